"""The points of a sweep: every combination of the values of sweep.axes, as a configuration of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

from fm_core.config import RunConfig, Section, merge, parse_config
from fm_core.config.sizes import SIZES
from fm_core.config.tree import all_keys, did_you_mean
from fm_core.errors import UserError
from fm_core.storage.hashing import fingerprint

SAMPLED, TRAINED = ("sample", "evaluate"), ("train", "model", "method")
"""Sections of the keys that give samples or scores of the same run, and of those that give another run."""
SEED = "run.seed"
PLACES = {
    *("sample.root", "sample.trust_code", "evaluate.samples", "evaluate.output", "evaluate.reference_out"),
    *("evaluate.processes", "evaluate.online", "train.checkpoint_root", "train.checkpoint_staging"),
    *("train.start_over", "train.prometheus", "train.tensorboard", "train.wandb"),
    # It sets other keys only where the configuration does not name them, which a point cannot tell.
    "evaluate.protocol",
}
"""Keys of these sections that change no score, or that cannot be swept."""
OF_A_SIZE = {key for keys in SIZES.values() for key in keys}
"""Keys of model that model.size sets."""
LONGEST_SUFFIX = 60
"""Maximum number of characters that the name of a point adds to that of the run."""


@dataclass(frozen=True)
class SweepPoint:
    """One combination of values."""

    values: Mapping[str, Any]
    """Value by dotted key, as in the configuration."""
    title: str
    """The values with the shortest names of their keys, e.g. "guidance 1.5, solver heun2"."""
    config: RunConfig
    """Complete configuration of the run, the samples and the scores of the point."""
    trained: bool
    """Whether the point is a run of its own."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages of the point, in order."""
        sampled = () if self.config.evaluate.samples == "sampler" else ("sample",)
        return (*(("train",) if self.trained else ()), *sampled, "evaluate")

    def with_config(self, config: RunConfig) -> "SweepPoint":
        """The point with another configuration."""
        return SweepPoint(self.values, self.title, config, self.trained)


def points_of(config: RunConfig) -> list[SweepPoint]:
    """The points of a sweep; the last axis varies fastest.

    `config` is the configuration of the sweep, without absent keys.

    Raises:
        UserError: a key is unknown or cannot be swept, a value is invalid, or two points are the same.
    """
    axes = config.sweep.axes
    if not axes:
        raise UserError(
            "sweep.axes is empty; give keys with their values, e.g. "
            "--sweep.axes '{\"sample.guidance\": [1, 1.5, 2]}'"
        )
    columns = [[_leaves(key, value) for value in values] for key, values in axes.items()]
    _check_disjoint(axes, columns)
    base = _base_tree(config)
    points = [
        _point(config, base, dict(pair for part in parts for pair in part)) for parts in product(*columns)
    ]
    titles = short_names([key for point in points for key in point.values])
    points = [
        SweepPoint(point.values, title_of(point.values, titles), point.config, point.trained)
        for point in points
    ]
    _check_distinct(points)
    return points


def short_names(keys: list[str]) -> dict[str, str]:
    """Names of dotted keys in titles: their last part, or the complete key if another ends in the same."""
    lasts = [key.rpartition(".")[2] for key in dict.fromkeys(keys)]
    return {key: key if lasts.count(last := key.rpartition(".")[2]) > 1 else last for key in keys}


