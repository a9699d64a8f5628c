"""All jobs of one run directory."""

from pathlib import Path

from fm_core.launch.dispatch import Job, alive, cancel, processes_of, submitted
from fm_core.launch.online_eval import stop_online_eval


def controls(run: Path) -> list[Path]:
    """The control directories of a run: its own is that of training, each set of samples and scores has one.

    The runs that a comparison is made of are its own too.
    """
    below = ("samples/*/*", "beside/samples/*/*", "evaluation/*/*", "beside/evaluation/*/*")
    return [
        control
        for one in runs(run)
        for control in (one, *(record.parent for place in below for record in one.glob(f"{place}/job.json")))
    ]


def runs(run: Path) -> list[Path]:
    """A run and, where it is a comparison, the runs that it is made of."""
    return [run, *sorted(record.parent for record in run.glob("reproduce/*/config.yaml"))]


def stop_requested(run: Path) -> bool:
    """Whether anybody asked a job of the run to stop since it was submitted."""
    return any(control.joinpath("STOP").exists() for control in controls(run))


def end_jobs(run: Path) -> list[Job]:
    """End every job that still has processes, by saving where it can; the jobs that were ended."""
    for one in runs(run):
        stop_online_eval(one)
    ended: list[Job] = []
    for control in controls(run):
        job = submitted(control)
        if job and (alive(job) or processes_of(job)):
            cancel(job, control)
            ended.append(job)
    return ended
