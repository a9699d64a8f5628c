"""Classifier trained on the labels of a data set, for features where Inception weights are unavailable.

Its features are specific to one data set and one training run, so a Fréchet distance on them is never called
FID. The fraction of samples that it classifies with high confidence measures whether they look like members
of a class at all. An ordinary classifier is confident about nine in ten images of pure noise. This classifier
is therefore also trained on out-of-distribution negatives (`ood_negatives`).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fm_core.method.dequantization import Quantizer

OnProgress = Callable[[int, int, float], None]


class Classifier(nn.Module):
    """A small CNN: images float32 [N, C, H, W] in [-1, 1] -> (features [N, D], logits [N, classes]).

    Each stage has two convolutions, twice as wide as those of the previous stage, and then pooling by 2. The
    image is pooled until it is about four pixels wide: once for 8 x 8 digits, four times for 64 x 64
    photographs. Features are non-negative (after a ReLU), and D = `features`.
    """

    def __init__(
        self, image_channels: int, image_size: int, classes: int, width: int = 32, features: int = 128
    ) -> None:
        super().__init__()
        self.classes = classes
        halvings = max(1, round(math.log2(image_size / 4)))
        stages: list[nn.Module] = []
        inputs = image_channels
        for level in range(halvings + 1):
            outputs = width * min(2**level, 8)
            stages += [_conv_bn_relu(inputs, outputs), _conv_bn_relu(outputs, outputs)]
            stages.append(nn.MaxPool2d(2, ceil_mode=True) if level < halvings else nn.AdaptiveAvgPool2d(2))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.embed = nn.Linear(4 * inputs, features)
        self.read = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of a batch of images."""
        features = F.relu(self.embed(self.stages(images).flatten(1)))
        return features, self.read(features)


def _conv_bn_relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def train_classifier(
    images: Tensor,
    labels: Tensor,
    levels: int,
    classes: int,
    seed: int,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> Classifier:
    """Train on images uint8 [N, C, S, S] in 0 .. levels - 1 with labels int64 [N] in 0 .. classes - 1.

    AdamW with one learning-rate cycle over `steps` batches. Every image is shifted by up to an eighth of its
    size, and each batch is extended by half as many OOD negatives. All randomness comes from `seed`, and
    global generators are not used: with the same kind of machine and number of threads, the result is
    identical bit for bit. `on_progress(step, steps, loss)` is called about fifty times. The classifier is
    returned in eval mode, on `device`.

    Raises:
        ValueError: the images and labels do not match each other or the number of classes.
    """
    _check(images, labels, classes)
    quantizer = Quantizer(levels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(images.shape[1], images.shape[2], classes)
    classifier = classifier.to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        indices, order = order[:batch_size], order[batch_size:]
        batch = random_shift(images[indices], images.shape[2] // 8, generator)
        x, targets = quantizer.scale(batch), F.one_hot(labels[indices], classes).float()
        negatives, soft_targets = ood_negatives(x, targets, generator)
        x, targets = torch.cat([x, negatives]).to(device), torch.cat([targets, soft_targets]).to(device)
        loss = F.cross_entropy(classifier(x)[1], targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_progress is not None and (step % max(1, steps // 50) == 0 or step == steps):
            on_progress(step, steps, loss.item())
    return classifier.eval()


def _check(images: Tensor, labels: Tensor, classes: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be uint8 [N, C, S, S], not {images.dtype} {tuple(images.shape)}")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{len(images)} images need as many labels (at least one), not {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}: with {classes} classes they "
            f"must lie in 0 .. {classes - 1}"
        )


def ood_negatives(x: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """OOD negatives and their soft targets: ([N // 2, C, H, W], [N // 2, classes]).

    Each image in the first half of the batch x [N, C, H, W], which has class probabilities `targets`
    [N, classes], is blended with an image of the second half whose pixels are shuffled and whose target is
    uniform. The weight of the first image is at most one half; with a larger weight, the blend would still be
    a member of its class.
    """
    n = len(x) // 2
    order = torch.rand(n, 1, x[0, 0].numel(), generator=generator).argsort(dim=2).expand(-1, x.shape[1], -1)
    shuffled = x[n : 2 * n].flatten(2).gather(2, order).view_as(x[:n])
    uniform = torch.full_like(targets[:n], 1 / targets.shape[1])
    weight = 0.5 * torch.rand(n, generator=generator)
    blend = weight[:, None, None, None] * x[:n] + (1 - weight)[:, None, None, None] * shuffled
    return blend, weight[:, None] * targets[:n] + (1 - weight)[:, None] * uniform


def random_shift(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image of [N, C, H, W] by up to max_shift pixels per axis, repeating edge pixels."""
    n, _, height, width = images.shape
    shifts = torch.randint(-max_shift, max_shift + 1, (2, n, 1), generator=generator).to(images.device)
    rows = (torch.arange(height, device=images.device) + shifts[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + shifts[1]).clamp(0, width - 1)
    index = torch.arange(n, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def predict(
    classifier: Classifier, images: Tensor, levels: int, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and class probabilities [N, classes], float32 on the CPU, of uint8 images [N, C, S, S].

    The classifier should be in eval mode, as `train_classifier` returns it.
    """
    device = next(classifier.parameters()).device
    quantizer = Quantizer(levels)
    features: list[Tensor] = []
    probabilities: list[Tensor] = []
    for batch in images.split(batch_size):
        feature, logits = classifier(quantizer.scale(batch.to(device)))
        features.append(feature.float().cpu())
        probabilities.append(logits.float().softmax(dim=1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor, levels: int) -> float:
    """Fraction in [0, 1] of images uint8 [N, C, S, S] whose most probable class is their label int64 [N]."""
    _, probabilities = predict(classifier, images, levels)
    return (probabilities.argmax(dim=1) == labels.cpu()).double().mean().item()
