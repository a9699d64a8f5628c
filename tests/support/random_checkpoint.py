"""Checkpoints of random weights, and samples from them in this process."""

import json

import torch
from safetensors.torch import save_file

from fm_core.checkpoint.format import seal
from fm_core.config import RunConfig
from fm_core.launch.worker_main import Rank
from fm_core.models.build import build_method, build_network
from fm_core.run.directory import RunDirectory
from fm_core.sampling.checkpoint_source import checkpoint_step, load_model, weights_file
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.sampling.sample_worker import sample
from fm_core.storage.keyed_random import CURRENT, generator_record

SHAPE = (1, 8, 8)
MODEL = {"channels": 8, "channel_multipliers": [1], "attention_resolutions": [], "head_channels": 8}
CPU = torch.device("cpu")


def config_at(root, method=None, **sample_keys):
    keys = {"images": 11, "batch": 4, "solver": "euler", "steps": 3} | sample_keys
    return RunConfig.model_validate(
        {
            "run": {"root": str(root), "name": "r"},
            "model": {**MODEL, "class_conditional": True},
            "method": method or {},
            "sample": {key: value for key, value in keys.items() if value is not None},
        }
    )


def checkpoint(config, step=7, seed=0, **recipe):
    """Write a complete checkpoint of random weights; its folder."""
    torch.manual_seed(seed)
    two_times = build_method(config.method).objective.two_times
    network = build_network(config.model, SHAPE, 10, two_times=two_times)
    weights = {name: torch.randn_like(weight) * 0.2 for name, weight in network.state_dict().items()}
    recipe = {
        "model": config.model.model_dump(mode="json"),
        "method": config.method.model_dump(mode="json"),
        "levels": 17,
        "image_shape": list(SHAPE),
        "classes": 10,
        "data": {"name": "digits", "version": "v"},
        **generator_record(config.run.generator or CURRENT),
        "seed": config.run.seed,
        "step": step,
        "images_seen": 5,
        **recipe,
    }
    folder = config_path(config) / "train" / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("raw", "ema-0.999"):
        save_file(weights, folder / f"{name}.safetensors", {"recipe": json.dumps(recipe)})
    seal(folder)
    return folder


def config_path(config):
    return RunDirectory(config).path


def samples_of(config):
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), CPU)
    return SampleSet(config, step, protocol_of(config, model.weights_sha256, model.generator))


def make(config, ranks=1):
    samples = samples_of(config)
    samples.control.mkdir(parents=True, exist_ok=True)
    for number in range(ranks):
        sample(config, Rank(number, ranks, number, samples.control, "job"))
    return samples


def pixels(samples):
    return torch.cat(list(samples.read(SHAPE)))
