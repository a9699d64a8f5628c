"""Two rounds of reflow by the commands of infra/docs/training.md, and what is refused before that."""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import fm_core
from fm_core.config import merge
from fm_core.data.manifest import load_manifest
from tests.support import ROOT
from tests.support.page_commands import page_commands, starting_with
from tests.support.tiny_run import DEBUG, TINY, CommandOutput, TinyRun

PAGE = page_commands(ROOT / "infra" / "docs" / "training.md")
FILE = "infra/configs/digits-reflow.yaml"
SMALL = {
    "data": {"validation_images": 60, "pairs": {"validation_images": 4}},
    "model": TINY["model"],
    "train": {"images": 32, "global_batch": 16, "warmup_images": 0, "schedule": "constant", "log_images": 16},
    "launch": {"processes": 1, "threads": 1},
    "sample": {"images": 20, "batch": 8},
    "evaluate": {"likelihood": {"images": 2, "batch": 2, "rtol": 0.1, "atol": 0.1}},
}
FEW = ("--sample.images", "20", "--sample.batch", "8")
"""Arguments of the commands that sample."""


@dataclass
class Rounds:
    """The folder of a teacher, runs/digits, and of two students; output of each command of the page."""

    root: Path
    outputs: dict[str, CommandOutput]

    def fm(self, line: str, *arguments: str) -> CommandOutput:
        """A command like those of the page, in the folder and in this process."""
        _, command, option, file, *words = shlex.split(line)
        assert option == "--config"
        run = TinyRun(self.root, "page")
        run.file = Path(file)
        few = FEW if command in ("sample", "evaluate", "report") else ()
        return run.fm(command, *DEBUG, *words, *few, *arguments)

    def succeed(self, line: str, *arguments: str) -> str:
        done = self.fm(line, *arguments)
        assert done.code == 0, done.err
        return done.out + done.err

    def refuse(self, line: str, *arguments: str) -> str:
        """The last line of a command that is refused."""
        done = self.fm(line, *arguments)
        assert done.code == 2, done.err
        return done.err.splitlines()[-1]


@pytest.fixture(scope="module")
def reflow_rounds(tiny) -> Rounds:
    """The tiny run as the teacher runs/digits, and every command of the page in order.

    It is class-conditional, while that of the page is not.
    """
    tiny.copy("digits")
    file = tiny.root / FILE
    file.parent.mkdir(parents=True)
    shown = yaml.safe_load((ROOT / FILE).read_text())
    shown["data"]["root"] = str(tiny.root / "data")
    file.write_text(yaml.safe_dump(merge(shown, SMALL)))
    rounds = Rounds(tiny.root, {})
    for line in starting_with("fm ", PAGE):
        rounds.outputs[line] = rounds.fm(line)
        assert rounds.outputs[line].code == 0, (line, rounds.outputs[line].err)
    return rounds


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores_of(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(run.glob("evaluation/*/*.json"))]


def test_each_round_is_trained_on_the_samples_of_the_one_before(reflow_rounds):
    runs = reflow_rounds.root / "runs"
    teacher = fm_core.load(runs / "digits").model
    for seed, name in enumerate(("digits-reflow", "digits-reflow-2"), start=1):
        model = fm_core.load(runs / name).model
        assert model.pairs["protocol"]["weights_sha256"] == teacher.weights_sha256
        assert model.pairs["protocol"]["seed"] == seed
        assert (model.coupling, model.conditional) == ("reflow", True)
        assert lines_of(runs / name / "train" / "metrics.jsonl")[-1]["images_seen"] == 32
        assert lines_of(runs / name / "train" / "held_out.jsonl")[-1]["loss"] > 0
        teacher = model


