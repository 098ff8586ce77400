"""Argoverse 2 pairs against labels that someone else made, hand arithmetic, and broken files."""

import dataclasses
import json
import os
import pickle
import shutil
import sys
import tracemalloc

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather
from scipy.spatial.transform import Rotation

import challenge
import clouds
import data
import synthetic
import vectormap


def rigid(yaw_deg: float, translation) -> np.ndarray:
    """A turn about z and a shift, written out: independent of the module's own helpers."""
    c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    x, y, z = translation
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


# --- A real pair ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def av2_labels(av2_folder) -> dict[str, np.ndarray]:
    """True flow of the real pair, made by Argoverse 2's own tools."""
    table = feather.read_table(next(av2_folder.glob("*/flow_labels.feather")))
    return {name: table[name].to_numpy() for name in table.column_names}


def test_true_flow_of_a_real_pair_is_that_of_argoverses_own_tools(av2_pair, av2_labels):
    assert len(av2_pair.pc0) == 99_229
    np.testing.assert_array_equal(av2_pair.category, av2_labels["classes"])
    np.testing.assert_array_equal(av2_pair.is_dynamic, av2_labels["dynamic"])
    theirs = np.stack([av2_labels[f"flow_t{axis}_m"] for axis in "xyz"], axis=1)
    error = np.linalg.norm(data.total_flow(av2_pair.flow, av2_pair).numpy() - theirs, axis=1)
    is_foreground = ((av2_pair.category > 0) & av2_pair.is_valid).numpy()
    assert error[is_foreground].max() < 1e-6
    assert error.max() < 1e-3  # their rigid flow came from float32 poses


def test_ground_of_a_real_pair_by_both_rules(av2_folder, av2_pair, av2_labels):
    assert (~av2_pair.is_ground0).sum() == 80_475
    assert (~av2_pair.is_ground1).sum() == 80_696
    assert (~av2_pair.is_ground0 & data.is_in_grid(av2_pair.pc0)).sum() == 60_769
    assert (~av2_pair.is_ground1 & data.is_in_grid(av2_pair.pc1)).sum() == 60_865
    log = data._read_log(av2_folder / av2_pair.log_id, None, "raster")
    city_SE3_ego0 = log.city_SE3_ego(av2_pair.timestamp0_ns)
    points_city = data.transform(city_SE3_ego0, av2_pair.pc0.double().numpy())
    by_av2s_rule = log.ground.is_ground(points_city, threshold_m=0.30, snap=np.trunc)
    assert (by_av2s_rule != av2_labels["is_ground_0"]).sum() <= 1
    mask = challenge.mask_of(data.open_dataset(av2_folder), av2_pair).numpy()
    is_near = (av2_pair.pc0[:, :2].abs() <= 50).all(dim=1).numpy()
    assert (
        mask != (is_near & ~av2_labels["is_ground_0"])
    ).sum() <= 1 and 0 < mask.sum() < is_near.sum()


def agreement(mask, truth) -> tuple[float, float, float]:
    """F1, precision, recall."""
    both = (mask & truth).sum().item()
    return (
        2 * both / (mask.sum().item() + truth.sum().item()),
        both / mask.sum().item(),
        both / truth.sum().item(),
    )


def test_ground_of_a_real_pair_without_its_raster(av2_folder, av2_pair):
    """Measured: vector map, precision .991, .989, recall .895, .895; no map, F1 .966, .966."""
    vector, points = (
        data.open_dataset(av2_folder, ground=ground)[0] for ground in ("vector", "points")
    )
    for sweep in "01":
        inside = data.is_in_grid(getattr(av2_pair, f"pc{sweep}"))
        raster, vectors, without = (
            getattr(pair, f"is_ground{sweep}")[inside] for pair in (av2_pair, vector, points)
        )
        _, precision, recall = agreement(vectors, raster)
        assert precision >= 0.98 and recall >= 0.87
        assert agreement(without, raster)[0] >= 0.95


# --- Frames ---------------------------------------------------------------------------------------


def test_total_flow_transforms_the_end_point_instead_of_adding():
    """A car at 15 m/s, seen from an ego that turns at 30°/s: adding is 8 cm wrong."""
    ego1_SE3_ego0 = rigid(-3.0, (-1.0, 0.1, 0.0))  # 3° in 0.1 s
    point, residual = np.array([20.0, 5.0, 1.0]), np.array([1.5, 0.0, 0.0])
    pair = data.SweepPair(
        pc0=torch.tensor(point[None], dtype=torch.float32),
        pc1=torch.zeros(0, 3),
        is_ground0=torch.zeros(1, dtype=torch.bool),
        is_ground1=torch.zeros(0, dtype=torch.bool),
        ego1_SE3_ego0=torch.from_numpy(ego1_SE3_ego0),
        log_id="log",
        timestamp0_ns=0,
        timestamp1_ns=1,
    )
    total = data.total_flow(torch.tensor(residual[None], dtype=torch.float32), pair)[0].numpy()
    expected = (ego1_SE3_ego0 @ [*(point + residual), 1])[:3] - point
    np.testing.assert_allclose(total, expected, atol=1e-6)
    added = (ego1_SE3_ego0 @ [*point, 1])[:3] - point + residual
    assert np.linalg.norm(added - total) == pytest.approx(0.0785, abs=1e-3)
    back = data.residual_flow(torch.from_numpy(total[None]), pair)[0].numpy()
    np.testing.assert_allclose(back, residual, atol=1e-6)


def test_inverse_of_a_transform_five_kilometers_away_is_exact():
    city_SE3_ego = rigid(33.0, (5000.0, -2300.0, 70.0))
    np.testing.assert_allclose(data.inverse(city_SE3_ego) @ city_SE3_ego, np.eye(4), atol=1e-11)


def test_nothing_moves_in_a_static_world_however_the_ego_turns(tmp_path, monkeypatch):
    """Parked cars, people at rest, a fast turning ego: the residual flow is zero to 1e-5 m."""

    def frozen_street(settings, number):
        street = make_street(settings, number)
        things = [dataclasses.replace(thing, s_mps=0.0, left_mps=0.0) for thing in street.things]
        return dataclasses.replace(street, things=things, curvature=1 / 40, ego_mps=15.0)

    make_street = synthetic.make_street
    monkeypatch.setattr(synthetic, "make_street", frozen_street)
    synthetic.write_logs(
        tmp_path, 1, synthetic.StreetSettings(azimuths=400, range_m=25.6, sweeps=2)
    )
    (pair,) = data.open_dataset(tmp_path)
    turn_deg = np.degrees(Rotation.from_matrix(pair.ego1_SE3_ego0[:3, :3]).magnitude())
    assert turn_deg > 2  # in 0.1 s
    assert (pair.category > 0).sum() > 500
    assert pair.flow[pair.is_valid].abs().max() < 1e-5
    assert not pair.is_dynamic.any()
    rigid_flow = data.total_flow(torch.zeros_like(pair.pc0), pair)
    assert rigid_flow.norm(dim=1).median() > 1.0  # while everything moved in the ego frame


def test_flow_from_poses_and_boxes_is_the_one_computed_by_hand(tmp_path):
    """One car in two sweeps, 5 km from the origin, ego turning: every number by hand."""
    city_SE3_ego0, city_SE3_ego1 = rigid(30, (5000, 2000, 10)), rigid(32, (5001, 2000.5, 10))
    city_SE3_car0, city_SE3_car1 = rigid(75, (5010, 2003, 11)), rigid(80, (5011, 2004, 11))
    in_car = np.array(
        [[2.2, 0.9, 0.7], [-2.2, -0.9, -0.7], [2.4, 0, 0]]
    )  # box 4.3 x 1.8 x 1.5; the last is 15 cm off
    pc0 = (np.linalg.inv(city_SE3_ego0) @ city_SE3_car0 @ np.c_[in_car, np.ones(3)].T)[:3].T
    write_log(
        tmp_path / "log", [pc0, pc0], [city_SE3_ego0, city_SE3_ego1], [city_SE3_car0, city_SE3_car1]
    )
    (pair,) = data.open_dataset(tmp_path / "log")
    moved = (
        np.linalg.inv(city_SE3_ego0) @ city_SE3_car1 @ np.linalg.inv(city_SE3_car0) @ city_SE3_ego0
    )[:3]
    points = pair.pc0.numpy().astype(float)
    expected = np.c_[points, np.ones(3)] @ moved.T - points
    np.testing.assert_allclose(pair.flow[:2], expected[:2], atol=1e-6)
    assert pair.flow[2].abs().sum() == 0
    assert pair.category.tolist() == [data.CATEGORIES.index("REGULAR_VEHICLE")] * 2 + [0]
    assert pair.is_dynamic.tolist() == [True, True, False]
    ego0_SE3_ego1 = np.linalg.inv(city_SE3_ego0) @ city_SE3_ego1
    np.testing.assert_allclose(
        pair.pc1, (np.c_[points, np.ones(3)] @ ego0_SE3_ego1.T)[:, :3], atol=1e-5
    )


