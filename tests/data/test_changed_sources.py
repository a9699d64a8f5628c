"""Sources whose files change while their data set is being made, or afterwards."""

import io
import os
import shutil
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import write_dataset
from fm_core.errors import UserError
from tests.support.photographs import NpzFiles, crops, encoded, labels, tar_of, write_tree

KINDS = ("folder", "png tar", "png zip", "tar of tars", "pickles", "parquet")


def bitmaps(count, seed=0):
    """Image files of equal sizes, whatever is in them."""
    return [encoded(image, "bmp") for image in crops(count, 32, seed)]


def files_of(kind, seed):
    """A source; those of different seeds differ only in pixels, not in names, sizes or counts."""
    images = bitmaps(12, seed)
    if kind == "folder":
        return {f"{'ab'[n % 2]}/{n}.bmp": image for n, image in enumerate(images)}
    if kind == "tar of tars":
        lists = {"imagenet_2012_validation_synset_labels.txt": b"n00000001 n00000002"}
        val = {f"ILSVRC2012_val_{n + 1:08d}.bmp": images[n + 4] for n in range(2)}
        train = {f"n0000000{n + 1}.tar": tar_of({f"{n}.bmp": images[n]}) for n in range(2)}
        return {"ILSVRC2012_img_train.tar": tar_of(train), "ILSVRC2012_img_val.tar": tar_of(val)} | lists
    if kind == "pickles":
        files = NpzFiles(size=32, rows=4)
        files.images = {name: crops(len(array), 32, seed + 7) for name, array in files.images.items()}
        return {name: files.pickle(name) for name in files.images}
    if kind == "parquet":
        file = io.BytesIO()
        table = pyarrow.table({"image": images, "label": labels(12, 3)})
        pyarrow.parquet.write_table(
            table, file, write_statistics=False, compression="none", use_dictionary=False
        )
        return {"a.parquet": file.getvalue()}
    packed = {}
    for split, chosen in (("train", images[:8]), ("valid", images[8:])):
        members = {f"{split}_32x32/{number}.bmp": image for number, image in enumerate(chosen)}
        if kind == "png tar":
            packed[f"{split}_32x32.tar"] = tar_of(members)
        else:
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(zipfile.ZipInfo(name), content)
            packed[f"{split}_32x32.zip"] = file.getvalue()
    return packed


def config_of(tmp_path):
    source = SourceSection(format="auto", url=str(tmp_path / "source"), image_size=32, allow_partial=True)
    return DataSection(root=str(tmp_path / "out"), name="set", source=source, validation_images=3)


def interrupted(tmp_path, kind):
    """A data set without its manifest and one of its shards."""
    write_tree(tmp_path / "source", files_of(kind, seed=0))
    config = config_of(tmp_path)
    manifest = write_dataset(config)
    (tmp_path / "out/set/manifest.json").unlink()
    (tmp_path / "out/set/commits/val-000000.json").unlink()
    return config, manifest


@pytest.mark.parametrize("kind", KINDS)
def test_content_that_changed_half_way_is_refused(tmp_path, kind):
    config, _ = interrupted(tmp_path, kind)
    before, after = files_of(kind, seed=0), files_of(kind, seed=1)
    assert {name: len(content) for name, content in before.items()} == {n: len(c) for n, c in after.items()}
    assert before != after
    write_tree(tmp_path / "source", after)
    with pytest.raises(
        UserError,
        match="the source files are not those that the earlier shards were written from, or were modified",
    ):
        write_dataset(config)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_data_set_goes_on_from_the_same_files(tmp_path, kind):
    config, manifest = interrupted(tmp_path, kind)
    assert write_dataset(config) == manifest


def test_files_that_hold_crcs_may_be_copied_meanwhile(tmp_path):
    config, manifest = interrupted(tmp_path, "png zip")
    for path in (tmp_path / "source").iterdir():
        os.utime(path, (1, 1))
    assert write_dataset(config) == manifest


@pytest.mark.parametrize("kind", KINDS)
def test_modification_times_are_not_part_of_a_data_set(tmp_path, kind):
    """Neither of its version nor of its manifest; and a complete one is repaired from touched files."""
    write_tree(tmp_path / "source", files_of(kind, seed=0))
    config = config_of(tmp_path)
    manifest = write_dataset(config)
    for path in (tmp_path / "source").rglob("*"):
        os.utime(path, (1, 1))
    (tmp_path / "out/set/train-000000.tar").unlink()
    assert write_dataset(config) == manifest
    shutil.move(tmp_path / "out", tmp_path / "first")
    assert write_dataset(config) == manifest
