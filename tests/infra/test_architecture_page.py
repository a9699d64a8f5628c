"""The architecture page and the glossary name existing files and cover all required topics."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "infra" / "docs"
PAGES = ("architecture.md", "glossary.md")
TOPICS = (
    *(
        "NaN handling",
        "hang watchdog",
        "Slurm submission",
        "checkpoint retention",
        "checkpoint upload",
        "KID",
    ),
    *(
        "precision and recall",
        "minibatch OT",
        "label dropout",
        "dequantization",
        "artifacts in the Prefect UI",
    ),
    *("cancellation", "ImageNet class order", "shard format", "learning-rate schedule", "EMA"),
    *("restart policy", "hostfile", "model card", "2-D experiments"),
)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def paths_in(text: str) -> set[str]:
    """Every path of the repository between backticks."""
    return set(re.findall(r"`((?:fm_core|flows|infra|tests)/[^`\s]*)`", text))


def table_rows() -> list[tuple[str, str]]:
    """Topic and files of each row of the table "I am looking for ..."."""
    table = text_of("architecture.md").partition("## I am looking for")[2]
    return re.findall(r"^\| (?!topic)(.+?) \| (.+) \|$", table, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str):
    paths = paths_in(text_of(page))
    assert len(paths) > 15
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page: str):
    links = re.findall(r"\]\(([^)#]+)\)", text_of(page))
    assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []


def test_every_package_has_a_paragraph():
    packages = {f"fm_core/{path.parent.name}/" for path in (ROOT / "fm_core").glob("*/__init__.py")}
    described = set(re.findall(r"^\*\*`([^`]+)`\*\*", text_of("architecture.md"), re.MULTILINE))
    assert packages - described == set()


@pytest.mark.parametrize("topic", TOPICS)
def test_the_table_names_a_file_for_each_topic(topic: str):
    (files,) = [files for name, files in table_rows() if name.startswith(topic)]
    assert paths_in(files)


def test_the_glossary_is_in_alphabetical_order():
    terms = re.findall(r"^\*\*(.+?)\*\*:", text_of("glossary.md"), re.MULTILINE)
    assert terms == sorted(terms, key=str.lower)
    assert {"Stream position", "Virtual rank", "Window", "Lease", "Hurried save"} <= set(terms)
