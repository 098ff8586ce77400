"""The Waymo reader on a small data set in the published schema.

Points are compared with a loop over pixels, and flow with arithmetic by hand.
"""

import math
import os
import shutil
import tracemalloc

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from scipy.spatial.transform import Rotation

import clouds
import commands
import data
import waymo

H, W = 6, 40
STAMPS = [1_550_083_467_346_370 + 100_000 * i for i in range(3)]  # microseconds
INCLINATIONS = np.array([-0.31, -0.2, -0.12, -0.05, 0.0, 0.04])  # ascending, as in the files


def pose(roll, pitch, yaw, x, y, z) -> np.ndarray:
    """(4, 4), rotated about the moving axes: yaw, then pitch, then roll."""
    target_SE3_source = np.eye(4)
    target_SE3_source[:3, :3] = Rotation.from_euler("ZYX", [yaw, pitch, roll]).as_matrix()
    target_SE3_source[:3, 3] = x, y, z
    return target_SE3_source


VEHICLE_SE3_LIDAR = pose(0.01, -0.02, 2.58, 1.43, 0.1, 2.184)


def drive(time: float) -> tuple[float, ...]:
    """Roll, pitch, yaw, x, y, z of the vehicle in the world, `time` in sweeps.

    It turns at 30°/s, 15 km from the origin, and is level at the time stamps but not between them.
    """
    tilt = math.sin(math.pi * time)
    return (
        0.03 * tilt,
        -0.02 * tilt,
        0.5 + math.radians(3) * time,
        -12_000 + 1.5 * time,
        9_000 + 0.4 * time,
        40 - time,
    )


def world_SE3_vehicle(i: int) -> np.ndarray:
    return pose(*drive(i))


def ranges_of(i: int) -> np.ndarray:
    """(H, W): a tenth of the pixels is -1 and a tenth 0, which both mean that nothing came back."""
    rng = np.random.default_rng(i)
    ranges = rng.uniform(4, 60, (H, W))
    ranges[rng.random((H, W)) < 0.1] = -1
    ranges[rng.random((H, W)) < 0.1] = 0
    return ranges.astype(np.float32)


def pixel_poses_of(i: int) -> np.ndarray:
    """(H, W, 6) float32: from half a turn before the time stamp to half a turn after it."""
    poses = [drive(i + (column + 0.5) / W - 0.5) for column in range(W)]
    poses = np.array(poses, dtype=np.float32)
    return np.broadcast_to(poses, (H, W, 6))


def points_by_hand(
    i: int, pixel_poses: np.ndarray, inclinations=INCLINATIONS, frame_pose=None
) -> np.ndarray:
    """Sweep i in its own vehicle frame, pixel by pixel.

    Each is a stick along x that is tilted, turned, mounted on the vehicle, driven with it, and seen
    from the vehicle at the time stamp.
    """
    frame_pose = world_SE3_vehicle(i) if frame_pose is None else frame_pose
    mounted_yaw = math.atan2(VEHICLE_SE3_LIDAR[1, 0], VEHICLE_SE3_LIDAR[0, 0])
    points = []
    for row in range(H):
        for column in range(W):
            stick = float(ranges_of(i)[row, column])
            if stick > 0:
                clockwise_from_behind = (column + 0.5) * 2 * math.pi / W
                turn = math.pi - clockwise_from_behind - mounted_yaw
                lidar_SE3_stick = pose(0, -inclinations[H - 1 - row], turn, 0, 0, 0)
                world_SE3_pixel = pose(*pixel_poses[row, column].astype(float))
                in_world = world_SE3_pixel @ VEHICLE_SE3_LIDAR @ lidar_SE3_stick @ [stick, 0, 0, 1]
                points.append(np.linalg.solve(frame_pose, in_world)[:3])
    return np.array(points)


# --- Points and poses -----------------------------------------------------------------------------


