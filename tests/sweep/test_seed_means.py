"""Means over seeds of a sweep's points."""

import pytest

from fm_core.sweep.seed_means import seed_means
from fm_core.sweep.sweep_page import sweep_sections


def record(number, seed, guidance, distance, precision=0.5):
    return {
        "number": number,
        "point": f"seed {seed}, guidance {guidance}",
        "values": {"run.seed": seed, "sample.guidance": guidance},
        "run": f"digits-seed-{seed}",
        "frechet_distance": {"value": distance, "stderr": 0.2, "features": "classifier", "images": 1000},
        "precision": {"value": precision, "stderr": 0.01, "images": 1000},
        "nfe": {"mean": 40.0 * (1 + (guidance != 1))},
    }


RECORDS = [
    record(0, 0, 1, 5.0),
    record(1, 0, 2, 1.0, 0.7),
    record(2, 1, 1, 4.0),
    record(3, 1, 2, 6.0, 0.8),
    record(4, 2, 1, 3.0),
    record(5, 2, 2, 3.5, 0.9),
]


def test_each_setting_has_its_mean_and_deviation_over_seeds():
    means = seed_means("frechet_distance", RECORDS)
    plain, guided = means["settings"]
    assert (plain["setting"], guided["setting"]) == ("guidance 1", "guidance 2")
    assert plain["scores"]["frechet_distance"] == {"value": 4.0, "stderr": 1.0}
    assert guided["scores"]["precision"] == {"value": pytest.approx(0.8), "stderr": pytest.approx(0.1)}
    assert guided["scores"]["nfe"] == {"value": 80.0, "stderr": 0.0}


def test_the_best_setting_is_chosen_for_each_seed_by_the_others():
    best = seed_means("frechet_distance", RECORDS)["best"]
    assert best["setting"] == "guidance 2"
    # Seed 0: plain has 3.5 over the others, guided 4.75, so plain, 5. Seed 1: guided, 2.25 to 4, so 6.
    # Seed 2: guided, 3.5 to 4.5, so 3.5.
    assert best["value"] == pytest.approx((5 + 6 + 3.5) / 3)
    assert best["of_settings"] == 2


def test_a_score_of_which_more_is_better_is_maximized():
    best = seed_means("precision", RECORDS)["best"]
    assert (best["setting"], best["value"]) == ("guidance 2", pytest.approx(0.8))


@pytest.mark.parametrize("records", [RECORDS[:2], [{**RECORDS[0], "values": {"sample.guidance": 1}}]])
def test_one_seed_has_no_mean(records):
    assert seed_means("frechet_distance", records) == {}


def test_a_setting_without_every_seed_is_left_out():
    means = seed_means("frechet_distance", RECORDS[:-1])
    assert [setting["setting"] for setting in means["settings"]] == ["guidance 1"]


def test_the_page_has_a_row_for_each_setting():
    results = {
        "metric": "frechet_distance",
        "title": "Fréchet distance",
        "points": RECORDS,
        "failed": {},
        "over_seeds": seed_means("frechet_distance", RECORDS),
    }
    section = next(each for each in sweep_sections(results) if each.title == "Over seeds")
    (table,) = section.parts
    assert table.head == ["setting", "Fréchet distance", "precision", "NFE"]
    assert table.rows[1] == ["guidance 2", "3.50 ± 2.50", "0.800 ± 0.100", "80 ± 0"]
    assert "Best mean of 2 settings: guidance 2. A choice" in section.note
    assert "has Fréchet distance 4.83 ± 1.26" in section.note


def test_scores_on_different_scales_have_no_best_setting():
    means = seed_means("frechet_distance", RECORDS, comparable=False)
    assert len(means["settings"]) == 2
    assert "best" not in means


def test_the_same_metric_of_a_further_extractor_has_its_own_mean():
    further = {"dinov2": {"frechet_distance": {"value": 300.0, "stderr": 1.0, "images": 1000}}}
    means = seed_means("frechet_distance", [{**each, "extractors": further} for each in RECORDS])
    scores = means["settings"][0]["scores"]
    assert scores["dinov2/frechet_distance"] == {"value": 300.0, "stderr": 0.0}
    assert scores["frechet_distance"]["value"] == 4.0
