"""Locations: paths and fsspec URLs in the configuration. ~ is expanded, and secrets are refused.

The configuration of a run is written to config.yaml, shown in the report and sent to Prefect and Weights &
Biases. So a URL in it holds no credentials; they come from the environment (AWS_ACCESS_KEY_ID, ...) or from
fsspec's own configuration (~/.config/fsspec/*.json), which every library behind fsspec reads.
"""

import re
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from fm_core.errors import UserError
from fm_core.storage.local_paths import expand_home

NO_PASSWORD = frozenset({"git", "github"})
"""Protocols of fsspec in which user:password@ has another meaning: organization:repository@branch."""
SECRET = re.compile(
    r"(?i)(^|[-_.])(access|api|auth|account)?[-_]?(key|token|secret|signature|sig|password|passwd|pwd|credentials?)$"
)
_SCHEMA = {
    "type": "string",
    # For Prefect, which stores the parameters of a run before anything of this program sees them.
    "not": {
        "pattern": r"^(?!git://|github://)[A-Za-z0-9+.:-]+://[^/?#]*:[^/?#]*@|"
        r"[?&;]([A-Za-z0-9._-]*[-_.])?([Kk]ey|[Tt]oken|[Ss]ecret|[Ss]ig|[Ss]ignature|[Pp]assword)="
    },
}


def holds_secret(location: str) -> bool:
    """Whether a URL names a password (user:password@) or a secret in its query, such as ?token=."""
    for part in location.split("::"):
        if "://" not in part:
            continue
        try:
            url = urlsplit(part)
            authority, protocol = url.netloc, url.scheme
            names = [name for name, _ in parse_qsl(f"{url.query}&{url.fragment}".replace(";", "&"))]
        except ValueError:
            continue
        account, at, _ = authority.rpartition("@")
        if at and ":" in account and protocol not in NO_PASSWORD:
            return True
        if any(SECRET.search(name) for name in names):
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
