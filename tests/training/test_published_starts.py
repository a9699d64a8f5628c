"""Training starts from published weights: their conversion on the way, flow maps, and what is refused."""

import argparse
from functools import partial

import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.meanflow import MeanFlow, SplitMeanFlow
from fm_core.method.paths import OptimalTransport
from fm_core.models.published_weights import convert_published
from fm_core.training.pretrained import pretrained_weights
from tests.support.public_layouts import PublicTransformer
from tests.support.published_networks import (
    CLASSES,
    public_transformer,
    public_unet,
    relative,
    transformer,
    unet,
)


@pytest.fixture
def file(tmp_path):
    torch.save({"ema": public_transformer().state_dict(), "args": argparse.Namespace()}, tmp_path / "sit.pt")
    return str(tmp_path / "sit.pt")


def test_it_starts_from_published_weights(file):
    network = transformer()
    network.load_state_dict(pretrained_weights(file, network, source="sit"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8])
    label = torch.tensor([1, CLASSES])
    with torch.no_grad():
        expected = public_transformer()(x, t, label)[:, :4]
        assert relative(network(t, x, label), expected) < 1e-5


def test_mistakes_are_one_line(file, tmp_path):
    for source, message in ((None, "must be sit or dit"), ("dit", "time_scale 1000")):
        with pytest.raises(UserError, match=rf"^train\.init_from: .*sit\.pt: .*{message}[^\n]*$"):
            pretrained_weights(file, transformer(), source=source)
    torch.save(transformer().state_dict(), tmp_path / "ours.pt")
    ours = str(tmp_path / "ours.pt")
    assert pretrained_weights(ours, transformer()).keys() == transformer().state_dict().keys()
    with pytest.raises(UserError, match=r"ours\.pt has no tensors of a published network; remove train"):
        pretrained_weights(ours, transformer(), source="sit")
    (tmp_path / "bad.pt").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"^train\.init_from: .*bad\.pt cannot be read: [^\n]*$"):
        pretrained_weights(str(tmp_path / "bad.pt"), transformer())


def test_a_network_of_a_published_size_has_its_number_of_heads():
    with torch.device("meta"):
        weights = PublicTransformer(8, 4, 4, 384, 12, 6, 10, False).state_dict()
        network = transformer(patch=4, width=384, depth=12, heads=12, classes=10)
    with pytest.raises(ValueError, match=r"^model\.heads 12: .* width 384 and depth 12 has 6$"):
        convert_published(weights, network, "sit")


@pytest.mark.parametrize("objective", [MeanFlow, SplitMeanFlow])
@pytest.mark.parametrize("source", ["sit", "adm"])
def test_published_weights_start_a_flow_map_that_ignores_its_second_time(source, objective):
    two_times = objective(OptimalTransport()).two_times
    if source == "sit":
        weights, make = public_transformer().state_dict(), transformer
    else:
        weights, make = public_unet(128).state_dict(), partial(unet, 128)
    plain, flow_map = make(), make(two_times=two_times)
    for network in (plain, flow_map):
        network.load_state_dict(convert_published(weights, network, source))
    x = torch.randn(2, *plain.image_shape)
    t, label = torch.tensor([0.2, 0.8]), torch.tensor([1, 3])
    with torch.no_grad():
        assert torch.equal(flow_map(t, x, label, torch.ones(2)), plain(t, x, label))
