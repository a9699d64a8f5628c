"""Hostfiles: a line `HOST slots=PROCESSES` for each host, as DeepSpeed and MPI read them."""

import re
from pathlib import Path

from fm_core.errors import UserError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\s+slots=(?P<slots>\d+))?")


def read_hostfile(path: str, processes: int | None) -> dict[str, int]:
    """Processes on each host, in the order of the file; `processes` where a line names no slots.

    Raises UserError for a file that cannot be read, holds no host, or has a line of another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"launch.hostfile: {path} cannot be read ({error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"launch.hostfile: line {number} of {path}"
        match = _LINE.fullmatch(text)
        if not match:
            raise UserError(f"{where}: {text!r}; expected a name or IPv4 address and slots=NUMBER")
        slots = int(match["slots"]) if match["slots"] else processes
        if not slots:
            raise UserError(f"{where}: {match['host']} has no slots=NUMBER; add it or set launch.processes")
        if match["host"] in hosts:
            raise UserError(f"{where}: {match['host']} appears twice; give all its slots in one line")
        hosts[match["host"]] = slots
    if not hosts:
        raise UserError(f"launch.hostfile: {path} names no host")
    return hosts
