"""Every metric by hand, by brute force over points, and against the av2 package if installed."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import a_pair

import data
import metrics

FD, FS, BS = metrics.FD, metrics.FS, metrics.BS
OUT = -1  # in this file: the point does not count
CATEGORY = {name: number for number, name in enumerate(data.CATEGORIES)}


# --- Points ---------------------------------------------------------------------------------------


def test_point_scores_by_hand():
    """Relative tolerance begins to matter for a true flow of more than one meter."""
    # Estimate, truth -> error, AccS, AccR, angle.
    rows = [
        ((0, 0, 0), (0, 0, 0), 0.0, True, True, 0.0),
        ((0.049, 0, 0), (0, 0, 0), 0.049, True, True, math.atan(0.49)),
        ((0.051, 0, 0), (0, 0, 0), 0.051, False, True, math.atan(0.51)),
        ((0.3, 0.099, 0), (0.3, 0, 0), 0.099, False, True, None),
        ((0.3, 0.101, 0), (0.3, 0, 0), 0.101, False, False, None),
        ((2.0, 0.099, 0), (2, 0, 0), 0.099, True, True, None),  # 4.95 % of 2 m
        ((2.0, 0.199, 0), (2, 0, 0), 0.199, False, True, None),
        # At right angles in space, but both vectors share 0.1 s of time.
        ((0, 1, 0), (1, 0, 0), math.sqrt(2), False, False, math.acos(0.01 / 1.01)),
        ((-1, 0, 0), (1, 0, 0), 2.0, False, False, math.acos(-0.99 / 1.01)),
        # Small angles are exact.
        ((1, 1e-4, 0), (1, 0, 0), 1e-4, True, True, 1e-4 / math.sqrt(1.01)),
    ]
    estimate, flow = (torch.tensor([row[i] for row in rows], dtype=torch.float32) for i in (0, 1))
    scores = metrics.point_scores(estimate, flow)
    assert scores["epe"].tolist() == pytest.approx([row[2] for row in rows], abs=1e-6)
    assert scores["speed"].tolist() == flow.norm(dim=1).tolist()
    assert scores["acc_strict"].tolist() == [row[3] for row in rows]
    assert scores["acc_relaxed"].tolist() == [row[4] for row in rows]
    for found, row in zip(scores["angle_error_rad"].tolist(), rows, strict=True):
        assert row[5] is None or found == pytest.approx(row[5], abs=1e-6)


# --- Groups ---------------------------------------------------------------------------------------


def test_group_means_by_hand():
    means = metrics.GroupMeans([3])
    is_counted = torch.tensor([True, True, True, False])
    group = torch.tensor([FD, FD, FS, BS])
    means.add(is_counted, (group,), {"epe": torch.tensor([1.0, 3.0, 0.5, torch.nan])})

    # No background counts: its mean is NaN, not 0, and it stays out of the three-way mean.
    assert means.mean().tolist()[:2] == [2.0, 0.5]
    assert math.isnan(means.mean()[2])
    assert metrics.three_way(means.mean(), means.counts)[""] == 1.25
    assert means.mean(over=[0]).item() == 1.5

    # A second sweep, with four background points.
    four = torch.ones(4, dtype=torch.bool)
    means.add(four, (torch.full((4,), BS),), {"epe": torch.tensor([0.1, 0.3, 0.2, 0.2])})
    assert means.mean().tolist() == pytest.approx([2.0, 0.5, 0.2])
    parts = {"": 0.9, "_fd": 2.0, "_fs": 0.5, "_bs": 0.2}
    assert metrics.three_way(means.mean(), means.counts) == pytest.approx(parts)
    assert means.mean(over=[0]).item() == pytest.approx((1 + 3 + 0.5 + 0.8) / 7)

    # Without points the mean is NaN. And an unknown error is not a small one.
    empty = metrics.GroupMeans([3])
    assert math.isnan(metrics.three_way(empty.mean(), empty.counts)[""])
    means.add(four[:1], (torch.tensor([FS]),), {"epe": torch.tensor([torch.nan])})
    assert math.isnan(metrics.three_way(means.mean(), means.counts)[""])


def test_groups_along_several_axes_by_brute_force_over_points():
    """Each point goes to the cell that its indices name. Masked points may have any index."""
    generator = torch.Generator().manual_seed(0)
    shape, n = (2, 3, 4), 500
    indices = tuple(torch.randint(size, (n,), generator=generator) for size in shape)
    mask = torch.rand(n, generator=generator) < 0.5
    value = torch.rand(n, generator=generator)
    indices[1][~mask] = 99
    value[~mask] = torch.nan
    means = metrics.GroupMeans(shape, ("value",))
    means.add(mask, indices, {"value": value, "not asked for": value})

    expected = np.zeros(shape)
    for i in range(n):
        if mask[i]:
            expected[tuple(int(index[i]) for index in indices)] += float(value[i])
    np.testing.assert_allclose(means.sums["value"], expected)
    assert means.counts.sum() == mask.sum()
    pooled_counts = means.counts.sum((0, 2))
    found = means.mean("value", over=[0, 2]) * pooled_counts
    np.testing.assert_allclose(found, expected.sum((0, 2)))

    # A table without axes is one single group. An index per axis is required.
    pooled = metrics.GroupMeans((), ("value",))
    pooled.add(mask, (), {"value": value})
    assert pooled.mean("value").item() == pytest.approx(value[mask].mean().item())
    with pytest.raises(ValueError):
        means.add(mask, indices[:2], {"value": value})


def test_sums_stay_exact_over_many_sweeps():
    """In float32, a million errors of a tenth of a millimeter beside one of 1 km would be lost."""
    means = metrics.GroupMeans([1])
    mask, group = torch.ones(10_000, dtype=torch.bool), torch.zeros(10_000, dtype=torch.long)
    means.add(mask[:1], (group[:1],), {"epe": torch.tensor([1000.0])})
    for _ in range(10):
        means.add(mask, (group,), {"epe": torch.full((10_000,), 2.0**-13)})
    assert means.sums["epe"].item() == 1000 + 100_000 * 2.0**-13


def grid_groups(pair: data.SweepPair) -> list[int]:
    """The groups of a pair's points, OUT where `grid` does not count them."""
    group = metrics.grid_groups(pair.category, pair.is_dynamic)
    is_input, _ = data.input_masks(pair)
    return torch.where(is_input, group, OUT).tolist()


