"""Cloud and pose formats against bytes written by hand; ground without a map against streets."""

import dataclasses
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather
from scipy.spatial.transform import Rotation
from test_data import agreement, rigid, write_log

import clouds
import data
import formats
import synthetic

# --- Formats of clouds and poses ------------------------------------------------------------------


def test_a_cloud_is_the_same_in_every_format(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (50, 3)).astype(np.float32)
    with_more = np.column_stack([points, np.arange(50, dtype=np.float32)])
    with_more.tofile(tmp_path / "kitti.bin")
    np.save(tmp_path / "cloud.npy", points.astype(np.float64))
    np.save(tmp_path / "more.npy", with_more)
    np.savez(tmp_path / "one.npz", points)
    np.savez_compressed(tmp_path / "named.npz", intensity=np.zeros(50), points=with_more)
    table = pyarrow.table(
        {"y": points[:, 1], "x": points[:, 0], "z": points[:, 2], "intensity": np.zeros(50)}
    )
    feather.write_feather(table, tmp_path / "cloud.feather")
    np.save(tmp_path / "big-endian.npy", points.astype(">f8"))
    for name in (
        "kitti.bin",
        "cloud.npy",
        "more.npy",
        "one.npz",
        "named.npz",
        "cloud.feather",
        "big-endian.npy",
    ):
        np.testing.assert_array_equal(clouds.read_cloud(tmp_path / name), points, err_msg=name)


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
    """Two cameras, then points with a color and a ring among their coordinates, then a face."""
    header = PLY.format(form=form, x=x, y=y, z=z).encode()
    if form == "ascii":
        rows = "".join(f"{p[2]:.17g} 7 {p[0]:.17g} -3 {p[1]:.17g}\n" for p in points)
        file.write_bytes(header + b"1 0.5\n2 0.25\n" + rows.encode() + b"3 0 1 2\n")
        return
    order = "<" if form.endswith("little_endian") else ">"
    codes = {"float": "f", "float32": "f", "double": "d", "int": "i", "ushort": "H"}
    row = f"{order}{codes[z]}B{codes[x]}h{codes[y]}"
    whole = [name in ("int", "ushort") for name in (x, y, z)]
    points = [
        [int(value) if is_int else value for value, is_int in zip(p, whole, strict=True)]
        for p in points
    ]
    rows = [struct.pack(row, p[2], 7, p[0], -3, p[1]) for p in points]
    cameras = struct.pack(f"{order}BfBf", 1, 0.5, 2, 0.25)
    file.write_bytes(header + cameras + b"".join(rows) + struct.pack(f"{order}Biii", 3, 0, 1, 2))


