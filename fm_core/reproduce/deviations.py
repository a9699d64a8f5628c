"""What a comparison does otherwise than the paper, or decides where the paper is silent."""

from collections.abc import Mapping
from typing import Any

from fm_core.method.paths import OptimalTransport
from fm_core.method.registry import path_named
from fm_core.reproduce.paper_results import TABLE_3, key_of

SILENT = "not stated"
NOT_THERE = "not among its data sets"


def deviations(config: Mapping[str, Any]) -> list[list[str]]:
    """Rows of (what, here, in the paper) for a configuration as plain values."""
    train, evaluate, sample = config["train"], config["evaluate"], config["sample"]
    likelihood = evaluate["likelihood"]
    budget, rate, precision = _table_3(config["data"]["name"])
    return [
        ["batch x iterations", f"{train['global_batch']:,} x {_steps(train):,}", budget],
        ["learning rate", f"{train['learning_rate']:g}, {train['schedule']}", rate],
        ["precision", str(train["precision"]), precision],
        ["gradient clipping", str(train["gradient_clip"]), SILENT],
        ["horizontal flips", "yes" if config["data"]["horizontal_flip"] else "no", SILENT],
        ["moving average of the weights", _decays(train), "not mentioned"],
        ["σ_min of the OT path", _sigma_min(config["reproduce"]["cells"]), SILENT],
        ["features of the Fréchet distance", str(evaluate["features"]), "InceptionV3, TensorFlow-GAN"],
        ["samples of the Fréchet distance", f"{sample['images']:,}", SILENT],
        ["dequantisation draws K", str(likelihood["draws"]), "50 (CIFAR-10), 15 (ImageNet-32), 10 (-64)"],
        ["images behind bits/dim", f"{likelihood['images']:,}", SILENT],
        ["tolerance of bits/dim", f"{likelihood['rtol']:g}", "1e-05"],
    ]


def trained(data_name: str) -> str:
    """How many images the paper's networks of a data set have seen, in words."""
    batch, steps, _, _ = TABLE_3[key_of(data_name)]
    return f"{batch * steps:,} images ({steps:,} iterations of {batch:,})"


def _table_3(data_name: str) -> tuple[str, str, str]:
    found = TABLE_3.get(key_of(data_name))
    if found is None:
        return NOT_THERE, NOT_THERE, NOT_THERE
    batch, steps, rate, precision = found
    return f"{batch:,} x {steps:,}", rate, precision


def _steps(train: Mapping[str, Any]) -> int:
    return -(-train["images"] // train["global_batch"])


def _decays(train: Mapping[str, Any]) -> str:
    return ", ".join(f"decay {decay}" for decay in train["ema_decays"]) or "none"


def _sigma_min(cells: list[Mapping[str, Any]]) -> str:
    paths = [path_named(cell["path"], cell["path_options"]) for cell in cells]
    found = sorted({path.sigma_min for path in paths if isinstance(path, OptimalTransport)})
    return ", ".join(f"{sigma:g}" for sigma in found) or "no such path here"
