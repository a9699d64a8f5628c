"""Configurations of students, and the flow of a distillation in this process."""

from pathlib import Path

from flows.distill import distill_model
from fm_core.config import RunConfig

REFLOW = {
    "method": {"coupling": "reflow"},
    "run": {"name": "student"},
    "model": {"class_conditional": True},
}
GENERATOR = RunConfig.model_validate({"run": {"name": "student", "generator": "numpy-v1"}}).run
PLAIN = {"run": {"name": "student"}, "model": {"class_conditional": True}}


def student_tree(tmp_path: Path, **data) -> dict:
    return REFLOW | {"data": {"pairs": {"samples": str(tmp_path / "pairs")}, **data}}


def run(**parameters):
    return distill_model.fn(**distill_model.validate_parameters(parameters))
