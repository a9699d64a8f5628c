"""Locations: paths and fsspec URLs in the configuration. ~ is expanded, and secrets are refused.

The configuration of a run is written to config.yaml, shown in the report and sent to Prefect and Weights &
Biases. Therefore its URLs must not contain credentials; these come from the environment (AWS_ACCESS_KEY_ID,
...) or from fsspec's own configuration (~/.config/fsspec/*.json), which every library behind fsspec reads.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from fm_core.errors import UserError
from fm_core.storage.local_paths import expand_home

NO_PASSWORD = frozenset({"git", "github"})
"""Protocols of fsspec in which user:password@ has another meaning: organization:repository@branch."""
PASSWORD = r"[^/@:?#]*:(?!\d*(?:[/?#]|$))\S*@"
"""What follows :// in a URL with a password, which may contain a slash; a port is not a password."""
SECRET = re.compile(
    r"(?i)(^|[-_.])(aws|access|api|auth|account|private|secret)*[-_]?"
    r"(key|key[-_]?id|token|secret|signature|sig|password|passwd|pwd|auth|authorization|credentials?)$"
)
"""Names of secrets in the query of a URL."""
HUB_TOKEN = r"\bhf_[A-Za-z0-9]{30,}"
"""An access token of the Hugging Face hub, anywhere in a URL."""
_SCHEMA = {
    "type": "string",
    # For Prefect, which stores the parameters of a run before this program can check them.
    "not": {
        "pattern": rf"(^|::)(?!git://|github://)[A-Za-z0-9+.-]+://{PASSWORD}|(^|::)https?://[^/@?#]+@|"
        r"[?&;#]([A-Za-z0-9._-]*[-_.])?(AWS|aws|[Aa]ccess|[Aa]pi|[Aa]uth|[Aa]ccount|[Pp]rivate|[Ss]ecret)*"
        r"([Kk]ey|[Kk]eyId|[Tt]oken|[Ss]ecret|[Ss]ig|[Ss]ignature|[Pp]assword|[Aa]uth|[Cc]redentials?)=|"
        + HUB_TOKEN
    },
}


def holds_secret(location: str) -> bool:
    """Whether a URL contains a password (user:password@) or a secret in its query, such as ?token=."""
    if re.search(HUB_TOKEN, location):
        return True
    for part in location.split("::"):
        protocol, separator, rest = part.partition("://")
        if not separator:
            continue
        if protocol not in NO_PASSWORD and re.match(PASSWORD, rest):
            return True
        if protocol in ("http", "https") and re.match(r"[^/@?#]+@", rest):
            return True  # a token in place of the user name
        if any(SECRET.search(name) for name in re.findall(r"[?&;#]([^=&;#?]+)=", rest)):
            return True
    return False


def _checked(location: str) -> str:
    if holds_secret(location):
        # The error must not quote the value: it is printed and logged.
        raise PydanticCustomError("secret", "a URL with a password or a token in it")
    if location.startswith("~"):
        try:
            return str(expand_home(location))
        except UserError as error:
            raise ValueError(str(error)) from None
    return location


Location = Annotated[str, AfterValidator(_checked), WithJsonSchema(_SCHEMA)]
"""A path or fsspec URL without credentials, ~ expanded."""


def absolute_source(source: str) -> str:
    """The URL of a source that a user names.

    A local path is made absolute, because workers may have another current directory.

    Raises:
        UserError: the URL contains a secret, or the path does not exist.
    """
    if holds_secret(source):
        raise UserError(
            "the source is a URL with a password or a token in it; it would be written to the file. "
            "Credentials come from the environment (AWS_ACCESS_KEY_ID, ...) or fsspec's configuration "
            "(~/.config/fsspec)"
        )
    if "://" in source:
        return source
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source}: does not exist; name a folder of images or an fsspec URL")
    return str(path.resolve())
