"""The stages by name, for the command line and for flows.

Stage functions are imported on first use, so that neither `fm --help` nor the start of a flow waits for
torch. `fm reproduce` and `fm sweep` get the stages that they run from here, because they must not import
them.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, cast

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.run.progress import Observer, no_progress
from fm_core.run.results import StageResult

if TYPE_CHECKING:
    from fm_core.reproduce.cost_estimate import CostEstimate
    from fm_core.run.stage_functions import StageFunctions


def stage_function(name: str) -> Callable[..., StageResult]:
    """The function of a stage: it takes a RunConfig and an Observer, and returns a StageResult."""
    if name == "reproduce":
        from fm_core.reproduce.reproduce import reproduce

        def reproduce_resolved(config: RunConfig, observe: Observer = no_progress) -> StageResult:
            return reproduce(resolve_comparison(config), observe, stages=stage_functions())

        return reproduce_resolved
    if name == "sweep":
        from fm_core.sweep.sweep import RunElsewhere, sweep

        def sweep_resolved(
            config: RunConfig, observe: Observer = no_progress, elsewhere: RunElsewhere | None = None
        ) -> StageResult:
            return sweep(resolve_sweep(config), observe, stages=stage_functions(), elsewhere=elsewhere)

        return sweep_resolved
    return cast(Callable[..., StageResult], getattr(import_module(f"fm_core.stages.{name}"), name))


def resolve_comparison(config: RunConfig) -> RunConfig:
    """Return the configuration of a comparison with its absent keys filled in; in 2-D none is derived."""
    if config.reproduce.kind == "toy2d":
        return config
    return resolve(config)


def resolve_sweep(config: RunConfig) -> RunConfig:
    """Return the configuration of a sweep with its absent keys filled in.

    The source is opened only if points are trained and there is no data set yet. Raises UserError.
    """
    from fm_core.stages.resolve import resolve as resolve_from
    from fm_core.sweep.sweep_points import points_of

    return resolve_from(config, from_source=any(point.trained for point in points_of(config)))


def resolve(config: RunConfig) -> RunConfig:
    """Return the configuration with its absent keys filled in, for another process. Raises UserError."""
    from fm_core.stages.resolve import resolve as resolve_from

    return resolve_from(config, from_source=True)


def can_be_scored(config: RunConfig) -> bool:
    """Whether evaluate has what it needs: labels for its classifier, or another feature extractor."""
    from fm_core.stages.preflight import has_features

    return has_features(config)


def stage_functions() -> "StageFunctions":
    """The stages of an image experiment; the processes of `fm reproduce` call this function by name."""
    from fm_core.run.stage_functions import StageFunctions
    from fm_core.stages.sample import checked_model, with_checkpoints
    from fm_core.stages.stage_rules import rules

    return StageFunctions(
        shard=stage_function("shard"),
        train=stage_function("train"),
        sample=stage_function("sample"),
        evaluate=stage_function("evaluate"),
        rules=rules,
        with_checkpoints=with_checkpoints,
        check_samples=checked_model,
        entry_point=f"{__name__}:stage_functions",
    )


def preflight(config: RunConfig, stages: Sequence[str], without: Collection[str] = ()) -> None:
    """Run the checks that can fail before these stages start, except those named in `without`.

    Raises:
        UserError: one line for the first thing that is wrong.
    """
    from fm_core.stages import preflight as stage_preflight

    if "reproduce" in stages:
        config = resolve_comparison(config)
        from fm_core.reproduce.comparison_checks import check_comparison
        from fm_core.stages.stage_rules import rules

        check_comparison(config, rules)
    if "sweep" in stages:
        from fm_core.sweep.sweep_checks import valid_points

        config = resolve_sweep(config)
        valid_points(config, stage_functions())
    stage_preflight.preflight(config, stages, without)


def dry_run(command: str, config: RunConfig, **numbers: float | None) -> str:
    """Describe, in lines of text, what shard or sweep would do, or reproduce with arguments of `estimate`."""
    if command == "shard":
        from fm_core.stages.shard import shard_dry_run

        return shard_dry_run(config)
    if command == "sweep":
        from fm_core.sweep.sweep_checks import sweep_dry_run

        return sweep_dry_run(resolve_sweep(config), stage_functions())
    return cast(Callable[..., "CostEstimate"], estimate)(config, **numbers).text()


def estimate(
    config: RunConfig,
    peak: float | None = None,
    mfu: float = 0.3,
    images_per_s: float | None = None,
    nfe: float | None = None,
) -> "CostEstimate":
    """Estimate the cost of `fm reproduce`; arguments as for `fm_core.reproduce.cost_estimate.estimate`."""
    from fm_core.reproduce import cost_estimate
    from fm_core.stages.stage_rules import rules

    # Until the source exists, use the defaults of the sections.
    with suppress(UserError):
        config = resolve_comparison(config)
    return cost_estimate.estimate(config, rules, peak, mfu, images_per_s, nfe)
