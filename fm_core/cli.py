"""The command line: `fm STAGE --config FILE [--section.key VALUE ...]`."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn, cast

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from fm_core.command_options import (
    COMMANDS,
    DOCTOR_FLAGS,
    DOCTOR_NUMBERS,
    EPILOGS,
    FLAGS,
    NUMBERS,
    of_images,
    present_option,
)
from fm_core.commands import dry_run, stage_function
from fm_core.config import RunConfig, merge, parse_config
from fm_core.config.location import absolute_source
from fm_core.config.tree import did_you_mean
from fm_core.errors import (
    FlowMatchingError,
    LeaseLostError,
    Outcome,
    StopRequested,
    UnrecoverableError,
    UserError,
    outcome_of,
)
from fm_core.output import flush_streams, log_to_stderr, print_line
from fm_core.run.directory import load_run_config
from fm_core.storage.local_paths import find_modules_here, provide_home


class _Overrides(RunConfig, BaseSettings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The configuration tree as command-line options."""


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message += did_you_mean(message.split()[2].partition("=")[0], known)
        self.exit(Outcome.REFUSED.exit_code, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0: done, 2: user error, 3: stopped and resumable, 1: anything else."""
    try:
        return _run_command(arguments)
    finally:
        flush_streams()


def _run_command(arguments: Sequence[str] | None) -> int:
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        provide_home()
        log_to_stderr()
        find_modules_here()
        if command_line[:1] == ["doctor"]:
            return _doctor(command_line[1:])
        if command_line[:1] == ["compare"]:
            return _compare(command_line[1:])
        if command_line[:1] == ["init"]:
            return _init(command_line[1:])
        if of_images(command_line):
            return _score_images(command_line[1:])
        command, config, flags, numbers = _parse(command_line)
        if command == "status":
            from fm_core.status_line import show_status

            return show_status(config, follow="follow" in flags)
        if "dry-run" in flags:
            print_line(dry_run(command, config, **numbers))
            return 0
        _run_stage(command, config, flags)
    except (Exception, KeyboardInterrupt) as error:
        outcome = outcome_of(error)
        message = str(error)
        if outcome is Outcome.STOPPED:
            message = message or "stopped; run it again to continue"
        elif not isinstance(error, UserError | LeaseLostError):
            logging.getLogger("fm_core").debug("failed", exc_info=True)
            message = f"{type(error).__name__}: {error}"
            if not isinstance(error, FlowMatchingError):
                message = message.splitlines()[0]
        print_line(f"fm: {message}", sys.stderr)
        return outcome.exit_code
    return 0


def _run_stage(command: str, config: RunConfig, flags: set[str]) -> None:
    from fm_core.terminal import ProgressBar

    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    stage = stage_function(command)
    options: dict[str, Any] = {}
    if command == "validate":
        depth = "deep" if "deep" in flags else "quick" if "quick" in flags else "default"
        options = {"depth": depth, "repair": "repair" in flags}
    debug = config.launch.kind == "debug"
    try:
        # A progress bar redraws the terminal and would overwrite a debugger's prompt.
        with ProgressBar(live=not debug) as bar:
            result = stage(config, bar.observe, **options)
    except Exception as error:
        if debug and outcome_of(error) in (Outcome.FAILED, Outcome.UNRECOVERABLE):
            traceback.print_exc()
        from fm_core.launch.rank_errors import outcome_and_message

        outcome, message = outcome_and_message(error, command)
        if outcome is Outcome.UNRECOVERABLE and not isinstance(error, UnrecoverableError):
            raise UnrecoverableError(message) from error  # the message names the key to change
        raise
    except KeyboardInterrupt:
        from fm_core.launch.upload_handover import describe_upload
        from fm_core.run.directory import RunDirectory

        uploaded = describe_upload(RunDirectory(config).path) if command == "train" else None
        message = "; ".join(filter(None, ("stopped", uploaded, "run it again to continue")))
        raise StopRequested(message) from None
    # Scores without a file are on standard output, which then holds nothing else.
    stream = sys.stdout if result.paths or command != "score_images" else sys.stderr
    name = "evaluate" if command == "score_images" else command
    print_line(f"{name} {result.state} in {result.seconds:.1f} s: {result.summary}", stream)
    for name, text in (*result.notes.items(), *result.paths.items()):
        print_line(f"  {name}: {text}", stream)


def _score_images(arguments: list[str]) -> int:
    usage = (
        "fm evaluate --evaluate.samples IMAGES --evaluate.reference IMAGES_OR_STATISTICS [--evaluate.KEY ...]"
    )
    _, overrides = _read(_Parser(prog="fm evaluate", usage=usage), arguments, ())
    _run_stage("score_images", parse_config(overrides, "fm evaluate"), set())
    return 0


def _compare(arguments: list[str]) -> int:
    parser = _Parser(prog="fm compare", description=COMMANDS["compare"])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory (its newest scores) or a file of scores"
    )
    runs = cast(list[str], parser.parse_args(arguments).runs)
    from fm_core.stages.compare import compare

    print_line(compare(runs).text())
    return 0


def _init(arguments: list[str]) -> int:
    parser = _Parser(
        prog="fm init",
        description="Inspect images and this machine, write NAME.yaml with a network, a batch and a "
        "length of training that fit them, and print the two commands that come next.",
    )
    parser.add_argument("source", metavar="FOLDER_OR_URL", help="folder or fsspec URL of the images")
    parser.add_argument(
        "--size",
        type=int,
        help="height and width to resize the images to, in pixels (default: 64, or the published size)",
    )
    parser.add_argument(
        "--name", help="name of the run, its data set and the file (default: that of the folder)"
    )
    given = parser.parse_args(arguments)
    url = absolute_source(given.source)  # before the import of torch, which takes seconds
    from fm_core.stages.init import init
    from fm_core.training.throughput import Throughput, measure_throughput

    def measure(*arguments: Any) -> Throughput:
        print("measuring the speed of training on this machine", file=sys.stderr, flush=True)
        return measure_throughput(*arguments)

    print(init(url, given.size, given.name, measure).text())
    return 0


class _Interrupt(KeyboardInterrupt):
    """A signal that asks the process to stop.

    A subclass of KeyboardInterrupt, because of a special case in Python: if a plain KeyboardInterrupt leaves
    code run by exec, such as a module being imported, the interpreter exits by SIGINT and ignores the exit
    status, even if the exception was caught.
    """


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise _Interrupt


def _parse(arguments: list[str]) -> tuple[str, RunConfig, set[str], dict[str, Any]]:
    """Return the command, its configuration, its flags, and its numeric options by parameter name."""
    parser = _Parser(
        prog="fm", description="Flow matching, stage by stage.", epilog="fm STAGE --help lists every key."
    )
    commands = parser.add_subparsers(dest="command", metavar="STAGE", required=True, parser_class=_Parser)
    for name, description in COMMANDS.items():
        sub = commands.add_parser(name, help=description, description=description, add_help=False)
        sub.add_argument("rest", nargs=argparse.REMAINDER)
    head = parser.parse_args(arguments[:1])
    sub = _Parser(
        prog=f"fm {head.command}",
        usage=f"fm {head.command} --config FILE [--SECTION.KEY VALUE ...] [OPTIONS]",
        epilog=EPILOGS.get(head.command),
        description=COMMANDS[head.command],
    )
    sub.add_argument("--config", metavar="FILE", required=True, help="YAML file with the configuration")
    own_flags = FLAGS.get(head.command, {})
    for flag, description in own_flags.items():
        sub.add_argument(f"--{flag}", action="store_true", help=description)
    for name, (default, description) in NUMBERS.get(head.command, {}).items():
        text = f"for --dry-run: {description}" + (f" (default: {default:g})" if default else "")
        sub.add_argument(f"--{name}", type=float, default=default, help=text)
    numbers = [name.replace("-", "_") for name in NUMBERS.get(head.command, {})]
    attributes = {flag: flag.replace("-", "_") for flag in own_flags}
    namespace, overrides = _read(sub, arguments[1:], ("config", *attributes.values(), *numbers))
    flags = {flag for flag, name in attributes.items() if getattr(namespace, name)}
    if "trust-code" in flags:
        overrides = merge(overrides, {"sample": {"trust_code": True}})
    values = {name: getattr(namespace, name) for name in numbers}
    return head.command, load_run_config(namespace.config, overrides), flags, values


def _doctor(arguments: list[str]) -> int:
    """Print a line for each check; the exit status is 2 if one failed."""
    # Removed before parsing, because to the parser --model and --launch mean entire sections, as JSON.
    flags = {flag for flag in DOCTOR_FLAGS if flag in arguments}
    options = "; ".join(f"{flag}: {description}" for flag, description in DOCTOR_FLAGS.items())
    sub = _Parser(
        prog="fm doctor",
        usage="fm doctor [--config FILE [--SECTION.KEY VALUE ...]] [OPTIONS]",
        description=f"{COMMANDS['doctor']}. {options}.",
    )
    sub.add_argument("--config", metavar="FILE", help="YAML file with the configuration to check")
    for name, (kind, default, description) in DOCTOR_NUMBERS.items():
        sub.add_argument(
            f"--{name}", type=kind, default=default, help=f"{description} (default: {default:g})"
        )
    numbers = [name.replace("-", "_") for name in DOCTOR_NUMBERS]
    rest = [argument for argument in arguments if argument not in flags]
    namespace, overrides = _read(sub, rest, ("config", *numbers))
    config = None
    if namespace.config:
        config = load_run_config(namespace.config, overrides)
    elif overrides:
        config = parse_config(overrides, "fm doctor")

    from fm_core.stages.doctor import DoctorRequest, doctor
    from fm_core.terminal import show_checks
    from fm_core.training.cost_model import Cluster

    cluster = Cluster(**{name: getattr(namespace, name) for name in numbers})
    request = DoctorRequest(
        model="--model" in flags,
        cost=cluster if "--cost" in flags else None,
        launch="--launch" in flags,
    )
    return 0 if show_checks(doctor(config, request)) else Outcome.REFUSED.exit_code


def _read(
    parser: argparse.ArgumentParser, arguments: list[str], own: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command's own options in a namespace, and the nested overrides of the configuration tree."""
    source = CliSettingsSource[Any](
        _Overrides,
        cli_prog_name=parser.prog,
        cli_hide_none_type=True,
        root_parser=parser,
        cli_exit_on_error=True,
    )
    namespace = parser.parse_args([present_option(argument) for argument in arguments])
    given = {key: value for key, value in vars(namespace).items() if key not in own}
    try:
        return namespace, source(parsed_args=argparse.Namespace(**given))()
    except SettingsError as error:
        raise UserError(" ".join(str(error).split())) from None


if __name__ == "__main__":
    sys.exit(main())
