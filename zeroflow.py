"""ZeroFlow on one page: scene flow by distillation (Vedder et al., ICLR 2024, arXiv 2305.10424).

Scene flow is the 3D motion of every LiDAR point between two sweeps. People who label it by hand
are slow and expensive, so ZeroFlow lets a machine do it, in four steps:

  1. label     A slow teacher (nsfp.py) is optimized from scratch on each pair of sweeps and needs
               no human labels. Its flow is written down as the pair's *pseudo-label*.
  2. loss      A fast student (fastflow3d.py) learns to predict these pseudo-labels in one pass.
               The loss weighs fast points more than slow ones; there are few of them.
  3. flow      The trained student replaces the teacher: milliseconds instead of minutes per pair.
  4. score     Both are compared with true flow, by groups of points (metrics.py).

`distill` puts the first two steps together; the other functions follow in the order of the steps.
They take tensors and return tensors; files, processes and command-line options are elsewhere.

Points are (N, 3) float32 in meters, in the ego frame of sweep 0 (x forward, y left, z up). Flow is
the *residual* displacement after ego-motion compensation, from sweep 0 to sweep 1. Row i of a flow
belongs to row i of `pc0`, ground included. A point that got no estimate has residual flow 0: it
moves with the ego-motion.

All steps see the same points: those that are not ground and lie in the student's grid
(`data.input_masks`), so that a teacher and a student are compared on the same points.
"""

from __future__ import annotations

import os
import sys

# torch's threads wait for each other by spinning. If another process is busy, too, this takes the
# core that the awaited thread needs. This lets them sleep; it works only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# In a file or a log, a progress bar is one line per minute. This works only before tqdm is loaded.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "60")

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import clouds
import data
import fastflow3d
import metrics
import nsfp
from data import DataError, PairKey, SweepPair

# The grid of the published student: it sees points with |x|, |y| < 51.2 m and |z| < 3 m.
GRID = data.GRID_HALF_EXTENT_M
Grid = Sequence[float]  # half extents in x, y and z

# --- The method -----------------------------------------------------------------------------------


def distill(
    pairs: Sequence[SweepPair],
    teacher: nsfp.NSFPSettings = nsfp.TEACHERS["fast"],
    student: fastflow3d.FastFlow3DSettings = fastflow3d.MODELS["normal"],
    steps: int = 1000,
    learning_rate: float = 2e-3,
) -> fastflow3d.FastFlow3D:
    """ZeroFlow for a handful of pairs in memory: the whole method, without any scaffolding.

    Returns the trained student in evaluation mode. train.py does the same at full scale, with
    labels on disk, batches, several GPUs and checkpoints.
    """
    # The teacher looks at each pair on its own, for as long as it needs, and only once.
    labels = make_labels(pairs, teacher, student.half_extent_m)

    # The student sees all pairs again and again. What the teacher got wrong differs from pair to
    # pair and averages out; what it got right is the same everywhere and is learned.
    model = fastflow3d.FastFlow3D(student).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(steps):
        pair, label = pairs[step % len(pairs)], labels[step % len(pairs)]
        is_source = ~pair.is_ground0
        flows, is_in_grid = model([pair.pc0[is_source]], [pair.pc1[~pair.is_ground1]])

        mask = label.has_flow[is_source] & is_in_grid[0]
        loss = distillation_loss(flows, [label.flow[is_source]], [mask], seconds=[pair.seconds])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


# --- Step 1: the teacher labels pairs -------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """A teacher's flow for one pair."""

    key: PairKey
    flow: torch.Tensor  # (N0, 3) float32, meters, residual; 0 where there is no estimate
    has_flow: torch.Tensor  # (N0,) bool, the points that the teacher saw: `data.input_masks`
    settings: dict  # the teacher's settings and the grid: `label_settings`
    loss: float  # mean truncated squared distance (m²) from the moved points to sweep 1
    seconds: float  # how long this pair took
    fingerprint: str  # of what the teacher was given: `SweepPair.fingerprint`
    # (N0,) float32: how much better than no motion a motion explains sweep 1; NaN if not known.
    gain: torch.Tensor  # See `nsfp.TeacherFlow`.