def test_one_pixel_by_hand():
    """A lidar mounted at 90° to the left, 1 m ahead and 2 m up.

    Column 1 of 4 looks ahead and left by 45°.
    """
    ranges = np.array([[0, 0, 0, -1.0], [0, 10, 0, 0]])
    vehicle_SE3_lidar = np.array([[0, -1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1.0]])
    inclinations = np.array([0.0, math.radians(30)])
    geometry = np.zeros((2, 4, 6)), inclinations, vehicle_SE3_lidar, np.eye(4)
    level = waymo.range_image_to_points(ranges, *geometry)
    side = 10 * math.sqrt(0.5)
    np.testing.assert_allclose(level, [[1 + side, side, 2]], atol=1e-12)
    up = waymo.range_image_to_points(ranges[::-1], *geometry)
    side = 10 * math.cos(math.radians(30)) * math.sqrt(0.5)
    np.testing.assert_allclose(
        up, [[1 + side, side, 2 + 5]], atol=1e-12
    )  # row 0 is the highest beam


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pose_type": pyarrow.float32()},
        {"inclinations": None},
        {"extra": True, "lasers": (5, 1, 3)},
        {"shuffle": True, "row_group_size": 4},
        {"row_group_size": 1},
    ],
    ids=str,
)
def test_a_pair_is_the_ray_of_every_pixel_from_where_the_vehicle_was_then(tmp_path, options):
    write_segment(tmp_path, **options)
    pairs = waymo.WaymoPairs(tmp_path)
    assert pairs.pair_keys == [
        data.PairKey("seg", STAMPS[i] * 1000, STAMPS[i + 1] * 1000) for i in (0, 1)
    ]
    frame_poses = [world_SE3_vehicle(i) for i in (0, 1)]
    if "pose_type" in options:
        frame_poses = [frame_pose.astype(np.float32).astype(float) for frame_pose in frame_poses]
    beams = INCLINATIONS
    if "inclinations" in options:  # six equal steps from -0.31 to 0.04, at their middles
        beams = [-0.31 + 0.35 * step / 12 for step in (1, 3, 5, 7, 9, 11)]
    points0 = points_by_hand(0, pixel_poses_of(0), beams, frame_poses[0])
    points1 = points_by_hand(1, pixel_poses_of(1), beams, frame_poses[1])
    ego0_SE3_ego1 = np.linalg.solve(frame_poses[0], frame_poses[1])
    pair = pairs[0]
    assert pair.key == pairs.pair_keys[0] and pair.pc0.dtype == pair.pc1.dtype == torch.float32
    np.testing.assert_allclose(pair.pc0, points0, atol=2e-5)
    points1_in_ego0 = points1 @ ego0_SE3_ego1[:3, :3].T + ego0_SE3_ego1[:3, 3]
    np.testing.assert_allclose(pair.pc1, points1_in_ego0, atol=2e-5)
    np.testing.assert_allclose(pair.ego1_SE3_ego0, np.linalg.inv(ego0_SE3_ego1), atol=1e-6)
    assert pair.ego1_SE3_ego0.dtype == torch.float64
    assert pair.flow is None  # no boxes were written
    lidar1 = ego0_SE3_ego1[:3, :3] @ VEHICLE_SE3_LIDAR[:3, 3] + ego0_SE3_ego1[:3, 3]
    np.testing.assert_allclose(pair.lidar1, lidar1, atol=1e-6)


def test_points_are_exact_to_a_millimeter_as_float32_poses_are_at_15_km(tmp_path):
    write_segment(tmp_path)
    poses = np.array([drive((column + 0.5) / W - 0.5) for column in range(W)])
    exact = points_by_hand(0, np.broadcast_to(poses, (H, W, 6)))
    error = waymo.WaymoPairs(tmp_path)[0].pc0.numpy() - exact
    assert 1e-4 < np.abs(error).max() < 1e-3
    # With one pose for all pixels, points would be wrong by decimeters.
    with_one_pose = points_by_hand(0, np.broadcast_to(np.array(drive(0.0)), (H, W, 6)))
    error = np.linalg.norm(with_one_pose - points_by_hand(0, pixel_poses_of(0)), axis=1)
    assert error.max() > 0.5


def test_each_sweeps_ground_is_found_in_its_own_vehicle_frame(tmp_path, monkeypatch):
    write_segment(tmp_path)
    monkeypatch.setattr(clouds, "is_ground_without_map", lambda points: points[:, 2] < 1.0)
    pair = waymo.WaymoPairs(tmp_path)[0]
    for i, is_ground in enumerate((pair.is_ground0, pair.is_ground1)):
        expected = points_by_hand(i, pixel_poses_of(i))[:, 2] < 1.0
        assert is_ground.tolist() == expected.tolist() and expected.any() and not expected.all()
    assert (pair.pc1[:, 2] < 1.0).tolist() != pair.is_ground1.tolist()  # sweep 1 lies 1 m lower


def test_a_pair_changed_in_place_leaves_the_next_pair_alone(tmp_path):
    write_segment(tmp_path)
    pairs = waymo.WaymoPairs(tmp_path)
    before = pairs[1]
    kept = before.pc0.clone(), before.is_ground0.clone()
    first = pairs[0]
    for tensor in (first.pc1, first.is_ground1, before.pc0, before.is_ground0):
        tensor.zero_()
    assert torch.equal(pairs[1].pc0, kept[0]) and torch.equal(pairs[1].is_ground0, kept[1])


# --- True flow ------------------------------------------------------------------------------------


def box(stamp: int, track: str, vehicle_SE3_box: np.ndarray, kind: int = 1, count: int = 9) -> dict:
    """A box of 4 x 2 x 2 m."""
    heading = math.atan2(vehicle_SE3_box[1, 0], vehicle_SE3_box[0, 0])
    part = "[LiDARBoxComponent].box"
    sizes = {f"{part}.size.x": 4.0, f"{part}.size.y": 2.0, f"{part}.size.z": 2.0}
    x, y, z = vehicle_SE3_box[:3, 3]
    center = {f"{part}.center.x": x, f"{part}.center.y": y, f"{part}.center.z": z}
    return {
        "key.frame_timestamp_micros": STAMPS[stamp],
        "key.laser_object_id": track,
        "[LiDARBoxComponent].box.heading": heading,
        "[LiDARBoxComponent].type": kind,
        "[LiDARBoxComponent].num_lidar_points_in_box": count,
        **sizes,
        **center,
    }


