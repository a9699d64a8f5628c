"""Sources that cannot be read, sources at URLs, and pixels that are left as published."""

import errno
import io
import os
import sys
from itertools import count

import fsspec
import numpy as np
import pytest
from PIL import Image

from fm_core.config import RunConfig
from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.sources import archive_readers, image_decoding
from fm_core.data.sources.image_decoding import decode
from fm_core.errors import ImageDecodingError, UserError
from fm_core.evaluation.image_sources import external_images
from fm_core.stages.preflight import preflight
from fm_core.stages.train import train
from tests.support.container_cases import hub, hub_numbers, samples
from tests.support.layout_cases import classes, numbered
from tests.support.photographs import NpzFiles, write_tree
from tests.support.source_cases import Case, encode, numbers_by_class, read_split, tar, tree

FOLDERS = count()
TWO_TARS = {"train.tar": tar(classes("")), "val.tar": tar(classes("", 11))}
PARQUET = {"default/train/0.parquet": hub(), "default/test/0.parquet": hub(11)}
SAMPLES = {"train-0.tar": tar(samples(1)), "val-0.tar": tar(samples(11))}


def with_error(monkeypatch, function, name, number):
    """Let a function of os or builtins fail for one file with an errno."""
    module, attribute = function
    real = getattr(module, attribute)

    def call(path, *arguments, **options):
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(module, attribute, call)


def test_a_file_without_permission_is_quarantined(tmp_path, monkeypatch):
    config = Case("permission", classes("") | {"cat/x.png": 9}, quarantined={"": 1}).config(tmp_path)
    monkeypatch.setattr(archive_readers, "open", open, raising=False)
    with_error(monkeypatch, (archive_readers, "open"), "x.png", errno.EACCES)
    assert write_dataset(config).quarantine.reasons == {"cannot be read (Permission denied)": 1}


def test_a_failing_disk_does_not_quarantine_an_image(tmp_path, monkeypatch):
    config = Case("disk", classes("") | {"cat/x.png": 9}, quarantined={"": 1}).config(tmp_path)
    monkeypatch.setattr(archive_readers, "open", open, raising=False)
    with_error(monkeypatch, (archive_readers, "open"), "x.png", errno.EIO)
    with pytest.raises(UserError, match=r"cat/x\.png: cannot be read \(Input/output error\)"):
        write_dataset(config)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    config = Case("folder", classes("")).config(tmp_path)
    with_error(monkeypatch, (os, "scandir"), "/cat", errno.EACCES)
    with pytest.raises(UserError, match=r"/cat: cannot be listed \(Permission denied\)"):
        check_source(config)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_readers, "MAX_FILE_BYTES", 1000)
    config = Case("large", classes("") | {"cat/x.png": bytes(1001)}, quarantined={"": 1}).config(tmp_path)
    assert write_dataset(config).quarantine.reasons == {"too large": 1}


