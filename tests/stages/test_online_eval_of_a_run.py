"""Online evaluation during training; it does not change the training."""

import json

import pytest

from fm_core.launch.online_eval import read_online_scores, stop_online_eval
from fm_core.launch.run_jobs import end_jobs
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support.tiny_run import TinyRun

ONE_PROCESS = {"launch": {"kind": "debug", "processes": 1}}
ONLINE_EVAL = {**ONE_PROCESS, "evaluate": {"online": {"images": 16, "solver": "euler", "steps": 2}}}


@pytest.fixture(scope="module")
def online_eval_run(tiny: TinyRun) -> TinyRun:
    """A run with online evaluation."""
    run = TinyRun(tiny.root, name="online-eval", over=ONLINE_EVAL)
    called = run.fm("train")
    assert called.code == 0, called.err
    return run


@pytest.fixture(scope="module")
def unscored(tiny: TinyRun) -> TinyRun:
    """The same run without it."""
    run = TinyRun(tiny.root, name="no-online-eval", over=ONE_PROCESS)
    called = run.fm("train")
    assert called.code == 0, called.err
    return run


def test_losses_are_those_of_a_run_without_online_evaluation(unscored: TinyRun, online_eval_run: TinyRun):
    measured = ("step", "images_seen", "loss", "loss_by_quarter_of_t", "grad_norm", "lr")

    def course(run: TinyRun) -> list[dict]:
        return [
            {key: line[key] for key in measured} for line in read_lines(run.path / "train" / "metrics.jsonl")
        ]

    assert course(online_eval_run) == course(unscored) != []


def test_the_last_checkpoint_is_scored_and_the_best_is_retained(online_eval_run: TinyRun):
    scores = read_online_scores(online_eval_run.path)
    log = (online_eval_run.path / "logs" / "train-beside.log").read_text()
    assert scores, log
    assert scores[-1]["step"] == 20
    assert scores[-1]["images_seen"] == 320
    assert {line["images"] for line in scores} == {16}
    best = min(scores, key=lambda line: line["frechet_distance"])
    record = read_json(online_eval_run.path / "best.json")
    assert (record["step"], record["frechet_distance"]) == (best["step"], best["frechet_distance"])
    best_checkpoints = online_eval_run.path / "beside" / "checkpoints"
    assert [path.name for path in best_checkpoints.iterdir()] == [f"step-{best['step']:08d}"]
    assert not (online_eval_run.path / "beside" / "samples").exists()


def test_the_best_can_be_sampled_from(online_eval_run: TinyRun):
    best_checkpoints = online_eval_run.path / "beside" / "checkpoints"
    asked = (online_eval_run.path / "config.yaml").read_bytes()
    arguments = ("--train.checkpoint_root", str(best_checkpoints), "--sample.images", "8")
    called = online_eval_run.fm("sample", *arguments)
    assert called.code == 0, called.err
    best = read_json(online_eval_run.path / "best.json")["step"]
    assert f"8 images of step {best}" in called.out
    assert (online_eval_run.path / "config.yaml").read_bytes() == asked, (
        "a run must not forget where its checkpoints are"
    )


def test_a_run_without_processes_has_nothing_to_end(tiny: TinyRun):
    stop_online_eval(tiny.path)
    assert end_jobs(tiny.path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 2}, "evaluate.online.images 2: a distance needs at least 4"),
        ({"images": 16, "solver": "leapfrog"}, "unknown solver 'leapfrog'"),
        ({"images": 16, "steps": None}, "solver midpoint"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(tiny: TinyRun, settings: dict, message: str):
    from fm_core.config import RunConfig, merge
    from fm_core.errors import UserError
    from fm_core.stages.preflight import preflight

    over = {"run": {"name": "refused"}, "evaluate": {"online": settings}}
    config = RunConfig.model_validate(merge(json.loads(tiny.config.model_dump_json()), over))
    with pytest.raises(UserError) as caught:
        preflight(config, ["train"])
    assert message in str(caught.value)
