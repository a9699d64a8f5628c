"""Image comparison of two tiny runs: results, verification and report."""

import shutil
from pathlib import Path

import pytest
import torch

from fm_core.commands import estimate, stage_function
from fm_core.config import merge, parse_config
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.models.build import build_method, build_network
from fm_core.reproduce.cost_estimate import HEAD, STORED
from fm_core.reproduce.experiments import experiments_of
from fm_core.reproduce.image_experiment import _checkpoint_config, sample_images_of
from fm_core.storage.atomic_files import read_json, write_json
from fm_core.training.training_set import training_set
from tests.support.tiny_image_comparison import configured

reproduce = stage_function("reproduce")


def test_a_checkpoint_of_the_curve_is_scored_by_its_distance_alone(tmp_path):
    config = _checkpoint_config(configured(tmp_path), step=3, images=24)
    assert (config.sample.step, config.sample.images) == (3, 24)
    assert (config.evaluate.likelihood.images, config.evaluate.nfe_curve.images) == (0, 0)
    assert tuple(config.evaluate.metrics) == ("frechet_distance",)


def test_every_experiment_is_a_plain_run_that_other_commands_know(compared):
    root, result, _ = compared
    assert result.state == "done"
    for name in ("ddpm-s0", "fm-ot-s0"):
        run = root / "runs" / "both" / "reproduce" / name
        assert (run / "config.yaml").exists()
        assert read_json(run / "train" / "DONE.json")["images_seen"] == 128


def test_runs_differ_only_in_their_objective_and_path(compared):
    asked = [
        asked_but_for_the_objective(experiment.config)
        for experiment in experiments_of(configured(compared[0]))
    ]
    assert asked[0] == asked[1]


def asked_but_for_the_objective(config):
    tree = config.model_dump(mode="json")
    del tree["run"]["name"], tree["method"]
    return tree


def test_runs_share_images_noise_times_and_initial_weights(compared):
    """Both paths have a standard normal source, so that the draws themselves can be compared."""
    drawn = [first_of(experiment.config) for experiment in experiments_of(configured(compared[0]))]
    assert drawn[0]["x1"].std() > 0.1
    for name, tensor in drawn[0].items():
        assert torch.allclose(tensor, drawn[1][name], atol=1e-6), name


def first_of(config):
    """The tensors of the first batch of a run, and its initial weights."""
    manifest = load_manifest(config.data.root, config.data.name)
    method = build_method(config.method)
    torch.manual_seed(config.run.seed)
    network = build_network(config.model, manifest.image_shape, 0)
    source = training_set(config, manifest, method).training_source(1)
    with source.batches(0, 8, 0, 1, 8) as batches:
        sample, _ = source.draw(next(batches), torch.device("cpu"))
    start, end = method.objective.interval
    return {
        "x0": sample.x0,
        "x1": sample.x1,
        "share of the interval": (sample.t - start) / (end - start),
        **network.state_dict(),
    }


def test_what_evaluation_would_refuse_is_refused_before_training(compared):
    root = compared[0]
    for over, message in (
        ({"evaluate": {"features": "inception"}}, "weights"),
        ({"evaluate": {"metrics": ["kernel_distance"]}}, "frechet_distance"),
        ({"reproduce": {"images": {"curve_images": 2}}}, "at least 4"),
    ):
        tree = merge(configured(root).model_dump(mode="json"), {"run": {"name": "refused"}, **over})
        with pytest.raises(UserError, match=message):
            reproduce(parse_config(tree, where="x"))
    assert not (root / "runs" / "refused" / "reproduce" / "ddpm-s0").exists()


def test_experiments_have_directories_of_their_own_in_one_store(compared):
    over = {"train": {"checkpoint_root": "memory://somewhere/else/"}}
    tree = merge(configured(compared[0]).model_dump(mode="json"), over)
    roots = [
        experiment.config.train.checkpoint_root
        for experiment in experiments_of(parse_config(tree, where="x"))
    ]
    assert roots == ["memory://somewhere/else/ddpm-s0", "memory://somewhere/else/fm-ot-s0"]


