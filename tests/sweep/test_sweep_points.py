"""Points of a sweep: combinations of values, their names and runs, and what is refused."""

import pytest

from fm_core.config import RunConfig, merge, parse_config
from fm_core.errors import UserError
from fm_core.sweep.sweep_points import points_of, run_name, value_text

BASE = {
    "run": {"name": "base"},
    "model": {"class_conditional": True},
    "sample": {"solver": "euler", "steps": 8, "guidance_interval": [0.2, 0.9], "guidance": 2},
    "train": {"checkpoint_root": "memory://bucket/base", "label_dropout": 0.1},
    "evaluate": {"output": "scores.json"},
}


def swept(axes, **over) -> RunConfig:
    return parse_config(merge(merge(BASE, {"sweep": {"axes": axes}}), over), where="run.yaml")


def test_every_combination_is_a_point_with_the_keys_of_the_base():
    points = points_of(swept({"sample.guidance": [1, 1.5], "sample.grid": ["uniform", [0, 0.5, 1]]}))
    assert [point.title for point in points] == [
        "guidance 1, grid uniform",
        "guidance 1, grid [0, 0.5, 1]",
        "guidance 1.5, grid uniform",
        "guidance 1.5, grid [0, 0.5, 1]",
    ]
    for point in points:
        assert (point.trained, point.stages) == (False, ("sample", "evaluate"))
        assert point.config.run.name == "base"
        assert (point.config.sample.solver, point.config.sample.steps) == ("euler", 8)
        assert point.config.sample.guidance_interval == (0.2, 0.9)
        assert point.config.sweep.axes == {}
        assert point.config.evaluate.output is None
    assert points[-1].config.sample.guidance == 1.5
    assert points[-1].config.sample.grid == (0, 0.5, 1)


def test_values_of_a_section_set_several_keys_together():
    axis = {"sample": [{"solver": "heun2", "steps": 4}, {"solver": "dopri5", "steps": None, "rtol": "1e-3"}]}
    first, second = points_of(swept(axis))
    assert first.title == "solver heun2, steps 4"
    assert (first.config.sample.solver, first.config.sample.steps) == ("heun2", 4)
    assert second.title == "solver dopri5, steps none, rtol 0.001"
    assert (second.config.sample.steps, second.config.sample.rtol) == (None, 1e-3)
    inner = points_of(swept({"sample.guide": [{"step": 5}, {"weights": "ema-power-0.2"}]}))
    assert [point.config.sample.guide.step for point in inner] == [5, None]


def test_keys_with_the_same_last_part_are_named_in_full():
    (point,) = points_of(swept({"sample.guide.weights": ["raw"], "sample.weights": ["ema"]}))
    assert point.title == "sample.guide.weights raw, sample.weights ema"


def test_keys_of_training_give_a_run_with_its_own_name_and_checkpoints():
    axes = {"train.learning_rate": [1e-3, "5e-4"], "run.seed": [0, 1], "sample.steps": [4, 8]}
    points = points_of(swept(axes))
    names = [point.config.run.name for point in points]
    assert len(points) == 8
    assert list(dict.fromkeys(names)) == [
        "base-learning_rate-0.001-seed-0",
        "base-learning_rate-0.001-seed-1",
        "base-learning_rate-0.0005-seed-0",
        "base-learning_rate-0.0005-seed-1",
    ]
    last = points[-1].config
    assert points[-1].stages == ("train", "sample", "evaluate")
    assert (last.train.learning_rate, last.run.seed, last.sample.steps) == (5e-4, 1, 8)
    assert last.train.checkpoint_root == f"memory://bucket/base/{last.run.name}"


def test_runs_of_different_seeds_are_sampled_from_different_noise():
    axes = {"run.seed": [0, 3], "sample.steps": [4, 8]}
    base = swept(axes).sample.seed
    assert [point.config.sample.seed for point in points_of(swept(axes))] == [base, base, base + 3, base + 3]
    named = points_of(swept({**axes, "sample.seed": [7]}))
    assert {point.config.sample.seed for point in named} == {7}


def test_a_published_size_sets_the_keys_that_it_determines():
    base = parse_config({"model": {"size": "DiT-S/2", "class_conditional": True}}, where="x")
    config = base.model_copy(update={"sweep": swept({"model.size": ["DiT-S/2", "DiT-B/4"]}).sweep})
    small, large = (point.config.model for point in points_of(config))
    assert (small.width, small.patch, large.width, large.patch) == (384, 2, 768, 4)
    assert large.class_conditional


def test_a_long_or_nested_value_gives_a_readable_name_of_limited_length():
    name = run_name("base", {"train.ema_decays": [0.9, 0.99]})
    assert name == "base-ema_decays-0.9-0.99"
    long = run_name("base", {"method.path_options": {"sigma_min": 1e-5}, "method.path": "m" * 80})
    other = run_name("base", {"method.path_options": {"sigma_min": 1e-4}, "method.path": "m" * 80})
    assert long != other
    assert len(long) <= 65
    assert long.startswith("base-path_options-sigma_min-1e-05-path-mmm")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "true"), (1.0, "1"), (0.1234567, "0.1234567"), ([1, None], "[1, none]")],
)
def test_values_are_shown_exactly(value, text):
    assert value_text(value) == text


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "sweep.axes is empty"),
        ({"sample.guidances": [1]}, "sample.guidances: unknown key; did you mean sample.guidance"),
        ({"sample": [{"guidances": 1}]}, "sample.guidances: unknown key"),
        ({"sample": [1]}, "sample is a section: each of its values must be a mapping"),
        ({"data.name": ["a", "b"]}, "data.name cannot be swept"),
        ({"run.name": ["a", "b"]}, "run.name cannot be swept"),
        ({"evaluate.protocol": ["adm", "edm"]}, "evaluate.protocol cannot be swept"),
        ({"sample.root": ["a", "b"]}, "sample.root cannot be swept"),
        ({"evaluate.online.images": [4]}, "evaluate.online.images cannot be swept"),
        ({"sample.guidance": [1, "many"]}, "at sample.guidance many: sample.guidance: input should be a"),
        ({"sample.guidance": [1, 1.0]}, "two points are the same: guidance 1; and guidance 1"),
        ({"sample": [{"steps": 4}], "sample.steps": [8]}, "sample.steps is set by both sample and sample.st"),
        ({"train.learning_rate": [-1]}, "train.learning_rate: input should be greater than 0"),
        ({"train.warmup_images": [10**9], "train.images": [5]}, "train.warmup_images is more than"),
    ],
)
def test_what_makes_no_point_is_refused_in_one_line(axes, message):
    with pytest.raises(UserError, match=message) as caught:
        points_of(swept(axes))
    assert "\n" not in str(caught.value)
    assert "sweep.axes" in str(caught.value)


def test_an_axis_without_values_is_refused_by_the_section():
    with pytest.raises(UserError, match=r"sweep.axes: sample.guidance has no values"):
        swept({"sample.guidance": []})


def test_former_names_of_keys_are_accepted():
    (point,) = points_of(swept({"train.held_out_images": [64]}))
    assert point.config.train.validation_images == 64
    assert list(point.values) == ["train.validation_images"]
