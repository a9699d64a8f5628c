"""The same images have the same scores from every source and with any number of processes."""

import json
import shutil

import numpy as np
import pytest
import torch

from fm_core import cli
from fm_core.config import load_config
from fm_core.sampling.checkpoint_source import checkpoint_step, load_model, weights_file
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.storage.atomic_files import read_json
from tests.support.forked_ranks import forked_jobs
from tests.support.tiny_run import DEBUG, is_progress

IMAGE_SCORES = (
    "frechet_distance",
    "frechet_distance_of_held_out",
    "frechet_distance_ratio",
    "kernel_distance",
    "inception_score",
    "precision",
    "recall",
    "recognised",
)
SHARED_SCORES = (*IMAGE_SCORES, "bits_per_dim", "nfe")


def flat(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, below in value.items() for k, v in flat(below, f"{prefix}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, below in enumerate(value) for k, v in flat(below, f"{prefix}.{i}").items()}
    return {prefix: value}


def scores_at(tiny, out):
    (line,) = [line for line in out.splitlines() if line.startswith("  scores: ")]
    return read_json(tiny.root / line.removeprefix("  scores: "))


@pytest.fixture(scope="module")
def run(tiny):
    return tiny.copy("scored")


@pytest.fixture(scope="module")
def here(tiny):
    """The scores that one process made, in the calling process."""
    return scores_at(tiny, tiny.first["evaluate"].out)


@pytest.fixture
def fm(run, capsys, monkeypatch):
    monkeypatch.chdir(run.root)

    def call(*arguments, code=0):
        status = cli.main([arguments[0], "--config", str(run.file), *arguments[1:]])
        out = capsys.readouterr()
        assert status == code, out.err
        return out.out if code == 0 else [line for line in out.err.splitlines() if not is_progress(line)]

    return call


def samples_of(run):
    config = load_config(run.file)
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device("cpu"))
    return SampleSet(config, step, protocol_of(config, model.weights_sha256, model.generator)), model


def scored_by(run, processes):
    """The scores of this many processes, and the folder of the copy of the run that was scored."""
    moved = run.path.with_name(f"by-{processes}")
    shutil.copytree(
        run.path, moved, ignore=shutil.ignore_patterns("evaluation", "scores-*", "lock", "job.json")
    )
    data = run.root / f"data-{processes}"
    shutil.copytree(run.root / "data", data, ignore=shutil.ignore_patterns("train-*.safetensors", "guard-*"))
    arguments = ("--run.name", moved.name, "--data.root", str(data), "--evaluate.processes", str(processes))
    called = run.fm("evaluate", *arguments)
    assert called.code == 0, called.err
    return scores_at(run, called.out), moved


def assert_same_scores(theirs, here):
    """To the last bit: parts are cut by the numbers of the images and put together in their order."""
    assert here["bits_per_dim"]["images"] == 2  # each a part of its own
    for name in SHARED_SCORES:
        assert flat(theirs[name]) == flat(here[name])
    assert theirs["protocol"]["samples_digest"] == here["protocol"]["samples_digest"]


@pytest.fixture(scope="module")
def scored_by_a_job(run):
    """What two processes of the local launcher made."""
    with forked_jobs():
        return scored_by(run, 2)


def test_two_processes_of_a_job_give_the_numbers_of_one(here, scored_by_a_job):
    theirs, moved = scored_by_a_job
    assert_same_scores(theirs, here)
    assert {path.name for path in (moved / "logs").glob("evaluate-?.log")} == {
        f"evaluate-{rank}.log" for rank in range(2)
    }


def test_three_processes_give_the_numbers_of_one(run, here, forked_ranks):
    assert_same_scores(scored_by(run, 3)[0], here)


def test_the_sampler_itself_is_scored_like_its_tars_and_writes_none(run, here, fm):
    before = set(run.path.rglob("*.tar"))
    theirs = scores_at(run, fm("evaluate", "--evaluate.samples", "sampler"))
    assert {name: theirs[name] for name in IMAGE_SCORES} == {name: here[name] for name in IMAGE_SCORES}
    assert theirs["nfe"] == here["nfe"]
    assert set(run.path.rglob("*.tar")) == before
    assert not list(run.path.glob("samples/*/scores-*/samples-*"))  # nor stay the features


def test_the_same_pixels_in_an_npz_score_the_same_and_have_no_cost(run, here, fm):
    samples, model = samples_of(run)
    pixels = torch.cat(list(samples.read(model.image_shape)))
    np.savez(run.root / "images.npz", pixels.permute(0, 2, 3, 1).numpy())
    theirs = scores_at(run, fm("evaluate", "--evaluate.samples", "images.npz"))
    for name in IMAGE_SCORES:
        assert flat(theirs[name]) == {
            key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            for key, value in flat(here[name]).items()
        }
    assert not {"nfe", "bits_per_dim", "step"} & theirs.keys()
    assert theirs["protocol"]["samples_digest"] == here["protocol"]["samples_digest"]


def test_samples_are_compared_with_training_and_validation_images(run, here, fm):
    record = here["memorization"]["pixels"]
    assert (record["images"], record["held_out_images"], record["training_images"]) == (20, 60, 1_737)
    assert record["samples"]["value"] > record["held_out"]["value"] > 0  # hardly trained
    assert record["near_copies"]["value"] == 0
    assert here["memorization"]["features"]["training_images"] == 1_737
    references = [here[f"frechet_distance_to_{key}"]["reference"] for key in ("held_out", "as_many_training")]
    assert references == ["val, 60 images", "train, 60 images"]
    fm("report")
    page = (run.path / "report.html").read_text()
    assert "near-copies" in page
    assert "fewer than 10 images per feature" in page
    assert "accuracy of the classifier" in page


def test_copies_among_the_samples_are_reported(run, fm):
    samples, model = samples_of(run)
    pixels = torch.cat(list(samples.read(model.image_shape))).permute(0, 2, 3, 1).numpy()
    np.savez(run.root / "copies.npz", np.concatenate([pixels, pixels[:6]]))
    out = fm("evaluate", "--evaluate.samples", "copies.npz")
    assert scores_at(run, out)["duplicates"] == {"images": 6, "of": 26}
    assert "6 of 26 images are copies of others" in out


def test_a_corrupted_tar_is_named_and_what_was_finished_stays(run, fm):
    samples, _ = samples_of(run)
    tar = samples.store.local / "samples-000001.tar"
    intact = tar.read_bytes()
    arguments = ("evaluate", "--evaluate.pair_images", "19")
    try:
        tar.write_bytes(intact[:-700] + b"\1" + intact[-699:])
        (error,) = fm(*arguments, code=2)
        assert "samples-000001.tar is missing or damaged; run fm sample" in error
        finished = list(run.path.glob("samples/*/scores-*/samples-00000000-*"))
        assert len(finished) == 1
        before = finished[0].stat().st_mtime_ns
        fm("sample", *DEBUG)
        assert tar.read_bytes() == intact
        parts = run.path.glob("samples/*/scores-*/samples-*")
        assert [part.stat().st_mtime_ns for part in parts] == [before]
        assert "evaluate done" in fm(*arguments)
        assert not finished[0].exists()
    finally:
        tar.write_bytes(intact)


def test_more_images_go_on_with_the_bits_that_are_there(run, fm):
    likelihood = ("--evaluate.likelihood.batch", "2", "--evaluate.likelihood.check_images", "1")
    few = scores_at(run, fm("evaluate", "--evaluate.likelihood.images", "4", *likelihood))
    parts = {
        path: path.stat().st_mtime_ns
        for path in run.path.glob("samples/*/scores-bits-*/bits-*")
        if not path.name.endswith("00000001.safetensors")
    }
    out = fm("evaluate", "--evaluate.likelihood.images", "6", *likelihood)
    many = scores_at(run, out)
    assert all(path.stat().st_mtime_ns == before for path, before in parts.items())
    assert (few["bits_per_dim"]["images"], many["bits_per_dim"]["images"]) == (4, 6)
    assert many["bits_per_dim"]["solver_check"]["images"] == 1
    file = out.split("  scores: ")[1].strip().replace(".json", ".bits.jsonl")
    lines = [json.loads(line) for line in (run.root / file).read_text().splitlines()]
    assert [line["image"] for line in lines] == list(range(6))
    assert np.mean([line["bits"] for line in lines]) == pytest.approx(many["bits_per_dim"]["value"])
    assert all(len(line["per_probe"]) == 2 for line in lines)


def test_the_curve_of_evaluations_is_in_scores_and_report(run, fm):
    curve = (
        *("--evaluate.nfe_curve.images", "8", "--evaluate.nfe_curve.exact_nfe", "40"),
        *("--evaluate.nfe_curve.nfe", "[4, 8]", "--evaluate.nfe_curve.tolerances", "[0.1]"),
    )
    curve_scores = scores_at(run, fm("evaluate", *curve))["nfe_curve"]
    assert curve_scores["images"] == 8
    assert [point["solver"] for point in curve_scores["points"]] == [
        *("euler", "euler", "midpoint", "midpoint", "heun2", "heun2", "rk4", "rk4", "dopri5")
    ]
    assert [point["nfe"] for point in curve_scores["points"][:8]] == [4, 8] * 4
    assert all(point["error"] > 0 and point["frechet_distance"] > 0 for point in curve_scores["points"])
    fm("report")
    page = (run.path / "report.html").read_text()
    assert "difference from a reference solution with 40 evaluations" in page
    assert "All scores of this run" in page


def test_scores_computed_in_float32_record_it_when_samples_are_in_bfloat16(run, fm):
    fast = ("--sample.precision", "bf16", "--evaluate.samples", "sampler")
    curve = (
        *("--evaluate.nfe_curve.images", "4", "--evaluate.nfe_curve.exact_nfe", "8"),
        *("--evaluate.nfe_curve.nfe", "[4]", "--evaluate.nfe_curve.solvers", '["euler"]'),
    )
    scores = scores_at(run, fm("evaluate", *fast, *curve))
    dtypes = [scores[key]["dtype"] for key in ("protocol", "nfe_curve", "bits_per_dim")]
    assert dtypes == ["bfloat16", "float32", "float32"]


def scored_by_own_reference(run, fm):
    """Scores with the reference that the run itself wrote to ours.npz."""
    fm("evaluate", "--evaluate.reference_out", "ours.npz")
    only = ("--evaluate.metrics", '["frechet_distance"]')
    return scores_at(run, fm("evaluate", "--evaluate.reference", "ours.npz", *only))


def test_a_reference_is_written_out_and_read_back(run, here, fm):
    theirs = scored_by_own_reference(run, fm)
    value = here["frechet_distance"]["value"]
    assert theirs["frechet_distance"]["value"] == pytest.approx(value, rel=1e-9)
    assert theirs["frechet_distance"]["reference"] == "ours.npz, 1737 images"


def test_a_changed_reference_is_refused_by_the_reference_check(run, fm):
    scored_by_own_reference(run, fm)
    with np.load(run.root / "ours.npz") as file:
        content = dict(file)
    content["mu"] = content["mu"] + 0.3
    np.savez(run.root / "ours.npz", **content)
    only = ("--evaluate.metrics", '["frechet_distance"]', "--evaluate.held_out_images", "60")
    arguments = ("evaluate", "--evaluate.reference", "ours.npz", *only, "--evaluate.pair_images", "18")
    (error,) = fm(*arguments, code=2)
    assert "real validation images are at" in error
    assert "if this is intended, remove" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--evaluate.features", "inception"), "needs evaluate.weights"),
        (("--evaluate.features", "inceptoin"), "allowed are classifier, inception"),
        (("--evaluate.weights", "x.pth"), "the classifier is trained on the data set"),
        (("--evaluate.samples", "nowhere"), "neither a folder of images nor an .npz"),
        (("--evaluate.reference", "nowhere.npz"), "nowhere.npz does not exist"),
        (("--evaluate.nfe_curve.images", "9", "--evaluate.nfe_curve.solvers", '["x"]'), "allowed: euler"),
        (("--evaluate.nfe_curve.images", "2"), "a distance needs at least 4"),
        (("--evaluate.metrics", '["fid"]'), "evaluate.metrics"),
        (("--sample.guidance", "-1"), "sample.guidance"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_scored_is_one_line(fm, arguments, message):
    (error,) = fm("evaluate", *arguments, code=2)
    assert message in error
