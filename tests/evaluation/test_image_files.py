"""Images to score without a run, read by the rules of sharding: folders, zips, tars, samples, data sets."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fm_core.data.sources.image_decoding import PixelRules, decode
from fm_core.errors import UserError
from fm_core.evaluation.image_files import open_images

KEY = "evaluate.samples"


def picture(number=0, size=(8, 8)):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def folder_of(folder, count=6):
    for number in range(count):
        save(folder / f"{number % 2}" / f"{number:03d}.png", picture(number))
    return folder


def opened(location):
    images = open_images(str(location), KEY)
    return images, images.read(range(images.count))


def refused(location):
    with pytest.raises(UserError) as caught:
        opened(location)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_four_images_are_enough(tmp_path):
    assert opened(folder_of(tmp_path / "four", 4))[0].count == 4


def test_folder_zip_and_tars_give_the_same_images_and_classes(tmp_path):
    folder = folder_of(tmp_path / "images")
    files = sorted(path for path in folder.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(folder))
    (tmp_path / "tars").mkdir()
    for name, part in (("part-0.tar", files[:3]), ("part-1.tar", files[3:])):
        with tarfile.open(tmp_path / "tars" / name, "w") as tar:
            for path in part:
                tar.add(path, path.relative_to(folder))
    images, pixels = opened(folder)
    assert (images.count, images.shape, images.kind) == (6, (3, 8, 8), "files")
    assert torch.equal(pixels[0], torch.from_numpy(picture(0)).permute(2, 0, 1))  # sorted by class
    assert images.labels().tolist() == [0, 0, 0, 1, 1, 1]
    assert images.facts() == {"files": {"PNG RGB": 6}}
    for place in ("a.zip", "tars", "tars/part-{0..1}.tar"):
        other, theirs = opened(tmp_path / place)
        assert torch.equal(theirs, pixels), place
    assert other.labels() is not None


def test_every_kind_of_picture_has_the_pixels_of_sharding_and_is_counted(tmp_path):
    gray = picture()[..., 0]
    save(tmp_path / "a.png", gray)
    save(tmp_path / "b.png", np.dstack([picture(), gray]))
    save(tmp_path / "c.png", gray.astype(np.uint16) * 257)
    save(tmp_path / "d.jpg", picture(1), quality=95)
    save(tmp_path / "e.webp", picture(2), lossless=True)
    images, pixels = opened(tmp_path)
    for row, path in enumerate(sorted(tmp_path.iterdir())):
        expected = decode(path.read_bytes(), 8, "exact", PixelRules(orientation=True))
        assert np.array_equal(pixels[row].numpy(), expected), path.name
    assert torch.equal(pixels[0], pixels[2])  # 16 bits are converted to 8
    counted = images.facts()["files"]
    assert counted == {"PNG L": 1, "PNG RGBA": 1, "PNG I;16": 1, "JPEG RGB": 1, "WEBP RGB": 1}
    assert images.labels() is None


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda f: save(f / "x.png", picture(size=(8, 9))), r"x\.png: 9 x 8 pixels, but 8 x 8 in 0/000\.png"),
        (
            lambda f: (f / "x.png").write_bytes(b"\x89PNG and no more"),
            r"x\.png cannot be read \(unreadable\)",
        ),
        (lambda f: save(f / "x.tiff", picture()[..., 0].astype(np.float32)), r"x\.tiff: values are float32"),
        (lambda f: (f / "x.heic").touch(), r"x\.heic: not a supported image format"),
        (lambda f: (f / "x.tar.gz").touch(), r"x\.tar\.gz: not a supported image format"),
        (lambda f: (f / "x.png").symlink_to("nowhere"), r"x\.png cannot be read"),
    ],
    ids=["size", "damaged", "float", "format", "archive", "link"],
)
def test_one_file_that_does_not_fit_is_refused_by_name(add, message, tmp_path):
    folder = folder_of(tmp_path / "images")
    add(folder)
    with pytest.raises(UserError, match=message):
        opened(folder)
    refused(folder)


def test_places_without_images_or_with_two_sets_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path / "few", 3)
    folder_of(tmp_path / "both/train")
    folder_of(tmp_path / "both/val")
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "environment.json"):
        (tmp_path / "run" / name).touch()
    for name, message in {
        "nowhere": "does not exist; name a folder of images",
        "empty": "contains no images",
        "few": "contains 3 images; scores and their errors need at least 4",
        "both": "holds folders of train and val images; name one of them",
        "run": "is a run; name its samples/<step>/<key>, or give --config",
        "few/0/000.png": "contains no images",
        "nowhere.tar": "does not exist",
        "part-{0..1}.tar": "part-0.tar is no .tar or .zip file",
    }.items():
        error = refused(tmp_path / name)
        assert error.startswith(KEY), error
        assert message in error
    assert open_images(str(tmp_path / "both/val"), KEY).count == 6


def test_hidden_entries_and_side_files_do_not_count(tmp_path):
    folder = folder_of(tmp_path / "images")
    for name in ("labels.csv", ".DS_Store", "0/README.txt", "scores.json"):
        (folder / name).touch()
    assert open_images(str(folder), KEY).count == 6


def test_a_data_set_is_named_by_its_folder_and_a_split(digits, manifest):
    place = f"{digits.data.root}/digits"
    train, val = (open_images(name, KEY) for name in (place, f"{place}/val"))
    assert (train.count, val.count, val.kind) == (1497, 300, "split val")
    assert val.read(range(3, 9)).shape == (6, 1, 8, 8)
    assert (val.facts()["data"], val.facts()["data_version"]) == ("digits", manifest.version)
    assert np.bincount(val.labels()).sum() == 300


def test_samples_of_a_run_are_complete_and_intact_or_refused(tmp_path):
    from fm_core.data.manifest import Block
    from fm_core.data.sample_shard import SampleShard
    from fm_core.data.shard_format import ShardFile
    from fm_core.data.sources.base import Samples
    from fm_core.storage.hashing import sha256_bytes

    pixels = np.stack([picture(number) for number in range(7)]).transpose(0, 3, 1, 2)
    for number, part in enumerate((slice(0, 4), slice(4, 7))):
        content = io.BytesIO()
        shard = ShardFile(content, number)
        shard.add(0, Samples(pixels[part], np.arange(7)[part]))
        shard.finish()
        (tmp_path / f"samples-{number:06d}.tar").write_bytes(content.getvalue())
        record = SampleShard(
            name=f"samples-{number:06d}.tar",
            bytes=len(content.getvalue()),
            sha256=sha256_bytes(content.getvalue()),
            first=part.start,
            images=part.stop - part.start,
            block=Block.model_validate(shard.blocks[0].model_dump()),
            nfe=4,
            accepted=None,
            rejected=None,
        )
        (tmp_path / f"samples-{number:06d}.json").write_text(record.model_dump_json())
    save(tmp_path / "grid.png", picture())
    assert "is not complete; run fm sample first" in refused(tmp_path)
    (tmp_path / "DONE.json").write_text('{"schema": 1, "protocol": {"images": 7, "solver": "euler"}}')
    images, decoded = opened(tmp_path)
    assert np.array_equal(decoded.numpy(), pixels)
    assert torch.equal(images.read(range(3, 5)), decoded[3:5])
    assert (images.facts()["solver"], images.labels().tolist()) == ("euler", list(range(7)))
    tar = tmp_path / "samples-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert "samples-000001.tar is missing or damaged" in refused(tmp_path)
    (tmp_path / "samples-000001.json").unlink()
    assert "lacks some of its tars" in refused(tmp_path)
