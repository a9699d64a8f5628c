"""The export section: exporting a trained model."""

from pydantic import Field, model_validator

from fm_core.config.location import Location
from fm_core.config.section import Section


class ExportSection(Section):
    """A self-contained folder with the model that sample.step and sample.weights select."""

    folder: Location | None = None
    """Folder to write; by default export/<step>-<weights> in the run directory."""
    hub: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", max_length=96)
    """Repository of the Hugging Face hub, user/name: the folder then has its metadata and hashes."""
    push: bool = False
    """Upload the folder to export.hub; needs huggingface_hub and a token in HF_TOKEN."""
    private: bool = True
    """Whether a repository that does not exist yet is created as a private one."""
    license: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64)
    """License of the weights in the card of export.hub, as the hub spells it, e.g. apache-2.0; by default the
    card states none."""

    @model_validator(mode="after")
    def _check_hub(self) -> "ExportSection":
        if ignored := self.set_without("hub", "push", "private", "license"):
            raise ValueError(f"export.{ignored[0]} does nothing without export.hub, e.g. user/name")
        return self