def test_scores_and_bits_are_those_of_real_images(reflow_rounds):
    student, teacher = (scores_of(reflow_rounds.root / "runs" / name) for name in ("digits-reflow", "digits"))
    manifest = load_manifest(str(reflow_rounds.root / "data"), "digits")
    protocol = student[0]["protocol"]
    assert protocol["data_version"] == manifest.version
    assert protocol["reference"] == f"train, {manifest.splits['train'].images} images"
    # The distance of real validation images is that of the teacher's scores.
    real = "frechet_distance_of_held_out"
    assert student[0][real]["value"] in [scores[real]["value"] for scores in teacher]
    assert student[0]["bits_per_dim"]["images"] == 2
    assert "noise" not in protocol


def test_report_export_and_status_name_the_pairs(reflow_rounds):
    run = reflow_rounds.root / "runs" / "digits-reflow"
    made_of = "20 samples of step 20 of the weights"
    assert f"but on pairs of noise and sample: {made_of}" in (run / "report.html").read_text()
    reflow_rounds.succeed(f"fm export --config {run}/config.yaml")
    (card,) = run.glob("export/*/README.md")
    assert f"| training pairs | {made_of}" in card.read_text()
    assert "export done" in reflow_rounds.succeed(f"fm status --config {run}/config.yaml")


def test_samples_at_the_noise_of_the_pairs_are_marked(reflow_rounds):
    command = "fm sample --config runs/digits-reflow/config.yaml"
    assert "noise that it has seen" in reflow_rounds.succeed(command, "--sample.seed", "1")
    assert "noise that it has seen" not in reflow_rounds.succeed(command, "--sample.seed", "7")
    reflow_rounds.succeed(command.replace("sample", "evaluate"), "--sample.seed", "1")
    marks = [
        scores["protocol"].get("noise") for scores in scores_of(reflow_rounds.root / "runs/digits-reflow")
    ]
    assert sorted(map(str, marks)) == ["None"] * (len(marks) - 1) + ["that of the training pairs"]


def test_a_student_has_no_score_for_stochastic_solvers(reflow_rounds):
    command = "fm sample --config runs/digits-reflow/config.yaml --sample.solver sde --sample.steps 4"
    assert "the coupling reflow does not determine it" in reflow_rounds.refuse(command)


def test_other_pairs_under_the_name_of_a_run_are_refused(reflow_rounds):
    message = reflow_rounds.refuse(
        f"fm train --config {FILE} --train.images 48 --data.pairs.samples runs/digits-reflow/pairs"
    )
    assert "pairs.version was" in message


def test_pairs_may_be_moved_and_a_complete_run_no_longer_needs_them(reflow_rounds):
    moved = reflow_rounds.root / "moved"
    shutil.copytree(reflow_rounds.root / "runs" / "digits" / "pairs", moved)
    train = f"fm train --config {FILE}"
    assert "verified" in reflow_rounds.succeed(f"{train} --data.pairs.samples gone")
    assert "48 images" in reflow_rounds.succeed(f"{train} --train.images 48 --data.pairs.samples {moved}")


def test_wrong_pairs_are_refused_in_one_line_without_files(reflow_rounds):
    pairs, damaged = reflow_rounds.root / "runs" / "digits" / "pairs", reflow_rounds.root / "damaged"
    shutil.copytree(pairs, damaged)
    tar = next(damaged.glob("*/*/floats-000001.tar"))
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(bytes(content))
    for arguments, message in (
        (f"--data.pairs.samples {damaged}", "floats-000001.tar is missing or damaged; run fm sample"),
        ("--data.pairs.samples nowhere", "there is no sample set; run fm sample"),
        ("--run.generator numpy-v1", "set run.generator: philox-v1"),
        ("--method.path variance-preserving", "use optimal-transport"),
        ("--data.horizontal_flip true", "a flipped sample is not the end"),
        ("--method.coupling independent", "data.pairs.samples needs method.coupling: reflow"),
    ):
        assert message in reflow_rounds.refuse(f"fm train --config {FILE} --run.name refused {arguments}")
    assert not (reflow_rounds.root / "runs" / "refused").exists()
