"""Scores of parts that several ranks compute, compared with the scores of one rank and of one part."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fm_core.config import merge, parse_config
from fm_core.evaluation import evaluation_run, image_sources, reference
from fm_core.evaluation.evaluation_run import REFERENCE, SAMPLES, VALIDATION, EvaluationRun
from fm_core.evaluation.evaluation_worker import evaluate
from fm_core.evaluation.scores import image_scores
from fm_core.launch.worker_main import Rank

CPU = torch.device("cpu")


class Projection(nn.Module):
    """Network with 16 features and five logits for images of 3 x 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.logits = nn.Linear(192, 16), nn.Linear(16, 5)

    def forward(self, images):
        features = self.features(images.float().flatten(1) / 255)
        return features, self.logits(features)


def projection():
    torch.manual_seed(0)
    return Projection()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "images.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 17, (700, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture
def scores(digits, images, tmp_path, monkeypatch):
    """Function of (ranks, images per part) that returns the scores and the number of parts of each task."""

    def compute(ranks, part):
        for module, name in (
            (reference, "PART_IMAGES"),
            (evaluation_run, "VALIDATION_PART_IMAGES"),
            (image_sources, "PART_IMAGES"),
        ):
            monkeypatch.setattr(module, name, part)
        root = tmp_path / f"{ranks}-{part}"
        shutil.copytree(Path(digits.data.root), root / "data", ignore=shutil.ignore_patterns("evaluation"))
        over = {
            "run": {"root": str(root / "runs")},
            "data": {"root": str(root / "data")},
            "evaluate": {"samples": str(images), "features": f"{__name__}:projection"},
        }
        config = parse_config(merge(digits.model_dump(mode="json"), over), where="test")
        (root / "control").mkdir()
        for number in reversed(range(ranks)):  # the order does not matter
            evaluate(config, Rank(number, ranks, number, root / "control", "job"))
        evaluation = EvaluationRun(config, CPU)
        evaluation.open(lambda step, steps, loss: None)
        tasks = evaluation.tasks
        assert not any(task.missing() for task in tasks.values())
        counts = [len(tasks[phase].ranges) for phase in (REFERENCE, SAMPLES, VALIDATION)]
        parts = [tasks[phase].read_all() for phase in (SAMPLES, VALIDATION)]
        scorers = (evaluation.reference, evaluation.extractor, evaluation.settings)
        return image_scores(*parts, *scorers, CPU), counts

    return compute


def test_parts_of_several_ranks_give_the_numbers_of_one_rank_and_nearly_those_of_one_part(scores):
    """Scores are identical bit for bit for any number of ranks; other parts round sums differently."""
    single, counts = scores(1, 256)
    assert counts == [6, 3, 2]
    assert {"frechet_distance", "kernel_distance", "inception_score", "precision", "recall"} <= single.keys()
    assert single["frechet_distance"]["infinity"]
    for ranks in (2, 3):
        assert scores(ranks, 256) == (single, counts)
    unsplit, counts = scores(2, 2_000)
    assert counts == [1, 1, 1]
    for key, record in unsplit.items():
        for name in {"value", "stderr"} & record.keys():
            assert single[key][name] == pytest.approx(record[name], rel=1e-10), (key, name)
