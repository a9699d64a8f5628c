"""Sampling request, protocol and key of a set of samples, from the configuration."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig
from fm_core.method.solver import Churn, Diffusion, Solver
from fm_core.method.time_grid import UNIFORM, grid_of
from fm_core.sampling.generate import Draw
from fm_core.storage.hashing import fingerprint
from fm_core.storage.keyed_random import GeneratorName, generator_record


def draw_of(config: RunConfig) -> Draw:
    """The sampling request of the sample section. Raises UserError like `solver_of`."""
    sample = config.sample
    tf32 = sample.precision == "tf32"
    return Draw(
        solver_of(config),
        sample.seed,
        sample.guidance,
        sample.classes,
        tf32,
        guidance_interval=sample.guidance_interval,
        class_mode=sample.class_mode,
    )


def solver_of(config: RunConfig) -> Solver:
    """The solver of the sample section. Raises UserError for settings that it would ignore."""
    sample, noise = config.sample, config.sample.stochastic
    diffusion = Diffusion(noise.diffusion, noise.scale)
    churn = Churn(noise.churn, noise.churn_min, noise.churn_max or math.inf, noise.churn_noise)
    return Solver(
        method=sample.solver,
        rtol=sample.rtol,
        atol=sample.atol,
        steps=sample.steps,
        error_norm=sample.error_norm or "batch",
        grid=grid_of(sample.grid, sample.grid_rho, sample.grid_shift, sample.grid_bounds),
        diffusion=diffusion if sample.solver == "sde" or diffusion != Diffusion() else None,
        churn=churn if sample.solver == "edm" or churn != Churn() else None,
    )


def protocol_of(
    config: RunConfig,
    weights_sha256: str,
    generator: GeneratorName,
    guide: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that changes the pixels of a set of samples, except for the machine's float arithmetic.

    `guide` is the record of the weaker model that guides, if there is one (`Model.guide_record`). Guidance
    and class settings with default values are omitted, as in the records of earlier versions, and so is
    sample.store, which names what is stored beside the pixels.
    """
    sample, classes = config.sample, list(config.sample.classes)
    guided = {
        "guidance": sample.guidance,
        **({"guidance_interval": list(sample.guidance_interval)} if sample.guidance_interval else {}),
        **({"guide": dict(guide)} if guide else {}),
    }
    mode = sample.class_order
    return {
        "weights": weights_name(config),
        "weights_sha256": weights_sha256,
        "images": config.sample.images,
        "batch_size": config.sample.batch,
        "seed": config.sample.seed,
        **generator_record(generator),
        **solver_of(config).record,
        **(guided if sample.guidance != 1 else {}),
        **({"classes": classes} if classes else {}),
        **({"class_mode": mode} if mode != ("in-turn" if classes else "drawn") else {}),
        **({"store": sample.store} if sample.store != "uint8" else {}),
        "dtype": {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}[config.sample.precision],
    }


def weights_name(config: RunConfig) -> str:
    """Short name of the weights; for a file, its name without folder and suffix."""
    weights = config.sample.weights
    return Path(weights).stem if weights.endswith(".safetensors") else weights


def sample_key(config: RunConfig, protocol: dict[str, Any]) -> str:
    """Directory name of a set of samples: the most important settings, and a hash of the protocol."""
    solver = solver_of(config)
    accuracy = f"{solver.steps}" if solver.steps else f"{solver.rtol:.0e}"
    accuracy += "" if solver.grid == UNIFORM else f"-{solver.grid.name}"
    sample = config.sample
    guided = (
        f"-{'auto' if sample.guide.named else ''}guided-{sample.guidance:g}" if sample.guidance != 1 else ""
    )
    if guided and sample.guidance_interval:
        guided += "-in-{:g}-{:g}".format(*sample.guidance_interval)
    return f"{weights_name(config)}-{solver.method}-{accuracy}{guided}-{fingerprint(protocol)[:6]}"
