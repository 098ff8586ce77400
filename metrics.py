"""The metrics: every number that papers on Argoverse 2 scene flow report, by definition.

An error belongs to the flow estimated for one point of sweep 0, in meters. Row i of every tensor is
point i, in the ego frame of sweep 0. "Three-way EPE" is always the mean of three groups' mean
end-point errors (foreground dynamic, foreground static, background static), so that the many static
points do not drown the few moving ones. The field has three definitions of it, over different
points and groups. This project adds a fourth, to compare a student with its teacher:

  name            points                               foreground             dynamic
  paper           not ground, in the grid,             pedestrians, wheeled,  0.5 m/s or more
                  |x|, |y| <= 35 m                     vehicles
  av2             in the 2023 challenge's mask,        every labeled          av2's label: 5 cm
                  true flow valid                      category               per sweep or more
  three_way_2024  |x|, |y| < 35 m, |z| < 2.5 m,        pedestrians, wheeled,  5 cm per sweep or more
                  not ground, true flow valid          cars, other vehicles
  grid            not ground, in the student's grid    every labeled          av2's label
                                                       category

`paper` is what ZeroFlow's published code computes: signs and cones count as background, and points
whose object is gone in sweep 1 are kept. `av2` is `av2.evaluation.scene_flow.eval` of the av2
package, on raw flow. `three_way_2024` and `bucketed` are the metrics of the 2024 challenge: Khatri
et al., "I Can't Believe It's Not Scene Flow!" (ECCV 2024). Everything except `av2` is computed on
residual flow. A rigid motion changes no distance, so the end-point errors would be the same on raw
flow; only the relative accuracy and the angle differ.

Use `Scores`: call `add` for one sweep after the other, then `numbers`. Sums are kept in float64, so
a mean pools all points exactly, however many sweeps there are. A group without points is NaN, never
0, and stays out of means. All tensors are on the CPU. This file needs torch, and no other file of
the project.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FD, FS, BS = 0, 1, 2  # foreground dynamic, foreground static, background static
GROUPS = ("fd", "fs", "bs")
# The nominal rate: a speed is 10 * displacement, whatever the pair's own time difference. The field
# defines its numbers so. The loss (zeroflow.py) takes the pair's own time.
SWEEPS_PER_S = 10.0
DYNAMIC_M = 0.05  # per sweep: a longer estimated flow counts as "dynamic"
NEAR_M = 35.0  # of |x| and |y|; all definitions agree on it, but not on the border itself

# The five meta classes of the 2024 challenge, under its names. Signs and animals have no class.
CLASSES = {
    "background": "NONE",
    "car": "REGULAR_VEHICLE",
    "pedestrian": "PEDESTRIAN STROLLER WHEELCHAIR OFFICIAL_SIGNALER",
    "wheeled_vru": "BICYCLE BICYCLIST MOTORCYCLE MOTORCYCLIST WHEELED_DEVICE WHEELED_RIDER",
    "other_vehicles": (
        "ARTICULATED_BUS BOX_TRUCK BUS LARGE_VEHICLE RAILED_VEHICLE SCHOOL_BUS "
        "TRUCK TRUCK_CAB VEHICULAR_TRAILER"
    ),
}
UNCLASSED = len(CLASSES)  # the class number of every other category

# The paper's movers are the same categories, and two more trailers.
_MOVING_CLASSES = [names for label, names in CLASSES.items() if label != "background"]
_PAPER_MOVERS = set(" ".join(_MOVING_CLASSES).split())
_PAPER_MOVERS |= {"TRAFFIC_LIGHT_TRAILER", "MESSAGE_BOARD_TRAILER"}

# The paper's speed ranges: name -> lowest speed (m/s) of the residual flow.
PAPER_SPEEDS = {"below_0.5_mps": 0.0, "0.5_to_2_mps": 0.5, "above_2_mps": 2.0}
PAPER_DYNAMIC_MPS = 0.5

# Rings around the ego, by max(|x|, |y|). The last one ends at the border of the grid.
RINGS_M = (0, 10, 20, 30, 40)

# The 2024 challenge's buckets of speed: fifty from 0 to 2 m per sweep, and one for all above.
BUCKET_M = 0.04
BUCKETS = 51


# --- Points ---------------------------------------------------------------------------------------


def point_scores(estimate: torch.Tensor, flow: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is averaged, as av2 defines it: name -> (N,).

    estimate, flow: estimated and true flow (N, 3), in meters per sweep.

    epe: the end-point error in meters.
    acc_strict: whether the error is below 5 cm, or below 5 % of the true flow's length.
    acc_relaxed: the same with 10 cm and 10 %.
    speed: the length of the true flow, in meters per sweep.
    angle_error_rad: between the space-time vectors (flow, 0.1 s). They have an angle even where
    nothing moves.
    """
    difference = estimate - flow
    error = difference.norm(dim=1)  # (N,)
    length = estimate.norm(dim=1)
    speed = flow.norm(dim=1)

    # The relative tolerance is the larger one only where the true flow is longer than 1 m.
    tolerance = speed.clamp(min=1)

    # The angle comes from its sine and cosine, both multiplied by |a| |b|. For the space-time
    # vectors a = (f, t) and b = (g, t) the sine is sqrt(|f x g|^2 + t^2 |f - g|^2), and f x g is (f
    # - g) x g. This is exact for small angles, unlike av2's acos of a cosine near 1.
    time_s = 1 / SWEEPS_PER_S
    cross = torch.linalg.cross(difference, flow).norm(dim=1)
    sine = (cross**2 + (time_s * error) ** 2).sqrt()
    cosine = (length**2 + speed**2 - error**2) / 2 + time_s**2
    return {
        "epe": error,
        "acc_strict": error < 0.05 * tolerance,
        "acc_relaxed": error < 0.1 * tolerance,
        "speed": speed,
        "angle_error_rad": torch.atan2(sine, cosine),
    }


