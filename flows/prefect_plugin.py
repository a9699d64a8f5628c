"""Let `prefect deployment run train-digits` stand for `train-digits/default`.

A plugin for Prefect's startup hook. Prefect loads it on every import where pyproject.toml's
`[tool.prefect]` is read, which is in the project root, so it imports nothing of this project and
nothing heavy. Where Prefect has changed under it, Prefect is left as it is.
"""

import contextlib
import functools
from typing import Any

from prefect.plugins import HookContext, register_hook

PREFECT_PLUGIN_API_REQUIRES = ">=0.1,<1"
DEPLOYMENT = "default"
"""The deployment that a flow's bare name stands for."""


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Teach Prefect's client to look up a deployment by its flow's name alone."""
    try:
        from prefect.client.orchestration import PrefectClient
        from prefect.exceptions import ObjectNotFound

        stock = PrefectClient.read_deployment_by_name
    except (ImportError, AttributeError) as error:
        ctx.logger_factory("prefect.plugins").debug("bare deployment names are off: %s", error)
        return

    @functools.wraps(stock)
    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:
        if "/" not in name:
            with contextlib.suppress(ObjectNotFound):
                return await stock(self, f"{name}/{DEPLOYMENT}")
        return await stock(self, name)  # a bare name that is nobody's gets Prefect's own message

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # pyright: ignore[reportAttributeAccessIssue]
