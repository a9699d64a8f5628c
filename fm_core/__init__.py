"""Flow matching: every stage of the pipeline, as functions and as commands, without Prefect.

`fm_core.load` is `fm_core.sampling.api.load`: it returns a trained model with its objective and sampler.
`fm_core.PublishedModel` describes the weights of others that it reads.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_core.sampling.api import PublishedModel as PublishedModel
    from fm_core.sampling.api import load as load

__all__ = ["PublishedModel", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing torch takes seconds, and `fm --help` does not need it.
    if name in __all__:
        from fm_core.sampling import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
