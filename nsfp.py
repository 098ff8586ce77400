"""The teacher: Neural Scene Flow Prior (NSFP, Li et al., NeurIPS 2021) as ZeroFlow runs it, and a cheap variant.

For one pair of sweeps and no label at all: fit a small MLP f, position -> flow, so that the moved points pc0 + f(pc0)
lie on the points of pc1. The network is thrown away afterwards. It is only a *prior*: an MLP finds it easier to move
neighbours alike than apart, so the flow comes out smooth, as the motion of rigid things is.

Points are (N, 3) float32 in metres, in the ego frame of sweep 0; flow is the residual displacement after ego-motion,
from sweep 0 to sweep 1; row i of the flow belongs to row i of pc0. The caller removes ground and crops (ZeroFlow: to
the student's grid); nothing is cut here. Works on the CPU and on CUDA, wherever pc0 lies. On a CPU, fit several pairs
side by side with one thread each (`torch.set_num_threads(1)`): the matrices are too small to gain from a second.

Two settings of the same code (TEACHERS):
  published  two networks of 128 wide, all points, truncated Chamfer distance both ways and the cycle back to sweep 0,
             constant rate with early stopping: ZeroFlow's teacher. Minutes a pair on a CPU, 26 s on the paper's GPU.
  fast       one network of 64 wide, a batch of points a step, only the way from sweep 0 to sweep 1, cosine rate.
             Seconds a pair on one core. Departs from the paper where `NSFPSettings` says so.
Code bases that are all called NSFP differ: the original stops at a change of 1e-4, others after 30 or 150 iterations
without improvement, or drop the cycle. `published` is what made ZeroFlow's labels.

This file needs torch and scipy, and none of its siblings.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import torch
from scipy.spatial import cKDTree
from torch import nn


@dataclass(frozen=True)
class NSFPSettings:
    """How to fit one pair. The defaults are the `fast` teacher; the comments give the published one's values."""

    hidden_channels: int = 64  # published: 128
    hidden_layers: int = 8
    input_scale: float = 0.3  # published: 1, raw metres. Smaller is smoother: the first ReLUs bend less per metre
    cycle: bool = False  # published: True, the inverse network, which must bring points home, and reverse terms
    batch_points: int = 2048  # random points of pc0 a step, 0 for all; published: 0
    iterations: int = 800  # published: at most 5,000, of which some 300 to 500 are used
    learning_rate: float = 8e-3  # of Adam, without weight decay
    cosine: bool = True  # 5 % warm-up, then down to 0. Published: False; a constant rate jumps out of good basins
    patience: int = 0  # iterations without improvement to stop after, keeping the best; 0: never. Published: 100
    min_improvement: float = 5e-5  # m², what counts as improvement
    truncation_sq: float = 2.0  # m²: a threshold for *squared* distances, so 1.41 m, not 2 m
    seed: int = 0


TEACHERS = {
    "fast": NSFPSettings(),
    "published": NSFPSettings(
        hidden_channels=128, input_scale=1.0, cycle=True, batch_points=0, iterations=5000, cosine=False, patience=100
    ),
}


def estimate_flow(pc0: torch.Tensor, pc1: torch.Tensor, settings: NSFPSettings = TEACHERS["fast"]) -> torch.Tensor:
    """Residual flow (N, 3) float32 of every point of pc0 (N, 3), given pc1 (M, 3). On a CPU, same seed, same flow.

    An empty pc0 gives an empty flow; an empty pc1 offers nothing to match, so the flow is zero.
    Raises ValueError for another shape or dtype, or coordinates that are not finite.
    """
    for name, points in (("pc0", pc0), ("pc1", pc1)):
        if points.ndim != 2 or points.shape[1] != 3 or points.dtype != torch.float32:
            raise ValueError(
                f"{name} is {points.dtype} of shape {tuple(points.shape)}; expected float32 (N, 3), metres"
            )
        if not points.isfinite().all():
            raise ValueError(f"{name} has coordinates that are NaN or infinite; cut those rows first")
    if settings.patience and settings.batch_points:
        raise ValueError("patience keeps the best flow of all points; it needs batch_points=0")
    if len(pc0) == 0 or len(pc1) == 0:
        return torch.zeros_like(pc0)

    generator = torch.Generator(pc0.device).manual_seed(settings.seed)
    forward = _new_prior(settings).to(pc0.device)
    inverse = copy.deepcopy(forward) if settings.cycle else None  # starts as a copy, as published
    networks = nn.ModuleList([forward, inverse] if settings.cycle else [forward])
    optimizer = torch.optim.Adam(networks.parameters(), lr=settings.learning_rate, fused=True)
    target0, target1 = Neighbours(pc0), Neighbours(pc1)  # neither cloud moves: one tree each for the whole fit
    best_loss = best_forward_loss = math.inf
    best_flow, best_iteration = torch.zeros_like(pc0), 0

    for iteration in range(settings.iterations):
        points = pc0
        if 0 < settings.batch_points < len(pc0):
            points = pc0[torch.randint(len(pc0), (settings.batch_points,), generator=generator, device=pc0.device)]
        flow = forward(points)  # (B, 3)
        moved = points + flow
        if settings.cycle:
            forward_loss = truncated_chamfer(moved, target1, settings.truncation_sq)
            loss = forward_loss + truncated_chamfer(moved - inverse(moved), target0, settings.truncation_sq)
        else:
            loss = truncated_sq_distance(moved, target1, settings.truncation_sq).mean()

        if settings.patience:
            # Two different bests, as published: the *total* loss decides when to stop, the *forward* one what to keep.
            kept_loss = (forward_loss if settings.cycle else loss).item()
            if kept_loss < best_forward_loss:
                best_forward_loss, best_flow = kept_loss, flow.detach()
            if loss.item() < best_loss - settings.min_improvement:
                best_loss, best_iteration = loss.item(), iteration
            elif iteration - best_iteration >= settings.patience:
                break

        optimizer.param_groups[0]["lr"] = _learning_rate(iteration, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if settings.patience:
        return best_flow
    with torch.no_grad():
        return forward(pc0)


def _learning_rate(iteration: int, settings: NSFPSettings) -> float:
    if not settings.cosine:
        return settings.learning_rate
    warm_up = min(1.0, (iteration + 1) / (0.05 * settings.iterations))
    return settings.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations))


