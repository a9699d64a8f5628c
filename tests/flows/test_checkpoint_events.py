"""Events and artifacts during training: one event per checkpoint, one point of the curve per score."""

from pathlib import Path

import pytest

from flows import checkpoint_events
from flows.checkpoint_events import CHECKPOINT_EVENT, CheckpointEvents
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import append_line

SCORE = {"frechet_distance": 9.0, "stderr": 0.5, "images": 64, "features": "classifier", "nfe": 8}


class Server:
    """Records what would be sent to Prefect's server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events, self.pictures, self.tables = [], [], []
        monkeypatch.setattr(
            checkpoint_events, "emit_event", lambda *args, **keys: self.events.append((args, keys))
        )
        artifacts = {"create_image_artifact": self.pictures, "create_table_artifact": self.tables}
        for name, recorded in artifacts.items():
            monkeypatch.setattr(
                checkpoint_events,
                name,
                lambda *args, recorded=recorded, **keys: recorded.append((args, keys)),
            )


@pytest.fixture
def server(monkeypatch) -> Server:
    return Server(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "A_Run"}}))


def finish(run: RunDirectory, step: int) -> None:
    write_status(run.path, Progress("train", step, 100, "images"), last_checkpoint=f"step-{step:08d}")


def score(run: RunDirectory, step: int, distance: float) -> None:
    line = {**SCORE, "step": step, "images_seen": 16 * step, "frechet_distance": distance}
    append_line(run.path / "evaluation" / "beside.jsonl", line)


def test_each_checkpoint_that_finishes_after_the_start_is_one_event(run: RunDirectory, server: Server):
    finish(run, 10)
    events = CheckpointEvents(run.config)
    events.publish()
    assert server.events == []
    for step in (20, 20, 30):
        finish(run, step)
        events.publish()
    resource = {"prefect.resource.id": "flow-matching.run.a-run", "prefect.resource.name": "A_Run"}
    payloads = [{"checkpoint": f"step-{step:08d}", "step": step, "run": str(run.path)} for step in (20, 30)]
    assert CHECKPOINT_EVENT == "flow-matching.checkpoint.finished"
    assert server.events == [((CHECKPOINT_EVENT, resource), {"payload": payload}) for payload in payloads]


def test_a_run_without_a_status_publishes_nothing(run: RunDirectory, server: Server):
    CheckpointEvents(run.config).publish()
    assert (server.events, server.pictures, server.tables) == ([], [], [])


def test_distances_are_a_curve_and_a_table_that_grow(run: RunDirectory, server: Server):
    score(run, 10, 9.0)
    events = CheckpointEvents(run.config)
    events.publish()
    events.publish()
    assert (
        len(server.pictures) == len(server.tables) == 1
    )  # including scores from before this supervisor started
    score(run, 20, 7.25)
    score(run, 30, 8.0)
    events.publish()
    (args, keys), (_, table) = server.pictures[-1], server.tables[-1]
    assert keys["key"] == "distance-curve"
    assert args[0].startswith("data:image/png;base64,")
    metric = "Fréchet distance (classifier features, 64 images) of 3 checkpoints"
    assert keys["description"] == f"{metric}; the best is 7.25 ± 0.50, at step 20"
    assert table["key"] == "distances"
    assert [line["step"] for line in server.tables[-1][0][0]] == [30, 20, 10]