def label_settings(settings: nsfp.NSFPSettings, half_extent_m: Grid = GRID) -> dict:
    """Everything that decides how a label comes out: the teacher's settings and the grid."""
    # A list of floats is what JSON gives back, so stored settings can be compared with new ones.
    grid = [float(half) for half in half_extent_m]
    return {**dataclasses.asdict(settings), "half_extent_m": grid}


def make_labels(
    pairs: Sequence[SweepPair],
    settings: nsfp.NSFPSettings,
    half_extent_m: Grid = GRID,
    device: str = "cpu",
) -> list[Label]:
    """Run the teacher on each pair and return its flow as pseudo-labels.

    half_extent_m: the student's grid. A fit may diverge: call `check_label` on the results.
    """
    start = time.perf_counter()

    # The teacher gets exactly the points that the student will see: no ground, inside the grid.
    # Several pairs at once are fitted side by side, which is what keeps a GPU busy.
    masks = [data.input_masks(pair, half_extent_m) for pair in pairs]
    pc0s, pc1s = [], []
    for pair, (has_flow, is_target) in zip(pairs, masks, strict=True):
        pc0s.append(pair.pc0[has_flow].to(device))
        pc1s.append(pair.pc1[is_target].to(device))

    lidar1s = [pair.lidar1 for pair in pairs]
    estimates = nsfp.estimate_flows(pc0s, pc1s, settings, lidar1s)
    seconds = (time.perf_counter() - start) / max(1, len(pairs))

    labels = []
    for i, pair in enumerate(pairs):
        # Row i of the label belongs to row i of sweep 0, so the estimate is put back into its rows.
        has_flow, _ = masks[i]
        flow, gain = torch.zeros_like(pair.pc0), torch.full_like(pair.pc0[:, 0], torch.nan)
        flow[has_flow], gain[has_flow] = estimates[i].flow.cpu(), estimates[i].gain.cpu()

        # How well does the flow take sweep 0 onto sweep 1? This is computed the same way for every
        # teacher, so it can be compared between teachers. Without points there is no distance.
        loss = 0.0
        if len(pc0s[i]) and len(pc1s[i]):
            moved, target = pc0s[i] + estimates[i].flow, nsfp.Neighbors(pc1s[i])
            distance_sq = nsfp.truncated_sq_distance(moved, target, settings.truncation_sq)
            loss = distance_sq.mean().item()

        about = (label_settings(settings, half_extent_m), loss, seconds, pair.fingerprint)
        labels.append(Label(pair.key, flow, has_flow, *about, gain))
    return labels


def check_label(label: Label) -> None:
    """Raise DataError for the flow of a fit that diverged: not finite, or as long as the grid."""
    # The loss cannot tell. Distances beyond the truncation cost nothing, so a fit that has thrown
    # its points far away may even have the lowest loss.
    if not is_plausible(label.flow, label.settings["half_extent_m"]):
        raise DataError(
            f"{tuple(label.key)}: the fit diverged; try a smaller learning rate or another seed"
        )


def is_plausible(flow: torch.Tensor, half_extent_m: Grid) -> bool:
    """Is a flow (N, 3) finite, and everywhere shorter than the grid?"""
    return bool(plausible_rows(flow, half_extent_m).all())


def plausible_rows(flow: torch.Tensor, half_extent_m: Grid) -> torch.Tensor:
    """(N,) bool: is the flow (N, 3) of a point finite, and shorter than the grid?"""
    # Written so that a NaN, for which every comparison is False, is not plausible.
    return (flow.abs() < 2 * max(half_extent_m)).all(dim=1)


# --- Step 2: the loss of the student --------------------------------------------------------------


def speed_weight(speed_mps: torch.Tensor, kind: str = "formula") -> torch.Tensor:
    """The weight of a point in the loss, given the speed of its label in m/s; same shape.

    kind: "formula", as in the paper; "published", as in the published code; "none".
    """
    # The paper: max(0.1, min(1, 1.8 s - 0.8)), 0.1 below 0.5 m/s and 1 above 1 m/s. Most points
    # are static; without weights their small errors would hide the large ones of moving points.
    if kind == "formula":
        return (1.8 * speed_mps - 0.8).clamp(0.1, 1.0)

    # The published code has min and max the wrong way round, which gives 0.1 at every speed. A
    # constant factor hardly changes what Adam does: it in effect trains without any weighting.
    if kind == "published":
        return torch.full_like(speed_mps, 0.1)
    if kind == "none":
        return torch.ones_like(speed_mps)
    raise ValueError(f"speed weight {kind!r}: choose formula, published or none")