def test_a_fast_car_has_its_own_displacement_and_a_parked_one_none_while_the_ego_turns(tmp_path):
    points = points_by_hand(0, pixel_poses_of(0))
    lonely = []  # points without another one within 5 m
    for k, point in enumerate(points):
        if (np.linalg.norm(points - point, axis=1) < 5).sum() == 1:
            lonely.append(k)
    fast, parked, gone = lonely[:3]
    ego0_SE3_ego1 = np.linalg.solve(world_SE3_vehicle(0), world_SE3_vehicle(1))
    ego1_SE3_ego0 = np.linalg.inv(ego0_SE3_ego1)
    fast0 = pose(0, 0, 0.7, *points[fast])
    parked0 = pose(0, 0, -2.0, *points[parked])
    gone0 = pose(0, 0, 1.0, *points[gone])
    # The point is at the car's front, not in its middle.
    fast0[:3, 3] += fast0[:3, :3] @ [-1.5, 0.8, 0.5]
    step = pose(0, 0, 0.1, 2.5, 0, 0)  # in 0.1 s: 2.5 m forward, 0.1 rad to the left
    boxes = [
        box(0, "fast", fast0),
        box(0, "parked", parked0, kind=4),
        box(0, "gone", gone0, kind=2),
        box(1, "parked", ego1_SE3_ego0 @ parked0, kind=4),
        box(1, "fast", ego1_SE3_ego0 @ fast0 @ step),
    ]
    write_segment(tmp_path, boxes=boxes)
    pair = waymo.WaymoPairs(tmp_path)[0]
    # The point in the car's frame moves by [2.5, 0] + (itself turned by 0.1 rad) - itself. That is
    # then expressed along the axes of the ego.
    x, y = 1.5, -0.8
    dx = 2.5 + x * math.cos(0.1) - y * math.sin(0.1) - x
    dy = x * math.sin(0.1) + y * math.cos(0.1) - y
    in_car = [dx, dy, 0]
    expected = fast0[:3, :3] @ in_car
    assert np.linalg.norm(expected) > 2.4
    np.testing.assert_allclose(pair.flow[fast], expected, atol=1e-5)
    assert pair.flow[parked].abs().max() < 1e-5
    is_foreground = np.isin(np.arange(len(points)), (fast, parked, gone))
    names = [data.CATEGORIES[number] for number in pair.category[[fast, parked, gone]]]
    assert names == ["REGULAR_VEHICLE", "BICYCLIST", "PEDESTRIAN"]
    assert pair.flow[~is_foreground].abs().max() == 0 and pair.category[~is_foreground].max() == 0
    assert pair.is_dynamic.nonzero().flatten().tolist() == [fast]
    assert (~pair.is_valid).nonzero().flatten().tolist() == [gone]


def test_evaluate_prints_the_number_first_that_can_be_compared_with_published_ones(
    tmp_path, capsys
):
    point = points_by_hand(0, pixel_poses_of(0))[0]
    boxes = [box(i, "car", pose(0, 0, 0, *point)) for i in (0, 1)]
    write_segment(tmp_path, boxes=boxes)
    argv = ["evaluate", "--data", str(tmp_path), "--baseline", "no-motion", "--device", "cpu"]
    assert commands.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.index("bucketed, dynamic: ") < printed.index("grid 3-way")
    assert "EulerFlow 0.219, FastNSF 0.429, NSFP 0.573" in printed


def test_a_box_without_points_does_not_count_and_signs_are_signs(tmp_path):
    point = points_by_hand(0, pixel_poses_of(0))[0]
    here = pose(0, 0, 0, *point)
    for counts, category, is_valid in (
        ((5, 5), "SIGN", True),
        ((5, 0), "SIGN", False),
        ((0, 5), "NONE", True),
    ):
        folder = tmp_path / str(counts)
        boxes = [box(i, "sign", here, kind=3, count=count) for i, count in enumerate(counts)]
        write_segment(folder, boxes=boxes)
        pair = waymo.WaymoPairs(folder)[0]
        assert (data.CATEGORIES[pair.category[0]], pair.is_valid[0].item()) == (category, is_valid)


def test_without_boxes_there_is_no_truth_and_an_empty_file_of_boxes_is_all_background(tmp_path):
    write_segment(tmp_path / "testing")
    write_segment(tmp_path / "training", boxes=[])
    for split, true_flow in (("testing", True), ("training", False)):
        pair = waymo.WaymoPairs(tmp_path / split, true_flow)[0]
        assert [pair.flow, pair.category, pair.is_dynamic, pair.is_valid] == [None] * 4
    pair = waymo.WaymoPairs(tmp_path / "training")[0]
    assert pair.flow.shape == pair.pc0.shape and pair.flow.abs().max() == 0
    assert pair.is_valid.all()


# --- Opening --------------------------------------------------------------------------------------


def test_open_dataset_knows_a_split_by_its_folders_and_draws_pairs_from_it(tmp_path):
    write_segment(tmp_path / "validation")
    with pytest.raises(data.DataError, match="holds the splits validation; choose one"):
        data.open_dataset(tmp_path)
    pairs = data.open_dataset(tmp_path / "validation", ground="points")
    assert isinstance(pairs, waymo.WaymoPairs)
    assert pairs.stamps["seg"].tolist() == [1000 * stamp for stamp in STAMPS]
    assert pairs[0].flow is None and len(pairs) == 2
    one = data.open_dataset(tmp_path / "validation", pairs_per_log=1)
    first = data.open_dataset(tmp_path / "validation", sweeps_per_log=2)
    assert one.pair_keys == first.pair_keys == pairs.pair_keys[:1]
    options = ({"ground": "raster"}, {"poses": "p"}, {"rate_hz": 5}, {"columns": 5})
    for option in (*options, {"min_range_m": 0}):
        message = f"validation: {next(iter(option))} .* is not for Waymo's"
        with pytest.raises(data.DataError, match=message):
            data.open_dataset(tmp_path / "validation", **option)


