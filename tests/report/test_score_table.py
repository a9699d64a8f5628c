"""Score tables: differences between protocols are always stated with the numbers."""

import json
import re
from pathlib import Path

import pytest

from fm_core import cli
from fm_core.errors import UserError
from fm_core.report.score_table import WARNING, ScoreEntry, compare_scores, scores_section
from fm_core.report.score_text import summary
from fm_core.stages.compare import compare

PROTOCOL = {
    "solver": "dopri5",
    "rtol": 1e-5,
    "images": 50_000,
    "weights_sha256": "a" * 64,
    "versions": {"torch": "2.9"},
}
DISTANCE = {"value": 3.25, "stderr": 0.02, "features": "classifier", "images": 50_000, "reference": "train"}


def scores(protocol=None, **over):
    return {
        "protocol": {**PROTOCOL, **(protocol or {})},
        "frechet_distance": DISTANCE,
        "nfe": {"solver": "dopri5", "mean": 138.0, "batch_size": 250},
        **over,
    }


def test_each_of_many_protocols_has_its_own_letters():
    entries = [ScoreEntry(str(seed), scores({"seed": seed})) for seed in range(30)]
    letters = [row[1] for row in compare_scores(entries).table.rows]
    assert len(set(letters)) == 30
    assert (letters[0], letters[25], letters[26], letters[27]) == ("A", "Z", "AA", "AB")


def test_equal_protocols_share_one_table_without_a_warning():
    both = [ScoreEntry("one", scores()), ScoreEntry("two", scores({"weights_sha256": "b" * 64}))]
    comparison = compare_scores(both)
    assert comparison.differences == []
    assert comparison.table.rows[0] == ["one", "3.250 ± 0.020 (50,000)", "138"]
    assert WARNING not in comparison.text()


def test_differences_of_protocol_are_listed_below_the_numbers():
    comparison = compare_scores(
        [
            ScoreEntry("one", scores()),
            ScoreEntry("two", scores({"solver": "euler", "rtol": 1e-3})),
            ScoreEntry("three", scores({"versions": {"torch": "2.10"}})),
            ScoreEntry("four", scores()),
        ]
    )
    assert [row[1] for row in comparison.table.rows] == ["A", "B", "C", "A"]
    assert "solver: A: dopri5; B: euler; C: dopri5" in comparison.differences
    assert "versions.torch: A: 2.9; B: 2.9; C: 2.10" in comparison.differences
    text = comparison.text()
    assert text.index(WARNING) > text.index("| one |")
    assert "- rtol: A: 1e-05; B: 0.001; C: 1e-05" in text


def test_a_key_that_one_protocol_lacks_is_a_difference():
    comparison = compare_scores([ScoreEntry("one", scores()), ScoreEntry("two", scores({"guidance": 2.0}))])
    assert comparison.differences == ["guidance: A: not recorded; B: 2.0"]


def test_scores_that_one_run_lacks_stay_empty():
    bits = {"value": 3.5, "stderr": 0.01, "images": 1000}
    comparison = compare_scores([ScoreEntry("one", scores(bits_per_dim=bits)), ScoreEntry("two", scores())])
    assert comparison.table.head[-2:] == ["bits/dim, K = 1", "NFE"]
    assert [row[2] for row in comparison.table.rows] == ["3.500 ± 0.010 (1,000)", ""]


@pytest.mark.parametrize(
    ("features", "title"),
    [
        ("classifier", "Fréchet distance (classifier features)"),
        ("inception-v3-2015-12-05", "FID"),
        ("inception-v3-0123abcd", "Fréchet distance (inception-v3-0123abcd features)"),
    ],
)
def test_only_inception_of_2015_is_called_fid(features, title):
    one = ScoreEntry("one", scores(frechet_distance={**DISTANCE, "features": features}))
    assert compare_scores([one]).table.head[1] == title
    html = scores_section(one.scores).html()
    assert title in html
    assert ("are not FID" in html) == (title != "FID")


def test_the_section_states_what_must_be_known_about_a_number():
    record = scores(
        frechet_distance={
            **DISTANCE,
            "fewer_images_than_features": True,
            "infinity": {"value": 2.5, "stderr": 0.4},
        },
        duplicates={"images": 7, "of": 50_000},
        nfe={"solver": "dopri5", "mean": 138.0, "batch_size": 250, "accepted": 22.5, "rejected": 0.5},
        bits_per_dim={
            "value": 3.5,
            "stderr": 0.01,
            "images": 1000,
            "k": 1,
            "probe_std": 0.02,
            "k_sample": {"value": 3.4, "stderr": 0.01, "k": 15},
            "solver_check": {"images": 4, "mean": 1e-5, "largest": 3e-5, "tolerances": "a tenth"},
        },
    )
    html = scores_section(record).html()
    for text in (
        "fewer than features",
        "extrapolated to infinitely many",
        "copies of other samples",
        "22.5 steps accepted, 0.5 steps rejected",
        "K = 15, probes shared",
        "at most 3.0e-05 for 4 images",
        "probe deviation 0.020",
    ):
        assert text in html


