"""Samples of flow maps: through the stage's worker and the Python API, protocol and key, refusals, export."""

import re
from dataclasses import replace

import pytest
import torch

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.method.meanflow import MeanFlow
from fm_core.method.registry import objective_named, path_named
from fm_core.method.solver import Solver
from fm_core.sampling.api import load
from fm_core.sampling.checkpoint_source import load_model, weights_file
from fm_core.sampling.compiled_network import Compiled
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.sample_protocol import protocol_of, sample_key
from fm_core.sampling.solver_check import check_solver
from fm_core.stages.export import export
from fm_core.stages.preflight import preflight
from fm_core.stages.stage_rules import rules
from fm_core.storage.atomic_files import write_text
from tests.support.random_checkpoint import CPU, checkpoint, config_at, make, pixels

MEANFLOW = {"objective": "meanflow"}
FLOW_MAP = {"solver": "flow_map", "steps": 2}


@pytest.fixture(scope="module")
def flow_map(tmp_path_factory):
    """The configuration of a flow map with random weights."""
    config = config_at(tmp_path_factory.mktemp("flow-map"), method=MEANFLOW, **FLOW_MAP)
    checkpoint(config)
    return config


@pytest.fixture(scope="module")
def model(flow_map):
    return load_model(weights_file(flow_map, 7), CPU)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_are_compositions_of_displacements(flow_map, model, steps):
    draw = Draw(Solver("flow_map", steps=steps), seed=0)
    batch = generate(model, draw, 0, 5, CPU)
    assert (batch.nfe, batch.accepted, batch.forwards) == (steps, steps, 1)
    x, labels = draw.noise(model, range(5)), draw.labels(model, range(5))
    displacement = model.objective.displacement(model.network, labels)
    for step in range(steps):
        x = x + displacement(torch.tensor(step / steps), torch.tensor((step + 1) / steps), x)
    assert torch.equal(batch.images, model.quantizer.quantize(x))


def test_the_stage_and_the_api_give_the_same_images(flow_map):
    samples = make(flow_map)
    assert samples.finished()[0].nfe == 2
    run = flow_map.run.root
    write_text(samples.control.parents[2] / "config.yaml", flow_map.model_dump_json())
    images = load(f"{run}/r", device="cpu").sample(11, solver="flow_map", steps=2, batch=4)
    assert torch.equal(images, pixels(samples))


def test_the_grid_is_part_of_protocol_and_key(flow_map):
    def record(**keys):
        config = flow_map.model_copy(update={"sample": flow_map.sample.model_copy(update=keys)})
        protocol = protocol_of(config, "ab", "philox-v1")
        return protocol, sample_key(config, protocol)

    protocol, key = record()
    assert (protocol["solver"], protocol["steps"]) == ("flow_map", 2)
    assert key.startswith("ema-flow_map-2-")
    shifted, shifted_key = record(grid="shift", grid_shift=3.0)
    assert shifted["grid"] == {"name": "shift", "shift": 3.0}
    assert shifted_key.startswith("ema-flow_map-2-shift-")
    listed, _ = record(grid=(0.0, 0.3, 1.0), steps=None)
    assert listed["steps"] == 2


@pytest.mark.parametrize("grid", ["uniform", "cosine", "log-snr", "edm"])
def test_every_grid_ends_at_the_data(model, grid):
    from fm_core.method.time_grid import TimeGrid

    batch = generate(model, Draw(Solver("flow_map", steps=3, grid=TimeGrid(grid)), 0), 0, 2, CPU)
    assert batch.nfe == 3


def test_the_velocity_of_a_flow_map_is_solved_like_any_other(model):
    batch = generate(model, Draw(Solver("euler", steps=3), 0), 0, 2, CPU)
    assert batch.nfe == 3
    guided = generate(model, Draw(Solver("euler", steps=3), 0, guidance=2.0), 0, 2, CPU)
    assert guided.nfe == 6


