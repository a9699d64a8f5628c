"""Sampling with any number of processes, image grids, exported models and pretrained weights."""

import json
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fm_core import cli, load
from fm_core.config import RunConfig, parse_config
from fm_core.config.location import Location
from fm_core.config.section import Section
from fm_core.errors import UserError
from fm_core.models.build import build_network
from fm_core.sampling.sample_store import SampleSet
from fm_core.sampling.sample_worker import TRAJECTORY_FRAMES
from fm_core.stages.export import _public_tree
from fm_core.storage.atomic_files import read_json
from fm_core.training.pretrained import pretrained_weights
from tests.support import ROOT
from tests.support.tiny_run import is_progress


@pytest.fixture(scope="module")
def run(tiny):
    return tiny.copy("shared")


@pytest.fixture
def fm(run, capsys, monkeypatch):
    monkeypatch.chdir(run.root)

    def call(*arguments, code=0):
        assert cli.main(list(arguments)) == code
        out = capsys.readouterr()
        return out.out if code == 0 else [line for line in out.err.splitlines() if not is_progress(line)]

    return call


def tars_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("samples-*.tar"))}


DOPRI5 = (
    "--sample.solver",
    "dopri5",
    "--sample.steps",
    "null",
    "--sample.rtol",
    "0.1",
    "--sample.atol",
    "0.1",
)


@pytest.mark.parametrize("solver", [DOPRI5, ()], ids=["adaptive", "fixed"])
def test_one_two_and_three_processes_make_the_same_images(run, forked_ranks, solver):
    """On one kind of machine, with the same threads a process, to the last bit."""
    made = [] if solver else [tars_of(run.path)]  # in the calling process, with euler
    for count in (1, 2, 3):
        root = run.root / f"samples-{len(solver)}-{count}"
        called = run.fm("sample", "--launch.processes", str(count), "--sample.root", str(root), *solver)
        assert called.code == 0, called.err
        made.append(tars_of(root))
    assert len(made[0]) == 3
    assert all(tars == made[0] for tars in made)


@pytest.fixture(scope="module")
def sampled_by_a_job(run):
    """Folder of the samples that two processes of the local launcher made."""
    root = run.root / "samples-of-a-job"
    called = run.fm("sample", "--sample.root", str(root))
    assert called.code == 0, called.err
    return root


def test_a_job_makes_the_images_that_the_calling_process_makes(run, sampled_by_a_job):
    assert len(tars_of(run.path)) == 3
    assert tars_of(sampled_by_a_job) == tars_of(run.path)


def test_a_grid_has_a_row_for_each_class(run):
    (folder,) = (run.path / "samples" / "step-00000020").glob("ema-euler-4-*")
    samples = SampleSet(run.config, 20, read_json(folder / "DONE.json")["protocol"])
    assert samples.store.local == folder
    images = torch.cat(list(samples.read((1, 8, 8))))[:, 0]
    labels = torch.cat([samples.read_labels(number) for number in range(samples.batches)]).tolist()
    with Image.open(folder / "grid.png") as grid:
        picture = torch.from_numpy(np.array(grid))
    margin, picture = picture[:, : -8 * 9 * 10], picture[:, -8 * 9 * 10 :]
    names = margin.unfold(0, 90, 90).flatten(1).amax(1)
    assert (names > 0).all()  # the name of its class beside each row
    sheet = picture[::10, ::10].unfold(0, 9, 9).unfold(1, 9, 9)  # a line of one pixel right of and below each
    assert torch.equal(picture, picture[::10, ::10].repeat_interleave(10, 0).repeat_interleave(10, 1))
    assert sheet.shape[:2] == (len(set(labels)), 8)
    assert len(set(labels)) > 2
    for row, label in zip(sheet[..., :8, :8], sorted(set(labels)), strict=True):
        cells = [image for image, of in zip(images, labels, strict=True) if of == label][:8]
        blank = torch.zeros(8 - len(cells), 8, 8)
        shown = (torch.cat([torch.stack(cells), blank]) * 255 / 16).round().to(torch.uint8)
        assert torch.equal(row, shown), label


def test_trajectories_are_a_strip_and_an_animated_picture(run):
    (folder,) = (run.path / "samples" / "step-00000020").glob("ema-euler-4-*")
    with Image.open(folder / "trajectory-animated.png") as moving:
        assert (moving.is_animated, moving.n_frames) == (True, TRAJECTORY_FRAMES)
    with Image.open(folder / "trajectory.png") as strip:
        assert (strip.width, strip.height) == (9 * 9 * 6, 8 * 9 * 6)
    assert "from noise to image" in (run.path / "report.html").read_text()


@pytest.fixture(scope="module")
def exported(run):
    """Folder of an exported model."""
    folder = run.root / "given-away"
    called = run.fm("export", "--export.folder", str(folder))
    assert called.out.startswith("export done"), called.err
    return folder


