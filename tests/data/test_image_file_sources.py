"""Sources that are image files: the older PNG set, the originals, folders."""

import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.reader import ImageReader
from fm_core.data.sources.image_decoding import decode
from fm_core.errors import ImageDecodingError, UserError
from tests.support.photographs import crops, encoded, tar_of, write_tree


def section(tmp_path, url, kind="auto", size=32, name="set", partial=True, **data):
    source = {"format": kind, "url": str(url), "image_size": size, "allow_partial": partial}
    source |= {key: data.pop(key) for key in ("resize",) if key in data}
    return DataSection(root=str(tmp_path / "out"), name=name, source=SourceSection(**source), **data)


def read_all(config, manifest, split):
    with ImageReader(config.root, manifest, split) as reader:
        images, labels = reader.read(np.arange(len(reader)))
    return images.numpy(), labels.numpy()


def same_set(images, labels, expected, expected_labels):
    """Whether two sets of labeled images are equal but for their order."""
    one = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    other = sorted(
        (image.tobytes(), int(label)) for image, label in zip(expected, expected_labels, strict=True)
    )
    return one == other


def png_set(packed):
    """The older set at 32 pixels, as a tar, a zip or a folder."""
    files = {}
    for split, images in (("train", crops(40, 32)), ("valid", crops(9, 32, seed=1))):
        stem = f"{split}_32x32"
        members = {f"{stem}/{number + 1:07d}.png": encoded(image) for number, image in enumerate(images)}
        if packed == "tar":
            files[f"{stem}.tar"] = tar_of(members)
        elif packed == "zip":
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
            files[f"{stem}.zip"] = file.getvalue()
        else:
            files |= members
    return files


@pytest.mark.parametrize("packed", ["tar", "zip", "folder"])
def test_the_older_pngs_have_no_labels_and_name_their_set(tmp_path, packed):
    config = section(tmp_path, write_tree(tmp_path / "source", png_set(packed)))
    manifest = write_dataset(config)
    assert manifest.recipe["source"] == "imagenet-png"
    assert manifest.class_count is None
    assert manifest.label_order == "none"
    with tarfile.open(tmp_path / "out/set/train-000000.tar") as archive:
        assert not any(".y." in name for name in archive.getnames())
    images, labels = read_all(config, manifest, "val")
    assert np.array_equal(images, crops(9, 32, seed=1))
    assert (labels == -1).all()
    images, labels = read_all(config, manifest, "train")
    assert same_set(images, labels, crops(40, 32), [-1] * 40)
    assert not np.array_equal(images, crops(40, 32))


def test_the_older_pngs_are_counted(tmp_path):
    config = section(tmp_path, write_tree(tmp_path / "source", png_set("tar")), partial=False)
    with pytest.raises(UserError, match=r"40 train images, the published set 1,281,149"):
        check_source(config)


@pytest.mark.parametrize("cut", [1, 10_240, 2_000])
def test_a_tar_that_is_cut_is_refused(tmp_path, cut):
    files = png_set("tar")
    files["train_32x32.tar"] = files["train_32x32.tar"][:-cut].rstrip(b"\0")[: None if cut > 1 else -600]
    with pytest.raises(UserError, match=r"train_32x32\.tar: damaged or incomplete"):
        check_source(section(tmp_path, write_tree(tmp_path / "source", files)))


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path):
    files = png_set("tar")
    tar = bytearray(files["train_32x32.tar"])
    second = tar.index(b"train_32x32/0000005.png")
    tar[second + 150] ^= 1  # its checksum
    files["train_32x32.tar"] = bytes(tar)
    with pytest.raises(UserError, match=r"train_32x32\.tar: damaged"):
        check_source(section(tmp_path, write_tree(tmp_path / "source", files)))


WNIDS = ("n01440764", "n02119789", "n03000134")


