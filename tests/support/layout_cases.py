"""Folders: which images are training and validation images, and of which class."""

import json

from tests.support.source_cases import Case

TWO = {"cat": [1, 2], "dog": [3, 4]}


def classes(prefix: str, first: int = 1, deeper: str = "") -> dict[str, int]:
    """Two pictures of a cat and two of a dog below a folder."""
    return {
        f"{prefix}{name}/{deeper}{number}.png": number
        for name, numbers in (("cat", (first, first + 1)), ("dog", (first + 2, first + 3)))
        for number in numbers
    }


def numbered(first: int) -> dict[str, list[int]]:
    return {"cat": [first, first + 1], "dog": [first + 2, first + 3]}


def split_case(name: str, train: str, val: str, **options) -> Case:
    return Case(
        name,
        classes(f"{train}/") | classes(f"{val}/", 11),
        train=numbered(1),
        val=numbered(11),
        **options,
    )


ANNOTATIONS = "".join(
    f"val_{n}.JPEG\t{name}\t0\t0\t7\t7\n" for n, name in ((11, "n02"), (12, "n01"))
).encode()
TINY = {f"train/n0{c}/images/n0{c}_{n}.JPEG": n for c, n in ((1, 1), (1, 2), (2, 3), (2, 4))}
TINY_VAL = {"val/images/val_11.JPEG": 11, "val/images/val_12.JPEG": 12}
EDM = {"00000/img00000000.png": 1, "00000/img00000001.png": 2, "00001/img00001000.png": 3}
EDM_JSON = json.dumps({"labels": [[name, 4 - number] for name, number in EDM.items()]}).encode()

