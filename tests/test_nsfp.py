"""The teacher against double loops, a plain copy of the published loop, and known flows."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import nn

import data
import nsfp
from nsfp import TEACHERS


def clouds(
    n: int = 50, m: int = 60, seed: int = 0, spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
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


# --- The loss -------------------------------------------------------------------------------------


def test_truncated_chamfer_is_the_double_loop():
    a, b = clouds()
    for truncation_sq in (0.3, 2.0, 100.0):
        expected = chamfer_by_loops(a.numpy(), b.numpy(), truncation_sq)
        assert nsfp.truncated_chamfer(a, b, truncation_sq).item() == pytest.approx(
            expected, rel=1e-5
        )


def test_the_threshold_is_for_squared_distances_and_cut_points_stay_in_the_mean():
    target = nsfp.Neighbors(torch.zeros(1, 3))
    queries = torch.tensor([[1.4, 0, 0], [1.42, 0, 0], [0, 30.0, 0]])  # 1.96 m², 2.02 m², far
    distance_sq = nsfp.truncated_sq_distance(queries, target, 2.0)
    torch.testing.assert_close(distance_sq, torch.tensor([1.96, 0.0, 0.0]))
    assert distance_sq.mean().item() == pytest.approx(1.96 / 3)


def test_the_gradient_of_the_chamfer_distance_is_that_of_finite_differences():
    a, b = (points.double() for points in clouds(8, 9, spread=1.0))
    assert torch.autograd.gradcheck(
        nsfp.truncated_chamfer, (a.requires_grad_(), b.requires_grad_()), eps=1e-7
    )


def test_tree_and_brute_force_find_the_same_neighbors():
    queries, points = clouds(300, 200)
    expected = (queries[:, None] - points[None]).norm(dim=2).argmin(dim=1)
    assert torch.equal(nsfp.Neighbors(points).nearest(queries), expected)
    for chunk in (1, 1000, 2**26):
        assert torch.equal(nsfp.nearest_by_brute_force(queries, points, chunk=chunk), expected)


def test_brute_force_tells_millimeters_apart_50_m_from_the_origin():
    points = 50 + torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 0.02
    queries = points[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    found = nsfp.nearest_by_brute_force(queries, points, max_distance=1e-4)
    assert torch.equal(points[found], queries)


def test_a_query_with_no_neighbor_in_reach_gets_the_row_after_the_last():
    points, queries = (
        torch.tensor([[0.0, 0, 0], [5, 0, 0]]),
        torch.tensor([[4.0, 0, 0], [2.4, 0, 0]]),
    )
    assert nsfp.Neighbors(points).nearest(queries, max_distance=1.41).tolist() == [1, 2]
    assert nsfp.nearest_by_brute_force(queries, points, max_distance=1.41).tolist() == [1, 2]


# --- The fit --------------------------------------------------------------------------------------


def published_by_the_book(pc0, pc1, iterations, patience, seed, rate=8e-3):
    """ZeroFlow's teacher once more: dense distances, torch's Adam, no shared code."""
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 128), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    forward_net = nn.Sequential(*layers, nn.Linear(128, 3))
    inverse_net = copy.deepcopy(forward_net)
    optimizer = torch.optim.Adam([*forward_net.parameters(), *inverse_net.parameters()], lr=rate)

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


def test_fit_published_is_the_published_loop():
    """In float64. Where a gradient is zero but for float32's rounding, Adam makes a full step: in
    float32 two correct loops are a decimeter apart after ten iterations, on some processors.
    """
    pc0, pc1 = clouds(40, 45, seed=3, spread=1.5)
    start = dataclasses.replace(TEACHERS["nsfp"], iterations=200, patience=1, seed=3)
    expected, ran = published_by_the_book(pc0, pc1, 200, patience=1, seed=3)
    assert ran == 1
    torch.testing.assert_close(nsfp.estimate_flow(pc0, pc1, start), expected, atol=1e-5, rtol=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for patience, seed, rate in (
            (100, 3, 8e-3),  # all 40 iterations
            (5, 10, 8e-3),  # stops early, and one iteration later would keep another flow
            (5, 3, 1e-6),  # goes down by less than 5e-5 an iteration, which counts as nothing
        ):
            settings = dataclasses.replace(
                start, iterations=40, patience=patience, seed=seed, learning_rate=rate
            )
            expected, ran = published_by_the_book(
                pc0.double(), pc1.double(), 40, patience, seed, rate
            )
            assert (ran < 40) == (patience == 5)
            flow = nsfp.fit_published(pc0.double(), pc1.double(), settings)
            torch.testing.assert_close(flow, expected, atol=1e-6, rtol=0)
    finally:
        torch.set_default_dtype(before)


def test_published_settings_are_the_papers():
    settings = TEACHERS["nsfp"]
    shapes = [tuple(weight.shape) for weight in nsfp.NeuralPriors(1, settings).weights]
    assert shapes == [(1, 3, 128)] + [(1, 128, 128)] * 7 + [(1, 128, 3)]
    assert (settings.learning_rate, settings.iterations, settings.patience) == (8e-3, 5000, 100)
    assert (settings.min_improvement, settings.truncation_sq) == (5e-5, 2.0)
    assert settings.cycle and settings.input_scale == 1 and not settings.cosine
    assert settings.batch_points is None
    assert settings.refine == "none"


def test_early_stopping_counts_iterations_as_published(monkeypatch):
    """The loss is 3, 2, then constant: a patience of 4 runs iterations 0 to 5, and no more."""
    losses, calls = iter([3.0, 2.0] + [2.0 - 4e-5] * 50), []

    def chamfer(a, b, truncation_sq):
        if len(calls) % 2 == 0:  # the forward loss; the way back adds nothing
            calls.append(next(losses))
            return calls[-1] + 0 * a.sum()
        calls.append(0.0)
        return 0 * a.sum()

    monkeypatch.setattr(nsfp, "truncated_chamfer", chamfer)
    settings = dataclasses.replace(TEACHERS["nsfp"], patience=4, iterations=50)
    nsfp.estimate_flow(*clouds(5, 5), settings)
    assert len(calls) // 2 == 6


def watch_chamfer(monkeypatch) -> list[torch.Tensor]:
    """Record the first cloud of every Chamfer distance: moved, home, moved, home, ..."""
    seen, chamfer = [], nsfp.truncated_chamfer

    def watched(a, b, truncation_sq):
        seen.append(a.detach().clone())
        return chamfer(a, b, truncation_sq)

    monkeypatch.setattr(nsfp, "truncated_chamfer", watched)
    return seen


@pytest.mark.parametrize("seed", [0, 1])
def test_fit_published_finds_the_translation_of_a_blob(seed):
    """The points of sweep 1 come in another order: no row of it belongs to one of sweep 0."""
    generator = torch.Generator().manual_seed(seed)
    blob = torch.rand(200, 3, generator=generator)
    translation = torch.tensor([0.5, -0.3, 0.1])
    pc1 = (blob + translation)[torch.randperm(200, generator=generator)]
    flow = nsfp.fit_published(blob, pc1, TEACHERS["nsfp"])
    error_m = (flow - translation).norm(dim=1)
    nearest_error_m = (pc1[torch.cdist(blob, pc1).argmin(dim=1)] - blob - translation).norm(dim=1)
    assert error_m.mean() < 0.06
    assert nearest_error_m.mean() > 0.3, "without the prior each point takes the nearest"


def test_the_inverse_network_starts_as_a_copy_of_the_forward_one(monkeypatch):
    """Before the first step both are the network that PyTorch makes for the seed."""
    pc0, pc1 = clouds()
    seen = watch_chamfer(monkeypatch)
    nsfp.fit_published(pc0, pc1, dataclasses.replace(TEACHERS["nsfp"], iterations=1, seed=7))
    torch.manual_seed(7)
    layers = [nn.Linear(3, 128), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(128, 3)).requires_grad_(False)
    moved = pc0 + network(pc0)
    assert torch.equal(seen[0], moved)
    assert torch.equal(seen[1], moved - network(moved))


def test_early_stopping_keeps_the_flow_of_the_least_forward_loss(monkeypatch):
    """Forward losses are 3, 1, 2, 2, ..., total losses 3, 6, 2, 2, ...: iteration 1 is kept, though
    the total loss is least in iteration 2, so that a patience of 3 stops in iteration 5.
    """
    moved, losses = [], [3.0, 0.0, 1.0, 5.0] + [2.0, 0.0] * 20

    def chamfer(a, b, truncation_sq):
        moved.append(a.detach().clone())
        return losses[len(moved) - 1] + 1e-3 * (a - a.detach()).sum()  # Adam needs some gradient

    monkeypatch.setattr(nsfp, "truncated_chamfer", chamfer)
    pc0, pc1 = clouds()
    settings = dataclasses.replace(TEACHERS["nsfp"], patience=3, iterations=20)
    kept = nsfp.fit_published(pc0, pc1, settings)
    assert len(moved) // 2 == 6
    is_kept = [torch.equal(pc0 + kept, a) for a in moved[0::2]]
    assert is_kept == [False, True, False, False, False, False]


def test_without_patience_the_flow_is_that_of_the_last_network(monkeypatch):
    """Its flow is what one iteration more would have started from."""
    pc0, pc1 = clouds()
    settings = dataclasses.replace(TEACHERS["nsfp"], iterations=3, patience=None)
    flow = nsfp.fit_published(pc0, pc1, settings)
    seen = watch_chamfer(monkeypatch)
    nsfp.fit_published(pc0, pc1, dataclasses.replace(settings, iterations=4))
    assert len(seen) == 8 and torch.equal(pc0 + flow, seen[6])


def test_the_fast_teachers_rate_warms_up_and_falls_as_a_cosine():
    settings = dataclasses.replace(TEACHERS["fast"], iterations=100, learning_rate=1.0)
    rates = [nsfp._learning_rate(i, settings) for i in (0, 4, 50, 99)]
    assert rates == pytest.approx([0.2, 0.9961, 0.5, 0.0002467], rel=1e-3)
    assert nsfp._learning_rate(99, TEACHERS["nsfp"]) == 8e-3


def test_the_input_scale_is_one_of_meters():
    small = dataclasses.replace(
        TEACHERS["fast"], hidden_channels=16, hidden_layers=2, input_scale=0.3
    )
    prior = nsfp.NeuralPriors(1, small)
    same = nsfp.NeuralPriors(1, dataclasses.replace(small, input_scale=1.0))
    points = clouds(20)[0].expand(4, -1, -1)
    torch.testing.assert_close(prior(points), same(0.3 * points))
    assert not torch.allclose(prior(points), same(points))


def plain_fits(pc0, pc1, settings):
    """The priors of `fast` one by one: nn.Sequential, dense distances, torch's Adam."""
    torch.manual_seed(settings.seed)
    widths = [3] + [settings.hidden_channels] * settings.hidden_layers + [3]
    mlps = []
    for _ in range(settings.priors):
        layers = []
        for c_in, c_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(c_in, c_out), nn.ReLU()]
        mlps.append(nn.Sequential(*layers[:-1]))
    batches = nsfp._draw_batches([pc0], [nsfp.Neighbors(pc1)], settings)
    for k, mlp in enumerate(mlps):
        optimizer = torch.optim.Adam(mlp.parameters())
        for i in range(settings.iterations):
            points = pc0[batches[i, k]]
            moved = points + mlp(settings.input_scale * points)
            distance_sq = (moved[:, None] - pc1[None]).square().sum(dim=2).min(dim=1).values
            optimizer.zero_grad()
            torch.where(distance_sq < settings.truncation_sq, distance_sq, 0.0).mean().backward()
            optimizer.param_groups[0]["lr"] = nsfp._learning_rate(i, settings)
            optimizer.step()
    return torch.stack([mlp(settings.input_scale * pc0) for mlp in mlps]).detach()


