import json
import os

import pytest

from fm_core.errors import UserError
from fm_core.storage.atomic_files import append_line, read_json, read_lines, write_json, write_text
from fm_core.storage.file_lock import file_lock


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})

    def cut(*_):
        raise PowerCut

    monkeypatch.setattr(*(os, "fsync") if moment == "fsync" else (type(path), "replace"), cut)
    with pytest.raises(PowerCut):
        write_json(path, {"step": 2})
    monkeypatch.undo()
    assert read_json(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_the_new_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path, order = tmp_path / "a.txt", []
    sync, replace = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_size), sync(fd))[1])
    monkeypatch.setattr(type(path), "replace", lambda a, b: (order.append("named"), replace(a, b))[1])
    write_text(path, "twelve bytes")
    assert order[:2] == [12, "named"]


def test_what_cannot_be_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path)["loss"] == 1.0


def test_a_reader_never_sees_half_a_file(tmp_path):
    """A reader that keeps the old file open goes on reading the old file."""
    path = tmp_path / "a.txt"
    write_text(path, "old" * 1000)
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old" * 1000
    assert path.read_text() == "new"


def test_a_missing_file_is_not_an_error(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("schema", [2, 99, None, "1"])
def test_another_schema_is_refused_by_name(tmp_path, schema):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema": schema, "step": 1}))
    with pytest.raises(UserError, match=f"{path}: schema"):
        read_json(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x00", '"text"'])
def test_what_is_not_ours_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError):
        read_json(path)


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    for step in range(3):
        append_line(path, {"step": step})
    path.write_text(path.read_text()[:-5])
    assert [line["step"] for line in read_lines(path)] == [0, 1]


def test_a_line_cut_short_costs_only_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    for step in range(3):
        append_line(path, {"step": step})
    path.write_text(path.read_text()[:-5])
    append_line(path, {"step": 3})
    append_line(path, {"step": 4})
    assert [line["step"] for line in read_lines(path)] == [0, 1, 3, 4]


def test_nothing_is_created_in_a_folder_that_has_vanished(tmp_path):
    away = tmp_path / "unmounted"
    with pytest.raises(FileNotFoundError), file_lock(away / ".lock.guard", create=False):
        pass
    with pytest.raises(FileNotFoundError):
        write_json(away / "lock", {"beats": 1}, parents=False)
    assert list(tmp_path.iterdir()) == []
    with file_lock(away / ".lock.guard"):
        write_json(away / "lock", {"beats": 1}, parents=False)
    assert read_json(away / "lock") == {"schema": 1, "beats": 1}
