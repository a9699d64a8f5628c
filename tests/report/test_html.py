import base64
import io
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from fm_core.report.file_links import FileLink, FileLinks
from fm_core.report.gallery import Gallery, Unit, data_uri
from fm_core.report.html import Fact, Figure, PageSection, Table, page
from fm_core.report.image_grids import grid, nearest, png
from fm_core.report.plots import ErrorBar, averaged, distance_curve, error_bar_plot, loss_curve
from tests.support import ROOT

EMPTY = ("meta", "img", "source", "br")
BAD = "<script>alert(1)</script>\"' onload=alert(1) $x^$ {{ 7 * 7 }} {% raw %}"


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def everything(text: str) -> str:
    """A page with a part of each kind, whose texts are all `text`."""
    picture = data_uri(png(grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 17, 1)))
    drawing = error_bar_plot(text, [ErrorBar(text, 1.0, 0.1)])
    gallery = Gallery([Unit(text, [picture], text, still=picture)], text, 80, 80, enlarged=True)
    links = FileLinks((FileLink(text, "./name", "1 kB"),))
    parts = [Table([text], [[text]]), Figure(drawing, text), Figure(picture, text), gallery, links]
    sections = [PageSection(text, parts, text, text), PageSection(text, [], text, text, folded=True)]
    return page(text, text, sections, [Fact(text, text, text)])


def test_the_page_is_well_formed_and_contains_its_arguments():
    table = Table(["", "value"], [["distance", "1.5 ± 0.2"], ["name", "x"]])
    figure = Figure(data_uri(b"png"), 'a "caption" <b>')
    text = page("Run <1>", "lead & more", [PageSection("Scores", [table, figure], "note", text="k: <v>\n")])
    reader = Reader(text)
    assert reader.open == []
    text = "".join(reader.texts)
    for part in ("Run <1>", "lead & more", "Scores", "1.5 ± 0.2", "note", "k: <v>", 'a "caption" <b>'):
        assert part in text
    image = next(attributes for tag, attributes in reader.tags if tag == "img")
    assert image["alt"] == 'a "caption" <b>'


