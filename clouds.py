"""Your own LiDAR: folders of clouds in common formats, their poses, and ground without a map.

Points are (N, 3) in meters, in the frame of the sensor at that sweep, z up; it plays the part of
the ego frame. Poses are world_SE3_sensor (4 x 4, float64). Times are in nanoseconds. Clouds have no
annotations, so their pairs have no true flow. ZeroFlow (Vedder et al., ICLR 2024) takes its ground
from Argoverse 2's maps; the rule without a map is this project's own.

Formats: .feather, .bin (KITTI), .npy, .npz, .ply, .pcd; poses as KITTI or TUM text, or .feather.
This file needs data.py beside it.
"""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

import data
from data import DataError

CLOUD_SUFFIXES = (".feather", ".bin", ".npy", ".npz", ".ply", ".pcd")
POSE_FILES = ("poses.txt", "city_SE3_egovehicle.feather")  # in the folder, or in the one above
MAX_POSE_GAP_NS = 1e6  # a pose belongs to a cloud if their times differ by at most 1 ms
GROUND_REACH_M = 100  # is_ground_without_map looks this far in x and y


Array = np.ndarray | torch.Tensor


def open_folder(
    folder: Path,
    true_flow: bool,
    ground: str,
    pairs_per_log: int | None,
    sweeps_per_log: int | None,
    poses: str | Path | None,
    rate_hz: float,
) -> CloudPairs:
    """The reader that `data.open_dataset` calls for any folder without logs; its arguments.

    Raises DataError if there are no clouds, and then lists what is there instead.
    """
    # true_flow makes no difference: clouds come without annotations.
    if not list_clouds(folder):
        raise DataError(_what_is_there(folder))
    return CloudPairs(folder, ground, pairs_per_log, sweeps_per_log, poses, rate_hz)


def _what_is_there(folder: Path) -> str:
    """The message for a folder that is not a data set: most often it is one level too high."""
    splits = []
    for child in sorted(child for child in folder.iterdir() if child.is_dir()):
        has_logs = any(data.is_log(grandchild) for grandchild in child.iterdir())
        if has_logs or data.is_waymo(child) or list_clouds(child):
            splits.append(child.name)
    if splits:
        example = folder / splits[0]
        return f"{folder}: holds the splits {', '.join(splits)}; choose one, as in {example}"
    return (
        f"{folder}: no Argoverse 2 log in it (a log is a folder with sensors/lidar/<timestamp_ns>"
        ".feather), no Waymo split (with lidar and vehicle_pose), and no clouds "
        f"({', '.join(CLOUD_SUFFIXES)})"
    )


