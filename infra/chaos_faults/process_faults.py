"""Faults of processes: killed, frozen, stopped, started twice, and replaced by another host while frozen."""

import signal
from contextlib import suppress
from random import Random

import psutil

from infra.chaos_faults.lab import ActiveFault, EpisodeLab, FaultKind, Inject, NotNowError
from infra.chaos_faults.tiny_training import RunProcess, read_record

ROLES = ("supervisor", "rank group", "rank 0", "rank 1")
TAKEOVER_SECONDS = 600.0
"""Within this time another host must have noticed that the first is dead, and must have trained."""
FREEZE_SECONDS = (0.2, 2.0, 5.0, 12.0)


def send(processes: list[RunProcess], number: signal.Signals) -> list[RunProcess]:
    """Send a signal; the processes that got it."""
    reached: list[RunProcess] = []
    for member in processes:
        with suppress(psutil.Error):
            member.process.send_signal(number)
            reached.append(member)
    return reached


def _named(processes: list[RunProcess]) -> str:
    return ", ".join(sorted({member.role for member in processes}))


def _kill(role: str) -> Inject:
    def inject(lab: EpisodeLab, rng: Random) -> ActiveFault:
        if not send(lab.live(role), signal.SIGKILL):
            raise NotNowError(f"{role} has just ended")
        return ActiveFault(f"kill: {role}", role)

    return inject


def kill_all(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """SIGKILL of everything at once, as a crash of the machine."""
    frozen = send(lab.live(), signal.SIGSTOP)
    killed = send(lab.training.processes(), signal.SIGKILL)
    return ActiveFault("kill: all", _named([*frozen, *killed]))


def freeze(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """SIGSTOP of one process, or of all, and SIGCONT after some seconds."""
    role = rng.choice((*ROLES, None))
    frozen = send(lab.live(role), signal.SIGSTOP)
    seconds = rng.choice(FREEZE_SECONDS)
    detail = f"{_named(frozen)} for {seconds:g} s"
    return ActiveFault("freeze", detail, lambda: send(frozen, signal.SIGCONT), seconds)


def take_over(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """SIGSTOP of everything until another host has taken over the run and trained, then SIGCONT."""
    if not lab.has_completed():
        raise NotNowError("nothing to take over")
    supervisors = lab.live("supervisor")
    lab.live("rank 0")
    epoch = lab.epoch()
    if not epoch:
        raise NotNowError("no job holds the lease")
    frozen = send(lab.live(), signal.SIGSTOP)
    frozen += send([member for member in lab.training.processes() if member not in frozen], signal.SIGSTOP)
    lab.host = lab.other_host if lab.host is None else None
    start = lab.start()
    before = lab.status_job()

    def trained() -> bool:
        return lab.status_job() not in (None, before) and lab.epoch() > epoch

    def is_over() -> bool:
        return start.process.poll() is not None or trained()

    def heal() -> None:
        send(frozen, signal.SIGCONT)

    detail = f"{len(supervisors)} supervisors and their job, epoch {epoch}"
    return ActiveFault(
        "freeze beyond the lease", detail, heal, TAKEOVER_SECONDS, is_over, trained, exclusive=True
    )


def start_again(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """A second start of the same run while one is alive."""
    if not lab.training.alive():
        raise NotNowError("nothing runs")
    return ActiveFault("second start", f"start {lab.start().number}")


def request_stop(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """A request to stop: SIGTERM of a supervisor, or a STOP file; the operator starts the run again."""
    if rng.random() < 0.5:
        supervisors = lab.live("supervisor")
        send([rng.choice(supervisors)], signal.SIGTERM)
        return ActiveFault("stop request", "SIGTERM")
    lab.live("rank 0")
    stop = lab.run_disk.backing / "STOP"
    try:
        stop.touch()
    except OSError as error:
        raise NotNowError(str(error)) from None
    return ActiveFault("stop request", "STOP file")


def orphaned_uploads(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """A stop while the store is away leaves a process that uploads; it is killed."""
    assert lab.store
    lab.live("rank 0")
    if not lab.has_completed():
        raise NotNowError("nothing to upload")
    supervisors = lab.live("supervisor")
    lab.store.ask("stop")
    send(supervisors, signal.SIGTERM)
    killed: list[RunProcess] = []

    def uploads() -> list[RunProcess]:
        record = read_record(lab.run_disk.backing / "train" / "afterwards.json")
        alive = lab.training.processes()
        if record is None or any(member.role.startswith("rank") for member in alive):
            return []
        return [member for member in alive if member.role == "side"]

    def heal() -> None:
        killed.extend(send(uploads(), signal.SIGKILL))
        assert lab.store
        lab.store.ask("start")

    return ActiveFault(
        "kill: uploads after a stop",
        "with the store away",
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