def test_grid_groups_by_hand():
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    points = [[0, 0, 0], [50, 50, 0], [0, 0, 2.9], [51.2, 0, 0], [0, 0, -3.1]]
    pair = a_pair(
        points, category=[car, car, 0, car, 0], is_dynamic=[True, False, False, True, False]
    )
    assert grid_groups(pair) == [FD, FS, BS, OUT, OUT]

    # Ground does not count.
    ground = dataclasses.replace(pair, is_ground0=torch.tensor([True, False, True, False, False]))
    assert grid_groups(ground) == [OUT, FS, OUT, OUT, OUT]


def test_paper_groups_by_hand():
    """Category, displacement in a sweep, place -> group."""
    rows = [
        ("REGULAR_VEHICLE", 0.051, (0, 0, 0), FD),  # above 0.5 m/s
        ("REGULAR_VEHICLE", 0.049, (0, 0, 0), FS),
        ("PEDESTRIAN", 0.2, (35, -35, 0), FD),
        ("PEDESTRIAN", 0.2, (35.1, 0, 0), OUT),  # beyond 35 m
        ("WHEELED_RIDER", 0.2, (0, 0, 0), FD),
        ("MESSAGE_BOARD_TRAILER", 0.0, (0, 0, 0), FS),
        ("NONE", 0.0, (0, 0, 0), BS),
        ("STOP_SIGN", 0.0, (0, 0, 0), BS),  # labeled, but background
        ("CONSTRUCTION_CONE", 0.2, (0, 0, 0), BS),
        ("DOG", 0.2, (0, 0, 0), OUT),  # in no group
        ("ANIMAL", 0.0, (0, 0, 0), OUT),
    ]
    names, steps, points, groups = zip(*rows, strict=True)
    pair = a_pair(
        points,
        flow=[[step, 0, 0] for step in steps],
        category=[data.CATEGORIES.index(name) for name in names],
        is_valid=[False] * len(rows),  # invalid points are not excluded
    )
    is_input, _ = data.input_masks(pair)
    found, is_counted = metrics.paper_groups(
        pair.pc0, pair.flow, pair.category, is_input, data.CATEGORIES
    )
    assert torch.where(is_counted, found, OUT).tolist() == list(groups)

    # The published code lists the background; whatever is in neither list is a mover.
    background = (
        "NONE BOLLARD CONSTRUCTION_BARREL CONSTRUCTION_CONE MOBILE_PEDESTRIAN_CROSSING_SIGN "
        "SIGN STOP_SIGN"
    ).split()
    assert metrics._PAPER_MOVERS == set(data.CATEGORIES) - set(background) - {"ANIMAL", "DOG"}


