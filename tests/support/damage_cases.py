"""Damaged, linked and unreadable files and archives: quarantined or refused by name."""

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

from tests.support.layout_cases import TWO, classes, numbered
from tests.support.photographs import NpzFiles, tar_of, write_tree
from tests.support.source_cases import Case, parquet, picture, tar, tree, zip_of

PNGS = {"format": "imagenet-png", "image_size": 32, "allow_partial": True, "resize": "squash-box"}
TARS = {"format": "imagenet-tar", "allow_partial": True}


def linked(folder: Path) -> None:
    """A class that is a link to a folder elsewhere, and a picture that is a link to another."""
    elsewhere = write_tree(folder.parent / "elsewhere", tree({"3.png": 3, "x.png": 4}))
    write_tree(folder, tree({"cat/1.png": 1}))
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat/2.png").symlink_to(write_tree(folder.parent / "one", tree({"2.png": 2})) / "2.png")


def all_linked(folder: Path) -> None:
    elsewhere = write_tree(folder.parent / "elsewhere", tree(classes("")))
    for name in ("cat", "dog"):
        (folder / name).symlink_to(elsewhere / name)


def in_a_loop(folder: Path) -> None:
    write_tree(folder, tree(classes("")))
    (folder / "cat/again").symlink_to(folder)
    (folder / "dog/itself").symlink_to(folder / "dog")


def in_a_loop_of_two(folder: Path) -> None:
    """Two folders that hold links to each other."""
    elsewhere = write_tree(folder.parent / "elsewhere", tree({"3.png": 3, "4.png": 4}))
    write_tree(folder, tree({"cat/1.png": 1, "cat/2.png": 2}))
    (folder / "dog").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)


def link_to_nowhere(folder: Path) -> None:
    write_tree(folder, tree(classes("")))
    (folder / "cat/x.png").symlink_to("/nowhere/x.png")


def pipe(folder: Path) -> None:
    write_tree(folder, tree(classes("")))
    os.mkfifo(folder / "cat/x.png")


def latin_1(folder: Path) -> None:
    """A file and a folder whose names are no UTF-8."""
    write_tree(folder, tree({"cat/1.png": 1, "cat/2.png": 2}))
    below = os.fsencode(folder) + b"/caf\xe9"
    Path(os.fsdecode(below)).mkdir()
    for name, content in ((b"3\xe9.png", picture(3)), (b"4.png", picture(4))):
        Path(os.fsdecode(below + b"/" + name)).write_bytes(content)


def latin_1_splits(folder: Path) -> None:
    """Splits in a folder whose name is no UTF-8, in which a picture is damaged."""
    below = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    write_tree(
        below, tree(classes("train/") | classes("val/", 11) | {"val/cat/x.png": b"x", "test/1.png": 1})
    )


