"""Your own LiDAR: folders of clouds, their times and poses, and ground without a map.

Points are (N, 3) in meters, in the frame of the sensor at that sweep, z up; it plays the part of
the ego frame. Poses are world_SE3_sensor (4 x 4, float64). Times are in nanoseconds. Clouds have no
annotations, so their pairs have no true flow. ZeroFlow (Vedder et al., ICLR 2024) takes its ground
from Argoverse 2's maps; the rule without a map is this project's own.

Clouds may be in any format of formats.py; poses are KITTI or TUM text, or .feather. This file needs
data.py and formats.py beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

import data
from data import DataError
from formats import CLOUD_SUFFIXES, read_bin, read_cloud

POSE_FILES = ("poses.txt", "city_SE3_egovehicle.feather")  # looked for in `_places`
MIN_RANGE_M = 2.5  # nearer points are the ego's own body: in KITTI its roof, 32 points of a sweep
MAX_POSE_GAP_NS = 1e6  # a pose belongs to a cloud if their times differ by at most 1 ms
# Names that many folders share, in lower case. The name above them tells one drive from another.
GENERIC_FOLDERS = (
    "bin clouds data lidar lidar_top pcd pcds ply pointcloud pointclouds points samples scans "
    "sensors sweeps velodyne velodyne_points"
).split()
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
    columns: int | None = None,
    min_range_m: float | None = None,
) -> CloudPairs:
    """The reader that `data.open_dataset` calls for any folder without logs, with its arguments.

    Raises DataError if there are no clouds, and then lists what is there instead.
    """
    # true_flow makes no difference: clouds come without annotations.
    if not list_clouds(folder):
        raise DataError(_what_is_there(folder))
    return CloudPairs(
        folder, ground, pairs_per_log, sweeps_per_log, poses, rate_hz, columns, min_range_m
    )


def _what_is_there(folder: Path) -> str:
    """The message for a folder that is not a data set: usually the user gave a parent of one."""
    level = [folder]
    for _ in range(3):
        level = [child for place in level for child in _subfolders(place)][:1000]
        splits = [place for place in level if _is_split(place)]
        if splits:
            names = ", ".join(str(split.relative_to(folder)) for split in splits[:20])
            return f"{folder}: holds the splits {names}; choose one, as in {splits[0]}"
    return (
        f"{folder}: no Argoverse 2 log in it (a log is a folder with sensors/lidar/<timestamp_ns>"
        ".feather), no Waymo split (with lidar and vehicle_pose), and no clouds "
        f"({', '.join(CLOUD_SUFFIXES)})"
    )


def _subfolders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):  # `data.open_dataset` reports a folder that cannot be read
        return data.subfolders(folder, lambda _: True)[0]
    return []


def _is_split(folder: Path) -> bool:
    with contextlib.suppress(OSError, DataError):
        has_logs = any(data.is_log(child) for child in _subfolders(folder))
        return has_logs or data.is_waymo(folder) or bool(list_clouds(folder))
    return False


class CloudPairs(data.Pairs):
    """Pairs of a folder of clouds, each in its own sensor frame, and their poses.

    The log id is the name of the folder and of those above, up to one that is not generic: many
    folders are called velodyne_points/data. `notes` reports how names and files were interpreted.
    ground: "auto" or "points" (see `is_ground_without_map`), or "none".
    pairs_per_log, sweeps_per_log: see `data.open_dataset`.
    poses: a file for `read_poses`; None: the first of POSE_FILES in the folder, in the one above,
    or above folders with generic names. Without any, all clouds are taken to be in one frame.
    rate_hz: sweeps per second, for names that are not times.
    columns: see `read_cloud`. min_range_m: see `no_returns_to_nan`; None: MIN_RANGE_M.
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
        columns: int | None = None,
        min_range_m: float | None = None,
    ):
        super().__init__()
        folder = Path(folder)
        self.ground = "points" if ground == "auto" else ground
        if self.ground not in GROUND_WITHOUT_MAP:
            raise DataError(
                f"{folder}: clouds have no map for ground {ground!r}; choose points or none"
            )
        if not 0 < rate_hz < math.inf:
            raise DataError(f"rate_hz {rate_hz}: give the number of sweeps per second, such as 10")
        self.columns = columns
        self.min_range_m = MIN_RANGE_M if min_range_m is None else min_range_m
        if not 0 <= self.min_range_m < math.inf:
            raise DataError(f"min_range_m {min_range_m}: give meters, or 0 for no limit")

        files, stamps_ns, has_times = self._stamp(folder, rate_hz)
        places = _places(folder)
        self.pose_file = _find_poses(places) if poses is None else Path(poses)
        if self.pose_file is None:
            world_SE3_sensors = np.broadcast_to(np.eye(4), (len(files), 4, 4))
            hint = "name a pose file if they are not"
            self.notes.append(
                f"{folder}: no poses.txt: its clouds are taken to be in one frame; {hint}"
            )
        else:
            times_ns = stamps_ns if has_times else None
            found = read_poses(self.pose_file, folder, len(files), times_ns)
            world_SE3_sensors, notes = found
            self.notes += notes

        # If two clouds have the same time (0.npy and 000000.npy), the first one is used.
        self._sweeps: dict[int, tuple[Path, np.ndarray]] = {}
        for stamp, file, pose in zip(stamps_ns, files, world_SE3_sensors, strict=True):
            if stamp in self._sweeps:
                other = self._sweeps[stamp][0].name
                self.skipped.append(f"{file}: has the same time as {other}; remove one of them")
            else:
                self._sweeps[stamp] = (file, pose)
        log_id = "-".join(data.log_id_of(place) for place in reversed(places))
        log_id = log_id.encode(errors="backslashreplace").decode()  # it may not be UTF-8
        # A gap longer than one and a half sweeps means that a sweep is missing.
        max_gap_ns = round(1.5e9 / rate_hz)
        self.add_log(folder, log_id, self._sweeps, pairs_per_log, sweeps_per_log, max_gap_ns)
        with contextlib.suppress(DataError):  # an unreadable cloud is reported with its pair
            self._note_points(files[0])

    def _stamp(self, folder: Path, rate_hz: float) -> tuple[list[Path], list[int], bool]:
        """The files that are sweeps, their times in ns, and whether these came from the names."""
        listed = list_clouds(folder)
        stamps, has_times, how = _times_of(listed, rate_hz)
        self.notes.append(f"{folder}: {how}")
        files, stamps_ns = [], []
        for file, stamp in zip(listed, stamps, strict=True):
            if stamp is None:  # it is something else, such as map.ply
                kind = "time" if has_times else "number"
                reason = f"its name is not a {kind}, as the others are; remove or rename it"
                self.skipped.append(f"{file}: {reason}")
            else:
                files.append(file)
                stamps_ns.append(stamp)
        return files, stamps_ns, has_times

    def _note_points(self, file: Path) -> None:
        """Add notes on how a cloud was interpreted, where this is not obvious."""
        points = read_cloud(file, self.columns)
        if file.suffix.lower() == ".bin":
            rows = read_bin(file, self.columns)
            if (rows.shape[1], rows.dtype) != (4, "<f4"):  # not KITTI's
                found = f"{rows.shape[1]} {rows.dtype.name} numbers (--columns)"
                self.notes.append(f"{file}: read as rows of {found}")
        is_return = np.isfinite(data.nan_bad_rows(points)).all(axis=1)
        is_kept = np.isfinite(no_returns_to_nan(points, self.min_range_m)).all(axis=1)
        if not is_kept.all():
            near = (is_return & ~is_kept).sum()
            self.notes.append(
                f"{file}: of its {len(points):,} points, {(~is_return).sum():,} are not returns "
                f"(0 0 0, or not finite) and {near:,} are nearer than {self.min_range_m:g} m "
                "(--min-range-m); such points are ignored in all clouds"
            )

    def read(self, key: data.PairKey) -> data.SweepPair:
        names, points, is_ground, world_SE3_sensors = [], [], [], []
        for stamp in (key.timestamp0_ns, key.timestamp1_ns):
            file, world_SE3_sensor = self._sweeps[stamp]
            names.append(file.name)
            problem = f"no pose for {file.name}"
            with data.naming(self.pose_file, problem, "correct it or remove that cloud"):
                world_SE3_sensors.append(check_pose(world_SE3_sensor))
            # A bad row becomes NaN but stays, so that row i of the file is row i of the pair.
            cloud = no_returns_to_nan(read_cloud(file, self.columns), self.min_range_m)
            if not np.isfinite(cloud).any():
                reason = f"none of its points is {self.min_range_m:g} m away or more"
                raise DataError(f"{file}: {reason}; are they in meters? See --min-range-m")
            points.append(cloud)
            is_ground.append(GROUND_WITHOUT_MAP[self.ground](cloud))

        sensor1_SE3_sensor0 = data.inverse(world_SE3_sensors[1]) @ world_SE3_sensors[0]
        if self.pose_file is not None:
            problem = f"wrong poses of {names[0]} and {names[1]}, {key.seconds:g} s apart"
            with data.naming(self.pose_file, problem, "correct the poses or --rate-hz"):
                data.check_ego_motion(sensor1_SE3_sensor0, key.seconds)
        lidar = np.zeros(3)  # the sensor frame begins there
        return data.make_pair(key, points, is_ground, sensor1_SE3_sensor0, {}, lidar)


