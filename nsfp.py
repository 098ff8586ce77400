"""The teacher: Neural Scene Flow Prior (NSFP), as published and in a cheap form.

NSFP (Li et al., "Neural Scene Flow Prior", NeurIPS 2021) needs no labels. It fits a small MLP f,
position -> flow, to one pair of sweeps, so that the moved points pc0 + f(pc0) lie on the points of
pc1. Afterwards the network is thrown away. It is only a *prior*: an MLP tends to move neighboring
points in the same way, so the flow comes out smooth, like the motion of rigid objects.

Points are (N, 3) float32 in meters, in the ego frame of sweep 0. Flow is the residual displacement
after ego-motion compensation, from sweep 0 to sweep 1; row i of the flow belongs to row i of pc0.
The caller removes ground and crops to the student's grid; no points are removed here. The fit runs
on the device of pc0, the CPU or CUDA. On a CPU, fit pairs in parallel processes of one thread each,
because the matrices are small (`torch.set_num_threads(1)`); on a GPU, give several to
`estimate_flows`.

Three teachers (TEACHERS):
  nsfp     `fit_published`: two networks of width 128, all points, truncated Chamfer distance both
           ways and the cycle back to sweep 0, constant rate with early stopping. This is ZeroFlow's
           teacher: minutes per pair on a CPU, 26 s on the paper's GPU.
  chodosh  the same, and then every cluster of points moves rigidly (Chodosh et al., "Re-Evaluating
           LiDAR Scene Flow for Autonomous Driving", WACV 2024): the paper's second teacher.
  fast     `fit_fast`: four networks of width 64, a small batch of points per step, only the term
           from sweep 0 to sweep 1, cosine rate. Then every cluster moves rigidly, by the network
           whose motion sweep 1 confirms, or not at all. Seconds per pair on one core. The comments
           in `NSFPSettings` name every departure from the paper.

Other code bases called NSFP differ: the original ignores improvements below 1e-4, others stop
after 30 or 150 iterations without improvement, or drop the cycle. `nsfp` made ZeroFlow's labels.
This file needs torch, numpy and scipy, and no other file of the project.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor, nn


@dataclass(frozen=True)
class NSFPSettings:
    """How to label one pair; the defaults are the `fast` teacher.

    Raises ValueError for settings that do not go together.
    """

    # The fit.

    cycle: bool = False  # the published fit: inverse network, both directions (nsfp: True)
    hidden_channels: int = 64  # width of the MLP (nsfp: 128)
    hidden_layers: int = 8  # hidden layers of the MLP
    input_scale: float = 0.3  # factor on positions in meters; smaller is smoother (nsfp: 1)
    priors: int = 4  # networks per pair, each with its own start and batches (nsfp: 1)
    batch_points: int | None = 256  # random points of pc0 per step and prior (nsfp: all)
    # points are drawn in proportion to their distance to sweep 1, counted as this at least (m)
    draw_min: float = 0.05
    draw_max: float = 0.3  # the most that this distance counts as, in meters
    iterations: int = 300  # steps of the fit (nsfp: at most 5000; some 300 to 500 are used)
    learning_rate: float = 8e-3  # of Adam, without weight decay
    cosine: bool = True  # 5 % warm-up and a cosine down to 0, not a constant rate (nsfp: False)
    patience: int | None = None  # iterations without improvement to stop after (nsfp: 100)
    min_improvement: float = 5e-5  # decrease of the total loss that counts as improvement, in m²
    truncation_sq: float = 2.0  # *squared* distances from here on count as 0, in m² (so 1.41 m)

    # The refinement, see `refine_flow`.

    # clusters move rigidly: as their flow (flow), as sweep 1 confirms (sweep), or not (nsfp: none)
    refine: Literal["none", "flow", "sweep"] = "sweep"
    # DBSCAN: two points closer than this are neighbors, in meters (chodosh: 0.4)
    cluster_reach: float = 0.5
    cluster_points: int = 10  # DBSCAN: points within reach, itself included, that make a core
    height_scale: float = 0.4  # factor on heights for DBSCAN: beams lie far apart (chodosh: 1)
    ransac_trials: int = 250  # RANSAC: at most this many motions of three points per cluster
    inlier_reach: float = 0.2  # RANSAC: largest distance between motion and flow, in meters
    upright: bool = True  # motions turn about the vertical only, and keep heights (chodosh: False)
    min_motion: float = 0.05  # a cluster that moves less than this on average is static, in meters
    cluster_sample: int | None = 512  # points per cluster that estimate its motion (chodosh: all)
    # a motion must be this many times closer to sweep 1 (mean squared distance) than no motion
    evidence: float = 1.5
    confirm_reach: float = 0.3  # points farther than this from sweep 1 are unexplained, in meters
    icp_steps: int = 3  # steps of ICP, which fits the motion of a cluster to sweep 1 itself
    final_icp_steps: int = 5  # further steps of ICP, for the motion that has won
    join_reach: float = 1.5  # a point in no cluster may move like a cluster this close, in meters

    seed: int = 0  # of the networks' weights, the batches and RANSAC

    def __post_init__(self) -> None:
        counts = ("iterations", "priors", "hidden_layers", "ransac_trials")
        for name in (*counts, "batch_points", "patience", "cluster_sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 < self.draw_min <= self.draw_max:
            bounds = f"draw_min {self.draw_min} and draw_max {self.draw_max}"
            raise ValueError(f"{bounds}: needs 0 < draw_min <= draw_max")
        if self.refine not in ("none", "flow", "sweep"):
            raise ValueError(f"refine {self.refine!r}: choose none, flow or sweep")
        # Each fit knows only some settings. A setting that would silently do nothing is refused.
        only_fast_knows = (self.batch_points, self.priors, self.input_scale, self.cosine)
        if self.cycle and only_fast_knows != (None, 1, 1.0, False):
            needed = "batch_points None (all), priors 1, input_scale 1 and cosine False"
            raise ValueError(f"cycle, the published fit, needs {needed}")
        if self.patience is not None and not self.cycle:
            raise ValueError("patience needs cycle: only the published fit stops early")
        if self.priors != 1 and self.refine != "sweep":
            raise ValueError("several priors need refine sweep: sweep 1 chooses among them")


_NSFP = NSFPSettings(
    cycle=True,
    hidden_channels=128,
    input_scale=1.0,
    priors=1,
    batch_points=None,
    iterations=5000,
    cosine=False,
    patience=100,
    refine="none",
    cluster_reach=0.4,
    height_scale=1.0,
    upright=False,
    cluster_sample=None,
)
TEACHERS = {
    "fast": NSFPSettings(),
    "nsfp": _NSFP,
    "chodosh": replace(_NSFP, refine="flow"),
}


def estimate_flow(
    pc0: Tensor,
    pc1: Tensor,
    settings: NSFPSettings = TEACHERS["fast"],
    lidar1: Tensor | None = None,
) -> Tensor:
    """Residual flow (N, 3) float32 in meters of every point of pc0 (N, 3), given pc1 (M, 3).

    lidar1: (3,) where the LiDAR was in sweep 1, in the frame of the points; see `refine_flow`.
    On a CPU the same seed gives the same flow. Where a cloud is empty the flow is zero. A fit that
    diverged gives a flow that is not finite, or absurdly long. Raises ValueError for another shape
    or dtype, or coordinates that are not finite.
    """
    return estimate_flows([pc0], [pc1], settings, [lidar1])[0].flow


class TeacherFlow(NamedTuple):
    """A teacher's result for one pair."""

    flow: Tensor  # (N, 3) float32, meters, residual
    # (N,) float32: how many times closer to sweep 1 the best motion of the point's cluster brings
    # it (mean squared distance) than no motion does, whichever of the two was chosen. The nearer to
    # `evidence`, the less certain was the choice. NaN where nothing was compared.
    gain: Tensor

    def like(self, pc0: Tensor) -> TeacherFlow:
        """The same on the device, and in the dtype, of pc0."""
        return TeacherFlow(self.flow.to(pc0), self.gain.to(pc0))


