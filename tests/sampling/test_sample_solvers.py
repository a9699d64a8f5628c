"""Solvers, grids and noise of samples: protocol, independence of the batch, and refused requests."""

from dataclasses import replace

import pytest
import torch

import fm_core
from fm_core.config import RunConfig, StochasticSection, dump_yaml
from fm_core.errors import UserError
from fm_core.evaluation.nfe_curve import SolverSetting, solver_settings
from fm_core.method.registry import objective_named, path_named
from fm_core.method.solver import Churn, Diffusion, Solver
from fm_core.method.time_grid import TimeGrid
from fm_core.sampling.checkpoint_source import load_model
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.sample_protocol import protocol_of, sample_key, solver_of
from fm_core.sampling.solver_check import check_solver
from fm_core.stages.preflight import preflight
from fm_core.storage.hashing import fingerprint
from fm_core.storage.keyed_random import CURRENT
from tests.support.random_checkpoint import CPU, checkpoint, config_at, config_path, make, pixels


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_at(tmp_path_factory.mktemp("model"))
    return load_model(checkpoint(config) / "raw.safetensors", CPU)


def protocol(**sample):
    return protocol_of(config_at("/nowhere", **sample), "w", CURRENT)


def test_a_sample_set_of_an_earlier_version_keeps_its_protocol_and_its_key():
    earlier = {
        **{"weights": "ema", "weights_sha256": "w", "images": 11, "batch_size": 4, "seed": 0},
        **{"generator": "philox-v1", "solver": "euler", "steps": 3, "dtype": "float32"},
    }
    assert protocol() == protocol(grid="uniform", error_norm=None) == earlier
    assert sample_key(config_at("/nowhere"), earlier) == f"ema-euler-3-{fingerprint(earlier)[:6]}"
    adaptive = {"solver": "dopri5", "steps": None}
    assert protocol(**adaptive) == protocol(**adaptive, error_norm="batch")


def test_everything_that_moves_the_pixels_is_in_the_protocol():
    sde = {"solver": "sde"}
    settings = [
        {},
        *({"grid": name} for name in ("log-snr", "edm", "cosine")),
        *({"grid": "shift", "grid_shift": shift} for shift in (2.0, 3.0)),
        {"grid": "edm", "grid_rho": 5.0},
        {"grid": "log-snr", "grid_bounds": (0.01, 100.0)},
        {"grid": (0.0, 0.2, 0.5, 1.0)},
        {"solver": "dopri5", "steps": None, "error_norm": "worst"},
        {"solver": "dopri5", "steps": None},
        *({"solver": name} for name in ("ddim", "sde", "edm")),
        {**sde, "stochastic": StochasticSection(scale=0.5)},
        {**sde, "stochastic": StochasticSection(diffusion="sigma")},
        {"solver": "edm", "stochastic": StochasticSection(churn=5.0)},
        {"solver": "edm", "stochastic": StochasticSection(churn=5.0, churn_min=0.1)},
    ]
    keys = [
        sample_key(config, protocol_of(config, "w", CURRENT))
        for config in (config_at("/x", **s) for s in settings)
    ]
    assert len({*keys}) == len(settings)
    assert protocol(grid="log-snr")["grid"] == {"name": "log-snr", "bounds": [0.001, 1000.0]}
    assert protocol(**sde)["stochastic"] == {"diffusion": "sbdm", "scale": 1.0}
    assert "stochastic" not in protocol(solver="edm")
    assert keys[1].startswith("ema-euler-3-log-snr-")


