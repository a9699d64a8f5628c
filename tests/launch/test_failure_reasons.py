"""Reasons why a job ended, from the exit records of its ranks."""

import pytest

from fm_core.errors import JobFailedError, StopRequested, UserError
from fm_core.launch.dispatch import Job
from fm_core.launch.failure_reasons import failure_of
from fm_core.storage.atomic_files import write_json

FACTS = {"id": "00a1", "stage": "train", "host": "h1", "processes": 3, "threads": 1, "log": "x"}


class TestVerdict:
    """The exception and message for each combination of exit records."""

    def job(self, path, *kinds):
        log = path / "pretend.log"
        log.write_text("one\ntwo\n")
        facts = {"id": "a1", "stage": "pretend", "host": "h", "pid": 1, "created": 0.0, "threads": 1}
        for rank, kind in enumerate(kinds):
            if kind:
                record = {"job": "a1", "rank": rank, "kind": kind, "message": f"word {rank}"}
                write_json(path / f"pretend-{rank}.end.json", record)
        return Job.model_validate({**facts, "processes": len(kinds), "log": str(log)})

    @pytest.mark.parametrize(
        ("kinds", "stop", "error", "message"),
        [
            (("stopped", "stopped"), False, StopRequested, "word 0"),
            (("done", "stopped"), False, StopRequested, "word 1"),
            (("stopped", None), False, JobFailedError, "rank 1 on h was killed"),
            (("stopped", None), True, StopRequested, "word 0"),
            (("orphaned", "orphaned"), False, JobFailedError, "the launcher on h was killed; word 1"),
            (("orphaned", "orphaned"), True, StopRequested, "word 0"),
            (("orphaned", "stopped"), False, JobFailedError, "the launcher on h was killed; word 0"),
            (("error", None), False, JobFailedError, "rank 1 on h was killed; rank 0: word 0"),
            (("stopped", "error"), True, JobFailedError, "rank 1: word 1"),
            (("error", "user"), False, UserError, "word 1"),
            (("unreachable", "unreachable"), False, JobFailedError, "rank 0: word 0"),
            (("unreachable", None), False, JobFailedError, "rank 1 on h was killed; rank 0: word 0"),
            ((None, None), False, JobFailedError, "no exit record from ranks 0 to 1 on h: all were killed"),
            ((None,), False, JobFailedError, "no exit record from rank 0 on h: all were killed"),
            ((None, None), False, JobFailedError, "one\ntwo"),
            (("done", "done"), False, JobFailedError, "not complete"),
        ],
    )
    def test_verdict(self, tmp_path, kinds, stop, error, message):
        job = self.job(tmp_path, *kinds)
        if stop:
            (tmp_path / "STOP").touch()
        state = failure_of(job, tmp_path)
        assert type(state) is error
        assert message in str(state)

    def test_exit_records_of_an_earlier_job_are_ignored(self, tmp_path):
        job = self.job(tmp_path, "user", "user").model_copy(update={"id": "b2"})
        assert "no exit record" in str(failure_of(job, tmp_path))


class TestSeveralHosts:
    """Failure messages of a job on several hosts."""

    def state(self, path, kinds, lost):
        job = Job.model_validate({**FACTS, "log": str(path / "x"), "hosts": {"h1": 2, "h2": 1}})
        job_log = path / "x"
        job_log.write_text("last output\n")
        for rank, kind in kinds.items():
            record = {"job": job.id, "rank": rank, "kind": kind, "message": f"word {rank}"}
            write_json(path / f"train-{rank}.end.json", record)
        return failure_of(job, path, lost)

    @pytest.mark.parametrize(
        ("kinds", "message"),
        [
            ({0: "stopped", 1: "stopped"}, "train failed: host h2 was lost (why)"),
            ({0: "error", 1: "stopped", 2: "stopped"}, "train failed: host h2 was lost (why)"),
            ({}, "train failed: host h2 was lost (why)"),
        ],
    )
    def test_a_lost_host_is_the_cause(self, tmp_path, kinds, message):
        state = self.state(tmp_path, kinds, ["host h2 was lost (why)"])
        assert isinstance(state, JobFailedError)
        assert str(state).startswith(message)
        assert "rank" not in str(state)

    def test_ranks_are_named_with_their_hosts(self, tmp_path):
        message = str(self.state(tmp_path, {0: "error", 1: "stopped"}, []))
        assert message.startswith("train failed: rank 2 on h2 was killed; rank 0 on h1: word 0")

    def test_what_was_cancelled_before_it_began_was_stopped(self, tmp_path):
        (tmp_path / "STOP").touch()
        state = self.state(tmp_path, {}, ["Slurm job 3: cancelled (None)"])
        assert isinstance(state, StopRequested)
        assert str(state) == "Slurm job 3: cancelled (None)"
