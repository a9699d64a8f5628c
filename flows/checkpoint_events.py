"""What training shows on its way: an event for each checkpoint, and distances against images seen."""

from typing import Any

from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.events import emit_event

from flows.artifacts import picture, slug
from fm_core.config import RunConfig
from fm_core.launch.online_eval import read_online_scores
from fm_core.run.directory import RunDirectory
from fm_core.run.status import read_status

EVENT = "flow-matching.checkpoint.finished"
"""For automations: its resource is the run, its payload the checkpoint's name and step."""


class CheckpointEvents:
    """Looks at a run's directory now and then and shows what is new."""

    def __init__(self, config: RunConfig) -> None:
        self._run = RunDirectory(config).path
        self._name = config.run.name
        self._checkpoint = self._last_checkpoint()
        self._scored = 0

    def show(self) -> None:
        """Show what happened since the last call."""
        last = self._last_checkpoint()
        if last and last != self._checkpoint:
            self._checkpoint = last
            resource = {
                "prefect.resource.id": f"flow-matching.run.{slug(self._name)}",
                "prefect.resource.name": self._name,
            }
            step = int(last.removeprefix("step-"))
            emit_event(EVENT, resource, payload={"checkpoint": last, "step": step, "run": str(self._run)})
        scores = read_online_scores(self._run)
        if len(scores) > self._scored:
            show_distances(scores)
            self._scored = len(scores)

    def _last_checkpoint(self) -> str | None:
        return (read_status(self._run) or {}).get("last_checkpoint")


def show_distances(scores: list[dict[str, Any]]) -> None:
    """The distance of each scored checkpoint as a curve and a table."""
    from fm_core.report.plots import distance_curve

    best = min(scores, key=lambda line: line["frechet_distance"])
    what = f"Fréchet distance ({best['features']} features, {best['images']} images)"
    value = f"{best['frechet_distance']:.2f} ± {best['stderr']:.2f}"
    told = f"{what} of {len(scores)} checkpoints; the best is {value}, at step {best['step']:,}"
    create_image_artifact(picture(distance_curve(scores)), key="distance-curve", description=told)
    create_table_artifact(scores[::-1], key="distances", description=told)