def test_an_exported_folder_describes_its_model(run, exported, fm):
    assert {path.name for path in exported.iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "README.md",
        "scores.json",
    }
    card = (exported / "README.md").read_text()
    version = json.loads((run.root / "data" / "digits" / "manifest.json").read_text())["version"]
    for text in (
        version,
        "flow-matching on the path optimal-transport",
        "320 images in 20 steps",
        "Fréchet",
    ):
        assert text in card
    assert "Protocol of" in card
    assert "FID" not in card
    arguments = ("export", "--config", str(run.file), "--export.folder", str(exported))
    assert fm(*arguments).startswith("export verified")
    (error,) = fm(*arguments, "--sample.weights", "raw", code=2)
    assert "contains another model" in error


@pytest.fixture(scope="module")
def drawn_elsewhere(exported):
    """Images drawn from the exported folder by a process without access to the run."""
    script = (
        "import fm_core, torch; model = fm_core.load('given-away', device='cpu'); "
        "images = model.sample(8, solver='euler', steps=4); torch.save(images, 'images.pt')"
    )
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=exported.parent, env=environment, check=True)
    return torch.load(exported.parent / "images.pt")


def test_an_exported_folder_loads_anywhere_without_the_run(run, drawn_elsewhere):
    expected = load(run.path, device="cpu").sample(8, solver="euler", steps=4)
    assert torch.equal(drawn_elsewhere, expected)


class TestCompare:
    def test_runs_share_one_table_and_their_differences_are_listed(self, run, fm):
        out = fm("evaluate", "--config", str(run.file))
        file = run.root / out.split("  scores: ")[1].strip()
        other = run.root / "other" / "evaluation" / "step-00000040" / file.name
        other.parent.mkdir(parents=True)
        scores = json.loads(file.read_text())
        scores["protocol"] |= {"solver": "midpoint", "weights_sha256": "0" * 64}
        other.write_text(json.dumps(scores))
        alone = fm("compare", str(file), str(file))
        assert "have different protocols" not in alone
        both = fm("compare", str(file), str(run.root / "other"))
        assert "| other step-00000040 | B |" in both
        assert "- solver: A: euler; B: midpoint" in both
        assert "weights_sha256" not in both

    def test_what_has_no_scores_is_refused_in_one_line(self, run, fm, tmp_path):
        (error,) = fm("compare", str(tmp_path), code=2)
        assert "has no scores" in error
        (error,) = fm("compare", str(run.path / "train" / "DONE.json"), code=2)
        assert "has no scores" in error


def test_training_starts_from_anothers_weights_only_where_they_fit(tiny, tmp_path):
    network = build_network(tiny.config.model, (1, 8, 8), 10)
    weights = pretrained_weights(str(tiny.path), network)
    assert weights.keys() == network.state_dict().keys()
    with pytest.raises(UserError, match=r"has no complete checkpoint"):
        pretrained_weights(str(tmp_path), network)
    wider = build_network(tiny.config.model.model_copy(update={"channels": 16}), (1, 8, 8), 10)
    with pytest.raises(UserError, match=r"is of another network"):
        pretrained_weights(str(tiny.path), wider)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"missing from|only in"):
        pretrained_weights(str(tmp_path / "a.safetensors"), network)
    with pytest.raises(UserError, match=r"cannot be read"):
        pretrained_weights(str(tmp_path / "none.safetensors"), network)


def locations(section: type[Section] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of the keys that are paths or URLs."""
    names = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += locations(field.annotation, f"{prefix}{name}.")
        elif any(mark in (*field.metadata, *str_of(field.annotation)) for mark in Location.__metadata__):
            names.append(f"{prefix}{name}")
    return names


def str_of(annotation) -> tuple:
    """Marks of the type in an optional type."""
    return tuple(mark for part in get_args(annotation) for mark in getattr(part, "__metadata__", ()))


def test_the_configuration_of_an_export_to_the_hub_has_no_places_of_this_machine():
    names = locations()
    assert {"data.root", "data.pairs.samples", "evaluate.weights", "train.init_from"} <= set(names)
    tree = {}
    for name in names:
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = f"/home/alice/{key}.npz"
    extractor = {
        "features": "/home/alice/other.pt",
        "weights": "/home/alice/w",
        "reference": "/home/alice/r.npz",
    }
    tree["evaluate"] |= {"features": "/home/alice/network.pt", "extractors": [extractor]}
    tree["method"] = {"coupling": "reflow"}
    tree["sweep"] = {"axes": {"evaluate.weights": ["/home/alice/1.pth", "/home/alice/2.pth"]}}
    tree["sample"] |= {"guidance": 2}
    tree["launch"] |= {"kind": "ssh"}
    public = _public_tree(parse_config(tree, where="x"))
    assert "alice" not in json.dumps(public)
    assert public["evaluate"]["features"] == "network.pt"
    assert public["data"]["pairs"] == {"samples": "pairs"}, "the coupling reflow needs one"