# --- Sweeps ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Sweep:
    """Random points of every class, place and speed, and an estimate of their flow."""

    estimate: torch.Tensor
    flow: torch.Tensor
    points: torch.Tensor
    category: torch.Tensor
    is_dynamic: torch.Tensor
    is_valid: torch.Tensor
    is_ground: torch.Tensor
    is_input: torch.Tensor
    raw: tuple[torch.Tensor, torch.Tensor]
    is_in_mask: torch.Tensor
    estimated_dynamic: torch.Tensor


def a_sweep(seed: int, n: int = 3000) -> Sweep:
    rng = np.random.default_rng(seed)

    # Speeds (m per sweep) on both sides of every border. The background stands still.
    category = np.where(rng.random(n) < 0.4, 0, rng.integers(1, 31, n)).astype(np.uint8)
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    speed = rng.choice([0.0, 0.03, 0.049, 0.2, 1.0, 2.5], n) * rng.uniform(0.9, 1.1, n)
    speed *= category > 0
    flow = torch.tensor(direction * speed[:, None], dtype=torch.float32)
    estimate = flow + torch.tensor(rng.normal(scale=0.08, size=(n, 3)), dtype=torch.float32)
    rigid = torch.tensor([0.8, -0.1, 0.02])  # what the ego-motion adds to raw flow

    # Points within and beyond every border of x, y and z.
    points = torch.tensor(rng.uniform((-60, -60, -3.5), (60, 60, 3.5), (n, 3)), dtype=torch.float32)
    is_ground = torch.tensor(rng.random(n) < 0.2)
    return Sweep(
        estimate=estimate,
        flow=flow,
        points=points,
        category=torch.tensor(category),
        is_dynamic=flow.norm(dim=1) >= 0.05,
        is_valid=torch.tensor(rng.random(n) < 0.9),
        is_ground=is_ground,
        is_input=~is_ground & data.is_in_grid(points),
        raw=(estimate + rigid, flow + rigid),
        is_in_mask=torch.tensor(rng.random(n) < 0.7),
        estimated_dynamic=torch.tensor(rng.random(n) < 0.3),
    )


def scores_of(*sweeps: Sweep) -> dict[str, float]:
    scores = metrics.Scores(data.CATEGORIES)
    for sweep in sweeps:
        scores.add(**vars(sweep))
    return scores.numbers()


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    """Each expected number is found, to a micrometer."""
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


CLASSES_2024 = {
    "background": ["NONE"],
    "car": ["REGULAR_VEHICLE"],
    "pedestrian": ["PEDESTRIAN", "STROLLER", "WHEELCHAIR", "OFFICIAL_SIGNALER"],
    "wheeled_vru": (
        "BICYCLE BICYCLIST MOTORCYCLE MOTORCYCLIST WHEELED_DEVICE WHEELED_RIDER".split()
    ),
    "other_vehicles": (
        "BOX_TRUCK LARGE_VEHICLE RAILED_VEHICLE TRUCK TRUCK_CAB VEHICULAR_TRAILER "
        "ARTICULATED_BUS BUS SCHOOL_BUS"
    ).split(),
}


