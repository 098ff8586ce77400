"""The metrics: every number that papers on Argoverse 2 scene flow print, by a name that says how it is defined.

Errors are of flow estimated for the points of sweep 0, in metres; row i of everything is point i, in the ego frame of
sweep 0. "Three-way EPE" is always the mean of three groups' mean end-point errors, so that the many points that stand
still do not drown the few that move. But the field has three of it, over different points and groups:

  name            points                                        foreground            what moves
  paper           not ground, in the grid, |x|, |y| <= 35 m     pedestrians, vehicles 0.5 m/s or more
  av2             of the 2023 challenge's mask, flow valid      every label           av2's label: 5 cm or more
  three_way_2024  |x|, |y| < 35 m, |z| < 2.5 m, not ground,     pedestrians, wheeled, 5 cm or more
                  flow valid                                    cars, other vehicles
  grid            not ground, in the student's grid             every label           av2's label

`paper` is what ZeroFlow's published code computes (its background includes signs and cones, and it keeps points whose
object is gone in sweep 1); `av2` is `av2.evaluation.scene_flow.eval` of the av2 package, on raw flow; `three_way_2024`
and `bucketed` are those of the 2024 challenge, Khatri et al., "I Can't Believe It's Not Scene Flow!" (ECCV 2024);
`grid` is this project's own yardstick. All but av2's are of residual flow, for which only its relative accuracy and
angle differ: a rigid motion changes no distance.

Use `Scores`: `add` one sweep after the other, then `numbers`. Sums are float64, so means pool all points exactly,
however many sweeps. A group without points is NaN, never 0, and stays out of means.
This file needs torch, and none of its siblings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FD, FS, BS, NOT_COUNTED = 0, 1, 2, -1  # foreground dynamic, foreground static, background static
GROUPS = ("fd", "fs", "bs")
SWEEPS_PER_S = 10.0  # the nominal rate: speeds are 10 · displacement, whatever the pair's own time difference
DYNAMIC_M = 0.05  # an estimate that moves farther says "dynamic"
NEAR_M = 35.0  # everywhere in the field: |x| and |y|

# The classes of the 2024 challenge, whose names they are; the rest (signs, animals) is in none of them.
CLASSES = {
    "background": "NONE",
    "car": "REGULAR_VEHICLE",
    "pedestrian": "PEDESTRIAN STROLLER WHEELCHAIR OFFICIAL_SIGNALER",
    "wheeled_vru": "BICYCLE BICYCLIST MOTORCYCLE MOTORCYCLIST WHEELED_DEVICE WHEELED_RIDER",
    "other_vehicles": (
        "ARTICULATED_BUS BOX_TRUCK BUS LARGE_VEHICLE RAILED_VEHICLE SCHOOL_BUS TRUCK TRUCK_CAB VEHICULAR_TRAILER"
    ),
}
UNCLASSED = len(CLASSES)
# The paper's movers are the same but for two trailers, its background is what does not move by itself.
_PAPER_MOVERS = {"TRAFFIC_LIGHT_TRAILER", "MESSAGE_BOARD_TRAILER"}.union(
    *(names.split() for label, names in CLASSES.items() if label != "background")
)

PAPER_SPEEDS = {"below_0.5_mps": 0.0, "0.5_to_2_mps": 0.5, "above_2_mps": 2.0}  # name: lowest, of residual flow
RINGS_M = (0, 10, 20, 30, 40)  # of max(|x|, |y|), each up to the next, the last up to the grid's border
BUCKET_M = 0.04  # the 2024 challenge's buckets of motion a sweep: fifty of this width, and one for 2 m or more
BUCKETS = 51


# --- Points ----------------------------------------------------------------------------------------------------------


def point_scores(estimate: torch.Tensor, flow: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is averaged, for each point of estimated and true flow (N, 3), as av2 defines it: name -> (N,).

    epe: the end-point error in metres. acc_strict, acc_relaxed: is it below 5 (10) cm, or below 5 (10) % of the flow?
    angle_error_rad: between the space-time vectors (flow, 0.1 s), which have an angle where nothing moves, too.
    """
    difference = estimate - flow
    error, length, true_length = (x.norm(dim=1) for x in (difference, estimate, flow))
    tolerance = true_length.clamp(min=1)  # a share counts only where it allows more than metres do
    # For vectors (f, t), (g, t), |a| |b| sin is sqrt(|f x g|² + t² |f - g|²): exact for small angles, as acos is not.
    time_s = 1 / SWEEPS_PER_S
    sine = (torch.linalg.cross(difference, flow).norm(dim=1) ** 2 + (time_s * error) ** 2).sqrt()  # f x f is 0
    cosine = (length**2 + true_length**2 - error**2) / 2 + time_s**2
    return {
        "epe": error,
        "acc_strict": error < 0.05 * tolerance,
        "acc_relaxed": error < 0.1 * tolerance,
        "angle_error_rad": torch.atan2(sine, cosine),
    }


