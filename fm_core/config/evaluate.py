"""The evaluate section: scores of samples and of the model."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from fm_core.config.location import Location
from fm_core.config.online_eval import OnlineEvalSection
from fm_core.config.protocols import PROTOCOLS, ProtocolName
from fm_core.config.section import Section

Metric = Literal["frechet_distance", "kernel_distance", "inception_score", "precision_recall", "memorization"]


class LikelihoodSection(Section):
    """Bits per dimension of validation images."""

    images: int = Field(default=0, ge=0)
    """Number of validation images to score, from the first; 0 turns the likelihood off."""
    batch: int = Field(default=64, ge=1)
    """Images solved in one batch."""
    draws: int = Field(default=1, ge=1)
    """K, the number of uniform dequantization draws per image; the headline number is K = 1."""
    rtol: float = Field(default=1e-5, gt=0)
    """Relative tolerance of dopri5."""
    atol: float = Field(default=1e-5, gt=0)
    """Absolute tolerance of dopri5."""
    check_images: int = Field(default=4, ge=0)
    """Number of these images that are solved again at a tenth of both tolerances, to measure the solver's
    error."""

    @model_validator(mode="after")
    def _check_image_count(self) -> "LikelihoodSection":
        if self.images == 1:
            raise ValueError("evaluate.likelihood.images is 1; a standard error needs at least 2")
        return self


class NfeCurveSection(Section):
    """Distance to the data and solver error as functions of the number of function evaluations (NFE)."""

    images: int = Field(default=0, ge=0)
    """Images solved at every budget, from index 0, with the noise of sample.seed; 0 turns the curve off."""
    solvers: tuple[str, ...] = ("euler", "midpoint", "heun2", "rk4")
    """Solvers with a fixed number of steps that are compared. A time grid other than uniform follows after @,
    and its rho or shift after a colon: dpmpp_2m@log-snr, ddim@edm:5, ab2@shift:3."""
    nfe: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Evaluations of the network per sample for those solvers, which take as many steps as fit; a solver that
    needs more for one step has no point there."""
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    """Tolerances of dopri5, absolute and relative alike; each gives one point of its curve."""
    exact_nfe: int = Field(default=1_000, ge=4, multiple_of=4)
    """NFE of the rk4 reference solution, against which errors are measured."""

    @model_validator(mode="after")
    def _check_budgets(self) -> "NfeCurveSection":
        if self.images and self.images < 4:
            raise ValueError(f"evaluate.nfe_curve.images is {self.images}; a distance needs at least 4")
        if any(budget < 1 for budget in self.nfe):
            raise ValueError("evaluate.nfe_curve.nfe: budgets must be at least 1")
        return self


class ExtractorSection(Section):
    """A further feature extractor, which receives the same images as that of evaluate.features."""

    features: str
    """As evaluate.features."""
    weights: Location | None = None
    """As evaluate.weights, of this extractor."""
    weights_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """As evaluate.weights_sha256."""
    reference: Location | None = None
    """Reference of this extractor, as evaluate.reference and by default the same. Needed where that is an
    .npz with mu and sigma, which are of the features of evaluate.features."""


