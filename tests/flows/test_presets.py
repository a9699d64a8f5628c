"""The flows say in one line where they can run, and this checkout's packages come before others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SHOW = "python -c 'import flows; print(flows.__file__)'; env | grep -c '^PIP_TARGET' || true"


def test_flows_that_were_installed_as_a_wheel_say_what_they_need(tmp_path: Path):
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    done = subprocess.run(
        [sys.executable, "-c", "import flows.presets"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: the flows read their presets from {tmp_path}/infra/configs")
    assert last.endswith("installed with pip install --editable")


def test_another_package_flows_on_pythonpath_does_not_come_first(tmp_path: Path):
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    script = f". infra/environment.sh; cd /; {SHOW}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "FM_ENVIRONMENT": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[0] == f"{ROOT}/flows/__init__.py", done.stderr


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"pip"*" config list"*) cat "$FAKE/pip.conf" ;;
*"pip install"*)
    env | grep '^PIP_' | sort >"$FAKE/variables"
    touch "$FAKE/project/.venv/bin/prefect"
    chmod +x "$FAKE/project/.venv/bin/prefect" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose environment has a python that only records how pip is called."""
    project = tmp_path / "project"
    (project / "infra").mkdir(parents=True)
    shutil.copy(ROOT / "infra" / "environment.sh", project / "infra")
    (project / "infra" / "constraints.txt").touch()
    (project / "pyproject.toml").touch()
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "pip.conf").touch()
    return project


def install(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FM_"))}
    return subprocess.run(
        ["bash", "infra/environment.sh"],
        cwd=project,
        env={**inherited, "FAKE": str(project.parent), "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
    )


def test_settings_of_pip_that_install_elsewhere_do_not_hold(project: Path):
    elsewhere = {"PIP_USER": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/x", "PIP_ROOT": "/x"}
    done = install(project, **elsewhere, PIP_INDEX_URL="https://index")
    assert done.returncode == 0, done.stdout + done.stderr
    variables = (project.parent / "variables").read_text().split()
    assert variables == ["PIP_INDEX_URL=https://index", "PIP_USER=0"]
    assert (project / ".venv" / "complete").exists()


def test_a_target_in_pip_conf_is_refused_by_name(project: Path):
    (project.parent / "pip.conf").write_text("global.index-url='x'\ninstall.target='/opt/x'\n")
    done = install(project)
    assert done.returncode == 2
    assert "pip.conf says install.target='/opt/x'" in done.stderr
    assert not (project / ".venv" / "complete").exists()
