"""The commented configuration file that `fm init` writes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import yaml

SHOWN_CLASSES = 8
NOTE_COLUMN = 44
"""Column of the notes after values."""
WIDTH = 100
"""Maximum line length of comments."""


@dataclass(frozen=True)
class SourceSummary:
    """What was found at the source."""

    url: str
    format: str
    """Detected value of data.source.format."""
    splits: dict[str, int]
    """Images of each split, train first."""
    own_split: bool
    """Whether the source has a validation split; otherwise data.split_seed chooses one."""
    classes: int | None
    """Number of classes; None without labels."""
    class_names: Sequence[str] = ()
    """Names of the classes, if they have names."""
    notes: Sequence[str] = ()
    """What was ignored or could not be read, and other notes for the user; one line each."""


@dataclass(frozen=True)
class TimeEstimate:
    """Estimated training time."""

    seconds: float
    images_per_s: float
    device: str
    """Where the speed was measured."""
    parameters: int
    """Size of the network."""


def starter_file(source: SourceSummary, tree: dict[str, dict[str, Any]], time: TimeEstimate) -> str:
    """A commented YAML file with the values of `tree`.

    `tree` contains the sections run, data, model, train, sample and optionally evaluate, in this order.
    """
    name, side = tree["run"]["name"], tree["data"]["source"].get("image_size")
    total = sum(source.splits.values())
    lines = [
        *_comment(
            f"{name}: written by fm init. Every value can be changed; fm train --help explains every key."
        ),
        "#",
        *_comment(f"Source: {total:,} images at {_plain(source.url)}, format {source.format}."),
        *_comment(_splits(source)),
        *_comment(_classes(source)),
        *(line for note in source.notes for line in _comment(_plain(note))),
        "#",
        *_comment(
            f"Next: fm shard --config {name}.yaml, then fm train --config {name}.yaml, fm sample, "
            f"{'fm evaluate, ' if source.classes else ''}fm report;"
        ),
        *_comment(
            f"or all of it in Prefect: prefect deployment run train-images --param config_file={name}.yaml"
        ),
        *_section("run", tree, {}),
        *_section(
            "data",
            tree,
            {
                "source": "format and splits as above"
                + (f"; images become {side} x {side} pixels" if side else ""),
                "validation_images": "not trained on; samples are compared with them",
                "horizontal_flip": "true doubles the images, unless left and right differ (text, digits)",
            },
        ),
        *_section(
            "model",
            tree,
            {
                "channels": "width of the network; the time grows with its square",
                "attention_resolutions": "sides in pixels",
                "time_scale": "with 1000, the paper's, adaptive solvers need more evaluations",
                "class_conditional": "the classes can be chosen: fm sample --sample.classes '[0]'",
            },
        ),
        *_section(
            "train",
            tree,
            {
                "images": f"each training image about {_epochs(source, tree):,} times",
                "micro_batch": "images of one forward pass; smaller needs less memory",
                "label_dropout": "lets fm sample use --sample.guidance 2",
            },
        ),
        *_section("sample", tree, {}),
        *_section("evaluate", tree, {}),
        "",
        *_comment(_time(time)),
        *_comment(_without_labels(source)),
        *_advice(source),
    ]
    return "\n".join(lines) + "\n"


def _epochs(source: SourceSummary, tree: dict[str, dict[str, Any]]) -> int:
    return ceil(tree["train"]["images"] / max(1, source.splits["train"]))


def duration(seconds: float) -> str:
    """A rough duration, e.g. "about 3 hours"."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return (
                f"about {seconds / length:.2g} {unit}"
                if seconds < 100 * length
                else f"{seconds / length:,.0f} {unit}"
            )
    return "about a minute" if seconds >= 30 else f"about {max(1, round(seconds))} seconds"


def _section(name: str, tree: dict[str, dict[str, Any]], notes: dict[str, str]) -> list[str]:
    if not tree.get(name):
        return []
    lines = ["", f"{name}:"]
    for key, value in tree[name].items():
        text, note = f"  {key}: {_flow(value)}", notes.get(key)
        if note and len(text) > NOTE_COLUMN:
            lines += [f"  # {note}", text]
        else:
            lines.append(f"{text:<{NOTE_COLUMN}} # {note}" if note else text)
    return lines


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"  # pyright: ignore
    if isinstance(value, int) and value >= 10_000:
        return f"{value:_}"
    if isinstance(value, float):
        return yaml.safe_dump(value).split("\n")[0]
    return json.dumps(value)


def _splits(source: SourceSummary) -> str:
    counts = ", ".join(f"{images:,} in {split}" for split, images in source.splits.items())
    how = (
        "the source's own" if source.own_split else "val is chosen by a seeded permutation (data.split_seed)"
    )
    return f"Splits: {counts}; {how}."


def _classes(source: SourceSummary) -> str:
    if not source.classes:
        return "Classes: none."
    names = [_plain(name) for name in source.class_names[:SHOWN_CLASSES]]
    more = ", ..." if len(source.class_names) > SHOWN_CLASSES else ""
    return f"Classes: {source.classes:,}" + (f": {', '.join(names)}{more}." if names else ".")


def _time(time: TimeEstimate) -> str:
    return (
        f"Training: {duration(time.seconds)} for a network of {time.parameters / 1e6:.1f} M parameters, at "
        f"{time.images_per_s:,.3g} images/s as measured for a few seconds on this machine ({time.device}); "
        "checkpoints and samples not counted."
    )


def _without_labels(source: SourceSummary) -> str:
    if source.classes:
        return ""
    return (
        "Without labels, fm evaluate has no classifier to compare samples by; it needs evaluate.features "
        "inception with evaluate.weights. The deployment train-images leaves the scores out."
    )


def _advice(source: SourceSummary) -> list[str]:
    few = source.splits["train"] < 20_000
    advice = [
        "When samples are blurred or shapeless: train longer. Raise train.images and run fm train again; it "
        "continues.",
        "When they are still poor: a wider network (model.channels, doubled) under another run.name.",
        "When the loss jumps or is not finite: train.learning_rate, halved, under another run.name.",
    ]
    if few:
        advice.insert(
            2,
            "When they copy training images (see the report): data.horizontal_flip true, model.dropout 0.1, "
            "or more images.",
        )
    if source.classes:
        advice.append("When they ignore their class: fm sample --sample.guidance 2.")
    return ["#", "# What to change first when results are poor:"] + [
        line for text in advice for line in _comment(f"- {text}")
    ]


def _comment(text: str) -> list[str]:
    """The text as comment lines."""
    lines, line = list[str](), "#"
    for word in text.split():
        if len(line) + 1 + len(word) > WIDTH and line != "#":
            lines.append(line)
            line = "#  "
        line += f" {word}"
    return [*lines, line] if text else []


def _plain(text: str) -> str:
    """Text of a file name without line breaks, control characters and invalid UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in text)