@pytest.mark.parametrize(("suffix", "reach"), [("", 35), ("_all_distances", 48)])
def test_the_2024_numbers_by_brute_force_over_points(suffix, reach):
    """A loop over points into lists by class and bucket, as the definition reads."""
    sweeps = [a_sweep(seed) for seed in range(3)]
    found = scores_of(*sweeps)
    edges = [*np.linspace(0, 2, 51), np.inf]
    cells, groups = {}, {"fd": [], "fs": [], "bs": []}
    for sweep in sweeps:
        for i in range(len(sweep.points)):
            # Is the point scored, and in which class?
            x, y, z = sweep.points[i].abs().tolist()
            name = data.CATEGORIES[sweep.category[i]]
            label = next((label for label, names in CLASSES_2024.items() if name in names), None)
            if label is None or sweep.is_ground[i] or not sweep.is_valid[i]:
                continue
            if max(x, y) >= reach or z >= 2.5:
                continue

            # Its bucket of speed, and its group of the three-way EPE.
            error = float(np.linalg.norm(sweep.estimate[i].double() - sweep.flow[i].double()))
            speed = float(np.linalg.norm(sweep.flow[i].double()))
            bucket = next(b for b in range(51) if edges[b] <= speed < edges[b + 1])
            cells.setdefault((label, bucket), []).append((error, speed))
            motion = "d" if speed >= 0.05 else "s"
            groups["bs" if label == "background" else "f" + motion].append(error)

    # Static: the error of the first bucket. Dynamic: of each other bucket, error over speed.
    dynamic, static = {}, {}
    for label in CLASSES_2024:
        static[label] = np.mean([error for error, _ in cells[label, 0]])
        shares = []
        for (of, bucket), cell in cells.items():
            if of == label and bucket > 0:
                errors, speeds = zip(*cell, strict=True)
                shares.append(np.mean(errors) / np.mean(speeds))
        dynamic[label] = np.mean(shares) if shares else np.nan

    # The background has no such bucket. It stays out of the mean.
    assert math.isnan(dynamic.pop("background"))
    assert math.isnan(found[f"bucketed_dynamic_background{suffix}"])
    three_way = {group: np.mean(errors) for group, errors in groups.items()}
    expected = {
        f"bucketed_dynamic_mean{suffix}": np.mean(list(dynamic.values())),
        f"bucketed_static_mean{suffix}": np.mean(list(static.values())),
        f"three_way_2024{suffix}": np.mean(list(three_way.values())),
    }
    expected |= {f"bucketed_dynamic_{label}{suffix}": share for label, share in dynamic.items()}
    expected |= {f"bucketed_static_{label}{suffix}": error for label, error in static.items()}
    expected |= {f"three_way_2024{suffix}_{group}": mean for group, mean in three_way.items()}
    assert_close(found, expected)


