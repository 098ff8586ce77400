"""The teacher: Neural Scene Flow Prior (NSFP, Li et al., NeurIPS 2021) as ZeroFlow runs it, and a cheap variant.

For one pair of sweeps and no label at all: fit a small MLP f, position -> flow, so that the moved points pc0 + f(pc0)
lie on the points of pc1. The network is thrown away afterwards. It is only a *prior*: an MLP finds it easier to move
neighbours alike than apart, so the flow comes out smooth, as the motion of rigid things is.

Points are (N, 3) float32 in metres, in the ego frame of sweep 0; flow is the residual displacement after ego-motion,
from sweep 0 to sweep 1; row i of the flow belongs to row i of pc0. The caller removes ground and crops (ZeroFlow: to
the student's grid); nothing is cut here. Works on the CPU and on CUDA, wherever pc0 lies. On a CPU, fit several pairs
side by side with one thread each (`torch.set_num_threads(1)`): the matrices are too small to gain from a second. On a
GPU, give several pairs at once to `estimate_flows`.

Three settings of the same code (TEACHERS):
  published  two networks of 128 wide, all points, truncated Chamfer distance both ways and the cycle back to sweep 0,
             constant rate with early stopping: ZeroFlow's teacher. Minutes a pair on a CPU, 26 s on the paper's GPU.
  chodosh    the same, and then every cluster of points moves rigidly (Chodosh et al., "Re-Evaluating LiDAR Scene Flow
             for Autonomous Driving", WACV 2024): the paper's second teacher.
  fast       four networks of 64 wide, a small batch of points a step, only the way from sweep 0 to sweep 1, cosine
             rate; then every cluster moves rigidly, as that network says whose motion sweep 1 confirms, or not at all.
             Seconds a pair on one core. Departs from the paper where `NSFPSettings` says so; README's results say
             what each departure is worth.
Code bases that are all called NSFP differ: the original stops at a change of 1e-4, others after 30 or 150 iterations
without improvement, or drop the cycle. `published` is what made ZeroFlow's labels.

This file needs torch, numpy and scipy, and none of its siblings.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import nn


@dataclass(frozen=True)
class NSFPSettings:
    """How to label one pair. The defaults are the `fast` teacher; the comments give the published one's values.

    Raises ValueError for settings that do not go together.
    """

    # The fit.
    hidden_channels: int = 64  # published: 128
    hidden_layers: int = 8
    input_scale: float = 0.3  # published: 1, raw metres. Smaller is smoother: the first ReLUs bend less per metre
    priors: int = 4  # networks fitted side by side, each from its own start and batches. Published: 1
    cycle: bool = False  # published: True, the inverse network, which must bring points home, and reverse terms
    batch_points: int = 256  # random points of pc0 a step and prior, 0 for all; published: 0
    draw_min: float = 0.05  # a point is drawn in proportion to its distance to the nearest of pc1, clamped to these ...
    draw_max: float = 0.3  # ... metres: what stands lies near one already, and has little to say
    iterations: int = 300  # published: at most 5,000, of which some 300 to 500 are used
    learning_rate: float = 8e-3  # of Adam, without weight decay
    cosine: bool = True  # 5 % warm-up, then down to 0. Published: False; a constant rate jumps out of good basins
    patience: int = 0  # iterations without improvement to stop after, keeping the best; 0: never. Published: 100
    min_improvement: float = 5e-5  # m², what counts as improvement
    truncation_sq: float = 2.0  # m²: a threshold for *squared* distances, so 1.41 m, not 2 m

    # The refinement, see `refine_flow`. Numbers from `cluster_reach` to `min_motion` are Chodosh et al.'s.
    refine: str = "sweep"  # "flow": clusters move rigidly; "sweep": and as sweep 1 confirms. Published: "", not at all
    cluster_reach: float = 0.4  # DBSCAN: two points closer than this are neighbours, ...
    cluster_points: int = 10  # ... and a point with so many, itself included, is the core of a cluster
    ransac_trials: int = 250  # of 3 points each; fewer where half of a cluster agrees
    inlier_reach: float = 0.2  # from where a motion takes a point to where the flow does
    min_motion: float = 0.05  # a cluster whose points move less, on average, stands still
    cluster_sample: int = 512  # points that speak for a cluster, 0 for all: six numbers need no more. chodosh: 0
    evidence: float = 1.7  # how many times less than standing still a motion must leave, in mean *squared* distance
    confirm_reach: float = 0.3  # a point farther than this from sweep 1 is not explained at all
    icp_steps: int = 3  # of fitting a cluster's motion to sweep 1 itself

    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.iterations, self.priors, self.hidden_layers, self.ransac_trials) < 1 or self.batch_points < 0:
            raise ValueError(
                "iterations, priors, hidden_layers and ransac_trials must be positive, batch_points not below 0"
            )
        if not 0 < self.draw_min <= self.draw_max:
            raise ValueError(f"draw_min {self.draw_min} and draw_max {self.draw_max}: needs 0 < draw_min <= draw_max")
        if self.refine not in ("", "flow", "sweep"):
            raise ValueError(f"refine {self.refine!r}: choose flow, sweep or nothing")
        if self.batch_points and (self.cycle or self.patience):
            raise ValueError("cycle and patience look at all points; they need batch_points 0")
        if self.priors != 1 and (self.refine != "sweep" or not self.batch_points):
            raise ValueError("of several priors, sweep 1 chooses; they need refine sweep, and batch_points")


_PUBLISHED = NSFPSettings(
    hidden_channels=128,
    input_scale=1.0,
    priors=1,
    cycle=True,
    batch_points=0,
    iterations=5000,
    cosine=False,
    patience=100,
    refine="",
)
TEACHERS = {
    "fast": NSFPSettings(),
    "published": _PUBLISHED,
    "chodosh": replace(_PUBLISHED, refine="flow", cluster_sample=0),
}


def estimate_flow(pc0: torch.Tensor, pc1: torch.Tensor, settings: NSFPSettings = TEACHERS["fast"]) -> torch.Tensor:
    """Residual flow (N, 3) float32 of every point of pc0 (N, 3), given pc1 (M, 3). On a CPU, same seed, same flow.

    An empty pc0 gives an empty flow; an empty pc1 offers nothing to match, so the flow is zero. A fit that diverged
    gives a flow that is not finite, or absurdly long. Raises ValueError for another shape or dtype, or coordinates that
    are not finite.
    """
    return estimate_flows([pc0], [pc1], settings)[0]


def estimate_flows(
    pc0s: Sequence[torch.Tensor], pc1s: Sequence[torch.Tensor], settings: NSFPSettings = TEACHERS["fast"]
) -> list[torch.Tensor]:
    """`estimate_flow` of several pairs. With `batch_points`, all are fitted side by side, which a GPU is there for."""
    for name, clouds in (("pc0", pc0s), ("pc1", pc1s)):
        for points in clouds:
            if points.ndim != 2 or points.shape[1] != 3 or points.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {points.dtype} of shape {tuple(points.shape)}; expected float32 (N, 3), metres"
                )
            if not points.isfinite().all():
                raise ValueError(f"{name} has coordinates that are NaN or infinite; cut those rows first")
    result = [torch.zeros_like(pc0) for pc0 in pc0s]
    filled = [i for i, (pc0, pc1) in enumerate(zip(pc0s, pc1s, strict=True)) if len(pc0) and len(pc1)]
    groups = [filled] if settings.batch_points and filled else [[i] for i in filled]
    for group in groups:
        fitted = _fit([pc0s[i] for i in group], [pc1s[i] for i in group], settings)
        for i, flows in zip(group, fitted, strict=True):  # (K, N, 3), one of each prior
            if not flows.isfinite().all():
                result[i] = torch.full_like(pc0s[i], torch.nan)
            elif settings.refine:
                result[i] = refine_flow(pc0s[i], flows, pc1s[i] if settings.refine == "sweep" else None, settings)
            else:
                result[i] = flows[0]
    return result


# --- The fit ---------------------------------------------------------------------------------------------------------


def _fit(pc0s: list[torch.Tensor], pc1s: list[torch.Tensor], settings: NSFPSettings) -> list[torch.Tensor]:
    """For each pair the flows (K, N, 3) of its K priors. No value is waited for in the loop, except for `patience`."""
    forward = NeuralPriors(len(pc0s), settings).to(pc0s[0].device)
    inverse = copy.deepcopy(forward) if settings.cycle else None  # starts as a copy, as published
    networks = nn.ModuleList([forward, inverse] if settings.cycle else [forward])
    optimizer = torch.optim.Adam(networks.parameters(), lr=settings.learning_rate, fused=True)
    targets = [Neighbours(pc1) for pc1 in pc1s]  # no cloud moves: one tree each for the whole fit
    home = Neighbours(pc0s[0]) if settings.cycle else None
    everyone = torch.cat(pc0s)
    batches = _draw_batches(pc0s, targets, settings) if settings.batch_points else None  # (iterations, P, B)
    best_loss = best_forward_loss = math.inf
    best_flow, best_iteration = torch.zeros_like(everyone)[None], 0

    for iteration in range(settings.iterations):
        points = everyone[batches[iteration]] if settings.batch_points else everyone[None]  # (P, B, 3)
        flow = forward(points)
        moved = points + flow
        if settings.cycle:
            forward_loss = truncated_chamfer(moved[0], targets[0], settings.truncation_sq)
            back = moved - inverse(moved)
            loss = forward_loss + truncated_chamfer(back[0], home, settings.truncation_sq)
        else:  # the sum over priors of a mean over points: no prior feels another
            by_pair = zip(moved.split(settings.priors), targets, strict=True)
            distance_sq = [truncated_sq_distance(m.flatten(0, 1), t, settings.truncation_sq) for m, t in by_pair]
            loss = torch.cat(distance_sq).sum() / points.shape[1]

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
        return [best_flow]
    with torch.no_grad():
        return [torch.cat([forward(part, pair) for part in pc0.split(1024)], 1) for pair, pc0 in enumerate(pc0s)]


def _draw_batches(pc0s: list[torch.Tensor], targets: list[Neighbours], settings: NSFPSettings) -> torch.Tensor:
    """(iterations, P, B) rows of the concatenated pc0s: the random points that each prior sees at each step.

    Most points stand still and lie near a point of pc1 as they are: uniform batches hold few points that move. So a
    point counts by its distance to pc1, within bounds. What has no neighbour in reach feels no pull and counts least.
    """
    reach, first, rows = math.sqrt(settings.truncation_sq), 0, []
    for pc0, target in zip(pc0s, targets, strict=True):
        generator = torch.Generator(pc0.device).manual_seed(settings.seed)
        weight = target.distance(pc0, reach, beyond=0.0).clamp(settings.draw_min, settings.draw_max)
        count = settings.iterations * settings.priors * settings.batch_points
        drawn = torch.multinomial(weight, count, replacement=True, generator=generator)
        rows.append(first + drawn.view(settings.iterations, settings.priors, settings.batch_points))
        first += len(pc0)
    return torch.cat(rows, dim=1)


def _learning_rate(iteration: int, settings: NSFPSettings) -> float:
    if not settings.cosine:
        return settings.learning_rate
    warm_up = min(1.0, (iteration + 1) / (0.05 * settings.iterations))
    return settings.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations))


class NeuralPriors(nn.Module):
    """K MLPs with ReLUs for each of several pairs, side by side: P = pairs x K. PyTorch's own initialisation.

    The start depends on the seed alone, is the same for every pair, and leaves the caller's random state alone.
    """

    def __init__(self, pairs: int, settings: NSFPSettings):
        super().__init__()
        self.input_scale, self.priors = settings.input_scale, settings.priors
        widths = [3] + [settings.hidden_channels] * settings.hidden_layers + [3]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.seed)
            mlps = [[nn.Linear(*width) for width in itertools.pairwise(widths)] for _ in range(settings.priors)]
        layers = list(zip(*mlps, strict=True))
        self.weights = nn.ParameterList(torch.stack([mlp.weight.T for mlp in ls] * pairs).detach() for ls in layers)
        self.biases = nn.ParameterList(torch.stack([mlp.bias[None] for mlp in ls] * pairs).detach() for ls in layers)

    def forward(self, points: torch.Tensor, pair: int | None = None) -> torch.Tensor:
        """Flow (P, B, 3) of positions (P, B, 3) in metres; or (K, B, 3) of (B, 3) by the K priors of one pair."""
        rows = slice(None) if pair is None else slice(pair * self.priors, (pair + 1) * self.priors)
        x = points * self.input_scale
        x = x if pair is None else x.expand(self.priors, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias[rows], x if i == 0 else x.relu(), weight[rows])
        return x


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
    partner, is_found = target.partners(queries, max_distance=math.sqrt(truncation_sq))
    distance_sq = (queries - partner).square().sum(dim=1)
    return torch.where(is_found & (distance_sq < truncation_sq), distance_sq, 0.0)


class Neighbours:
    """Exact nearest neighbours in a cloud: a k-d tree on the CPU, brute force in chunks on a GPU.

    The search itself is not differentiated: with the partner fixed, the gradient of the distance is the right one
    almost everywhere.
    """

    def __init__(self, points: torch.Tensor):
        self.points = points  # (M, 3)
        self.tree = cKDTree(_finite(points)) if points.device.type == "cpu" else None

    @torch.no_grad()
    def nearest(self, queries: torch.Tensor, max_distance: float = math.inf) -> torch.Tensor:
        """(N,) int64: row of the nearest point for each query (N, 3); M where none is closer than `max_distance`."""
        bound = max_distance * (1 + 1e-6)  # the caller's own float32 comparison decides on the border
        if self.tree is None:
            return nearest_by_brute_force(queries, self.points, bound)
        _, index = self.tree.query(_finite(queries), distance_upper_bound=bound, workers=torch.get_num_threads())
        return torch.from_numpy(index)

    def partners(self, queries: torch.Tensor, max_distance: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest point (N, 3) for each query (N, 3); (N,) bool: whether it is closer than the maximum."""
        row = self.nearest(queries, max_distance)
        return self.points[row.clamp(max=len(self.points) - 1)], row < len(self.points)

    def distance(self, queries: torch.Tensor, max_distance: float, beyond: float) -> torch.Tensor:
        """(N,) distance to the nearest point for each query (N, 3); `beyond` where none is closer than the maximum."""
        partner, is_found = self.partners(queries, max_distance)
        distance = (queries - partner).norm(dim=1)
        return torch.where(is_found & (distance < max_distance), distance, beyond)


