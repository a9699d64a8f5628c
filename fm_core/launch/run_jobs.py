"""Jobs of a run directory: their control directories, stop requests, and how to end them."""

from pathlib import Path

from fm_core.launch.dispatch import Job, alive, cancel, processes_of, submitted
from fm_core.launch.online_eval import stop_online_eval
from fm_core.run.stop_file import mark_stop_handled, was_stopped
from fm_core.storage.atomic_files import read_json


def control_directories(run: Path, sweeps: bool = False) -> list[Path]:
    """Control directories of a run: the run directory for training, and one per set of samples and scores.

    Those of the experiments of a comparison are included; with `sweeps`, those of its sweeps and of the runs
    that these train as well.
    """
    below = ("samples/*/*", "beside/samples/*/*", "evaluation/*/*", "beside/evaluation/*/*")
    return [
        control
        for path in [*runs(run, sweeps), *(run.glob("sweep/*") if sweeps else [])]
        for control in (path, *(job.parent for place in below for job in path.glob(f"{place}/job.json")))
    ]


def runs(run: Path, sweeps: bool = False) -> list[Path]:
    """The run, the runs of its experiments if it is a comparison, and with `sweeps` those that these train.

    The runs of a sweep are runs of their own otherwise, which another flow run may continue.
    """
    experiments = sorted(path for path in run.glob("reproduce/*") if path.is_dir())
    plans = [read_json(path) or {} for path in run.glob("sweep/*/points.json")] if sweeps else []
    names = sorted({name for plan in plans for name in plan.get("runs", [])})
    return [run, *experiments, *(path for name in names if (path := run.parent / name).is_dir())]


def stop_requested(run: Path, sweeps: bool = False) -> bool:
    """Whether a job of the run, and with `sweeps` of its sweeps, was asked to stop since it was submitted."""
    return any(was_stopped(control) for control in control_directories(run, sweeps))


def end_jobs(run: Path, sweeps: bool = False) -> list[Job]:
    """End every job that still has processes, saving if possible; return the jobs that were ended.

    `sweeps`: also the jobs of the runs that its sweeps train.
    """
    for path in runs(run, sweeps):
        stop_online_eval(path)
    return [job for control in control_directories(run, sweeps) if (job := end_job(control))]


def end_job(control: Path) -> Job | None:
    """End the job of a control directory if it still has processes, saving if possible; the job, or None."""
    job = submitted(control)
    if job is None or not (alive(job) or processes_of(job)):
        return None
    cancel(job, control)
    mark_stop_handled(control)
    return job