def test_priors_side_by_side_are_priors_one_by_one():
    """Also for two pairs at once, of different sizes. Few iterations: the fit is chaotic."""
    settings = dataclasses.replace(
        TEACHERS["fast"], priors=3, batch_points=32, iterations=4, seed=4
    )
    (a0, a1), (b0, b1) = clouds(60, 70, seed=1), clouds(90, 50, seed=2)
    fitted = nsfp.fit_fast([a0, b0], [a1, b1], settings)
    for flows, pc0, pc1 in zip(fitted, (a0, b0), (a1, b1), strict=True):
        expected = plain_fits(pc0, pc1, settings)
        torch.testing.assert_close(flows, expected, atol=1e-4, rtol=0)
        assert (expected[0] - expected[1]).norm(dim=1).mean() > 0.01, "the priors are to differ"
    together = nsfp.estimate_flows([a0, b0], [a1, b1], settings)
    for flow, pair in zip(together, ((a0, a1), (b0, b1)), strict=True):
        expected = nsfp.estimate_flow(*pair, settings)
        torch.testing.assert_close(flow.flow, expected, atol=1e-4, rtol=0)


def test_without_batches_every_step_of_the_fast_fit_sees_all_points():
    """In float64, as chaos needs it. Several pairs take turns, and `fit_fast` takes only one."""
    settings = dataclasses.replace(
        TEACHERS["nsfp"], cycle=False, patience=None, iterations=4, seed=4
    )
    pairs = [clouds(60, 70, seed=1), clouds(90, 50, seed=2)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for pc0, pc1 in pairs:
            (flows,) = nsfp.fit_fast([pc0.double()], [pc1.double()], settings)
            expected = full_batch_fit(pc0.double(), pc1.double(), settings)
            torch.testing.assert_close(flows, expected[None], atol=1e-6, rtol=0)
    finally:
        torch.set_default_dtype(before)
    together = nsfp.estimate_flows(*zip(*pairs, strict=True), settings)
    for flow, (pc0, pc1) in zip(together, pairs, strict=True):
        assert torch.equal(flow.flow[None], nsfp.fit_fast([pc0], [pc1], settings)[0])
    with pytest.raises(ValueError, match="several pairs at once need batch_points"):
        nsfp.fit_fast(*zip(*pairs, strict=True), settings)


def full_batch_fit(pc0, pc1, settings):
    """The same without a line of nsfp.py: one nn.Sequential, all points, a constant rate."""
    torch.manual_seed(settings.seed)
    layers = [nn.Linear(3, 128), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(128, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    for _ in range(settings.iterations):
        offsets = (pc0 + network(pc0))[:, None] - pc1[None]  # (N, M, 3)
        distance_sq = offsets.square().sum(dim=2).min(dim=1).values
        optimizer.zero_grad()
        torch.where(distance_sq < settings.truncation_sq, distance_sq, 0.0).mean().backward()
        optimizer.step()
    return network(pc0).detach()


def test_the_fit_by_brute_force_as_on_a_gpu_is_the_fit_by_tree(monkeypatch):
    settings = dataclasses.replace(TEACHERS["fast"], priors=2, batch_points=32, iterations=4)
    pairs = [clouds(60, 70, seed=1), clouds(90, 50, seed=2)]
    by_tree = nsfp.fit_fast(*zip(*pairs, strict=True), settings)
    monkeypatch.setattr(nsfp, "cKDTree", lambda points: None)
    by_brute_force = nsfp.fit_fast(*zip(*pairs, strict=True), settings)
    for flows, expected in zip(by_brute_force, by_tree, strict=True):
        torch.testing.assert_close(flows, expected, atol=1e-4, rtol=0)


def test_one_prior_that_diverged_spoils_the_flow_visibly(monkeypatch):
    fitted = torch.zeros(4, 50, 3)
    fitted[2] = torch.nan
    monkeypatch.setattr(nsfp, "fit_fast", lambda *arguments: [fitted])
    assert nsfp.estimate_flow(*clouds(50, 60)).isnan().all()


def test_points_are_drawn_by_their_distance_to_sweep_1_within_bounds():
    """Distances of 0, 0.1, 0.2, 1.2 and out of reach: drawn as .05 : .1 : .2 : .3 : .05."""
    pc1 = torch.tensor([[0.0, 0, 0]])
    pc0 = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0, 0.2, 0], [0, 0, 1.2], [0, 0, 9]])
    settings = dataclasses.replace(TEACHERS["fast"], iterations=100, batch_points=256, priors=4)
    rows = nsfp._draw_batches([pc0, pc0], [nsfp.Neighbors(pc1)] * 2, settings)
    assert rows.shape == (100, 8, 256)
    # The second pair's rows come after the first's.
    for first, drawn in ((0, rows[:, :4]), (5, rows[:, 4:])):
        share = (drawn - first).flatten().bincount() / drawn.numel()
        expected = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.05]) / 0.7
        torch.testing.assert_close(share, expected, atol=0.01, rtol=0)