class CloudPairs(data.Pairs):
    """Pairs of a folder of clouds, each in its own sensor frame, and their poses.

    The log id is the name of the folder and of the one above: many folders are called velodyne.
    ground: "auto" or "points" (see `is_ground_without_map`), or "none".
    pairs_per_log, sweeps_per_log: see `data.open_dataset`.
    poses: a file for `read_poses`; None: the first of POSE_FILES in the folder or the one above.
    Without any, all clouds are taken to be in one frame, and `notes` reports it.
    rate_hz: sweeps per second, for names that are not times.
    Raises DataError naming the folder or file.
    """

    def __init__(
        self,
        folder: str | Path,
        ground: str = "auto",
        pairs_per_log: int | None = None,
        sweeps_per_log: int | None = None,
        poses: str | Path | None = None,
        rate_hz: float = 10.0,
    ):
        super().__init__()
        folder = Path(folder)
        self.ground = "points" if ground == "auto" else ground
        if self.ground not in GROUND_WITHOUT_MAP:
            raise DataError(
                f"{folder}: clouds have no map for ground {ground!r}; choose points or none"
            )
        if not rate_hz > 0:
            raise DataError(f"rate_hz {rate_hz}: give the number of sweeps per second, such as 10")

        files, stamps_ns, has_times = self._stamp(list_clouds(folder), rate_hz)
        self.pose_file = _find_poses(folder) if poses is None else Path(poses)
        if self.pose_file is None:
            world_SE3_sensors = np.broadcast_to(np.eye(4), (len(files), 4, 4))
            hint = "name a pose file if they are not"
            self.notes.append(
                f"{folder}: no poses.txt: its clouds are taken to be in one frame; {hint}"
            )
        else:
            times_ns = stamps_ns if has_times else None
            found = read_poses(self.pose_file, folder, len(files), times_ns)
            world_SE3_sensors, self.notes = found

        # Of two clouds with the same time (0.npy and 000000.npy) the first counts.
        self._sweeps: dict[int, tuple[Path, np.ndarray]] = {}
        for stamp, file, pose in zip(stamps_ns, files, world_SE3_sensors, strict=True):
            if stamp in self._sweeps:
                other = self._sweeps[stamp][0].name
                self.skipped.append(f"{file}: has the time of {other}; remove one of them")
            else:
                self._sweeps[stamp] = (file, pose)
        log_id = f"{data.log_id_of(data.parent_of(folder))}-{data.log_id_of(folder)}"
        max_gap_ns = round(
            1.5e9 / rate_hz
        )  # one and a half sweeps: a longer gap is a missing sweep
        self.add_log(folder, log_id, self._sweeps, pairs_per_log, sweeps_per_log, max_gap_ns)

    def _stamp(self, files: list[Path], rate_hz: float) -> tuple[list[Path], list[int], bool]:
        """The files that are sweeps, their times in ns, and whether these came from the names."""
        numbers = {file: _name_as_number(file.stem) for file in files}
        numbered = [file for file in files if numbers[file] is not None]

        # Where most names are not numbers (frame_a, frame_b), only their order counts.
        if 2 * len(numbered) <= len(files):
            return files, [round(i * 1e9 / rate_hz) for i in range(len(files))], False

        # Otherwise the few other files are something else, such as map.ply.
        for file in files:
            if numbers[file] is None:
                reason = "its name is not a number, as the others are; remove or rename it"
                self.skipped.append(f"{file}: {reason}")

        # Large numbers are times since 1970. A decimal point means seconds (perhaps since the start
        # of a machine). Small whole numbers count sweeps, so that a missing number is a gap.
        largest = max(numbers[file] for file in numbered)
        unit_ns = _unit_ns(largest)
        if unit_ns is None and isinstance(largest, Fraction):
            unit_ns = 1_000_000_000
        if unit_ns is None:
            return numbered, [round(numbers[file] * 1e9 / rate_hz) for file in numbered], False
        return numbered, [int(numbers[file] * unit_ns) for file in numbered], True

    def read(self, key: data.PairKey) -> data.SweepPair:
        points, is_ground, world_SE3_sensors = [], [], []
        for stamp in (key.timestamp0_ns, key.timestamp1_ns):
            file, world_SE3_sensor = self._sweeps[stamp]
            try:
                world_SE3_sensors.append(check_pose(world_SE3_sensor))
            except ValueError as error:
                reason = f"no pose for {file.name} ({error})"
                raise DataError(f"{self.pose_file}: {reason}; remove that cloud") from error
            # A bad row becomes NaN but stays, so that row i of the file is row i of the pair.
            points.append(data.nan_bad_rows(read_cloud(file)))
            is_ground.append(GROUND_WITHOUT_MAP[self.ground](points[-1]))
        sensor1_SE3_sensor0 = data.inverse(world_SE3_sensors[1]) @ world_SE3_sensors[0]
        return data.make_pair(key, points, is_ground, sensor1_SE3_sensor0, {})


def pair_of_clouds(
    points0: Array,
    points1: Array,
    ego1_SE3_ego0: Array | None = None,
    is_ground0: Array | None = None,
    is_ground1: Array | None = None,
) -> data.SweepPair:
    """A pair from your own clouds (N0, 3), (N1, 3), each in its own ego frame.

    Without a pose, both are taken to be in the same frame. Ground (N0,), (N1,) bool: if not given,
    no point is ground. Raises ValueError where shapes do not fit.
    """
    pose = np.eye(4) if ego1_SE3_ego0 is None else check_pose(ego1_SE3_ego0)
    clouds, masks = [], []
    for name, points, is_ground in (("0", points0, is_ground0), ("1", points1, is_ground1)):
        points = _to_float64(points)
        if points.ndim != 2 or points.shape[1] != 3:
            wanted = "expected (N, 3); drop other columns"
            raise ValueError(f"cloud {name} has shape {points.shape}, {wanted}")
        mask = np.zeros(len(points), dtype=bool)
        if isinstance(is_ground, torch.Tensor):
            mask = is_ground.cpu().numpy()
        elif is_ground is not None:
            mask = np.array(is_ground)
        # Numbers are refused as a mask: they may well be the indices of rows.
        if mask.shape != (len(points),) or mask.dtype != bool:
            wanted = f"expected a bool for each of {len(points)} points"
            raise ValueError(f"ground {name} is {mask.shape} {mask.dtype}, {wanted}")
        clouds.append(points)
        masks.append(mask)
    return data.make_pair(data.PairKey("", 0, 0), clouds, masks, pose, {})