def test_a_bucket_by_hand():
    """Two moving cars (1 and 1.5 m per sweep), a parked one, two trucks, and a sign that moves."""
    names = ["REGULAR_VEHICLE"] * 3 + ["BUS", "TRUCK", "SIGN"]
    category = torch.tensor([CATEGORY[name] for name in names], dtype=torch.uint8)
    flow = torch.tensor([[1, 0, 0], [1.5, 0, 0], [0, 0, 0], [2, 0, 0], [5, 0, 0], [1, 0, 0.0]])
    error = torch.tensor([0.1, 0.6, 0.02, 0.7, 0.7, 9.0])
    estimate = flow + torch.stack([0 * error, error, 0 * error], dim=1)
    is_dynamic = flow.norm(dim=1) >= 0.05
    yes = torch.ones(6, dtype=torch.bool)
    scores = metrics.Scores(data.CATEGORIES)
    scores.add(estimate, flow, torch.zeros(6, 3), category, is_dynamic, yes, ~yes, yes)
    numbers = scores.numbers()

    # The trucks share the bucket of 2 m and more: a ratio of means, not a mean of ratios. Signs
    # have no class in 2024.
    assert numbers["bucketed_dynamic_car"] == pytest.approx((0.1 / 1 + 0.6 / 1.5) / 2)
    assert numbers["bucketed_static_car"] == pytest.approx(0.02)
    assert numbers["bucketed_dynamic_other_vehicles"] == pytest.approx(0.7 / 3.5)
    assert numbers["bucketed_dynamic_mean"] == pytest.approx((0.25 + 0.2) / 2)
    assert numbers["bucketed_static_mean"] == pytest.approx(0.02)
    assert numbers["three_way_2024_fd"] == pytest.approx((0.1 + 0.6 + 0.7 + 0.7) / 4)
    assert math.isnan(numbers["three_way_2024_bs"])
    assert math.isnan(numbers["av2_three_way"])

    # By class and speed, in the grid, where the sign counts as "other".
    fast_car = numbers["grid_epe_car_above_2_mps"]
    assert numbers["grid_epe_car_0.5_to_2_mps"] != fast_car == pytest.approx(0.35)
    assert numbers["grid_points_car_below_0.5_mps"] == 1
    assert numbers["grid_points_car_above_2_mps_close"] == 2
    assert numbers["grid_below_5_cm_car_below_0.5_mps"] == 1
    assert numbers["grid_below_10_cm_car_above_2_mps"] == 0
    assert numbers["grid_epe_other_above_2_mps"] == pytest.approx(9)


def test_an_error_that_is_nan_makes_no_metric_better():
    """Without the one mover whose estimate is NaN, every mean over groups would be lower."""
    whole, torn = a_sweep(0, 20_000), a_sweep(0, 20_000)

    # A fast car that every definition counts.
    is_everywhere = whole.is_input & whole.is_valid & whole.is_in_mask
    is_everywhere &= (whole.points.abs().amax(dim=1) < 30) & (whole.points[:, 2].abs() < 2)
    is_fast_car = whole.category == CATEGORY["REGULAR_VEHICLE"]
    is_fast_car &= whole.flow.norm(dim=1) > 0.5
    row = int((is_everywhere & is_fast_car).nonzero()[0])
    torn.estimate[row] = torch.nan
    torn.raw[0][row] = torch.nan

    before, after = scores_of(whole), scores_of(torn)
    keys = ["epe", "grid_epe", "grid_three_way", "paper_three_way", "av2_three_way"]
    for key in [*keys, "three_way_2024"]:
        assert math.isnan(after[key]) and not math.isnan(before[key]), key
    assert math.isnan(after["bucketed_dynamic_mean"])
    assert math.isnan(after["bucketed_dynamic_car"])


# On the borders of the definitions, in meters; the last one is a broken return.
BORDER_POINTS = torch.tensor(
    [
        [34.9, 0, 0],
        [35, 0, 0],
        [0, -47.9, 0],
        [48, 0, 0],
        [0, 0, 2.4],
        [0, 0, -2.5],
        [torch.nan, 0, 0],
    ]
)


