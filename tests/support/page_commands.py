"""Commands in the Markdown pages of the repository."""

import re
from pathlib import Path
from typing import Any


def page_commands(page: Path) -> list[str]:
    """Each line of the page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def starting_with(beginning: str, commands: list[str]) -> list[str]:
    """The commands that start so; there has to be one."""
    matches = [command for command in commands if command.startswith(beginning)]
    assert matches, f"the page no longer shows {beginning}"
    return matches


def flags(tree: dict[str, Any], prefix: str = "--") -> list[str]:
    """A nested mapping as command-line options."""
    options: list[str] = []
    for key, value in tree.items():
        options += (
            flags(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}", str(value)]
        )
    return options