def test_repeated_stamps_and_gaps_do_not_form_pairs_and_opening_reads_no_image(tmp_path):
    start = STAMPS[0]
    # The gaps are 0.1, 0, 0.1, 0.2 and 0.14 s.
    stamps = [start + 1000 * ms for ms in (0, 100, 100, 200, 400, 540)]
    write_segment(tmp_path, pose_stamps=stamps[::-1])
    for tag in ("lidar", "lidar_pose", "lidar_calibration"):
        (tmp_path / tag / "seg.parquet").write_text("never read")
    (tmp_path / "lidar" / ".other.parquet").write_text("still being copied")
    pairs = waymo.WaymoPairs(tmp_path)
    found = []
    for key in pairs.pair_keys:
        found.append((key.timestamp0_ns // 1000 - start, key.timestamp1_ns // 1000 - start))
    assert found == [(0, 100_000), (100_000, 200_000), (400_000, 540_000)]
    assert len(pairs.skipped) == 2
    repeated, late = start * 1000 + 10**8, start * 1000 + 2 * 10**8
    assert f"no pair at {repeated}: the next sweep is 0.00 s later" in pairs.skipped[0]
    assert f"no pair at {late}: the next sweep is 0.20 s later" in pairs.skipped[1]


def test_a_split_without_a_pair_says_so(tmp_path):
    write_segment(tmp_path, pose_stamps=STAMPS[:1])
    with pytest.raises(data.DataError, match="no two consecutive sweeps in 1 logs"):
        data.open_dataset(tmp_path)


# --- Reading little -------------------------------------------------------------------------------


def test_row_groups_of_other_sweeps_and_lasers_are_not_read(tmp_path):
    """Everything that the pair does not need is overwritten on disk, and it is read as before."""
    for name in ("whole", "torn"):
        write_segment(tmp_path / name, row_group_size=1)
    file = tmp_path / "torn" / "lidar" / "seg.parquet"
    opened, content = parquet.ParquetFile(file), bytearray(file.read_bytes())
    keys = opened.read(["key.frame_timestamp_micros", "key.laser_name"]).to_pylist()
    for group, key in enumerate(keys):
        for k in range(opened.metadata.num_columns):
            chunk = opened.metadata.row_group(group).column(k)
            is_top = key["key.laser_name"] == 1
            is_needed = is_top and key["key.frame_timestamp_micros"] in STAMPS[1:]
            is_needed &= "return2" not in chunk.path_in_schema
            if chunk.path_in_schema.startswith("[") and not is_needed:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                size = chunk.total_compressed_size
                content[start : start + size] = bytes(size)
    file.write_bytes(content)
    torn = waymo.WaymoPairs(tmp_path / "torn")
    assert torch.equal(torn[1].pc0, waymo.WaymoPairs(tmp_path / "whole")[1].pc0)
    with pytest.raises(data.DataError, match="lidar/seg.parquet: not a whole parquet file"):
        torn[0]


def test_a_disk_that_fails_once_is_named_and_the_next_try_reads_on(tmp_path, monkeypatch):
    write_segment(tmp_path / "good")
    write_segment(tmp_path / "failing")  # both have one row group, in which sweep 0 is row 0
    pairs = waymo.WaymoPairs(tmp_path / "failing")

    def fails_once(self, *arguments, **named):
        for batch in iter_batches(self, *arguments, **named):
            yield batch
            if failures:
                raise OSError(failures.pop())

    failures, iter_batches = ["stale file handle"], parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", fails_once)
    message = r"lidar/seg.parquet: not a whole parquet file \(stale file handle\)"
    with pytest.raises(data.DataError, match=message):
        pairs[0]
    assert torch.equal(pairs[0].pc1, waymo.WaymoPairs(tmp_path / "good")[0].pc1)


def test_a_row_group_that_ends_early_does_not_end_a_loop_over_the_pairs(tmp_path, monkeypatch):
    write_segment(tmp_path)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *arguments, **named: iter(()))
    with pytest.raises(data.DataError, match="lidar/seg.parquet: not a whole parquet file"):
        list(waymo.WaymoPairs(tmp_path))


def test_files_rewritten_for_reading_in_random_order_give_the_same_pairs(tmp_path):
    """The recipe of the module's docstring."""
    for name in ("released", "new"):
        write_segment(tmp_path / name)
    for tag in ("lidar", "lidar_pose"):
        file, new_file = (tmp_path / name / tag / "seg.parquet" for name in ("released", "new"))
        top = parquet.read_table(file, filters=[("key.laser_name", "=", 1)])
        parquet.write_table(top, new_file, row_group_size=1)
        assert parquet.ParquetFile(new_file).num_row_groups == len(STAMPS)
    pairs = [waymo.WaymoPairs(tmp_path / name) for name in ("released", "new")]
    for released, new in zip(*pairs, strict=True):
        assert torch.equal(new.pc0, released.pc0) and torch.equal(new.pc1, released.pc1)


def test_the_order_of_visits_changes_nothing_and_memory_does_not_grow_with_them(tmp_path):
    stamps = [STAMPS[0] + 100_000 * i for i in range(24)]
    write_segment(tmp_path, stamps=stamps)  # one row group
    pairs = waymo.WaymoPairs(tmp_path)
    in_order = [pair.pc0 for pair in pairs]
    held = []
    for visits in (range(22, 11, -1), (5, 17, 2, 2, 21, 0, 11, 8, 16)):
        tracemalloc.start()
        for index in visits:
            assert torch.equal(pairs[index].pc0, in_order[index])
        held.append(tracemalloc.get_traced_memory()[0] + pyarrow.total_allocated_bytes())
        tracemalloc.stop()
    assert abs(held[1] - held[0]) < 100_000
    assert all(cache.cache_info().maxsize <= 8 for cache in CACHES)


CACHES = (
    waymo._read_sweep,
    waymo._Images,
    waymo._read_calibration,
    waymo._read_poses,
    waymo._read_boxes,
)


# --- Broken files ---------------------------------------------------------------------------------


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _rows(change):
    """Rewrite the rows of a file by a function of a list of rows."""

    def break_it(file):
        table = parquet.read_table(file)
        parquet.write_table(
            pyarrow.Table.from_pylist(change(table.to_pylist()), table.schema), file
        )

    return break_it


def _set(column, value):
    return _rows(lambda rows: [{**row, column: value} for row in rows])


def _drop_column(file):
    table = parquet.read_table(file)
    parquet.write_table(table.drop_columns([f"{IMAGE}.shape"]), file)


def _without_top(rows):
    return [row for row in rows if row["key.laser_name"] != 1]


IMAGE = "[LiDARComponent].range_image_return1"


def _retyped(name, kind):
    def break_it(file):
        table = parquet.read_table(file)
        texts = [
            [str(x) for x in v] if isinstance(v, list) else str(v) for v in table[name].to_pylist()
        ]
        values = pyarrow.array(texts, kind)
        parquet.write_table(table.set_column(table.column_names.index(name), name, values), file)

    return break_it


BAD_BOX = "a box has a size or pose that is not a number"
TRANSFORM = "[VehiclePoseComponent].world_from_vehicle.transform"


@pytest.mark.parametrize(
    ("tag", "break_it", "message"),
    [
        ("lidar", _cut, "not a whole parquet file .*; download it again"),
        ("lidar_pose", _cut, "not a whole parquet file"),
        (
            "lidar_pose",
            lambda file: file.unlink(),
            "no such file; download this tag of the segment",
        ),
        ("lidar", _drop_column, r"has no columns \['.*return1.shape'\]"),
        ("lidar", _rows(_without_top), f"no row of the TOP lidar at {STAMPS[0]} us"),
        ("lidar_pose", _rows(lambda rows: rows[:1]), f"no row of the TOP lidar at {STAMPS[1]} us"),
        (
            "lidar",
            _set(f"{IMAGE}.shape", [H, W + 1, 4]),
            r"960 values of shape \(6, 41, 4\) .*expected \('H', 'W', 4\)",
        ),
        ("lidar", _set(f"{IMAGE}.shape", [H, W * 2, 2]), r"960 values of shape \(6, 80, 2\)"),
        ("lidar", _set(f"{IMAGE}.values", None), "0 values of shape"),
        (
            "lidar",
            _set(f"{IMAGE}.values", [-1.0] * H * W * 4),
            f"the sweep has no points at {STAMPS[0]} us",
        ),
        (
            "lidar_pose",
            _set(f"{waymo.PIXEL_POSES}.shape", [W, H, 6]),
            r"1440 values of shape \(40, 6, 6\) .*expected \(6, 40, 6\)",
        ),
        ("lidar_calibration", _rows(_without_top), "0 rows of the TOP lidar, expected 1"),
        (
            "lidar_calibration",
            _set(f"{waymo.INCLINATION}.values", [0.1]),
            "1 beam inclinations for range images of 6 rows",
        ),
        (
            "vehicle_pose",
            _set(TRANSFORM, [1.0] * 16),
            "a transform in it is not a pose .*no(t a)? rotation",
        ),
        (
            "vehicle_pose",
            _set(TRANSFORM, None),  # pyarrow before 21 cannot read such a file
            r"nulls in the columns \['.*transform'\]|not a whole parquet file .*size=16",
        ),
        ("lidar_box", _set("[LiDARBoxComponent].box.heading", math.nan), BAD_BOX),
        ("lidar_box", _set("[LiDARBoxComponent].box.size.x", math.nan), BAD_BOX),
        (
            "lidar_box",
            _retyped("[LiDARBoxComponent].box.heading", pyarrow.string()),
            r"the column .*heading is string; is it of Waymo",
        ),
        (
            "vehicle_pose",
            _retyped(TRANSFORM, pyarrow.list_(pyarrow.string())),
            "the column .*transform is list<",
        ),
        ("lidar_box", _cut, "not a whole parquet file"),
        ("lidar_box", _set("[LiDARBoxComponent].type", 0), r"unknown types of boxes \[0\]"),
    ],
)
def test_a_broken_file_is_named_together_with_the_remedy(tmp_path, tag, break_it, message):
    write_segment(tmp_path, boxes=[box(0, "car", np.eye(4))], lasers=(1, 2))
    break_it(tmp_path / tag / "seg.parquet")
    with pytest.raises(data.DataError, match=f"{tag}/seg.parquet: {message}"):
        waymo.WaymoPairs(tmp_path)[0]


def test_a_sweep_whose_pixels_have_no_pose_has_no_points(tmp_path):
    write_segment(tmp_path)
    _set(f"{waymo.PIXEL_POSES}.values", [math.nan] * H * W * 6)(
        tmp_path / "lidar_pose" / "seg.parquet"
    )
    with pytest.raises(data.DataError, match="the sweep has no points"):
        waymo.WaymoPairs(tmp_path)[0]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_cut, "not a whole parquet file"),
        (lambda file: file.unlink(), "no such file"),
        (_retyped("key.frame_timestamp_micros", pyarrow.string()), "timestamp_micros is string"),
    ],
)
def test_a_segment_without_time_stamps_is_skipped_and_the_others_are_read(
    tmp_path, break_it, message
):
    for name in ("a", "b"):
        write_segment(tmp_path)
        for tag in ("lidar", "lidar_pose", "lidar_calibration", "vehicle_pose"):
            (tmp_path / tag / "seg.parquet").rename(tmp_path / tag / f"{name}.parquet")
    break_it(tmp_path / "vehicle_pose" / "a.parquet")
    pairs = data.open_dataset(tmp_path)
    assert {key.log_id for key in pairs.pair_keys} == {"b"} and len(pairs[0].pc0)
    assert len(pairs.skipped) == 1
    assert "vehicle_pose/a.parquet" in pairs.skipped[0] and message in pairs.skipped[0]