def _to_float64(values: Array) -> np.ndarray:
    """Of a tensor or an array, which may be reversed or in a byte order that torch refuses."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def list_clouds(folder: Path) -> list[Path]:
    """The clouds in a folder, sorted by name; frame9 comes before frame10."""
    # Feather files are left out: in such a folder they are Argoverse 2's poses or annotations.
    suffixes = [suffix for suffix in CLOUD_SUFFIXES if suffix != ".feather"]
    files = [folder / name for name in os.listdir(folder) if not name.startswith(".")]
    files = [file for file in files if file.suffix in suffixes]

    def by_number(file: Path) -> list[str | int]:
        pieces = re.split(r"([0-9]+)", file.name)  # text, digits, text, digits ...
        return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]

    return sorted(files, key=by_number)


def _name_as_number(stem: str) -> int | Fraction | None:
    """Exact: as a float, today's time in seconds would have steps of a quarter microsecond."""
    if re.fullmatch(r"[0-9]{1,19}", stem):
        return int(stem)
    if re.fullmatch(r"[0-9]{1,11}\.[0-9]{1,9}", stem):
        return Fraction(stem)
    return None


def _unit_ns(largest: int | float | Fraction) -> int | None:
    """The unit, in ns, of times since 1970; None if they are too small for ms, us, or ns."""
    # Today is 1.7e9 s = 1.7e12 ms = 1.7e15 us = 1.7e18 ns. The limits lie between these sizes.
    for smallest, unit_ns in ((1e17, 1), (1e14, 1_000), (1e11, 1_000_000)):
        if largest >= smallest:
            return unit_ns
    return None


# --- Clouds ---------------------------------------------------------------------------------------


def read_cloud(file: str | Path) -> np.ndarray:
    """(N, 3): the points of a file, in its own floating dtype.

    .feather: the columns x, y, z. .bin: KITTI's rows of x, y, z, intensity, float32. .npy: an
    array (N, 3 or more) of which the first three columns count. .npz: the same, as the only array
    or the one called points. .ply (ascii, binary) and .pcd (ascii, binary, compressed): the fields
    x, y, z of any type; VIEWPOINT is not applied. Raises DataError naming the file and the remedy.
    """
    file = Path(file)
    if file.suffix == ".feather":
        return data.read_points(file)
    if file.suffix not in _READERS:
        formats = ", ".join(CLOUD_SUFFIXES)
        raise DataError(f"{file}: not a format of clouds; convert it to one of {formats}")
    return data.read_points(file, _READERS[file.suffix])


def _read_kitti(file: Path) -> np.ndarray:
    values = np.fromfile(file, dtype="<f4")
    size = file.stat().st_size
    if size % 16:
        raise ValueError(f"{size} bytes are not a whole number of rows of four float32 numbers")
    return values.reshape(-1, 4)


