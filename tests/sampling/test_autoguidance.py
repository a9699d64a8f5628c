"""Guidance by a weaker model that sample.guide names, and in an interval of t."""

import shutil

import pytest
import torch

from fm_core import load
from fm_core.config import dump_yaml, parse_config
from fm_core.errors import UserError
from fm_core.launch.worker_main import Rank
from fm_core.method.ode import Solver
from fm_core.models.flops import flops_per_image
from fm_core.sampling.checkpoint_source import PINNED_GUIDE, checkpoint_step, load_model, weights_file
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.guide_model import guide_file, guide_record, guided_by, with_guide
from fm_core.sampling.sample_protocol import protocol_of, sample_key
from fm_core.sampling.sample_store import SampleSet
from fm_core.sampling.sample_worker import sample as sample_rank
from fm_core.stages import sample as sample_stage
from fm_core.storage.keyed_random import CURRENT
from tests.support.random_checkpoint import CPU, SHAPE, checkpoint, config_at

EULER = Solver("euler", steps=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run with checkpoints of steps 3 and 7, and a run with another architecture at `other/r`."""
    root = tmp_path_factory.mktemp("runs")
    config = config_at(root)
    for step in (3, 7):
        checkpoint(config, step=step, seed=step, train={"label_dropout": 0.0})
    other = config_at(root / "other")
    model = other.model.model_copy(update={"residual_blocks": 2, "class_conditional": False})
    other = other.model_copy(update={"model": model})
    checkpoint(other, step=5, seed=5)
    (root / "other" / "r" / "config.yaml").write_text(dump_yaml(other))
    return root


def guided_config(root, guide, **keys):
    return config_at(root, guidance=2.0, guide=guide, steps=5, **keys)


def opened(config):
    model = load_model(weights_file(config, checkpoint_step(config)), CPU, config)
    return with_guide(model, config, CPU)


def guides(root):
    other = root / "other" / "r"
    return {
        "an earlier checkpoint": ({"step": 3}, 3, True),
        "another run": ({"run": str(other)}, 5, False),
        "weights of another run": ({"run": str(other), "weights": "ema-0.999", "step": 5}, 5, False),
        "a file": ({"run": str(weights_file(config_at(root, step=3), 3))}, 3, True),
    }


def test_the_weaker_model_is_another_run_or_an_earlier_checkpoint(root):
    x, t, labels = torch.randn(3, *SHAPE), torch.tensor(0.3), torch.tensor([1, 2, 3])
    for name, (guide, step, conditional) in guides(root).items():
        config = guided_config(root, guide)
        model = opened(config)
        assert model.guide.step == step, name
        draw = Draw(EULER, 1, guidance=2.0)
        draw.check(model)
        strong = model.objective.velocity(model.network, labels)(t, x)
        weak = model.guide.objective.velocity(model.guide.network, labels if conditional else None)(t, x)
        torch.testing.assert_close(draw.velocity(model, labels)(t, x), weak + 2.0 * (strong - weak))
        record = guide_record(config)
        assert record == model.guide_record == {"weights_sha256": model.guide.weights_sha256, "step": step}


def test_it_is_in_the_protocol_and_absence_means_as_before(root):
    plain, config = config_at(root, steps=5), guided_config(root, {"step": 3})
    record = guide_record(config)
    before = protocol_of(plain, "w", CURRENT)
    after = protocol_of(config, "w", CURRENT, record)
    assert after == {**before, "guidance": 2.0, "guide": record}
    assert "-autoguided-2-" in sample_key(config, after)
    limited = config_at(root, steps=5, guidance=2.0, guidance_interval=(0.2, 0.8))
    assert protocol_of(limited, "w", CURRENT) == {**before, "guidance": 2.0, "guidance_interval": [0.2, 0.8]}
    assert "-guided-2-in-0.2-0.8-" in sample_key(limited, protocol_of(limited, "w", CURRENT))
    unguided = config_at(root, steps=5, guidance=1.0, guidance_interval=(0.2, 0.8), guide={"step": 3})
    assert guide_record(unguided) is None
    assert protocol_of(unguided, "w", CURRENT) == before


def test_scale_1_gives_the_images_of_no_guidance_to_the_bit(root):
    model = load_model(weights_file(config_at(root), 7), CPU)
    guide = load_model(weights_file(config_at(root), 3), CPU)
    plain = generate(model, Draw(EULER, 1), 0, 4, CPU)
    draw = Draw(EULER, 1, guidance_interval=(0.2, 0.8))
    for each in (model, guided_by(model, guide)):
        same = generate(each, draw, 0, 4, CPU)
        assert torch.equal(same.images, plain.images)
        assert (same.nfe, same.guide_nfe) == (5, 0)


def test_the_stage_counts_evaluations_of_each_network_and_their_flops(root):
    config = guided_config(
        root, {"run": str(root / "other" / "r")}, guidance_interval=(0.2, 0.6), images=4, trajectories=0
    )
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"kind": "debug"})})
    model = opened(config)
    protocol = protocol_of(config, model.weights_sha256, model.generator, model.guide_record)
    samples = SampleSet(config, 7, protocol)
    samples.control.mkdir(parents=True)
    shutil.copy(guide_file(config), samples.control / PINNED_GUIDE)
    sample_rank(config, Rank(0, 1, 0, samples.control, "job"))
    shard = samples.shard(0)
    assert (shard.nfe, shard.guide_nfe, shard.forwards) == (5 + 3, 3, 2)  # guided at 0.2, 0.4 and 0.6
    sample_stage._finish(samples, model, 7, ["zero", "one"])
    nfe = samples.done()["nfe"]
    strong, weak = (flops_per_image(each.network, SHAPE) for each in (model, model.guide))
    assert weak != strong
    assert (nfe["mean"], nfe["guide_mean"]) == (8, 3)
    assert nfe["flops_per_image"] == pytest.approx(5 * strong + 3 * weak)
    assert samples.done()["protocol"]["guide"]["step"] == 5
    assert samples.store.size("grid.png")


def test_the_python_api_guides_by_another_model(root):
    strong = load(weights_file(config_at(root), 7))
    weak = load(weights_file(config_at(root), 3))
    keys = {"solver": "euler", "steps": 3}
    plain = strong.sample(2, **keys)
    assert torch.equal(strong.sample(2, guide=weak, **keys), plain)
    guided = strong.sample(2, guide=weak, guidance=3.0, **keys)
    assert not torch.equal(guided, plain)
    assert torch.equal(
        strong.sample(2, guide=weak, guidance=3.0, guidance_interval=(0.9, 1.0), **keys), plain
    )


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"step": 7}, "these are the weights that are to be guided"),
        ({"step": 4}, "sample.step 4: .* has 3, 7"),
        ({"run": "/nowhere/model.safetensors"}, "does not exist"),
        ({"run": "/nowhere/model.safetensors", "step": 3}, r"sample.guide.step: .* is not a run directory"),
    ],
)
def test_a_weaker_model_that_is_not_there_or_is_the_model_itself_is_refused(root, guide, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(guided_config(root, guide))
    assert "\n" not in str(caught.value)


def test_a_model_of_other_images_paths_or_classes_cannot_guide(root, tmp_path):
    model = load_model(weights_file(config_at(root), 7), CPU)
    for name, recipe, message in (
        ("levels", {"levels": 256}, "intensity levels of the weaker model: 256, not 17"),
        ("path", {"method": {"path": "cosine"}}, "path of the weaker model: cosine, not optimal-transport"),
        (
            "order",
            {"data": {"name": "d", "version": "v", "label_order": "sorted"}},
            "other classes: 10 in the",
        ),
    ):
        folder = checkpoint(config_at(tmp_path / name), seed=1, **recipe)
        with pytest.raises(UserError, match=rf"sample.guide: .*{message}"):
            guided_by(model, load_model(folder / "raw.safetensors", CPU))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"guidance_interval": [0.2, 0.8]}, "sample.guidance_interval does nothing without sample.guidance"),
        ({"guide": {"step": 3}}, "sample.guide does nothing without sample.guidance"),
        ({"guidance": 2, "guidance_interval": [0.8, 0.2]}, "its ends must increase"),
        ({"guidance": 2, "guidance_interval": [-0.1, 0.2]}, "within 0 .. 1"),
        ({"guidance": 2, "guide": {"scale": 2}}, "sample.guide.scale: unknown key"),
    ],
)
def test_keys_that_do_nothing_or_make_no_sense_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        parse_config({"sample": keys}, where="run.yaml")
