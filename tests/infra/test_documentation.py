"""What the documentation names exists: files, keys, options, links; each page has a test that runs it."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fm_core.cli import main
from fm_core.command_options import COMMANDS
from fm_core.config import RunConfig, parse_config
from fm_core.config.tree import all_keys
from fm_core.method.couplings import Coupling
from fm_core.method.objectives import Objective
from fm_core.method.paths import Path as ProbabilityPath
from fm_core.method.registry import built_in
from fm_core.method.timestep_samplers import TimestepSampler
from fm_core.models.build import build_method
from tests.support import ROOT
from tests.support.page_commands import page_commands

DOCS = ROOT / "infra" / "docs"
TESTS = {
    "README.md": "tests/flows/test_readme.py",
    ".github/CONTRIBUTING.md": "tests/infra/test_contributor_kit.py",
    "infra/README.md": "tests/infra/test_documentation.py",
    "infra/benchmarks/RESULTS.md": "tests/infra/test_documentation.py",
    "infra/docs/architecture.md": "tests/infra/test_architecture_page.py",
    "infra/docs/benchmarks.md": "tests/infra/test_documentation.py",
    "infra/docs/changelog.md": "tests/infra/test_documentation.py",
    "infra/docs/clusters.md": "tests/infra/test_documentation.py",
    "infra/docs/data.md": "tests/data/test_data_page.py",
    "infra/docs/extending.md": "tests/infra/test_extending.py",
    "infra/docs/glossary.md": "tests/infra/test_architecture_page.py",
    "infra/docs/operations.md": "tests/flows/test_operators_page.py",
    "infra/docs/sampling-and-evaluation.md": "tests/sampling/test_api.py",
    "infra/docs/security.md": "tests/infra/test_documentation.py",
    "infra/docs/training.md": "tests/stages/test_reflow_runs.py",
    "infra/docs/your-own-images.md": "tests/infra/test_your_own_images.py",
}
"""Page -> the test that executes its blocks, beside those of this module."""
FILES = re.compile(r"((?:fm_core|flows|infra|tests|\.github)/[\w./*-]+?)/?")
KEY = re.compile(rf"(?:--)?((?:{'|'.join(RunConfig.model_fields)})(?:\.[a-z_0-9]+)+)(?:[ :].*)?")
NO_KEYS = (".safetensors", ".html", ".png", ".yaml", ".yml", ".json", ".log", ".md", ".py")
MADE_BY_USERS = {"infra/.env"}
pages = pytest.mark.parametrize("page", TESTS)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def quoted(page: str) -> list[str]:
    """What stands between backticks in running text and tables."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_listed_and_its_test_exists():
    written = {f"infra/docs/{path.name}" for path in DOCS.glob("*.md")}
    assert written == {page for page in TESTS if page.startswith("infra/docs/")}
    index = text_of("infra/README.md")
    assert [page for page in written if f"](docs/{Path(page).name})" not in index] == []
    for page, test in TESTS.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8"), (page, test)


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 200


@pages
def test_links_lead_to_files_and_headings(page: str):
    here = (ROOT / page).parent
    broken: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = here / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pages
def test_files_in_backticks_exist(page: str):
    names = {match[1] for text in quoted(page) if (match := FILES.fullmatch(text))}
    assert sorted(name for name in names - MADE_BY_USERS if not list(ROOT.glob(name))) == []


@pages
def test_keys_in_backticks_are_keys_of_the_configuration(page: str):
    known = all_keys()
    named = {match[1] for text in quoted(page) if (match := KEY.fullmatch(text))}
    assert sorted(name for name in named if not name.endswith(NO_KEYS) and name not in known) == []


@pages
def test_yaml_blocks_of_the_configuration_are_accepted(page: str):
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if set(tree) <= set(RunConfig.model_fields) and "mixer" not in block:  # a kind that extending.md adds
            config = parse_config(tree, page)
            if ":" not in config.method.path:  # a class in a file of the user's
                build_method(config.method)


@pages
def test_blocks_of_python_compile(page: str):
    for block in blocks(page, "python"):
        compile(block, page, "exec")


@pytest.fixture(scope="module")
def options() -> dict[str, str]:
    """Help text by command."""
    return {}


@pages
def test_commands_and_their_options_exist(page: str, options: dict[str, str], capsys):
    inline = [text for text in quoted(page) if text.startswith("fm ")]
    for command in [*page_commands(ROOT / page), *inline]:
        if not command.startswith("fm ") or command.startswith("fm <stage>"):
            continue
        name, *arguments = shlex.split(command.split(" …")[0].replace("\\|", "|"))[1:]
        if name == "STAGE" or name.startswith("-"):
            continue
        assert name in COMMANDS, command
        if name not in options:
            with pytest.raises(SystemExit):
                main([name, "--help"])
            options[name] = capsys.readouterr().out
        flags = [argument for argument in arguments if argument.startswith("--")]
        unknown = [flag for flag in flags if not re.search(rf"(^|[\s\[]){flag}[\s:\]]", options[name])]
        assert unknown == [], command


def test_pages_that_no_test_executes_show_no_other_commands():
    executed = {
        command
        for page, test in TESTS.items()
        if test != "tests/infra/test_documentation.py"
        for command in page_commands(ROOT / page)
    }
    for page, test in TESTS.items():
        if test == "tests/infra/test_documentation.py":
            assert [command for command in page_commands(ROOT / page) if command not in executed] == [], page


def test_the_readme_names_every_command_and_every_deployment():
    readme = text_of("README.md")
    assert [name for name in COMMANDS if f"fm {name}" not in readme] == []
    deployments = yaml.safe_load(text_of("infra/prefect.yaml"))["deployments"]
    names = {each["entrypoint"].rsplit(".", 1)[1].replace("_", "-") for each in deployments}
    assert len(names) > 10
    assert [name for name in sorted(names) if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("kind", [ProbabilityPath, Objective, Coupling, TimestepSampler])
def test_the_page_on_training_names_every_part_of_the_method(kind: type):
    page = text_of("infra/docs/training.md")
    assert [name for name in built_in(kind) if name not in page] == []