CASES = [
    Case("classes without splits", classes(""), both=TWO, classes=["cat", "dog"]),
    Case("loose images have no labels", {f"{n}.png": n for n in range(1, 6)}, both={None: [1, 2, 3, 4, 5]}),
    split_case("train and val", "train", "val"),
    split_case("training and validation", "training", "validation"),
    split_case("capital letters", "TRAIN", "Val"),
    split_case("valid", "Train", "valid"),
    split_case("dev", "train", "dev"),
    split_case("test serves as validation", "train", "test", says=r"val from test \(4 images\)"),
    split_case("testing", "training", "testing"),
    split_case("eval", "train", "eval"),
    split_case("training_set and test_set", "training_set", "test_set"),
    split_case("trainset and testset", "trainset", "testset"),
    split_case("years in the names", "train2017", "val2017"),
    split_case("sizes in the names", "train_64x64", "valid_64x64"),
    split_case("below one folder", "pets/train", "pets/val"),
    split_case("below two folders", "a/pets/train", "a/pets/val"),
    split_case("named twice", "training_set/training_set", "test_set/test_set"),
    split_case("folders of images in the splits", "train/images", "val/images"),
    Case(
        "validation is preferred to test",
        classes("train/") | classes("val/", 11) | classes("test/", 21),
        train=numbered(1),
        val=numbered(11),
        says=r"test is ignored: test \(4 images\)",
    ),
    Case(
        "unlabeled test is ignored",
        classes("train/", 1) | {"test/5.png": 5, "test/6.png": 6},
        both=TWO,
        says="test is ignored",
    ),
    Case(
        "test beside class folders is not trained on",
        classes("") | {"test/5.png": 5, "test/6.png": 6},
        both=TWO,
        says="test is ignored",
    ),
    Case(
        "a class of trains",
        {f"{c}/{n}.png": n for n, c in enumerate(["train", "car", "bus", "car"], 1)},
        both={"train": [1], "car": [2, 4], "bus": [3]},
    ),
    Case(
        "a class beside words of splits",
        {f"{c}/{n}.png": n for n, c in enumerate(["test tube", "train_station"] * 2, 1)},
        both={"test tube": [1, 3], "train_station": [2, 4]},
    ),
    Case("one folder that holds the classes", classes("pets/"), both=TWO),
    Case("one class", {f"cats/{n}.png": n for n in range(4)}, both={"cats": [0, 1, 2, 3]}),
    Case(
        "one class below the split, with folders",
        {f"{s}/cat/{n}/1.png": n for n, s in enumerate(["train"] * 3 + ["val"])},
        train={"cat": [0, 1, 2]},
        val={"cat": [3]},
    ),
    Case(
        "a class folder without images",
        classes("train/") | classes("val/", 11) | {"train/fox/a.txt": b"x"},
        train=numbered(1),
        val=numbered(11),
        says="no images in class folder fox",
    ),
    Case(
        "ImageNet's folders in capital letters",
        {
            f"{s}/n0000000{c}/{n}.png": n
            for n, (s, c) in enumerate([("Train", 1), ("Train", 2), ("Val", 1), ("Val", 2)])
        },
        source={"format": "auto"},
        train={"n00000001": [0], "n00000002": [1]},
        val={"n00000001": [2], "n00000002": [3]},
    ),
    Case("train alone", classes("train/"), both=TWO),
    Case(
        "splits within the classes",
        {
            f"{c}/{s}/{n}.png": n
            for n, (c, s) in enumerate(
                [("cat", "train"), ("dog", "train"), ("cat", "val"), ("dog", "val")], 1
            )
        },
        train={"cat": [1], "dog": [2]},
        val={"cat": [3], "dog": [4]},
    ),
    Case(
        "several roots",
        classes("a/train/") | classes("b/train/", 11) | classes("a/val/", 21),
        train={"cat": [1, 2, 11, 12], "dog": [3, 4, 13, 14]},
        val=numbered(21),
    ),
    Case(
        "splits by file name",
        {"train_1.png": 1, "train-2.png": 2, "val_3.png": 3, "test.4.png": 4},
        train={None: [1, 2]},
        val={None: [3]},
        says="test is ignored",
    ),
    Case(
        "splits by file name in class folders",
        {"cat/train1.png": 1, "dog/train2.png": 2, "cat/val3.png": 3},
        train={"cat": [1], "dog": [2]},
        val={"cat": [3]},
    ),
    Case(
        "images outside of the splits",
        classes("train/") | classes("val/", 11) | {"cover.png": 99},
        train=numbered(1),
        val=numbered(11),
        says="in no split, ignored",
    ),
    Case("test alone", classes("test/"), refused="holds only test images; name the training images train"),
    Case(
        "tiny-imagenet",
        TINY | TINY_VAL | {"val/val_annotations.txt": ANNOTATIONS},
        train={"n01": [1, 2], "n02": [3, 4]},
        val={"n01": [12], "n02": [11]},
    ),
    Case(
        "tiny-imagenet by detection",
        TINY | TINY_VAL | {"val/val_annotations.txt": ANNOTATIONS, "test/images/t.JPEG": 9},
        train={"n01": [1, 2], "n02": [3, 4]},
        val={"n01": [12], "n02": [11]},
        source={"format": "auto"},
    ),
    Case(
        "tiny-imagenet without its list",
        TINY | TINY_VAL,
        refused="2 validation images are in no class folder",
    ),
    Case(
        "validation of other classes",
        classes("train/") | {"val/fox/5.png": 5},
        refused=r"no training images of any class of the validation images \(fox\)",
    ),
    Case(
        "a class without training images",
        classes("train/") | classes("val/", 11) | {"val/fox/9.png": 9},
        train=numbered(1),
        val=numbered(11) | {"fox": [9]},
        says="no training images of class fox",
    ),
    Case(
        "deeper folders do not matter",
        classes("train/", 1, "2021/may/") | classes("val/", 11, "x/"),
        train=numbered(1),
        val=numbered(11),
    ),
    Case(
        "numbers are classes by value",
        {f"{n}/{n}.png": n for n in range(12)},
        both={str(n): [n] for n in range(12)},
        classes=[str(n) for n in range(12)],
    ),
    Case(
        "numbers with zeros",
        {f"{n:02d}/{n}.png": n for n in range(12)},
        classes=[f"{n:02d}" for n in range(12)],
        both={f"{n:02d}": [n] for n in range(12)},
    ),
    Case(
        "not all names are numbers",
        {f"{n}/1.png": i for i, n in enumerate(["10", "9", "x"])},
        both={"10": [0], "9": [1], "x": [2]},
        classes=["10", "9", "x"],
    ),
    Case(
        "some images in no class folder",
        classes("") | {"5.png": 5},
        refused="1 of 5 images are in no class folder",
    ),
    Case("dataset.json of EDM", EDM | {"dataset.json": EDM_JSON}, both={3: [1], 2: [2], 1: [3]}),
    Case(
        "dataset.json with labels for some",
        EDM | {"9.png": 9, "dataset.json": EDM_JSON},
        refused="dataset.json has no label for 1 of 4",
    ),
    Case(
        "dataset.json without labels",
        EDM | {"dataset.json": b'{"labels": null}'},
        both={"00000": [1, 2], "00001": [3]},
    ),
    Case(
        "dataset.json of another tool",
        classes("") | {"dataset.json": b'["x"]'},
        both=TWO,
        says=r"not read: 1 \.json",
    ),
    Case(
        "damaged dataset.json",
        EDM | {"dataset.json": b'{"labels": [['},
        refused="dataset.json: not valid JSON",
    ),
    Case(
        "labels of dataset.json are no classes",
        EDM | {"dataset.json": EDM_JSON.replace(b"3]", b"0.5]")},
        refused=r"label 0\.5 of 00000/img00000000\.png; classes are integers",
    ),
    Case("Jupyter's checkpoints", classes("") | {"dog/.ipynb_checkpoints/3-checkpoint.png": 3}, both=TWO),
    Case(
        "thumbnails of a NAS",
        classes("") | {"dog/@eaDir/3.png/SYNOPHOTO_THUMB_M.jpg": 3, "@eaDir/1.png": 9},
        both=TWO,
    ),
    Case(
        "AppleDouble files",
        classes("train/")
        | classes("val/", 11)
        | {"__MACOSX/train/cat/._1.png": b"x", "train/cat/._1.png": b"x"},
        train=numbered(1),
        val=numbered(11),
    ),
    Case(
        "other endings",
        {"cat/1.JPG": 1, "cat/2.jfif": 2, "cat/3.pgm.PNG": 3, "dog/4.gif": 4, "dog/5.avif": 5},
        both={"cat": [1, 2, 3], "dog": [4, 5]},
    ),
    Case(
        "what is not read is counted",
        classes("") | {"dog/a.heic": b"x", "cat/b.HEIC": b"x", "cat/c.psd": b"x", "README": b"x"},
        both=TWO,
        says=r"not read: 2 \.heic, 1 \.psd, 1 no ending",
    ),
    Case("no images at all", {"notes.txt": b"x"}, refused="no images under"),
    Case(
        "nothing left to train on",
        {"a/1.png": 1, "a/2.png": 2},
        refused="validation_images: 2 leaves nothing to train on of 2",
    ),
]
