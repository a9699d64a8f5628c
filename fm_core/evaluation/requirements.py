"""Requirements of an evaluation on its settings and on the data set."""

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.dinov2 import NO_WEIGHTS as NO_DINOV2_WEIGHTS
from fm_core.evaluation.features.inception import NO_WEIGHTS
from fm_core.evaluation.nfe_curve import solver_settings
from fm_core.storage.local_paths import local_path


def check_extractors(settings: EvaluateSection) -> None:
    """Check the settings of the extractor, reference and solver without reading data. Raises UserError."""
    check_weights(settings)
    for key in ("weights", "reference"):
        name = getattr(settings, key)
        path = local_path(name) if name and name not in ("train", "val") else None
        if path and not path.exists():
            raise UserError(f"evaluate.{key}: {name} does not exist")
    if settings.nfe_curve.images:
        solver_settings(settings.nfe_curve)


def check_weights(settings: EvaluateSection) -> None:
    """Check that weights are given if and only if the extractor needs them. Raises UserError."""
    if settings.features == "inception" and not settings.weights:
        raise UserError(NO_WEIGHTS)
    if settings.features == "dinov2" and not settings.weights:
        raise UserError(NO_DINOV2_WEIGHTS)
    for key in ("weights", "weights_sha256"):
        if settings.features == "classifier" and getattr(settings, key):
            raise UserError(f"evaluate.{key}: the classifier is trained on the data set and takes no weights")


def check_splits(settings: EvaluateSection, manifest: Manifest) -> None:
    """Check that the data set has the splits that an evaluation needs. Raises UserError."""
    needed = {"val": "real validation images are scored like samples"}
    if settings.features == "classifier":
        needed["train"] = "the classifier is trained on it"
    if settings.reference in ("train", "val"):
        needed[settings.reference] = "it is evaluate.reference"
    for split, reason in needed.items():
        if split not in manifest.splits:
            raise UserError(
                f"data.name {manifest.name} has no split {split}, only {', '.join(manifest.splits)}: {reason}"
                "; shard a source that has one"
            )
