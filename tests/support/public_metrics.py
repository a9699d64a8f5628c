"""Metrics of torch-fidelity, torchmetrics and scipy on given features, in a virtual environment.

Usage: python -m tests.support.public_metrics features.npz metrics.npz

torch-fidelity's package needs a torchvision that fits torch, and torchmetrics imports it where it is
installed. Its modules of formulas need neither, once an empty package stands in for it.
"""

import importlib.util
import sys
import types

import numpy as np
import scipy.linalg
import torch


def stub(name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    above, _, own = name.rpartition(".")
    if above:
        setattr(sys.modules[above], own, module)


class Placeholder:
    pass


where = importlib.util.find_spec("torch_fidelity").submodule_search_locations
stub("torch_fidelity", __path__=where, __getattr__=lambda attribute: Placeholder)
from torchmetrics.image.fid import _compute_fid  # noqa: E402
from torchmetrics.image.kid import poly_mmd  # noqa: E402

# Modules that read data, not those that compute metrics:
for name in ("torchvision", "torch_fidelity.datasets", "torch_fidelity.registry"):
    stub(name, __getattr__=lambda attribute: Placeholder)
from torch_fidelity.metric_fid import fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402


def main(source, target):
    arrays = {name: torch.from_numpy(value) for name, value in np.load(source).items()}
    x, y, logits = arrays["x"], arrays["y"], arrays["logits"]
    mu, sigma = ([rows.double().mean(0) for rows in (x, y)], [torch.cov(rows.double().T) for rows in (x, y)])
    statistics = [{"mu": m.numpy(), "sigma": s.numpy()} for m, s in zip(mu, sigma, strict=True)]
    difference = (mu[0] - mu[1]).numpy()
    root = scipy.linalg.sqrtm(sigma[0].numpy() @ sigma[1].numpy()).real
    as_many = y.double()[: len(x)]
    one_subset = {"kid_subsets": 1, "kid_subset_size": len(x), "verbose": False}
    splits = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    prc = prc_features_to_metric(x, y, verbose=False, save_cpu_ram=True)
    answers = {
        "scipy.fid": difference @ difference + np.trace(sigma[0].numpy() + sigma[1].numpy() - 2 * root),
        "torch_fidelity.fid": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        "torchmetrics.fid": _compute_fid(mu[0], sigma[0], mu[1], sigma[1]).item(),
        "torch_fidelity.isc": isc_features_to_metric(logits, splits=1)["inception_score_mean"],
        "torch_fidelity.isc_of_splits": splits["inception_score_mean"],
        "torch_fidelity.std_over_splits": splits["inception_score_std"],
        "torch_fidelity.kid": kid_features_to_metric(x.double(), as_many, **one_subset)[
            "kernel_inception_distance_mean"
        ],
        "torchmetrics.kid": poly_mmd(x.double(), as_many).item(),
        "torch_fidelity.precision": prc["precision"],
        "torch_fidelity.recall": prc["recall"],
    }
    np.savez(target, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
