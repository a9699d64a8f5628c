"""Faults of processes: killed, frozen, stopped, started twice, and replaced by another host while frozen."""

import signal
from contextlib import suppress
from random import Random

import psutil

from infra.chaos_faults.context import ActiveFault, EpisodeContext, FaultKind, Inject, NotNowError
from infra.chaos_faults.tiny_training import RunProcess, read_record

ROLES = ("supervisor", "rank group", "rank 0", "rank 1")
TAKEOVER_SECONDS = 600.0
"""Seconds in which another host must detect that the first is dead, and continue training."""
FREEZE_SECONDS = (0.2, 2.0, 5.0, 12.0)


def send(processes: list[RunProcess], number: signal.Signals) -> list[RunProcess]:
    """Send a signal; return the processes that received it."""
    reached: list[RunProcess] = []
    for member in processes:
        with suppress(psutil.Error):
            member.process.send_signal(number)
            reached.append(member)
    return reached


def _named(processes: list[RunProcess]) -> str:
    return ", ".join(sorted({member.role for member in processes}))


def _kill(role: str) -> Inject:
    def inject(context: EpisodeContext, rng: Random) -> ActiveFault:
        if not send(context.live(role), signal.SIGKILL):
            raise NotNowError(f"{role} has just ended")
        return ActiveFault(f"kill: {role}", role)

    return inject


def kill_all(context: EpisodeContext, rng: Random) -> ActiveFault:
    """SIGKILL of all processes at once, like a crash of the machine."""
    frozen = send(context.live(), signal.SIGSTOP)
    killed = send(context.training.processes(), signal.SIGKILL)
    return ActiveFault("kill: all", _named([*frozen, *killed]))


def freeze(context: EpisodeContext, rng: Random) -> ActiveFault:
    """SIGSTOP of one process, or of all, and SIGCONT after some seconds."""
    role = rng.choice((*ROLES, None))
    frozen = send(context.live(role), signal.SIGSTOP)
    seconds = rng.choice(FREEZE_SECONDS)
    detail = f"{_named(frozen)} for {seconds:g} s"
    return ActiveFault("freeze", detail, lambda: send(frozen, signal.SIGCONT), seconds)


def take_over(context: EpisodeContext, rng: Random) -> ActiveFault:
    """SIGSTOP of everything until another host has taken over the run and trained, then SIGCONT."""
    if not context.has_completed():
        raise NotNowError("nothing to take over")
    supervisors = context.live("supervisor")
    context.live("rank 0")
    epoch = context.epoch()
    if not epoch:
        raise NotNowError("no job holds the lease")
    frozen = send(context.live(), signal.SIGSTOP)
    frozen += send(
        [member for member in context.training.processes() if member not in frozen], signal.SIGSTOP
    )
    context.host = context.other_host if context.host is None else None
    start = context.start()
    before = context.status_job()

    def trained() -> bool:
        return context.status_job() not in (None, before) and context.epoch() > epoch

    def is_over() -> bool:
        return start.process.poll() is not None or trained()

    def heal() -> None:
        send(frozen, signal.SIGCONT)

    detail = f"{len(supervisors)} supervisors and their job, epoch {epoch}"
    return ActiveFault(
        "freeze beyond the lease", detail, heal, TAKEOVER_SECONDS, is_over, trained, exclusive=True
    )


def start_again(context: EpisodeContext, rng: Random) -> ActiveFault:
    """A second start of the same run while one is alive."""
    if not context.training.alive():
        raise NotNowError("nothing runs")
    return ActiveFault("second start", f"start {context.start().number}")


def request_stop(context: EpisodeContext, rng: Random) -> ActiveFault:
    """A request to stop: SIGTERM of a supervisor, or a STOP file; the operator starts the run again."""
    if rng.random() < 0.5:
        supervisors = context.live("supervisor")
        send([rng.choice(supervisors)], signal.SIGTERM)
        return ActiveFault("stop request", "SIGTERM")
    context.live("rank 0")
    stop = context.run_disk.backing / "STOP"
    try:
        stop.touch()
    except OSError as error:
        raise NotNowError(str(error)) from None
    return ActiveFault("stop request", "STOP file")


def orphaned_uploads(context: EpisodeContext, rng: Random) -> ActiveFault:
    """A stop while the store is unavailable leaves an upload process, which is killed."""
    assert context.store
    context.live("rank 0")
    if not context.has_completed():
        raise NotNowError("nothing to upload")
    supervisors = context.live("supervisor")
    context.store.ask("stop")
    send(supervisors, signal.SIGTERM)
    killed: list[RunProcess] = []

    def uploads() -> list[RunProcess]:
        record = read_record(context.run_disk.backing / "train" / "afterwards.json")
        alive = context.training.processes()
        if record is None or any(member.role.startswith("rank") for member in alive):
            return []
        return [member for member in alive if member.role == "side"]

    def heal() -> None:
        killed.extend(send(uploads(), signal.SIGKILL))
        assert context.store
        context.store.ask("start")

    return ActiveFault(
        "kill: uploads after a stop",
        "with the store unavailable",
        heal,
        60.0,
        lambda: bool(uploads()),
        lambda: bool(killed),
        exclusive=True,
    )


KINDS = (
    *(FaultKind(f"kill: {role}", _kill(role)) for role in ROLES),
    FaultKind("kill: all", kill_all),
    FaultKind("kill: uploads after a stop", orphaned_uploads, frozenset({"store"}), "store"),
    FaultKind("freeze", freeze),
    FaultKind("freeze beyond the lease", take_over, frozenset({"hosts"})),
    FaultKind("second start", start_again),
    FaultKind("stop request", request_stop),
)
