"""Requirements of an evaluation on its settings and on the data set."""

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.custom_features import TORCHSCRIPT_SUFFIXES
from fm_core.evaluation.features.dinov2 import NO_WEIGHTS as NO_DINOV2_WEIGHTS
from fm_core.evaluation.features.extractor_set import keys_of
from fm_core.evaluation.features.inception import NO_WEIGHTS
from fm_core.evaluation.nfe_curve import solver_settings
from fm_core.storage.local_paths import local_path


def check_extractors(settings: EvaluateSection) -> None:
    """Check the settings of the extractors, reference and solver without reading data. Raises UserError."""
    check_weights(settings)
    for number, section in enumerate(settings.each_extractor()):
        scripted = section.features.endswith(TORCHSCRIPT_SUFFIXES)
        for key in ("weights", "reference", *(["features"] if scripted else [])):
            name = getattr(section, key)
            path = local_path(name) if name and name not in ("train", "val") else None
            if path and not path.exists():
                with keys_of(number):
                    raise UserError(f"evaluate.{key}: {name} does not exist")
    if settings.reference not in ("train", "val"):
        check_own_references(settings)
    if settings.nfe_curve.images:
        solver_settings(settings.nfe_curve)


def check_weights(settings: EvaluateSection) -> None:
    """Check that weights are given if and only if each extractor needs them. Raises UserError."""
    for number, section in enumerate(settings.each_extractor()):
        with keys_of(number):
            if section.features == "inception" and not section.weights:
                raise UserError(NO_WEIGHTS)
            if section.features == "dinov2" and not section.weights:
                raise UserError(NO_DINOV2_WEIGHTS)
            for key in ("weights", "weights_sha256"):
                if section.features == "classifier" and getattr(section, key):
                    raise UserError(
                        f"evaluate.{key}: the classifier is trained on the data set and takes no weights"
                    )


def check_own_references(settings: EvaluateSection) -> None:
    """Check that further extractors do not use statistics of evaluate.features. Raises UserError."""
    for number, further in enumerate(settings.extractors):
        if further.reference in (None, settings.reference):
            raise UserError(
                f"evaluate.extractors.{number}.reference: evaluate.reference {settings.reference} holds "
                f"statistics of evaluate.features; for {further.features}, name an .npz of its own statistics"
                " or, in the evaluation of a run, train or val"
            )


def check_splits(settings: EvaluateSection, manifest: Manifest) -> None:
    """Check that the data set has the splits that an evaluation needs. Raises UserError."""
    needed = {"val": "real validation images are scored like samples"}
    if settings.trains_classifier:
        needed["train"] = "the classifier is trained on it"
    for section in settings.each_extractor():
        if section.reference in ("train", "val"):
            needed[section.reference] = "it is evaluate.reference"
    for split, reason in needed.items():
        if split not in manifest.splits:
            raise UserError(
                f"data.name {manifest.name} has no split {split}, only {', '.join(manifest.splits)}: {reason}"
                "; shard a source that has one"
            )
