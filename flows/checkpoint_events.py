"""Prefect events for finished checkpoints, and artifacts of the scores of online evaluation."""

from contextlib import suppress
from typing import Any

from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.events import emit_event

from flows.artifacts import image_uri, slug
from fm_core.checkpoint.format import complete_steps, step_of
from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.launch.online_eval import read_online_scores
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.status import read_status
from fm_core.storage.atomic_files import read_json, write_json
from fm_core.storage.local_paths import local_path

CHECKPOINT_EVENT = "flow-matching.checkpoint.finished"
"""Event name, for automations. Its resource is the run; its payload has the checkpoint's name and step."""


class CheckpointEvents:
    """Publishes the new checkpoints and online scores of a run directory.

    logs/checkpoint-events.json records the newest checkpoint whose event was emitted, so that checkpoints
    that finish while no flow run supervises the job are published by the next one.
    """

    def __init__(self, config: RunConfig) -> None:
        directory = RunDirectory(config)
        self._run, self._name = directory.path, config.run.name
        self._checkpoints = local_path(directory.checkpoints)
        self._record = directory.path / "logs" / "checkpoint-events.json"
        self._published: int | None = None
        self._last: int | None = None
        self._published_scores = 0
        with suppress(OSError, UserError):
            self._published = self._published_before()

    def publish(self) -> None:
        """Publish what is new since the last call; the next call retries what fails."""
        if self._published is None:
            self._published = self._published_before()
        last, steps = self._last_step(), self._steps()
        if last is not None and last != self._last and last < self._published:
            self._published = last - 1  # training rolled back to an earlier checkpoint
        self._last = last
        for step in steps:
            if self._published < step <= (last or 0):
                self._emit(step)
                self._published = step
                write_json(self._record, {"step": step})
        if self._record.parent.is_dir() and not self._record.exists():
            write_json(self._record, {"step": self._published})
        scores = read_online_scores(self._run)
        if len(scores) > self._published_scores:
            publish_distances(scores)
            self._published_scores = len(scores)

    def _emit(self, step: int) -> None:
        resource = {
            "prefect.resource.id": f"flow-matching.run.{slug(self._name)}",
            "prefect.resource.name": self._name,
        }
        payload = {"checkpoint": step_name(step), "step": step, "run": str(self._run)}
        emit_event(CHECKPOINT_EVENT, resource, payload=payload)

    def _published_before(self) -> int:
        """Step of the newest checkpoint whose event was already emitted."""
        record = read_json(self._record)
        return int(record["step"]) if record else max(self._steps(), default=0)

    def _last_step(self) -> int | None:
        last = (read_status(self._run) or {}).get("last_checkpoint")
        return step_of(last) if last else None

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order; of those in a store, only the newest."""
        last = self._last_step()
        steps = set[int]() if last is None else {last}
        if self._checkpoints and self._checkpoints.is_dir():
            steps |= set(complete_steps(self._checkpoints))
        return sorted(steps)


def publish_distances(scores: list[dict[str, Any]]) -> None:
    """Create the artifacts `distance-curve` and `distances` of all scored checkpoints."""
    from fm_core.report.plots import distance_curve
    from fm_core.report.score_text import with_error

    best = min(scores, key=lambda line: line["frechet_distance"])
    metric = f"Fréchet distance ({best['features']} features, {best['images']} images)"
    accuracy = best.get("classifier_accuracy")
    metric += f", classifier {accuracy:.1%} accurate" if accuracy is not None else ""
    value = with_error({**best, "value": best["frechet_distance"]}, 2)
    description = f"{metric} of {len(scores)} checkpoints; the best is {value}, at step {best['step']:,}"
    create_image_artifact(
        image_uri(distance_curve(scores).png()), key="distance-curve", description=description
    )
    create_table_artifact(scores[::-1], key="distances", description=description)
