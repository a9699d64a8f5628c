"""All jobs of a run are listed, including those of the runs of a comparison."""

import subprocess
import sys

import pytest

from fm_core.launch.job import JOB_VARIABLE, Job
from fm_core.launch.launcher import job_config_file
from fm_core.launch.online_eval import online_eval_directory
from fm_core.launch.run_jobs import control_directories, end_jobs, runs, stop_requested
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import write_json, write_text

BELOW = (
    "samples/step-00000001/ema",
    "evaluation/step-00000001/ema",
    "beside/samples/step-00000001/ema",
    "beside/evaluation/step-00000001/ema",
)
JOB = Job(id="x", stage="sample", host="h", processes=1, threads=1, log="l")


@pytest.fixture
def comparison(tmp_path):
    """A run with the runs of two experiments; each has jobs of its own."""
    for experiment in ("fm-s0", "sm-s0"):
        write_text(tmp_path / "reproduce" / experiment / "config.yaml", "")
        for below in BELOW:
            write_json(tmp_path / "reproduce" / experiment / below / "job.json", JOB.model_dump())
    for below in BELOW:
        write_json(tmp_path / below / "job.json", JOB.model_dump())
    return tmp_path


def test_every_job_has_its_control_directory(comparison):
    experiments = [comparison / "reproduce" / experiment for experiment in ("fm-s0", "sm-s0")]
    expected = {one / below for one in (comparison, *experiments) for below in (".", *BELOW)}
    assert set(control_directories(comparison)) == expected


@pytest.mark.parametrize("below", [".", *BELOW, "reproduce/sm-s0", f"reproduce/sm-s0/{BELOW[1]}"])
def test_a_stop_request_to_any_of_them_is_seen(comparison, below):
    assert not stop_requested(comparison)
    (comparison / below / "STOP").touch()
    assert stop_requested(comparison)


def test_processes_of_an_experiment_are_ended_with_the_comparison(comparison):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    control = comparison / "reproduce" / "fm-s0" / BELOW[1]
    scorer = subprocess.Popen(sleep)
    Lease(online_eval_directory(comparison / "reproduce" / "sm-s0") / "lock").take(scorer.pid)
    job = JOB.model_copy(update={"id": f"experiment-{scorer.pid}"})
    rank = subprocess.Popen(sleep, env={JOB_VARIABLE: job.id})
    write_json(control / "job.json", job.model_dump())
    assert end_jobs(comparison) == [job]
    assert stop_requested(comparison)
    assert not (control / "STOP").exists(), "it was handled"
    assert scorer.poll() is not None
    assert rank.poll() is not None


def test_runs_that_a_sweep_trains_are_listed_with_its_own(tmp_path):
    run = tmp_path / "run"
    for name in ("run", "run-seed-1", "run-seed-2", "another"):
        (tmp_path / name).mkdir()
    for key, names in (("seed-0a1b2c", ["run-seed-2", "run-seed-1", "removed"]), ("steps-0a1b2c", [])):
        write_json(run / "sweep" / key / "points.json", {"points": [], "runs": names})
    assert runs(run, sweeps=True) == [run, tmp_path / "run-seed-1", tmp_path / "run-seed-2"]
    assert runs(run) == [run], "another flow run may continue those of the sweep"


@pytest.mark.parametrize("below", ["run/sweep/seed-0a1b2c", "run-seed-2"])
def test_a_stop_of_a_sweep_is_one_of_its_flow_only(tmp_path, below):
    run = tmp_path / "run"
    (tmp_path / "run-seed-2").mkdir()
    write_json(run / "sweep" / "seed-0a1b2c" / "points.json", {"points": [], "runs": ["run-seed-2"]})
    (tmp_path / below / "STOP").touch()
    assert stop_requested(run, sweeps=True)
    assert not stop_requested(run)


def test_jobs_of_one_run_that_sample_at_a_time_have_configurations_of_their_own(tmp_path):
    logs, below = tmp_path / "logs", [tmp_path / "samples" / "step-00000001" / key for key in ("a", "b")]
    assert job_config_file(tmp_path, logs, "train") == logs / "train.yaml"
    assert [job_config_file(each, logs, "sample") for each in below] == [
        each / "sample.yaml" for each in below
    ]
