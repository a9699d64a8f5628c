"""The parts of gpu.sh, each of which is one process of another benchmark in this folder."""

from dataclasses import dataclass, field
from typing import Any

LOSS_STEPS = 20
TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest allowed relative difference between a loss and the CPU's float32 loss, in the first steps."""


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        group: parts of one group are compared with its reference.
        name: name within the group.
        what: description of the measurement, for the table.
        script: the program, relative to this folder unless absolute.
        task: settings of the program.
        seconds: expected time on an H200, including startup and compilation.
        reference: whether the other parts of the group are compared with this one.
        needs_gpu: whether the part is skipped on a CPU.
        goal: target of the measurement, for the table.
    """

    group: str
    name: str
    what: str
    script: str
    task: dict[str, Any] = field(default_factory=dict)
    seconds: float = 20
    reference: bool = False
    needs_gpu: bool = False
    goal: str = ""

    @property
    def key(self) -> str:
        """Unique name among all parts."""
        return f"{self.group}/{self.name}"


def all_parts(device: str, size: str) -> list[Part]:
    """List the parts for a device ("cuda" or "cpu") and a size ("full" or "tiny"), shortest first."""
    tiny = size == "tiny"
    step = {"warmup": 1, "steps": 1, "blocks": 1} if tiny else {"warmup": 3, "steps": 5, "blocks": 3}
    step |= {"device": device, "batch": 2 if tiny else 64}
    groups = [
        *_noise({**step, "images": 2 if tiny else 64}),
        *_losses(device, "digits" if tiny else "small", 4 if tiny else 64),
        Part(
            "loader",
            "tars",
            "DiT-B/4, eager, images from shards",
            "end_to_end.py",
            {
                **step,
                "size": "tiny-dit" if tiny else "DiT-B/4",
                "images": 64 if tiny else 20_000,
                "compile": False,
                "contender": "tars",
            },
            15,
            goal="waits below 1%",
        ),
        *_steps("dit", "DiT-B/4", {**step, "size": "tiny-dit" if tiny else "DiT-B/4"}, 12, 28),
        *_steps("unet", "ImageNet-64 U-Net", {**step, "size": "digits" if tiny else "imagenet64"}, 15, 55),
        *_sampling(device, tiny),
    ]
    return sorted(groups, key=lambda part: part.seconds)


def _noise(task: dict[str, Any]) -> list[Part]:
    sides = {
        "philox-v1": "drawn on the device",
        "philox-v1-compiled": "drawn on the device, compiled",
        "numpy-v1": "drawn on the CPU and copied",
    }
    return [
        Part(
            "noise",
            name,
            f"a million normal numbers {what}",
            "keyed_noise.py",
            {**task, "task": "normals", "contender": name},
            8 if name.endswith("compiled") else 6,
            reference=name == "numpy-v1",
            # Compilation for a CPU takes long and is not of interest here.
            needs_gpu=name.endswith("compiled"),
        )
        for name, what in sides.items()
    ]


def _losses(device: str, size: str, batch: int) -> list[Part]:
    task = {"size": size, "batch": batch, "warmup": 1, "steps": 1, "blocks": LOSS_STEPS}
    task["contender"] = "no-switch"
    sides = {"cpu": ("cpu", "fp32"), "fp32": (device, "fp32"), "bf16": (device, "bf16")}
    return [
        Part(
            "losses",
            name,
            f"{LOSS_STEPS} steps of a small U-Net on the {'CPU' if where == 'cpu' else 'GPU'}, {precision}",
            "training_step.py",
            {**task, "device": where, "precision": precision},
            12 if name == "cpu" else 10,
            reference=name == "cpu",
            goal=f"within {TOLERANCES[name]:g} of the CPU" if name in TOLERANCES else "",
        )
        for name, (where, precision) in sides.items()
    ]


def _steps(group: str, network: str, task: dict[str, Any], eager: float, compiled: float) -> list[Part]:
    """List the training steps: the reference, and this project's loop with and without each switch.

    `compile` without `cudnn_benchmark` is measured only on the transformer, which has no convolution
    algorithms to select. tf32 has no effect in bf16, and one device has no communication to overlap.
    """
    gpu = task["device"] == "cuda"
    sides = {
        "reference": ("DDP, fp16 autocast, GradScaler, NCHW, eager", eager),
        "no-switch": ("the program's loop, eager, defaults", eager),
        "ours-eager": ("the same with train.speed.cudnn_benchmark", eager),
        "not-fused": ("defaults without train.speed.fused_optimizer", eager),
        "compile-only": ("defaults with train.speed.compile", compiled),
        "ours": ("compile and cudnn_benchmark", compiled),
        "ours-channels-last": ("compile, compile_channels_last and cudnn_benchmark", compiled + 5),
    }
    left_out = {"unet": {"compile-only"}, "dit": {"ours-eager", "ours", "ours-channels-last"}}
    best = "compile-only" if group == "dit" else "ours"
    return [
        Part(
            group,
            name,
            f"{network}: {what}",
            "training_step.py",
            {**task, "contender": name},
            seconds,
            reference=name == "reference",
            needs_gpu=seconds >= compiled,
            goal="half the reference's time, MFU 40%" if name == best and gpu else "",
        )
        for name, (what, seconds) in sides.items()
        if name not in left_out[group]
    ]


def _sampling(device: str, tiny: bool) -> list[Part]:
    task = {"device": device, "batch": 2 if tiny else 64, "blocks": 1 if tiny else 2, "compile": False}
    network = {**task, "size": "small" if tiny else "imagenet64"}
    parts = []
    # The second solver finds the compiled network of the first in inductor's cache.
    for solver, theirs, ours in (("midpoint-20", 15, 40), ("dopri5", 25, 41)):
        for side, what, seconds in (
            ("odesolver", "flow_matching's ODESolver, eager fp16", theirs),
            ("ours", "bf16 network compiled with CUDA graphs", ours),
        ):
            reference = side == "odesolver"
            name = f"{side}-{solver}"
            parts.append(
                Part(
                    f"sampling-{solver}",
                    side,
                    f"ImageNet-64 U-Net: {what}",
                    "sampling.py",
                    {**network, "contender": name},
                    seconds,
                    reference,
                    goal="" if reference else "half the reference's time",
                )
            )
    small = {**task, "batch": 8, "size": "tiny-dit" if tiny else "DiT-B/4", "contender": "ours-midpoint-20"}
    return [
        *parts,
        *(
            Part(
                "cuda-graphs",
                "on" if graphs else "off",
                f"DiT-B/4, 8 images, midpoint-20, sample.cuda_graphs {str(graphs).lower()}",
                "sampling.py",
                {**small, "cuda_graphs": graphs},
                18,
                reference=not graphs,
                needs_gpu=True,
            )
            for graphs in (False, True)
        ),
    ]
