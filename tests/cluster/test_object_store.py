"""Two hosts without a shared directory: data, checkpoints and samples are on an S3 server on the first."""

import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.launch.job import submitted
from fm_core.storage.atomic_files import read_json
from tests.support.two_host_run import BATCH, LIMIT_SECONDS, TwoHostRun
from tests.support.two_hosts import environment

pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

STEPS = 32
ENDPOINT = "http://10.99.0.1:5000"
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": ENDPOINT,
}
OVER = {
    "data": {"root": "s3://bucket/data"},
    "train": {"images": STEPS * BATCH, "checkpoint_root": "s3://bucket/checkpoints"},
    "sample": {"root": "s3://bucket/samples"},
    "evaluate": {"likelihood": {"images": 2, "batch": 1, "rtol": 0.1, "atol": 0.1}},
}


def objects(pair) -> list[str]:
    """Every object, asked for by the second host."""
    ask = "import fsspec; print(*fsspec.filesystem('s3').find('bucket'), sep='\\n')"
    done = subprocess.run(
        pair.second.inside(sys.executable, "-c", ask),
        env=environment(**VARIABLES),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def stored_run(pair, hostfile, tmp_path_factory):
    """Outcome of each stage, and the objects that exist afterwards."""
    folder = tmp_path_factory.mktemp("stored")
    launch = {"kind": "ssh", "hostfile": str(hostfile), "restarts": 0}
    server = subprocess.Popen(
        pair.first.inside(sys.executable, "-m", "moto.server", "-H", "10.99.0.1", "-p", "5000"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    make = f"""
import time, urllib.request
for _ in range(3000):
    try:
        print(urllib.request.urlopen(urllib.request.Request("{ENDPOINT}/bucket", method="PUT")).status)
        break
    except OSError:
        time.sleep(0.1)
"""
    assert pair.first.run("env", "-u", "http_proxy", sys.executable, "-c", make).strip() == "200"
    run = TwoHostRun(folder, pair.first, launch, OVER, **VARIABLES)
    pair.second.hide(folder)
    outcomes = {"run": run, "folder": folder}
    for stage in ("shard", "train", "sample", "evaluate"):
        run.start(stage)
        outcomes[stage] = run.end()
        outcomes[f"{stage} hosts"] = submitted(run.path).hosts if submitted(run.path) else None
    outcomes["objects"] = objects(pair)
    outcomes["files of h2"] = pair.second.run("find", str(folder), "-type", "f").split()
    run.close()
    server.terminate()
    server.wait()
    return outcomes


def test_every_stage_succeeds(stored_run):
    stages = ("shard", "train", "sample", "evaluate")
    codes = {stage: stored_run[stage].code for stage in stages}
    assert codes == dict.fromkeys(stages, 0), [stored_run[stage].errors for stage in stages]
    # Of the run the second host had, where its directory would be, the checkpoint it fetched.
    last = stored_run["run"].path / "train" / "fetched" / f"step-{STEPS:08d}"
    files = [Path(path) for path in stored_run["files of h2"]]
    assert files
    assert all(file.is_relative_to(last) for file in files), files


def test_both_hosts_trained_to_the_end_and_the_checkpoints_are_objects(stored_run):
    assert stored_run["train hosts"] == {"10.99.0.1": 1, "h2": 1}
    done = read_json(stored_run["run"].path / "train" / "DONE.json")
    assert (done["step"], done["processes"]) == (STEPS, 2)
    complete = [name for name in stored_run["objects"] if name.endswith("/COMPLETE")]
    assert complete == [f"bucket/checkpoints/step-{step:08d}/COMPLETE" for step in (16, 32)]


def test_the_samples_are_objects_and_both_hosts_made_them(stored_run):
    (place,) = stored_run["run"].path.glob("samples/*/*/job.json")
    assert submitted(place.parent).hosts == {"10.99.0.1": 1, "h2": 1}
    tars = [
        name for name in stored_run["objects"] if name.startswith("bucket/samples/") and name.endswith(".tar")
    ]
    assert len(tars) == 3


def test_both_hosts_evaluated(stored_run):
    (place,) = stored_run["run"].path.glob("evaluation/**/job.json")
    assert submitted(place.parent).hosts == {"10.99.0.1": 1, "h2": 1}
    scores = [
        path for path in stored_run["run"].path.glob("evaluation/step-*/*.json") if path.name != "job.json"
    ]
    assert any("bits_per_dim" in (read_json(path) or {}) for path in scores), scores