def test_the_table_the_curves_and_the_claims_are_there(compared):
    _, result, _ = compared
    results = read_json(Path(result.paths["results"]))
    assert set(results["summary"]) == {"ddpm", "fm-ot"}
    for row in results["summary"].values():
        assert row["frechet_distance"]["value"] > 0
        assert row["bits_per_dim"]["stderr"] > 0
        assert row["nfe"]["value"] > 0
    assert [p["images_seen"] for p in results["curves"]["while_training"]["fm-ot"]] == [64, 128]
    assert [p["nfe"] for p in results["curves"]["solvers"]["euler"]["fm-ot"]] == [4, 8]
    assert set(results["claims"]) == {"samples", "evaluations", "training"}
    page = Path(result.paths["report"]).read_text()
    for message in ("Table 1", "FM-OT", "While training", "Fewer evaluations", "claims", "not stated"):
        assert message in page
    assert page.count("<img") >= 4
    assert page.count("The noise of image ") == 3
    assert 'href="./results.json"' in page
    assert "http" not in page.split("</style>")[1]


def test_objectives_start_from_one_noise_and_end_at_their_samples(compared):
    root = compared[0]
    experiments = experiments_of(configured(root))
    trajectories = [sample_images_of(experiment)["trajectory"] for experiment in experiments]
    assert trajectories[0].shape == trajectories[1].shape == (17, 8, 1, 8, 8)
    # Both sources are standard normal.
    assert trajectories[0][0].equal(trajectories[1][0])
    assert not trajectories[0][-1].equal(trajectories[1][-1])
    for experiment, trajectory in zip(experiments, trajectories, strict=True):
        (tar,) = (Path(experiment.config.run.root) / experiment.name / "samples").glob(
            "*/*/samples-000000.tar"
        )
        assert trajectory[-1].numpy().tobytes() in tar.read_bytes()


def test_a_comparison_made_before_there_were_paths_gets_them(tmp_path, compared):
    root = tmp_path / "old"
    shutil.copytree(compared[0], root)
    directory = root / "runs" / "both" / "reproduce"
    results = read_json(directory / "results.json")
    for record in results["cells"]:
        del record["trajectories_sha256"]
        for name in ("trajectories.json", "trajectories.safetensors"):
            (directory / record["run"] / "pictures" / name).unlink()
    write_json(directory / "results.json", results)
    (directory / "report.html").write_text("an older page")
    stages = {name: weights_stamp(directory / name) for name in ("ddpm-s0", "fm-ot-s0")}
    again = reproduce(configured(root))
    assert again.state == "done"
    assert {name: weights_stamp(directory / name) for name in stages} == stages
    assert "Sampling paths from one noise" in (directory / "report.html").read_text()


def weights_stamp(run: Path) -> list[int]:
    """Modification times of the checkpoints and samples of a run."""
    files = [*run.glob("train/checkpoints/*/*"), *run.glob("samples/**/*.tar")]
    assert files
    return [file.stat().st_mtime_ns for file in sorted(files)]


def test_called_again_it_verifies(compared):
    root, result, _ = compared
    before = Path(result.paths["report"]).stat().st_mtime_ns
    again = reproduce(configured(root))
    assert again.state == "verified"
    assert again.hashes == result.hashes
    assert Path(result.paths["report"]).stat().st_mtime_ns == before


def test_the_dry_run_predicts_steps_and_bytes(compared):
    root = compared[0]
    cost = estimate(configured(root))
    row = dict(zip(HEAD + STORED, cost.rows[-1], strict=True))
    runs = [root / "runs" / "both" / "reproduce" / name for name in ("ddpm-s0", "fm-ot-s0")]
    steps = sum(read_json(run / "train" / "DONE.json")["step"] for run in runs)
    assert int(row["steps"]) == steps
    size = sum(
        file.stat().st_size
        for run in runs
        for file in (run / "train" / "checkpoints").rglob("*")
        if file.is_file()
    )
    factors = {"kB": 1e3, "MB": 1e6}
    number, unit = row["checkpoints"].split()
    # For a network this small, names and the state of the run contribute noticeably to the size.
    assert 0.8 < float(number) * factors[unit] / size < 1
    assert (
        f"{sum(file.stat().st_size for file in (root / 'data' / 'digits').glob('*.tar')) / 1e3:.3g} kB"
        in (cost.facts["data set"])
    )


def test_progress_only_grows(compared):
    done = [progress.done for progress in compared[2] if progress.stage == "reproduce"]
    assert done == sorted(done)
    assert done[-1] == compared[2][-1].total


def test_checkpoints_that_do_not_cover_the_run_are_refused(tmp_path):
    config = configured(tmp_path)
    short = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": 1})})
    with pytest.raises(UserError, match=r"train\.keep_checkpoints"):
        reproduce(short)
