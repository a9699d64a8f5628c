"""Zips, tars, parquet files and WebDataset tars: splits, classes and counts."""

import json

from tests.support.layout_cases import TWO, classes, numbered
from tests.support.source_cases import Case, parquet, tar, zip_of

PARQUET = {"format": "parquet"}
WDS = {"format": "webdataset"}
HUB = {"cat": [1, 2, 3], "dog": [4, 5]}
EDM = {"00000/img1.png": 1, "00000/img2.png": 2, "00000/img3.png": 3}
EDM_JSON = json.dumps({"labels": dict.fromkeys(EDM, 7)}).encode()


def hub(first: int = 1, labels=(0, 0, 0, 1, 1), names=("cat", "dog")) -> bytes:
    return parquet(list(range(first, first + 5)), list(labels), list(names) if names else None)


def hub_numbers(first: int) -> dict[str, list[int]]:
    return {"cat": [first, first + 1, first + 2], "dog": [first + 3, first + 4]}


def hub_case(name: str, train: str, val: str, **options) -> Case:
    files = {train: hub(), val: hub(11)}
    return Case(name, files, train=HUB, val=hub_numbers(11), source=PARQUET, **options)


def samples(first: int, field: str = "cls", values=("0", "1", "0")) -> dict[str, int | bytes]:
    """Members of a WebDataset tar."""
    members: dict[str, int | bytes] = {}
    for number, value in enumerate(values, first):
        members[f"{number:06d}.png"] = number
        members[f"{number:06d}.{field}"] = str(value).encode()
    return members


def json_values(*labels) -> list[str]:
    return [json.dumps({"label": label, "id": 5}) for label in labels]


