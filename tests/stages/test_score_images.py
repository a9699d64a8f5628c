"""`fm evaluate` without a configuration: any images against any reference, and its one-line errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fm_core import cli
from fm_core.evaluation.score_output import bibtex_note
from fm_core.storage.atomic_files import read_json
from tests.support.tiny_run import is_progress

METRICS = ["frechet_distance", "kernel_distance", "inception_score", "precision_recall"]
FEATURES = ("--evaluate.features", f"{__name__}:Pooled")


class Pooled(nn.Module):
    """Twelve features and three logits of uint8 images [N, 3, S, S]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(12, 3)

    def forward(self, images):
        features = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, self.read(features)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders, arrays and statistics of the layouts in use."""
    folder, random = tmp_path_factory.mktemp("place"), np.random.default_rng(0)

    def pixels(count, side=8):
        return random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    for name, images, suffix in (
        ("png", pixels(24), "png"),
        ("jpeg", pixels(24), "jpg"),
        ("large", pixels(6, 16), "png"),
    ):
        for number, image in enumerate(images):
            file = folder / name / f"class-{number // (len(images) // 3)}" / f"{number:03d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    (folder / "empty").mkdir()
    array = pixels(30)
    np.savez(folder / "uint8.npz", array, np.arange(30) % 4)
    np.savez(folder / "float.npz", array / 255)
    features = nn.functional.adaptive_avg_pool2d(torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255, 2)
    rows = features.flatten(1).double().numpy()
    statistics = {"mu": rows.mean(0), "sigma": np.cov(rows.T)}
    np.savez(folder / "edm.npz", **statistics)
    np.savez(folder / "adm.npz", arr_0=array, mu_s=np.zeros(5), sigma_s=np.eye(5), **statistics)
    np.savez(folder / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "damaged.npz", mu=rows.mean(0), sigma=np.eye(3))
    return folder


@pytest.fixture
def fm(place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def call(*arguments, code=0):
        try:
            status = cli.main(list(arguments))
        except SystemExit as end:
            status = end.code
        out = capsys.readouterr()
        assert status == code, out.err
        return out.out if code == 0 else [line for line in out.err.splitlines() if not is_progress(line)]

    return call


@pytest.fixture
def score(fm):
    def call(samples, reference, *arguments, features=FEATURES):
        sets = ("--evaluate.samples", samples, "--evaluate.reference", reference)
        return json.loads(fm("evaluate", *sets, *features, *arguments))

    return call


def test_standard_output_is_the_scores_and_nothing_is_written(place, score, fm):
    before = set(place.rglob("*"))
    scores = score("png", "uint8.npz")
    assert set(place.rglob("*")) == before
    assert {"frechet_distance", "kernel_distance", "precision", "recall", "inception_score"} <= scores.keys()
    assert not {"frechet_distance_of_held_out", "nfe", "bits_per_dim"} & scores.keys()
    protocol = scores["protocol"]
    assert (protocol["images"], protocol["samples"], protocol["image_size"]) == (24, "files", "8 x 8")
    assert protocol["class_balance"] == "8 of each of 3 classes"
    assert protocol["reference"] == "uint8.npz, 30 images"
    assert "name" not in protocol


def test_the_same_images_are_at_distance_zero_from_their_statistics_and_from_themselves(score):
    for reference in ("uint8.npz", "edm.npz", "adm.npz"):
        scores = score("uint8.npz", reference)
        assert scores["frechet_distance"]["value"] == pytest.approx(0, abs=1e-7), reference
        assert ("precision" in scores) == (reference != "edm.npz")
    assert scores["precision"]["value"] == scores["recall"]["value"] == 1


def test_jpeg_is_said_and_a_protocol_lists_every_deviation(score):
    scores = score("jpeg", "adm.npz", "--evaluate.protocol", "adm")
    protocol = scores["protocol"]
    assert protocol["files"] == {"JPEG RGB": 24}
    assert protocol["name"] == "adm"
    deviations = " | ".join(protocol["deviations"])
    for text in ("Pooled, not inception", "24, not 50,000", "24 JPEG RGB files", "8 of each of 3 classes"):
        assert text in deviations
    assert scores["inception_score_of_splits"]["splits"] == 10
    assert scores["precision"]["reference_images"] == 30


def test_scores_in_a_file_are_compared_and_stated_in_one_line(fm, place):
    sets = ("--evaluate.samples", "png", "--evaluate.reference", "edm.npz", *FEATURES)
    out = fm("evaluate", *sets, "--evaluate.output", "here/png.json")
    lines = out.splitlines()
    assert lines[0].startswith("evaluate done in ")
    assert lines[1].startswith("  protocol: none of the named ones; features ")
    assert lines[2].startswith("  BibTeX: note = {Fr{\\'e}chet distance ")
    assert lines[3:] == ["  scores: here/png.json"]
    fm("evaluate", *sets[2:], "--evaluate.samples", "jpeg", "--evaluate.output", "here/jpeg.json")
    table = fm("compare", "here/png.json", "here/jpeg.json")
    assert "| png |" in table
    assert "- files.JPEG RGB: A: not recorded; B: 24" in table
    scores = read_json(place / "here/png.json")
    assert scores["name"] == "png"
    assert bibtex_note({**scores, "name": "é"}).isascii()


def test_a_note_of_bibtex_escapes_what_latex_reads(place, fm, tmp_path):
    scores = {
        "protocol": {"features": "f", "features_sha256": "0" * 64, "reference": "VIRTUAL_64&50%.npz – ü"},
        "frechet_distance": {
            "value": 2.314,
            "stderr": 0.04,
            "features": "inception-v3-2015-12-05",
            "images": 50_000,
        },
    }
    note = bibtex_note(scores)
    assert note.startswith(r"note = {FID 2.31 $\pm$ 0.04; protocol: none of the named ones; ")
    assert r"50,000 samples against VIRTUAL\_64\&50\%.npz ? u" in note


class Averages(nn.Module):
    """Four features of uint8 images [N, 3, S, S]."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images[:, :1].float() / 255, 2).flatten(1)


