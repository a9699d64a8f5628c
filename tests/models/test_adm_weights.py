"""Converted weights of torchcfm's UNet compute what torchcfm computes."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from fm_core.errors import UserError
from fm_core.models.adm_weights import from_adm, is_adm
from fm_core.models.unet import UNet
from fm_core.training.pretrained import pretrained_weights
from tests.support import ROOT

PLAIN = {"scale_shift": False, "resample": False, "classes": 0, "new_order": False}
CASES = {
    "plain": PLAIN,
    "paper": {"scale_shift": True, "resample": True, "classes": 0, "new_order": False},
    "classes-new-order": {"scale_shift": True, "resample": False, "classes": 5, "new_order": True},
}


def ours(case, channels=128, time_scale=1.0):
    return UNet(
        image_size=8,
        image_channels=3,
        channels=channels,
        channel_multipliers=(1, 2),
        residual_blocks=1,
        attention_resolutions=(4,),
        head_channels=64,
        dropout=0.0,
        scale_shift=case["scale_shift"],
        resample_with_residual_blocks=case["resample"],
        classes=case["classes"],
        time_scale=time_scale,
    ).eval()


@pytest.fixture(scope="module")
def theirs(public_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public-unets")
    script = [public_python, "-m", "tests.support.public_unets"]
    subprocess.run([*script, folder, json.dumps(CASES)], cwd=ROOT, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_converted_weights_compute_what_torchcfm_computes(theirs, name):
    case = CASES[name]
    weights = load_file(theirs / f"{name}.safetensors")
    answers = load_file(theirs / f"{name}-answers.safetensors")
    order = "new" if case["new_order"] else "legacy"
    label = answers.get("label")
    expected = answers["y"]
    assert is_adm(weights)
    assert expected.std() > 0.1
    for time_scale, t in ((1.0, answers["t"]), (1000.0, answers["t"] / 1000)):
        network = ours(case, time_scale=time_scale)
        network.load_state_dict(from_adm(weights, network, order))
        with torch.no_grad():
            torch.testing.assert_close(network(t, answers["x"], label), expected, rtol=1e-4, atol=1e-4)
    there = pretrained_weights(str(theirs / f"{name}.safetensors"), network, order)
    assert all(torch.equal(there[key], weight) for key, weight in network.state_dict().items())
    other = from_adm(weights, network, "legacy" if order == "new" else "new")
    network.load_state_dict(other)
    with torch.no_grad():
        assert (network(t, answers["x"], label) - expected).abs().max() > 1e-2


def test_what_does_not_fit_is_refused_by_name(theirs):
    weights = load_file(theirs / "plain.safetensors")
    with pytest.raises(ValueError, match=r"middle_block\.1\.norm\.bias is missing"):
        from_adm({name: w for name, w in weights.items() if name != "middle_block.1.norm.bias"}, ours(PLAIN))
    with pytest.raises(ValueError, match=r"label_emb\.weight has no place"):
        from_adm({**weights, "label_emb.weight": torch.zeros(2, 512)}, ours(PLAIN))
    with pytest.raises(ValueError, match=r"in the weights and .* in the network"):
        from_adm(weights, ours({**PLAIN, "scale_shift": True}))
    with pytest.raises(UserError, match=r"train.init_from: .*plain.safetensors: .* in the network"):
        pretrained_weights(str(theirs / "plain.safetensors"), ours({**PLAIN, "scale_shift": True}))


def test_a_network_with_other_groups_is_refused():
    with pytest.raises(ValueError, match="16 groups and the public networks have 32"):
        from_adm({}, ours(PLAIN, channels=64))