@pytest.mark.parametrize(
    "solver",
    [
        Solver("dpmpp_2m", steps=3, grid=TimeGrid("log-snr")),
        Solver("sde", steps=3),
        Solver("edm", steps=3, churn=Churn(2.0), grid=TimeGrid("edm")),
    ],
    ids=lambda solver: solver.method,
)
def test_image_i_is_the_same_in_any_batch(model, solver):
    """Rounding depends on the batch size, and rarely changes a pixel by one intensity level."""
    draw = Draw(solver, 1)
    batch_of_all = generate(model, draw, 0, 12, CPU)
    parts = torch.cat([generate(model, draw, first, 3, CPU).images for first in range(0, 12, 3)])
    apart = (parts.int() - batch_of_all.images.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 5e-3


@pytest.mark.parametrize("generator", ["philox-v1", "numpy-v1"])
def test_the_noise_of_a_step_is_a_function_of_seed_image_and_step(model, generator):
    model = replace(model, recipe={**model.recipe, "generator": generator})
    draw = Draw(Solver("sde", steps=3), 1)
    noise = draw.step_noise(model, range(4, 8))
    assert torch.equal(noise(2)[1:2], draw.step_noise(model, [5])(2))
    others = [noise(1)[1:2], draw.step_noise(model, [6])(2), draw.noise(model, [5])]
    others += [Draw(Solver("sde", steps=3), 2).step_noise(model, [5])(2)]
    assert not any(torch.equal(noise(2)[1:2], other) for other in others)


def test_guidance_counts_both_passes(model):
    batch = generate(model, Draw(Solver("unipc", steps=3), 1, 2.0, [3]), 0, 2, CPU, at=[0.0, 0.5, 1.0])
    assert (batch.nfe, batch.forwards, batch.accepted) == (6, 2, 3)
    assert batch.trajectory.shape[:2] == (3, 2)


def test_a_loaded_model_samples_as_fm_sample_does(tmp_path):
    config = config_at(tmp_path, images=4, solver="dpmpp_3m", steps=4, grid="cosine")
    checkpoint(config)
    (config_path(config) / "config.yaml").write_text(dump_yaml(config))
    written, loaded = pixels(make(config)), fm_core.load(config_path(config), device="cpu")
    assert torch.equal(loaded.sample(4, solver="dpmpp_3m", steps=4, grid="cosine", batch=4), written)
    whole = Solver("dpmpp_3m", steps=4, grid=TimeGrid("cosine"))
    assert torch.equal(loaded.sample(4, solver=whole, batch=4), written)
    with pytest.raises(UserError, match="has its own settings"):
        loaded.sample(4, solver=whole, steps=3)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"solver": "dopri5", "steps": None, "grid": "log-snr"},
            "chooses its own steps and would ignore the time",
        ),
        ({"grid": (0.0, 1.0)}, "steps is 3, but the time grid has 1 steps"),
        ({"grid_rho": 5.0}, "time grid uniform would ignore rho"),
        ({"grid": "shift"}, "needs a positive shift"),
        ({"solver": "ddim", "error_norm": "worst"}, "ddim would ignore error_norm"),
        ({"solver": "ddim", "stochastic": StochasticSection(scale=0.5)}, "ddim would ignore diffusion"),
        ({"solver": "sde", "stochastic": StochasticSection(churn=0.5)}, "sde would ignore churn"),
    ],
    ids=str,
)
def test_settings_that_a_solver_would_ignore_are_refused(sample, message):
    with pytest.raises(UserError, match=message):
        solver_of(config_at("/nowhere", **sample))


def test_a_model_that_does_not_determine_x1_or_the_score_is_refused():
    path = path_named("optimal-transport")
    cnf, fm = (objective_named(name, path) for name in ("maximum-likelihood", "flow-matching"))
    ddim, sde = Solver("ddim", steps=3), Solver("sde", steps=3, diffusion=Diffusion("sigma"))
    with pytest.raises(UserError, match=r"sample\.solver ddim: a model of maximum-likelihood"):
        check_solver(ddim, cnf, "independent")
    with pytest.raises(UserError, match=r"sample\.grid edm: a model of maximum-likelihood"):
        check_solver(Solver("midpoint", steps=3, grid=TimeGrid("edm")), cnf, "independent")
    with pytest.raises(UserError, match=r"sample\.solver sde adds noise by the score"):
        check_solver(sde, fm, "minibatch-optimal-transport")
    with pytest.raises(UserError, match="at most 65,535 steps"):
        check_solver(Solver("sde", steps=70_000), fm, "independent")
    check_solver(ddim, fm, "minibatch-optimal-transport")
    check_solver(Solver("midpoint", steps=3, grid=TimeGrid("shift", shift=2.0)), cnf, "independent")
    with pytest.raises(UserError, match="solver ddim is for sampling; maximum-likelihood needs a method of"):
        objective_named("maximum-likelihood", path, {"method": "ddim", "steps": 4})


def test_it_is_refused_before_anything_starts(tmp_path):
    config = config_at(tmp_path, solver="ddim", weights="ema")
    method = config.method.model_copy(update={"objective": "maximum-likelihood"})
    config = RunConfig.model_validate({**config.model_dump(), "method": method.model_dump()})
    with pytest.raises(UserError, match=r"sample\.solver ddim: a model of maximum-likelihood"):
        preflight(config, ("sample",))


def test_the_curve_takes_solvers_with_grids_and_budgets_of_few_evaluations():
    section = config_at("/x").evaluate.nfe_curve.model_copy(
        update={"solvers": ("midpoint", "edm@edm:5", "dpmpp_2m@log-snr", "ab2@shift:3"), "nfe": (1, 4)}
    )
    records = [point.record for point in solver_settings(section) if not point.solver.adaptive]
    assert records == [
        {"solver": "midpoint", "steps": 2},
        {"solver": "edm@edm:5", "steps": 1},
        {"solver": "edm@edm:5", "steps": 2},
        *({"solver": "dpmpp_2m@log-snr", "steps": steps} for steps in (1, 4)),
        *({"solver": "ab2@shift:3", "steps": steps} for steps in (1, 4)),
    ]
    assert SolverSetting(Solver("edm", steps=2)).record["solver"] == "edm"
    for name, message in (
        ("sde", "sde adds noise; allowed: euler"),
        ("ab2@karras", "unknown time grid 'karras'"),
        ("ab2@shift:x", "'x' is not a number"),
        ("ab2@cosine:3", "cosine would ignore rho"),
    ):
        with pytest.raises(UserError, match=message):
            solver_settings(section.model_copy(update={"solvers": (name,)}))
