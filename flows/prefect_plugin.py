"""Prefect plugin: deployments by flow name, workers that let runs save, the server's password.

`prefect deployment run train-digits` runs `train-digits/default`. On SIGTERM or Ctrl-C a worker asks its flow
runs to save before it ends (worker_shutdown.py). The password of the project's own server is found
automatically.

It uses Prefect's startup hook. Prefect loads it on every import in a directory whose pyproject.toml enables
plugins (`[tool.prefect]`), i.e. the project root, so it must not import this project or anything slow. If a
version of Prefect lacks what the plugin replaces, Prefect is not changed.
"""

import contextlib
import functools
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect.plugins import HookContext, SetupResult, register_hook
from prefect.settings import get_current_settings

PREFECT_PLUGIN_API_REQUIRES = ">=0.1,<1"
DEPLOYMENT = "default"
"""The deployment that a flow name without a deployment name refers to."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FILE_VARIABLE = "FM_API_AUTH_FILE"
"""Variable with the path of the password file if the server is on another host, as in containers."""


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Install all three features in this process."""
    _find_deployments_by_flow(ctx)
    _let_runs_save(ctx)
    settings = get_current_settings().api
    if (settings.auth_string and settings.auth_string.get_secret_value()) or settings.key:
        return None
    password = api_password(ctx.api_url)
    return SetupResult(env={"PREFECT_API_AUTH_STRING": password}) if password else None


def api_password(url: str | None) -> str | None:
    """The generated password ("user:password") of the server at an API URL, as stored by infra/serve.sh.

    A password is sent only to the server for which it was generated: on the loopback interface, the one on
    the same port. Of several files, that of the server that was started last is used. None if there is no
    file that only this user can read.
    """
    if not url:
        return None
    if named := os.environ.get(FILE_VARIABLE):
        files = [Path(named)]
    else:
        address = urlsplit(url)
        if address.hostname not in LOOPBACK:
            return None
        folders = [os.environ.get("PREFECT_HOME"), Path(__file__).parents[1] / "runs" / ".prefect"]
        with contextlib.suppress(RuntimeError):
            folders.append(Path.home() / ".prefect")
        files = [Path(folder) / f"api-auth-{address.port or 80}" for folder in folders if folder]
    private = [file for file in files if _is_private(file)]
    if not private:
        return None
    with contextlib.suppress(OSError):
        return max(private, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8").strip() or None
    return None


def _is_private(file: Path) -> bool:
    try:
        facts = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077


def _let_runs_save(ctx: HookContext) -> None:
    """Make a worker ask its runs to save when it is terminated."""
    try:
        from prefect.utilities import processutils

        stock = processutils.setup_signal_handlers_worker
    except (ImportError, AttributeError) as error:
        ctx.logger_factory("prefect.plugins").debug("runs cannot save when their worker is ended: %s", error)
        return

    @functools.wraps(stock)
    def setup_signal_handlers_worker(pid: int, process_name: str, print_fn: Any) -> None:
        from flows.worker_shutdown import install

        stock(pid, process_name, print_fn)
        install(print_fn)

    processutils.setup_signal_handlers_worker = setup_signal_handlers_worker


def _find_deployments_by_flow(ctx: HookContext) -> None:
    """Make Prefect's client look up a deployment by only its flow's name."""
    try:
        from prefect.client.orchestration import PrefectClient
        from prefect.exceptions import ObjectNotFound

        stock = PrefectClient.read_deployment_by_name
    except (ImportError, AttributeError) as error:
        ctx.logger_factory("prefect.plugins").debug(
            "deployments cannot be named by their flow alone: %s", error
        )
        return

    @functools.wraps(stock)
    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:
        if "/" not in name:
            with contextlib.suppress(ObjectNotFound):
                return await stock(self, f"{name}/{DEPLOYMENT}")
        return await stock(self, name)  # for an unknown name, Prefect shows its own message

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # pyright: ignore[reportAttributeAccessIssue]