def originals():
    """Photographs of odd sizes, in the formats that hide behind .JPEG in ILSVRC: by wnid, and validation."""
    photographs = crops(8, 90)
    train = {wnid: {} for wnid in WNIDS}
    for number in range(6):
        image = photographs[number][:, : 70 + number, :]
        train[WNIDS[number % 3]][f"{WNIDS[number % 3]}_{number}.JPEG"] = encoded(image, "jpeg", quality=95)
    train[WNIDS[0]][f"{WNIDS[0]}_99.JPEG"] = encoded(photographs[6], "png")
    file = io.BytesIO()
    Image.fromarray(photographs[7].transpose(1, 2, 0)).convert("CMYK").save(file, "jpeg")
    train[WNIDS[1]][f"{WNIDS[1]}_77.JPEG"] = file.getvalue()
    val = {
        f"ILSVRC2012_val_{number + 1:08d}.JPEG": encoded(image, "jpeg")
        for number, image in enumerate(crops(4, 80, seed=5))
    }
    return train, val


VAL_WNIDS = (WNIDS[2], WNIDS[0], WNIDS[0], WNIDS[1])


def truth_files(kind):
    if kind == "kaggle":
        rows = [f"ILSVRC2012_val_{n + 1:08d},{wnid} 1 2 3 4 " for n, wnid in enumerate(VAL_WNIDS)]
        return {"LOC_val_solution.csv": "\n".join(["ImageId,PredictionString", *reversed(rows)]).encode()}
    if kind == "list":
        return {"imagenet_2012_validation_synset_labels.txt": "\n".join(VAL_WNIDS).encode()}
    ids = {wnid: 100 - number for number, wnid in enumerate(WNIDS)}  # numbers are not in WordNet order
    synsets = np.array([(ids[w], w) for w in WNIDS], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "\n".join(str(ids[wnid]) for wnid in VAL_WNIDS).encode()
    inner = "ILSVRC2012_devkit_t12/data/"
    files = {
        f"{inner}ILSVRC2012_validation_ground_truth.txt": truth,
        f"{inner}meta.mat": meta.getvalue(),
    }
    return files if kind == "devkit" else {"ILSVRC2012_devkit_t12.tar.gz": tar_of(files, "w:gz")}


@pytest.mark.parametrize("truth", ["kaggle", "list", "devkit", "packed devkit"])
@pytest.mark.parametrize("kind", ["folder", "tar", "kaggle folder"])
def test_originals_are_squashed_by_the_box_filter_and_labeled_by_sorted_wnid(tmp_path, kind, truth):
    train, val = originals()
    if kind == "tar":
        inner = {f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}
        files = {"ILSVRC2012_img_train.tar": tar_of(inner), "ILSVRC2012_img_val.tar": tar_of(val)}
    else:
        top = "" if kind == "folder" else "ILSVRC/Data/CLS-LOC/"
        files = {f"{top}train/{wnid}/{name}": c for wnid, group in train.items() for name, c in group.items()}
        files |= {f"{top}val/{name}": content for name, content in val.items()}
    config = section(tmp_path, write_tree(tmp_path / "source", files | truth_files(truth)))
    manifest = write_dataset(config)
    assert manifest.recipe["source"] == ("imagenet-tar" if kind == "tar" else "imagenet-folder")
    assert "box" in manifest.recipe["resize"]
    assert manifest.class_names == WNIDS
    images, labels = read_all(config, manifest, "train")
    expected = [(squashed(c), WNIDS.index(wnid)) for wnid, group in train.items() for c in group.values()]
    assert same_set(images, labels, *zip(*expected, strict=True))
    images, labels = read_all(config, manifest, "val")
    assert np.array_equal(images, np.stack([squashed(content) for content in val.values()]))
    assert labels.tolist() == [WNIDS.index(wnid) for wnid in VAL_WNIDS]


def squashed(content):
    """As Chrabaszcz et al. did."""
    picture = Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32), Image.BOX)
    return np.asarray(picture).transpose(2, 0, 1)


def test_the_error_for_validation_images_without_classes_says_what_to_add(tmp_path):
    train, val = originals()
    files = {f"train/{wnid}/{name}": c for wnid, group in train.items() for name, c in group.items()}
    files |= {f"val/{name}": content for name, content in val.items()}
    with pytest.raises(UserError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz, LOC_val_solution\.csv or"):
        check_source(section(tmp_path, write_tree(tmp_path / "source", files)))


def test_the_adm_crop_is_admss(tmp_path):
    """Halved by the box filter, bicubic, cut from the middle: the chain of ADM's center_crop_arr."""
    content = encoded(crops(1, 300)[0][:, :200, :], "png")
    ours = decode(content, 32, "crop-adm").transpose(1, 2, 0)
    picture = Image.open(io.BytesIO(content))
    while min(*picture.size) >= 64:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.BOX)
    scale = 32 / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    y, x = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    assert np.array_equal(ours, array[y : y + 32, x : x + 32])


