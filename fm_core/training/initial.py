"""Weights to start from."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from fm_core.data.store import Store
from fm_core.errors import UserError
from fm_core.models.adm_weights import AttentionOrder, from_adm, is_adm
from fm_core.models.unet import UNet
from fm_core.training.committed import COMPLETE


def initial_weights(
    where: str, network: nn.Module, attention: AttentionOrder = "legacy"
) -> dict[str, Tensor]:
    """Weights from a .safetensors file (a path or URL), or the first average of a run's newest checkpoint.

    A file with the names of guided-diffusion's UNet is converted; `attention` is its order of heads.
    Raises UserError, naming the first tensor that does not fit, or what is missing.
    """
    path = Path(where)
    file = _newest_average(path) if path.is_dir() else where
    try:
        folder, _, name = str(file).rpartition("/")
        weights = load(Store.at(folder).read_bytes(name)) if "://" in where else load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"train.init_from: {file} cannot be read: {error}") from None
    if isinstance(network, UNet) and is_adm(weights):
        try:
            return from_adm(weights, network, attention)
        except ValueError as error:
            raise UserError(f"train.init_from: {file}: {error}") from None
    wanted = network.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            raise UserError(
                f"train.init_from: {name} is {'missing from' if name in wanted else 'only in'} {file}"
            )
        if weights[name].shape != wanted[name].shape:
            shapes = f"{list(weights[name].shape)} there and {list(wanted[name].shape)} here"
            raise UserError(f"train.init_from: {name} is {shapes}; {file} is of another network")
    return weights


def _newest_average(run: Path) -> Path:
    checkpoints = sorted(mark.parent for mark in run.glob(f"train/checkpoints/step-*/{COMPLETE}"))
    averages = sorted(checkpoints[-1].glob("ema-*.safetensors")) if checkpoints else []
    if not averages:
        raise UserError(
            f"train.init_from: {run} has no complete checkpoint; name a run directory or a .safetensors file"
        )
    return averages[0]
