"""All jobs of one run directory."""

from pathlib import Path

from fm_core.run.beside import end_scoring
from fm_core.run.launch import Job, alive, cancel, processes_of, submitted


def controls(run: Path) -> list[Path]:
    """The control directories of a run: its own is that of training, each set of samples has one."""
    samples = (*run.glob("samples/*/*/job.json"), *run.glob("beside/samples/*/*/job.json"))
    return [run, *(record.parent for record in samples)]


def stop_requested(run: Path) -> bool:
    """Whether anybody asked a job of the run to stop since it was submitted."""
    return any(control.joinpath("STOP").exists() for control in controls(run))


def end_jobs(run: Path) -> list[Job]:
    """End every job that still has processes, by saving where it can; the jobs that were ended."""
    end_scoring(run)
    ended: list[Job] = []
    for control in controls(run):
        job = submitted(control)
        if job and (alive(job) or processes_of(job)):
            cancel(job, control)
            ended.append(job)
    return ended
