"""The readers against labels that someone else made, hand arithmetic, and broken files."""

import dataclasses
import json
import shutil
import struct
import sys
import tracemalloc

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather
from scipy.spatial.transform import Rotation

import data
import synthetic


def rigid(yaw_deg: float, translation) -> np.ndarray:
    """A turn about z and a shift, written out: independent of the module's own helpers."""
    c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    x, y, z = translation
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


# --- A real pair -----------------------------------------------------------------------------------------------------


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
    log = data._read_log(av2_folder / av2_pair.log_id, False, "raster")
    city_SE3_ego0 = log.city_SE3_ego(av2_pair.timestamp0_ns)
    points_city = data.transform(city_SE3_ego0, av2_pair.pc0.double().numpy())
    by_av2s_rule = log.ground.is_ground(points_city, threshold_m=0.30, snap=np.trunc)
    assert (by_av2s_rule != av2_labels["is_ground_0"]).sum() <= 1
    mask = data.open_dataset(av2_folder).challenge_mask(av2_pair).numpy()
    is_near = (av2_pair.pc0[:, :2].abs() <= 50).all(dim=1).numpy()
    assert (mask != (is_near & ~av2_labels["is_ground_0"])).sum() <= 1 and 0 < mask.sum() < is_near.sum()


def agreement(mask, truth) -> tuple[float, float, float]:
    """F1, precision, recall."""
    both = (mask & truth).sum().item()
    return 2 * both / (mask.sum().item() + truth.sum().item()), both / mask.sum().item(), both / truth.sum().item()


def test_ground_of_a_real_pair_without_its_raster(av2_folder, av2_pair):
    """Measured: vector map, precision .991 and .989, recall .895 and .895; no map, F1 .966 and .966."""
    vector, points = (data.open_dataset(av2_folder, ground=ground)[0] for ground in ("vector", "points"))
    for sweep in "01":
        inside = data.is_in_grid(getattr(av2_pair, f"pc{sweep}"))
        raster, vectors, without = (getattr(pair, f"is_ground{sweep}")[inside] for pair in (av2_pair, vector, points))
        _, precision, recall = agreement(vectors, raster)
        assert precision >= 0.98 and recall >= 0.87
        assert agreement(without, raster)[0] >= 0.95


# --- Frames ----------------------------------------------------------------------------------------------------------


def test_total_flow_transforms_the_end_point_and_does_not_add():
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


def test_inverse_of_a_transform_five_kilometres_away_is_exact():
    city_SE3_ego = rigid(33.0, (5000.0, -2300.0, 70.0))
    np.testing.assert_allclose(data.inverse(city_SE3_ego) @ city_SE3_ego, np.eye(4), atol=1e-11)


def test_nothing_moves_in_a_static_world_however_the_ego_turns(tmp_path, monkeypatch):
    """Parked cars, standing people, a fast turning ego: the residual flow is zero to 1e-5 m."""

    def frozen_street(settings, number):
        street = make_street(settings, number)
        things = [dataclasses.replace(thing, s_mps=0.0, left_mps=0.0) for thing in street.things]
        return dataclasses.replace(street, things=things, curvature=1 / 40, ego_mps=15.0)

    make_street = synthetic.make_street
    monkeypatch.setattr(synthetic, "make_street", frozen_street)
    synthetic.write_logs(tmp_path, 1, synthetic.StreetSettings(azimuths=400, range_m=25.6, sweeps=2))
    (pair,) = data.open_dataset(tmp_path)
    turn_deg = np.degrees(Rotation.from_matrix(pair.ego1_SE3_ego0[:3, :3]).magnitude())
    assert turn_deg > 2  # in 0.1 s
    assert (pair.category > 0).sum() > 500
    assert pair.flow[pair.is_valid].abs().max() < 1e-5
    assert not pair.is_dynamic.any()
    rigid_flow = data.total_flow(torch.zeros_like(pair.pc0), pair)
    assert rigid_flow.norm(dim=1).median() > 1.0  # while everything moved in the ego frame


def test_poses_and_boxes_give_the_flow_that_was_meant(tmp_path):
    """One car in two sweeps, 5 km from the origin, ego turning: every number by hand."""
    city_SE3_ego0, city_SE3_ego1 = rigid(30, (5000, 2000, 10)), rigid(32, (5001, 2000.5, 10))
    city_SE3_car0, city_SE3_car1 = rigid(75, (5010, 2003, 11)), rigid(80, (5011, 2004, 11))
    in_car = np.array([[2.2, 0.9, 0.7], [-2.2, -0.9, -0.7], [2.4, 0, 0]])  # box 4.3 x 1.8 x 1.5; the last is 15 cm off
    pc0 = (np.linalg.inv(city_SE3_ego0) @ city_SE3_car0 @ np.c_[in_car, np.ones(3)].T)[:3].T
    write_log(tmp_path / "log", [pc0, pc0], [city_SE3_ego0, city_SE3_ego1], [city_SE3_car0, city_SE3_car1])
    (pair,) = data.open_dataset(tmp_path / "log")
    moved = (np.linalg.inv(city_SE3_ego0) @ city_SE3_car1 @ np.linalg.inv(city_SE3_car0) @ city_SE3_ego0)[:3]
    points = pair.pc0.numpy().astype(float)
    expected = np.c_[points, np.ones(3)] @ moved.T - points
    np.testing.assert_allclose(pair.flow[:2], expected[:2], atol=1e-6)
    assert pair.flow[2].abs().sum() == 0
    assert pair.category.tolist() == [data.CATEGORIES.index("REGULAR_VEHICLE")] * 2 + [0]
    assert pair.is_dynamic.tolist() == [True, True, False]
    ego0_SE3_ego1 = np.linalg.inv(city_SE3_ego0) @ city_SE3_ego1
    np.testing.assert_allclose(pair.pc1, (np.c_[points, np.ones(3)] @ ego0_SE3_ego1.T)[:, :3], atol=1e-5)


def test_where_boxes_overlap_the_later_one_in_the_file_counts(tmp_path):
    """Two boxes over one point, both moving; then the second is gone in sweep 1: no flow, and not valid."""
    pose, pc = rigid(0, (5000, 2000, 10)), np.array([[10.0, 0, 1]])
    cars = [rigid(0, (5010, 2000, 11)), rigid(0, (5011, 2000, 11))]
    write_log(tmp_path / "log", [pc, pc], [pose, pose], cars)
    file = tmp_path / "log" / "annotations.feather"
    first = feather.read_table(file).to_pylist()
    second = [{**row, "track_uuid": "bus", "category": "BUS"} for row in first]
    second[1]["tx_m"] += 2
    for name, rows, flow, is_valid in (("both", first + second, 3.0, True), ("gone", first + second[:1], 0.0, False)):
        shutil.copytree(tmp_path / "log", tmp_path / name)
        feather.write_feather(pyarrow.Table.from_pylist(rows), tmp_path / name / "annotations.feather")
        (pair,) = data.open_dataset(tmp_path / name)
        assert pair.category.item() == data.CATEGORIES.index("BUS")
        assert pair.flow[0, 0].item() == pytest.approx(flow, abs=1e-6) and pair.is_valid.item() == is_valid


