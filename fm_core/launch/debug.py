"""Debug launcher: the single rank of a job runs in this process, for debuggers and profilers.

There is no agent, no watchdog and no restart, and standard input and output remain the terminal's. While the
rank runs, this process has the environment, threads and signal handlers of a rank of a local job, and a
process group of one. All of that is restored afterwards, so that several stages can run in one interpreter.
"""

import bdb
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fm_core.config import load_config
from fm_core.errors import JobFailedError, Outcome, StopRequested, UserError, outcome_of
from fm_core.launch.exit_records import write_exit_record
from fm_core.launch.job import GRACE_SECONDS, Job, agent_lives, end_processes, kill
from fm_core.launch.launcher import (
    JobSpec,
    JobStatus,
    StageJob,
    job_config_file,
    with_agent,
    worker_environment,
)
from fm_core.launch.rank_group import LOOPBACK, LOOPBACK_INTERFACE
from fm_core.launch.worker_main import Rank, load_worker
from fm_core.run.fence import LeaseFence
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, no_progress
from fm_core.run.status import progress_of, read_status
from fm_core.run.stop_file import request_stop
from fm_core.storage.atomic_files import write_json

OBSERVE_SECONDS = 0.5
HELPER_MODULES = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "compile_worker",
)
DEBUGGERS = ("pdb", "bdb", "cmd", "code", "IPython", "ipdb", "pudb", "pydevd", "_pydevd_bundle", "debugpy")
"""Modules whose frames on the stack mean that a debugger is in control."""


def submit(spec: JobSpec) -> Job:
    """Record this process as the agent of the job; `run_in_process` runs the rank."""
    with (spec.logs / f"{spec.job.stage}-0.log").open("a", encoding="utf-8") as log:
        log.write(
            f"job {spec.job.id}: launch.kind debug, in process {os.getpid()} on {spec.job.host}; "
            "its output went to its terminal\n"
        )
    return with_agent(spec.job, os.getpid())