def test_sixteen_bits_are_scaled_and_gray_becomes_three_channels():
    gray = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "png")
    image = decode(file.getvalue(), 32, "exact")
    assert np.array_equal(image, np.stack([(gray >> 8).astype(np.uint8)] * 3))


def test_another_size_is_unusable_in_exact_mode():
    with pytest.raises(ImageDecodingError, match="another size"):
        decode(encoded(crops(1, 33)[0]), 32, "exact")


def folder_files(count=30, classes=("cat", "dog", "fox")):
    images = crops(count, 32)
    return {f"{classes[n % 3]}/{n}.png": encoded(image) for n, image in enumerate(images)}, images


def test_a_folder_of_classes_is_split_and_named(tmp_path):
    files, images = folder_files()
    config = section(tmp_path, write_tree(tmp_path / "source", files), validation_images=6)
    manifest = write_dataset(config)
    assert manifest.recipe["source"] == "folder"
    assert manifest.class_names == ("cat", "dog", "fox")
    assert manifest.splits["val"].images == 6
    train, train_labels = read_all(config, manifest, "train")
    val, val_labels = read_all(config, manifest, "val")
    assert same_set([*train, *val], [*train_labels, *val_labels], images, np.arange(30) % 3)


def test_a_folder_with_its_own_split_keeps_it(tmp_path):
    files, images = folder_files()
    files = {
        f"{'val' if n < 6 else 'train'}/{key}": content for n, (key, content) in enumerate(files.items())
    }
    config = section(tmp_path, write_tree(tmp_path / "source", files))
    manifest = write_dataset(config)
    assert same_set(*read_all(config, manifest, "val"), images[:6], np.arange(6) % 3)
    assert same_set(*read_all(config, manifest, "train"), images[6:], np.arange(6, 30) % 3)


def test_images_at_the_top_have_no_labels(tmp_path):
    files = {f"{number}.png": encoded(image) for number, image in enumerate(crops(8, 32))}
    config = section(tmp_path, write_tree(tmp_path / "source", files), kind="folder", validation_images=2)
    assert write_dataset(config).class_count is None


def test_unreadable_images_are_quarantined_up_to_a_share(tmp_path):
    files, images = folder_files()
    files["cat/0.png"] = files["cat/0.png"][:200]
    files["dog/1.png"] = b"<html>not found</html>"
    source = write_tree(tmp_path / "source", files)
    with pytest.raises(
        UserError, match=r"data\.max_quarantined: 1 of 30 .* 0 may be left out; first .*unreadable"
    ):
        write_dataset(section(tmp_path, source, validation_images=6, block_bytes=3072 * 4, name="strict"))
    config = section(tmp_path, source, validation_images=6, max_quarantined=0.1)
    manifest = write_dataset(config)
    assert manifest.quarantine.images == 2
    assert manifest.quarantine.reasons == {"unreadable": 2}
    rows = [json.loads(line) for line in (tmp_path / "out/set/quarantine.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {"cat/0.png", "dog/1.png"}
    assert {row["sha256"] for row in rows} >= {hashlib.sha256(files["dog/1.png"]).hexdigest()}
    train, train_labels = read_all(config, manifest, "train")
    val, val_labels = read_all(config, manifest, "val")
    assert same_set([*train, *val], [*train_labels, *val_labels], images[2:], np.arange(2, 30) % 3)


def test_the_error_for_an_empty_or_unknown_folder_says_what_is_recognized(tmp_path):
    write_tree(tmp_path / "source", {"notes.txt": b"x"})
    with pytest.raises(UserError, match=r"no format recognized under .*imagenet-npz"):
        check_source(section(tmp_path, tmp_path / "source"))
    with pytest.raises(UserError, match="no format recognized"):
        check_source(section(tmp_path, tmp_path / "absent"))


def test_naming_a_url_without_a_format_means_detection():
    assert SourceSection.model_validate({"url": "/x"}).format == "auto"
    assert SourceSection().format == "digits"
