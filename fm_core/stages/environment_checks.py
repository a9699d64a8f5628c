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
from fm_core.launch.rank_group import LOOPBACK, LOOPBACK_INTERFACE, rank_group_command
from fm_core.models.build import build_network
from fm_core.run.results import Check

DISTRIBUTION = "flow-matching-pipeline"
RENDEZVOUS_SECONDS = 45

_RENDEZVOUS_SCRIPT = """
import os, torch, torch.distributed as dist
try:
    dist.init_process_group("gloo")
    ranks = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(ranks)
    assert ranks.item() == 3, ranks
    dist.barrier()
    dist.destroy_process_group()
except BaseException as error:
    # Written in one call, because both processes share the pipe.
    os.write(1, f"{type(error).__name__}: {error}\\n".encode())
    raise
"""


def machine_checks() -> list[Check]:
    """All checks of this module. They take seconds, use only the loopback interface, and leave no files."""
    remote = {"ssh": ssh.PROGRAMS, "slurm": slurm.PROGRAMS}
    launchers = [launcher(kind, programs) for kind, programs in remote.items()]
    return [versions(), *devices(), processes(), *launchers]


def versions() -> Check:
    """Whether the installed packages satisfy pyproject.toml."""
    problems: list[str] = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if problems:
        return Check("versions", False, f"{'; '.join(problems)}: install with infra/constraints.txt")
    key_versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "prefect"))
    return Check(
        "versions", True, f"Python {sys.version.split()[0]}, {key_versions}; all satisfy pyproject.toml"
    )


def devices() -> list[Check]:
    """Whether each device computes the gradients of a small network as the CPU does in float32."""
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    return [_device(torch.device(name)) for name in names]


def _device(device: torch.device) -> Check:
    description = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        description = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    try:
        exact = _gradient(torch.device("cpu"), torch.float32)
        errors = {
            name: ((_gradient(device, dtype) - exact).norm() / exact.norm()).item()
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
    except RuntimeError as error:
        return Check(f"device {device}", False, f"{description}: {error}".splitlines()[0])
    ok = errors["float32"] < 1e-3 and errors["bfloat16"] < 0.1
    accuracy = ", ".join(f"{name} gradients within {error:.0e}" for name, error in errors.items())
    return Check(f"device {device}", ok, f"{description}: {accuracy}")


def _gradient(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a small U-Net's loss as a flat float32 vector on the CPU."""
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
    """Whether two processes of this host can form a process group and all-reduce a number."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "rendezvous.py"
        script.write_text(_RENDEZVOUS_SCRIPT, encoding="utf-8")
        try:
            done = subprocess.run(
                rank_group_command([str(script)], 2, meet=f"{LOOPBACK}:0"),
                env={**os.environ, **LOOPBACK_INTERFACE, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=RENDEZVOUS_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Check(
                "launcher local",
                False,
                f"two processes did not connect over the loopback interface in {RENDEZVOUS_SECONDS} s",
            )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
        return Check(
            "launcher local", False, f"two processes cannot connect: {lines[0] if lines else done.returncode}"
        )
    return Check("launcher local", True, "two processes connected on 127.0.0.1 and all-reduced a number")


def launcher(kind: str, programs: Mapping[str, str]) -> Check:
    """Whether this host has the programs that a multi-host launcher needs; their absence is not a failure.

    `programs` maps each program that is called to the package that provides it.
    """
    paths = {name: shutil.which(name) for name in programs}
    missing = [f"{name} (of {programs[name]})" for name, path in paths.items() if not path]
    if missing:
        present = ", ".join(name for name, path in paths.items() if path) or "none"
        detail = f"not from here (launch.kind {kind}): {', '.join(missing)} missing, {present} present"
        return Check(f"launcher {kind}", True, detail)
    return Check(f"launcher {kind}", True, f"from here (launch.kind {kind}): {', '.join(paths)} are present")
