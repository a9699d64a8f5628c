"""What works here, what a configuration asks for, and what it will cost."""

from dataclasses import dataclass

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import check_source, read_complete
from fm_core.errors import UserError
from fm_core.evaluation.self_tests import self_tests
from fm_core.launch.cluster_check import cluster_checks as launch_checks
from fm_core.models.build import build_meta_network
from fm_core.models.flops import TRAINING_PASSES, flops_per_image, parameter_count
from fm_core.run.results import Check
from fm_core.stages.environment_checks import machine_checks
from fm_core.stages.preflight import images_of, rules
from fm_core.training.cost_model import Cluster, checkpoint_bytes_of, cost_checks, training_cost


@dataclass(frozen=True)
class Asked:
    """What of the doctor."""

    model: bool = False
    """Parameters and operations of the network."""
    cost: Cluster | None = None
    """What training takes on these machines."""
    launch: bool = False
    """Whether the hosts of the configuration can be reached and agree."""


def doctor(config: RunConfig | None, asked: Asked) -> list[Check]:
    """Without a configuration: self-tests. With one: its rules and data, or what was asked of it.

    Raises UserError where that cannot be looked at.
    """
    if config is None:
        if asked != Asked():
            raise UserError("this wants --config FILE")
        return [*machine_checks(), *self_tests()]
    checks: list[Check] = []
    if asked.model:
        checks += _model(config)
    if asked.cost:
        shape, classes = images_of(config)
        checks += cost_checks(config, training_cost(config, shape, classes, asked.cost), asked.cost)
    if asked.launch:
        checks += launch_checks(config, _checkpoint_bytes(config))
    return checks if asked != Asked() else [_data(config), *_rules(config)]


def _model(config: RunConfig) -> list[Check]:
    shape, classes = images_of(config)
    network = build_meta_network(config.model, shape, classes)
    forward = flops_per_image(network, shape)
    kind = config.model.size or config.model.kind
    training = TRAINING_PASSES * forward / 1e9
    labels = f" of {classes:,} classes" if config.model.class_conditional else ""
    return [
        Check("network", True, f"{kind} for images of {' x '.join(map(str, shape))}{labels}"),
        Check("parameters", True, f"{parameter_count(network):,}"),
        Check("FLOPs per image", True, f"{forward / 1e9:,.2f} G forward, {training:,.2f} G to train on it"),
    ]


def _checkpoint_bytes(config: RunConfig) -> int | None:
    """Bytes of one checkpoint; None where neither shards nor source are in sight."""
    try:
        shape, classes = images_of(config)
    except UserError:
        return None
    return checkpoint_bytes_of(config, shape, classes)


def _data(config: RunConfig) -> Check:
    """Whether the shards are there or can be made."""
    try:
        check_source(config.data)
        manifest = read_complete(config.data)
    except UserError as error:
        return Check("data", False, str(error))
    if manifest is None:
        return Check("data", True, "the source is there; fm shard makes the shards of it")
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
            checks.append(Check(name, True, "nothing against it"))
    return checks
