"""infra/docs/your-own-images.md, executed on fewer images with a smaller network, and what binds a run."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fm_core import cli
from fm_core.config import RunConfig, load_config
from fm_core.config.derived_defaults import DatasetSize, absent_keys, with_derived
from fm_core.evaluation.features import classifier_features
from fm_core.run.directory import RunDirectory
from tests.support import ROOT

PAGE = (ROOT / "infra" / "docs" / "your-own-images.md").read_text(encoding="utf-8")
TRAIN = ("--train.images", "128", "--train.global_batch", "32", "--train.warmup_images", "32")
SAMPLE = ("--sample.images", "8", "--sample.solver", "euler", "--sample.steps", "2")
OPTIONS = ("--launch.kind", "debug", "--launch.threads", "1")
METRICS = ("--evaluate.metrics", '["frechet_distance"]')
SMALL_NETWORK = ("--model.channels", "8", "--model.head_channels", "8", "--model.residual_blocks", "1")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line.strip()]


def make_crops(count: int) -> None:
    (script,) = blocks("python")
    script, replaced = re.subn(r"CROPS, SIDE = \S+, (\d+)", rf"CROPS, SIDE = {count}, \1", script)
    assert replaced == 1
    exec(compile(script, "your-own-images.md", "exec"), {})


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder in which the page was followed: photographs, configuration, run."""
    root = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("fm_core.training.throughput.MEASURED_SECONDS", 0.0)
        patch.setattr(classifier_features, "training_steps", lambda images: 20)
        make_crops(30)
        for command in commands():
            if command[0] == "fm":
                stage, *arguments = command[1:]
                if stage != "init":
                    arguments += [*OPTIONS, *SMALL_NETWORK, *TRAIN, *SAMPLE, *METRICS]
                assert cli.main([stage, *arguments]) == 0, command
    return root


def fm(monkeypatch, capsys, root: Path, *arguments: str) -> tuple[int, str]:
    monkeypatch.chdir(root)
    code = cli.main([*arguments, *OPTIONS])
    lines = capsys.readouterr().err.splitlines()
    return code, next((line for line in lines if line.startswith("fm: ")), "")


def test_the_page_ends_with_samples_scores_and_a_report(project):
    run = project / "runs" / "photographs"
    assert (run / "report.html").stat().st_size > 10_000
    (grid,) = run.glob("samples/*/*/grid.png")
    assert grid.read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("evaluation/*/*.json"))
    config = load_config(run / "config.yaml")
    assert (config.model.class_conditional, config.data.source.format) == (True, "folder")


def test_every_command_of_the_readme_on_photographs_is_on_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [
        line for line in readme.splitlines() if line.startswith(("fm ", "prefect ")) and "photographs" in line
    ]
    page = [" ".join(command) for command in commands()]
    assert shown
    assert [line for line in shown if line.replace("--size 64", "--size 16") not in page] == []


def test_its_pictures_exist():
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "infra" / "docs" / link).exists()] == []


@pytest.fixture(scope="module")
def two_keys(project) -> Path:
    """A file with the two keys that the page says are enough."""
    (text,) = blocks("yaml")
    folder = project / "two-keys"
    folder.mkdir()
    (folder / "two.yaml").write_text(text)
    (folder / "photographs").symlink_to(project / "photographs")
    return folder


def test_two_keys_are_enough_and_a_refused_start_leaves_no_trace(two_keys, monkeypatch, capsys):
    """Shards, refused starts with other values, then training with derived values that are recorded."""
    assert sorted(absent_keys(load_config(two_keys / "two.yaml"))) == ["data", "model", "train"]
    file, run = ("--config", "two.yaml"), two_keys / "runs" / "run"
    code, message = fm(monkeypatch, capsys, two_keys, "train", *file)
    assert (code, "manifest.json is missing" in message) == (2, True), message
    assert not (two_keys / "runs").exists()
    assert fm(monkeypatch, capsys, two_keys, "shard", *file)[0] == 0
    assert (two_keys / "datasets" / "photographs" / "manifest.json").exists()
    assert not (run / "config.yaml").exists()
    for wrong in (
        ("--model.attention_resolutions", "[5]"),
        ("--train.init_from", "missing"),
        ("--train.micro_batch", "3"),
    ):
        before = sorted(run.rglob("*"))
        code, message = fm(monkeypatch, capsys, two_keys, "train", *file, *wrong)
        assert code == 2, message
        assert not (run / "config.yaml").exists()
        assert not (run / "train").exists()
        assert sorted(run.rglob("*")) == before
    short = ("--train.images", "64", "--train.global_batch", "32")
    code, message = fm(monkeypatch, capsys, two_keys, "train", *file, *SMALL_NETWORK, *short)
    assert code == 0, message
    recorded = load_config(run / "config.yaml")
    expected = with_derived(
        RunConfig.model_validate(
            {
                "model": {"channels": 8, "head_channels": 8, "residual_blocks": 1},
                "train": {"images": 64, "global_batch": 32},
            }
        ),
        DatasetSize(16, 54),
    )
    assert recorded.model == expected.model
    assert recorded.train == expected.train
    assert (recorded.data.name, recorded.data.validation_images) == ("photographs", 6)
    # Later starts take absent keys from the run.
    code, message = fm(monkeypatch, capsys, two_keys, "sample", *file, *SAMPLE, *short)
    assert code == 0, message
    code, message = fm(monkeypatch, capsys, two_keys, "train", *file, *short, "--model.channels", "16")
    assert (code, "model.channels was 8 and is now 16" in message) == (2, True), message


def test_images_without_classes_train_and_are_reported_without_scores(project, tmp_path, monkeypatch, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted((project / "photographs").glob("*/*.png"))[:20]):
        (flat / f"{number}.png").symlink_to(image)
    tree = {
        "data": {"source": {"url": str(flat), "image_size": 8}},
        "model": {"channels": 8, "head_channels": 8},
        "train": {"images": 32, "global_batch": 16},
        "sample": {"images": 8, "solver": "euler", "steps": 2},
    }
    (tmp_path / "flat.yaml").write_text(yaml.safe_dump(tree))
    for stage in ("shard", "train", "sample", "report"):
        code, message = fm(monkeypatch, capsys, tmp_path, stage, "--config", "flat.yaml")
        assert code == 0, message
    from fm_core.commands import can_be_scored

    assert not can_be_scored(load_config("flat.yaml"))
    assert RunDirectory(load_config("flat.yaml")).report.exists()
