"""Preflight checks: errors that can be detected before any work starts."""

from collections.abc import Collection, Sequence

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import check_source, read_complete
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory
from fm_core.stages.resolve import resolve

STAGES = ("shard", "train", "sample", "evaluate", "report")


def preflight(config: RunConfig, stages: Sequence[str] = STAGES, without: Collection[str] = ()) -> None:
    """Check sources, directories, divisibility of sizes and consistency of settings for these stages.

    `without` names rules to leave out, whose files are not written yet.

    Raises:
        UserError: the first problem, in one line.
    """
    config = resolve(config, from_source="shard" in stages)
    classes = check_source(config.data) if "shard" in stages else None
    if {*stages} - {"shard", "report"}:
        # Imported here, because torch takes seconds and a flow that writes shards or a report needs none.
        from fm_core.stages.stage_rules import rules
        from fm_core.stages.train import check_labels

        if "shard" in stages and "train" in stages:
            check_labels(config, classes)
        for name, rule in rules(config, stages):
            if name not in without:
                rule()
    RunDirectory(config).check()


def has_features(config: RunConfig) -> bool:
    """Whether samples can be scored: the classifier needs labels. True if the data set is not known yet."""
    if not config.evaluate.trains_classifier:
        return True
    try:
        data = resolve(config, from_source=True).data
        manifest = read_complete(data)
        classes = manifest.class_count if manifest else check_source(data)
    except UserError:
        return True
    return classes is not None
