"""Images in .npz files: reading parts in linear time, and one-line errors."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fm_core.errors import UserError
from fm_core.evaluation.npz_images import NpzImages, npz_arrays


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (200, 6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_parts_in_any_order_are_the_images(save, pixels, tmp_path):
    save(tmp_path / "a.npz", pixels, np.arange(200) % 7)
    images = NpzImages(tmp_path / "a.npz")
    assert (images.count, images.shape) == (200, (3, 6, 5))
    for part in (range(0, 30), range(30, 64), range(150, 200), range(10, 20)):
        expected = torch.from_numpy(pixels[part.start : part.stop]).permute(0, 3, 1, 2)
        assert torch.equal(images.read(part), expected)
    assert images.labels().tolist() == (np.arange(200) % 7).tolist()


def test_a_compressed_array_is_decompressed_once_for_all_parts(pixels, tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", pixels)
    images = NpzImages(tmp_path / "a.npz")
    decompressed = []
    update = zipfile.ZipExtFile._update_crc

    def counted(file, content):
        decompressed.append(len(content))
        return update(file, content)

    monkeypatch.setattr(zipfile.ZipExtFile, "_update_crc", counted)
    for first in range(0, 200, 4):
        images.read(range(first, first + 4))
    assert pixels.nbytes <= sum(decompressed) < pixels.nbytes + 1000


def test_labels_that_are_no_classes_are_not_read(pixels, tmp_path):
    np.savez(tmp_path / "a.npz", pixels, np.zeros((200, 2)))
    np.savez(tmp_path / "b.npz", pixels)
    assert [NpzImages(tmp_path / f"{name}.npz").labels() for name in "ab"] == [None, None]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((9, 8, 8, 3), np.float32)}, r"arr_0 is float32; images are uint8 \[N, height"),
        (
            {"arr_0": np.zeros((9, 3, 8, 8), np.uint8)},
            r"arr_0 is \[9, 3, 8, 8\].*move the channels to the end",
        ),
        (
            {"arr_0": np.zeros((9, 8, 8), np.uint8)},
            r"arr_0 is \[9, 8, 8\]; images are .* of 1 or 3 channels$",
        ),
        ({"arr_0": np.zeros((9, 8, 8, 4), np.uint8)}, r"arr_0 is \[9, 8, 8, 4\]; .* of 1 or 3 channels"),
        ({"arr_0": np.zeros((9, 0, 8, 3), np.uint8)}, "without any pixels"),
        ({"arr_0": np.asfortranarray(np.zeros((9, 8, 8, 3), np.uint8))}, "Fortran order"),
        ({"images": np.zeros((9, 8, 8, 3), np.uint8)}, r"no array arr_0 \(it holds images\).*np\.savez"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"no array arr_0 \(it holds mu, sigma\)"),
        ({}, r"no array arr_0 \(it is empty\)"),
        (None, "is no .npz file and contains no array arr_0: File is not a zip file"),
    ],
    ids=["float", "channels-first", "gray", "alpha", "empty", "fortran", "key", "statistics", "none", "text"],
)
def test_what_holds_no_images_of_8_bits_is_one_line(arrays, message, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"no archive") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        NpzImages(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_cut_or_altered_is_one_line(pixels, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        npz_arrays(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match=r"s3:/bucket/a\.npz: an \.npz file is read from a local disk"):
        npz_arrays(Path("s3://bucket/a.npz"))
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-70])
    images = NpzImages(tmp_path / "cut.npz")
    images.read(range(0, 100))
    with pytest.raises(UserError, match="damaged: arr_0 ends before image 200"):
        images.read(range(100, 200))
    np.savez_compressed(tmp_path / "altered.npz", pixels)
    content = bytearray((tmp_path / "altered.npz").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (tmp_path / "altered.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"altered\.npz is damaged"):
        NpzImages(tmp_path / "altered.npz").read(range(0, 200))
