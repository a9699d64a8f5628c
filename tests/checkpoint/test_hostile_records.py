"""A COMPLETE with files outside of its checkpoint, or with invalid hashes, is rejected."""

import json

import pytest

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import files_of, verify
from fm_core.checkpoint.retention import Retention
from fm_core.errors import DamagedRecordError, UserError

FACTS = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "..", "", ".", "a\\..\\x", "a\nb", "a\x00b", "COMPLETE", "a/COMPLETE"],
)
def test_names_that_leave_the_checkpoint_are_refused(name):
    with pytest.raises(DamagedRecordError, match="not the name of a file"):
        files_of({"files": {name: FACTS}}, "COMPLETE")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        None,
        {"bytes": 1},
        {**FACTS, "sha256": "../../x"},
        {**FACTS, "sha256": "A" * 64},
        {**FACTS, "bytes": -1},
    ],
)
def test_facts_that_are_none_are_refused(facts):
    with pytest.raises(DamagedRecordError, match="size and SHA-256"):
        files_of({"files": {"raw.safetensors": facts}}, "COMPLETE")


def test_a_store_cannot_choose_where_a_file_goes(tmp_path):
    catalog = CheckpointCatalog("memory://hostile/run", tmp_path / "a" / "staging", Retention(2))
    name = "../../../evil"
    catalog.store.write_bytes(
        "step-00000010/COMPLETE", json.dumps({"schema": 1, "files": {name: FACTS}}).encode()
    )
    catalog.store.filesystem.pipe_file(f"{catalog.store.path}/step-00000010/{name}", b"x")
    with pytest.raises(UserError, match="not the name of a file of a checkpoint"):
        catalog.newest()
    assert "not the name" in catalog.problem_of("step-00000010")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_local_one_is_damaged(tmp_path):
    (tmp_path / "COMPLETE").write_text(json.dumps({"schema": 1, "files": {"../x": FACTS}}))
    assert "not the name" in verify(tmp_path)
    (tmp_path / "COMPLETE").write_text('{"schema": 1, "fi')
    assert "not JSON" in verify(tmp_path)
