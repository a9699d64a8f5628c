"""The command line: `fm STAGE --config FILE [--section.key VALUE ...]`."""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, cast

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from fm_core.config import RunConfig, load_config
from fm_core.errors import Stopped, UserError

STAGES = {
    "shard": "write a data set's shards and manifest, or verify them",
    "train": "train from the newest complete checkpoint to train.images",
    "sample": "make images from a checkpoint",
    "evaluate": "score samples and model",
    "report": "write report.html",
    "validate": "check a data set's shards, and mend them if asked",
    "reproduce": "compare objectives as the paper does, with its figures",
}

COMMANDS = {**STAGES, "status": "what a run is doing now"}
FLAGS = {
    "status": {"follow": "print a line every few seconds until interrupted"},
    "validate": {
        "quick": "sizes and commit marks alone",
        "deep": "every image's CRC, duplicates, and the source as well",
        "repair": "write damaged shards again first",
    },
}

EXIT_USER, EXIT_STOPPED = 2, 3


class _Overrides(RunConfig, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The configuration tree as command-line options."""


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 done, 2 the user's mistake, 3 stopped and resumable, 1 else."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        command, config, flags = _parse(words)
        if command == "status":
            from fm_core.terminal import show_status

            return show_status(config, follow="follow" in flags)
        _run_stage(command, config, flags)
    except UserError as error:
        print(f"fm: {error}", file=sys.stderr)
        return EXIT_USER
    except (Stopped, KeyboardInterrupt) as error:
        print(f"fm: {str(error) or 'stopped; run it again to continue'}", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:
        logging.getLogger("fm_core").debug("failed", exc_info=True)
        print(f"fm: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _run_stage(command: str, config: RunConfig, flags: set[str]) -> None:
    from fm_core.terminal import Bar

    signal.signal(signal.SIGTERM, _interrupt)
    stage = cast(Callable[..., Any], getattr(importlib.import_module(f"fm_core.stages.{command}"), command))
    options: dict[str, Any] = {}
    if command == "validate":
        depth = "deep" if "deep" in flags else "quick" if "quick" in flags else "default"
        options = {"depth": depth, "repair": "repair" in flags}
    with Bar() as bar:
        result = stage(config, bar.observe, **options)
    print(f"{command} {result.state} in {result.seconds:.1f} s: {result.summary}")
    for name, path in result.paths.items():
        print(f"  {name}: {path}")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parse(words: list[str]) -> tuple[str, RunConfig, set[str]]:
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
    source = CliSettingsSource[Any](
        _Overrides,
        cli_prog_name=f"fm {head.command}",
        cli_hide_none_type=True,
        root_parser=sub,
        cli_exit_on_error=True,
    )
    namespace = sub.parse_args(words[1:])
    flags = {flag for flag in known if getattr(namespace, flag)}
    given = {key: value for key, value in vars(namespace).items() if key not in ("config", *known)}
    try:
        overrides = source(parsed_args=argparse.Namespace(**given))()
    except SettingsError as error:
        raise UserError(" ".join(str(error).split())) from None
    return head.command, load_config(namespace.config, overrides), flags


if __name__ == "__main__":
    sys.exit(main())
