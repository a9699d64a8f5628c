"""Prefect events for finished checkpoints, and artifacts of the scores of online evaluation."""

from typing import Any

from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.events import emit_event

from flows.artifacts import image_uri, slug
from fm_core.checkpoint.format import step_of
from fm_core.config import RunConfig
from fm_core.launch.online_eval import read_online_scores
from fm_core.run.directory import RunDirectory
from fm_core.run.status import read_status

CHECKPOINT_EVENT = "flow-matching.checkpoint.finished"
"""Event name, for automations. Its resource is the run; its payload has the checkpoint's name and step."""


class CheckpointEvents:
    """Publishes the new checkpoints and online scores of a run directory."""

    def __init__(self, config: RunConfig) -> None:
        self._run = RunDirectory(config).path
        self._name = config.run.name
        self._checkpoint = self._last_checkpoint()
        self._published_scores = 0

    def publish(self) -> None:
        """Publish what is new since the last call."""
        last = self._last_checkpoint()
        if last and last != self._checkpoint:
            self._checkpoint = last
            resource = {
                "prefect.resource.id": f"flow-matching.run.{slug(self._name)}",
                "prefect.resource.name": self._name,
            }
            payload = {"checkpoint": last, "step": step_of(last), "run": str(self._run)}
            emit_event(CHECKPOINT_EVENT, resource, payload=payload)
        scores = read_online_scores(self._run)
        if len(scores) > self._published_scores:
            publish_distances(scores)
            self._published_scores = len(scores)

    def _last_checkpoint(self) -> str | None:
        return (read_status(self._run) or {}).get("last_checkpoint")


def publish_distances(scores: list[dict[str, Any]]) -> None:
    """Create the artifacts `distance-curve` and `distances` of all scored checkpoints."""
    from fm_core.report.plots import distance_curve

    best = min(scores, key=lambda line: line["frechet_distance"])
    metric = f"Fréchet distance ({best['features']} features, {best['images']} images)"
    value = f"{best['frechet_distance']:.2f} ± {best['stderr']:.2f}"
    description = f"{metric} of {len(scores)} checkpoints; the best is {value}, at step {best['step']:,}"
    create_image_artifact(image_uri(distance_curve(scores)), key="distance-curve", description=description)
    create_table_artifact(scores[::-1], key="distances", description=description)
