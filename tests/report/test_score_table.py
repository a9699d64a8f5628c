"""Score tables: differences of protocol are always stated with the numbers."""

import json
import re

import pytest

from fm_core import cli
from fm_core.errors import UserError
from fm_core.report.score_table import WARNING, ScoreEntry, compare_scores, scores_section
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
    assert comparison.table.head[-2:] == ["bits/dim", "NFE"]
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


def test_the_curve_is_an_image():
    points = [
        {"solver": "euler", "nfe": nfe, "error": 1 / nfe, "frechet_distance": 10 / nfe} for nfe in (4, 8)
    ]
    curve = {"images": 100, "features": "classifier", "exact": {"evaluations": 1000}, "points": points}
    html = scores_section(scores(nfe_curve=curve)).html()
    assert 'src="data:image/png;base64,' in html
    assert "difference from a reference solution with 1,000 evaluations" in html


def runs_with(tmp_path, *protocols):
    for number, protocol in enumerate(protocols):
        path = tmp_path / f"run{number}/evaluation/step-00000001/key.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"schema": 1, **scores(protocol)}))
    return [str(tmp_path / f"run{number}") for number in range(len(protocols))]


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
