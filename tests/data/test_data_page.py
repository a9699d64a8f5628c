"""The page on data says what the code does, and its recipe for another program runs."""

import re
from pathlib import Path

import pytest

from fm_core.config.data import DataSection, SourceFormat
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.sources.image_decoding import MAX_ASPECT, MAX_PIXELS
from fm_core.data.sources.split_words import SPLIT_WORDS

PAGE = (Path(__file__).parents[2] / "infra/docs/data.md").read_text()


def test_the_recipe_feeds_the_shards_to_a_plain_pytorch_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(DataSection())
    recipe = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    assert len([line for line in recipe.splitlines() if line and not line.startswith("import")]) == 3
    names = {}
    exec(recipe, names)
    seen = list(names["loader"])
    assert sum(len(images) for images, _ in seen) == 1297
    images, labels = seen[0]
    assert (list(images.shape), str(images.dtype)) == ([64, 1, 8, 8], "torch.uint8")
    assert (list(labels.shape), str(labels.dtype)) == ([64], "torch.int64")
    assert set(labels.tolist()) <= set(range(10))


@pytest.mark.parametrize("kind", SPLIT_WORDS)
def test_every_split_word_is_on_the_page(kind):
    assert ", ".join(SPLIT_WORDS[kind]) in re.sub(r"\s+", " ", PAGE)


def test_every_format_and_limit_is_on_the_page():
    for name in SourceFormat.__args__:
        assert name in PAGE or name == "digits"
    assert MAX_PIXELS == 2**28
    assert f"aspect ratio above {MAX_ASPECT}" in PAGE
