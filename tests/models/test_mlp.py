import pytest
import torch

from fm_core.models.mlp import MLP


def test_the_paper_network_has_five_layers_of_512():
    network = MLP()
    hidden = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 512]
    assert len(hidden) == 5
    assert sum(p.numel() for p in network.parameters()) == (3 * 512 + 512) + 4 * (512 * 512 + 512) + (
        512 * 2 + 2
    )


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (1, 2)])
def test_points_keep_their_shape_and_an_untrained_network_returns_zeros(shape):
    x = torch.randn(4, *shape)
    y = MLP(width=16)(torch.rand(4), x)
    assert torch.equal(y, torch.zeros_like(x))


def test_time_point_and_label_matter():
    torch.manual_seed(0)
    network = MLP(width=16, classes=3)
    torch.nn.init.normal_(network.last.weight)
    t, x = torch.rand(4), torch.randn(4, 2)
    y = network(t, x)
    assert torch.equal(y, network(t, x, torch.full((4,), 3)))
    for other in (network(t + 0.1, x), network(t, x + 0.1), network(t, x, torch.zeros(4, dtype=torch.int64))):
        assert (other - y).abs().amin(dim=1).min() > 1e-6


def test_what_does_not_fit_is_refused():
    t = torch.rand(4)
    with pytest.raises(ValueError, match="2 dimensions, these are 3"):
        MLP()(t, torch.randn(4, 3))
    with pytest.raises(ValueError, match="without classes"):
        MLP()(t, torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one hidden layer"):
        MLP(layers=0)


def test_it_learns_the_velocity_that_carries_noise_to_a_point():
    torch.manual_seed(0)
    network = MLP(width=64, layers=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    goal = torch.tensor([2.0, -1.0])
    for _ in range(300):
        t, x0 = torch.rand(256), torch.randn(256, 2)
        x = (1 - t)[:, None] * x0 + t[:, None] * goal
        loss = (network(t, x) - (goal - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Under the straight path to one point the velocity at (t, x) is (goal - x) / (1 - t).
    t, x = torch.full((100,), 0.5), torch.randn(100, 2) / 2 + goal / 2
    assert (network(t, x) - (goal - x) / 0.5).square().mean() < 0.05
