"""The recipes of extending.md, applied to a copy of the code and executed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.storage.atomic_files import read_json
from tests.support import ROOT
from tests.support.page_commands import page_commands

PAGE = ROOT / "infra" / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
RECIPES = ("path", "objective", "network", "launcher")
DIFFS = dict(zip(RECIPES, re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL), strict=True))
COMMANDS = page_commands(PAGE)
PARTS = ("fm_core", "pyproject.toml", "infra/configs")


def copy_of_the_code(folder: Path) -> Path:
    for part in PARTS:
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


def apply(diff: str, root: Path) -> None:
    # A temporary folder may lie in a repository: then git apply would skip files outside of it.
    variables = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = subprocess.run(
        ["git", "apply", "-"], input=diff, cwd=root, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with all four recipes and the configuration file of the page."""
    root = copy_of_the_code(tmp_path_factory.mktemp("extended"))
    for diff in DIFFS.values():
        apply(diff, root)
    (own,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (root / "own.yaml").write_text(own, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def extended_run(extended: Path) -> Path:
    """The run that the commands of the page leave."""
    # As the console script does: the working directory is not on the path of modules.
    program = "import sys; sys.path.remove(''); from fm_core.cli import main; sys.exit(main(sys.argv[1:]))"
    variables = {
        **os.environ,
        "PYTHONPATH": str(extended),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        assert name == "fm"
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=extended,
            env=variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return extended / "runs" / "own"


@pytest.mark.parametrize("recipe", DIFFS)
def test_each_recipe_applies_on_its_own_and_is_clean(recipe: str, tmp_path: Path):
    root = copy_of_the_code(tmp_path / "copy")
    apply(DIFFS[recipe], root)
    files = re.findall(r"^\+\+\+ b/(\S+)$", DIFFS[recipe], re.MULTILINE)
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *files], cwd=root, capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


def test_the_path_and_the_objective_are_found_beside_the_configuration(extended: Path, monkeypatch, capsys):
    from fm_core.cli import main

    monkeypatch.chdir(extended)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(extended))])
    parts = ("--method.path", "polynomial:Polynomial", "--method.objective", "late_weighted:LateWeighted")
    assert main(["doctor", "--config", "infra/configs/digits.yaml", *parts, "--run.name", "x"]) in (0, 2)
    assert "cannot import" not in capsys.readouterr().out
    assert str(extended) in sys.path
    for name in ("polynomial", "late_weighted"):
        assert sys.modules.pop(name).__file__ == str(extended / f"{name}.py")


def test_the_recipes_train_and_sample_together(extended_run: Path):
    recipe = (extended_run / "config.yaml").read_text(encoding="utf-8")
    for name in ("polynomial:Polynomial", "late_weighted:LateWeighted", "kind: mixer"):
        assert name in recipe
    assert read_json(extended_run / "train" / "DONE.json")["step"] == 4


def test_the_launcher_of_the_page_starts_the_ranks(extended_run: Path):
    assert len(list(extended_run.glob("samples/*/*/DONE.json"))) == 2
    kinds = {read_json(job)["kind"] for job in extended_run.rglob("job.json")}
    assert kinds == {"debug", "idle"}