def test_each_sweeps_ground_is_found_with_its_own_pose(tmp_path):
    """The same points in both sweeps, but the second ego stands 1 m higher: what was ground is ground no more."""
    pc, car = np.array([[5.0, 0, 0.2], [5.0, 1, -0.9]]), rigid(0, (900, 0, 0))
    poses = [rigid(0, (0.0, 0, 0)), rigid(0, (0.0, 0, 1.0))]
    write_log(tmp_path / "log", [pc, pc], poses, [car, car])
    np.save(tmp_path / "log" / "map" / "log_ground_height_surface____PIT.npy", np.zeros((20, 20), dtype=np.float16))
    (pair,) = data.open_dataset(tmp_path / "log")
    assert pair.is_ground0.tolist() == [True, True] and pair.is_ground1.tolist() == [False, True]


def test_a_box_without_points_at_either_end_is_no_box(tmp_path):
    pose, pc = rigid(0, (5000, 2000, 10)), np.array([[10.0, 0, 1]])
    cars = [rigid(0, (5010, 2000, 11)), rigid(0, (5011, 2000, 11))]
    for interior, category, is_valid in (((5, 5), 19, True), ((5, 0), 19, False), ((0, 5), 0, True)):
        folder = tmp_path / f"log{interior}"
        write_log(folder, [pc, pc], [pose, pose], cars, interior)
        (pair,) = data.open_dataset(folder)
        assert (pair.category.item(), pair.is_valid.item()) == (category, is_valid)
        assert pair.flow[0, 0].item() == (1.0 if interior == (5, 5) else 0.0)


# --- Ground and grid -------------------------------------------------------------------------------------------------


def test_ground_rule_by_hand():
    height = np.array([[1.0, 2.0], [3.0, np.nan]], dtype=np.float16)  # pixel (column, row) = 2 (xy + (1, 1))
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
    truncated = raster.is_ground(np.array([[-0.74, -1.0, 1.29], [-0.74, -1.0, 1.31]]), threshold_m=0.30, snap=np.trunc)
    assert truncated.tolist() == [True, False]  # av2's rule looks at column 0


def test_height_from_lines_of_a_map_by_hand():
    """A line along x that climbs 1 m a metre, and a vertex every metre: distances and heights by Pythagoras."""
    lines = [np.array([[0.0, 0, 0], [2.5, 0, 2.5], [3, 0, 3]]), np.array([[900.0, 900, -50]])]
    ground = data.GroundVectorMap(lines)
    along = [0, 2.5 / 3, 5 / 3, 2.5, 3]  # 2.5 m are three parts
    for x, y, nearest in ((1.25, 0.25, along[:4]), (2.25, -1.75, along[1:]), (40.25, 30.25, along[1:])):
        weights = [1 / np.hypot(x - vertex, y) for vertex in nearest]
        z = np.dot(weights, nearest) / sum(weights)
        above, below = (x, y, z + 0.401), (x, y, z + 0.399)  # each the middle of a cell of 50 cm
        assert ground.is_ground(np.array([above, below, (x, y, z - 9)])).tolist() == [False, True, True]
        assert ground.is_ground(np.array([below, (x + 0.2, y - 0.2, z + 0.399)])).tolist() == [True, True]  # same cell
    nowhere = [[-100.6, 0, -99], [0, -100.6, -99], [1000.6, 0, -99], [np.nan, 0, -99], [0, 0, np.nan], [np.inf, 0, -99]]
    assert not ground.is_ground(np.array(nowhere)).any()


def test_a_map_of_lines_is_closed_around_areas_and_has_both_sides_of_lanes(street_folder, street, tmp_path):
    """Heights at the middle of the closing edge and at lanes are those of the vertices that must be there."""
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
    (file,) = (log / "map").glob("log_map_archive_*.json")

    def points(*rows):
        return [dict(zip("xyz", row, strict=True)) for row in rows]

    area = {"area_boundary": points((0, 0, 1), (30, 0, 1), (30, 30, 1), (0, 30, 1))}
    lane = {
        "left_lane_boundary": points((10, 10, 5), (20, 10, 5)),
        "right_lane_boundary": points((10, 20, 9), (20, 20, 9)),
    }
    file.write_text(json.dumps({"drivable_areas": {"1": area}, "lane_segments": {"2": lane}}))
    ground = data._read_log(log, False, "vector").ground
    heights = ground.ground_z(np.array([[0.0, 15.25], [15.25, 10], [15.25, 20]]))  # all within 0.3 m of their line
    np.testing.assert_allclose(heights, [1, 5, 9], atol=1e-9)


def flat_street(rng, tilt_deg: float, z: float) -> tuple[np.ndarray, np.ndarray]:
    """A tilted plane with a kerb of 12 cm, a car, a wall, and what is ground."""
    xy = rng.uniform(-40, 40, (20_000, 2))
    road = np.column_stack([xy, rng.normal(0, 0.02, len(xy)) + 0.12 * (xy[:, 1] > 6)])
    car = rng.uniform((8, -1, 0.45), (12.5, 1, 1.6), (400, 3))
    wall = rng.uniform((-30, 20, 0.6), (30, 20.2, 4), (3_000, 3))
    points = np.concatenate([road, car, wall]) @ Rotation.from_euler("y", tilt_deg, degrees=True).as_matrix().T
    return points + (0, 0, z), np.arange(len(points)) < len(road)


@pytest.mark.parametrize(("tilt_deg", "z"), [(0, 0), (0, -1.73), (4, -0.33), (-6, 2)])
def test_ground_without_a_map_is_the_road_from_any_height_and_tilt(tilt_deg, z):
    points, truth = flat_street(np.random.default_rng(0), tilt_deg, z)
    is_ground = data.is_ground_without_map(points)
    assert is_ground[truth].mean() > 0.995 and not is_ground[~truth].any()
    order = np.random.default_rng(1).permutation(len(points))
    np.testing.assert_array_equal(data.is_ground_without_map(points[order]), is_ground[order])
    dirt = points.copy()
    dirt[::7, 1], dirt[1::7, 2], dirt[2::7, 0] = np.nan, np.inf, -np.inf
    is_clean = np.isfinite(dirt).all(axis=1)
    again = data.is_ground_without_map(dirt.astype(np.float32))
    assert not again[~is_clean].any() and again[is_clean & truth].mean() > 0.99 and not again[is_clean & ~truth].any()


def test_ground_without_a_map_follows_hills_and_is_not_drawn_down_by_ghosts(tmp_path, monkeypatch):
    """On streets of twice the usual slope, of a seed that was not tuned on; then with reflections far below."""
    make_street = synthetic.make_street

    def hilly(settings, number):
        street = make_street(settings, number)
        return dataclasses.replace(street, waves=street.waves * (2, 1, 1, 1))

    monkeypatch.setattr(synthetic, "make_street", hilly)
    synthetic.write_logs(tmp_path, 2, synthetic.StreetSettings(range_m=60, azimuths=900, sweeps=2, seed=5))
    rng = np.random.default_rng(0)
    for pair in data.open_dataset(tmp_path):
        points, inside = pair.pc0.numpy(), data.is_in_grid(pair.pc0).numpy()
        clean = agreement(data.is_ground_without_map(points)[inside], pair.is_ground0.numpy()[inside])[0]
        for _ in range(3):  # the same points, the same mask
            np.testing.assert_array_equal(data.is_ground_without_map(points), data.is_ground_without_map(points))
        ghosts = rng.uniform((-30, -30, -9), (30, 30, -2), (200, 3))
        haunted = data.is_ground_without_map(np.concatenate([points, ghosts]))
        assert clean > 0.93 and haunted[len(points) :].all()
        assert agreement(haunted[: len(points)][inside], pair.is_ground0.numpy()[inside])[0] > clean - 0.01


