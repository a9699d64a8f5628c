"""A long run and what happens to it: process, worker and server are killed, it is cancelled and goes on.

The tests tell one story in their order; each leaves the run as the next one finds it. The noisy objective
sleeps, so that the story costs little computing.
"""

import itertools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from flows.checkpoint_events import EVENT
from fm_core.launch.job import JOB_VARIABLE
from fm_core.storage.atomic_files import read_lines
from tests.support.demo_project import Demo
from tests.support.fault_injection import NOISY_STEPS
from tests.support.operator import Operator, PrefectServer, until, with_variable
from tests.support.ui_driver import BROWSER, DRIVER, press

pytestmark = pytest.mark.slow

RUN = {
    "run": {"name": "story"},
    "method": {"objective": "tests.support.fault_injection:NoisyObjective"},
    "model": {"channels": 8, "channel_multipliers": [1], "head_channels": 8},
    "train": {
        "images": 16_000_000,
        "global_batch": 16,
        "schedule": "constant",
        "warmup_images": 0,
        "log_images": 16,
        "checkpoint_images": 800,
    },
}
AWAY_SECONDS = 120
"""How long the server is away."""
SILENCE_SECONDS = 45
"""After which a run is taken for crashed; heartbeats come every 30 s here. An operator's are 600 and 60."""
RULES = ("silent-runs-crashed", "crashed-runs-resume", "runs-that-crash-again-and-again-fail")
APART = ("shard_dataset", "train_model")


@pytest.fixture(scope="module")
def hands(demo: Demo) -> Iterator[Operator]:
    """An own pool and worker for train-model, automations with short times, and the run itself."""
    told = demo.command("python", "-m", "flows.automations").stdout.splitlines()
    assert told == [f"{rule}: installed" for rule in RULES]
    assert demo.prefect("work-pool", "create", "gpu", "--type", "process").returncode == 0
    quick = (demo.root / "infra" / "prefect.yaml").read_text()
    assert 'FREQUENCY: "60"' in quick
    (demo.root / "quick.yaml").write_text(quick.replace('FREQUENCY: "60"', 'FREQUENCY: "30"'))
    for stage in APART:
        own = ("--name", f"flows.stages.{stage}/default", "--pool", "gpu")
        deployed = demo.prefect("--no-prompt", "deploy", "--prefect-file", "quick.yaml", *own)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    hands = Operator(demo, RUN["run"]["name"])
    hands.worker("gpu")
    yield hands
    for process in [psutil.Process(worker.pid) for worker in hands.workers if worker.poll() is None]:
        process.kill()
    for process in with_variable(JOB_VARIABLE, hands.job()["id"]):
        process.kill()


@pytest.fixture(scope="module")
def run_id(hands: Operator) -> str:
    run_id = hands.start("train-model", json.dumps(RUN))
    until(lambda: len(hands.steps()) > 2, 240, "training begins")
    return run_id


def listen_for(demo: Demo, seconds: int) -> None:
    """Have a run that is not heard of for so long be taken for crashed."""
    rules = (
        (demo.root / "infra" / "automations.yaml").read_text().replace("within: 600", f"within: {seconds}")
    )
    (demo.root / "rules.yaml").write_text(rules)
    told = demo.command("python", "-m", "flows.automations", "rules.yaml").stdout.splitlines()
    assert told == [f"{rule}: brought up to date" for rule in RULES]


def test_ranks_hold_no_connection_to_the_server(hands: Operator, run_id: str):
    ranks = hands.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        others = [c.raddr.port for c in rank.net_connections("inet") if c.raddr]
        assert hands.demo.port not in others


def test_the_database_holds_the_warnings_and_not_the_lines(hands: Operator, run_id: str):
    logs = hands.path / "logs"
    until(lambda: hands.steps()[-1] > NOISY_STEPS, 60, "the noise is over")
    lines = sum(1 for rank in (0, 1) for line in (logs / f"train-{rank}.log").open() if ", line " in line)
    assert lines >= 100_000
    told = hands.messages(run_id)
    assert len(told) < 100
    assert sum("the noisy objective is tired" in message for message in told) == 1
    assert "all that its processes say: runs/story/logs/train-*.log" in told


def test_a_killed_flow_process_is_replaced_and_the_next_one_attaches(hands: Operator, run_id: str):
    listen_for(hands.demo, SILENCE_SECONDS)
    job = hands.job()["id"]
    hands.supervisor(run_id).kill()
    until(lambda: hands.demo.run(run_id)["run_count"] == 2, 90, "the run is started again")
    until(lambda: hands.state(run_id)["type"] == "RUNNING", 30, "it runs")
    hands.goes_on()
    assert hands.job()["id"] == job


