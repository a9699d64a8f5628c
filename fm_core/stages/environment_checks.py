"""Self-tests of this machine and its installation: versions, devices, networks, launchers."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from fm_core.config import ModelSection
from fm_core.launch import slurm, ssh
from fm_core.models.build import build_network
from fm_core.run.results import Check

DISTRIBUTION = "flow-matching-pipeline"
MEETING_SECONDS = 45

_MEETING = """
import torch, torch.distributed as dist
try:
    dist.init_process_group("gloo")
    ranks = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(ranks)
    assert ranks.item() == 3, ranks
    dist.barrier()
    dist.destroy_process_group()
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    raise
"""


def machine_checks() -> list[Check]:
    """Everything of this module; seconds, no network beyond the loopback interface, no files kept."""
    elsewhere = {"ssh": ssh.PROGRAMS, "slurm": slurm.PROGRAMS}
    return [versions(), *devices(), processes(), *(launcher(kind, elsewhere[kind]) for kind in elsewhere)]


def versions() -> Check:
    """Whether what is installed is what pyproject.toml asks for."""
    wrong: list[str] = []
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        return Check("versions", False, f"{'; '.join(wrong)}: install with infra/constraints.txt")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "prefect"))
    return Check("versions", True, f"Python {sys.version.split()[0]}, {shown}; all as pyproject.toml asks")


def devices() -> list[Check]:
    """Whether each device gives a small network the gradients that the CPU gives it in float32."""
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    return [_device(torch.device(name)) for name in names]


def _device(device: torch.device) -> Check:
    what = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        what = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    try:
        exact = _gradient(torch.device("cpu"), torch.float32)
        errors = {
            name: ((_gradient(device, dtype) - exact).norm() / exact.norm()).item()
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
    except RuntimeError as error:
        return Check(f"device {device}", False, f"{what}: {error}".splitlines()[0])
    told = ", ".join(f"{name} gradients within {error:.0e}" for name, error in errors.items())
    return Check(f"device {device}", errors["float32"] < 1e-3 and errors["bfloat16"] < 0.1, f"{what}: {told}")


def _gradient(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a small U-Net's loss, flat, float32, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    section = ModelSection(channels=32, head_channels=32)
    network = build_network(section, (3, 8, 8), 0).to(device, dtype)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    t = torch.rand(4, generator=generator).to(device)
    x = torch.randn(4, 3, 8, 8, generator=generator).to(device)
    network(t, x).square().mean().backward()
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    return torch.cat([gradient.float().flatten().cpu() for gradient in gradients])


def processes() -> Check:
    """Whether two processes of this host meet and add up a number."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "meeting.py"
        script.write_text(_MEETING)
        try:
            done = subprocess.run(
                [*agent, "--nproc-per-node=2", str(script)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=MEETING_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Check(
                "launcher local", False, f"two did not meet over the loopback in {MEETING_SECONDS} s"
            )
    if done.returncode:
        # What a rank says itself; torchrun's own words end in a frame of signs.
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip("=- ")]
        return Check("launcher local", False, f"two cannot meet: {said[0] if said else done.returncode}")
    return Check("launcher local", True, "two met through torchrun and added up a number")


def launcher(kind: str, programs: Mapping[str, str]) -> Check:
    """Whether jobs can go to other hosts from here in this way; not to be able to is no fault of a machine.

    `programs` are those that are called, each with what brings it.
    """
    found = {name: shutil.which(name) for name in programs}
    missing = [f"{name} (of {programs[name]})" for name, path in found.items() if not path]
    if missing:
        there = ", ".join(name for name, path in found.items() if path) or "nothing"
        told = f"not from here (launch.kind {kind}): {', '.join(missing)} missing, {there} there"
        return Check(f"launcher {kind}", True, told)
    return Check(f"launcher {kind}", True, f"from here (launch.kind {kind}): {', '.join(found)} are there")