def test_ground_without_a_map_of_hardly_any_points_is_none():
    for points in (np.zeros((0, 3)), np.zeros((1, 3)), np.zeros((500, 3)), np.full((30, 3), np.nan)):
        is_ground = data.is_ground_without_map(points)
        assert is_ground.shape == (len(points),) and is_ground.dtype == bool and not is_ground.any()
    x = np.arange(-30.0, 30) + 0.5  # the middles of cells
    on_a_line, up_a_wall = np.column_stack([x, 0 * x, 0 * x]), np.column_stack([x, x % 2, 0.5 * x])  # 27 degrees
    assert not data.is_ground_without_map(on_a_line).any() and not data.is_ground_without_map(up_a_wall).any()


def test_a_row_of_parked_cars_does_not_pass_for_a_kerb():
    """They stand door to door and hide the road below: the lowest that is seen there is 45 cm above it."""
    rng = np.random.default_rng(0)
    road = np.column_stack([rng.uniform(-40, 40, (30_000, 2)), rng.normal(0, 0.02, 30_000)])
    road = road[(road[:, 1] < 3) | (road[:, 1] > 5)]
    cars = rng.uniform((-35, 3, 0.45), (35, 5, 0.9), (4_000, 3))
    is_ground = data.is_ground_without_map(np.concatenate([road, cars]))
    assert is_ground[: len(road)].all() and is_ground[len(road) :].mean() < 0.02


def test_a_sweep_that_is_all_ground_is_all_ground():
    points = np.column_stack([np.random.default_rng(0).uniform(-60, 60, (9_000, 2)), np.full(9_000, -0.33)])
    assert data.is_ground_without_map(points).all()


def test_the_best_ground_that_a_log_has_is_taken_and_others_by_name(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
    by_name = {name: data.open_dataset(log, ground=name)[0].is_ground0 for name in data.GROUNDS}
    assert torch.equal(data.open_dataset(log)[0].is_ground0, by_name["raster"]) and not by_name["none"].any()
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
    with pytest.raises(data.DataError, match="map: a log's vector map is one .*found "):
        data.open_dataset(log, ground="vector")[0]
    with pytest.raises(data.DataError, match="ground 'rooster': choose raster, vector, points, none"):
        data.open_dataset(log, ground="rooster")


def test_the_grid_owns_its_lower_border_and_nan_lies_nowhere():
    points = torch.tensor(
        [[-51.2, -51.2, -3], [51.2, 0, 0], [0, 51.2, 0], [0, 0, 3], [51.19, 51.19, 2.99], [torch.nan, 0, 0]]
    )
    assert data.is_in_grid(points).tolist() == [True, False, False, False, True, False]


def test_every_row_of_the_file_is_a_row_of_the_pair(street_folder, street):
    pair = street[0]
    table = feather.read_table(street_folder / pair.log_id / "sensors" / "lidar" / f"{pair.timestamp0_ns}.feather")
    np.testing.assert_array_equal(pair.pc0, np.stack([table[axis].to_numpy() for axis in "xyz"], axis=1))
    rows = {len(getattr(pair, name)) for name in ("pc0", "is_ground0", "flow", "category", "is_dynamic", "is_valid")}
    assert rows == {table.num_rows}
    assert pair.is_ground0.any() and not pair.is_ground0.all()


# --- Folders and broken files ----------------------------------------------------------------------------------------


def test_a_split_a_log_and_a_folder_without_labels_open(street_folder, street):
    assert [len(street), len({key.log_id for key in street.keys})] == [4, 2]
    log = data.open_dataset(street_folder / street.keys[-1].log_id)
    assert log.keys == street.keys[2:]
    assert torch.equal(log[1].pc0, street[3].pc0)
    assert data.open_dataset(street_folder, true_flow=False)[0].flow is None


def test_a_log_has_its_own_name_from_wherever_it_is_opened(street_folder, street, monkeypatch):
    monkeypatch.chdir(street_folder / street.keys[0].log_id / "map")
    for path in ("..", "../../" + street.keys[0].log_id):
        assert data.open_dataset(path).keys == street.keys[:2]


def test_opening_reads_no_sweep_and_a_gap_is_no_pair(tmp_path):
    lidar = tmp_path / "log" / "sensors" / "lidar"
    lidar.mkdir(parents=True)
    for stamp_ms in (1000, 1100, 1400, 1500):
        (lidar / f"{stamp_ms * 10**6}.feather").write_text("never read")
    pairs = data.open_dataset(tmp_path)
    assert [(key.timestamp0_ns // 10**6, key.timestamp1_ns // 10**6) for key in pairs.keys] == [
        (1000, 1100),
        (1400, 1500),
    ]
    assert len(pairs.skipped) == 1 and "0.30 s later" in pairs.skipped[0] and "1100000000" in pairs.skipped[0]


def _log_of(folder, stamps_ms) -> None:
    (folder / "sensors" / "lidar").mkdir(parents=True)
    for stamp_ms in stamps_ms:
        (folder / "sensors" / "lidar" / f"{stamp_ms * 10**6}.feather").touch()


def test_pairs_of_a_log_at_regular_intervals_are_nested(tmp_path):
    _log_of(tmp_path / "a", range(0, 30_000, 100))  # 300 sweeps, 299 pairs
    _log_of(tmp_path / "b", range(0, 1_600, 100))  # 15 pairs
    everything = data.open_dataset(tmp_path).keys
    assert len(everything) == 314
    three, five = (data.open_dataset(tmp_path, pairs_per_log=count).keys for count in (12, 24))
    assert len(three) == 24 and len(five) == 24 + 15
    assert set(three) < set(five) < set(everything) and five == sorted(five)
    for keys, interval_ms in ((three, 2_492), (five, 1_246)):  # 29,900 ms over 12 and 24
        steps_ms = np.diff([key.timestamp0_ns / 1e6 for key in keys if key.log_id == "a"])
        assert np.abs(steps_ms - interval_ms).max() < 100
    with pytest.raises(data.DataError, match="pairs_per_log -1, sweeps_per_log 0: give 0 for all"):
        data.open_dataset(tmp_path, pairs_per_log=-1)


def test_only_the_first_sweeps_of_a_log_where_that_is_asked_for(tmp_path):
    _log_of(tmp_path / "a", range(0, 15_600, 100))
    _log_of(tmp_path / "b", range(0, 500, 100))
    keys = data.open_dataset(tmp_path, sweeps_per_log=145).keys
    assert [sum(key.log_id == name for key in keys) for name in "ab"] == [144, 4]
    assert keys[0].timestamp0_ns == 0 and keys[143].timestamp1_ns == 14_400 * 10**6
    assert data.open_dataset(tmp_path, sweeps_per_log=145, pairs_per_log=2).keys[1].timestamp0_ns == 7_200 * 10**6


def test_a_file_with_a_strange_name_costs_that_file(tmp_path):
    _log_of(tmp_path / "a", (0, 100, 200))
    lidar = tmp_path / "a" / "sensors" / "lidar"
    for name in ("copy of 5.feather", "._100000000.feather", "0100000000.feather", "-5.feather", "notes.txt"):
        (lidar / name).touch()
    pairs = data.open_dataset(tmp_path)
    assert [key.timestamp0_ns for key in pairs.keys] == [0, 10**8] and pairs.notes == []
    assert len(pairs.skipped) == 4 and all("named <timestamp_ns>.feather; remove" in line for line in pairs.skipped)


def test_a_waymo_split_without_its_reader_says_what_to_copy(tmp_path, monkeypatch):
    for tag in ("lidar", "vehicle_pose"):
        (tmp_path / "training" / tag).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "waymo", None)  # as if it were not there
    with pytest.raises(data.DataError, match="training: a Waymo split, .* copy waymo.py too"):
        data.open_dataset(tmp_path / "training")


def test_a_folder_that_is_no_data_set_says_what_would_be_one(tmp_path):
    with pytest.raises(data.DataError, match="nowhere: no such folder"):
        data.open_dataset(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="no Argoverse 2 log in it .*sensors/lidar"):
        data.open_dataset(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "log" / "sensors" / "lidar").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"holds the splits train, val; choose one"):
        data.open_dataset(tmp_path)