def title_of(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The values of a point in one line."""
    return ", ".join(f"{names[key]} {value_text(value)}" for key, value in values.items())


def value_text(value: Any) -> str:
    """A value as text, e.g. 1.5, none, true, [0.2, 0.9]."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, cast(list[Any], value)))}]"
    if isinstance(value, Mapping):
        pairs = cast(Mapping[str, Any], value).items()
        return f"{{{', '.join(f'{name}: {value_text(each)}' for name, each in pairs)}}}"
    return str(value)


def run_name(base: str, values: Mapping[str, Any]) -> str:
    """Name of the run of a point: that of the sweep's run and the values that it is trained with.

    A long suffix is cut and ends in a hash.
    """
    texts = [text for key, value in values.items() for text in (key.rpartition(".")[2], value_text(value))]
    suffix = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") for text in texts)
    if len(suffix) > LONGEST_SUFFIX:
        suffix = f"{suffix[: LONGEST_SUFFIX - 7]}-{fingerprint(dict(values))[:6]}"
    return f"{base}-{suffix}"


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """The keys that one value of an axis sets. Raises UserError if they are unknown or cannot be swept."""
    known = all_keys()
    if key not in known:
        raise UserError(f"sweep.axes: {key}: unknown key{did_you_mean(key, known)}")
    key = known[key]
    if _is_section(key):
        if not isinstance(value, Mapping):
            raise UserError(
                f"sweep.axes: {key} is a section: each of its values must be a mapping of its keys, "
                f"not {value!r}"
            )
        pairs = cast(Mapping[str, Any], value).items()
        return [leaf for name, inner in pairs for leaf in _leaves(f"{key}.{name}", inner)]
    section = key.partition(".")[0]
    places = any(key == place or key.startswith(f"{place}.") for place in PLACES)
    if key != SEED and (section not in (*SAMPLED, *TRAINED) or places):
        raise UserError(
            f"sweep.axes: {key} cannot be swept; keys of sample, evaluate, train, model and method that "
            "change samples or scores can, and run.seed"
        )
    return [(key, value)]


def _is_section(key: str) -> bool:
    section: type[Section] = RunConfig
    for name in key.split("."):
        annotation = section.model_fields[name].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return False
        section = annotation
    return True


def _check_disjoint(axes: Mapping[str, Any], columns: list[list[list[tuple[str, Any]]]]) -> None:
    setters: dict[str, str] = {}
    for axis, column in zip(axes, columns, strict=True):
        for key in {key for leaves in column for key, _ in leaves}:
            if setters.setdefault(key, axis) != axis:
                raise UserError(
                    f"sweep.axes: {key} is set by both {setters[key]} and {axis}; keep one of them"
                )


def _base_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration of the sweep as a tree, without what concerns only the sweep or places of files."""
    tree = config.model_dump(mode="json")
    del tree["sweep"], tree["reproduce"]
    tree["evaluate"] |= {"output": None, "reference_out": None}
    tree["train"]["start_over"] = False
    return tree


def _point(config: RunConfig, base: Mapping[str, Any], values: dict[str, Any]) -> SweepPoint:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    if "model.size" in values:
        base = {**base, "model": {key: base["model"][key] for key in base["model"].keys() - OF_A_SIZE}}
    seed = values.get(SEED)
    if isinstance(seed, int) and "sample.seed" not in values:
        # Runs of different seeds are sampled from different noise, so that their scores are independent.
        tree.setdefault("sample", {})["seed"] = (config.sample.seed + seed) % 2**31
    shown = {key: key for key in values}
    made = parse_config(merge(base, tree), where=f"sweep.axes at {title_of(values, shown)}")
    dumped = made.model_dump(mode="json")
    valid = {key: _value_at(dumped, key) for key in values}
    own = {key: value for key, value in valid.items() if key == SEED or key.partition(".")[0] in TRAINED}
    if own:
        made = _as_own_run(config, made, run_name(config.run.name, own))
    return SweepPoint(valid, "", made, bool(own))


def _as_own_run(config: RunConfig, made: RunConfig, name: str) -> RunConfig:
    """The configuration of a point as that of a run with its own name and checkpoints."""
    places = {
        key: f"{url.rstrip('/')}/{name}"
        for key in ("checkpoint_root", "checkpoint_staging")
        if (url := getattr(config.train, key))
    }
    over = {"run": {"name": name}, "train": places}
    return parse_config(merge(made.model_dump(mode="json"), over), where="sweep.axes")


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for name in key.split("."):
        value = value[name]
    return value


def _check_distinct(points: list[SweepPoint]) -> None:
    titles: dict[str, str] = {}
    runs: dict[str, Any] = {}
    for point in points:
        tree = point.config.model_dump(mode="json")
        twin = titles.get(key := fingerprint(tree))
        if twin is not None:
            raise UserError(f"sweep.axes: two points are the same: {twin}; and {point.title}")
        titles[key] = point.title
        own = {name: tree[name] for name in (*TRAINED, "run")}
        if point.trained and runs.setdefault(point.config.run.name, own) != own:
            raise UserError(f"sweep.axes: two points would train the same run, {point.config.run.name}")
