"""Flows called in this process against Prefect's own test server: states, task runs and artifacts."""

from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import Artifact, FlowRun, State, TaskRun
from prefect.task_runners import ProcessPoolTaskRunner

from flows.parallel_runs import wait_for
from flows.presets import DIGITS
from flows.reproduce import reproduce_paper
from flows.stages import shard_dataset, train_model
from flows.train import train_digits, train_imagenet64, train_images
from fm_core.commands import stage_function
from fm_core.errors import UserError
from fm_core.evaluation.features import classifier_features
from tests.support.demo_project import SMALL_NETWORK
from tests.support.operator import PATIENCE_SECONDS, until
from tests.support.photographs import write_tree
from tests.support.source_cases import numbers_by_class, tree

PETS = {"cat": list(range(20)), "dog": list(range(100, 120))}
"""Numbers of the pictures of each class."""


@dataclass
class EndedFlow:
    """A flow run as the server shows it."""

    state: State[Any]
    run: FlowRun
    task_runs: list[TaskRun]
    artifacts: dict[str, Artifact]
    log: list[str]


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., EndedFlow]]:
    """Call a flow with a configuration."""
    from prefect.testing.utilities import prefect_test_harness  # it imports the server

    with prefect_test_harness(server_startup_timeout=int(PATIENCE_SECONDS)):
        yield called


def called(flow: Flow[..., Any], config: dict[str, Any], stages: int = 0, **parameters: Any) -> EndedFlow:
    """Call the flow, and wait until the server has the task runs of this many stages."""
    state = flow(config=config, return_state=True, **parameters)
    run_id = state.state_details.flow_run_id
    this = FlowRunFilter.model_validate({"id": {"any_": [run_id]}})
    with get_client(sync_client=True) as client:

        def log() -> list[str]:
            lines = client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run_id]}}))
            return [line.message for line in lines]

        def task_runs() -> list[TaskRun]:
            return client.read_task_runs(flow_run_filter=this)

        until(
            lambda: sum(task.state.is_final() for task in task_runs()) >= stages, "the task runs are recorded"
        )
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(), flow_run_filter=this)
        shown = {artifact.key or "": artifact for artifact in artifacts}
        return EndedFlow(state, client.read_flow_run(run_id), task_runs(), shown, log())


def places(folder: Path, name: str) -> dict[str, Any]:
    return {"run": {"root": str(folder / "runs"), "name": name}, "data": {"root": str(folder / "datasets")}}


def test_a_flow_of_one_stage_shows_its_task_progress_and_artifacts(call, tmp_path: Path):
    small = {
        "model": SMALL_NETWORK,
        "train": {"images": 64, "global_batch": 16, "log_images": 32, "warmup_images": 0},
        "launch": {"kind": "debug", "threads": 1},
    }
    config = places(tmp_path, "digits") | small
    stage_function("shard")(DIGITS.config_class.model_validate(config), lambda progress: None)
    ended = call(train_model, config, stages=1)
    assert ended.state.type == "COMPLETED", ended.state.message
    assert ended.run.name == "digits-s0"
    assert {"run:digits", "data:digits"} <= set(ended.run.tags)
    assert [task.name for task in ended.task_runs] == ["train[1]"]
    assert set(ended.artifacts) == {"train-progress", "loss-curve", "train-metrics"}
    assert ended.artifacts["train-progress"].type == "progress"
    # Called again it verifies, and says so.
    again = call(train_model, config, stages=1)
    assert (again.state.message or "").endswith("; nothing to do, everything was complete")
    assert [task.state_name for task in again.task_runs] == ["Cached"]


def test_rules_across_keys_are_checked_before_any_stage(call, tmp_path: Path):
    wrong = {"train": {"images": 100, "warmup_images": 200}}
    ended = call(train_digits, places(tmp_path, "digits") | wrong)
    assert ended.state.type == "FAILED"
    assert "train.warmup_images is more than train.images" in (ended.state.message or "")
    assert ended.task_runs == []


def test_imagenet_without_its_archives_is_refused_in_one_line(call, tmp_path: Path):
    ended = call(train_imagenet64, places(tmp_path, "imagenet64"))
    assert ended.state.type == "FAILED"
    assert "imagenet64" in (ended.state.message or "")
    assert "\n" not in (ended.state.message or "")
    assert not any("Traceback" in line for line in ended.log)
    assert ended.task_runs == []


COMPARISON = {
    "launch": {"threads": 1},
    "reproduce": {
        "cells": [
            {"name": "ddpm", "title": "DDPM", "objective": "noise-prediction", "path": "variance-preserving"},
            {"name": "fm-ot", "title": "FM-OT", "objective": "flow-matching", "path": "optimal-transport"},
        ],
        "toy2d": {"steps": 12, "batch": 16, "width": 8, "layers": 1, "held_out": 8, "samples": 40}
        | {"grid": 4, "nfe": [2, 4], "rtol": 1e-2, "atol": 1e-2},
        "few_steps": {"experiments": ["fm-ot"], "solvers": ["euler"], "nfe": [1, 2], "student_nfe": [1]}
        | {"students": [{"name": "again", "pairs": 8, "steps": 2, "learning_rate": 1e-3}]},
    },
}


