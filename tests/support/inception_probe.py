"""Checks of the Inception extractor where torch-fidelity is installed, in a virtual environment.

Usage: PYTHONPATH=FOLDER python -m tests.support.inception_probe DATA_ROOT DATA_NAME FOLDER

FOLDER holds a torchvision that does not fit torch. Each line of the output is a name, a tab and a value.
"""

import hashlib
import importlib
import pickle
import sys
from pathlib import Path

import torch
from torch import nn

from fm_core.config import EvaluateSection
from fm_core.config.protocols import PROTOCOLS
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.evaluation.features import inception
from fm_core.evaluation.features.extractor import as_rgb
from fm_core.evaluation.features.inception import torch_fidelity_module
from fm_core.evaluation.features.inception_input import INPUTS
from fm_core.evaluation.features.open_extractor import open_extractor

root, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
manifest = load_manifest(root, name)


def report(name, value):
    print(name, value, sep="\t", flush=True)


def opened(**keys):
    settings = EvaluateSection.model_validate({"features": "inception", **keys})
    return open_extractor(settings, root, manifest, torch.device("cpu"), lambda step, steps, loss: None)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(**keys):
    try:
        opened(**keys)
    except UserError as error:
        return " ".join(str(error).splitlines())
    return "accepted"


try:
    import torch_fidelity  # noqa: F401
except Exception as error:
    report("package", f"{type(error).__name__}: {error}")
for module in [module for module in sys.modules if module.split(".")[0] == "torch_fidelity"]:
    del sys.modules[module]

module = torch_fidelity_module("feature_extractor_inceptionv3")


class Fresh(module.FeatureExtractorInceptionV3):
    """The class with its random initial values: a state dict of the published file's format."""

    def load_state_dict(self, state):
        pass


torch.manual_seed(0)
weights = folder / "weights.pth"
torch.save({}, weights)
torch.save(Fresh("x", ["2048"], feature_extractor_weights_path=str(weights)).state_dict(), weights)

inception.BATCH = 2  # so that three images are two batches
options = {"weights": str(weights), "weights_sha256": sha256(weights)}
extractor = opened(**options)
images = torch.randint(0, 17, (3, *manifest.image_shape), dtype=torch.uint8)
features, probabilities = extractor(images)
report("features", f"{tuple(features.shape)} {tuple(probabilities.shape)}")
report("name", extractor.name)
report("sha256", extractor.sha256)
report("sha256 of the file", sha256(weights))
layers = ["2048", "logits_unbiased"]
original = module.FeatureExtractorInceptionV3("x", layers, feature_extractor_weights_path=str(weights))
answers = [original(as_rgb(part, 17)) for part in images.split(2)]
theirs, logits = (torch.cat(each) for each in zip(*answers, strict=True))
report("largest difference of the features", (features - theirs).abs().amax().item())
report("largest difference of the probabilities", (probabilities - logits.softmax(1)).abs().amax().item())
report("spread of the features", features.std(0).amax().item())

# The other resizings, with the network's own replaced in its module; the layer of sFID by its name there.
pixels, own_resize = as_rgb(images, 17), module.interpolate_bilinear_2d_like_tensorflow1x
inner = {}
original.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, output: inner.update(output=output))
for protocol in ("pytorch-fid", "clean-fid"):
    made = INPUTS[PROTOCOLS[protocol].resize](pixels) * 128 + 128
    module.interpolate_bilinear_2d_like_tensorflow1x = lambda *arguments, made=made, **options: made
    theirs = original(pixels)[0]
    module.interpolate_bilinear_2d_like_tensorflow1x = own_resize
    ours = opened(protocol=protocol, **options)(images)[0]
    # With random weights the features of different images are nearly equal: compare with their differences.
    spread = ours.std(0).amax().item()
    report(
        f"largest difference with the resizing of {protocol}", (ours - theirs).abs().amax().item() / spread
    )
    report(f"resizing of {protocol} matters", (ours - features).abs().amax().item() / spread)
adm = opened(protocol="adm", **options).outputs(images)
spatial = adm["spatial"].view(3, 17, 17, 7).permute(0, 3, 1, 2)
original(pixels)
report("spatial features", tuple(adm["spatial"].shape))
report("largest difference of the spatial features", (spatial - inner["output"][:, :7]).abs().amax().item())
report("largest difference of the features of adm", (adm["features"] - features).abs().amax().item())
report("published hash", refusal(weights=str(weights)))

other = folder / "other.pth"
torch.save(nn.Linear(2, 2).state_dict(), other)
report("other network", refusal(weights=str(other), weights_sha256=sha256(other)))
hostile = folder / "hostile.pth"
hostile.write_bytes(pickle.dumps(print))
report("code in a pickle", refusal(weights=str(hostile), weights_sha256=sha256(hostile)))

# Where torch-fidelity's module itself imported torchvision, its RuntimeError would be one line.
broken = folder / "torch_fidelity"
broken.mkdir()
(broken / "__init__.py").write_text("")
(broken / "feature_extractor_inceptionv3.py").write_text("import torchvision\n")
for module in [module for module in sys.modules if module.split(".")[0] in ("torch_fidelity", "torchvision")]:
    del sys.modules[module]
importlib.invalidate_caches()
report("broken module", refusal(**options))
