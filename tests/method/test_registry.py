"""Registry names and options, the compatibility table, and user-defined classes."""

import pytest
import torch

import fm_core.method.compatibility
from fm_core.errors import UserError
from fm_core.method.affine import Affine
from fm_core.method.divergence import Exact
from fm_core.method.likelihood import log_density
from fm_core.method.objectives import DataPrediction, NoisePrediction, ScoreFlow, ScoreMatching
from fm_core.method.ode import Solver
from fm_core.method.paths import OptimalTransport
from fm_core.method.registry import (
    coupling_named,
    objective_named,
    path_named,
    supported_pairs,
    timestep_sampler_named,
)
from fm_core.method.times import Times
from fm_core.method.timestep_samplers import TimestepSampler
from tests.support.gaussian_mixtures import plane

PLUGINS = "tests.support.plugins"
PATHS = ["optimal-transport", "variance-preserving", "variance-exploding", "cosine"]
OBJECTIVES = [
    "flow-matching",
    "score-matching",
    "scoreflow",
    "noise-prediction",
    "data-prediction",
    "maximum-likelihood",
    "meanflow",
    "split-meanflow",
]


def test_the_matrix_in_the_documentation_is_the_one_computed():
    pairs, documented = supported_pairs(), {}
    lines = (fm_core.method.compatibility.__doc__ or "").splitlines()
    header = next(line.split()[1:] for line in lines if line.split()[:1] == ["objective"])
    for line in lines:
        objective, *cells = line.replace("[0, ", "[0,").replace(" - ", "-").split() or [""]
        if objective in OBJECTIVES:
            documented |= {(objective, path): cell for path, cell in zip(header, cells, strict=True)}
    assert set(pairs) == set(documented) == {(o, p) for o in OBJECTIVES for p in PATHS}
    for pair, interval in pairs.items():
        if documented[pair] == "refused":
            assert isinstance(interval, str)
            assert "alpha_t" in interval
            assert "\n" not in interval
        else:
            end, _, cut = documented[pair].removeprefix("[0,").removesuffix("]").partition("-")
            assert interval == pytest.approx(
                (0.0, float(end) - float(cut or 0)), abs=1e-5 if cut in ("1e-3", "6.4e-4") else 1e-12
            )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_have_the_interval_of_the_matrix(objective):
    for path in PATHS:
        expected = supported_pairs()[objective, path]
        if isinstance(expected, str):
            with pytest.raises(UserError, match="cannot be used on the path"):
                objective_named(objective, path_named(path))
        else:
            assert objective_named(objective, path_named(path)).interval == expected


def test_paths_from_functions_obey_the_same_rules():
    dips = Affine(lambda t: (t - 0.5) ** 2, lambda t: 1 - t)
    with pytest.raises(UserError, match=r"at t = 0\.5"):
        NoisePrediction(dips)
    with pytest.raises(UserError, match="sigma_t"):
        DataPrediction(Affine(lambda t: t, lambda t: 1e-4 * (1 - t)))

    # sigma / alpha increases up to t = 1/3, so no diffusion has these marginals.
    growing = Affine(lambda t: 0.5 + 0 * t, lambda t: 0.1 + 6 * t * (1 - t) ** 2)
    ScoreMatching(growing)
    with pytest.raises(UserError, match="negative"):
        ScoreFlow(growing)


@pytest.mark.parametrize(
    ("make", "options", "attribute", "value"),
    [
        (lambda o: path_named("optimal-transport", o), {"sigma_min": 0.01}, "sigma_min", 0.01),
        (lambda o: path_named("variance-preserving", o), {"epsilon": 1e-3}, "interval", (0.0, 1 - 1e-3)),
        (lambda o: path_named("variance-exploding", o), {"sigma_max": 9.0}, "source_std", 9.0),
        (lambda o: coupling_named("minibatch-optimal-transport", o), {"block": 16}, "block", 16),
        (lambda o: coupling_named("independent", o), {}, "block", 1),
        (lambda o: timestep_sampler_named("logit-normal", (0.0, 0.5), o), {"mean": 2.0}, "mean", 2.0),
        (lambda o: timestep_sampler_named("uniform", (0.0, 0.5), o), {}, "interval", (0.0, 0.5)),
        (lambda o: timestep_sampler_named("edm", (0.0, 0.5), o), {}, "log_mean", -1.2),
    ],
)
def test_names_and_options_build_the_part(make, options, attribute, value):
    assert getattr(make(options), attribute) == value