# --- Groups ---------------------------------------------------------------------------------------


def grid_groups(category: torch.Tensor, is_dynamic: torch.Tensor) -> torch.Tensor:
    """Return the group (N,) int64 of each point for `grid`: FD, FS or BS.

    category (N,) uint8: every category but 0 is foreground. is_dynamic (N,) bool: av2's label, a
    residual of 5 cm or more. Which points count is for the caller to choose; in `grid` the method's
    input counts.
    """
    return torch.where(category > 0, torch.where(is_dynamic, FD, FS), BS)


def paper_groups(
    points: torch.Tensor,
    flow: torch.Tensor,
    category: torch.Tensor,
    is_input: torch.Tensor,
    names: Sequence[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the groups of ZeroFlow's published code: (group (N,) int64, is_counted (N,) bool).

    points, flow (N, 3): positions and true residual flow, in meters. category (N,) uint8: an index
    of `names`, Argoverse 2's categories. is_input (N,) bool: not ground and in the student's grid.
    """
    number = category.long()
    is_mover = torch.tensor([name in _PAPER_MOVERS for name in names])[number]
    is_animal = torch.tensor([name in ("ANIMAL", "DOG") for name in names])[number]

    # Pedestrians and vehicles are split by speed. Everything else is background, also what is
    # labeled: signs, cones, bollards.
    is_fast = SWEEPS_PER_S * flow.norm(dim=1) >= PAPER_DYNAMIC_MPS
    group = torch.where(is_mover, torch.where(is_fast, FD, FS), BS)

    # Animals are in no group. A point at exactly 35 m is near. Points whose object is gone in sweep
    # 1 (is_valid is False) do count.
    is_near = (points[:, :2].abs() <= NEAR_M).all(dim=1)
    return group, is_input & is_near & ~is_animal


def is_scored_2024(
    points: torch.Tensor,
    is_ground: torch.Tensor,
    is_valid: torch.Tensor,
) -> torch.Tensor:
    """Return the mask (N,) bool of the points that the 2024 challenge scores, near or far.

    points (N, 3) in meters; is_ground (N,) by ZeroFlow's rule (0.40 m); is_valid (N,): the true
    flow is known.
    """
    limit_m = points.new_tensor([48, 48, 2.5])
    is_inside = (points.abs() < limit_m).all(dim=1)
    return ~is_ground & is_valid & is_inside


class GroupMeans:
    """Means of named values by group, over any number of sweeps.

    The groups form a table with one axis per criterion: shape (2, 3) could be near or far by FD,
    FS, BS. Shape () is a single group.
    """

    def __init__(self, shape: Sequence[int], values: Sequence[str] = ("epe",)):
        self.counts = torch.zeros(tuple(shape), dtype=torch.float64)
        self.sums = {name: torch.zeros_like(self.counts) for name in values}

    def add(
        self,
        mask: torch.Tensor,
        indices: tuple[torch.Tensor, ...],
        values: dict[str, torch.Tensor],
    ) -> None:
        """Add N points, of which those in `mask` (N,) bool count.

        indices: for each axis of the table, where each point belongs, (N,) int64. Outside the mask
        they may be anything. values: name -> (N,); only the names that this table was made for are
        read.
        """
        # Number the table's cells row by row: cell (1, 2) of shape (2, 3) is number 5.
        cell = 0  # with the first axis it becomes (N,)
        for index, size in zip(indices, self.counts.shape, strict=True):
            cell = cell * size + index

        # bincount then sums by cell. Points that do not count go to a spare cell behind the last
        # one: their index or error may be meaningless, and even a NaN does no harm there.
        # (Selecting the points that count takes longer.)
        num_cells = self.counts.numel()
        cell = torch.where(mask, cell, num_cells)
        counts = torch.bincount(cell, minlength=num_cells + 1)
        self.counts += counts[:num_cells].view_as(self.counts)
        for name, total in self.sums.items():
            sums = torch.bincount(cell, values[name].double(), minlength=num_cells + 1)
            total += sums[:num_cells].view_as(total)

    def mean(self, name: str = "epe", over: Sequence[int] = ()) -> torch.Tensor:
        """Return the means, with the groups along the axes `over` pooled.

        A group without points is NaN.
        """
        if not over:  # torch's sum over no axes would be the sum over all of them
            return self.sums[name] / self.counts
        return self.sums[name].sum(dim=over) / self.counts.sum(dim=over)


def mean_of_filled(means: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean, along the last axis, over the groups that have points; NaN if none has.

    means, counts (..., groups): of each group, its mean and its number of points.

    This is not nanmean. If one error in a group is NaN, the group's mean is NaN, and leaving it out
    would make a broken method look better.
    """
    is_filled = counts > 0
    return torch.where(is_filled, means, 0.0).sum(dim=-1) / is_filled.sum(dim=-1)


def three_way(means: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """Return the three-way EPE of the means and counts (3,) of FD, FS, BS, and its parts.

    The keys are suffixes: "" is the mean over the groups that have points; then "_fd", "_fs",
    "_bs".
    """
    result = {"": mean_of_filled(means, counts).item()}
    for name, mean in zip(GROUPS, means, strict=True):
        result[f"_{name}"] = mean.item()
    return result


# --- Sweeps ---------------------------------------------------------------------------------------


class Scores:
    """All metrics of one method, over any number of sweeps."""

    def __init__(self, names: Sequence[str]):
        """Start without sweeps.

        names: Argoverse 2's categories in the order of their numbers, background first.
        """
        self.names = names
        class_of = {}
        for number, members in enumerate(CLASSES.values()):
            class_of.update(dict.fromkeys(members.split(), number))
        self.class_of = torch.tensor([class_of.get(name, UNCLASSED) for name in names])

        # One table per definition. Its axes are listed at the end of the line.
        every = ("epe", "acc_strict", "acc_relaxed", "angle_error_rad")
        errors = ("epe", "below_5_cm", "below_10_cm")
        classes, speeds, rings = len(CLASSES), len(PAPER_SPEEDS), len(RINGS_M)
        self.all = GroupMeans([])  # every point with a known true flow
        self.grid = GroupMeans([3], every)  # FD, FS, BS
        self.paper = GroupMeans([3])  # FD, FS, BS
        self.av2 = GroupMeans([2, 2, 2], every)  # foreground or not; dynamic or not; close or far
        self.three_way_2024 = GroupMeans([2, 3])  # close or far; FD, FS, BS
        self.bucketed = GroupMeans([2, classes, BUCKETS], ("epe", "speed"))  # close or far; ...
        self.by_class = GroupMeans([classes + 1, speeds, 2], errors)  # ...; ...; close or far
        self.by_ring = GroupMeans([3, rings])  # FD, FS, BS; ...

        # Only counts: [is it truly dynamic?, is it estimated to be dynamic?], where 0 means no.
        self.grid_confusion = GroupMeans([2, 2], ())
        self.av2_confusion = GroupMeans([2, 2], ())

        # The three-way EPE (`grid`) of each sweep alone, in the order in which they were added.
        self.pair_three_ways: list[float] = []

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
        estimated_dynamic: torch.Tensor | None = None,
    ) -> None:
        """Add one sweep of N points.

        estimate, flow: estimated and true residual flow (N, 3), in meters.
        points: their positions (N, 3), in meters, in the ego frame of sweep 0.
        category: (N,) uint8, an index of the names that the constructor was given.
        is_dynamic: (N,) bool, av2's label.
        is_valid: (N,) bool, the true flow is known.
        is_ground: (N,) bool, by ZeroFlow's rule.
        is_input: (N,) bool, not ground and in the student's grid.
        raw: estimated and true flow (N, 3) including the ego-motion.
        is_in_mask: (N,) bool, the 2023 challenge's points. Without it, or without raw, the numbers
        of av2 stay NaN.
        estimated_dynamic: (N,) bool, if the method itself classifies points. Otherwise an estimate
        longer than 5 cm counts as dynamic.
        """
        # What the definitions average, for each point: (N,) each.
        values = point_scores(estimate, flow)
        values["below_5_cm"] = values["epe"] < 0.05
        values["below_10_cm"] = values["epe"] < 0.1

        # What several definitions group by.
        distance = points[:, :2].abs().amax(dim=1)  # (N,) max(|x|, |y|), in meters
        label = self.class_of[category.long()]  # (N,) a class of 2024, or UNCLASSED
        if estimated_dynamic is None:
            estimated_dynamic = estimate.norm(dim=1) > DYNAMIC_M

        # The position of a broken return is NaN, and an error there would mean nothing.
        is_known = is_valid & points.isfinite().all(dim=1)
        self.all.add(is_known, (), values)

        # The definitions of the module docstring, each with its own points and groups.
        self._add_grid(values, distance, category, is_dynamic, is_input, estimated_dynamic)
        self._add_by_class(values, distance, label, is_input)
        group, is_counted = paper_groups(points, flow, category, is_input, self.names)
        self.paper.add(is_counted, (group,), values)
        is_scored = is_scored_2024(points, is_ground, is_valid)
        self._add_2024(values, distance, label, is_scored)
        if raw is not None and is_in_mask is not None:
            is_scored = is_in_mask & is_valid
            self._add_av2(raw, distance, category, is_dynamic, is_scored, estimated_dynamic)

    def _add_grid(
        self,
        values: dict[str, torch.Tensor],
        distance: torch.Tensor,
        category: torch.Tensor,
        is_dynamic: torch.Tensor,
        is_input: torch.Tensor,
        estimated_dynamic: torch.Tensor,
    ) -> None:
        """`grid`: all points that the method sees, whether their true flow is valid or not."""
        group = grid_groups(category, is_dynamic)
        self.grid.add(is_input, (group,), values)
        self.grid_confusion.add(is_input, (is_dynamic.long(), estimated_dynamic.long()), {})

        # The three-way EPE of this sweep alone shows which pairs a method does worst on.
        alone = GroupMeans([3])
        alone.add(is_input, (group,), values)
        self.pair_three_ways.append(mean_of_filled(alone.mean(), alone.counts).item())

        # The same points by distance. Each ring includes its inner border.
        inner_m = distance.new_tensor(RINGS_M[1:])
        ring = torch.bucketize(distance, inner_m, right=True)
        self.by_ring.add(is_input, (group, ring), values)

    def _add_by_class(
        self,
        values: dict[str, torch.Tensor],
        distance: torch.Tensor,
        label: torch.Tensor,
        is_input: torch.Tensor,
    ) -> None:
        """The paper's breakdown by class, speed and distance, for the points of `grid`."""
        # The borders between the ranges of speed: the lowest range begins at 0 and needs none.
        borders_mps = torch.tensor(list(PAPER_SPEEDS.values())[1:])
        speed_range = torch.bucketize(SWEEPS_PER_S * values["speed"], borders_mps, right=True)

        # As in `paper` and av2, a point at exactly 35 m is close.
        is_far = distance > NEAR_M
        self.by_class.add(is_input, (label, speed_range, is_far.long()), values)

    def _add_2024(
        self,
        values: dict[str, torch.Tensor],
        distance: torch.Tensor,
        label: torch.Tensor,
        is_scored: torch.Tensor,
    ) -> None:
        """The 2024 challenge: `three_way_2024` and `bucketed`, for near and far points."""
        # Points of no meta class (signs, animals) are not scored. Here, 35 m itself is far.
        is_scored = is_scored & (label < UNCLASSED)
        is_far = (distance >= NEAR_M).long()

        # Bucket 0 is [0, 0.04) m per sweep, bucket 50 holds everything from 2 m on.
        borders_m = torch.arange(1, BUCKETS) * BUCKET_M
        bucket = torch.bucketize(values["speed"], borders_m, right=True)
        self.bucketed.add(is_scored, (is_far, label, bucket), values)

        # "Dynamic" is decided by the true flow itself here, not by av2's label.
        is_fast = values["speed"] >= DYNAMIC_M
        group = torch.where(label > 0, torch.where(is_fast, FD, FS), BS)
        self.three_way_2024.add(is_scored, (is_far, group), values)

    def _add_av2(
        self,
        raw: tuple[torch.Tensor, torch.Tensor],
        distance: torch.Tensor,
        category: torch.Tensor,
        is_dynamic: torch.Tensor,
        is_scored: torch.Tensor,
        estimated_dynamic: torch.Tensor,
    ) -> None:
        """`av2`: the 2023 challenge's definition, which is on raw flow."""
        # Foreground, dynamic and close come first along their axes, as in the keys.
        is_background = (category == 0).long()
        is_static = (~is_dynamic).long()
        is_far = (distance > NEAR_M).long()
        self.av2.add(is_scored, (is_background, is_static, is_far), point_scores(*raw))
        self.av2_confusion.add(is_scored, (is_dynamic.long(), estimated_dynamic.long()), {})

    def numbers(self) -> dict[str, float]:
        """Return every number in one flat dictionary.

        The first part of a key names the definition. NaN means that there was nothing to measure.
        """
        return {
            "epe": self.all.mean().item(),
            "points": int(self.grid.counts.sum()),
            **self._grid_numbers(),
            **self._three_ways(),
            **self._av2_numbers(),
            **self._bucketed_numbers(),
            **self._class_numbers(),
            **self._ring_numbers(),
        }

    def _grid_numbers(self) -> dict[str, float]:
        """Means over all points of `grid`."""
        result = {}
        for name in self.grid.sums:
            result[f"grid_{name}"] = self.grid.mean(name, over=[0]).item()

        # A sweep without points in the grid has no three-way EPE (NaN). It stays out of the mean.
        of_pairs = torch.tensor(self.pair_three_ways, dtype=torch.float64)
        result["grid_three_way_pair_mean"] = of_pairs.nanmean().item()
        result["grid_dynamic_iou"] = dynamic_iou(self.grid_confusion.counts)
        return result

    def _three_ways(self) -> dict[str, float]:
        """The three-way EPE by every definition, with its parts."""
        # Three cells of av2's table, over all distances: foreground dynamic, foreground static,
        # background static.
        segments = [0, 0, 1], [0, 1, 1]
        av2_means = self.av2.mean(over=[2])[segments]  # (3,)
        av2_counts = self.av2.counts.sum(dim=2)[segments]

        # The headline of the 2024 challenge takes points within 35 m, the other all points.
        near = self.three_way_2024.mean()[0]  # (3,)
        near_counts = self.three_way_2024.counts[0]
        every = self.three_way_2024.mean(over=[0])
        every_counts = self.three_way_2024.counts.sum(dim=0)

        result = {}
        for name, means, counts in (
            ("grid_three_way", self.grid.mean(), self.grid.counts),
            ("paper_three_way", self.paper.mean(), self.paper.counts),
            ("av2_three_way", av2_means, av2_counts),
            ("three_way_2024", near, near_counts),
            ("three_way_2024_all_distances", every, every_counts),
        ):
            for suffix, value in three_way(means, counts).items():
                result[name + suffix] = value
        return result

    def _av2_numbers(self) -> dict[str, float]:
        """av2's own table. It has no row for dynamic background, although such points can exist."""
        result = {"av2_dynamic_iou": dynamic_iou(self.av2_confusion.counts)}
        segments = {
            "foreground_dynamic": (0, 0),
            "foreground_static": (0, 1),
            "background_static": (1, 1),
        }
        # Each over all distances (without a suffix), and for close and far points.
        for name in self.av2.sums:
            pooled, by_distance = self.av2.mean(name, over=[2]), self.av2.mean(name)
            for segment, index in segments.items():
                key = f"av2_{name}_{segment}"
                close, far = by_distance[index]
                result[key] = pooled[index].item()
                result[f"{key}_close"] = close.item()
                result[f"{key}_far"] = far.item()
        return result

    def _bucketed_numbers(self) -> dict[str, float]:
        """The bucketed errors of the 2024 challenge, by class.

        Static errors are in meters, dynamic ones a share of the motion. The no-motion baseline has
        a dynamic error of 1.0 everywhere. The headline is bucketed_dynamic_mean.
        """
        result = {}
        for suffix, rows in (("", [0]), ("_all_distances", [0, 1])):
            counts = self.bucketed.counts[rows].sum(dim=0)  # (classes, buckets)
            error = self.bucketed.sums["epe"][rows].sum(dim=0) / counts
            speed = self.bucketed.sums["speed"][rows].sum(dim=0) / counts

            # A class's static error is the mean error of its first bucket. Its dynamic error is the
            # mean over the other buckets, each divided by its mean speed: slow and fast objects
            # weigh the same.
            static, share = error[:, 0], error / speed
            dynamic = mean_of_filled(share[:, 1:], counts[:, 1:])  # (classes,)

            # A class without such points stays out of the mean over classes. The background, for
            # example, has no dynamic points.
            static_counts, dynamic_counts = counts[:, 0], counts[:, 1:].sum(dim=1)
            for kind, by_class, class_counts in (
                ("static", static, static_counts),
                ("dynamic", dynamic, dynamic_counts),
            ):
                mean = mean_of_filled(by_class, class_counts)
                result[f"bucketed_{kind}_mean{suffix}"] = mean.item()
                for label, value in zip(CLASSES, by_class, strict=True):
                    result[f"bucketed_{kind}_{label}{suffix}"] = value.item()
        return result

    def _class_numbers(self) -> dict[str, float]:
        """Points and errors in the grid by class, speed and distance (the paper's breakdown)."""
        # Close, far, and both pooled (without a suffix), as slices of the table's last axis.
        places = {"_close": slice(0, 1), "_far": slice(1, 2), "": slice(None)}
        result = {}
        for i, label in enumerate((*CLASSES, "other")):
            for j, speed in enumerate(PAPER_SPEEDS):
                for place, part in places.items():
                    segment = f"{label}_{speed}{place}"
                    count = self.by_class.counts[i, j, part].sum()
                    result[f"grid_points_{segment}"] = int(count)
                    for name, sums in self.by_class.sums.items():
                        result[f"grid_{name}_{segment}"] = (sums[i, j, part].sum() / count).item()
        return result

    def _ring_numbers(self) -> dict[str, float]:
        """End-point errors in the grid by group and by distance from the ego."""
        result = {}
        for group, means in zip(GROUPS, self.by_ring.mean(), strict=True):
            for inner_m, mean in zip(RINGS_M, means, strict=True):
                result[f"grid_epe_{group}_from_{inner_m}_m"] = mean.item()
        return result


def dynamic_iou(confusion: torch.Tensor) -> float:
    """Return the intersection over union of dynamic points, TP / (TP + FP + FN).

    confusion (2, 2): counts by [is it truly dynamic?, is it estimated to be dynamic?], 0 for no.
    """
    (_, false_positive), (false_negative, true_positive) = confusion
    return (true_positive / (true_positive + false_positive + false_negative)).item()


# --- To read --------------------------------------------------------------------------------------


def report(numbers: dict[str, float]) -> str:
    """Return the numbers of `Scores` as three tables: by definition, by quality, by class."""
    tables = (_definitions_table(numbers), _quality_table(numbers), _classes_table(numbers))
    text = "\n\n".join("\n".join(lines) for lines in tables)
    return text.replace("      nan", "        -")


def _cells(numbers: dict[str, float], keys: Sequence[str]) -> str:
    """The numbers of the keys, each 9 characters wide."""
    return " ".join(f"{numbers[key]:9.4f}" for key in keys)


def _definitions_table(numbers: dict[str, float]) -> list[str]:
    """Lines: the three-way EPE by every definition, with its three parts."""
    lines = [f"{'three-way EPE, by definition':38} {'mean':>9} {'FD':>9} {'FS':>9} {'BS':>9}"]
    definitions = {
        "grid_three_way": "grid: this project's",
        "paper_three_way": "paper: ZeroFlow's published code",
        "av2_three_way": "av2: the 2023 challenge",
        "three_way_2024": "three_way_2024: within 35 m",
        "three_way_2024_all_distances": "... at all distances",
    }
    # As everywhere, a definition's parts are named by suffixes.
    for name, text in definitions.items():
        keys = [name, *(f"{name}_{group}" for group in GROUPS)]
        lines.append(f"{text:38} {_cells(numbers, keys)}")
    return lines


def _quality_table(numbers: dict[str, float]) -> list[str]:
    """Lines: error, accuracies and angle, over all points or by av2's segments."""
    columns = " ".join(f"{name:>9}" for name in ("EPE", "AccS", "AccR", "angle", "dyn. IoU"))
    quality = ("epe", "acc_strict", "acc_relaxed", "angle_error_rad")
    grid_keys = [*(f"grid_{name}" for name in quality), "grid_dynamic_iou"]
    lines = [
        f"{'all groups':38} {columns}",
        f"{'every point with a true flow':38} {_cells(numbers, ['epe'])}",
        f"{'grid':38} {_cells(numbers, grid_keys)}",
    ]
    for segment in ("foreground_dynamic", "foreground_static", "background_static"):
        keys = [f"av2_{name}_{segment}" for name in quality]
        lines.append(f"{'av2: ' + segment.replace('_', ' '):38} {_cells(numbers, keys)}")

    # av2's IoU is over all segments, so it has a row of its own, in the last column.
    lines.append(f"{'av2: all':38} {' ' * 39} {_cells(numbers, ['av2_dynamic_iou'])}")
    return lines


def _classes_table(numbers: dict[str, float]) -> list[str]:
    """Lines: by class, the error in the grid by speed, and the 2024 challenge's bucketed errors."""
    columns = " ".join(f"{name:>9}" for name in ("<.5 m/s", ".5-2", ">2 m/s", "static", "dynamic"))
    note = "   (EPE in the grid by speed; 2024's bucketed)"
    lines = [f"{'by class':24} {'points':>13} {columns}{note}"]
    for label in (*CLASSES, "other"):
        points = sum(numbers[f"grid_points_{label}_{speed}"] for speed in PAPER_SPEEDS)
        keys = [f"grid_epe_{label}_{speed}" for speed in PAPER_SPEEDS]
        if label != "other":  # which is not a class of the 2024 challenge
            keys += [f"bucketed_static_{label}", f"bucketed_dynamic_{label}"]
        lines.append(f"{label.replace('_', ' '):24} {points:13} {_cells(numbers, keys)}")

    # The headline of the 2024 challenge, below the last two columns.
    means = _cells(numbers, ["bucketed_static_mean", "bucketed_dynamic_mean"])
    note = "   (m; share of the motion: 1 is what no-motion gets)"
    lines.append(f"{'mean of classes':24} {' ' * 43} {means}{note}")
    return lines


# --- What the paper printed -----------------------------------------------------------------------

# Three-way EPE (meters, `paper`) on the whole validation split of Argoverse 2, and milliseconds per
# pair: Vedder et al., ICLR 2024, from its tables and the authors' plotting constants. Quoted, not
# measured here.
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

# `bucketed_dynamic_mean` on Waymo's validation split, as later papers report it. ZeroFlow's own
# three-way on Waymo cannot be matched: its scoring read Waymo's class numbers by Argoverse's table.
WAYMO_BUCKETED = {
    "EulerFlow": 0.219,
    "FastNSF": 0.429,
    "NSFP": 0.573,
    "ZeroFlow": 0.739,
    "FastFlow3D": 0.757,
}

# `PAPER`'s error by the share of the Sensor training split that a student learned from, from the
# same sources. Shares above 1 add logs of the LiDAR data set, which have no human labels.
PAPER_SCALING = {
    "ZeroFlow": {
        0.01: 0.216,
        0.1: 0.139,
        0.2: 0.116,
        0.5: 0.101,
        1: 0.087,
        2: 0.076,
        3: 0.066,
        5: 0.058,
    },
    "FastFlow3D (human)": {0.01: 0.202, 0.1: 0.125, 0.2: 0.104, 0.5: 0.091, 1: 0.076},
}
AV2_VAL_LOGS = 150  # in the validation split of the Sensor data set


def beside_the_paper(name: str, numbers: dict[str, float]) -> str:
    """Return a table of the paper's methods and this one, sorted by the paper's three-way EPE.

    numbers: as `Scores.numbers` returns them, and seconds_per_pair, the median measured here.
    """
    rows = [(error, ms, method) for method, (error, ms) in PAPER.items()]
    rows.append((numbers["paper_three_way"], 1e3 * numbers["seconds_per_pair"], f"{name} *"))
    title = "the paper, same split; * measured here"
    lines = ["", f"{title:40} {'3-way':>9} {'ms/pair':>10}   (*: the median)"]
    for error, ms, method in sorted(rows):
        lines.append(f"{method:40} {error:9.4f} {ms:10.1f}")
    return "\n".join(lines)
