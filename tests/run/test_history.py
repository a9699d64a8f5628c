"""History of a run: what it records independent of mounts, and the files of earlier versions."""

import json

import pytest

from fm_core.errors import UnreachableError, UserError
from fm_core.run import history
from fm_core.run.history import (
    RunHistory,
    history_path,
    open_history,
    preserve_history,
    read_history,
    rearm_start_over,
    record_completed,
    write_history,
)
from fm_core.storage.atomic_files import write_json


def test_it_is_made_once_and_names_one_run(tmp_path):
    assert read_history(tmp_path) is None
    history = open_history(tmp_path)
    assert open_history(tmp_path) == read_history(tmp_path) == history
    assert history.completed_step is None
    assert open_history(tmp_path / "other").id != history.id
    assert open_history(tmp_path / "third", history.id).id == history.id


def test_a_completed_checkpoint_is_recorded(tmp_path):
    history = open_history(tmp_path)
    record_completed(tmp_path, history.id, 300, "s3://bucket/run")
    assert read_history(tmp_path).completed_step == 300
    history_path(tmp_path).unlink()
    with pytest.raises(UnreachableError, match="check that the run directory is mounted"):
        record_completed(tmp_path, history.id, 310, "s3://bucket/run")
    open_history(tmp_path)
    with pytest.raises(UnreachableError):
        record_completed(tmp_path, history.id, 310, "s3://bucket/run")


@pytest.mark.parametrize(
    ("file", "record"),
    [
        ("status.json", {"stage": "train", "last_checkpoint": "step-00000300"}),
        ("train/DONE.json", {"step": 300, "checkpoint": "step-00000300"}),
        ("train/setback.json", {"step": 300, "position": 5000}),
        ("train/afterwards.json", {"url": "s3://bucket/run", "step": 300}),
        ("best.json", {"step": 300}),
    ],
)
def test_what_an_earlier_version_left_counts(tmp_path, file, record):
    write_json(tmp_path / file, record)
    preserve_history(tmp_path, None)
    (tmp_path / file).unlink()  # the next stage replaces the status
    assert open_history(tmp_path).completed_step == 300


def test_a_history_that_was_lost_gets_the_id_of_its_owner_record_back(tmp_path):
    write_json(tmp_path / "status.json", {"stage": "train", "last_checkpoint": "step-00000300"})
    checkpoints = tmp_path / "train" / "checkpoints"
    write_json(checkpoints / "OWNER.json", {"run": {"id": "1" * 32, "name": "a"}})
    preserve_history(tmp_path, checkpoints)
    assert read_history(tmp_path) == RunHistory(id="1" * 32, completed_step=300)


def test_of_two_that_begin_together_both_have_the_history_of_the_first(tmp_path, monkeypatch):
    real, first = history.create_exclusively, []

    def overtaken(path, content):
        monkeypatch.setattr(history, "create_exclusively", real)
        first.append(open_history(tmp_path))
        return real(path, content)

    monkeypatch.setattr(history, "create_exclusively", overtaken)
    assert open_history(tmp_path) == first[0] == read_history(tmp_path)


def test_a_run_that_completed_nothing_is_not_changed(tmp_path):
    write_json(tmp_path / "status.json", {"stage": "train", "step": 7})
    preserve_history(tmp_path, None)
    assert not history_path(tmp_path).exists()
    assert open_history(tmp_path).completed_step is None


def test_start_over_can_be_used_again_after_a_start_without_it(tmp_path):
    history = open_history(tmp_path)
    write_history(tmp_path, history.model_copy(update={"start_over_obeyed": True, "start_overs": 1}))
    rearm_start_over(tmp_path)
    assert read_history(tmp_path) == RunHistory(id=history.id, start_overs=1)


def test_one_of_another_version_is_refused(tmp_path):
    history_path(tmp_path).parent.mkdir(parents=True)
    history_path(tmp_path).write_text(json.dumps({"schema": 1, "id": "a", "tokens": 3}))
    with pytest.raises(UserError, match="another version"):
        read_history(tmp_path)
