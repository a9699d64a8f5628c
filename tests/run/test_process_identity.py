"""A process is named by boot, PID namespace, id and start in ticks."""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fm_core.errors import UserError
from fm_core.run import process_identity as module
from fm_core.run.process_identity import ProcessIdentity, host_id


@pytest.fixture
def me():
    return ProcessIdentity.of(os.getpid())


def test_a_process_is_itself_and_no_other(me):
    assert me.here
    assert me.alive() is True
    assert replace(me, start_ticks=me.start_ticks + 1).alive() is False
    assert replace(me, pid=2**22 + 1).alive() is False
    assert replace(me, host_id="another boot/4026531836").alive() is False
    assert ProcessIdentity.from_record(me.facts()) == me


def test_the_host_is_a_boot_and_a_pid_namespace():
    boot, namespace = host_id().split("/")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert int(namespace) == Path("/proc/self/ns/pid").stat().st_ino


def test_the_start_in_ticks_is_that_of_the_kernel(me):
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert me.start_ticks == int(fields[19])


def test_a_name_with_parentheses_is_read(tmp_path, monkeypatch):
    stat = tmp_path / "7" / "stat"
    stat.parent.mkdir()
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "stat").touch()
    stat.write_text("7 (a) S (b) Z " + " ".join(str(number) for number in range(4, 30)))
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert module._start_and_state(7) == (22, "Z")


def test_without_proc_the_host_name_and_psutil_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PROC", tmp_path)
    me = ProcessIdentity.of(os.getpid())
    assert me.host_id == os.uname().nodename
    assert me.alive() is True
    assert replace(me, start_ticks=me.start_ticks - 100).alive() is False


def test_records_of_earlier_versions_name_a_process_by_its_start_in_seconds():
    created = psutil.Process().create_time()
    record = {"host": os.uname().nodename, "pid": os.getpid(), "created": created}
    assert ProcessIdentity.from_record(record).alive() is True
    assert ProcessIdentity.from_record({**record, "created": created + 60}).alive() is False
    assert ProcessIdentity.from_record({**record, "host": "elsewhere"}).alive() is False
    assert ProcessIdentity.from_record({"host": "Slurm job 7"}) is None


def test_a_proc_of_another_pid_namespace_is_refused(tmp_path, monkeypatch):
    (tmp_path / "self").symlink_to("1234567")
    monkeypatch.setattr(module, "_PROC", tmp_path)
    with pytest.raises(UserError, match="/proc belongs to another PID namespace") as caught:
        ProcessIdentity.of(os.getpid())
    assert "--mount-proc" in str(caught.value)