class EvaluateSection(Section):
    """Scores of samples and of the model."""

    aliases: ClassVar[Mapping[str, str]] = {"beside": "online"}

    protocol: ProtocolName | None = None
    """Named protocol of published numbers. It sets features, metrics and pair_images where these are not
    named, and how images are resized; scores record every deviation from it."""
    features: str = "classifier"
    """Feature extractor. classifier: a network trained on the labels of the data set, whose distances are not
    called FID; inception: InceptionV3 of 2015-12-05 (needs evaluate.weights); dinov2: the vision transformer
    of Oquab et al. 2023 (needs evaluate.weights); or a TorchScript file, or package.module:Name of an
    nn.Module."""
    classifier_min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Least accuracy on validation images of the classifier whose features may be used; below it nothing is
    scored. By default chance + (1 - chance) / 4, less two standard errors; 0 accepts any."""
    weights: Location | None = None
    """Path or URL of the extractor's weights; for inception, weights-inception-2015-12-05-6726825d.pth."""
    weights_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """Expected SHA-256 of those weights; for inception, by default that of the published file."""
    extractors: tuple[ExtractorSection, ...] = ()
    """Further extractors, each with the keys features, weights, weights_sha256 and reference. An image is
    read or sampled once for all of them, and distances, their ratios and the metrics over pairs are computed
    for each. A named protocol covers the numbers of evaluate.features alone."""
    metrics: tuple[Metric, ...] = (
        "frechet_distance",
        "kernel_distance",
        "inception_score",
        "precision_recall",
        "memorization",
    )
    """Metrics of the samples. memorization: their distances to the nearest training images, beside those of
    validation images, and Fréchet distances to equal numbers of both; not with evaluate.samples sampler."""
    samples: Location | None = None
    """Images to score: by default this run's samples; sampler: the same images, generated but not written;
    or a folder of images, or an .npz with uint8 arr_0 [N, height, width, channels]. Without a configuration
    file also tars, zips and data sets."""
    reference: Location = "train"
    """train or val, a split of the data set; or an .npz with mu and sigma (as written by ADM, EDM,
    pytorch-fid, or evaluate.reference_out). Without a configuration file: such an .npz, or images as for
    samples."""
    reference_out: Location | None = None
    """Write the statistics of the reference to this .npz: mu, sigma, and a description of their source."""
    output: Location | None = None
    """Also write the scores to this file. Without a configuration file and this key they are printed."""
    pair_images: int = Field(default=10_000, ge=4)
    """Images per set for metrics over pairs: kernel distance, precision and recall. A larger set is
    subsampled by a fixed permutation."""
    held_out_images: int = Field(default=50_000, ge=4)
    """Largest number of real validation images to score like samples, as a reference."""
    processes: int | None = Field(default=None, ge=1)
    """Processes that share the work; by default one per GPU, or the current process if there is no GPU."""
    likelihood: LikelihoodSection = LikelihoodSection()
    """Bits per dimension."""
    nfe_curve: NfeCurveSection = NfeCurveSection()
    """Scores as functions of NFE."""
    online: OnlineEvalSection = OnlineEvalSection()
    """Online evaluation of each checkpoint during training."""

    @property
    def trains_classifier(self) -> bool:
        """Whether one of the extractors is the classifier, which is trained on the data set."""
        return "classifier" in (self.features, *(further.features for further in self.extractors))

    def each_extractor(self) -> tuple["EvaluateSection", ...]:
        """Sections with one extractor each: first this one, then those of `extractors` without a protocol."""
        alone = self.model_copy(update={"extractors": ()})
        return alone, *(
            alone.model_copy(
                update={
                    "protocol": None,
                    "features": further.features,
                    "weights": further.weights,
                    "weights_sha256": further.weights_sha256,
                    "reference": further.reference or self.reference,
                }
            )
            for further in self.extractors
        )

    @model_validator(mode="after")
    def _check_extractors(self) -> "EvaluateSection":
        # Scores are recorded by name: that of a class, and of a TorchScript file without its folder.
        sources = [
            (PurePath(each.features).name, None if ":" in each.features else each.weights)
            for each in (self, *self.extractors)
        ]
        for number, (features, weights) in enumerate(sources):
            if (features, weights) in sources[:number]:
                of = f" with weights {weights}" if weights else ""
                raise ValueError(
                    f"evaluate.extractors.{number - 1}.features: {features}{of} is named twice; name each "
                    "extractor once, in evaluate.features or in evaluate.extractors"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _take_protocol(cls, keys: Any) -> Any:
        """Set the keys of a named protocol that neither the configuration nor a preset names."""
        if not isinstance(keys, dict):
            return keys
        named = cast(dict[str, Any], keys)
        protocol = named.get("protocol")
        if not isinstance(protocol, str) or protocol not in PROTOCOLS:
            return named
        fixed = PROTOCOLS[protocol].keys()
        return {**{key: fixed[key] for key in fixed if key not in cls.preset_keys}, **named}
