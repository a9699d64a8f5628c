"""A run on a two-node Slurm cluster: preemption, time-limit warning, node loss, cancellation, resuming."""

import time

import pytest

from fm_core.checkpoint.format import complete_steps
from fm_core.launch.job import JOB_VARIABLE, submitted
from fm_core.launch.run_jobs import control_directories
from fm_core.stages.shard import shard
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support import slurm_cluster, two_hosts
from tests.support.slurm_cluster import SlurmCluster
from tests.support.two_host_run import BATCH, LIMIT_SECONDS, STEPS, TwoHostRun

SMALL_SCORES = [
    *("--evaluate.likelihood.images", "2", "--evaluate.likelihood.batch", "1"),
    *("--evaluate.likelihood.rtol", "0.1", "--evaluate.likelihood.atol", "0.1"),
]


@pytest.fixture(scope="module")
def slurm_run(tmp_path_factory):
    """Outcomes of one run that is preempted, warned, cut off, cancelled and resumed."""
    two_hosts.require(two_hosts.PROGRAMS | slurm_cluster.PROGRAMS)
    folder = tmp_path_factory.mktemp("slurm")
    pair = two_hosts.make_pair(folder)
    try:
        yield _run_scenario(pair, SlurmCluster(pair, folder), folder)
    finally:
        pair.close()


def _run_scenario(pair, slurm, folder):
    launch = {"kind": "slurm", "slurm": {"nodes": 2, "options": {"partition": "low"}, "notice_seconds": 60}}
    run = TwoHostRun(folder, pair.first, launch)
    shard(run.config)
    outcomes = {"run": run}

    def wait_for(number, wanted, seconds=LIMIT_SECONDS):
        deadline = time.monotonic() + seconds
        while not wanted(job := slurm.job(number)):
            assert time.monotonic() < deadline, (job, run.log())
            time.sleep(0.2)
        return job

    # It is refused first, for an option that sbatch does not know.
    run.start("train", "--launch.slurm.options", '{"partition": "none"}')
    outcomes["refused"] = run.end()

    # A job of higher priority takes both nodes for a moment.
    run.start("train")
    outcomes["preempted at"] = run.wait_beyond(8)
    job = submitted(run.path)
    outcomes["working"] = [
        len(host.processes(f"{JOB_VARIABLE}={job.id}")) for host in (pair.first, pair.second)
    ]
    slurm.command("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(job.slurm, lambda job: (job["Restarts"], job["JobState"]) == ("1", "PENDING"))
    outcomes["after preemption"] = complete_steps(run.checkpoints)

    # Slurm's warning before the time limit, as it would send it.
    outcomes["warned at"] = run.wait_beyond(run.steps()[-1] + 8)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job.slurm))
    wait_for(job.slurm, lambda job: (job["Restarts"], job["JobState"]) == ("2", "PENDING"))
    outcomes["after warning"] = complete_steps(run.checkpoints)

    # The second node is cut off; Slurm declares it lost, ends the job on the first and queues it for both
    # again.
    outcomes["cut at"] = run.wait_beyond(run.steps()[-1] + 8)
    pair.disconnect()
    wait_for(job.slurm, lambda job: (job["Restarts"], job["JobState"]) == ("3", "PENDING"))
    outcomes["nodes"] = slurm.command("sinfo", "--noheader", "--partition=low", "--format=%T %N")
    outcomes["left on the first"] = pair.first.processes(f"{JOB_VARIABLE}={job.id}")
    outcomes["after the cut"] = complete_steps(run.checkpoints)
    pair.reconnect()
    slurm.command("scontrol", "update", "nodename=h2", "state=resume")  # Slurm itself looks after minutes

    # Somebody cancels it.
    outcomes["cancelled at"] = run.wait_beyond(run.steps()[-1] + 8)
    slurm.command("scancel", str(job.slurm))
    outcomes["cancel"] = run.end()
    outcomes["state"] = slurm.job(job.slurm)["JobState"]
    outcomes["left"] = [host.processes(f"{JOB_VARIABLE}={job.id}") for host in (pair.first, pair.second)]
    outcomes["after cancel"] = complete_steps(run.checkpoints)
    outcomes["first job"] = job

    run.start("train")
    outcomes["end"] = run.end()
    outcomes["last job"] = submitted(run.path)

    for stage in ("sample", "evaluate"):
        run.start(stage, *(SMALL_SCORES if stage == "evaluate" else ()))
        outcomes[stage] = run.end()
    jobs = [submitted(control) for control in control_directories(run.path)]
    outcomes["jobs"] = {job.stage: job for job in jobs if job}
    run.close()
    return outcomes


def test_what_sbatch_refuses_is_one_line(slurm_run):
    refused = slurm_run["refused"]
    assert refused.code == 2
    assert len(refused.errors) == 1
    assert "partition" in refused.errors[0]


def test_it_runs_on_both_nodes_as_a_job_of_slurm(slurm_run):
    assert slurm_run["first job"].kind == "slurm"
    # The node, its agent and its rank.
    assert slurm_run["working"] == [3, 3]


def test_a_preempted_job_saves_waits_and_goes_on(slurm_run):
    assert slurm_run["after preemption"][-1] >= slurm_run["preempted at"]
    assert slurm_run["warned at"] > slurm_run["after preemption"][-1]


def test_before_its_time_limit_it_saves_and_is_queued_again(slurm_run):
    assert slurm_run["after warning"][-1] >= slurm_run["warned at"]
    assert slurm_run["cancelled at"] > slurm_run["after warning"][-1]


def test_a_node_that_is_lost_ends_the_job_and_it_goes_on_when_the_node_is_back(slurm_run):
    assert "down" in slurm_run["nodes"]
    assert slurm_run["left on the first"] == []
    assert slurm_run["after the cut"][-1] >= slurm_run["after warning"][-1]
    assert slurm_run["cancelled at"] > slurm_run["cut at"]


def test_a_cancelled_job_saves_and_leaves_nothing(slurm_run):
    assert slurm_run["cancel"].code == 3
    assert len(slurm_run["cancel"].errors) == 1
    assert slurm_run["state"] == "CANCELLED"
    assert slurm_run["after cancel"][-1] >= slurm_run["cancelled at"]
    assert slurm_run["left"] == [[], []]


def test_the_run_goes_on_in_another_job_to_its_end(slurm_run):
    run = slurm_run["run"]
    assert slurm_run["end"].code == 0
    assert slurm_run["last job"].slurm > slurm_run["first job"].slurm
    done = read_json(run.path / "train" / "DONE.json")
    assert (done["step"], done["images_seen"]) == (STEPS, STEPS * BATCH)
    assert run.steps() == list(range(4, STEPS + 1, 4))
    assert not (run.path / "lock").exists()


def test_samples_and_scores_are_jobs_of_slurm_on_both_nodes(slurm_run):
    run, jobs = slurm_run["run"], slurm_run["jobs"]
    for stage in ("sample", "evaluate"):
        assert slurm_run[stage].code == 0, slurm_run[stage].errors
        assert (jobs[stage].kind, len(jobs[stage].hosts)) == ("slurm", 2)
        assert jobs[stage].slurm > slurm_run["last job"].slurm
    (samples,) = (read_json(path) for path in (run.folder / "shared" / "samples").rglob("DONE.json"))
    assert sum(shard["images"] for shard in samples["shards"]) == 12
    (bits,) = (run.path / "evaluation").rglob("*.bits.jsonl")
    assert len(read_lines(bits)) == 2
    assert read_json(bits.with_name(bits.name.replace(".bits.jsonl", ".json")))["frechet_distance"]
