"""What training shows on its way: each finished checkpoint is an event, each new score a point of a curve."""

from pathlib import Path

import pytest

from flows import checkpoint_events
from flows.checkpoint_events import EVENT, CheckpointEvents
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import append_line

SCORE = {"frechet_distance": 9.0, "stderr": 0.5, "images": 64, "features": "classifier", "nfe": 8}


class Server:
    """Takes what would go to Prefect's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events, self.pictures, self.tables = [], [], []
        monkeypatch.setattr(
            checkpoint_events, "emit_event", lambda *words, **keys: self.events.append((words, keys))
        )
        keep = {"create_image_artifact": self.pictures, "create_table_artifact": self.tables}
        for name, kept in keep.items():
            monkeypatch.setattr(
                checkpoint_events, name, lambda *words, kept=kept, **keys: kept.append((words, keys))
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


def test_each_checkpoint_that_is_finished_from_now_on_is_one_event(run: RunDirectory, server: Server):
    finish(run, 10)
    shown = CheckpointEvents(run.config)
    shown.show()
    assert server.events == []
    for step in (20, 20, 30):
        finish(run, step)
        shown.show()
    resource = {"prefect.resource.id": "flow-matching.run.a-run", "prefect.resource.name": "A_Run"}
    payloads = [{"checkpoint": f"step-{step:08d}", "step": step, "run": str(run.path)} for step in (20, 30)]
    assert EVENT == "flow-matching.checkpoint.finished"
    assert server.events == [((EVENT, resource), {"payload": payload}) for payload in payloads]


def test_a_run_of_which_nothing_is_known_shows_nothing(run: RunDirectory, server: Server):
    CheckpointEvents(run.config).show()
    assert (server.events, server.pictures, server.tables) == ([], [], [])


def test_distances_are_a_curve_and_a_table_that_grow(run: RunDirectory, server: Server):
    score(run, 10, 9.0)
    shown = CheckpointEvents(run.config)
    shown.show()
    shown.show()
    assert len(server.pictures) == len(server.tables) == 1  # also what was scored before this supervisor
    score(run, 20, 7.25)
    score(run, 30, 8.0)
    shown.show()
    (words, keys), (_, table) = server.pictures[-1], server.tables[-1]
    assert keys["key"] == "distance-curve"
    assert words[0].startswith("data:image/png;base64,")
    told = "Fréchet distance (classifier features, 64 images) of 3 checkpoints"
    assert keys["description"] == f"{told}; the best is 7.25 ± 0.50, at step 20"
    assert table["key"] == "distances"
    assert [line["step"] for line in server.tables[-1][0][0]] == [30, 20, 10]
