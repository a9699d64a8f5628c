"""Verdicts on the paper's claims, from made-up numbers with known answers."""

import json
import random

import pytest

from fm_core.reproduce import claims as claims_module
from fm_core.reproduce.aggregate import by_objective, claims, curves, summary
from fm_core.reproduce.claims import (
    ONE_SEED,
    CurvePoint,
    Measured,
    compare_cost,
    compare_quality,
    critical_deviation,
    mean_of_seeds,
    over_seeds,
    reached_at,
)
from fm_core.reproduce.seed_differences import paired_bits


def curve(*pairs, stderr=0.1):
    return [CurvePoint(cost, Measured(value, stderr)) for cost, value in pairs]


def test_seeds_give_their_mean_and_deviation_and_one_keeps_its_own_error():
    assert over_seeds([Measured(1, 0.5)]) == Measured(1, 0.5)
    assert over_seeds([Measured(1, 9), Measured(3, 9)]) == Measured(2, pytest.approx(2**0.5))
    assert mean_of_seeds([Measured(1, 9), Measured(3, 9)]) == Measured(2, pytest.approx(1))


def test_the_first_cost_that_is_good_enough_counts_even_if_a_later_one_is_worse():
    points = curve((4, 9), (8, 2), (16, 3), (32, 1))
    assert reached_at(points, 2.5) == 8
    assert reached_at(points, 0.5) is None


def test_a_factor_counts_how_many_times_fewer():
    verdict = compare_cost(curve((4, 5), (8, 1.9)), curve((8, 9), (16, 4), (32, 2)), "evaluations")
    assert verdict.factor == 4
    assert verdict.text.startswith("4 times fewer")


def test_a_factor_below_one_is_reported_as_more():
    verdict = compare_cost(curve((16, 5), (64, 2)), curve((8, 3), (16, 2)), "evaluations")
    assert verdict.factor == 0.25
    assert verdict.text.startswith("4 times more")


def test_one_standard_error_of_the_others_best_is_granted():
    other = curve((8, 2.05), (32, 2), stderr=0.1)
    verdict = compare_cost(curve((8, 2.05), stderr=0.1), other, "evaluations")
    assert verdict.factor == 1
    assert verdict.text.startswith("not distinguishable")


def test_a_factor_within_the_errors_is_not_distinguished_from_one():
    other = curve((4, 9), (8, 2.2), (16, 2.0), stderr=0.5)
    verdict = compare_cost(curve((4, 9), (8, 2.1), (16, 2.0), stderr=0.5), other, "evaluations")
    assert verdict.low <= 1 <= verdict.high
    assert verdict.text.startswith("not distinguishable")
    sure = compare_cost(curve((4, 1), stderr=1e-3), curve((8, 1), stderr=1e-3), "evaluations")
    assert (sure.low, sure.high) == (0, 2)  # half of the draws miss an equal distance


def test_a_quality_that_is_not_reached_has_no_factor():
    verdict = compare_cost(curve((4, 5), (100, 3)), curve((50, 2)), "evaluations")
    assert verdict.factor is None
    assert "not reached" in verdict.text


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("ratio", [1, 100])
def test_equal_objectives_are_told_apart_in_at_most_one_comparison_of_twenty(seeds, ratio):
    """This holds for any ratio of their deviations over seeds."""
    rng = random.Random(seeds)
    draws = 600
    verdicts = [
        compare_quality(
            *(mean_of_seeds([Measured(rng.gauss(0, s), 0.1) for _ in range(seeds)]) for s in pair)
        )
        for pair in [(1, ratio)] * draws
    ]
    wrong = sum(not verdict.text.startswith("not distinguishable") for verdict in verdicts)
    assert wrong / draws < 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_curves_are_told_apart_in_at_most_one_comparison_of_twenty(seeds, monkeypatch):
    monkeypatch.setattr(claims_module, "BOOTSTRAP_DRAWS", 100)
    rng = random.Random(0)

    def drawn():
        points = ((4, 9), (8, 4), (16, 2.4), (32, 2))
        return [
            CurvePoint(cost, mean_of_seeds([Measured(rng.gauss(v, 0.3), 0.3) for _ in range(seeds)]))
            for cost, v in points
        ]

    texts = [compare_cost(drawn(), drawn(), "evaluations").text for _ in range(80)]
    wrong = sum(not text.startswith("not distinguishable") for text in texts)
    assert wrong / 80 < 0.05 + 3 * (0.05 * 0.95 / 80) ** 0.5


@pytest.mark.parametrize(("seeds", "needed"), [(1, 1.96), (2, 4.30), (3, 2.78)])
def test_the_threshold_is_that_of_students_t_for_so_many_seeds(seeds, needed):
    one = Measured(1, 0.1, seeds)
    assert critical_deviation(one, one) == pytest.approx(needed, abs=0.01)


def test_one_seed_gives_no_verdict_about_training():
    one, three = Measured(1, 0.1), Measured(1, 0.1, 3)
    worse = Measured(9, 0.1), Measured(9, 0.1, 3)
    verdict = compare_quality(one, worse[0])
    assert verdict.text.endswith(ONE_SEED)
    assert verdict.record()["covers"] == "samples"
    sure = compare_quality(three, worse[1])
    assert ONE_SEED not in sure.text
    assert (sure.record()["covers"], sure.record()["seeds"]) == ("training seeds", 3)
    assert compare_cost(curve((4, 2)), curve((8, 2)), "images").text.endswith(ONE_SEED)


@pytest.mark.parametrize(
    ("ours", "other", "word"), [(1, 2, "better"), (2, 1, "worse"), (1, 1.2, "not distinguishable")]
)
def test_samples_are_better_only_beyond_the_errors(ours, other, word):
    assert compare_quality(Measured(ours, 0.1), Measured(other, 0.1)).text.startswith(word)