def test_an_objective_takes_its_options():
    objective = objective_named("maximum-likelihood", OptimalTransport(), {"method": "rk4", "steps": 4})
    assert objective.solver == Solver("rk4", steps=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: path_named("straight"), "unknown path 'straight'; allowed: cosine, optimal-transport"),
        (lambda: path_named("cosine", {"a": 1}), "unknown option 'a' of the path cosine; allowed: none"),
        (lambda: path_named("optimal-transport", {"sigma": 1}), "allowed: sigma_min"),
        (lambda: path_named("optimal-transport", {"sigma_min": "x"}), "cannot be built"),
        (lambda: path_named("optimal-transport", {"sigma_min": 2}), "sigma_min must lie in"),
        (
            lambda: path_named("optimal-transport", {"sigma_min": True}),
            "sigma_min must be a number, not True",
        ),
        (
            lambda: coupling_named("minibatch-optimal-transport", {"block": 16.5}),
            "block must be an integer, not 16.5",
        ),
        (
            lambda: objective_named("maximum-likelihood", OptimalTransport(), {"steps": "four"}),
            "steps must be an integer, not 'four'",
        ),
        (
            lambda: objective_named("maximum-likelihood", OptimalTransport(), {"divergence": 3}),
            "divergence must be a string, not 3",
        ),
        (
            lambda: path_named(f"{PLUGINS}:IntegerPower", {"power": 1.5}),
            r":IntegerPower cannot .*: no half powers$",
        ),
        (lambda: path_named("no.such.module:Path"), "cannot import the path"),
        (lambda: path_named(f"{PLUGINS}:Missing"), "cannot import the path"),
        (lambda: path_named(f"{PLUGINS}:NotAPath"), "is not a subclass of"),
        (lambda: path_named(f"{PLUGINS}:HalfVelocity"), "is not a subclass of"),
        (lambda: objective_named("ddpm", OptimalTransport()), "unknown objective 'ddpm'; allowed: data-"),
        (lambda: objective_named("flow-matching", OptimalTransport(), {"path": 1}), "unknown option 'path'"),
        (
            lambda: coupling_named("sinkhorn"),
            "unknown coupling 'sinkhorn'; allowed: class-optimal-transport, ",
        ),
        (
            lambda: timestep_sampler_named("beta", (0.0, 1.0)),
            "unknown time distribution 'beta'; allowed: edm",
        ),
        (lambda: timestep_sampler_named("uniform", (0.0, 1.0), {"interval": 1}), "unknown option 'interval'"),
    ],
)
def test_unknown_names_and_options_are_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_path_and_an_objective_from_outside_train_sample_and_score_like_the_built_in_ones():
    path = path_named(f"{PLUGINS}:Power", {"power": 1.5})
    objective = objective_named(f"{PLUGINS}:HalfVelocity", path)
    mixture = plane(path)
    velocity = objective.velocity(lambda t, x, label: mixture.velocity(t, x) / 2)
    x1 = 0.5 * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = log_density(velocity, x1, objective.interval, Solver(rtol=1e-8, atol=1e-8), Exact())
    expected = mixture.log_density(torch.ones(4, dtype=torch.float64), x1)  # starts from exactly N(0, I)
    torch.testing.assert_close(actual.log_density, expected, rtol=0, atol=1e-5)
    sample = path.sample(torch.randn(4, 2), torch.randn(4, 2), torch.rand(4))
    assert objective.loss(lambda t, x, label: sample.velocity / 2, sample).abs().max() < 1e-12
    with pytest.raises(UserError, match="power"):
        objective_named("noise-prediction", path)


def test_a_coupling_and_a_timestep_sampler_from_outside():
    x0, x1 = torch.randn(4, 2), torch.randn(4, 2)
    assert torch.equal(coupling_named(f"{PLUGINS}:Reversed").pair(x0, x1)[0], x0.flip(0))
    sampler = timestep_sampler_named(f"{PLUGINS}:Squared", (0.0, 0.5))
    assert sampler.times(torch.tensor([0.5])).tolist() == [0.125]


def test_the_former_name_of_the_timestep_sampler_can_be_subclassed():
    assert Times is TimestepSampler
