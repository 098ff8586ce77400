"""The readers against labels that someone else made, hand arithmetic, and broken files."""

import dataclasses
import shutil

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
    log = data._read_log(av2_folder / av2_pair.log_id, False)
    city_SE3_ego0 = log.city_SE3_ego(av2_pair.timestamp0_ns)
    points_city = data.transform(city_SE3_ego0, av2_pair.pc0.double().numpy())
    by_av2s_rule = log.ground.is_ground(points_city, threshold_m=0.30, snap=np.trunc)
    assert (by_av2s_rule != av2_labels["is_ground_0"]).sum() <= 1
    mask = data.open_dataset(av2_folder).challenge_mask(av2_pair).numpy()
    is_near = (av2_pair.pc0[:, :2].abs() <= 50).all(dim=1).numpy()
    assert (mask != (is_near & ~av2_labels["is_ground_0"])).sum() <= 1 and 0 < mask.sum() < is_near.sum()


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
    ],
)
def test_a_broken_file_is_named_with_the_way_out(street_folder, street, tmp_path, pattern, break_it, message):
    log = tmp_path / "log"
    shutil.copytree(street_folder / street.keys[0].log_id, log)
    break_it(sorted(log.glob(pattern))[0])
    pairs = data.open_dataset(log)
    with pytest.raises(data.DataError, match=message):
        pairs[0]


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
    (tmp_path / "cloud.ply").write_text("ply")
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
        ("cloud.ply", "convert it to one of .feather, .bin, .npy, .npz"),
        ("no.bin", "no such file"),
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
