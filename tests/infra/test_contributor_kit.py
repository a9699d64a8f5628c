"""Contributor kit: hooks, workflow, templates, and what CONTRIBUTING.md says of the repository."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.page_checks import SCREENSHOTS
from tests.support.page_commands import page_commands
from tests.test_architecture import LAYERS, MAX_LINES
from tests.test_module_names import SHORT

CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
}
ELSEWHERE = ("git clone REPOSITORY flow-matching", "cd flow-matching", "source .venv/bin/activate")
"""Commands of a shell that need no test."""


def test_hooks_are_local_and_their_programs_are_pinned():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}
    pinned = {line.split("==")[0] for line in (ROOT / "infra" / "constraints.txt").read_text().splitlines()}
    for hook in HOOKS.values():
        assert hook["language"] == "system"
        program, *arguments = shlex.split(hook["entry"])
        assert program.removeprefix(".venv/bin/") in pinned or (ROOT / arguments[0]).exists(), hook
    assert HOOKS["tests"]["stages"] == ["pre-push"]
    assert HOOKS["tests"]["entry"] == "bash infra/test.sh"


@pytest.mark.parametrize(
    ("hook", "text"), [("format", "x = {'a' : 1}\n"), ("lint", "import os\nimport sys\n")]
)
def test_a_hook_of_ruff_notices_what_it_is_for(tmp_path: Path, hook: str, text: str):
    file = tmp_path / "module.py"
    file.write_text(text)
    _, *arguments = shlex.split(HOOKS[hook]["entry"])
    command = [sys.executable, "-m", "ruff", *arguments, "--config", str(ROOT / "pyproject.toml"), str(file)]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode or file.read_text() != text


def test_the_workflow_runs_what_the_checks_of_a_change_run():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert [step["run"].split()[-2:] for step in job["steps"] if "run" in step] == [["bash", ".ci/run"]]
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "python" in step.get("uses", "")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"
    uploads = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    screenshots = [step["if"] for step in uploads if step["with"]["path"] == "build/test-artifacts"]
    assert screenshots == ["always()"]
    assert str(SCREENSHOTS.relative_to(ROOT)) == "build/test-artifacts"
    script = (ROOT / ".ci" / "run").read_text()
    assert "bash infra/demo.sh" in script
    assert "bash infra/test.sh --all" in script
    assert "not been run there yet" in " ".join(CONTRIBUTING.read_text().split())


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_templates_have_a_name_and_a_description(name: str):
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"name", "about", "labels"}
    assert body.strip()


def test_the_pull_request_template_asks_for_what_a_change_must_show():
    text = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    for word in ("numerics", "speed", "ratio", "losses", "bash infra/test.sh"):
        assert word in text
        assert word in CONTRIBUTING.read_text()


def test_the_commands_of_the_page_are_those_of_the_repository():
    for command in page_commands(CONTRIBUTING):
        if command in ELSEWHERE:
            continue
        words = shlex.split(command)
        if words[0] == "bash":
            assert (ROOT / words[1]).exists()
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (ROOT / words[3]).is_dir()
        else:
            stages = {stage for hook in HOOKS.values() for stage in hook.get("stages", ["pre-commit"])}
            assert words[:2] == ["pre-commit", "install"]
            assert {word for word in words if word in stages} == stages


def test_the_page_states_the_rules_that_tests_enforce():
    page = " ".join(CONTRIBUTING.read_text(encoding="utf-8").split())
    assert f"at most {MAX_LINES} lines; one of fewer than {SHORT}" in page
    (order,) = re.findall(r"one way: flows → (.+?)\. A test", page)
    stated = [set(layer.split(", ")) for layer in order.split(" → ")]
    packages = [layer for layer in LAYERS if (ROOT / "fm_core" / min(layer)).is_dir()]
    assert stated == [*packages[:-1], packages[-1] | {"errors"}]
    assert re.findall(r"in at most (\d+) characters", (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text())
