"""What a sweep refuses before its first point starts, and the noise of its fresh samples."""

from types import SimpleNamespace

import pytest

from fm_core.config import parse_config
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory
from fm_core.sweep.sweep_checks import check_point, checked_points, valid_points
from fm_core.sweep.sweep_points import points_of


class Pairs:
    """A model that was trained on pairs with the noise of some seeds."""

    def __init__(self, *seeds):
        self.seeds = seeds

    def trained_on_noise_of(self, seed):
        return seed in self.seeds


def stages_of(model):
    return SimpleNamespace(
        rules=lambda config, names: iter(()),
        with_checkpoints=lambda config: config,
        check_samples=lambda config: model,
    )


def config_of(tmp_path, axes, **over):
    tree = {"run": {"name": "r", "root": str(tmp_path / "runs")}, "data": {"root": str(tmp_path)}, **over}
    tree["sweep"] = {"axes": axes, **over.get("sweep", {})}
    return parse_config(tree, where="x")


STEPS = {"sample.guidance": [1, 2]}


@pytest.mark.parametrize(("seeds", "expected"), [((), 1), ((1,), 2), ((1, 2, 5), 3)])
def test_fresh_samples_do_not_begin_at_the_noise_of_training_pairs(tmp_path, seeds, expected):
    config = config_of(tmp_path, STEPS)
    points = points_of(config)
    assert check_point(config, points[0], points, Pairs(*seeds)).config.sample.seed == expected


def test_a_given_seed_of_fresh_samples_is_refused_rather_than_changed(tmp_path):
    config = config_of(tmp_path, STEPS, sweep={"check_seed": 7})
    points = points_of(config)
    assert check_point(config, points[0], points, Pairs(1)).config.sample.seed == 7
    with pytest.raises(UserError, match=r"sweep.check_seed 7: the model was trained on pairs"):
        check_point(config, points[0], points, Pairs(7))


@pytest.mark.parametrize(
    ("axes", "sweep", "message"),
    [
        (STEPS, {"check_seed": 7}, r"sweep.check_seed 7: the model was trained on pairs"),
        ({"sample.seed": [0, 7]}, {}, r"at seed 7: sample.seed 7: the model was trained on pairs"),
    ],
)
def test_a_seed_of_training_pairs_is_refused(tmp_path, axes, sweep, message):
    config = config_of(tmp_path, axes, sweep=sweep)
    assert len(checked_points(config, stages_of(Pairs()))) == 2
    with pytest.raises(UserError, match=message):
        checked_points(config, stages_of(Pairs(7)))


def test_a_run_of_other_settings_under_the_name_of_a_point_is_refused(tmp_path):
    config = config_of(tmp_path, {"train.learning_rate": [1e-3, 2e-3]})
    first, second = valid_points(config, stages_of(Pairs()))
    assert first.config.run.name == "r-learning_rate-0.001"
    other = parse_config(
        {**second.config.model_dump(mode="json"), "method": {"objective": "noise-prediction"}}, where="x"
    )
    earlier = RunDirectory(other)
    earlier.begin()
    earlier.bind()
    with pytest.raises(UserError, match=r"at learning_rate 0\.002: .*is another run"):
        valid_points(config, stages_of(Pairs()))


def test_a_score_that_the_features_cannot_have_is_refused(tmp_path):
    config = config_of(tmp_path, STEPS, evaluate={"features": "dinov2"}, sweep={"metric": "inception_score"})
    with pytest.raises(UserError, match="inception_score needs class probabilities"):
        valid_points(config, stages_of(Pairs()))
