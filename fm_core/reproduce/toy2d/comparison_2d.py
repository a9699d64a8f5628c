"""The paper's comparison in 2-D: every objective trained and scored on the checkerboard, and its page."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.method.compatibility import require_diffusion_path
from fm_core.method.paths import Path
from fm_core.report.file_links import file_links
from fm_core.report.html import FINGERPRINT_MARK, PAGE_VERSION, PageSection
from fm_core.reproduce.claims import Measured, compare_quality, mean_of_seeds, over_seeds
from fm_core.reproduce.experiments import seeds_of, title_of
from fm_core.reproduce.toy2d.checkerboard import ENTROPY, NAME
from fm_core.reproduce.toy2d.experiment_2d import (
    FEW_STEPS_KEYS,
    ToyExperiment,
    generator_in_2d,
    toy_experiments,
)
from fm_core.reproduce.toy2d.figures import FigureData
from fm_core.reproduce.toy2d.page import page_2d, sections_2d
from fm_core.reproduce.toy2d.run_2d import ToyOutcome, ToyProgress, run_toy_experiment
from fm_core.reproduce.toy2d.scoring import DENSITY_TOLERANCE, LIKELIHOOD_BATCH
from fm_core.run.artifact_cache import exclusive_lock
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, byte_size
from fm_core.run.results import StageResult
from fm_core.storage.atomic_files import SCHEMA, read_json, write_json, write_text
from fm_core.storage.hashing import fingerprint
from fm_core.storage.keyed_random import generator_record


def reproduce_2d(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    """Run the experiments that are missing, and write the page.

    Raises:
        UserError: an experiment cannot be built.
        RuntimeError: at the end, if an experiment failed.
    """
    experiments = toy_experiments(config)
    directory = run.path / "reproduce"
    run.begin()
    threads = config.launch.threads or torch.get_num_threads()
    with exclusive_lock(directory) as check_stop, cpu_threads(threads):
        progress = ToyProgress(len(experiments), observe, check_stop)
        outcomes = [run_toy_experiment(experiment, config, run, progress) for experiment in experiments]
        check_stop()
        written = _write_results(config, run, outcomes)
    failed = [outcome for outcome in outcomes if outcome.error]
    paths = {"report": str(directory / "report.html"), "results": str(directory / "results.json")}
    if failed:
        errors = "; ".join(f"{outcome.experiment.name}: {outcome.error}" for outcome in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(experiments)} experiments failed ({errors}); the others are in "
            f"{paths['report']}; run it again to retry the failed ones"
        )
    changed = written or any(outcome.changed for outcome in outcomes)
    progress.finish(paths["report"])
    return StageResult(
        stage="reproduce",
        state="done" if changed else "verified",
        seconds=0.0,
        summary=f"{len(experiments)} experiments compared; {paths['report']}",
        paths=paths,
        counts={f"nll_nats_{o.experiment.name}": o.record["nll"]["nats"] for o in outcomes},
        hashes={outcome.experiment.name: outcome.record["weights_sha256"] for outcome in outcomes},
    )


def page_sections_2d(config: RunConfig, results: dict[str, Any]) -> list[PageSection]:
    """The tables and figures of a comparison from results.json. Raises UserError like `toy_experiments`."""
    experiments = toy_experiments(config)
    complete = [experiment for experiment in experiments if experiment.name in results["cells"]]
    data = _figure_data(config, complete)
    paths = {experiment.section.path: experiment.objective.path for experiment in experiments}
    return sections_2d(results, data, paths)


def _write_results(config: RunConfig, run: RunDirectory, outcomes: list[ToyOutcome]) -> bool:
    """Write results.json and report.html unless they are up to date; returns whether they were written."""
    complete = [outcome for outcome in outcomes if not outcome.error]
    experiments = [outcome.experiment for outcome in outcomes]
    paths = {experiment.section.path: experiment.objective.path for experiment in experiments}
    results = {
        "kind": "plane",  # as in the files of all versions
        "protocol": _protocol(config),
        "entropy": {"nats": ENTROPY, "bits": ENTROPY / math.log(2)},
        "diffusion_paths": [name for name, path in paths.items() if _is_diffusion(path)],
        "cells": {o.experiment.name: _result_record(o) for o in complete},
        **over_seeds_2d(complete),
        **_few_steps(config, complete),
        "failed": {o.experiment.name: f"{o.experiment.label}: {o.error}" for o in outcomes if o.error},
    }
    directory = run.path / "reproduce"
    page_file = directory / "report.html"
    mark = f"{FINGERPRINT_MARK}{fingerprint([PAGE_VERSION, results])} -->\n"
    same = read_json(directory / "results.json") == {"schema": SCHEMA, **json.loads(json.dumps(results))}
    if same and page_file.exists() and page_file.read_text(encoding="utf-8").endswith(mark):
        return False
    data = _figure_data(config, [outcome.experiment for outcome in complete])
    write_json(directory / "results.json", results)
    links = PageSection("Files", [file_links(directory, page_file, byte_size)], folded=True)
    write_text(page_file, page_2d(results, data, paths, links) + mark)
    return True


def _figure_data(config: RunConfig, complete: Sequence[ToyExperiment]) -> list[FigureData]:
    """What the figures show: the experiments of the first seed, without reflow students."""
    return [
        FigureData(experiment.label, experiment.cache.tensors("pictures"))
        for experiment in complete
        if experiment.seed == seeds_of(config)[0] and not experiment.teacher
    ]


def over_seeds_2d(complete: Sequence[ToyOutcome]) -> dict[str, Any]:
    """NLL and NFE over seeds for each objective, with a verdict; empty for one seed.

    The verdict compares the NLL of flow matching on the optimal-transport path with the NLL of the objective.
    Reflow students, which have had more training, are left out.
    """
    by_objective = dict[str, list[ToyOutcome]]()
    for outcome in (each for each in complete if not each.experiment.teacher):
        by_objective.setdefault(outcome.experiment.section.name, []).append(outcome)
    if max(map(len, by_objective.values()), default=0) < 2:
        return {}
    numbers = {
        name: [Measured(o.record["nll"]["nats"], o.record["nll"]["stderr_nats"]) for o in outcomes]
        for name, outcomes in by_objective.items()
    }
    ours = next(
        (name for name, outcomes in by_objective.items() if outcomes[0].experiment.is_flow_matching_ot), None
    )
    records = dict[str, Any]()
    for name, outcomes in by_objective.items():
        nll = over_seeds(numbers[name])
        nfe = over_seeds([Measured(o.record["nfe"]["dopri5"], 0.0) for o in outcomes])
        records[name] = {
            "title": title_of(outcomes[0].experiment.section),
            "seeds": [o.experiment.seed for o in outcomes],
            "nll_nats": {"value": nll.value, "stderr": nll.stderr},
            "nfe": {"value": nfe.value, "stderr": nfe.stderr},
        }
        if ours and name != ours:
            verdict = compare_quality(mean_of_seeds(numbers[ours]), mean_of_seeds(numbers[name]))
            records[name]["verdict"] = verdict.record()
    return {"over_seeds": records}


def _result_record(outcome: ToyOutcome) -> dict[str, Any]:
    """An experiment's entry in results.json."""
    record = {key: value for key, value in outcome.record.items() if key not in ("schema", "tensors_sha256")}
    if "few_steps" in record:
        section = outcome.experiment.section
        record |= {"title": title_of(section), "experiment": section.name}
    return {"label": outcome.experiment.label, **record}


