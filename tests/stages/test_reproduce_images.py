"""The comparison on images: two tiny runs, made once, verified, and put side by side."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_images import configured

from fm_core.errors import UserError
from fm_core.run.files import read_json, write_json
from fm_core.stages.cells import cell_runs
from fm_core.stages.estimate import HEAD, STORED, estimate
from fm_core.stages.image_cell import pictures_of
from fm_core.stages.reproduce import reproduce

pytestmark = pytest.mark.slow


def test_every_cell_is_a_plain_run_that_other_commands_know(compared):
    root, result, _ = compared
    assert result.state == "done"
    for name in ("ddpm-s0", "fm-ot-s0"):
        run = root / "runs" / "both" / "reproduce" / name
        assert (run / "config.yaml").exists()
        assert read_json(run / "train" / "DONE.json")["images_seen"] == 128


def test_runs_share_data_order_noise_and_initial_weights(compared):
    root = compared[0] / "runs" / "both" / "reproduce"
    trees = [json.loads(json.dumps(read_lines(root / name))) for name in ("ddpm-s0", "fm-ot-s0")]
    assert trees[0] == trees[1]


def read_lines(run: Path) -> dict:
    """All that is asked of a run but its name, its objective and its path."""
    import yaml

    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["run"]["name"]
    assert tree["run"]["seed"] == 0
    del tree["method"]
    return tree


def test_the_table_the_curves_and_the_claims_are_there(compared):
    _, result, _ = compared
    results = read_json(Path(result.paths["results"]))
    assert set(results["summary"]) == {"ddpm", "fm-ot"}
    for cell in results["summary"].values():
        assert cell["frechet_distance"]["value"] > 0
        assert cell["bits_per_dim"]["stderr"] > 0
        assert cell["nfe"]["value"] > 0
    assert [p["images_seen"] for p in results["curves"]["while_training"]["fm-ot"]] == [64, 128]
    assert [p["nfe"] for p in results["curves"]["solvers"]["euler"]["fm-ot"]] == [4, 8]
    assert set(results["claims"]) == {"samples", "evaluations", "training"}
    page = Path(result.paths["report"]).read_text()
    for words in ("Table 1", "FM-OT", "While training", "Fewer evaluations", "claims", "not stated"):
        assert words in page
    assert page.count("<img") >= 4
    assert page.count("The noise of image ") == 2 * 3  # each picture's caption is its text as well
    assert "http" not in page.split("</style>")[1]


def test_objectives_start_from_one_noise_and_end_at_their_samples(compared):
    root = compared[0]
    cells = cell_runs(configured(root))
    ways = [pictures_of(cell)["trajectory"] for cell in cells]
    assert ways[0].shape == ways[1].shape == (17, 8, 1, 8, 8)
    # Both sources are standard normal.
    assert ways[0][0].equal(ways[1][0])
    assert not ways[0][-1].equal(ways[1][-1])
    for cell, way in zip(cells, ways, strict=True):
        (tar,) = (Path(cell.config.run.root) / cell.name / "samples").glob("*/*/samples-000000.tar")
        assert way[-1].numpy().tobytes() in tar.read_bytes()


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
    """When the checkpoints and samples of a run were written."""
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


def test_the_dry_run_foretold_steps_and_bytes(compared):
    root = compared[0]
    found = estimate(configured(root))
    row = dict(zip(HEAD + STORED, found.rows[-1], strict=True))
    runs = [root / "runs" / "both" / "reproduce" / name for name in ("ddpm-s0", "fm-ot-s0")]
    steps = sum(read_json(run / "train" / "DONE.json")["step"] for run in runs)
    assert int(row["steps"]) == steps
    there = sum(
        file.stat().st_size
        for run in runs
        for file in (run / "train" / "checkpoints").rglob("*")
        if file.is_file()
    )
    told = {"kB": 1e3, "MB": 1e6}
    number, unit = row["checkpoints"].split()
    # In a network as small as this, names and the state of the run weigh something.
    assert 0.8 < float(number) * told[unit] / there < 1
    assert (
        f"{sum(file.stat().st_size for file in (root / 'data' / 'digits').glob('*.tar')) / 1e3:.3g} kB"
        in (found.facts["data set"])
    )


def test_progress_only_grows(compared):
    done = [progress.done for progress in compared[2] if progress.stage == "reproduce"]
    assert done == sorted(done)
    assert done[-1] == compared[2][-1].total


def test_checkpoints_that_do_not_reach_over_the_run_are_refused(tmp_path):
    config = configured(tmp_path)
    short = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": 1})})
    with pytest.raises(UserError, match=r"train\.keep_checkpoints"):
        reproduce(short)