def estimate_flows(
    pc0s: Sequence[Tensor],
    pc1s: Sequence[Tensor],
    settings: NSFPSettings = TEACHERS["fast"],
    lidar1s: Sequence[Tensor | None] | None = None,
) -> list[TeacherFlow]:
    """`estimate_flow` of several pairs; with `batch_points` they are fitted side by side."""
    for name, clouds in (("pc0", pc0s), ("pc1", pc1s)):
        for points in clouds:
            _check_cloud(name, points)

    # Pairs without points in both sweeps are not fitted: their flow stays zero.
    results = [not_compared(torch.zeros_like(pc0)) for pc0 in pc0s]
    is_filled = [len(pc0) > 0 and len(pc1) > 0 for pc0, pc1 in zip(pc0s, pc1s, strict=True)]
    filled = [i for i in range(len(pc0s)) if is_filled[i]]
    if settings.cycle:
        candidates = [fit_published(pc0s[i], pc1s[i], settings)[None] for i in filled]
    elif settings.batch_points is None:
        candidates = [fit_fast([pc0s[i]], [pc1s[i]], settings)[0] for i in filled]
    else:
        candidates = fit_fast([pc0s[i] for i in filled], [pc1s[i] for i in filled], settings)

    for i, flows in zip(filled, candidates, strict=True):  # (K, N, 3), one flow per prior
        if not flows.isfinite().all():
            results[i] = not_compared(torch.full_like(pc0s[i], torch.nan))
        elif settings.refine == "none":
            results[i] = not_compared(flows[0])
        else:
            sweep1 = pc1s[i] if settings.refine == "sweep" else None
            lidar1 = lidar1s[i] if lidar1s is not None else None
            results[i] = refine_flow(pc0s[i], flows, sweep1, settings, lidar1)
    return results


def not_compared(flow: Tensor) -> TeacherFlow:
    """A flow (N, 3) that was not compared with no motion, so its gain is unknown."""
    return TeacherFlow(flow, torch.full_like(flow[:, 0], torch.nan))


def _check_cloud(name: str, points: Tensor) -> None:
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype != torch.float32:
        found = f"{points.dtype} of shape {tuple(points.shape)}"
        raise ValueError(f"{name} is {found}; expected float32 (N, 3), in meters")
    if not points.isfinite().all():
        raise ValueError(f"{name} has coordinates that are NaN or infinite; cut those rows first")


# --- The published fit ----------------------------------------------------------------------------