def latin_1_damaged(folder: Path) -> None:
    latin_1(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/cat/\xe9.png")).write_bytes(b"no picture")


def tar_with_links() -> bytes:
    """A hard link, a symbolic link, a link to a link and one to nowhere, each named like a picture."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, number in (("cat/1.png", 1), ("dog/3.png", 3)):
            member = tarfile.TarInfo(name)
            member.size = len(picture(number))
            archive.addfile(member, io.BytesIO(picture(number)))
        for name, target, kind in (
            ("cat/2.png", "cat/1.png", tarfile.LNKTYPE),
            ("dog/4.png", "../cat/1.png", tarfile.SYMTYPE),
            ("dog/5.png", "4.png", tarfile.SYMTYPE),
            ("dog/6.png", "gone.png", tarfile.SYMTYPE),
            ("dog/7.png", "7.png", tarfile.SYMTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return file.getvalue()


def zip_with_two_of_a_name() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in (1, 2, 3):
            archive.writestr("cat/x.png", picture(number))
    return file.getvalue()


def patched_zip(files: dict, offset: int, value: int) -> bytes:
    """A zip with a 16-bit field of all directory entries (and, 2 bytes before, of all headers) replaced."""
    content = bytearray(zip_of(files))
    for magic, shift in ((b"PK\x01\x02", offset), (b"PK\x03\x04", offset - 2)):
        at = content.find(magic)
        while at >= 0:
            content[at + shift : at + shift + 2] = struct.pack("<H", value)
            at = content.find(magic, at + 4)
    return bytes(content)


def damaged_crc() -> bytes:
    content = zip_of(classes(""))
    return content.replace(picture(2), picture(2)[:-20] + b"x" * 20, 1)


def npz_folder(method: int, value: int):
    def write(folder: Path) -> None:
        NpzFiles(size=8).write_zips(folder)
        path = folder / "Imagenet8_val_npz.zip"
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        path.write_bytes(patched_zip(members, method, value))

    return write


def ilsvrc(folder: Path, val: bytes) -> None:
    train = tar_of({"n01440764.tar": tar({"n01440764_1.JPEG": 1})})
    write_tree(folder, {"ILSVRC2012_img_train.tar": train, "ILSVRC2012_img_val.tar": val})


NPZ = {"format": "imagenet-npz", "allow_partial": True, "resize": "squash-box"}
METHOD, FLAGS = 10, 8
OK = {"cat/1.png": 1, "cat/2.png": 2, "dog/3.png": 3, "dog/4.png": 4}
TWO_TARS = tar({"cat/1.png": 1, "cat/2.png": 2}) + tar({"dog/3.png": 3, "dog/4.png": 4})
UNREADABLE = {"unreadable": 1}

CASES = [
    Case("linked folders and files", linked, both=TWO),
    Case("all folders linked", all_linked, both=TWO),
    Case("links in a loop", in_a_loop, both=TWO),
    Case("links that lead back to their folder", in_a_loop_of_two, both=TWO),
    Case(
        "a link to nowhere",
        link_to_nowhere,
        both=TWO,
        quarantined={"cannot be read (No such file or directory)": 1},
    ),
    Case(
        "a link to nowhere where none may be left out",
        link_to_nowhere,
        refused=r"max_quarantined: 1 of 5 .* first cat/x\.png: cannot be read \(No such file",
    ),
    Case("a pipe", pipe, both=TWO),
    Case("names that are not UTF-8", latin_1, both={"cat": [1, 2], "caf\\xe9": [3, 4]}),
    Case(
        "splits in a folder whose name is not UTF-8",
        latin_1_splits,
        train=numbered(1),
        val=numbered(11),
        quarantined=UNREADABLE,
        says=r"train from caf\\xe9/train",
    ),
    Case(
        "a damaged picture whose name is not UTF-8",
        latin_1_damaged,
        both={"cat": [1, 2], "caf\\xe9": [3, 4]},
        quarantined=UNREADABLE,
    ),
    Case("a damaged picture", classes("") | {"cat/x.png": b"\x89PNG"}, both=TWO, quarantined=UNREADABLE),
    Case(
        "links in a tar",
        {"a.tar": tar_with_links()},
        both={"cat": [1, 1], "dog": [1, 1, 3]},
        quarantined={"link to a file that is not in the archive": 2},
    ),
    Case("two members of one name in a zip", {"a.zip": zip_with_two_of_a_name()}, both={"cat": [1, 2, 3]}),
    Case("joined tars", {"a.tar": TWO_TARS}, both=TWO),
    Case("joined tars with padding", {"a.tar": TWO_TARS + bytes(100_352)}, both=TWO),
    Case(
        "something else after a tar",
        {"a.tar": tar(OK) + b"x" * 512},
        refused=r"a\.tar: damaged or incomplete \(the data after its end",
    ),
    Case("a truncated tar", {"a.tar": tar(OK)[:2000]}, refused=r"a\.tar: damaged or incomplete"),
    Case(
        "a compressed tar with the wrong name",
        {"a.tar": tar_of(tree(OK), "w:gz")},
        refused=r"a\.tar: compressed by gzip; unpack it",
    ),
    Case("a tar that is a zip", {"a.tar": zip_of(OK)}, refused=r"a\.tar: damaged"),
    Case("a zip that is a tar", {"a.zip": tar(OK)}, refused=r"a\.zip: damaged"),
    Case("an empty tar", {"a.tar": tar({})}, refused="no images under"),
    Case("a zip without pictures", {"a.zip": zip_of({"x.txt": b"x"})}, refused="no images under"),
    Case(
        "a zip packed by Deflate64",
        {"a.zip": patched_zip(OK, METHOD, 9)},
        refused=r"a\.zip: cat/1\.png is packed by Deflate64",
    ),
    Case(
        "a zip packed by an unknown method",
        {"a.zip": patched_zip(OK, METHOD, 77)},
        refused="packed by method 77",
    ),
    Case(
        "an encrypted zip", {"a.zip": patched_zip(OK, FLAGS, 1)}, refused=r"cat/1\.png is encrypted; unpack"
    ),
    Case(
        "a damaged member of a zip",
        {"a.zip": damaged_crc()},
        both={"cat": [1], "dog": [3, 4]},
        quarantined=UNREADABLE,
    ),
    Case(
        "npz in a zip packed by Deflate64", npz_folder(METHOD, 9), source=NPZ, refused="packed by Deflate64"
    ),
    Case("npz in an encrypted zip", npz_folder(FLAGS, 1), source=NPZ, refused=r"val_data\.npz is encrypted"),
    Case(
        "the older set in a zip packed by Deflate64",
        {"train_32x32.zip": patched_zip({"train_32x32/1.png": 1}, METHOD, 9)},
        source=PNGS,
        refused="packed by Deflate64",
    ),
    Case(
        "a validation tar without pictures",
        lambda folder: ilsvrc(folder, tar({"a.txt": b"x"})),
        source=TARS,
        refused=r"no images in .*ILSVRC2012_img_val\.tar",
    ),
    Case(
        "parquet that is none",
        {"train-0.parquet": b"PAR1" + bytes(64)},
        source={"format": "parquet"},
        refused=r"train-0\.parquet: damaged or incomplete",
    ),
    Case(
        "a missing image in parquet",
        {"a.parquet": parquet([], [0, 0, 0, 0], column=[picture(1), None, picture(2), picture(3)])},
        source={"format": "parquet"},
        both={0: [1, 2, 3]},
        quarantined={"no image": 1},
    ),
    Case(
        "WebDataset with two files of one name",
        {"a.tar": tar({"1.png": 1}) + tar({"1.png": 2, "1.cls": b"0"})},
        source={"format": "webdataset"},
        refused="duplicate file name in tar file",
    ),
    Case(
        "splits in a tar whose pictures are links",
        {"a.tar": tar(classes("train/") | classes("val/", 11))},
        train=numbered(1),
        val=numbered(11),
    ),
    Case(
        "no usable validation images",
        {f"train/{n}.png": n for n in range(4)} | {"val/1.png": b"x", "val/2.png": b"x"},
        data={"max_quarantined": 0.9},
        refused=r"none of the val images can be used; first val/[12]\.png: unreadable",
    ),
    Case(
        "an archive of another split beside folders",
        classes("train/") | {"val.zip": zip_of(classes("", 11))},
        refused=r"val\.zip is not read next to folders of images; unpack it",
    ),
    Case(
        "a packed test set beside folders",
        classes("train/") | {"test.tar.gz": b"x"},
        refused=r"test\.tar\.gz is not read next to folders of images",
    ),
    Case(
        "the archive that was unpacked here",
        classes("train/") | classes("val/", 11) | {"train.zip": b"x", "pets.tar.gz": b"x"},
        train=numbered(1),
        val=numbered(11),
        says=r"not read: 1 \.gz, 1 \.zip",
    ),
]
