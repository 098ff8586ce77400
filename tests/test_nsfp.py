"""The teacher against double loops, a plain reimplementation of the published loop, and flows known beforehand."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import nsfp
from nsfp import TEACHERS


def clouds(n: int = 50, m: int = 60, seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(spread * torch.randn(count, 3, generator=generator) for count in (n, m))


def chamfer_by_loops(a: np.ndarray, b: np.ndarray, truncation_sq: float) -> float:
    """Both directions, squared distances, cut ones count as 0 in a mean over all points."""
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for p in x:
            nearest_sq = min(float(((p - q) ** 2).sum()) for q in y)
            total += (nearest_sq if nearest_sq < truncation_sq else 0.0) / len(x)
    return total


# --- The loss --------------------------------------------------------------------------------------------------------


def test_truncated_chamfer_is_the_double_loop():
    a, b = clouds()
    for truncation_sq in (0.3, 2.0, 100.0):
        expected = chamfer_by_loops(a.numpy(), b.numpy(), truncation_sq)
        assert nsfp.truncated_chamfer(a, b, truncation_sq).item() == pytest.approx(expected, rel=1e-5)


def test_the_threshold_is_for_squared_distances_and_cut_points_stay_in_the_mean():
    target = nsfp.Neighbours(torch.zeros(1, 3))
    queries = torch.tensor([[1.4, 0, 0], [1.42, 0, 0], [0, 30.0, 0]])  # 1.96 m², 2.02 m², far
    distance_sq = nsfp.truncated_sq_distance(queries, target, 2.0)
    torch.testing.assert_close(distance_sq, torch.tensor([1.96, 0.0, 0.0]))
    assert distance_sq.mean().item() == pytest.approx(1.96 / 3)


def test_the_gradient_of_the_chamfer_distance_is_that_of_finite_differences():
    a, b = (points.double() for points in clouds(8, 9, spread=1.0))
    assert torch.autograd.gradcheck(nsfp.truncated_chamfer, (a.requires_grad_(), b.requires_grad_()), eps=1e-7)


def test_tree_and_brute_force_find_the_same_neighbours():
    queries, points = clouds(300, 200)
    expected = (queries[:, None] - points[None]).norm(dim=2).argmin(dim=1)
    assert torch.equal(nsfp.Neighbours(points).nearest(queries), expected)
    for chunk in (1, 1000, 2**26):
        assert torch.equal(nsfp.nearest_by_brute_force(queries, points, chunk=chunk), expected)


def test_a_query_with_no_neighbour_in_reach_gets_the_row_after_the_last():
    points, queries = torch.tensor([[0.0, 0, 0], [5, 0, 0]]), torch.tensor([[4.0, 0, 0], [2.4, 0, 0]])
    assert nsfp.Neighbours(points).nearest(queries, max_distance=1.41).tolist() == [1, 2]
    assert nsfp.nearest_by_brute_force(queries, points, max_distance=1.41).tolist() == [1, 2]


# --- The fit ---------------------------------------------------------------------------------------------------------


def published_by_the_book(pc0, pc1, iterations, patience, seed):
    """ZeroFlow's teacher again, as plainly as can be: dense distances, torch's Adam, no shared code."""
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 128), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    forward_net = nn.Sequential(*layers, nn.Linear(128, 3))
    inverse_net = copy.deepcopy(forward_net)
    optimizer = torch.optim.Adam([*forward_net.parameters(), *inverse_net.parameters()], lr=8e-3)

    def chamfer(a, b):
        squares = (a[:, None] - b[None]).square().sum(dim=2)
        there, back = squares.min(dim=1).values, squares.min(dim=0).values
        return sum(torch.where(d < 2, d, torch.zeros_like(d)).mean() for d in (there, back))

    best, waited, kept, kept_loss, ran = float("inf"), 0, None, float("inf"), 0
    for _ in range(iterations):
        flow = forward_net(pc0)
        forward_loss = chamfer(pc0 + flow, pc1)
        home = pc0 + flow - inverse_net(pc0 + flow)
        loss = forward_loss + chamfer(home, pc0)
        if forward_loss < kept_loss:
            kept, kept_loss = flow.detach(), forward_loss.item()
        waited = 0 if loss < best - 5e-5 else waited + 1
        best = min(best, loss.item()) if waited == 0 else best
        if waited == patience:
            break
        ran += 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kept, ran


def test_published_is_the_published_loop():
    """Few iterations: the fit is chaotic, and after some twenty a last digit has become a decimetre."""
    pc0, pc1 = clouds(40, 45, seed=3, spread=1.5)
    for patience, iterations in ((100, 10), (3, 200)):
        settings = dataclasses.replace(TEACHERS["published"], iterations=iterations, patience=patience, seed=3)
        expected, ran = published_by_the_book(pc0, pc1, iterations, patience, seed=3)
        assert (ran < iterations) == (patience == 3), "the second case is there to stop early"
        torch.testing.assert_close(nsfp.estimate_flow(pc0, pc1, settings), expected, atol=1e-4, rtol=0)


def test_published_settings_are_the_papers():
    settings = TEACHERS["published"]
    net = nsfp.NeuralPrior(settings.hidden_channels, settings.hidden_layers, settings.input_scale)
    shapes = [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert shapes == [(128, 3)] + [(128, 128)] * 7 + [(3, 128)]
    assert (settings.learning_rate, settings.iterations, settings.patience) == (8e-3, 5000, 100)
    assert (settings.min_improvement, settings.truncation_sq) == (5e-5, 2.0)
    assert settings.cycle and settings.input_scale == 1 and not settings.batch_points and not settings.cosine


def test_early_stopping_counts_iterations_as_published(monkeypatch):
    """The loss is 3, 2, then stays: with a patience of 4, iterations 0 to 5 are run, and no more."""
    losses, calls = iter([3.0, 2.0] + [2.0 - 4e-5] * 50), []

    def chamfer(a, b, truncation_sq):
        if len(calls) % 2 == 0:  # the forward loss; the way back adds nothing
            calls.append(next(losses))
            return calls[-1] + 0 * a.sum()
        calls.append(0.0)
        return 0 * a.sum()

    monkeypatch.setattr(nsfp, "truncated_chamfer", chamfer)
    nsfp.estimate_flow(*clouds(5, 5), dataclasses.replace(TEACHERS["published"], patience=4, iterations=50))
    assert len(calls) // 2 == 6


def test_the_fast_teachers_rate_warms_up_and_falls_as_a_cosine():
    settings = dataclasses.replace(TEACHERS["fast"], iterations=100, learning_rate=1.0)
    rates = [nsfp._learning_rate(i, settings) for i in (0, 4, 50, 99)]
    assert rates == pytest.approx([0.2, 0.9961, 0.5, 0.0002467], rel=1e-3)
    assert nsfp._learning_rate(99, TEACHERS["published"]) == 8e-3


def test_the_input_scale_is_one_of_metres():
    torch.manual_seed(0)
    prior, points = nsfp.NeuralPrior(16, 2, input_scale=0.3), clouds(20)[0]
    same = nsfp.NeuralPrior(16, 2, input_scale=1.0)
    same.load_state_dict(prior.state_dict())
    torch.testing.assert_close(prior(points), same(0.3 * points))
    assert not torch.allclose(prior(points), same(points))


QUICK = {  # either teacher, so short that a test can wait for it
    "fast": dataclasses.replace(TEACHERS["fast"], batch_points=256, iterations=300),
    "published": dataclasses.replace(TEACHERS["published"], iterations=150),
}


@pytest.mark.parametrize("teacher", QUICK)
def test_a_wall_and_a_box_that_moves_are_told_apart(teacher):
    """A wall stands, a box a few metres away goes 0.6 m: the flow says so, to a few centimetres."""
    generator = torch.Generator().manual_seed(1)
    wall = torch.rand(400, 3, generator=generator) * torch.tensor([8.0, 0.05, 2.0]) + torch.tensor([-4.0, 6.0, 0.0])
    box = (torch.rand(400, 3, generator=generator) * 2 - 1).sign() * torch.rand(400, 3, generator=generator)
    motion = torch.tensor([0.6, 0.0, 0.0])
    pc0, pc1 = torch.cat([wall, box]), torch.cat([wall, box + motion])
    flow = nsfp.estimate_flow(pc0, pc1, QUICK[teacher])
    assert (flow[400:] - motion).norm(dim=1).mean() < 0.12
    assert flow[:400].norm(dim=1).mean() < 0.06


@pytest.mark.parametrize("teacher", QUICK)
def test_the_flow_depends_on_the_seed_alone_and_leaves_the_callers_random_state_alone(teacher):
    pc0, pc1 = clouds(400, 400)
    settings = dataclasses.replace(QUICK[teacher], iterations=10)
    state = torch.random.get_rng_state()
    first = nsfp.estimate_flow(pc0, pc1, settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(nsfp.estimate_flow(pc0, pc1, settings), first)
    assert not torch.equal(nsfp.estimate_flow(pc0, pc1, dataclasses.replace(settings, seed=1)), first)


def test_points_of_sweep_1_beyond_the_truncation_change_nothing():
    pc0, pc1 = clouds(100, 100)
    settings = dataclasses.replace(QUICK["fast"], iterations=20)
    far = torch.cat([pc1, torch.full((50, 3), 300.0)])
    assert torch.equal(nsfp.estimate_flow(pc0, pc1, settings), nsfp.estimate_flow(pc0, far, settings))


def test_permuted_points_get_permuted_flow():
    pc0, pc1 = clouds(100, 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(TEACHERS["published"], iterations=5)
    flow, permuted = nsfp.estimate_flow(pc0, pc1, settings), nsfp.estimate_flow(pc0[order], pc1.flip(0), settings)
    torch.testing.assert_close(permuted, flow[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("teacher", QUICK)
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0), (1, 1), (2, 1), (1, 5)])
def test_clouds_of_no_or_few_points_get_a_flow(teacher, n, m):
    pc0, pc1 = clouds(n, m)
    flow = nsfp.estimate_flow(pc0, pc1, dataclasses.replace(QUICK[teacher], iterations=3))
    assert flow.shape == (n, 3) and flow.isfinite().all()
    assert m or not flow.any()


def test_patience_needs_all_points():
    with pytest.raises(ValueError, match="patience keeps the best flow of all points; it needs batch_points=0"):
        nsfp.estimate_flow(*clouds(), dataclasses.replace(TEACHERS["fast"], patience=5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_neighbours_and_nearly_the_same_flow():
    pc0, pc1 = clouds(500, 400)
    nearest = nsfp.Neighbours(pc1.cuda()).nearest(pc0.cuda(), max_distance=1.0)
    assert torch.equal(nearest.cpu(), nsfp.Neighbours(pc1).nearest(pc0, max_distance=1.0))
    settings = dataclasses.replace(TEACHERS["published"], iterations=5)
    on_gpu = nsfp.estimate_flow(pc0.cuda(), pc1.cuda(), settings).cpu()
    torch.testing.assert_close(on_gpu, nsfp.estimate_flow(pc0, pc1, settings), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("pc0", "message"),
    [
        (torch.zeros(4, 2), r"pc0 is torch.float32 of shape \(4, 2\); expected float32 \(N, 3\)"),
        (torch.zeros(4, 3).double(), "pc0 is torch.float64"),
        (torch.full((4, 3), torch.nan), "pc0 has coordinates that are NaN or infinite"),
    ],
)
def test_clouds_that_are_none_are_refused(pc0, message):
    with pytest.raises(ValueError, match=message):
        nsfp.estimate_flow(pc0, torch.zeros(4, 3))