def test_nothing_that_is_shown_can_be_markup():
    plain, hostile = Reader(everything("plain")), Reader(everything(BAD))
    assert hostile.open == []
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    # An attribute that is not one of the plain page's would have come out of a text.
    names = [sorted(attributes) for _, attributes in plain.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == names
    assert "".join(hostile.texts).count(BAD) >= 10


def test_a_page_follows_the_theme_and_asks_for_no_other_file():
    text = everything("plain")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    used = {
        value
        for _, attributes in Reader(text).tags
        for key, value in attributes.items()
        if key in ("src", "srcset")
    }
    assert used
    assert all(value.startswith("data:image/png;base64,") for value in used)
    assert "<script" not in text
    assert "url(" not in text.replace("url(#", "")


def test_protocols_and_configurations_are_folded():
    tags = [tag for tag, _ in Reader(page("", "", [PageSection("Scores", [], text="protocol")])).tags]
    assert tags.index("details") < tags.index("pre")
    folded = Reader(page("", "", [PageSection("Files", [Table(["a"], [["b"]])], folded=True)]))
    tags = [tag for tag, _ in folded.tags]
    assert tags.index("details") < tags.index("h2") < tags.index("table")
    assert all("open" not in attributes for tag, attributes in folded.tags if tag == "details")


def test_the_templates_are_in_the_wheel():
    """Each file of the folder matches a pattern of package-data."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "fm_core"
    ]
    files = sorted((ROOT / "fm_core" / "report" / "templates").iterdir())
    assert len(files) >= 3
    for file in files:
        name = file.relative_to(ROOT / "fm_core").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize(
    "number",
    ["12.5", "+0.1", "1,000", "5 min 8 s", "90.1%", "7.8% to 12.7%", "-3.0e-05", "0.5 ± 0.1 (± unreliable)"],
)
def test_columns_of_numbers_are_aligned_to_the_right(number):
    rows = [[number, "a name"], [number, "1,000 samples"], ["not known", ""], ["", number]]
    html = Table(["value", "of"], rows).html()
    assert html.count('<td class="number">') == 4
    assert html.count('<th scope="col" class="number">') == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_in_its_place_at_full_range(channels):
    images = torch.zeros(5, channels, 2, 3, dtype=torch.uint8)
    for number in range(5):
        images[number] = number * 4
    picture = grid(images, levels=17, columns=3, scale=2)
    assert picture.size == (3 * 4 * 2, 2 * 3 * 2)  # including the lines between images
    for number in range(5):
        column, row = number % 3, number // 3
        value = picture.convert("RGB").getpixel((column * 8 + 5, row * 6 + 3))
        assert value == (round(number * 4 * 255 / 16),) * 3
        assert picture.convert("RGB").getpixel((column * 8 + 6, row * 6 + 3)) == (0,) * 3
    assert picture.convert("L").getpixel((17, 9)) == 0


def test_a_png_in_a_page_is_the_image():
    picture = grid(torch.full((1, 1, 2, 2), 16, dtype=torch.uint8), 17, 1)
    uri = data_uri(png(picture))
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).crop((0, 0, 4, 4)).getextrema() == (255, 255)


LINE = {"images_seen": 10, "loss": 1.0, "loss_by_quarter_of_t": [1.0, None, 0.5, 2.0]}


@pytest.mark.parametrize("metrics", [[LINE], [LINE, {**LINE, "images_seen": 20, "loss": None}]])
def test_a_loss_curve_is_drawn_from_one_line_on_and_with_gaps(metrics):
    drawing = loss_curve(metrics)
    assert Image.open(io.BytesIO(drawing.png())).width > 400
    assert "validation" not in drawing.svg("loss")


def test_a_loss_curve_shows_the_validation_loss_where_it_was_measured():
    validation = [{"images_seen": 10, "loss": 0.9}, {"images_seen": 20, "loss": None}]
    assert ">validation<" in loss_curve([LINE], validation).svg("loss")
    assert ">validation<" not in loss_curve([LINE], validation[1:]).svg("loss")


def test_a_long_run_does_not_make_a_large_plot():
    quarters = [0.5, 1.5, None, 2.0]
    metrics = [{"images_seen": i, "loss": float(i), "loss_by_quarter_of_t": quarters} for i in range(1000)]
    lines = averaged(metrics, points=10)
    assert [line["images_seen"] for line in lines] == list(range(99, 1000, 100))
    assert [line["loss"] for line in lines] == pytest.approx([49.5 + 100 * i for i in range(10)])
    assert lines[0]["loss_by_quarter_of_t"] == quarters
    assert len(loss_curve(metrics * 50).svg("loss")) < 150_000


def test_a_plot_has_the_colors_of_the_page_and_no_background():
    scores = [
        {"images_seen": seen, "frechet_distance": 100 / seen, "stderr": 0.1, "features": "classifier"}
        for seen in (1, 10, 100)
    ]
    svg = distance_curve(scores).svg("distance")
    assert "var(--ink)" in svg
    assert "var(--series-1)" in svg
    assert "fill: #ffffff" not in svg
    assert "<style" not in svg
    assert distance_curve(scores).svg("distance") == svg


def test_an_error_is_drawn_as_long_as_it_is():
    """The ends of the bars are in the proportions of the values."""
    figure = error_bar_plot("title", [ErrorBar("a", 1.0, 0.5), ErrorBar("b", 3.0, 1.0)]).figure
    (container,) = figure.axes[0].containers
    segments = container[2][0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[0.5, 1.5], [2.0, 4.0]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_the_nearest_image_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(0, 17, (50, 1, 4, 4), dtype=torch.uint8, generator=generator)
    samples = training[[7, 31]].clone()
    samples[1, 0, 0, 0] += 2
    ids, distances = nearest(samples, training)
    assert ids.tolist() == [7, 31]
    assert distances.tolist() == pytest.approx([0, 0.5])
