"""Flows of the full pipeline, from images to scores: one per preset, and one for any data set."""

from typing import Annotated, Any

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State

from flows.cancellation import end_remaining_jobs
from flows.parameters import config_of
from flows.pipeline import ALL_STAGES, pipeline, run_name
from flows.presets import DIGITS, IMAGENET32, IMAGENET64, PIPELINE, Preset
from flows.stage_tasks import final_flow_state
from flows.subflows import Apart
from fm_core.commands import can_be_scored
from fm_core.config import RunConfig
from fm_core.errors import StageEndedError, UserError, outcome_of

COMMON = """
    * **output**: the run directory `<run.root>/<run.name>` with shards, checkpoints, samples, scores
      and `report.html`
    * **rerun**: a run with the same `run.name` continues where the last one ended and verifies what is
      complete
    * **apart**: stages to run as flow runs of their own deployments, in those deployments' work pools
"""
IMAGENET = """
    The network and the hyper-parameters of Lipman et al. (ICLR 2023).

    * **input**: `config.data.source.url`, the folder with the archives of downsampled ImageNet
      (Chrabaszcz et al.) in npz format; a run without them is refused within seconds"""


def possible_stages(config: RunConfig) -> list[str]:
    """All stages, except evaluate if there are neither labels nor another feature extractor."""
    stages = [stage for stage in ALL_STAGES if stage != "evaluate" or can_be_scored(config)]
    if "evaluate" not in stages:
        get_run_logger().info(
            "skipping evaluate: evaluate.features classifier needs labels, and the data set has none"
        )
    return stages


def train_pipeline(config: RunConfig, apart: tuple[Apart, ...]) -> State[Any]:
    """Run all stages that are possible."""
    return pipeline(config, possible_stages(config), apart)


def preset_flow(name: str, preset: Preset, description: str) -> Flow[..., State[Any]]:
    """The flow of a preset: its form shows the preset's values."""

    def run(config: RunConfig = preset.values, apart: tuple[Apart, ...] = ()) -> State[Any]:
        return train_pipeline(config, apart)

    run.__name__ = run.__qualname__ = name.replace("-", "_")
    run.__doc__ = description + COMMON
    run.__annotations__["config"] = Annotated[RunConfig, preset.form(*PIPELINE)]
    return flow(name=name, flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])(run)


train_digits = preset_flow(
    "train-digits",
    DIGITS,
    """Shard, train, sample, score and report scikit-learn's handwritten digits.

    1,797 images of 8 x 8 pixels that come with scikit-learn. Takes minutes on two CPU cores and less than
    1 GB of disk.

    * **input**: none; `config` has runnable defaults""",
)
train_imagenet32 = preset_flow(
    "train-imagenet32",
    IMAGENET32,
    f"Shard, train, sample, score and report ImageNet at 32 x 32 pixels.\n{IMAGENET}",
)
train_imagenet64 = preset_flow(
    "train-imagenet64",
    IMAGENET64,
    f"Shard, train, sample, score and report ImageNet at 64 x 64 pixels.\n{IMAGENET}",
)


@flow(name="train-images", flow_run_name=run_name, retries=0, on_cancellation=[end_remaining_jobs])
def train_images(
    config_file: str | None = None, config: dict[str, Any] | None = None, apart: tuple[Apart, ...] = ()
) -> State[Any]:
    """Shard, train, sample, score and report your own images, or any configuration.

    * **output**: the run directory `<run.root>/<run.name>` with shards, checkpoints, samples, scores
      and `report.html`; without labels there are no scores
    * **rerun**: a run with the same `run.name` continues where the last one ended and verifies what is
      complete

    Args:
        config_file: a configuration file as `fm init` writes it: a path on the worker's machine, relative to
            the project's root
        config: a tree of configuration keys, e.g. `{"train": {"images": 1000000}}`: alone, or to replace
            values of the file. Keys that neither names have defaults for the resolution and number of the
            images
        apart: stages to run as flow runs of their own deployments, in those deployments' work pools
    """
    try:
        given = config_of({"config_file": config_file, "config": config})
    except UserError as error:
        return final_flow_state(StageEndedError(outcome_of(error), str(error)))
    return train_pipeline(given, apart)