def distillation_loss(
    estimates: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    weight: str = "formula",
    point_weights: Sequence[torch.Tensor] | None = None,
    seconds: Sequence[float] | None = None,
    squared: bool = False,
) -> torch.Tensor:
    """The paper's loss for a batch, a scalar in meters: a sum over samples, a mean over points.

    estimates, labels: lists of (N, 3); masks: list of (N,) bool, the rows that count; a sample
    without any contributes 0. weight: see `speed_weight`. point_weights: list of (N,), which are
    multiplied with it. With `weight` "none", and point weights of 0.1 for background and 1 for the
    rest, this is FastFlow3D's loss. seconds: between the two sweeps of each sample (None: 0.1).
    squared: square each error, to see what the paper gains by not doing so.
    """
    total = estimates[0].new_zeros(())
    for i, (estimate, label, mask) in enumerate(zip(estimates, labels, masks, strict=True)):
        # Of many labels for alike points, the estimate with the least total *distance* is their
        # median, and the one with the least total of squares is their mean. A mean follows every
        # label that is far off; a median does not care how far off it is.
        error = (estimate[mask] - label[mask]).norm(dim=1)  # (N,) meters
        error = error.square() if squared else error

        # Flow is meters from one sweep to the next. The paper's sweeps come ten times per second;
        # at another rate, the same flow is another speed.
        rate_hz = metrics.SWEEPS_PER_S if seconds is None else 1 / seconds[i]
        speed_mps = rate_hz * label[mask].norm(dim=1)
        weights = speed_weight(speed_mps, weight)
        if point_weights is not None:
            weights = weights * point_weights[i][mask]

        # sum(w · |estimate - label|) / N: divided by the number of points, as in the paper, and
        # not by the sum of the weights.
        total = total + (weights * error).sum() / max(1, len(error))
    return total


# --- Step 3: the student estimates flow -----------------------------------------------------------

# The readable network, or the same function in its fast form (inference.FastFlow3DInference).
Student = torch.nn.Module


def predict(
    model: Student,
    pc0: np.ndarray | torch.Tensor,
    pc1: np.ndarray | torch.Tensor,
    ego1_SE3_ego0: np.ndarray | torch.Tensor | None = None,
    is_ground0: np.ndarray | torch.Tensor | None = None,
    is_ground1: np.ndarray | torch.Tensor | None = None,
    total: bool = False,
) -> np.ndarray | torch.Tensor:
    """Residual flow (N0, 3) float32 in meters for every row of pc0 (N0, 3), given pc1 (N1, 3).

    ego1_SE3_ego0 (4, 4): with it, each cloud is in its own ego frame; without it, both clouds are
    already in the same frame. is_ground0 (N0,), is_ground1 (N1,) bool: without them nothing counts
    as ground. total: return the raw flow, ego-motion included, instead.
    Ground, NaN and points outside the model's grid keep residual 0: they move with the ego-motion.
    Raises ValueError if shapes do not fit or the model is in training mode.
    """
    pair = clouds.pair_of_clouds(pc0, pc1, ego1_SE3_ego0, is_ground0, is_ground1)
    flow, _ = student_flow(model, pair)
    if total:
        flow = data.total_flow(flow, pair)

    # An array gives an array; a tensor gives a tensor on the same device.
    return flow.to(pc0.device) if isinstance(pc0, torch.Tensor) else flow.numpy()


