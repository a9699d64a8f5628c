"""The doctor command: checks of this machine, or of a configuration's rules, network, cost and hosts."""

from contextlib import suppress
from dataclasses import dataclass

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import check_source, read_complete
from fm_core.data.shard_plan import image_shape_and_classes
from fm_core.errors import UserError
from fm_core.evaluation.self_tests import self_tests
from fm_core.launch.cluster_check import cluster_checks
from fm_core.models.build import build_meta_network, build_method
from fm_core.models.flops import TRAINING_PASSES, flops_per_image, parameter_count
from fm_core.run.results import Check
from fm_core.stages.environment_checks import machine_checks
from fm_core.stages.resolve import resolve
from fm_core.stages.stage_rules import rules
from fm_core.training.cost_model import Cluster, checkpoint_bytes_of, cost_checks, training_cost


@dataclass(frozen=True)
class DoctorRequest:
    """The requested checks of a configuration; none means its rules and data."""

    model: bool = False
    """Parameters and FLOPs of the network."""
    cost: Cluster | None = None
    """Cost of training on these machines."""
    launch: bool = False
    """Whether the hosts of the configuration can be reached and agree."""


def doctor(config: RunConfig | None, request: DoctorRequest) -> list[Check]:
    """Self-tests of the machine; with a configuration, its rules and data or the requested checks.

    Raises:
        UserError: a requested check needs a configuration or data that are not available.
    """
    if config is None:
        if request != DoctorRequest():
            raise UserError("--model, --launch and --cost need --config FILE")
        return [*machine_checks(), *self_tests()]
    with suppress(UserError):  # `_data` reports it
        config = resolve(config, from_source=True)
    checks: list[Check] = []
    if request.model:
        checks += _model(config)
    if request.cost:
        shape, classes = image_shape_and_classes(config.data)
        checks += cost_checks(config, training_cost(config, shape, classes, request.cost), request.cost)
    if request.launch:
        checks += cluster_checks(config, _checkpoint_bytes(config))
    return checks if request != DoctorRequest() else [_data(config), *_rules(config)]


def _model(config: RunConfig) -> list[Check]:
    shape, classes = image_shape_and_classes(config.data)
    objective = build_method(config.method).objective
    network = build_meta_network(config.model, shape, classes, objective.two_times)
    forward = flops_per_image(network, shape)
    kind = config.model.size or config.model.kind
    training = (TRAINING_PASSES + objective.extra_forwards) * forward / 1e9
    labels = f" of {classes:,} classes" if config.model.class_conditional else ""
    return [
        Check("network", True, f"{kind} for images of {' x '.join(map(str, shape))}{labels}"),
        Check("parameters", True, f"{parameter_count(network):,}"),
        Check("FLOPs per image", True, f"{forward / 1e9:,.2f} G forward, {training:,.2f} G for training"),
    ]


def _checkpoint_bytes(config: RunConfig) -> int | None:
    """Bytes of one checkpoint; None if neither shards nor source are available."""
    try:
        shape, classes = image_shape_and_classes(config.data)
    except UserError:
        return None
    return checkpoint_bytes_of(config, shape, classes)


def _data(config: RunConfig) -> Check:
    """Whether the shards exist or can be written."""
    try:
        check_source(config.data)
        manifest = read_complete(config.data)
    except UserError as error:
        return Check("data", False, str(error))
    if manifest is None:
        return Check("data", True, "the source is available; fm shard writes the shards")
    counts = ", ".join(f"{split.images:,} in {name}" for name, split in manifest.splits.items())
    return Check("data", True, f"{len(manifest.shards)} shards: {counts}")


def _rules(config: RunConfig) -> list[Check]:
    checks: list[Check] = []
    for name, rule in rules(config):
        try:
            rule()
        except UserError as error:
            checks.append(Check(name, False, str(error)))
        else:
            checks.append(Check(name, True, "ok"))
    return checks
