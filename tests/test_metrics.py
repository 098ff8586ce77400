"""Every metric by hand, by brute force over points, and against Argoverse's own package where it is installed."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import a_pair

import data
import metrics
import zeroflow

FD, FS, BS, OUT = metrics.FD, metrics.FS, metrics.BS, metrics.NOT_COUNTED
CATEGORY = {name: number for number, name in enumerate(data.CATEGORIES)}


# --- Points ----------------------------------------------------------------------------------------------------------


def test_point_scores_by_hand():
    """Estimate, truth -> error, AccS, AccR, angle. Relative tolerance begins to matter beyond one metre."""
    rows = [
        ((0, 0, 0), (0, 0, 0), 0.0, True, True, 0.0),
        ((0.049, 0, 0), (0, 0, 0), 0.049, True, True, math.atan(0.49)),
        ((0.051, 0, 0), (0, 0, 0), 0.051, False, True, math.atan(0.51)),
        ((0.3, 0.099, 0), (0.3, 0, 0), 0.099, False, True, None),
        ((0.3, 0.101, 0), (0.3, 0, 0), 0.101, False, False, None),
        ((2.0, 0.099, 0), (2, 0, 0), 0.099, True, True, None),  # 4.95 % of 2 m
        ((2.0, 0.199, 0), (2, 0, 0), 0.199, False, True, None),
        ((0, 1, 0), (1, 0, 0), math.sqrt(2), False, False, math.acos(0.01 / 1.01)),  # at right angles, but for time
        ((-1, 0, 0), (1, 0, 0), 2.0, False, False, math.acos(-0.99 / 1.01)),
        ((1, 1e-4, 0), (1, 0, 0), 1e-4, True, True, 1e-4 / math.sqrt(1.01)),  # small, and still exact
    ]
    estimate, flow = (torch.tensor([row[i] for row in rows], dtype=torch.float32) for i in (0, 1))
    scores = metrics.point_scores(estimate, flow)
    assert scores["epe"].tolist() == pytest.approx([row[2] for row in rows], abs=1e-6)
    assert scores["acc_strict"].tolist() == [row[3] for row in rows]
    assert scores["acc_relaxed"].tolist() == [row[4] for row in rows]
    for found, row in zip(scores["angle_error_rad"].tolist(), rows, strict=True):
        assert row[5] is None or found == pytest.approx(row[5], abs=1e-6)


# --- Groups ----------------------------------------------------------------------------------------------------------


def test_group_means_by_hand():
    means = metrics.GroupMeans([3])
    means.add(torch.tensor([FD, FD, FS, OUT]), {"epe": torch.tensor([1.0, 3.0, 0.5, torch.nan])})
    assert means.mean().tolist()[:2] == [2.0, 0.5] and math.isnan(means.mean()[2])  # no background: NaN, not 0
    assert metrics.three_way(means.mean(), means.counts)[""] == 1.25  # ... and out of the mean
    assert means.mean(over=[0]).item() == 1.5
    means.add(torch.full((4,), BS), {"epe": torch.tensor([0.1, 0.3, 0.2, 0.2])})
    assert means.mean().tolist() == pytest.approx([2.0, 0.5, 0.2])
    assert metrics.three_way(means.mean(), means.counts) == pytest.approx({"": 0.9, "_fd": 2.0, "_fs": 0.5, "_bs": 0.2})
    assert means.mean(over=[0]).item() == pytest.approx((1 + 3 + 0.5 + 0.8) / 7)
    empty = metrics.GroupMeans([3])
    assert math.isnan(metrics.three_way(empty.mean(), empty.counts)[""])
    means.add(torch.tensor([FS]), {"epe": torch.tensor([torch.nan])})
    assert math.isnan(metrics.three_way(means.mean(), means.counts)[""])  # an unknown error is not a good one


def test_sums_stay_exact_over_many_sweeps():
    """In float32, a million errors of a tenth of a millimetre beside one of 1 km would be lost."""
    means = metrics.GroupMeans([1])
    means.add(torch.zeros(1, dtype=torch.long), {"epe": torch.tensor([1000.0])})
    for _ in range(10):
        means.add(torch.zeros(10_000, dtype=torch.long), {"epe": torch.full((10_000,), 2.0**-13)})
    assert means.sums["epe"].item() == 1000 + 100_000 * 2.0**-13


def grid_groups(pair: data.SweepPair) -> torch.Tensor:
    return metrics.grid_groups(pair.category, pair.is_dynamic, zeroflow.input_masks(pair)[0])


def test_grid_groups_by_hand():
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    points = [[0, 0, 0], [50, 50, 0], [0, 0, 2.9], [51.2, 0, 0], [0, 0, -3.1]]
    pair = a_pair(points, category=[car, car, 0, car, 0], is_dynamic=[True, False, False, True, False])
    assert grid_groups(pair).tolist() == [0, 1, 2, -1, -1]
    ground = dataclasses.replace(pair, is_ground0=torch.tensor([True, False, True, False, False]))
    assert grid_groups(ground).tolist() == [-1, 1, -1, -1, -1]


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
        ("STOP_SIGN", 0.0, (0, 0, 0), BS),  # labelled, but background
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
    is_input, _ = zeroflow.input_masks(pair)
    found = metrics.paper_groups(pair.pc0, pair.flow, pair.category, is_input, data.CATEGORIES)
    assert found.tolist() == list(groups)
    background = (
        "NONE BOLLARD CONSTRUCTION_BARREL CONSTRUCTION_CONE MOBILE_PEDESTRIAN_CROSSING_SIGN SIGN STOP_SIGN".split()
    )
    assert metrics._PAPER_MOVERS == set(data.CATEGORIES) - set(background) - {"ANIMAL", "DOG"}


# --- Sweeps ----------------------------------------------------------------------------------------------------------


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
    says_dynamic: torch.Tensor


def a_sweep(seed: int, n: int = 3000) -> Sweep:
    rng = np.random.default_rng(seed)
    category = np.where(rng.random(n) < 0.4, 0, rng.integers(1, 31, n)).astype(np.uint8)
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    speed = rng.choice([0.0, 0.03, 0.049, 0.2, 1.0, 2.5], n) * rng.uniform(0.9, 1.1, n) * (category > 0)
    flow = torch.tensor(direction * speed[:, None], dtype=torch.float32)
    estimate = flow + torch.tensor(rng.normal(scale=0.08, size=(n, 3)), dtype=torch.float32)
    rigid = torch.tensor([0.8, -0.1, 0.02])
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
        says_dynamic=torch.tensor(rng.random(n) < 0.3),
    )


def scores_of(*sweeps: Sweep) -> dict[str, float]:
    scores = metrics.Scores(data.CATEGORIES)
    for sweep in sweeps:
        scores.add(**vars(sweep))
    return scores.numbers()


def test_the_2024_numbers_by_brute_force_over_points():
    """A loop over points into lists by class and bucket, as the definition reads."""
    sweeps = [a_sweep(seed) for seed in range(3)]
    found = scores_of(*sweeps)
    edges = [*np.linspace(0, 2, 51), np.inf]
    meta = {
        "background": ["NONE"],
        "car": ["REGULAR_VEHICLE"],
        "pedestrian": "PEDESTRIAN STROLLER WHEELCHAIR OFFICIAL_SIGNALER".split(),
        "wheeled_vru": "BICYCLE BICYCLIST MOTORCYCLE MOTORCYCLIST WHEELED_DEVICE WHEELED_RIDER".split(),
        "other_vehicles": (
            "BOX_TRUCK LARGE_VEHICLE RAILED_VEHICLE TRUCK TRUCK_CAB VEHICULAR_TRAILER ARTICULATED_BUS BUS SCHOOL_BUS"
        ).split(),
    }
    for suffix, reach in (("", 35), ("_all_distances", 48)):
        cells, groups = {}, {"fd": [], "fs": [], "bs": []}
        for sweep in sweeps:
            for i in range(len(sweep.points)):
                x, y, z = sweep.points[i].abs().tolist()
                name = data.CATEGORIES[sweep.category[i]]
                label = next((label for label, names in meta.items() if name in names), None)
                if max(x, y) >= reach or z >= 2.5 or sweep.is_ground[i] or not sweep.is_valid[i] or label is None:
                    continue
                error = float(np.linalg.norm(sweep.estimate[i].double() - sweep.flow[i].double()))
                speed = float(np.linalg.norm(sweep.flow[i].double()))
                bucket = next(b for b in range(51) if edges[b] <= speed < edges[b + 1])
                cells.setdefault((label, bucket), []).append((error, speed))
                groups["bs" if label == "background" else "fd" if speed >= 0.05 else "fs"].append(error)
        dynamic, static = {}, {}
        for label in meta:
            static[label] = np.mean([error for error, _ in cells[label, 0]])
            normalised = [
                np.mean([error for error, _ in cell]) / np.mean([speed for _, speed in cell])
                for (of, bucket), cell in cells.items()
                if of == label and bucket > 0
            ]
            dynamic[label] = np.mean(normalised) if normalised else np.nan
            assert found[f"bucketed_static_{label}{suffix}"] == pytest.approx(static[label], abs=1e-6)
            assert found[f"bucketed_dynamic_{label}{suffix}"] == pytest.approx(dynamic[label], abs=1e-6, nan_ok=True)
        assert math.isnan(dynamic["background"])  # which has no such bucket, and is out of the mean
        assert found[f"bucketed_dynamic_mean{suffix}"] == pytest.approx(np.nanmean(list(dynamic.values())), abs=1e-6)
        assert found[f"bucketed_static_mean{suffix}"] == pytest.approx(np.mean(list(static.values())), abs=1e-6)
        for group, errors in groups.items():
            assert found[f"three_way_2024{suffix}_{group}"] == pytest.approx(np.mean(errors), abs=1e-6)
        mean = np.mean([np.mean(errors) for errors in groups.values()])
        assert found[f"three_way_2024{suffix}"] == pytest.approx(mean, abs=1e-6)


def test_a_bucket_by_hand():
    """A car at 1 m and one at 1.5 m a sweep, off by 0.1 and 0.6 m; a parked one; 2 m and more are one bucket."""
    car, sign = CATEGORY["REGULAR_VEHICLE"], CATEGORY["SIGN"]
    flow = torch.tensor([[1, 0, 0], [1.5, 0, 0], [0, 0, 0], [2, 0, 0], [5, 0, 0], [1, 0, 0.0]])
    off = torch.tensor([0.1, 0.6, 0.02, 0.7, 0.7, 9.0])
    category = torch.tensor([car, car, car, CATEGORY["BUS"], CATEGORY["TRUCK"], sign], dtype=torch.uint8)
    yes = torch.ones(6, dtype=torch.bool)
    scores = metrics.Scores(data.CATEGORIES)
    estimate = flow + torch.stack([0 * off, off, 0 * off], dim=1)
    scores.add(estimate, flow, torch.zeros(6, 3), category, flow.norm(dim=1) >= 0.05, yes, ~yes, yes)
    numbers = scores.numbers()
    assert numbers["bucketed_dynamic_car"] == pytest.approx((0.1 / 1 + 0.6 / 1.5) / 2)
    assert numbers["bucketed_static_car"] == pytest.approx(0.02)
    assert numbers["bucketed_dynamic_other_vehicles"] == pytest.approx(0.7 / 3.5)  # of means, not a mean of ratios
    assert numbers["bucketed_dynamic_mean"] == pytest.approx((0.25 + 0.2) / 2)  # the sign is in no class
    assert numbers["bucketed_static_mean"] == pytest.approx(0.02)
    assert numbers["three_way_2024_fd"] == pytest.approx((0.1 + 0.6 + 0.7 + 0.7) / 4)
    assert math.isnan(numbers["three_way_2024_bs"]) and math.isnan(numbers["av2_three_way"])
    assert numbers["grid_epe_car_0.5_to_2_mps"] != numbers["grid_epe_car_above_2_mps"] == pytest.approx(0.35)
    assert (numbers["grid_points_car_below_0.5_mps"], numbers["grid_points_car_above_2_mps_close"]) == (1, 2)
    assert numbers["grid_below_5_cm_car_below_0.5_mps"] == 1 and numbers["grid_below_10_cm_car_above_2_mps"] == 0
    assert numbers["grid_epe_other_above_2_mps"] == pytest.approx(9)


def test_an_error_that_is_no_number_makes_no_number_better():
    """Without the one mover whose estimate is NaN, every mean over groups would be lower."""
    whole, torn = a_sweep(0, 20_000), a_sweep(0, 20_000)
    is_everywhere = whole.is_input & whole.is_valid & whole.is_in_mask & (whole.points.abs().amax(dim=1) < 30)
    is_car = whole.category == CATEGORY["REGULAR_VEHICLE"]
    row = int((is_everywhere & is_car & (whole.flow.norm(dim=1) > 0.5) & (whole.points[:, 2].abs() < 2)).nonzero()[0])
    torn.estimate[row] = torn.raw[0][row] = torch.nan
    before, after = scores_of(whole), scores_of(torn)
    for key in ("epe", "grid_epe", "grid_three_way", "paper_three_way", "av2_three_way", "three_way_2024"):
        assert math.isnan(after[key]) and not math.isnan(before[key]), key
    assert math.isnan(after["bucketed_dynamic_mean"]) and math.isnan(after["bucketed_dynamic_car"])


def test_what_counts_in_2024_and_within_35_m():
    points = [[34.9, 0, 0], [35, 0, 0], [0, -47.9, 0], [48, 0, 0], [0, 0, 2.4], [0, 0, -2.5], [torch.nan, 0, 0]]
    no = torch.zeros(7, dtype=torch.bool)
    scored = metrics.is_scored_2024(torch.tensor(points), no, ~no)
    assert scored.tolist() == [True, True, True, False, True, False, False]
    assert not metrics.is_scored_2024(torch.zeros(7, 3), ~no, ~no).any()
    assert not metrics.is_scored_2024(torch.zeros(7, 3), no, no).any()
    scores = metrics.Scores(data.CATEGORIES)  # errors 1, 2, 3 at 34.9, 35 and 47.9 m
    estimate = torch.tensor([[i + 1.0, 0, 0] for i in range(7)])
    kind = torch.zeros(7, dtype=torch.uint8)
    scores.add(estimate, torch.zeros(7, 3), torch.tensor(points), kind, no, ~no, no, ~no)
    numbers = scores.numbers()
    assert numbers["three_way_2024_bs"] == (1 + 5) / 2 and numbers["three_way_2024_all_distances_bs"] == 11 / 4
    assert numbers["paper_three_way_bs"] == (1 + 2 + 5 + 6) / 4  # 35 m is within
    assert numbers["epe"] == (1 + 2 + 3 + 4 + 5 + 6) / 6  # a point that is nowhere has no error
    # At exactly 35 m a point is close to the paper and to av2, and far in 2024.
    assert numbers["grid_points_background_below_0.5_mps_far"] == 2
    assert numbers["grid_points_background_below_0.5_mps_close"] == 5
    is_valid = torch.tensor([True, False, True, True, True, True, True])
    scores = metrics.Scores(data.CATEGORIES)
    raw, is_known = (estimate, torch.zeros(7, 3)), torch.tensor(points).isfinite().all(dim=1)
    scores.add(estimate, raw[1], torch.tensor(points), kind, no, is_valid, no, ~no, raw, is_known, says_dynamic=~no)
    numbers = scores.numbers()
    assert numbers["epe"] == (1 + 3 + 4 + 5 + 6) / 5  # nor has one whose true flow is not known
    assert numbers["grid_epe"] == 4 and numbers["av2_epe_background_static_close"] == (1 + 5 + 6) / 3
    assert numbers["av2_epe_background_static_far"] == (3 + 4) / 2


def test_rings_and_dynamic_iou_by_hand():
    points = torch.tensor([[5, -9.9, 0], [10, 0, 0], [0, 39, 0], [0, -51, 0.0]])
    estimate = torch.tensor([[0.06, 0, 0], [0.05, 0, 0], [0.5, 0, 0], [0.04, 0, 0]])
    yes, car = torch.ones(4, dtype=torch.bool), torch.full((4,), CATEGORY["REGULAR_VEHICLE"], dtype=torch.uint8)
    is_dynamic = torch.tensor([True, True, False, False])
    scores = metrics.Scores(data.CATEGORIES)
    scores.add(estimate, torch.zeros(4, 3), points, car, is_dynamic, yes, ~yes, yes)
    numbers = scores.numbers()
    assert numbers["grid_epe_fd_from_0_m"] == pytest.approx(0.06)
    assert numbers["grid_epe_fd_from_10_m"] == pytest.approx(0.05)
    assert numbers["grid_epe_fs_from_30_m"] == 0.5 and numbers["grid_epe_fs_from_40_m"] == pytest.approx(0.04)
    assert math.isnan(numbers["grid_epe_bs_from_0_m"])
    assert numbers["grid_dynamic_iou"] == pytest.approx(1 / 3)  # found one of two, and one that is none
    scores.add(estimate, torch.zeros(4, 3), points, car, is_dynamic, ~yes, ~yes, yes, says_dynamic=is_dynamic)
    assert scores.numbers()["grid_dynamic_iou"] == pytest.approx(3 / 5)  # the grid's: valid or not


def test_av2_numbers_are_those_of_the_av2_package():
    evaluation = pytest.importorskip(
        "av2.evaluation.scene_flow.eval", reason="the av2 package is not installed; it is needed for comparison only"
    )
    import pandas
    from av2.evaluation.scene_flow.constants import FOREGROUND_BACKGROUND_BREAKDOWN

    sweeps, frames = [a_sweep(seed) for seed in range(4)], []
    for sweep in sweeps:
        rows = sweep.is_in_mask
        estimate, flow = (x[rows].numpy() for x in sweep.raw)
        is_close = (sweep.points[:, :2].abs() <= 35).all(dim=1)
        flags = (x[rows].numpy() for x in (sweep.category, sweep.is_dynamic, is_close, sweep.is_valid))
        says = sweep.says_dynamic[rows].numpy()
        frames.append(
            pandas.DataFrame(evaluation.compute_metrics(estimate, says, flow, *flags, FOREGROUND_BACKGROUND_BREAKDOWN))
        )
    expected = evaluation.results_to_dict(pandas.concat(frames))
    found = scores_of(*sweeps)
    names = {"EPE": "epe", "Accuracy Strict": "acc_strict", "Accuracy Relax": "acc_relaxed"}
    names["Angle Error"] = "angle_error_rad"
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
    found, errors, counts = scores_of(*sweeps), {}, np.zeros((2, 2))
    for sweep in sweeps:
        for i in range(len(sweep.points)):
            if not (sweep.is_in_mask[i] and sweep.is_valid[i]):
                continue
            ground = "background" if sweep.category[i] == 0 else "foreground"
            motion = "dynamic" if sweep.is_dynamic[i] else "static"
            place = "close" if sweep.points[i, :2].abs().max() <= 35 else "far"
            error = float(np.linalg.norm((sweep.raw[0][i] - sweep.raw[1][i]).double()))
            for segment in (f"{ground}_{motion}", f"{ground}_{motion}_{place}"):
                errors.setdefault(segment, []).append(error)
            counts[int(sweep.is_dynamic[i]), int(sweep.says_dynamic[i])] += 1
    assert len(errors) == 9
    for segment, values in errors.items():
        assert found[f"av2_epe_{segment}"] == pytest.approx(np.mean(values), abs=1e-6)
    parts = [np.mean(errors[name]) for name in ("foreground_dynamic", "foreground_static", "background_static")]
    names = ["av2_three_way", "av2_three_way_fd", "av2_three_way_fs", "av2_three_way_bs"]
    assert [found[name] for name in names] == pytest.approx([np.mean(parts), *parts], abs=1e-6)
    assert found["av2_dynamic_iou"] == pytest.approx(counts[1, 1] / (counts[1, 1] + counts[0, 1] + counts[1, 0]))


def test_a_perfect_estimate_has_no_error_and_no_motion_is_exactly_one_in_every_bucket():
    sweep = a_sweep(0)
    perfect = dataclasses.replace(sweep, estimate=sweep.flow, raw=(sweep.raw[1],) * 2, says_dynamic=sweep.is_dynamic)
    numbers = scores_of(perfect)
    for key, value in numbers.items():
        if "points" not in key and not math.isnan(value):
            assert value == (1 if any(word in key for word in ("acc", "iou", "below_5_cm", "below_10_cm")) else 0), key
    still = scores_of(dataclasses.replace(sweep, estimate=torch.zeros_like(sweep.flow)))
    for label, suffix in itertools.product(
        ("car", "pedestrian", "wheeled_vru", "other_vehicles", "mean"), ("", "_all_distances")
    ):
        assert still[f"bucketed_dynamic_{label}{suffix}"] == 1.0


def test_the_order_of_points_and_of_sweeps_and_how_they_are_cut_do_not_matter():
    first, second = a_sweep(0), a_sweep(1)
    order = torch.randperm(len(second.points), generator=torch.Generator().manual_seed(0))

    def rows(sweep: Sweep, index) -> Sweep:
        picked = {name: value[index] for name, value in vars(sweep).items() if name != "raw"}
        return Sweep(**picked, raw=tuple(x[index] for x in sweep.raw))

    whole = scores_of(first, second)
    parts = scores_of(rows(second, order[:1000]), first, rows(second, order[1000:]), rows(first, slice(0, 0)))
    for key, value in whole.items():
        if key != "grid_three_way_pair_mean":  # which is of sweeps
            assert parts[key] == pytest.approx(value, rel=1e-9, nan_ok=True), key
    # Points that count nowhere change nothing.
    far = dataclasses.replace(
        second, points=second.points + 1000, is_in_mask=~second.is_valid, is_valid=~second.is_valid
    )
    far = dataclasses.replace(far, is_input=torch.zeros_like(far.is_input), is_in_mask=torch.zeros_like(far.is_input))
    with_far = scores_of(first, second, far)
    assert all(
        with_far[key] == pytest.approx(value, rel=1e-12, nan_ok=True) for key, value in whole.items() if key != "epe"
    )


def test_the_papers_rows_are_its_own_and_ours_stands_among_them():
    known = {"ZeroFlow 1x": (0.087, 29.33), "ZeroFlow XL 5x": (0.054, 260.6), "FastFlow3D (human)": (0.076, 29.33)}
    known |= {"NSFP": (0.068, 26285), "Chodosh et al.": (0.061, 35281), "ICP": (0.204, 523), "EgoFlow": (0.205, 2116)}
    known |= {"Gojcic et al.": (0.083, 6088), "PPWC": (0.13, 79), "Sim2Real": (0.157, 99), "FlowStep3D": (0.161, 688)}
    assert {name: metrics.PAPER[name] for name in known} == known
    rows = metrics.beside_the_paper("NSFP", {"paper_three_way": 0.07, "seconds_per_pair": 2.5}).splitlines()[2:]
    errors = [float(row.split()[-2]) for row in rows]
    assert len(rows) == len(metrics.PAPER) + 1 and errors == sorted(errors)
    assert ["NSFP", "*", "0.0700", "2500.0"] in [row.split() for row in rows]
    assert ["NSFP", "0.0680", "26285.0"] in [row.split() for row in rows]
