"""The configuration tree of a run, read from YAML, with overrides key by key."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import yaml
from pydantic import BaseModel, ValidationError, create_model, model_validator

from fm_core.config.data import DataSection
from fm_core.config.evaluate import EvaluateSection
from fm_core.config.export import ExportSection
from fm_core.config.launch import RECORDED, LaunchSection
from fm_core.config.method import MethodSection
from fm_core.config.model import ModelSection
from fm_core.config.report import ReportSection
from fm_core.config.reproduce import ReproduceSection
from fm_core.config.run import RunSection
from fm_core.config.sample import SampleSection
from fm_core.config.section import Section
from fm_core.config.sweep import SweepSection
from fm_core.config.train import TrainSection
from fm_core.errors import UserError
from fm_core.storage.local_paths import expand_home

if TYPE_CHECKING:
    from yaml import SafeDumper as Dumper
    from yaml import SafeLoader as Loader
else:  # libyaml takes a tenth of the time of what is written in Python
    try:
        from yaml import CSafeDumper as Dumper
        from yaml import CSafeLoader as Loader
    except ImportError:
        from yaml import SafeDumper as Dumper
        from yaml import SafeLoader as Loader


class _RepeatedKeyError(yaml.constructor.ConstructorError):
    pass


class _UniqueKeys(Loader):
    """YAML loader that rejects duplicate keys, because the first value, often a section, would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a node's mapping. Raises ConstructorError for a duplicate key."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in lines:
                raise _RepeatedKeyError(
                    None,
                    None,
                    f"the key {key} appears in lines {lines[key]} and {line}; merge the two",
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


AS_WRITTEN = ("launch", "slurm", "options")
"""The table whose values are passed verbatim to another program."""
EARLIER_DEFAULTS = {"run": {"generator": "numpy-v1"}}
"""Values of keys that recorded files of earlier versions lack and whose default has another meaning."""
_UNAMBIGUOUS = re.compile(r"true|false|null|~||0|-?[1-9][0-9]*", re.IGNORECASE)


class RunConfig(Section):
    """The configuration of a run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    method: MethodSection = MethodSection()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection = EvaluateSection()
    report: ReportSection = ReportSection()
    export: ExportSection = ExportSection()
    reproduce: ReproduceSection = ReproduceSection()
    sweep: SweepSection = SweepSection()

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        source = self.data.source
        if source.format != "digits" and not source.url:
            raise ValueError(f"data.source.format {source.format} needs data.source.url")
        if source.format == "imagenet-npz" and not source.image_size:
            raise ValueError("data.source.format imagenet-npz needs data.source.image_size")
        if self.train.given("images") and self.train.warmup_images > self.train.images:
            raise ValueError("train.warmup_images is more than train.images")
        if self.train.label_dropout and not self.model.class_conditional:
            raise ValueError("train.label_dropout needs model.class_conditional: true")
        self._check_pairs()
        return self

    def _check_pairs(self) -> None:
        pairs, reflow = self.data.pairs.samples is not None, self.method.coupling == "reflow"
        if reflow != pairs:
            other = "data.pairs.samples, the samples to train on" if reflow else "method.coupling: reflow"
            raise ValueError(f"{'method.coupling reflow' if reflow else 'data.pairs.samples'} needs {other}")
        if pairs and self.data.horizontal_flip:
            raise ValueError(
                "data.horizontal_flip: a flipped sample is not the end of its noise's trajectory; set it to "
                "false with data.pairs.samples"
            )


def load_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None, recorded: bool = False
) -> RunConfig:
    """Read a YAML file and apply nested overrides; `recorded` as for `parse_config`.

    Raises:
        UserError: in one line, for a missing file, unknown keys and invalid values.
    """
    return parse_config(
        merge(read_yaml(path), present_names(overrides or {})), where=str(path), recorded=recorded
    )


def parse_config(tree: Mapping[str, Any], where: str, recorded: bool = False) -> RunConfig:
    """Validate a nested mapping; `where` is its source, for error messages.

    `recorded`: an earlier start wrote it, possibly with a version that accepted more or lacked a key.
    """
    tree = merge(EARLIER_DEFAULTS, tree) if recorded else tree
    try:
        return RunConfig.model_validate(tree, context=RECORDED if recorded else None)
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error)}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises UserError if the file is missing or is not a mapping."""
    try:
        text = expand_home(path).read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_UniqueKeys)
        _keep_written(text, tree, AS_WRITTEN)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); --config expects a YAML file") from None
    except _RepeatedKeyError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise UserError(f"{path}: not YAML: {message}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: contains a {type(tree).__name__}; expected a mapping of sections")
    return present_names(cast(dict[str, Any], tree))