def test_a_pose_that_is_missing_makes_a_gap(tmp_path):
    write_segment(tmp_path, pose_stamps=STAMPS[:1] + STAMPS[2:], stamps=STAMPS)
    pairs = waymo.WaymoPairs(tmp_path)
    assert len(pairs) == 0 and "the next sweep is 0.20 s later" in pairs.skipped[0]


# --- Wrong poses, and truth that disappears or is invented ----------------------------------------


def test_poses_that_no_vehicle_can_follow_are_refused(tmp_path):
    """The second sweep's pose is 10 m to the side: 100 m/s to it, and 100 m/s back."""
    write_segment(tmp_path)
    rows = parquet.read_table(tmp_path / "vehicle_pose" / "seg.parquet")
    moved = rows.to_pylist()
    moved[1][TRANSFORM][7] += 10
    parquet.write_table(
        pyarrow.Table.from_pylist(moved, rows.schema), tmp_path / "vehicle_pose" / "seg.parquet"
    )
    pairs = waymo.WaymoPairs(tmp_path)
    for key in pairs.pair_keys:
        stamps = f"{key.timestamp0_ns} and {key.timestamp1_ns} ns"
        with pytest.raises(
            data.DataError, match=rf"vehicle_pose/seg.parquet: wrong poses .* {stamps} \(\d+ m/s"
        ):
            pairs.read(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"[LiDARBoxComponent].num_lidar_points_in_box": 0}, "no box contains a point"),
        ({"key.frame_timestamp_micros": STAMPS[0] * 1000}, "no time stamp .* equals a sweep's"),
        ({"key.laser_object_id": ""}, "a track id is missing, or twice in one sweep"),
        ({"key.laser_object_id": "car"}, "a track id is missing, or twice in one sweep"),
        ({"[LiDARBoxComponent].box.size.y": 0.0}, "a box has a size or pose .* or a size of 0"),
    ],
)
def test_boxes_from_which_motion_would_be_lost_or_invented_are_refused(tmp_path, change, message):
    boxes = []
    for stamp in (0, 1):
        for track, x in (("car", 10), ("other", 20)):
            boxes.append(box(stamp, track, pose(0, 0, 0, x, 0, 1)) | change)
    write_segment(tmp_path, boxes=boxes)
    with pytest.raises(data.DataError, match=f"lidar_box/seg.parquet: {message}"):
        waymo.WaymoPairs(tmp_path)[0]