def _read_npy(file: Path) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def _read_npz(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        if "points" in arrays:
            return arrays["points"]
        if len(arrays.files) != 1:
            raise ValueError(f"it holds {arrays.files}, and none of them is called points")
        return arrays[arrays.files[0]]


# PLY's older names of types; the newer ones (int8 ... float64) are NumPy's own.
_PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
_PLY_TYPES |= {"float": "f4", "double": "f8"}
_PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


def _read_ply(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header = re.match(rb"ply\s.*?\nend_header\r?\n", content, re.DOTALL)
    if not header:
        raise ValueError("it does not begin with ply ... end_header")
    form, elements = _parse_ply_header(header[0].decode("ascii", "replace"))

    # The elements follow each other without gaps, each as `count` rows of its properties. Walk over
    # them until the vertices. `lines` is what remains of a text file, `body` of a binary one.
    body = content[header.end() :]
    lines = body.split(b"\n") if form == "ascii" else []
    for element, count, properties in elements:
        if "list" in properties.values():  # its rows differ in length, so it cannot be skipped
            raise ValueError(f"a list among or before the vertices, in {element}, is not supported")
        fields = []
        for name, kind in properties.items():
            fields.append((name, np.dtype(kind).newbyteorder(_PLY_ORDERS[form])))
        row = np.dtype(fields)
        if element == "vertex" and form == "ascii":
            return _text_xyz(lines, count, row.names)
        if element == "vertex":
            return _stack_xyz(np.frombuffer(body, row, count))
        lines = lines[count:]
        body = body[count * row.itemsize :]
    raise ValueError("it has no vertices")


def _parse_ply_header(header: str) -> tuple[str, list[tuple[str, int, dict[str, str]]]]:
    """The format, and of each element its name, number of rows, and property -> NumPy's type."""
    form, elements = "", []
    for line in header.splitlines():
        match line.split():
            case ["format", form, _]:
                pass
            case ["element", name, count]:
                elements.append((name, int(count), {}))
            case ["property", kind, *_, name]:
                properties = elements[-1][2]
                properties[name] = _PLY_TYPES.get(kind, kind)
    return form, elements


def _read_pcd(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header_end = re.search(rb"^DATA\s+(\w+)[^\n]*\n", content, re.MULTILINE)
    if not header_end:
        raise ValueError("it has no line DATA")
    form, body = header_end[1], content[header_end.end() :]
    header = {}  # first word of a line -> the other words
    for line in content[: header_end.end()].decode("ascii", "replace").splitlines():
        words = line.split()
        if words:
            header[words[0]] = words[1:]
    row, count = _pcd_row(header), int(header["POINTS"][0])

    if form == b"ascii":
        return _text_xyz(body.split(b"\n"), count, row.names)
    if form == b"binary":
        return _stack_xyz(np.frombuffer(body, row, count))
    if form != b"binary_compressed":
        raise ValueError(f"its DATA is {form}")

    # Compressed: two sizes, then all values of the first field, all of the second, and so on.
    packed_size, unpacked_size = np.frombuffer(body, "<u4", 2).tolist()
    unpacked = _unpack_lzf(body[8 : 8 + packed_size], unpacked_size)
    columns = {}
    for name, (kind, offset) in row.fields.items():
        # A field that begins `offset` bytes into a row begins `count * offset` bytes into this.
        columns[name] = np.frombuffer(unpacked, kind, count, count * offset)
    return _stack_xyz(columns)


def _pcd_row(header: dict[str, list[str]]) -> np.dtype:
    """One point of a .pcd file as a structured dtype."""
    names = header["FIELDS"]
    counts = header.get("COUNT", ["1"] * len(names))
    fields = []
    for name, size, kind, count in zip(names, header["SIZE"], header["TYPE"], counts, strict=True):
        dtype = f"<{kind.lower()}{size}"  # F 4 becomes <f4
        if name in ("x", "y", "z"):
            fields.append((name, dtype))
            continue
        # Other names may occur twice (padding is called _), and one field may be several numbers.
        # Each number becomes a field with a name of its own; none of them is read.
        for _ in range(int(count)):
            fields.append((f"{len(fields)} {name}", dtype))
    return np.dtype(fields)


def _unpack_lzf(packed: bytes, size: int) -> bytes:
    """Undo LZF compression. Raises ValueError or IndexError unless it gives `size` bytes."""
    output, position = bytearray(), 0
    while position < len(packed):
        control = packed[position]
        position += 1

        # A control byte below 32: the next `control + 1` bytes are copied as they are.
        if control < 32:
            output += packed[position : position + control + 1]
            position += control + 1
            continue

        # Otherwise earlier output repeats. Its length is in the upper three bits, less 2; if they
        # are all set, the next byte adds to it. The other five bits and one more byte say how far
        # back it starts, less 1.
        length = (control >> 5) + 2
        if length == 7 + 2:
            length += packed[position]
            position += 1
        distance = ((control & 31) << 8) + packed[position] + 1
        position += 1
        start = len(output) - distance
        if start < 0:
            raise ValueError("its compressed part refers to bytes before its beginning")
        for i in range(start, start + length):  # one by one: it may repeat bytes it just wrote
            output.append(output[i])
    if len(output) != size:
        raise ValueError(f"its compressed part has {len(output)} bytes, expected {size}")
    return bytes(output)


def _stack_xyz(columns: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """(N, 3) from a structured array, or a dict of columns, with the names x, y, z."""
    return np.stack([columns[axis] for axis in "xyz"], axis=1)


def _text_xyz(lines: list[bytes], count: int, names: tuple[str, ...]) -> np.ndarray:
    """(count, 3): x, y, z from rows of numbers as text; names: of all columns."""
    columns = [names.index(axis) for axis in "xyz"]
    points = np.loadtxt(lines[:count], usecols=columns, ndmin=2)
    if len(points) != count:
        raise ValueError(f"it has {len(points)} points, expected {count}")
    return points


_READERS = {
    ".bin": _read_kitti,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".ply": _read_ply,
    ".pcd": _read_pcd,
}


# --- Poses ----------------------------------------------------------------------------------------


def read_pose(file: str | Path) -> np.ndarray:
    """A rigid transform (4, 4) float64 from .npy or four lines of text. Raises DataError."""
    file = Path(file)
    try:
        if file.suffix == ".npy":
            return check_pose(np.load(file, allow_pickle=False))
        return check_pose(np.loadtxt(file.read_text().splitlines()))
    except Exception as error:  # np.load and np.loadtxt raise many kinds
        raise DataError(f"{file}: not a 4 x 4 pose as text or .npy ({error})") from error


def check_pose(pose: Array) -> np.ndarray:
    """The pose as (4, 4) float64. Raises ValueError unless it is a rotation and a translation."""
    pose = _to_float64(pose)
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise ValueError(f"its shape is {pose.shape}, expected (4, 4), all finite")
    rotation = pose[:3, :3]
    is_orthogonal = np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-3
    if not is_orthogonal or np.linalg.det(rotation) <= 0:
        raise ValueError("its upper left 3 x 3 is not a rotation: does it scale or mirror?")
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise ValueError("its last row is not 0 0 0 1: is it transposed?")
    return pose


def _find_poses(folder: Path) -> Path | None:
    for place in (folder, data.parent_of(folder)):
        for name in POSE_FILES:
            if (place / name).is_file():
                return place / name
    return None


def read_poses(
    file: Path, folder: Path, count: int, times_ns: list[int] | None
) -> tuple[np.ndarray, list[str]]:
    """world_SE3_sensor (count, 4, 4) of the clouds of a folder, and notes for the user.

    Rows of 12 numbers are KITTI's 3 x 4, one per cloud, in the order of the clouds. Rows of 8 are
    TUM's `time tx ty tz qx qy qz qw` (in s, or by their size ms, us, or ns). A .feather file has
    Argoverse 2's columns. times_ns: when the clouds were taken, if their names tell; None: poses
    are matched by order. A cloud without a pose within 1 ms gets NaN. Raises DataError naming the
    file.
    """
    pose_ns, world_SE3_sensors, notes = _read_pose_rows(file)
    if pose_ns is None or times_ns is None:
        found = len(world_SE3_sensors)
        if found != count:
            raise DataError(
                f"{file}: has {found} poses for the {count} clouds of {folder}; give one each"
            )
        return world_SE3_sensors, notes

    # Match by time: a pose file often has more poses than there are clouds, in any order.
    if not np.isfinite(pose_ns).all():
        raise DataError(f"{file}: has a time that is not finite; make it again, or give another")
    times_ns = np.array(times_ns, dtype=float)
    gap_ns, nearest = cKDTree(pose_ns[:, None]).query(times_ns[:, None])
    has_pose = gap_ns <= MAX_POSE_GAP_NS
    if not has_pose.any():
        reason = f"has no pose within 1 ms of any cloud of {folder}"
        raise DataError(f"{file}: {reason}; do its times start at another moment?")
    return np.where(has_pose[:, None, None], world_SE3_sensors[nearest], np.nan), notes


def _read_pose_rows(file: Path) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Times (M,) in ns as float64, if the file has them; poses (M, 4, 4); notes."""
    if file.suffix == ".feather":
        columns = ["timestamp_ns", *data.POSE_COLUMNS]
        rows = data.read_numbers(file, data.read_feather(file, columns), columns)
        return rows[:, 0], data.poses_from_rows(rows[:, 1:]), []
    try:
        lines = file.read_text().split("\n")
        if not any(lines):
            raise ValueError("it is empty")
        rows = np.loadtxt(lines, ndmin=2)
        if rows.shape[1] not in (8, 12):
            found = f"it has {rows.shape[1]} numbers per row"
            raise ValueError(f"{found}, expected 12 (KITTI) or 8 (TUM)")
    except (OSError, ValueError) as error:
        reason = f"its poses cannot be read ({error})"
        raise DataError(f"{file}: {reason}; make it again, or give another") from error
    if rows.shape[1] == 12:
        poses, notes = _kitti_poses(rows, file.with_name("calib.txt"))
        return None, poses, notes
    # float64 holds times in ns to within 128 ns, and 1 ms is all that matters here.
    unit_ns = _unit_ns(rows[:, 0].max()) or 1_000_000_000
    poses = data.poses_from_rows(rows[:, [7, 4, 5, 6, 1, 2, 3]])  # TUM has w last, rotation last
    return rows[:, 0] * unit_ns, poses, []


def _kitti_poses(rows: np.ndarray, calibration: Path) -> tuple[np.ndarray, list[str]]:
    """world_SE3_sensor (N, 4, 4) from rows (N, 12), and notes."""
    rows = rows.reshape(-1, 3, 4)
    poses = data.rigid(rows[..., :3], rows[..., 3])
    if not calibration.is_file():
        return poses, []

    # KITTI's own poses are of its left camera, camera0_SE3_camera. Its calib.txt has Tr, which is
    # camera_SE3_lidar; with it they become the lidar's, in the frame of its first sweep.
    try:
        lines = calibration.read_text().splitlines()
        lines = [line for line in lines if line.startswith("Tr:")]
        if not lines:
            return poses, []
        values = np.array(lines[0].split()[1:], dtype=float)
        camera_SE3_lidar = np.vstack([values.reshape(3, 4), (0, 0, 0, 1)])
    except (OSError, ValueError) as error:
        reason = f"its Tr is not a 3 x 4 pose ({error})"
        raise DataError(f"{calibration}: {reason}; make it again or remove it") from error
    note = "by its Tr, KITTI's camera poses were made lidar poses; remove it if they were already"
    return data.inverse(camera_SE3_lidar) @ poses @ camera_SE3_lidar, [f"{calibration}: {note}"]


# --- Ground without a map -------------------------------------------------------------------------


def is_ground_without_map(points: np.ndarray) -> np.ndarray:
    """(N,) bool: ground among the points (N, 3) of one sweep, from the points alone; z up.

    The height of the frame's origin does not matter. Points that are not finite, or 100 m away, are
    not ground; nothing is if no plane is found. The same points always give the same mask. All
    numbers were chosen on synthetic streets, level and hilly.
    """
    is_ground = np.zeros(len(points), dtype=bool)
    is_near = (np.abs(points) < GROUND_REACH_M).all(axis=1)  # False for NaN
    rows = np.flatnonzero(is_near)
    near = points[rows].astype(np.float64)  # (M, 3)

    # Cells of 1 m: the lowest point of a cell is the best guess of the ground there.
    side = 2 * GROUND_REACH_M
    cell_x = np.floor(near[:, 0]).astype(int) + GROUND_REACH_M
    cell_y = np.floor(near[:, 1]).astype(int) + GROUND_REACH_M
    cell = cell_x * side + cell_y  # (M,)

    # First a plane through the lowest points, which takes out the tilt and height of the sensor.
    plane = _ground_plane(_lowest(near[:, 2], cell, side))
    if plane is None:
        return is_ground
    height = near[:, 2] - near[:, :2] @ plane[:2] - plane[2]  # (M,) above the plane

    # Then two smooth surfaces above it: a coarse one that follows hills, and a fine one. Ground is
    # sought only in a band around the last surface; it widens with range, as errors of tilt do.
    range_m = np.hypot(near[:, 0], near[:, 1])
    for band_m, widening, scales_m in ((0.6, 0.03, (8, 4)), (0.3, 0.01, (8, 3, 1))):
        is_in_band = np.abs(height) < band_m + widening * range_m
        lowest = _lowest(height[is_in_band], cell[is_in_band], side)
        surface = _smooth_floor(lowest, scales_m)
        height -= surface.ravel()[cell]

    # Points below the surface are reflections, and count as ground, as they do with a map.
    is_ground[rows] = height <= 0.35
    return is_ground


def _lowest(height: np.ndarray, cell: np.ndarray, side: int) -> np.ndarray:
    """(side, side): the lowest height in each cell, infinite in cells without a point."""
    lowest = np.full(side * side, np.inf)
    np.minimum.at(lowest, cell, height)
    return lowest.reshape(side, side)


def _ground_plane(lowest: np.ndarray) -> np.ndarray | None:
    """(a, b, c) of z = a x + b y + c through the lowest points within 40 m, by RANSAC.

    None if there are fewer than 10, or if every plane tried is steeper than 15 degrees.
    """
    is_known = np.isfinite(lowest)
    centers = np.argwhere(is_known) - GROUND_REACH_M + 0.5  # (K, 2) x, y of the cells' centers
    points = np.column_stack([centers, lowest[is_known]])
    points = points[np.hypot(centers[:, 0], centers[:, 1]) < 40]
    if len(points) < 10:
        return None

    # Try 200 planes through three points each. The fixed seed makes the mask reproducible.
    chosen = np.random.default_rng(0).integers(len(points), size=(3, 200))
    corner0, corner1, corner2 = points[chosen]
    normal = np.cross(corner1 - corner0, corner2 - corner0)  # (200, 3)
    is_level = np.abs(normal[:, 2]) > np.cos(np.radians(15)) * np.linalg.norm(normal, axis=1)
    if not is_level.any():
        return None
    slopes = -normal[is_level, :2] / normal[is_level, 2:]
    offsets = corner0[is_level, 2] - (slopes * corner0[is_level, :2]).sum(axis=1)

    # Keep the plane that explains the most points to within 20 cm ...
    residual = points[:, 2] - slopes @ points[:, :2].T - offsets[:, None]  # (planes, points)
    best = (np.abs(residual) < 0.2).sum(axis=1).argmax()
    plane = np.array([*slopes[best], offsets[best]])

    # ... and fit it to all of those by least squares, twice, since the first fit may gain points.
    xy1 = np.column_stack([points[:, :2], np.ones(len(points))])
    for _ in range(2):
        is_inlier = np.abs(points[:, 2] - xy1 @ plane) < 0.2
        plane = np.linalg.lstsq(xy1[is_inlier], points[is_inlier, 2], rcond=None)[0]
    return plane


def _smooth_floor(lowest: np.ndarray, scales_m: tuple[float, ...]) -> np.ndarray:
    """(side, side): a smooth height for every cell; scales_m: widths of the smoothing, in order."""
    # A cell 0.3 m above one of its 5 x 5 neighbors holds the side of a car, not ground.
    is_floor = lowest < ndimage.minimum_filter(lowest, 5) + 0.3
    floor = np.where(is_floor, lowest, 0.0)

    # Normalized Gaussian smoothing: the sum of heights over the sum of weights. The coarser surface
    # has the small weight 0.05: it fills the holes, where no cell with ground is near.
    surface = np.zeros_like(lowest)
    for scale in scales_m:
        weight = ndimage.gaussian_filter(is_floor * 1.0, scale, truncate=3)
        total = ndimage.gaussian_filter(floor, scale, truncate=3)
        surface = (total + 0.05 * surface) / (weight + 0.05)
    return surface


def _no_ground(points: np.ndarray) -> np.ndarray:
    return np.zeros(len(points), dtype=bool)


GROUND_WITHOUT_MAP = {"points": is_ground_without_map, "none": _no_ground}
