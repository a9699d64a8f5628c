"""Variants beside what is trained on: masks, sides of pairs, other editions of a split."""

import pyarrow

from tests.support.container_cases import HUB, PARQUET, WDS, hub, hub_numbers, samples
from tests.support.layout_cases import classes, numbered
from tests.support.source_cases import Case, parquet, tar, zip_of

AB = {"b": [1, 4], "a": [2, 3]}

CASES = [
    Case(
        "images and their masks",
        {f"{c}/{n}.png": n + k for c, k in (("images", 0), ("masks", 100)) for n in range(4)},
        both={None: [0, 1, 2, 3]},
        says=r"annotations is ignored: masks \(4 images\)",
    ),
    Case(
        "images and masks below splits",
        {f"{s}/{c}/{n}.png": n for s in ("train", "val") for c in ("images", "masks") for n in range(3)},
        train={None: [0, 1, 2]},
        val={None: [0, 1, 2]},
        says="annotations is ignored",
    ),
    Case(
        "splits below images and masks",
        {f"{c}/{s}/{n}.png": n for s in ("train", "val") for c in ("JPEGImages", "gtFine") for n in range(3)},
        train={None: [0, 1, 2]},
        val={None: [0, 1, 2]},
    ),
    Case(
        "masks named after the images beside them",
        {
            f"{c}/{c} ({n}){m}.png": n
            for c in ("cat", "dog")
            for n in range(2)
            for m in ("", "_mask", "_mask_1")
        },
        both={"cat": [0, 1], "dog": [0, 1]},
    ),
    Case(
        "trimaps in a folder of annotations",
        {
            "images/a_1.png": 1,
            "images/a_2.png": 2,
            "annotations/trimaps/a_1.png": 9,
            "annotations/a.xml": b"x",
        },
        both={None: [1, 2]},
        data={"validation_images": 1},
    ),
    Case(
        "people with masks and without",
        {f"{c}/{n}.png": n for c in ("mask", "without_mask") for n in range(3)},
        both={"mask": [0, 1, 2], "without_mask": [0, 1, 2]},
    ),
    *(
        Case(
            f"pairs of {first} and {second}",
            {f"{s}{c}/{n}.png": n for s in ("train/", "val/") for c in (first, second) for n in range(3)},
            refused=f"({first} and {second}|{second} and {first}) hold images of the same names",
        )
        for first, second in (("HR", "LR"), ("input", "target"), ("blurred", "sharp"), ("noisy", "clean"))
    ),
    *(
        Case(
            f"train beside train_{name}",
            classes("train/")
            | classes(f"train_{name}/", 11)
            | classes("val/", 21)
            | classes(f"val_{name}/", 31),
            train=numbered(1),
            val=numbered(21),
            says=f"ignored: .*train_{name}",
        )
        for name in ("blurred", "cleaned", "small", "raw", "32x32", "old")
    ),
    *(
        Case(
            f"{first} beside {second}",
            classes(f"{first}/") | classes(f"{second}/", 11),
            refused=f"{first} and {second} are both train images; leave one",
        )
        for first, second in (("train", "train_clean"), ("trainA", "trainB"), ("train_hr", "train_lr"))
    ),
    Case(
        "training images of two years",
        classes("train2014/") | classes("train2017/", 11) | classes("val2017/", 21),
        refused="train2014 and train2017 are both train images",
    ),
    *(
        Case(
            f"training images in the parts {first} and {second}",
            classes(f"{first}/") | classes(f"{second}/", 11) | classes("val/", 21),
            train={"cat": [1, 2, 11, 12], "dog": [3, 4, 13, 14]},
            val=numbered(21),
        )
        for first, second in (("train", "train2"), ("train_1", "train_2"), ("Train-001", "Train-002"))
    ),
    *(
        Case(
            f"parquet of a variant: {other}",
            {"data/train-0.parquet": hub(), other: hub(11), "data/test-0.parquet": hub(21)},
            train=HUB,
            val=hub_numbers(21),
            source=PARQUET,
            says=rf"ignored: {other} \(5 rows\)",
        )
        for other in ("data/train_clean-0.parquet", "data/train-small-0.parquet")
    ),
    Case(
        "parquet of two configurations",
        {f"{c}/{s}/0000.parquet": hub() for c in ("160px", "full_size") for s in ("train", "test")},
        source=PARQUET,
        refused="160px and full_size under .* both hold (train|test) files; add one of these folders",
    ),
    Case(
        "parquet in files with hashes",
        {
            "data/train-00000-of-00002-0a1b2c3d4e5f6071.parquet": hub(),
            "data/train-00001-of-00002-deadbeefcafeabcd.parquet": hub(11),
            "data/validation-00000-of-00001-1f2e3d4c5b6a7988.parquet": hub(21),
        },
        train={"cat": [1, 2, 3, 11, 12, 13], "dog": [4, 5, 14, 15]},
        val=hub_numbers(21),
        source=PARQUET,
    ),
    Case(
        "parquet in files of Spark",
        {
            f"{s}/part-00000-1d2c3b4a-aaaa-{n}-c000.snappy.parquet": hub(n)
            for s, n in (("train", 1), ("val", 11))
        },
        train=HUB,
        val=hub_numbers(11),
        source=PARQUET,
    ),
    Case(
        "parquet with a file for each class in a folder for each split",
        {"train/a.parquet": hub(), "train/b.parquet": hub(11), "val/a.parquet": hub(21)},
        train={"cat": [1, 2, 3, 11, 12, 13], "dog": [4, 5, 14, 15]},
        val=hub_numbers(21),
        source=PARQUET,
    ),
    Case(
        "webdataset of two sets",
        {"coco-train-0.tar": tar(samples(1)), "laion-train-0.tar": tar(samples(11))},
        source=WDS,
        refused="coco-train-0.tar and laion-train-0.tar are both train files; keep only one",
    ),
    Case(
        "a zip of a variant",
        {
            "train.zip": zip_of(classes("")),
            "train_raw.zip": zip_of(classes("", 11)),
            "val.zip": zip_of(classes("", 21)),
        },
        train=numbered(1),
        val=numbered(21),
        says=r"ignored: train_raw\.zip",
    ),
    *(
        Case(
            f"parquet with {name}",
            {
                "train-0.parquet": parquet([1, 2, 3, 4], labels, names),
                "val-0.parquet": parquet([5], labels[:1], names),
            },
            train=train,
            val={next(iter(train)): [5]},
            classes=classes,
            source=PARQUET,
        )
        for name, labels, names, train, classes in (
            ("names", ["dog", "cat", "cat", "dog"], None, {"dog": [1, 4], "cat": [2, 3]}, ["cat", "dog"]),
            (
                "numbers as names",
                ["10", "9", "2", "9"],
                None,
                {"10": [1], "9": [2, 4], "2": [3]},
                ["2", "9", "10"],
            ),
            ("names of the hub", ["b", "a", "a", "b"], ["b", "a"], {"b": [1, 4], "a": [2, 3]}, ["b", "a"]),
            ("long texts", pyarrow.array(["b", "a", "a", "b"], pyarrow.large_string()), None, AB, ["a", "b"]),
            ("a dictionary", pyarrow.array(["b", "a", "a", "b"]).dictionary_encode(), None, AB, ["a", "b"]),
            ("one class", ["a"] * 4, None, {"a": [1, 2, 3, 4]}, ["a"]),
        )
    ),
    Case(
        "parquet with a name missing",
        {"a.parquet": parquet([1, 2, 3], ["a", None, "b"])},
        source=PARQUET,
        refused=r"a\.parquet: label is missing in 1 of 3 rows",
    ),
    Case(
        "parquet with names and a test set without",
        {
            "train.parquet": parquet([1, 2, 3], ["a", "a", "b"]),
            "test.parquet": parquet([4], pyarrow.array([""])),
        },
        both={"a": [1, 2], "b": [3]},
        source=PARQUET,
        says="test is ignored",
    ),
    Case(
        "parquet with names and numbers",
        {"a.parquet": parquet([1, 2], ["a", "b"]), "b.parquet": parquet([3, 4], [0, 1])},
        source=PARQUET,
        refused=r"label is text in a\.parquet and numbers in b\.parquet",
    ),
    Case(
        "parquet with other names in another file",
        {"a.parquet": parquet([1, 2], [0, 1], ["x", "y"]), "b.parquet": parquet([3, 4], [0, 1], ["y", "x"])},
        source=PARQUET,
        refused=r"label has other class names in a\.parquet than in b\.parquet",
    ),
    Case(
        "parquet with captions",
        {"a.parquet": parquet(list(range(20)), [f"photo {n}" for n in range(20)])},
        source=PARQUET,
        refused="label has 20 different texts in 20 rows, which are no classes",
    ),
    Case(
        "names in two forms of Unicode",
        {"caf\u00e9/1.png": 1, "cafe\u0301/2.png": 2, "x/3.png": 3, "x/4.png": 4},
        both={"caf\u00e9": [1, 2], "x": [3, 4]},
    ),
    Case(
        "numbers below zero",
        {f"{n}/1.png": n + 3 for n in (-2, -1, 0, 1, 2, 10)},
        both={str(n): [n + 3] for n in (-2, -1, 0, 1, 2, 10)},
        classes=["-2", "-1", "0", "1", "2", "10"],
    ),
    Case(
        "thumbnails of viewers",
        classes("") | {"cat/thumbnails/1.png": 9, "_thumbs/1.png": 9},
        both={"cat": [1, 2], "dog": [3, 4]},
    ),
    Case(
        "a table of labels that is not read",
        {f"train/{n}.png": n for n in range(4)} | {"train/metadata.jsonl": b"{}"},
        both={None: [0, 1, 2, 3]},
        says=r"note: no classes: train/metadata\.jsonl is not read",
    ),
    Case(
        "variants of a set with classes",
        {f"{f}/{c}/{n}.png": n for f in ("color", "gray", "segmented") for c in "ab" for n in range(2)},
        refused="color and gray and segmented hold images of the same names",
    ),
    Case(
        "two names of test beside validation",
        classes("train/") | classes("val/", 11) | classes("test/", 21) | classes("eval/", 31),
        train=numbered(1),
        val=numbered(11),
        says="test is ignored: eval .*, test ",
    ),
    Case(
        "two names of validation",
        classes("train/") | classes("val/", 11) | classes("dev/", 21),
        refused="dev and val are both val images; leave one",
    ),
    Case(
        "training images under two names beside test",
        classes("train-a/") | classes("train-b/", 11) | classes("test/", 21),
        refused="train-a and test look like training and test images",
    ),
    Case(
        "webdataset with a folder for each split in one tar",
        {
            "a.tar": tar(
                {f"{s}/{n}": v for s, k in (("train", 1), ("val", 11)) for n, v in samples(k).items()}
            )
        },
        train={0: [1, 3], 1: [2]},
        val={0: [11, 13], 1: [12]},
        source=WDS,
    ),
]
