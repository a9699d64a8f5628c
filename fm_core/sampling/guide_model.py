"""The weaker model of autoguidance (Karras et al. 2024): selection by sample.guide, and compatibility."""

from dataclasses import replace
from pathlib import Path

import torch

from fm_core.checkpoint.weights_file import read_recipe, verified_sha256
from fm_core.config import RunConfig, SampleSection
from fm_core.errors import UserError
from fm_core.method.types import Interval
from fm_core.sampling.checkpoint_source import (
    EXPORTED,
    PINNED_GUIDE,
    Model,
    check_run,
    checkpoint_step,
    config_of_run,
    load_model,
    weights_file,
)
from fm_core.sampling.compiled_network import accelerated
from fm_core.storage.local_paths import expand_home


def used_guide(config: RunConfig) -> bool:
    """Whether samples of this configuration are guided by a weaker model."""
    return config.sample.guide.named and config.sample.guidance != 1


def guide_config(config: RunConfig) -> RunConfig | None:
    """The configuration whose sample section names the checkpoint of the weaker model; None for a file.

    Raises:
        UserError: sample.guide.run contains neither a run nor weights, or keys would be ignored because it is
            a file.
    """
    guide, sample = config.sample.guide, config.sample
    if guide.run is None:
        named = {"weights": guide.weights or sample.weights, "step": guide.step or sample.step}
        return config.model_copy(update={"sample": sample.model_copy(update=named)})
    path = expand_home(guide.run)
    if path.is_dir() and not (path / EXPORTED).exists():
        return config_of_run(path, guide.weights or "ema", guide.step or "latest")
    if guide.weights or guide.step:
        key = "weights" if guide.weights else "step"
        raise UserError(f"sample.guide.{key}: {path} is not a run directory; leave it out")
    return None


def guide_step(named: RunConfig) -> int:
    """`checkpoint_step` of a configuration from `guide_config`; errors are prefixed with sample.guide."""
    try:
        return checkpoint_step(named)
    except UserError as error:
        raise UserError(f"sample.guide: {error}") from None


def guide_file(config: RunConfig, control: Path | None = None) -> Path:
    """The weights file of the weaker model: the one pinned in a job's control directory, if there is one.

    Raises UserError if the weaker model has no weights file.
    """
    if control and (control / PINNED_GUIDE).exists():
        return control / PINNED_GUIDE
    if (named := guide_config(config)) is not None:
        return weights_file(named, guide_step(named))
    path = expand_home(str(config.sample.guide.run))
    path = path / EXPORTED if path.is_dir() else path
    if not path.exists():
        raise UserError(f"sample.guide.run: {path} does not exist; name a run directory or a file of weights")
    return path


def guide_record(config: RunConfig) -> dict[str, object] | None:
    """`Model.guide_record` for this configuration, computed without loading the weaker model."""
    if not used_guide(config):
        return None
    file = guide_file(config)
    return {"weights_sha256": verified_sha256(file), "step": read_recipe(file)["step"]}


def with_guide(model: Model, config: RunConfig, device: torch.device, control: Path | None = None) -> Model:
    """Attach the weaker model that guides the samples; without one, the model is returned unchanged.

    Args:
        model: the model of this configuration.
        config: names the weaker model under sample.guide.
        device: the device of the weaker network.
        control: control directory of a job, in which the weights may be pinned.

    Raises:
        UserError: the weaker model is missing, or cannot guide this one.
    """
    if not used_guide(config):
        return model
    file, named = guide_file(config, control), guide_config(config)
    guide = load_model(file, device, named or config)
    if named is not None and control is None:
        check_run(named, guide, guide.step)
    return guided_by(model, guide, config.sample.guidance_interval)


def guided_by(model: Model, guide: Model, interval: Interval | None = None) -> Model:
    """Attach a weaker model that guides this model, in an interval of t or everywhere.

    Raises UserError if the two differ in their images, path or classes, or are the same model.
    """
    if guide.weights_sha256 == model.weights_sha256:
        raise UserError("sample.guide: these are the weights that are to be guided; name a weaker model")
    for what, one, other in (
        ("image shape", model.image_shape, guide.image_shape),
        ("intensity levels", model.quantizer.levels, guide.quantizer.levels),
        ("path", *(each.recipe["method"].get("path") for each in (model, guide))),
        ("options of the path", *(each.recipe["method"].get("path_options", {}) for each in (model, guide))),
    ):
        if one != other:
            raise UserError(f"sample.guide: {what} of the weaker model: {other}, not {one}")
    if guide.conditional and not model.conditional:
        raise UserError("sample.guide: the weaker model has classes, and the model has none")
    orders = [each.recipe.get("data", {}).get("label_order") for each in (model, guide)]
    if guide.conditional and (guide.classes, orders[1]) != (model.classes, orders[0]):
        raise UserError(
            f"sample.guide: the weaker model has other classes: {guide.classes} in the order {orders[1]}, "
            f"not {model.classes} in the order {orders[0]}"
        )
    start, end = model.objective.interval
    start, end = (max(start, interval[0]), min(end, interval[1])) if interval else (start, end)
    if not guide.objective.interval[0] <= start <= end <= guide.objective.interval[1]:
        low, high = guide.objective.interval
        raise UserError(
            f"sample.guide: the weaker model is defined for t in [{low:g}, {high:g}]; set "
            "sample.guidance_interval within it"
        )
    return replace(model, guide=guide)


def accelerated_model(model: Model, sample: SampleSection) -> Model:
    """Apply `accelerated` to the network of the model and to the network of its weaker model."""
    guide = model.guide and accelerated_model(model.guide, sample)
    return replace(model, network=accelerated(model.network, sample), guide=guide)
