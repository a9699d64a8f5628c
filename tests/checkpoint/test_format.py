"""On-disk format and retention on small made-up checkpoints; tests/stages has real ones."""

import json
import shutil

import pytest

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import COMPLETE, commit, complete_steps, read_state, seal, stored_steps, verify
from fm_core.checkpoint.retention import Retention, retain_local, retain_remote
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import UserError
from fm_core.storage.atomic_files import write_json
from fm_core.storage.store import Store
from fm_core.training.train_log import TrainLog


def make(root, step, complete=True):
    directory = root / f"step-{step:08d}"
    (directory / "shards").mkdir(parents=True)
    (directory / "raw.safetensors").write_bytes(b"weights of step %d" % step * 100)
    (directory / "shards" / "rank-1.pt").write_bytes(bytes(range(256)))
    commit(directory, TrainState(step=step, images_seen=step * 10))
    if not complete:
        (directory / COMPLETE).unlink()
    return directory


def newest(root):
    """Name of the newest intact checkpoint."""
    directory = CheckpointCatalog(str(root), root / "nowhere", Retention(3)).newest()
    return directory and directory.name


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_counts_when_complete_is_there(tmp_path):
    make(tmp_path, 10)
    directory = make(tmp_path, 20, complete=False)
    assert complete_steps(tmp_path) == [10]
    assert verify(tmp_path / "step-00000010") is None
    assert "not complete" in verify(directory)
    assert newest(tmp_path) == "step-00000010"


def test_complete_names_every_file_in_every_folder(tmp_path):
    directory = make(tmp_path, 10)
    files = json.loads((directory / COMPLETE).read_text())["files"]
    assert sorted(files) == ["raw.safetensors", "shards/rank-1.pt", "state.json"]


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "truncated":
        del content[-1]
    elif how == "lengthened":
        content.append(0)
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["removed", "truncated", "lengthened", "flipped"])
@pytest.mark.parametrize("file", ["raw.safetensors", "shards/rank-1.pt", "state.json"])
def test_one_damaged_file_falls_back_to_the_previous_checkpoint_with_a_warning(tmp_path, caplog, how, file):
    make(tmp_path, 10)
    make(tmp_path, 9)
    damage(make(tmp_path, 20) / file, how)
    assert newest(tmp_path) == "step-00000010"
    assert caplog.records[0].levelname == "WARNING"
    assert f"step-00000020/{file}" in caplog.messages[0]


def test_without_an_intact_checkpoint_there_is_an_error_and_no_start_from_scratch(tmp_path):
    for step in (10, 20):
        damage(make(tmp_path, step) / "raw.safetensors", "flipped")
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_complete_of_another_version_stops_everything(tmp_path):
    make(tmp_path, 10)
    directory = make(tmp_path, 20)
    (directory / COMPLETE).write_text('{"schema": 99, "files": {}}')
    with pytest.raises(UserError, match="schema"):
        newest(tmp_path)


def test_no_checkpoint_at_all_is_a_start_from_scratch(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "not-made-yet") is None


def test_retention_keeps_the_newest_and_leaves_what_it_has_not_read(tmp_path):
    for step in (10, 20, 30, 50):
        make(tmp_path, step)
    make(tmp_path, 25, complete=False)
    make(tmp_path, 40, complete=False)
    (tmp_path / "notes.txt").write_text("not ours")
    retain_local(tmp_path, Retention(2), newest=30)
    assert names(tmp_path) == [
        "notes.txt",
        "set-aside-step-00000025.e0-",
        "step-00000020",
        "step-00000030",
        "step-00000040",
        "step-00000050",
    ]


@pytest.mark.parametrize("content", [None, "{}}", '{"schema": 1, "tokens": 3}'])
def test_what_cannot_be_read_is_not_removed(tmp_path, content):
    store = Store.at(f"memory://unread-{tmp_path.name}")
    for step in (10, 20, 30):
        directory = make(tmp_path, step)
        if step == 10:
            (directory / "state.json").unlink()
            if content:
                (directory / "state.json").write_text(content)
                seal(directory)
        for path in directory.rglob("*"):
            if path.is_file():
                store.write_bytes(str(path.relative_to(tmp_path)), path.read_bytes())
    retain_local(tmp_path, Retention(1), newest=30)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]
    assert [state.step for state in retain_remote(store, Retention(1), newest=30)] == [30]
    assert stored_steps(store) == [10, 30]
    with pytest.raises(UserError, match=r"state\.json"):
        read_state(tmp_path / "step-00000010")


