"""Selection of the sampled classes, and their assignment to images."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fm_core.config import RunConfig, parse_config
from fm_core.errors import UserError
from fm_core.method.ode import Solver
from fm_core.sampling.checkpoint_source import load_model
from fm_core.sampling.generate import Draw
from fm_core.sampling.sample_protocol import draw_of, protocol_of
from fm_core.stages import resolve as resolve_stage
from fm_core.stages.resolve import resolve
from fm_core.storage.keyed_random import CURRENT
from tests.support.random_checkpoint import CPU, checkpoint, config_at

EULER = Solver("euler", steps=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_at(tmp_path_factory.mktemp("model"))
    return load_model(checkpoint(config) / "raw.safetensors", CPU)


def labels(model, indices, seed=1, **keys):
    return Draw(EULER, seed, **keys).labels(model, indices).tolist()


@pytest.mark.parametrize("classes", [(), (7, 0, 4)], ids=["all", "given"])
def test_balanced_classes_are_equally_frequent(model, classes):
    wanted = classes or range(10)
    counts = Counter(labels(model, range(50 * len(wanted)), classes=classes, class_mode="balanced"))
    assert counts == dict.fromkeys(wanted, 50)


def test_balanced_classes_depend_on_the_seed_and_the_index_alone(model):
    drawn = labels(model, range(60), class_mode="balanced")
    assert labels(model, range(37, 52), class_mode="balanced") == drawn[37:52]
    assert labels(model, [55, 3, 19], class_mode="balanced") == [drawn[55], drawn[3], drawn[19]]
    assert labels(model, range(60), seed=2, class_mode="balanced") != drawn
    blocks = [tuple(drawn[first : first + 10]) for first in range(0, 60, 10)]
    assert all(sorted(block) == list(range(10)) for block in blocks)
    assert len(set(blocks)) > 1  # blocks have different orders


def test_classes_are_drawn_or_in_turn_as_before_unless_a_mode_is_named(model):
    assert labels(model, range(30)) == labels(model, range(30), class_mode="drawn")
    assert labels(model, range(4), classes=(7, 0, 4)) == [7, 0, 4, 7]
    assert labels(model, range(8, 13), class_mode="in-turn") == [8, 9, 0, 1, 2]
    drawn = labels(model, range(300), classes=(7, 0, 4), class_mode="drawn")
    assert set(drawn) == {7, 0, 4}
    assert drawn[:3] * 100 != drawn
    assert torch.equal(Draw(EULER, 1).labels(model, range(30)), Draw(EULER, 1).labels(model, [*range(30)]))


def test_the_mode_is_in_the_protocol_where_it_is_not_the_default(tmp_path):
    def protocol(**keys):
        return protocol_of(config_at(tmp_path, **keys), "w", CURRENT)

    before, given = protocol(), protocol(classes=[3, 1])
    assert "class_mode" not in before | given
    assert protocol(class_mode="drawn") == before
    assert protocol(classes=[3, 1], class_mode="in-turn") == given
    for keys in ({}, {"classes": [3, 1]}):
        assert protocol(**keys, class_mode="balanced")["class_mode"] == "balanced"
    assert protocol(class_mode="in-turn") == {**before, "class_mode": "in-turn"}
    draw = draw_of(config_at(tmp_path, classes=[3, 1], class_mode="balanced"))
    assert (draw.classes, draw.class_mode) == ((3, 1), "balanced")


def test_a_model_without_classes_refuses_a_mode(tmp_path):
    config = config_at(tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"class_conditional": False})})
    plain = load_model(checkpoint(config) / "raw.safetensors", CPU)
    with pytest.raises(UserError, match=r"sample.class_mode: the model was trained without classes"):
        Draw(EULER, 1, class_mode="balanced").check(plain)


class Named:
    """The attributes of a manifest with class names."""

    image_shape, splits = (1, 8, 8), {"train": SimpleNamespace(images=100)}
    class_names = ("tench", "goldfish", "crane", "crane", "7")


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(resolve_stage, "load_manifest", lambda root, name: Named)


def test_classes_have_names(named, tmp_path):
    config = resolve(config_at(tmp_path, classes=["goldfish", 2, "tench", "7", "0"]))
    assert config.sample.classes == (1, 2, 0, 4, 0)
    assert protocol_of(config, "w", CURRENT)["classes"] == [1, 2, 0, 4, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("goldfsh", "no class .* is named 'goldfsh'; did you mean goldfish"),
        ("crane", r"\[2, 3\] are all named"),
    ],
)
def test_a_name_that_is_none_or_not_unique_is_refused(named, tmp_path, name, message):
    with pytest.raises(UserError, match=rf"sample.classes: .*{message}") as caught:
        resolve(config_at(tmp_path, classes=[name]))
    assert "\n" not in str(caught.value)


def test_a_name_without_a_data_set_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(config_at(tmp_path, classes=["goldfish"]))
    with pytest.raises(UserError, match="names are in the data set"):
        draw_of(config).check(model)


def test_unknown_modes_are_refused():
    with pytest.raises(UserError, match=r"sample.class_mode"):
        parse_config({"sample": {"class_mode": "random"}}, where="run.yaml")
    assert RunConfig().sample.class_order == "drawn"
