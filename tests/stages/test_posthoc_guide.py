"""Averages of new widths as the model and as the model that guides it, with several processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.weights_file import read_recipe
from fm_core.commands import stage_functions
from fm_core.config import RunConfig, merge, parse_config
from fm_core.errors import UserError
from fm_core.launch.worker_main import Rank
from fm_core.run.directory import RunDirectory
from fm_core.sampling.sample_worker import sample as sample_rank
from fm_core.stages import sample as sample_stage
from fm_core.storage.atomic_files import read_json
from fm_core.sweep.sweep_checks import checked_points
from fm_core.training.ema import power_name
from tests.support.random_checkpoint import checkpoint, config_at

WIDTHS = (0.05, 0.1)
LAST = 40


def keys(runs: Path, **sample) -> RunConfig:
    """A run with snapshots, sampled with a width that training did not store."""
    tree = config_at(runs).model_dump(mode="json")
    over = {
        "train": {"ema_power_widths": list(WIDTHS), "snapshot_images": 10},
        "launch": {"processes": 2, "threads": 1},
        "sample": {
            "weights": "ema-power-0.07",
            "guidance": 2.0,
            "guide": {"weights": "ema-power-0.12"},
            "trajectories": 0,
            **sample,
        },
    }
    return parse_config(merge(tree, over), where="x")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Root of a run with snapshots of random weights and a checkpoint at its last step."""
    root = tmp_path_factory.mktemp("snapshots")
    config = keys(root)
    folder = checkpoint(config, step=LAST)
    recipe = {"recipe": json.dumps(read_recipe(folder / "raw.safetensors"))}
    snapshots = CheckpointCatalog.of(config).snapshots()
    for number, step in enumerate(range(5, LAST + 1, 5)):
        assert snapshots.begin(step) is None
        for width in WIDTHS:
            tensors = random_tensors(folder, number + 100 * width)
            assert snapshots.write(step, power_name(width), tensors, recipe) is None
        assert snapshots.finish(TrainState(step=step, applied_steps=step)) is None
    return root


def random_tensors(folder: Path, seed: float) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(int(1000 * seed))
    tensors = load_file(folder / "raw.safetensors")
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


@pytest.fixture
def root(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "runs")
    return tmp_path / "runs"


def in_process(processes: int, before=lambda stage_job: None):
    """Replacement of `supervise` whose ranks run one after another in this process."""

    def supervise(stage_job, observe):
        stage_job.control.mkdir(parents=True, exist_ok=True)
        before(stage_job)
        for number in range(processes):
            sample_rank(stage_job.config, Rank(number, processes, number, stage_job.control, "job"))
        assert stage_job.complete()

    return supervise


def tars(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(root.rglob("samples-*.tar"))}


def posthoc_files(root: Path) -> set[str]:
    return {file.name for file in root.rglob("ema-power-*.safetensors") if "snapshots" not in file.parts}


def remove_sources(root: Path) -> None:
    """Remove the averages and the checkpoint after the job was submitted, as retention may."""
    for file in root.rglob("ema-power-*.safetensors"):
        if "snapshots" not in file.parts:
            file.unlink()
    shutil.rmtree(next(root.glob(f"r/train/checkpoints/step-{LAST:08d}")))


def test_ranks_use_the_pinned_averages_of_the_model_and_of_its_guide(root, monkeypatch):
    monkeypatch.setattr(sample_stage, "supervise", in_process(1))
    assert posthoc_files(root) == set()
    first = sample_stage.sample(keys(root, root=str(root / "one")))
    assert posthoc_files(root) == {"ema-power-0.07.safetensors", "ema-power-0.12.safetensors"}
    pinned = []

    def retire(stage_job):
        pinned.extend(sorted(file.name for file in stage_job.control.glob("*.safetensors")))
        remove_sources(root)

    monkeypatch.setattr(sample_stage, "supervise", in_process(2, retire))
    second = sample_stage.sample(keys(root, root=str(root / "two")))
    assert pinned == ["guide.safetensors", "weights.safetensors"]
    assert len(tars(root / "one")) == 3
    assert tars(root / "two") == tars(root / "one")
    assert first.hashes == second.hashes
    assert list(root.rglob("guide.safetensors")) == []
    (done,) = (root / "two").rglob("DONE.json")
    protocol = read_json(done)["protocol"]
    assert (protocol["weights"], protocol["guide"]["step"]) == ("ema-power-0.07", LAST)


def test_another_width_of_the_guide_gives_other_images(root, monkeypatch):
    monkeypatch.setattr(sample_stage, "supervise", in_process(2))
    for width in ("0.12", "0.15"):
        guide = {"weights": f"ema-power-{width}"}
        sample_stage.sample(keys(root, root=str(root / width), guide=guide))
    assert tars(root / "0.12").keys() == tars(root / "0.15").keys()
    assert tars(root / "0.12") != tars(root / "0.15")


def test_jobs_of_several_processes_make_the_same_images(root, forked_ranks):
    """Post-hoc averages on both sides, in processes of their own."""
    made = []
    for processes in (1, 2, 3):
        config = keys(root, root=str(root / f"of-{processes}"))
        launch = config.launch.model_copy(update={"processes": processes})
        sample_stage.sample(config.model_copy(update={"launch": launch}))
        made.append(tars(root / f"of-{processes}"))
    assert len(made[0]) == 3
    assert made[1] == made[0]
    assert made[2] == made[0]


def test_a_sweep_over_widths_makes_every_average_before_it_starts(root):
    axes = {
        "sample.weights": ["ema-power-0.06", "ema-power-0.09"],
        "sample.guide.weights": ["ema-power-0.15"],
    }
    config = keys(root, guide={})
    config = parse_config(merge(config.model_dump(mode="json"), {"sweep": {"axes": axes}}), where="x")
    points = checked_points(config, stage_functions())
    assert [(point.config.sample.step, point.config.sample.guide.step) for point in points] == [
        (LAST, LAST)
    ] * 2
    assert posthoc_files(root) == {f"ema-power-{width}.safetensors" for width in ("0.06", "0.09", "0.15")}
    assert not (RunDirectory(config).path / "sweep").exists()


def test_a_width_that_snapshots_do_not_span_is_refused_with_its_point(root):
    config = keys(root, guide={})
    axes = {"sample.weights": ["ema-power-0.07", "ema-power-0.27"]}
    config = parse_config(merge(config.model_dump(mode="json"), {"sweep": {"axes": axes}}), where="x")
    with pytest.raises(UserError, match=r"at weights ema-power-0\.27: ema-power-0\.27: .*do not span it"):
        checked_points(config, stage_functions())
