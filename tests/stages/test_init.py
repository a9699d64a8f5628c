"""fm init: from a folder of images to a configuration that trains."""

import numpy as np
import pytest
import torch
import yaml

from fm_core import cli
from fm_core.config import load_config
from fm_core.config.derived_defaults import validation_images_for
from fm_core.errors import UserError
from fm_core.launch.dispatch import world
from fm_core.models.build import build_meta_network
from fm_core.run.directory import RunDirectory
from fm_core.stages import init as init_module
from fm_core.stages.init import init
from fm_core.stages.preflight import preflight
from fm_core.training.throughput import Throughput, measure_throughput
from tests.support.photographs import crops, encoded, write_tree


def fast(config, shape, classes, batch):
    return Throughput(1e5, 1, "a test", None)


def photographs(folder, classes=("china", "flower"), count=30, prefix=""):
    images = crops(count * max(1, len(classes)), 12)
    names = [
        f"{prefix}{classes[i % len(classes)]}/{i}.png" if classes else f"{prefix}{i}.png"
        for i in range(len(images))
    ]
    return write_tree(folder, {name: encoded(image) for name, image in zip(names, images, strict=True)})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_names_what_was_found_and_its_values_pass_every_check(here):
    photographs(here / "My photos")
    made = init("My photos", size=8, measure=fast)
    assert made.path.name == "My-photos.yaml"
    text, config = made.path.read_text(), load_config(made.path)
    for fact in ("60 images", "54 in train, 6 in val", "Classes: 2: china, flower.", "format folder"):
        assert fact in text, text
    for advice in ("What to change first", "train longer", "measured", "--sample.guidance", "train-images"):
        assert advice in text, text
    assert config == made.config
    assert config.data.source.url == str(here / "My photos")
    assert (config.data.source.image_size, config.data.name) == (8, "My-photos")
    assert (config.model.class_conditional, config.train.label_dropout) == (True, 0.1)
    assert config.model.time_scale == 10
    assert config.train.global_batch % world(config.launch)[0] == 0
    preflight(config)
    assert not (here / "runs").exists()


def test_its_last_lines_are_the_two_commands_that_come_next(here):
    photographs(here / "pets")
    lines = init("pets", size=8, measure=fast).text().splitlines()
    assert lines[-2:] == ["  fm shard --config pets.yaml", "  fm train --config pets.yaml"]


def test_images_without_classes_are_not_conditional(here):
    photographs(here / "flat", classes=())
    made = init("flat", size=8, name="n", measure=fast)
    assert not made.config.model.class_conditional
    assert "Classes: none." in made.path.read_text()
    assert "needs evaluate.features inception" in " ".join(made.path.read_text().replace("#", "").split())


def test_a_split_of_its_own_is_named_and_not_drawn(here):
    photographs(here / "split", prefix="train/", count=20)
    photographs(here / "split", prefix="val/", count=3)
    made = init("split", size=8, measure=fast)
    assert made.source.own_split
    assert made.source.splits == {"train": 40, "val": 6}
    assert "validation_images" not in yaml.safe_load(made.path.read_text())["data"]


def test_a_split_of_its_own_may_have_the_size_of_a_drawn_one(here):
    photographs(here / "split", prefix="train/", count=20)
    photographs(here / "split", prefix="val/", count=2)
    made = init("split", size=8, measure=fast)
    assert made.source.splits == {"train": 40, "val": validation_images_for(40)}
    assert made.source.own_split


def test_what_is_ignored_is_in_the_file_and_among_its_last_lines(here):
    photographs(here / "pets", classes=("images", "masks"))
    write_tree(here / "pets", {"images/notes.pdf": b"x"})
    made = init("pets", size=8, measure=fast)
    for note in ("note: annotations is ignored: masks (30 images)", "not read: 1 .pdf"):
        assert f"# {note}" in made.path.read_text()
        assert note in made.text()


def test_by_default_images_become_64_pixels(here):
    photographs(here / "pets")
    made = init("pets", measure=fast)
    assert made.config.data.source.image_size == 64
    build_meta_network(made.config.model, (3, 64, 64), 2)


