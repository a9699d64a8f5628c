"""Configuration from the parameters of a flow run."""

from collections.abc import Mapping
from typing import Any

from fm_core.config import RunConfig, merge, parse_config, present_names, read_yaml
from fm_core.errors import UserError


def config_of(parameters: Mapping[str, Any], default: RunConfig | None = None) -> RunConfig:
    """The configuration of the parameter `config`, or of `config_file` overridden by the keys of `config`.

    `default` is the flow's own configuration, for a run without the parameter. Keys that are not set remain
    absent, so that their defaults can be derived from the data set.

    Raises:
        UserError: in one line, if neither parameter is given, or for an invalid file or key.
    """
    config, file = parameters.get("config"), parameters.get("config_file")
    if isinstance(config, RunConfig):
        return config
    if file:
        return parse_config(merge(read_yaml(file), present_names(config or {})), where=str(file))
    if config:
        return parse_config(config, where="config")
    if default is not None:
        return default
    raise UserError(
        "config_file: name a configuration file, e.g. one that fm init has written, or give config"
    )
