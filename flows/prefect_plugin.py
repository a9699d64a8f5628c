"""Prefect plugin: flows named without their deployment, and workers that let their runs save when they end.

`prefect deployment run train-digits` runs `train-digits/default`. On SIGTERM or Ctrl-C a worker asks its flow
runs to save before it ends (worker_shutdown.py).

It uses Prefect's startup hook. Prefect loads it on every import in a directory whose pyproject.toml turns
plugins on (`[tool.prefect]`), which is the project root, so it imports nothing of this project and nothing
heavy. If a version of Prefect lacks what the plugin replaces, Prefect stays as it is.
"""

import contextlib
import functools
from typing import Any

from prefect.plugins import HookContext, register_hook

PREFECT_PLUGIN_API_REQUIRES = ">=0.1,<1"
DEPLOYMENT = "default"
"""The deployment that a flow name without a deployment name refers to."""


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Install both in this process."""
    _find_deployments_by_flow(ctx)
    _let_runs_save(ctx)


def _let_runs_save(ctx: HookContext) -> None:
    """Make a worker ask its runs to save when it is ended."""
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
    """Make Prefect's client look up a deployment by its flow's name alone."""
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
        return await stock(self, name)  # an unknown name gets Prefect's own message

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # pyright: ignore[reportAttributeAccessIssue]
