"""Registry of paths, objectives, couplings and timestep samplers by their names in configuration files.

A name is either built in, such as "optimal-transport", or the import path "package.module:Class" of a
user-defined subclass of `Path`, `Objective`, `Coupling` or `TimestepSampler`. Built-in classes are registered
by their class attribute `name`.
"""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Collection, Mapping
from typing import TypeVar

import fm_core.method
from fm_core.errors import UserError
from fm_core.method import couplings, objectives, paths, timestep_samplers
from fm_core.method.types import Interval

T = TypeVar("T")
Option = float | int | str | bool
TYPE_NAMES: dict[object, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
}
"""Annotated type of an option -> its name in error messages."""


def path_named(name: str, options: Mapping[str, Option] | None = None) -> paths.Path:
    """Build the path with this name.

    Raises:
        UserError: the name or an option is unknown, or the class refuses an option's value.
    """
    return _build(paths.Path, "path", name, (), options)


def objective_named(
    name: str, path: paths.Path, options: Mapping[str, Option] | None = None
) -> objectives.Objective:
    """Build the objective with this name on a path.

    Raises:
        UserError: as in `path_named`, or the objective is not defined on the path.
    """
    return _build(objectives.Objective, "objective", name, (path,), options)


def coupling_named(name: str, options: Mapping[str, Option] | None = None) -> couplings.Coupling:
    """Build the coupling with this name; raises UserError like `path_named`."""
    return _build(couplings.Coupling, "coupling", name, (), options)


def timestep_sampler_named(
    name: str, interval: Interval, options: Mapping[str, Option] | None = None
) -> timestep_samplers.TimestepSampler:
    """Build the timestep sampler with this name on an interval; raises UserError like `path_named`."""
    return _build(timestep_samplers.TimestepSampler, "time distribution", name, (interval,), options)


def require_known_code(names: Mapping[str, str], known: Collection[str], where: str) -> None:
    """Refuse classes that only a weights file names, because importing a module runs its code.

    Args:
        names: names in a recipe by kind of component ("path", "objective", ...).
        known: names trusted in addition to the built-in ones, such as those in a run's own configuration.
        where: the file, for the error message.

    Raises:
        UserError: a name is neither built in nor known.
    """
    for what, name in names.items():
        if ":" in name and name not in known:
            raise UserError(
                f"{where} names code of its own, the {what} {name}, which loading would run; if you trust "
                "it, pass trust_code=True, or --trust-code on the command line"
            )


def supported_pairs() -> dict[tuple[str, str], Interval | str]:
    """Interval of t, or reason for refusal, of each built-in (objective, path) with default options."""
    pairs: dict[tuple[str, str], Interval | str] = {}
    for objective, cls in built_in(objectives.Objective).items():
        for path in built_in(paths.Path):
            try:
                pairs[objective, path] = cls.interval_on(path_named(path))
            except UserError as error:
                pairs[objective, path] = str(error)
    return pairs


def built_in(kind: type[T]) -> dict[str, type[T]]:
    """The built-in subclasses of `kind` by name; modules of this package are discovered, not listed."""
    for module in pkgutil.iter_modules(fm_core.method.__path__):
        importlib.import_module(f"fm_core.method.{module.name}")
    classes: dict[str, type[T]] = {}
    pending = kind.__subclasses__()
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        name = cls.__dict__.get("name")
        if isinstance(name, str) and name and cls.__module__.startswith("fm_core.method."):
            classes[name] = cls
    return dict(sorted(classes.items()))


def _build(
    kind: type[T], what: str, name: str, positional: tuple[object, ...], options: Mapping[str, Option] | None
) -> T:
    cls = _load_class(kind, what, name)
    options = dict(options or {})
    allowed = dict(list(inspect.signature(cls).parameters.items())[len(positional) :])
    for option, value in options.items():
        if option not in allowed:
            names = ", ".join(allowed) or "none"
            raise UserError(f"unknown option {option!r} of the {what} {name}; allowed: {names}")
        if expected := _type_mismatch(value, allowed[option].annotation):
            raise UserError(
                f"the {what} {name} cannot be built with {options}: "
                f"{option} must be {expected}, not {value!r}"
            )
    try:
        return cls(*positional, **options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the {what} {name} cannot be built with {options}: {reason}") from error


def _type_mismatch(value: Option, annotation: object) -> str:
    """Name the type that a parameter's annotation expects instead of this value; empty if the value fits."""
    kinds = [kind for kind in (typing.get_args(annotation) or (annotation,)) if kind is not type(None)]
    if type(value) in kinds or (type(value) is int and float in kinds) or not set(kinds) <= TYPE_NAMES.keys():
        return ""
    return " or ".join(TYPE_NAMES[kind] for kind in kinds)


def _load_class(kind: type[T], what: str, name: str) -> type[T]:
    classes = built_in(kind)
    if name in classes:
        return classes[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"unknown {what} {name!r}; allowed: {', '.join(classes)}, or package.module:Class")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "; put it into the working directory or on PYTHONPATH" if _is_missing(module, error) else ""
        raise UserError(f"cannot import the {what} {name}: {error}{hint}") from error
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise UserError(f"the {what} {name} is not a subclass of {kind.__module__}.{kind.__name__}")
    return cls


def _is_missing(module: str, error: Exception) -> bool:
    """Whether the module itself was not found, rather than a module that it imports."""
    return isinstance(error, ModuleNotFoundError) and module.startswith(error.name or module)
