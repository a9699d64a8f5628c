"""Weights to start from."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fm_core.checkpoint.format import COMPLETE, tensors_file
from fm_core.checkpoint.uploader import remote_files, remote_steps
from fm_core.errors import UserError
from fm_core.models.adm_weights import AttentionOrder, from_adm, is_adm
from fm_core.models.unet import UNet
from fm_core.run.directory import RunDirectory, recorded_config, step_name
from fm_core.storage.store import Store


def pretrained_weights(
    where: str, network: nn.Module, attention: AttentionOrder = "legacy"
) -> dict[str, Tensor]:
    """Weights from a .safetensors file (a path or URL), or the first average of a run's newest checkpoint.

    A file with the names of guided-diffusion's UNet is converted; `attention` is its order of heads.
    Raises UserError, naming the first tensor that does not fit, or what is missing.
    """
    file, sha256 = _average_of(Path(where)) if Path(where).is_dir() else (where, None)
    try:
        folder, _, name = file.rpartition("/")
        content = Store.at(folder).read_bytes(name) if "://" in file else Path(file).read_bytes()
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"train.init_from: {file} differs from the hash in its checkpoint's {COMPLETE}")
        weights = load(content)
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


def _average_of(run: Path) -> tuple[str, str]:
    """The first average in the newest complete checkpoint of a run, wherever that is, and its SHA-256."""
    missing = (
        f"train.init_from: {run} has no complete checkpoint; name a run directory or a .safetensors file"
    )
    if not (run / "config.yaml").exists():
        raise UserError(missing)
    config = recorded_config(run)
    store = Store.at(RunDirectory(config).checkpoints)
    steps = remote_steps(store)
    if not steps:
        raise UserError(f"{missing} (its train.checkpoint_root is {store.url})")
    name, file = step_name(steps[-1]), tensors_file(f"ema-{config.train.ema_decays[0]:g}")
    facts = (remote_files(store, name) or {}).get(file)
    if facts is None:
        raise UserError(f"train.init_from: {store.url}/{name} has no {file}")
    return f"{store.url}/{name}/{file}", facts["sha256"]
