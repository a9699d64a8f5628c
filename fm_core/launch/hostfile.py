"""Hostfiles: a line `HOST slots=PROCESSES` for each host, as DeepSpeed and MPI write them.

Also accepted are `USER@HOST`, spaces around the equals sign, Open MPI's `max_slots` (the limit of `slots`),
and a byte order mark. `HOST:8` is rejected: in some programs it means processes, in others a port.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fm_core.errors import UserError

_LINE = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"(?:\s+slots\s*=\s*(?P<slots>\d+))?(?:\s+max[_-]slots\s*=\s*(?P<most>\d+))?"
)


def read_hostfile(path: str, processes: int | None) -> dict[str, int]:
    """Processes on each host, in the order of the file; `processes` for a line without slots.

    Raises UserError for a file that cannot be read, contains no host, or has an invalid line.
    """
    hosts: dict[str, int] = {}
    for where, match in _lines(path):
        slots = int(match["slots"] or match["most"] or processes or 0)
        if match["most"] and slots > int(match["most"]):
            raise UserError(f"{where}: {slots} slots of {match['host']} are more than its max_slots")
        if not slots:
            raise UserError(f"{where}: {match['host']} has no slots=NUMBER; add it or set launch.processes")
        if match["host"] in hosts:
            raise UserError(f"{where}: {match['host']} appears twice; give all its slots in one line")
        hosts[match["host"]] = slots
    if not hosts:
        raise UserError(f"launch.hostfile: {path} names no host")
    return hosts


def read_logins(path: str) -> dict[str, str]:
    """USER@HOST of each host with a user in the file; errors as for `read_hostfile`."""
    return {match["host"]: f"{match['user']}@{match['host']}" for _, match in _lines(path) if match["user"]}


def _lines(path: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Each host's parsed line, with its location for messages."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"launch.hostfile: {path} cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"launch.hostfile: line {number} of {path}"
        match = _LINE.fullmatch(text)
        if not match:
            raise UserError(f"{where}: {text!r}; expected a name or IPv4 address and slots=NUMBER")
        yield where, match