def fit_published(pc0: Tensor, pc1: Tensor, settings: NSFPSettings) -> Tensor:
    """Flow (N, 3) of pc0 (N, 3) onto pc1 (M, 3): NSFP as ZeroFlow ran it.

    With patience None it runs all iterations and returns the flow of the last network.
    """
    # The forward network predicts the flow from sweep 0 to 1; the inverse network, of each moved
    # point, how far it has come. As published, the inverse network starts as a copy.
    forward_net = seeded_mlps(1, settings)[0].to(pc0.device)
    inverse_net = copy.deepcopy(forward_net)
    parameters = [*forward_net.parameters(), *inverse_net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    sweep0, sweep1 = Neighbors(pc0), Neighbors(pc1)  # the search trees are built once
    best_loss, best_iteration = math.inf, 0
    best_forward_loss, best_flow = math.inf, torch.zeros_like(pc0)

    for iteration in range(settings.iterations):
        # Sweep 0 must land on sweep 1, and the inverse network must bring it home again.
        flow = forward_net(pc0)  # (N, 3)
        moved = pc0 + flow
        home = moved - inverse_net(moved)
        forward_loss = truncated_chamfer(moved, sweep1, settings.truncation_sq)
        loss = forward_loss + truncated_chamfer(home, sweep0, settings.truncation_sq)

        # Two different bests, as published: the forward loss decides which flow to keep ...
        if forward_loss.item() < best_forward_loss:
            best_forward_loss, best_flow = forward_loss.item(), flow.detach()
        # ... and the total loss decides when to stop.
        if loss.item() < best_loss - settings.min_improvement:
            best_loss, best_iteration = loss.item(), iteration
        elif settings.patience is not None and iteration - best_iteration >= settings.patience:
            break

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return best_flow if settings.patience is not None else forward_net(pc0).detach()


def seeded_mlps(count: int, settings: NSFPSettings) -> list[nn.Sequential]:
    """`count` MLPs (N, 3) -> (N, 3) with ReLUs and PyTorch's default initialization.

    The weights depend on the seed alone. The caller's random state is left alone.
    """
    width, mlps = settings.hidden_channels, []
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the caller's GPUs, too.
        torch.default_generator.manual_seed(settings.seed)
        for _ in range(count):
            layers = [nn.Linear(3, width), nn.ReLU()]
            for _ in range(settings.hidden_layers - 1):
                layers += [nn.Linear(width, width), nn.ReLU()]
            mlps.append(nn.Sequential(*layers, nn.Linear(width, 3)))
    return mlps


# --- The fast fit ---------------------------------------------------------------------------------


def fit_fast(pc0s: list[Tensor], pc1s: list[Tensor], settings: NSFPSettings) -> list[Tensor]:
    """For each pair the flows (K, N, 3) of its K = `priors` networks, all pairs side by side.

    pc0s: (N, 3) each, pc1s: (M, 3) each, of any sizes but 0. Only the forward term is left of the
    published loss. Raises ValueError for several pairs if `batch_points` is None.
    """
    if not pc0s:
        return []
    networks = NeuralPriors(len(pc0s), settings).to(pc0s[0].device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=settings.learning_rate, fused=True)
    sweep1s = [Neighbors(pc1) for pc1 in pc1s]
    # The batches are drawn beforehand, so that a GPU never has to wait inside the loop.
    all_points = torch.cat(pc0s)
    batches = _draw_batches(pc0s, sweep1s, settings)  # (iterations, P, B), P = pairs * K

    for iteration in range(settings.iterations):
        points = all_points[batches[iteration]]  # (P, B, 3)
        moved = points + networks(points)
        distances_sq = []
        for moved_of_pair, sweep1 in zip(moved.split(settings.priors), sweep1s, strict=True):
            queries = moved_of_pair.flatten(0, 1)  # (K * B, 3)
            distances_sq.append(truncated_sq_distance(queries, sweep1, settings.truncation_sq))
        # A mean over points, but a sum over networks, so that no network influences another.
        loss = torch.cat(distances_sq).sum() / points.shape[1]

        optimizer.param_groups[0]["lr"] = _learning_rate(iteration, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return [networks.flow_of_pair(pc0, pair) for pair, pc0 in enumerate(pc0s)]


def _draw_batches(pc0s: list[Tensor], sweep1s: list[Neighbors], settings: NSFPSettings) -> Tensor:
    """(iterations, P, B) rows of the joined pc0s: the random points of each network at each step.

    Most points are static and already close to a point of sweep 1, so a uniform batch holds few
    moving points. Therefore a point is drawn in proportion to its distance to sweep 1, within
    bounds. A point without a neighbor in reach feels no pull and is drawn least.
    """
    if settings.batch_points is None:
        if len(pc0s) > 1:
            raise ValueError("several pairs at once need batch_points; fit these one by one")
        every_row = torch.arange(len(pc0s[0]), device=pc0s[0].device)
        return every_row.expand(settings.iterations, settings.priors, -1)  # a view, not a copy

    reach = math.sqrt(settings.truncation_sq)
    shape = (settings.iterations, settings.priors, settings.batch_points)
    first_row, rows = 0, []
    for pc0, sweep1 in zip(pc0s, sweep1s, strict=True):
        # Seeded per pair, so that its batches do not depend on the pairs beside it.
        generator = torch.Generator(pc0.device).manual_seed(settings.seed)
        weight = sweep1.distance(pc0, reach, beyond=0.0).clamp(settings.draw_min, settings.draw_max)
        drawn = torch.multinomial(weight, math.prod(shape), replacement=True, generator=generator)
        rows.append(first_row + drawn.view(shape))
        first_row += len(pc0)
    return torch.cat(rows, dim=1)


def _learning_rate(iteration: int, settings: NSFPSettings) -> float:
    if not settings.cosine:
        return settings.learning_rate
    # 5 % warm-up, then a cosine down to 0: at a constant rate Adam jumps out of good basins.
    warm_up = min(1.0, (iteration + 1) / (0.05 * settings.iterations))
    decay = 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations))
    return settings.learning_rate * warm_up * decay


class NeuralPriors(nn.Module):
    """The K = `priors` MLPs of each pair side by side, P = pairs * K; every pair starts alike."""

    def __init__(self, pairs: int, settings: NSFPSettings):
        super().__init__()
        self.input_scale, self.priors = settings.input_scale, settings.priors
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        mlps = seeded_mlps(settings.priors, settings)
        for layer in range(0, len(mlps[0]), 2):  # a ReLU follows each Linear
            weight = torch.stack([mlp[layer].weight.T for mlp in mlps]).detach()  # (K, in, out)
            bias = torch.stack([mlp[layer].bias[None] for mlp in mlps]).detach()  # (K, 1, out)
            self.weights.append(nn.Parameter(weight.repeat(pairs, 1, 1)))
            self.biases.append(nn.Parameter(bias.repeat(pairs, 1, 1)))

    def forward(self, points: Tensor, networks: slice = slice(None)) -> Tensor:
        """Flow (P, B, 3) of positions (P, B, 3) in meters; networks: only these of the P."""
        # One batched product per layer serves all networks, which is what a GPU is good at.
        x = points * self.input_scale
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x.relu() if layer > 0 else x
            x = torch.baddbmm(bias[networks], x, weight[networks])  # (P, B, out)
        return x

    @torch.no_grad()
    def flow_of_pair(self, pc0: Tensor, pair: int) -> Tensor:
        """Flow (K, N, 3) of pc0 (N, 3) by the K networks of one pair, in parts to save memory."""
        networks = slice(pair * self.priors, (pair + 1) * self.priors)
        parts = [part.expand(self.priors, -1, -1) for part in pc0.split(1024)]
        return torch.cat([self(part, networks) for part in parts], dim=1)


