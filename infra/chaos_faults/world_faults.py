"""Faults of the environment: disks, system calls, the clock, the network and the store."""

from random import Random

from infra.chaos_faults.context import ActiveFault, EpisodeContext, FaultKind, NotNowError
from infra.chaos_faults.disks import ChaosDisk
from infra.chaos_faults.namespaces import run
from infra.chaos_faults.preload import CLOCK_STEPS_SECONDS

SECONDS = (0.5, 2.0, 5.0, 12.0)
"""Range of the duration of a fault in seconds."""
LONG_SECONDS = (2.0, 8.0, 20.0)
ERROR_SECONDS = 20.0
"""Seconds to wait for a call that is to fail."""


def _hide(kind: str, disk: ChaosDisk, context: EpisodeContext, rng: Random) -> ActiveFault:
    if disk.hidden:
        raise NotNowError("it is unmounted already")
    if not context.has_completed():
        raise NotNowError("an empty mount point cannot be told from a new run before the first checkpoint")
    seconds = rng.choice(LONG_SECONDS)
    disk.hide()
    return ActiveFault(kind, f"for {seconds:g} s", disk.show, seconds)


def hide_checkpoints(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Unmount the disk of the checkpoints and mount it again."""
    assert context.checkpoint_disk
    return _hide("unmount: checkpoints", context.checkpoint_disk, context, rng)


def hide_run(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Unmount the run directory and mount it again."""
    return _hide("unmount: run directory", context.run_disk, context, rng)


def fill_checkpoints(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Fill the disk of the checkpoints for a while."""
    assert context.checkpoint_disk
    context.checkpoint_disk.fill()
    seconds = rng.choice(SECONDS)
    return ActiveFault("full disk: checkpoints", f"for {seconds:g} s", context.checkpoint_disk.free, seconds)


def fill_run(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Fill the disk of the run directory for a while."""
    context.run_disk.fill()
    seconds = rng.choice(SECONDS)
    return ActiveFault("full disk: run directory", f"for {seconds:g} s", context.run_disk.free, seconds)


def fail_calls(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Make a random system call on a file of the run fail, in the process that makes it next."""
    preload = context.preload
    assert preload
    context.live()
    detail = preload.arm_randomly(rng)
    return ActiveFault(
        "error of a system call",
        detail,
        preload.disarm,
        ERROR_SECONDS,
        is_over=lambda: preload.spent,
        occurred=lambda: preload.fired > 0,
    )


def step_clock(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Step the wall clock of all processes of the run, backward or forward."""
    assert context.preload
    context.live()
    seconds = rng.choice(CLOCK_STEPS_SECONDS)
    context.preload.step_clock(seconds)
    return ActiveFault("clock step", f"to {seconds:+g} s")


def cut_loopback(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Take the network interface of the ranks down for a while."""
    context.live("rank 0")
    seconds = rng.choice(SECONDS)
    run("ip", "link", "set", "lo", "down")
    return ActiveFault(
        "network cut: ranks", f"for {seconds:g} s", lambda: run("ip", "link", "set", "lo", "up"), seconds
    )


def stop_store(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Make the store refuse connections for a while."""
    store = context.store
    assert store
    seconds = rng.choice(LONG_SECONDS)
    store.ask("stop")
    return ActiveFault("store stopped", f"for {seconds:g} s", lambda: store.ask("start"), seconds)


def freeze_store(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Make the store accept connections without answering for a while."""
    assert context.store
    seconds = rng.choice(LONG_SECONDS)
    context.store.freeze()
    return ActiveFault("store frozen", f"for {seconds:g} s", context.store.thaw, seconds)


def cut_store(context: EpisodeContext, rng: Random) -> ActiveFault:
    """Disconnect the network of the store for a while."""
    assert context.store
    seconds = rng.choice(LONG_SECONDS)
    context.store.cut()
    return ActiveFault("network cut: store", f"for {seconds:g} s", context.store.connect, seconds)


KINDS = (
    FaultKind("unmount: checkpoints", hide_checkpoints, frozenset({"mounts"}), "folder"),
    FaultKind("unmount: run directory", hide_run, frozenset({"mounts"})),
    FaultKind("full disk: checkpoints", fill_checkpoints, frozenset({"mounts"}), "folder"),
    FaultKind("full disk: run directory", fill_run, frozenset({"mounts"})),
    FaultKind("error of a system call", fail_calls, frozenset({"compiler"})),
    FaultKind("clock step", step_clock, frozenset({"compiler"})),
    FaultKind("network cut: ranks", cut_loopback, frozenset({"network"})),
    FaultKind("store stopped", stop_store, frozenset({"store"}), "store"),
    FaultKind("store frozen", freeze_store, frozenset({"store"}), "store"),
    FaultKind("network cut: store", cut_store, frozenset({"store", "network"}), "store"),
)