def test_a_file_without_boxes_is_reported_once(tmp_path, capsys):
    write_segment(tmp_path, boxes=[])
    pairs = waymo.WaymoPairs(tmp_path)
    for pair in pairs:
        assert pair.flow.abs().max() == 0
    (note,) = pairs.notes
    assert note.endswith(
        "lidar_box/seg.parquet: sweeps without boxes: all their points count as background"
    )
    assert capsys.readouterr().err == note + "\n"


# --- Odd files and folders ------------------------------------------------------------------------


def _twice(column):
    def break_it(file):
        table = parquet.read_table(file)
        parquet.write_table(table.append_column(column, table[column]), file)

    return break_it


def _wrapped(column):
    """Every value of a column becomes a list of itself."""

    def break_it(file):
        table = parquet.read_table(file)
        lists = pyarrow.array([[value] for value in table[column].to_pylist()])
        parquet.write_table(table.set_column(table.column_names.index(column), column, lists), file)

    return break_it


def _scalar(column, value):
    def break_it(file):
        table = parquet.read_table(file)
        values = pyarrow.array([value] * table.num_rows)
        parquet.write_table(
            table.set_column(table.column_names.index(column), column, values), file
        )

    return break_it


HEADING = "[LiDARBoxComponent].box.heading"


@pytest.mark.parametrize(
    ("tag", "break_it", "message"),
    [
        ("vehicle_pose", _twice(TRANSFORM), r"has no columns .*, or has them twice"),
        ("lidar_box", _twice(HEADING), r"has no columns .*, or has them twice"),
        ("lidar_box", _wrapped(HEADING), "the column .*heading is list<"),
        ("lidar_box", _wrapped("key.laser_object_id"), "the column .*object_id is list<"),
        ("lidar_box", _wrapped("[LiDARBoxComponent].type"), "the column .*type is list<"),
        ("lidar_box", _scalar(HEADING, True), "the column .*heading is bool"),
        ("lidar", _scalar(f"{waymo.RANGE_IMAGE}.values", 1.0), "the column .*values is double"),
        ("lidar", _wrapped(f"{waymo.RANGE_IMAGE}.values"), "the column .*values is list<"),
        ("lidar_pose", _scalar(f"{waymo.PIXEL_POSES}.shape", 6), "the column .*shape is int64"),
        ("vehicle_pose", _set(TRANSFORM, [None] * 16), "a transform in it is not a pose"),
        ("vehicle_pose", _scalar(TRANSFORM, 1.0), "the column .*transform is double"),
        ("vehicle_pose", _retyped(TRANSFORM, pyarrow.list_(pyarrow.string())), "is list<"),
        (
            "lidar_calibration",
            _scalar(f"{waymo.INCLINATION}.min", "low"),
            "the column .*min is string",
        ),
    ],
)
def test_odd_columns_are_named(tmp_path, tag, break_it, message):
    write_segment(tmp_path, boxes=[box(0, "car", np.eye(4))])
    break_it(tmp_path / tag / "seg.parquet")
    with pytest.raises(data.DataError, match=f"{tag}/seg.parquet: .*{message}"):
        waymo.WaymoPairs(tmp_path)[0]