def test_ply_files_of_all_kinds_give_their_points(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (3, 3)).astype(np.float32)
    for form in ("ascii", "binary_little_endian", "binary_big_endian"):
        write_ply(tmp_path / "cloud.ply", points, form)
        np.testing.assert_array_equal(
            clouds.read_cloud(tmp_path / "cloud.ply"), points, err_msg=form
        )
        (tmp_path / "crlf.ply").write_bytes(
            (tmp_path / "cloud.ply").read_bytes().replace(b"header\n", b"header\r\n")
        )
        np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "crlf.ply"), points)
    whole = np.array([[1, -2, 3], [4, -5, 6], [700, -8, 65535]])
    write_ply(tmp_path / "whole.ply", whole, "binary_little_endian", "int", "int", "ushort")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "whole.ply"), whole)


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
    """LZF without any repetitions: runs of up to 32 bytes, each after its length less one."""
    runs = [content[i : i + 32] for i in range(0, len(content), 32)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def write_pcd(file, points, form: str) -> None:
    header = PCD.format(count=len(points), form=form).encode()
    if form == "ascii":
        rows = "".join(f"9 {p[0]:.17g} 0 0 0 {p[1]:.17g} {p[2]:.17g} nan 1\n" for p in points)
        body = rows.encode()
    elif form == "binary":
        body = b"".join(
            struct.pack("<Bf3Bdfff", 9, p[0], 0, 0, 0, p[1], p[2], 1, 1) for p in points
        )
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
        np.testing.assert_array_equal(
            clouds.read_cloud(tmp_path / "cloud.pcd"), points, err_msg=form
        )


def test_lzf_by_hand():
    """Literal runs; short, long and far repetitions; and one that repeats its own output."""
    far = bytes(range(256)) * 2
    farther = b"12345678" + bytes(17 * 256 - 2)  # the repetition begins at the 4
    for content, wanted in (
        (b"\x02abc", b"abc"),
        (b"\x02abc\x20\x02", b"abcabc"),  # 1 + 2 bytes from 2 + 1 back
        (b"\x00a\xe0\x05\x00", b"a" * 15),  # 7 + 5 + 2 bytes from 0 + 1 back
        # 2 + 2 bytes from 256 + 255 + 1 back, and 1 + 2 bytes from 17 * 256 + 2 + 1 back
        (packed(far) + b"\x41\xff\x00z", far + far[:4] + b"z"),
        (packed(farther) + b"\x31\x02", farther + b"456"),
    ):
        assert formats._unpack_lzf(content, len(wanted)) == wanted
    for torn in (b"\x05ab", b"\x00a\x20", b"\x00a\x20\x07"):
        with pytest.raises((ValueError, IndexError)):
            formats._unpack_lzf(torn, 4)


def test_files_that_are_not_clouds_are_named(tmp_path):
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
    (tmp_path / "torn compressed.pcd").write_bytes(
        (tmp_path / "binary_compressed.pcd").read_bytes()[:-30]
    )
    (tmp_path / "headless.pcd").write_text(text.split("DATA")[0])
    (tmp_path / "odd.pcd").write_text(text.replace("ascii", "morse"))
    (tmp_path / "flat.pcd").write_text(text.replace(" z ", " height "))
    for name, message in (
        ("torn.bin", "its 20 bytes were not recognized as rows of 3 to 9 float32 or float64"),
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
        ("short.ply", "it has 2 points, expected 3"),
        ("headless.ply", "it does not begin with ply"),
        ("faces first.ply", "a list among or before the vertices, in face"),
        ("flat.ply", "cannot be read"),
        ("odd.ply", "cannot be read"),
        ("torn.pcd", "buffer is smaller"),
        ("torn ascii.pcd", "it has 1 points, expected 2"),
        ("torn compressed.pcd", "cannot be read"),
        ("headless.pcd", "it has no line DATA"),
        ("odd.pcd", "its DATA is"),
        ("flat.pcd", "cannot be read"),
    ):
        with pytest.raises(data.DataError, match=f"{name}: .*{message}"):
            clouds.read_cloud(tmp_path / name)


def test_poses_are_read_and_files_without_a_pose_are_named(tmp_path):
    pose = np.array([[0, -1, 0, 3], [1, 0, 0, -2], [0, 0, 1, 0.5], [0, 0, 0, 1]], dtype=float)
    np.save(tmp_path / "pose.npy", pose)
    np.savetxt(tmp_path / "pose.txt", pose)
    for name in ("pose.npy", "pose.txt"):
        np.testing.assert_array_equal(clouds.read_pose(tmp_path / name), pose)
    for name, wrong in (
        ("transposed.txt", pose.T),
        ("three rows.txt", pose[:3]),
        ("mirrored.txt", pose * [[-1], [1], [1], [1]]),
        ("scaled.txt", np.diag([2.0, 2.0, 2.0, 1.0])),
        ("nan.txt", pose * np.nan),
    ):
        np.savetxt(tmp_path / name, wrong)
        with pytest.raises(data.DataError, match=f"{name}: not a 4 x 4 pose"):
            clouds.read_pose(tmp_path / name)
    np.savetxt(tmp_path / "far.txt", rigid(0, (0, 1e9, 0)))
    with pytest.raises(data.DataError, match="far.txt: not the ego's motion .* vehicle does at"):
        clouds.read_pose(tmp_path / "far.txt")
    (tmp_path / "words.txt").write_text("no pose")
    for name in ("words.txt", "nowhere.txt"):
        with pytest.raises(data.DataError, match=f"{name}: not a 4 x 4 pose"):
            clouds.read_pose(tmp_path / name)


# --- Folders of clouds ----------------------------------------------------------------------------

# world_SE3_sensor of four sweeps: the ego drives 2 m per sweep and turns left by 10 degrees.
DRIVE = [
    rigid(0, (10, 0, 0)),
    rigid(10, (12, 0, 0)),
    rigid(20, (14, 0.3, 0)),
    rigid(30, (16, 1, 0)),
]
POLE = np.array([20.0, 5.0, 1.0])  # in the world


def write_clouds(folder, names) -> None:
    """The pole as the i-th sensor sees it, then a point high above whose z is 50 + i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, world_SE3_sensor) in enumerate(zip(names, DRIVE, strict=False)):
        pole = (np.linalg.inv(world_SE3_sensor) @ [*POLE, 1])[:3]
        np.save(folder / name, np.array([pole, [0, 0, 50 + i]]))


def kitti_rows(poses) -> str:
    return "".join(" ".join(f"{value:.12g}" for value in pose[:3].ravel()) + "\n" for pose in poses)


def tum_row(stamp_s, pose) -> str:
    return " ".join(
        [
            str(stamp_s),
            *(f"{v:.12g}" for v in (*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat())),
        ]
    )


def assert_the_pole_is_at_rest(pairs, sensors=(0, 1, 2, 3)) -> None:
    assert len(pairs) == len(sensors) - 1
    for pair, i, j in zip(pairs, sensors, sensors[1:], strict=False):
        pole = (np.linalg.inv(DRIVE[i]) @ [*POLE, 1])[:3]
        np.testing.assert_allclose(pair.pc0[0], pole, atol=1e-5)
        np.testing.assert_allclose(pair.pc1[0], pole, atol=1e-5)
        assert pair.pc0[1, 2] == 50 + i and pair.pc1[1, 2] == 50 + j


COUNTED = "names count the clouds: 10 per second are assumed (--rate-hz)"
NUMBERED = [f"{i:06d}.npy" for i in range(4)]
STAMPED = [f"{10**18 + i * 10**8 + 137}.npy" for i in range(4)]


def test_a_folder_of_clouds_with_kittis_poses_is_a_data_set(tmp_path):
    write_clouds(tmp_path / "drive", NUMBERED)
    (tmp_path / "poses.txt").write_text(kitti_rows(DRIVE))  # in the folder above
    pairs = data.open_dataset(tmp_path / "drive")
    assert pairs.notes == [f"{tmp_path / 'drive'}: {COUNTED}"] and pairs.skipped == []
    assert pairs.pair_keys == [
        (f"{tmp_path.name}-drive", i * 10**8, (i + 1) * 10**8) for i in range(3)
    ]
    assert_the_pole_is_at_rest(pairs)
    np.testing.assert_allclose(
        pairs[0].ego1_SE3_ego0, np.linalg.inv(DRIVE[1]) @ DRIVE[0], atol=1e-12
    )
    assert pairs[0].flow is None and not pairs[0].is_ground0.any()
    sensor0_SE3_sensor1 = np.linalg.inv(DRIVE[0]) @ DRIVE[1]
    np.testing.assert_allclose(pairs[0].lidar1, sensor0_SE3_sensor1[:3, 3], atol=1e-12)
    assert [
        key.timestamp0_ns for key in data.open_dataset(tmp_path / "drive", rate_hz=5).pair_keys
    ] == [0, 2e8, 4e8]
    assert len(data.open_dataset(tmp_path / "drive", sweeps_per_log=3, pairs_per_log=1)) == 1
    (tmp_path / "poses.txt").rename(tmp_path / "elsewhere.txt")
    assert_the_pole_is_at_rest(
        data.open_dataset(tmp_path / "drive", poses=tmp_path / "elsewhere.txt")
    )
    with pytest.raises(data.DataError, match="holds the splits drive; choose one"):
        data.open_dataset(tmp_path)


def test_kittis_camera_poses_become_lidar_poses(tmp_path):
    """KITTI writes camera0_SE3_camera; beside it calib.txt has Tr, camera_SE3_lidar."""
    write_clouds(tmp_path / "velodyne", NUMBERED)
    camera_SE3_lidar = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])
    cameras = [
        camera_SE3_lidar @ np.linalg.inv(DRIVE[0]) @ pose @ np.linalg.inv(camera_SE3_lidar)
        for pose in DRIVE
    ]
    (tmp_path / "poses.txt").write_text(kitti_rows(cameras))
    (tmp_path / "calib.txt").write_text("P0: 1 2 3\nTr: " + kitti_rows([camera_SE3_lidar]))
    pairs = data.open_dataset(tmp_path / "velodyne")
    assert_the_pole_is_at_rest(pairs)
    assert len(pairs.notes) == 2 and "calib.txt: by its Tr" in pairs.notes[1]


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_tum_poses_are_matched_by_time_where_names_are_times(tmp_path, unit):
    write_clouds(tmp_path, STAMPED)
    rows = ["# stamp tx ty tz qx qy qz qw"]
    for i, pose in list(enumerate(DRIVE))[
        ::-1
    ]:  # not in order, 0.9 ms early, and with others between
        for stamp_ns, each in (
            (10**18 + i * 10**8 - 900_000, pose),
            (10**18 + i * 10**8 + 5 * 10**7, np.eye(4)),
        ):
            stamp = f"{stamp_ns // 10**9}.{stamp_ns % 10**9:09d}" if unit == "s" else stamp_ns
            rows.append(tum_row(stamp, each))
    (tmp_path / "poses.txt").write_text("\n".join(rows))
    pairs = data.open_dataset(tmp_path)
    assert pairs.pair_keys[0].timestamp0_ns == 10**18 + 137
    assert_the_pole_is_at_rest(pairs)
    late = "\n".join(rows).replace(
        rows[1].split()[0], rows[1].split()[0].replace("99100000", "98800000")
    )  # 1.2 ms
    (tmp_path / "poses.txt").write_text(late)
    pairs = data.open_dataset(tmp_path)
    assert pairs[1].pc0[1, 2] == 51
    with pytest.raises(
        data.DataError, match=rf"poses.txt: no pose for {STAMPED[3]} .*remove that cloud"
    ):
        pairs[2]


@pytest.mark.parametrize(
    "names",
    [
        ["1700000000.500000", "1700000000.600000", "1700000000.700000", "1700000000.800000"],
        [
            "1700000000.5",
            "1700000000.6",
            "1700000000.65",
            "1700000000.7",
        ],  # as Python writes floats
        [str(1_700_000_000_500_000 + i * 100_000) for i in range(4)],  # microseconds
        [str(1_700_000_000_500 + i * 100) for i in range(4)],  # milliseconds
        [str(1_700_000_000_500_000_000 + i * 10**8) for i in range(4)],
    ],
    ids=lambda names: names[0],
)
def test_the_size_of_time_stamps_tells_their_unit(tmp_path, names):
    step_ns = [10**8] * 3 if "65" not in names[2] else [10**8, 5 * 10**7, 5 * 10**7]
    write_clouds(tmp_path, [f"{name}.npy" for name in names])
    pairs = data.open_dataset(tmp_path)
    assert pairs.pair_keys[0].timestamp0_ns == 1_700_000_000_500_000_000 and pairs.skipped == []
    assert [key.timestamp1_ns - key.timestamp0_ns for key in pairs.pair_keys] == step_ns
    assert [int(pairs[i].pc0[1, 2]) for i in range(3)] == [50, 51, 52]  # in their order
    (tmp_path / f"{names[1]}.npy").unlink()  # 0.2 s, or 0.15 s
    assert len(data.open_dataset(tmp_path)) == (1 if step_ns == [10**8] * 3 else 2)
    stamps_us = [1_700_000_000_500_000, 1_700_000_000_700_000]
    rows = [
        tum_row(stamp, pose) for stamp, pose in zip(stamps_us, (DRIVE[0], DRIVE[2]), strict=True)
    ]
    (tmp_path / "poses.txt").write_text("\n".join(rows))  # TUM in microseconds
    posed = clouds.CloudPairs(tmp_path)
    assert np.allclose(posed._sweeps[1_700_000_000_500_000_000][1], DRIVE[0])


def test_the_folder_above_is_found_from_inside(tmp_path, monkeypatch):
    write_clouds(tmp_path / "drive" / "velodyne", NUMBERED)
    (tmp_path / "drive" / "poses.txt").write_text(kitti_rows(DRIVE))
    by_name = data.open_dataset(tmp_path / "drive" / "velodyne")
    (tmp_path / "drive" / "velodyne" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "drive" / "velodyne" / "below")
    from_inside = data.open_dataset("..")
    assert (
        from_inside.pair_keys == by_name.pair_keys
        and from_inside.pair_keys[0].log_id == "drive-velodyne"
    )
    assert_the_pole_is_at_rest(from_inside)


def test_pose_files_and_calibrations_with_bad_numbers_are_named(tmp_path):
    write_clouds(tmp_path, STAMPED)
    rows = [tum_row((10**18 + i * 10**8) / 1e9, pose) for i, pose in enumerate(DRIVE)]
    (tmp_path / "poses.txt").write_text(
        "\n".join([*rows, rows[0].replace(rows[0].split()[0], "nan")])
    )
    with pytest.raises(data.DataError, match="poses.txt: has a time that is not finite"):
        data.open_dataset(tmp_path)
    (tmp_path / "poses.txt").write_text(kitti_rows(DRIVE))
    (tmp_path / "calib.txt").write_text("Tr: 1 2 3\n")
    with pytest.raises(data.DataError, match="calib.txt: its Tr is not a 3 x 4 pose"):
        data.open_dataset(tmp_path)


def test_tum_poses_are_matched_by_order_where_names_are_not_times(tmp_path):
    write_clouds(tmp_path, [f"frame{i}.npy" for i in (8, 9, 10, 11)])  # frame10 comes after frame9
    (tmp_path / "poses.txt").write_text(
        "\n".join(tum_row(i / 10, pose) for i, pose in enumerate(DRIVE))
    )
    assert_the_pole_is_at_rest(data.open_dataset(tmp_path))
    (tmp_path / "frame12.npy").write_bytes(b"")
    with pytest.raises(
        data.DataError, match=r"poses.txt: has 4 poses for the 5 clouds of .*; give one each"
    ):
        data.open_dataset(tmp_path)


def test_clouds_with_argoverses_poses(tmp_path):
    write_clouds(tmp_path, STAMPED)
    write_log(tmp_path / "log", [np.ones((1, 3))] * 4, DRIVE, DRIVE, (5,) * 4)
    table = feather.read_table(tmp_path / "log" / "city_SE3_egovehicle.feather")
    stamps = pyarrow.array([int(name.split(".")[0]) for name in STAMPED])
    feather.write_feather(
        table.set_column(0, "timestamp_ns", stamps), tmp_path / "city_SE3_egovehicle.feather"
    )
    shutil.rmtree(tmp_path / "log")
    assert_the_pole_is_at_rest(data.open_dataset(tmp_path))


def test_without_poses_clouds_are_in_one_frame_and_a_note_reports_it(tmp_path):
    write_clouds(tmp_path, NUMBERED[:2])
    pairs = data.open_dataset(tmp_path)
    how, note = pairs.notes
    assert how == f"{tmp_path}: {COUNTED}"
    assert str(tmp_path) in note and "taken to be in one frame" in note
    np.testing.assert_array_equal(pairs[0].pc1, np.load(tmp_path / NUMBERED[1]).astype(np.float32))
    assert torch.equal(pairs[0].ego1_SE3_ego0, torch.eye(4, dtype=torch.float64))


def test_gaps_strange_names_and_repeated_times_are_skipped_and_reported(tmp_path):
    write_clouds(tmp_path, ["000000.npy", "000001.npy", "000003.npy", "000004.npy"])
    shutil.copy(tmp_path / "000000.npy", tmp_path / "map.npy")
    np.save(tmp_path / "0.npy", np.full((1, 3), 3))
    (tmp_path / "._000002.npy").touch()
    (tmp_path / "notes.txt").touch()
    pairs = data.open_dataset(tmp_path)
    assert [(key.timestamp0_ns / 1e8, key.timestamp1_ns / 1e8) for key in pairs.pair_keys] == [
        (0, 1),
        (3, 4),
    ]
    strange, repeated, gap = pairs.skipped
    assert (
        "map.npy: its name is not a number" in strange
        and "no pair at 100000000" in gap
        and "0.20 s later" in gap
    )
    assert "000000.npy: has the same time as 0.npy; remove one" in repeated
    assert pairs[0].pc0.tolist() == [[3, 3, 3]]  # 0.npy, the first of the two
    for name, content in (("000001.npy", b""), ("000004.npy", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
    for pair, name in zip((0, 1), ("000001.npy", "000004.npy"), strict=True):
        with pytest.raises(data.DataError, match=f"{name}: its points cannot be read"):
            pairs[pair]


def test_ground_of_clouds_is_found_without_a_map_or_not_at_all(tmp_path):
    points, truth = flat_street(np.random.default_rng(0), 1, -1.73)
    for name in NUMBERED[:2]:
        np.column_stack([points, points[:, 0]]).astype("<f4").tofile(
            tmp_path / name.replace("npy", "bin")
        )
    for ground, wanted in (("auto", truth), ("points", truth), ("none", 0 * truth > 0)):
        mask = data.open_dataset(tmp_path, ground=ground)[0].is_ground1.numpy()
        assert (mask == wanted).mean() > 0.99
    for ground in ("raster", "vector"):
        with pytest.raises(
            data.DataError, match=f"clouds have no map for ground '{ground}'; choose points or none"
        ):
            data.open_dataset(tmp_path, ground=ground)
    with pytest.raises(data.DataError, match="rate_hz 0: give the number of sweeps per second"):
        data.open_dataset(tmp_path, rate_hz=0)


def test_pose_files_that_cannot_be_used_are_named(tmp_path):
    write_clouds(tmp_path / "clouds", NUMBERED)
    file = tmp_path / "mine.txt"
    for content, message in (
        ("", "its poses cannot be read"),
        ("no poses", "its poses cannot be read"),
        ("1 2 3\n" * 4, "3 numbers per row, expected 12 .KITTI. or 8 .TUM."),
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
    with pytest.raises(data.DataError, match="mine.txt: no pose for 000003.npy .*not a rotation"):
        pairs[2]
    write_clouds(tmp_path / "stamped", STAMPED)
    file.write_text("\n".join(tum_row(i / 10, pose) for i, pose in enumerate(DRIVE)))
    with pytest.raises(data.DataError, match="mine.txt: has no pose within 1 ms of any cloud"):
        data.open_dataset(tmp_path / "stamped", poses=file)


# --- Rows of another width ------------------------------------------------------------------------


def spinning_lidar(elevations_deg, azimuths: int = 900) -> np.ndarray:
    """(N, 3) float32: a lidar 1.8 m above a plane inside a winding wall, laser by laser."""
    rng, points = np.random.default_rng(0), []
    for azimuth in np.linspace(-np.pi, np.pi, azimuths, endpoint=False):
        wall = 30 + 15 * np.sin(3 * azimuth)
        for elevation in np.radians(elevations_deg):
            ground = 1.8 / np.sin(-elevation) if elevation < -0.001 else np.inf
            range_m = min(ground, wall / np.cos(elevation)) + rng.normal(0, 0.02)
            flat = range_m * np.cos(elevation)
            points.append(
                (flat * np.cos(azimuth), flat * np.sin(azimuth), range_m * np.sin(elevation))
            )
    return np.array(points, dtype=np.float32)


# A Velodyne VLP-16 fires its lasers in this order, low and high in turn.
FIRING_ORDER = [-15, 1, -13, 3, -11, 5, -9, 7, -7, 9, -5, 11, -3, 13, -1, 15]


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("order", ["rings", "firing", "none"])
def test_the_columns_of_bin_files_are_recognized(tmp_path, dtype, order):
    points = spinning_lidar(FIRING_ORDER if order == "firing" else sorted(FIRING_ORDER))
    rng = np.random.default_rng(1)
    if order == "none":
        points = rng.permutation(points)
    points[rng.random(len(points)) < 0.3] = 0  # no returns
    # What such files hold: intensity, ring, time (ns), reflectivity, ambient light, range (mm).
    more = [
        rng.integers(0, 255, len(points)) / 255,
        np.arange(len(points)) % 16,
        np.arange(len(points)) * 55_296.0,
        rng.gamma(2, 10, len(points)),
        rng.gamma(3, 100, len(points)),
        np.linalg.norm(points, axis=1) * 1000,
    ]
    file = tmp_path / "cloud.bin"
    for columns in range(3, 10):
        rows = np.column_stack([points, *more[: columns - 3]]).astype(dtype)
        rows.tofile(file)
        for given in (None, columns):
            np.testing.assert_array_equal(
                clouds.read_cloud(file, given), points, err_msg=f"{columns} {given}"
            )
        # A torn file is not read as rows of another width, whatever its size divides by.
        for cut in (4, 16, 20):
            if cut % rows.strides[0]:
                file.write_bytes(rows.tobytes()[:-cut])
                with pytest.raises(
                    data.DataError, match=f"{columns} {rows.dtype.name} numbers|not recog"
                ):
                    clouds.read_cloud(file)
    # float64 numbers with few digits are two plausible float32, of which one is always 0.
    few_digits = np.column_stack([points, *more[:2]]).round()
    few_digits[:, 3] = 0  # no intensity
    for columns in (3, 4, 5):
        few_digits[:, :columns].astype(np.float64).tofile(file)
        for given in (None, columns):
            np.testing.assert_array_equal(clouds.read_cloud(file, given), few_digits[:, :3])


def test_bin_files_that_may_be_read_in_many_ways_ask_for_columns(tmp_path):
    """A ball of points looks alike from all sides: nothing tells x from y."""
    ball = np.random.default_rng(0).normal(0, 9, (1000, 3)).astype("<f4")
    for name in ("ball.bin", "ball.pcd.bin"):
        ball.tofile(tmp_path / name)
    with pytest.raises(data.DataError, match=r"ball.bin: .*12000 bytes .*with --columns"):
        clouds.read_cloud(tmp_path / "ball.bin")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "ball.bin", 3), ball)
    # nuScenes' suffix decides where nothing else does.
    found = clouds.read_cloud(tmp_path / "ball.pcd.bin")
    np.testing.assert_array_equal(found, ball.reshape(-1, 5)[:, :3])
    for seed in range(30):  # nor does chance, where points are few
        few = np.random.default_rng(seed).normal(0, 9, (40, 3)).astype("<f4")
        few.tofile(tmp_path / "few.bin")
        with pytest.raises(data.DataError, match="few.bin: .*with --columns"):
            clouds.read_cloud(tmp_path / "few.bin")
    for columns, message in (
        (7, "12000 bytes are not a whole number of rows of 7"),
        (2, "3 or more"),
    ):
        with pytest.raises(data.DataError, match=f"ball.bin: .*{message}"):
            clouds.read_cloud(tmp_path / "ball.bin", columns)
    (tmp_path / "noise.bin").write_bytes(np.random.default_rng(0).bytes(48_000))
    with pytest.raises(data.DataError, match="noise.bin: .*with --columns"):
        clouds.read_cloud(tmp_path / "noise.bin")


def test_kittis_real_scans_have_four_columns():
    if "KITTI_SAMPLE" not in os.environ:
        pytest.skip("needs real scans: set KITTI_SAMPLE to a folder that holds KITTI's 000000.bin")
    for file in clouds.list_clouds(Path(os.environ["KITTI_SAMPLE"])):
        wanted = np.fromfile(file, "<f4").reshape(-1, 4)[:, :3]
        np.testing.assert_array_equal(clouds.read_cloud(file), wanted)


def test_arrays_on_their_side_and_arrays_with_fields_are_read(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (50, 3)).astype(np.float32)
    np.save(tmp_path / "side.npy", points.T)
    np.save(tmp_path / "homogeneous.npy", np.column_stack([points, np.ones(50)]).T)
    np.savez(tmp_path / "side.npz", points=points.T)
    fields = np.zeros((5, 10), [("intensity", "f4"), ("z", "f8"), ("x", "f4"), ("y", ">f4")])
    for axis, values in zip("xyz", points.T, strict=True):
        fields[axis] = values.reshape(5, 10)
    np.save(tmp_path / "fields.npy", fields)
    np.savez(tmp_path / "fields.npz", fields)
    for name in ("side.npy", "homogeneous.npy", "side.npz", "fields.npy", "fields.npz"):
        np.testing.assert_array_equal(clouds.read_cloud(tmp_path / name), points, err_msg=name)
    np.save(tmp_path / "flat.npy", fields[["x", "y"]])
    with pytest.raises(data.DataError, match="flat.npy: .*its points have no z"):
        clouds.read_cloud(tmp_path / "flat.npy")
    np.save(tmp_path / "long.npy", np.zeros((20, 99)))
    with pytest.raises(data.DataError, match=r"long.npy: .*\(20, 99\), expected \(N, 3\)"):
        clouds.read_cloud(tmp_path / "long.npy")


def test_a_ply_name_that_occurs_twice_does_not_shift_rows(tmp_path):
    points = np.random.default_rng(0).normal(0, 20, (30, 3)).astype("<f4")
    rows = np.column_stack([points[:, :1], points[:, :1], points[:, 1:], points[:, :2]])
    header = "ply\nformat {} 1.0\nelement vertex 30\n"
    for name in ("s", "x", "y", "z", "s", "nx"):
        header += f"property float {name}\n"
    header += "end_header\n"
    (tmp_path / "two.ply").write_bytes(
        header.format("binary_little_endian").encode() + rows.tobytes()
    )
    text = "\n".join(" ".join(f"{value:.9g}" for value in row) for row in rows)
    (tmp_path / "text.ply").write_text(header.format("ascii") + text)
    for name in ("two.ply", "text.ply"):
        found = clouds.read_cloud(tmp_path / name).astype(np.float32)
        np.testing.assert_array_equal(found, points, err_msg=name)
    (tmp_path / "x.ply").write_text(header.format("ascii").replace(" s", " x") + text)
    with pytest.raises(data.DataError, match="x.ply: .*field 'x' occurs more than once"):
        clouds.read_cloud(tmp_path / "x.ply")


def test_headers_and_files_that_are_broken_end_in_one_line(tmp_path):
    """Huge and negative numbers, text that is not UTF-8, broken headers, odd archives."""
    huge = "9" * 5000
    write_ply(tmp_path / "whole.ply", np.ones((3, 3)), "ascii")
    write_pcd(tmp_path / "whole.pcd", np.ones((2, 3), dtype=np.float32), "binary")
    write_pcd(tmp_path / "packed.pcd", np.ones((2, 3), dtype=np.float32), "binary_compressed")
    np.save(tmp_path / "whole.npy", np.ones((30, 3)))
    np.savez(tmp_path / "whole.npz", np.ones((30, 3)))
    # An archive's directory begins with PK 1 2; its seventh byte is the version it needs.
    version = re.search(rb"PK\x01\x02...", (tmp_path / "whole.npz").read_bytes(), re.DOTALL)[0]
    cases = []
    for source, old, new in (
        ("whole.ply", b"vertex 3", b"vertex -1"),
        ("whole.ply", b"vertex 3", b"vertex " + huge.encode()),
        ("whole.ply", b"vertex 3", b"vertex 3.0"),
        ("whole.ply", b"vertex 3", "vertex ٣٣".encode()),
        ("whole.ply", b"property double y", b"property double \xff\xfe"),
        ("whole.pcd", b"POINTS 2", b"POINTS -1"),
        ("whole.pcd", b"POINTS 2", b"POINTS " + huge.encode()),
        ("whole.pcd", b"POINTS 2", b"POINTS"),
        ("whole.pcd", b"TYPE U F U F F F", b"NONE"),
        ("whole.pcd", b"COUNT 1 1 3 1 1 2", b"COUNT 1 1 999999999 1 1 2"),
        ("whole.pcd", b"COUNT 1 1 3 1 1 2", b"COUNT 1 2 3 1 1 2"),
        ("whole.pcd", b"SIZE 1 4", b"SIZE 1 77"),
        ("packed.pcd", b"compressed\n", b"compressed\n" + struct.pack("<II", 2**32 - 1, 2**32 - 1)),
        ("whole.npy", b"'shape': (", b"'shape': (("),
        ("whole.npy", b"(30, 3)", b"(10**9)"),
        ("whole.npy", b"30, 3)", b"99999)"),
        ("whole.npy", b"<f8", b"\xff\xff8"),
        ("whole.npz", version, version[:6] + b"\xff"),
    ):
        content = (tmp_path / source).read_bytes()
        assert old in content, old
        cases.append(tmp_path / f"{len(cases)}-{source}")
        cases[-1].write_bytes(content.replace(old, new, 1))
    for file in cases:
        with pytest.raises(data.DataError, match=f"{file.name}: "):
            pytest.fail(f"{file.name}: {clouds.read_cloud(file)}")
    write_clouds(tmp_path / "drive", NUMBERED)
    for content in (b"\xff\xfe\x00", b"1e999 " * 12, b"1" * 6000 + b" 2", b"PK\x03\x04"):
        (tmp_path / "poses.txt").write_bytes(content)
        with pytest.raises(data.DataError, match="poses.txt: "):
            data.open_dataset(tmp_path / "drive")[0]
        for name in ("pose.txt", "pose.npy"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(data.DataError, match=f"{name}: not a 4 x 4 pose"):
                clouds.read_pose(tmp_path / name)
    (tmp_path / "poses.txt").write_text(kitti_rows(DRIVE))
    (tmp_path / "calib.txt").write_bytes(b"\xff\nTr: " + huge.encode() + b"\n")
    with pytest.raises(data.DataError, match="calib.txt: its Tr is not a 3 x 4 pose"):
        data.open_dataset(tmp_path / "drive")


# --- No returns and the ego's own body ------------------------------------------------------------


def test_no_returns_and_the_egos_own_body_are_nan_and_a_note_counts_them(tmp_path):
    rng = np.random.default_rng(0)
    world = rng.uniform((5, -20, -1.7), (30, 20, 2), (5000, 3))
    body = rng.uniform(-1, 1, (32, 3))
    cloud = np.vstack([np.zeros((2000, 3)), world, body, np.full((7, 3), np.nan)])
    for name in NUMBERED[:2]:
        np.save(tmp_path / name, cloud)
    pairs = data.open_dataset(tmp_path)
    assert pairs.notes[-1] == (
        f"{tmp_path / NUMBERED[0]}: of its 7,039 points, 2,007 are not returns (0 0 0, or not "
        "finite) and 32 are nearer than 2.5 m (--min-range-m); such points are "
        "ignored in all clouds"
    )
    wanted = np.repeat([False, True, False], [2000, 5000, 39])
    for points in (pairs[0].pc0, pairs[0].pc1):
        np.testing.assert_array_equal(torch.isfinite(points).all(dim=1), wanted)
        np.testing.assert_array_equal(points[wanted], world.astype(np.float32))
    # The limit is the distance in space; with 0 the body stays, and 0 0 0 is no return anyway.
    near = (world**2).sum(1) < 10**2
    farther = data.open_dataset(tmp_path, min_range_m=10)
    assert int(torch.isfinite(farther[0].pc0[:, 0]).sum()) == (~near).sum()
    assert f" {near.sum() + 32} are nearer than 10 m" in farther.notes[-1].replace(",", "")
    assert (
        int(torch.isfinite(data.open_dataset(tmp_path, min_range_m=0)[0].pc0[:, 0]).sum()) == 5032
    )
    with pytest.raises(data.DataError, match=f"{NUMBERED[0]}: none of its points is 99 m away"):
        data.open_dataset(tmp_path, min_range_m=99)[0]
    for wrong in (-1, np.nan):
        with pytest.raises(data.DataError, match=f"min_range_m {wrong}: give meters"):
            data.open_dataset(tmp_path, min_range_m=wrong)
    # A pair of one's own clouds has the same rule, but no body.
    pair = clouds.pair_of_clouds(cloud, cloud)
    assert int(torch.isfinite(pair.pc0[:, 0]).sum()) == 5032


# --- Poses that are wrong -------------------------------------------------------------------------


CAMERA_SE3_LIDAR = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])


def kitti_dataset(root, tr: str | None, tum: bool = False):
    """KITTI's own folders: poses apart from the clouds, and Tr beside these. Gives both."""
    drive = root / "sequences" / "00"
    write_clouds(drive / "velodyne", NUMBERED)
    first = CAMERA_SE3_LIDAR @ np.linalg.inv(DRIVE[0])
    cameras = [first @ pose @ np.linalg.inv(CAMERA_SE3_LIDAR) for pose in DRIVE]
    (root / "poses").mkdir()
    tum_rows = "\n".join(tum_row(i / 10, pose) for i, pose in enumerate(cameras))
    (root / "poses" / "00.txt").write_text(tum_rows if tum else kitti_rows(cameras))
    if tr is not None:
        values = kitti_rows([CAMERA_SE3_LIDAR])
        content = f"P0: 1 2 3\nTr_imu_to_velo: 7\n{tr} {values}Track: caf\xe9\n"
        (drive / "calib.txt").write_bytes(content.encode("latin-1"))  # not UTF-8
    return drive / "velodyne", root / "poses" / "00.txt"


@pytest.mark.parametrize("tum", [False, True])
@pytest.mark.parametrize("tr", ["Tr:", "Tr_velo_to_cam:", "Tr_velo_cam", "TR :", "tr_VELO_TO_CAM="])
def test_kittis_calibration_is_found_beside_the_clouds_and_in_any_spelling(tmp_path, tr, tum):
    folder, poses = kitti_dataset(tmp_path, tr, tum)
    pairs = data.open_dataset(folder, poses=poses)
    assert_the_pole_is_at_rest(pairs)
    assert f"{folder.parent / 'calib.txt'}: by its Tr, KITTI's camera poses" in pairs.notes[1]


def test_camera_poses_without_a_calibration_are_refused(tmp_path):
    folder, poses = kitti_dataset(tmp_path, None)
    with pytest.raises(data.DataError, match="00.txt: its poses move along z, as a camera's do"):
        data.open_dataset(folder, poses=poses)
    # The lidar's own poses need no calibration, and must not be changed by one that is there.
    poses.write_text(kitti_rows(DRIVE))
    assert_the_pole_is_at_rest(data.open_dataset(folder, poses=poses))
    (folder.parent / "calib.txt").write_text("Tr: " + kitti_rows([CAMERA_SE3_LIDAR]))
    pairs = data.open_dataset(folder, poses=poses)
    assert_the_pole_is_at_rest(pairs)
    assert "calib.txt: its Tr was not needed" in pairs.notes[1]
    # An ego at rest, or one with a torn pose, is no camera.
    (folder.parent / "calib.txt").unlink()
    poses.write_text(kitti_rows([DRIVE[0]] * 4))
    assert len(data.open_dataset(folder, poses=poses)) == 3
    torn = DRIVE[3].copy()
    torn[2, 3] = 1e6
    poses.write_text(kitti_rows([*DRIVE[:3], torn]))
    assert len(data.open_dataset(folder, poses=poses)) == 3


def test_poses_that_no_vehicle_can_have_cost_their_pair(tmp_path):
    write_clouds(tmp_path, NUMBERED)
    jump = DRIVE[3].copy()
    jump[0, 3] += 10
    (tmp_path / "poses.txt").write_text(kitti_rows([*DRIVE[:3], jump]))
    pairs = data.open_dataset(tmp_path)
    assert len(pairs[0].pc0) == len(pairs[1].pc0) == 2
    with pytest.raises(
        data.DataError, match="poses.txt: wrong poses of 000002.npy and 000003.npy, 0.1 s apart"
    ):
        pairs[2]
    assert len(data.open_dataset(tmp_path, rate_hz=2)[2].pc0) == 2  # 12 m in half a second
    (tmp_path / "poses.txt").write_text(kitti_rows(DRIVE))
    with pytest.raises(data.DataError, match="0.01 s apart"):  # 2 m in 10 ms
        data.open_dataset(tmp_path, rate_hz=100)[0]


# --- Names ----------------------------------------------------------------------------------------


# Two or three names, when these clouds were taken (s), and what the note says.
NAMES = """
x-2018-07-24-11-22-45__1532402927647951.pcd x-2018-07-24-11-22-45__1532402927697951.pcd
    1532402927.647951 1532402927.697951 are times: microseconds since 1970
c_1583836591_582553088 c_1583836591_682529024 c_1583836599_082553088
    1583836591.582553088 1583836591.682529024 1583836599.082553088 are times: nanoseconds since 1970
bag_1532402900-lidar_1532402929.6 bag_1532402900-lidar_1532402929.7
    1532402929.6 1532402929.7 are times: milliseconds since 1970
c-1583836591-982553088 c-1583836592-82553088
    1583836591.982553088 1583836592.082553088 are times: nanoseconds since 1970
2021-10-26-16-21-29-468 2021-10-26-16-21-29-568
    1635265289.468 1635265289.568 are times: date and time of day, to milliseconds
2021-10-26T16:21:29.9Z 2021-10-26T16:21:30.05Z
    1635265289.9 1635265290.05 are times: date and time of day, to milliseconds
20211026162129 20211027162129
    1635265289 1635351689 are times: date and time of day, to seconds
20211026_162129_468123 20211026_162129_568123
    1635265289.468123 1635265289.568123 are times: date and time of day, to microseconds
478932100 478932199 478932301
    478932.1 478932.199 478932.301 are times: milliseconds since an unknown moment
315966265360040000 315966265459836000
    315966265.36004 315966265.459836 are times: nanoseconds since an unknown moment
12.5 12.62
    12.5 12.62 are times: seconds since an unknown moment
frame_07 frame_08 frame_10
    0.7 0.8 1.0 count the clouds: 10 per second are assumed (--rate-hz)
1583836591_000001 1583836591_000002
    0.1 0.2 count the clouds: 10 per second are assumed (--rate-hz)
2021_10_26_drive_0001_sync_3 2021_10_26_drive_0001_sync_4
    0.3 0.4 count the clouds: 10 per second are assumed (--rate-hz)
1_2 2_3
    0 0.1 give only the order of the clouds: 10 per second are assumed (--rate-hz)
a b
    0 0.1 give only the order of the clouds: 10 per second are assumed (--rate-hz)
99999999999999999999998 99999999999999999999999
    0 0.1 give only the order of the clouds: 10 per second are assumed (--rate-hz)
"""


@pytest.mark.parametrize("case", re.findall(r"^\S.*\n .*", NAMES, re.MULTILINE))
def test_times_are_found_inside_names_and_a_note_reports_how(tmp_path, case):
    names, wanted = (line.split() for line in case.split("\n"))
    times_s = [float(word) for word in wanted[: len(names)]]
    how = " ".join(wanted[len(names) :])
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.full((1, 3), 5))
    pairs = clouds.CloudPairs(tmp_path)
    assert pairs.notes[0] == f"{tmp_path}: names {how}"
    np.testing.assert_allclose(np.array([*pairs.stamps.values()][0]) / 1e9, times_s, 0, 1e-6)
    # Gaps count: clouds 7 s or a day apart are not consecutive.
    gaps = np.diff(times_s)
    assert len(pairs) == (gaps <= 0.15).sum() and len(pairs.skipped) == (gaps > 0.15).sum()


