"""2-D comparison that takes seconds."""

from pathlib import Path

from fm_core.config import RunConfig, parse_config

CELLS = [
    {"name": "ddpm", "title": "DDPM", "objective": "noise-prediction", "path": "variance-preserving"},
    {"name": "fm-ot", "title": "FM-OT", "objective": "flow-matching", "path": "optimal-transport"},
    {
        "name": "cnf",
        "title": "CNF",
        "objective": "maximum-likelihood",
        "path": "optimal-transport",
        "steps": 2,
    },
]
PLANE = {
    "steps": 12,
    "batch": 16,
    "width": 8,
    "layers": 1,
    "held_out": 8,
    "samples": 40,
    "grid": 4,
    "nfe": [2, 4],
    "rtol": 1e-2,
    "atol": 1e-2,
}


def configured(root, cells=CELLS, seeds=None, few_steps=None, **toy2d) -> RunConfig:
    tree = {
        "run": {"name": "tiny", "root": str(root)},
        "launch": {"threads": 1},
        "reproduce": {
            "cells": cells,
            "seeds": seeds,
            "few_steps": few_steps or {},
            "toy2d": {**PLANE, **toy2d},
        },
    }
    return parse_config(tree, where="tiny.yaml")


def place(root, *parts) -> Path:
    return Path(root, "tiny", "reproduce", *parts)