def test_where_boxes_overlap_the_later_one_in_the_file_wins(tmp_path):
    """Two moving boxes over one point; then the second is gone in sweep 1: no flow, not valid."""
    pose, pc = rigid(0, (5000, 2000, 10)), np.array([[10.0, 0, 1]])
    cars = [rigid(0, (5010, 2000, 11)), rigid(0, (5011, 2000, 11))]
    write_log(tmp_path / "log", [pc, pc], [pose, pose], cars)
    file = tmp_path / "log" / "annotations.feather"
    first = feather.read_table(file).to_pylist()
    second = [{**row, "track_uuid": "bus", "category": "BUS"} for row in first]
    second[1]["tx_m"] += 2
    for name, rows, flow, is_valid in (
        ("both", first + second, 3.0, True),
        ("gone", first + second[:1], 0.0, False),
    ):
        shutil.copytree(tmp_path / "log", tmp_path / name)
        feather.write_feather(
            pyarrow.Table.from_pylist(rows), tmp_path / name / "annotations.feather"
        )
        (pair,) = data.open_dataset(tmp_path / name)
        assert pair.category.item() == data.CATEGORIES.index("BUS")
        assert (
            pair.flow[0, 0].item() == pytest.approx(flow, abs=1e-6)
            and pair.is_valid.item() == is_valid
        )


def test_each_sweeps_ground_is_found_with_its_own_pose(tmp_path):
    """The same points in both sweeps, but the second ego is 1 m higher: its points are, too."""
    pc, car = np.array([[5.0, 0, 0.2], [5.0, 1, -0.9]]), rigid(0, (900, 0, 0))
    poses = [rigid(0, (0.0, 0, 0)), rigid(0, (0.0, 0, 1.0))]
    write_log(tmp_path / "log", [pc, pc], poses, [car, car])
    np.save(
        tmp_path / "log" / "map" / "log_ground_height_surface____PIT.npy",
        np.zeros((20, 20), dtype=np.float16),
    )
    (pair,) = data.open_dataset(tmp_path / "log")
    assert pair.is_ground0.tolist() == [True, True] and pair.is_ground1.tolist() == [False, True]


def test_a_box_without_points_in_either_sweep_is_dropped(tmp_path):
    pose, pc = rigid(0, (5000, 2000, 10)), np.array([[10.0, 0, 1]])
    cars = [rigid(0, (5010, 2000, 11)), rigid(0, (5011, 2000, 11))]
    for interior, category, is_valid in (
        ((5, 5), 19, True),
        ((5, 0), 19, False),
        ((0, 5), 0, True),
    ):
        folder = tmp_path / f"log{interior}"
        write_log(folder, [pc, pc], [pose, pose], cars, interior)
        (pair,) = data.open_dataset(folder)
        assert (pair.category.item(), pair.is_valid.item()) == (category, is_valid)
        assert pair.flow[0, 0].item() == (1.0 if interior == (5, 5) else 0.0)
        # The other truth keeps such boxes.
        (pair,) = data.open_dataset(folder, truth="grown")
        assert (pair.category.item(), pair.is_valid.item()) == (19, True)


def test_boxes_that_grow_with_speed_by_hand(street_folder, tmp_path):
    """A box of 4 x 2 x 1.5 m, 10 m ahead, that moves by 1 m along y; and what is around it."""

    def box(x, y, track="car"):
        return data.Box(track, 19, np.array([4.0, 2.0, 1.5]), rigid(0, (x, y, 0.0)))

    # Two points in the box: the norm over points is (0, sqrt(2), 0), its mean sqrt(2) / 3 = 0.471.
    # So the box is 4 + 0.2 + 0.236 m long, 2.2 m wide and 1.7 m high: its half sizes are 2.218, 1.1
    # and 0.85.
    inside = [[10.0, 0, 0], [11.9, 0.9, 0.7]]
    grown = [[12.21, 0, 0], [10.0, 1.09, 0], [10.0, 0, -0.84]]
    outside = [[12.23, 0, 0], [10.0, 1.11, 0], [10.0, 0, 0.86], [np.nan, 0, 0]]
    points = np.array(inside + grown + outside)
    flow, category, is_dynamic, is_valid = data.grown_flow(
        points, [box(10, 0)], [box(10, 1)], np.eye(4)
    )
    assert category.tolist() == [19] * 5 + [0] * 4
    np.testing.assert_allclose(flow[:5], np.tile([0, 1, 0], (5, 1)), atol=1e-6)
    assert not flow[5:].any() and is_dynamic.tolist() == [True] * 5 + [False] * 4
    assert is_valid.tolist() == [True] * 8 + [False]

    # Hardly moving, mean norm sqrt(2) * 0.08 / 3 = 0.0377: as annotated, without even the 0.2 m.
    _, category, _, _ = data.grown_flow(points, [box(10, 0)], [box(10, 0.08)], np.eye(4))
    assert category.tolist() == [19, 19] + [0] * 7
    # More than 4 m: the growth ends at 2 m, half of it at either end.
    ends = np.array([[10.0, 0, 0], [13.09, 0, 0], [13.11, 0, 0]])
    _, category, _, _ = data.grown_flow(ends, [box(10, 0)], [box(30, 0)], np.eye(4))
    assert category.tolist() == [19, 19, 0]
    # An object that is gone has no flow that could be known, and keeps the class of background.
    _, category, _, is_valid = data.grown_flow(points, [box(10, 0)], [box(10, 1, "bus")], np.eye(4))
    assert not category.any() and is_valid.tolist() == [False] * 2 + [True] * 6 + [False]

    # The ego turns and drives, and nothing else moves: no box grows.
    ego1_SE3_ego0 = np.linalg.inv(rigid(20, (2.0, 1.0, 0.0)))
    there = box(10, 0)._replace(ego_SE3_box=ego1_SE3_ego0 @ rigid(0, (10, 0, 0)))
    flow, category, _, _ = data.grown_flow(points, [box(10, 0)], [there], ego1_SE3_ego0)
    assert category.tolist() == [19, 19] + [0] * 7 and np.abs(flow).max() < 1e-6


def test_the_truth_of_a_data_set_can_be_chosen(street_folder, tmp_path):
    for truth, flow_of in (("av2", data.true_residual_flow), ("grown", data.grown_flow)):
        dataset = data.open_dataset(street_folder, truth=truth)
        pair = dataset[0]
        boxes = dataset.log(pair.log_id).boxes
        boxes0, boxes1 = boxes[pair.timestamp0_ns], boxes[pair.timestamp1_ns]
        points = pair.pc0.double().numpy()
        flow, category, _, _ = flow_of(points, boxes0, boxes1, pair.ego1_SE3_ego0.numpy())
        np.testing.assert_allclose(pair.flow, flow, atol=1e-6)
        assert np.array_equal(pair.category, category) and pair.is_dynamic.any()

    with pytest.raises(data.DataError, match="truth 'bigger': choose av2, grown"):
        data.open_dataset(street_folder, truth="bigger")
    np.save(tmp_path / "0.npy", points)
    with pytest.raises(data.DataError, match="truth 'grown' is for Argoverse 2's boxes"):
        data.open_dataset(tmp_path, truth="grown")


def test_where_the_lidar_stood_in_sweep_1_is_read_from_the_calibration(street_folder, tmp_path):
    log = next(street_folder.iterdir())
    pair = data.open_dataset(log)[0]
    mounted = np.array([*synthetic.LIDAR_ORIGINS.mean(axis=0), 1.0])
    expected = (np.linalg.inv(pair.ego1_SE3_ego0.numpy()) @ mounted)[:3]
    np.testing.assert_allclose(pair.lidar1, expected, atol=1e-9)

    # Labels do without it; but what is there must be right.
    copy = tmp_path / log.name
    shutil.copytree(log, copy)
    file = copy / "calibration" / "egovehicle_SE3_sensor.feather"
    table = feather.read_table(file)
    for change in ({"sensor_name": ["a", "b"]}, {"tx_m": [1e5, 1.0]}, {"tz_m": [np.nan, 1.0]}):
        feather.write_feather(pyarrow.table({**table.to_pydict(), **change}), file)
        with pytest.raises(data.DataError, match="egovehicle_SE3_sensor.feather: no lidar within"):
            data.open_dataset(copy)[0]
    file.unlink()
    assert data.open_dataset(copy)[0].lidar1 is None


# --- Ground and grid ------------------------------------------------------------------------------


def test_ground_rule_by_hand():
    height = np.array(
        [[1.0, 2.0], [3.0, np.nan]], dtype=np.float16
    )  # pixel (column, row) = 2 (xy + (1, 1))
    raster = data.GroundRaster(height, np.eye(2), np.array([1.0, 1.0]), 2.0)
    points = {  # x, y, z: is it ground?
        (-1.0, -1.0, 1.39): True,  # pixel (0, 0), 0.39 above
        (-1.0, -1.0, 1.41): False,
        (-1.0, -1.0, -5.0): True,  # below is ground, however deep
        (-0.5, -1.0, 2.39): True,  # column 1, row 0
        (-1.0, -0.5, 3.39): True,  # column 0, row 1
        (-0.76, -1.0, 2.0): False,  # rounds to column 0, where the ground is at 1
        (-0.74, -1.0, 2.0): True,  # rounds to column 1
        (-0.5, -0.5, 0.0): False,  # no height there
        (9.0, 0.0, -9.0): False,  # off the raster
    }
    assert raster.is_ground(np.array(list(points))).tolist() == list(points.values())
    truncated = raster.is_ground(
        np.array([[-0.74, -1.0, 1.29], [-0.74, -1.0, 1.31]]), threshold_m=0.30, snap=np.trunc
    )
    assert truncated.tolist() == [True, False]  # av2's rule looks at column 0