@torch.no_grad()
def student_flow(model: Student, pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's flow (N0, 3), and has_flow (N0,): not ground and in its grid; on the CPU."""
    if model.training:
        raise ValueError(
            "the student is in training mode; call model.eval() or model.prepare_inference()"
        )
    device = next(model.parameters()).device

    # The student removes points outside its grid by itself, but has never seen ground.
    is_source = ~pair.is_ground0
    pc0, pc1 = pair.pc0[is_source].to(device), pair.pc1[~pair.is_ground1].to(device)
    flows, is_in_grid = model([pc0], [pc1])

    flow, has_flow = torch.zeros_like(pair.pc0), torch.zeros_like(is_source)
    flow[is_source] = flows[0].cpu()
    has_flow[is_source] = is_in_grid[0].cpu()
    return flow, has_flow


# --- Step 4: teacher, student and baselines are scored --------------------------------------------


class Estimate(NamedTuple):
    """What a method estimates for one pair."""

    flow: torch.Tensor  # (N0, 3) residual, on the CPU
    seconds: float  # how long it took
    is_dynamic: torch.Tensor | None = None  # (N0,) bool, if the method decides which points move


# Every method that can be scored is a function from a pair to an estimate.
Estimator = Callable[[SweepPair], Estimate]


def from_teacher(
    settings: nsfp.NSFPSettings, half_extent_m: Grid = GRID, device: str = "cpu"
) -> Estimator:
    """The teacher, fitted to every pair it is given."""

    def estimator(pair: SweepPair) -> Estimate:
        label = make_labels([pair], settings, half_extent_m, device)[0]
        check_label(label)
        return Estimate(label.flow, label.seconds)

    return estimator


def from_student(model: Student) -> Estimator:
    """A student, switched to evaluation mode, on the device where it is."""
    model.eval()
    return timed(lambda pair: student_flow(model, pair)[0], warm_up=True)


def from_baseline(name: str, half_extent_m: Grid = GRID) -> Estimator:
    """One of BASELINES by its name."""
    return timed(lambda pair: BASELINES[name](pair, half_extent_m), warm_up=True)


def no_motion(pair: SweepPair, half_extent_m: Grid = GRID) -> torch.Tensor:
    """Baseline: nothing moves except the ego, so the residual flow (N0, 3) is zero."""
    return torch.zeros_like(pair.pc0)


def nearest_neighbor(pair: SweepPair, half_extent_m: Grid = GRID) -> torch.Tensor:
    """Baseline: every point moves to the nearest point of sweep 1, however far; flow (N0, 3)."""
    is_source, is_target = data.input_masks(pair, half_extent_m)
    source, target = pair.pc0[is_source], pair.pc1[is_target]
    flow = torch.zeros_like(pair.pc0)
    if len(target):
        nearest = nsfp.Neighbors(target).nearest(source)
        flow[is_source] = target[nearest] - source
    return flow


BASELINES = {"no-motion": no_motion, "nearest": nearest_neighbor}


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    # Every metric of metrics.py by its name, in meters, pooled over the points of all pairs; and
    # `pairs`, `broken`, `seconds_per_pair` (the median).
    numbers: dict[str, float]

    # The grid three-way EPE of each pair alone, by its index in the data set.
    pair_three_ways: dict[int, float]


def evaluate(
    dataset: Sequence[SweepPair],
    estimator: Estimator,
    half_extent_m: Grid = GRID,
    challenge_mask: Callable[[SweepPair], torch.Tensor | None] | None = None,
    max_broken: float = 0.0,
) -> Evaluation:
    """Compare a method with the true flow of every pair of a data set.

    half_extent_m: the student's grid; the grid's and the paper's metrics ignore points outside it.
    challenge_mask: gives the (N0,) points that the 2023 challenge scores; without it the av2
    numbers are NaN. max_broken: the share of the pairs (of at least 100) that may be unreadable.
    Raises DataError for the pair that exceeds it, for a pair without true flow, and if no pair is
    left.
    """
    scores = metrics.Scores(data.CATEGORIES)
    seconds, pair_three_ways, broken = [], {}, 0
    progress = tqdm(range(len(dataset)), desc="evaluate", unit="pair", disable=len(dataset) < 2)
    for index in progress:
        try:
            pair = dataset[index]
            estimate = estimator(pair)
            mask = challenge_mask(pair) if challenge_mask else None
        except (DataError, OSError) as error:
            # One bad file must not stop the evaluation of a whole split, but many must.
            broken += 1
            if broken > max_broken * max(100, len(dataset)):
                raise _too_many_broken(error, broken, len(dataset)) from error
            print(f"left out: {error}", file=sys.stderr)
            continue

        _add_to(scores, pair, estimate, half_extent_m, mask)
        seconds.append(estimate.seconds)
        pair_three_ways[index] = scores.pair_three_ways[-1]

    if not seconds:
        raise DataError(f"none of {len(dataset)} pairs could be evaluated; the reasons are above")
    counts = {"pairs": len(seconds), "broken": broken}
    time_numbers = {"seconds_per_pair": float(np.median(seconds))}
    return Evaluation({**counts, **scores.numbers(), **time_numbers}, pair_three_ways)


def _too_many_broken(error: Exception, broken: int, pairs: int) -> DataError:
    more = f"; {broken} of {pairs} are broken so far, see --max-broken" if broken > 1 else ""
    return DataError(f"{error}{more}")


def _add_to(
    scores: metrics.Scores,
    pair: SweepPair,
    estimate: Estimate,
    half_extent_m: Grid,
    mask: torch.Tensor | None,
) -> None:
    """Add one pair to the scores. mask (N0,): the points of the 2023 challenge, if known."""
    if pair.flow is None:
        raise DataError(
            f"{tuple(pair.key)}: no true flow to compare with; "
            "evaluate a split with annotations.feather"
        )
    check_flow(estimate.flow, pair)

    # The 2023 challenge compares raw flow, ego-motion included; all other metrics, residual flow.
    raw = None
    if mask is not None:
        raw = data.total_flow(estimate.flow, pair), data.total_flow(pair.flow, pair)

    scores.add(
        estimate.flow,
        pair.flow,
        points=pair.pc0,
        category=pair.category,
        is_dynamic=pair.is_dynamic,
        is_valid=pair.is_valid,
        is_ground=pair.is_ground0,
        is_input=data.input_masks(pair, half_extent_m)[0],
        raw=raw,
        is_in_mask=mask,
        estimated_dynamic=estimate.is_dynamic,
    )


def check_flow(flow: torch.Tensor, pair: SweepPair) -> None:
    """Raise DataError if a flow (N0, 3) is not finite, or over 100 m long, at a point of pc0."""
    # NaN has no error: depending on the metric it would count as bad, as good, or not at all.
    is_lost = ~plausible_rows(flow, GRID) & pair.pc0.isfinite().all(dim=1)
    if is_lost.any():
        raise DataError(
            f"{tuple(pair.key)}: flow is not finite, or over 100 m long, at "
            f"{int(is_lost.sum())} points; did the training diverge?"
        )


def timed(estimate: Callable[[SweepPair], torch.Tensor], warm_up: bool = False) -> Estimator:
    """Turn a function from a pair to its flow into an Estimator that measures wall time.

    warm_up: call the function once before the first measurement; first calls are often slower.
    """
    is_cold = warm_up

    def estimator(pair: SweepPair) -> Estimate:
        nonlocal is_cold
        if is_cold:
            estimate(pair)
            is_cold = False
        start = time.perf_counter()
        flow = estimate(pair).cpu()  # on a GPU the clock stops when the flow has come back
        return Estimate(flow, time.perf_counter() - start)

    return estimator


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread."""
    # The teacher's matrices are too small to gain from a second thread, and the times of different
    # methods can be compared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# The headline numbers, our own metric first, then the paper's. FD, FS and BS are the errors of
# moving foreground, static foreground and background.
TABLE_COLUMNS = {
    "grid 3-way": "grid_three_way",
    "FD": "grid_three_way_fd",
    "FS": "grid_three_way_fs",
    "BS": "grid_three_way_bs",
    "EPE": "grid_epe",
    "pair mean": "grid_three_way_pair_mean",
    "paper 3-way": "paper_three_way",
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The headline numbers of several methods as text; rows: name -> `Evaluation.numbers`."""
    width = max(map(len, rows))
    headings = [f"{name:>11}" for name in [*TABLE_COLUMNS, "ms/pair"]]
    lines = [" ".join([" " * width, *headings])]
    for name, numbers in rows.items():
        cells = [f"{numbers[key]:11.4f}" for key in TABLE_COLUMNS.values()]
        milliseconds = f"{1e3 * numbers['seconds_per_pair']:11.1f}"
        lines.append(" ".join([f"{name:<{width}}", *cells, milliseconds]))
    return "\n".join(lines)


if __name__ == "__main__":
    import commands

    sys.exit(commands.main())
