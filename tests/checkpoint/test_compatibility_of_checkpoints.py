"""Compatibility of checkpoints: a train.checkpoint_root belongs to one run, which may be moved with it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.checkpoint_loader import check_compatible
from fm_core.config import RunConfig
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.training import train_worker
from fm_core.training.train_worker import recipe

MANIFEST = Manifest.model_construct(
    levels=17,
    image_shape=(1, 8, 8),
    class_count=10,
    name="digits",
    label_order="as found",
    recipe={},
    shards=(),
)


def asked(**train):
    return RunConfig.model_validate({"run": {"name": train.pop("name", "a")}, "train": train})


@pytest.fixture
def written(tmp_path):
    """A checkpoint with the identity of run a."""

    def write(**record):
        metadata = {"recipe": json.dumps({**recipe(asked(), MANIFEST), "step": 1, **record})}
        (tmp_path / "optimizer").mkdir(exist_ok=True)
        for name in ("raw", "optimizer/exp_avg", "ema-0.999"):
            save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata)
        return tmp_path

    return write


def refused(folder, config, shared=True):
    with pytest.raises(UserError) as caught:
        check_compatible(folder, recipe(config, MANIFEST), ["ema-0.999"], shared)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_run_itself_goes_on(written):
    for shared in (True, False):
        check_compatible(written(), recipe(asked(), MANIFEST), ["ema-0.999"], shared)
        other_way = asked(images=256, micro_batch=2, checkpoint_images=7, keep_checkpoints=9)
        check_compatible(written(), recipe(other_way, MANIFEST), ["ema-0.999"], shared)


def test_another_run_with_the_same_root_is_refused_by_its_name(written):
    message = refused(written(), asked(name="b"))
    assert (
        "is of another run: run.name was 'a' and is now 'b'; choose another train.checkpoint_root" in message
    )


def test_a_run_directory_may_be_renamed_with_the_checkpoints_in_it(written):
    check_compatible(written(), recipe(asked(name="b"), MANIFEST), ["ema-0.999"], shared=False)


@pytest.mark.parametrize("shared", [True, False])
def test_another_optimization_is_refused_with_the_difference(written, shared):
    message = refused(written(), asked(learning_rate=0.5), shared)
    assert "train.learning_rate was 0.001 and is now 0.5" in message


def test_a_checkpoint_of_a_version_without_origins_is_continued(written):
    before = recipe(asked(), MANIFEST)
    folder = written(run={}, order={}, train={"learning_rate": before["train"]["learning_rate"]})
    check_compatible(folder, recipe(asked(name="b", label_dropout=0.0), MANIFEST), ["ema-0.999"], True)


def test_a_checkpoint_of_another_order_of_the_data_is_refused(written, monkeypatch):
    folder = written()
    monkeypatch.setattr(train_worker, "ORDER_VERSION", 99)
    assert "order.version was 1 and is now 99" in refused(folder, asked(), shared=False)


def test_a_checkpoint_of_another_generator_is_refused_and_one_that_names_none_is_of_the_earlier(written):
    def with_generator(name):
        config = asked()
        return config.model_copy(update={"run": config.run.model_copy(update={"generator": name})})

    earlier, new = with_generator("numpy-v1"), with_generator("philox-v1")
    assert "generator" not in recipe(earlier, MANIFEST)
    message = "run.generator was 'philox-v1' and is now 'numpy-v1'"
    assert message in refused(written(), earlier, shared=False)
    folder, record = written(), recipe(earlier, MANIFEST)
    for name in ("raw", "optimizer/exp_avg", "ema-0.999"):
        save_file({"a": torch.zeros(1)}, folder / f"{name}.safetensors", {"recipe": json.dumps(record)})
    assert "run.generator was 'numpy-v1' and is now 'philox-v1'" in refused(folder, new, shared=False)
    check_compatible(folder, recipe(earlier, MANIFEST), ["ema-0.999"], shared=False)


def test_a_root_that_was_named_may_be_anothers_as_well(tmp_path):
    assert CheckpointCatalog.of(asked(checkpoint_root=str(tmp_path))).shared
    assert not CheckpointCatalog.of(asked()).shared
