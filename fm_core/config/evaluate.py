"""The evaluate section: scores of samples and of the model."""

from typing import Literal

from pydantic import Field, model_validator

from fm_core.config.beside import OnlineEvalSection
from fm_core.config.section import Section

Metric = Literal["frechet_distance", "kernel_distance", "inception_score", "precision_recall"]


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
    check_images: int = Field(default=4, ge=0)
    """Of these images, how many are solved again at a tenth of both tolerances: the solver's error."""

    @model_validator(mode="after")
    def _error_can_be_told(self) -> "LikelihoodSection":
        if self.images == 1:
            raise ValueError("evaluate.likelihood.images is 1; a standard error needs at least 2")
        return self


class NfeCurveSection(Section):
    """What fewer evaluations of the network cost: distance to the data and error of the solution."""

    images: int = Field(default=0, ge=0)
    """Images solved at every budget, number 0 on, from the noise of sample.seed; 0 leaves the curve out."""
    solvers: tuple[str, ...] = ("euler", "midpoint", "heun2", "rk4")
    """Methods of fixed steps that are compared."""
    nfe: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Evaluations of the network a sample, for those methods; each takes as many steps as they pay for."""
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    """Absolute and relative tolerance of dopri5, a point of its curve each."""
    exact_nfe: int = Field(default=1_000, ge=4, multiple_of=4)
    """Evaluations of the solution that errors are measured against, by rk4."""

    @model_validator(mode="after")
    def _budgets_are_budgets(self) -> "NfeCurveSection":
        if self.images and self.images < 4:
            raise ValueError(f"evaluate.nfe_curve.images is {self.images}; a distance needs at least 4")
        if any(budget < 4 for budget in self.nfe):
            raise ValueError("evaluate.nfe_curve.nfe: rk4 takes 4 evaluations a step; less is no step")
        return self


class EvaluateSection(Section):
    """Scores of samples and of the model."""

    features: str = "classifier"
    """classifier: a network trained on the data set's own labels, never called FID; inception: InceptionV3
    of 2015-12-05 (needs evaluate.weights); or a TorchScript file, or package.module:Name of an nn.Module."""
    weights: str | None = None
    """Path or URL of the extractor's weights; for inception weights-inception-2015-12-05-6726825d.pth."""
    weights_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """What those weights must hash to; by default, for inception, the published file's."""
    metrics: tuple[Metric, ...] = (
        "frechet_distance",
        "kernel_distance",
        "inception_score",
        "precision_recall",
    )
    """Scores of the samples."""
    samples: str | None = None
    """What is scored: by default this run's samples; sampler: the same images, made and not written; or a
    folder of images, or an .npz with uint8 arr_0 [N, height, width, channels]."""
    reference: str = "train"
    """train or val, a split of the data set; or an .npz with mu and sigma (ADM, EDM, pytorch-fid, ours)."""
    reference_out: str | None = None
    """Write the reference's statistics to this .npz: mu, sigma, and what they are of."""
    pair_images: int = Field(default=10_000, ge=4)
    """Images of each side that are compared pair by pair: kernel distance, precision and recall. Of more,
    evenly spaced ones are taken."""
    held_out_images: int = Field(default=50_000, ge=4)
    """Real held-out images, at most, that are scored like samples."""
    processes: int | None = Field(default=None, ge=1)
    """Processes that share the work; by default one per GPU, or this one where there is none."""
    likelihood: LikelihoodSection = LikelihoodSection()
    """Bits per dimension."""
    nfe_curve: NfeCurveSection = NfeCurveSection()
    """Scores against evaluations of the network."""
    beside: OnlineEvalSection = OnlineEvalSection()
    """Scores of each checkpoint while training goes on."""