def test_models_with_one_time_and_guided_displacements_are_refused(model):
    plain = objective_named("flow-matching", path_named("optimal-transport"))
    with pytest.raises(UserError, match=r"sample\.solver flow_map: a model of flow-matching has one time"):
        check_solver(Solver("flow_map", steps=1), plain, "independent")
    with pytest.raises(UserError, match=r"sample\.guidance 2 guides a velocity, not a displacement"):
        Draw(Solver("flow_map", steps=1), 0, guidance=2.0).check(model)
    with pytest.raises(UserError, match=r"evaluate\.online\.solver flow_map: a model of flow-matching"):
        check_solver(Solver("flow_map", steps=1), plain, "independent", "evaluate.online")


def checked(tmp_path, stages=("train", "sample"), **sections):
    config = RunConfig.model_validate({"run": {"root": str(tmp_path)}, **sections})
    for _, rule in rules(config, stages):
        rule()


def test_wrong_requests_are_refused_before_the_start(tmp_path):
    good = {"method": MEANFLOW, "sample": FLOW_MAP}
    checked(tmp_path, **good)
    with pytest.raises(UserError, match="has one time"):
        checked(tmp_path, sample=FLOW_MAP)
    with pytest.raises(UserError, match="has one time"):
        checked(tmp_path, evaluate={"online": {"images": 8, **FLOW_MAP}})
    checked(tmp_path, method=MEANFLOW, evaluate={"online": {"images": 8, **FLOW_MAP}})
    conditional = {"model": {"class_conditional": True}, "train": {"label_dropout": 0.1}}
    with pytest.raises(UserError, match="guides a velocity"):
        checked(tmp_path, **conditional, method=MEANFLOW, sample={**FLOW_MAP, "guidance": 2.0})
    curve = {"nfe_curve": {"images": 8, "solvers": ["flow_map"], "nfe": [1, 2]}}
    checked(tmp_path, stages=("evaluate",), method=MEANFLOW, evaluate=curve)
    with pytest.raises(UserError, match="has one time"):
        checked(tmp_path, stages=("evaluate",), evaluate=curve)
    with pytest.raises(UserError, match="no common scale"):
        preflight(
            RunConfig.model_validate({"method": {**MEANFLOW, "path": "variance-exploding"}}), ("train",)
        )


def test_networks_of_one_batch_size_pass_the_second_time_on(model):
    network = Compiled(model.network, batch=99, cuda_graphs=False)
    t, s, x = torch.zeros(2), torch.ones(2), torch.randn(2, 1, 8, 8)
    assert torch.equal(network(t, x, None, s), model.network(t, x, None, s))
    assert not torch.equal(network(t, x, None, s), network(t, x))


def test_the_card_of_an_export_says_how_to_sample_it(flow_map, tmp_path):
    config = flow_map.model_copy(
        update={"export": flow_map.export.model_copy(update={"folder": str(tmp_path / "folder")})}
    )
    export(config)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert '.sample(16, solver="flow_map", steps=2)' in card
    assert "meanflow on the path optimal-transport" in card
    assert load(tmp_path / "folder").sample(2, solver="flow_map", steps=1).shape == (2, 1, 8, 8)


LEARNED = {"method": {**MEANFLOW, "objective_options": {"guidance": 2}}}
CONDITIONAL = {"model": {"class_conditional": True}, "train": {"label_dropout": 0.1}}


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        (("train", "sample"), {}, "sample.guidance 3: the model has learned guidance of scale 2"),
        (
            ("train",),
            {"online": {"images": 8, "solver": "euler", "steps": 2}},
            "evaluate.online: sample.guidance 3",
        ),
        (
            ("evaluate",),
            {"nfe_curve": {"images": 8, "solvers": ["euler"], "nfe": [2]}},
            "evaluate.nfe_curve: sample.guidance 3",
        ),
    ],
)
def test_learned_guidance_is_not_applied_twice(tmp_path, stages, settings, message):
    def check(**sample):
        checked(tmp_path, stages, **LEARNED, **CONDITIONAL, sample=sample, evaluate=settings)

    check()
    check(guidance=3, guide={"step": 3})
    with pytest.raises(UserError, match=re.escape(message)):
        check(guidance=3)


def test_a_model_with_learned_guidance_refuses_it_in_python(model):
    learned = replace(model, objective=MeanFlow(model.objective.path, guidance=2.0))
    draw = Draw(Solver("euler", steps=3), 0, guidance=3.0)
    with pytest.raises(UserError, match="would be applied twice"):
        draw.check(learned)
    draw.check(replace(learned, guide=model))