def test_k_draws_have_a_column_of_their_own():
    bits = {"value": 3.11, "stderr": 0.01, "images": 1000, "k": 1}
    k_sample = {"value": 2.99, "stderr": 0.01, "k": 50}
    table = compare_scores([ScoreEntry("one", scores(bits_per_dim={**bits, "k_sample": k_sample}))]).table
    assert table.head[2:4] == ["bits/dim, K = 1", "bits/dim, K = 50"]
    assert table.rows[0][2:4] == ["3.110 ± 0.010 (1,000)", "2.990 ± 0.010"]


def test_an_unreliable_error_is_marked_and_explained_wherever_it_stands():
    covers = "samples, for a given reference"
    distance = {**DISTANCE, "covers": covers, "unreliable": "fewer than 10 images per feature"}
    one = scores(frechet_distance=distance)
    text = compare_scores([ScoreEntry("one", one)]).text()
    html = scores_section(one).html()
    for page in (text, html):
        assert "3.250 ± 0.020 (± unreliable)" in page
        assert "Fréchet distance (classifier features) (fewer than 10 images per feature)" in page
        assert covers in page
        assert "does not cover training seeds" in page


def test_errors_of_files_of_earlier_versions_are_said_to_be_such():
    text = compare_scores([ScoreEntry("one", scores())]).text()
    assert "earlier version" in text
    assert "independent" not in text


def test_distances_of_different_numbers_of_images_stand_with_their_limits():
    limit = {"infinity": {"value": 1.5, "stderr": 1.0}}
    few = {**DISTANCE, "images": 500}
    many = {**DISTANCE, "images": 1_000, **limit}
    comparison = compare_scores(
        [ScoreEntry("few", scores(frechet_distance=few)), ScoreEntry("many", scores(frechet_distance=many))]
    )
    column = comparison.table.head.index("its limit for infinitely many images")
    assert [row[column] for row in comparison.table.rows] == ["not known", "1.500 ± 1.000"]
    assert any("not comparable" in note for note in comparison.notes)
    same = compare_scores([ScoreEntry(name, scores(frechet_distance=many)) for name in ("one", "two")])
    assert "its limit for infinitely many images" not in same.table.head


def further(sha256="1" * 64, **over):
    """Scores of a further extractor."""
    distance = {**DISTANCE, "value": 310.0, "stderr": 2.0, "features": "dinov2-vitl14"}
    ratio = {"value": 1.4, "stderr": 0.1, "features": "dinov2-vitl14", "images": 50_000}
    own = {"protocol": {"features": "dinov2-vitl14", "features_sha256": sha256, "reference": "train"}}
    real = {**distance, "value": 221.5}
    records = {"frechet_distance_of_held_out": real, "frechet_distance_ratio": ratio}
    return {"dinov2-vitl14": {**own, "frechet_distance": distance, **records, **over}}


def test_a_further_extractor_has_columns_of_its_own_and_is_no_difference_of_protocol():
    one = ScoreEntry("one", scores(extractors=further()))
    comparison = compare_scores([one, ScoreEntry("two", scores())])
    head = comparison.table.head
    distance, ratio = (head.index(f"{name} (dinov2-vitl14 features)") for name in ("Fréchet distance", "FDr"))
    assert [row[distance] for row in comparison.table.rows] == ["310.000 ± 2.000 (50,000)", ""]
    assert comparison.table.rows[0][ratio] == "1.400 ± 0.100 (50,000)"
    assert comparison.differences == []
    other = ScoreEntry("one", scores(extractors=further(sha256="2" * 64)))
    (difference,) = compare_scores([one, other]).differences
    assert difference == f"features_sha256 of dinov2-vitl14: one: {'1' * 64}; one: {'2' * 64}"


