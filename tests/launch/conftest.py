import pytest
from pretended import PretendedJob

from fm_core.launch.dispatch import submitted


@pytest.fixture
def job(tmp_path, monkeypatch):
    job = PretendedJob(tmp_path, monkeypatch)
    yield job
    if submitted(job.control):
        for process in job.processes():
            process.kill()