def test_on_a_slow_machine_the_network_is_narrow_and_the_samples_are_few(here, monkeypatch):
    photographs(here / "pets", count=10)
    monkeypatch.setattr(init_module, "device_count", lambda: 0)
    slow = init("pets", name="slow", measure=lambda *_: Throughput(2.0, 1, "a test", None)).config
    swift = init("pets", name="swift", measure=fast).config
    assert slow.model.channels < swift.model.channels
    assert slow.sample.images < swift.sample.images
    assert (slow.sample.solver, swift.sample.solver) == ("midpoint", "ab2")


def test_what_fits_into_a_gpu_in_one_piece_is_not_divided(here):
    photographs(here / "pets")

    def fits(config, shape, classes, batch):
        return Throughput(1e4, 1, "a GPU", batch)

    plain, fitting = (
        init("pets", name=name, size=8, measure=measure).config.train
        for name, measure in (("plain", fast), ("fitting", fits))
    )
    assert (fitting.micro_batch, fitting.global_batch) == (plain.micro_batch, plain.global_batch)


def test_what_does_not_fit_into_a_gpu_is_divided(here):
    photographs(here / "pets")
    config = init("pets", size=8, measure=lambda *_: Throughput(1e4, 1, "a GPU", 12)).config
    share = config.train.global_batch // world(config.launch)[0]
    assert config.train.micro_batch == 12
    assert share % 12 == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("missing",), "missing: does not exist"),
        (("empty",), "no format recognized under"),
        (("text",), "no format recognized under"),
        (("pets", "--size", "2"), "data.source.image_size"),
        (("pets", "--size", "many"), "--size"),
        (("pets", "--name", "../up"), "run.name"),
        (("pets", "--name", "taken"), "taken.yaml exists"),
        (("pets", "--name", "trained"), "runs/trained is a trained run"),
        (("https://me:secret@host/pets",), "a URL with a password or a token in it"),
        ((), "FOLDER_OR_URL"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused_in_one_line_and_writes_nothing(here, capsys, arguments, named):
    photographs(here / "pets", count=8)
    write_tree(here / "text", {"a/notes.txt": b"nothing to see"})
    (here / "empty").mkdir()
    (here / "taken.yaml").write_text("kept")
    RunDirectory(load_of({"run": {"name": "trained"}})).bind()
    before = sorted(here.rglob("*"))
    try:
        code = cli.main(["init", *arguments])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(err) == 1
    assert named in err[0]
    assert "secret" not in err[0]
    assert sorted(here.rglob("*")) == before
    assert (here / "taken.yaml").read_text() == "kept"


def load_of(tree):
    from fm_core.config import parse_config

    return parse_config(tree, "here")


def test_names_of_classes_cannot_break_the_file(here):
    odd = ["a: b", "#c", "line\nbreak", "\u2028", "'\"", "猫"]
    photographs(here / "odd", classes=odd, count=4)
    made = init("odd", size=8, measure=fast)
    assert made.source.classes == len(odd)
    assert load_config(made.path) == made.config


def test_the_command_measures_this_machine(here, capsys, monkeypatch):
    monkeypatch.setattr("fm_core.training.throughput.MEASURED_SECONDS", 0.0)
    photographs(here / "pets")
    before = torch.get_rng_state()
    assert cli.main(["init", "pets", "--size", "8"]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert "images/s, measured on" in capsys.readouterr().out


def test_the_measurement_counts_images():
    config = load_of({"model": {"class_conditional": True}})
    speed = measure_throughput(config, (3, 8, 8), 10, batch=4)
    assert np.isfinite(speed.images_per_s)
    assert speed.images_per_s > 0


def test_an_error_of_the_source_is_that_of_the_first_size(here):
    write_tree(here / "npz", {"train_data_batch_1": b"not a pickle"})
    with pytest.raises(UserError) as caught:
        init("npz", measure=fast)
    assert "\n" not in str(caught.value)
    assert not list(here.glob("*.yaml"))