def test_the_section_and_the_summary_show_every_extractor():
    kernel = {"value": 0.25, "stderr": 0.01, "features": "dinov2-vitl14", "images": 9, "reference_images": 8}
    held_out = {**DISTANCE, "value": 6.5}
    ratio = {"value": 0.5, "stderr": 0.02, "features": "inception-v3-2015-12-05", "images": 50_000}
    record = scores(
        {"name": "edm", "deviations": []},
        frechet_distance={**DISTANCE, "features": "inception-v3-2015-12-05"},
        frechet_distance_of_held_out=held_out,
        frechet_distance_ratio=ratio,
        extractors=further(kernel_distance=kernel),
    )
    html = scores_section(record).html()
    for text in (
        "310.000 ± 2.000",
        "1.400 ± 0.100",
        "0.500 ± 0.020",
        "0.25000 ± 0.01000",
        "9 samples against 8, dinov2-vitl14 features",
        "The protocol edm covers the scores of inception-v3-2015-12-05 features alone.",
    ):
        assert text in html, text
    assert (
        json.loads(scores_section(record).text)["extractors"]["dinov2-vitl14"]["features_sha256"] == "1" * 64
    )
    assert summary(record).startswith(
        "Fréchet distance (inception-v3-2015-12-05 features, 50000 images) 3.25 ± 0.02, real held-out images "
        "6.50, FDr 0.50 ± 0.02; Fréchet distance (dinov2-vitl14 features, 50000 images) 310.00 ± 2.00, real "
        "held-out images 221.50, FDr 1.40 ± 0.10; "
    )


@pytest.mark.parametrize("key", ["classifier_score", "inception_score"])
def test_only_a_score_of_inception_is_called_inception_score(key):
    """Files of earlier versions store a classifier's score under the other key."""
    record = {"value": 9.5, "stderr": 0.1, "images": 500, "features": "classifier"}
    one = scores(**{key: record}, classifier={"held_out_accuracy": 0.982, "held_out_images": 300})
    head = compare_scores([ScoreEntry("one", one)]).table.head
    assert "classifier score" in head
    assert "Inception Score" not in head
    assert (
        head.index("accuracy of the classifier") == head.index("Fréchet distance (classifier features)") + 1
    )
    html = scores_section(one).html()
    assert "classifier score" in html
    assert "Inception Score" not in html
    assert "accuracy of the classifier 98.2% on 300 validation images" in html
    of_inception = {**record, "features": "inception-v3-2015-12-05"}
    assert (
        "Inception Score"
        in compare_scores([ScoreEntry("x", scores(inception_score=of_inception))]).table.head
    )


def test_error_and_distance_against_evaluations_are_drawn():
    points = [
        {"solver": "euler", "nfe": nfe, "error": 1 / nfe, "frechet_distance": 10 / nfe} for nfe in (4, 8)
    ]
    curve = {"images": 100, "features": "classifier", "exact": {"evaluations": 1000}, "points": points}
    html = scores_section(scores(nfe_curve=curve)).html()
    assert html.count("<svg") == scores_section(scores()).html().count("<svg") + 2
    assert ">euler<" in html
    assert "difference from a reference solution with 1,000 evaluations" in html


def runs_with(tmp_path, *protocols):
    for number, protocol in enumerate(protocols):
        path = tmp_path / f"run{number}/evaluation/step-00000001/key.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"schema": 1, **scores(protocol)}))
    return [str(tmp_path / f"run{number}") for number in range(len(protocols))]


def test_bits_of_the_same_images_and_draws_are_compared_in_pairs(tmp_path):
    shared = {"likelihood": {"images": 40}, "data_version": "a", "seed": 0}
    runs = runs_with(tmp_path, shared, {**shared, "solver": "euler"}, {**shared, "seed": 1})
    for number, run in enumerate(runs):
        (scores_file,) = Path(run).glob("evaluation/*/*.json")
        lines = [
            {"image": i, "bits": i % 7 + 0.01 * number + 0.001 * (i % 2), "k_sample": 1.0} for i in range(40)
        ]
        scores_file.with_suffix(".bits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    notes = [note for note in compare(runs).notes if "paired" in note]
    assert len(notes) == 1  # the third entry has another seed and other draws
    assert re.search(
        r"of run1 .* less run0 .*: \+0\.0100 ± 0\.0000 over 40 images \(unpaired ± 0\.4", notes[0]
    )


def conditional(order, yes=True):
    return {"label_order": order, "class_conditional": yes}


def test_class_conditional_runs_of_different_label_orders_are_refused(tmp_path):
    runs = runs_with(tmp_path, conditional("imagenet-clsloc"), {}, conditional("sorted-wnid"))
    with pytest.raises(UserError) as caught:
        compare(runs)
    assert re.search(
        r"are not comparable: imagenet-clsloc \(run0 .*\), sorted-wnid \(run2 ", str(caught.value)
    )
    assert "\n" not in str(caught.value)
    assert cli.main(["compare", *runs]) == 2


def test_other_runs_of_different_label_orders_are_compared_with_a_note(tmp_path):
    protocols = conditional("imagenet-clsloc"), conditional("sorted-wnid", yes=False)
    assert (
        "label_order: A: imagenet-clsloc; B: sorted-wnid"
        in compare(runs_with(tmp_path, *protocols)).differences
    )