# --- The loss -------------------------------------------------------------------------------------


def truncated_chamfer(a: Tensor, b: Tensor | Neighbors, truncation_sq: float = 2.0) -> Tensor:
    """Truncated Chamfer distance of clouds a (N, 3) and b (M, 3), in m²; differentiable in both.

    The mean over a of the squared distance to the nearest point of b, plus the same from b to a.
    """
    b = b if isinstance(b, Neighbors) else Neighbors(b)
    a_to_b = truncated_sq_distance(a, b, truncation_sq)  # (N,)
    b_to_a = truncated_sq_distance(b.points, Neighbors(a), truncation_sq)  # (M,)
    return a_to_b.mean() + b_to_a.mean()


def truncated_sq_distance(queries: Tensor, target: Neighbors, truncation_sq: float = 2.0) -> Tensor:
    """(N,) squared distance in m² of each query (N, 3) to its nearest target, 0 if truncated.

    Reimplementations get two things wrong. The threshold is compared with the *squared* distance:
    "2" means 1.41 m. And truncated points become 0 but stay in the mean, which is over *all*
    points: a point without a partner (hidden, out of range) does not raise the others' weight.
    """
    partner, is_found = target.partners(queries, max_distance=math.sqrt(truncation_sq))
    distance_sq = (queries - partner).square().sum(dim=1)
    return torch.where(is_found & (distance_sq < truncation_sq), distance_sq, 0.0)


class Neighbors:
    """Exact nearest neighbors in a cloud: a k-d tree on the CPU, brute force in chunks on a GPU.

    The search itself is not differentiated: with the partner fixed, the gradient of the distance is
    the right one almost everywhere.
    """

    def __init__(self, points: Tensor):
        self.points = points  # (M, 3)
        self.tree = cKDTree(_finite(points)) if points.device.type == "cpu" else None

    @torch.no_grad()
    def nearest(self, queries: Tensor, max_distance: float = math.inf) -> Tensor:
        """(N,) int64 row of the nearest point to each query (N, 3); M if none is close enough."""
        bound = max_distance * (1 + 1e-6)  # on the border the caller's own float32 test decides
        if self.tree is None:
            return nearest_by_brute_force(queries, self.points, bound)
        threads = torch.get_num_threads()
        _, row = self.tree.query(_finite(queries), distance_upper_bound=bound, workers=threads)
        return torch.from_numpy(row)

    def partners(self, queries: Tensor, max_distance: float) -> tuple[Tensor, Tensor]:
        """Nearest point (N, 3) to each query (N, 3), and (N,) bool: is it close enough?"""
        row = self.nearest(queries, max_distance)
        return self.points[row.clamp(max=len(self.points) - 1)], row < len(self.points)

    def distance(self, queries: Tensor, max_distance: float, beyond: float) -> Tensor:
        """(N,) distance of each query (N, 3) to its nearest point; `beyond` if not close enough."""
        partner, is_found = self.partners(queries, max_distance)
        distance = (queries - partner).norm(dim=1)
        return torch.where(is_found & (distance < max_distance), distance, beyond)


def _finite(points: Tensor) -> np.ndarray:
    """SciPy refuses NaN, the points of a diverged fit. Here they are far away, as on a GPU."""
    return np.nan_to_num(points.detach().numpy(), nan=1e30)