AVERAGES = f"{__name__}:Averages"


def further(**keys):
    """Arguments for a further extractor."""
    return "--evaluate.extractors", json.dumps([{"features": AVERAGES, **keys}])


FURTHER = further()


@pytest.mark.parametrize("protocol", [(), ("--evaluate.protocol", "edm")])
def test_further_extractors_score_the_same_images_outside_of_the_protocol(score, fm, place, protocol):
    together = score("png", "uint8.npz", *protocol, *FURTHER)
    first = score("png", "uint8.npz", *protocol)
    assert {**together, "seconds": 0, "extractors": 0} == {**first, "seconds": 0, "extractors": 0}
    metrics = ("--evaluate.metrics", json.dumps(["frechet_distance"] if protocol else METRICS))
    alone = score("png", "uint8.npz", *metrics, features=("--evaluate.features", AVERAGES))
    own = together["extractors"][AVERAGES]
    names = own.keys() - {"protocol"}
    assert names == alone.keys() - {"protocol", "schema", "name", "seconds", "duplicates"}
    assert {name: own[name] for name in names} == {name: alone[name] for name in names}
    assert "name" not in own["protocol"]
    assert own["protocol"]["features_sha256"] == alone["protocol"]["features_sha256"]
    outside = ", not part of edm" if protocol else ""
    sets = ("--evaluate.samples", "png", "--evaluate.reference", "uint8.npz", *FEATURES)
    out = fm("evaluate", *sets, *protocol, *FURTHER, "--evaluate.output", "several.json")
    assert re.search(
        rf"; also features {AVERAGES} \(weights [^)]*, against uint8.npz, 30 images\){outside}; ", out
    )
    assert f"({AVERAGES} features)" in bibtex_note(together).replace("\\_", "_")
    if protocol:
        assert together["protocol"]["deviations"] == first["protocol"]["deviations"]


def test_statistics_are_of_one_extractor(place, score, fm):
    rows = Averages()(torch.from_numpy(np.load(place / "uint8.npz")["arr_0"]).permute(0, 3, 1, 2)).double()
    np.savez(place / "averages.npz", mu=rows.mean(0).numpy(), sigma=np.cov(rows.numpy().T))
    scores = score("png", "adm.npz", *further(reference="averages.npz"))
    alone = score("png", "averages.npz", features=("--evaluate.features", AVERAGES))
    name = "frechet_distance"
    assert scores["extractors"][AVERAGES][name] == alone[name]
    assert "precision" in scores
    assert "precision" not in scores["extractors"][AVERAGES]
    sets = ("--evaluate.samples", "png", *FEATURES, "--evaluate.reference")
    (error,) = fm("evaluate", *sets, "adm.npz", *FURTHER, code=2)
    assert "evaluate.extractors.0.reference: evaluate.reference adm.npz holds statistics of" in error
    (error,) = fm("evaluate", *sets, "adm.npz", *further(reference="inception.npz"), code=2)
    assert "evaluate.extractors.0.reference inception.npz has 2048 features; " in error
    (error,) = fm("evaluate", *sets, "uint8.npz", *further(reference="png"), code=2)
    assert "a further extractor has the reference of the first" in error


