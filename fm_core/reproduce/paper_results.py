"""The paper's published results and settings, and how a comparison deviates from them.

Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, tables 1 and 3. NFE is for dopri5 with
tolerance 1e-5. Published numbers are shown next to measured numbers, never in the same table.
"""

from collections.abc import Mapping
from typing import Any

from fm_core.method.paths import OptimalTransport
from fm_core.method.registry import path_named

Row = tuple[float, float, int]

TABLE_1: dict[str, dict[str, Row]] = {
    "cifar10": {
        "DDPM": (3.12, 7.48, 274),
        "Score Matching": (3.16, 19.94, 242),
        "ScoreFlow": (3.09, 20.78, 428),
        "FM-Dif": (3.10, 8.06, 183),
        "FM-OT": (2.99, 6.35, 142),
    },
    "imagenet32": {
        "DDPM": (3.54, 6.99, 262),
        "Score Matching": (3.56, 5.68, 178),
        "ScoreFlow": (3.55, 14.14, 195),
        "FM-Dif": (3.54, 6.37, 193),
        "FM-OT": (3.53, 5.02, 122),
    },
    "imagenet64": {
        "DDPM": (3.32, 17.36, 264),
        "Score Matching": (3.40, 19.74, 441),
        "ScoreFlow": (3.36, 24.95, 601),
        "FM-Dif": (3.33, 16.88, 187),
        "FM-OT": (3.31, 14.45, 138),
    },
}
"""Data set -> objective -> (bits/dim, FID, NFE)."""

TABLE_3: dict[str, tuple[int, int, str, str]] = {
    "cifar10": (256, 391_000, "5e-04, linear decay after warm-up", "fp32"),
    "imagenet32": (1_024, 250_000, "1e-04, linear decay after warm-up", "fp32"),
    "imagenet64": (2_048, 157_000, "1e-04, constant", "16-bit mixed"),
}
"""Data set -> (batch, iterations, learning rate, precision)."""

DRAWS = {"cifar10": 50, "imagenet32": 15, "imagenet64": 10}
"""K, the number of dequantization draws per image in the published bits/dim."""

NOT_STATED = "not stated"
HEADS = "64, and 4 heads: both cannot hold"
UNKNOWN_DATA_SET = "not among its data sets"


def table_key(data_name: str) -> str:
    """The key of a data set in the tables of this module."""
    return data_name.lower().replace("-", "").replace("_", "")


def paper_results(data_name: str) -> dict[str, Row] | None:
    """The paper's rows for a data set of this name (cifar10, imagenet32, imagenet64); None for others."""
    return TABLE_1.get(table_key(data_name))


def training_budget(data_name: str) -> str:
    """Number of images that the paper's networks of a data set were trained on, as text."""
    batch, steps, _, _ = TABLE_3[table_key(data_name)]
    return f"{batch * steps:,} images ({steps:,} iterations of {batch:,})"


def deviations(config: Mapping[str, Any]) -> list[list[str]]:
    """Settings of a comparison next to the paper's settings, including those that the paper does not state.

    `config` is the configuration as plain values; a row is (setting, value here, value in the paper).
    """
    train, evaluate, sample = config["train"], config["evaluate"], config["sample"]
    likelihood = evaluate["likelihood"]
    steps = -(-train["images"] // train["global_batch"])
    decays = ", ".join(f"decay {decay}" for decay in train["ema_decays"]) or "none"
    budget, rate, precision = _paper_settings(config["data"]["name"])
    return [
        ["batch x iterations", f"{train['global_batch']:,} x {steps:,}", budget],
        ["learning rate", f"{train['learning_rate']:g}, {train['schedule']}", rate],
        ["precision", str(train["precision"]), precision],
        ["channels of an attention head", str(config["model"]["head_channels"]), HEADS],
        ["gradient clipping", str(train["gradient_clip"]), NOT_STATED],
        ["horizontal flips", "yes" if config["data"]["horizontal_flip"] else "no", NOT_STATED],
        ["moving average of the weights", decays, "not mentioned"],
        ["σ_min of the OT path", _sigma_min(config["reproduce"]["cells"]), NOT_STATED],
        ["features of the Fréchet distance", str(evaluate["features"]), "InceptionV3, TensorFlow-GAN"],
        ["samples of the Fréchet distance", f"{sample['images']:,}", NOT_STATED],
        ["dequantization draws K", _draws(likelihood["draws"]), "50 (CIFAR-10), 15 (ImageNet-32), 10 (-64)"],
        ["images behind bits/dim", f"{likelihood['images']:,} validation images", "the test set (table 4)"],
        ["tolerance of bits/dim", f"{likelihood['rtol']:g}", "1e-05"],
    ]


def _draws(draws: int) -> str:
    """Values of K in the columns of bits/dim."""
    return f"1 and {draws}, a column each" if draws > 1 else "1"


def _paper_settings(data_name: str) -> tuple[str, str, str]:
    """Batch and iterations, learning rate, and precision in the paper."""
    row = TABLE_3.get(table_key(data_name))
    if row is None:
        return UNKNOWN_DATA_SET, UNKNOWN_DATA_SET, UNKNOWN_DATA_SET
    batch, steps, rate, precision = row
    return f"{batch:,} x {steps:,}", rate, precision


def _sigma_min(experiments: list[Mapping[str, Any]]) -> str:
    paths = [path_named(section["path"], section["path_options"]) for section in experiments]
    values = sorted({path.sigma_min for path in paths if isinstance(path, OptimalTransport)})
    return ", ".join(f"{sigma:g}" for sigma in values) or "no such path here"