def test_height_from_lines_of_a_map_by_hand():
    """A line along x with a slope of 1 and a vertex every meter: distances by Pythagoras."""
    lines = [np.array([[0.0, 0, 0], [2.5, 0, 2.5], [3, 0, 3]]), np.array([[900.0, 900, -50]])]
    ground = vectormap.GroundVectorMap(lines)
    along = [0, 2.5 / 3, 5 / 3, 2.5, 3]  # 2.5 m are three parts
    for x, y, nearest in (
        (1.25, 0.25, along[:4]),
        (2.25, -1.75, along[1:]),
        (40.25, 30.25, along[1:]),
    ):
        weights = [1 / np.hypot(x - vertex, y) for vertex in nearest]
        z = np.dot(weights, nearest) / sum(weights)
        above, below = (x, y, z + 0.401), (x, y, z + 0.399)  # each the middle of a cell of 50 cm
        assert ground.is_ground(np.array([above, below, (x, y, z - 9)])).tolist() == [
            False,
            True,
            True,
        ]
        assert ground.is_ground(np.array([below, (x + 0.2, y - 0.2, z + 0.399)])).tolist() == [
            True,
            True,
        ]  # same cell
    nowhere = [
        [-100.6, 0, -99],
        [0, -100.6, -99],
        [1000.6, 0, -99],
        [np.nan, 0, -99],
        [0, 0, np.nan],
        [np.inf, 0, -99],
    ]
    assert not ground.is_ground(np.array(nowhere)).any()


def test_a_map_of_lines_is_closed_around_areas_and_has_both_sides_of_lanes(
    street_folder, street, tmp_path
):
    """In the middle of the closing edge, and at lanes, heights equal their nearest vertices."""
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    (file,) = (log / "map").glob("log_map_archive_*.json")

    def points(*rows):
        return [dict(zip("xyz", row, strict=True)) for row in rows]

    area = {"area_boundary": points((0, 0, 1), (30, 0, 1), (30, 30, 1), (0, 30, 1))}
    lane = {
        "left_lane_boundary": points((10, 10, 5), (20, 10, 5)),
        "right_lane_boundary": points((10, 20, 9), (20, 20, 9)),
    }
    file.write_text(json.dumps({"drivable_areas": {"1": area}, "lane_segments": {"2": lane}}))
    ground = data._read_log(log, None, "vector").ground
    heights = ground.ground_z(
        np.array([[0.0, 15.25], [15.25, 10], [15.25, 20]])
    )  # all within 0.3 m of their line
    np.testing.assert_allclose(heights, [1, 5, 9], atol=1e-9)