def no_returns_to_nan(points: np.ndarray, min_range_m: float = MIN_RANGE_M) -> np.ndarray:
    """(N, 3) float64 in the sensor's frame; rows that are not returns become NaN.

    Such rows are not finite, 0 0 0 (a ray without an echo), or nearer to the origin than
    min_range_m: those belong to the ego's own body and would seem to move like the ego.
    """
    points = data.nan_bad_rows(points)
    is_near = (points**2).sum(axis=1) < min_range_m**2  # False for NaN
    points[is_near] = np.nan
    return points


def pair_of_clouds(
    points0: Array,
    points1: Array,
    ego1_SE3_ego0: Array | None = None,
    is_ground0: Array | None = None,
    is_ground1: Array | None = None,
) -> data.SweepPair:
    """A pair from your own clouds (N0, 3), (N1, 3), each in its own ego frame.

    Without a pose, both are taken to be in the same frame. Ground (N0,), (N1,) bool: if not given,
    no point is ground. A row that is not finite or 0 0 0 becomes NaN. Raises ValueError where
    shapes do not fit.
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
        # A mask of numbers is refused: they may be row indices.
        if mask.shape != (len(points),) or mask.dtype != bool:
            wanted = f"expected a bool for each of {len(points)} points"
            raise ValueError(f"ground {name} is {mask.shape} {mask.dtype}, {wanted}")
        clouds.append(data.nan_bad_rows(points))
        masks.append(mask)
    return data.make_pair(data.PairKey("", 0, 0), clouds, masks, pose, {})


def _to_float64(values: Array) -> np.ndarray:
    """The values as float64; an array may be reversed, or in a byte order that torch refuses."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def list_clouds(folder: Path) -> list[Path]:
    """The clouds in a folder, sorted by name; frame9 comes before frame10. Raises DataError."""
    with data.naming(folder, "not a folder that can be read", "give a folder of clouds"):
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        names = [entry.name for entry in entries if not entry.is_dir()]
    files = []
    for name in names:
        file = folder / name
        # A Feather file is a sweep if its name is a time; others hold poses or annotations.
        is_table = file.suffix.lower() == ".feather" and not re.fullmatch("[0-9]{10,}", file.stem)
        if file.suffix.lower() in CLOUD_SUFFIXES and not is_table:
            files.append(file)

    def by_number(file: Path) -> list[str | int]:
        pieces = re.split(r"([0-9]+)", file.name)  # text, digits, text, digits ...
        return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]

    return sorted(files, key=by_number)


