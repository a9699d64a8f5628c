"""Retries of store operations, and classification of the errors of fsspec libraries."""

import errno
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from fm_core.errors import UnreachableError, UserError

T = TypeVar("T")

ATTEMPTS = 5
CREDENTIAL_ATTEMPTS = 3
"""Attempts without credentials, because a metadata service that all ranks query at once rejects some."""
FIRST_DELAY_S = 0.2
# A missing object or an invalid request: never retried.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
CONDITION_FAILED = "pre-conditions you specified"
"""S3's answer to a request to create an object that exists."""
# Not all of their errors for a broken connection or a busy server are OSErrors.
REMOTE_LIBRARIES = {
    *("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpcore", "httpcore2", "httpx"),
    *("httpx2", "huggingface_hub", "requests", "urllib3"),
}
RETRIED_BY_LIBRARY = {"httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub"}
"""huggingface_hub already makes five attempts, which take half a minute."""
LIBRARY_ATTEMPTS = 2
TEMPORARY_STATUS = {408, 425, 429}
"""HTTP statuses below 500 that may be temporary."""


def with_retries(action: Callable[[], T], where: str) -> T:
    """Call `action`; retry it after temporary errors, with growing, jittered pauses.

    Args:
        action: what to do; it may be called up to ATTEMPTS times.
        where: file or URL that errors name.

    Raises:
        UnreachableError: the error persisted.
        UserError: the store refused the request: permissions or credentials.
        FileNotFoundError, FileExistsError: as `action` raised it.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FINAL as error:
            if isinstance(error, FileNotFoundError | FileExistsError):
                raise
            raise UserError(f"{where}: {one_line(error)}; check the permissions or credentials") from None
        except Exception as error:
            if CONDITION_FAILED in str(error):  # s3fs reports no details
                raise FileExistsError(f"{where}: {one_line(error)}") from None
            if _is_refused(error):
                raise UserError(f"{where}: {one_line(error)}; check the URL and the credentials") from None
            if isinstance(error, ValueError) and _is_remote(error):
                raise UserError(f"{where}: {one_line(error)}; check the URL") from None
            credentials = "Credentials" in type(error).__name__
            if not _is_temporary(error) or (credentials and attempt == CREDENTIAL_ATTEMPTS):
                if _is_remote(error):
                    raise UserError(
                        f"{where}: {one_line(error)}; credentials are read from the environment"
                    ) from None
                raise
            if attempt == (LIBRARY_ATTEMPTS if _library(error) in RETRIED_BY_LIBRARY else ATTEMPTS):
                raise UnreachableError(f"{where}: tried {attempt} times: {one_line(error)}") from error
        time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * (0.5 + os.urandom(1)[0] / 255))
    raise AssertionError("unreachable")


def one_line(error: Exception) -> str:
    """Message of an error on one line, without credentials; the name of its class if it has none.

    Libraries quote the URL of a request, which may be signed or contain a password.
    """
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def without_secrets(text: str) -> str:
    """Replace passwords and signatures in the URLs of a text by ***."""
    text = re.sub(r"://[^/@:?#\s'\"]*:(?!\d*(?:[/?#]|$))[^\s'\"]*@", "://***@", text)
    return re.sub(
        r"(?i)([?&][\w.-]*(?:key|keyid|token|secret|sig|signature|password|auth|credential)s?=)[^&\s'\"<>)]+",
        r"\1***",
        text,
    )


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOSYS)
    return _is_remote(error)


def _is_remote(error: Exception) -> bool:
    return _library(error) in REMOTE_LIBRARIES


def _is_refused(error: Exception) -> bool:
    """Whether a server has rejected the request and would do so again."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in TEMPORARY_STATUS


def _library(error: Exception) -> str:
    return type(error).__module__.split(".")[0]
