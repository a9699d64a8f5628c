"""Import rules: the packages of fm_core form layers, and imports only go from higher to lower layers."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from fm_core.command_options import STAGES

ROOT = Path(__file__).parents[1]
CORE = ROOT / "fm_core"
# Highest layer first. A package imports only from lower layers; ALLOWED_WITHIN_LAYER lists the exceptions.
LAYERS = [
    {"cli"},
    {"status_line"},
    {"terminal", "commands", "command_options"},
    {"stages", "reproduce", "sweep"},
    {"training", "sampling", "evaluation", "report"},
    {"checkpoint", "data", "launch"},
    {"run", "models"},
    {"method", "config"},
    {"storage"},
    {"errors", "output"},
]
MAX_LINES = 300
"""Of a module."""
ALLOWED_WITHIN_LAYER = {("launch", "checkpoint"), ("evaluation", "sampling")}
"""(importer, imported): the cluster check reads checkpoints, evaluation reads samples and models."""


def modules(*folders: Path):
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> set[str]:
    """Full names of all that a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "fm_core" and len(parts) > 1 else None


def layer_of(package: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if package in layer)


@pytest.mark.parametrize("path", modules(CORE), ids=name_of)
def test_packages_import_only_from_lower_layers(path):
    here = package_of(name_of(path))
    if here in (None, "__main__"):
        return
    for imported in imports_of(path):
        there = package_of(imported)
        if there is None or there == here:
            continue
        allowed = layer_of(there) > layer_of(here) or (here, there) in ALLOWED_WITHIN_LAYER
        assert allowed, f"{name_of(path)} imports {imported}"


def test_no_stage_imports_another():
    compositions = {"preflight", "stage_rules", "doctor", "score_checkpoints"}
    for path in modules(CORE / "stages"):
        stages = {".".join(imported.split(".")[:3]) for imported in imports_of(path)} & {
            f"fm_core.stages.{name}" for name in STAGES
        }
        assert not stages or path.stem in compositions, f"{name_of(path)} imports {stages}"


def test_the_report_imports_no_other_package():
    for path in modules(CORE / "report"):
        packages = {package_of(imported) for imported in imports_of(path)} - {None, "report"}
        assert not packages, f"{name_of(path)}: {packages}"


def test_the_method_imports_nothing_of_ours_but_errors():
    for path in modules(CORE / "method"):
        packages = {package_of(imported) for imported in imports_of(path)} - {None, "method"}
        assert packages <= {"errors"}, f"{name_of(path)}: {packages}"


def test_the_configuration_knows_no_heavy_library():
    for path in modules(CORE / "config"):
        assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "numpy", "deepspeed"}


def test_the_core_knows_nothing_of_prefect_or_the_flows():
    for path in modules(CORE):
        roots = {imported.split(".")[0] for imported in imports_of(path)}
        assert not roots & {"prefect", "flows"}, name_of(path)


def test_flows_know_nothing_of_tests_and_infrastructure():
    for path in modules(ROOT / "flows"):
        roots = {imported.split(".")[0] for imported in imports_of(path)}
        assert not roots & {"tests", "infra"}, name_of(path)


def test_only_checkpoint_knows_the_files_of_a_checkpoint():
    """No string constant elsewhere holds their names; everyone else asks fm_core/checkpoint."""
    for path in modules(CORE, ROOT / "flows"):
        if package_of(name_of(path)) == "checkpoint":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                file_names = set(re.split(r"[^\w.]+", node.value))
                assert not file_names & {"COMPLETE", "state.json"}, f"{name_of(path)}:{node.lineno}"
                if name_of(path) != "fm_core.run.directory":  # step_name
                    assert not node.value.startswith("step-"), f"{name_of(path)}:{node.lineno}"


def test_modules_are_short_and_named_for_what_they_hold():
    for path in modules(CORE, ROOT / "flows", ROOT / "infra", ROOT / "tests"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, name_of(path)
        parts = set(name_of(path).lower().replace("_", ".").split("."))
        assert not parts & {"util", "utils", "helper", "helpers", "misc", "manager", "common"}, name_of(path)


def test_every_package_has_a_layer():
    packages = {package_of(name_of(path)) for path in modules(CORE)} - {None, "__main__"}
    assert packages <= set().union(*LAYERS), "a new package needs a place in LAYERS"
