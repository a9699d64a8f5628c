"""What a flow run reports to Prefect (name, task runs, artifacts, final message) and what it refuses."""

import json
import re

import pytest

from tests.support.demo_project import SHRUNKEN, Demo

pytestmark = pytest.mark.slow


def test_the_final_message_carries_the_result(demo: Demo):
    state = demo.run()["state"]
    assert state["type"] == "COMPLETED"
    assert re.search(
        r"Fréchet distance \(.* features, 200 images\) [\d.]+ ± [\d.]+, real held-out images [\d.]+; "
        r".*recognised.*; report: runs/digits/report\.html$",
        state["message"],
    )


def test_a_run_can_be_recognized_by_its_name_and_tags(demo: Demo):
    run = demo.run()
    assert run["name"] == "digits-s0"
    assert {"pipeline", "digits", "run:digits", "data:digits"} <= set(run["tags"])


def test_there_is_one_bar_for_each_stage(demo: Demo):
    query = {"flow_runs": {"id": {"any_": [demo.run_id]}}, "sort": "EXPECTED_START_TIME_ASC"}
    bars = [task["name"] for task in demo.api("/task_runs/filter", query)]
    assert bars == ["shard", "train[2]", "sample[2]", "evaluate", "report"]


def artifacts(demo: Demo, run_id: str | None = None) -> dict[str, dict]:
    records = demo.api("/artifacts/filter", {"flow_runs": {"id": {"any_": [run_id or demo.run_id]}}})
    return {artifact["key"]: artifact for artifact in records}


def test_every_stage_shows_its_progress(demo: Demo):
    shown = artifacts(demo)
    for stage in ("shard", "train", "sample", "evaluate", "report"):
        bar = shown[f"{stage}-progress"]
        assert (bar["type"], bar["data"]) == ("progress", 100.0)
    description = shown["train-progress"]["description"]
    assert re.search(r"step \d+, loss [\d.]+, 5,120 of 5,120 images, [\d.,]+ images/s", description)


def test_results_are_pictures_and_tables(demo: Demo):
    shown = artifacts(demo)
    for key in ("sample-grid", "loss-curve"):
        assert shown[key]["type"] == "image"
        assert shown[key]["data"].startswith("data:image/")
        assert len(shown[key]["data"]) < 200_000
    scores = {row["score"]: row["value"] for row in json.loads(shown["scores"]["data"])}
    assert {"frechet_distance", "frechet_distance_of_held_out", "recognised", "protocol.data"} <= set(scores)
    card = {row["fact"]: row["value"] for row in json.loads(shown["dataset-card"]["data"])}
    assert (card["splits.train.images"], card["levels"]) == (1297, 17)
    assert json.loads(shown["train-metrics"]["data"])[0]["images_seen"] == 5120
    assert f"{demo.root}/runs/digits/report.html" in shown["run-directory"]["data"]


def test_the_database_holds_a_line_in_half_a_minute_and_not_more(demo: Demo):
    query = {"logs": {"flow_run_id": {"any_": [demo.run_id]}}}
    messages = [line["message"] for line in demo.api("/logs/filter", query)]
    run = demo.run()
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


def test_imagenet_without_its_archives_is_refused_in_seconds_and_one_line(demo: Demo):
    run = demo.watched("train-imagenet64")
    assert run["state"]["type"] == "FAILED"
    assert run["total_run_time"] < 30
    message = run["state"]["message"]
    assert "\n" not in message
    assert "datasets/downloads/imagenet64" in message
    logs = demo.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert not any("Traceback" in line["message"] for line in logs)
    assert not (demo.root / "datasets" / "imagenet64").exists()


def test_a_stage_runs_alone(demo: Demo):
    config = {**SHRUNKEN, "sample": {"images": 24, "batch": 24, "solver": "euler", "steps": 4}}
    run = demo.watched("sample-images", "--param", f"config={json.dumps(config)}")
    assert run["state"]["type"] == "COMPLETED"
    assert run["state"]["message"] == "24 images of step 40 with euler, NFE 4"


