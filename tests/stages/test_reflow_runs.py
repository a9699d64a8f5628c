"""Two rounds of reflow by the commands, and what is refused before a file is written."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import fm_core
from fm_core.data.manifest import load_manifest
from tests.support.tiny_run import DEBUG, TinyRun

PAIRS = ("--sample.store", "float32", "--sample.images", "24", "--sample.seed")


@dataclass
class Rounds:
    """A teacher, the pairs that were made of each model, and the students that were trained on them."""

    teacher: TinyRun
    places: list[Path]
    students: list[TinyRun]


def student(teacher: TinyRun, name: str, place: Path, init_from: Path, **over) -> TinyRun:
    train = {
        "images": 32,
        "warmup_images": 0,
        "schedule": "constant",
        "log_images": 16,
        "init_from": str(init_from),
    }
    tree = {
        "data": {"horizontal_flip": False, "pairs": {"samples": str(place), "validation_images": 4}},
        "method": {"coupling": "reflow"},
        "train": train,
        "sample": {"steps": 1},
        "evaluate": {"likelihood": {"images": 2, "batch": 2}},
    }
    return TinyRun(teacher.root, name, {**tree, **over})


def succeed(run: TinyRun, command: str, *arguments: str) -> str:
    done = run.fm(command, *DEBUG, *arguments)
    assert done.code == 0, done.err
    return done.out + done.err


@pytest.fixture(scope="module")
def reflow_rounds(tiny) -> Rounds:
    """Pairs of the tiny run, a student, pairs of the student, and a student of the student."""
    rounds = Rounds(tiny, [], [])
    last = tiny
    for number in (1, 2):
        place = tiny.root / f"pairs-{number}"
        seed = str(number)
        # The tiny run is class-conditional; it was trained without label dropout, so nothing guides it.
        succeed(last, "sample", "--sample.root", str(place), *PAIRS, seed)
        next_one = student(tiny, f"reflow-{number}", place, last.path)
        succeed(next_one, "train")
        rounds.places.append(place)
        rounds.students.append(next_one)
        last = next_one
    return rounds


def metrics_of(run: TinyRun) -> list[dict]:
    return [json.loads(line) for line in (run.path / "train" / "metrics.jsonl").read_text().splitlines()]


def test_each_round_is_trained_on_the_samples_of_the_one_before(reflow_rounds):
    teacher = fm_core.load(reflow_rounds.teacher.path).model
    for number, run in enumerate(reflow_rounds.students, start=1):
        model = fm_core.load(run.path).model
        assert model.pairs["protocol"]["weights_sha256"] == teacher.weights_sha256
        assert model.pairs["protocol"]["seed"] == number
        assert (model.coupling, model.conditional) == ("reflow", True)
        assert metrics_of(run)[-1]["images_seen"] == 32
        held_out = json.loads((run.path / "train" / "held_out.jsonl").read_text().splitlines()[-1])
        assert held_out["loss"] > 0
        teacher = model


def test_scores_bits_and_memorization_are_those_of_real_images(reflow_rounds):
    run = reflow_rounds.students[0]
    succeed(run, "sample")
    succeed(run, "evaluate", "--evaluate.metrics", '["frechet_distance", "memorization"]')
    (scores,) = [json.loads(file.read_text()) for file in (run.path / "evaluation").glob("*/*.json")]
    (teachers, *_) = [
        json.loads(file.read_text()) for file in (reflow_rounds.teacher.path / "evaluation").glob("*/*.json")
    ]
    manifest = load_manifest(run.config.data.root, "digits")
    assert scores["protocol"]["data_version"] == manifest.version
    assert scores["protocol"]["reference"].startswith("train")
    # The distance of real validation images is that of the teacher's scores.
    real = "frechet_distance_of_held_out"
    assert scores[real]["value"] == teachers[real]["value"]
    assert scores["bits_per_dim"]["images"] == 2
    assert "noise" not in scores["protocol"]


def test_report_export_and_status_name_the_pairs(reflow_rounds):
    run = reflow_rounds.students[0]
    succeed(run, "sample")
    succeed(run, "report")
    report = (run.path / "report.html").read_text()
    assert "Not trained on these images, but on pairs of noise and sample: 24 samples of step 20" in report
    assert "step" in succeed(run, "export")
    (card,) = run.path.glob("export/*/README.md")
    assert "| training pairs | 24 samples of step 20 of the weights" in card.read_text()
    assert "32 images" in run.fm("status").out or "done" in run.fm("status").out


def test_samples_at_the_noise_of_the_pairs_are_marked(reflow_rounds):
    run = reflow_rounds.students[0]
    assert "noise that it has seen" in succeed(run, "sample", "--sample.seed", "1")
    assert "noise that it has seen" not in succeed(run, "sample", "--sample.seed", "7")


def test_a_student_is_sampled_without_noise_in_its_steps_only(reflow_rounds):
    done = reflow_rounds.students[0].fm("sample", *DEBUG, "--sample.solver", "sde", "--sample.steps", "4")
    assert done.code == 2
    assert "the coupling reflow does not determine it" in done.err


def test_other_pairs_under_the_name_of_a_run_are_refused(reflow_rounds):
    run, other = reflow_rounds.students[0], reflow_rounds.places[1]
    done = run.fm("train", *DEBUG, "--data.pairs.samples", str(other))
    assert done.code == 2
    assert "data.pairs.samples was 'pairs-1' and is now 'pairs-2'" in done.err


def test_replaced_pairs_are_found_by_their_hash(reflow_rounds, tmp_path):
    """Another set in a folder of the same name; its tars differ from those that the checkpoint records."""
    replaced = tmp_path / "pairs-1"
    shutil.copytree(reflow_rounds.places[1], replaced)
    reflow_rounds.students[0].copy("reflow-replaced")
    run = student(reflow_rounds.teacher, "reflow-replaced", replaced, reflow_rounds.teacher.path)
    done = run.fm("train", *DEBUG, "--train.images", "48")
    assert done.code == 2
    assert "pairs.version was" in done.err


def test_a_complete_run_no_longer_needs_its_pairs(reflow_rounds):
    run = reflow_rounds.students[1].copy("reflow-without-pairs")
    run = student(reflow_rounds.teacher, "reflow-without-pairs", run.root / "gone" / "pairs-2", run.path)
    assert "verified" in succeed(run, "train")


def test_wrong_pairs_are_refused_in_one_line_without_files(reflow_rounds):
    teacher, place = reflow_rounds.teacher, reflow_rounds.places[0]
    damaged = teacher.root / "damaged"
    shutil.copytree(place, damaged)
    tar = next(damaged.glob("*/*/floats-000001.tar"))
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(bytes(content))
    for samples, keys, message in (
        (damaged, {}, "floats-000001.tar is missing or damaged; run fm sample to make it again"),
        (teacher.root / "nowhere", {}, "there is no sample set; run fm sample"),
        (place, {"run": {"generator": "numpy-v1"}}, "set run.generator: philox-v1"),
        (place, {"method": {"coupling": "reflow", "path": "variance-preserving"}}, "use optimal-transport"),
    ):
        run = student(teacher, "reflow-refused", samples, teacher.path, **keys)
        done = run.fm("train", *DEBUG)
        assert done.code == 2
        assert message in done.err.splitlines()[-1]
        assert not run.path.exists()
