"""Shards are read by webdataset alone, in a process without this project's code."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.reader import ImageReader
from tests.support import ROOT
from tests.support.command_server import CommandServer
from tests.support.photographs import NpzFiles

READ = """
import json, sys
import webdataset as wds
print(json.dumps([{row} for {names} in wds.WebDataset(sys.argv[1], shardshuffle=False){steps}]))
assert not any(name.startswith("fm_core") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def webdataset() -> Iterator[CommandServer]:
    """A process that has imported webdataset."""
    server = CommandServer(ROOT, os.environ | {"PYTHONPATH": str(ROOT)}, ["webdataset"])
    yield server
    server.close()


def read_plainly(server: CommandServer, url: str, **code: str) -> list:
    done = server.run("python", "-c", READ.format(**code), url)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_reads_the_shards(webdataset: CommandServer, tmp_path: Path):
    config = DataSection(root=str(tmp_path), block_bytes=6400, shard_blocks=3)
    manifest = write_dataset(config)
    rows = read_plainly(
        webdataset,
        f"{tmp_path}/digits/train-{{000000..000004}}.tar",
        steps='.decode().to_tuple("x.npy", "y.npy").unbatched()',
        names="x, y",
        row="(x.tolist(), int(y))",
    )
    with ImageReader(str(tmp_path), manifest, "train") as reader:
        images, labels = reader.read(np.arange(len(reader)))
    assert [row[0] for row in rows] == images.tolist()
    assert [row[1] for row in rows] == labels.tolist()


def test_it_reads_shards_with_one_file_per_image(webdataset: CommandServer, tmp_path: Path):
    NpzFiles(size=8, batches=3, rows=100).write_folder(tmp_path / "source")
    source = SourceSection(
        format="imagenet-npz", url=str(tmp_path / "source"), image_size=8, allow_partial=True
    )
    root = str(tmp_path / "out")
    config = DataSection(
        root=root, name="tiny", source=source, block_bytes=4096, shard_blocks=1, layout="image"
    )
    manifest = write_dataset(config)
    shards = len(manifest.split_shards("train"))
    rows = read_plainly(
        webdataset,
        f"{root}/tiny/train-{{000000..{shards - 1:06d}}}.tar",
        steps='.decode("rgb8").to_tuple("png", "cls", "json")',
        names="png, label, facts",
        row="(png.transpose(2, 0, 1).tolist(), int(label), facts)",
    )
    with ImageReader(root, manifest, "train") as reader:
        images, labels = reader.read(np.arange(len(reader)))
    assert [row[0] for row in rows] == images.tolist()
    assert [row[1] for row in rows] == labels.tolist()
    assert {row[2]["label"] for row in rows} == set(labels.tolist())
