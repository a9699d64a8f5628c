"""Paths, objectives, couplings and time distributions by the names that configuration files use.

A name is a built-in one, such as "optimal-transport", or the import path "package.module:Class" of a class
from outside. A class joins by subclassing `Path`, `Objective`, `Coupling` or `Times` and giving a `name`.
"""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from typing import TypeVar

import fm_core.method
from fm_core.errors import UserError
from fm_core.method import couplings, objectives, paths, timestep_samplers
from fm_core.method.types import Interval

T = TypeVar("T")
Option = float | int | str | bool
KINDS: dict[object, str] = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
"""What an option's annotation asks for, in words."""


def path_named(name: str, options: Mapping[str, Option] | None = None) -> paths.Path:
    """The path of that name.

    Raises:
        UserError: an unknown name or option, or an option's value that the class refuses.
    """
    return _build(paths.Path, "path", name, (), options)


def objective_named(
    name: str, path: paths.Path, options: Mapping[str, Option] | None = None
) -> objectives.Objective:
    """The objective of that name on a path; raises UserError as `path_named`, and for an unsupported pair."""
    return _build(objectives.Objective, "objective", name, (path,), options)


def coupling_named(name: str, options: Mapping[str, Option] | None = None) -> couplings.Coupling:
    """The coupling of that name; raises UserError as `path_named`."""
    return _build(couplings.Coupling, "coupling", name, (), options)


def times_named(
    name: str, interval: Interval, options: Mapping[str, Option] | None = None
) -> timestep_samplers.TimestepSampler:
    """The time distribution of that name on an interval; raises UserError as `path_named`."""
    return _build(timestep_samplers.TimestepSampler, "time distribution", name, (interval,), options)


def supported_pairs() -> dict[tuple[str, str], Interval | str]:
    """For each (objective, path) of this package, at defaults, the interval of t or the reason of refusal."""
    pairs: dict[tuple[str, str], Interval | str] = {}
    for objective, cls in built_in(objectives.Objective).items():
        for path in built_in(paths.Path):
            try:
                pairs[objective, path] = cls.interval_on(path_named(path))
            except UserError as error:
                pairs[objective, path] = str(error)
    return pairs


def built_in(kind: type[T]) -> dict[str, type[T]]:
    """The classes of this package that have a name, by it: a new module here needs no entry anywhere."""
    for module in pkgutil.iter_modules(fm_core.method.__path__):
        importlib.import_module(f"fm_core.method.{module.name}")
    found: dict[str, type[T]] = {}
    waiting = kind.__subclasses__()
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        name = cls.__dict__.get("name")
        if isinstance(name, str) and name and cls.__module__.startswith("fm_core.method."):
            found[name] = cls
    return dict(sorted(found.items()))


def _build(
    kind: type[T], what: str, name: str, given: tuple[object, ...], options: Mapping[str, Option] | None
) -> T:
    cls = _find(kind, what, name)
    options = dict(options or {})
    allowed = dict(list(inspect.signature(cls).parameters.items())[len(given) :])
    for option, value in options.items():
        if option not in allowed:
            listed = ", ".join(allowed) or "none"
            raise UserError(f"unknown option {option!r} of the {what} {name}; allowed: {listed}")
        if wanted := _mistyped(value, allowed[option].annotation):
            raise UserError(
                f"the {what} {name} cannot be made with {options}: {option} is {wanted}, not {value!r}"
            )
    try:
        return cls(*given, **options)
    except (TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"the {what} {name} cannot be made with {options}: {told}") from error


def _mistyped(value: Option, annotation: object) -> str:
    """What is expected instead of a value, by a parameter's annotation; empty if the value will do."""
    kinds = [kind for kind in (typing.get_args(annotation) or (annotation,)) if kind is not type(None)]
    if type(value) in kinds or (type(value) is int and float in kinds) or not set(kinds) <= KINDS.keys():
        return ""
    return " or ".join(KINDS[kind] for kind in kinds)


def _find(kind: type[T], what: str, name: str) -> type[T]:
    known = built_in(kind)
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"unknown {what} {name!r}; allowed: {', '.join(known)}, or package.module:Class")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import the {what} {name}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise UserError(f"the {what} {name} is not a subclass of {kind.__module__}.{kind.__name__}")
    return cls