def test_a_log_without_pairs_is_an_error_and_an_unfinished_log_is_none(tmp_path):
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
        ("city_SE3_egovehicle.feather", _column("tx_m", float("nan")), r"feather: the pose of sweep \d+ is no number"),
        ("sensors/lidar/*.feather", _nulls, r"lidar/\d+.feather: the sweep has no points"),
        ("sensors/lidar/*.feather", _column("x", "far"), r"lidar/\d+.feather: its points cannot be read .*'far'"),
        ("map/*_city.json", lambda file: file.write_text("[]"), "map: the ground raster cannot be read"),
        ("city_SE3_egovehicle.feather", _drop_pose, r"city_SE3_egovehicle.feather: no pose for sweep \d+; download"),
        ("city_SE3_egovehicle.feather", lambda file: file.unlink(), "city_SE3_egovehicle.feather: no such file"),
        ("sensors/lidar/*.feather", _empty, r"lidar/\d+.feather: the sweep has no points"),
        ("sensors/lidar/*.feather", _cut, r"lidar/\d+.feather: not a whole Feather file .* download"),
        ("sensors/lidar/*.feather", _rename_column, r"lidar/\d+.feather: has no columns \['x'\]"),
        ("annotations.feather", _cut, "annotations.feather: not a whole Feather file"),
        ("map/*.npy", _cut, "map: the ground raster cannot be read"),
        (
            "map/*.npy",
            lambda file: np.save(file, np.zeros(9)),
            r"map: the ground raster cannot be read .*shape is \(9,\)",
        ),
        ("map/*.npy", lambda file: file.unlink(), "map: a log's map needs one"),
        ("city_SE3_egovehicle.feather", _column("qw", "half"), r"egovehicle.feather: has no numbers in .*'half'"),
        ("city_SE3_egovehicle.feather", _column("timestamp_ns", "now"), "timestamp_ns is string, expected integers"),
        ("city_SE3_egovehicle.feather", _zero_quaternion, r"feather: the pose of sweep \d+ is no number"),
        ("city_SE3_egovehicle.feather", _cut, "egovehicle.feather: not a whole Feather file"),
        ("city_SE3_egovehicle.feather", lambda file: file.write_bytes(b""), "not a whole Feather file"),
        ("sensors/lidar/*.feather", lambda file: file.write_bytes(b""), r"lidar/\d+.feather: not a whole Feather file"),
        ("annotations.feather", _column("timestamp_ns", 0.5), "annotations.feather: .*double, expected integers"),
        ("annotations.feather", _column("length_m", "long"), "annotations.feather: has no numbers in"),
        ("annotations.feather", _column("num_interior_pts", "many"), "annotations.feather: has no numbers in"),
        ("annotations.feather", _column("category", None), "annotations.feather: unknown categories"),
        ("annotations.feather", _column("tx_m", float("inf")), "annotations.feather: a box has a size or pose"),
        ("annotations.feather", _zero_quaternion, "annotations.feather: a box has a size or pose"),
        ("map/*_city.json", lambda file: file.write_bytes(b"\xff"), "map: the ground raster cannot be read"),
        ("map/*_city.json", _nan_scale, "map: the ground raster cannot be read .*Sim2 is no number"),
        ("map/*.npy", lambda file: np.save(file, np.full((9, 9), "low")), "map: the ground raster cannot .* type <U3"),
        ("city_SE3_egovehicle.feather", _empty, r"egovehicle.feather: no pose for sweep \d+"),
    ],
)
def test_a_broken_file_is_named_with_the_way_out(street_folder, street, tmp_path, pattern, break_it, message):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
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
                "drivable_areas": {"1": {"area_boundary": [{"x": value, "y": 0, "z": 0}, {"x": 0, "y": 0, "z": 0}]}},
            }
        )
        for value in (None, "far", float("nan"), 1e300)
    ],
)
def test_a_broken_vector_map_is_named(street_folder, street, tmp_path, content):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
    (file,) = (log / "map").glob("log_map_archive_*.json")
    file.write_text(content)
    with pytest.raises(data.DataError, match="log_map_archive_.*json: the vector map cannot be read .*download"):
        data.open_dataset(log, ground="vector")[0]


def test_what_is_no_point_stays_a_row_without_ground_and_flow(street_folder, street, tmp_path):
    """NaN, infinite and absurd coordinates, and points off the raster; the other rows are as before."""
    clean, log = street[0], tmp_path / street.keys[0].log_id
    shutil.copytree(street_folder / log.name, log)
    for stamp in clean.key[1:]:
        file = log / "sensors" / "lidar" / f"{stamp}.feather"
        table = feather.read_table(file).select(["x", "y", "z"])
        columns = {name: table[name].to_numpy().astype(np.float64) for name in "xyz"}
        columns["x"][0], columns["y"][1], columns["z"][2], columns["x"][3] = np.nan, np.inf, -np.inf, 1e300
        columns["x"][4], columns["y"][4] = 6e4, -6e4
        feather.write_feather(pyarrow.table(columns), file)
    for ground in data.GROUNDS:
        expected, pair = (data.open_dataset(folder, ground=ground)[0] for folder in (street_folder, log))
        assert len(pair.pc0) == len(clean.pc0) and len(pair.pc1) == len(clean.pc1)
        assert pair.pc0[:4].isnan().all() and pair.pc1[:4].isnan().all()
        torch.testing.assert_close(pair.pc0[5:], expected.pc0[5:])
        for mask0, mask1 in ((pair.is_ground0, expected.is_ground0), (pair.is_ground1, expected.is_ground1)):
            assert not mask0[:5].any()
            assert (mask0[5:] != mask1[5:]).float().mean() <= (0.01 if ground == "points" else 0)
        assert not pair.is_valid[:4].any() and pair.is_valid[4] and not pair.is_dynamic[:5].any()
        assert torch.equal(pair.flow[5:], expected.flow[5:]) and (pair.flow[:5] == 0).all()


