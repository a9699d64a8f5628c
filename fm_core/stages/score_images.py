"""`fm evaluate` without a configuration: scores of images, whoever made them, against other images."""

import time
from pathlib import Path

import torch

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.evaluation.requirements import check_weights
from fm_core.evaluation.score_output import check_output, scores_text, statements, values_text, write_scores
from fm_core.evaluation.set_comparison import SetComparison
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.output import print_line
from fm_core.run.progress import Observer, Progress, ProgressPhases, no_progress
from fm_core.run.resource_limits import available_cores, raise_open_file_limit
from fm_core.run.results import StageResult

CLASSIFIER, CLASSIFIER_WEIGHT = "training the classifier", 25_000.0
OF_A_RUN = ("processes", "reference_out", "held_out_images", "likelihood", "nfe_curve", "online")
"""Keys of the evaluate section that need a run."""


def score_images(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Score evaluate.samples against evaluate.reference; write evaluate.output, or print the scores.

    Raises:
        UserError: one line for what is missing, damaged, or does not fit together; nothing is written.
    """
    _check(config)
    started = time.monotonic()
    raise_open_file_limit()
    settings = config.evaluate
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with cpu_threads(available_cores()):
        comparison = SetComparison(settings, device)
        classifier = {CLASSIFIER: CLASSIFIER_WEIGHT} if settings.trains_classifier else {}
        phases = ProgressPhases("evaluate", observe, {**classifier, **comparison.phases()})
        comparison.open(
            lambda step, steps, loss: phases.at(CLASSIFIER, step, steps, f"steps, loss {loss:.3f}")
        )
        scores = comparison.scores(lambda phase, done, total: phases.at(phase, done, total, "images"))
    seconds = round(time.monotonic() - started, 3)
    record = {"name": Path(str(settings.samples)).name, **scores, "seconds": seconds}
    if settings.output:
        write_scores(settings.output, record)
    else:
        print_line(scores_text(record))
    summary = values_text(scores)
    observe(Progress("evaluate", 100, 100, "%", summary))
    return StageResult(
        stage="evaluate",
        state="done",
        seconds=seconds,
        summary=summary,
        paths={"scores": settings.output} if settings.output else {},
        counts={key: score["value"] for key, score in scores.items() if "value" in score},
        hashes={"features": scores["protocol"]["features_sha256"]},
        notes=statements(scores),
    )


def _check(config: RunConfig) -> None:
    settings = config.evaluate
    missing = [f"--evaluate.{key}" for key in ("samples", "reference") if not settings.given(key)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: needed without --config; name a folder of images, an .npz file, tars, "
            "or the folder of a data set"
        )
    if settings.samples in (None, "sampler"):
        raise UserError("evaluate.samples sampler: only a run has a sampler; give --config")
    others = [
        name for name in RunConfig.model_fields if name != "evaluate" and name in config.model_fields_set
    ]
    wrong = others + [f"evaluate.{key}" for key in OF_A_RUN if settings.given(key)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: only for the scores of a run; give --config, or leave it out")
    check_weights(settings)
    if settings.output:
        check_output(settings.output)