def test_object_ids_may_be_a_dictionary(tmp_path):
    """Tables that went through pandas have one for repeated text."""
    write_segment(tmp_path, boxes=[box(i, "car", pose(0, 0, 0, 9, 0, 1)) for i in (0, 1)])
    file = tmp_path / "lidar_box" / "seg.parquet"
    table = parquet.read_table(file)
    name = "key.laser_object_id"
    column = table[name].dictionary_encode()
    parquet.write_table(table.set_column(table.column_names.index(name), name, column), file)
    assert waymo.WaymoPairs(tmp_path)[0].is_valid.all()


def test_a_null_among_the_inclinations_loses_only_that_beam(tmp_path):
    write_segment(tmp_path / "whole")
    write_segment(tmp_path / "torn")
    _set(f"{waymo.INCLINATION}.values", [None, *INCLINATIONS[1:]])(
        tmp_path / "torn" / "lidar_calibration" / "seg.parquet"
    )
    whole, torn = (waymo.WaymoPairs(tmp_path / name)[0].pc0 for name in ("whole", "torn"))
    is_lost = torn.isnan().any(dim=1)
    lowest_beam = int((ranges_of(0)[-1] > 0).sum())
    assert is_lost.sum() == lowest_beam and torch.equal(torn[~is_lost], whole[~is_lost])


def test_a_range_that_is_not_finite_is_no_point(tmp_path):
    write_segment(tmp_path)

    def change(rows):
        rows[0][f"{IMAGE}.values"][0] = math.nan
        rows[0][f"{IMAGE}.values"][4] = 3e38
        return rows

    clean = waymo.WaymoPairs(tmp_path)[0].pc0
    waymo._read_sweep.cache_clear()
    waymo._Images.cache_clear()
    _rows(change)(tmp_path / "lidar" / "seg.parquet")
    pc0 = waymo.WaymoPairs(tmp_path)[0].pc0
    assert pc0.isfinite().all(dim=1).sum() >= clean.isfinite().all(dim=1).sum() - 2
    assert pc0.nan_to_num().abs().max() < 100


def test_names_that_are_not_utf8_and_what_a_mac_adds(tmp_path):
    split = tmp_path / os.fsdecode(b"caf\xe9") / "~"
    write_segment(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", split)
    for tag in ("lidar", "vehicle_pose"):
        (split / tag / "._seg.parquet").write_bytes(b"\x00\x05\x16\x07")
        (split / tag / os.fsdecode(b"\xff.parquet")).write_bytes(b"never read")
    pairs = data.open_dataset(split)
    assert {key.log_id for key in pairs.pair_keys} == {"seg"}
    assert torch.equal(pairs[0].pc0, data.open_dataset(tmp_path / "plain")[0].pc0)
    (line,) = pairs.skipped
    assert "cannot be used" in line and "rename it" in line


def test_where_no_segment_can_be_used_the_reason_is_in_the_error(tmp_path, monkeypatch):
    write_segment(tmp_path)
    (tmp_path / "vehicle_pose" / "seg.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        data.DataError, match=r"1 skipped: .*vehicle_pose/seg.parquet: not a whole parquet file"
    ):
        data.open_dataset(tmp_path)
    listdir = os.listdir

    def refuses(path):
        if str(path) == str(tmp_path / "lidar"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuses)
    with pytest.raises(data.DataError, match="lidar: cannot be read .*Permission denied"):
        data.open_dataset(tmp_path)


# --- A segment written in the published schema ----------------------------------------------------

KEYS = {"key.segment_context_name": pyarrow.string(), "key.frame_timestamp_micros": pyarrow.int64()}
LASER = {"key.laser_name": pyarrow.int8()}
DOUBLE = pyarrow.float64()


def image_columns(name: str) -> dict[str, pyarrow.DataType]:
    values, shape = pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.int32(), 3)
    return {f"{name}.values": values, f"{name}.shape": shape}


