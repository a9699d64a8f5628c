"""From the configuration to the network and the parts of the method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fm_core.config import MethodSection, ModelSection
from fm_core.config.model import OF_KIND
from fm_core.errors import UserError
from fm_core.method.couplings import Coupling
from fm_core.method.objectives import Objective
from fm_core.method.registry import coupling_named, objective_named, path_named, times_named
from fm_core.method.timestep_samplers import TimestepSampler
from fm_core.models.transformer import Transformer
from fm_core.models.unet import UNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "transformer": Transformer}
"""A network takes the keys of its kind by name, and what build_network adds to them."""


@dataclass(frozen=True)
class Method:
    """The parts that a training step composes."""

    objective: Objective
    coupling: Coupling
    times: TimestepSampler


def build_method(method: MethodSection) -> Method:
    """The objective on its path, the coupling and the times.

    Raises UserError for unknown names and for pairs that do not go together.
    """
    path = path_named(method.path, method.path_options)
    objective = objective_named(method.objective, path, method.objective_options)
    coupling = coupling_named(method.coupling, method.coupling_options)
    objective.check_coupling(coupling)
    return Method(
        objective=objective,
        coupling=coupling,
        times=times_named(method.times, objective.interval, method.times_options),
    )


def build_network(
    model: ModelSection, image_shape: tuple[int, int, int], classes: int, gradient_checkpointing: bool = False
) -> nn.Module:
    """The network for images of `image_shape` = (channels, height, width), float32, freshly initialised.

    `classes` is the data set's number of classes; it matters when model.class_conditional is true.
    Raises UserError for a shape or sizes that the network cannot take.
    """
    channels, height, width = image_shape
    if height != width:
        raise UserError(f"model.kind {model.kind} wants square images; the data set's are {height} x {width}")
    sizes = {
        "image_size": height,
        "image_channels": channels,
        "classes": classes if model.class_conditional else 0,
        "time_scale": model.time_scale,
        "gradient_checkpointing": gradient_checkpointing,
        **model.model_dump(include=set(OF_KIND[model.kind])),
    }
    try:
        return NETWORKS[model.kind](**sizes)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def network_shape(model: ModelSection, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network on the meta device: what `build_network` makes and refuses, without numbers."""
    with torch.device("meta"), _Unfilled():
        return build_network(model, image_shape, classes)


class _Unfilled(TorchFunctionMode):
    """Initial values are left out: torch draws some of the meta device's by its compiler, 1.5 s to import."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