# --- Groups ----------------------------------------------------------------------------------------------------------


def grid_groups(category: torch.Tensor, is_dynamic: torch.Tensor, is_input: torch.Tensor) -> torch.Tensor:
    """(N,) int64 of category (N,) uint8, is_dynamic (N,) and is_input (N,): not ground and in the student's grid.

    Foreground is every labelled category, dynamic is av2's label (the residual is 5 cm or more).
    """
    groups = torch.where(category > 0, torch.where(is_dynamic, FD, FS), BS)
    return torch.where(is_input, groups, NOT_COUNTED)


def paper_groups(
    points: torch.Tensor, flow: torch.Tensor, category: torch.Tensor, is_input: torch.Tensor, names: Sequence[str]
) -> torch.Tensor:
    """(N,) int64, as ZeroFlow's published code: of the input, what has |x| and |y| at most 35 m.

    points (N, 3); flow (N, 3), the true one; category (N,) uint8, an index of `names`, Argoverse 2's. Movers are
    pedestrians and vehicles, split at 0.5 m/s; signs, cones and bollards count as background; animals are in no group.
    Points whose object is gone in sweep 1 (is_valid False) are *not* excluded.
    """
    is_mover, is_animal = (
        torch.tensor([name in group for name in names])[category.long()] for group in (_PAPER_MOVERS, ("ANIMAL", "DOG"))
    )
    is_fast = SWEEPS_PER_S * flow.norm(dim=1) >= 0.5
    groups = torch.where(is_mover, torch.where(is_fast, FD, FS), BS)
    is_near = (points[:, :2].abs() <= NEAR_M).all(dim=1)
    return torch.where(is_input & is_near & ~is_animal, groups, NOT_COUNTED)


def is_scored_2024(points: torch.Tensor, is_ground: torch.Tensor, is_valid: torch.Tensor) -> torch.Tensor:
    """(N,) bool: what the 2024 challenge looks at, near or far. points (N, 3); ground by ZeroFlow's rule (0.40 m)."""
    return ~is_ground & is_valid & (points.abs() < points.new_tensor([48, 48, 2.5])).all(dim=1)