def test_an_invalid_comparison_is_refused_in_one_line(call, tmp_path: Path):
    cells = [{**COMPARISON["reproduce"]["cells"][0], "path": "no-such-path"}]
    odd = {"cells": cells, "few_steps": {"experiments": [], "students": []}}
    ended = call(reproduce_paper, places(tmp_path, "odd") | {"reproduce": odd})
    message = ended.state.message or ""
    assert ended.state.type == "FAILED"
    assert "reproduce.cells.ddpm: unknown path 'no-such-path'" in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def comparison_run(call, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EndedFlow]:
    """A comparison of two objectives and a student, as small as it may be."""
    folder = tmp_path_factory.mktemp("comparison")
    return folder, call(reproduce_paper, places(folder, "plane") | COMPARISON)


def test_the_papers_comparison_logs_its_cost_and_shows_its_tables_and_figures(comparison_run):
    folder, ended = comparison_run
    assert ended.state.type == "COMPLETED", ended.state.message
    (estimate,) = [line for line in ended.log if "3 objectives, 3 runs of 50 parameters" in line]
    assert estimate.startswith("plane: ")
    table = ended.artifacts["comparison"].data
    assert "## Scores" in table
    assert "\n| FM-OT | 12 | " in table
    assert "## Few evaluations, each objective with its best solver" in table
    assert f"{folder}/runs/plane/reproduce/report.html" in table
    assert ended.artifacts["reproduce-progress"].data == 100.0
    drawn = {key: artifact.data for key, artifact in ended.artifacts.items() if artifact.type == "image"}
    assert set(drawn) == {
        "comparison-scores",
        "comparison-trajectories-and-samples",
        "comparison-trajectories-and-densities",
        "comparison-conditional-fields",
        "comparison-conditional-trajectories",
    }
    for image in drawn.values():
        assert image.startswith("data:image/")
        assert len(image) < 210_000


@pytest.fixture(scope="module")
def own_images_run(call, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EndedFlow]:
    """`train-images` on 40 pictures of two classes, with a configuration file."""
    folder = tmp_path_factory.mktemp("own-images")
    files = {f"{name}/{number}.png": number for name, numbers in PETS.items() for number in numbers}
    write_tree(folder / "pets", tree(files))
    small = {
        "run": {"name": "pets"},
        "data": {"source": {"url": str(folder / "pets"), "image_size": 8, "resize": "exact"}},
        "model": SMALL_NETWORK,
        "train": {"images": 64, "global_batch": 16, "log_images": 32, "warmup_images": 0},
        "sample": {"images": 16, "solver": "euler", "steps": 2},
        "evaluate": {"likelihood": {"images": 0}},
        "launch": {"kind": "debug", "threads": 1},
    }
    (folder / "pets.yaml").write_text(yaml.safe_dump(small))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_features, "training_steps", lambda images: 5)
        keys = places(folder, "pets")
        return folder, call(train_images, keys, stages=5, config_file=str(folder / "pets.yaml"))


def test_own_images_are_trained_on_to_the_end(own_images_run):
    folder, ended = own_images_run
    assert ended.state.type == "COMPLETED", ended.state.message
    stages = [task.name.split("[")[0] for task in ended.task_runs]
    assert sorted(stages) == ["evaluate", "report", "sample", "shard", "train"]
    assert {"run:pets", "data:pets"} <= set(ended.run.tags)
    assert [line for line in ended.log if "could not create" in line] == []
    assert {"dataset-card", "sample-grid", "loss-curve", "scores"} <= set(ended.artifacts)
    # The pictures of the report, drawn by the same functions.
    pictures = {key: artifact.data for key, artifact in ended.artifacts.items() if artifact.type == "image"}
    assert {"report-samples", "report-training", "report-nearest-neighbors"} <= set(pictures)
    assert all(picture.startswith("data:image/") for picture in pictures.values())
    assert (folder / "runs" / "pets" / "report.html").exists()
    written = [numbers_by_class(folder / "datasets" / "pets", split) for split in ("train", "val")]
    assert {name: sorted(written[0][name] + written[1].get(name, [])) for name in PETS} == PETS


def test_a_small_data_set_is_written_without_another_process(call, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ProcessPoolTaskRunner, "submit", lambda *_, **__: pytest.fail("a process is started"))
    ended = call(shard_dataset, places(tmp_path, "one"), stages=3)
    assert ended.state.is_completed(), ended.state.message
    assert (tmp_path / "datasets" / "digits" / "manifest.json").exists()
    assert {task.name for task in ended.task_runs} == {"train-000000", "val-000000", "shard"}


def test_a_killed_process_of_the_pool_is_named():
    class Future:
        def wait(self, timeout: float) -> None:
            raise BrokenProcessPool("terminated abruptly")

    with pytest.raises(UserError, match=r"a process that writes shards was killed, .* run the flow again"):
        wait_for(Future())