def _finite(points: torch.Tensor) -> np.ndarray:
    """For SciPy, which takes no NaN: the points of a fit that diverged are far from everything, as on a GPU."""
    return np.nan_to_num(points.detach().numpy(), nan=1e30)


def nearest_by_brute_force(
    queries: torch.Tensor, points: torch.Tensor, max_distance: float = math.inf, chunk: int = 2**26
) -> torch.Tensor:
    """As `Neighbours.nearest`, by looking at all points, at most `chunk` distances at a time. Never waits for a GPU.

    |q|² + |p|² - 2qp is one matrix product. It cancels, and in float32 is coarse 50 m from the origin; so in float64.
    """
    points, rows = points.double(), []
    length_sq = points.square().sum(dim=1)
    for part in queries.double().split(max(1, chunk // len(points))):
        nearest_sq, row = torch.addmm(length_sq, part, points.T, alpha=-2).min(dim=1)  # of (n, M), |q|² still to come
        is_found = nearest_sq + part.square().sum(dim=1) < max_distance**2
        rows.append(torch.where(is_found, row, len(points)))
    return torch.cat(rows)


# --- The refinement --------------------------------------------------------------------------------------------------
# A motion is (3, 4): a rotation beside a translation, about the origin. All of it is float64, and on the CPU.


def refine_flow(
    pc0: torch.Tensor,
    flow: torch.Tensor,
    pc1: torch.Tensor | None = None,
    settings: NSFPSettings = TEACHERS["fast"],
) -> torch.Tensor:
    """Flow (N, 3) by which each cluster of pc0 (N, 3) moves as a rigid thing; works on any flow (N, 3).

    Without pc1, as Chodosh et al.: a rigid motion is fitted to each cluster's flow by RANSAC; a motion under
    `min_motion` becomes none; points in no cluster keep their flow. Theirs measures a motion by its translation about
    the *origin*, which a small rotation makes large far away; here it is the mean displacement of the points.

    With pc1 (M, 3), `flow` may be several candidates (K, N, 3), and sweep 1 decides: each candidate's motion is drawn
    to the points of pc1 (ICP), and the one that takes the cluster closest to them wins, if it does so `evidence` times
    better than standing still. A point in no cluster is then a cluster of its own.

    Raises ValueError for points or flow that are not finite.
    """
    if not all(x is None or x.isfinite().all() for x in (pc0, flow, pc1)):
        raise ValueError("points or flow to refine are NaN or infinite; cut those rows first")
    if len(pc0) == 0 or (pc1 is not None and len(pc1) == 0):
        return torch.zeros_like(pc0)  # nothing to move, or nothing that could confirm a motion
    flows = flow.detach().cpu().double().reshape(-1, *pc0.shape)
    points = pc0.detach().cpu().double()
    cluster = find_clusters(points, settings.cluster_reach, settings.cluster_points)
    if pc1 is not None:
        is_alone = cluster < 0
        cluster[is_alone] = cluster.max() + 1 + torch.arange(int(is_alone.sum()))
    members = (cluster >= 0).nonzero()[:, 0]
    if len(members) == 0:  # without pc1 only
        return flows[0].to(pc0)
    spokesmen = _sample_of_each(cluster, members, settings)
    c, p = cluster[spokesmen], points[spokesmen]
    candidates = [motions_by_ransac(p, p + candidate[spokesmen], c, settings) for candidate in flows]
    motion = candidates[0] if pc1 is None else _confirmed_motions(p, candidates, c, pc1, settings)

    displacement = move(points[members], motion, cluster[members]) - points[members]
    stands = mean_by_cluster(displacement.norm(dim=1), cluster[members]) < settings.min_motion
    displacement[stands[cluster[members]]] = 0.0
    result = flows[0].clone()
    result[members] = displacement
    return result.to(pc0)


def find_clusters(points: torch.Tensor, reach: float, min_points: int) -> torch.Tensor:
    """DBSCAN (Ester et al., 1996): (N,) int64, clusters numbered from 0, and -1 for points in none.

    A core has `min_points` points within `reach`, itself included. Cores within reach of each other share a cluster;
    any other point joins that of its nearest core in reach. Memory goes with the pairs of neighbours, so with the
    square of the density: 2.5 million for the 60,769 points of a real Argoverse sweep.
    """
    points = points.numpy()
    distance, _ = cKDTree(points).query(points, [min_points], distance_upper_bound=reach)  # (N, 1), inf if too few
    is_core = np.isfinite(distance[:, 0])
    cluster = np.full(len(points), -1)
    if is_core.any():
        cores = cKDTree(points[is_core])
        a, b = cores.query_pairs(reach, output_type="ndarray").T
        links = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(cores.n, cores.n))
        _, cluster[is_core] = connected_components(links, connection="weak")
        distance, nearest = cores.query(points[~is_core], distance_upper_bound=reach)
        of_cores = np.append(cluster[is_core], -1)  # the row of "none in reach" comes last
        cluster[~is_core] = of_cores[nearest]
    return torch.from_numpy(cluster)


def _sample_of_each(cluster: torch.Tensor, members: torch.Tensor, settings: NSFPSettings) -> torch.Tensor:
    """Rows of at most `cluster_sample` random members of each cluster."""
    if not settings.cluster_sample:
        return members
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(settings.seed))
    shuffled = members[order]
    shuffled = shuffled[cluster[shuffled].argsort(stable=True)]  # by cluster, and at random within
    size = cluster[members].bincount()
    place = torch.arange(len(members)) - (size.cumsum(0) - size)[cluster[shuffled]]
    return shuffled[place < settings.cluster_sample]


