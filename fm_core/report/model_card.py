"""Model card of an exported model, as Markdown, and with the metadata of the Hugging Face hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fm_core.report.memorization_table import HEAD, NOTE, memorization_rows, memorization_verdict
from fm_core.report.score_columns import columns_of
from fm_core.report.score_table import ScoreEntry, compare_scores
from fm_core.report.score_text import INCEPTION

TASK = "unconditional-image-generation"
"""The hub's name for image generation from noise, with or without classes."""
METRICS = {
    "frechet_distance": "frechet-distance",
    "kernel_distance": "kernel-distance",
    "inception_score": "inception-score",
    "precision": "precision",
    "recall": "recall",
    "bits_per_dim": "bits-per-dim",
}
"""Scores in the metadata of the card, with their types there; with Inception's features the first is fid."""


@dataclass(frozen=True)
class CardFacts:
    """What a card describes."""

    name: str
    """Name of the run."""
    recipe: Mapping[str, Any]
    """The recipe that is stored in the weights file."""
    train: Mapping[str, Any]
    """The train section of the configuration."""
    data_recipe: Mapping[str, Any] | None
    """How the data set's pixels were produced, if the data set is available."""
    scores: Sequence[ScoreEntry]
    """All evaluations of these weights."""
    flow_map: bool = False
    """Whether the network has two times, so that it is sampled in a few evaluations."""


def model_card(facts: CardFacts, where: str = "this/folder") -> str:
    """Return the card as Markdown; `where` is what `fm_core.load` takes in its example."""
    recipe, train, data_recipe, scores = facts.recipe, facts.train, facts.data_recipe, facts.scores
    channels, height, width = recipe["image_shape"]
    data, method = recipe["data"], recipe["method"]
    classes = f"{recipe['classes']} classes" if recipe["model"]["class_conditional"] else "unconditional"
    has_options = facts.flow_map and method["objective_options"]
    options = f" {json.dumps(method['objective_options'])}" if has_options else ""
    table = {
        "images": f"{height} x {width}, {channels} channels, {recipe['levels']} intensity levels, {classes}",
        "data set": f"{data['name']}, version {data['version']}",
        "data recipe": json.dumps(data_recipe)
        if data_recipe
        else "the data set was not available when this card was written",
        "objective": f"{method['objective']}{options} on the path {method['path']}, "
        f"coupling {method['coupling']}",
        **({"training pairs": pairs_text(recipe["pairs"])} if "pairs" in recipe else {}),
        "network": json.dumps(recipe["model"]),
        "training": json.dumps({key: value for key, value in train.items() if value is not None}),
        "trained for": f"{recipe['images_seen']:,} images in {recipe['step']:,} steps"
        + (f", seed {recipe['seed']}" if "seed" in recipe else ""),
    }
    few_steps = ', solver="flow_map", steps=2' if facts.flow_map else ""
    rows = [f"| {key} | {value} |" for key, value in table.items()]
    lines = [
        f"# {facts.name}",
        "",
        "A flow map of images, sampled in a few evaluations."
        if facts.flow_map
        else "A flow-matching model of images.",
        "",
        "```python",
        "import fm_core",
        "",
        f'images = fm_core.load("{where}").sample(16{few_steps})  # uint8 [16, channels, height, width]',
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
        lines += _memorization(entry)
    for entry in scores:
        lines += [f"Protocol of {entry.name}:", "", "```json"]
        lines += [json.dumps(entry.scores["protocol"], indent=1), "```", ""]
    return "\n".join(lines)


def hub_card(facts: CardFacts, repository: str, license_name: str | None) -> str:
    """Return the card of a repository USER/NAME of the hub: metadata as YAML, then the Markdown.

    The metadata has no license unless one is given.
    """
    conditional = facts.recipe["model"]["class_conditional"]
    results = _results(facts)
    metadata = {
        **({"license": license_name} if license_name else {}),
        "library_name": "flow-matching-pipeline",
        "pipeline_tag": TASK,
        "tags": ["flow-matching", "image-generation", *(["class-conditional"] if conditional else [])],
        # The hub requires a result in this list.
        **({"model-index": [{"name": facts.name, "results": results}]} if results else {}),
    }
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n{model_card(facts, f'hf://{repository}')}"


def _results(facts: CardFacts) -> list[dict[str, Any]]:
    """The scores as the hub's model-index has them: one result for each evaluation.

    Scores of further extractors are only in the text of the card, because the type of a metric does not name
    features.
    """
    data = facts.recipe["data"]
    results = list[dict[str, Any]]()
    for entry in facts.scores:
        metrics = list[dict[str, Any]]()
        for column in columns_of([entry.scores]):
            record = column.record(entry.scores)
            if record is None or column.key not in METRICS or column.extractor is not None:
                continue
            inception = column.key == "frechet_distance" and record.get("features") == INCEPTION
            error = f", standard error {record['stderr']:.3g}" if "stderr" in record else ""
            error += " (unreliable)" if error and record.get("unreliable") else ""
            images = f", {record['images']:,} images" if "images" in record else ""
            metrics.append(
                {
                    "type": "fid" if inception else METRICS[column.key],
                    "name": f"{column.head([entry.scores])}{images}{error}",
                    "value": round(float(record.get("value", record.get("mean"))), 6),
                }
            )
        if metrics:
            results.append(
                {
                    "task": {"type": TASK},
                    "dataset": {"name": data["name"], "type": data["name"], "revision": data["version"]},
                    "metrics": metrics,
                }
            )
    return results


def _memorization(entry: ScoreEntry) -> list[str]:
    """Section with the memorization numbers of one evaluation; empty if there are none."""
    rows = memorization_rows(entry.scores)
    if not rows:
        return []
    table = [HEAD, ["---"] * len(HEAD), *rows]
    lines = [f"Memorization in {entry.name}:", "", *("| " + " | ".join(row) + " |" for row in table), ""]
    return [*lines, " ".join([memorization_verdict(entry.scores), NOTE]).strip(), ""]


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
