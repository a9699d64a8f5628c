"""Named protocols: their settings, recorded deviations, and the scores that only they define."""

import hashlib
from typing import get_args

import numpy as np
import pytest
import torch

from fm_core.config import EvaluateSection, RunConfig, config_class
from fm_core.config.protocols import INCEPTION_SHA256, PROTOCOLS, RESIZE_TEXTS, ProtocolName, Resize
from fm_core.evaluation.evaluation_run import EvaluationRun
from fm_core.evaluation.features.extractor import INCEPTION, Extractor
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import frechet_distance_of_features
from fm_core.evaluation.protocol_scores import (
    ScoredSet,
    balance_text,
    deviations,
    named_protocol,
    protocol_records,
    split_inception_score,
)
from fm_core.evaluation.reference import Reference
from fm_core.evaluation.scores import image_scores
from tests.support import ROOT

CPU = torch.device("cpu")
NAMES = ("adm", "edm", "pytorch-fid", "torch-fidelity", "clean-fid", "flow-matching-paper")


def rows(count, size, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def inception(name=INCEPTION, sha256=INCEPTION_SHA256):
    return Extractor(name, sha256, lambda images: (images, None))


def settings_of(protocol, **keys):
    return EvaluateSection.model_validate({"protocol": protocol, "weights": "w.pth", **keys})


def reference_of(images=10_000, spatial=True):
    gaussian = Gaussian.of(FeatureMoments.of(rows(30, 3)))
    return Reference(gaussian, rows(images, 3), "VIRTUAL.npz", gaussian if spatial else None)


def test_the_table_is_closed_and_its_names_are_those_of_the_configuration():
    assert tuple(PROTOCOLS) == get_args(ProtocolName) == NAMES
    assert set(RESIZE_TEXTS) == set(get_args(Resize))
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert set(protocol.metrics) <= set(EvaluateSection().metrics)
        assert (protocol.neighbors is not None) == ("precision_recall" in protocol.metrics)
        assert protocol.weights_sha256 in (None, INCEPTION_SHA256)
    with pytest.raises(TypeError):
        PROTOCOLS["adm"] = PROTOCOLS["edm"]


def row_of(protocol):
    """Row of a protocol in the documentation's table."""
    images = f"{protocol.images:,}" if protocol.images else "not fixed"
    images += ", random classes" if protocol.random_classes else ""
    order = {"file": "in file order", "shuffled": "shuffled"}[protocol.split_order]
    splits = f"{protocol.splits} splits, {order}; all at once beside it" if protocol.splits else "all at once"
    pairs = f"k = {protocol.neighbors}, {protocol.pair_samples or 0:,} against {protocol.pair_images:,}; sFID"
    cells = (
        *(f"`{protocol.name}`", protocol.title, protocol.used_by, RESIZE_TEXTS[protocol.resize], images),
        splits if "inception_score" in protocol.metrics else "none",
        pairs if protocol.spatial and protocol.neighbors else "none",
        protocol.reference_text,
    )
    return f"| {' | '.join(cells)} |"


def test_the_documentation_has_a_row_and_every_remark_of_each_protocol():
    page = (ROOT / "infra" / "docs" / "sampling-and-evaluation.md").read_text(encoding="utf-8")
    for protocol in PROTOCOLS.values():
        assert row_of(protocol) in page
        for remark in protocol.remarks:
            assert f"- `{protocol.name}`: {remark}." in page


class TestKeys:
    def test_a_protocol_sets_the_keys_that_are_not_named(self):
        adm = EvaluateSection(protocol="adm")
        assert (adm.features, adm.pair_images) == ("inception", 10_000)
        assert adm.metrics == ("frechet_distance", "inception_score", "precision_recall")
        assert EvaluateSection(protocol="edm").metrics == ("frechet_distance",)
        again = EvaluateSection.model_validate(adm.model_dump(mode="json"))  # as read by the ranks of a job
        assert again == adm

    def test_a_key_that_is_named_is_taken(self):
        settings = EvaluateSection(protocol="adm", features="classifier", pair_images=500)
        assert (settings.features, settings.pair_images) == ("classifier", 500)

    def test_a_key_of_a_preset_is_taken(self):
        preset = RunConfig.model_validate({"evaluate": {"features": "classifier"}})
        config = config_class(preset).model_validate({"evaluate": {"protocol": "adm"}})
        assert (config.evaluate.features, config.evaluate.metrics[1]) == ("classifier", "inception_score")

    def test_without_a_protocol_nothing_changes(self):
        assert EvaluateSection() == EvaluateSection(protocol=None)
        assert EvaluateSection().features == "classifier"
        assert (
            named_protocol(EvaluateSection(), inception(), reference_of(), ScoredSet(9, 256, "train")) == {}
        )
        assert (
            protocol_records([{"features": rows(9, 3)}], reference_of(), inception(), EvaluateSection(), CPU)
            == {}
        )

    def test_the_names_of_earlier_score_files_stay(self, digits, tmp_path):
        """The hash in the name does not include keys that were added later, unless they are set."""
        np.savez(tmp_path / "a.npz", np.zeros((9, 8, 8, 1), np.uint8))

        def key(**keys):
            section = digits.evaluate.model_copy(update={"samples": str(tmp_path / "a.npz"), **keys})
            return EvaluationRun(digits.model_copy(update={"evaluate": section}), CPU).key

        assert key() == key(output="x.json")
        assert key() != key(protocol="adm")


FULL = ScoredSet(images=50_000, levels=256, reference_kind="statistics")


class TestDeviations:
    def test_scores_by_the_protocol_have_none(self):
        for name, protocol in PROTOCOLS.items():
            differences = deviations(protocol, settings_of(name), inception(), reference_of(), FULL)
            assert differences == [], name
        recorded = named_protocol(settings_of("adm"), inception(), reference_of(), FULL)
        assert recorded == {"name": "adm", "deviations": []}

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (
                {"keys": {"features": "classifier", "weights": None}},
                "evaluate.features: classifier, not inception",
            ),
            (
                {"keys": {"metrics": ["frechet_distance"]}},
                "evaluate.metrics: without inception_score, precision",
            ),
            ({"keys": {"pair_images": 77}}, "evaluate.pair_images: 77, not 10,000"),
            ({"extractor": inception("inception-v3-ffff", "f" * 64)}, "weights: SHA-256 ffff"),
            ({"reference": reference_of(500)}, "precision and recall: 500 reference images, not 10,000"),
            ({"reference": reference_of(spatial=False)}, "no sFID: the reference has no mu_s and sigma_s"),
            ({"scored": {"images": 10_000}}, "images: 10,000, not 50,000"),
            ({"scored": {"levels": 17}}, "intensity levels: 17, stretched to 256"),
            ({"scored": {"class_counts": [50] * 1000}}, "classes: 50 of each of 1,000 classes, not drawn"),
            ({"scored": {"lossy": {"JPEG RGB": 7}}}, "samples: 7 JPEG RGB files, which may not hold"),
            (
                {"scored": {"reference_kind": "train"}},
                "reference: VIRTUAL.npz, not an .npz of guided-diffusion",
            ),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_each_deviation_is_named(self, change, expected):
        differences = deviations(
            PROTOCOLS["adm"],
            settings_of("adm", **change.get("keys", {})),
            change.get("extractor", inception()),
            change.get("reference", reference_of()),
            ScoredSet(**{**vars(FULL), **change.get("scored", {})}),
        )
        assert len(differences) == 1, differences
        assert differences[0].startswith(expected)

    def test_classes_at_random_are_none_and_a_validation_set_is_no_training_set(self):
        random = ScoredSet(50_000, 256, "val", class_counts=[48, 53, 50])
        differences = deviations(PROTOCOLS["edm"], settings_of("edm"), inception(), reference_of(), random)
        assert differences == ["reference: VIRTUAL.npz, not statistics of the training set"]
        assert balance_text([48, 53, 50]) == "48 to 53 of each of 3 classes"


class TestInceptionScoreOfSplits:
    def independent(self, probabilities, splits, order):
        """Inception Score by the formula of Salimans et al. (2016) in numpy, image by image."""
        p = probabilities.double().numpy()
        p = p if order == "file" else p[np.random.RandomState(2020).permutation(len(p))]
        values = []
        for part in (p[i * len(p) // splits : (i + 1) * len(p) // splits] for i in range(splits)):
            marginal = part.mean(0)
            divergences = [float(np.sum(row * (np.log(row) - np.log(marginal)))) for row in part]
            values.append(np.exp(np.mean(divergences)))
        return np.mean(values), np.std(values)

    @pytest.mark.parametrize("order", ["file", "shuffled"])
    @pytest.mark.parametrize("count", [100, 103])
    def test_it_is_the_formula_on_each_split(self, order, count):
        probabilities = (3 * rows(count, 7)).softmax(1)
        assert split_inception_score(probabilities, 10, order) == pytest.approx(
            self.independent(probabilities, 10, order), rel=1e-12
        )

    def test_images_in_class_order_lower_it_only_in_the_order_of_the_files(self):
        probabilities = (9 * torch.eye(10)[torch.arange(500) // 50]).softmax(1)
        in_order, shuffled = (
            split_inception_score(probabilities, 10, order)[0] for order in ("file", "shuffled")
        )
        assert in_order == pytest.approx(1)
        assert shuffled > 8

    def test_a_probability_of_zero_counts_nothing_and_few_images_are_refused(self):
        assert split_inception_score(torch.eye(4).repeat(5, 1), 5, "file")[0] == pytest.approx(4)
        with pytest.raises(ValueError, match="10 splits need as many images, not 9"):
            split_inception_score(torch.full((9, 2), 0.5), 10, "file")


def test_adm_has_sfid_splits_and_all_samples_against_the_images_of_the_reference():
    features, spatial = rows(90, 3), rows(90, 5, seed=1)
    parts = [
        {"features": features[a:b], "spatial": spatial[a:b], "probabilities": features[a:b].softmax(1)}
        for a, b in ((0, 40), (40, 90))
    ]
    gaussian = Gaussian.of(FeatureMoments.of(rows(60, 5, seed=2)))
    reference = Reference(gaussian, rows(50, 3, seed=3), "VIRTUAL.npz", gaussian)
    settings = settings_of("adm", pair_images=50)
    records = protocol_records(parts, reference, inception(), settings, CPU)
    assert set(records) == {"inception_score_of_splits", "spatial_frechet_distance", "precision", "recall"}
    expected = pytest.approx(frechet_distance_of_features(spatial, gaussian), rel=1e-9)
    assert records["spatial_frechet_distance"]["value"] == expected
    assert records["inception_score_of_splits"]["order"] == "consecutive images in the order of the files"
    assert (records["recall"]["images"], records["recall"]["reference_images"]) == (90, 50)
    ours = image_scores(
        parts,
        (),
        Reference(Gaussian.of(FeatureMoments.of(rows(60, 3))), reference.rows, "r"),
        inception(),
        settings,
        CPU,
    )
    assert (ours["precision"]["images"], ours["precision"]["reference_images"]) == (50, 50)
    assert not {"frechet_distance_of_held_out", "recognised"} & ours.keys()
    few = protocol_records(
        [parts[0] | {"probabilities": parts[0]["probabilities"][:5]}], reference, inception(), settings, CPU
    )
    assert "inception_score_of_splits" not in few


def test_the_published_hash_is_that_of_the_names_of_both_files():
    assert INCEPTION_SHA256.startswith("6726825d")
    assert len(INCEPTION_SHA256) == len(hashlib.sha256().hexdigest())
