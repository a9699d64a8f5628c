import pytest

from fm_core.launch.dispatch import submitted
from tests.support.fake_job import FakeJob


@pytest.fixture
def job(tmp_path, monkeypatch):
    job = FakeJob(tmp_path, monkeypatch)
    yield job
    if submitted(job.control):
        for process in job.processes():
            process.kill()