def test_a_log_whose_boxes_are_none_is_all_background(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
    _empty(log / "annotations.feather")
    pair = data.open_dataset(log)[0]
    assert (pair.flow == 0).all() and (pair.category == 0).all() and pair.is_valid.all()


def test_a_missing_pose_breaks_its_pairs_and_no_others(street_folder, street, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
    file = log / "city_SE3_egovehicle.feather"
    feather.write_feather(feather.read_table(file).slice(0, 2), file)  # the third sweep's is gone
    pairs = data.open_dataset(log)
    assert torch.equal(pairs[0].pc1, street[0].pc1)
    with pytest.raises(data.DataError, match=f"no pose for sweep {pairs.keys[1].timestamp1_ns}"):
        pairs[1]


def test_memory_does_not_grow_with_the_pairs_visited(street_folder, street, tmp_path):
    for number in range(20):  # more logs than are kept
        (tmp_path / f"log{number:02d}").symlink_to(street_folder / street.keys[0].log_id)
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


# --- Clouds and poses of one's own -----------------------------------------------------------------------------------


def test_a_cloud_is_the_same_in_every_format(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (50, 3)).astype(np.float32)
    with_more = np.column_stack([points, np.arange(50, dtype=np.float32)])
    with_more.tofile(tmp_path / "kitti.bin")
    np.save(tmp_path / "cloud.npy", points.astype(np.float64))
    np.save(tmp_path / "more.npy", with_more)
    np.savez(tmp_path / "one.npz", points)
    np.savez_compressed(tmp_path / "named.npz", intensity=np.zeros(50), points=with_more)
    table = pyarrow.table({"y": points[:, 1], "x": points[:, 0], "z": points[:, 2], "intensity": np.zeros(50)})
    feather.write_feather(table, tmp_path / "cloud.feather")
    np.save(tmp_path / "big-endian.npy", points.astype(">f8"))
    for name in ("kitti.bin", "cloud.npy", "more.npy", "one.npz", "named.npz", "cloud.feather", "big-endian.npy"):
        np.testing.assert_array_equal(data.read_cloud(tmp_path / name), points, err_msg=name)


PLY = """ply
format {form} 1.0
comment made by hand
element camera 2
property uchar id
property float angle
element vertex 3
property {z} z
property uchar red
property {x} x
property short ring
property {y} y
element face 1
property list uchar int vertex_indices
end_header
"""


def write_ply(file, points, form: str, x="float", y="double", z="float32") -> None:
    """Two cameras, then points with a colour and a ring among their coordinates, then a face."""
    header = PLY.format(form=form, x=x, y=y, z=z).encode()
    if form == "ascii":
        rows = "".join(f"{p[2]:.17g} 7 {p[0]:.17g} -3 {p[1]:.17g}\n" for p in points)
        file.write_bytes(header + b"1 0.5\n2 0.25\n" + rows.encode() + b"3 0 1 2\n")
        return
    order = "<" if form.endswith("little_endian") else ">"
    codes = {"float": "f", "float32": "f", "double": "d", "int": "i", "ushort": "H"}
    row = f"{order}{codes[z]}B{codes[x]}h{codes[y]}"
    whole = [name in ("int", "ushort") for name in (x, y, z)]
    points = [[int(value) if is_int else value for value, is_int in zip(p, whole, strict=True)] for p in points]
    rows = [struct.pack(row, p[2], 7, p[0], -3, p[1]) for p in points]
    cameras = struct.pack(f"{order}BfBf", 1, 0.5, 2, 0.25)
    file.write_bytes(header + cameras + b"".join(rows) + struct.pack(f"{order}Biii", 3, 0, 1, 2))


def test_ply_files_of_all_kinds_give_their_points(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (3, 3)).astype(np.float32)
    for form in ("ascii", "binary_little_endian", "binary_big_endian"):
        write_ply(tmp_path / "cloud.ply", points, form)
        np.testing.assert_array_equal(data.read_cloud(tmp_path / "cloud.ply"), points, err_msg=form)
        (tmp_path / "crlf.ply").write_bytes((tmp_path / "cloud.ply").read_bytes().replace(b"header\n", b"header\r\n"))
        np.testing.assert_array_equal(data.read_cloud(tmp_path / "crlf.ply"), points)
    whole = np.array([[1, -2, 3], [4, -5, 6], [700, -8, 65535]])
    write_ply(tmp_path / "whole.ply", whole, "binary_little_endian", "int", "int", "ushort")
    np.testing.assert_array_equal(data.read_cloud(tmp_path / "whole.ply"), whole)


PCD = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS intensity x _ y z normal
SIZE 1 4 1 8 4 4
TYPE U F U F F F
COUNT 1 1 3 1 1 2
WIDTH {count}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {count}
DATA {form}
"""


def packed(content: bytes) -> bytes:
    """LZF without looking for repetitions: runs of up to 32 bytes, each behind its length less one."""
    runs = [content[i : i + 32] for i in range(0, len(content), 32)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def write_pcd(file, points, form: str) -> None:
    header = PCD.format(count=len(points), form=form).encode()
    if form == "ascii":
        rows = "".join(f"9 {p[0]:.17g} 0 0 0 {p[1]:.17g} {p[2]:.17g} nan 1\n" for p in points)
        body = rows.encode()
    elif form == "binary":
        body = b"".join(struct.pack("<Bf3Bdfff", 9, p[0], 0, 0, 0, p[1], p[2], 1, 1) for p in points)
    else:
        count = len(points)
        columns = [bytes(count), struct.pack(f"<{count}f", *points[:, 0]), bytes(3 * count)]
        columns += [
            struct.pack(f"<{count}d", *points[:, 1]),
            struct.pack(f"<{count}f", *points[:, 2]),
            bytes(8 * count),
        ]
        plain = b"".join(columns)
        body = struct.pack("<II", len(packed(plain)), len(plain)) + packed(plain) + b"padding"
    file.write_bytes(header + body)


def test_pcd_files_of_all_kinds_give_their_points(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (50, 3)).astype(np.float32)
    for form in ("ascii", "binary", "binary_compressed"):
        write_pcd(tmp_path / "cloud.pcd", points, form)
        np.testing.assert_array_equal(data.read_cloud(tmp_path / "cloud.pcd"), points, err_msg=form)


def test_lzf_by_hand():
    """Runs as they are, short, long and far repetitions, and one that repeats what it is writing."""
    far = bytes(range(256)) * 2
    for content, wanted in (
        (b"\x02abc", b"abc"),
        (b"\x02abc\x20\x02", b"abcabc"),  # 1 + 2 bytes from 2 + 1 back
        (b"\x00a\xe0\x05\x00", b"a" * 15),  # 7 + 5 + 2 bytes from 0 + 1 back
        (packed(far) + b"\x41\xff\x00z", far + far[:4] + b"z"),  # 2 + 2 bytes from 256 + 255 + 1 back
    ):
        assert data._unpack_lzf(content, len(wanted)) == wanted
    for torn in (b"\x05ab", b"\x00a\x20", b"\x00a\x20\x07"):
        with pytest.raises((ValueError, IndexError)):
            data._unpack_lzf(torn, 4)


def test_files_that_are_no_clouds_are_named(tmp_path):
    (tmp_path / "torn.bin").write_bytes(b"0" * 20)
    (tmp_path / "empty.bin").write_bytes(b"")
    np.save(tmp_path / "flat.npy", np.zeros(9))
    np.save(tmp_path / "two.npy", np.zeros((9, 2)))
    np.save(tmp_path / "code.npy", np.array([object()]), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.full((2, 3), "far"))
    np.savez(tmp_path / "many.npz", a=np.zeros((2, 3)), b=np.zeros((2, 3)))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "many.npz").read_bytes()[:100])
    (tmp_path / "torn.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:90])
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    np.save(tmp_path / "complex.npy", np.ones((2, 3), dtype=complex))
    np.savez_compressed(tmp_path / "flipped.npz", np.random.default_rng(0).normal(size=(500, 3)))
    flipped = bytearray((tmp_path / "flipped.npz").read_bytes())
    flipped[len(flipped) // 2 :: 50] = bytes(len(flipped[len(flipped) // 2 :: 50]))
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "cloud.las").write_text("LASF")
    write_ply(tmp_path / "whole.ply", np.ones((3, 3)), "binary_little_endian")
    (tmp_path / "torn.ply").write_bytes((tmp_path / "whole.ply").read_bytes()[:-40])
    write_ply(tmp_path / "short.ply", np.ones((3, 3)), "ascii")
    text = (tmp_path / "short.ply").read_text()
    (tmp_path / "short.ply").write_text("\n".join(text.splitlines()[:-2]))
    (tmp_path / "headless.ply").write_text(text.replace("end_header", "the end"))
    (tmp_path / "faces first.ply").write_text(
        text.replace("element camera 2", "element face 2\nproperty list int int i")
    )
    (tmp_path / "flat.ply").write_text(text.replace("float32 z", "float32 height"))
    (tmp_path / "odd.ply").write_text(text.replace("ascii", "morse"))
    for form in ("binary", "ascii", "binary_compressed"):
        write_pcd(tmp_path / f"{form}.pcd", np.ones((2, 3), dtype=np.float32), form)
    text = (tmp_path / "ascii.pcd").read_text()
    (tmp_path / "torn.pcd").write_bytes((tmp_path / "binary.pcd").read_bytes()[:-9])
    (tmp_path / "torn ascii.pcd").write_text("\n".join(text.splitlines()[:-1]))
    (tmp_path / "torn compressed.pcd").write_bytes((tmp_path / "binary_compressed.pcd").read_bytes()[:-30])
    (tmp_path / "headless.pcd").write_text(text.split("DATA")[0])
    (tmp_path / "odd.pcd").write_text(text.replace("ascii", "morse"))
    (tmp_path / "flat.pcd").write_text(text.replace(" z ", " height "))
    for name, message in (
        ("torn.bin", "20 bytes are no rows of four float32 numbers"),
        ("empty.bin", "has no points"),
        ("flat.npy", r"its shape is \(9,\)"),
        ("two.npy", r"its shape is \(9, 2\)"),
        ("code.npy", "cannot be read"),
        ("text.npy", "cannot be read"),
        ("many.npz", r"it holds \['a', 'b'\], and none of them is called points"),
        ("torn.npz", "cannot be read"),
        ("torn.npy", "cannot be read"),
        ("nan.npy", "has no points"),
        ("complex.npy", "its values are complex128"),
        ("flipped.npz", "cannot be read"),
        ("cloud.las", "convert it to one of .feather, .bin, .npy, .npz, .ply, .pcd"),
        ("no.bin", "no such file"),
        ("torn.ply", "buffer is smaller"),
        ("short.ply", "it has 2 points, and should have 3"),
        ("headless.ply", "it does not begin with ply"),
        ("faces first.ply", "a list among or before the vertices, in face"),
        ("flat.ply", "cannot be read"),
        ("odd.ply", "cannot be read"),
        ("torn.pcd", "buffer is smaller"),
        ("torn ascii.pcd", "it has 1 points, and should have 2"),
        ("torn compressed.pcd", "cannot be read"),
        ("headless.pcd", "it has no line DATA"),
        ("odd.pcd", "its DATA is"),
        ("flat.pcd", "cannot be read"),
    ):
        with pytest.raises(data.DataError, match=f"{name}: .*{message}"):
            data.read_cloud(tmp_path / name)


def test_poses_are_read_and_what_is_no_pose_is_named(tmp_path):
    pose = np.array([[0, -1, 0, 3], [1, 0, 0, -2], [0, 0, 1, 0.5], [0, 0, 0, 1]], dtype=float)
    np.save(tmp_path / "pose.npy", pose)
    np.savetxt(tmp_path / "pose.txt", pose)
    for name in ("pose.npy", "pose.txt"):
        np.testing.assert_array_equal(data.read_pose(tmp_path / name), pose)
    for name, wrong in (
        ("transposed.txt", pose.T),
        ("three rows.txt", pose[:3]),
        ("mirrored.txt", pose * [[-1], [1], [1], [1]]),
        ("scaled.txt", np.diag([2.0, 2.0, 2.0, 1.0])),
        ("nan.txt", pose * np.nan),
    ):
        np.savetxt(tmp_path / name, wrong)
        with pytest.raises(data.DataError, match=f"{name}: not a 4 x 4 pose"):
            data.read_pose(tmp_path / name)
    (tmp_path / "words.txt").write_text("no pose")
    for name in ("words.txt", "nowhere.txt"):
        with pytest.raises(data.DataError, match=f"{name}: not a 4 x 4 pose"):
            data.read_pose(tmp_path / name)


def test_a_pair_of_clouds_is_in_the_frame_of_the_first():
    """The ego goes 3 m ahead and turns left by 90 degrees: a pole 10 m ahead is then 7 m to its right."""
    ego0_SE3_ego1 = np.array([[0, -1, 0, 3], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)
    pole0, pole1 = np.array([[10.0, 0, 1]]), np.array([[0.0, -7, 1]])
    pair = data.pair_of_clouds(pole0, torch.from_numpy(pole1), np.linalg.inv(ego0_SE3_ego1), np.array([True]))
    torch.testing.assert_close(pair.pc1, torch.tensor([[10.0, 0, 1]]))
    assert pair.pc0.dtype == pair.pc1.dtype == torch.float32
    assert pair.is_ground0.tolist() == [True] and pair.is_ground1.tolist() == [False]
    assert torch.equal(data.pair_of_clouds(pole0, pole1).pc1, torch.from_numpy(pole1).float())
    backwards = np.array([[1.0, 2, 3], [4, 5, 6]], dtype=">f4")[::-1]
    backwards.flags.writeable = False
    assert data.pair_of_clouds(backwards, pole1).pc0.tolist() == [[4, 5, 6], [1, 2, 3]]
    for arguments, message in (
        ((pole0, pole1.T), r"cloud 1 has shape \(3, 1\)"),
        ((pole0, pole1, np.eye(3)), r"its shape is \(3, 3\)"),
        ((pole0, pole1, None, np.zeros(2, dtype=bool)), "ground 0 is .*a bool for each of 1"),
        ((pole0, pole1, None, None, np.zeros(1)), "ground 1 is .*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            data.pair_of_clouds(*arguments)


# --- Folders of clouds ------------------------------------------------------------------------------------------------

# The ego drives 2 m a sweep and turns left by 90 degrees after each: world_SE3_sensor of four sweeps.
DRIVE = [rigid(0, (10, 0, 0)), rigid(90, (12, 0, 0)), rigid(180, (12, 2, 0)), rigid(270, (10, 2, 0))]
POLE = np.array([20.0, 5.0, 1.0])  # in the world


def write_clouds(folder, names) -> None:
    """The pole as the i-th sensor sees it, then a point far above that is i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, world_SE3_sensor) in enumerate(zip(names, DRIVE, strict=False)):
        pole = (np.linalg.inv(world_SE3_sensor) @ [*POLE, 1])[:3]
        np.save(folder / name, np.array([pole, [0, 0, 50 + i]]))


def kitti_rows(poses) -> str:
    return "".join(" ".join(f"{value:.12g}" for value in pose[:3].ravel()) + "\n" for pose in poses)


def tum_row(stamp_s, pose) -> str:
    return " ".join(
        [str(stamp_s), *(f"{v:.12g}" for v in (*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()))]
    )


def assert_the_pole_stands_still(pairs, sensors=(0, 1, 2, 3)) -> None:
    assert len(pairs) == len(sensors) - 1
    for pair, i, j in zip(pairs, sensors, sensors[1:], strict=False):
        pole = (np.linalg.inv(DRIVE[i]) @ [*POLE, 1])[:3]
        np.testing.assert_allclose(pair.pc0[0], pole, atol=1e-5)
        np.testing.assert_allclose(pair.pc1[0], pole, atol=1e-5)
        assert pair.pc0[1, 2] == 50 + i and pair.pc1[1, 2] == 50 + j


NUMBERED = [f"{i:06d}.npy" for i in range(4)]
STAMPED = [f"{10**18 + i * 10**8 + 137}.npy" for i in range(4)]


def test_a_folder_of_clouds_with_kittis_poses_is_a_data_set(tmp_path):
    write_clouds(tmp_path / "drive", NUMBERED)
    (tmp_path / "poses.txt").write_text(kitti_rows(DRIVE))  # in the folder above
    pairs = data.open_dataset(tmp_path / "drive")
    assert pairs.notes == pairs.skipped == []
    assert pairs.keys == [(f"{tmp_path.name}-drive", i * 10**8, (i + 1) * 10**8) for i in range(3)]
    assert_the_pole_stands_still(pairs)
    np.testing.assert_allclose(pairs[0].ego1_SE3_ego0, np.linalg.inv(DRIVE[1]) @ DRIVE[0], atol=1e-12)
    assert pairs[0].flow is None and not pairs[0].is_ground0.any()
    assert [key.timestamp0_ns for key in data.open_dataset(tmp_path / "drive", rate_hz=5).keys] == [0, 2e8, 4e8]
    assert len(data.open_dataset(tmp_path / "drive", sweeps_per_log=3, pairs_per_log=1)) == 1
    (tmp_path / "poses.txt").rename(tmp_path / "elsewhere.txt")
    assert_the_pole_stands_still(data.open_dataset(tmp_path / "drive", poses=tmp_path / "elsewhere.txt"))
    with pytest.raises(data.DataError, match="holds the splits drive; choose one"):
        data.open_dataset(tmp_path)


def test_kittis_poses_of_its_camera_become_its_lidars(tmp_path):
    """KITTI writes camera0_SE3_camera; beside it calib.txt has Tr, camera_SE3_lidar."""
    write_clouds(tmp_path / "velodyne", NUMBERED)
    camera_SE3_lidar = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])
    cameras = [camera_SE3_lidar @ np.linalg.inv(DRIVE[0]) @ pose @ np.linalg.inv(camera_SE3_lidar) for pose in DRIVE]
    (tmp_path / "poses.txt").write_text(kitti_rows(cameras))
    (tmp_path / "calib.txt").write_text("P0: 1 2 3\nTr: " + kitti_rows([camera_SE3_lidar]))
    pairs = data.open_dataset(tmp_path / "velodyne")
    assert_the_pole_stands_still(pairs)
    assert len(pairs.notes) == 1 and "calib.txt: by its Tr" in pairs.notes[0]


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_tum_poses_go_by_time_where_names_are_stamps(tmp_path, unit):
    write_clouds(tmp_path, STAMPED)
    rows = ["# stamp tx ty tz qx qy qz qw"]
    for i, pose in list(enumerate(DRIVE))[::-1]:  # not in order, 0.9 ms early, and with others between
        for stamp_ns, each in ((10**18 + i * 10**8 - 900_000, pose), (10**18 + i * 10**8 + 5 * 10**7, np.eye(4))):
            stamp = f"{stamp_ns // 10**9}.{stamp_ns % 10**9:09d}" if unit == "s" else stamp_ns
            rows.append(tum_row(stamp, each))
    (tmp_path / "poses.txt").write_text("\n".join(rows))
    pairs = data.open_dataset(tmp_path)
    assert pairs.keys[0].timestamp0_ns == 10**18 + 137
    assert_the_pole_stands_still(pairs)
    late = "\n".join(rows).replace(rows[1].split()[0], rows[1].split()[0].replace("99100000", "98800000"))  # 1.2 ms
    (tmp_path / "poses.txt").write_text(late)
    pairs = data.open_dataset(tmp_path)
    assert pairs[1].pc0[1, 2] == 51
    with pytest.raises(data.DataError, match=rf"poses.txt: no pose for {STAMPED[3]} .*remove that cloud"):
        pairs[2]