def test_auto_takes_the_best_ground_that_a_log_has(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    by_name = {
        ground: data.open_dataset(log, ground=ground)[0].is_ground0 for ground in data.GROUNDS
    }
    assert torch.equal(by_name["auto"], by_name["raster"])
    assert (
        torch.equal(data.open_dataset(log)[0].is_ground0, by_name["raster"])
        and not by_name["none"].any()
    )
    assert len({tuple(mask.tolist()) for mask in by_name.values()}) == 4
    assert agreement(by_name["vector"], by_name["raster"])[0] > 0.9
    data._read_log.cache_clear()
    for file in [*(log / "map").glob("*.npy"), *(log / "map").glob("*_city.json")]:
        file.unlink()
    assert torch.equal(data.open_dataset(log)[0].is_ground0, by_name["vector"])
    shutil.rmtree(log / "map")
    data._read_log.cache_clear()
    assert torch.equal(data.open_dataset(log)[0].is_ground0, by_name["points"])
    with pytest.raises(data.DataError, match="map: a log's map needs one .*another ground"):
        data.open_dataset(log, ground="raster")[0]
    with pytest.raises(
        data.DataError, match="map: a log's map needs one log_map_archive.*found .*another ground"
    ):
        data.open_dataset(log, ground="vector")[0]
    with pytest.raises(
        data.DataError, match="ground 'rooster': choose auto, raster, vector, points, none"
    ):
        data.open_dataset(log, ground="rooster")


def test_the_lower_border_is_inside_the_grid_and_nan_is_not():
    points = torch.tensor(
        [
            [-51.2, -51.2, -3],
            [51.2, 0, 0],
            [0, 51.2, 0],
            [0, 0, 3],
            [51.19, 51.19, 2.99],
            [torch.nan, 0, 0],
        ]
    )
    assert data.is_in_grid(points).tolist() == [True, False, False, False, True, False]


def test_the_input_masks_are_the_points_off_the_ground_in_the_grid_that_is_asked_for():
    points = torch.tensor([[0.0, 0, 1], [30, 0, 0], [0, -60, 0], [1, 1, 1]])
    pair = clouds.pair_of_clouds(points, points[:2], None, torch.tensor([False] * 3 + [True]))
    is_input0, is_input1 = data.input_masks(pair)
    assert is_input0.tolist() == [True, True, False, False] and is_input1.tolist() == [True, True]
    is_input0, is_input1 = data.input_masks(pair, (25.6, 25.6, 3.0))
    assert is_input0.tolist() == [True, False, False, False] and is_input1.tolist() == [True, False]


def test_every_row_of_the_file_is_a_row_of_the_pair(street_folder, street):
    pair = street[0]
    table = feather.read_table(
        street_folder / pair.log_id / "sensors" / "lidar" / f"{pair.timestamp0_ns}.feather"
    )
    np.testing.assert_array_equal(
        pair.pc0, np.stack([table[axis].to_numpy() for axis in "xyz"], axis=1)
    )
    rows = {
        len(getattr(pair, name))
        for name in ("pc0", "is_ground0", "flow", "category", "is_dynamic", "is_valid")
    }
    assert rows == {table.num_rows}
    assert pair.is_ground0.any() and not pair.is_ground0.all()


# --- Folders and broken files ---------------------------------------------------------------------


def test_a_split_a_log_and_a_folder_without_labels_open(street_folder, street):
    assert [len(street), len({key.log_id for key in street.pair_keys})] == [4, 2]
    log = data.open_dataset(street_folder / street.pair_keys[-1].log_id)
    assert log.pair_keys == street.pair_keys[2:]
    assert torch.equal(log[1].pc0, street[3].pc0)
    assert data.open_dataset(street_folder, true_flow=False)[0].flow is None


def test_a_log_has_its_own_name_from_wherever_it_is_opened(street_folder, street, monkeypatch):
    monkeypatch.chdir(street_folder / street.pair_keys[0].log_id / "map")
    for path in ("..", "../../" + street.pair_keys[0].log_id):
        assert data.open_dataset(path).pair_keys == street.pair_keys[:2]


def test_opening_reads_no_sweep_and_does_not_pair_across_a_gap(tmp_path):
    lidar = tmp_path / "log" / "sensors" / "lidar"
    lidar.mkdir(parents=True)
    for stamp_ms in (1000, 1100, 1400, 1500):
        (lidar / f"{stamp_ms * 10**6}.feather").write_text("never read")
    pairs = data.open_dataset(tmp_path)
    assert [
        (key.timestamp0_ns // 10**6, key.timestamp1_ns // 10**6) for key in pairs.pair_keys
    ] == [
        (1000, 1100),
        (1400, 1500),
    ]
    assert (
        len(pairs.skipped) == 1
        and "0.30 s later" in pairs.skipped[0]
        and "1100000000" in pairs.skipped[0]
    )


def _log_of(folder, stamps_ms) -> None:
    (folder / "sensors" / "lidar").mkdir(parents=True)
    for stamp_ms in stamps_ms:
        (folder / "sensors" / "lidar" / f"{stamp_ms * 10**6}.feather").touch()


def test_the_pairs_of_3x_and_5x_are_those_that_the_published_script_draws(tmp_path):
    """Of logs of 300, 160, 144 and 9 sweeps, by a second writing of its rule: a pair at every
    step-th sweep, the second draw half a step later.
    """
    lengths = (300, 160, 144, 9)
    for length in lengths:
        _log_of(tmp_path / f"{length:03}", range(0, 100 * length, 100))
    three, five = (data.open_dataset(tmp_path, pairs_per_log=count).pair_keys for count in (12, 24))
    for length in lengths:
        step = max(1, int((length - 1) / 11))
        draws = []
        for offset in (0, int(0.5 * step)):
            draws.append([k for k in range(length - 1) if k >= offset and (k - offset) % step == 0])
        found = [
            [key.timestamp0_ns // 10**8 for key in keys if key.log_id == f"{length:03}"]
            for keys in (three, five)
        ]
        assert found == [draws[0], sorted({*draws[0], *draws[1]})]
    assert [len(data.paper_draw(length, 12)) for length in lengths] == [12, 12, 11, 8]
    assert set(three) < set(five) and five == sorted(five)


def test_other_numbers_of_pairs_of_a_log_are_at_even_intervals(tmp_path):
    _log_of(tmp_path / "a", range(0, 30_000, 100))  # 300 sweeps, 299 pairs
    keys = data.open_dataset(tmp_path, pairs_per_log=10).pair_keys
    steps_ms = np.diff([key.timestamp0_ns / 1e6 for key in keys])
    assert len(keys) == 10 and np.abs(steps_ms - 2_990).max() < 100
    with pytest.raises(data.DataError, match="pairs_per_log -1: give a number of 1 or more"):
        data.open_dataset(tmp_path, pairs_per_log=-1)
    with pytest.raises(data.DataError, match="sweeps_per_log 0: give a number of 1 or more"):
        data.open_dataset(tmp_path, sweeps_per_log=0)


def test_evenly_spread_indices_by_hand():
    assert data.evenly_spread(10, 4) == [0, 2, 5, 7]
    assert data.evenly_spread(3, None) == data.evenly_spread(3, 9) == [0, 1, 2]
    assert data.evenly_spread(0, None) == data.evenly_spread(0, 5) == []


def test_a_sweep_named_by_a_number_that_is_no_time_costs_only_itself(tmp_path, street_folder):
    log = next(street_folder.iterdir())
    shutil.copytree(log, tmp_path / log.name)
    lidar = tmp_path / log.name / "sensors" / "lidar"
    (lidar / f"{2**63}.feather").touch()
    dataset = data.open_dataset(tmp_path)
    assert len(dataset) == 2
    (line,) = dataset.skipped
    assert log.name in line and "1 sweeps are named by numbers of over 63 bits" in line


def test_keys_in_arrays_are_a_sequence_like_any_other():
    listed = [data.PairKey(log, stamp, stamp + 9**18) for log in "abca" for stamp in (0, 10**18)]
    keys = data.PairKeys(listed)
    assert keys == listed and listed == list(keys) and len(keys) == 8
    assert keys[1:6:2] == listed[1:6:2] and keys[-1] == listed[-1] and keys[::-1] == listed[::-1]
    assert keys.index(listed[3]) == 3 and listed[5] in keys and ("d", 0, 1) not in keys
    assert keys != listed[:-1] and keys != 8
    with pytest.raises(IndexError):
        keys[8]
    copied = pickle.loads(pickle.dumps(keys))  # for the processes of a loader
    copied.extend([data.PairKey("d", 1, 2)])
    assert copied[-1] == ("d", 1, 2) and copied[:-1] == keys


def test_a_subset_has_its_own_pairs_in_their_order_and_leaves_the_data_set_as_it_is(street):
    before = list(street.pair_keys)
    part = data.subset(street, [before[3], before[0]])
    assert part.pair_keys == [before[3], before[0]] and street.pair_keys == before
    assert part[0].key == before[3] and torch.equal(part[1].pc0, street[0].pc0)
    assert part.stamps == street.stamps


def test_sweeps_per_log_takes_only_the_first_sweeps(tmp_path):
    _log_of(tmp_path / "a", range(0, 15_600, 100))
    _log_of(tmp_path / "b", range(0, 500, 100))
    keys = data.open_dataset(tmp_path, sweeps_per_log=145).pair_keys
    assert [sum(key.log_id == name for key in keys) for name in "ab"] == [144, 4]
    assert keys[0].timestamp0_ns == 0 and keys[143].timestamp1_ns == 14_400 * 10**6
    assert (
        data.open_dataset(tmp_path, sweeps_per_log=145, pairs_per_log=2).pair_keys[1].timestamp0_ns
        == 7_200 * 10**6
    )


def test_a_file_with_a_strange_name_is_skipped_and_reported(tmp_path):
    _log_of(tmp_path / "a", (0, 100, 200))
    lidar = tmp_path / "a" / "sensors" / "lidar"
    for name in (
        "copy of 5.feather",
        "._100000000.feather",
        "0100000000.feather",
        "-5.feather",
        "notes.txt",
    ):
        (lidar / name).touch()
    pairs = data.open_dataset(tmp_path)
    assert [key.timestamp0_ns for key in pairs.pair_keys] == [0, 10**8] and pairs.notes == []
    assert len(pairs.skipped) == 4 and all(
        "named <timestamp_ns>.feather; remove" in line for line in pairs.skipped
    )


def test_without_waymo_py_a_waymo_split_asks_for_it(tmp_path, monkeypatch):
    for tag in ("lidar", "vehicle_pose"):
        (tmp_path / "training" / tag).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "waymo", None)  # as if it were not there
    with pytest.raises(data.DataError, match="training: a Waymo split needs .* copy waymo.py too"):
        data.open_dataset(tmp_path / "training")


def test_without_clouds_py_what_needs_it_asks_for_it(tmp_path, monkeypatch, street_folder):
    np.save(tmp_path / "0.npy", np.ones((1, 3)))
    monkeypatch.setitem(sys.modules, "clouds", None)  # as if it were not there
    with pytest.raises(
        data.DataError, match=f"{tmp_path}: .* needs clouds.py .*copy clouds.py too"
    ):
        data.open_dataset(tmp_path)
    with pytest.raises(
        data.DataError, match="the ground without a map needs clouds.py .*copy clouds"
    ):
        data.open_dataset(street_folder, ground="points")[0]
    assert data.open_dataset(street_folder)[0].is_ground0.any()  # a map does not


def test_a_folder_that_is_not_a_data_set_lists_what_is_there(tmp_path):
    with pytest.raises(data.DataError, match="nowhere: no such folder"):
        data.open_dataset(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="no Argoverse 2 log in it .*sensors/lidar"):
        data.open_dataset(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "log" / "sensors" / "lidar").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"holds the splits train, val; choose one"):
        data.open_dataset(tmp_path)


def test_a_log_without_pairs_is_an_error_and_an_unfinished_log_is_ignored(tmp_path):
    (tmp_path / "log" / "sensors" / "lidar").mkdir(parents=True)
    with pytest.raises(data.DataError, match="no two consecutive sweeps in 1 logs"):
        data.open_dataset(tmp_path)
    (tmp_path / "log").rename(tmp_path / ".log.tmp")
    with pytest.raises(data.DataError, match="no Argoverse 2 log in it"):
        data.open_dataset(tmp_path)


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _drop_pose(file):
    feather.write_feather(feather.read_table(file).slice(1), file)


def _empty(file):
    feather.write_feather(feather.read_table(file).slice(0, 0), file)


def _rename_column(file):
    table = feather.read_table(file)
    feather.write_feather(table.rename_columns(["a", *table.column_names[1:]]), file)


def _column(name, values):
    """Give every row of one column the same value."""

    def break_it(file):
        table = feather.read_table(file)
        column = pyarrow.array([values] * table.num_rows)
        feather.write_feather(table.set_column(table.column_names.index(name), name, column), file)

    return break_it


def _zero_quaternion(file):
    for name in ("qw", "qx", "qy", "qz"):
        _column(name, 0.0)(file)


def _nan_scale(file):
    file.write_text('{"R": [1, 0, 0, 1], "t": [0, 0], "s": NaN}')


def _nulls(file):
    for name in "xyz":
        _column(name, None)(file)


@pytest.mark.parametrize(
    ("pattern", "break_it", "message"),
    [
        (
            "city_SE3_egovehicle.feather",
            _column("tx_m", float("nan")),
            r"feather: the pose of sweep \d+ is not finite",
        ),
        ("sensors/lidar/*.feather", _nulls, r"lidar/\d+.feather: the sweep has no points"),
        (
            "sensors/lidar/*.feather",
            _column("x", "far"),
            r"lidar/\d+.feather: its points cannot be read .*'far'",
        ),
        (
            "map/*_city.json",
            lambda file: file.write_text("[]"),
            "map: the ground raster cannot be read",
        ),
        (
            "city_SE3_egovehicle.feather",
            _drop_pose,
            r"city_SE3_egovehicle.feather: no pose for sweep \d+; download",
        ),
        (
            "city_SE3_egovehicle.feather",
            lambda file: file.unlink(),
            "city_SE3_egovehicle.feather: no such file",
        ),
        ("sensors/lidar/*.feather", _empty, r"lidar/\d+.feather: the sweep has no points"),
        (
            "sensors/lidar/*.feather",
            _cut,
            r"lidar/\d+.feather: not a whole Feather file .* download",
        ),
        ("sensors/lidar/*.feather", _rename_column, r"lidar/\d+.feather: has no columns \['x'\]"),
        ("annotations.feather", _cut, "annotations.feather: not a whole Feather file"),
        ("map/*.npy", _cut, "map: the ground raster cannot be read"),
        (
            "map/*.npy",
            lambda file: np.save(file, np.zeros(9)),
            r"map: the ground raster cannot be read .*shape is \(9,\)",
        ),
        ("map/*.npy", lambda file: file.unlink(), "map: a log's map needs one"),
        (
            "city_SE3_egovehicle.feather",
            _column("qw", "half"),
            r"egovehicle.feather: expected numbers in .*'half'",
        ),
        (
            "city_SE3_egovehicle.feather",
            _column("timestamp_ns", "now"),
            "timestamp_ns is string, expected integers",
        ),
        (
            "city_SE3_egovehicle.feather",
            _zero_quaternion,
            r"feather: the pose of sweep \d+ is not finite",
        ),
        ("city_SE3_egovehicle.feather", _cut, "egovehicle.feather: not a whole Feather file"),
        (
            "city_SE3_egovehicle.feather",
            lambda file: file.write_bytes(b""),
            "not a whole Feather file",
        ),
        (
            "sensors/lidar/*.feather",
            lambda file: file.write_bytes(b""),
            r"lidar/\d+.feather: not a whole Feather file",
        ),
        (
            "annotations.feather",
            _column("timestamp_ns", 0.5),
            "annotations.feather: .*double, expected integers",
        ),
        (
            "annotations.feather",
            _column("length_m", "long"),
            "annotations.feather: expected numbers in",
        ),
        (
            "annotations.feather",
            _column("num_interior_pts", "many"),
            "annotations.feather: expected numbers in",
        ),
        (
            "annotations.feather",
            _column("category", None),
            "annotations.feather: unknown categories",
        ),
        (
            "annotations.feather",
            _column("tx_m", float("inf")),
            "annotations.feather: a box has a size or pose",
        ),
        ("annotations.feather", _zero_quaternion, "annotations.feather: a box has a size or pose"),
        (
            "map/*_city.json",
            lambda file: file.write_bytes(b"\xff"),
            "map: the ground raster cannot be read",
        ),
        (
            "map/*_city.json",
            _nan_scale,
            "map: the ground raster cannot be read .*Sim2 is not finite",
        ),
        (
            "map/*.npy",
            lambda file: np.save(file, np.full((9, 9), "low")),
            "map: the ground raster cannot .* type <U3",
        ),
        ("city_SE3_egovehicle.feather", _empty, r"egovehicle.feather: no pose for sweep \d+"),
    ],
)
def test_a_broken_file_is_named_with_a_remedy(
    street_folder, street, tmp_path, pattern, break_it, message
):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    break_it(sorted(log.glob(pattern))[0])
    pairs = data.open_dataset(log)
    with pytest.raises(data.DataError, match=message):
        pairs[0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"drivable_areas": {}, "lane_segments": {}}',
        '{"drivable_areas": {"1": {}}, "lane_segments": {}}',
    ]
    + [
        json.dumps(
            {
                "lane_segments": {},
                "drivable_areas": {
                    "1": {"area_boundary": [{"x": value, "y": 0, "z": 0}, {"x": 0, "y": 0, "z": 0}]}
                },
            }
        )
        for value in (None, "far", float("nan"), 1e300)
    ],
)
def test_a_broken_vector_map_is_named(street_folder, street, tmp_path, content):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    (file,) = (log / "map").glob("log_map_archive_*.json")
    file.write_text(content)
    with pytest.raises(
        data.DataError, match="log_map_archive_.*json: the vector map cannot be read .*download"
    ):
        data.open_dataset(log, ground="vector")[0]