def test_a_host_that_falls_silent_is_noticed_and_a_second_configuration_refused(hands: Operator, run_id: str):
    job = hands.job()["id"]
    os.killpg(hands.workers[-1].pid, signal.SIGKILL)
    hands.supervisor(run_id).kill()
    fell_silent = time.monotonic()
    hands.worker("gpu")
    other = json.dumps({**RUN, "train": {**RUN["train"], "log_images": 32}})
    refused = hands.start("train-model", other)
    until(lambda: hands.state(refused)["type"] == "FAILED", 90, "the second run is refused")
    assert (
        "a train job runs in runs/story with another configuration: train.log_images"
        in hands.state(refused)["message"]
    )
    until(lambda: hands.demo.run(run_id)["run_count"] == 3, 150, "the silent run is started again")
    assert time.monotonic() - fell_silent < SILENCE_SECONDS + 120
    listen_for(hands.demo, 600)
    until(lambda: hands.state(run_id)["type"] == "RUNNING", 30, "it runs")
    hands.goes_on()
    assert hands.job()["id"] == job


def test_a_line_of_progress_is_there_each_half_minute_and_no_more(hands: Operator, run_id: str):
    """Of the attempt that runs since it attached to the job."""
    began = hands.attached(run_id)
    until(lambda: time.time() - began > 75, 90, "it has run for a while")
    told = hands.lines_of_attempt(run_id)
    progress = [moment for moment, text in told if re.match(r" *\d+%  .*step [\d,]+", text)]
    assert len(progress) >= 2, told
    gaps = [later - earlier for earlier, later in itertools.pairwise([began, *progress])]
    assert all(29 < gap < 75 for gap in gaps), gaps


def test_each_checkpoint_is_an_event(hands: Operator, run_id: str):
    query = {"filter": {"event": {"name": [EVENT]}}, "limit": 5}

    def found() -> list[dict[str, Any]]:
        events = hands.demo.api("/events/filter", query)["events"]
        return [event for event in events if event["resource"]["prefect.resource.name"] == RUN["run"]["name"]]

    event = until(found, 120, "the event of a checkpoint")[0]
    assert event["payload"]["checkpoint"] == f"step-{event['payload']['step']:08d}"


def test_training_does_not_notice_that_the_server_is_away(hands: Operator, run_id: str):
    server = PrefectServer(hands.demo)
    restart = server.kill()
    began, before = time.monotonic(), len(hands.steps())
    time.sleep(AWAY_SECONDS)
    assert len(hands.steps()) >= before + AWAY_SECONDS / 4  # a line each half second or so
    server.start(*restart)
    shown = time.monotonic() - began
    assert hands.state(run_id)["type"] == "RUNNING", shown

    def caught_up() -> bool:
        query = {"flow_runs": {"id": {"any_": [run_id]}}, "artifacts": {"key": {"any_": ["train-progress"]}}}
        bar = max(hands.demo.api("/artifacts/filter", query), key=lambda found: found["updated"])
        told = re.search(r"step ([\d,]*\d)", bar["description"])
        return bool(told) and int(told[1].replace(",", "")) > hands.steps()[before]

    until(caught_up, 90, "the artifact catches up")


@pytest.fixture
def cancel(hands: Operator, run_id: str, request: pytest.FixtureRequest) -> Callable[[], None]:
    """The button of the UI, or the command on a machine without a browser."""
    if BROWSER and DRIVER:
        browser: WebDriver = request.getfixturevalue("browser")
        return lambda: press_cancel(browser, hands.demo, run_id)

    def by_command() -> None:
        assert hands.demo.prefect("flow-run", "cancel", run_id).returncode == 0

    return by_command


def test_a_run_whose_worker_is_gone_is_cancelled(hands: Operator, run_id: str, cancel: Callable[[], None]):
    os.killpg(hands.workers[-1].pid, signal.SIGKILL)
    hands.goes_on()
    hands.worker("gpu")
    second = hands.start("train-model", json.dumps(RUN))
    supervisor, job = hands.supervisor(run_id), hands.job()["id"]
    hands.attached(second)
    cancel()
    until(lambda: hands.state(run_id)["type"] == "CANCELLED", 60, "the run is cancelled")
    assert with_variable(JOB_VARIABLE, job) == []
    told, step = hands.state(run_id)["message"], hands.steps()[-1]
    stopped = int(told.split("stopped at step ")[1].split(" (")[0].replace(",", ""))
    assert step <= stopped < step + 20
    assert f"checkpoint step-{stopped:08d}; to go on: prefect flow-run retry {run_id}" in told
    until(lambda: not supervisor.is_running(), 30, "its process ends")
    # The run that was attached to the same job ends with it.
    until(lambda: hands.state(second)["type"] == "CANCELLED", 60, "the attached run ends")


