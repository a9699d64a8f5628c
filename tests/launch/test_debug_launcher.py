"""Debug launcher, which runs one rank in this process: its environment, cleanup, and refusals."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch
import torch.distributed as dist

from fm_core.config import RunConfig, parse_config
from fm_core.errors import JobFailedError, StopRequested, UserError
from fm_core.launch.debug import cancel, poll
from fm_core.launch.dispatch import submitted, world
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.reproduce.parallel import device_shares
from fm_core.run import lease as lease_module
from fm_core.run.lease import Lease
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.run.stop_file import was_stopped
from fm_core.stages.evaluate import evaluate
from fm_core.storage.atomic_files import read_json

THREADS = 3
PLACE = {}
"""Written by the workers of this module, read by its tests."""


def run(path, worker, observe=lambda progress: None, complete=lambda: True, **launch):
    launch = {"kind": "debug", "threads": THREADS, **launch}
    config = RunConfig.model_validate({"run": {"root": str(path)}, "launch": launch})
    (path / "logs").mkdir(exist_ok=True)
    entry_point = f"{__name__}:{worker.__name__}"
    supervise(StageJob(path, path / "logs", "pretend", entry_point, config, complete), observe)


def state():
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "process group": dist.is_initialized(),
    }


def look(config, rank):
    PLACE.update(state(), rank=(rank.number, rank.count, rank.local), watched=rank.watched)
    PLACE["sum"] = torch.ones(2)
    dist.all_reduce(PLACE["sum"])
    torch.set_float32_matmul_precision("high")
    sys.stdout = None


def start_processes(config, rank):
    """A process of the rank, and one like those that the interpreter keeps for later jobs."""
    wait = [sys.executable, "-c", "import time; time.sleep(600)"]
    PLACE["child"] = subprocess.Popen(wait)
    PLACE["helper"] = subprocess.Popen([*wait, "multiprocessing.resource_tracker"])


def fail(config, rank):
    raise ZeroDivisionError("a number\nof two lines")


def stop(config, rank):
    if rank.stop_requested():
        raise StopRequested("stopped at thing 3")


def exit_quietly(config, rank):
    sys.exit(0)


def touch_stop(config, rank):
    stop(config, rank)
    (rank.control / "STOP").touch()
    rank._looked_at = float("-inf")  # some seconds later
    stop(config, rank)


def terminate(config, rank):
    os.kill(os.getpid(), signal.SIGTERM)
    stop(config, rank)


def interrupt(config, rank):
    os.kill(os.getpid(), signal.SIGINT)
    stop(config, rank)


def interrupt_twice(config, rank):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_the_debugger(config, rank):
    exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)", {"__name__": "pdb"})


def wait_for_a_heartbeat(config, rank):
    lock = rank.control / "lock"
    first, deadline = read_json(lock)["heartbeat"], time.monotonic() + 60
    while read_json(lock)["heartbeat"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    PLACE["beat"] = True


def start_again(config, rank):
    for kind in ("debug", "local"):
        with pytest.raises(UserError, match=r"is in use by process \d+ on .* \(pretend\)") as caught:
            run(rank.control, look, kind=kind)
        assert "\n" not in str(caught.value)
    PLACE["refused"] = True


def report(config, rank):
    write_status(rank.control, Progress("pretend", 3, 7, "things"), job=rank.job)
    rank.stop_requested()


def test_the_rank_finds_what_a_local_rank_has_and_all_is_restored(tmp_path):
    before = state()
    run(tmp_path, look)
    assert state() == before
    assert PLACE["rank"] == (0, 1, 0)
    assert not PLACE["watched"]
    assert PLACE["threads"] == THREADS
    assert PLACE["process group"]
    assert PLACE["sum"].tolist() == [1.0, 1.0]
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert expected.items() <= PLACE["environment"].items()
    assert read_json(tmp_path / "pretend-0.end.json")["kind"] == "done"
    job = submitted(tmp_path)
    assert (job.kind, job.processes, job.threads, job.pid) == ("debug", 1, THREADS, None)
    assert not poll(job).alive
    assert Lease(tmp_path / "lock").holder() is None


def test_an_error_is_raised_as_it_is_without_a_restart_and_all_is_restored(tmp_path):
    before = state()
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path, fail, restarts=3)
    assert "in fail" in "".join(traceback.format_tb(caught.tb))
    assert state() == before
    assert read_json(tmp_path / "pretend-0.end.json")["kind"] == "error"
    assert not (tmp_path / "logs" / "restarts.jsonl").exists()
    run(tmp_path, look)


def test_its_processes_end_with_it_but_for_helpers_of_the_interpreter(tmp_path):
    try:
        run(tmp_path, start_processes)
        assert PLACE["child"].wait(timeout=60) == -signal.SIGTERM
        assert PLACE["helper"].poll() is None
    finally:
        for name in ("child", "helper"):
            PLACE[name].kill()
            PLACE[name].wait()


def test_what_is_not_complete_afterwards_is_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="not complete"):
        run(tmp_path, look, complete=lambda: False)


@pytest.mark.parametrize("worker", [touch_stop, terminate, interrupt])
def test_a_stop_file_and_the_first_signal_stop_it_between_two_pieces_of_work(tmp_path, worker):
    with pytest.raises(StopRequested, match=r"^stopped at thing 3$"):
        run(tmp_path, worker)
    assert read_json(tmp_path / "pretend-0.end.json")["kind"] == "stopped"


def test_a_stop_is_recorded_as_a_request_and_the_next_start_clears_it(tmp_path):
    with pytest.raises(StopRequested):
        run(tmp_path, terminate)
    assert was_stopped(tmp_path)
    run(tmp_path, look)
    assert not was_stopped(tmp_path)


def test_a_stop_file_of_before_the_start_ends_it_once(tmp_path):
    (tmp_path / "STOP").touch()
    with pytest.raises(StopRequested, match="was created while nothing was running"):
        run(tmp_path, look)
    run(tmp_path, look)


def test_a_rank_that_calls_sys_exit_has_failed(tmp_path):
    with pytest.raises(JobFailedError, match=r"the rank called sys.exit\(0\)"):
        run(tmp_path, exit_quietly)
    assert read_json(tmp_path / "pretend-0.end.json")["kind"] == "error"


@pytest.mark.parametrize("worker", [interrupt_twice, interrupt_the_debugger])
def test_ctrl_c_interrupts_at_once_in_the_debugger_and_the_second_time(tmp_path, worker):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, worker)
    assert Lease(tmp_path / "lock").holder() is None


def test_the_lease_is_renewed_while_the_main_thread_is_blocked(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    PLACE.clear()
    run(tmp_path, wait_for_a_heartbeat)
    assert PLACE == {"beat": True}


def test_a_second_start_in_its_directory_is_refused(tmp_path):
    PLACE.clear()
    run(tmp_path, start_again)
    assert PLACE == {"refused": True}


def test_progress_reaches_the_observer_on_the_main_thread(tmp_path):
    seen = []
    run(tmp_path, report, observe=lambda progress: seen.append((progress, threading.current_thread())))
    assert [(progress.done, progress.total) for progress, _ in seen] == [(3, 7)]
    assert seen[0][1] is threading.main_thread()


def test_a_running_local_job_is_not_attached_to(job):
    job.does("wait;wait")
    thread, outcome = job.in_thread()
    job.wait_ready(0, 1)
    with pytest.raises(UserError, match="is in use by process"):
        run(job.control, look)
    (job.control / "STOP").touch()
    thread.join(60)
    assert isinstance(outcome[0], StopRequested)


def test_cancelling_a_job_of_this_process_only_asks_it_to_stop(tmp_path):
    run(tmp_path, look)
    job = submitted(tmp_path).model_copy(update={"pid": os.getpid(), "created": 0.0})
    cancel(job, tmp_path)
    assert (tmp_path / "STOP").exists()


def test_its_world_is_one_process():
    launch = RunConfig.model_validate({"launch": {"kind": "debug", "threads": 5}}).launch
    assert world(launch) == (1, 5)


@pytest.mark.parametrize(
    ("launch", "named"),
    [
        ({"processes": 2}, "launch.processes 2: launch.kind debug runs one process"),
        ({"hostfile": "hosts"}, "launch.hostfile"),
        ({"slurm": {"nodes": 2}}, "launch.slurm"),
    ],
)
def test_more_than_one_process_or_host_is_refused(launch, named):
    with pytest.raises(UserError, match=named) as caught:
        parse_config({"launch": {"kind": "debug", **launch}}, where="x.yaml")
    assert "\n" not in str(caught.value)


def test_several_processes_of_an_evaluation_and_parallel_experiments_are_refused(tmp_path):
    tree = {"run": {"root": str(tmp_path / "runs")}, "launch": {"kind": "debug"}}
    with pytest.raises(UserError, match=r"^evaluate.processes 2: launch.kind debug runs one process"):
        evaluate(RunConfig.model_validate({**tree, "evaluate": {"processes": 2}}))
    assert not (tmp_path / "runs").exists()
    reproduce = {"kind": "images", "parallel": 2}
    with pytest.raises(UserError, match=r"^reproduce.parallel 2: launch.kind debug runs one process"):
        device_shares(RunConfig.model_validate({**tree, "reproduce": reproduce}))
