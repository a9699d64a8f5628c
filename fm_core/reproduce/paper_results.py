"""The paper's own numbers, to stand beside measured ones and never among them.

Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, table 1; NFE is dopri5's at 1e-5.
"""

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
"""By data set, by objective: (bits/dim, FID, NFE)."""

DRAWS = {"cifar10": 50, "imagenet32": 15, "imagenet64": 10}
"""K, the dequantisation draws of each image behind the published bits/dim."""


TABLE_3: dict[str, tuple[int, int, str, str]] = {
    "cifar10": (256, 391_000, "5e-04, linear decay after warm-up", "fp32"),
    "imagenet32": (1_024, 250_000, "1e-04, linear decay after warm-up", "fp32"),
    "imagenet64": (2_048, 157_000, "1e-04, constant", "16-bit mixed"),
}
"""By data set: batch, iterations, learning rate, precision."""


def key_of(data_name: str) -> str:
    """How the tables here call a data set."""
    return data_name.lower().replace("-", "").replace("_", "")


def paper_results(data_name: str) -> dict[str, Row] | None:
    """The paper's rows for a data set of this name (cifar10, imagenet32, imagenet64); None for others."""
    return TABLE_1.get(key_of(data_name))
