"""DINOv2 features compared with a numpy implementation, on random weights with the published tensor names."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.special import erf

from fm_core.config import EvaluateSection
from fm_core.errors import UserError
from fm_core.evaluation.features.dinov2 import SIDE, dinov2_network, preprocess
from fm_core.evaluation.features.open_extractor import open_extractor

WIDTH, DEPTH, HEADS, PATCH, GRID = 128, 2, 2, 56, 3
"""Two heads of 64 channels; 3 x 3 position embeddings for an input of 4 x 4 patches."""


@pytest.fixture(scope="module")
def weights():
    """Tensors as in facebookresearch/dinov2 and timm, except for their sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in (f"blocks.{number}." for number in range(DEPTH)):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            shapes |= {f"{block}{name}.weight": (outputs, inputs), f"{block}{name}.bias": (outputs,)}
        shapes |= {f"{block}{name}": (WIDTH,) for name in ("ls1.gamma", "ls2.gamma")}
        shapes |= {f"{block}norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


@pytest.fixture
def files(weights, tmp_path):
    """Weights files in facebook's format, with the mask token of its training, and in timm's format."""
    torch.save({**weights, "mask_token": torch.zeros(1, WIDTH)}, tmp_path / "facebook.pth")
    save_file(weights, tmp_path / "timm.safetensors")
    return tmp_path


def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def cubic(distance):
    """Keys' cubic kernel with a = -0.75."""
    x, a = np.abs(distance), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0))


def interpolation(old, new):
    """Matrix [new, old] for bicubic interpolation at the positions that the published code uses."""
    at = (np.arange(new) + 0.5) * old / (new + 0.1) - 0.5
    matrix = np.zeros((new, old))
    for row, place in enumerate(at):
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[row, np.clip(tap, 0, old - 1)] += cubic(place - tap)
    return matrix


def formula(images, w):
    """Class token of one image after the last normalization, in float64."""
    w = {name: tensor.double().numpy() for name, tensor in w.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normalize(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    side, tokens = SIDE // PATCH, []
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    resized = np.asarray(Image.fromarray(images).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    x = (resized / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    for row in range(side):
        for column in range(side):
            patch = x[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            tokens.append(np.einsum("hwc,kchw->k", patch, kernel) + bias)
    matrix, grid = interpolation(GRID, side), w["pos_embed"][0, 1:].reshape(GRID, GRID, WIDTH)
    positions = np.einsum("ia,jb,abk->ijk", matrix, matrix, grid).reshape(-1, WIDTH)
    x = np.concatenate([w["cls_token"][0] + w["pos_embed"][0, :1], np.array(tokens) + positions])
    for block in (f"blocks.{number}." for number in range(DEPTH)):
        q, k, v = np.split(linear(normalize(x, f"{block}norm1"), f"{block}attn.qkv"), 3, axis=-1)
        mixed = []
        for head in (slice(h * 64, (h + 1) * 64) for h in range(HEADS)):
            scores = np.exp(q[:, head] @ k[:, head].T / 8)
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, head])
        x = x + w[f"{block}ls1.gamma"] * linear(np.concatenate(mixed, -1), f"{block}attn.proj")
        hidden = linear(normalize(x, f"{block}norm2"), f"{block}mlp.fc1")
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = x + w[f"{block}ls2.gamma"] * linear(hidden, f"{block}mlp.fc2")
    return normalize(x[0], "norm")


@pytest.mark.parametrize("name", ["facebook.pth", "timm.safetensors"])
def test_its_features_are_the_formula_and_the_hash_is_recorded(name, files, weights, manifest, digits):
    settings = EvaluateSection(features="dinov2", weights=str(files / name))
    color = manifest.model_copy(update={"levels": 256, "image_shape": (3, 32, 32)})
    extractor = open_extractor(settings, digits.data.root, color, torch.device("cpu"), lambda *_: None)
    features, probabilities = extractor(as_tensor(pictures()))
    expected = np.stack([formula(image, weights) for image in pictures()])
    assert probabilities is None
    assert np.abs(features.numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert extractor.sha256 == hashlib.sha256((files / name).read_bytes()).hexdigest()
    assert extractor.protocol == {"resize": "Pillow bicubic to 224 in 8 bits"}


def test_the_input_is_resized_in_8_bits_and_normalized():
    x = preprocess(torch.full((1, 3, 40, 40), 255, dtype=torch.uint8), SIDE)
    assert x.shape == (1, 3, SIDE, SIDE)
    assert x[0, :, 5, 5].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    )


@pytest.mark.parametrize("change", ["registers", "other", "pickle"])
def test_other_weights_are_refused_in_one_line(change, files, weights):
    path = files / "x.pth"
    if change == "pickle":
        path.write_bytes(b"nothing")
    else:
        extra = {"register_tokens": torch.zeros(1, 4, WIDTH)}
        torch.save({**weights, **extra} if change == "registers" else {"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="does not contain DINOv2 weights without registers") as caught:
        dinov2_network(path)
    assert "\n" not in str(caught.value)


def test_weights_are_asked_for(manifest, digits):
    settings = EvaluateSection(features="dinov2")
    with pytest.raises(
        UserError, match=r"needs evaluate\.weights: path or URL of dinov2_vitl14_pretrain\.pth"
    ):
        open_extractor(settings, digits.data.root, manifest, torch.device("cpu"), lambda *_: None)