@pytest.mark.parametrize(
    "names",
    [
        ["1700000000.500000", "1700000000.600000", "1700000000.700000", "1700000000.800000"],
        ["1700000000.5", "1700000000.6", "1700000000.65", "1700000000.7"],  # as Python writes floats
        [str(1_700_000_000_500_000 + i * 100_000) for i in range(4)],  # microseconds
        [str(1_700_000_000_500 + i * 100) for i in range(4)],  # milliseconds
        [str(1_700_000_000_500_000_000 + i * 10**8) for i in range(4)],
    ],
    ids=lambda names: names[0],
)
def test_time_stamps_are_in_the_unit_that_their_size_tells(tmp_path, names):
    step_ns = [10**8] * 3 if "65" not in names[2] else [10**8, 5 * 10**7, 5 * 10**7]
    write_clouds(tmp_path, [f"{name}.npy" for name in names])
    pairs = data.open_dataset(tmp_path)
    assert pairs.keys[0].timestamp0_ns == 1_700_000_000_500_000_000 and pairs.skipped == []
    assert [key.timestamp1_ns - key.timestamp0_ns for key in pairs.keys] == step_ns
    assert [int(pairs[i].pc0[1, 2]) for i in range(3)] == [50, 51, 52]  # in their order
    (tmp_path / f"{names[1]}.npy").unlink()  # 0.2 s, or 0.15 s
    assert len(data.open_dataset(tmp_path)) == (1 if step_ns == [10**8] * 3 else 2)
    stamps_us = [1_700_000_000_500_000, 1_700_000_000_700_000]
    rows = [tum_row(stamp, pose) for stamp, pose in zip(stamps_us, (DRIVE[0], DRIVE[2]), strict=True)]
    (tmp_path / "poses.txt").write_text("\n".join(rows))  # TUM in microseconds
    posed = data.CloudPairs(tmp_path)
    assert np.allclose(posed._sweeps[1_700_000_000_500_000_000][1], DRIVE[0])


