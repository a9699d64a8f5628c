"""The command line: `fm STAGE --config FILE [--section.key VALUE ...]`."""

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, cast

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from fm_core.config import RunConfig, load_config, parse_config
from fm_core.errors import Outcome, StopRequested, UserError, outcome_of

STAGES = {
    "shard": "write a data set's shards and manifest, or verify them",
    "train": "train from the newest complete checkpoint to train.images",
    "sample": "make images from a checkpoint",
    "evaluate": "score samples and model",
    "report": "write report.html",
    "validate": "check a data set's shards, and mend them if asked",
    "reproduce": "compare objectives as the paper does, with its figures",
    "export": "write a folder with weights, configuration and model card that loads anywhere",
}

COMMANDS = {
    **STAGES,
    "status": "what a run is doing now",
    "compare": "scores of several runs in one table",
    "doctor": "what works here, what is wrong with a configuration, what it will cost",
}
FLAGS = {
    "status": {"follow": "print a line every few seconds until interrupted"},
    "validate": {
        "quick": "sizes and commit marks alone",
        "deep": "every image's CRC, duplicates, and the source as well",
        "repair": "write damaged shards again first",
    },
    "reproduce": {
        "dry-run": "check the configuration, say what the comparison will take, and start nothing",
    },
}
NUMBERS: dict[str, dict[str, tuple[float | None, str]]] = {
    "reproduce": {
        "peak": (None, "FLOP/s of a device; by default this GPU's in bf16, or where none is known an H200's"),
        "mfu": (0.3, "share of the peak that goes into the network's operations"),
        "images-per-s": (None, "images that one device trains on in a second, measured; instead of both"),
        "nfe": (None, "evaluations of dopri5 for an image; by default the paper's, or unknown"),
    },
}
"""For --dry-run."""
DOCTOR_FLAGS = {
    "--model": "parameters and operations of the network",
    "--launch": "whether the hosts of the configuration can be reached and agree",
    "--cost": "time, storage and traffic of training on --hosts times --devices devices",
}
DOCTOR_NUMBERS: dict[str, tuple[type, float, str]] = {
    "hosts": (int, 1, "for --cost: number of hosts"),
    "devices": (int, 1, "for --cost: devices of each host"),
    "peak": (float, 989e12, "for --cost: FLOP/s of a device; the default is bf16 on an H100 or H200"),
    "mfu": (float, 0.3, "for --cost: share of the peak that goes into the network's operations"),
    "store-rate": (float, 1e9, "for --cost: bytes per second to the store of checkpoints"),
}


