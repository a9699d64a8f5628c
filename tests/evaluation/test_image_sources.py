"""External images: folders and .npz files, and their one-line errors."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fm_core.errors import UserError
from fm_core.evaluation.image_sources import external_images


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 17, (2500, 8, 8), dtype=np.uint8)


def folder_of(pixels, folder, suffix=".png"):
    (folder / "deeper").mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / ("deeper" if number % 2 else ".") / f"{number:05d}{suffix}")
    return folder


def all_of(source):
    return torch.cat([source.read(number)[0] for number in range(len(source.ranges))])


def test_a_folder_and_an_npz_give_the_same_images_in_parts(pixels, manifest, tmp_path):
    folder_of(pixels[:1100], tmp_path / "images")
    np.savez(tmp_path / "images.npz", pixels[..., None], np.arange(2500))
    as_folder, as_npz = (external_images(str(tmp_path / name), manifest) for name in ("images", "images.npz"))
    assert [len(part) for part in as_npz.ranges] == [1024, 1024, 452]
    assert as_npz.read(2)[0].shape == (452, 1, 8, 8)
    assert torch.equal(all_of(as_npz), torch.from_numpy(pixels)[:, None])
    one, other = (images.flatten(1).tolist() for images in (all_of(as_folder), all_of(as_npz)[:1100]))
    assert sorted(one) == sorted(other)
    assert as_npz.read(0)[1] is None


def test_a_compressed_npz_is_read_too(pixels, manifest, tmp_path):
    np.savez_compressed(tmp_path / "images.npz", pixels[..., None])
    source = external_images(str(tmp_path / "images.npz"), manifest)
    assert torch.equal(source.read(1)[0], torch.from_numpy(pixels)[1024:2048, None])


def test_changed_images_have_another_identity(pixels, manifest, tmp_path):
    folder = folder_of(pixels[:5], tmp_path / "images")
    before = external_images(str(folder), manifest).identity
    assert external_images(str(folder), manifest).identity == before
    Image.fromarray(pixels[9]).save(folder / "00000.png")
    assert external_images(str(folder), manifest).identity != before


def saved(path, *arrays):
    np.savez(path, *arrays)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: saved(p, np.zeros((9, 8, 8, 1), np.float32)), "arr_0 is float32; images are uint8"),
        (lambda p: saved(p, np.zeros((9, 9, 9, 1), np.uint8)), r"arr_0 is \[9, 9, 9, 1\].*\[N, 8, 8, 1\]"),
        (lambda p: saved(p, np.zeros((9, 1, 8, 8), np.uint8)), r"arr_0 is \[9, 1, 8, 8\]"),
        (lambda p: saved(p, np.zeros((1, 8, 8, 1), np.uint8)), "contains 1 images; .* at least 4"),
        (lambda p: p.write_bytes(b"no archive") and p, "contains no array arr_0"),
        (lambda p: p.with_name("nothing.npz"), "neither a folder of images nor an .npz"),
    ],
    ids=["float", "size", "layout", "one", "damaged", "missing"],
)
def test_an_npz_that_does_not_fit_is_refused_in_one_line(make, message, manifest, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        external_images(str(make(tmp_path / "a.npz")), manifest)
    assert "\n" not in str(caught.value)


def test_a_truncated_npz_and_levels_out_of_range_are_refused_when_read(manifest, tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((50, 8, 8, 1), np.uint8))
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-700])
    with pytest.raises(UserError, match="damaged"):
        external_images(str(tmp_path / "cut.npz"), manifest).read(0)
    path = saved(tmp_path / "bright.npz", np.full((5, 8, 8, 1), 255, np.uint8))
    with pytest.raises(UserError, match=r"intensity levels up to 255; those of digits are 0 \.\. 16"):
        external_images(str(path), manifest).read(0)


@pytest.mark.parametrize(
    ("add_file", "message"),
    [
        (lambda f, p: Image.fromarray(p[0].repeat(2, 0)).save(f / "x.png"), "16 x 8 pixels, not 8 x 8"),
        (lambda f, p: Image.fromarray(p[:3].transpose(1, 2, 0)).save(f / "x.png"), "mode RGB"),
        (lambda f, p: Image.fromarray(p[0].astype(np.uint16) * 256).save(f / "x.png"), "mode I;16"),
        (lambda f, p: (f / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more"), "cannot be read"),
    ],
    ids=["size", "color", "sixteen-bits", "damaged"],
)
def test_an_image_that_does_not_fit_is_refused_by_name(add_file, message, pixels, manifest, tmp_path):
    folder = folder_of(pixels[:6], tmp_path / "images")
    add_file(folder, pixels)
    source = external_images(str(folder), manifest)
    with pytest.raises(UserError, match=rf"x\.png.*{message}") as caught:
        source.read(0)
    assert "\n" not in str(caught.value)


def test_few_images_are_refused(pixels, manifest, tmp_path):
    with pytest.raises(UserError, match="contains 3 images; scores and their errors need at least 4"):
        external_images(str(folder_of(pixels[:3], tmp_path / "images")), manifest)


def test_files_of_other_kinds_are_refused_by_name_and_known_side_files_are_ignored(
    pixels, manifest, tmp_path
):
    folder = folder_of(pixels[:6], tmp_path / "images")
    (folder / ".cache").mkdir()
    for name in ("labels.csv", "scores.json", "deeper/README.txt", ".DS_Store", ".cache/x.tiff"):
        (folder / name).touch()
    assert len(all_of(external_images(str(folder), manifest))) == 6
    Image.fromarray(pixels[0].astype(np.float32)).save(folder / "x.tiff")
    (folder / "x").touch()
    with pytest.raises(UserError, match=r"images/x and 1 more files: not a supported") as caught:
        external_images(str(folder), manifest)
    assert "\n" not in str(caught.value)
    (folder / "x").unlink()
    with pytest.raises(UserError, match=r"x\.tiff: not a supported image format \(\.bmp, "):
        external_images(str(folder), manifest)
