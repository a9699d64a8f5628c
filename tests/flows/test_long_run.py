"""Recovery of a long run when its process, worker or server is killed or it is cancelled.

The tests run in file order: each continues the run that the one before left. The objective mostly sleeps.
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

from flows.checkpoint_events import CHECKPOINT_EVENT
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
def operator(demo: Demo) -> Iterator[Operator]:
    """An own pool and worker for train-model, automations with short times, and the run itself."""
    installed = demo.command("python", "-m", "flows.automations").stdout.splitlines()
    assert installed == [f"{rule}: installed" for rule in RULES]
    assert demo.prefect("work-pool", "create", "gpu", "--type", "process").returncode == 0
    quick = (demo.root / "infra" / "prefect.yaml").read_text()
    assert 'FREQUENCY: "60"' in quick
    (demo.root / "quick.yaml").write_text(quick.replace('FREQUENCY: "60"', 'FREQUENCY: "30"'))
    for stage in APART:
        own = ("--name", f"flows.stages.{stage}/default", "--pool", "gpu")
        deployed = demo.prefect("--no-prompt", "deploy", "--prefect-file", "quick.yaml", *own)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    operator = Operator(demo, RUN["run"]["name"])
    operator.worker("gpu")
    yield operator
    for process in [psutil.Process(worker.pid) for worker in operator.workers if worker.poll() is None]:
        process.kill()
    for process in with_variable(JOB_VARIABLE, operator.job()["id"]):
        process.kill()


@pytest.fixture(scope="module")
def run_id(operator: Operator) -> str:
    run_id = operator.start("train-model", json.dumps(RUN))
    until(lambda: len(operator.steps()) > 2, 240, "training begins")
    return run_id


def listen_for(demo: Demo, seconds: int) -> None:
    """Have a run that is not heard of for so long be taken for crashed."""
    rules = (
        (demo.root / "infra" / "automations.yaml").read_text().replace("within: 600", f"within: {seconds}")
    )
    (demo.root / "rules.yaml").write_text(rules)
    updated = demo.command("python", "-m", "flows.automations", "rules.yaml").stdout.splitlines()
    assert updated == [f"{rule}: updated" for rule in RULES]


def test_ranks_hold_no_connection_to_the_server(operator: Operator, run_id: str):
    ranks = operator.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        others = [c.raddr.port for c in rank.net_connections("inet") if c.raddr]
        assert operator.demo.port not in others


def test_the_database_holds_the_warnings_and_not_the_lines(operator: Operator, run_id: str):
    logs = operator.path / "logs"
    until(lambda: operator.steps()[-1] > NOISY_STEPS, 60, "the noise is over")
    lines = sum(1 for rank in (0, 1) for line in (logs / f"train-{rank}.log").open() if ", line " in line)
    assert lines >= 100_000
    messages = operator.messages(run_id)
    assert len(messages) < 100
    assert sum("the noisy objective is tired" in message for message in messages) == 1
    assert "full logs of its processes: runs/story/logs/train-*.log" in messages


def test_a_killed_flow_process_is_replaced_and_the_next_one_attaches(operator: Operator, run_id: str):
    listen_for(operator.demo, SILENCE_SECONDS)
    job = operator.job()["id"]
    operator.supervisor(run_id).kill()
    until(lambda: operator.demo.run(run_id)["run_count"] == 2, 90, "the run is started again")
    until(lambda: operator.state(run_id)["type"] == "RUNNING", 30, "it runs")
    operator.goes_on()
    assert operator.job()["id"] == job


def test_a_host_that_falls_silent_is_noticed_and_a_second_configuration_refused(
    operator: Operator, run_id: str
):
    job = operator.job()["id"]
    os.killpg(operator.workers[-1].pid, signal.SIGKILL)
    operator.supervisor(run_id).kill()
    fell_silent = time.monotonic()
    operator.worker("gpu")
    other = json.dumps({**RUN, "train": {**RUN["train"], "log_images": 32}})
    refused = operator.start("train-model", other)
    until(lambda: operator.state(refused)["type"] == "FAILED", 90, "the second run is refused")
    assert (
        "a train job runs in runs/story with another configuration: train.log_images"
        in operator.state(refused)["message"]
    )
    until(lambda: operator.demo.run(run_id)["run_count"] == 3, 150, "the silent run is started again")
    assert time.monotonic() - fell_silent < SILENCE_SECONDS + 120
    listen_for(operator.demo, 600)
    until(lambda: operator.state(run_id)["type"] == "RUNNING", 30, "it runs")
    operator.goes_on()
    assert operator.job()["id"] == job


def test_a_line_of_progress_is_there_each_half_minute_and_no_more(operator: Operator, run_id: str):
    """Of the attempt that runs since it attached to the job."""
    began = operator.attached(run_id)
    until(lambda: time.time() - began > 75, 90, "it has run for a while")
    lines = operator.lines_of_attempt(run_id)
    progress = [moment for moment, text in lines if re.match(r" *\d+%  .*step [\d,]+", text)]
    assert len(progress) >= 2, lines
    gaps = [later - earlier for earlier, later in itertools.pairwise([began, *progress])]
    assert all(29 < gap < 75 for gap in gaps), gaps


def test_each_checkpoint_is_an_event(operator: Operator, run_id: str):
    query = {"filter": {"event": {"name": [CHECKPOINT_EVENT]}}, "limit": 5}

    def events_of_the_run() -> list[dict[str, Any]]:
        events = operator.demo.api("/events/filter", query)["events"]
        return [event for event in events if event["resource"]["prefect.resource.name"] == RUN["run"]["name"]]

    event = until(events_of_the_run, 120, "the event of a checkpoint")[0]
    assert event["payload"]["checkpoint"] == f"step-{event['payload']['step']:08d}"


def test_training_does_not_notice_that_the_server_is_away(operator: Operator, run_id: str):
    server = PrefectServer(operator.demo)
    restart = server.kill()
    began, before = time.monotonic(), len(operator.steps())
    time.sleep(AWAY_SECONDS)
    assert len(operator.steps()) >= before + AWAY_SECONDS / 4  # a line each half second or so
    server.start(*restart)
    shown = time.monotonic() - began
    assert operator.state(run_id)["type"] == "RUNNING", shown

    def caught_up() -> bool:
        query = {"flow_runs": {"id": {"any_": [run_id]}}, "artifacts": {"key": {"any_": ["train-progress"]}}}
        bar = max(operator.demo.api("/artifacts/filter", query), key=lambda artifact: artifact["updated"])
        match = re.search(r"step ([\d,]*\d)", bar["description"])
        return bool(match) and int(match[1].replace(",", "")) > operator.steps()[before]

    until(caught_up, 90, "the artifact catches up")


@pytest.fixture
def cancel(operator: Operator, run_id: str, request: pytest.FixtureRequest) -> Callable[[], None]:
    """The button of the UI, or the command on a machine without a browser."""
    if BROWSER and DRIVER:
        browser: WebDriver = request.getfixturevalue("browser")
        return lambda: press_cancel(browser, operator.demo, run_id)

    def by_command() -> None:
        assert operator.demo.prefect("flow-run", "cancel", run_id).returncode == 0

    return by_command


def test_a_run_whose_worker_is_gone_is_cancelled(operator: Operator, run_id: str, cancel: Callable[[], None]):
    os.killpg(operator.workers[-1].pid, signal.SIGKILL)
    operator.goes_on()
    operator.worker("gpu")
    second = operator.start("train-model", json.dumps(RUN))
    supervisor, job = operator.supervisor(run_id), operator.job()["id"]
    operator.attached(second)
    cancel()
    until(lambda: operator.state(run_id)["type"] == "CANCELLED", 60, "the run is cancelled")
    assert with_variable(JOB_VARIABLE, job) == []
    message, step = operator.state(run_id)["message"], operator.steps()[-1]
    stopped = int(message.split("stopped at step ")[1].split(" (")[0].replace(",", ""))
    assert step <= stopped < step + 20
    assert f"checkpoint step-{stopped:08d}; to resume: prefect flow-run retry {run_id}" in message
    until(lambda: not supervisor.is_running(), 30, "its process ends")
    # The run that was attached to the same job ends with it.
    until(lambda: operator.state(second)["type"] == "CANCELLED", 60, "the attached run ends")


def press_cancel(browser: WebDriver, demo: Demo, run_id: str) -> None:
    browser.get(f"http://127.0.0.1:{demo.port}/v2/runs/flow-run/{run_id}")
    press(browser, "Open menu", "button")
    press(browser, "Cancel", "*[@role='menuitem']")
    press(browser, "Cancel Flow Run", "button")


def test_the_command_of_the_message_continues_and_a_killed_launcher_is_replaced(
    operator: Operator, run_id: str
):
    message = operator.state(run_id)["message"]
    command = message.split("to resume: ")[1].split(", or ")[0].split()
    stopped = operator.steps()[-1]
    assert operator.demo.command(*command).returncode == 0
    until(lambda: operator.steps()[-1] > stopped, 120, "training goes on")
    first, runs = operator.job()["id"], operator.demo.run(run_id)["run_count"]
    psutil.Process(operator.job()["pid"]).kill()
    until(lambda: operator.job()["id"] != first, 90, "another job is submitted")
    operator.goes_on(120)
    # The run's own process started it again: no new attempt, and the reason is on record.
    assert operator.demo.run(run_id)["run_count"] == runs
    (restart,) = read_lines(operator.path / "logs" / "restarts.jsonl")
    assert "the launcher on" in restart["because"]
    assert "was killed; stopped at step" in restart["because"]
    assert operator.steps() == sorted(set(operator.steps()))  # no step twice


def test_all_ranks_killed_at_once_are_named_and_training_goes_on(operator: Operator, run_id: str):
    first, runs = operator.job()["id"], operator.demo.run(run_id)["run_count"]
    ranks = operator.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        rank.kill()
    until(lambda: operator.job()["id"] != first, 90, "another job is submitted")
    operator.goes_on(120)
    assert operator.demo.run(run_id)["run_count"] == runs
    because = read_lines(operator.path / "logs" / "restarts.jsonl")[-1]["because"]
    assert socket.gethostname() in because
    assert "killed" in because
    assert operator.steps() == sorted(set(operator.steps()))


def test_a_cancelled_parent_cancels_its_subflows(operator: Operator, run_id: str):
    """The shards are complete; its train-model attaches to the job of the other run and ends with it."""
    config = {**RUN, "sample": {"images": 16, "solver": "euler", "steps": 2}}
    arguments = ("--param", 'apart=["shard", "train"]', "--param", f"config={json.dumps(config)}")
    created = operator.demo.prefect("deployment", "run", "train-digits", *arguments)
    parent = created.stdout.split("UUID: ")[1].split()[0]

    def children() -> dict[str, dict[str, Any]]:
        runs = operator.demo.api(
            "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [parent]}}}
        )
        flows = {flow["id"]: flow["name"] for flow in operator.demo.api("/flows/filter", {})}
        return {flows[child["flow_id"]]: child for child in runs}

    def state(stage: str) -> str:
        return children()[stage]["state"]["type"]

    until(lambda: state("train-model") == "RUNNING", 240, "both stages were started")
    assert state("shard-dataset") == "COMPLETED"
    operator.attached(children()["train-model"]["id"])
    job = operator.job()["id"]
    operator.goes_on()
    assert operator.demo.prefect("flow-run", "cancel", parent).returncode == 0
    until(lambda: state("train-model") == "CANCELLED", 60, "the stage is cancelled")
    until(lambda: f"retry {parent}" in (operator.state(parent)["message"] or ""), 90, "the final message")
    assert operator.state(parent)["type"] == "CANCELLED"
    assert "stopped at step" in operator.state(parent)["message"]
    assert with_variable(JOB_VARIABLE, job) == []
    until(lambda: operator.state(run_id)["type"] == "CANCELLED", 60, "so does the run that had the same job")


def test_the_traceback_of_a_failing_rank_is_in_the_log(operator: Operator, run_id: str):
    (operator.demo.root / "FAIL").touch()
    assert operator.demo.prefect("flow-run", "retry", run_id).returncode == 0

    def failure_entry() -> str | None:
        return next((text for text in operator.messages(run_id) if "the test wants a failure" in text), None)

    entry = until(failure_entry, 120, "the failure is logged")
    assert entry.startswith("train-1.log: Traceback (most recent call last):\n")
    assert entry.endswith("FloatingPointError: the test wants a failure")
    operator.demo.prefect("flow-run", "cancel", run_id)  # or it has failed by itself
    until(lambda: operator.state(run_id)["type"] in ("CANCELLED", "FAILED"), 60, "it ends")
    (operator.demo.root / "FAIL").unlink()
