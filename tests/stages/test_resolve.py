"""Keys that a file does not name, where the data set exists, and where its source is gone."""

import json
import shutil

import pytest

from fm_core.config import RunConfig
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.stages import resolve as resolution
from fm_core.stages.resolve import resolve, resolve_data
from tests.support.photographs import write_tree
from tests.support.source_cases import tree

OWN_SPLIT = {f"{split}/{name}/{n}.png": n for split in ("train", "val") for name in "ab" for n in range(3)}
NO_SPLIT = {f"{name}/{n}.png": n for name in "ab" for n in range(30)}


@pytest.fixture
def config_of(tmp_path):
    """A configuration with only URL and size, of a source with these files."""

    def make(files, place="a/images"):
        url = write_tree(tmp_path / place, tree(files))
        data = {"root": str(tmp_path / "sets"), "source": {"url": str(url), "image_size": 8}}
        return RunConfig.model_validate({"run": {"root": str(tmp_path / "runs")}, "data": data})

    return make


@pytest.mark.parametrize("files", [OWN_SPLIT, NO_SPLIT])
def test_a_complete_data_set_needs_no_source(config_of, files, tmp_path):
    config = config_of(files)
    first = resolve_data(config)
    write_dataset(first.data)
    shutil.rmtree(tmp_path / "a")
    for resolved in (resolve(config), resolve(config, from_source=True), resolve_data(config)):
        assert resolved.data.name == "images"
        assert resolved.data.validation_images == first.data.validation_images or files is OWN_SPLIT
        assert write_dataset(resolved.data).name == "images"
    assert resolve(config).train.images == resolve(config, from_source=True).train.images


def test_a_plan_that_was_begun_needs_no_second_look(config_of, monkeypatch, tmp_path):
    config = config_of(OWN_SPLIT)
    write_dataset(resolve_data(config).data)
    (tmp_path / "sets/images/manifest.json").unlink()
    monkeypatch.setattr(resolution, "open_source", None)
    assert resolve_data(config).data.name == "images"


def test_the_name_is_derived_where_nothing_else_can_be(config_of, tmp_path):
    config = config_of(NO_SPLIT)
    shutil.rmtree(tmp_path / "a")
    assert resolve(config).data.name == "images"


def test_images_of_another_folder_of_this_name_are_refused(config_of):
    first, second = config_of(NO_SPLIT), config_of(NO_SPLIT, "b/images")
    write_dataset(resolve_data(first).data)
    for action in (resolve, resolve_data, lambda config: resolve(config, from_source=True)):
        with pytest.raises(
            UserError, match=r"holds the images of .*/a/images, not .*/b/images; write data.name"
        ):
            action(second)
    named = second.model_copy(update={"data": second.data.model_copy(update={"name": "images"})})
    assert resolve_data(named).data.name == "images"


def test_a_manifest_that_names_no_url_passes_and_stays_as_it_is(config_of, tmp_path):
    config = resolve_data(config_of(NO_SPLIT))
    manifest = write_dataset(config.data)
    path = tmp_path / "sets/images/manifest.json"
    record = {**json.loads(path.read_text()), "source_url": None, "interpretation": None}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    assert resolve_data(config_of(NO_SPLIT, "b/images")).data.name == "images"
    (tmp_path / "sets/images/train-000000.tar").unlink()
    write_dataset(config.data)
    repaired = load_manifest(config.data.root, "images")
    assert (repaired.interpretation, repaired.source_url) == (None, None)
    assert repaired.version == manifest.version