# --- Times from names -----------------------------------------------------------------------------

# Times inside names: ten digits are seconds since 1970, from 2001 to 2033; or a date. Three, six or
# nine digits of a fraction may follow directly (1532402927647951 has microseconds), or any number
# of digits after a mark (1583836591_582553088, 2021-10-26-16-21-29-468, 1700000000.5).
SINCE_1970 = "1[0-9]{9}"
DATE = "20[0-9]{2}([-_.]?[0-9]{2}){2}[-_.T ]?[0-9]{2}([-_.:]?[0-9]{2}){2}"
FRACTION = "((?P<mark>[-_.,])(?P<split>[0-9]{1,9})|(?P<joined>([0-9]{3}){0,3}))"
UNITS = {0: "seconds", 3: "milliseconds", 6: "microseconds", 9: "nanoseconds"}  # by decimals


def _times_of(files: list[Path], rate_hz: float) -> tuple[list[int | None], bool, str]:
    """The time of each file in ns (None: its name differs in kind from most); whether these are
    real times and not an order at an assumed rate; and a sentence about what was done."""
    stems = [file.stem for file in files]
    for whole, form in ((SINCE_1970, "{} since 1970"), (DATE, "date and time of day, to {}")):
        times_ns, decimals = _times_inside(stems, whole)
        if times_ns:
            return times_ns, True, f"names are times: {form.format(UNITS[decimals])}"

    # Numbers that are not times count sweeps, so that a missing number is a gap.
    assumed = f"{rate_hz:g} per second are assumed (--rate-hz)"
    numbers = _numbers_inside(stems)
    known = [number for number in numbers if number is not None]
    unit_ns = _unit_of_numbers(known)
    factor = Fraction(1e9 / rate_hz) if unit_ns is None else unit_ns
    if 2 * len(known) > len(stems) and max(known) * factor < 2**63:  # what an int64 holds
        stamps = [None if number is None else round(number * factor) for number in numbers]
        if unit_ns is None:
            return stamps, False, f"names count the clouds: {assumed}"
        unit = UNITS[9 - round(math.log10(unit_ns))]
        return stamps, True, f"names are times: {unit} since an unknown moment"

    # Where most names are not numbers (frame_a, frame_b), only their order counts.
    stamps = [round(i * 1e9 / rate_hz) for i in range(len(files))]
    return stamps, False, f"names give only the order of the clouds: {assumed}"


