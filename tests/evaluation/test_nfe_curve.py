"""NFE curve: error and distance against network evaluations, on a field with a known solution."""

import math

import pytest
import torch
from torch import nn

from fm_core.config import MethodSection, ModelSection, NfeCurveSection
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.nfe_curve import curve_part, curve_record, solver_settings
from fm_core.evaluation.reference import subset_indices
from fm_core.method.dequantization import Quantizer
from fm_core.method.ode import Solver
from fm_core.models.build import build_method
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.generate import Draw

CPU = torch.device("cpu")
EXTRACTOR = Extractor("pixels", "0" * 64, lambda images: (images.flatten(1).float(), None))


class Decay(nn.Module):
    """Field u(t, x) = -2 x, whose images are noise times exp(-2)."""

    def forward(self, t, x, label=None):
        return -2 * x


MODEL = Model(
    network=Decay(),
    section=ModelSection(),
    objective=build_method(MethodSection()).objective,
    quantizer=Quantizer(256),
    image_shape=(1, 2, 2),
    classes=0,
    conditional=False,
    step=1,
    images_seen=1,
    data_version="v",
    weights_sha256="w",
)


@pytest.fixture(scope="module")
def record():
    settings = NfeCurveSection(images=60, nfe=(4, 8, 16), tolerances=(1e-2, 1e-5))
    draw = Draw(Solver("dopri5"), 1)
    parts = [
        curve_part(MODEL, draw, settings, EXTRACTOR, numbers, CPU)
        for numbers in (range(0, 40), range(40, 60))
    ]
    noise = torch.randn(500, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    real = EXTRACTOR(MODEL.quantizer.quantize(noise * math.exp(-2)))[0]
    return curve_record(parts, settings, Gaussian.of(FeatureMoments.of(real)), EXTRACTOR, real)


def errors(record, solver):
    return {round(point["nfe"]): point["error"] for point in record["points"] if point["solver"] == solver}


def test_the_curve_has_every_solver_at_every_budget(record):
    points = [(point["solver"], point.get("steps"), point.get("rtol")) for point in record["points"]]
    assert points == [
        *(("euler", steps, None) for steps in (4, 8, 16)),
        *(("midpoint", steps, None) for steps in (2, 4, 8)),
        *(("heun2", steps, None) for steps in (2, 4, 8)),
        *(("rk4", steps, None) for steps in (1, 2, 4)),
        ("dopri5", None, 1e-2),
        ("dopri5", None, 1e-5),
    ]
    assert record["exact"] == {"solver": "rk4", "evaluations": 1000}
    assert (record["images"], record["features"], record["dtype"]) == (60, "pixels", "float32")


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("rk4", 4)])
def test_errors_fall_by_the_order_of_the_method(record, solver, order):
    error = errors(record, solver)
    assert list(error) == [4, 8, 16]
    assert math.log2(error[8] / error[16]) == pytest.approx(order, abs=0.7)


def test_errors_are_root_mean_squares_in_the_units_of_the_model(record):
    draw = Draw(Solver("dopri5"), 1)
    noise = draw.noise(MODEL, range(60)).double().flatten(1)
    by_hand = noise.square().mean(1).sqrt().mean() * abs((1 - 2 / 4) ** 4 - math.exp(-2))
    assert errors(record, "euler")[4] == pytest.approx(by_hand.item(), rel=1e-4)


def test_tighter_tolerances_cost_more_and_err_less(record):
    loose, tight = (point for point in record["points"] if point["solver"] == "dopri5")
    assert tight["nfe"] > loose["nfe"]
    assert tight["error"] < loose["error"] / 10
    assert tight["error"] < 1e-4


def test_images_that_are_nearly_exact_are_nearer_to_the_data(record):
    euler = [point["frechet_distance"] for point in record["points"] if point["solver"] == "euler"]
    best = record["points"][-1]["frechet_distance"]
    assert euler[0] > 3 * best
    assert all(point["frechet_distance_stderr"] > 0 for point in record["points"])


def test_methods_without_a_fixed_cost_per_step_are_refused():
    with pytest.raises(
        UserError, match=r"dopri8 has no fixed number of evaluations per step; dopri5 is always included"
    ):
        solver_settings(NfeCurveSection(images=4, solvers=("dopri8",)))
    with pytest.raises(UserError, match="allowed: euler, midpoint"):
        solver_settings(NfeCurveSection(images=4, solvers=("implicit_adams",)))
    assert solver_settings(NfeCurveSection(solvers=("heun",), nfe=(8,)))[0].record == {
        "solver": "heun2",
        "steps": 4,
    }


def test_the_kernel_distance_is_that_of_the_images_of_each_point():
    settings = NfeCurveSection(images=20, solvers=("euler",), nfe=(4,), tolerances=())
    part = curve_part(MODEL, Draw(Solver("dopri5"), 1), settings, EXTRACTOR, range(20), CPU)
    features = part["features-0"]
    reference, rows = Gaussian.of(FeatureMoments.of(features)), features[:15] + 1.0
    (point,) = curve_record([part], settings, reference, EXTRACTOR, rows)["points"]
    by_hand = kernel_distance(features, rows)
    assert (point["kernel_distance"], point["kernel_distance_stderr"]) == (by_hand.value, by_hand.stderr)
    (fewer,) = curve_record([part], settings, reference, EXTRACTOR, rows, pair_images=8)["points"]
    subset = features[subset_indices(20, 8)]
    assert fewer["kernel_distance"] == kernel_distance(subset, rows).value
    (without,) = curve_record([part], settings, reference, EXTRACTOR)["points"]
    assert "kernel_distance" not in without
    assert "unreliable" in point  # fewer than 10 images per feature


def test_only_a_classifier_of_the_data_set_recognizes_images():
    def extract(images):
        dark = images.float().mean((1, 2, 3)) < 127
        return images.flatten(1).float(), torch.stack([0.95 - 0.3 * dark, 0.05 + 0.3 * dark], dim=1)

    settings = NfeCurveSection(images=12, solvers=("euler",), nfe=(4,), tolerances=())
    draw = Draw(Solver("dopri5"), 1)
    for accuracy in (0.9, None):
        classifier = Extractor("pixels", "0" * 64, extract, validation_accuracy=accuracy)
        part = curve_part(MODEL, draw, settings, classifier, range(12), CPU)
        reference = Gaussian.of(FeatureMoments.of(part["features-0"]))
        (point,) = curve_record([part], settings, reference, classifier)["points"]
        if accuracy is None:
            assert "recognized" not in point
            continue
        bright = (part["features-0"].mean(1) >= 127).double().mean().item()
        assert 0 < bright < 1
        assert point["recognized"] == pytest.approx(bright)
