"""`fm shard --dry-run` and `fm validate` say how a source is read; the dry run writes a picture only."""

import numpy as np
import pytest
from PIL import Image

from fm_core.cli import main
from tests.support.layout_cases import classes
from tests.support.photographs import write_tree
from tests.support.source_cases import tree


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    files = classes("train/") | classes("Valid/", 11) | classes("test/", 21) | {"train/cat/a.heic": b"x"}
    root = write_tree(tmp_path / "pets", tree(files))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "pets.yaml").write_text(
        f"run: {{root: {tmp_path}/runs, name: pets}}\n"
        f"data:\n  root: {tmp_path}/sets\n  name: pets\n"
        f"  source: {{format: folder, url: {root}, image_size: 8}}\n"
        "model: {attention_resolutions: []}\n"
    )
    return lambda stage, *flags: main([stage, "--config", str(tmp_path / "pets.yaml"), *flags])


def test_a_dry_run_shows_splits_classes_and_pictures_and_writes_nothing(command_line, tmp_path, capsys):
    assert command_line("shard", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "images: 4 train + 4 val (8 x 8 pixels, 3 channels, 256 intensity levels)" in lines
    assert "splits: train from train (4 images); val from Valid (4 images)" in lines
    assert "classes: 2: 0 = cat, 1 = dog (by the first folder below the split)" in lines
    assert "not read: 1 .heic" in lines
    assert "note: test is ignored: test (4 images)" in lines
    assert not (tmp_path / "sets").exists()
    assert not (tmp_path / "runs").exists()
    picture = np.asarray(Image.open(lines[-1].removeprefix("picture: ")))
    tiles = {tuple(int(value) for value in picture[40, column]) for column in (40, 150)}
    assert tiles <= {(number, 0, 77) for number in (1, 2, 3, 4)}
    assert len(tiles) == 2


def test_validate_prints_how_the_source_was_read(command_line, capsys):
    assert command_line("shard") == 0
    assert "not read: 1 .heic" in capsys.readouterr().out
    assert command_line("validate") == 0
    out = capsys.readouterr().out
    for text in (
        "val from Valid (4 images)",
        "0 = cat, 1 = dog",
        "transparent pixels on white",
        "test is ignored",
    ):
        assert text in out


def test_a_dry_run_of_a_missing_source_is_refused(command_line, tmp_path, capsys):
    assert command_line("shard", "--dry-run", "--data.source.url", str(tmp_path / "nowhere")) == 2
    assert "no images under" in capsys.readouterr().err
