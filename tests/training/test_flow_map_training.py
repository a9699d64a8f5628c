"""Training of flow maps: sharded gradients (flow_maps_rank.py), times by position, the teacher, refusals."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from fm_core.config import RunConfig
from fm_core.data.batches import Batch
from fm_core.errors import UserError
from fm_core.method.couplings import Independent
from fm_core.method.dequantization import Quantizer
from fm_core.method.meanflow import MeanFlow, SplitMeanFlow
from fm_core.method.paths import OptimalTransport
from fm_core.method.timestep_samplers import Uniform
from fm_core.models.mlp import MLP
from fm_core.models.unet import UNet
from fm_core.stages.train import check_initial_weights, check_training
from fm_core.storage.keyed_random import Domain, KeyedRandom
from fm_core.training.batch_source import BatchSource
from fm_core.training.cost_model import Cluster, training_cost
from fm_core.training.mfu import utilization
from fm_core.training.pretrained import pretrained_weights
from tests.support.flow_maps_rank import CASES
from tests.support.forked_ranks import run_experiments


@pytest.fixture(scope="module")
def sharded_flow_maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow-maps")
    return run_experiments("flow_maps_rank", folder, 2, "results-flow-maps.json")


@pytest.mark.parametrize(("objective", "setting"), CASES)
def test_gradients_on_two_ranks_equal_those_of_one_process(sharded_flow_maps, objective, setting):
    difference = sharded_flow_maps[f"{objective}: {setting}"]
    assert difference < (0.1 if "bf16" in setting else 1e-5)


def source(generator, equal_times):
    random = KeyedRandom(generator, 3, Domain.TRAINING)
    path, times = OptimalTransport(), Uniform()
    made = BatchSource(None, None, Quantizer(17), path, Independent(), times, random, False)
    made.equal_times = equal_times
    return made


def batch(first, count):
    positions = torch.arange(first, first + count)
    return Batch(first, torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count).long(), positions)


@pytest.mark.parametrize("generator", ["philox-v1", "numpy-v1"])
def test_second_times_are_a_function_of_the_position(generator):
    drawn = source(generator, 0.5)
    together, _ = drawn.draw(batch(64, 32), torch.device("cpu"))
    parts = [drawn.draw(batch(first, 8), torch.device("cpu"))[0] for first in range(64, 96, 8)]
    for get in (lambda sample: sample.t, lambda sample: sample.second.s, lambda sample: sample.second.split):
        assert torch.equal(get(together), torch.cat([get(part) for part in parts]))
    apart = torch.cat([8 * number + part.second.apart for number, part in enumerate(parts)])
    assert torch.equal(together.second.apart, apart)
    assert 0 < len(apart) < 32
    # Examples with equal times have those of a plain objective.
    plain, _ = source(generator, None).draw(batch(64, 32), torch.device("cpu"))
    equal = torch.ones(32, dtype=torch.bool)
    equal[apart] = False
    assert torch.equal(together.t[equal], plain.t[equal])
    assert torch.equal(together.x_t[equal], plain.x_t[equal])
    assert plain.second is None


def unet(**keys):
    return UNet(4, 1, 8, (1,), 1, (), 8, 0.0, True, True, **keys)


def test_weights_with_one_time_start_a_network_with_two(tmp_path):
    teacher, student = unet(), unet(two_times=True)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    weights = pretrained_weights(str(tmp_path / "teacher.safetensors"), student)
    student.load_state_dict(weights)
    t, s, x = torch.rand(3), torch.ones(3), torch.randn(3, 1, 4, 4)
    assert torch.equal(student(t, x, None, s), teacher(t, x))
    # Weights with two times keep theirs, and do not start a network with one.
    torch.nn.init.ones_(student.conditioning.second_time.outer.bias)
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    again = pretrained_weights(str(tmp_path / "student.safetensors"), unet(two_times=True))
    assert torch.equal(again["conditioning.second_time.outer.bias"], torch.ones(32))
    with pytest.raises(UserError, match=r"second_time\.inner\.bias is only in"):
        pretrained_weights(str(tmp_path / "student.safetensors"), unet())


def config(tmp_path, objective="meanflow", options=None, **sections):
    tree = {
        "run": {"root": str(tmp_path)},
        "method": {"objective": objective, "objective_options": options or {}},
        **sections,
    }
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("objective", ["meanflow", "split-meanflow"])
def test_zero_3_is_refused_before_anything_starts(tmp_path, objective):
    with pytest.raises(UserError, match=rf"train\.zero_stage 3: {objective} .*; use stage 1 or 2"):
        check_training(config(tmp_path, objective, train={"zero_stage": 3}))
    check_training(config(tmp_path, objective, train={"zero_stage": 2}))


def test_learned_guidance_needs_classes_and_label_dropout(tmp_path):
    options, conditional = {"guidance": 2.0}, {"class_conditional": True}
    for sections in ({}, {"model": conditional}):
        with pytest.raises(UserError, match=r"guidance 2: it needs model\.class_conditional"):
            check_training(config(tmp_path, options=options, **sections))
    check_training(config(tmp_path, options=options, model=conditional, train={"label_dropout": 0.1}))


@pytest.mark.parametrize("objective", ["meanflow", "split-meanflow"])
def test_a_teacher_must_predict_the_velocity_on_the_same_path(tmp_path, objective):
    teacher = tmp_path / "teacher"
    teacher.mkdir()

    def check(**sections):
        tree = {"run": {"root": str(tmp_path), "name": "teacher"}, **sections}
        (teacher / "config.yaml").write_text(RunConfig.model_validate(tree).model_dump_json())
        check_initial_weights(config(tmp_path, objective, train={"init_from": str(teacher)}))

    check()
    check(method={"objective": "meanflow"})
    with pytest.raises(UserError, match=f"with data-prediction; {objective} starts from a network"):
        check(method={"objective": "data-prediction"})
    with pytest.raises(UserError, match=r"with method\.path cosine, not optimal-transport"):
        check(method={"path": "cosine"})
    with pytest.raises(UserError, match=r"with model\.time_scale 1\.0, not 1000"):
        check(model={"time_scale": 1.0})


@pytest.mark.parametrize("objective", ["meanflow", "split-meanflow"])
@pytest.mark.parametrize("source", ["sit", "dit", "adm"])
def test_published_weights_must_predict_the_velocity_on_the_path_of_the_flow_map(tmp_path, objective, source):
    file = tmp_path / "weights.pt"
    file.touch()

    def check(**method):
        made = config(tmp_path, objective, train={"init_from": str(file), "init_source": source})
        check_initial_weights(
            made.model_copy(update={"method": made.method.model_copy(update=method)}),
        )

    if source == "sit":
        check()
        with pytest.raises(UserError, match=r"init_source sit: its path is .* not cosine"):
            check(path="cosine")
    else:
        with pytest.raises(UserError, match=f"init_source {source}: its network predicts the noise"):
            check()


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({}, {}, None),
        ({"method": {"path_options": {"sigma_min": 0}}, "model": {"dropout": 0.1}}, {}, None),
        ({"method": {"objective": "score-matching"}}, {}, None),  # any network will do without pairs
        ({"method": {"objective": "meanflow"}}, {}, "meanflow, so its network has two times"),
        ({"model": {"channels": 16}}, {"model": {"channels": 32}}, r"model\.channels 16, not 32"),
        ({"model": {"channels": 16}}, {}, None),  # derived later
        ({"model": {"kind": "transformer"}}, {}, r"model\.kind transformer, not unet"),
        ({"model": {"class_conditional": True}}, {}, r"model\.class_conditional True, not False"),
        (
            {"method": {"objective": "score-matching"}},
            "pairs",
            "score-matching, whose prediction is not that",
        ),
        ({"method": {"path": "cosine"}}, "pairs", r"method\.path cosine, not optimal-transport"),
        ({"method": {"path_options": {"sigma_min": 0.1}}}, "pairs", r"path_options \{'sigma_min': 0\.1\}"),
        ({"method": {"path_options": {"sigma_min": 0}}}, "pairs", None),
        ({"method": {"objective": "maximum-likelihood"}}, "pairs", None),
        ({"model": {"time_scale": 1.0}}, "pairs", r"model\.time_scale 1\.0, not 1000"),
    ],
)
def test_a_run_must_have_the_network_of_the_run_that_starts_from_it(tmp_path, teacher, student, message):
    place = tmp_path / "teacher"
    place.mkdir()
    tree = {"run": {"root": str(tmp_path), "name": "teacher"}, **teacher}
    (place / "config.yaml").write_text(RunConfig.model_validate(tree).model_dump_json())
    if student == "pairs":
        student = {"method": {"coupling": "reflow"}, "data": {"pairs": {"samples": "/pairs"}}}
    own = {"run": {"root": str(tmp_path)}, "train": {"init_from": str(place)}, **student}
    check = partial(check_initial_weights, RunConfig.model_validate(own))
    if message is None:
        check()
        return
    with pytest.raises(UserError, match=rf"^train\.init_from: .* was trained with .*{message}[^\n]*$"):
        check()


def test_passes_without_gradients_count_in_the_cost_and_in_the_speed(tmp_path):
    hardware = Cluster(hosts=1, devices=1, peak=1e12, mfu=0.5, store_rate=1e9)
    plain = training_cost(config(tmp_path, "flow-matching"), (1, 8, 8), 10, hardware)
    guided = config(tmp_path, options={"guidance": 2.0, "equal_times": 0.5})
    flow_map = training_cost(guided, (1, 8, 8), 10, hardware)
    # A JVP (two passes) and the network's own velocity for half of the examples, and the guide for all.
    per_pass = flow_map.training_flops / flow_map.forward_flops
    assert (plain.training_flops / plain.forward_flops, per_pass) == (3, 3 + 0.5 * 3 + 1)
    assert flow_map.parameters > plain.parameters
    assert flow_map.seconds / plain.seconds == pytest.approx(flow_map.training_flops / plain.training_flops)
    assert utilization(10, 1e9, 1, None, False, 1.5)["tflops_per_device"] == pytest.approx(0.045)


COMPILED = {
    # The compiler needs a minute for the code of a UNet on a CPU: that one is traced and differentiated only.
    "UNet": (lambda: UNet(2, 1, 8, (1,), 1, (2,), 8, 0.0, True, True, two_times=True), "aot_eager"),
    "MLP": (lambda: MLP(dimensions=4, width=16, layers=2, two_times=True), "inductor"),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("objective", [MeanFlow, SplitMeanFlow])
def test_a_compiled_network_has_the_same_loss_and_gradients(compiler, objective, name):
    make, backend = COMPILED[name]
    pair = objective(OptimalTransport(), equal_times=0.5)
    sample, _ = source("philox-v1", 0.5).draw(batch(0, 8), torch.device("cpu"))
    torch.manual_seed(0)
    network = make()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    compiled = deepcopy(network)
    compiled.compile(dynamic=False, backend=backend)
    gradients = list[list[torch.Tensor]]()
    for each in (network, compiled):
        pair.loss(each, sample).mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