def _keep_written(text: str, tree: Any, keys: Sequence[str]) -> None:
    """Replace the plain scalars of the table at `keys` by their text: YAML 1.1 parses 0123 as 83, on as true.

    true, false, null and decimal numbers keep their meaning.
    """
    node: Any = yaml.compose(text, Loader=Loader)
    for key in keys:
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in entries if name.value == key), None)
        tree = cast(dict[str, Any], tree).get(key) if isinstance(tree, dict) else None
    if not isinstance(node, yaml.MappingNode) or not isinstance(tree, dict):
        return
    for name, value in node.value:
        plain = isinstance(value, yaml.ScalarNode) and not value.style
        if plain and not _UNAMBIGUOUS.fullmatch(value.value):
            tree[name.value] = value.value


def dump_yaml(config: RunConfig) -> str:
    """The complete tree as YAML, in the order of the sections."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge one nested mapping into another, key by key; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        nested = merged.get(key)
        merged[key] = (
            merge(nested, value) if isinstance(nested, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def one_line(error: ValidationError) -> str:
    """Format all problems of a validation as one line: each key and what is wrong with it."""
    parts: list[str] = []
    for item in error.errors():
        key = (
            ".".join(str(part) for part in item["loc"] if not str(part).startswith("literal["))
            or "configuration"
        )
        if item["type"] == "extra_forbidden":
            parts.append(f"{key}: unknown key{did_you_mean(key, all_keys())}")
        elif item["type"] == "alias":
            alias, name = (f"{key}.{item.get('ctx', {})[part]}" for part in ("alias", "key"))
            parts.append(f"{alias} is an alias of {name}: give one of the two")
        elif item["type"] == "secret":
            parts.append(
                f"{key}: {item['msg']}; it would be written to config.yaml and the report. Credentials come "
                "from the environment (AWS_ACCESS_KEY_ID, ...) or fsspec's configuration (~/.config/fsspec)"
            )
        elif item["type"] == "value_error":
            parts.append(str(item["ctx"]["error"]) if "ctx" in item else item["msg"])
        else:
            value = repr(item["input"])
            shown = "a URL" if "://" in value else value  # which may contain a password
            message = item["msg"].partition(", unable to ")[0]
            parts.append(f"{key}: {message[0].lower()}{message[1:]}, not {shown}")
    return "; ".join(parts)


def all_keys(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every dotted key and alias, mapped to its current name."""
    names: dict[str, str] = {}
    for key, field in section.model_fields.items():
        below: dict[str, str] = {}
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            below = all_keys(field.annotation)
        for name in (key, *(alias for alias, meant in section.aliases.items() if meant == key)):
            names[f"{prefix}{name}"] = f"{prefix}{key}"
            names |= {f"{prefix}{name}.{inner}": f"{prefix}{key}.{now}" for inner, now in below.items()}
    return names


def present_names(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with the current names of its keys, so that it can be merged with another.

    If a key is given under both names, both are kept, and validation rejects them.
    """
    known, renamed = all_keys(), dict[str, Any]()
    for name, value in tree.items():
        key = known.get(f"{prefix}{name}", name).removeprefix(prefix)
        key = name if key in tree else key
        nested = isinstance(value, Mapping)
        renamed[key] = present_names(cast(Mapping[str, Any], value), f"{prefix}{key}.") if nested else value
    return renamed


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suffix of a message about an unknown name that suggests the closest known name, if any."""
    alike = [each for each in known if each.count(".") == name.count(".")]
    matches = get_close_matches(name, alike, n=1, cutoff=0.75)
    return f"; did you mean {matches[0]}?" if matches else ""


def config_class(preset: RunConfig) -> type[RunConfig]:
    """A RunConfig class whose defaults, at every depth, are the values of a preset.

    A caller that sets one key keeps the other values of the preset.
    """
    return cast(type[RunConfig], _with_defaults(RunConfig, preset))


def _with_defaults(section: type[BaseModel], preset: BaseModel) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        value = getattr(preset, name)
        annotation: Any = field.annotation
        if isinstance(value, Section):
            annotation = _with_defaults(type(value), value)
            value = annotation.model_validate(value.model_dump(exclude_unset=True))
        copied = copy(field)
        copied.default = value
        copied.annotation = annotation
        fields[name] = (annotation, copied)
    made = create_model(
        section.__name__,
        __base__=section,
        __doc__=section.__doc__,
        __module__=__name__,
        # The copied fields already have descriptions; parsing the sources again takes 0.05 s.
        __cls_kwargs__={"use_attribute_docstrings": False},
        **fields,
    )
    if isinstance(preset, Section) and issubclass(made, Section):
        made.preset_keys = type(preset).preset_keys | preset.model_fields_set
    return made