def test_what_counts_in_2024_and_within_35_m():
    no = torch.zeros(7, dtype=torch.bool)
    scored = metrics.is_scored_2024(BORDER_POINTS, no, ~no)
    assert scored.tolist() == [True, True, True, False, True, False, False]
    assert not metrics.is_scored_2024(torch.zeros(7, 3), ~no, ~no).any()
    assert not metrics.is_scored_2024(torch.zeros(7, 3), no, no).any()

    # The error of point i is i + 1 meters.
    estimate, flow = torch.tensor([[i + 1.0, 0, 0] for i in range(7)]), torch.zeros(7, 3)
    category = torch.zeros(7, dtype=torch.uint8)
    scores = metrics.Scores(data.CATEGORIES)
    scores.add(estimate, flow, BORDER_POINTS, category, no, ~no, no, ~no)
    numbers = scores.numbers()
    assert numbers["three_way_2024_bs"] == (1 + 5) / 2
    assert numbers["three_way_2024_all_distances_bs"] == 11 / 4
    assert numbers["paper_three_way_bs"] == (1 + 2 + 5 + 6) / 4  # 35 m is within
    assert numbers["epe"] == (1 + 2 + 3 + 4 + 5 + 6) / 6  # a broken return has no error

    # At exactly 35 m a point is close to the paper and to av2, and far in 2024.
    assert numbers["grid_points_background_below_0.5_mps_far"] == 2
    assert numbers["grid_points_background_below_0.5_mps_close"] == 5


def test_what_counts_in_2023():
    """The points of the mask whose true flow is valid. The grid does not ask for that."""
    # The error of point i is i + 1 meters again. The second point's true flow is not valid.
    no = torch.zeros(7, dtype=torch.bool)
    is_valid = torch.tensor([True, False, True, True, True, True, True])
    estimate, flow = torch.tensor([[i + 1.0, 0, 0] for i in range(7)]), torch.zeros(7, 3)
    scores = metrics.Scores(data.CATEGORIES)
    scores.add(
        estimate,
        flow,
        BORDER_POINTS,
        torch.zeros(7, dtype=torch.uint8),
        no,
        is_valid,
        no,
        ~no,
        raw=(estimate, flow),
        is_in_mask=BORDER_POINTS.isfinite().all(dim=1),
        estimated_dynamic=~no,
    )

    # Of the valid points at 34.9, 47.9, 48, 2.4 and 2.5 m, two are farther than 35 m.
    numbers = scores.numbers()
    assert numbers["epe"] == (1 + 3 + 4 + 5 + 6) / 5
    assert numbers["grid_epe"] == 4
    assert numbers["av2_epe_background_static_close"] == (1 + 5 + 6) / 3
    assert numbers["av2_epe_background_static_far"] == (3 + 4) / 2


def test_rings_and_dynamic_iou_by_hand():
    points = torch.tensor([[5, -9.9, 0], [10, 0, 0], [0, 39, 0], [0, -51, 0.0]])
    estimate = torch.tensor([[0.06, 0, 0], [0.05, 0, 0], [0.5, 0, 0], [0.04, 0, 0]])
    flow, yes = torch.zeros(4, 3), torch.ones(4, dtype=torch.bool)
    car = torch.full((4,), CATEGORY["REGULAR_VEHICLE"], dtype=torch.uint8)
    is_dynamic = torch.tensor([True, True, False, False])
    scores = metrics.Scores(data.CATEGORIES)
    scores.add(estimate, flow, points, car, is_dynamic, yes, ~yes, yes)
    numbers = scores.numbers()
    assert numbers["grid_epe_fd_from_0_m"] == pytest.approx(0.06)
    assert numbers["grid_epe_fd_from_10_m"] == pytest.approx(0.05)
    assert numbers["grid_epe_fs_from_30_m"] == 0.5
    assert numbers["grid_epe_fs_from_40_m"] == pytest.approx(0.04)
    assert math.isnan(numbers["grid_epe_bs_from_0_m"])

    # The estimates find one of two dynamic points, and take a static one for dynamic: 1 of 3. A
    # second sweep is classified perfectly: 3 of 5. It counts, although its true flow is not valid.
    assert numbers["grid_dynamic_iou"] == pytest.approx(1 / 3)
    found = {"estimated_dynamic": is_dynamic}
    scores.add(estimate, flow, points, car, is_dynamic, ~yes, ~yes, yes, **found)
    assert scores.numbers()["grid_dynamic_iou"] == pytest.approx(3 / 5)