def test_a_bad_row_stays_a_row_without_ground_and_flow(street_folder, street, tmp_path):
    """NaN, infinite and absurd coordinates, points off the raster; other rows are as before."""
    clean, log = street[0], tmp_path / street.pair_keys[0].log_id
    shutil.copytree(street_folder / log.name, log)
    for stamp in clean.key[1:]:
        file = log / "sensors" / "lidar" / f"{stamp}.feather"
        table = feather.read_table(file).select(["x", "y", "z"])
        columns = {name: table[name].to_numpy().astype(np.float64) for name in "xyz"}
        columns["x"][0], columns["y"][1], columns["z"][2], columns["x"][3] = (
            np.nan,
            np.inf,
            -np.inf,
            1e300,
        )
        columns["x"][4], columns["y"][4] = 6e3, -6e3
        feather.write_feather(pyarrow.table(columns), file)
    for ground in data.GROUNDS:
        expected, pair = (
            data.open_dataset(folder, ground=ground)[0] for folder in (street_folder, log)
        )
        assert len(pair.pc0) == len(clean.pc0) and len(pair.pc1) == len(clean.pc1)
        assert pair.pc0[:4].isnan().all() and pair.pc1[:4].isnan().all()
        torch.testing.assert_close(pair.pc0[5:], expected.pc0[5:])
        for mask0, mask1 in (
            (pair.is_ground0, expected.is_ground0),
            (pair.is_ground1, expected.is_ground1),
        ):
            assert not mask0[:5].any()
            assert (mask0[5:] != mask1[5:]).float().mean() <= (0.01 if ground == "points" else 0)
        assert not pair.is_valid[:4].any() and pair.is_valid[4] and not pair.is_dynamic[:5].any()
        assert torch.equal(pair.flow[5:], expected.flow[5:]) and (pair.flow[:5] == 0).all()


