"""Model card of an exported model, as Markdown."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fm_core.report.score_table import ScoreEntry, compare_scores


def model_card(
    name: str,
    recipe: Mapping[str, Any],
    train: Mapping[str, Any],
    data_recipe: Mapping[str, Any] | None,
    scores: Sequence[ScoreEntry],
    flow_map: bool = False,
) -> str:
    """Return the model card as Markdown.

    Args:
        name: name of the run.
        recipe: the recipe that is stored in the weights file.
        train: the train section of the configuration.
        data_recipe: the recipe of the data set's pixels, if the data set is available.
        scores: all evaluations of these weights.
        flow_map: whether the network has two times, so that it is sampled in a few evaluations.
    """
    channels, height, width = recipe["image_shape"]
    data, method = recipe["data"], recipe["method"]
    classes = f"{recipe['classes']} classes" if recipe["model"]["class_conditional"] else "unconditional"
    options = (
        f" {json.dumps(method['objective_options'])}" if flow_map and method["objective_options"] else ""
    )
    facts = {
        "images": f"{height} x {width}, {channels} channels, {recipe['levels']} intensity levels, {classes}",
        "data set": f"{data['name']}, version {data['version']}",
        "data recipe": json.dumps(data_recipe)
        if data_recipe
        else "the data set was not available when this card was written",
        "objective": f"{method['objective']}{options} on the path {method['path']}, "
        f"coupling {method['coupling']}",
        "network": json.dumps(recipe["model"]),
        "training": json.dumps({key: value for key, value in train.items() if value is not None}),
        "trained for": f"{recipe['images_seen']:,} images in {recipe['step']:,} steps, seed {recipe['seed']}",
    }
    few_steps = ', solver="flow_map", steps=2' if flow_map else ""
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    lines = [
        f"# {name}",
        "",
        "A flow map of images, sampled in a few evaluations."
        if flow_map
        else "A flow-matching model of images.",
        "",
        "```python",
        "import fm_core",
        "",
        f'images = fm_core.load("this/folder").sample(16{few_steps})  # uint8 [16, channels, height, width]',
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
        return "\n".join([*lines, "No scores were computed.", ""])
    lines += [compare_scores(scores).text(), ""]
    for entry in scores:
        lines += [f"Protocol of {entry.name}:", "", "```json"]
        lines += [json.dumps(entry.scores["protocol"], indent=1), "```", ""]
    return "\n".join(lines)