def test_a_picture_that_takes_too_much_memory_is_too_large(monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(image_decoding, "_fit", exhausted)
    with pytest.raises(ImageDecodingError, match="too large"):
        decode(encode(Image.new("RGB", (8, 8))), 8, "exact")


@pytest.fixture
def memory():
    """Writes files to a new folder in fsspec's memory; returns its URL."""
    filesystem = fsspec.filesystem("memory")

    def write(files):
        url = f"memory://bucket{next(FOLDERS)}"
        for name, content in tree(files).items():
            filesystem.pipe_file(f"{url}/{name}", content)
        return url

    return write


@pytest.mark.parametrize(
    ("files", "kind", "below", "train", "val"),
    [
        (classes("Train/") | classes("validation/", 11), "folder", "", numbered(1), numbered(11)),
        (
            {"train.tar": tar(classes("")), "val.tar": tar(classes("", 11))},
            "auto",
            "",
            numbered(1),
            numbered(11),
        ),
        (
            {"default/train/0.parquet": hub(), "default/test/0.parquet": hub(11)},
            "auto",
            "",
            hub_numbers(1),
            hub_numbers(11),
        ),
        (
            {"train-0.tar": tar(samples(1)), "val-0.tar": tar(samples(11))},
            "webdataset",
            "/{train,val}-0.tar",
            {0: [1, 3], 1: [2]},
            {0: [11, 13], 1: [12]},
        ),
    ],
)
def test_sources_at_urls_are_read_as_local_ones(tmp_path, memory, files, kind, below, train, val):
    source = {"format": kind, "url": memory(files) + below, "image_size": 8, "resize": "exact"}
    config = DataSection(root=str(tmp_path), name="set", source=SourceSection.model_validate(source))
    write_dataset(config)
    assert numbers_by_class(tmp_path / "set", "train") == train
    assert numbers_by_class(tmp_path / "set", "val") == val


def test_a_protocol_whose_package_is_missing_is_refused_in_one_line(tmp_path, monkeypatch):
    registry = sys.modules["fsspec.registry"]
    monkeypatch.setitem(
        registry.known_implementations, "hf", {"class": "nowhere.Fs", "err": "Install huggingface_hub"}
    )
    monkeypatch.delitem(registry._registry, "hf", raising=False)  # another test may have used it
    source = SourceSection(format="parquet", url="hf://datasets/a/b", image_size=8)
    with pytest.raises(UserError, match="hf://datasets/a/b: Install huggingface_hub"):
        check_source(DataSection(root=str(tmp_path), name="set", source=source))


def test_ilsvrc_is_left_as_published(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    content = encode(Image.fromarray(upright), "png", exif=exif)
    files = {f"{split}/n01440764/{n}.JPEG": content for split in ("train", "val") for n in range(2)}
    case = Case("ilsvrc", files, source={"format": "imagenet-folder", "allow_partial": True})
    manifest = write_dataset(case.config(tmp_path))
    assert "EXIF orientation left as published" in manifest.interpretation.pixels
    images, _ = read_split(tmp_path / "sets/set", "train")
    assert np.array_equal(images[0], upright.transpose(2, 0, 1))


@pytest.mark.parametrize("flat", [True, False])
def test_ilsvrc_validation_in_class_folders_is_shuffled_and_by_number_is_not(tmp_path, flat):
    wnids = ["n01440764", "n02119789"]
    train = {f"train/{wnid}/{n}.JPEG": n for wnid in wnids for n in range(2)}
    folders = {f"val/{wnid}/{n}.JPEG": n for wnid in wnids for n in range(20)}
    numbers = {f"val/ILSVRC2012_val_{n + 1:08d}.JPEG": n for n in range(40)}
    labels = {"imagenet_2012_validation_synset_labels.txt": "\n".join(wnids * 20).encode()}
    files = train | (numbers | labels if flat else folders)
    case = Case("ilsvrc", files, source={"format": "imagenet-folder", "allow_partial": True})
    write_dataset(case.config(tmp_path))
    _, actual = read_split(tmp_path / "sets/set", "val")
    assert set(actual[:10]) == set(wnids)
    assert (actual == wnids * 20) == flat


def test_batches_in_fortran_order_are_read(tmp_path):
    files = NpzFiles(size=8)
    root = files.write_folder(tmp_path / "plain")
    source = SourceSection(format="imagenet-npz", url=str(root), image_size=8, allow_partial=True)
    plain = write_dataset(DataSection(root=str(tmp_path), name="a", source=source))
    rows = files.images["val_data"].reshape(20, -1)
    file = io.BytesIO()
    np.savez(file, labels=files.labels["val_data"] + 1, data=np.asfortranarray(rows))
    write_tree(root, {"val_data.npz": file.getvalue()})
    assert write_dataset(DataSection(root=str(tmp_path), name="b", source=source)).version == plain.version


def test_a_link_to_a_folder_in_the_same_tree_is_a_separate_class(tmp_path):
    root = write_tree(tmp_path / "source", tree({"cat/1.png": 1, "cat/2.png": 2, "cat/3.png": 3}))
    (root / "copy").symlink_to(root / "cat")
    source = SourceSection(format="folder", url=str(root), image_size=8)
    manifest = write_dataset(DataSection(root=str(tmp_path), name="set", source=source, validation_images=2))
    assert manifest.class_names == ("cat", "copy")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.zip", "folder"),
        ("a.tar", "folder"),
        ("a.tar", "webdataset"),
        ("a.parquet", "parquet"),
        ("Imagenet8_val_npz.zip", "imagenet-npz"),
        ("val_data.npz", "imagenet-npz"),
    ],
)
def test_an_archive_that_is_a_link_to_nowhere_is_refused_by_name(tmp_path, name, kind):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).symlink_to("/nowhere")
    source = SourceSection(format=kind, url=str(tmp_path / "source"), image_size=8, allow_partial=True)
    with pytest.raises(UserError, match=name):
        check_source(DataSection(root=str(tmp_path), name="set", source=source))


def test_a_list_of_labels_that_is_a_link_to_nowhere_is_refused_by_name(tmp_path):
    root = write_tree(tmp_path / "source", tree(classes("")))
    (root / "dataset.json").symlink_to("/nowhere")
    source = SourceSection(format="folder", url=str(root), image_size=8)
    with pytest.raises(UserError, match=r"dataset\.json: cannot be read"):
        check_source(DataSection(root=str(tmp_path), source=source))


def test_a_picture_to_score_that_is_a_link_to_nowhere_is_refused_by_name(tmp_path):
    root = write_tree(tmp_path / "source", tree(classes("")))
    (root / "x.png").symlink_to("/nowhere")
    manifest = write_dataset(DataSection(root=str(tmp_path / "digits")))
    with pytest.raises(UserError, match=r"x\.png cannot be read: No such file"):
        external_images(str(root), manifest)


def test_a_conditional_model_of_images_without_labels_is_refused_before_anything_starts(tmp_path):
    root = write_tree(tmp_path / "source", tree({f"{number}.png": number for number in range(5)}))
    config = RunConfig.model_validate(
        {
            "run": {"root": str(tmp_path / "runs"), "name": "r"},
            "data": {
                "root": str(tmp_path / "sets"),
                "name": "digits",
                "source": {"format": "folder", "url": str(root), "image_size": 8},
                "validation_images": 2,
            },
            "model": {"class_conditional": True},
        }
    )
    message = "class_conditional: the data set digits has no labels"
    with pytest.raises(UserError, match=message):
        preflight(config, ("shard", "train"))
    write_dataset(config.data)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "runs/r/train").exists()
