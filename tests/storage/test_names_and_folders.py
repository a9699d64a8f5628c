"""Names from records and stores stay below their folder, and cache folders and locks are this user's own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
from pydantic import BaseModel, ValidationError

from fm_core.checkpoint.format import COMPLETE, recorded_files, stored_files
from fm_core.data.cache import NodeCache
from fm_core.errors import DamagedRecordError, UserError
from fm_core.storage.atomic_files import write_json
from fm_core.storage.file_lock import file_lock
from fm_core.storage.hashing import Sha256
from fm_core.storage.local_paths import (
    RelativeName,
    cache_home,
    expand_home,
    local_path,
    private_folder,
    private_temporary_folder,
    require_relative_name,
)
from fm_core.storage.store import Store
from tests.support import ROOT

ESCAPES = ["../evil", "a/../../evil", "/etc/passwd", "a/..", "..", "", "a//b", "./a", "a\0b"]
HASH = "0" * 64


class Entry(BaseModel):
    name: RelativeName
    sha256: Sha256


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str):
    with pytest.raises(DamagedRecordError, match="somewhere"):
        require_relative_name(name, "somewhere")
    with pytest.raises(ValidationError):
        Entry(name=name, sha256=HASH)


def test_a_hash_that_is_not_hexadecimal_is_refused():
    assert require_relative_name("optimizer/exp_avg.safetensors", "") == "optimizer/exp_avg.safetensors"
    Entry(name="a/b", sha256=HASH)
    for digest in ("../../x", HASH[:-1], HASH.upper().replace("0", "A"), HASH + "\n"):
        with pytest.raises(ValidationError):
            Entry(name="a/b", sha256=digest)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/passwd"])
def test_a_store_neither_reads_nor_writes_outside_its_folder(name: str, tmp_path: Path):
    (tmp_path / "evil").write_text("kept")
    target = tmp_path / "target"
    for store in (Store.at(str(tmp_path / "folder")), Store.at("memory://names/folder")):
        actions = [
            lambda store=store: store.fetch(name, target),
            lambda store=store: store.read_bytes(name),
            lambda store=store: store.open(name),
            lambda store=store: store.write_bytes(name, b"x"),
            lambda store=store: store.remove(name),
            lambda store=store: store.remove_folder(name),
            lambda store=store: Store.at(store.url, name),
        ]
        for action in actions:
            with pytest.raises(UserError, match="is outside of this folder"):
                action()
        assert not target.exists()
    assert (tmp_path / "evil").read_text() == "kept"


@pytest.mark.parametrize(
    "files",
    [
        {"../../evil": {"bytes": 1, "sha256": HASH}},
        {"/tmp/evil": {"bytes": 1, "sha256": HASH}},
        {"raw.safetensors": {"bytes": 1, "sha256": "../evil"}},
        {"raw.safetensors": {"bytes": 1}},
        ["raw.safetensors"],
    ],
)
def test_a_complete_with_such_names_is_refused_before_anything_is_fetched(files: object, tmp_path: Path):
    write_json(tmp_path / "step-00000010" / COMPLETE, {"files": files})
    with pytest.raises(DamagedRecordError):
        recorded_files(tmp_path / "step-00000010")
    store = Store.at("memory://complete")
    store.send(tmp_path / "step-00000010" / COMPLETE, f"step-00000010/{COMPLETE}")
    with pytest.raises(DamagedRecordError):
        stored_files(store, "step-00000010")


def test_keys_with_dots_are_not_listed():
    memory = fsspec.filesystem("memory")
    memory.store["/dots/.."] = memory.store["/dots/good"] = fsspec.implementations.memory.MemoryFile(memory)
    memory.store["/dots/../deeper/x"] = memory.store["/dots/folder/x"] = memory.store["/dots/good"]
    store = Store.at("memory://dots")
    assert ".." not in store.sizes()
    assert ".." not in store.folders()


def test_cache_folders_are_made_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    os.umask(os.umask(0) or 0o022)
    folder = private_temporary_folder("flow-matching-shards")
    assert folder == tmp_path / f"flow-matching-shards-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)  # as earlier versions made it
    assert private_temporary_folder("flow-matching-shards").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert NodeCache().folder == tmp_path / "cache" / folder.name
    assert cache_home() == tmp_path / "cache"
    assert NodeCache(str(tmp_path / "named")).folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared, link = tmp_path / "shared", tmp_path / "link"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UserError, match=r"can be written to by other users.*data\.cache"):
        private_folder(shared, "data.cache")
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a directory of its own"):
        private_folder(link, "data.cache")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=f"belongs to uid {os.getuid()}"):
        private_folder(tmp_path, "data.cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_folder_and_link_that_another_user_prepared_harm_nothing():
    with tempfile.TemporaryDirectory() as place:
        _check_prepared_folder(Path(place))


def _check_prepared_folder(place: Path):
    temporary, precious = place / "tmp", place / "precious.txt"
    temporary.mkdir()
    temporary.chmod(0o1777)
    precious.write_text("precious")
    place.chmod(0o755)
    folder = temporary / "flow-matching-shards-0"
    if (attacker := os.fork()) == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        folder.mkdir()
        (folder / "room.lock").symlink_to(precious)
        os._exit(0)
    assert os.waitpid(attacker, 0)[1] == 0
    victim = "from fm_core.data.cache import NodeCache; NodeCache().folder"
    variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", victim], env=variables, capture_output=True, text=True)
    assert "belongs to uid 65534" in done.stderr
    assert precious.read_text() == "precious"
    with pytest.raises(UserError, match="symbolic link"), file_lock(folder / "room.lock"):
        pass
    assert precious.read_text() == "precious"


def test_a_lock_keeps_the_content_of_its_file(tmp_path: Path):
    (tmp_path / "lock").write_text("content")
    with file_lock(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "content"


def test_a_tilde_is_the_home_directory_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/runs") == local_path("~/runs") == local_path("file://~/runs") == tmp_path / "runs"
    Store.at("~/sets", "digits").write_bytes("a", b"x")
    assert (tmp_path / "sets" / "digits" / "a").read_bytes() == b"x"
    with pytest.raises(UserError, match="home directory is not known"):
        expand_home("~nobody-of-this-name/runs")


@pytest.mark.parametrize("home", [{}, {"HOME": "/"}, {"HOME": "/nonexistent"}])
def test_a_user_without_passwd_entry_and_home_gets_both(home: dict[str, str], tmp_path: Path):
    other_user = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*other_user, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a user namespace")
    code = (
        "import os, getpass, pathlib\n"
        "os.access = lambda *_: False\n"  # the namespace leaves root's rights on files
        "from fm_core.storage.local_paths import cache_home, provide_home\n"
        "provide_home()\n"
        "print(getpass.getuser(), pathlib.Path.home(), os.path.expanduser('~/x'))\n"
    )
    variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"], **home}
    done = subprocess.run(
        [*other_user, sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )
    folder = tmp_path / "flow-matching-home-12345"
    assert done.stdout.split() == ["uid-12345", str(folder), f"{folder}/x"], done.stderr
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_a_home_caches_go_to_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/")
    assert cache_home() == tmp_path / f"flow-matching-cache-{os.getuid()}"
