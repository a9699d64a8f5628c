"""Sampling jobs whose checkpoint is removed before the job begins, and weights of another run."""

import shutil

import pytest
import torch

from fm_core.errors import UserError
from fm_core.launch.worker_main import Rank
from fm_core.run.history import open_history
from fm_core.sampling.checkpoint_source import (
    check_run,
    checkpoint_step,
    job_weights,
    load_model,
    pin_weights,
    unpin_weights,
    weights_file,
)
from fm_core.sampling.sample_worker import sample
from tests.support.random_checkpoint import CPU, checkpoint, config_at, config_path, samples_of


@pytest.fixture
def config(tmp_path):
    return config_at(tmp_path)


def pinned(config):
    """The samples of a submitted job whose checkpoint was removed after pinning."""
    folder = checkpoint(config)
    samples = samples_of(config)
    pin_weights(weights_file(config, 7), samples.control)
    shutil.rmtree(folder)
    return samples


def test_the_job_samples_from_what_it_was_submitted_for(config):
    samples = pinned(config)
    sample(config, Rank(0, 1, 0, samples.control, "job"))
    assert samples.problems() == []


def test_the_pinned_weights_are_a_link_and_go_with_the_job(config):
    folder = checkpoint(config)
    samples = samples_of(config)
    pin_weights(weights_file(config, 7), samples.control)
    step, file = job_weights(config, samples.control)
    assert (step, file.stat().st_ino) == (7, (folder / "ema-0.999.safetensors").stat().st_ino)
    unpin_weights(samples.control)
    assert job_weights(config, samples.control) == (7, folder / "ema-0.999.safetensors")


def shared(config, tmp_path, name="r"):
    root = str(config_path(config) / "train" / "checkpoints")
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"root": str(tmp_path / "other-runs"), "name": name}),
            "train": config.train.model_copy(update={"checkpoint_root": root}),
        }
    )


def checked(config):
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device(CPU))
    check_run(config, model, step)


def test_weights_of_another_run_are_refused_by_its_name_and_seed(config, tmp_path):
    checkpoint(config, run={"name": "r"}, seed=config.run.seed)
    checked(config)
    checked(shared(config, tmp_path))
    with pytest.raises(UserError, match=r"run\.name was 'r' and is now 's'"):
        checked(shared(config, tmp_path, "s"))


def test_weights_in_a_place_of_another_run_are_refused(config, tmp_path):
    folder = checkpoint(config, run={"name": "r"})
    owner = '{"schema": 1, "run": {"id": "%s", "name": "r"}}'
    other = shared(config, tmp_path)
    history = open_history(config_path(other))
    (folder.parent / "OWNER.json").write_text(owner % history.id)
    checked(other)
    (folder.parent / "OWNER.json").write_text(owner % "another")
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        checked(other)