class _Overrides(RunConfig, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The configuration tree as command-line options."""


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(Outcome.REFUSED.exit_code, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 done, 2 the user's mistake, 3 stopped and resumable, 1 else."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        if words[:1] == ["doctor"]:
            return _doctor(words[1:])
        if words[:1] == ["compare"]:
            return _compare(words[1:])
        command, config, flags, numbers = _parse(words)
        if command == "status":
            from fm_core.terminal import show_status

            return show_status(config, follow="follow" in flags)
        if "dry-run" in flags:
            from fm_core.reproduce.cost_estimate import estimate

            print(estimate(config, **numbers).text())
            return 0
        _run_stage(command, config, flags)
    except (Exception, KeyboardInterrupt) as error:
        outcome = outcome_of(error)
        message = str(error)
        if outcome is Outcome.STOPPED:
            message = message or "stopped; run it again to continue"
        elif not isinstance(error, UserError):
            logging.getLogger("fm_core").debug("failed", exc_info=True)
            message = f"{type(error).__name__}: {error}"
        print(f"fm: {message}", file=sys.stderr)
        return outcome.exit_code
    return 0


def _run_stage(command: str, config: RunConfig, flags: set[str]) -> None:
    from fm_core.terminal import Bar

    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    stage = cast(Callable[..., Any], getattr(importlib.import_module(_module_of(command)), command))
    options: dict[str, Any] = {}
    if command == "validate":
        depth = "deep" if "deep" in flags else "quick" if "quick" in flags else "default"
        options = {"depth": depth, "repair": "repair" in flags}
    debug = config.launch.kind == "debug"
    try:
        # A bar redraws the terminal, which a debugger's prompt needs for itself.
        with Bar(live=not debug) as bar:
            result = stage(config, bar.observe, **options)
    except Exception as error:
        if debug and outcome_of(error) in (Outcome.FAILED, Outcome.UNRECOVERABLE):
            traceback.print_exc()
        raise
    except KeyboardInterrupt:
        from fm_core.launch.upload_handover import describe_upload
        from fm_core.run.directory import RunDirectory

        uploaded = describe_upload(RunDirectory(config).path) if command == "train" else None
        told = "; ".join(filter(None, ("stopped", uploaded, "run it again to continue")))
        raise StopRequested(told) from None
    print(f"{command} {result.state} in {result.seconds:.1f} s: {result.summary}")
    for name, path in result.paths.items():
        print(f"  {name}: {path}")


def _module_of(command: str) -> str:
    return f"fm_core.{'reproduce' if command == 'reproduce' else 'stages'}.{command}"


def _compare(words: list[str]) -> int:
    parser = _Parser(prog="fm compare", description=COMMANDS["compare"])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory (its newest scores) or a file of scores"
    )
    runs = cast(list[str], parser.parse_args(words).runs)
    from fm_core.stages.compare import compare

    print(compare(runs).text())
    return 0


class _Interrupt(KeyboardInterrupt):
    """A signal to stop.

    Once a plain KeyboardInterrupt has left a string that is executed, as modules do while they are imported,
    Python ends itself by SIGINT, even where it was caught and there is an exit status.
    """


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise _Interrupt


def _parse(words: list[str]) -> tuple[str, RunConfig, set[str], dict[str, Any]]:
    """The command, its configuration, the flags that were given, and numbers by their arguments' names."""
    parser = _Parser(
        prog="fm", description="Flow matching, stage by stage.", epilog="fm STAGE --help lists every key."
    )
    commands = parser.add_subparsers(dest="command", metavar="STAGE", required=True, parser_class=_Parser)
    for name, what in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what, add_help=False)
        sub.add_argument("rest", nargs=argparse.REMAINDER)
    head = parser.parse_args(words[:1])
    sub = _Parser(prog=f"fm {head.command}", description=COMMANDS[head.command])
    sub.add_argument("--config", metavar="FILE", required=True, help="YAML file with the configuration")
    known = FLAGS.get(head.command, {})
    for flag, what in known.items():
        sub.add_argument(f"--{flag}", action="store_true", help=what)
    for name, (default, what) in NUMBERS.get(head.command, {}).items():
        told = f"for --dry-run: {what}" + (f" (default: {default:g})" if default else "")
        sub.add_argument(f"--{name}", type=float, default=default, help=told)
    numbers = [name.replace("-", "_") for name in NUMBERS.get(head.command, {})]
    named = {flag: flag.replace("-", "_") for flag in known}
    namespace, overrides = _read(sub, words[1:], ("config", *named.values(), *numbers))
    flags = {flag for flag, name in named.items() if getattr(namespace, name)}
    values = {name: getattr(namespace, name) for name in numbers}
    return head.command, load_config(namespace.config, overrides), flags, values


def _doctor(words: list[str]) -> int:
    """Print a line for each check; 2 where something is for the user to mend."""
    # Taken out here: to the parser --model and --launch are whole sections, as JSON.
    flags = {flag for flag in DOCTOR_FLAGS if flag in words}
    asked_for = "; ".join(f"{flag}: {what}" for flag, what in DOCTOR_FLAGS.items())
    sub = _Parser(prog="fm doctor", description=f"{COMMANDS['doctor']}. {asked_for}.")
    sub.add_argument("--config", metavar="FILE", help="YAML file with the configuration to look at")
    for name, (kind, default, what) in DOCTOR_NUMBERS.items():
        sub.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default: {default:g})")
    numbers = [name.replace("-", "_") for name in DOCTOR_NUMBERS]
    rest = [word for word in words if word not in flags]
    namespace, overrides = _read(sub, rest, ("config", *numbers))
    config = None
    if namespace.config:
        config = load_config(namespace.config, overrides)
    elif overrides:
        config = parse_config(overrides, "fm doctor")

    from fm_core.stages.doctor import Asked, doctor
    from fm_core.terminal import show_checks
    from fm_core.training.cost_model import Cluster

    cluster = Cluster(**{name: getattr(namespace, name) for name in numbers})
    asked = Asked(
        model="--model" in flags,
        cost=cluster if "--cost" in flags else None,
        launch="--launch" in flags,
    )
    return 0 if show_checks(doctor(config, asked)) else Outcome.REFUSED.exit_code


def _read(
    sub: argparse.ArgumentParser, words: list[str], own: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The words' own options of a command, and what they override in the configuration tree."""
    source = CliSettingsSource[Any](
        _Overrides,
        cli_prog_name=sub.prog,
        cli_hide_none_type=True,
        root_parser=sub,
        cli_exit_on_error=True,
    )
    namespace = sub.parse_args(words)
    given = {key: value for key, value in vars(namespace).items() if key not in own}
    try:
        return namespace, source(parsed_args=argparse.Namespace(**given))()
    except SettingsError as error:
        raise UserError(" ".join(str(error).split())) from None


if __name__ == "__main__":
    sys.exit(main())