def _few_steps(config: RunConfig, complete: Sequence[ToyOutcome]) -> dict[str, Any]:
    """The settings of the comparison at few evaluations, if an experiment has it."""
    if not any("few_steps" in outcome.record for outcome in complete):
        return {}
    settings = config.reproduce.few_steps.model_dump(mode="json", include=FEW_STEPS_KEYS)
    ours = (o.experiment for o in complete if o.experiment.is_flow_matching_ot and not o.experiment.teacher)
    candidate = next(ours, None)
    return {"few_steps": {**settings, "candidate": candidate.section.name if candidate else None}}


def _protocol(config: RunConfig) -> dict[str, Any]:
    """All settings that affect the numbers and are the same for all experiments but reflow students."""
    return {
        "data": NAME,
        "seed": seeds_of(config)[0],
        **generator_record(generator_in_2d(config)),
        **config.reproduce.toy2d.model_dump(mode="json"),
        # These strings are part of results.json: a change would rewrite the pages of finished comparisons.
        "optimizer": "Adam, betas 0.9 and 0.999, cosine to zero over the cell's steps, weights not averaged",
        "times": "uniform on the objective's interval",
        "coupling": "independent",
        "network": "MLP, SiLU, time as a third coordinate, float32",
        "nll": f"dopri5, exact trace, batches of {LIKELIHOOD_BATCH}, error norm over the batch",
        "samples_by": "dopri5 (error norm over all samples at once); midpoint for few evaluations",
        "density_picture": f"dopri5 at {DENSITY_TOLERANCE}, exact trace",
    }


def _is_diffusion(path: Path) -> bool:
    try:
        require_diffusion_path("the score", path)
    except UserError:
        return False
    return True