def test_a_log_with_an_empty_annotation_file_is_all_background(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    _empty(log / "annotations.feather")
    pair = data.open_dataset(log)[0]
    assert (pair.flow == 0).all() and (pair.category == 0).all() and pair.is_valid.all()


def test_a_missing_pose_breaks_only_its_own_pairs(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    file = log / "city_SE3_egovehicle.feather"
    feather.write_feather(feather.read_table(file).slice(0, 2), file)  # the third sweep's is gone
    pairs = data.open_dataset(log)
    assert torch.equal(pairs[0].pc1, street[0].pc1)
    with pytest.raises(
        data.DataError, match=f"no pose for sweep {pairs.pair_keys[1].timestamp1_ns}"
    ):
        pairs[1]


def test_memory_does_not_grow_with_the_pairs_visited(street_folder, street, tmp_path):
    for number in range(20):  # more logs than are kept
        (tmp_path / f"log{number:02d}").symlink_to(street_folder / street.pair_keys[0].log_id)
    pairs = data.open_dataset(tmp_path, ground="vector")

    def visit() -> int:
        for index in range(len(pairs)):
            pairs[index]
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        once, twice = visit(), visit()
    finally:
        tracemalloc.stop()
    assert len(pairs) == 40 and data._read_log.cache_info().currsize <= 8
    assert twice - once < 100_000


# --- Wrong poses ----------------------------------------------------------------------------------


def _poses(change):
    """Rewrite the translations (rows, 3) of a pose file by a function."""

    def break_it(file):
        table = feather.read_table(file, memory_map=False)
        moved = change(data.stack(table, ("tx_m", "ty_m", "tz_m")).copy())
        for name, values in zip(("tx_m", "ty_m", "tz_m"), moved.T, strict=True):
            column = table.column_names.index(name)
            table = table.set_column(column, name, pyarrow.array(values))
        feather.write_feather(table, file)

    return break_it


def _jump(translations):
    translations[1] += (0, 10, 0)  # only the second sweep's pose is wrong
    return translations


@pytest.mark.parametrize(
    ("change", "speed"), [(_jump, r"\d{3}"), (lambda meters: 1e3 * meters, r"\d{4,5}")]
)
def test_poses_that_no_vehicle_can_follow_are_refused(
    street_folder, street, tmp_path, change, speed
):
    """A jump of 10 m in one sweep is 100 m/s; meters taken for millimeters are thousands."""
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    _poses(change)(log / "city_SE3_egovehicle.feather")
    for key in street.pair_keys[:2]:  # the wrong pose is of both pairs
        stamps = f"{key.timestamp0_ns} and {key.timestamp1_ns}"
        message = rf"city_SE3_egovehicle.feather: .* {stamps} \({speed} m/s .* at most 60 m/s"
        with pytest.raises(data.DataError, match=message):
            data.open_dataset(log).read(data.PairKey("log", *key[1:]))


def test_the_bounds_of_an_egos_motion_by_hand():
    for yaw_deg, meters, seconds, message in (
        (11.9, 5.9, 0.1, ""),
        (
            0.0,
            6.1,
            0.1,
            r"^61 m/s and 0 degrees/s; a vehicle does at most 60 m/s and 120 degrees/s",
        ),
        (12.1, 0.0, 0.1, "^0 m/s and 121 degrees/s"),
        (12.1, 6.1, 0.2, ""),
        (0.0, 0.0, 0.0, ""),  # one moment, one pose
        (0.0, 0.1, 0.0, "m/s"),
        (0.0, float("nan"), 0.1, "^nan m/s"),
    ):
        ego1_SE3_ego0 = rigid(yaw_deg, (0, meters, 0))
        if not message:
            data.check_ego_motion(ego1_SE3_ego0, seconds)
            continue
        with pytest.raises(ValueError, match=message):
            data.check_ego_motion(ego1_SE3_ego0, seconds)


# --- Truth that disappears, or is invented --------------------------------------------------------


def _micros(file):
    table = feather.read_table(file, memory_map=False)
    micros = pyarrow.array([stamp // 1000 for stamp in table["timestamp_ns"].to_pylist()])
    feather.write_feather(table.set_column(0, "timestamp_ns", micros), file)


def _other_stamps(file):
    table = feather.read_table(file, memory_map=False)
    later = pyarrow.array([stamp + 1 for stamp in table["timestamp_ns"].to_pylist()])
    feather.write_feather(table.set_column(0, "timestamp_ns", later), file)


def _one_null(name):
    def break_it(file):
        rows = feather.read_table(file, memory_map=False).to_pylist()
        max(rows, key=lambda row: row["num_interior_pts"])[name] = None
        feather.write_feather(pyarrow.Table.from_pylist(rows), file)

    return break_it


def _tracks(change):
    def break_it(file):
        table = feather.read_table(file, memory_map=False)
        tracks = pyarrow.array([change(track) for track in table["track_uuid"].to_pylist()])
        column = table.column_names.index("track_uuid")
        feather.write_feather(table.set_column(column, "track_uuid", tracks), file)

    return break_it


def _far_box(file):
    """The first box of the second sweep is 40 m farther than it was 0.1 s before."""
    rows = feather.read_table(file, memory_map=False).to_pylist()
    stamps = sorted({row["timestamp_ns"] for row in rows})
    before = {row["track_uuid"] for row in rows if row["timestamp_ns"] == stamps[0]}
    before &= {row["track_uuid"] for row in rows if row["num_interior_pts"] > 0}
    seen = [row for row in rows if row["track_uuid"] in before]
    row = max(seen, key=lambda row: row["num_interior_pts"] * (row["timestamp_ns"] == stamps[1]))
    row["tx_m"] += 40
    feather.write_feather(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_column("num_interior_pts", 0), "no box contains a point, as if nothing moved"),
        (_column("num_interior_pts", None), "the number of points in a box is missing"),
        (_one_null("num_interior_pts"), "the number of points in a box is missing"),
        (_micros, r"no time stamp \(in ns\) equals a sweep's"),
        (_other_stamps, r"no time stamp \(in ns\) equals a sweep's"),
        (_column("track_uuid", None), "a track id is missing, or twice in one sweep"),
        (_one_null("track_uuid"), "a track id is missing, or twice in one sweep"),
        (_tracks(lambda track: ""), "a track id is missing, or twice in one sweep"),
        (_tracks(lambda track: "car"), "a track id is missing, or twice in one sweep"),
        (_column("length_m", 0.0), "a box has a size or pose that is not a number, or a size of 0"),
        (_column("height_m", -1.5), "a box has a size or pose that is not a number, or a size"),
    ],
)
def test_annotations_from_which_motion_would_be_lost_or_invented_are_refused(
    street_folder, street, tmp_path, break_it, message
):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    break_it(log / "annotations.feather")
    with pytest.raises(data.DataError, match=f"log/annotations.feather: {message}.*; download"):
        data.open_dataset(log)[0]
    assert data.open_dataset(log, true_flow=False)[0].flow is None  # they are not needed then


def test_a_box_that_leaps_is_not_a_moving_object(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    _far_box(log / "annotations.feather")
    with pytest.raises(data.DataError, match=r"^log: its boxes move at \d{3} m/s between \d+ and"):
        data.open_dataset(log)[0]


def test_a_sweep_without_boxes_among_others_is_reported(street_folder, street, tmp_path):
    log, key = tmp_path / "log", street.pair_keys[1]
    shutil.copytree(street_folder / key.log_id, log)
    table = feather.read_table(log / "annotations.feather", memory_map=False)
    is_other = np.array([stamp != key.timestamp0_ns for stamp in table["timestamp_ns"].to_pylist()])
    feather.write_feather(table.filter(pyarrow.array(is_other)), log / "annotations.feather")
    pairs = data.open_dataset(log)
    assert pairs[0].flow.abs().sum() == 0 and not pairs[0].is_valid.all()  # no box in sweep 1
    assert pairs.notes == [] and pairs[1].is_valid.all()
    assert pairs.notes == [f"{log}: sweeps without boxes: all their points count as background"]


def test_an_empty_annotation_file_is_reported_once(street_folder, street, tmp_path, capsys):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    _empty(log / "annotations.feather")
    pairs = data.open_dataset(log)
    assert pairs.notes == []
    for index in (0, 1, 0):
        pairs[index]
    assert pairs.notes == [f"{log}: sweeps without boxes: all their points count as background"]
    assert capsys.readouterr().err.splitlines() == pairs.notes


def test_a_real_log_and_a_street_have_nothing_to_report(av2_folder, street):
    for pairs in (data.open_dataset(av2_folder), street):
        pairs[0]
        assert pairs.notes == pairs.skipped == []


def _sim2(**values):
    def break_it(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return break_it


def _no_height(file):
    np.save(file, np.full_like(np.load(file), np.nan))


def _raster_header(file):
    file.write_bytes(file.read_bytes().replace(b"'shape': (", b"'shape': (("))


@pytest.mark.parametrize(
    ("pattern", "break_it", "message"),
    [
        ("*.npy", _no_height, "no pixel has a height"),
        ("*.npy", lambda file: np.save(file, np.zeros((0, 0))), "no pixel has a height"),
        ("*.npy", _raster_header, "EOF in multi-line statement"),
        ("*.npy", lambda file: file.write_bytes(b"\x93NUMPY\x01\x00"), ""),
        ("*.npy", lambda file: file.write_text("not an array"), ""),
        ("*_city.json", _sim2(s=0), "its Sim2 is not finite, or its R or s is wrong.*'s': 0"),
        ("*_city.json", _sim2(s=-3.3), "wrong.*'s': -3.3"),
        ("*_city.json", _sim2(R=[0, 0, 0, 0]), r"'R': \[0, 0, 0, 0\]"),
        ("*_city.json", _sim2(R=[2, 0, 0, 2]), "wrong"),
        ("*_city.json", _sim2(s=10**400), "int too large to convert to float"),
        ("*_city.json", _sim2(t="far"), ""),
        ("*_city.json", lambda file: file.write_bytes("{'é'}".encode("latin-1")), ""),
        ("*_city.json", lambda file: file.write_text("[" * 10**5), ""),
        ("*_city.json", lambda file: file.write_text('{"s": ' + "9" * 5000 + "}"), ""),
    ],
)
def test_a_raster_that_would_find_no_ground_is_refused(
    street_folder, street, tmp_path, pattern, break_it, message
):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    break_it(next((log / "map").glob(pattern)))
    with pytest.raises(
        data.DataError, match=f"log/map: the ground raster cannot be read .*{message}.*; download"
    ):
        data.open_dataset(log)[0]


def test_a_map_of_another_place_is_reported(street_folder, street, tmp_path, capsys):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    _sim2(t=[9e6, 9e6])(next((log / "map").glob("*_city.json")))
    pairs = data.open_dataset(log)
    assert not pairs[0].is_ground0.any()
    (note,) = pairs.notes
    assert note.endswith("all or no points of a sweep are ground: is it the right map?")
    assert capsys.readouterr().err == note + "\n"


# --- No file ends a run ---------------------------------------------------------------------------


def _rewrite(change):
    """Rewrite a Feather file without compression, its table changed by a function."""

    def break_it(file):
        table = feather.read_table(file, memory_map=False)
        feather.write_feather(change(table), file, compression="uncompressed")

    return break_it


def _retyped(name, make):
    def change(table):
        column = pyarrow.array([make(value) for value in table[name].to_pylist()])
        return table.set_column(table.column_names.index(name), name, column)

    return _rewrite(change)


def _wrong_offset(file):
    """The second text of the column of tracks begins 1 GB farther than the file ends."""
    _rewrite(lambda table: table)(file)
    tracks = feather.read_table(file, memory_map=False)["track_uuid"].to_pylist()
    content = bytearray(file.read_bytes())
    offsets = np.cumsum([0, len(tracks[0]), len(tracks[1])]).astype("<i4").tobytes()
    second = content.find(offsets) + 4
    content[second : second + 4] = np.array(2**30, "<i4").tobytes()
    file.write_bytes(content)


POSE_FILE, BOX_FILE = "city_SE3_egovehicle.feather", "annotations.feather"


@pytest.mark.parametrize(
    ("pattern", "break_it", "message"),
    [
        (BOX_FILE, _wrong_offset, r"annotations.feather: not a whole Feather file \("),
        (BOX_FILE, _retyped("track_uuid", lambda track: [track]), "log: the log cannot be read"),
        (BOX_FILE, _retyped("category", lambda name: [name]), "log: the log cannot be read"),
        (BOX_FILE, _retyped("length_m", lambda meters: [meters]), "expected numbers in"),
        (BOX_FILE, _retyped("num_interior_pts", lambda n: {"n": n}), "expected numbers in"),
        (POSE_FILE, _retyped("qw", lambda w: {"w": w}), "expected numbers in"),
        (POSE_FILE, _retyped("tx_m", lambda meters: str(meters).encode()[:1] + b"x"), "expected"),
        (POSE_FILE, _rewrite(lambda table: table.append_column("qw", table["qw"])), r"\['qw'\]"),
        ("sensors/lidar/*.feather", _retyped("x", lambda x: [x, x]), "its points cannot be read"),
        ("sensors/lidar/*.feather", _retyped("z", lambda z: z > 0), "its points cannot be read"),
        (
            "sensors/lidar/*.feather",
            _rewrite(lambda table: table.append_column("y", table["y"])),
            r"has no columns \['y'\], or has them twice",
        ),
        ("sensors/lidar/*.feather", _column("x", 0.0), ""),  # a wall is no fault
        ("sensors/lidar/*.feather", _retyped("x", lambda x: 1e3 * x), "over 1 km apart"),
    ],
)
def test_odd_columns_and_wrong_offsets_are_named(
    street_folder, street, tmp_path, pattern, break_it, message
):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    break_it(sorted(log.glob(pattern))[0])
    if not message:
        assert len(data.open_dataset(log)[0].pc0)
        return
    with pytest.raises(data.DataError, match=message):
        data.open_dataset(log)[0]


def test_the_guard_passes_data_errors_on_and_names_all_others(tmp_path):
    file = tmp_path / "file"
    for error, message in (
        (KeyError("R"), "file: not whole \\('R'\\); make it again"),
        (EOFError(), r"file: not whole \(EOFError\); make it again"),
        (MemoryError(), r"\(MemoryError\)"),
        (StopIteration(), r"\(StopIteration\)"),
        (data.DataError("other: torn"), "^other: torn$"),
    ):
        with pytest.raises(data.DataError, match=message):
            with data.naming(file, "not whole", "make it again"):
                raise error
    with pytest.raises(KeyboardInterrupt), data.naming(file, "not whole"):
        raise KeyboardInterrupt


def test_rows_without_a_return_are_no_points(street_folder, street, tmp_path):
    """0 0 0 and 0 -0 0 become NaN; 0 0 1 is a point."""
    points = np.array([[0, 0, 0], [0, 0, 1], [0, -0.0, 0], [1, 0, 0], [2, np.nan, 2]])
    is_bad = np.isnan(data.nan_bad_rows(points.astype(np.float32)))
    assert is_bad.all(axis=1).tolist() == [True, False, True, False, True]
    assert is_bad.any(axis=1).tolist() == is_bad.all(axis=1).tolist()
    assert data.nan_bad_rows(np.zeros((0, 3))).shape == (0, 3)
    stray = np.random.default_rng(0).uniform(-50, 50, (100, 3))
    stray[7, 1], stray[8, 2], stray[9, 0] = -3e7, np.inf, 2e30
    for origin in (0, (6e5, 5.3e6, 500)):  # in ego and in city coordinates
        is_bad = np.isnan(data.nan_bad_rows(stray + origin)).all(axis=1)
        assert np.flatnonzero(is_bad).tolist() == [7, 8, 9]
    log, key = tmp_path / street.pair_keys[0].log_id, street.pair_keys[0]
    shutil.copytree(street_folder / log.name, log)
    file = log / "sensors" / "lidar" / f"{key.timestamp0_ns}.feather"
    table = feather.read_table(file, memory_map=False).select(["x", "y", "z"])
    columns = {name: np.r_[np.zeros(3_000), table[name].to_numpy()] for name in "xyz"}
    feather.write_feather(pyarrow.table(columns), file)
    pair = data.open_dataset(log)[0]
    assert pair.pc0[:3_000].isnan().all() and not pair.is_valid[:3_000].any()
    assert torch.equal(pair.pc0[3_000:], street[0].pc0)
    assert torch.equal(pair.flow[3_000:], street[0].flow)


def test_the_gate_for_clouds_by_hand(av2_pair):
    rng = np.random.default_rng(0)
    street = rng.uniform((-50, -50, -2), (50, 50, 4), (5_000, 3))
    utm = street + (461_000, 5_428_000, 110)
    no_returns = np.concatenate([np.zeros((9_000, 3)), street])
    for points in (av2_pair.pc0.numpy(), street, utm, no_returns, street[:1], 1e6 * street[:9]):
        data.check_points(points)
    late = np.full((100_000, 3), np.nan)
    late[77_777] = 1  # the only point is in no sample
    data.check_points(late)
    as_float32 = street.copy().view("<f4").reshape(-1, 3)  # bytes of the wrong type
    one_place = np.concatenate([np.full((60_000, 3), 7.0), street])
    for points, message in (
        (np.zeros((0, 3)), "the sweep has no points"),
        (np.zeros((50, 3)), "the sweep has no points"),
        (np.full((50, 3), np.nan), "the sweep has no points"),
        (1_000 * street, "over 1 km apart"),  # millimeters
        (as_float32, "over 1 km apart"),
        (one_place, "nearly all at one place"),
    ):
        with pytest.raises(ValueError, match=message):
            data.check_points(points)


def test_an_array_on_its_side_is_no_cloud(tmp_path):
    np.save(tmp_path / "0.npy", np.random.default_rng(0).random((3, 400)))
    with pytest.raises(data.DataError, match=r"0.npy: its points .*shape is \(3, 400\)"):
        data.read_points(tmp_path / "0.npy", np.load)


# --- Folders as people have them ------------------------------------------------------------------


def forbid(monkeypatch, folder) -> None:
    """The tests may run as root, who may read everything: let one folder refuse even root."""

    def refuses(call):
        def guarded(path=".", *arguments, **named):
            is_below = str(path).startswith(str(folder))
            if is_below:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *arguments, **named)

        return guarded

    for name in ("listdir", "scandir", "stat"):
        monkeypatch.setattr(os, name, refuses(getattr(os, name)))


def test_a_folder_that_cannot_be_read_costs_only_itself(tmp_path, monkeypatch):
    _log_of(tmp_path / "a", (0, 100))
    (tmp_path / "lost+found").mkdir()
    forbid(monkeypatch, tmp_path / "lost+found")
    pairs = data.open_dataset(tmp_path)
    assert [key.log_id for key in pairs.pair_keys] == ["a"]
    (line,) = pairs.skipped
    assert "lost+found: [Errno 13] Permission denied" in line and "permissions" in line


def test_a_log_that_cannot_be_listed_costs_only_itself(tmp_path, monkeypatch):
    for name in "ab":
        _log_of(tmp_path / name, (0, 100))
    listdir = os.listdir

    def refuses(path):
        if str(path).startswith(str(tmp_path / "a")):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuses)
    pairs = data.open_dataset(tmp_path)
    assert [key.log_id for key in pairs.pair_keys] == ["b"]
    (line,) = pairs.skipped
    assert line.startswith(f"{tmp_path / 'a'}: [Errno 13] Permission denied")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(data.DataError, match=r"in 0 logs; .*1 skipped: .*/a: .*Permission denied"):
        data.open_dataset(tmp_path)


def test_where_nothing_can_be_read_the_reasons_are_in_the_error(tmp_path, monkeypatch):
    for name in "abcde":
        (tmp_path / "root" / name).mkdir(parents=True)
    forbid(monkeypatch, tmp_path / "root" / "")  # all that is below, but not the root
    with pytest.raises(data.DataError, match="root: cannot be opened .*Permission denied"):
        data.open_dataset(tmp_path / "root")
    monkeypatch.undo()
    for name in "abcd":
        forbid(monkeypatch, tmp_path / "root" / name)
    with pytest.raises(
        data.DataError, match=r"no Argoverse 2 log in it .*\(4 skipped: .*/a: .*/b: .*/c: "
    ):
        data.open_dataset(tmp_path / "root")


def test_a_map_that_cannot_be_listed_is_named(street_folder, street, tmp_path, monkeypatch):
    """Otherwise "auto" would find no map in it, and take the ground from the points."""
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.pair_keys[0].log_id, log)
    listdir = os.listdir

    def refuses(path):
        if str(path) == str(log / "map"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuses)
    with pytest.raises(data.DataError, match="log: the log cannot be read .*denied: .*log/map"):
        data.open_dataset(log)[0]


def test_what_a_mac_adds_is_no_map_and_no_sweep(street_folder, street, tmp_path):
    log = tmp_path / street.pair_keys[0].log_id
    shutil.copytree(street_folder / log.name, log)
    for file in [*(log / "map").iterdir(), *(log / "sensors" / "lidar").iterdir()]:
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(99))
    (log / "._annotations.feather").write_bytes(bytes(99))
    (tmp_path / f"._{log.name}").write_bytes(bytes(99))
    for ground in data.GROUNDS:
        pair = data.open_dataset(tmp_path, ground=ground)[0]
        expected = data.open_dataset(street_folder, ground=ground)[0]
        assert torch.equal(pair.is_ground0, expected.is_ground0)
        assert torch.equal(pair.flow, expected.flow)
    (line,) = data.open_dataset(tmp_path).skipped  # one for all three sweeps
    assert line.startswith(str(log / "sensors" / "lidar" / "._"))


