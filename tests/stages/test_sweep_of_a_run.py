"""`fm sweep` on a tiny run: points are normal samples and runs, and a sweep continues where it ended."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fm_core.commands import resolve_sweep, stage_functions
from fm_core.config import load_config
from fm_core.errors import JobFailedError, StopRequested
from fm_core.run.stage_functions import StageFunctions
from fm_core.run.status import read_status
from fm_core.storage.atomic_files import read_json
from fm_core.sweep.sweep import sweep
from tests.support.tiny_run import DEBUG, TinyRun

AXES = {"sample.solver": ["euler", "midpoint"], "sample.steps": [1, 3]}
CHEAP = ("--sample.trajectories", "0", "--evaluate.likelihood.images", "0")
ARGUMENTS = (*DEBUG, *CHEAP, "--sweep.axes", json.dumps(AXES))


@pytest.fixture(scope="module")
def run(tiny) -> TinyRun:
    return tiny.copy("swept")


@pytest.fixture(scope="module")
def results(run):
    """The results of a sweep of four points, read from its file."""
    done = run.fm("sweep", *ARGUMENTS)
    assert done.code == 0, done.err
    assert done.out.startswith("sweep done"), done.out
    return read_json(only(run, "results.json"))


def only(run: TinyRun, name: str) -> Path:
    (file,) = run.path.glob(f"sweep/solver-steps-*/{name}")
    return file


def stamps(run: TinyRun) -> dict[Path, int]:
    """Modification times of samples and scores."""
    files = [*run.path.glob("samples/*/*/*.tar"), *run.path.glob("evaluation/*/*.json")]
    return {file: file.stat().st_mtime_ns for file in files}


def direct(run: TinyRun, **functions) -> StageFunctions:
    """The stages of a point, some of them replaced."""
    return replace(stage_functions(), **functions)


def config_of(run: TinyRun, axes=AXES):
    over = {
        "launch": {"kind": "debug", "processes": 1},
        "sample": {"trajectories": 0},
        "evaluate": {"likelihood": {"images": 0}},
        "sweep": {"axes": axes},
    }
    return resolve_sweep(load_config(run.file, over))


def test_every_point_has_its_score_its_difference_from_the_best_and_a_verdict(results):
    assert [point["point"] for point in results["points"]] == [
        "solver euler, steps 1",
        "solver euler, steps 3",
        "solver midpoint, steps 1",
        "solver midpoint, steps 3",
    ]
    assert [point["nfe"]["mean"] for point in results["points"]] == [1, 3, 2, 6]
    best = results["points"][results["best"]["number"]]
    distances = [point["frechet_distance"]["value"] for point in results["points"]]
    assert best["frechet_distance"]["value"] == min(distances)
    assert (best["verdict"], results["best"]["of_points"]) == ("best", 4)
    for point in results["points"]:
        if point is not best:
            assert point["difference"]["paired"]
            difference = point["frechet_distance"]["value"] - best["frechet_distance"]["value"]
            assert point["difference"]["value"] == pytest.approx(difference)
            assert point["difference"]["stderr"] > 0
    assert results["failed"] == {}


def test_points_share_noise_and_the_fresh_samples_have_other_noise(results):
    protocols = [read_json(Path(point["scores_file"]))["protocol"] for point in results["points"]]
    fresh = results["best"]["fresh"]
    assert {protocol["seed"] for protocol in protocols} == {0}
    assert fresh["seed"] == 1
    scored = read_json(Path(fresh["scores_file"]))
    assert scored["protocol"]["seed"] == 1
    assert scored["frechet_distance"]["value"] == fresh["value"]
    chosen = results["points"][results["best"]["number"]]["frechet_distance"]["value"]
    assert fresh["change"]["value"] == pytest.approx(fresh["value"] - chosen)


def test_points_are_samples_and_scores_that_other_commands_know(run, results):
    keys = (*DEBUG, *CHEAP, "--sample.solver", "midpoint", "--sample.steps", "3")
    for stage in ("sample", "evaluate"):
        assert run.fm(stage, *keys).out.startswith(f"{stage} verified")


def test_a_finished_sweep_is_verified_and_nothing_is_written(run, results):
    pages = [only(run, name) for name in ("sweep.html", "sweep.png", "results.json", "points.json")]
    before = stamps(run), [page.stat().st_mtime_ns for page in pages]
    again = run.fm("sweep", *ARGUMENTS)
    assert again.out.startswith("sweep verified"), again.err
    assert "fresh samples" in again.out
    assert (stamps(run), [page.stat().st_mtime_ns for page in pages]) == before


def test_only_what_is_missing_is_made_again(run, results):
    before = stamps(run)
    point = results["points"][3]
    scores = Path(point["scores_file"])
    scores.unlink()
    (tar,) = run.path.glob(f"samples/*/{scores.stem.rpartition('-')[0]}/samples-000001.tar")
    tar.unlink()
    assert run.fm("sweep", *ARGUMENTS).code == 0
    changed = {file for file, stamp in stamps(run).items() if stamp != before[file]}
    assert changed == {tar, scores}
    assert read_json(only(run, "results.json"))["points"] == results["points"]


def test_the_page_is_one_file_with_the_table_and_the_figure(run, results):
    page = only(run, "sweep.html").read_text()
    for text in ("Best point", "not distinguishable", "paired", "fresh samples of seed 1", "Chosen among 4"):
        assert text in page
    assert page.count("<svg") == 1
    assert "http" not in page
    assert only(run, "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_stop_file_ends_the_sweep_between_points_and_the_next_start_continues(tiny):
    run = tiny.copy("stopped")
    made = []

    def sample(config, observe):
        result = stage_functions().sample(config, observe)
        made.append(result.state)
        (run.path / "STOP").touch()
        return result

    config = config_of(run)
    with pytest.raises(StopRequested, match=r"stopped by .*STOP"):
        sweep(config, stages=direct(run, sample=sample))
    assert made == ["done"]
    assert not (run.path / "STOP").exists()
    (run.path / "STOP").touch()
    with pytest.raises(StopRequested, match="created while nothing was running"):
        sweep(config, stages=direct(run))
    assert len(list(run.path.glob("samples/*/*/DONE.json"))) == 2  # one is that of the tiny run itself


def test_a_point_that_fails_costs_the_others_nothing_and_is_tried_again(tiny):
    run = tiny.copy("failing")
    axes = {"sample.steps": [1, 2]}

    stages_of_status = []

    def sample(config, observe):
        if config.sample.steps == 2:
            raise ArithmeticError("no step today")
        result = stage_functions().sample(config, observe)
        stages_of_status.append(read_status(run.path)["stage"])
        return result

    config = config_of(run, axes)
    with pytest.raises(
        JobFailedError, match=r"1 of 2 points failed \(steps 2: ArithmeticError: no step today"
    ):
        sweep(config, stages=direct(run, sample=sample))
    (file,) = run.path.glob("sweep/steps-*/results.json")
    results = read_json(file)
    assert [point["number"] for point in results["points"]] == [0]
    assert results["failed"] == {"steps 2": "ArithmeticError: no step today"}
    assert "no step today" in (run.path / "logs" / "sweep-1.log").read_text()
    assert "no step today" in file.with_name("sweep.html").read_text()
    assert stages_of_status == ["sweep"] * 2, "fm status shows the sweep, not the stage of a point"
    assert sweep(config, stages=direct(run)).state == "done"
    assert [point["number"] for point in read_json(file)["points"]] == [0, 1]
    assert read_json(file)["failed"] == {}


def test_points_that_run_elsewhere_are_verified_here_and_their_failures_reported(tiny):
    run, asked = tiny.copy("elsewhere"), []

    def elsewhere(points, report):
        asked.append([point.title for point in points])
        for point in points:
            if point.title != "steps 2":
                for stage in point.stages:
                    getattr(stage_functions(), stage)(point.config, lambda progress: None)
        report(len(points), "all ended")
        return {"steps 2": "no space"} if len(points) == 2 else {}

    made = []

    def sample(config, observe):
        made.append(stage_functions().sample(config, observe))
        return made[-1]

    config = config_of(run, {"sample.steps": [1, 2]})
    with pytest.raises(JobFailedError, match=r"1 of 2 points failed \(steps 2: no space\)"):
        sweep(config, stages=direct(run, sample=sample), elsewhere=elsewhere)
    assert asked == [["steps 1", "steps 2"], ["fresh samples of steps 1"]]
    assert [result.state for result in made] == ["verified"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep.axes", '{"sample.guidance": [1, 2]}'), "at guidance 2: sample.guidance"),
        (("--sweep.axes", '{"sample.weights": ["ema", "ema-0.7"]}'), "at weights ema-0.7: sample.weights"),
        (("--sweep.axes", '{"sample.solver": ["dopri5"]}'), "at solver dopri5: solver dopri5 chooses"),
        (("--sweep.axes", '{"sample.classes": [[1], [99]]}'), "at classes [99]: sample.classes: 99 is not"),
        ((*ARGUMENTS[-2:], "--sweep.check_seed", "0"), "sweep.check_seed 0 is the seed of samples"),
        (
            (*ARGUMENTS[-2:], "--evaluate.metrics", "[precision_recall]"),
            "needs frechet_distance in evaluate.metrics",
        ),
        ((*ARGUMENTS[-2:], "--evaluate.samples", "images"), "a sweep scores the samples of its points"),
        ((*ARGUMENTS[-2:], "--sweep.check_images", "2"), "scores need at least 4 images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_point_would_refuse_is_refused_before_anything_starts(tiny, arguments, message):
    before = sorted(tiny.path.rglob("*"))
    refused = tiny.fm("sweep", *DEBUG, *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert message in refused.err
    assert len(refused.err.splitlines()) == 1
    assert sorted(tiny.path.rglob("*")) == before


def test_the_dry_run_lists_points_and_evaluations_and_starts_nothing(tiny):
    before = sorted(tiny.path.rglob("*"))
    listed = tiny.fm("sweep", "--dry-run", *ARGUMENTS)
    assert listed.code == 0, listed.err
    assert "| solver midpoint, steps 3 | tiny | 20 | 6 |" in listed.out
    assert listed.out.splitlines()[-1] == "4 points: 80 samples"
    trained = tiny.fm("sweep", "--dry-run", *DEBUG, "--sweep.axes", '{"train.learning_rate": [1e-3, 2e-3]}')
    assert "| learning_rate 0.002 | tiny-learning_rate-0.002 | 20 | 4 |" in trained.out
    assert trained.out.splitlines()[-1] == "2 runs are trained first, on 640 images in all"
    assert sorted(tiny.path.rglob("*")) == before