# --- The prior -------------------------------------------------------------------------------------------------------


class NeuralPrior(nn.Module):
    """An MLP with ReLUs from a position (N, 3) in metres to its flow (N, 3); PyTorch's own initialisation."""

    def __init__(self, hidden_channels: int = 128, hidden_layers: int = 8, input_scale: float = 1.0):
        super().__init__()
        self.input_scale = input_scale
        widths = [3] + [hidden_channels] * hidden_layers
        layers = [layer for c_in, c_out in itertools.pairwise(widths) for layer in (nn.Linear(c_in, c_out), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_channels, 3))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.layers(points * self.input_scale)


def _new_prior(settings: NSFPSettings) -> NeuralPrior:
    """A freshly initialised prior that depends on the seed alone, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return NeuralPrior(settings.hidden_channels, settings.hidden_layers, settings.input_scale)


# --- The loss --------------------------------------------------------------------------------------------------------


def truncated_chamfer(a: torch.Tensor, b: torch.Tensor | Neighbours, truncation_sq: float = 2.0) -> torch.Tensor:
    """Truncated Chamfer distance of clouds a (N, 3) and b (M, 3), a scalar in m², differentiable in both.

    The mean over a of the squared distance to the nearest point of b, plus the mean over b of that to a.
    """
    b = b if isinstance(b, Neighbours) else Neighbours(b)
    there = truncated_sq_distance(a, b, truncation_sq)  # (N,)
    back = truncated_sq_distance(b.points, Neighbours(a), truncation_sq)  # (M,)
    return there.mean() + back.mean()


def truncated_sq_distance(queries: torch.Tensor, target: Neighbours, truncation_sq: float = 2.0) -> torch.Tensor:
    """Squared distance in m² of each query (N, 3) to its nearest target, but 0 where it is `truncation_sq` or more.

    Two things that reimplementations get wrong. The threshold is compared with the *squared* distance: "2" means
    1.41 m. And what is cut becomes 0 but stays in the mean, which is over *all* points: a point without a partner
    (hidden, or out of range) pulls nowhere, and does not raise the weight of the others.
    """
    index = target.nearest(queries, max_distance=math.sqrt(truncation_sq))  # (N,)
    is_found = index < len(target.points)
    partner = target.points[index.clamp(max=len(target.points) - 1)]
    distance_sq = (queries - partner).square().sum(dim=1)
    return torch.where(is_found & (distance_sq < truncation_sq), distance_sq, 0.0)


class Neighbours:
    """Exact nearest neighbours in a cloud: a k-d tree on the CPU, brute force in chunks on a GPU.

    The search itself is not differentiated: with the partner fixed, the gradient of the distance is the right one
    almost everywhere.
    """

    def __init__(self, points: torch.Tensor):
        self.points = points  # (M, 3)
        self.tree = cKDTree(points.detach().numpy()) if points.device.type == "cpu" else None

    @torch.no_grad()
    def nearest(self, queries: torch.Tensor, max_distance: float = math.inf) -> torch.Tensor:
        """(N,) int64: row of the nearest point for each query (N, 3); M where none is closer than `max_distance`."""
        bound = max_distance * (1 + 1e-6)  # the caller's own float32 comparison decides on the border
        if self.tree is None:
            return nearest_by_brute_force(queries, self.points, bound)
        workers = torch.get_num_threads()
        _, index = self.tree.query(queries.detach().numpy(), distance_upper_bound=bound, workers=workers)
        return torch.from_numpy(index)


def nearest_by_brute_force(
    queries: torch.Tensor, points: torch.Tensor, max_distance: float = math.inf, chunk: int = 2**26
) -> torch.Tensor:
    """As `Neighbours.nearest`, by looking at all points, at most `chunk` distances at a time. Never waits for a GPU.

    Squares of differences, summed: the usual |a|² + |b|² - 2ab cancels, and is coarse 50 m from the origin.
    """
    rows = []
    for part in queries.split(max(1, chunk // len(points))):
        distance_sq = sum((part[:, None, axis] - points[None, :, axis]).square() for axis in range(3))  # (n, M)
        nearest_sq, row = distance_sq.min(dim=1)
        rows.append(torch.where(nearest_sq < max_distance**2, row, len(points)))
    return torch.cat(rows)
