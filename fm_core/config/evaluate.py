"""The evaluate section: scores of samples and of the model."""

from typing import Literal

from pydantic import Field, model_validator

from fm_core.config.beside import BesideSection
from fm_core.config.section import Section


class LikelihoodSection(Section):
    """Bits per dimension of held-out images."""

    images: int = Field(default=0, ge=0)
    """Held-out images to score, from the first on; 0 leaves the likelihood out."""
    batch: int = Field(default=64, ge=1)
    """Images solved together."""
    draws: int = Field(default=1, ge=1)
    """K, the uniform dequantisation draws of each image; the headline is K = 1."""
    rtol: float = Field(default=1e-5, gt=0)
    """Relative tolerance of dopri5."""
    atol: float = Field(default=1e-5, gt=0)
    """Absolute tolerance of dopri5."""

    @model_validator(mode="after")
    def _error_can_be_told(self) -> "LikelihoodSection":
        if self.images == 1:
            raise ValueError("evaluate.likelihood.images is 1; a standard error needs at least 2")
        return self


class EvaluateSection(Section):
    """Scores of samples and of the model."""

    features: Literal["classifier"] = "classifier"
    """classifier: a network trained on the data set's own labels; never called FID."""
    likelihood: LikelihoodSection = LikelihoodSection()
    """Bits per dimension."""
    beside: BesideSection = BesideSection()
    """Scores of each checkpoint while training goes on."""