CASES = [
    Case("a zip", {"pets.zip": zip_of(classes(""))}, both=TWO, url="pets.zip"),
    Case(
        "a zip with one folder of its name", {"pets.zip": zip_of(classes("pets/"))}, both=TWO, url="pets.zip"
    ),
    Case(
        "a zip with splits",
        {"pets.zip": zip_of(classes("Train/") | classes("val/", 11))},
        train=numbered(1),
        val=numbered(11),
        url="pets.zip",
    ),
    Case("a folder with one zip", {"pets.zip": zip_of(classes("pets/"))}, both=TWO),
    Case(
        "a zip for each split",
        {"train.zip": zip_of(classes("")), "test.zip": zip_of(classes("", 11))},
        train=numbered(1),
        val=numbered(11),
    ),
    Case(
        "a zip for each split, with folders",
        {"train.zip": zip_of(classes("train/")), "val.zip": zip_of(classes("val/", 11))},
        train=numbered(1),
        val=numbered(11),
    ),
    Case(
        "a tar for each split",
        {"train.tar": tar(classes("")), "validation.tar": tar(classes("", 11))},
        train=numbered(1),
        val=numbered(11),
    ),
    Case(
        "a tar for each class",
        {"cat.tar": tar({"1.png": 1, "2.png": 2}), "dog.tar": tar({"3.png": 3, "4.png": 4})},
        both=TWO,
    ),
    Case(
        "a zip with one folder of another name",
        {"archive.zip": zip_of(classes("flower photos/x/"))},
        both=TWO,
    ),
    Case(
        "a folder of tars in parts",
        {"parts/a.tar": tar(classes("")), "parts/b.tar": tar(classes("", 11))},
        both={"cat": [1, 2, 11, 12], "dog": [3, 4, 13, 14]},
    ),
    Case(
        "a zip of loose images",
        {"a.zip": zip_of({f"{n}.png": n for n in range(4)})},
        both={None: [0, 1, 2, 3]},
    ),
    Case(
        "a zip with the separators of Windows",
        {"a.zip": zip_of({f"a\\{c}\\{n}.png": n for n, c in enumerate("xyx")})},
        both={"x": [0, 2], "y": [1]},
    ),
    Case(
        "an absolute path in a tar",
        {"a.tar": tar({f"/{c}/{n}.png": n for n, c in enumerate("xyx")})},
        both={"x": [0, 2], "y": [1]},
    ),
    Case("a compressed tar", {"a.tar.gz": b"x"}, refused=r"no images under .* \(but 1 \.gz\)"),
    Case(
        "an empty parquet file",
        {"train-0.parquet": hub(), "train-1.parquet": parquet([], []), "val-0.parquet": hub(11)},
        train=HUB,
        val=hub_numbers(11),
        source=PARQUET,
    ),
    Case(
        "a set in parts",
        {"part1.zip": zip_of(classes("")), "part2.zip": zip_of(classes("", 11))},
        both={"cat": [1, 2, 11, 12], "dog": [3, 4, 13, 14]},
    ),
    Case(
        "a tar by detection",
        {"pets.tar": tar(classes("./"))},
        both=TWO,
        url="pets.tar",
        source={"format": "auto"},
    ),
    Case(
        "a zip of EDM",
        {"cifar.zip": zip_of(EDM | {"dataset.json": EDM_JSON})},
        both={7: [1, 2, 3]},
        url="cifar.zip",
    ),
    Case(
        "macOS in a zip",
        {"pets.zip": zip_of(classes("pets/") | {"__MACOSX/pets/cat/._1.png": b"x"})},
        both=TWO,
        url="pets.zip",
    ),
    hub_case(
        "parquet by file name", "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"
    ),
    hub_case("parquet by folder", "train/0000.parquet", "validation/0000.parquet"),
    hub_case(
        "parquet by folder of a configuration", "default/train/0000.parquet", "default/test/0000.parquet"
    ),
    hub_case(
        "parquet by folder, partial",
        "default/partial-train/0000.parquet",
        "default/partial-validation/0000.parquet",
    ),
    hub_case("parquet in capital letters", "TRAIN/0000.parquet", "Val/0000.parquet"),
    hub_case("parquet by detection", "a/b/training/0.parquet", "a/b/dev/0.parquet"),
    Case(
        "the hub's ImageNet",
        {"train-0.parquet": hub(), "validation-0.parquet": hub(11), "test-0.parquet": hub(21, [-1] * 5)},
        train=HUB,
        val=hub_numbers(11),
        source=PARQUET,
        says=r"test is ignored: test-0\.parquet \(5 rows\)",
    ),
    Case(
        "a labeled test set is not pooled",
        {"train/0.parquet": hub(), "val/0.parquet": hub(11), "test/0.parquet": hub(21)},
        train=HUB,
        val=hub_numbers(11),
        source=PARQUET,
    ),
    Case(
        "an unlabeled test set is no validation",
        {"train/0.parquet": hub(), "test/0.parquet": hub(21, [-1] * 5)},
        both=HUB,
        source=PARQUET,
        says="test is ignored",
    ),
    Case(
        "parquet without splits",
        {"a.parquet": hub(), "b/c.parquet": hub(11)},
        both={"cat": [1, 2, 3, 11, 12, 13], "dog": [4, 5, 14, 15]},
        source=PARQUET,
    ),
    Case(
        "parquet without names",
        {"a.parquet": hub(names=None)},
        both={0: [1, 2, 3], 1: [4, 5]},
        source=PARQUET,
    ),
    Case(
        "parquet without labels",
        {"a.parquet": parquet([1, 2, 3, 4, 5])},
        both={None: [1, 2, 3, 4, 5]},
        source=PARQUET | {"label_column": None},
    ),
    Case(
        "a checkpoint of Jupyter beside parquet",
        {
            "train/0.parquet": hub(),
            "val/0.parquet": hub(11),
            "train/.ipynb_checkpoints/0-checkpoint.parquet": hub(21),
        },
        train=HUB,
        val=hub_numbers(11),
        source=PARQUET,
    ),
    Case(
        "parquet of which one file lacks a column",
        {"train/0.parquet": hub(), "train/1.parquet": parquet([1])},
        source=PARQUET,
        refused=r"label_column: no column label in train/1\.parquet",
    ),
    Case("no parquet files", {"a.csv": b"x"}, source=PARQUET, refused="no .parquet files under"),
    Case(
        "webdataset with cls",
        {"set-000000.tar": tar(samples(1)), "set-000001.tar": tar(samples(4))},
        both={0: [1, 3, 4, 6], 1: [2, 5]},
        source=WDS,
    ),
    Case(
        "webdataset by braces",
        {f"set-{n:06d}.tar": tar(samples(1 + 3 * n)) for n in range(3)},
        both={0: [1, 3, 4, 6], 1: [2, 5]},
        source=WDS,
        url="set-{000000..000001}.tar",
    ),
    Case(
        "webdataset with splits",
        {"imagenet-train-0.tar": tar(samples(1)), "imagenet-validation-0.tar": tar(samples(11))},
        train={0: [1, 3], 1: [2]},
        val={0: [11, 13], 1: [12]},
        source={"format": "auto"},
    ),
    Case(
        "webdataset with splits by folders",
        {"train/0.tar": tar(samples(1)), "val/0.tar": tar(samples(11)), "test/0.tar": tar(samples(21))},
        train={0: [1, 3], 1: [2]},
        val={0: [11, 13], 1: [12]},
        source=WDS,
        says="test is ignored",
    ),
    Case(
        "webdataset with json",
        {"a.tar": tar(samples(1, "json", json_values(1, 0, 2)))},
        both={0: [2], 1: [1], 2: [3]},
        source=WDS,
    ),
    Case(
        "webdataset with names in json",
        {"a.tar": tar(samples(1, "json", json_values("dog", "cat", "dog")))},
        both={"cat": [2], "dog": [1, 3]},
        source=WDS,
    ),
    Case(
        "webdataset with classes in txt",
        {"a.tar": tar(samples(1, "txt", ("dog", "cat", "dog", "cat\n")))},
        both={"cat": [2, 4], "dog": [1, 3]},
        source=WDS,
    ),
    Case(
        "webdataset with captions",
        {"a.tar": tar(samples(1, "txt", ("a dog", "two cats", "a cat", "my dog")))},
        both={None: [1, 2, 3, 4]},
        source=WDS,
        says="captions, not classes",
    ),
    Case(
        "webdataset without labels",
        {"a.tar": tar({f"{n}.jpg": n for n in (1, 2, 3)})},
        both={None: [1, 2, 3]},
        source=WDS,
    ),
    Case(
        "webdataset with a label missing",
        {"a.tar": tar(samples(1) | {"x.png": 9})},
        source=WDS,
        refused="1 of 4 samples have no label",
    ),
    Case(
        "webdataset with masks beside the images",
        {
            "a.tar": tar(
                {
                    f"{n}.{f}": n if f == "png" else b"1" if f == "cls" else 99
                    for n in (1, 2, 3)
                    for f in ("png", "seg.png", "cls")
                }
            )
        },
        both={1: [1, 2, 3]},
        source=WDS,
    ),
    Case(
        "webdataset without images",
        {"a.tar": tar({"1.npy": b"x", "1.cls": b"0"})},
        source=WDS,
        refused="no samples with an image",
    ),
    Case(
        "webdataset that is not there",
        {"a.tar": tar(samples(1))},
        source=WDS,
        url="b-{0..1}.tar",
        refused="does not exist",
    ),
]
