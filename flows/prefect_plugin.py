"""Prefect plugin: `prefect deployment run train-digits` runs `train-digits/default`.

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
