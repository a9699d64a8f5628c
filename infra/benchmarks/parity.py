"""Quality of a flow-matching run on the OT path, compared with torchcfm's own loss and sampling.

    fm reproduce --config infra/configs/reproduce-digits.yaml
    python infra/benchmarks/parity.py runs/reproduce-digits/reproduce/fm-ot-s0

For each finished run on the command line (one per seed), a plain PyTorch loop trains the same network from
the same initial weights with torchcfm's ConditionalFlowMatcher. It uses the same number of images of the same
data, the same batch size, AdamW with the same learning-rate schedule, clipping and EMA, and the run's seed;
torch draws the order of the images, the noise and t. As in torchcfm's compute_fid.py, samples are drawn from
torch.randn with torchdiffeq's dopri5, at the run's tolerances, number of images and batch size. Both sets are
scored as external images with the same feature extractor, the classifier of the data set.
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
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.stages.evaluate import evaluate
from fm_core.storage.atomic_files import read_json

REQUIRED = {
    "objective": "flow-matching",
    "path": "optimal-transport",
    "coupling": "independent",
    "times": "uniform",
}
"""Configuration that corresponds to ConditionalFlowMatcher."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs, one per seed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torchcfm's process")
    parser.add_argument("--work", type=Path, default=WORK / "parity", help="folder for samples and scores")
    parser.add_argument("--peers", type=Path, default=WORK / "peers", help="the environment with torchcfm")
    parser.add_argument("--json", type=Path, help="file for the numbers; the table is printed")
    options = parser.parse_args()
    try:
        pairs = [compare_run(run, options) for run in options.runs]
    except UserError as error:
        sys.exit(f"parity: {error}")
    report(pairs, options)


def compare_run(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Score one run and its torchcfm counterpart."""
    config = resolved_config(run)
    folder = options.work.resolve() / f"{run.resolve().parent.parent.name}-{config.run.name}"
    folder.mkdir(parents=True, exist_ok=True)
    sides = {"ours": export_samples(config, folder / "ours.npz")}
    (folder / "config.yaml").write_text(dump_yaml(config))
    task = {"config": str(folder / "config.yaml"), "samples": str(folder / "theirs.npz")}
    theirs = Contender("torchcfm", "ConditionalFlowMatcher, plain loop, odeint")
    sides["theirs"] = child("torchcfm_run.py", theirs, options.threads, task, peers_python(options.peers))
    sides["theirs"].pop("blocks")
    for side, results in sides.items():
        results |= score_file(config, folder, f"{side}.npz")
        print(f"{config.run.name} {side}: {results}", file=sys.stderr, flush=True)
    return {"run": str(run), "seed": config.run.seed, **sides}


def resolved_config(run: Path) -> RunConfig:
    """Configuration of a finished run, with absolute paths. Raises UserError if torchcfm cannot match it."""
    config = load_config(run / "config.yaml")
    for key, required in REQUIRED.items():
        if getattr(config.method, key) != required:
            raise UserError(f"{run}: method.{key} {getattr(config.method, key)}; torchcfm's is {required}")
    if config.sample.solver != "dopri5":
        raise UserError(f"{run}: sample.solver {config.sample.solver}; torchcfm samples by dopri5")
    if config.train.label_dropout or config.sample.guidance != 1 or config.sample.classes:
        raise UserError(f"{run}: this comparison does not support guidance")
    done = read_json(run / "train" / "DONE.json")
    if done is None or done["images_seen"] < config.train.images:
        raise UserError(f"{run} is not fully trained; run fm reproduce first")
    tree = config.model_dump(mode="json")
    tree["run"]["root"] = str(run.resolve().parent)
    if "://" not in config.data.root:
        tree["data"]["root"] = str(Path(config.data.root).resolve())
    return parse_config(tree, where=str(run))


def export_samples(config: RunConfig, file: Path) -> dict[str, Any]:
    """Write the run's samples as .npz; return their NFE and the length of the training."""
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device("cpu"))
    samples = SampleSet(config, step, protocol_of(config, model.weights_sha256, model.generator))
    done = samples.done()
    if done is None:
        raise UserError(f"{samples.store.url} is not complete; run fm reproduce first")
    images = torch.cat([*samples.read(model.image_shape)])
    np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())
    return {"nfe": done["nfe"]["mean"], "images_seen": model.images_seen, "step": step}


def score_file(config: RunConfig, folder: Path, name: str) -> dict[str, Any]:
    """Fréchet distance of the images in a file, computed in a separate run directory."""
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
    print(f"\nOurs is {verdict}; {images:,} images; distance of real validation images: {held_out:.2f}.")
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
    """Table row with the ratio of the distances and its propagated error."""
    ours, theirs = distance(pair, "ours"), distance(pair, "theirs")
    ratio = theirs.value / ours.value
    error = abs(ratio) * math.hypot(theirs.stderr / theirs.value, ours.stderr / ours.value)
    evaluations = f"{pair['ours']['nfe']:.0f}, {pair['theirs']['nfe']:.0f}"
    return f"| {ratio:.2f} ± {error:.2f} | {ours} | {theirs} | {evaluations} | {pair['seed']} |"


def distance(pair: dict[str, Any], side: str) -> Measured:
    score = pair[side]["frechet_distance"]
    return Measured(score["value"], score["stderr"])


if __name__ == "__main__":
    main()