def poll(job: Job) -> JobStatus:
    """Whether the process still runs the rank; `collect` clears the process id."""
    return JobStatus(agent_lives(job))


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the process to save and exit; kill it after `grace` seconds, unless it is this one."""
    request_stop(control)
    if job.pid is None or job.pid == os.getpid() or not agent_lives(job):
        return
    process = psutil.Process(job.pid)
    with suppress(psutil.NoSuchProcess):
        process.terminate()
    deadline = time.monotonic() + grace
    while agent_lives(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    if agent_lives(job):
        kill([process])


def collect(job: Job, control: Path) -> list[str]:
    """Record that the job has no process any more, and end the processes that the rank started."""
    cleanup(job)
    write_json(control / "job.json", job.model_copy(update={"pid": None, "created": None}).model_dump())
    return []


def cleanup(job: Job) -> None:
    """End the processes that the rank started, except helpers that this interpreter keeps until it exits."""
    end_processes(job.id, GRACE_SECONDS, spare=frozenset({os.getpid(), *_interpreter_helpers()}))


def _interpreter_helpers() -> list[int]:
    """Child processes that Python and torch reuse: the resource tracker and the compile workers."""
    helpers: list[int] = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(child.cmdline())
            if any(module in command for module in HELPER_MODULES):
                helpers.append(child.pid)
    return helpers


@dataclass
class DebugRank(Rank):
    """The only rank of a job, in the process of its stage."""

    observe: Observer = no_progress
    _observed_at: float = 0.0

    def stop_requested(self) -> bool:
        """Whether to stop; called between pieces of work, where it also reports progress."""
        now = time.monotonic()
        if now - self._observed_at > OBSERVE_SECONDS:
            self._observed_at = now
            with suppress(OSError, UserError):  # a failure to show progress must not end the rank
                status = read_status(self.control)
                if status and status.get("job") == self.job:
                    self.observe(progress_of(status))
        return super().stop_requested()

    def handle_interrupt(self, number: int, frame: FrameType | None) -> None:
        """SIGINT handler: KeyboardInterrupt in a debugger or the second time, otherwise a request to stop."""
        if self._stop_signaled or in_debugger(frame):
            raise KeyboardInterrupt
        self.request_stop(number, frame)
        print("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)


def run_in_process(job: Job, stage_job: StageJob, observe: Observer) -> None:
    """Run the rank of a submitted job; its exceptions are raised with their own traceback.

    Raises:
        StopRequested: a stop was requested, or the debugger was quit.
    """
    control, stage = stage_job.control.resolve(), stage_job.stage
    fence = LeaseFence(Lease(control / "lock"), job.id, job.epoch)
    rank = DebugRank(
        number=0,
        count=1,
        local=0,
        control=control,
        job=job.id,
        run=stage_job.logs.resolve().parent,
        watched=False,
        fence=fence,
        observe=observe,
    )
    outcome, message = Outcome.DONE, ""
    with ExitStack() as restored:
        restored.enter_context(fence.keep_alive(rank.record_loss))
        restored.enter_context(_environment(job, stage_job))
        restored.enter_context(_streams())
        restored.enter_context(_signal_handlers(rank))
        restored.enter_context(_torch_settings(job.threads))
        restored.enter_context(_process_group())
        try:
            load_worker(stage_job.worker)(load_config(job_config_file(control, stage_job.logs, stage)), rank)
        except bdb.BdbQuit:
            outcome, message = Outcome.STOPPED, "the debugger was quit; run it again to continue"
            raise StopRequested(message) from None
        except SystemExit as error:
            outcome, message = Outcome.FAILED, f"the rank called sys.exit({error.code!r})"
            raise JobFailedError(message) from error
        except BaseException as error:
            outcome, message = outcome_of(error), str(error)
            raise
        finally:
            write_exit_record(control, stage, job.id, 0, outcome, message)


def in_debugger(frame: FrameType | None) -> bool:
    """Whether a debugger is in control: one of its frames is above that of `run_in_process`."""
    while frame and frame.f_code is not run_in_process.__code__:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _environment(job: Job, stage_job: StageJob) -> Generator[None]:
    before = dict(os.environ)
    os.environ.update(worker_environment(job, stage_job.control, stage_job.logs, 1))
    os.environ.pop("NCCL_COMM_ID", None)  # it would redirect NCCL's bootstrap to that address
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "0") | dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"
    )
    # The process group is created from a store in memory, so nothing listens at this address.
    os.environ.update(ranks | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "0"} | LOOPBACK_INTERFACE)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _streams() -> Generator[None]:
    before = sys.stdin, sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@contextmanager
def _signal_handlers(rank: DebugRank) -> Generator[None]:
    """SIGINT and SIGTERM stop the rank after its step; a crash prints the stacks of all threads."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows only the main thread to set handlers
        return
    handlers = {signal.SIGTERM: rank.request_stop, signal.SIGINT: rank.handle_interrupt}
    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handlers[number])
    faults = faulthandler.is_enabled()
    if not faults and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if not faults:
            faulthandler.disable()
        debugger: Any = sys.modules.get("pdb")
        if debugger and getattr(debugger.Pdb, "_previous_sigint_handler", None):
            # pdb saves the previous handler and would set it again at the next prompt.
            debugger.Pdb._previous_sigint_handler = None


@contextmanager
def _torch_settings(threads: int) -> Generator[None]:
    """Use the thread count of a separate rank; restore torch settings that a stage changes."""
    import torch

    cudnn: Any = torch.backends.cudnn
    count, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    benchmark, allow_tf32 = cudnn.benchmark, cudnn.allow_tf32
    generator = torch.get_rng_state()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, allow_tf32
        torch.set_rng_state(generator)


@contextmanager
def _process_group() -> Generator[None]:
    """A process group of one rank, created without a connection; DeepSpeed uses it."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        raise UserError("launch.kind debug: this interpreter already has a process group; destroy it first")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
        if deepspeed and deepspeed.cdb:
            # Including the groups that the rank created itself.
            deepspeed.destroy_process_group()
            deepspeed.cdb = None
        if dist.is_initialized():
            dist.destroy_process_group()