def retained(retention, *facts):
    """Steps that are kept of checkpoints with (images seen, validation loss), numbered from 1."""
    states = [
        TrainState(step=step, images_seen=images, held_out_loss=loss)
        for step, (images, loss) in enumerate(facts, 1)
    ]
    return retention.retained(states)


def test_the_last_every_mth_and_the_best_stay():
    facts = [(10, 0.9), (20, 0.2), (30, 0.5), (45, 0.6), (50, 0.4), (60, 0.3), (70, None), (80, 0.5)]
    assert retained(Retention(2, best=False), *facts) == {7, 8}
    assert retained(Retention(2), *facts) == {2, 7, 8}
    # The first at or after 40 is the one of 45 images, and is kept when those before it are removed.
    assert retained(Retention(1, every_images=40, best=False), *facts) == {4, 8}
    assert retained(Retention(1, every_images=20, best=False), *facts) == {2, 4, 6, 8}
    assert retained(Retention(None), *facts) == set(range(1, 9))
    assert retained(Retention(1, every_images=1000), (10, None)) == {1}
    assert retained(Retention(1)) == set()


def test_of_two_equally_good_ones_the_later_stays():
    assert retained(Retention(1), (10, 0.2), (20, 0.2), (30, 0.9)) == {2, 3}


def test_incomplete_ones_do_not_count_towards_what_stays(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    retain_local(tmp_path, Retention(1), newest=10)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_retention_never_removes_the_only_good_one_for_later_damaged_ones(tmp_path):
    """Steps 20 and 30 were found damaged; the run went back to 10 and has just saved 15."""
    make(tmp_path, 10)
    make(tmp_path, 15)
    for step in (20, 30):
        damage(make(tmp_path, step) / "raw.safetensors", "flipped")
    retain_local(tmp_path, Retention(1), newest=15, damaged={20: "flipped", 30: "flipped"})
    aside = ["set-aside-step-00000020.e0-", "set-aside-step-00000030.e0-"]
    assert names(tmp_path) == [*aside, "step-00000015"]
    assert newest(tmp_path) == "step-00000015"


def test_a_removal_that_is_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch):
    for step in (10, 20):
        make(tmp_path, step)

    def cut(path, **options):
        (path / "raw.safetensors").unlink()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(OSError, match="Input/output"):
            retain_local(tmp_path, Retention(1), newest=20)
    assert complete_steps(tmp_path) == [20]
    assert names(tmp_path) == [".removing-step-00000010.e0-", "step-00000020"]
    retain_local(tmp_path, Retention(1), newest=20)
    assert names(tmp_path) == ["step-00000020"]


def test_a_state_with_unknown_keys_is_refused(tmp_path):
    directory = make(tmp_path, 10)
    write_json(directory / "state.json", {**TrainState().model_dump(), "tokens": 3})
    with pytest.raises(UserError, match="another version"):
        read_state(directory)


def test_a_state_survives_its_file(tmp_path):
    state = TrainState(step=3, seconds=1.25, interval_sums=("00ff", "ff00"))
    write_json(tmp_path / "state.json", state.model_dump())
    assert read_state(tmp_path) == state


def test_lines_of_steps_that_will_be_trained_again_are_set_aside(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    log = TrainLog(tmp_path, metrics, "a1", 100)
    log.forget_after(0)  # no file yet
    for step in (1, 2, 3, 4):
        log.line({"step": step, "loss": 0.1 * step, "lr": 1e-3, "images_per_s": 5.0})
    before = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*before[:2], '{"step": 2, "lo', *before[2:]]) + '\n{"step": 5')
    log.forget_after(3)
    assert metrics.read_text().splitlines() == before[:3]
    aside = tmp_path / "metrics.set-aside.jsonl"
    assert aside.read_text().splitlines() == ['{"step": 2, "lo', before[3], '{"step": 5']
    log.forget_after(3)
    assert len(aside.read_text().splitlines()) == 3