def test_av2_numbers_are_those_of_the_av2_package():
    evaluation = pytest.importorskip(
        "av2.evaluation.scene_flow.eval",
        reason="the av2 package is not installed; it is needed for comparison only",
    )
    import pandas
    from av2.evaluation.scene_flow.constants import FOREGROUND_BACKGROUND_BREAKDOWN

    # The package wants the points of the mask as arrays.
    sweeps, frames = [a_sweep(seed) for seed in range(4)], []
    for sweep in sweeps:
        rows = sweep.is_in_mask
        estimate, flow = (x[rows].numpy() for x in sweep.raw)
        is_close = (sweep.points[:, :2].abs() <= 35).all(dim=1)
        flags = (sweep.category, sweep.is_dynamic, is_close, sweep.is_valid)
        flags = [x[rows].numpy() for x in flags]
        is_found = sweep.estimated_dynamic[rows].numpy()
        frame = evaluation.compute_metrics(
            estimate, is_found, flow, *flags, FOREGROUND_BACKGROUND_BREAKDOWN
        )
        frames.append(pandas.DataFrame(frame))
    expected = evaluation.results_to_dict(pandas.concat(frames))

    # Its keys are like "EPE/Foreground/Dynamic/Close".
    found = scores_of(*sweeps)
    names = {
        "EPE": "epe",
        "Accuracy Strict": "acc_strict",
        "Accuracy Relax": "acc_relaxed",
        "Angle Error": "angle_error_rad",
    }
    compared = 0
    for key, value in expected.items():
        metric, *segment = key.split("/")
        if segment:
            mine = f"av2_{names[metric]}_" + "_".join(segment).lower()
            assert found[mine] == pytest.approx(value, abs=1e-6), key
            compared += 1
    assert compared == 4 * 3 * 3
    assert found["av2_dynamic_iou"] == pytest.approx(expected["Dynamic IoU"], abs=1e-9)
    assert found["av2_three_way"] == pytest.approx(expected["EPE 3-Way Average"], abs=1e-6)


def test_av2_numbers_by_brute_force_over_points():
    """The same without the package: mask and validity first, then by class, motion and distance."""
    sweeps = [a_sweep(seed) for seed in range(2)]
    errors, counts = {}, np.zeros((2, 2))
    for sweep in sweeps:
        for i in range(len(sweep.points)):
            if not (sweep.is_in_mask[i] and sweep.is_valid[i]):
                continue
            kind = "background" if sweep.category[i] == 0 else "foreground"
            motion = "dynamic" if sweep.is_dynamic[i] else "static"
            place = "close" if sweep.points[i, :2].abs().max() <= 35 else "far"
            error = float(np.linalg.norm((sweep.raw[0][i] - sweep.raw[1][i]).double()))
            for segment in (f"{kind}_{motion}", f"{kind}_{motion}_{place}"):
                errors.setdefault(segment, []).append(error)
            counts[int(sweep.is_dynamic[i]), int(sweep.estimated_dynamic[i])] += 1

    # Three segments, since no background moves here, and each of them close and far, too.
    assert len(errors) == 3 * 3
    means = {f"av2_epe_{segment}": np.mean(values) for segment, values in errors.items()}
    parts = {
        "av2_three_way_fd": means["av2_epe_foreground_dynamic"],
        "av2_three_way_fs": means["av2_epe_foreground_static"],
        "av2_three_way_bs": means["av2_epe_background_static"],
    }
    found = scores_of(*sweeps)
    assert_close(found, means | parts | {"av2_three_way": np.mean(list(parts.values()))})
    either = counts[1, 1] + counts[0, 1] + counts[1, 0]
    assert found["av2_dynamic_iou"] == pytest.approx(counts[1, 1] / either)


