"""Self-tests of `fm doctor`: they pass on this machine, and can fail."""

import pytest
import torch

from fm_core.evaluation import self_tests as module
from fm_core.evaluation.self_tests import self_tests
from fm_core.method.ode import ADAPTIVE, FIXED


@pytest.fixture(scope="module")
def checks():
    return self_tests()


def test_every_check_passes_here(checks):
    assert [f"{check.name}: {check.detail}" for check in checks if not check.ok] == []


def test_every_solver_and_extractor_is_listed(checks):
    names = {check.name for check in checks}
    assert {f"solver {method}" for method in (*ADAPTIVE, *FIXED)} <= names
    assert {"extractor classifier", "extractor inception", "bits/dim of a uniform model"} <= names
    assert all(check.detail not in ("", "None") and "\n" not in check.detail for check in checks)


@pytest.mark.parametrize("name", ["_gaussian_model", "_uniform_model", "_few_images", "_order"])
def test_they_fail_where_arithmetic_is_wrong(monkeypatch, name):
    wrong = {
        "_gaussian_model": ("bits_per_dim", lambda right: lambda *a, **k: _shifted(right(*a, **k))),
        "_uniform_model": ("bits_per_dim", lambda right: lambda *a, **k: _shifted(right(*a, **k))),
        "_few_images": ("frechet_distance", lambda right: lambda *a: right(*a) * 1.01),
        "_order": (
            "inception_score",
            lambda right: lambda p: right(p * torch.linspace(0.5, 1, len(p))[:, None]),
        ),
    }[name]
    monkeypatch.setattr(module, wrong[0], wrong[1](getattr(module, wrong[0])))
    check = module._run_check(name, getattr(module, name))
    assert not check.ok
    assert ", expected " in check.detail


def test_an_inaccurate_solver_is_detected(monkeypatch):
    right = module.solve
    monkeypatch.setattr(module, "solve", lambda field, *rest: right(lambda t, x: 1.05 * field(t, x), *rest))
    checks = [module._solver(method) for method in (*ADAPTIVE, *FIXED)]
    assert [check.ok for check in checks] == [False] * len(checks)


def _shifted(bits):
    return type(bits)(bits.single_sample + 0.01, bits.k_sample, bits.per_probe, bits.k, bits.nfe)


def test_a_check_that_raises_is_a_failure_and_not_a_crash():
    def broken():
        raise OSError("no such library")

    check = module._run_check("x", broken)
    assert (check.ok, check.detail) == (False, "OSError: no such library")