class GroupMeans:
    """Means of named values in groups, numbered along some axes, over any number of sweeps."""

    def __init__(self, shape: Sequence[int], values: Sequence[str] = ("epe",)):
        self.counts = torch.zeros(*shape, dtype=torch.float64)
        self.sums = {name: torch.zeros_like(self.counts) for name in values}

    def add(self, group: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """group (N,) int64, an index of the flattened groups or NOT_COUNTED; values (N,), of which ours are taken."""
        bins, size = group + 1, self.counts.numel() + 1  # bin 0 takes what does not count
        self.counts += torch.bincount(bins, minlength=size)[1:].view_as(self.counts)
        for name, total in self.sums.items():
            total += torch.bincount(bins, values[name].double(), minlength=size)[1:].view_as(total)

    def mean(self, name: str = "epe", over: Sequence[int] = ()) -> torch.Tensor:
        """The means, with the groups along the axes `over` pooled; NaN for a group without points."""
        if not over:
            return self.sums[name] / self.counts
        return self.sums[name].sum(dim=over) / self.counts.sum(dim=over)


def mean_of_filled(means: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Along the last axis, the mean of the means of those groups that have points; NaN if none has.

    Not nanmean: the mean of a group in which an error is NaN is NaN, too, and that must not make a method better.
    """
    is_filled = counts > 0
    return torch.where(is_filled, means, 0.0).sum(dim=-1) / is_filled.sum(dim=-1)


def three_way(means: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """Of the means (3,) of FD, FS, BS: their mean over the groups that have points, and each; keys to be prefixed."""
    parts = {f"_{name}": mean.item() for name, mean in zip(GROUPS, means, strict=True)}
    return {"": mean_of_filled(means, counts).item(), **parts}


# --- Sweeps ----------------------------------------------------------------------------------------------------------


class Scores:
    """All metrics of one method, over any number of sweeps."""

    def __init__(self, names: Sequence[str]):
        """names: Argoverse 2's categories, in the order of their numbers, the background first."""
        self.names = names
        members = [names_of.split() for names_of in CLASSES.values()]
        class_of = {name: label for label, group in enumerate(members) for name in group}
        self.class_of = torch.tensor([class_of.get(name, UNCLASSED) for name in names])
        every = ("epe", "acc_strict", "acc_relaxed", "angle_error_rad")
        self.all = GroupMeans([1])
        self.grid = GroupMeans([3], every)
        self.paper = GroupMeans([3])
        self.av2 = GroupMeans([2, 2, 2], every)  # foreground or not, dynamic or not, close or far
        self.three_way_2024 = GroupMeans([2, 3])  # near or far; FD, FS, BS
        self.bucketed = GroupMeans([2, len(CLASSES), BUCKETS], ("epe", "speed"))  # near or far
        self.by_class = GroupMeans([len(CLASSES) + 1, len(PAPER_SPEEDS), 2], ("epe", "below_5_cm", "below_10_cm"))
        self.by_ring = GroupMeans([3, len(RINGS_M)])
        self.confusion = {
            name: torch.zeros(2, 2, dtype=torch.float64) for name in ("grid", "av2")
        }  # truly dynamic, said to be
        self.pair_three_ways: list[float] = []  # grid, of each sweep alone

    def add(
        self,
        estimate: torch.Tensor,
        flow: torch.Tensor,
        points: torch.Tensor,
        category: torch.Tensor,
        is_dynamic: torch.Tensor,
        is_valid: torch.Tensor,
        is_ground: torch.Tensor,
        is_input: torch.Tensor,
        raw: tuple[torch.Tensor, torch.Tensor] | None = None,
        is_in_mask: torch.Tensor | None = None,
        says_dynamic: torch.Tensor | None = None,
    ) -> None:
        """One sweep of N points: estimated and true residual flow, and where they were, (N, 3); category (N,) uint8.

        Masks (N,) bool: is_dynamic, av2's label; is_valid: the true flow is known; is_ground by ZeroFlow's rule;
        is_input: not ground and in the student's grid. raw: estimated and true flow with ego-motion, and is_in_mask,
        the 2023 challenge's points: without both, the av2 numbers stay NaN. says_dynamic: the method's own word;
        else, that its estimate is longer than 5 cm.
        """
        scores = point_scores(estimate, flow)
        speed = flow.norm(dim=1)
        scores |= {"speed": speed, "below_5_cm": scores["epe"] < 0.05, "below_10_cm": scores["epe"] < 0.1}
        distance = points[:, :2].abs().amax(dim=1)
        label = self.class_of[category.long()]
        if says_dynamic is None:
            says_dynamic = estimate.norm(dim=1) > DYNAMIC_M

        self.all.add(torch.where(is_valid & points.isfinite().all(dim=1), 0, NOT_COUNTED), scores)
        groups = grid_groups(category, is_dynamic, is_input)
        self.grid.add(groups, scores)
        self._confuse("grid", is_input, is_dynamic, says_dynamic)
        alone = GroupMeans([3])
        alone.add(groups, scores)
        self.pair_three_ways.append(mean_of_filled(alone.mean(), alone.counts).item())
        self.paper.add(paper_groups(points, flow, category, is_input, self.names), scores)

        ring = torch.bucketize(distance, points.new_tensor(RINGS_M[1:]), right=True)
        self.by_ring.add(torch.where(is_input, groups * len(RINGS_M) + ring, NOT_COUNTED), scores)
        lowest = torch.tensor(list(PAPER_SPEEDS.values())[1:])
        group = label * len(PAPER_SPEEDS) + torch.bucketize(SWEEPS_PER_S * speed, lowest, right=True)
        self.by_class.add(torch.where(is_input, group * 2 + (distance > NEAR_M), NOT_COUNTED), scores)

        is_far = (distance >= NEAR_M).long()
        is_scored = is_scored_2024(points, is_ground, is_valid) & (label < UNCLASSED)
        bucket = torch.bucketize(speed, torch.arange(1, BUCKETS) * BUCKET_M, right=True)
        group = (is_far * len(CLASSES) + label) * BUCKETS + bucket
        self.bucketed.add(torch.where(is_scored, group, NOT_COUNTED), scores)
        group = is_far * 3 + torch.where(label > 0, torch.where(speed >= DYNAMIC_M, FD, FS), BS)
        self.three_way_2024.add(torch.where(is_scored, group, NOT_COUNTED), scores)

        if raw is not None and is_in_mask is not None:
            is_scored = is_in_mask & is_valid
            group = ((category == 0).long() * 2 + ~is_dynamic) * 2 + (distance > NEAR_M)
            self.av2.add(torch.where(is_scored, group, NOT_COUNTED), point_scores(*raw))
            self._confuse("av2", is_scored, is_dynamic, says_dynamic)

    def _confuse(self, name: str, is_scored: torch.Tensor, is_dynamic: torch.Tensor, says: torch.Tensor) -> None:
        self.confusion[name] += torch.bincount(is_dynamic * 2 + says, is_scored.double(), minlength=4).view(2, 2)

    def numbers(self) -> dict[str, float]:
        """Everything, flat: keys say the definition first. NaN where there was nothing to measure."""
        result = {"epe": self.all.mean().item(), "points": int(self.grid.counts.sum())}
        for name in self.grid.sums:
            result[f"grid_{name}"] = self.grid.mean(name, over=[0]).item()
        pair_mean = (
            torch.tensor(self.pair_three_ways, dtype=torch.float64).nanmean().item()
        )  # NaN: a pair without points
        result |= {"grid_three_way_pair_mean": pair_mean, "grid_dynamic_iou": self._dynamic_iou("grid")}
        near, every = self.three_way_2024.mean()[0], self.three_way_2024.mean(over=[0])
        segments = [0, 0, 1], [0, 1, 1]  # of av2: foreground dynamic, foreground static, background static
        for name, means, counts in (
            ("grid_three_way", self.grid.mean(), self.grid.counts),
            ("paper_three_way", self.paper.mean(), self.paper.counts),
            ("av2_three_way", self.av2.mean(over=[2])[segments], self.av2.counts.sum(dim=2)[segments]),
            ("three_way_2024", near, self.three_way_2024.counts[0]),
            ("three_way_2024_all_distances", every, self.three_way_2024.counts.sum(dim=0)),
        ):
            result |= {name + key: value for key, value in three_way(means, counts).items()}
        return result | self._av2_numbers() | self._bucketed_numbers() | self._breakdown()

    def _dynamic_iou(self, name: str) -> float:
        (_, false_positive), (false_negative, true_positive) = self.confusion[name]
        return (true_positive / (true_positive + false_positive + false_negative)).item()

    def _av2_numbers(self) -> dict[str, float]:
        """av2's own table, without the background that moves, of which it has none."""
        result = {"av2_dynamic_iou": self._dynamic_iou("av2")}
        segments = {"foreground_dynamic": (0, 0), "foreground_static": (0, 1), "background_static": (1, 1)}
        for name in self.av2.sums:
            for segment, index in segments.items():
                result[f"av2_{name}_{segment}"] = self.av2.mean(name, over=[2])[index].item()
                for place, mean in zip(("close", "far"), self.av2.mean(name)[index], strict=True):
                    result[f"av2_{name}_{segment}_{place}"] = mean.item()
        return result

    def _bucketed_numbers(self) -> dict[str, float]:
        """The 2024 challenge: per class, error of the first bucket in metres, and of the others as a share of motion.

        1.0 is no better than saying that nothing moves. The headline is bucketed_dynamic_mean.
        """
        result = {}
        for place, rows in (("", [0]), ("_all_distances", [0, 1])):
            counts = self.bucketed.counts[rows].sum(dim=0)  # (classes, buckets)
            error, speed = (self.bucketed.sums[name][rows].sum(dim=0) / counts for name in ("epe", "speed"))
            static, dynamic = error[:, 0], mean_of_filled((error / speed)[:, 1:], counts[:, 1:])  # (classes,)
            is_there = {"static": counts[:, 0], "dynamic": counts[:, 1:].sum(dim=1)}
            for kind, values in (("static", static), ("dynamic", dynamic)):
                result[f"bucketed_{kind}_mean{place}"] = mean_of_filled(values, is_there[kind]).item()
                for label, value in zip(CLASSES, values, strict=True):
                    result[f"bucketed_{kind}_{label}{place}"] = value.item()
        return result

    def _breakdown(self) -> dict[str, float]:
        """Grid points by class, speed and distance as in the paper's figures, and EPE by ring."""
        result = {}
        for i, label in enumerate((*CLASSES, "other")):
            for j, speed in enumerate(PAPER_SPEEDS):
                for k, place in enumerate(("close", "far", "")):
                    where = slice(None) if place == "" else slice(k, k + 1)
                    count = self.by_class.counts[i, j, where].sum()
                    segment = "_".join(part for part in (label, speed, place) if part)
                    result[f"grid_points_{segment}"] = int(count)
                    for name, sums in self.by_class.sums.items():
                        result[f"grid_{name}_{segment}"] = (sums[i, j, where].sum() / count).item()
        for group, means in zip(GROUPS, self.by_ring.mean(), strict=True):
            for inner, mean in zip(RINGS_M, means, strict=True):
                result[f"grid_epe_{group}_from_{inner}_m"] = mean.item()
        return result


# --- To read ---------------------------------------------------------------------------------------------------------


def report(numbers: dict[str, float]) -> str:
    """The numbers of `Scores` by definition, and by class and speed, as tables to read."""

    def cells(*keys: str) -> str:
        return " ".join(f"{numbers[key]:9.4f}" for key in keys)

    lines = [f"{'three-way EPE, by definition':38} {'mean':>9} {'FD':>9} {'FS':>9} {'BS':>9}"]
    for name, what in {
        "grid_three_way": "grid: this project's",
        "paper_three_way": "paper: ZeroFlow's published code",
        "av2_three_way": "av2: the 2023 challenge",
        "three_way_2024": "three_way_2024: within 35 m",
        "three_way_2024_all_distances": "... at all distances",
    }.items():
        lines.append(f"{what:38} {cells(name, *(f'{name}_{group}' for group in GROUPS))}")
    lines += ["", f"{'all groups':38} {'EPE':>9} {'AccS':>9} {'AccR':>9} {'angle':>9} {'dyn. IoU':>9}"]
    quality = ("epe", "acc_strict", "acc_relaxed", "angle_error_rad")
    lines.append(f"{'every point with a true flow':38} {cells('epe')}")
    lines.append(f"{'grid':38} {cells(*(f'grid_{name}' for name in quality), 'grid_dynamic_iou')}")
    for segment in ("foreground_dynamic", "foreground_static", "background_static"):
        keys = [f"av2_{name}_{segment}" for name in quality]
        lines.append(f"{'av2: ' + segment.replace('_', ' '):38} {cells(*keys)}")
    lines.append(f"{'av2: all':38} {' ' * 39} {cells('av2_dynamic_iou')}")
    speeds = list(PAPER_SPEEDS)
    head = " ".join(f"{name:>9}" for name in ("<.5 m/s", ".5-2", ">2 m/s", "static", "dynamic"))
    lines += ["", f"{'by class':24} {'points':>13} {head}   (EPE in the grid by speed; 2024's bucketed)"]
    for label in (*CLASSES, "other"):
        count = sum(numbers[f"grid_points_{label}_{speed}"] for speed in speeds)
        bucketed = [f"bucketed_{kind}_{label}" for kind in ("static", "dynamic")] if label != "other" else []
        by_speed = cells(*(f"grid_epe_{label}_{speed}" for speed in speeds), *bucketed)
        lines.append(f"{label.replace('_', ' '):24} {count:13} {by_speed}")
    means = cells("bucketed_static_mean", "bucketed_dynamic_mean")
    lines.append(f"{'mean of classes':24} {' ' * 43} {means}   (m; share of the motion: 1 is no better than none)")
    return "\n".join(lines).replace("      nan", "        -")


# --- What the paper printed ------------------------------------------------------------------------------------------

# Three-way EPE (metres, `paper`) on Argoverse 2's whole validation split, and milliseconds a pair: Vedder et al., ICLR
# 2024, from its tables and the authors' plotting constants. Nobody here has measured these.
PAPER = {
    "ZeroFlow 1x": (0.087, 29.33),
    "ZeroFlow 3x": (0.066, 29.33),
    "ZeroFlow 5x": (0.060, 29.33),
    "FastFlow3D (human)": (0.076, 29.33),
    "ZeroFlow XL 1x": (0.072, 260.6),
    "ZeroFlow XL 3x": (0.056, 260.6),
    "ZeroFlow XL 5x": (0.054, 260.6),
    "FastFlow3D XL (human)": (0.058, 260.6),
    "NSFP": (0.068, 26285.0),
    "Chodosh et al.": (0.061, 35281.0),
    "Gojcic et al.": (0.083, 6088.0),
    "PPWC": (0.130, 79.0),
    "Sim2Real": (0.157, 99.0),
    "FlowStep3D": (0.161, 688.0),
    "ICP": (0.204, 523.0),
    "EgoFlow": (0.205, 2116.0),
}
# The same error by the share of the Sensor training split that is learnt from; beyond 1 with LiDAR logs, which have no
# human labels. Same sources.
PAPER_SCALING = {
    "ZeroFlow": {0.01: 0.216, 0.1: 0.139, 0.2: 0.116, 0.5: 0.101, 1: 0.087, 2: 0.076, 3: 0.066, 5: 0.058},
    "FastFlow3D (human)": {0.01: 0.202, 0.1: 0.125, 0.2: 0.104, 0.5: 0.091, 1: 0.076},
}
AV2_VAL_LOGS = 150  # in that split, of the Sensor data set


def beside_the_paper(name: str, numbers: dict[str, float]) -> str:
    """The paper's methods and this one, with its seconds_per_pair, by paper_three_way: a table to read."""
    rows = [(error, ms, method) for method, (error, ms) in PAPER.items()]
    rows.append((numbers["paper_three_way"], 1e3 * numbers["seconds_per_pair"], f"{name} *"))
    lines = ["", f"{'the paper, same split; * measured here':40} {'3-way':>9} {'ms a pair':>10}   (*: the median)"]
    return "\n".join([*lines, *(f"{method:40} {error:9.4f} {ms:10.1f}" for error, ms, method in sorted(rows))])
