"""The commands of `fm`, and the options of each besides the keys of the configuration."""

from collections.abc import Sequence

from fm_core.config.tree import all_keys

STAGES = {
    "shard": "write the shards and manifest of a data set, or verify them",
    "train": "train from the newest complete checkpoint to train.images",
    "sample": "generate images from a checkpoint",
    "evaluate": "score the samples and the model",
    "report": "write report.html",
    "validate": "check the shards of a data set, and repair them on request",
    "reproduce": "reproduce the paper's comparison of objectives and its figures",
    "sweep": "sample and score every combination of values of keys, and find the best",
    "export": "write a self-contained folder with weights, configuration and model card",
}

COMMANDS = {
    "init": "write a configuration file for a folder of images",
    **STAGES,
    "status": "show what a run is doing",
    "compare": "show the scores of several runs in one table",
    "doctor": "check this machine or a configuration, and estimate its cost",
}
TRUST = {"trust-code": "import classes that only the file of weights names; importing a module runs its code"}
FLAGS = {
    **dict.fromkeys(("sample", "evaluate", "report", "export"), TRUST),
    "status": {"follow": "print a line every few seconds until interrupted"},
    "shard": {
        "dry-run": "show which splits, classes and images would be read; write nothing but a picture of them",
    },
    "validate": {
        "quick": "check sizes and sidecar files only",
        "deep": "also check the CRC of every image, duplicates, and the source",
        "repair": "first rewrite damaged shards",
    },
    "reproduce": {
        "dry-run": "check the configuration and estimate the cost of the comparison; start nothing",
    },
    "sweep": {
        "dry-run": "check and list the points, with the evaluations of the network for their samples; start "
        "nothing",
    },
}
NUMBERS: dict[str, dict[str, tuple[float | None, str]]] = {
    "reproduce": {
        "peak": (
            None,
            "peak FLOP/s of a device; by default that of this GPU in bf16 if known, otherwise an H200's",
        ),
        "mfu": (0.3, "share of the peak that goes into the network's operations"),
        "images-per-s": (None, "measured training throughput of one device, instead of peak and mfu"),
        "nfe": (None, "evaluations of dopri5 per image; by default the paper's, if known"),
    },
}
"""For --dry-run."""
EPILOGS = {
    "evaluate": "Without --config: images that no run made are scored by --evaluate.samples and "
    "--evaluate.reference; the scores go to --evaluate.output, or to standard output.",
}
"""End of the help of a command."""
DOCTOR_FLAGS = {
    "--model": "parameters and FLOPs of the network",
    "--launch": "whether the hosts of the configuration can be reached and agree",
    "--cost": "time, storage and network traffic of training on --hosts x --devices devices",
}
DOCTOR_NUMBERS: dict[str, tuple[type, float, str]] = {
    "hosts": (int, 1, "for --cost: number of hosts"),
    "devices": (int, 1, "for --cost: devices per host"),
    "peak": (float, 989e12, "for --cost: peak FLOP/s of a device; the default is bf16 on an H100 or H200"),
    "mfu": (float, 0.3, "for --cost: share of the peak that goes into the network's operations"),
    "store-rate": (float, 1e9, "for --cost: bytes per second to the checkpoint store"),
}


def of_images(arguments: Sequence[str]) -> bool:
    """Whether these arguments of `fm` ask to score images that no run made: samples, but no configuration."""
    samples = any(each.partition("=")[0] == "--evaluate.samples" for each in arguments)
    return (
        arguments[:1] == ["evaluate"] and samples and not any(each.startswith("--conf") for each in arguments)
    )


def present_option(argument: str) -> str:
    """Return an option of the configuration tree under its current name."""
    option, equals, value = argument.partition("=")
    key = option.removeprefix("--")
    return f"--{all_keys().get(key, key)}{equals}{value}" if option.startswith("--") else argument
