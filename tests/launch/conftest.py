import subprocess

import pytest

from fm_core.launch.dispatch import submitted
from tests.support.fake_job import FakeJob
from tests.support.pid_namespace import UNSHARE, Containers


@pytest.fixture
def job(tmp_path, monkeypatch):
    job = FakeJob(tmp_path, monkeypatch)
    yield job
    if submitted(job.control):
        for process in job.processes():
            process.kill()


@pytest.fixture
def pid_namespaces(tmp_path):
    """Supervisors of one directory in PID namespaces of their own, as in containers of one host."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot create PID namespaces")
    containers = Containers(tmp_path)
    yield containers
    containers.close()
