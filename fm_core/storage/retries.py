"""Retries of store operations, and which errors of the fsspec libraries are worth one."""

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
"""A metadata service that all ranks of a job ask at the same time has none for some of them."""
FIRST_DELAY_S = 0.2
# A missing object or a wrong request: never retried.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
CONDITION_FAILED = "pre-conditions you specified"
"""S3's answer to a request to create an object that exists."""
# Their errors for a broken connection or a busy server are not all OSErrors.
REMOTE_LIBRARIES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}


def with_retries(action: Callable[[], T], where: str) -> T:
    """Call `action`; retry it after temporary errors, with growing, jittered pauses.

    Args:
        action: what to do; it may be called up to ATTEMPTS times.
        where: file or URL that errors name.

    Raises:
        UnreachableError: the error did not go away.
        UserError: the store refuses: permissions or credentials.
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
            if CONDITION_FAILED in str(error):  # s3fs says no more about it
                raise FileExistsError(f"{where}: {one_line(error)}") from None
            credentials = "Credentials" in type(error).__name__
            if not _is_temporary(error) or (credentials and attempt == CREDENTIAL_ATTEMPTS):
                if _is_remote(error):
                    raise UserError(
                        f"{where}: {one_line(error)}; credentials are read from the environment"
                    ) from None
                raise
            if attempt == ATTEMPTS:
                raise UnreachableError(f"{where}: tried {ATTEMPTS} times: {one_line(error)}") from error
        time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * (0.5 + os.urandom(1)[0] / 255))
    raise AssertionError("unreachable")


def one_line(error: Exception) -> str:
    """Message of an error on one line, without credentials; the name of its class if it has none.

    Libraries quote the URL of a request, which may be signed or hold a password.
    """
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def without_secrets(text: str) -> str:
    """A text in which *** stands for passwords and signatures of the URLs that it quotes."""
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
    return type(error).__module__.split(".")[0] in REMOTE_LIBRARIES
