"""Cluster probe: the worker of the cluster check.

Writes facts.json to the control directory: facts about each rank's host, and the speed of an all-reduce.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import torch
import torch.distributed as dist

import fm_core
from fm_core.checkpoint.format import checkpoint_directories
from fm_core.checkpoint.ownership import staging_folder
from fm_core.config import RunConfig
from fm_core.launch.job import LOGS_VARIABLE
from fm_core.launch.rank_group import store_of_one
from fm_core.launch.worker_main import Rank
from fm_core.run.directory import RunDirectory, environment
from fm_core.run.resource_limits import available_cores
from fm_core.storage.atomic_files import write_json
from fm_core.storage.local_paths import local_path

FACTS = "facts.json"
TIMEOUT = timedelta(minutes=2)
GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
ROUNDS = 5


def probe(config: RunConfig, rank: Rank) -> None:
    """Gather the facts of all ranks; rank 0 writes them."""
    with store_of_one():
        _probe(config, rank)


def _probe(config: RunConfig, rank: Rank) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank.local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # already initialized with launch.kind debug
        dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    facts = _facts(config, device)
    dist.barrier()
    facts["clock"] = time.time()
    gathered: list[dict[str, Any]] = [{}] * rank.count
    dist.all_gather_object(gathered, facts)
    speed = _all_reduce_speed(device, GPU_BYTES if gpu else CPU_BYTES, rank.count)
    if rank.first:
        write_json(rank.control / FACTS, {"ranks": gathered, "all_reduce": speed})
    dist.barrier()


def _facts(config: RunConfig, device: torch.device) -> dict[str, Any]:
    known = environment()
    return {
        "host": socket.gethostname(),
        "versions": {**known["versions"], "python": known["python"], "fm_core": _code_hash()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "devices": torch.cuda.device_count() or available_cores(),
        "scratch_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "checkpoints": _checkpoints(config),
        "data": _sees_data(config),
        "run_directory": os.environ[LOGS_VARIABLE] != "",
    }


def _all_reduce_speed(device: torch.device, size: int, ranks: int) -> dict[str, float]:
    """Best time of several all-reduces, and the bytes per second of each rank's link in a ring."""
    tensor = torch.ones(size // 4, device=device)
    seconds: list[float] = []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    best = min(seconds[1:])
    return {"bytes": size, "seconds": best, "bytes_per_s": 2 * (ranks - 1) / ranks * size / best}


def _checkpoints(config: RunConfig) -> dict[str, Any]:
    """Where this host would write checkpoints, how many exist there, and the free bytes."""
    root = local_path(RunDirectory(config).checkpoints)
    folder = (root or staging_folder(config)).resolve()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    return {
        "folder": str(folder),
        "uploads": root is None,
        "there": len(checkpoint_directories(folder)),
        "free_bytes": shutil.disk_usage(above).free,
    }


def _sees_data(config: RunConfig) -> bool:
    url = f"{config.data.root.rstrip('/')}/{config.data.name}/manifest.json"
    filesystem, path = cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    return bool(filesystem.exists(path))


def _code_hash() -> str:
    root, digest = Path(fm_core.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
