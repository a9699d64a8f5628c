"""Recovery of a long run when its process, worker or server is killed or it is cancelled.

The tests run in file order: each continues the run that the one before left. The objective mostly sleeps.
Intervals of the server, the automations and the restarts are shorter than an operator's.
"""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from flows.checkpoint_events import CHECKPOINT_EVENT
from fm_core.launch.job import JOB_VARIABLE
from fm_core.storage.atomic_files import read_lines
from tests.support.demo_project import created_run
from tests.support.fault_injection import NOISY_STEPS
from tests.support.operator import Operator, until, with_variable
from tests.support.served_project import RULES, SILENCE_SECONDS, ServedProject, listen_for, served_project
from tests.support.ui_driver import BROWSER, DRIVER, press_cancel, sign_in

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

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
    "launch": {"restarts": 9, "restart_seconds": 0.5},
}
FLOWS = ("stages.shard_dataset", "stages.train_model", "train.train_digits")
QUICK_SERVER = {"PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S"}
"""How often the server evaluates its proactive triggers."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProject]:
    """A server of its own: it is killed."""
    with served_project(tmp_path_factory.mktemp("long-run"), {}, **QUICK_SERVER) as project:
        yield project


@pytest.fixture(scope="module")
def operator(served: ServedProject) -> Operator:
    """The operator of a pool with one worker, automations with short times, and the shards of the run."""
    installed = served.command("python", "-m", "flows.automations").stdout.splitlines()
    assert installed == [f"{rule}: installed" for rule in RULES]
    assert served.prefect("work-pool", "create", "gpu", "--type", "process").returncode == 0
    quick = (served.root / "infra" / "prefect.yaml").read_text()
    assert 'FREQUENCY: "60"' in quick
    (served.root / "quick.yaml").write_text(quick.replace('FREQUENCY: "60"', 'FREQUENCY: "30"'))
    for flow in FLOWS:
        own = ("--name", f"flows.{flow}/default", "--pool", "gpu")
        deployed = served.prefect("--no-prompt", "deploy", "--prefect-file", "quick.yaml", *own)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert served.command("fm", "shard", "--config", "infra/configs/digits.yaml").returncode == 0
    operator = Operator(served, RUN["run"]["name"])
    operator.worker("gpu")
    return operator


@pytest.fixture(scope="module")
def run_id(operator: Operator) -> str:
    run_id = operator.start("train-model", json.dumps(RUN))
    until(lambda: len(operator.steps()) > 2, "training begins")
    return run_id


def test_ranks_hold_no_connection_to_the_server(served: ServedProject, operator: Operator, run_id: str):
    ranks = operator.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        others = [c.raddr.port for c in rank.net_connections("inet") if c.raddr]
        assert served.port not in others


def test_the_database_holds_the_warnings_and_not_the_lines(operator: Operator, run_id: str):
    logs = operator.path / "logs"
    until(lambda: operator.steps()[-1] > NOISY_STEPS, "the noise is over")
    lines = sum(1 for rank in (0, 1) for line in (logs / f"train-{rank}.log").open() if ", line " in line)
    assert lines >= 100_000
    messages = operator.messages(run_id)
    assert len(messages) < 100
    assert sum("the noisy objective is tired" in message for message in messages) == 1
    assert "full logs of its processes: runs/story/logs/train-*.log" in messages


def test_a_killed_flow_process_is_replaced_and_the_next_one_attaches(
    served: ServedProject, operator: Operator, run_id: str
):
    listen_for(served, SILENCE_SECONDS)
    job, runs = operator.job()["id"], served.run(run_id)["run_count"]
    operator.supervisor(run_id).kill()
    until(lambda: served.run(run_id)["run_count"] > runs, "the run is started again")
    until(lambda: operator.state(run_id)["type"] == "RUNNING", "it runs")
    operator.goes_on()
    assert operator.job()["id"] == job


def test_a_host_that_falls_silent_is_noticed_and_a_second_configuration_refused(
    served: ServedProject, operator: Operator, run_id: str
):
    job, runs = operator.job()["id"], served.run(run_id)["run_count"]
    operator.heard_of(run_id)
    os.killpg(operator.workers[-1].pid, signal.SIGKILL)
    operator.supervisor(run_id).kill()
    operator.worker("gpu")
    other = served.root / "other.yaml"
    other.write_text((operator.path / "config.yaml").read_text())
    refused = served.command("fm", "train", "--config", "other.yaml", "--train.log_images", "32")
    assert refused.returncode == 2
    assert "a train job runs in runs/story with another configuration: train.log_images" in refused.stderr
    until(lambda: served.run(run_id)["run_count"] > runs, "the silent run is started again")
    listen_for(served, 600)
    until(lambda: operator.state(run_id)["type"] == "RUNNING", "it runs")
    operator.goes_on()
    assert operator.job()["id"] == job


def test_each_checkpoint_is_an_event(served: ServedProject, operator: Operator, run_id: str):
    query = {"filter": {"event": {"name": [CHECKPOINT_EVENT]}}, "limit": 5}

    def events_of_the_run() -> list[dict[str, Any]]:
        events = served.api("/events/filter", query)["events"]
        return [event for event in events if event["resource"]["prefect.resource.name"] == RUN["run"]["name"]]

    event = until(events_of_the_run, "the event of a checkpoint")[0]
    assert event["payload"]["checkpoint"] == f"step-{event['payload']['step']:08d}"


def test_a_worker_that_gets_sigterm_lets_its_run_save_and_the_next_worker_continues_it(
    served: ServedProject, operator: Operator, run_id: str
):
    operator.attached(run_id)
    job, runs = operator.job()["id"], served.run(run_id)["run_count"]
    worker = operator.workers[-1]
    worker.terminate()
    assert worker.wait(timeout=300) is not None
    stopped = operator.steps()[-1]
    assert with_variable(JOB_VARIABLE, job) == []
    assert (operator.path / "train" / "checkpoints" / f"step-{stopped:08d}" / "COMPLETE").exists()
    assert operator.state(run_id)["type"] in ("CRASHED", "SCHEDULED")  # the automation schedules it again
    operator.worker("gpu")
    until(lambda: operator.steps()[-1] > stopped, "the run continues")
    assert operator.job()["id"] != job
    assert served.run(run_id)["run_count"] > runs
    assert operator.repeated_steps() == []


def test_training_does_not_notice_that_the_server_is_unavailable(
    served: ServedProject, operator: Operator, run_id: str
):
    operator.attached(run_id)
    restart = served.kill_server()
    before = len(operator.steps())
    operator.goes_on(lines=20)  # test_progress_report.py has a server that is unavailable for longer
    served.restart_server(*restart)
    assert operator.state(run_id)["type"] == "RUNNING"

    def caught_up() -> bool:
        match = re.search(r"step ([\d,]*\d)", operator.progress(run_id))
        return bool(match) and int(match[1].replace(",", "")) > operator.steps()[before]

    until(caught_up, "the artifact catches up")

    def line_of_progress() -> bool:
        return any(re.match(r" *\d+%  .*step [\d,]+", text) for text in operator.messages(run_id))

    until(line_of_progress, "one line in half a minute")


@pytest.fixture
def cancel(
    served: ServedProject, operator: Operator, run_id: str, request: pytest.FixtureRequest
) -> Callable[[], None]:
    """The button of the UI, or the command on a machine without a browser."""
    if BROWSER and DRIVER:
        browser: WebDriver = request.getfixturevalue("browser")
        sign_in(browser, served.port, served.secret)
        return lambda: press_cancel(browser, f"http://127.0.0.1:{served.port}/v2/runs/flow-run/{run_id}")

    def by_command() -> None:
        assert served.prefect("flow-run", "cancel", run_id).returncode == 0

    return by_command


def test_a_run_whose_worker_is_gone_is_cancelled(operator: Operator, run_id: str, cancel: Callable[[], None]):
    os.killpg(operator.workers[-1].pid, signal.SIGKILL)
    operator.goes_on()
    operator.worker("gpu")
    second = operator.start("train-model", json.dumps(RUN))
    supervisor, job = operator.supervisor(run_id), operator.job()["id"]
    operator.attached(second)
    cancel()
    until(lambda: operator.state(run_id)["type"] == "CANCELLED", "the run is cancelled")
    assert with_variable(JOB_VARIABLE, job) == []
    message, step = operator.state(run_id)["message"], operator.steps()[-1]
    stopped = int(message.split("stopped at step ")[1].split(" (")[0].replace(",", ""))
    assert step <= stopped < step + 20
    assert f"checkpoint step-{stopped:08d}; to resume: prefect flow-run retry {run_id}" in message
    until(lambda: not supervisor.is_running(), "its process ends")
    # The run that was attached to the same job ends with it.
    until(lambda: operator.state(second)["type"] == "CANCELLED", "the attached run ends")


def test_the_command_of_the_message_continues_and_a_killed_launcher_is_replaced(
    served: ServedProject, operator: Operator, run_id: str
):
    message = operator.state(run_id)["message"]
    command = message.split("to resume: ")[1].split(", or ")[0].split()
    stopped = operator.steps()[-1]
    assert served.command(*command).returncode == 0
    until(lambda: operator.steps()[-1] > stopped, "training goes on")
    first, runs = operator.job()["id"], served.run(run_id)["run_count"]
    psutil.Process(operator.job()["pid"]).kill()
    until(lambda: operator.job()["id"] != first, "another job is submitted")
    operator.goes_on()
    # The run's own process started it again: no new attempt, and the reason is on record.
    assert served.run(run_id)["run_count"] == runs
    (restart,) = read_lines(operator.path / "logs" / "restarts.jsonl")
    assert "the launcher on" in restart["because"]
    assert "was killed; stopped at step" in restart["because"]
    assert operator.repeated_steps() == []


def test_all_ranks_killed_at_once_are_named_and_training_goes_on(
    served: ServedProject, operator: Operator, run_id: str
):
    first, runs = operator.job()["id"], served.run(run_id)["run_count"]
    ranks = operator.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        rank.kill()
    until(lambda: operator.job()["id"] != first, "another job is submitted")
    operator.goes_on()
    assert served.run(run_id)["run_count"] == runs
    because = read_lines(operator.path / "logs" / "restarts.jsonl")[-1]["because"]
    assert socket.gethostname() in because
    assert "killed" in because
    assert operator.repeated_steps() == []


def test_the_traceback_of_a_failing_rank_is_in_the_log_and_training_goes_on(
    served: ServedProject, operator: Operator, run_id: str
):
    first = operator.job()["id"]
    (served.root / "FAIL").touch()

    def failure_entry() -> str | None:
        return next((text for text in operator.messages(run_id) if "the test wants a failure" in text), None)

    until(lambda: operator.job()["id"] != first, "the job failed and another is submitted")
    (served.root / "FAIL").unlink()
    entry = until(failure_entry, "the failure is logged")
    assert entry.startswith("train-1.log: Traceback (most recent call last):\n")
    assert entry.endswith("FloatingPointError: the test wants a failure")
    operator.goes_on()


def test_a_cancelled_parent_cancels_its_subflows(served: ServedProject, operator: Operator, run_id: str):
    """The shards are complete; its train-model attaches to the job of the other run and ends with it."""
    config = {**RUN, "sample": {"images": 16, "solver": "euler", "steps": 2}}
    arguments = ("--param", 'apart=["shard", "train"]', "--param", f"config={json.dumps(config)}")
    parent = created_run(served.prefect("deployment", "run", "train-digits", *arguments))

    def children() -> dict[str, dict[str, Any]]:
        runs = served.api("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [parent]}}})
        flows = {flow["id"]: flow["name"] for flow in served.api("/flows/filter", {})}
        return {flows[child["flow_id"]]: child for child in runs}

    def state(stage: str) -> str:
        return children()[stage]["state"]["type"]

    until(lambda: state("train-model") == "RUNNING", "both stages were started")
    assert state("shard-dataset") == "COMPLETED"
    operator.attached(children()["train-model"]["id"])
    job = operator.job()["id"]
    operator.goes_on()
    assert served.prefect("flow-run", "cancel", parent).returncode == 0
    until(lambda: state("train-model") == "CANCELLED", "the stage is cancelled")
    until(lambda: f"retry {parent}" in (operator.state(parent)["message"] or ""), "the final message")
    assert operator.state(parent)["type"] == "CANCELLED"
    assert "stopped at step" in operator.state(parent)["message"]
    assert with_variable(JOB_VARIABLE, job) == []
    until(lambda: operator.state(run_id)["type"] == "CANCELLED", "so does the run that had the same job")