def image(name: str, values: np.ndarray) -> dict:
    numbers = values.astype(np.float32).ravel().tolist()
    return {f"{name}.values": numbers, f"{name}.shape": list(values.shape)}


def range_images(i: int, laser: int) -> dict:
    """Both returns. The short-range lidars have 5 x 7 pixels, all of them 3 m away."""
    ranges = ranges_of(i) if laser == 1 else np.full((5, 7), 3.0)
    first = np.stack([ranges, ranges * 0 + 0.5, ranges * 0 + 0.2, ranges * 0 - 1], axis=-1)
    return image(IMAGE, first) | image("[LiDARComponent].range_image_return2", first + 1)


def write_segment(
    split,
    stamps=tuple(STAMPS),
    pose_stamps=None,
    boxes=None,
    inclinations=INCLINATIONS,
    pose_type=DOUBLE,
    lasers=(1, 2, 3, 4, 5),
    extra=False,
    shuffle=False,
    row_group_size=None,
) -> None:
    """A segment of the sweeps `ranges_of` at the poses `drive`.

    Each tag's columns and their types are spelled out as in the release.
    """

    def write(tag, columns, rows):
        rows = [{"key.segment_context_name": "seg", **row} for row in rows]
        if shuffle:
            rows = [rows[k] for k in np.random.default_rng(9).permutation(len(rows))]
        names = list(columns)
        if extra:
            names = ["index", *names[::-1], "zzz"]
            rows = [{"index": str(k), **row} for k, row in enumerate(rows)]
        schema = pyarrow.schema([(name, columns.get(name, pyarrow.string())) for name in names])
        (split / tag).mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows, schema)
        parquet.write_table(table, split / tag / "seg.parquet", row_group_size=row_group_size)

    at = [{"key.frame_timestamp_micros": stamp} for stamp in stamps]
    top = {"key.laser_name": 1}
    both = image_columns(IMAGE) | image_columns("[LiDARComponent].range_image_return2")
    images = []
    for i, key in enumerate(at):
        for laser in lasers:
            images.append(key | {"key.laser_name": laser} | range_images(i, laser))
    write("lidar", KEYS | LASER | both, images)
    poses = [key | top | image(waymo.PIXEL_POSES, pixel_poses_of(i)) for i, key in enumerate(at)]
    write("lidar_pose", KEYS | LASER | image_columns(waymo.PIXEL_POSES), poses)

    stamp_of = {stamp: i for i, stamp in enumerate(stamps)}
    poses = []
    for stamp in stamps if pose_stamps is None else pose_stamps:
        numbers = world_SE3_vehicle(stamp_of.get(stamp, 0)).ravel().tolist()
        poses.append({"key.frame_timestamp_micros": stamp, TRANSFORM: numbers})
    write("vehicle_pose", KEYS | {TRANSFORM: pyarrow.list_(pose_type, 16)}, poses)

    beams = "[LiDARCalibrationComponent].beam_inclination"
    extrinsic = "[LiDARCalibrationComponent].extrinsic.transform"
    calibrations = []
    for laser in lasers:
        is_listed = laser == 1 and inclinations is not None
        row = {"key.laser_name": laser}
        row[extrinsic] = (VEHICLE_SE3_LIDAR if laser == 1 else np.eye(4)).ravel().tolist()
        row[f"{beams}.min"] = INCLINATIONS[0] if laser == 1 else -1.5
        row[f"{beams}.max"] = INCLINATIONS[-1] if laser == 1 else 0.5
        row[f"{beams}.values"] = inclinations.tolist() if is_listed else None
        calibrations.append(row)
    columns = {"key.segment_context_name": pyarrow.string()} | LASER
    columns |= {extrinsic: pyarrow.list_(DOUBLE, 16)}
    columns |= {f"{beams}.min": DOUBLE, f"{beams}.max": DOUBLE}
    columns |= {f"{beams}.values": pyarrow.list_(DOUBLE)}
    write("lidar_calibration", columns, calibrations)

    if boxes is not None:
        columns = {
            "key.laser_object_id": pyarrow.string(),
            "[LiDARBoxComponent].type": pyarrow.int8(),
        }
        columns |= {"[LiDARBoxComponent].num_lidar_points_in_box": pyarrow.int64()}
        parts = [f"{part}.{axis}" for part in ("center", "size") for axis in "xyz"]
        columns |= {f"[LiDARBoxComponent].box.{part}": DOUBLE for part in (*parts, "heading")}
        write("lidar_box", KEYS | columns, boxes)
