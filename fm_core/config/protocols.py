"""Named evaluation protocols: what each published way of scoring images fixes.

A closed table. evaluate.protocol chooses a row, which sets the keys of the evaluate section that the
configuration does not name; a key that it does name is taken, and recorded as a deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

ProtocolName = Literal["adm", "edm", "pytorch-fid", "torch-fidelity", "clean-fid", "flow-matching-paper"]
Resize = Literal["tensorflow1-bilinear", "torch-bilinear", "pillow-bicubic"]
SplitOrder = Literal["file", "shuffled"]
ReferenceKind = Literal["adm-batch", "training-set", "any"]

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of weights-inception-2015-12-05-6726825d.pth as published by torch-fidelity and pytorch-fid, whose
names of the file hold its first eight digits."""
RESIZE_TEXTS: Mapping[Resize, str] = MappingProxyType(
    {
        # The text of files that were written before there were named protocols.
        "tensorflow1-bilinear": "TensorFlow 1 bilinear to 299",
        "torch-bilinear": "PyTorch bilinear to 299, half-pixel centers, no antialiasing",
        "pillow-bicubic": "Pillow bicubic to 299 in float32, clipped to 0 .. 255",
    }
)


@dataclass(frozen=True)
class EvaluationProtocol:
    """What a protocol fixes. Features are those of InceptionV3 of 2015-12-05 in all of them."""

    name: ProtocolName
    title: str
    """The program that defines the protocol."""
    used_by: str
    """Papers that report numbers by it."""
    metrics: tuple[str, ...]
    """evaluate.metrics of the numbers that it defines."""
    resize: Resize
    """How images become 299 x 299 pixels; the result stays in float32."""
    quantized: str
    """Where images are rounded to 8 bits."""
    weights_sha256: str | None
    """SHA-256 of the weights, if their publisher states it; otherwise that of the file is recorded."""
    images: int | None
    """Number of samples; None if the protocol does not fix it."""
    random_classes: bool
    """Whether the class of each sample is drawn at random, and not the same number taken of each."""
    reference: ReferenceKind
    """adm-batch: an .npz with mu, sigma, mu_s, sigma_s and arr_0; training-set: statistics of all of it."""
    reference_text: str
    splits: int | None = None
    """Splits of the Inception Score; None: all images at once, or no Inception Score."""
    split_order: SplitOrder = "shuffled"
    """file: consecutive images; shuffled: by numpy's RandomState(2020) before the splits are cut."""
    neighbors: int | None = None
    """k of precision and recall; None if they are not part of the protocol."""
    pair_samples: int | None = None
    """Samples of precision and recall; None: evaluate.pair_images."""
    pair_images: int = 10_000
    """evaluate.pair_images: reference images of precision and recall."""
    spatial: bool = False
    """Whether sFID belongs to it: 7 channels of 17 x 17 features of the layer mixed_6/conv."""
    remarks: tuple[str, ...] = ()
    """What is computed otherwise here, or is to be known of the published numbers."""

    def keys(self) -> dict[str, Any]:
        """Keys of the evaluate section that the protocol sets."""
        return {"features": "inception", "metrics": self.metrics, "pair_images": self.pair_images}


_ALL = (
    EvaluationProtocol(
        name="adm",
        title="evaluator of guided-diffusion",
        used_by="ADM (Dhariwal and Nichol 2021), DiT, SiT, MAR, and most papers on ImageNet 256",
        metrics=("frechet_distance", "inception_score", "precision_recall"),
        resize="tensorflow1-bilinear",
        quantized="samples are uint8 in an .npz",
        weights_sha256=None,
        images=50_000,
        random_classes=True,
        reference="adm-batch",
        reference_text="VIRTUAL_*.npz of guided-diffusion: statistics of the training set, 10,000 images",
        splits=10,
        split_order="file",
        neighbors=3,
        pair_samples=50_000,
        spatial=True,
        remarks=(
            "its weights are classify_image_graph_def.pb; here the same network, converted",
            "its splits are of 5,000 images; here there are ten, whatever the number of images",
            "it compares distances of precision and recall in float16; here in float64",
            "its Inception Score depends on the order of the images: in class order it is far too low",
        ),
    ),
    EvaluationProtocol(
        name="edm",
        title="fid.py of EDM",
        used_by="EDM (Karras et al. 2022), EDM2, consistency models",
        metrics=("frechet_distance",),
        resize="tensorflow1-bilinear",
        quantized="samples are PNG files",
        weights_sha256=None,
        images=50_000,
        random_classes=True,
        reference="training-set",
        reference_text=".npz of EDM (fid-refs), or statistics of the training set by the same preprocessing",
        remarks=(
            "its weights are inception-2015-12-05.pkl; here the same network, converted",
            "the papers report the smallest of three values with disjoint seeds; here each is one value",
        ),
    ),
    EvaluationProtocol(
        name="pytorch-fid",
        title="pytorch-fid 0.3",
        used_by="many PyTorch papers before 2021",
        metrics=("frechet_distance",),
        resize="torch-bilinear",
        quantized="samples are image files",
        weights_sha256=INCEPTION_SHA256,
        images=None,
        random_classes=False,
        reference="any",
        reference_text="a folder of images, or an .npz with mu and sigma",
        remarks=("its resizing differs from that of TensorFlow, with which FID was defined",),
    ),
    EvaluationProtocol(
        name="torch-fidelity",
        title="torch-fidelity 0.4",
        used_by="papers that state torch-fidelity or torchmetrics with antialias=False",
        metrics=("frechet_distance", "kernel_distance", "inception_score"),
        resize="tensorflow1-bilinear",
        quantized="samples are uint8",
        weights_sha256=INCEPTION_SHA256,
        images=None,
        random_classes=False,
        reference="any",
        reference_text="any set of images",
        splits=10,
        remarks=(
            "its KID is the mean over 100 subsets of 1,000 images; here over all pairs of "
            "evaluate.pair_images, which has the same expectation",
            "its precision and recall are on VGG16 by default, which is not offered here",
        ),
    ),
    EvaluationProtocol(
        name="clean-fid",
        title="clean-fid 0.1.35, mode clean",
        used_by="papers that state clean-fid (Parmar et al. 2022)",
        metrics=("frechet_distance",),
        resize="pillow-bicubic",
        quantized="samples are image files; resized values are not rounded",
        weights_sha256=None,
        images=None,
        random_classes=False,
        reference="any",
        reference_text="a folder of images, or statistics of clean-fid with mu and sigma",
        remarks=("its weights are inception-2015-12-05.pt; here the same network, converted",),
    ),
    EvaluationProtocol(
        name="flow-matching-paper",
        title="TensorFlow-GAN, as in Flow Matching",
        used_by="Flow Matching (Lipman et al. 2023) on CIFAR-10, ImageNet-32 and ImageNet-64",
        metrics=("frechet_distance", "inception_score"),
        resize="tensorflow1-bilinear",
        quantized="samples are uint8",
        weights_sha256=None,
        images=50_000,
        random_classes=False,
        reference="training-set",
        reference_text="training set; the paper does not state its reference, this is the usual reading",
        remarks=(
            "the paper does not state the number of samples of FID; 50,000 is that of its NFE",
            "ImageNet-128 of the paper is by the protocol adm",
        ),
    ),
)
PROTOCOLS: Mapping[str, EvaluationProtocol] = MappingProxyType({item.name: item for item in _ALL})
"""Every named protocol."""