QUICK = {  # either teacher, so short that a test can wait for it
    "fast": dataclasses.replace(TEACHERS["fast"], batch_points=256, iterations=300),
    "nsfp": dataclasses.replace(TEACHERS["nsfp"], iterations=150),
}


@pytest.mark.parametrize("teacher", QUICK)
def test_a_wall_and_a_box_that_moves_are_told_apart(teacher):
    """A static wall, and a box a few meters away that moves by 0.6 m: right to centimeters."""
    generator = torch.Generator().manual_seed(1)
    wall = torch.rand(400, 3, generator=generator) * torch.tensor([8.0, 0.05, 2.0])
    wall = wall + torch.tensor([-4.0, 6.0, 0.0])
    sign = (torch.rand(400, 3, generator=generator) * 2 - 1).sign()
    box = sign * torch.rand(400, 3, generator=generator)
    motion = torch.tensor([0.6, 0.0, 0.0])
    pc0, pc1 = torch.cat([wall, box]), torch.cat([wall, box + motion])
    flow = nsfp.estimate_flow(pc0, pc1, QUICK[teacher])
    assert (flow[400:] - motion).norm(dim=1).mean() < 0.12
    assert flow[:400].norm(dim=1).mean() < 0.06


@pytest.mark.parametrize("teacher", QUICK)
def test_the_flow_depends_on_the_seed_alone_and_leaves_the_callers_random_state_alone(teacher):
    pc0, pc1 = clouds(400, 400)
    # Refined, both seeds may well end with the same motion.
    settings = dataclasses.replace(QUICK[teacher], iterations=10, priors=1, refine="none")
    state = torch.random.get_rng_state()
    first = nsfp.estimate_flow(pc0, pc1, settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(nsfp.estimate_flow(pc0, pc1, settings), first)
    other = nsfp.estimate_flow(pc0, pc1, dataclasses.replace(settings, seed=1))
    assert not torch.equal(other, first)


def test_points_of_sweep_1_beyond_the_truncation_change_nothing():
    pc0, pc1 = clouds(100, 100)
    settings = dataclasses.replace(QUICK["fast"], iterations=20)
    far = torch.cat([pc1, torch.full((50, 3), 300.0)])
    expected = nsfp.estimate_flow(pc0, pc1, settings)
    assert torch.equal(nsfp.estimate_flow(pc0, far, settings), expected)


def test_permuted_points_get_permuted_flow():
    pc0, pc1 = clouds(100, 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(TEACHERS["nsfp"], iterations=5)
    flow = nsfp.estimate_flow(pc0, pc1, settings)
    permuted = nsfp.estimate_flow(pc0[order], pc1.flip(0), settings)
    torch.testing.assert_close(permuted, flow[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("teacher", QUICK)
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0), (1, 1), (2, 1), (1, 5)])
def test_clouds_of_no_or_few_points_get_a_flow(teacher, n, m):
    pc0, pc1 = clouds(n, m)
    flow = nsfp.estimate_flow(pc0, pc1, dataclasses.replace(QUICK[teacher], iterations=3))
    assert flow.shape == (n, 3) and flow.isfinite().all()
    assert m or not flow.any()


@pytest.mark.parametrize(
    ("teacher", "change", "message"),
    [
        ("fast", {"patience": 5}, "patience needs cycle: only the published fit stops early"),
        ("fast", {"cycle": True}, r"cycle, the published fit, needs batch_points None \(all\)"),
        ("fast", {"refine": "none"}, "several priors need refine sweep: sweep 1 chooses"),
        ("nsfp", {"priors": 2, "refine": "sweep"}, "cycle, .* needs .* priors 1"),
        ("nsfp", {"batch_points": 256}, "cycle, .* needs batch_points None"),
        ("nsfp", {"input_scale": 0.3}, "cycle, .* needs .* input_scale 1"),
        ("nsfp", {"cosine": True}, "cycle, .* needs .* cosine False"),
        ("nsfp", {"cycle": False}, "patience needs cycle"),
        ("fast", {"iterations": 0}, "iterations is 0; it must be positive"),
        ("fast", {"priors": 0}, "priors is 0; it must be positive"),
        ("fast", {"hidden_layers": 0}, "hidden_layers is 0; it must be positive"),
        ("fast", {"ransac_trials": 0}, "ransac_trials is 0; it must be positive"),
        ("fast", {"batch_points": -1}, "batch_points is -1; it must be positive"),
        ("fast", {"batch_points": 0}, "batch_points is 0; it must be positive"),
        ("nsfp", {"patience": 0}, "patience is 0; it must be positive"),
        ("fast", {"cluster_sample": 0}, "cluster_sample is 0; it must be positive"),
        (
            "fast",
            {"draw_min": 0.0},
            "draw_min 0.0 and draw_max 0.3: needs 0 < draw_min <= draw_max",
        ),
        ("fast", {"refine": "well"}, "refine 'well': choose none, flow or sweep"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(teacher, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TEACHERS[teacher], **change)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_fit_that_diverges_gives_a_flow_that_is_not_finite(teacher):
    wild = dataclasses.replace(TEACHERS[teacher], learning_rate=1e30, iterations=10, patience=None)
    assert not nsfp.estimate_flow(*clouds(), wild).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_neighbors_and_nearly_the_same_flow():
    pc0, pc1 = clouds(500, 400)
    nearest = nsfp.Neighbors(pc1.cuda()).nearest(pc0.cuda(), max_distance=1.0)
    assert torch.equal(nearest.cpu(), nsfp.Neighbors(pc1).nearest(pc0, max_distance=1.0))
    settings = dataclasses.replace(TEACHERS["nsfp"], iterations=5)
    on_gpu = nsfp.estimate_flow(pc0.cuda(), pc1.cuda(), settings).cpu()
    torch.testing.assert_close(on_gpu, nsfp.estimate_flow(pc0, pc1, settings), atol=1e-3, rtol=0)
    fast = dataclasses.replace(QUICK["fast"], iterations=5)
    # A GPU draws other batches than the CPU for a seed, so the flows differ.
    for flows in nsfp.fit_fast([pc0.cuda()] * 3, [pc1.cuda()] * 3, fast):
        assert flows.shape == (4, 500, 3) and flows.isfinite().all() and flows.is_cuda
    assert nsfp.estimate_flow(pc0.cuda(), pc1.cuda(), fast).is_cuda


@pytest.mark.parametrize(
    ("pc0", "message"),
    [
        (torch.zeros(4, 2), r"pc0 is torch.float32 of shape \(4, 2\); expected float32 \(N, 3\)"),
        (torch.zeros(4, 3).double(), "pc0 is torch.float64"),
        (torch.full((4, 3), torch.nan), "pc0 has coordinates that are NaN or infinite"),
    ],
)
def test_clouds_of_another_shape_or_dtype_or_with_nan_are_refused(pc0, message):
    with pytest.raises(ValueError, match=message):
        nsfp.estimate_flow(pc0, torch.zeros(4, 3))


# --- The refinement -------------------------------------------------------------------------------


def a_turn(degrees: float, about: torch.Tensor, shift: tuple[float, float, float]) -> torch.Tensor:
    """(3, 4) motion: a turn to the left about a place, then a shift."""
    rotation = torch.from_numpy(Rotation.from_euler("z", degrees, degrees=True).as_matrix())
    return torch.cat(
        [rotation, (about - rotation @ about + torch.tensor(shift).double())[:, None]], dim=1
    )


def a_box(center: tuple[float, float, float], n: int = 400, seed: int = 0) -> torch.Tensor:
    """Points on the sides of a small car, dense enough to be a cluster."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 3, generator=generator) * 2 - 1
    side = torch.arange(n) % 3
    points[torch.arange(n), side] = points[torch.arange(n), side].sign()
    return points * torch.tensor([1.0, 0.6, 0.5]) + torch.tensor(center)


def test_clusters_are_those_of_dbscan_by_loops():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat(
        [
            torch.rand(150, 3, generator=generator) * 2.5,
            torch.rand(60, 3, generator=generator) * 0.5 + 4,
        ]
    )
    reach, min_points = 0.35, 5
    near = torch.cdist(points.double(), points.double()) < reach
    is_core = near.sum(dim=1) >= min_points
    expected, number = torch.full((210,), -1), 0
    for start in range(210):  # flood from each core that has no number yet
        if is_core[start] and expected[start] < 0:
            stack = [start]
            while stack:
                i = stack.pop()
                if expected[i] < 0:
                    expected[i] = number
                    stack += [
                        j for j in range(210) if near[i, j] and is_core[j] and expected[j] < 0
                    ]
            number += 1
    found = nsfp.find_clusters(points.double(), reach, min_points)
    assert number > 2 and is_core.any() and (~is_core).any()
    pairs = set(zip(expected[is_core].tolist(), found[is_core].tolist(), strict=True))
    assert len(pairs) == number == int(found.max()) + 1  # the same parts, by whatever number
    for i in (~is_core).nonzero()[:, 0]:
        cores = near[i] & is_core
        assert (found[i] == -1) == (not cores.any())
        assert found[i] == -1 or found[i] in found[cores]


def clusters_from_all_links(points: torch.Tensor, reach: float, min_points: int) -> torch.Tensor:
    """DBSCAN from the list of all pairs of neighbors: simple, but its memory is quadratic."""
    points = points.numpy()
    distance, _ = cKDTree(points).query(points, [min_points], distance_upper_bound=reach)
    is_core = np.isfinite(distance[:, 0])
    cluster = np.full(len(points), -1)
    if is_core.any():
        tree = cKDTree(points[is_core])
        a, b = tree.query_pairs(reach, output_type="ndarray").T
        links = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(tree.n, tree.n))
        _, core_cluster = connected_components(links, connection="weak")
        cluster[is_core] = core_cluster
        _, nearest_core = tree.query(points[~is_core], distance_upper_bound=reach)
        cluster[~is_core] = np.append(core_cluster, -1)[nearest_core]
    return torch.from_numpy(cluster)


def a_clustered_cloud(rng: np.random.Generator) -> torch.Tensor:
    """Blobs of any density, coincident points, lines, and points on a grid, in random order."""
    parts = []
    for _ in range(rng.integers(1, 6)):
        n, center = int(rng.integers(1, 800)), rng.uniform(-2, 2, 3)
        kinds = [
            rng.normal(0, 10 ** rng.uniform(-4, 0.3), (n, 3)),
            np.zeros((n, 3)),
            np.outer(rng.uniform(-3, 3, n), rng.normal(size=3)),
            np.round(rng.uniform(-2, 2, (n, 3)), 1),  # many distances are equal
        ]
        parts.append(center + kinds[rng.integers(4)])
    cloud = np.concatenate(parts).astype(np.float16 if rng.random() < 0.5 else float).astype(float)
    return torch.from_numpy(cloud[rng.permutation(len(cloud))])


def test_clusters_are_those_of_all_links_in_clouds_of_any_density():
    rng = np.random.default_rng(0)
    for _ in range(150):
        points = a_clustered_cloud(rng)
        reach, min_points = float(rng.choice([0.1, 0.2, 0.4, 0.8])), int(rng.integers(1, 20))
        expected = clusters_from_all_links(points, reach, min_points)
        assert torch.equal(nsfp.find_clusters(points, reach, min_points), expected)


def test_two_crowds_touch_only_by_points_that_come_late_in_their_cells():
    """200 points at each end of a gap, and one of each beside it, just in reach or just not."""
    left, right = torch.zeros(200, 3).double(), torch.zeros(200, 3).double()
    for gap, clusters in ((0.399, 1), (0.401, 2)):
        right[:, 0] = 0.2 + gap
        left[-1, 0] = 0.2
        points = torch.cat([left, right])
        found = nsfp.find_clusters(points, 0.4, 10)
        assert torch.equal(found, clusters_from_all_links(points, 0.4, 10))
        assert int(found.max()) + 1 == clusters and int(found.min()) == 0


def test_clusters_of_the_real_sweep_are_those_of_all_links(av2_pair):
    points = av2_pair.pc0[data.input_masks(av2_pair)[0]].double()
    for reach, min_points in ((0.4, 10), (0.8, 5)):  # the fast teacher's, and the street's
        expected = clusters_from_all_links(points, reach, min_points)
        assert torch.equal(nsfp.find_clusters(points, reach, min_points), expected)


MEMORY = """
import dataclasses, sys, torch, nsfp
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
corner = (torch.rand(60, 3, generator=generator) - 0.5) * torch.tensor([90.0, 90.0, 5.0])
side = torch.rand(60_000, 3, generator=generator) * torch.tensor([8.0, 0.0, 2.0])
walls = corner.repeat(1000, 1) + side
place, width = torch.tensor([[5.0, 3.0, 0.5]]), float(sys.argv[1])
crowd = place + width * torch.randn(40_000, 3, generator=generator)
quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2)
assert nsfp.estimate_flow(torch.cat([walls, crowd]), walls, quick).isfinite().all()
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # the most memory used, in kB
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to count memory")
@pytest.mark.parametrize("width", [0.0, 0.002])
def test_forty_thousand_points_at_one_place_need_at_most_one_and_a_half_gigabytes(width):
    """In a cloud of 100,000, all at the same place or within millimeters.

    Sweep 1 has no crowd: searching among points at one place needs no memory, but it takes long.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(nsfp.__file__).parent)}
    command = [sys.executable, "-c", MEMORY, str(width)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or "it was killed"
    assert int(run.stdout) < 1.5e6


def test_rigid_motions_are_scipys_and_never_a_mirror():
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(4).repeat_interleave(30)
    points = torch.randn(120, 3, generator=generator, dtype=torch.float64) + 20
    points[30:60, 2] = 1.0  # flat: the third axis is free, and a mirror would fit as well
    moved = torch.randn(
        120, 3, generator=generator, dtype=torch.float64
    )  # far from rigid: some best fits mirror
    moved[30:60] = points[30:60] @ torch.diag(torch.tensor([1.0, -1.0, 1.0]).double())
    weight = torch.rand(120, generator=generator, dtype=torch.float64)
    motion = nsfp.rigid_motions(points, moved, cluster, weight)
    for c in range(4):
        p, q, w = (x[cluster == c].numpy() for x in (points, moved, weight))
        center, moved_center = np.average(p, 0, w), np.average(q, 0, w)
        rotation, _ = Rotation.align_vectors(q - moved_center, p - center, w)
        assert torch.linalg.det(motion[c, :, :3]).item() == pytest.approx(1)
        there = (p - center) @ rotation.as_matrix().T + moved_center
        mine = nsfp.move(points[cluster == c], motion, cluster[cluster == c]).numpy()
        assert (w * ((mine - q) ** 2).sum(1)).sum() == pytest.approx(
            (w * ((there - q) ** 2).sum(1)).sum(), rel=1e-9
        )


def test_a_cluster_moves_rigidly_through_the_outliers_of_its_flow():
    """Two boxes turn, far from the origin. 60 % of the flow of one is wrong at random."""
    generator = torch.Generator().manual_seed(0)
    boxes = [a_box((40.0, 10, 0)).double(), a_box((-30.0, -5, 0), seed=1).double()]
    motions = [a_turn(3, boxes[0].mean(0), (0.8, 0, 0)), a_turn(-4, boxes[1].mean(0), (0, 0.5, 0))]
    noise = torch.tensor([[0.0, 30, 0]])
    pc0 = torch.cat([*boxes, noise]).float()
    flows = [b @ m[:, :3].T + m[:, 3] - b for b, m in zip(boxes, motions, strict=True)]
    truth = torch.cat(flows).float()
    flow = torch.cat([truth, torch.tensor([[0.01, 0, 0]])])
    is_wrong = torch.rand(400, generator=generator) < 0.6
    flow[:400][is_wrong] += 0.5 + torch.rand(int(is_wrong.sum()), 3, generator=generator)
    for sample in (None, 100):
        settings = dataclasses.replace(TEACHERS["chodosh"], cluster_sample=sample)
        refined = nsfp.refine_flow(pc0, flow, settings=settings).flow
        assert (refined[:-1] - truth).norm(dim=1).max() < 0.001
        assert torch.equal(refined[-1], flow[-1])  # in no cluster: as it was
    assert refined.dtype == torch.float32 and refined.shape == pc0.shape


def test_the_last_fit_averages_the_noise_of_the_flow():
    """The flow of a box of two meters has 3 cm of noise: too much for 3 points, not for 400."""
    box = a_box((20.0, 0, 0))
    noise = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    flow = torch.tensor([0.5, 0, 0]) + 0.03 * noise
    refined = nsfp.refine_flow(box, flow, settings=TEACHERS["chodosh"]).flow
    assert (refined - torch.tensor([0.5, 0, 0])).norm(dim=1).max() < 0.01


def test_a_small_motion_becomes_none_wherever_it_is():
    """0.2 degrees about its center move a box of 50 m away by millimeters, but the translation of
    that motion about the origin is 17 cm.
    """
    box = a_box((50.0, 0, 0)).double()
    center = box.mean(0)
    for shift, is_static in ((0.045, True), (0.055, False)):
        motion = a_turn(0.2, center, (shift, 0.0, 0.0))
        assert motion[:, 3].norm() > 0.1
        flow = (box @ motion[:, :3].T + motion[:, 3] - box).float()
        refined = nsfp.refine_flow(box.float(), flow, settings=TEACHERS["chodosh"]).flow
        assert (not refined.any()) == is_static
        expected = torch.zeros_like(flow) if is_static else flow
        torch.testing.assert_close(refined, expected, atol=1e-5, rtol=0)


def test_sweep_1_chooses_the_candidate_and_icp_completes_it():
    """One candidate is nearly right for the first box, one for the second; one is nonsense."""
    boxes = [a_box((10.0, 0, 0)), a_box((0.0, 15, 0), seed=1)]
    pc0, truth = torch.cat(boxes), torch.zeros(800, 3)
    truth[:400, 0], truth[400:, 1] = 0.9, -0.7
    pc1 = pc0 + truth
    nonsense = torch.randn(800, 3, generator=torch.Generator().manual_seed(0))
    first, second = nonsense.clone(), nonsense.clone()
    first[:400] = truth[:400] + torch.tensor([0.1, 0.05, 0.0])
    second[400:] = truth[400:] + torch.tensor([0.0, -0.1, 0.03])
    refined = nsfp.refine_flow(pc0, torch.stack([nonsense, first, second]), pc1).flow
    assert (refined - truth).norm(dim=1).max() < 0.02
    assert (nsfp.refine_flow(pc0, nonsense, pc1).flow - truth).norm(dim=1).mean() > 0.3


def test_a_motion_that_sweep_1_does_not_confirm_becomes_none():
    """A static box, a static lone point, and a static wall of which sweep 1 sees other points; the
    flow of all is wrong by 0.3 m in each coordinate.
    """
    generator = torch.Generator().manual_seed(0)
    wall = torch.rand(2, 300, 3, generator=generator) * torch.tensor([6.0, 0.02, 2])
    wall = wall + torch.tensor([0, 8.0, 0])
    still = torch.cat([a_box((10.0, 0, 0)), torch.tensor([[0.0, -20, 0]])])
    flow = torch.full((701, 3), 0.3)
    pc0, pc1 = torch.cat([still, wall[0]]), torch.cat([still, wall[1]])
    assert not nsfp.refine_flow(pc0, flow, pc1).flow.any()


def test_a_motion_must_explain_sweep_1_by_evidence_times_less_squared_distance():
    """Sweep 1 has half of the box's points, moved by 0.2 m. No motion leaves a larger distance, by
    a factor that is measured here.
    """
    box, truth = a_box((10.0, 0, 0)), torch.tensor([0.2, 0, 0])
    sweep1 = box[::2] + truth
    surface = nsfp.Surface(sweep1.double())
    left = []
    for flow in (torch.zeros(3), truth):
        distance_sq = surface.sq_distance((box + flow).double(), 0.3)
        left.append((distance_sq + nsfp.RANGE_NOISE_M**2).mean())
    ratio = (left[0] / left[1]).item()
    assert 1.5 < ratio < 20
    no_icp = {"icp_steps": 0, "final_icp_steps": 0}
    for evidence, moves in ((0.9 * ratio, True), (1.1 * ratio, False)):
        settings = dataclasses.replace(TEACHERS["fast"], evidence=evidence, **no_icp)
        refined = nsfp.refine_flow(box, truth.expand(400, 3), sweep1, settings)
        assert bool(refined.flow.any()) == moves
        # The gain is that factor, whichever was chosen.
        assert refined.gain.tolist() == pytest.approx([ratio] * 400, rel=1e-4)


def test_only_points_whose_motion_was_compared_with_no_motion_have_a_gain():
    """A box, a lone point, and both without a sweep 1. No motion explains a static box best: its
    gain is below that of one that moves.
    """
    pc0 = torch.cat([a_box((10.0, 0, 0)), torch.tensor([[0.0, -20, 0]])])
    flow = torch.tensor([0.3, 0.3, 0.0]).expand(401, 3)
    still, moving = (nsfp.refine_flow(pc0, flow, pc1) for pc1 in (pc0, pc0 + flow))
    assert (still.gain[:400] <= 1.5).all() and (moving.gain[:400] > 10).all()
    assert still.gain[400].isnan() and moving.gain[400].isnan()
    for pc1, teacher in ((None, "chodosh"), (pc0[:0], "fast")):
        assert nsfp.refine_flow(pc0, flow, pc1, TEACHERS[teacher]).gain.isnan().all()


def scan_lines(y_from: float, y_to: float, height_m: float, spacing: float = 0.3) -> torch.Tensor:
    """A wall at x = 10, seen by beams `spacing` meters apart: a point every 5 cm along each."""
    y = torch.arange(y_from, y_to, 0.05)
    z = torch.arange(height_m, 2, spacing)
    y, z = torch.meshgrid(y, z, indexing="ij")
    return torch.stack([torch.full_like(y, 10.0), y, z], dim=2).flatten(0, 1)


def test_a_shifted_pattern_of_scan_lines_is_no_motion():
    """Sweep 1 sees a wall 10 cm farther along. To move there explains nothing across the wall."""
    pc0, pc1 = scan_lines(-1, 1, -1.0), scan_lines(-1, 1, -0.9)
    flow = torch.tensor([0.0, 0.0, 0.1]).expand_as(pc0)
    for order in ([0, 1, 2], [0, 2, 1]):  # shifted up; and upright lines that are shifted aside
        assert not nsfp.refine_flow(pc0[:, order], flow[:, order], pc1[:, order]).flow.any()
    # The wall itself comes nearer: that is one.
    flow = torch.tensor([-0.2, 0, 0]).expand_as(pc0)
    refined = nsfp.refine_flow(pc0, flow, pc1 - torch.tensor([0.2, 0, 0])).flow
    torch.testing.assert_close(refined[:, 0], flow[:, 0], atol=0.01, rtol=0)


def test_a_wall_behind_a_parked_car_does_not_slide():
    """From where sweep 1 was taken, the car hides another part of the wall than before."""
    car = torch.stack(
        torch.meshgrid(torch.tensor([5.0]), torch.arange(-1, 1, 0.05), torch.arange(0, 2, 0.1),
                       indexing="ij"), dim=3
    ).flatten(0, 2)  # fmt: skip
    lidar1 = torch.tensor([0.0, 1.0, 0.5])
    pc0, pc1 = scan_lines(-3.0, -2.0, 0.0, 0.1), scan_lines(-4.0, -3.0, 0.05, 0.1)
    pc1 = pc1 + torch.tensor([0.0, 0.5, 0.0])  # from -3.5 to -2.5: half of it is new
    sweep0, sweep1 = torch.cat([pc0, car]), torch.cat([pc1, car])
    flow = torch.zeros(len(sweep0), 3)
    flow[: len(pc0), 1] = -0.5
    assert nsfp.refine_flow(sweep0, flow, sweep1).flow.any()
    assert not nsfp.refine_flow(sweep0, flow, sweep1, lidar1=lidar1).flow.any()


def test_what_comes_nearer_hides_its_own_old_place_and_yet_moves():
    box = a_box((10.0, 0, 0))
    flow = torch.tensor([-2.0, 0, 0]).expand_as(box)
    refined = nsfp.refine_flow(box, flow, box + flow, lidar1=torch.zeros(3)).flow
    torch.testing.assert_close(refined, flow, atol=0.01, rtol=0)


def test_distances_to_a_surface_by_hand():
    """To a level plane of points 0.1 m apart. Along it they count from the third neighbor on."""
    steps = torch.arange(-1, 1, 0.1, dtype=torch.float64)
    x, y = torch.meshgrid(steps, steps, indexing="ij")
    surface = nsfp.Surface(torch.stack([x, y, 0 * x], dim=2).flatten(0, 1))
    for query, expected in (
        ((0.02, 0.01, 0.0), 0.0),  # within the pattern
        ((0.04, 0.0, 0.2), 0.2),  # above it
        ((-1.3, 0.0, 0.0), 0.2),  # beyond its edge, whose points have neighbors 0.1 m away
        ((0.0, 0.0, 0.9), 0.5),  # out of reach
        ((0.0, 0.0, 7.0), 0.5),
    ):
        distance_sq = surface.sq_distance(torch.tensor([query]).double(), 0.5)
        torch.testing.assert_close(distance_sq, torch.tensor([expected**2]).double())
    nsfp.Surface(torch.zeros(1, 3).double()).sq_distance(torch.zeros(2, 3).double(), 0.5)


def test_points_in_no_cluster_move_like_the_nearest_cluster_if_sweep_1_is_closer_then():
    box, shift = a_box((10.0, 0, 0)), torch.tensor([0.6, 0, 0])
    moves_along, stands = torch.tensor([[10.0, 0, 1.9]]), torch.tensor([[10.0, 1.6, 0]])
    far = torch.tensor([[10.0, 0, 4.0]])  # beyond join_reach
    pc0 = torch.cat([box, moves_along, stands, far])
    pc1 = torch.cat([box + shift, moves_along + shift, stands, far + shift])
    refined = nsfp.refine_flow(pc0, shift.expand_as(pc0), pc1).flow
    expected = torch.stack([shift, torch.zeros(3), torch.zeros(3)])
    torch.testing.assert_close(refined[-3:], expected, atol=0.01, rtol=0)


def test_heights_count_less_when_clusters_are_found():
    """A box, and 0.8 m above its roof a scan line of which the flow is wrong."""
    box, line = a_box((10.0, 0, 0)), torch.zeros(20, 3)
    line[:, 0], line[:, 1], line[:, 2] = 10.0, 0.05 * torch.arange(20) - 0.5, 1.3
    flow = torch.zeros(420, 3)
    flow[:400, 0] = 0.5
    for height_scale, is_one in ((0.4, True), (1.0, False)):
        settings = dataclasses.replace(TEACHERS["chodosh"], height_scale=height_scale)
        refined = nsfp.refine_flow(torch.cat([box, line]), flow, settings=settings).flow
        torch.testing.assert_close(refined[:400], flow[:400], atol=0.01, rtol=0)
        assert bool(refined[400:].any()) == is_one


def test_upright_motions_turn_about_the_vertical_and_keep_heights():
    box = a_box((10.0, 3, 0)).double()
    truth = a_turn(20, box.mean(0), (0.7, -0.2, 0.0))
    cluster = torch.zeros(400, dtype=torch.int64)
    moved = nsfp.move(box, truth[None], cluster)
    found = nsfp.upright_motions(box, moved, cluster)
    torch.testing.assert_close(found[0], truth, atol=1e-9, rtol=0)
    # Whatever heights do, they change nothing; and a weight of 0 takes a point out.
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    moved[:, 2] += noise
    moved[0] += 100
    weight = torch.ones(400).double()
    weight[0] = 0
    again = nsfp.upright_motions(box, moved, cluster, weight)
    expected = nsfp.upright_motions(box, nsfp.move(box, truth[None], cluster), cluster, weight)
    torch.testing.assert_close(again, expected, atol=1e-9, rtol=0)


def test_a_small_motion_that_sweep_1_confirms_becomes_none_too():
    box = a_box((10.0, 0, 0))
    for shift, moves in ((0.04, False), (0.06, True)):
        flow = torch.tensor([shift, 0, 0]).expand(400, 3)
        assert bool(nsfp.refine_flow(box, flow, box + flow).flow.any()) == moves


def test_ransac_tries_until_half_agree_and_no_longer(monkeypatch):
    box, fits = a_box((10.0, 0, 0)).double(), []
    rigid_motions = nsfp.rigid_motions

    def counted(*arguments):
        fits.append(1)
        return rigid_motions(*arguments)

    monkeypatch.setattr(nsfp, "rigid_motions", counted)
    cluster, settings = torch.zeros(400, dtype=torch.int64), TEACHERS["chodosh"]
    nsfp.motions_by_ransac(box, box + 1, cluster, settings)
    assert len(fits) == 2  # one trial, and the last fit
    fits.clear()
    nsfp.motions_by_ransac(box, 9 * torch.randn(400, 3, dtype=torch.float64), cluster, settings)
    assert len(fits) == 251


def test_ransac_keeps_clusters_apart_when_some_are_finished_before_others():
    """Clusters 0 and 2 agree at once. Of 1 and 3 only 40 % do, so they are tried to the end."""
    generator = torch.Generator().manual_seed(0)
    box = a_box((10.0, 0, 0)).double()
    cluster = torch.arange(4).repeat_interleave(400)[torch.randperm(1600, generator=generator)]
    points = box[torch.arange(1600) % 400]
    motions = torch.stack([a_turn(5 * i, box.mean(0), (0.4 * i, 0, 0)) for i in range(4)])
    rotation, translation = motions[cluster].split([3, 1], dim=2)  # of every point
    moved = (rotation @ points[:, :, None] + translation)[:, :, 0]
    is_wrong = (cluster % 2 == 1) & (torch.rand(1600, generator=generator) < 0.6)
    moved[is_wrong] += 1 + torch.rand(int(is_wrong.sum()), 3, generator=generator)
    found = nsfp.motions_by_ransac(points, moved, cluster, TEACHERS["chodosh"])
    torch.testing.assert_close(found, motions, atol=1e-6, rtol=0)


@pytest.mark.parametrize("teacher", ["fast", "chodosh"])
def test_ransac_of_several_candidates_at_once_is_that_of_each_alone(teacher):
    """But for float64's rounding. The candidates are right for other shares of the points, so that
    their clusters are finished after other numbers of trials.
    """
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([a_box((10.0 * i, 0, 0), seed=i) for i in range(3)]).double()
    cluster = torch.arange(3).repeat_interleave(400)
    moved = []
    for wrong in (0.1, 0.55, 0.8):
        noise = 0.05 * torch.randn(1200, 3, generator=generator)
        is_wrong = torch.rand(1200, generator=generator) < wrong
        noise[is_wrong] += 3 * torch.rand(int(is_wrong.sum()), 3, generator=generator)
        moved.append(points + torch.tensor([0.3, 0.2, 0.0]) + noise)
    settings = TEACHERS[teacher]
    alone = [nsfp.motions_by_ransac(points, each, cluster, settings) for each in moved]
    own_cluster = torch.cat([cluster, cluster + 3, cluster + 6])
    thrice = points.repeat(3, 1), torch.cat(moved), own_cluster
    together = nsfp.motions_by_ransac(*thrice, settings, candidates=3)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)
    assert (alone[1] - alone[2]).abs().max() > 1e-3


def test_each_cluster_is_sampled_at_random_up_to_cluster_sample_points():
    cluster = torch.tensor([0, 1, -1, 0, 1, 0, 0, 2, 0])
    members = (cluster >= 0).nonzero()[:, 0]
    chosen = set()
    for seed in range(30):
        settings = dataclasses.replace(TEACHERS["fast"], cluster_sample=2, seed=seed)
        rows = nsfp._sample_clusters(cluster, members, settings)
        assert cluster[rows].bincount().tolist() == [2, 2, 1] and len(rows.unique()) == 5
        chosen |= set(rows.tolist())
    assert chosen == set(members.tolist())


def test_what_cannot_be_refined_is_zero_or_refused():
    box, empty = a_box((10.0, 0, 0)), torch.zeros(0, 3)
    flow = torch.ones_like(box)
    assert nsfp.refine_flow(empty, empty).flow.shape == (0, 3)
    assert nsfp.refine_flow(empty, empty[None], box).flow.shape == (0, 3)
    assert not nsfp.refine_flow(box, flow, empty).flow.any()
    for broken in ((box, flow / 0), (box / 0, flow), (box, flow, box / 0)):
        with pytest.raises(ValueError, match="points or flow to refine are NaN or infinite"):
            nsfp.refine_flow(*broken)


@pytest.mark.parametrize("refine", ["flow", "sweep"])
def test_clouds_without_clusters_keep_their_flow_or_get_none_if_sweep_1_decides(refine):
    pc0 = 100 * torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    flow = torch.full((9, 3), 0.3)
    for n in (1, 2, 9):
        pc1 = pc0[:n] + 0.3 if refine == "sweep" else None
        expected = torch.zeros(n, 3) if refine == "sweep" else flow[:n]
        assert torch.equal(nsfp.refine_flow(pc0[:n], flow[:n], pc1).flow, expected)


def test_chodosh_is_nsfp_and_then_refined():
    pc0, pc1 = a_box((5.0, 0, 0)), a_box((5.3, 0, 0), seed=1)
    nsfp5, chodosh5 = (
        dataclasses.replace(TEACHERS[name], iterations=5) for name in ("nsfp", "chodosh")
    )
    unrefined = nsfp.estimate_flow(pc0, pc1, nsfp5)
    expected = nsfp.refine_flow(pc0, unrefined, settings=chodosh5).flow
    assert torch.equal(nsfp.estimate_flow(pc0, pc1, chodosh5), expected)
    assert not torch.equal(unrefined, expected)


def test_a_static_world_gets_no_flow():
    pc0 = torch.cat([a_box((10.0, 0, 0)), clouds(100, spread=10.0)[0]])
    settings = dataclasses.replace(TEACHERS["fast"], iterations=30)
    assert not nsfp.estimate_flow(pc0, pc0.flip(0), settings).any()