@pytest.mark.parametrize(
    ("ours", "other", "word"), [(1, 2, "better"), (2, 1, "worse"), (1, 1, "not distinguishable")]
)
def test_numbers_without_errors_are_distinguished_by_any_difference(ours, other, word):
    assert compare_quality(Measured(ours, 0), Measured(other, 0)).text.startswith(word)


def record(cell, seed, distance, *, training=((100, 9), (200, 2)), budgets=((10, 5), (20, 2))):
    return {
        "cell": cell,
        "title": cell.upper(),
        "run": f"{cell}-s{seed}",
        "steps": 10,
        "images_seen": 200,
        "fewer_steps": False,
        "scores": {
            "frechet_distance": {"value": distance, "stderr": 0.1},
            "bits_per_dim": {"value": 1.5, "stderr": 0.01},
            "nfe": {"mean": 100.0},
            "nfe_curve": {
                "points": [
                    {
                        "solver": "midpoint",
                        "nfe": nfe,
                        "error": 1 / nfe,
                        "frechet_distance": value,
                        "frechet_distance_stderr": 0.1,
                    }
                    for nfe, value in budgets
                ]
            },
        },
        "while_training": [
            {"images_seen": seen, "frechet_distance": value, "stderr": 0.1, "nfe": 90.0}
            for seen, value in training
        ],
    }


def test_the_three_claims_are_drawn_from_the_runs():
    slow = {"training": ((100, 9), (200, 4)), "budgets": ((10, 9), (20, 5))}
    records = [record("other", 0, 4.0, **slow), record("ours", 0, 2.0)]
    verdicts = claims(records, "ours")
    assert verdicts["samples"]["other"]["words"].startswith("better")
    assert verdicts["evaluations"]["other"]["factor"] == 2
    assert verdicts["training"]["other"]["factor"] == 1  # 9 at 100 images misses the baseline's final 4
    assert claims(records, "") == {}


def test_numbers_of_several_seeds_are_means_with_deviations():
    seeds = [record("ours", 0, 2.0), record("ours", 1, 4.0)]
    (group,) = by_objective(seeds).values()
    record_of_group = summary(group)
    assert record_of_group["frechet_distance"] == {"value": 3.0, "stderr": pytest.approx(2**0.5)}
    assert record_of_group["error_is"] == "deviation over seeds"
    assert record_of_group["bits_per_dim"]["value"] == 1.5
    drawn = curves(seeds)
    assert [p["images_seen"] for p in drawn["while_training"]["ours"]] == [100, 200]
    assert list(drawn["solvers"]) == ["midpoint"]


def test_k_draws_limits_and_labels_reach_the_summary():
    one = record("ours", 0, 2.0)
    one["scores"]["bits_per_dim"]["k_sample"] = {"value": 1.4, "stderr": 0.01, "k": 50}
    extra = {"images": 1_000, "infinity": {"value": 1.0, "stderr": 0.2}, "unreliable": "few"}
    one["scores"]["frechet_distance"] |= extra
    row = summary([one])
    assert (row["bits_per_dim"]["k"], row["bits_per_dim"]["value"]) == (1, 1.5)
    assert row["bits_per_dim_k_sample"] == {"value": 1.4, "stderr": 0.01, "k": 50}
    assert row["frechet_distance"] == {"value": 2.0, "stderr": 0.1, **extra}
    assert row["covers"] == "samples"


def test_bits_of_the_same_images_are_compared_in_pairs(tmp_path):
    """Errors are over images for one seed and over seeds for several; effects shared by the images cancel."""
    records = []
    for name, offset in (("other", 0.05), ("ours", 0.0)):
        for seed in (0, 1, 2):
            file = tmp_path / f"{name}-{seed}.json"
            lines = [{"image": i, "bits": i % 9 + offset + 0.001 * seed, "k_sample": 0.0} for i in range(30)]
            bits_file = file.with_suffix(".bits.jsonl")
            bits_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            records.append({**record(name, seed, 2.0), "seed": seed, "scores_file": str(file)})
    groups = by_objective(records)
    over_seeds = paired_bits(groups, "ours")["other"]["1"]
    assert over_seeds["value"] == pytest.approx(-0.05)
    assert (over_seeds["seeds"], over_seeds["covers"]) == (3, "training seeds")
    assert over_seeds["words"].startswith("fewer: -0.0500 ± 0.0000 over 3 seeds")
    one = paired_bits({name: seeds[:1] for name, seeds in groups.items()}, "ours")["other"]["1"]
    assert one["words"].endswith(ONE_SEED)
    assert one["covers"] == "validation images"
    assert paired_bits(groups, "") == {}
    assert paired_bits(by_objective([record("ours", 0, 2.0), record("other", 0, 2.0)]), "ours") == {}


def test_seeds_meet_where_each_of_them_was_measured():
    stopped = record("ours", 0, 2.0, training=((100, 9), (150, 5), (200, 2)))
    other = record("ours", 1, 4.0, training=((100, 7), (200, 4)))
    drawn = curves([stopped, other])["while_training"]["ours"]
    assert [(point["images_seen"], point["value"]) for point in drawn] == [(100, 8), (200, 3)]


def test_a_budget_counts_by_its_best_solver():
    one = record("ours", 0, 2.0)
    points = one["scores"]["nfe_curve"]["points"]
    points += [{**points[0], "solver": "euler", "frechet_distance": 1.0}]
    other = record("other", 0, 2.0, budgets=((10, 8), (20, 1.0)))
    assert claims([one, other], "ours")["evaluations"]["other"]["factor"] == 2
