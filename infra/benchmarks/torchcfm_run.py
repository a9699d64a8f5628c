"""Training and sampling with torchcfm: its loss in a plain training loop, and its sampler. Used by parity.py.

Runs in the environment with torchcfm: `python torchcfm_run.py '{"config": FILE, "samples": FILE}'`.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import print_result

from fm_core.config import RunConfig, load_config
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.reader import ImageReader
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_network
from fm_core.training.ema import ema_decay
from fm_core.training.lr_schedule import learning_rate


def main(task: dict[str, Any]) -> None:
    """Train, sample, and print the result."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    config = load_config(task["config"])
    train, data = config.train, config.data
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = load_manifest(data.root, data.name)
    with ImageReader(data.root, manifest, "train") as reader:
        pixels, labels = reader.read(np.arange(len(reader), dtype=np.int64))
    quantizer = Quantizer(manifest.levels)
    torch.manual_seed(config.run.seed)
    network = build_network(config.model, manifest.image_shape, manifest.class_count or 0)
    weights = [weight.detach().numpy().tobytes() for weight in network.parameters()]
    initial = hashlib.sha256(b"".join(weights)).hexdigest()
    network.to(device).train()
    average = [weight.detach().clone() for weight in network.parameters()]
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    matcher = ConditionalFlowMatcher(sigma=0.0)
    rows = endless(len(pixels), train.global_batch)
    steps = math.ceil(train.images / train.global_batch)
    began, losses = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step * train.global_batch)
        indices = next(rows)
        images = pixels[indices]
        if data.horizontal_flip:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        x1 = quantizer.dequantize(images, torch.rand(images.shape)).to(device)
        t, x_t, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        label = labels[indices].to(device) if config.model.class_conditional else None
        loss = torch.mean((network(t, x_t, label) - target) ** 2)
        optimizer.zero_grad()
        loss.backward()
        if train.gradient_clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), train.gradient_clip)
        optimizer.step()
        losses.append(loss.item())
        share = 1 - ema_decay(train.ema_decays[0], step, train.ema_warmup)
        torch._foreach_lerp_(average, [weight.detach() for weight in network.parameters()], share)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        for weight, averaged in zip(network.parameters(), average, strict=True):
            weight.copy_(averaged)
    nfe = draw_samples(network.eval(), config, manifest, quantizer, device, Path(task["samples"]))
    last = losses[-max(1, steps // 20) :]
    print_result(
        [seconds / steps],
        nfe=nfe,
        images_seen=steps * train.global_batch,
        step=steps,
        loss=sum(last) / len(last),
        initial_weights_sha256=initial,
        device=device.type,
    )


def endless(images: int, batch: int) -> Iterator[torch.Tensor]:
    """Yield row indices of full batches endlessly, reshuffled for each pass over the images."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        left = torch.cat([left, torch.randperm(images)])
        count = len(left) - len(left) % batch
        yield from left[:count].split(batch) if count else ()
        left = left[count:]


@torch.no_grad()
def draw_samples(
    network: torch.nn.Module,
    config: RunConfig,
    manifest: Manifest,
    quantizer: Quantizer,
    device: torch.device,
    file: Path,
) -> float:
    """Draw the run's number of images with the run's batch size; return the NFE per image."""
    from torchdiffeq import odeint

    sample, drawn, calls = config.sample, [], 0
    times = torch.linspace(0, 1, 2, device=device)
    for first in range(0, sample.images, sample.batch):
        count = min(sample.batch, sample.images - first)
        label = None
        if config.model.class_conditional:
            label = torch.randint(manifest.class_count or 1, (count,)).to(device)
        evaluations = 0

        def velocity(t: torch.Tensor, x: torch.Tensor, label: Any = label) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            return network(t.expand(len(x)), x, label)

        noise = torch.randn(count, *manifest.image_shape).to(device)
        tolerances = {"rtol": sample.rtol or 1e-5, "atol": sample.atol or 1e-5}
        trajectory = odeint(velocity, noise, times, method="dopri5", **tolerances)
        drawn.append(quantizer.quantize(trajectory[-1]).cpu())
        calls += evaluations * count
    np.savez(file, arr_0=torch.cat(drawn).permute(0, 2, 3, 1).numpy())
    return calls / sample.images


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
