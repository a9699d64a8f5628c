"""Jobs of a run directory: their control directories, stop requests, and how to end them."""

from pathlib import Path

from fm_core.launch.dispatch import Job, alive, cancel, processes_of, submitted
from fm_core.launch.online_eval import stop_online_eval
from fm_core.run.stop_file import mark_stop_handled, was_stopped
from fm_core.storage.atomic_files import read_json


def control_directories(run: Path) -> list[Path]:
    """Control directories of a run: the run directory for training, and one per set of samples and scores.

    Those of the experiments of a comparison, and of the runs of a sweep, are included.
    """
    below = ("samples/*/*", "beside/samples/*/*", "evaluation/*/*", "beside/evaluation/*/*")
    return [
        control
        for path in runs(run)
        for control in (path, *(job.parent for place in below for job in path.glob(f"{place}/job.json")))
    ]


def runs(run: Path) -> list[Path]:
    """The run, the runs of its experiments if it is a comparison, and those that its sweeps train."""
    experiments = sorted(path for path in run.glob("reproduce/*") if path.is_dir())
    plans = [read_json(path) or {} for path in run.glob("sweep/*/points.json")]
    names = sorted({name for plan in plans for name in plan.get("runs", [])})
    return [run, *experiments, *(path for name in names if (path := run.parent / name).is_dir())]


def stop_requested(run: Path) -> bool:
    """Whether a job of the run was asked to stop since it was submitted."""
    return any(was_stopped(control) for control in control_directories(run))


def end_jobs(run: Path) -> list[Job]:
    """End every job that still has processes, saving if possible; return the jobs that were ended."""
    for path in runs(run):
        stop_online_eval(path)
    return [job for control in control_directories(run) if (job := end_job(control))]


def end_job(control: Path) -> Job | None:
    """End the job of a control directory if it still has processes, saving if possible; the job, or None."""
    job = submitted(control)
    if job is None or not (alive(job) or processes_of(job)):
        return None
    cancel(job, control)
    mark_stop_handled(control)
    return job
