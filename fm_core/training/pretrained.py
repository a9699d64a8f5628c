"""Pretrained weights to start training from (train.init_from)."""

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from fm_core.checkpoint.format import stored_files, stored_steps, tensors_file
from fm_core.errors import UserError
from fm_core.models.adm_weights import AttentionOrder
from fm_core.models.layers import is_second_time
from fm_core.models.published_weights import Source, convert_published, is_published, read_tensors
from fm_core.run.directory import RunDirectory, recorded_config, step_name
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store


def pretrained_weights(
    where: str, network: nn.Module, attention: AttentionOrder = "legacy", source: Source | None = None
) -> dict[str, Tensor]:
    """Weights from a file (a path or URL), or the first average of a run's newest checkpoint.

    A file with the tensor names of a published network is converted: `source` says whose, `attention` the
    attention order of a U-Net. The embedding of a second time keeps the weights of `network`, which make it
    zero, if the file has none. Raises UserError, which names the first tensor that does not fit, or what is
    missing.
    """
    file, sha256 = _newest_average(Path(where)) if Path(where).is_dir() else (where, None)
    try:
        folder, _, name = file.rpartition("/")
        content = Store.at(folder).read_bytes(name) if "://" in file else Path(file).read_bytes()
        if sha256 and sha256_bytes(content) != sha256:
            raise UserError(f"train.init_from: {file} differs from the hash recorded in its checkpoint")
        weights = read_tensors(content, name)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"train.init_from: {file} cannot be read: {error}") from None
    if is_published(weights):
        try:
            return convert_published(weights, network, source, attention)
        except ValueError as error:
            raise UserError(f"train.init_from: {file}: {error}") from None
    if source:
        raise UserError(
            f"train.init_from: {file} has no tensors of a published network; remove train.init_source"
        )
    expected = network.state_dict()
    if not any(is_second_time(name) for name in weights):
        weights |= {name: weight for name, weight in expected.items() if is_second_time(name)}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise UserError(
                f"train.init_from: {name} is {'missing from' if name in expected else 'only in'} {file}"
            )
        if weights[name].shape != expected[name].shape:
            shapes = f"{list(weights[name].shape)} there and {list(expected[name].shape)} here"
            raise UserError(f"train.init_from: {name} is {shapes}; {file} is of another network")
    return weights


def _newest_average(run: Path) -> tuple[str, str]:
    """URL and SHA-256 of the first average in the newest complete checkpoint of a run, local or stored."""
    missing = (
        f"train.init_from: {run} has no complete checkpoint; name a run directory or a .safetensors file"
    )
    if not (run / "config.yaml").exists():
        raise UserError(missing)
    config = recorded_config(run)
    store = Store.at(RunDirectory(config).checkpoints)
    steps = stored_steps(store)
    if not steps:
        raise UserError(f"{missing} (its train.checkpoint_root is {store.url})")
    name, file = step_name(steps[-1]), tensors_file(f"ema-{config.train.ema_decays[0]:g}")
    facts = (stored_files(store, name) or {}).get(file)
    if facts is None:
        raise UserError(f"train.init_from: {store.url}/{name} has no {file}")
    return f"{store.url}/{name}/{file}", facts["sha256"]
