"""Random trees of splits, classes, depths and hidden entries: the images that are read are those that were
written."""

import shutil
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fm_core.data.dataset_builder import write_dataset
from fm_core.data.shard_plan import make_plan
from fm_core.data.sources.annotation_images import ANNOTATION_WORDS, PAIRED_WORDS
from fm_core.data.sources.split_words import (
    FILLERS,
    SPLIT_WORDS,
    humps_of,
    split_of_data_file,
    split_of_folder,
)
from fm_core.data.sources.splits import place_images
from fm_core.errors import UserError
from tests.support.photographs import write_tree
from tests.support.source_cases import Case, numbers_by_class, tree, zip_of

WORDS = [(kind, word) for kind, words in SPLIT_WORDS.items() for word in words]
NAMES = st.text(string.ascii_letters + string.digits + "é _", min_size=1, max_size=8).filter(
    lambda name: (
        name == name.strip()
        and split_of_folder(name) is None
        and not set(name.lower().split("_")) & FILLERS
        and not set(humps_of(name)) & (ANNOTATION_WORDS | PAIRED_WORDS | FILLERS)
        and not any(
            character.isalpha() and name.lower().strip("0123456789_ ") in FILLERS for character in name
        )
    )
)
HIDDEN = st.sampled_from([".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails"])


def cased(word: str) -> st.SearchStrategy[str]:
    return st.sampled_from([word, word.upper(), word.capitalize()])


@st.composite
def layouts(draw):
    """Files with the numbers of their pictures, and by split and class the numbers that have to come out."""
    classes = draw(st.lists(NAMES, min_size=2, max_size=4, unique_by=str.lower))
    splits = {"train": draw(st.sampled_from(SPLIT_WORDS["train"]).flatmap(cased))}
    for kind in draw(st.sampled_from([(), ("val",), ("test",), ("val", "test")])):
        splits[kind] = draw(st.sampled_from(SPLIT_WORDS[kind]).flatmap(cased))
    above = "".join(f"{name}/" for name in draw(st.lists(NAMES, max_size=2)))
    files: dict[str, int] = {}
    expected: dict[str, dict[str, list[int]]] = {kind: {} for kind in splits}
    for kind, folder in splits.items():
        for name in classes:
            for number in range(draw(st.integers(1, 3))):
                below = "".join(f"{part}/" for part in draw(st.lists(NAMES, max_size=2)))
                files[f"{above}{folder}/{name}/{below}{number}.png"] = number = len(files)
                expected[kind].setdefault(name, []).append(number)
        if draw(st.booleans()):
            hidden = draw(HIDDEN)
            files[f"{above}{folder}/{draw(st.sampled_from(classes))}/{hidden}/copy.png"] = 999
    return files, expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts(), st.sampled_from(["folder", "zip"]))
def test_the_classes_and_counts_that_come_out_are_those_that_went_in(tmp_path, layout, container):
    files, expected = layout
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    contents = {"set.zip": zip_of(files)} if container == "zip" else files
    case = Case(
        "random", contents, url="set.zip" if container == "zip" else "", data={"validation_images": 1}
    )
    write_dataset(case.config(tmp_path / "case"))
    folder = tmp_path / "case/sets/set"
    train, val = numbers_by_class(folder, "train"), numbers_by_class(folder, "val")
    held_out = "val" if "val" in expected else "test" if "test" in expected else None
    if held_out:
        assert (train, val) == (expected["train"], expected[held_out])
    else:
        together = {name: sorted(train.get(name, []) + val.get(name, [])) for name in {*train, *val}}
        assert together == expected["train"]


@pytest.mark.parametrize(("kind", "word"), WORDS)
@pytest.mark.parametrize(
    "form", ["{}", "{}-00000-of-00002.parquet", "my_{}_0.parquet", "default/{}/0000.parquet"]
)
def test_every_split_word_names_its_split_in_any_case(kind, word, form):
    for name in (word, word.upper(), word.capitalize()):
        assert split_of_data_file(form.format(name)) == kind
        assert split_of_folder(name) == kind
        assert split_of_folder(f"{name}set") == kind


@pytest.mark.parametrize(
    "name", ["trains", "retrain", "contest", "device", "value", "test_tube", "valley", "images"]
)
def test_a_word_that_contains_a_split_word_names_none(name):
    assert split_of_folder(name) is None


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["pets-train/1.png", "pets-test/2.png"], "pets-train and pets-test"),
        (["pets-train.tar/1.png", "pets-val.tar/2.png"], "pets-train.tar and pets-val.tar"),
        (["train_v2/cat/1.png", "test_v2/cat/2.png"], "train_v2 and test_v2"),
        (["trainA/1.png", "trainB/2.png", "testA/3.png", "testB/4.png"], "trainA and testA"),
        (["train/1.png", "pets-test/2.png"], "train and pets-test"),
        (["img_train_0.png", "img_test_0.png"], "img_train_0 and img_test_0"),
        (["cat/train_1.png", "cat/test_1.png", "dog/1.png"], "cat/train_1 and cat/test_1"),
        (
            ["cat/train/1.png", "cat/test/1.png", "cat/extra/1.png", "dog/train/1.png"],
            "cat/train and cat/test",
        ),
        (["data/train/1.png", "data/test/1.png", "docs/logo.png"], "data/train and data/test"),
        (["train/train/1.png", "train/test/1.png", "val/1.png"], "train/train and train/test"),
    ],
)
def test_names_of_splits_that_would_be_pooled_are_refused(files, named):
    with pytest.raises(UserError, match=f"data.source.url: {named} look like training and test images"):
        place_images(files)


@pytest.mark.parametrize(
    "files",
    [
        ["train_station/1.png", "test tube/2.png"],
        ["train/1.png", "car/2.png", "test tube/3.png"],
        ["train station.png", "test tube.png", "a test of a train.png"],
        ["cat/1.png", "test/2.png"],
    ],
)
def test_names_of_classes_that_hold_a_split_word_are_not(files):
    assert {place.split for place in place_images(files)} <= {None, "test"}


def test_a_holdout_is_not_trained_on():
    assert [place.split for place in place_images(["train/1.png", "holdout/2.png"])] == ["train", "test"]


def test_images_of_a_folder_share_their_place():
    places = place_images([f"train/cat/{number}.png" for number in range(9)])
    assert len({id(place) for place in places}) == 1


def test_the_number_of_validation_images_has_no_effect_on_a_source_with_its_own(tmp_path: Path):
    files = {f"{split}/cat/{number}.png": number for split in ("train", "val") for number in range(3)}
    config = Case("own split", files).config(tmp_path)
    first = write_dataset(config)
    other = config.model_copy(update={"validation_images": 1})
    assert write_dataset(other).version == first.version
    assert first.recipe["validation_images"] is None


def test_the_number_of_validation_images_is_part_of_a_random_split(tmp_path: Path):
    root = write_tree(tmp_path / "source", tree({f"{number}.png": number for number in range(6)}))
    case = Case("no split", {})
    config = case.config(tmp_path / "case")
    source = config.source.model_copy(update={"url": str(root)})
    assert make_plan(config.model_copy(update={"source": source})).recipe["validation_images"] == 2