def motions_by_ransac(
    points: torch.Tensor, moved: torch.Tensor, cluster: torch.Tensor, settings: NSFPSettings
) -> torch.Tensor:
    """(C, 3, 4): for each cluster the rigid motion that takes most of its points (N, 3) to where the flow does.

    Each trial fits three random points of every cluster in which no motion has yet found half of the points; the last
    fit is one to all inliers of the best.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    size = cluster.bincount()
    rows_by_cluster, first = cluster.argsort(stable=True), size.cumsum(0) - size
    best = torch.zeros(len(size), dtype=torch.float64)  # inliers
    motion = torch.eye(3, 4, dtype=torch.float64).repeat(len(size), 1, 1)

    def is_inlier(rows: torch.Tensor, motion: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
        """(R,) 1 for those rows that the motion of their cluster takes to where the flow does, else 0; float64."""
        distance_sq = (move(points[rows], motion, cluster) - moved[rows]).square().sum(dim=1)
        return (distance_sq < settings.inlier_reach**2).double()

    open_ = torch.arange(len(size))  # (O,) the clusters still tried ...
    everyone = torch.arange(len(points))
    rows, slot = everyone, cluster  # ... their points, and which of the O each belongs to
    for _ in range(settings.ransac_trials):
        three = (torch.rand(len(open_), 3, generator=generator) * size[open_][:, None]).long()
        three = rows_by_cluster[first[open_][:, None] + three].flatten()  # (3 O,)
        trial = rigid_motions(points[three], moved[three], torch.arange(len(open_)).repeat_interleave(3))
        inliers = slot.bincount(is_inlier(rows, trial, slot))
        is_better = inliers > best[open_]
        best[open_[is_better]], motion[open_[is_better]] = inliers[is_better], trial[is_better]
        stays = best[open_] < 0.5 * size[open_]
        if not stays.any():
            break
        renumbered, kept = stays.cumsum(0) - 1, stays[slot]
        open_, rows, slot = open_[stays], rows[kept], renumbered[slot[kept]]
    final = rigid_motions(points, moved, cluster, is_inlier(everyone, motion, cluster))
    return torch.where((best >= 3)[:, None, None], final, motion)


def _confirmed_motions(
    points: torch.Tensor,
    candidates: list[torch.Tensor],
    cluster: torch.Tensor,
    pc1: torch.Tensor,
    settings: NSFPSettings,
) -> torch.Tensor:
    """(C, 3, 4): of the candidates, each drawn to sweep 1, what explains it best for each cluster; else no motion."""
    target, reach = Neighbours(pc1.detach().cpu().double()), settings.confirm_reach

    def mismatch(motion: torch.Tensor) -> torch.Tensor:
        """(C,) mean squared distance to sweep 1; to leave everything behind explains nothing, and costs the most."""
        distance = target.distance(move(points, motion, cluster), reach, beyond=reach)
        return mean_by_cluster(distance.square(), cluster)

    best_motion = torch.eye(3, 4, dtype=torch.float64).expand_as(candidates[0])
    best = mismatch(best_motion) / settings.evidence
    for motion in candidates:
        for _ in range(settings.icp_steps):
            partner, is_found = target.partners(move(points, motion, cluster), reach)
            drawn = rigid_motions(points, partner, cluster, is_found.double())
            is_fixed = cluster.bincount(is_found.double()) >= settings.cluster_points
            motion = torch.where(is_fixed[:, None, None], drawn, motion)
        left = mismatch(motion)
        best_motion = torch.where((left < best)[:, None, None], motion, best_motion)
        best = torch.minimum(left, best)
    return best_motion


def rigid_motions(
    points: torch.Tensor, moved: torch.Tensor, cluster: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """(C, 3, 4): the rigid motion of each cluster that takes its points (N, 3) nearest to `moved` (N, 3), by Kabsch.

    weight (N,): of the squared distances; a cluster without any gets no translation.
    """
    weight = torch.ones(len(points), dtype=torch.float64) if weight is None else weight
    centre, moved_centre = (mean_by_cluster(x, cluster, weight) for x in (points, moved))  # (C, 3)
    outer = (points - centre[cluster])[:, :, None] * (moved - moved_centre[cluster])[:, None, :]  # (N, 3, 3)
    u, _, vh = torch.linalg.svd(mean_by_cluster(outer.flatten(1), cluster, weight).view(-1, 3, 3))
    no_mirror = torch.ones(len(centre), 3, dtype=torch.float64)
    no_mirror[:, 2] = torch.linalg.det(u @ vh).sign()
    rotation = vh.mT @ (no_mirror[:, :, None] * u.mT)
    return torch.cat([rotation, moved_centre[:, :, None] - rotation @ centre[:, :, None]], dim=2)


def move(points: torch.Tensor, motion: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
    """Points (N, 3), each by the motion (C, 3, 4) of its cluster (N,)."""
    each = motion[cluster]
    return (each[:, :, :3] @ points[:, :, None])[:, :, 0] + each[:, :, 3]


def mean_by_cluster(values: torch.Tensor, cluster: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """(C,) or (C, D): the mean of values (N,) or (N, D) float64 over each cluster; 0 where there is no weight."""
    weight = torch.ones(len(values), dtype=torch.float64) if weight is None else weight
    total = cluster.bincount(weight)
    weight, total = (x.view(-1, *[1] * (values.ndim - 1)) for x in (weight, total))
    sums = values.new_zeros(len(total), *values.shape[1:]).index_add_(0, cluster, weight * values)
    return sums / total.clamp(min=1e-12)