def test_samples_of_a_run_and_its_data_set_have_the_scores_of_the_run(tiny, fm, tmp_path):
    (line,) = [line for line in tiny.first["evaluate"].out.splitlines() if line.startswith("  scores: ")]
    here = read_json(tiny.root / line.removeprefix("  scores: "))
    (done,) = tiny.path.glob("samples/step-*/*/DONE.json")
    sets = ("--evaluate.samples", str(done.parent), "--evaluate.reference", str(tiny.root / "data/digits"))
    theirs = json.loads(fm("evaluate", *sets))
    for name in ("frechet_distance", "kernel_distance", "precision", "recall", "inception_score"):
        assert theirs[name]["value"] == pytest.approx(here[name]["value"], rel=1e-6), name
    for name in ("samples_digest", "features_sha256", "reference", "solver", "data_version"):
        assert theirs["protocol"][name] == here["protocol"][name], name


def test_a_run_is_scored_by_a_protocol_and_says_what_deviates(tiny, fm):
    run = tiny.copy("by-protocol")
    keys = ("--evaluate.protocol", "edm", *FEATURES, "--evaluate.likelihood.images", "0")
    out = fm("evaluate", "--config", str(run.file), *keys, "--evaluate.output", "copy.json")
    assert f"  protocol: edm with deviations (evaluate.features: {__name__}:Pooled, not inception; " in out
    scores = json.loads(Path("copy.json").read_text())
    (written,) = [path for path in run.path.glob("evaluation/*/*.json") if "edm" in path.read_text()]
    assert read_json(written) == scores
    assert scores["protocol"]["deviations"][1:] == [
        "images: 20, not 50,000",
        "intensity levels: 17, stretched to 256",
    ]
    assert not {"precision", "kernel_distance", "inception_score"} & scores.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float.npz", "png"), "float.npz: arr_0 is float64; images are uint8"),
        (("nowhere", "png"), "evaluate.samples: nowhere does not exist"),
        (("png", "nowhere"), "evaluate.reference: nowhere does not exist"),
        (("png", "nowhere.npz"), "evaluate.reference: nowhere.npz does not exist"),
        (("empty", "png"), "evaluate.samples: empty contains no images"),
        (("png", "large"), "evaluate.samples of 8 x 8 and evaluate.reference of 16 x 16 pixels"),
        (("png", "damaged.npz"), "damaged.npz: mu [12] and sigma [3, 3] are not a mean and a covariance"),
        (("png", "inception.npz"), "inception.npz has 2048 features; "),
        (("edm.npz", "png"), "edm.npz contains no array arr_0 (it holds mu, sigma)"),
        (("png", "train"), "evaluate.reference train: without --config, name a folder"),
        (("sampler", "png"), "only a run has a sampler"),
        (
            ("png", "edm.npz", "--evaluate.metrics", '["precision_recall"]'),
            "edm.npz contains no images (arr_0)",
        ),
        (("png", "uint8.npz", "--evaluate.features", "inception"), "needs evaluate.weights"),
        (("png", "uint8.npz", "--evaluate.features", "classifier"), "evaluate.reference is none: give"),
        (
            ("png", "uint8.npz", "--evaluate.protocol", "fid"),
            "evaluate.protocol: input should be 'adm', 'edm'",
        ),
        (("png", "uint8.npz", "--evaluate.output", "empty"), "evaluate.output empty: is a folder"),
        (("png", "uint8.npz", "--train.images", "9"), "train: only for the scores of a run"),
        (
            ("png", "uint8.npz", "--evaluate.likelihood.images", "9"),
            "evaluate.likelihood: only for the scores",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_scored_is_one_line(fm, arguments, message):
    samples, reference, *others = arguments
    features = () if "--evaluate.features" in others else FEATURES
    sets = ("--evaluate.samples", samples, "--evaluate.reference", reference)
    (error,) = fm("evaluate", *sets, *features, *others, code=2)
    assert message in error


def test_without_a_reference_or_samples_it_says_what_is_needed(fm):
    (error,) = fm("evaluate", "--evaluate.samples", "png", code=2)
    assert "--evaluate.reference: needed without --config; name a folder of images" in error
    (error,) = fm("evaluate", "--evaluate.reference", "png", code=2)
    assert "--config" in error