def test_the_folder_above_is_found_from_inside(tmp_path, monkeypatch):
    write_clouds(tmp_path / "drive" / "velodyne", NUMBERED)
    (tmp_path / "drive" / "poses.txt").write_text(kitti_rows(DRIVE))
    by_name = data.open_dataset(tmp_path / "drive" / "velodyne")
    (tmp_path / "drive" / "velodyne" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "drive" / "velodyne" / "below")
    from_inside = data.open_dataset("..")
    assert from_inside.keys == by_name.keys and from_inside.keys[0].log_id == "drive-velodyne"
    assert_the_pole_stands_still(from_inside)


def test_pose_files_with_stamps_or_calibrations_that_are_no_numbers_are_named(tmp_path):
    write_clouds(tmp_path, STAMPED)
    rows = [tum_row((10**18 + i * 10**8) / 1e9, pose) for i, pose in enumerate(DRIVE)]
    (tmp_path / "poses.txt").write_text("\n".join([*rows, rows[0].replace(rows[0].split()[0], "nan")]))
    with pytest.raises(data.DataError, match="poses.txt: has a time stamp that is no number"):
        data.open_dataset(tmp_path)
    (tmp_path / "poses.txt").write_text(kitti_rows(DRIVE))
    (tmp_path / "calib.txt").write_text("Tr: 1 2 3\n")
    with pytest.raises(data.DataError, match="calib.txt: its Tr is no 3 x 4 pose"):
        data.open_dataset(tmp_path)


