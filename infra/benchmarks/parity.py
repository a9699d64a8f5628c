"""Quality: a run of flow matching on the OT path against torchcfm's own loss and sampling, by one judge.

    fm reproduce --config infra/configs/reproduce-digits.yaml
    python infra/benchmarks/parity.py runs/reproduce-digits/reproduce/fm-ot-s0

For each finished run that is named (one for each seed), torchcfm's ConditionalFlowMatcher trains the same
network from the same initial weights in a plain PyTorch loop: as many images, in batches of the same size,
of the same data, AdamW with the same course of the learning rate, clipping and moving average, the run's
seed. Order of the images, noise and times are drawn by torch. Samples are torchdiffeq's dopri5 at the run's
tolerances from torch.randn, as in torchcfm's compute_fid.py, as many and in batches as large as the run's.
Both sets are scored as images from outside, by the classifier of the data set.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import WORK, Contender, child, machine
from peers import peers_python

from fm_core.config import RunConfig, dump_yaml, load_config, parse_config
from fm_core.errors import UserError
from fm_core.reproduce.claims import Measured, compare_quality, mean_of_seeds
from fm_core.sampling.checkpoint_source import checkpoint_step, load_model, weights_file
from fm_core.sampling.sample_store import SampleSet, protocol_of
from fm_core.stages.evaluate import evaluate
from fm_core.storage.atomic_files import read_json

ASKED = {
    "objective": "flow-matching",
    "path": "optimal-transport",
    "coupling": "independent",
    "times": "uniform",
}
"""What ConditionalFlowMatcher is, in the words of the configuration."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs, one for each seed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torchcfm's process")
    parser.add_argument("--work", type=Path, default=WORK / "parity", help="where samples and scores go")
    parser.add_argument("--peers", type=Path, default=WORK / "peers", help="the environment with torchcfm")
    parser.add_argument("--json", type=Path, help="where the numbers go, beside the table")
    options = parser.parse_args()
    try:
        pairs = [compared(run, options) for run in options.runs]
    except UserError as error:
        sys.exit(f"parity: {error}")
    report(pairs, options)


def compared(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of one run and of torchcfm's."""
    config = resolved(run)
    folder = options.work.resolve() / f"{run.resolve().parent.parent.name}-{config.run.name}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"ours": exported(config, folder / "ours.npz")}
    (folder / "config.yaml").write_text(dump_yaml(config))
    task = {"config": str(folder / "config.yaml"), "samples": str(folder / "theirs.npz")}
    theirs = Contender("torchcfm", "ConditionalFlowMatcher, plain loop, odeint")
    facts["theirs"] = child("torchcfm_run.py", theirs, options.threads, task, peers_python(options.peers))
    facts["theirs"].pop("blocks")
    for side, found in facts.items():
        found |= scored(config, folder, f"{side}.npz")
        print(f"{config.run.name} {side}: {found}", file=sys.stderr, flush=True)
    return {"run": str(run), "seed": config.run.seed, **facts}


def resolved(run: Path) -> RunConfig:
    """The configuration of a finished run, readable from any folder. UserError for another kind."""
    config = load_config(run / "config.yaml")
    for key, asked in ASKED.items():
        if getattr(config.method, key) != asked:
            raise UserError(f"{run}: method.{key} {getattr(config.method, key)}; torchcfm's is {asked}")
    if config.sample.solver != "dopri5":
        raise UserError(f"{run}: sample.solver {config.sample.solver}; torchcfm samples by dopri5")
    if config.train.label_dropout or config.sample.guidance != 1 or config.sample.classes:
        raise UserError(f"{run}: guidance is no part of this comparison")
    done = read_json(run / "train" / "DONE.json")
    if done is None or done["images_seen"] < config.train.images:
        raise UserError(f"{run} is not trained to its end; run fm reproduce first")
    tree = config.model_dump(mode="json")
    tree["run"]["root"] = str(run.resolve().parent)
    if "://" not in config.data.root:
        tree["data"]["root"] = str(Path(config.data.root).resolve())
    return parse_config(tree, where=str(run))


def exported(config: RunConfig, file: Path) -> dict[str, Any]:
    """Write the run's samples where the other's will be; what they cost."""
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device("cpu"))
    samples = SampleSet(config, step, protocol_of(config, model.weights_sha256))
    done = samples.done()
    if done is None:
        raise UserError(f"{samples.store.url} is not complete; run fm reproduce first")
    images = torch.cat([*samples.read(model.image_shape)])
    np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())
    return {"nfe": done["nfe"]["mean"], "images_seen": model.images_seen, "step": step}


def scored(config: RunConfig, folder: Path, name: str) -> dict[str, Any]:
    """The Fréchet distance of images in a file, by a run of its own that holds scores alone."""
    tree = config.model_dump(mode="json")
    tree["run"] |= {"root": str(folder), "name": "scores"}
    tree["evaluate"]["likelihood"]["images"] = 0
    tree["evaluate"]["nfe_curve"]["images"] = 0
    tree["evaluate"] |= {"metrics": ["frechet_distance"], "samples": str(folder / name)}
    scores = read_json(Path(evaluate(parse_config(tree, where=name)).paths["scores"])) or {}
    return {key: scores[key] for key in ("frechet_distance", "frechet_distance_of_held_out")}


def report(pairs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, ratios first, and write the JSON."""
    lines = ["| torchcfm's Fréchet distance to ours | ours | torchcfm's | NFE of both | seed |"]
    lines += ["|---|---|---|---|---|", *map(line, pairs)]
    ours, theirs = (mean_of_seeds([distance(pair, side) for pair in pairs]) for side in ("ours", "theirs"))
    verdict = compare_quality(ours, theirs).text
    held_out = pairs[0]["ours"]["frechet_distance_of_held_out"]["value"]
    images = pairs[0]["ours"]["frechet_distance"]["images"]
    print("\n".join(lines))
    print(f"\nOurs is {verdict}; {images:,} images, real held-out images are at {held_out:.2f}.")
    where = options.json or WORK / "parity.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "verdict": verdict,
        "ours": {"value": ours.value, "stderr": ours.stderr},
        "theirs": {"value": theirs.value, "stderr": theirs.stderr},
        "pairs": pairs,
        "machine": machine(),
    }
    where.write_text(json.dumps({"command": sys.argv, **facts}, indent=1))
    print(where)


def line(pair: dict[str, Any]) -> str:
    """A row: the ratio with the error that both distances give it."""
    ours, theirs = distance(pair, "ours"), distance(pair, "theirs")
    ratio = theirs.value / ours.value
    error = abs(ratio) * math.hypot(theirs.stderr / theirs.value, ours.stderr / ours.value)
    evaluations = f"{pair['ours']['nfe']:.0f}, {pair['theirs']['nfe']:.0f}"
    return f"| {ratio:.2f} ± {error:.2f} | {ours} | {theirs} | {evaluations} | {pair['seed']} |"


def distance(pair: dict[str, Any], side: str) -> Measured:
    found = pair[side]["frechet_distance"]
    return Measured(found["value"], found["stderr"])


if __name__ == "__main__":
    main()
