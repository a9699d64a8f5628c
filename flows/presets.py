"""The project's configuration files as types of flow parameters.

A flow with such a parameter shows the values of infra/configs/<name>.yaml in its form, rejects unknown keys
and wrong types when a run is created, and uses the file's values for absent keys.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fm_core.config import RunConfig, config_class, load_config

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "infra" / "configs"
if not CONFIGS.is_dir():
    raise ImportError(
        f"the flows read their presets from {CONFIGS}, which does not exist: they run from a clone of the "
        "project, installed with pip install --editable"
    )


def preset(name: str) -> type[RunConfig]:
    """RunConfig with the defaults of infra/configs/<name>.yaml."""
    return config_class(load_config(CONFIGS / f"{name}.yaml"))


if TYPE_CHECKING:
    Checkerboard = Digits = ImageNet32 = ImageNet64 = RunConfig
    ReproduceCifar10 = ReproduceDigits = ReproduceImageNet32 = ReproduceImageNet64 = RunConfig
else:
    Checkerboard = preset("checkerboard")
    Digits = preset("digits")
    ImageNet32 = preset("imagenet32")
    ImageNet64 = preset("imagenet64")
    ReproduceCifar10 = preset("reproduce-cifar10")
    ReproduceDigits = preset("reproduce-digits")
    ReproduceImageNet32 = preset("reproduce-imagenet32")
    ReproduceImageNet64 = preset("reproduce-imagenet64")

CHECKERBOARD = Checkerboard()
DIGITS = Digits()
IMAGENET32 = ImageNet32()
IMAGENET64 = ImageNet64()
REPRODUCE_CIFAR10 = ReproduceCifar10()
REPRODUCE_DIGITS = ReproduceDigits()
REPRODUCE_IMAGENET32 = ReproduceImageNet32()
REPRODUCE_IMAGENET64 = ReproduceImageNet64()
