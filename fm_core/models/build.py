"""Construction of the network and the method from the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fm_core.config import MethodSection, ModelSection
from fm_core.config.model import OF_KIND
from fm_core.errors import UserError
from fm_core.method.couplings import Coupling
from fm_core.method.objectives import Objective
from fm_core.method.registry import coupling_named, objective_named, path_named, timestep_sampler_named
from fm_core.method.timestep_samplers import TimestepSampler
from fm_core.models.transformer import Transformer
from fm_core.models.unet import UNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "transformer": Transformer}
"""Network classes by model.kind. Keyword arguments: the kind's keys, and those that build_network adds."""


@dataclass(frozen=True)
class Method:
    """The parts of the method that a training step uses."""

    objective: Objective
    coupling: Coupling
    times: TimestepSampler


def build_method(method: MethodSection) -> Method:
    """Build the objective on its path, the coupling and the timestep sampler.

    Raises:
        UserError: a name is unknown, or two parts cannot be combined.
    """
    path = path_named(method.path, method.path_options)
    objective = objective_named(method.objective, path, method.objective_options)
    coupling = coupling_named(method.coupling, method.coupling_options)
    objective.check_coupling(coupling)
    coupling.check_path(path)
    return Method(
        objective=objective,
        coupling=coupling,
        times=timestep_sampler_named(method.times, objective.interval, method.times_options),
    )


def build_network(
    model: ModelSection,
    image_shape: tuple[int, int, int],
    classes: int,
    gradient_checkpointing: bool = False,
    two_times: bool = False,
) -> nn.Module:
    """Build the network for images of `image_shape` = (channels, height, width), float32, untrained.

    `classes` is the data set's number of classes; it is used if model.class_conditional is true. `two_times`
    is that of the objective.

    Raises:
        UserError: the network cannot be built for this image shape or with these sizes.
    """
    channels, height, width = image_shape
    if height != width:
        raise UserError(
            f"model.kind {model.kind} requires square images; those of the data set are {height} x {width}"
        )
    sizes = {
        "image_size": height,
        "image_channels": channels,
        "classes": classes if model.class_conditional else 0,
        "time_scale": model.time_scale,
        "gradient_checkpointing": gradient_checkpointing,
        # A network with one time does not need the parameter.
        **({"two_times": True} if two_times else {}),
        **model.model_dump(include=set(OF_KIND[model.kind])),
    }
    network = NETWORKS[model.kind]
    if two_times and "two_times" not in signature(network).parameters:
        raise UserError(
            f"model.kind {model.kind} has one time, and method.objective needs a network with two"
        )
    try:
        return network(**sizes)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def build_meta_network(
    model: ModelSection, image_shape: tuple[int, int, int], classes: int, two_times: bool = False
) -> nn.Module:
    """Build the network on the meta device: same modules and errors as `build_network`, no storage."""
    with torch.device("meta"), _SkipInit():
        return build_network(model, image_shape, classes, two_times=two_times)


class _SkipInit(TorchFunctionMode):
    """Skips torch.nn.init, some of which imports torch's compiler on the meta device, taking 1.5 s."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
