"""The model card: what a model is, for those who get it without its run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fm_core.report.score_table import Entry, compared


def model_card(
    name: str,
    recipe: Mapping[str, Any],
    train: Mapping[str, Any],
    data_recipe: Mapping[str, Any] | None,
    scores: Sequence[Entry],
) -> str:
    """A page in Markdown.

    Args:
        name: of the run.
        recipe: what the file of weights says of itself.
        train: the train section of the configuration.
        data_recipe: how the pixels came about, where the data set is at hand.
        scores: every evaluation of these weights.
    """
    channels, height, width = recipe["image_shape"]
    data, method = recipe["data"], recipe["method"]
    of_classes = f"{recipe['classes']} classes" if recipe["model"]["class_conditional"] else "unconditional"
    facts = {
        "images": f"{height} x {width}, {channels} channels, {recipe['levels']} grey levels, {of_classes}",
        "data set": f"{data['name']}, version {data['version']}",
        "data recipe": json.dumps(data_recipe) if data_recipe else "not at hand when this was written",
        "objective": f"{method['objective']} on the path {method['path']}, coupling {method['coupling']}",
        "network": json.dumps(recipe["model"]),
        "training": json.dumps({key: value for key, value in train.items() if value is not None}),
        "trained for": f"{recipe['images_seen']:,} images in {recipe['step']:,} steps, seed {recipe['seed']}",
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    lines = [
        f"# {name}",
        "",
        "A flow-matching model of images.",
        "",
        "```python",
        "import fm_core",
        "",
        'images = fm_core.load("this/folder").sample(16)  # uint8 [16, channels, height, width]',
        "```",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
        "## Scores",
        "",
    ]
    if not scores:
        return "\n".join([*lines, "None were computed.", ""])
    lines += [compared(scores).text(), ""]
    for entry in scores:
        lines += [f"Protocol of {entry.name}:", "", "```json"]
        lines += [json.dumps(entry.scores["protocol"], indent=1), "```", ""]
    return "\n".join(lines)