def _times_inside(stems: list[str], whole: str) -> tuple[list[int | None], int]:
    """Times in ns since 1970, and how many decimals of a second; [] if the names are not times."""
    # The last time in a name counts: the first may be that of the log.
    pattern = re.compile(f"(?<![0-9])(?P<whole>{whole}){FRACTION}(?![0-9])")
    found = []  # seconds (ten digits, or none), mark, fraction
    for stem in stems:
        matches = [*pattern.finditer(stem)]
        mark, split, joined = matches[-1].group("mark", "split", "joined") if matches else [""] * 3
        seconds = _seconds(matches[-1]["whole"]) if matches else ""
        found.append((seconds, mark, split or joined or ""))

    # After a point, 5 is 500 ms. After other marks programs often leave out leading zeros: where
    # the fractions of a folder differ in length, the longest tells if they are ms, us, or ns.
    lengths = {len(fraction) for seconds, _, fraction in found if seconds} or {0}
    decimals = -(-max(lengths) // 3) * 3
    width = max(lengths) if len(lengths) == 1 else decimals
    times_ns: list[int | None] = []
    for seconds, mark, fraction in found:
        fraction = fraction if mark == "." else fraction.zfill(width)
        times_ns.append(int((seconds + fraction).ljust(19, "0")) if seconds else None)

    # Most names must have a time of their own, and no sensor turns a thousand times per second: a
    # date that all names share is not their time, nor is the number behind it a fraction.
    distinct = sorted(set(times_ns) - {None})
    is_too_fast = len(distinct) > 1 and np.median(np.diff(distinct)) < 1e6
    is_time = 2 * len(distinct) > len(stems) and not is_too_fast
    return (times_ns if is_time else []), decimals


def _seconds(whole: str) -> str:
    """Ten digits, the seconds since 1970, from such digits or a date (UTC); "" if there is none."""
    if re.fullmatch(SINCE_1970, whole):
        return whole
    try:
        moment = datetime.datetime.strptime(re.sub("[^0-9]", "", whole), "%Y%m%d%H%M%S")
    except ValueError:
        return ""
    return f"{moment.replace(tzinfo=datetime.UTC).timestamp():010.0f}"


def _numbers_inside(stems: list[str]) -> list[int | Fraction | None]:
    """The only number that changes from name to name, where names differ in nothing else."""
    shapes = [re.sub("[0-9]+", "0", stem) for stem in stems]
    shape = Counter(shapes).most_common(1)[0][0]
    digits = [re.findall("[0-9]+", stem) for stem in stems]
    same = [row for row, its in zip(digits, shapes, strict=True) if its == shape]
    changing = [i for i, row in enumerate(zip(*same, strict=True)) if len(set(row)) > 1] or [-1]

    numbers: list[int | Fraction | None] = []
    for stem, row, its in zip(stems, digits, shapes, strict=True):
        if its != shape or not row:
            numbers.append(None)
        elif shape == "0.0":  # exact: as floats, times in seconds would have steps of 0.2 us
            numbers.append(Fraction(stem))
        else:
            numbers.append(int(row[changing[0]]) if len(changing) == 1 else None)
    return numbers


def _unit_of_numbers(numbers: list[int | Fraction]) -> int | None:
    """The unit, in ns, of names that are numbers; None: they count the clouds."""
    if any(isinstance(number, Fraction) for number in numbers):
        return 1_000_000_000  # a decimal point means seconds, perhaps since the machine started
    # Nobody counts to ten million. Sweeps are 10 ms to 1 s apart, which tells the unit.
    largest, distinct = max(numbers, default=0), sorted(set(numbers))
    if largest >= 1e7 and len(distinct) > 1:
        step = np.median(np.diff(np.array(distinct, dtype=float)))
        for unit_ns in (1, 1_000, 1_000_000):
            if 1e7 <= step * unit_ns <= 1e9:
                return unit_ns
    return _unit_ns(largest)


def _unit_ns(largest: int | float | Fraction) -> int | None:
    """The unit, in ns, of times since 1970; None if they are too small for ms, us, or ns."""
    # Today is 1.7e9 s = 1.7e12 ms = 1.7e15 us = 1.7e18 ns. The limits lie between these sizes.
    for smallest, unit_ns in ((1e17, 1), (1e14, 1_000), (1e11, 1_000_000)):
        if largest >= smallest:
            return unit_ns
    return None


# --- Poses ----------------------------------------------------------------------------------------


def read_pose(file: str | Path) -> np.ndarray:
    """ego1_SE3_ego0 (4, 4) float64 from .npy or four lines of text. Raises DataError."""
    file = Path(file)
    with data.naming(file, "not a 4 x 4 pose as text or .npy"):
        if file.suffix.lower() == ".npy":
            pose = check_pose(np.load(file, allow_pickle=False))
        else:
            pose = check_pose(np.loadtxt(file.read_text(encoding="utf-8").splitlines()))
    with data.naming(file, "not the ego's motion from sweep 0 to 1", "give it in meters"):
        data.check_ego_motion(pose, seconds=1.0)  # sweeps are closer in time than that
    return pose


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


def _places(folder: Path) -> list[Path]:
    """The folder, the one above it, and those above as long as their names are generic."""
    places = [Path(os.path.abspath(folder)), data.parent_of(folder)]
    while places[-1].name.lower() in GENERIC_FOLDERS:
        places.append(places[-1].parent)
    return places


def _find_poses(places: list[Path]) -> Path | None:
    for place in places:
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
    Argoverse 2's columns. times_ns: of the clouds, if their names contain times; None: poses are
    matched by order. A cloud without a pose within 1 ms gets NaN. Poses of KITTI's camera are
    converted by the calib.txt beside them, or in or above the folder. Raises DataError naming the
    file.
    """
    pose_ns, world_SE3_sensors, notes = _read_pose_rows(file, [file.parent, *_places(folder)])
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


def _read_pose_rows(
    file: Path, places: list[Path]
) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Times (M,) in ns as float64, if the file has them; poses (M, 4, 4); notes."""
    if file.suffix.lower() == ".feather":
        columns = ["timestamp_ns", *data.POSE_COLUMNS]
        rows = data.read_numbers(file, data.read_feather(file, columns), columns)
        return rows[:, 0], data.poses_from_rows(rows[:, 1:]), []
    with data.naming(file, "its poses cannot be read", "make it again, or give another"):
        lines = file.read_text(encoding="utf-8").split("\n")
        if not any(lines):
            raise ValueError("it is empty")
        rows = np.loadtxt(lines, ndmin=2)
        if rows.shape[1] not in (8, 12):
            found = f"it has {rows.shape[1]} numbers per row"
            raise ValueError(f"{found}, expected 12 (KITTI) or 8 (TUM)")
    if rows.shape[1] == 12:
        rows = rows.reshape(-1, 3, 4)
        poses, notes = _lidar_poses(file, data.rigid(rows[..., :3], rows[..., 3]), places)
        return None, poses, notes
    # float64 holds times in ns to within 128 ns, and 1 ms is all that matters here.
    unit_ns = _unit_ns(rows[:, 0].max()) or 1_000_000_000
    poses = data.poses_from_rows(rows[:, [7, 4, 5, 6, 1, 2, 3]])  # TUM has w last, rotation last
    poses, notes = _lidar_poses(file, poses, places)
    return rows[:, 0] * unit_ns, poses, notes


def _lidar_poses(file: Path, poses: np.ndarray, places: list[Path]) -> tuple[np.ndarray, list[str]]:
    """world_SE3_sensor (N, 4, 4) and notes, from the poses of a file: the lidar's or a camera's."""
    # In which direction do the steps point, each in its own sensor's frame? A lidar has z up and
    # hardly moves along it; a camera looks along its z. The median ignores a few broken poses.
    with np.errstate(all="ignore"):
        steps = (data.inverse(poses[:-1]) @ poses[1:])[:, :3, 3]
        length = np.linalg.norm(steps, axis=1)
        share_of_z = np.abs(steps[:, 2]) / length
    share_of_z = share_of_z[(length > 0.05) & np.isfinite(share_of_z)]
    along_z = np.median(share_of_z) if len(share_of_z) else np.nan  # NaN: it does not move

    # KITTI's own poses are of its left camera, camera0_SE3_camera. Its calib.txt has Tr, which is
    # camera_SE3_lidar; with it they become the lidar's, in the frame of its first sweep.
    calibration, camera_SE3_lidar = _read_calibration(places)
    if camera_SE3_lidar is None:
        if along_z > 0.7:
            found = "its poses move along z, as a camera's do, but clouds have z up"
            remedy = "give the lidar's poses, or put KITTI's calib.txt (with Tr) beside them"
            raise DataError(f"{file}: {found}; {remedy}")
        return poses, []
    if along_z < 0.3:
        note = "its Tr was not needed: the poses do not move along z, so they are the lidar's"
        return poses, [f"{calibration}: {note}"]
    note = "by its Tr, KITTI's camera poses were made lidar poses; remove it if they were already"
    return data.inverse(camera_SE3_lidar) @ poses @ camera_SE3_lidar, [f"{calibration}: {note}"]


def _read_calibration(places: list[Path]) -> tuple[Path | None, np.ndarray | None]:
    """The first calib.txt that has a Tr, and the Tr as camera_SE3_lidar (4, 4)."""
    for calibration in (place / "calib.txt" for place in places):
        if not calibration.is_file():
            continue
        with data.naming(calibration, "its Tr is not a 3 x 4 pose", "make it again or remove it"):
            text = calibration.read_text(encoding="utf-8", errors="replace")
            # Odometry has Tr:, objects Tr_velo_to_cam:, tracking Tr_velo_cam without a colon.
            found = re.search(r"(?im)^[ \t]*Tr(?:_velo\w*)?[ \t]*[:= \t](.*)$", text)
            if found:
                values = np.array(found[1].split(), dtype=float).reshape(-1, 4)
                return calibration, check_pose(np.vstack([values[:3], (0, 0, 0, 1)]))
    return None, None


# --- Ground without a map -------------------------------------------------------------------------


def is_ground_without_map(points: np.ndarray) -> np.ndarray:
    """(N,) bool: ground among the points (N, 3) of one sweep, from the points alone; z up.

    The height of the frame's origin does not matter. Points that are not finite, or 100 m away, are
    not ground. If no plane is found, no point is ground. The same points always give the same mask.
    All numbers were chosen on synthetic streets, level and hilly.
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