def press_cancel(browser: WebDriver, demo: Demo, run_id: str) -> None:
    browser.get(f"http://127.0.0.1:{demo.port}/v2/runs/flow-run/{run_id}")
    press(browser, "Open menu", "button")
    press(browser, "Cancel", "*[@role='menuitem']")
    press(browser, "Cancel Flow Run", "button")


def test_the_command_of_the_message_continues_and_a_killed_launcher_is_replaced(hands: Operator, run_id: str):
    told = hands.state(run_id)["message"]
    command = told.split("to go on: ")[1].split(", or ")[0].split()
    stopped = hands.steps()[-1]
    assert hands.demo.command(*command).returncode == 0
    until(lambda: hands.steps()[-1] > stopped, 120, "training goes on")
    first, runs = hands.job()["id"], hands.demo.run(run_id)["run_count"]
    psutil.Process(hands.job()["pid"]).kill()
    until(lambda: hands.job()["id"] != first, 90, "another job is submitted")
    hands.goes_on(120)
    # The run's own process started it again: no new attempt, and the reason is on record.
    assert hands.demo.run(run_id)["run_count"] == runs
    (restart,) = read_lines(hands.path / "logs" / "restarts.jsonl")
    assert "the launcher on" in restart["because"]
    assert "was killed; stopped at step" in restart["because"]
    assert hands.steps() == sorted(set(hands.steps()))  # no step twice


def test_all_ranks_killed_at_once_are_named_and_training_goes_on(hands: Operator, run_id: str):
    first, runs = hands.job()["id"], hands.demo.run(run_id)["run_count"]
    ranks = hands.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        rank.kill()
    until(lambda: hands.job()["id"] != first, 90, "another job is submitted")
    hands.goes_on(120)
    assert hands.demo.run(run_id)["run_count"] == runs
    because = read_lines(hands.path / "logs" / "restarts.jsonl")[-1]["because"]
    assert socket.gethostname() in because
    assert "killed" in because
    assert hands.steps() == sorted(set(hands.steps()))


def test_a_parent_whose_stages_run_apart_cancels_them(hands: Operator, run_id: str):
    """The shards are whole already; its train-model attaches to the job of the story and ends with it."""
    config = {**RUN, "sample": {"images": 16, "solver": "euler", "steps": 2}}
    words = ("--param", 'apart=["shard", "train"]', "--param", f"config={json.dumps(config)}")
    created = hands.demo.prefect("deployment", "run", "train-digits", *words)
    parent = created.stdout.split("UUID: ")[1].split()[0]

    def children() -> dict[str, dict[str, Any]]:
        found = hands.demo.api("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [parent]}}})
        flows = {flow["id"]: flow["name"] for flow in hands.demo.api("/flows/filter", {})}
        return {flows[child["flow_id"]]: child for child in found}

    def state(stage: str) -> str:
        return children()[stage]["state"]["type"]

    until(lambda: state("train-model") == "RUNNING", 240, "both stages were started")
    assert state("shard-dataset") == "COMPLETED"
    hands.attached(children()["train-model"]["id"])
    job = hands.job()["id"]
    hands.goes_on()
    assert hands.demo.prefect("flow-run", "cancel", parent).returncode == 0
    until(lambda: state("train-model") == "CANCELLED", 60, "the stage is cancelled")
    until(lambda: f"retry {parent}" in (hands.state(parent)["message"] or ""), 90, "the last word")
    assert hands.state(parent)["type"] == "CANCELLED"
    assert "stopped at step" in hands.state(parent)["message"]
    assert with_variable(JOB_VARIABLE, job) == []
    until(lambda: hands.state(run_id)["type"] == "CANCELLED", 60, "so does the run that had the same job")


def test_the_traceback_of_a_failing_rank_is_in_the_log(hands: Operator, run_id: str):
    (hands.demo.root / "FAIL").touch()
    assert hands.demo.prefect("flow-run", "retry", run_id).returncode == 0

    def told() -> str | None:
        return next((text for text in hands.messages(run_id) if "the test wants a failure" in text), None)

    entry = until(told, 120, "the failure is told")
    assert entry.startswith("train-1.log: Traceback (most recent call last):\n")
    assert entry.endswith("FloatingPointError: the test wants a failure")
    hands.demo.prefect("flow-run", "cancel", run_id)  # or it has failed by itself
    until(lambda: hands.state(run_id)["type"] in ("CANCELLED", "FAILED"), 60, "it ends")
    (hands.demo.root / "FAIL").unlink()