def test_times_of_nanoseconds_are_exact(tmp_path):
    for name in ("c_1583836591_582553088", "c_1583836591_582553089", "c_1583836591_682553089"):
        np.save(tmp_path / f"{name}.npy", np.full((1, 3), 5))
    (stamps,) = clouds.CloudPairs(tmp_path).stamps.values()
    assert stamps.tolist() == [1583836591582553088, 1583836591582553089, 1583836591682553089]


def test_two_drives_whose_folders_have_the_same_names_are_two_logs(tmp_path):
    """KITTI's raw drives all end in velodyne_points/data; poses.txt is in the drive's folder."""
    ids = []
    for drive in ("2011_09_26_drive_0001_sync", "2011_09_26_drive_0002_sync"):
        folder = tmp_path / drive / "velodyne_points" / "data"
        write_clouds(folder, NUMBERED)
        (tmp_path / drive / "poses.txt").write_text(kitti_rows(DRIVE))
        pairs = data.open_dataset(folder)
        assert_the_pole_is_at_rest(pairs)
        ids.append(pairs.pair_keys[0].log_id)
        assert ids[-1] == f"{drive}-velodyne_points-data"
    write_clouds(tmp_path / "scene-0001" / "LIDAR_TOP" / "points", NUMBERED)
    pairs = data.open_dataset(tmp_path / "scene-0001" / "LIDAR_TOP" / "points")
    assert pairs.pair_keys[0].log_id == "scene-0001-LIDAR_TOP-points"


