"""Checks of a comparison on images before any of its experiments starts."""

from collections.abc import Iterator
from functools import partial

from fm_core.config import RunConfig
from fm_core.reproduce.experiments import experiments_of
from fm_core.reproduce.few_steps import check_few_steps
from fm_core.run.stage_functions import Rule, Rules

SHARED_RULES = ("feature extractors", "samples")
"""Preflight rules for the settings that all experiments of a comparison share."""


def comparison_rules(config: RunConfig, rules: Rules) -> Iterator[tuple[str, Rule]]:
    """The preflight rules of a comparison on images, by name.

    Sampling and scoring have the same settings in all experiments, so their rules are yielded once.
    """
    experiments = experiments_of(config)
    by_name = dict(rules(experiments[0].config, ("train", "sample", "evaluate")))
    yield from ((name, by_name[name]) for name in SHARED_RULES)
    for experiment in experiments:
        yield f"training of {experiment.name}", dict(rules(experiment.config, ("train",)))["training"]
        few_steps = partial(check_few_steps, experiment, config.reproduce.few_steps)
        yield f"few evaluations of {experiment.name}", few_steps


def check_comparison(config: RunConfig, rules: Rules) -> None:
    """Check a comparison on images before it starts; a 2-D comparison runs its own checks.

    Raises:
        UserError: a one-line message about the first problem.
    """
    if config.reproduce.kind == "images":
        for _, rule in comparison_rules(config, rules):
            rule()
