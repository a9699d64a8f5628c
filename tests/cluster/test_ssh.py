"""Training over ssh on two hosts: a lost host, a network cut, a run directory that one host cannot see."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fm_core.checkpoint.format import complete_steps
from fm_core.launch.job import JOB_VARIABLE, submitted
from fm_core.stages.shard import shard
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support.operator import until
from tests.support.two_host_run import BATCH, LIMIT_SECONDS, SECRET, STEPS, TwoHostRun
from tests.support.two_hosts import environment

PORT = 31_123


@pytest.fixture(scope="module")
def ssh_attempts(pair, hostfile, tmp_path_factory):
    """Jobs that are refused or fail, one after another in one process of h1."""
    folder = tmp_path_factory.mktemp("attempts")
    for name in ("runs", "own"):
        (folder / name).mkdir()
    pair.second.hide(folder / "own")
    far = folder / "far"
    far.write_text("10.99.0.1 slots=1\n10.99.0.9 slots=1\n")
    launch = {"kind": "ssh", "hostfile": str(hostfile), "threads": 1, "restarts": 0}
    asked = [
        {"name": "far", "does": "write;write", "launch": {**launch, "hostfile": str(far)}},
        {"name": "port", "does": "write;write", "launch": {**launch, "port": PORT}},
        {
            "name": "own",
            "does": "write;write",
            "stage": "train",
            "train": {"checkpoint_root": str(folder / "own")},
            "launch": launch,
        },
        {"name": "raises", "does": "wait;raise", "launch": launch},
        {"name": "killed", "does": "wait;wait", "kill": True, "launch": launch},
        {"name": "writes", "does": "write;write", "launch": launch},
        {"name": "preflight", "launch": launch},
        {"name": "far-preflight", "launch": {**launch, "hostfile": str(far)}},
    ]
    listen = f"import socket, time; s = socket.create_server(('', {PORT})); time.sleep(600)"
    busy = subprocess.Popen(pair.first.inside(sys.executable, "-c", listen))
    done = subprocess.run(
        pair.first.inside(sys.executable, "-m", "tests.support.fake_job_runner", str(folder)),
        env=environment(),
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    busy.kill()
    busy.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def test_a_host_that_cannot_be_reached_is_named_before_anything_starts(ssh_attempts):
    folder, results = ssh_attempts
    assert results["far"]["kind"] == "UnreachableError"
    assert results["far"]["message"].startswith("launch.hostfile: 10.99.0.9 cannot be reached by ssh")
    assert "\n" not in results["far"]["message"]
    assert not (folder / "runs" / "far" / "job.json").exists()


def test_a_port_in_use_is_named(ssh_attempts):
    _, results = ssh_attempts
    assert results["port"]["kind"] == "UserError"
    assert results["port"]["message"].startswith(f"launch.port: {PORT} of 10.99.0.1 cannot be used")


def test_a_place_for_checkpoints_that_a_host_does_not_see_is_named(ssh_attempts):
    folder, results = ssh_attempts
    assert results["own"]["kind"] == "UserError"
    assert results["own"]["message"].startswith(
        f"train.checkpoint_root: h2 has no access to {folder / 'own'}"
    )
    assert list((folder / "own").iterdir()) == []


def test_a_rank_that_fails_ends_the_job_and_is_named_with_its_host(ssh_attempts):
    folder, results = ssh_attempts
    assert results["raises"]["kind"] == "JobFailedError"
    assert "rank 1 on h2: ZeroDivisionError: a number" in results["raises"]["message"]
    assert read_json(folder / "runs" / "raises" / "pretend-0.end.json")["kind"] == "stopped"


def test_kill_9_of_the_agent_ends_the_ranks_of_all_hosts(pair, ssh_attempts):
    folder, results = ssh_attempts
    assert results["killed"]["kind"] == "StopRequested"
    control = folder / "runs" / "killed"
    assert [read_json(control / f"pretend-{rank}.end.json")["kind"] for rank in (0, 1)] == ["stopped"] * 2
    word = f"{JOB_VARIABLE}={submitted(control).id}"
    assert [host.processes(word) for host in (pair.first, pair.second)] == [[], []]


def test_environment_and_configuration_reach_every_host(ssh_attempts):
    folder, results = ssh_attempts
    assert results["writes"]["kind"] == "done"
    for rank in (0, 1):
        # What each rank does is set in the environment of the submitting process alone.
        assert read_json(folder / "runs" / "writes" / f"made-{rank}.json")["run"] == "writes"


def test_the_preflight_asks_all_hosts(ssh_attempts):
    folder, results = ssh_attempts
    checks = {check["name"]: check for check in results["preflight"]["checks"]}
    assert checks["ssh to h2"]["ok"]
    assert "2 processes met on h1, h2" in checks["launch"]["detail"]
    assert "torch 2." in checks["versions"]["detail"]
    assert "h2: " in checks["devices"]["detail"]
    assert checks["clocks"]["ok"]
    assert "GB/s" in checks["all-reduce"]["detail"]
    assert not checks["data"]["ok"]
    assert "on h1, h2" in checks["data"]["detail"]
    assert {name for name, check in checks.items() if not check["ok"]} == {"data"}
    assert list((folder / "runs").glob(".preflight-*")) == []


def test_the_preflight_names_a_host_that_does_not_answer(ssh_attempts):
    _, results = ssh_attempts
    checks = {check["name"]: check for check in results["far-preflight"]["checks"]}
    assert checks["ssh to 10.99.0.1"]["ok"]
    assert not checks["ssh to 10.99.0.9"]["ok"]
    assert "No route to host" in checks["ssh to 10.99.0.9"]["detail"]


def _holds(path: Path, word: str) -> bool:
    try:
        return word.encode() in path.read_bytes()
    except OSError:  # a folder, or gone in the meantime
        return False


@pytest.fixture(scope="module")
def ssh_run(pair, hostfile, tmp_path_factory):
    """Outcomes of one run that is killed, cut off, stopped and resumed."""
    folder = tmp_path_factory.mktemp("run")
    run = TwoHostRun(folder, pair.first, {"kind": "ssh", "hostfile": str(hostfile)})
    shard(run.config)
    outcomes = {"run": run}

    def left() -> dict[str, list[psutil.Process]]:
        word = f"{JOB_VARIABLE}={submitted(run.path).id}"
        return {host.name: host.processes(word) for host in (pair.first, pair.second)}

    def ended(name: str) -> None:
        outcomes[name] = run.end()
        outcomes[f"{name} left"] = left()
        outcomes[f"{name} steps"] = complete_steps(run.checkpoints)

    # The second host has no access to the run directory; then all of its processes are killed.
    pair.second.hide(folder / "runs")
    run.start("train", "--launch.restarts", "0")
    outcomes["killed at"] = run.wait_beyond(24)
    word = f"{JOB_VARIABLE}={submitted(run.path).id}"
    outcomes["working"] = {host.name: len(host.processes(word)) for host in (pair.first, pair.second)}
    outcomes["with the key"] = len(pair.second.processes(SECRET))
    everything = [process for host in (pair.first, pair.second) for process in host.processes(word)]
    places = [Path(f"/proc/{process.pid}/cmdline") for process in everything]
    outcomes["telling the key"] = [path for path in (*places, *folder.rglob("*")) if _holds(path, SECRET)]
    outcomes["killed"] = pair.second.kill(word)
    ended("kill")
    outcomes["rank 1 log"] = (run.path / "logs" / "train-1.log").exists()

    # Still not visible: the network is cut, and restored when the command has noticed.
    run.start("train", "--launch.restarts", "1", "--launch.restart_seconds", "0.5")
    outcomes["cut at"] = run.wait_beyond(outcomes["killed at"] + 8)
    outcomes["cut job"] = submitted(run.path)
    pair.disconnect()
    cut_off = f"{JOB_VARIABLE}={outcomes['cut job'].id}"
    outcomes["working when cut off"] = len(pair.second.processes(cut_off))
    restarts = run.path / "logs" / "restarts.jsonl"
    until(lambda: read_lines(restarts), "the network cut is noticed", LIMIT_SECONDS)
    outcomes["restarts"] = read_lines(restarts)
    outcomes["cut steps"] = complete_steps(run.checkpoints)
    # The host that was cut off ends its ranks on its own, before it can be reached again.
    until(lambda: not pair.second.processes(cut_off), "the ranks that were cut off end", LIMIT_SECONDS)
    pair.reconnect()

    # It continues automatically, and is stopped by a signal to the command.
    outcomes["stopped after"] = run.wait_beyond(run.steps()[-1] + 4)
    outcomes["left of the cut"] = pair.second.processes(cut_off)
    run.terminate()
    ended("stop")
    pair.second.show(folder / "runs")

    run.start("train")
    ended("end")
    run.close()
    return outcomes


def test_both_hosts_work_at_one_run(ssh_run):
    # pdsh, two lines of a shell, a heartbeat process and an ssh each, and the node, agent and rank of the
    # host.
    assert ssh_run["working"]["h2"] == 3
    assert ssh_run["working"]["h1"] > 3
    job = submitted(ssh_run["run"].path)
    assert (job.kind, job.host, job.hosts) == ("ssh", "h1", {"10.99.0.1": 1, "h2": 1})


def test_the_environment_reaches_only_the_other_host(ssh_run):
    assert ssh_run["with the key"] == 2  # the agent and the rank
    assert ssh_run["telling the key"] == []


def test_kill_9_of_all_on_one_host_ends_the_job_and_names_the_host(ssh_run):
    kill = ssh_run["kill"]
    assert ssh_run["killed"] == 3
    assert kill.code == 1
    assert len(kill.errors) == 1
    assert "host h2 was lost" in kill.errors[0]
    assert ssh_run["kill left"] == {"h1": [], "h2": []}
    assert ssh_run["kill steps"][-1] >= 16


def test_a_host_that_does_not_see_the_run_directory_works_all_the_same(ssh_run):
    run = ssh_run["run"]
    assert not ssh_run["rank 1 log"]
    assert (run.path / "logs" / "train-0.log").exists()
    # How its rank ended after the stop came over the line.
    assert "h2: fm-end {" in run.log()


def test_a_signal_saves_on_all_hosts_and_leaves_nothing(ssh_run):
    stop = ssh_run["stop"]
    assert stop.code == 3
    step = ssh_run["stop steps"][-1]
    assert step >= ssh_run["stopped after"]
    assert stop.errors == ["fm: stopped; run it again to continue"]
    assert ssh_run["stop left"] == {"h1": [], "h2": []}


def test_a_network_cut_is_a_clear_failure_and_the_run_goes_on_after_it(ssh_run):
    assert len(ssh_run["restarts"]) == 1
    because = ssh_run["restarts"][0]["because"]
    assert "host h2 was lost" in because
    assert "not responding" in because
    assert "\n" not in because
    assert ssh_run["cut steps"][-1] >= ssh_run["kill steps"][-1]
    assert ssh_run["stopped after"] > ssh_run["cut at"]
    assert ssh_run["working when cut off"] == 3
    # No process of the host that was cut off was left when the next job started.
    assert ssh_run["left of the cut"] == []


def test_the_run_goes_on_from_its_checkpoint_to_its_end(ssh_run):
    run = ssh_run["run"]
    assert ssh_run["end"].code == 0
    assert ssh_run["end left"] == {"h1": [], "h2": []}
    done = read_json(run.path / "train" / "DONE.json")
    assert (done["step"], done["images_seen"]) == (STEPS, STEPS * BATCH)
    # No step is missing or duplicated, whatever happened in between.
    assert run.steps() == list(range(4, STEPS + 1, 4))
    assert list(run.checkpoints.glob(".*.seen")) == []
