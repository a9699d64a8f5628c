import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data import shard_writer
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError
from tests.support.photographs import NpzFiles, crops, encoded, write_tree


def npz_config(tmp_path, name="tiny", **data):
    source = tmp_path / "source"
    if not source.exists():
        NpzFiles(size=8, batches=3, rows=100).write_folder(source)
    keys = SourceSection(format="imagenet-npz", url=str(source), image_size=8, allow_partial=True)
    return DataSection(
        root=str(tmp_path / "out"), name=name, source=keys, block_bytes=4096, shard_blocks=1, **data
    )


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.tar")}


def read_all(config, manifest, split):
    with ImageReader(config.root, manifest, split) as reader:
        images, labels = reader.read(np.random.default_rng(0).permutation(len(reader)))
    return images.numpy(), labels.numpy()


@pytest.mark.parametrize("source", ["npz", "digits"])
def test_both_layouts_hold_the_same_images(tmp_path, source):
    blocks = npz_config(tmp_path) if source == "npz" else DataSection(root=str(tmp_path / "out"))
    images = blocks.model_copy(update={"layout": "image", "name": "images"})
    first, second = write_dataset(blocks), write_dataset(images)
    for split in ("train", "val"):
        for one, other in zip(read_all(blocks, first, split), read_all(images, second, split), strict=True):
            assert np.array_equal(one, other)
    assert first.splits == second.splits
    assert first.version != second.version


def test_a_flipped_bit_in_a_png_is_detected(tmp_path):
    config = npz_config(tmp_path, layout="image")
    manifest = write_dataset(config)
    path = tmp_path / "out/tiny/val-000000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 30] ^= 4
    path.write_bytes(content)
    with (
        ImageReader(config.root, manifest, "val") as reader,
        pytest.raises(UserError, match="image 0 of val"),
    ):
        reader.read(np.arange(len(reader)))


def test_indexes_for_other_tools_count_samples(tmp_path):
    config = npz_config(tmp_path)
    manifest = write_dataset(config)
    folder = tmp_path / "out/tiny"
    wids = json.loads((folder / "train.wids.json").read_text())
    assert wids["__kind__"] == "wids-shard-index-v1"
    assert [item["url"] for item in wids["shardlist"]] == [s.name for s in manifest.split_shards("train")]
    sizes = json.loads((folder / "sizes.json").read_text())
    assert sizes == {shard.name: len(shard.blocks) for shard in manifest.shards}


def test_several_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "WORTH_A_POOL_BYTES", 0)
    seen = []
    write_dataset(npz_config(tmp_path, "pool", workers=3), seen.append)
    monkeypatch.setattr(shard_writer, "WORTH_A_POOL_BYTES", 1e12)
    manifest = write_dataset(npz_config(tmp_path, "single", workers=1))
    assert hashes(tmp_path / "out/pool") == hashes(tmp_path / "out/single")
    assert seen[-1] == sum(split.images for split in manifest.splits.values())
    assert len(seen) > 3


def test_images_are_distributed_shard_by_shard(tmp_path, monkeypatch):
    files = {f"{n % 2}/{n}.png": encoded(image) for n, image in enumerate(crops(40, 16))}
    source = SourceSection(format="folder", url=str(write_tree(tmp_path / "source", files)), image_size=16)
    config = DataSection(
        root=str(tmp_path / "out"), name="a", source=source, block_bytes=768 * 4, shard_blocks=1, workers=2
    )
    config = config.model_copy(update={"validation_images": 5})
    monkeypatch.setattr(shard_writer, "WORTH_A_POOL_BYTES", 0)
    write_dataset(config)
    write_dataset(config.model_copy(update={"name": "b", "workers": 1}))
    assert hashes(tmp_path / "out/a") == hashes(tmp_path / "out/b")


def test_an_error_in_a_process_arrives_as_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "WORTH_A_POOL_BYTES", 0)
    config = npz_config(tmp_path, workers=2)
    path = tmp_path / "source/train_data_batch_2.npz"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train_data_batch_2\.npz: damaged"):
        write_dataset(config)


POOL = """
import sys
from fm_core.config.data import DataSection
from fm_core.data import shard_writer
from fm_core.data.dataset_builder import write_dataset
if __name__ == "__main__":
    shard_writer.WORTH_A_POOL_BYTES = 0
    write_dataset(DataSection.model_validate_json(sys.argv[1]), lambda done: print(done, flush=True))
"""


def test_kill_of_the_parent_leaves_no_writers_and_the_next_call_continues(tmp_path):
    files = {f"{n % 2}/{n}.png": encoded(image) for n, image in enumerate(crops(400, 64))}
    source = SourceSection(format="folder", url=str(write_tree(tmp_path / "source", files)), image_size=16)
    config = DataSection(
        root=str(tmp_path / "out"), name="a", source=source, block_bytes=768 * 4, shard_blocks=1, workers=2,
        validation_images=5,
    )  # fmt: skip
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    command = [sys.executable, str(script), config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) > 0:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
    for _ in range(300):
        alive = [child for child in children if _running(child)]
        if not alive:
            break
        time.sleep(0.1)
    assert children
    assert not alive
    assert not (tmp_path / "out/a/manifest.json").exists()
    mtimes = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/a").glob("*.tar")}
    assert mtimes
    manifest = write_dataset(config)
    assert sum(split.images for split in manifest.splits.values()) == 400
    same = [path for path, time_ns in mtimes.items() if path.stat().st_mtime_ns == time_ns]
    assert len(same) >= len(mtimes) - 2


def _running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return status != "Z" and b"resource_tracker" not in command