# --- Folders as people have them ------------------------------------------------------------------


def write_sweep(file, points) -> None:
    """As Argoverse 2 stores it. (pyarrow does not open a file whose name is not UTF-8.)"""
    with open(file, "wb") as opened:
        feather.write_feather(pyarrow.table(dict(zip("xyz", points.T, strict=False))), opened)


def test_suffixes_in_capitals_files_of_macs_and_names_that_are_not_utf8(tmp_path, monkeypatch):
    points = np.random.default_rng(0).normal(0, 20, (50, 3)).astype(np.float32)
    points[:, 2] = 1
    write_ply(tmp_path / "000000.PLY", points[:3], "binary_little_endian")
    write_pcd(tmp_path / "000001.PCD", points, "binary")
    np.column_stack([points, np.arange(50)]).astype("<f4").tofile(tmp_path / "000002.BIN")
    np.save(tmp_path / "000003.npy", points)
    os.rename(tmp_path / "000003.npy", tmp_path / "000003.NPY")
    for name in ("._000004.bin", "._poses.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "000005.bin").mkdir()
    pairs = data.open_dataset(tmp_path)
    assert len(pairs) == 3 and not pairs.skipped
    np.testing.assert_array_equal(pairs[1].pc0, points)
    np.testing.assert_array_equal(pairs[1].pc1, points)
    np.testing.assert_array_equal(pairs[2].pc1, points)

    # Linux allows any bytes in a name, and ~ is a name like others.
    odd = tmp_path / os.fsdecode(b"caf\xe9") / "~"
    stamps = (10**18, 10**18 + 10**8)
    for name in (b"w\xe9 1.npy", b"w\xe9 2.npy"):
        odd.mkdir(parents=True, exist_ok=True)
        np.save(odd / os.fsdecode(name), points)
    named = data.open_dataset(odd)
    assert named.pair_keys[0].log_id == "caf\\udce9-~"
    np.testing.assert_array_equal(named[0].pc0, points)
    monkeypatch.chdir(odd.parent)
    assert data.open_dataset("~").pair_keys == named.pair_keys
    shutil.rmtree("~")

    # Sweeps as Argoverse 2 stores them, in a folder that is no log, beside a table that is none.
    os.mkdir("~")
    for stamp in stamps:
        write_sweep(odd / f"{stamp}.feather", points)
    write_sweep(odd / "annotations.feather", points)
    sweeps = data.open_dataset("~")
    assert sweeps.pair_keys == [("caf\\udce9-~", *stamps)]
    np.testing.assert_array_equal(sweeps[0].pc1, points)
    write_sweep(odd / f"{stamps[1]}.feather", points[:, :2])
    with pytest.raises(data.DataError, match=f"{stamps[1]}.feather: has no columns .'z'"):
        data.open_dataset("~")[0]


def test_a_file_given_for_a_folder_and_folders_that_cannot_be_read(tmp_path, monkeypatch):
    write_clouds(tmp_path / "root" / "set" / "train" / "drive", NUMBERED)
    file = tmp_path / "root" / "set" / "train" / "drive" / NUMBERED[0]
    for open_it in (clouds.CloudPairs, clouds.list_clouds):
        with pytest.raises(data.DataError, match=f"{NUMBERED[0]}: not a folder that can be read"):
            open_it(file)
    (tmp_path / "root" / "lost+found" / "below").mkdir(parents=True)
    (tmp_path / "root" / "set" / "mine").mkdir()
    scan = os.scandir

    def scan_as_a_user(folder):
        if os.path.basename(folder) in ("lost+found", "mine"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scan_as_a_user)
    for levels_too_high, names in (("root/set/train", "drive"), ("root", "set/train/drive")):
        with pytest.raises(data.DataError, match=f"holds the splits {names}; choose one, as in"):
            data.open_dataset(tmp_path / levels_too_high)
    with pytest.raises(data.DataError, match="mine: .*Permission denied"):
        data.open_dataset(tmp_path / "root" / "set" / "mine")


# --- Ground without a map -------------------------------------------------------------------------


def flat_street(rng, tilt_deg: float, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of a tilted plane with a curb of 12 cm, a car and a wall; and which are ground."""
    xy = rng.uniform(-40, 40, (20_000, 2))
    road = np.column_stack([xy, rng.normal(0, 0.02, len(xy)) + 0.12 * (xy[:, 1] > 6)])
    car = rng.uniform((8, -1, 0.45), (12.5, 1, 1.6), (400, 3))
    wall = rng.uniform((-30, 20, 0.6), (30, 20.2, 4), (3_000, 3))
    points = (
        np.concatenate([road, car, wall])
        @ Rotation.from_euler("y", tilt_deg, degrees=True).as_matrix().T
    )
    return points + (0, 0, z), np.arange(len(points)) < len(road)


@pytest.mark.parametrize(("tilt_deg", "z"), [(0, 0), (0, -1.73), (4, -0.33), (-6, 2)])
def test_ground_without_a_map_is_the_road_from_any_height_and_tilt(tilt_deg, z):
    points, truth = flat_street(np.random.default_rng(0), tilt_deg, z)
    is_ground = clouds.is_ground_without_map(points)
    assert is_ground[truth].mean() > 0.995 and not is_ground[~truth].any()
    order = np.random.default_rng(1).permutation(len(points))
    np.testing.assert_array_equal(clouds.is_ground_without_map(points[order]), is_ground[order])
    dirt = points.copy()
    dirt[::7, 1], dirt[1::7, 2], dirt[2::7, 0] = np.nan, np.inf, -np.inf
    is_clean = np.isfinite(dirt).all(axis=1)
    again = clouds.is_ground_without_map(dirt.astype(np.float32))
    assert (
        not again[~is_clean].any()
        and again[is_clean & truth].mean() > 0.99
        and not again[is_clean & ~truth].any()
    )


def test_ground_without_a_map_follows_hills_and_ignores_reflections_below(tmp_path, monkeypatch):
    """Streets of twice the usual slope, of an unseen seed; then with reflections far below."""
    make_street = synthetic.make_street

    def hilly(settings, number):
        street = make_street(settings, number)
        return dataclasses.replace(street, waves=street.waves * (2, 1, 1, 1))

    monkeypatch.setattr(synthetic, "make_street", hilly)
    synthetic.write_logs(
        tmp_path, 2, synthetic.StreetSettings(range_m=60, azimuths=900, sweeps=2, seed=5)
    )
    rng = np.random.default_rng(0)
    for pair in data.open_dataset(tmp_path):
        points, inside = pair.pc0.numpy(), data.is_in_grid(pair.pc0).numpy()
        clean = agreement(
            clouds.is_ground_without_map(points)[inside], pair.is_ground0.numpy()[inside]
        )[0]
        for _ in range(3):  # the same points, the same mask
            np.testing.assert_array_equal(
                clouds.is_ground_without_map(points), clouds.is_ground_without_map(points)
            )
        reflections = rng.uniform((-30, -30, -9), (30, 30, -2), (200, 3))
        with_them = clouds.is_ground_without_map(np.concatenate([points, reflections]))
        assert clean > 0.93 and with_them[len(points) :].all()
        assert (
            agreement(with_them[: len(points)][inside], pair.is_ground0.numpy()[inside])[0]
            > clean - 0.01
        )


def test_ground_without_a_map_of_hardly_any_points_is_empty():
    for points in (
        np.zeros((0, 3)),
        np.zeros((1, 3)),
        np.zeros((500, 3)),
        np.full((30, 3), np.nan),
    ):
        is_ground = clouds.is_ground_without_map(points)
        assert is_ground.shape == (len(points),) and is_ground.dtype == bool and not is_ground.any()
    x = np.arange(-30.0, 30) + 0.5  # the middles of cells
    on_a_line, up_a_wall = (
        np.column_stack([x, 0 * x, 0 * x]),
        np.column_stack([x, x % 2, 0.5 * x]),
    )  # 27 degrees
    assert (
        not clouds.is_ground_without_map(on_a_line).any()
        and not clouds.is_ground_without_map(up_a_wall).any()
    )


def test_a_row_of_parked_cars_is_not_taken_for_a_curb():
    """They hide the road below: the lowest visible points are 45 cm above it."""
    rng = np.random.default_rng(0)
    road = np.column_stack([rng.uniform(-40, 40, (30_000, 2)), rng.normal(0, 0.02, 30_000)])
    road = road[(road[:, 1] < 3) | (road[:, 1] > 5)]
    cars = rng.uniform((-35, 3, 0.45), (35, 5, 0.9), (4_000, 3))
    is_ground = clouds.is_ground_without_map(np.concatenate([road, cars]))
    assert is_ground[: len(road)].all() and is_ground[len(road) :].mean() < 0.02


def test_a_sweep_that_is_all_ground_is_all_ground():
    points = np.column_stack(
        [np.random.default_rng(0).uniform(-60, 60, (9_000, 2)), np.full(9_000, -0.33)]
    )
    assert clouds.is_ground_without_map(points).all()
