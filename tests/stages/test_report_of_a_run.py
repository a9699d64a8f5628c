"""The report of a tiny run: what it shows, what it links to, and when it is written again."""

import base64
import re
from urllib.parse import quote, unquote

import pytest
from PIL import Image

from fm_core.run.progress import three_digits
from fm_core.stages import report
from fm_core.storage.atomic_files import read_json, read_lines


@pytest.fixture
def scores(tiny):
    (file,) = (tiny.path / "evaluation" / "step-00000020").glob("*.json")
    return read_json(file)


@pytest.fixture
def text(tiny):
    return (tiny.path / "report.html").read_text()


def test_it_needs_no_other_file(text):
    sources = re.findall(r"""(?:src|srcset|data)\s*=\s*["']?([^"'\s>]+)""", text)
    assert len(sources) >= 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<(script|link|iframe|object)|@import|url\((?!#)", text)


def test_it_links_the_files_of_the_run(text, tiny):
    links = {unquote(link) for link in re.findall(r'<a href="\./([^"]*)"', text)}
    assert {"config.yaml", "train/metrics.jsonl", "logs/train-0.log", "train/DONE.json"} <= links
    assert [link for link in links if not (tiny.path / link).is_file()] == []
    samples = [path.relative_to(tiny.path).as_posix() for path in tiny.path.glob("samples/*/*/*.tar")]
    assert set(samples) <= links
    others = set(re.findall(r'href="([^"]*)"', text)) - {f"./{quote(link)}" for link in links}
    assert all(other.startswith("#") for other in others)


def test_it_states_the_cost_of_the_run(text, tiny):
    done = read_json(tiny.path / "train" / "DONE.json")
    cost = text.split(">Cost</h2>")[1].split("</table>")[0]
    row = re.findall(r"<td[^>]*>([^<]*)</td>", cost.split("<tr><td>train</td>")[1].split("</tr>")[0])
    assert row[1:4] == ["2", three_digits(2 * done["seconds"] / 3600), three_digits(320 / done["seconds"])]
    assert re.search(r"<td>sample</td>.*<td class=\"number\">4</td></tr>", cost)


def test_its_pictures_are_pictures(text):
    bodies = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert all(base64.b64decode(body).startswith(b"\x89PNG") for body in bodies)


def test_it_shows_loss_samples_neighbors_scores_and_times(text, scores, tiny):
    for phrase in ("training loss against images seen", "the first samples", "nearest training image"):
        assert f'alt="{phrase}' in text or phrase in text
    assert f"{scores['frechet_distance']['value']:.3f}" in text
    assert f"{scores['bits_per_dim']['value']:.3f}" in text
    assert "classifier features" in text
    for line in read_lines(tiny.path / "logs" / "stages.jsonl")[:4]:
        assert f"{line['seconds']:.1f} s" in text
    assert "320 images seen in 20 steps" in text
    assert "17 intensity levels" in text


def test_it_is_drawn_again_when_what_it_shows_changes(tiny):
    other = tiny.config.model_copy(update={"report": tiny.config.report.model_copy(update={"neighbors": 0})})
    before = (tiny.path / "report.html").read_bytes()
    try:
        assert report.report(other).state == "done"
        assert b"nearest training image (right)" not in (tiny.path / "report.html").read_bytes()
    finally:
        assert report.report(tiny.config).state == "done"
    assert len((tiny.path / "report.html").read_bytes()) >= len(before) - 500


def test_its_pictures_are_written_as_files_where_a_folder_is_named(tiny, tmp_path):
    before = (tiny.path / "report.html").read_bytes()
    folder = tmp_path / "pictures"
    named = tiny.config.report.model_copy(update={"pictures": str(folder)})
    assert report.report(tiny.config.model_copy(update={"report": named})).state == "done"
    names = {path.name for path in folder.iterdir()}
    assert {"report-samples.png", "report-training.png", "report-nearest-neighbors.png"} <= names
    assert all(Image.open(path).width > 100 for path in folder.iterdir())
    # The folder is not part of the content of the page.
    assert report.report(tiny.config).state == "verified"
    assert (tiny.path / "report.html").read_bytes()[-100:] == before[-100:]
