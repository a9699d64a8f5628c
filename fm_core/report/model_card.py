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
) -> str:
    """Return the model card as Markdown.

    Args:
        name: name of the run.
        recipe: the recipe that is stored in the weights file.
        train: the train section of the configuration.
        data_recipe: the recipe of the data set's pixels, if the data set is available.
        scores: all evaluations of these weights.
    """
    channels, height, width = recipe["image_shape"]
    data, method = recipe["data"], recipe["method"]
    classes = f"{recipe['classes']} classes" if recipe["model"]["class_conditional"] else "unconditional"
    facts = {
        "images": f"{height} x {width}, {channels} channels, {recipe['levels']} intensity levels, {classes}",
        "data set": f"{data['name']}, version {data['version']}",
        "data recipe": json.dumps(data_recipe)
        if data_recipe
        else "the data set was not available when this card was written",
        "objective": f"{method['objective']} on the path {method['path']}, coupling {method['coupling']}",
        **({"training pairs": pairs_text(recipe["pairs"])} if "pairs" in recipe else {}),
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
        return "\n".join([*lines, "No scores were computed.", ""])
    lines += [compare_scores(scores).text(), ""]
    for entry in scores:
        lines += [f"Protocol of {entry.name}:", "", "```json"]
        lines += [json.dumps(entry.scores["protocol"], indent=1), "```", ""]
    return "\n".join(lines)


def pairs_text(pairs: Mapping[str, Any]) -> str:
    """Describe the sample set that a model was trained on (reflow) in one line; `pairs` is of its recipe."""
    protocol: Mapping[str, Any] = pairs["protocol"]
    accuracy = f"{protocol['steps']} steps" if "steps" in protocol else f"rtol {protocol.get('rtol')}"
    guidance = f", guidance {protocol['guidance']:g}" if "guidance" in protocol else ""
    return (
        f"{protocol['images']:,} samples of step {pairs['step']:,} of the weights "
        f"{protocol['weights_sha256'][:16]} with {protocol['solver']}, {accuracy}{guidance}, seed "
        f"{protocol['seed']}, stored as {protocol.get('store', 'uint8')}; {pairs['validation_images']:,} of "
        "them for validation"
    )
