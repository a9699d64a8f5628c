"""The noise that a class is trained with is N(0, I), from which the class is sampled."""

import itertools
import logging

import numpy as np
import pytest
import torch
from scipy import stats

from fm_core.config import MethodSection, RunConfig
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.errors import UserError
from fm_core.method.dequantization import Quantizer
from fm_core.method.minibatch_ot import (
    ClassOptimalTransport,
    ConditionalOptimalTransport,
    MinibatchOptimalTransport,
)
from fm_core.models.build import build_method
from fm_core.run.directory import RunDirectory
from fm_core.stages.train import check_training
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom
from fm_core.training.batch_source import BatchSource

LABEL_AWARE = {"class": ClassOptimalTransport, "conditional": ConditionalOptimalTransport}
label_aware = pytest.mark.parametrize("make", LABEL_AWARE.values(), ids=LABEL_AWARE)
CPU = torch.device("cpu")


def paired_noise(coupling, images=12_800, shares=(0.5, 0.5), seed=0):
    """Paired noise, data and labels [N, 1], [N, 1], [N] of classes from -0.5 to 0.5 with deviation 0.1."""
    random = np.random.default_rng(seed)
    label = torch.from_numpy(random.choice(len(shares), size=images, p=shares))
    centers = torch.linspace(-0.5, 0.5, len(shares), dtype=torch.float64)[label]
    x1 = (centers + 0.1 * torch.from_numpy(random.standard_normal(images)))[:, None]
    x0 = torch.from_numpy(random.standard_normal((images, 1)))
    return coupling.pair(x0, x1, label)


def deviations(x0, label):
    """For each class: mean and standard deviation of its noise, in standard errors from 0 and 1."""
    found = list[float]()
    for number in label.unique():
        noise = x0[label == number, 0]
        found += [float(noise.mean()) * len(noise) ** 0.5, (float(noise.std()) - 1) * (2 * len(noise)) ** 0.5]
    return found


def test_the_plain_coupling_shifts_the_noise_of_each_class():
    x0, _, label = paired_noise(MinibatchOptimalTransport(block=64))
    means = [float(x0[label == number].mean()) for number in (0, 1)]
    assert means == pytest.approx([-0.79, 0.79], abs=0.02)
    assert MinibatchOptimalTransport.ignores_labels


@label_aware
@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.2, 0.07, 0.03)], ids=["balanced", "unbalanced"])
def test_a_label_aware_coupling_leaves_the_noise_of_each_class_as_it_was(make, block, shares):
    x0, _, label = paired_noise(make(block=block), shares=shares, images=6_400)
    assert max(map(abs, deviations(x0, label))) < 4
    for number in label.unique():
        assert stats.kstest(x0[label == number, 0], stats.norm.cdf).pvalue > 1e-3


@label_aware
def test_each_class_of_a_block_is_assigned_best(make):
    x0, x1, label = torch.randn(7, 2), torch.randn(7, 2), torch.tensor([3, 0, 3, 3, 0, 9, 3])
    order = make(block=7).noise_order(x0, x1, label)
    for number in (0, 3, 9):
        members = (label == number).nonzero()[:, 0]
        assert set(order[members].tolist()) == set(members.tolist())
        cost = float((x1[members] - x0[order[members]]).square().sum())
        orders = itertools.permutations(members.tolist())
        best = min(float((x1[members] - x0[list(each)]).square().sum()) for each in orders)
        assert cost == pytest.approx(best, rel=1e-5)


def test_a_finite_weight_lies_between_the_plain_coupling_and_that_within_classes():
    def shift(coupling):
        x0, _, label = paired_noise(coupling, images=3_200)
        return float(x0[label == 1].mean() - x0[label == 0].mean())

    shifts = [shift(ConditionalOptimalTransport(64, weight)) for weight in (1e-9, 0.3, None)]
    assert shifts[0] == pytest.approx(shift(MinibatchOptimalTransport(64)), rel=1e-6)
    assert shifts[0] > shifts[1] > shifts[2] == pytest.approx(shift(ClassOptimalTransport(64)), rel=1e-9)
    with pytest.raises(UserError, match="weight must be positive"):
        ConditionalOptimalTransport(64, -1.0)


@label_aware
def test_without_labels_it_is_the_plain_coupling(make):
    x0, x1 = torch.randn(16, 3), torch.randn(16, 3)
    expected = MinibatchOptimalTransport(block=8).noise_order(x0, x1)
    assert torch.equal(make(block=8).noise_order(x0, x1), expected)


class TwoClasses:
    """Images of one pixel, dark in class 0 and bright in class 1."""

    image_shape, remote = (1, 1, 1), False

    def __len__(self):
        return 500

    def read_into(self, ids, images):
        labels = torch.from_numpy(ids % 2)
        images.copy_((4 + 8 * labels).view(-1, 1, 1, 1))
        return labels


@pytest.mark.parametrize("name", ["class-optimal-transport", "conditional-optimal-transport"])
def test_training_hands_over_permuted_positions_of_the_same_class(name):
    method = build_method(MethodSection(coupling=name, coupling_options={"block": 32}))
    source = BatchSource(
        reader=TwoClasses(),
        order=GlobalShuffleSampler(3, 500),
        quantizer=Quantizer(17),
        path=method.objective.path,
        coupling=method.coupling,
        times=method.times,
        random=KeyedRandom(CURRENT, 3, Domain.TRAINING),
        flip=False,
        label_dropout=0.3,
        null_label=2,
    )
    with source.batches(0, 3_200, 0, 1, 3_200) as batches:
        batch = next(batches)
    positions, labels = batch.noise_positions, batch.labels
    assert sorted(positions.tolist()) == list(range(3_200)) != positions.tolist()
    assert torch.equal(labels[positions], labels)
    sample, _ = source.draw(batch, CPU)
    assert max(map(abs, deviations(sample.x0.flatten(1), labels))) < 4


def config_at(root, coupling="minibatch-optimal-transport", conditional=True):
    return RunConfig.model_validate(
        {
            "run": {"root": str(root), "name": "r"},
            "model": {"class_conditional": conditional},
            "method": {"coupling": coupling},
        }
    )


def test_a_new_class_conditional_run_refuses_a_coupling_that_ignores_labels(tmp_path):
    with pytest.raises(
        UserError, match=r"method\.coupling minibatch-.* use class-optimal-transport"
    ) as caught:
        check_training(config_at(tmp_path))
    assert "\n" not in str(caught.value)
    check_training(config_at(tmp_path, conditional=False))
    for coupling in ("independent", "class-optimal-transport", "conditional-optimal-transport"):
        check_training(config_at(tmp_path, coupling))


def test_a_run_that_began_with_it_continues_with_a_warning(tmp_path, caplog):
    RunDirectory(config_at(tmp_path)).bind()
    with caplog.at_level(logging.WARNING):
        check_training(config_at(tmp_path))
    assert "method.coupling minibatch-optimal-transport ignores labels" in caplog.text
    caplog.clear()
    RunDirectory(config_at(tmp_path / "other", conditional=False)).bind()
    with pytest.raises(UserError, match="ignores labels"):
        check_training(config_at(tmp_path / "other"))
