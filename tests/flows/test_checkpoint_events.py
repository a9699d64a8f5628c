"""Events and artifacts during training: one event per checkpoint, one point of the curve per score."""

from pathlib import Path

import pytest

from flows import checkpoint_events
from flows.checkpoint_events import CHECKPOINT_EVENT, CheckpointEvents
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import append_line, write_json

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


def complete(run: RunDirectory, step: int) -> None:
    write_json(run.path / "train" / "checkpoints" / f"step-{step:08d}" / "COMPLETE", {"files": {}})
    finish(run, step)


def steps(server: Server) -> list[int]:
    return [keys["payload"]["step"] for _, keys in server.events]


def test_checkpoints_that_finish_between_two_looks_are_all_published(run: RunDirectory, server: Server):
    complete(run, 10)
    events = CheckpointEvents(run.config)
    for step in (20, 30, 40):
        complete(run, step)
    events.publish()
    events.publish()
    assert steps(server) == [20, 30, 40]


def test_checkpoints_that_finish_without_supervision_are_published_by_the_next_flow_run(
    run: RunDirectory, server: Server
):
    run.history.parent.mkdir(parents=True)
    CheckpointEvents(run.config).publish()
    for step in (10, 20):
        complete(run, step)
    CheckpointEvents(run.config).publish()
    CheckpointEvents(run.config).publish()
    assert steps(server) == [10, 20]


def test_an_event_that_could_not_be_emitted_is_emitted_later(run: RunDirectory, server: Server, monkeypatch):
    events = CheckpointEvents(run.config)
    complete(run, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_events, "emit_event", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            events.publish()
    events.publish()
    assert steps(server) == [10]


def test_checkpoints_after_a_return_to_an_earlier_one_are_published_again(run: RunDirectory, server: Server):
    events = CheckpointEvents(run.config)
    for step in (10, 20, 10, 20):
        complete(run, step)
        events.publish()
    assert steps(server) == [10, 20, 10, 20]


def test_a_status_that_cannot_be_read_at_the_start_does_not_end_the_stage(run: RunDirectory, server: Server):
    run.path.mkdir()
    (run.path / "status.json").write_text("cut")
    events = CheckpointEvents(run.config)
    (run.path / "status.json").unlink()
    events.publish()
    assert server.events == []


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
