"""Tables of small inputs: the right images in the right split and class, or one line of what is wrong."""

import re

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from tests.support import container_cases, damage_cases, layout_cases, pixel_cases, variant_cases
from tests.support.photographs import write_tree
from tests.support.source_cases import SIZE, numbers_by_class, read_split

TABLES = (layout_cases, container_cases, damage_cases, variant_cases)
CASES = {case.name: case for table in TABLES for case in table.CASES}
PIXEL_CASES = {case.name: case for case in pixel_cases.CASES}


def test_the_tables_are_long_and_no_name_is_used_twice():
    assert len(CASES) == sum(len(table.CASES) for table in TABLES)
    assert len(PIXEL_CASES) == len(pixel_cases.CASES)
    assert len(CASES) + len(PIXEL_CASES) >= 80


@pytest.fixture(autouse=True)
def copies_in_the_test_folder(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.mark.parametrize("name", CASES)
def test_an_input_is_read_as_its_owner_means_it_or_refused_in_one_line(tmp_path, name):
    case = CASES[name]
    config = case.config(tmp_path)
    if case.refused:
        with pytest.raises(UserError, match=case.refused) as refusal:
            write_dataset(config)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "sets/set/manifest.json").exists()
        return
    manifest = write_dataset(config)
    folder = tmp_path / "sets/set"
    train, val = numbers_by_class(folder, "train"), numbers_by_class(folder, "val")
    if case.both is not None:
        together = {key: sorted(train.get(key, []) + val.get(key, [])) for key in {*train, *val}}
        assert together == case.both
        assert case.quarantined or sum(map(len, val.values())) == config.validation_images
    else:
        assert (train, val) == (case.train, case.val)
    assert manifest.interpretation is not None
    if case.classes is not None:
        assert list(manifest.class_names or ()) == case.classes
    if case.says:
        assert re.search(case.says, "\n".join(manifest.interpretation.lines()))
    assert manifest.quarantine.reasons == case.quarantined
    assert manifest == load_manifest(config.root, config.name)
    assert not any((tmp_path / "tmp").rglob("content")), "temporary copies are removed"


@pytest.mark.parametrize("name", PIXEL_CASES)
def test_pixels_are_what_the_owner_sees(tmp_path, name):
    case = PIXEL_CASES[name]
    root = write_tree(tmp_path / "source", {f"{n}.{case.ending}": case.content for n in range(3)})
    if case.ending == "parquet":
        for number in (1, 2):
            (root / f"{number}.parquet").unlink()
    source = {"format": "folder", "url": str(root), "image_size": SIZE, "resize": "exact"} | case.source
    config = DataSection(
        root=str(tmp_path / "sets"),
        name="set",
        source=SourceSection.model_validate(source),
        validation_images=1,
    )
    if case.refused or case.rejected:
        expected = case.refused or rf"max_quarantined: \d of 3 .*: {case.rejected}"
        with pytest.raises(UserError, match=expected) as refusal:
            write_dataset(config)
        assert "\n" not in str(refusal.value)
        return
    write_dataset(config)
    for split, count in (("train", 2), ("val", 1)):
        images, _ = read_split(tmp_path / "sets/set", split)
        assert images.shape == (count, 3, SIZE, SIZE)
        tolerance = 2 if case.ending in ("jpg", "avif") else 0
        for image in images.astype(int):
            if case.left is not None:
                assert abs(image[:, :, :3] - np.reshape(case.left, (3, 1, 1))).max() <= tolerance
                continue
            assert abs(image[:, :4] - np.reshape(case.upper, (3, 1, 1))).max() <= tolerance
            assert abs(image[:, 4:] - np.reshape(case.lower, (3, 1, 1))).max() <= tolerance