COMPARISON = {
    "run": {"name": "plane"},
    "launch": {"threads": 1},
    "reproduce": {
        "cells": [
            {"name": "ddpm", "title": "DDPM", "objective": "noise-prediction", "path": "variance-preserving"},
            {"name": "fm-ot", "title": "FM-OT", "objective": "flow-matching", "path": "optimal-transport"},
        ],
        "plane": {"steps": 12, "batch": 16, "width": 8, "layers": 1, "held_out": 8, "samples": 40}
        | {"grid": 4, "nfe": [2, 4], "rtol": 1e-2, "atol": 1e-2},
    },
}


def test_the_papers_comparison_says_what_it_takes_and_shows_its_tables_and_figures(demo: Demo):
    run = demo.watched("reproduce-paper", "--param", f"config={json.dumps(COMPARISON)}")
    assert run["state"]["type"] == "COMPLETED"
    lines = demo.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    (estimate,) = [
        line["message"] for line in lines if "2 objectives, 2 runs of 50 parameters" in line["message"]
    ]
    assert estimate.startswith("plane: ")
    shown = artifacts(demo, run["id"])
    table = shown["comparison"]["data"]
    assert "## Scores" in table
    assert "\n| FM-OT | 12 | " in table
    assert f"{demo.root}/runs/plane/reproduce/report.html" in table
    assert shown["reproduce-progress"]["data"] == 100.0
    drawn = {key for key, artifact in shown.items() if artifact["type"] == "image"}
    assert drawn == {
        "comparison-trajectories-and-samples",
        "comparison-trajectories-and-densities",
        "comparison-conditional-fields",
        "comparison-conditional-trajectories",
    }
    for key in drawn:
        assert shown[key]["data"].startswith("data:image/")
        assert len(shown[key]["data"]) < 210_000


def test_an_invalid_comparison_is_refused_in_one_line(demo: Demo):
    cells = [{**COMPARISON["reproduce"]["cells"][0], "path": "no-such-path"}]
    config = {**COMPARISON, "run": {"name": "odd"}, "reproduce": {"cells": cells}}
    run = demo.watched("reproduce-paper", "--param", f"config={json.dumps(config)}")
    assert run["state"]["type"] == "FAILED"
    assert "reproduce.cells.ddpm: unknown path 'no-such-path'" in run["state"]["message"]
    assert "\n" not in run["state"]["message"]


def test_rules_across_keys_are_checked_in_the_first_seconds(demo: Demo):
    config = {"train": {"images": 100, "warmup_images": 200}}
    run = demo.watched("train-digits", "--param", f"config={json.dumps(config)}")
    assert run["state"]["type"] == "FAILED"
    assert "train.warmup_images is more than train.images" in run["state"]["message"]
    assert run["total_run_time"] < 30


def test_the_form_is_grouped_ordered_and_describes_every_key(demo: Demo):
    (deployment,) = demo.api("/deployments/filter", {"flows": {"name": {"any_": ["train-imagenet64"]}}})
    schema = deployment["parameter_openapi_schema"]
    kinds = schema["definitions"]
    (name,) = re.findall(r'"#/definitions/(\w+)"', json.dumps(schema["properties"]["config"]))
    config = kinds[name]
    groups = sorted(config["properties"], key=lambda name: config["properties"][name]["position"])
    assert groups[:5] == ["run", "data", "model", "method", "train"]
    undescribed = [
        f"{kind}.{key}"
        for kind, section in kinds.items()
        for key, field in section.get("properties", {}).items()
        if not (field.get("description") or "allOf" in field or "$ref" in field)
    ]
    assert undescribed == []
    for kind in kinds.values():
        positions = [
            field["position"] for field in kind.get("properties", {}).values() if "position" in field
        ]
        assert positions == sorted(positions)