def nearest_by_brute_force(
    queries: Tensor, points: Tensor, max_distance: float = math.inf, chunk: int = 2**26
) -> Tensor:
    """`Neighbors.nearest` from all distances, at most `chunk` at once; never waits for a GPU."""
    # |q|² + |p|² - 2qp needs only one matrix product. It subtracts large numbers: 50 m from the
    # origin that is too coarse in float32.
    points = points.double()
    length_sq = points.square().sum(dim=1)  # (M,)
    rows = []
    for part in queries.double().split(max(1, chunk // len(points))):
        nearest_sq, row = torch.addmm(length_sq, part, points.T, alpha=-2).min(dim=1)  # less |q|²
        is_found = nearest_sq + part.square().sum(dim=1) < max_distance**2
        rows.append(torch.where(is_found, row, len(points)))
    return torch.cat(rows)


# --- The refinement -------------------------------------------------------------------------------
# A motion is (3, 4): a rotation beside a translation, about the origin. `cluster` (N,) int64 is the
# cluster of each point, 0 to C - 1. All of it is float64, and on the CPU.


def refine_flow(
    pc0: Tensor,
    flow: Tensor,
    pc1: Tensor | None = None,
    settings: NSFPSettings = TEACHERS["fast"],
    lidar1: Tensor | None = None,
) -> TeacherFlow:
    """Flow (N, 3) by which each cluster of pc0 (N, 3) moves rigidly, from any flow (N, 3).

    Without pc1, as Chodosh et al. (WACV 2024): a rigid motion is fitted to each cluster's flow by
    RANSAC; a motion under `min_motion` becomes none; points in no cluster keep their flow. Their
    code measures a motion by its translation about the *origin*, which a small rotation makes large
    far away; here it is the mean displacement of the points.

    With pc1 (M, 3), `flow` may be several candidates (K, N, 3). Each candidate's motion is fitted
    to the points of pc1 (ICP), and the one that brings the cluster closest to their surface wins,
    if it does so `evidence` times better than no motion. A point in no cluster moves like the
    nearest cluster that moves, if that is closer to sweep 1. With lidar1 (3,), where the LiDAR
    was in sweep 1, points that were hidden from there do not count as evidence. Only with pc1 is
    there a `gain`, and only for points in a cluster or moved like one.

    Raises ValueError for points or flow that are not finite.
    """
    if not all(x is None or x.isfinite().all() for x in (pc0, flow, pc1, lidar1)):
        raise ValueError("points or flow to refine are NaN or infinite; cut those rows first")
    if len(pc0) == 0 or (pc1 is not None and len(pc1) == 0):
        # Nothing to move, or nothing that could confirm a motion.
        return not_compared(torch.zeros_like(pc0))
    points = pc0.detach().cpu().double()  # (N, 3)
    flows = flow.detach().cpu().double().reshape(-1, *pc0.shape)  # (K, N, 3)

    # Which points move together? A LiDAR's beams lie farther apart than the points of one beam, and
    # things in a street do not stand on each other: so distances in height count less.
    scale = torch.tensor([1.0, 1.0, settings.height_scale], dtype=torch.float64)
    cluster = find_clusters(points * scale, settings.cluster_reach, settings.cluster_points)
    members = (cluster >= 0).nonzero()[:, 0]  # rows of pc0
    result = not_compared(flows[0].clone() if pc1 is None else torch.zeros_like(points))
    if len(members) == 0:
        return result.like(pc0)

    # A motion has few parameters: a sample of each cluster is enough to estimate it ...
    sample = _sample_clusters(cluster, members, settings)  # rows of pc0
    points_s, cluster_s = points[sample], cluster[sample]
    # All candidates go through RANSAC at once: each has its own clusters, k · C to k · C + C - 1.
    count, clusters = len(flows), int(cluster.max()) + 1
    own_cluster = cluster_s + clusters * torch.arange(count)[:, None]  # (K, S)
    moved_s = points_s + flows[:, sample]  # (K, S, 3)
    each = (points_s.repeat(count, 1), moved_s.flatten(0, 1), own_cluster.flatten())
    candidates = motions_by_ransac(*each, settings, count).unflatten(0, (count, clusters))
    motion = candidates[0]  # (C, 3, 4)
    if pc1 is not None:
        surface = Surface(pc1.detach().cpu().double())
        lidar1 = lidar1 if lidar1 is None else lidar1.cpu().double()
        about = (cluster_s, surface, lidar1, settings)
        motion, gain = _confirmed_motions(points_s, candidates, *about)
        result.gain[members] = gain[cluster[members]]

    # ... and then all its members move by it, or not at all if they move too little.
    displacement = move(points[members], motion, cluster[members]) - points[members]
    mean_displacement = mean_by_cluster(displacement.norm(dim=1), cluster[members])  # (C,) meters
    is_static = (mean_displacement < settings.min_motion)[cluster[members]]
    displacement[is_static] = 0.0
    result.flow[members] = displacement
    moving = members[~is_static]
    if pc1 is None or len(moving) == 0:
        return result.like(pc0)

    # The remaining points are in no cluster, for example where a beam grazes a roof.
    loose = (cluster < 0).nonzero()[:, 0]
    nearest = Neighbors(points[moving]).nearest(points[loose], settings.join_reach)
    loose, like = loose[nearest < len(moving)], moving[nearest[nearest < len(moving)]]
    moved = move(points[loose], motion, cluster[like])
    reach = settings.confirm_reach
    is_closer = surface.sq_distance(moved, reach) < surface.sq_distance(points[loose], reach)
    result.flow[loose[is_closer]] = (moved - points[loose])[is_closer]
    result.gain[loose[is_closer]] = result.gain[like[is_closer]]
    return result.like(pc0)


def find_clusters(points: Tensor, reach: float, min_points: int) -> Tensor:
    """DBSCAN (Ester et al., 1996) of points (N, 3): (N,) int64 clusters from 0, -1 for none.

    A core has `min_points` points within `reach` (meters), itself included. Cores within reach of
    each other share a cluster; any other point joins its nearest core in reach. Memory grows with
    the number of points, however many of them lie at one place.
    """
    points = points.numpy()
    # All points of a small cell are neighbors: its diagonal is 0.99 of the reach. If there are
    # enough of them, they are cores. Only the rest must look for neighbors in other cells.
    corner = np.floor(points / (0.57 * reach))  # (N, 3)
    _, cell, size = np.unique(corner, axis=0, return_inverse=True, return_counts=True)
    cell = cell.ravel()  # (N,); NumPy 2.0 returns (N, 1)
    is_core = size[cell] >= min_points
    rest = np.flatnonzero(~is_core)
    # The distance to the min_points-th nearest point is infinite where that is out of reach.
    distance, _ = cKDTree(points).query(points[rest], [min_points], distance_upper_bound=reach)
    is_core[rest] = np.isfinite(distance[:, 0])

    cluster = np.full(len(points), -1)
    if is_core.any():
        core_cluster = _connect_cores(points[is_core], cell[is_core], reach)
        cluster[is_core] = core_cluster
        # For "none in reach" SciPy gives the row after the last core, where we append a -1.
        _, nearest = cKDTree(points[is_core]).query(points[~is_core], distance_upper_bound=reach)
        cluster[~is_core] = np.append(core_cluster, -1)[nearest]
    return torch.from_numpy(cluster)


def _connect_cores(cores: np.ndarray, cell: np.ndarray, reach: float) -> np.ndarray:
    """(N,) clusters of cores (N, 3): the connected components of those within reach of each other.

    cell: (N,) the cell of each; all cores of a cell are within reach of each other. To link every
    two of 40,000 cores at one place would take 13 GB. So each core is linked with the first of its
    cell, and only the first `per_cell` of a cell are linked with their neighbors in other cells.
    """
    per_cell = 5  # measured: more make more links, and fewer leave more cells for the loop below
    rows = cell.argsort(kind="stable")  # of the first cell, of the second, ...
    _, start, size = np.unique(cell[rows], return_index=True, return_counts=True)
    chosen = rows[np.arange(len(rows)) - start.repeat(size) < per_cell]
    pairs = chosen[cKDTree(cores[chosen]).query_pairs(reach, output_type="ndarray")]  # (L, 2)
    within_cells = np.stack([rows, rows[start.repeat(size)]], axis=1)  # (N, 2)
    component = _components(np.concatenate([pairs, within_cells]), len(cores))

    # The other cores of a crowded cell may still link it with a component that lies nearby.
    tree, links = cKDTree(cores), [np.zeros((0, 2), dtype=int)]
    for crowded in np.flatnonzero(size > per_cell):
        members = rows[start[crowded] : start[crowded] + size[crowded]]
        own = component[members[0]]
        near = np.array(tree.query_ball_point(cores[members[0]], 2 * reach))  # and some too far
        near = near[component[near] != own]
        if len(near):
            count = cKDTree(cores[members]).query_ball_point(cores[near], reach, return_length=True)
            linked = np.unique(component[near[count > 0]])
            links.append(np.stack([np.full_like(linked, own), linked], axis=1))
    return _components(np.concatenate(links), component.max() + 1)[component]


def _components(links: np.ndarray, count: int) -> np.ndarray:
    """(count,) connected component of each node of a graph, given its links (L, 2) of rows."""
    graph = coo_matrix((np.ones(len(links), dtype=bool), links.T), shape=(count, count))
    return connected_components(graph, connection="weak")[1]


def _sample_clusters(cluster: Tensor, members: Tensor, settings: NSFPSettings) -> Tensor:
    """Rows of at most `cluster_sample` random members of each cluster."""
    if settings.cluster_sample is None:
        return members
    generator = torch.Generator().manual_seed(settings.seed)
    shuffled = members[torch.randperm(len(members), generator=generator)]
    # The stable sort by cluster keeps the random order within each; its first rows are the sample.
    shuffled = shuffled[cluster[shuffled].argsort(stable=True)]
    size = cluster[members].bincount()  # (C,)
    start = size.cumsum(0) - size  # (C,) where each cluster begins
    rank = torch.arange(len(members)) - start[cluster[shuffled]]
    return shuffled[rank < settings.cluster_sample]


def motions_by_ransac(
    points: Tensor, moved: Tensor, cluster: Tensor, settings: NSFPSettings, candidates: int = 1
) -> Tensor:
    """(C, 3, 4): per cluster the rigid motion that takes most points (N, 3) to `moved` (N, 3).

    RANSAC (Fischler and Bolles, 1981): a trial fits a motion to three random points of a cluster,
    until half of its points agree with one. The final motion is fitted to all points that agree.
    The clusters may belong to several candidates, as many to each, one candidate after the other.
    Each candidate then draws the triples that it would draw alone.
    """
    fit = upright_motions if settings.upright else rigid_motions
    generators = [torch.Generator().manual_seed(settings.seed) for _ in range(candidates)]
    size = cluster.bincount()  # (C,)
    candidate = torch.arange(candidates).repeat_interleave(len(size) // candidates)  # (C,)
    rows_by_cluster = cluster.argsort(stable=True)  # (N,) the rows of cluster 0, of cluster 1, ...
    start = size.cumsum(0) - size  # (C,) where each cluster begins in it
    best_count = torch.zeros(len(size), dtype=torch.float64)  # inliers of the best motion so far
    best_motion = torch.eye(3, 4, dtype=torch.float64).repeat(len(size), 1, 1)

    # A cluster is done, and dropped, when half of its points agree: most are after one trial.
    # Three index sets describe what is left.
    active = torch.arange(len(size))  # (A,) the clusters that are still tried
    rows = torch.arange(len(points))  # (R,) the rows of their points
    slot = cluster  # (R,) for each of those rows, the place of its cluster in `active`
    for _ in range(settings.ransac_trials):
        # One motion per active cluster, from three points. (The same one may be drawn twice.)
        counts = candidate[active].bincount(minlength=candidates).tolist()
        draws = [torch.rand(n, 3, generator=g) for n, g in zip(counts, generators, strict=True)]
        place = (torch.cat(draws) * size[active][:, None]).long()  # (A, 3) within the cluster
        triple = rows_by_cluster[start[active][:, None] + place].flatten()  # (3 A,)
        triple_slot = torch.arange(len(active)).repeat_interleave(3)
        motion = fit(points[triple], moved[triple], triple_slot)  # (A, 3, 4)

        # Keep it where more points agree with it than with the best so far.
        is_inlier = _is_inlier(points[rows], moved[rows], motion, slot, settings.inlier_reach)
        count = slot.bincount(is_inlier.double())  # (A,)
        is_better = count > best_count[active]
        best_count[active[is_better]] = count[is_better]
        best_motion[active[is_better]] = motion[is_better]

        # Drop the clusters that are done, with their points, and renumber the slots.
        is_active = best_count[active] < 0.5 * size[active]  # (A,)
        if not is_active.any():
            break
        is_kept, new_slot = is_active[slot], is_active.cumsum(0) - 1
        active, rows, slot = active[is_active], rows[is_kept], new_slot[slot[is_kept]]

    # Three points carry the noise of the flow; a fit to all inliers averages it. A cluster with
    # fewer than three inliers keeps what it has.
    is_inlier = _is_inlier(points, moved, best_motion, cluster, settings.inlier_reach)
    final = fit(points, moved, cluster, is_inlier.double())
    return torch.where((best_count >= 3)[:, None, None], final, best_motion)


def _is_inlier(
    points: Tensor, moved: Tensor, motion: Tensor, cluster: Tensor, reach: float
) -> Tensor:
    """(N,) bool: does the motion of its cluster take a point to within reach of `moved`?"""
    distance_sq = (move(points, motion, cluster) - moved).square().sum(dim=1)
    return distance_sq < reach**2


def _confirmed_motions(
    points: Tensor,
    candidates: Tensor,
    cluster: Tensor,
    surface: Surface,
    lidar1: Tensor | None,
    settings: NSFPSettings,
) -> tuple[Tensor, Tensor]:
    """(C, 3, 4): per cluster the candidate, of (K, C, 3, 4), that explains sweep 1 best after ICP,
    or no motion.

    And (C,) the gain: the mean squared distance to sweep 1 without a motion, divided by that with
    the best candidate. A candidate must beat no motion by the factor `evidence`.
    """

    def mismatch(moved: Tensor, cluster: Tensor, weight: Tensor | None = None) -> Tensor:
        """(C,) mean squared distance to the surface of sweep 1, in m²."""
        # Out of reach must cost the most: else the best motion would be one away from everything.
        distance_sq = surface.sq_distance(moved, settings.confirm_reach)
        return mean_by_cluster(distance_sq + RANGE_NOISE_M**2, cluster, weight)

    # Which candidate is the best, and how much better is it than no motion?
    still = torch.eye(3, 4, dtype=torch.float64).expand_as(candidates[0])
    rest = mismatch(points, cluster)  # (C,)
    best_motion, best_mismatch = still, torch.full_like(rest, torch.inf)
    for motion in candidates:
        motion = _fit_to_sweep(points, motion, cluster, surface, settings.icp_steps, settings)
        motion_mismatch = mismatch(move(points, motion, cluster), cluster)
        is_better = motion_mismatch < best_mismatch
        best_motion = torch.where(is_better[:, None, None], motion, best_motion)
        best_mismatch = torch.minimum(motion_mismatch, best_mismatch)
    gain = rest / best_mismatch

    # The few that seem to move are fitted better and checked again. Clusters get new numbers.
    seems_to_move = gain > settings.evidence  # (C,)
    rows = seems_to_move[cluster].nonzero()[:, 0]
    chosen, slot = cluster[rows].unique(return_inverse=True)
    points, motion, steps = points[rows], best_motion[chosen], settings.final_icp_steps
    motion = _fit_to_sweep(points, motion, slot, surface, steps, settings)

    # The part of a wall that a parked car hides from sweep 1 seems to have disappeared, and the
    # part that it uncovers, to have appeared. Hidden points must not be evidence for a motion.
    moved, weight = move(points, motion, slot), None
    if lidar1 is not None and len(rows):
        is_hidden = hidden_points(points, moved, surface.neighbors.points, lidar1)
        weight = (~is_hidden).double()
    gain[chosen] = mismatch(points, slot, weight) / mismatch(moved, slot, weight)
    is_moving = gain[chosen] > settings.evidence
    motions = still.clone()
    motions[chosen[is_moving]] = motion[is_moving]
    return motions, gain


def _fit_to_sweep(
    points: Tensor,
    motion: Tensor,
    cluster: Tensor,
    surface: Surface,
    steps: int,
    settings: NSFPSettings,
) -> Tensor:
    """(C, 3, 4): the motion of each cluster after some steps of ICP (Besl and McKay, 1992)."""
    fit = upright_motions if settings.upright else rigid_motions
    for _ in range(steps):
        # Match the moved points with sweep 1, fit a motion to the matches, repeat. Too few matches
        # determine no motion; such a cluster keeps what it has.
        moved = move(points, motion, cluster)
        partner, is_found = surface.neighbors.partners(moved, settings.confirm_reach)
        fitted = fit(points, partner, cluster, is_found.double())
        has_enough = cluster.bincount(is_found.double()) >= settings.cluster_points
        motion = torch.where(has_enough[:, None, None], fitted, motion)
    return motion


RANGE_NOISE_M = 0.03  # of a LiDAR, at most: smaller distances to a surface mean nothing


class Surface:
    """A sweep as a surface: around each point a small plane, as wide as the points lie apart there.

    The distance from point to point is misleading: along a static wall, it becomes smaller when the
    *pattern* of scan lines is shifted onto that of the other sweep. Distances along a surface
    therefore count only where they exceed the spacing of its points.
    """

    def __init__(self, points: Tensor):
        self.neighbors = Neighbors(points)  # (M, 3) float64
        self.normal = torch.zeros_like(points)  # (M, 3) of the planes, where they are known
        self.spacing = torch.zeros_like(points[:, 0])  # (M,) meters to the third neighbor
        self.is_known = torch.zeros(len(points), dtype=torch.bool)

    def _find_planes(self, rows: Tensor) -> None:
        """Find the planes around these points, those that are not known yet."""
        # Only a third of the points of a real sweep are ever asked for.
        new = torch.zeros_like(self.is_known)
        new[rows] = True
        new &= ~self.is_known
        self.is_known |= new
        # Of the plane through a point and its neighbors, the normal is the direction in which they
        # spread least: the first eigenvector of their covariance.
        points = self.neighbors.points
        count = min(8, len(points))
        distance, near = self.neighbors.tree.query(points[new].numpy(), [*range(1, count + 1)])
        around = points[torch.from_numpy(near)]  # (K, 8, 3)
        offset = around - around.mean(dim=1, keepdim=True)
        self.normal[new] = torch.linalg.eigh(offset.mT @ offset).eigenvectors[:, :, 0]
        self.spacing[new] = torch.from_numpy(distance)[:, min(3, count - 1)]

    def sq_distance(self, queries: Tensor, reach: float) -> Tensor:
        """(N,) squared distance in m² of each query (N, 3) to the surface, reach² at most."""
        points = self.neighbors.points
        row = self.neighbors.nearest(queries, max_distance=1.0)
        is_found, row = row < len(points), row.clamp(max=len(points) - 1)
        self._find_planes(row[is_found])
        offset = queries - points[row]  # (N, 3)
        across = (offset * self.normal[row]).sum(dim=1)
        along = (offset.square().sum(dim=1) - across.square()).clamp(min=0).sqrt()
        beyond = (along - self.spacing[row]).clamp(min=0)
        distance_sq = across.square() + beyond.square()
        return torch.where(is_found, distance_sq, torch.inf).clamp(max=reach**2)


def hidden_points(points: Tensor, moved: Tensor, pc1: Tensor, lidar1: Tensor) -> Tensor:
    """(N,) bool: is something in pc1 (M, 3) between lidar1 (3,) and a point (N, 3)?

    moved: (N, 3) where the point is claimed to be in sweep 1. Whatever hides it must be nearer than
    both places, since a car that comes closer hides the place where it was.
    """
    margin_m, width = 0.5, 0.015  # how much nearer it must be; the ray's half width, in radians
    ranges = (pc1 - lidar1).norm(dim=1).clamp(min=1e-6)  # (M,)
    directions = cKDTree(((pc1 - lidar1) / ranges[:, None]).numpy())
    distance = (points - lidar1).norm(dim=1).clamp(min=1e-6)  # (N,)
    rays = ((points - lidar1) / distance[:, None]).numpy()
    # SciPy gives row M where there is no further point so close to the ray: nothing hides there.
    _, rows = directions.query(rays, [*range(1, 9)], distance_upper_bound=width)
    nearest = torch.cat([ranges, ranges.new_tensor([torch.inf])])[torch.from_numpy(rows)].amin(1)
    return nearest < torch.minimum(distance, (moved - lidar1).norm(dim=1)) - margin_m


def upright_motions(
    points: Tensor, moved: Tensor, cluster: Tensor, weight: Tensor | None = None
) -> Tensor:
    """`rigid_motions` that turn about the vertical only, and keep heights, as things on a road do.

    Scan lines of the same height attract each other. Where they may, a car that comes nearer would
    rise by several centimeters.
    """
    center = mean_by_cluster(points, cluster, weight)  # (C, 3)
    moved_center = mean_by_cluster(moved, cluster, weight)
    x, y, _ = (points - center[cluster]).unbind(dim=1)
    moved_x, moved_y, _ = (moved - moved_center[cluster]).unbind(dim=1)
    # The best angle has the sine and cosine of all offsets together.
    parts = torch.stack([x * moved_x + y * moved_y, x * moved_y - y * moved_x], dim=1)
    cosine, sine = mean_by_cluster(parts, cluster, weight).unbind(dim=1)  # (C,)
    angle = torch.atan2(sine, cosine + 1e-12)  # 0 where a single place determines none
    rotation = torch.zeros(len(center), 3, 3, dtype=torch.float64)
    rotation[:, 0, 0] = rotation[:, 1, 1] = angle.cos()
    rotation[:, 1, 0], rotation[:, 0, 1] = angle.sin(), -angle.sin()
    rotation[:, 2, 2] = 1.0
    translation = moved_center[:, :, None] - rotation @ center[:, :, None]  # (C, 3, 1)
    translation[:, 2] = 0.0
    return torch.cat([rotation, translation], dim=2)


def rigid_motions(
    points: Tensor, moved: Tensor, cluster: Tensor, weight: Tensor | None = None
) -> Tensor:
    """(C, 3, 4): per cluster the motion that takes its points (N, 3) closest to `moved` (N, 3).

    By Kabsch (1976). weight (N,) float64 multiplies each squared distance (None: 1); a cluster
    without any weight gets no translation.
    """
    # About the centers only a rotation is left to find, from the covariance of the offsets.
    center = mean_by_cluster(points, cluster, weight)  # (C, 3)
    moved_center = mean_by_cluster(moved, cluster, weight)  # (C, 3)
    offset, moved_offset = points - center[cluster], moved - moved_center[cluster]  # (N, 3)
    outer = offset[:, :, None] * moved_offset[:, None, :]  # (N, 3, 3)
    covariance = mean_by_cluster(outer.flatten(1), cluster, weight).view(-1, 3, 3)
    u, _, vh = torch.linalg.svd(covariance)
    # If V Uᵀ, the best orthogonal matrix, mirrors, flip the axis that matters least: the last.
    sign = torch.ones(len(center), 3, dtype=torch.float64)
    sign[:, 2] = torch.linalg.det(u @ vh).sign()
    rotation = vh.mT @ (sign[:, :, None] * u.mT)  # (C, 3, 3)
    translation = moved_center[:, :, None] - rotation @ center[:, :, None]  # (C, 3, 1)
    return torch.cat([rotation, translation], dim=2)


def move(points: Tensor, motion: Tensor, cluster: Tensor) -> Tensor:
    """Points (N, 3), each moved by the motion (C, 3, 4) of its cluster (N,)."""
    motion = motion[cluster]  # (N, 3, 4)
    return (motion[:, :, :3] @ points[:, :, None])[:, :, 0] + motion[:, :, 3]


def mean_by_cluster(values: Tensor, cluster: Tensor, weight: Tensor | None = None) -> Tensor:
    """(C,) or (C, D): mean of values (N,) or (N, D) float64 per cluster; 0 if all weights are 0."""
    if weight is None:
        weight = torch.ones(len(values), dtype=torch.float64)
    total = cluster.bincount(weight)  # (C,)
    # Values (N, D) need the weights as columns.
    if values.ndim == 2:
        weight, total = weight[:, None], total[:, None]
    sums = values.new_zeros(len(total), *values.shape[1:]).index_add_(0, cluster, weight * values)
    return sums / total.clamp(min=1e-12)
