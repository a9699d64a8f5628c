"""Links to the files of a run, whatever their names are."""

from urllib.parse import unquote, urljoin, urlsplit

import pytest

from fm_core.report import file_links as module
from fm_core.report.file_links import file_links
from fm_core.report.html import PageSection

NAMES = ("javascript:alert(1)", "a <b>&c.json", "100%.txt", "a?b#c.txt", "logs/stage 1.log")


def links_of(folder):
    return file_links(folder, folder / "report.html", lambda size: f"{size} bytes").links


@pytest.fixture
def folder(tmp_path):
    for name in (*NAMES, "report.html", "lock", ".hidden", "samples/.part/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
    return tmp_path


def test_every_file_is_linked_and_a_link_leads_to_its_file(folder):
    links = links_of(folder)
    assert sorted(link.name for link in links) == sorted(NAMES)
    page = "file:///run/report.html"
    for link in links:
        target = urlsplit(urljoin(page, link.href))
        assert (target.scheme, target.query, target.fragment) == ("file", "", "")
        assert unquote(target.path) == f"/run/{link.name}"
        assert link.size == "7 bytes"


def test_names_are_escaped(folder):
    html = PageSection("Files", [file_links(folder, folder / "report.html", str)]).html()
    assert "a &lt;b&gt;&amp;c.json" in html
    assert "<b>" not in html
    assert 'href="javascript:' not in html


def test_of_too_many_files_the_fullest_folders_are_linked(folder, monkeypatch):
    for number in range(20):
        path = folder / "samples" / f"{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.setattr(module, "MAX_LINKS", 10)
    links = {link.name: link for link in links_of(folder)}
    assert links["samples/"].size == "20 files"
    assert links.keys() - {"samples/"} == set(NAMES)


def test_a_name_that_is_not_utf8_does_not_prevent_a_page(tmp_path):
    import os

    (tmp_path / os.fsdecode(b"\xff.txt")).touch()
    (link,) = links_of(tmp_path)
    assert link.href == "./%FF.txt"
    link.name.encode()
