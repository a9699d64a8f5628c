"""Properties of the paths, and their precision in float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.errors import UserError
from fm_core.method.affine import Affine, derivative
from fm_core.method.objectives import FlowMatching, NoisePrediction
from fm_core.method.paths import Cosine, OptimalTransport, VarianceExploding, VariancePreserving
from tests.support.gaussian_mixtures import PATHS

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)
quick = settings(deadline=None, max_examples=25)


@paths
def test_derivatives_are_those_of_the_functions(path):
    start, end = path.interval
    t = torch.linspace(start, end - 1e-4, 33, dtype=torch.float64)
    torch.testing.assert_close(path.d_alpha(t), derivative(path.alpha, t))
    torch.testing.assert_close(path.d_sigma(t), derivative(path.sigma, t))


@paths
def test_noise_gives_way_to_data(path):
    t = torch.linspace(*path.interval, 65, dtype=torch.float64)
    assert (path.alpha(t).diff() >= 0).all()
    assert (path.sigma(t).diff() < 0).all()
    assert float(path.alpha(t[-1])) == pytest.approx(1, abs=1e-5)
    assert float(path.sigma(t[0])) == pytest.approx(path.source_std, rel=1e-4)


@pytest.mark.parametrize("path", [VariancePreserving(), Cosine()], ids=["variance-preserving", "cosine"])
def test_variance_is_preserved(path):
    t = torch.linspace(*path.interval, 33, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


def test_diffusion_is_beta_for_vp_and_minus_the_slope_of_the_variance_for_ve():
    t = torch.linspace(0, 0.99, 20, dtype=torch.float64)
    vp, ve = VariancePreserving(), VarianceExploding()
    torch.testing.assert_close(vp.diffusion(t), 0.1 + (1 - t) * 19.9)
    torch.testing.assert_close(ve.diffusion(t), -derivative(lambda t: ve.sigma(t) ** 2, t))


@quick
@given(
    name=st.sampled_from(sorted(PATHS)),
    batch=st.integers(1, 5),
    shape=shapes,
    time_type=st.sampled_from([torch.float32, torch.float64]),
    data_type=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    end=st.sampled_from([0, 1, None]),
)
def test_samples_have_the_shape_of_the_data_and_a_type_no_coarser_than_float32(
    name, batch, shape, time_type, data_type, end
):
    path = PATHS[name]
    t = (
        torch.rand(batch, dtype=time_type) * 0.98 + 0.01
        if end is None
        else torch.full((batch,), path.interval[end])
    )
    t = t.to(time_type)
    x0, x1 = torch.randn(batch, *shape).to(data_type), torch.randn(batch, *shape).to(data_type)
    sample = path.sample(x0, x1, t)
    expected = torch.promote_types(time_type, data_type)
    for value in (sample.x_t, sample.velocity, sample.x0, sample.x1):
        assert value.shape == x1.shape
        assert value.dtype == expected
        assert torch.isfinite(value).all()
    for n in range(batch):  # broadcasting: each example has its own time
        single = path.sample(x0[n : n + 1], x1[n : n + 1], t[n : n + 1])
        torch.testing.assert_close(sample.x_t[n : n + 1], single.x_t)
        torch.testing.assert_close(sample.velocity[n : n + 1], single.velocity)


@quick
@given(name=st.sampled_from(sorted(PATHS)), u=st.floats(0, 0.999))
def test_the_target_is_the_time_derivative_of_the_sample(name, u):
    path = PATHS[name]
    start, end = path.interval
    t = torch.tensor([start + u * (end - start)], dtype=torch.float64)
    x0, x1 = torch.randn(1, 3).double(), torch.randn(1, 3).double()
    for i in range(3):
        moving = derivative(lambda t, i=i: path.sample(x0, x1, t).x_t[:, i], t)
        torch.testing.assert_close(moving, path.sample(x0, x1, t).velocity[:, i])


def test_coarse_times_and_wrong_shapes_are_refused():
    x = torch.zeros(2, 3)
    for coarse in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(TypeError, match="float32"):
            OptimalTransport().sample(x, x, torch.zeros(2, dtype=coarse))
    with pytest.raises(ValueError, match="x0 and x1"):
        OptimalTransport().sample(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="x0 and x1"):
        OptimalTransport().sample(x, torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimalTransport(sigma_min=1.0), "sigma_min"),
        (lambda: OptimalTransport(sigma_min=-0.1), "sigma_min"),
        (lambda: VariancePreserving(beta_min=0), "beta_min"),
        (lambda: VariancePreserving(beta_min=2, beta_max=1), "beta_min"),
        (lambda: VariancePreserving(epsilon=0), "epsilon"),
        (lambda: VarianceExploding(sigma_min=2, sigma_max=1), "sigma_min"),
        (lambda: Affine(lambda t: t, lambda t: 1 - t, (0.5, 0.5)), "interval"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_derivative_of_a_constant_function_is_zero():
    path = Affine(lambda t: torch.ones_like(t), lambda t: 2 - t)
    t = torch.tensor([0.3])
    assert path.d_alpha(t).tolist() == [0.0]
    with torch.inference_mode():
        assert path.d_sigma(t).tolist() == [-1.0]


def test_sigma_of_vp_keeps_its_digits_in_float32():
    exact = 1.00049e-3  # sigma at t = 1 - 1e-5
    assert float(VariancePreserving().sigma(torch.tensor(1 - 1e-5, dtype=torch.float64))) == pytest.approx(
        exact, rel=1e-5
    )
    t = torch.tensor(1 - 1e-5)
    by_float64 = float(VariancePreserving().sigma(t.double()))  # at the float32 nearest to t
    assert float(VariancePreserving().sigma(t)) == pytest.approx(by_float64, rel=1e-6)
    assert float(VariancePreserving().sigma(t)) == pytest.approx(exact, rel=1.5e-3)
    naive = math.sqrt(float(1 - torch.exp(-VariancePreserving().integrated_beta(t))))
    assert naive != pytest.approx(by_float64, rel=1e-3), "float32 would no longer need expm1"


@pytest.mark.parametrize("sigma_min", [1e-3, 1e-5, 1e-8, 0.0])
def test_the_ot_target_survives_float32_as_sigma_min_vanishes(sigma_min):
    path = OptimalTransport(sigma_min)
    x0, x1 = torch.randn(1000), torch.randn(1000)
    t = torch.cat([torch.rand(998), torch.tensor([0.0, 1.0])])
    sample = path.sample(x0, x1, t)
    exact = x1.double() - (1 - sigma_min) * x0.double()
    assert (sample.velocity - exact).abs().max() < 1e-6
    assert float(path.sigma(torch.tensor(1.0))) == pytest.approx(sigma_min)
    if sigma_min == 1e-5:  # eq. 21 on the same numbers, for comparison
        divided = (x1 - (1 - sigma_min) * sample.x_t) / (1 - (1 - sigma_min) * t)
        assert (divided - exact).abs().max() > 1e-4


def test_sigma_of_the_cosine_path_keeps_its_digits_near_the_data():
    t = torch.tensor(1 - 1e-4)
    assert float(Cosine().sigma(t)) == pytest.approx(float(Cosine().sigma(t.double())), rel=1e-6)


@pytest.mark.parametrize("cls", [FlowMatching, NoisePrediction])
def test_autocast_runs_the_network_in_bfloat16_and_everything_else_in_float32(cls):
    path, network = VariancePreserving(), torch.nn.Linear(3, 3)
    pair, seen = cls(path), {}

    def recorded(t, x, label):
        out = network(x)
        seen.update(t=t.dtype, x=x.dtype, out=out.dtype)
        return out

    x0, x1, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4) * 0.99999
    expected = path.sample(x0, x1, t)
    with torch.autocast("cpu", torch.bfloat16):
        sample = path.sample(x0, x1, t)
        loss = pair.loss(recorded, sample)
        velocity = pair.velocity(recorded)(torch.tensor(0.99999), x1)
    assert seen == {"t": torch.float32, "x": torch.float32, "out": torch.bfloat16}
    assert loss.dtype == velocity.dtype == torch.float32
    assert torch.equal(sample.x_t, expected.x_t)
    assert torch.equal(sample.velocity, expected.velocity)
    loss.sum().backward()
    assert torch.isfinite(network.weight.grad).all()
