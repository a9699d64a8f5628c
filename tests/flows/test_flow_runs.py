"""What a deployed flow reports to Prefect (name, task runs, artifacts, final message) and what is refused."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.demo_project import Demo


def test_the_final_message_carries_the_result(demo: Demo):
    state = demo.run(demo.run_id)["state"]
    assert state["type"] == "COMPLETED"
    assert re.search(
        r"Fréchet distance \(.* features, 200 images\) [\d.]+ ± [\d.]+, real held-out images [\d.]+; "
        r".*recognized.*; report: runs/digits/report\.html$",
        state["message"],
    )


def test_a_run_can_be_recognized_by_its_name_and_tags(demo: Demo):
    run = demo.run(demo.run_id)
    assert run["name"] == "digits-s0"
    assert {"pipeline", "digits", "run:digits", "data:digits"} <= set(run["tags"])


def test_there_is_one_bar_for_each_stage(demo: Demo):
    query = {"flow_runs": {"id": {"any_": [demo.run_id]}}, "sort": "EXPECTED_START_TIME_ASC"}
    bars = [task["name"] for task in demo.api("/task_runs/filter", query)]
    assert bars == ["shard", "train[2]", "sample[2]", "evaluate", "report"]


def test_every_stage_shows_its_progress(demo: Demo):
    shown = demo.artifacts(demo.run_id)
    for stage in ("shard", "train", "sample", "evaluate", "report"):
        bar = shown[f"{stage}-progress"]
        assert (bar["type"], bar["data"]) == ("progress", 100.0)
    description = shown["train-progress"]["description"]
    assert re.search(r"step \d+, loss [\d.]+, 1,280 of 1,280 images", description)


def test_results_are_pictures_and_tables(demo: Demo):
    shown = demo.artifacts(demo.run_id)
    for key in ("sample-grid", "loss-curve"):
        assert shown[key]["type"] == "image"
        assert shown[key]["data"].startswith("data:image/")
        assert len(shown[key]["data"]) < 200_000
    scores = {row["score"]: row["value"] for row in json.loads(shown["scores"]["data"])}
    assert {"frechet_distance", "frechet_distance_of_held_out", "recognised", "protocol.data"} <= set(scores)
    card = {row["fact"]: row["value"] for row in json.loads(shown["dataset-card"]["data"])}
    assert (card["splits.train.images"], card["levels"]) == (1297, 17)
    assert json.loads(shown["train-metrics"]["data"])[0]["images_seen"] == 1280
    assert f"{demo.root}/runs/digits/report.html" in shown["run-directory"]["data"]


def test_the_database_holds_a_line_in_half_a_minute_and_not_more(demo: Demo):
    messages = demo.log_messages(demo.run_id)
    run = demo.run(demo.run_id)
    # twelve lines of Prefect's about starting, two at the end of each stage, one each half minute; where the
    # processes of two stages log, and what they warn of
    warnings = [message for message in messages if re.match(r"(train|sample)-\d\.log: ", message)]
    assert len(messages) - len(warnings) < 12 + 2 * 5 + 2 + run["total_run_time"] / 30 + 3
    assert len(warnings) < 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"trian": {}},
            "'config'. Failure reason: Additional properties are not allowed ('trian' was unexpected)",
        ),
        ({"train": {"imagess": 3}}, "'config.train'. Failure reason: Additional properties are not allowed"),
        (
            {"train": {"images": "many"}},
            "'config.train.images'. Failure reason: 'many' is not of type 'integer'",
        ),
        ({"train": {"images": 0}}, "'config.train.images'. Failure reason: 0 is less than the minimum of 1"),
        ({"model": {"kind": "cnn"}}, "'config.model.kind'. Failure reason: "),
    ],
)
def test_wrong_parameters_are_refused_when_a_run_is_created(demo: Demo, config: dict, message: str):
    result = demo.prefect("deployment", "run", "train-digits", "--param", f"config={json.dumps(config)}")
    assert result.returncode == 1
    assert "UUID" not in result.stdout
    assert message in " ".join((result.stdout + result.stderr).split())


def test_imagenet_without_its_archives_is_refused_before_any_stage_and_in_one_line(
    demo: Demo, imagenet_without_archives: dict[str, Any]
):
    run = imagenet_without_archives
    assert run["state"]["type"] == "FAILED"
    message = run["state"]["message"]
    assert "\n" not in message
    assert "datasets/downloads/imagenet64" in message
    assert demo.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}}) == []
    assert not any("Traceback" in line for line in demo.log_messages(run["id"]))
    assert not (demo.root / "datasets" / "imagenet64").exists()


def undescribed(keys: dict[str, Any], place: str = "config") -> Iterator[str]:
    """Keys without a description, and sections whose keys are not in the order of the form."""
    positions = [key["position"] for key in keys.values() if not key.get("deprecated")]
    if positions != list(range(len(positions))):
        yield f"{place}: {positions}"
    for name, key in keys.items():
        if not key.get("description"):
            yield f"{place}.{name}"
        if not key.get("deprecated"):
            yield from undescribed(key.get("properties", {}), f"{place}.{name}")


def test_the_form_is_grouped_ordered_and_describes_every_key(demo: Demo):
    (deployment,) = demo.api("/deployments/filter", {"flows": {"name": {"any_": ["train-imagenet64"]}}})
    config = deployment["parameter_openapi_schema"]["properties"]["config"]
    groups = sorted(config["properties"], key=lambda name: config["properties"][name]["position"])
    assert groups[:5] == ["run", "data", "model", "method", "train"]
    assert list(undescribed(config["properties"])) == []