def test_names_that_are_not_utf8_or_a_tilde(street_folder, street, tmp_path, monkeypatch):
    """Above the logs every name is read; a log with such a name has an id that labels cannot hold.

    pyarrow itself takes a folder called ~ for the user's home.
    """
    log_id = street.pair_keys[0].log_id
    strange = tmp_path / os.fsdecode(b"caf\xe9") / "~"
    strange.mkdir(parents=True)
    shutil.copytree(street_folder / log_id, strange / log_id)
    shutil.copytree(street_folder / log_id, strange / "~")
    shutil.copytree(street_folder / log_id, strange / os.fsdecode(b"\xff"))
    for path in (strange, "~", "."):
        monkeypatch.chdir(strange if path == "." else strange.parent)
        pairs = data.open_dataset(path)
        assert sorted({key.log_id for key in pairs.pair_keys}) == sorted([log_id, "~"])
        assert torch.equal(pairs[0].pc0, street[0].pc0)
        assert torch.equal(pairs[-1].flow, street[1].flow)
        (line,) = pairs.skipped
        assert "can't encode" in line and "rename it" in line


def test_a_file_is_no_folder(street_folder, street):
    file = street_folder / street.pair_keys[0].log_id / "annotations.feather"
    with pytest.raises(data.DataError, match="annotations.feather: is a file; give a folder"):
        data.open_dataset(file)


