import base64
import io
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from fm_core.report.html import Figure, PageSection, Table, data_uri, page
from fm_core.report.image_grids import grid, nearest, png
from fm_core.report.plots import loss_curve


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_well_formed_and_contains_its_arguments():
    table = Table(["", "value"], [["distance", "1.5 ± 0.2"], ["name", "x"]])
    figure = Figure(data_uri(b"png"), 'a "caption" <b>', plot=True)
    text = page("Run <1>", "lead & more", [PageSection("Scores", [table, figure], "note", text="k: <v>\n")])
    reader = Reader(text)
    assert reader.open == []
    text = "".join(reader.texts)
    for part in ("Run <1>", "lead & more", "Scores", "1.5 ± 0.2", "note", "k: <v>", 'a "caption" <b>'):
        assert part in text
    image = next(attributes for tag, attributes in reader.tags if tag == "img")
    assert image["alt"] == 'a "caption" <b>'
    assert image["class"] == "plot"


def test_nothing_that_is_shown_can_be_markup():
    bad = "<script>alert(1)</script>"
    text = page(bad, bad, [PageSection(bad, [Table([bad], [[bad]]), Figure("data:,", bad)], bad, bad)])
    assert "<script" not in text


def test_numbers_stand_to_the_right():
    html = Table(["a"], [["12.5"], ["word"], [""]]).html()
    assert html.count("class=number") == 1


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


def test_a_loss_curve_is_drawn_from_one_line_on_and_with_gaps():
    line = {"images_seen": 10, "loss": 1.0, "loss_by_quarter_of_t": [1.0, None, 0.5, 2.0]}
    for metrics in ([line], [line, {**line, "images_seen": 20, "loss": None}]):
        picture = Image.open(io.BytesIO(loss_curve(metrics)))
        assert picture.width > 500


def test_the_nearest_image_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(0, 17, (50, 1, 4, 4), dtype=torch.uint8, generator=generator)
    samples = training[[7, 31]].clone()
    samples[1, 0, 0, 0] += 2
    ids, distances = nearest(samples, training)
    assert ids.tolist() == [7, 31]
    assert distances.tolist() == pytest.approx([0, 0.5])