def test_tum_poses_go_by_order_where_names_are_no_stamps(tmp_path):
    write_clouds(tmp_path, [f"frame{i}.npy" for i in (8, 9, 10, 11)])  # frame10 comes after frame9
    (tmp_path / "poses.txt").write_text("\n".join(tum_row(i / 10, pose) for i, pose in enumerate(DRIVE)))
    assert_the_pole_stands_still(data.open_dataset(tmp_path))
    (tmp_path / "frame12.npy").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"poses.txt: has 4 poses for the 5 clouds of .*; give one each"):
        data.open_dataset(tmp_path)


def test_clouds_with_argoverses_poses(tmp_path):
    write_clouds(tmp_path, STAMPED)
    write_log(tmp_path / "log", [np.ones((1, 3))] * 4, DRIVE, DRIVE, (5,) * 4)
    table = feather.read_table(tmp_path / "log" / "city_SE3_egovehicle.feather")
    stamps = pyarrow.array([int(name.split(".")[0]) for name in STAMPED])
    feather.write_feather(table.set_column(0, "timestamp_ns", stamps), tmp_path / "city_SE3_egovehicle.feather")
    shutil.rmtree(tmp_path / "log")
    assert_the_pole_stands_still(data.open_dataset(tmp_path))


def test_without_poses_clouds_are_in_one_frame_and_a_note_says_so(tmp_path):
    write_clouds(tmp_path, NUMBERED[:2])
    pairs = data.open_dataset(tmp_path)
    (note,) = pairs.notes
    assert str(tmp_path) in note and "taken to be in one frame" in note
    np.testing.assert_array_equal(pairs[0].pc1, np.load(tmp_path / NUMBERED[1]).astype(np.float32))
    assert torch.equal(pairs[0].ego1_SE3_ego0, torch.eye(4, dtype=torch.float64))


def test_gaps_strange_names_and_repeated_times_break_a_pair(tmp_path):
    write_clouds(tmp_path, ["000000.npy", "000001.npy", "000003.npy", "000004.npy"])
    shutil.copy(tmp_path / "000000.npy", tmp_path / "map.npy")
    np.save(tmp_path / "0.npy", np.ones((1, 3)))
    (tmp_path / "._000002.npy").touch()
    (tmp_path / "notes.txt").touch()
    pairs = data.open_dataset(tmp_path)
    assert [(key.timestamp0_ns / 1e8, key.timestamp1_ns / 1e8) for key in pairs.keys] == [(0, 1), (3, 4)]
    strange, repeated, gap = pairs.skipped
    assert "map.npy: has no number for a name" in strange and "no pair at 100000000" in gap and "0.20 s later" in gap
    assert "000000.npy: has the time of 0.npy; remove one" in repeated
    assert pairs[0].pc0.tolist() == [[1, 1, 1]]  # 0.npy, the first of the two
    for name, content in (("000001.npy", b""), ("000004.npy", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
    for pair, name in zip((0, 1), ("000001.npy", "000004.npy"), strict=True):
        with pytest.raises(data.DataError, match=f"{name}: its points cannot be read"):
            pairs[pair]


def test_ground_of_clouds_is_found_without_a_map_or_not_at_all(tmp_path):
    points, truth = flat_street(np.random.default_rng(0), 1, -1.73)
    for name in NUMBERED[:2]:
        np.column_stack([points, points[:, 0]]).astype("<f4").tofile(tmp_path / name.replace("npy", "bin"))
    for ground, wanted in (("", truth), ("points", truth), ("none", 0 * truth > 0)):
        mask = data.open_dataset(tmp_path, ground=ground)[0].is_ground1.numpy()
        assert (mask == wanted).mean() > 0.99
    for ground in ("raster", "vector"):
        with pytest.raises(
            data.DataError, match=f"clouds have no map for the ground '{ground}'; choose points or none"
        ):
            data.open_dataset(tmp_path, ground=ground)
    with pytest.raises(data.DataError, match="rate_hz 0: give the number of sweeps a second"):
        data.open_dataset(tmp_path, rate_hz=0)


def test_files_of_poses_that_are_none_are_named(tmp_path):
    write_clouds(tmp_path / "clouds", NUMBERED)
    file = tmp_path / "mine.txt"
    for content, message in (
        ("", "its poses cannot be read"),
        ("no poses", "its poses cannot be read"),
        ("1 2 3\n" * 4, "3 numbers a row, and a pose 12 .KITTI. or 8 .TUM."),
        (kitti_rows(DRIVE + DRIVE[:1]), r"has 5 poses for the 4 clouds of .*clouds; give one each"),
        (kitti_rows(DRIVE[:3]), r"has 3 poses for the 4 clouds of .*clouds; give one each"),
    ):
        file.write_text(content)
        with pytest.raises(data.DataError, match=f"mine.txt: .*{message}"):
            data.open_dataset(tmp_path / "clouds", poses=file)
    with pytest.raises(data.DataError, match="nowhere.txt: its poses cannot be read"):
        data.open_dataset(tmp_path / "clouds", poses=tmp_path / "nowhere.txt")
    file.write_text(kitti_rows(DRIVE[:3] + [2 * DRIVE[3]]))
    pairs = data.open_dataset(tmp_path / "clouds", poses=file)
    assert len(pairs[0].pc0) == 2  # its poses are sound
    with pytest.raises(data.DataError, match="mine.txt: no pose for 000003.npy .*no rotation"):
        pairs[2]
    write_clouds(tmp_path / "stamped", STAMPED)
    file.write_text("\n".join(tum_row(i / 10, pose) for i, pose in enumerate(DRIVE)))
    with pytest.raises(data.DataError, match="mine.txt: has no pose within 1 ms of any cloud"):
        data.open_dataset(tmp_path / "stamped", poses=file)


# --- A log written by hand -------------------------------------------------------------------------------------------


def write_log(folder, sweeps, city_SE3_egos, city_SE3_cars, interior=(5, 5)) -> None:
    """An Argoverse 2 log of one car, its columns spelt out as in the published files."""

    def pose(matrix):
        x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
        return dict(zip(("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m"), (w, x, y, z, *matrix[:3, 3]), strict=True))

    (folder / "sensors" / "lidar").mkdir(parents=True)
    (folder / "map").mkdir()
    stamps = [10**9 + i * 10**8 for i in range(len(sweeps))]
    for stamp, points in zip(stamps, sweeps, strict=True):
        columns = dict(zip("xyz", points.T.astype(np.float16), strict=True))
        feather.write_feather(pyarrow.table(columns), folder / "sensors" / "lidar" / f"{stamp}.feather")
    poses = [{"timestamp_ns": stamp, **pose(ego)} for stamp, ego in zip(stamps, city_SE3_egos, strict=True)]
    size = {"length_m": 4.3, "width_m": 1.8, "height_m": 1.5}
    boxes = [
        {"timestamp_ns": stamp, "track_uuid": "car", "category": "REGULAR_VEHICLE", "num_interior_pts": count, **size}
        | pose(np.linalg.inv(ego) @ car)
        for stamp, ego, car, count in zip(stamps, city_SE3_egos, city_SE3_cars, interior, strict=True)
    ]
    feather.write_feather(pyarrow.Table.from_pylist(poses), folder / "city_SE3_egovehicle.feather")
    feather.write_feather(pyarrow.Table.from_pylist(boxes), folder / "annotations.feather")
    np.save(folder / "map" / "log_ground_height_surface____PIT.npy", np.zeros((2, 2), dtype=np.float16))
    (folder / "map" / "log___img_Sim2_city.json").write_text('{"R": [1, 0, 0, 1], "t": [0, 0], "s": 1}')