def test_the_folder_of_a_logs_sweeps_stands_for_the_log(street_folder, street, monkeypatch):
    lidar = street_folder / street.pair_keys[0].log_id / "sensors" / "lidar"
    assert data.open_dataset(lidar).pair_keys == street.pair_keys[:2]
    monkeypatch.chdir(lidar)
    assert torch.equal(data.open_dataset(".")[0].flow, street[0].flow)


def test_a_folder_two_levels_too_high_lists_the_splits(tmp_path, monkeypatch):
    for split in ("sensor/train", "sensor/val", "lidar/val"):
        _log_of(tmp_path / "av2" / split / "log", (0, 100))
    (tmp_path / "av2" / "motion").mkdir()
    (tmp_path / "av2" / "lost+found").mkdir()
    forbid(monkeypatch, tmp_path / "av2" / "lost+found")
    with pytest.raises(
        data.DataError, match="holds the splits lidar/val, sensor/train, sensor/val; choose one"
    ):
        data.open_dataset(tmp_path / "av2")


def test_options_of_clouds_are_refused_for_argoverse(street_folder):
    for option in ({"columns": 5}, {"min_range_m": 0.0}, {"poses": "p"}, {"rate_hz": 5}):
        message = f"{next(iter(option))} .* is not for Argoverse 2's folders; leave it out"
        with pytest.raises(data.DataError, match=message):
            data.open_dataset(street_folder, **option)


# --- What a label remembers of its pair -----------------------------------------------------------


def test_a_pair_knows_its_seconds(street):
    assert street[0].seconds == street.pair_keys[0].seconds == pytest.approx(0.1)
    late = dataclasses.replace(street[0], timestamp1_ns=street[0].timestamp0_ns + 250_000_000)
    assert late.seconds == 0.25


def test_the_fingerprint_is_of_points_ground_and_pose_and_of_nothing_else(street):
    pair = street[0]
    assert len(pair.fingerprint) == 16 and int(pair.fingerprint, 16)
    moved = pair.pc0.clone()
    moved[5, 1] += 0.2
    ground = pair.is_ground1.clone()
    ground[7] = ~ground[7]
    ego1_SE3_ego0 = pair.ego1_SE3_ego0.clone()
    ego1_SE3_ego0[0, 3] += 0.001
    others = [
        {"pc0": moved},
        {"pc1": pair.pc1[:-1]},
        {"pc1": pair.pc1.flip(0)},
        {"is_ground1": ground},
        {"ego1_SE3_ego0": ego1_SE3_ego0},
        {"lidar1": torch.tensor([0.0, 0.5, 1.7])},
    ]
    changed = [dataclasses.replace(pair, **fields).fingerprint for fields in others]
    assert len({pair.fingerprint, street[1].fingerprint, *changed}) == 8
    unseen = dataclasses.replace(pair, log_id="x", timestamp0_ns=1, flow=None, category=None)
    assert unseen.fingerprint == pair.fingerprint


def test_the_fingerprint_is_the_same_on_a_machine_that_rounds_differently(av2_pair):
    """The last bits of sweep 1 and of the pose, the sign of 0, and the kind of NaN do not count."""
    pc0, pc1 = av2_pair.pc0.clone(), av2_pair.pc1.clone()
    pc0[:2], pc0[2:4] = 0.0, torch.nan
    here = dataclasses.replace(av2_pair, pc0=pc0)
    there = dataclasses.replace(
        here,
        pc0=pc0 * torch.where(torch.arange(len(pc0)) < 4, -1, 1)[:, None],
        pc1=torch.nextafter(pc1, pc1 + torch.tensor([1.0, -1.0, 1.0])),
        ego1_SE3_ego0=av2_pair.ego1_SE3_ego0 + 1e-12,
    )
    assert not torch.equal(here.pc1, there.pc1)
    # Of 100,000 points some are within a millionth of a rounding border: those are left out here.
    is_safe = ((here.pc1 * 10).round() == (there.pc1 * 10).round()).all(dim=1)
    assert is_safe.float().mean() > 0.999
    pairs = []
    for pair in (here, there):
        pairs.append(
            dataclasses.replace(pair, pc1=pair.pc1[is_safe], is_ground1=pair.is_ground1[is_safe])
        )
    assert pairs[0].fingerprint == pairs[1].fingerprint


# --- Clouds in memory -----------------------------------------------------------------------------


def test_a_pair_of_clouds_is_in_the_frame_of_the_first():
    """The ego drives 3 m and turns left by 90 degrees: a pole 10 m ahead is 7 m to its right."""
    ego0_SE3_ego1 = np.array([[0, -1, 0, 3], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)
    pole0, pole1 = np.array([[10.0, 0, 1]]), np.array([[0.0, -7, 1]])
    pair = clouds.pair_of_clouds(
        pole0, torch.from_numpy(pole1), np.linalg.inv(ego0_SE3_ego1), np.array([True])
    )
    torch.testing.assert_close(pair.pc1, torch.tensor([[10.0, 0, 1]]))
    assert pair.pc0.dtype == pair.pc1.dtype == torch.float32
    assert pair.is_ground0.tolist() == [True] and pair.is_ground1.tolist() == [False]
    assert torch.equal(clouds.pair_of_clouds(pole0, pole1).pc1, torch.from_numpy(pole1).float())
    backwards = np.array([[1.0, 2, 3], [4, 5, 6]], dtype=">f4")[::-1]
    backwards.flags.writeable = False
    assert clouds.pair_of_clouds(backwards, pole1).pc0.tolist() == [[4, 5, 6], [1, 2, 3]]
    for arguments, message in (
        ((pole0, pole1.T), r"cloud 1 has shape \(3, 1\)"),
        ((pole0, pole1, np.eye(3)), r"its shape is \(3, 3\)"),
        ((pole0, pole1, None, np.zeros(2, dtype=bool)), "ground 0 is .*a bool for each of 1"),
        ((pole0, pole1, None, None, np.zeros(1)), "ground 1 is .*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            clouds.pair_of_clouds(*arguments)


# --- A log written by hand ------------------------------------------------------------------------


def write_log(folder, sweeps, city_SE3_egos, city_SE3_cars, interior=(5, 5)) -> None:
    """An Argoverse 2 log of one car, with the same columns as the published files."""

    def pose(matrix):
        x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
        return dict(
            zip(
                ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m"),
                (w, x, y, z, *matrix[:3, 3]),
                strict=True,
            )
        )

    (folder / "sensors" / "lidar").mkdir(parents=True)
    (folder / "map").mkdir()
    stamps = [10**9 + i * 10**8 for i in range(len(sweeps))]
    for stamp, points in zip(stamps, sweeps, strict=True):
        columns = dict(zip("xyz", points.T.astype(np.float16), strict=True))
        feather.write_feather(
            pyarrow.table(columns), folder / "sensors" / "lidar" / f"{stamp}.feather"
        )
    poses = [
        {"timestamp_ns": stamp, **pose(ego)}
        for stamp, ego in zip(stamps, city_SE3_egos, strict=True)
    ]
    size = {"length_m": 4.3, "width_m": 1.8, "height_m": 1.5}
    boxes = [
        {
            "timestamp_ns": stamp,
            "track_uuid": "car",
            "category": "REGULAR_VEHICLE",
            "num_interior_pts": count,
            **size,
        }
        | pose(np.linalg.inv(ego) @ car)
        for stamp, ego, car, count in zip(
            stamps, city_SE3_egos, city_SE3_cars, interior, strict=True
        )
    ]
    feather.write_feather(pyarrow.Table.from_pylist(poses), folder / "city_SE3_egovehicle.feather")
    feather.write_feather(pyarrow.Table.from_pylist(boxes), folder / "annotations.feather")
    np.save(
        folder / "map" / "log_ground_height_surface____PIT.npy", np.zeros((2, 2), dtype=np.float16)
    )
    (folder / "map" / "log___img_Sim2_city.json").write_text(
        '{"R": [1, 0, 0, 1], "t": [0, 0], "s": 1}'
    )
