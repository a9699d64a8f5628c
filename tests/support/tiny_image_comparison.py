"""Image comparison that takes seconds: two objectives, one seed."""

from pathlib import Path

from fm_core.config import RunConfig, merge, parse_config
from tests.support.tiny_run import TINY

CELLS = [
    {"name": "ddpm", "title": "DDPM", "objective": "noise-prediction", "path": "variance-preserving"},
    {"name": "fm-ot", "title": "FM-OT", "objective": "flow-matching", "path": "optimal-transport"},
]
OVERRIDES = {
    "run": {"name": "both"},
    "launch": {"kind": "debug", "processes": 1},
    "train": {"images": 128, "warmup_images": 0, "checkpoint_images": 64, "keep_checkpoints": 2},
    "sample": {"solver": "dopri5", "steps": None, "rtol": 0.1, "atol": 0.1},
    "evaluate": {
        "metrics": ["frechet_distance"],
        "nfe_curve": {"images": 8, "solvers": ["euler"], "nfe": [4, 8], "tolerances": [0.1], "exact_nfe": 16},
    },
    "reproduce": {
        "kind": "images",
        "cells": CELLS,
        "images": {"curve_images": 8, "shown_nfe": [2, 4], "shown_images": 3},
    },
}
STUDENTS = [
    {"name": "map", "title": "Map", "objective": "split-meanflow", "steps": 2, "learning_rate": 0.001},
    {"name": "reflow", "pairs": 40, "steps": 3, "learning_rate": 0.001},
]
FEW_STEPS = {
    "experiments": ["ddpm", "fm-ot"],
    "solvers": ["euler", "dpmpp_2m@log-snr"],
    "nfe": [1, 2, 4],
    "exact_nfe": 8,
    "teacher": "fm-ot",
    "students": STUDENTS,
    "student_nfe": [1, 2],
}


def configured(root: Path, **reproduce_keys) -> RunConfig:
    places = {"run": {"root": str(root / "runs")}, "data": {"root": str(root / "data")}}
    tree = merge(merge(merge(TINY, OVERRIDES), places), {"reproduce": reproduce_keys})
    return parse_config(tree, where="both.yaml")