def test_a_perfect_estimate_has_no_error_and_no_motion_is_exactly_one_in_every_bucket():
    sweep = a_sweep(0)
    perfect = dataclasses.replace(
        sweep,
        estimate=sweep.flow,
        raw=(sweep.raw[1], sweep.raw[1]),
        estimated_dynamic=sweep.is_dynamic,
    )

    # Errors are 0, and shares of good points are 1.
    shares = ("acc", "iou", "below_5_cm", "below_10_cm")
    for key, value in scores_of(perfect).items():
        if "points" not in key and not math.isnan(value):
            assert value == (1 if any(share in key for share in shares) else 0), key

    no_motion = scores_of(dataclasses.replace(sweep, estimate=torch.zeros_like(sweep.flow)))
    for label in ("car", "pedestrian", "wheeled_vru", "other_vehicles", "mean"):
        for suffix in ("", "_all_distances"):
            assert no_motion[f"bucketed_dynamic_{label}{suffix}"] == 1.0


def rows_of(sweep: Sweep, index) -> Sweep:
    """The points of a sweep that an index picks."""
    picked = {name: value[index] for name, value in vars(sweep).items() if name != "raw"}
    return Sweep(**picked, raw=tuple(x[index] for x in sweep.raw))


def test_the_order_of_points_and_of_sweeps_and_how_they_are_cut_do_not_matter():
    first, second = a_sweep(0), a_sweep(1)
    order = torch.randperm(len(second.points), generator=torch.Generator().manual_seed(0))
    whole = scores_of(first, second)
    parts = scores_of(
        rows_of(second, order[:1000]),
        first,
        rows_of(second, order[1000:]),
        rows_of(first, slice(0, 0)),
    )
    for key, value in whole.items():
        if key != "grid_three_way_pair_mean":  # which is a mean over sweeps
            assert parts[key] == pytest.approx(value, rel=1e-9, nan_ok=True), key


def test_points_that_count_nowhere_change_nothing():
    first, second = a_sweep(0), a_sweep(1)
    no = torch.zeros_like(second.is_input)
    far = dataclasses.replace(
        second,
        points=second.points + 1000,
        is_valid=~second.is_valid,
        is_input=no,
        is_in_mask=no,
    )
    without, with_far = scores_of(first, second), scores_of(first, second, far)
    for key, value in without.items():
        if key != "epe":  # which is over every point whose true flow is known
            assert with_far[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key


# --- To read --------------------------------------------------------------------------------------


def test_the_report_prints_every_definition_and_a_dash_where_there_is_no_number():
    lines = metrics.report(scores_of(a_sweep(0))).splitlines()
    assert not any("nan" in line for line in lines)
    numbers = scores_of(a_sweep(0))
    row = next(line for line in lines if line.startswith("paper: ZeroFlow's published code"))
    keys = ["paper_three_way", *(f"paper_three_way_{group}" for group in metrics.GROUPS)]
    assert row.split()[-4:] == [f"{numbers[key]:.4f}" for key in keys]
    background = next(line for line in lines if line.startswith("background "))
    assert background.split()[-1] == "-"  # no background moves


def test_the_papers_rows_are_its_own_and_ours_is_sorted_in_among_them():
    known = {
        "ZeroFlow 1x": (0.087, 29.33),
        "ZeroFlow XL 5x": (0.054, 260.6),
        "FastFlow3D (human)": (0.076, 29.33),
        "NSFP": (0.068, 26285),
        "Chodosh et al.": (0.061, 35281),
        "ICP": (0.204, 523),
        "EgoFlow": (0.205, 2116),
        "Gojcic et al.": (0.083, 6088),
        "PPWC": (0.13, 79),
        "Sim2Real": (0.157, 99),
        "FlowStep3D": (0.161, 688),
    }
    assert {name: metrics.PAPER[name] for name in known} == known

    # Sorted by error, with milliseconds per pair in the last column.
    numbers = {"paper_three_way": 0.07, "seconds_per_pair": 2.5}
    _, head, *rows = metrics.beside_the_paper("NSFP", numbers).splitlines()
    assert "ms/pair" in head
    errors = [float(row.split()[-2]) for row in rows]
    assert len(rows) == len(metrics.PAPER) + 1
    assert errors == sorted(errors)
    words = [row.split() for row in rows]
    assert ["NSFP", "*", "0.0700", "2500.0"] in words
    assert ["NSFP", "0.0680", "26285.0"] in words
