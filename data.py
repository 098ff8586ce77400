"""From files to pairs of sweeps: readers of Argoverse 2 and of one's own clouds, ego-motion, ground and true flow.

Points are (N, 3) float32 in metres, in the ego frame of sweep 0 (x forward, y left, z up). Flow is the *residual*
displacement after ego-motion, from sweep 0 to sweep 1: a parked car has none, however fast we drive past it.
Row i of a flow belongs to row i of `pc0`. Rows are never dropped or reordered; ground is a mask.

Transforms are named `target_SE3_source` (4 x 4, float64) and read right to left, as in av2-api:
`ego1_SE3_ego0 = inv(city_SE3_ego1) @ city_SE3_ego0`. City coordinates are some 5,000 m, where float32 has steps of
half a millimetre, so poses are composed in float64 and only the result, in an ego frame, becomes float32.

Source: Argoverse 2 (Wilson et al., NeurIPS 2021) and the conventions of ZeroFlow (Vedder et al., ICLR 2024).
This file needs numpy, scipy, pyarrow and torch, and none of its siblings; Waymo splits need waymo.py beside it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import feather
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

# The student's grid as published: |x|, |y| < 51.2 m and |z| < 3 m (the lower border belongs to it, the upper does not).
GRID_HALF_EXTENT_M = (51.2, 51.2, 3.0)
GROUND_THRESHOLD_M = 0.40  # ZeroFlow's ...
AV2_GROUND_THRESHOLD_M = 0.30  # ... and that of the av2 package, which made the 2023 challenge's masks
MAX_GAP_NS = 150_000_000  # sweeps come at 10 Hz; a longer gap means that one is missing
DYNAMIC_THRESHOLD_M = 0.05  # av2's: a point that moves less than 5 cm a sweep is static

# av2's category numbers: 0 is NONE (background), then the thirty names in alphabetical order.
# The published ZeroFlow code counts from -1 (background) instead.
CATEGORIES = (
    "NONE ANIMAL ARTICULATED_BUS BICYCLE BICYCLIST BOLLARD BOX_TRUCK BUS CONSTRUCTION_BARREL CONSTRUCTION_CONE DOG "
    "LARGE_VEHICLE MESSAGE_BOARD_TRAILER MOBILE_PEDESTRIAN_CROSSING_SIGN MOTORCYCLE MOTORCYCLIST OFFICIAL_SIGNALER "
    "PEDESTRIAN RAILED_VEHICLE REGULAR_VEHICLE SCHOOL_BUS SIGN STOP_SIGN STROLLER TRAFFIC_LIGHT_TRAILER TRUCK "
    "TRUCK_CAB VEHICULAR_TRAILER WHEELCHAIR WHEELED_DEVICE WHEELED_RIDER"
).split()


class DataError(ValueError):
    """A file or folder that cannot be used. The message names it and says what to do."""


class PairKey(NamedTuple):
    """What identifies a pair, wherever it lies on a disk and whatever its place in a list."""

    log_id: str
    timestamp0_ns: int
    timestamp1_ns: int


@dataclass(frozen=True)
class SweepPair:
    """Two consecutive sweeps, both in the ego frame of sweep 0. All tensors are on the CPU.

    pc0 (N0, 3), pc1 (N1, 3) float32 metres; is_ground0 (N0,), is_ground1 (N1,) bool; ego1_SE3_ego0 (4, 4) float64.
    Where the data set has labels: flow (N0, 3) float32, the true residual flow; category (N0,) uint8, an index into
    CATEGORIES; is_dynamic (N0,) bool; is_valid (N0,) bool, False where the object is gone in sweep 1.
    """

    pc0: torch.Tensor
    pc1: torch.Tensor
    is_ground0: torch.Tensor
    is_ground1: torch.Tensor
    ego1_SE3_ego0: torch.Tensor
    log_id: str
    timestamp0_ns: int
    timestamp1_ns: int
    flow: torch.Tensor | None = None
    category: torch.Tensor | None = None
    is_dynamic: torch.Tensor | None = None
    is_valid: torch.Tensor | None = None

    @property
    def key(self) -> PairKey:
        return PairKey(self.log_id, self.timestamp0_ns, self.timestamp1_ns)


GROUNDS = ("raster", "vector", "points", "none")


def open_dataset(
    path: str | Path,
    true_flow: bool = True,
    ground: str = "",
    pairs_per_log: int = 0,
    sweeps_per_log: int = 0,
    poses: str | Path | None = None,
    rate_hz: float = 10.0,
) -> Pairs:
    """Open an Argoverse 2 split (a folder of logs) or log, a Waymo split, or a folder of clouds, as `SweepPair`s.

    Reads folder listings only (and the poses of clouds): no sweep or box is read before a pair is asked for.
    true_flow: False leaves the annotations unread, which is all that label-free training needs.
    ground: where the mask comes from. "raster" and "vector" are Argoverse 2's maps, "points" needs none, "none" masks
    nothing; "" takes the first of the first three that a log has.
    pairs_per_log: this many at regular intervals, all if 0. The paper's 3x takes 12 of each log of the LiDAR data set;
    24, its 5x, are those and as many between them. sweeps_per_log: only the first, all if 0; the published code takes
    145 of a log of the Sensor data set.
    poses, rate_hz: of a folder of clouds, see `CloudPairs`.
    Raises DataError where the folder is no data set, saying what would be one.
    """
    path = Path(path)
    if ground not in ("", *GROUNDS):
        raise DataError(f"ground {ground!r}: choose {', '.join(GROUNDS)}, or nothing for the best there is")
    if pairs_per_log < 0 or sweeps_per_log < 0:
        raise DataError(f"pairs_per_log {pairs_per_log}, sweeps_per_log {sweeps_per_log}: give 0 for all, or a number")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give a folder of Argoverse 2 logs, or one log")
    # A log that is still being written or copied has a name with a dot in front.
    children = sorted(Path(child) for child in os.scandir(path) if child.is_dir() and child.name[0] != ".")
    logs = [path] if _is_log(path) else [child for child in children if _is_log(child)]
    if logs:
        _refuse(path, "Argoverse 2's", poses=poses, rate_hz=rate_hz != 10 and rate_hz)
        pairs = Argoverse2Pairs(logs, true_flow, ground, pairs_per_log, sweeps_per_log)
        found = f"{len(logs)} logs; download the sweeps, or another log"
    elif _is_waymo(path):
        _refuse(path, "Waymo's", poses=poses, rate_hz=rate_hz != 10 and rate_hz, ground=ground.replace("points", ""))
        pairs = _open_waymo(path, true_flow, pairs_per_log, sweeps_per_log)
        found = f"{len(pairs.stamps)} segments, the files of lidar; download more"
    elif _clouds(path):
        pairs = CloudPairs(path, ground, pairs_per_log, sweeps_per_log, poses, rate_hz)
        found = f"{len(_clouds(path))} clouds; see why: {pairs.skipped[:3]}"
    else:
        raise DataError(_what_is_there(path, children))
    if len(pairs) == 0:
        raise DataError(f"{path}: no two consecutive sweeps in {found}")
    return pairs


def _is_log(folder: Path) -> bool:
    return (folder / "sensors" / "lidar").is_dir()


def _log_id(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))  # of "." and "..", too


def _parent(folder: Path) -> Path:
    return Path(os.path.abspath(folder)).parent  # of "..", too


def _is_waymo(folder: Path) -> bool:
    return (folder / "lidar").is_dir() and (folder / "vehicle_pose").is_dir()


def _clouds(folder: Path) -> list[Path]:
    """The clouds in a folder by name, where frame9 comes before frame10. Feather files are Argoverse 2's own."""
    files = (folder / name for name in os.listdir(folder) if name[0] != ".")
    files = [file for file in files if file.suffix in _CLOUD_READERS and file.suffix != ".feather"]
    pieces = {file: re.split(r"([0-9]+)", file.name) for file in files}  # text, number, text ...
    return sorted(files, key=lambda file: [int(piece) if i % 2 else piece for i, piece in enumerate(pieces[file])])


def _refuse(path: Path, whose: str, **options) -> None:
    for name, value in options.items():
        if value:
            raise DataError(f"{path}: {name} {value} is not for {whose} folders; leave it out")


def _open_waymo(path: Path, true_flow: bool, pairs_per_log: int, sweeps_per_log: int) -> Pairs:
    try:
        import waymo  # only here: this file is to work without it
    except ImportError as error:
        raise DataError(f"{path}: a Waymo split, which waymo.py reads ({error}); copy waymo.py too") from error
    return waymo.WaymoPairs(path, true_flow, pairs_per_log, sweeps_per_log)


def _what_is_there(path: Path, children: list[Path]) -> str:
    splits = [
        child.name
        for child in children
        if _is_waymo(child) or any(_is_log(grandchild) for grandchild in child.iterdir()) or _clouds(child)
    ]
    if splits:
        return f"{path}: holds the splits {', '.join(splits)}; choose one, as in {path / splits[0]}"
    return (
        f"{path}: no Argoverse 2 log in it (a log is a folder with sensors/lidar/<timestamp_ns>.feather), no Waymo "
        f"split (with lidar and vehicle_pose), and no clouds ({', '.join(_CLOUD_READERS)})"
    )


class Pairs(torch.utils.data.Dataset):
    """Pairs of consecutive sweeps in the order of log id and time; what every reader offers.

    keys: the PairKey of every pair. skipped: a line for every file that is no sweep and every two neighbours that are
    no pair, with the reason. notes: lines that a user should see. stamps: the times (ns) of all sweeps of each log,
    sorted, whether they make pairs or not.
    """

    def __init__(self):
        self.keys: list[PairKey] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.stamps: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> SweepPair:
        return self.read(self.keys[index])

    def read(self, key: PairKey) -> SweepPair:
        """Read any two sweeps of a log. Raises DataError naming the file that is missing, empty or broken."""
        raise NotImplementedError

    def challenge_mask(self, pair: SweepPair) -> torch.Tensor | None:
        """(N0,) bool: the points of a pair that the 2023 challenge scores; None where nobody knows."""
        return None

    def _add_log(
        self,
        path: Path,
        log_id: str,
        stamps: Iterable[int],
        pairs_per_log: int,
        sweeps_per_log: int,
        max_gap_ns: int = MAX_GAP_NS,
    ) -> None:
        """Add the pairs of a log's first sweeps: all, or so many at regular intervals, of which twice as many are
        those and as many between them."""
        self.stamps[log_id], keys = sorted(stamps), []
        for stamp0, stamp1 in itertools.pairwise(self.stamps[log_id][: sweeps_per_log or None]):
            gap_ns = stamp1 - stamp0
            if 0 < gap_ns <= max_gap_ns:
                keys.append(PairKey(log_id, stamp0, stamp1))
            else:
                self.skipped.append(f"{path}: no pair at {stamp0}: the next sweep is {gap_ns / 1e9:.2f} s later")
        count = min(pairs_per_log or len(keys), len(keys))
        self.keys += [keys[i * len(keys) // count] for i in range(count)]


class Argoverse2Pairs(Pairs):
    """All pairs of consecutive sweeps of some Argoverse 2 logs. The arguments are those of `open_dataset`."""

    def __init__(
        self,
        logs: list[Path],
        true_flow: bool = True,
        ground: str = "",
        pairs_per_log: int = 0,
        sweeps_per_log: int = 0,
    ):
        super().__init__()
        self.true_flow, self.ground = true_flow, ground
        self._folders = {_log_id(log): log for log in logs}
        for log in logs:
            stamps = []
            for name in sorted(os.listdir(log / "sensors" / "lidar")):
                stem, suffix = os.path.splitext(name)
                if suffix == ".feather" and _is_number(stem):
                    stamps.append(int(stem))
                elif suffix == ".feather":
                    file = log / "sensors" / "lidar" / name
                    self.skipped.append(f"{file}: a sweep is named <timestamp_ns>.feather; remove or rename this file")
            self._add_log(log, _log_id(log), stamps, pairs_per_log, sweeps_per_log)

    def read(self, key: PairKey) -> SweepPair:
        folder = self._folders[key.log_id]
        log = _read_log(folder, self.true_flow, self.ground)
        points = [_read_sweep(folder / "sensors" / "lidar" / f"{stamp}.feather") for stamp in key[1:]]
        city_SE3_egos = [log.city_SE3_ego(stamp) for stamp in key[1:]]
        is_ground = [log.is_ground(*each) for each in zip(points, city_SE3_egos, strict=True)]
        ego1_SE3_ego0 = inverse(city_SE3_egos[1]) @ city_SE3_egos[0]
        truth = {}
        if log.boxes is not None:
            boxes0, boxes1 = (log.boxes.get(stamp, []) for stamp in key[1:])
            truth = dict(zip(TRUTH_FIELDS, true_residual_flow(points[0], boxes0, boxes1, ego1_SE3_ego0), strict=True))
        return make_pair(key, points, is_ground, ego1_SE3_ego0, truth)

    def challenge_mask(self, pair: SweepPair) -> torch.Tensor | None:
        """(N0,) bool: the points that the 2023 challenge scores, by av2's rule of ground; None without its raster."""
        log = _read_log(self._folders[pair.log_id], self.true_flow, self.ground)
        if not isinstance(log.ground, GroundRaster):
            return None
        points = pair.pc0.double().numpy()
        points_city = transform(log.city_SE3_ego(pair.timestamp0_ns), points)
        is_ground = log.ground.is_ground(points_city, AV2_GROUND_THRESHOLD_M, np.trunc)
        return torch.from_numpy((np.abs(points[:, :2]) <= 50).all(axis=1) & ~is_ground)


TRUTH_FIELDS = ("flow", "category", "is_dynamic", "is_valid")


def make_pair(
    key: PairKey, points: list[np.ndarray], is_ground: list[np.ndarray], ego1_SE3_ego0: np.ndarray, truth: dict
) -> SweepPair:
    """Of two sweeps (N, 3) float64, each in its own ego frame, their ground, and the truth by name where known."""
    return SweepPair(
        pc0=torch.from_numpy(points[0].astype(np.float32)),
        pc1=torch.from_numpy(transform(inverse(ego1_SE3_ego0), points[1]).astype(np.float32)),
        is_ground0=torch.from_numpy(is_ground[0]),
        is_ground1=torch.from_numpy(is_ground[1]),
        ego1_SE3_ego0=torch.from_numpy(ego1_SE3_ego0),
        **key._asdict(),
        **{name: torch.from_numpy(values) for name, values in truth.items()},
    )


def _is_number(stem: str) -> bool:
    """Whether a file's name is a number as `str` writes it: 007 or ٣ would not find its file again."""
    return stem.isdecimal() and str(int(stem)) == stem


def _name_as_number(stem: str) -> int | Fraction | None:
    """Exactly: a float has steps of a quarter of a microsecond at today's seconds."""
    if re.fullmatch(r"[0-9]{1,19}", stem):
        return int(stem)
    return Fraction(stem) if re.fullmatch(r"[0-9]{1,11}\.[0-9]{1,9}", stem) else None


def _stamp_unit_ns(largest: int | float | Fraction) -> int:
    """Of time stamps since 1970, or since a machine's start where a decimal point says seconds; 0 for mere counts."""
    for least, unit_ns in ((1e17, 1), (1e14, 1_000), (1e11, 1_000_000)):
        if largest >= least:
            return unit_ns
    return 1_000_000_000 if isinstance(largest, float | Fraction) else 0


class CloudPairs(Pairs):
    """Pairs of a folder of clouds, each in its own sensor frame, and their poses. The log id is the folder's name and
    that of the one above it: many a folder is called velodyne.

    Names that are numbers are time stamps (in ns, us, ms or, with a decimal point, s, as their size tells), or small
    ones that count sweeps which come at `rate_hz`; where most are no numbers, the order of names counts. A gap of more
    than one and a half sweeps is no pair.

    poses: a file of world_SE3_sensor, see `read_poses`; else poses.txt or city_SE3_egovehicle.feather in the folder or
    the one above it; else the clouds are taken to be in one frame, and a note says so.
    ground: "points" (also if "") or "none".
    """

    def __init__(
        self,
        folder: str | Path,
        ground: str = "",
        pairs_per_log: int = 0,
        sweeps_per_log: int = 0,
        poses: str | Path | None = None,
        rate_hz: float = 10.0,
    ):
        super().__init__()
        folder = Path(folder)
        if ground not in ("", *_GROUND_WITHOUT_MAP):
            raise DataError(f"{folder}: clouds have no map for the ground {ground!r}; choose points or none")
        if not rate_hz > 0:
            raise DataError(f"rate_hz {rate_hz}: give the number of sweeps a second, such as 10")
        self.ground = ground or "points"
        files, stamps_ns, is_stamped = self._stamp(_clouds(folder), rate_hz)
        self.pose_file = Path(poses) if poses else _find_poses(folder)
        if self.pose_file:
            world_SE3_sensors, self.notes = read_poses(self.pose_file, folder, stamps_ns, is_stamped)
        else:
            world_SE3_sensors = np.broadcast_to(np.eye(4), (len(files), 4, 4))
            self.notes.append(f"{folder}: no poses.txt: its clouds are taken to be in one frame; else name a pose file")
        self._sweeps: dict[int, tuple[Path, np.ndarray]] = {}
        for stamp, file, pose in zip(stamps_ns, files, world_SE3_sensors, strict=True):
            if stamp in self._sweeps:
                self.skipped.append(f"{file}: has the time of {self._sweeps[stamp][0].name}; remove one of them")
            self._sweeps.setdefault(stamp, (file, pose))
        log_id = f"{_log_id(_parent(folder))}-{_log_id(folder)}"
        self._add_log(folder, log_id, self._sweeps, pairs_per_log, sweeps_per_log, round(1.5e9 / rate_hz))

    def _stamp(self, files: list[Path], rate_hz: float) -> tuple[list[Path], list[int], bool]:
        """Those files that are sweeps, their time stamps in ns, and whether those came from the names."""
        numbers = {file: _name_as_number(file.stem) for file in files}
        numbered = [file for file in files if numbers[file] is not None]
        if 2 * len(numbered) <= len(files):
            return files, [round(i * 1e9 / rate_hz) for i in range(len(files))], False
        for file in files:
            if numbers[file] is None:
                self.skipped.append(f"{file}: has no number for a name, as the others have; remove or rename it")
        unit_ns = _stamp_unit_ns(max(numbers[file] for file in numbered))
        if unit_ns:
            return numbered, [int(numbers[file] * unit_ns) for file in numbered], True
        return numbered, [round(numbers[file] * 1e9 / rate_hz) for file in numbered], False

    def read(self, key: PairKey) -> SweepPair:
        (file0, world_SE3_sensor0), (file1, world_SE3_sensor1) = (self._sweeps[stamp] for stamp in key[1:])
        for file, pose in ((file0, world_SE3_sensor0), (file1, world_SE3_sensor1)):
            try:
                check_pose(pose)
            except ValueError as error:
                raise DataError(f"{self.pose_file}: no pose for {file.name} ({error}); remove that cloud") from error
        points = [_read_sweep(file) for file in (file0, file1)]
        is_ground = [_GROUND_WITHOUT_MAP[self.ground](each) for each in points]
        return make_pair(key, points, is_ground, inverse(world_SE3_sensor1) @ world_SE3_sensor0, {})


# --- Ego-motion ------------------------------------------------------------------------------------------------------


def transform(target_SE3_source: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) of the source frame in the target frame, in the dtype of the inputs (float64 wanted)."""
    moved = points @ target_SE3_source[:3, :3].T
    moved += target_SE3_source[:3, 3]  # in place is twice as fast
    return moved


def inverse(target_SE3_source: np.ndarray) -> np.ndarray:
    """source_SE3_target of a rigid transform (..., 4, 4)."""
    rotation = np.swapaxes(target_SE3_source[..., :3, :3], -1, -2)
    return _rigid(rotation, -(rotation @ target_SE3_source[..., :3, 3:])[..., 0])


def _rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) and translations (..., 3) as 4 x 4 transforms."""
    target_SE3_source = np.zeros((*translation.shape[:-1], 4, 4))
    target_SE3_source[..., :3, :3] = rotation
    target_SE3_source[..., :3, 3] = translation
    target_SE3_source[..., 3, 3] = 1.0
    return target_SE3_source


def total_flow(residual: torch.Tensor, pair: SweepPair) -> torch.Tensor:
    """Raw flow as Argoverse 2 defines it: ego1_SE3_ego0 · (p + r) - p, (N0, 3) float32.

    The end point is *transformed* into the ego frame of sweep 1. Adding the residual to the rigid flow is 8 cm wrong
    for a car at 15 m/s seen from an ego that turns at 30°/s: the residual must turn too.
    """
    assert residual.shape == pair.pc0.shape, f"flow {tuple(residual.shape)} for points {tuple(pair.pc0.shape)}"
    points = pair.pc0.double()
    rotation, translation = pair.ego1_SE3_ego0[:3, :3], pair.ego1_SE3_ego0[:3, 3]
    return ((points + residual.double()) @ rotation.T + translation - points).float()


def residual_flow(total: torch.Tensor, pair: SweepPair) -> torch.Tensor:
    """The residual of a raw flow (N0, 3), float32: the inverse of `total_flow`."""
    assert total.shape == pair.pc0.shape, f"flow {tuple(total.shape)} for points {tuple(pair.pc0.shape)}"
    points = pair.pc0.double()
    rotation, translation = pair.ego1_SE3_ego0[:3, :3], pair.ego1_SE3_ego0[:3, 3]
    return ((points + total.double() - translation) @ rotation - points).float()  # v @ R is inv(R) · v


# --- Ground and grid -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroundRaster:
    """Height of the ground on a raster of 30 cm. Pixel (column, row) of a city point: s · (R · xy + t)."""

    height: np.ndarray  # (rows, columns) float16, NaN where unknown
    R: np.ndarray  # (2, 2)
    t: np.ndarray  # (2,) metres
    s: float  # pixels per metre

    def is_ground(self, points_city: np.ndarray, threshold_m: float = GROUND_THRESHOLD_M, snap=np.round) -> np.ndarray:
        """(N,) bool: up to `threshold_m` above the ground, or anywhere below it. Where no height is known: not ground.

        The defaults are ZeroFlow's rule. The av2 package's, which its challenge masks follow, is
        `threshold_m=0.30, snap=np.trunc`.
        """
        column, row = snap(self.s * (points_city[:, :2] @ self.R.T + self.t)).T
        is_inside = (column >= 0) & (column < self.height.shape[1]) & (row >= 0) & (row < self.height.shape[0])
        ground_z = np.full(len(points_city), np.nan)
        ground_z[is_inside] = self.height[row[is_inside].astype(int), column[is_inside].astype(int)]
        return points_city[:, 2] - ground_z <= threshold_m  # a comparison with NaN is False


class GroundVectorMap:
    """Height of the ground from lines of a map: the inverse-distance mean of the 4 nearest vertices.

    For logs without a raster, as those of Argoverse 2's LiDAR data set. The height is that of a cell of 50 cm, asked
    for when a point first lies in it: six times as fast as to ask for every point, and twenty times in the next sweep.
    """

    cell_m, margin_m = 0.5, 100.0

    def __init__(self, lines: list[np.ndarray]):
        """Lines (L, 3) in city coordinates, between whose vertices others are put until they are at most 1 m apart.

        Raises ValueError if they span more than a log can.
        """
        corners = np.concatenate(lines)[:, :2]
        self._low = corners.min(axis=0) - self.margin_m
        extent = corners.max(axis=0) + self.margin_m - self._low
        if extent.max() > 2_000:
            raise ValueError(f"its points span {extent.max():.0f} m, a log's no more than some hundreds")
        vertices = _densify(lines)
        self._tree, self._vertex_z = cKDTree(vertices[:, :2]), vertices[:, 2]
        self._height = np.full((extent / self.cell_m).astype(int) + 1, np.nan, dtype=np.float32)

    def ground_z(self, xy: np.ndarray) -> np.ndarray:
        """(M,) heights at (M, 2) city coordinates."""
        distance, nearest = self._tree.query(xy, k=range(1, min(4, len(self._vertex_z)) + 1))  # (M, 4)
        weight = 1 / np.maximum(distance, 1e-3)
        return (weight * self._vertex_z[nearest]).sum(axis=1) / weight.sum(axis=1)

    def is_ground(self, points_city: np.ndarray, threshold_m: float = GROUND_THRESHOLD_M) -> np.ndarray:
        """(N,) bool: by GroundRaster's rule. More than 100 m outside the lines' bounding box no height is known."""
        column, row = ((points_city[:, :2] - self._low) / self.cell_m).T
        columns, rows = self._height.shape
        is_inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        cell = column[is_inside].astype(int) * rows + row[is_inside].astype(int)
        height = self._height.reshape(-1)  # a view
        unknown = np.unique(cell[np.isnan(height[cell])])
        centers = np.stack(np.divmod(unknown, rows), axis=1) + 0.5
        height[unknown] = self.ground_z(centers * self.cell_m + self._low)
        ground_z = np.full(len(points_city), np.nan)
        ground_z[is_inside] = height[cell]
        return points_city[:, 2] - ground_z <= threshold_m  # a comparison with NaN is False


def _densify(lines: list[np.ndarray]) -> np.ndarray:
    """(V, 3): the vertices of lines, and between two that are d metres apart ceil(d) - 1 others."""
    start, end = (np.concatenate([line[part] for line in lines]) for part in (slice(-1), slice(1, None)))
    parts = np.ceil(np.linalg.norm((end - start)[:, :2], axis=1)).astype(int)
    segment = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(segment)) - np.repeat(np.cumsum(parts) - parts, parts)  # 0, 1 ... in each segment
    between = start[segment] + (part / parts[segment])[:, None] * (end - start)[segment]
    return np.concatenate([between, *(line[-1:] for line in lines)])


GROUND_REACH_M = 100  # of is_ground_without_map, in x and y


def is_ground_without_map(points: np.ndarray) -> np.ndarray:
    """(N,) bool: ground among the points (N, 3) of one sweep in an ego or sensor frame, z up; from the points alone.

    A plane, then heights above it: the lowest point of each cell of 1 m, without cells that stand above their
    neighbours, smoothed; first coarsely, to follow a hill, then finely. Ground is up to 0.35 m above that, or anywhere
    below. How high the frame's origin is does not matter. What is not finite or 100 m away is not ground, and nothing
    is where no plane is found.

    All numbers were chosen on synthetic streets, level and hilly. The same points give the same mask.
    """
    is_ground = np.zeros(len(points), dtype=bool)
    rows = np.flatnonzero((np.abs(points) < GROUND_REACH_M).all(axis=1))  # NaN is nowhere
    near = points[rows].astype(np.float64)
    side = 2 * GROUND_REACH_M
    column, row = (np.floor(near[:, axis]).astype(int) + GROUND_REACH_M for axis in (0, 1))
    cell = column * side + row  # (M,)
    plane = _ground_plane(_lowest(near[:, 2], cell, side))
    if plane is None:
        return is_ground
    height = near[:, 2] - near[:, :2] @ plane[:2] - plane[2]
    distance = np.hypot(near[:, 0], near[:, 1])
    # What may be ground lies in a band around the last surface that widens with range, as errors of tilt do.
    for band_m, widening, scales_m in ((0.6, 0.03, (8, 4)), (0.3, 0.01, (8, 3, 1))):
        is_in_band = np.abs(height) < band_m + widening * distance
        height -= _smooth_floor(_lowest(height[is_in_band], cell[is_in_band], side), scales_m).ravel()[cell]
    is_ground[rows] = height <= 0.35
    return is_ground


def _lowest(height: np.ndarray, cell: np.ndarray, side: int) -> np.ndarray:
    """(side, side): the lowest height in each cell, infinite where there is none."""
    lowest = np.full(side * side, np.inf)
    np.minimum.at(lowest, cell, height)
    return lowest.reshape(side, side)


def _ground_plane(lowest: np.ndarray) -> np.ndarray | None:
    """(a, b, c) of z = a x + b y + c by RANSAC over the cells within 40 m; None if they are under 10, or steep."""
    x, y = (np.argwhere(np.isfinite(lowest)) - GROUND_REACH_M + 0.5).T
    near = np.hypot(x, y) < 40
    points = np.stack([x, y, lowest[np.isfinite(lowest)]], axis=1)[near]
    if len(points) < 10:
        return None
    corner0, corner1, corner2 = points[np.random.default_rng(0).integers(len(points), size=(3, 200))]
    normal = np.cross(corner1 - corner0, corner2 - corner0)  # (200, 3)
    is_level = np.abs(normal[:, 2]) > np.cos(np.radians(15)) * np.linalg.norm(normal, axis=1)
    if not is_level.any():
        return None
    slopes = -normal[is_level, :2] / normal[is_level, 2:]
    offsets = corner0[is_level, 2] - (slopes * corner0[is_level, :2]).sum(axis=1)
    residual = points[:, 2] - slopes @ points[:, :2].T - offsets[:, None]  # (planes, points)
    best = (np.abs(residual) < 0.2).sum(axis=1).argmax()
    plane = np.array([*slopes[best], offsets[best]])
    level = np.column_stack([points[:, :2], np.ones(len(points))])
    for _ in range(2):  # least squares over what it explains
        is_inlier = np.abs(points[:, 2] - level @ plane) < 0.2
        plane = np.linalg.lstsq(level[is_inlier], points[is_inlier, 2], rcond=None)[0]
    return plane


def _smooth_floor(lowest: np.ndarray, scales_m: tuple[float, ...]) -> np.ndarray:
    """A height for every cell: normalised Gaussian smoothing, each scale over the coarser one where it knows better."""
    # A cell 0.3 m above one of its 5 x 5 neighbours holds the side of a car, not ground.
    is_floor = lowest < ndimage.minimum_filter(lowest, 5) + 0.3
    surface, floor = np.zeros_like(lowest), np.where(is_floor, lowest, 0.0)
    for scale in scales_m:
        weight, total = (ndimage.gaussian_filter(each, scale, truncate=3) for each in (is_floor * 1.0, floor))
        surface = (total + 0.05 * surface) / (weight + 0.05)
    return surface


_GROUND_WITHOUT_MAP = {"points": is_ground_without_map, "none": lambda points: np.zeros(len(points), dtype=bool)}


def is_in_grid(points: torch.Tensor, half_extent_m: tuple[float, float, float] = GRID_HALF_EXTENT_M) -> torch.Tensor:
    """(N,) bool: which points (N, 3) lie in [-half, half) in x, y and z. NaN lies nowhere."""
    half = points.new_tensor(half_extent_m)
    return ((points >= -half) & (points < half)).all(dim=1)


# --- True flow from tracked boxes ------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A tracked box at one time stamp, in the ego frame of that stamp."""

    track: str
    category: int  # index into CATEGORIES
    size: np.ndarray  # (3,) length, width, height in metres
    ego_SE3_box: np.ndarray  # (4, 4)


def true_residual_flow(
    points: np.ndarray, boxes0: list[Box], boxes1: list[Box], ego1_SE3_ego0: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flow that the tracked boxes imply, as av2's own tools make it, but residual.

    points (N, 3) float64 in the ego frame of sweep 0; boxes in file order (later boxes overwrite earlier ones).
    Returns flow (N, 3) float32, category (N,) uint8, is_dynamic (N,) bool, is_valid (N,) bool.
    What is in no box is background and moves as the ego says, so its residual is exactly zero. A row that is not
    finite is in no box, and not valid.
    """
    flow = np.zeros((len(points), 3))
    category = np.zeros(len(points), dtype=np.uint8)
    is_valid = np.isfinite(points.sum(axis=1))
    ego1_SE3_track = {box.track: box.ego_SE3_box for box in boxes1}
    by_x = np.argsort(points[:, 0])  # a box then looks at a slice of the sweep, not at all of it
    sorted_x = points[by_x, 0]
    for box in boxes0:
        # Length and width grow by 0.2 m in total, as in av2: points on the skin of a car belong to the car.
        half = (box.size + (0.2, 0.2, 0.0)) / 2
        reach, (center_x, center_y) = np.linalg.norm(half), box.ego_SE3_box[:2, 3]
        near = by_x[slice(*np.searchsorted(sorted_x, (center_x - reach, center_x + reach)))]
        near = near[np.abs(points[near, 1] - center_y) <= reach]
        rows = near[(np.abs(transform(inverse(box.ego_SE3_box), points[near])) <= half).all(axis=1)]
        category[rows] = box.category
        is_valid[rows] = box.track in ego1_SE3_track
        flow[rows] = 0.0
        if box.track in ego1_SE3_track:
            # Where the box carries the point, seen from sweep 0: ego0_SE3_ego1 · T1 · inv(T0) · p.
            ego0_moved_SE3_ego0 = inverse(ego1_SE3_ego0) @ ego1_SE3_track[box.track] @ inverse(box.ego_SE3_box)
            flow[rows] = transform(ego0_moved_SE3_ego0, points[rows]) - points[rows]
    is_dynamic = np.linalg.norm(flow, axis=1) >= DYNAMIC_THRESHOLD_M
    return flow.astype(np.float32), category, is_dynamic, is_valid


# --- Clouds and poses of one's own -----------------------------------------------------------------------------------


def read_cloud(file: str | Path) -> np.ndarray:
    """(N, 3): the points of a .feather (x, y, z), .bin (KITTI: x, y, z, intensity, float32), .npy, .npz, .ply or .pcd.

    In the file's own floating dtype. An .npy array is (N, 3 or more), of which the first three columns count; an .npz
    file holds one such array, or names it `points`. Of .ply (ascii, binary) and .pcd (ascii, binary, compressed) the
    fields x, y, z of any type are read; a .pcd file's VIEWPOINT is not applied. Raises DataError naming the file and
    the way out.
    """
    file = Path(file)
    if file.suffix not in _CLOUD_READERS:
        raise DataError(f"{file}: not a format of clouds; convert it to one of {', '.join(_CLOUD_READERS)}")
    if not file.is_file():
        raise DataError(f"{file}: no such file; download it again, or give another")
    try:
        points = np.asarray(_CLOUD_READERS[file.suffix](file))
        if points.ndim != 2 or points.shape[1] < 3:
            raise ValueError(f"its shape is {points.shape}, expected (N, 3)")
        points = points[:, :3]
        if points.dtype.kind not in "fiuO":  # O: a column with nulls
            raise ValueError(f"its values are {points.dtype}, expected numbers")
        if points.dtype not in (np.float16, np.float32):  # another byte order, too, is no dtype of torch's
            points = points.astype(np.float64)
    except DataError:
        raise
    except Exception as error:  # the readers raise a dozen kinds: of zip, zlib, the tokenizer, pyarrow, memory
        raise DataError(f"{file}: its points cannot be read ({error}); download or make it again") from error
    if not any(np.isfinite(row).all() for row in points):  # mostly the first is
        raise DataError(f"{file}: the sweep has no points; download it again or remove it")
    return points


def _read_kitti(file: Path) -> np.ndarray:
    values = np.fromfile(file, dtype="<f4")
    if file.stat().st_size % 16:
        raise ValueError(f"{file.stat().st_size} bytes are no rows of four float32 numbers")
    return values.reshape(-1, 4)


def _read_npz(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        if "points" not in arrays and len(arrays.files) != 1:
            raise ValueError(f"it holds {arrays.files}, and none of them is called points")
        return arrays["points" if "points" in arrays else arrays.files[0]]


_PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
_PLY_TYPES |= {"float": "f4", "double": "f8"}  # int8 ... float64 are NumPy's own names
_PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


def _read_ply(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header = re.match(rb"ply\s.*?\nend_header\r?\n", content, re.DOTALL)
    if not header:
        raise ValueError("it does not begin with ply ... end_header")
    elements, form = [], ""  # elements: name, rows, {property: type}
    for line in header[0].decode("ascii", "replace").splitlines():
        match line.split():
            case ["format", form, _]:
                pass
            case ["element", name, count]:
                elements.append((name, int(count), {}))
            case ["property", kind, *_, name]:
                elements[-1][2][name] = _PLY_TYPES.get(kind, kind)
    rest = content[header.end() :]
    lines = rest.split(b"\n") if form == "ascii" else []
    for element, count, properties in elements:
        if "list" in properties.values():
            raise ValueError(f"a list among or before the vertices, in {element}, is not read")
        row = np.dtype([(name, np.dtype(kind).newbyteorder(_PLY_ORDERS[form])) for name, kind in properties.items()])
        if element == "vertex":
            return _text_xyz(lines, count, row.names) if form == "ascii" else _xyz(np.frombuffer(rest, row, count))
        lines, rest = lines[count:], rest[count * row.itemsize :]
    raise ValueError("it has no vertices")


def _read_pcd(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header = re.search(rb"^DATA\s+(\w+)[^\n]*\n", content, re.MULTILINE)
    if not header:
        raise ValueError("it has no line DATA")
    lines = content[: header.end()].decode("ascii", "replace").splitlines()
    words = {key: values for key, *values in map(str.split, filter(str.strip, lines))}
    columns = [words[key] for key in ("FIELDS", "SIZE", "TYPE")]
    columns.append(words.get("COUNT", ["1"] * len(words["FIELDS"])))
    fields = []
    for name, size, kind, repeat in zip(*columns, strict=True):
        kind = f"<{kind.lower()}{size}"
        # Names may repeat, as the padding's does; a field of several numbers is that many fields.
        names = [name] if name in ("x", "y", "z") else [f"{len(fields) + i} {name}" for i in range(int(repeat))]
        fields += [(each, kind) for each in names]
    row, count, rest = np.dtype(fields), int(words["POINTS"][0]), content[header.end() :]
    match header[1]:
        case b"ascii":
            return _text_xyz(rest.split(b"\n"), count, row.names)
        case b"binary":
            return _xyz(np.frombuffer(rest, row, count))
        case b"binary_compressed":  # the columns one after the other
            packed, unpacked = np.frombuffer(rest, "<u4", 2).tolist()
            rest = _unpack_lzf(rest[8 : 8 + packed], unpacked)
            return _xyz({name: np.frombuffer(rest, kind, count, count * at) for name, (kind, at) in row.fields.items()})
    raise ValueError(f"its DATA is {header[1]}")


def _unpack_lzf(packed: bytes, size: int) -> bytes:
    """LZF: a control byte below 32 says how many bytes follow as they are, others what to repeat of the output."""
    out, at = bytearray(), 0
    while at < len(packed):
        control, at = packed[at], at + 1
        if control < 32:
            out += packed[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length, at = length + packed[at], at + 1
        start, at = len(out) - ((control & 31) << 8) - packed[at] - 1, at + 1
        if start < 0:
            raise ValueError("its compressed part refers to what is not there")
        for i in range(start, start + length + 2):  # one by one: it may repeat what it is writing
            out.append(out[i])
    if len(out) != size:
        raise ValueError(f"its compressed part is {len(out)} bytes, and should be {size}")
    return bytes(out)


def _xyz(columns) -> np.ndarray:
    return np.stack([columns[axis] for axis in "xyz"], axis=1)


def _text_xyz(lines: list[bytes], count: int, names: tuple[str, ...]) -> np.ndarray:
    """(count, 3): x, y, z of rows of numbers as text."""
    rows = np.loadtxt(lines[:count], usecols=[names.index(axis) for axis in "xyz"], ndmin=2)
    if len(rows) != count:
        raise ValueError(f"it has {len(rows)} points, and should have {count}")
    return rows


_CLOUD_READERS = {
    ".feather": lambda file: stack(read_feather(file, ["x", "y", "z"]), "xyz"),
    ".bin": _read_kitti,
    ".npy": lambda file: np.load(file, allow_pickle=False),
    ".npz": _read_npz,
    ".ply": _read_ply,
    ".pcd": _read_pcd,
}


def read_pose(file: str | Path) -> np.ndarray:
    """A rigid transform (4, 4) float64 from an .npy file or four lines of text. Raises DataError naming the file."""
    file = Path(file)
    try:
        pose = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file.read_text().splitlines())
        return check_pose(pose)
    except Exception as error:  # see read_cloud
        raise DataError(f"{file}: not a 4 x 4 pose as text or .npy ({error})") from error


def _find_poses(folder: Path) -> Path | None:
    names = ("poses.txt", "city_SE3_egovehicle.feather")
    files = (where / name for where in (folder, _parent(folder)) for name in names)
    return next((file for file in files if file.is_file()), None)


def read_poses(file: Path, folder: Path, stamps_ns: list[int], is_stamped: bool) -> tuple[np.ndarray, list[str]]:
    """world_SE3_sensor (N, 4, 4) of the N clouds of a folder, NaN where one has none, and notes for the user.

    Rows of 12 numbers are KITTI's 3 x 4, one a cloud, in the clouds' order. KITTI's are of the left camera: where a
    calib.txt with `Tr:` (camera_SE3_lidar) lies beside them, they are made the lidar's, and a note says so. Rows of 8
    are TUM's `stamp tx ty tz qx qy qz qw` (s, or by its size ms, us or ns), and a .feather file has Argoverse 2's
    columns. Those two go by time, to within 1 ms, if the clouds' names are time stamps, else by order.
    Raises DataError naming the file.
    """
    pose_ns, world_SE3_sensors, notes = _pose_rows(file)
    if pose_ns is None or not is_stamped:
        if len(world_SE3_sensors) != len(stamps_ns):
            raise DataError(
                f"{file}: has {len(world_SE3_sensors)} poses for the {len(stamps_ns)} clouds of {folder}; give one each"
            )
        return world_SE3_sensors, notes
    if not np.isfinite(pose_ns).all():
        raise DataError(f"{file}: has a time stamp that is no number; make it again, or give another")
    off_ns, nearest = cKDTree(pose_ns[:, None]).query(np.array(stamps_ns, dtype=float)[:, None])
    if (off_ns > 1e6).all():
        raise DataError(f"{file}: has no pose within 1 ms of any cloud of {folder}; do its stamps have another origin?")
    return np.where((off_ns <= 1e6)[:, None, None], world_SE3_sensors[nearest], np.nan), notes


def _pose_rows(file: Path) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Time stamps (M,) in ns as float64 (off by 128 ns), if the file has them; poses (M, 4, 4); notes."""
    if file.suffix == ".feather":
        table = read_feather(file, ["timestamp_ns", *POSE_COLUMNS])
        rows = read_numbers(file, table, ["timestamp_ns", *POSE_COLUMNS])
        return rows[:, 0], _poses(rows[:, 1:]), []
    try:
        lines = file.read_text().split("\n")
        if not any(lines):
            raise ValueError("it is empty")
        rows = np.loadtxt(lines, ndmin=2)
        if rows.shape[1] == 12:
            return None, *_kitti_poses(rows, file.with_name("calib.txt"))
        if rows.shape[1] != 8:
            raise ValueError(f"it has {rows.shape[1]} numbers a row, and a pose 12 (KITTI) or 8 (TUM)")
        return rows[:, 0] * _stamp_unit_ns(float(rows[:, 0].max())), _poses(rows[:, [7, 4, 5, 6, 1, 2, 3]]), []
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: its poses cannot be read ({error}); make it again, or give another") from error


def _kitti_poses(rows: np.ndarray, calibration: Path) -> tuple[np.ndarray, list[str]]:
    """world_SE3_sensor (N, 4, 4) of rows of 12; of the lidar, in the first one's frame, where they are of a camera."""
    poses = _rigid(rows.reshape(-1, 3, 4)[..., :3], rows.reshape(-1, 3, 4)[..., 3])
    lines = calibration.read_text().splitlines() if calibration.is_file() else []
    for numbers in (line.split()[1:] for line in lines if line.startswith("Tr:")):
        try:
            camera_SE3_lidar = np.vstack([np.array(numbers, dtype=float).reshape(3, 4), (0, 0, 0, 1)])
        except ValueError as error:
            raise DataError(f"{calibration}: its Tr is no 3 x 4 pose ({error}); make it again or remove it") from error
        note = f"{calibration}: by its Tr, poses of KITTI's camera were made the lidar's; remove it if they were so"
        return inverse(camera_SE3_lidar) @ poses @ camera_SE3_lidar, [note]
    return poses, []


def check_pose(pose: np.ndarray | torch.Tensor) -> np.ndarray:
    """The same as (4, 4) float64. Raises ValueError if it is no rotation and translation."""
    pose = _on_cpu(pose).double().numpy()
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise ValueError(f"its shape is {pose.shape}, expected (4, 4), all finite")
    rotation = pose[:3, :3]
    is_rotation = np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-3 and np.linalg.det(rotation) > 0
    if not is_rotation:
        raise ValueError("its upper left 3 x 3 is no rotation: does it scale or mirror?")
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise ValueError("its last row is not 0 0 0 1: is it transposed?")
    return pose


def _on_cpu(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """As a tensor that torch can use: arrays may be read-only, run backwards, or be of another byte order."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    values = np.array(values)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


def pair_of_clouds(
    points0: np.ndarray | torch.Tensor,
    points1: np.ndarray | torch.Tensor,
    ego1_SE3_ego0: np.ndarray | torch.Tensor | None = None,
    is_ground0: np.ndarray | torch.Tensor | None = None,
    is_ground1: np.ndarray | torch.Tensor | None = None,
) -> SweepPair:
    """A pair of clouds (N0, 3), (N1, 3), each in its own ego frame, or without a pose both in the same one.

    Ground (N0,), (N1,) bool; none where it is not given. Raises ValueError where shapes do not fit.
    """
    clouds, masks = [], []
    for name, points, is_ground in (("0", points0, is_ground0), ("1", points1, is_ground1)):
        clouds.append(_on_cpu(points))
        if clouds[-1].ndim != 2 or clouds[-1].shape[1] != 3:
            raise ValueError(f"cloud {name} has shape {tuple(clouds[-1].shape)}, expected (N, 3); drop other columns")
        count = len(clouds[-1])
        masks.append(torch.zeros(count, dtype=torch.bool) if is_ground is None else _on_cpu(is_ground))
        if masks[-1].shape != (count,) or masks[-1].dtype != torch.bool:
            found = f"{tuple(masks[-1].shape)} {masks[-1].dtype}"
            raise ValueError(f"ground {name} is {found}, expected a bool for each of {count} points")
    pose = np.eye(4) if ego1_SE3_ego0 is None else check_pose(ego1_SE3_ego0)
    pc1 = transform(inverse(pose), clouds[1].double().numpy())
    return SweepPair(
        clouds[0].float(), torch.from_numpy(pc1.astype(np.float32)), *masks, torch.from_numpy(pose), "", 0, 0
    )


# --- Challenge files --------------------------------------------------------------------------------------------------

FLOW_COLUMNS = ("flow_tx_m", "flow_ty_m", "flow_tz_m")
CHALLENGES = (2023, 2024)
EVERY = 5  # both challenges score every fifth pair


def neighbours(dataset: Pairs) -> list[PairKey]:
    """All two consecutive sweeps of each log in a row, those with a gap between them, too, as the challenges count."""
    every = dataset.stamps.items()
    return [PairKey(log_id, *pair) for log_id, stamps in every for pair in itertools.pairwise(stamps)]


def challenge_members(dataset: Pairs, challenge: int) -> dict[str, PairKey]:
    """Name in a submission -> pair, of the pairs that a challenge scores.

    2023: every fifth of all the split's neighbours in a row, `<log>/<timestamp0_ns>.feather`. 2024: every fifth of each
    log, `<log>/<i of sweep 0:010d>.feather`.
    """
    if challenge == 2023:
        return {f"{key.log_id}/{key.timestamp0_ns}.feather": key for key in neighbours(dataset)[::EVERY]}
    numbered = ((dataset.stamps[key.log_id].index(key.timestamp0_ns), key) for key in neighbours(dataset))
    return {f"{key.log_id}/{i:010d}.feather": key for i, key in numbered if i % EVERY == 0}


def challenge_file(pair: SweepPair, residual: torch.Tensor, challenge: int, mask: torch.Tensor | None) -> bytes:
    """A pair's file in a submission, of the residual flow (N0, 3); Feather, float16.

    2023: raw flow and is_dynamic (5 cm or more of it the object's own), a row a point of `mask` (N0,). 2024: residual
    flow, a row a point of the sweep, all valid: a point without an estimate has residual 0, and moves as the ego says.
    """
    if challenge == 2023:
        columns = {"is_dynamic": (residual.norm(dim=1) > DYNAMIC_THRESHOLD_M)[mask].numpy()}
        flow = total_flow(residual, pair)[mask]
    else:
        columns, flow = {"is_valid": np.ones(len(residual), dtype=bool)}, residual
    flow_columns = {name: flow[:, i].numpy().astype(np.float16) for i, name in enumerate(FLOW_COLUMNS)}
    file = pyarrow.BufferOutputStream()
    feather.write_feather(pyarrow.table(flow_columns | columns), file)
    return file.getvalue().to_pybytes()


class ChallengeFiles:
    """The Feather files `<log_id>/<name>.feather` of a folder or a zip, as challenges hand them out and take them.

    members: (log_id, name without ending) -> where it is. Folders above the log's do not matter.
    """

    def __init__(self, path: str | Path):
        self.path, self._archive = Path(path), None
        if not self.path.exists():
            raise DataError(f"{path}: no such file or folder; give a folder or zip of <log_id>/<name>.feather")
        if self.path.is_dir():
            names = [file.relative_to(self.path).as_posix() for file in self.path.rglob("*.feather")]
        else:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{path}: neither a folder nor a whole zip ({error}); download it again") from error
            names = self._archive.namelist()
        self.members: dict[tuple[str, str], str] = {}
        for file in (PurePosixPath(name) for name in sorted(names)):
            if file.suffix == ".feather" and not file.name.startswith("."):  # a Mac adds ._ files
                first = self.members.setdefault((file.parent.name, file.stem), str(file))
                if first != str(file):
                    raise DataError(f"{path}: holds both {first} and {file}; choose one of the folders above them")

    def read(self, log_id: str, name: str, columns: list[str], rows: int) -> pyarrow.Table:
        """One file. Raises DataError naming it where it is missing or torn, or has other columns or rows."""
        if (log_id, name) not in self.members:
            raise DataError(f"{self.path}: has no {log_id}/{name}.feather; is it of this split?")
        member, content = self.members[log_id, name], None
        file = self.path / member
        if self._archive is not None:
            try:
                content = pyarrow.BufferReader(self._archive.read(member))
            except (
                zipfile.BadZipFile,
                zlib.error,
                OSError,
                EOFError,
                RuntimeError,
            ) as error:  # encrypted, or Deflate64
                raise DataError(f"{file}: cannot be unpacked ({error}); download or make it again") from error
        table = read_feather(file, columns, content)
        if table.num_rows != rows:
            raise DataError(f"{file}: has {table.num_rows} rows, expected {rows}; is it of this sweep and these masks?")
        for name in columns:
            kind, is_right = table[name].type, pyarrow.types.is_boolean
            if name in FLOW_COLUMNS:
                is_right = pyarrow.types.is_floating
            if not is_right(kind) or table[name].null_count:
                raise DataError(f"{file}: its column {name} is {kind}, or has nulls; make the file again")
        return table

    def mask(self, pair: SweepPair) -> torch.Tensor | None:
        """(N0,) bool: the points of a pair that the 2023 challenge scores, where these are its masks; None of a pair
        that it does not score."""
        if (pair.log_id, str(pair.timestamp0_ns)) not in self.members:
            return None
        table = self.read(pair.log_id, str(pair.timestamp0_ns), ["mask"], len(pair.pc0))
        return torch.from_numpy(table["mask"].to_numpy().astype(bool))


class ChallengePredictions:
    """Predictions on disk in the layout of either challenge, which their names tell: a folder, or a submission.

    keys: the pairs of `dataset` that have one. masks: those of the 2023 challenge; None: made as av2 makes them.
    """

    def __init__(self, path: str | Path, dataset: Argoverse2Pairs, masks: ChallengeFiles | None = None):
        self.files = ChallengeFiles(path)
        self._mask = dataset.challenge_mask if masks is None else masks.mask
        names = {2023: {}, 2024: {}}  # pair -> (log_id, name of the file)
        for key in dataset.keys:
            number = dataset.stamps[key.log_id].index(key.timestamp0_ns)
            for challenge, name in ((2023, str(key.timestamp0_ns)), (2024, f"{number:010d}")):
                if (key.log_id, name) in self.files.members:
                    names[challenge][key] = key.log_id, name
        if names[2023] and names[2024]:
            raise DataError(f"{path}: holds files of both challenges; evaluate them one at a time")
        self.challenge = 2023 if names[2023] else 2024
        self._names = names[self.challenge]
        self.keys = list(self._names)
        if not self.keys:
            raise DataError(
                f"{path}: no prediction for any pair of the data; expected <log_id>/<timestamp0_ns>.feather (2023) or "
                "<log_id>/<number of sweep 0, ten digits>.feather (2024)"
            )

    def __call__(self, pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Residual flow (N0, 3), 0 where nothing is said; and what the file says of is_dynamic (N0,), if anything.

        A 2023 file says nothing of the points outside its mask.
        """
        residual = torch.zeros_like(pair.pc0)
        if self.challenge == 2024:
            table = self.files.read(*self._names[pair.key], [*FLOW_COLUMNS, "is_valid"], len(pair.pc0))
            is_said, says_dynamic = torch.from_numpy(table["is_valid"].to_numpy().astype(bool)), None
            residual[is_said] = torch.from_numpy(stack(table, FLOW_COLUMNS).astype(np.float32))[is_said]
        else:
            is_said = self._mask(pair)
            if is_said is None:
                raise DataError(
                    f"{self.files.path}: which points are these? The log has no ground raster: give the masks"
                )
            table = self.files.read(*self._names[pair.key], [*FLOW_COLUMNS, "is_dynamic"], int(is_said.sum()))
            total, says_dynamic = torch.zeros_like(residual), torch.zeros_like(is_said)
            total[is_said] = torch.from_numpy(stack(table, FLOW_COLUMNS).astype(np.float32))
            says_dynamic[is_said] = torch.from_numpy(table["is_dynamic"].to_numpy().astype(bool))
            residual[is_said] = residual_flow(total, pair)[is_said]
        return residual, says_dynamic


# --- Reading a log ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Log:
    """What belongs to a whole log: poses, its map's ground or what goes without, and boxes by time stamp if wanted."""

    pose_file: Path
    poses: dict[int, np.ndarray]  # time stamp: quaternion (w, x, y, z) and translation
    ground: GroundRaster | GroundVectorMap | str  # "points" and "none" are no maps
    boxes: dict[int, list[Box]] | None

    def city_SE3_ego(self, timestamp_ns: int) -> np.ndarray:
        if timestamp_ns not in self.poses:
            raise DataError(
                f"{self.pose_file}: no pose for sweep {timestamp_ns}; download the file again or remove the sweep"
            )
        city_SE3_ego = _poses(self.poses[timestamp_ns])
        if not np.isfinite(city_SE3_ego).all():
            raise DataError(
                f"{self.pose_file}: the pose of sweep {timestamp_ns} is no number; download it again or remove that"
            )
        return city_SE3_ego

    def is_ground(self, points: np.ndarray, city_SE3_ego: np.ndarray) -> np.ndarray:
        """(N,) bool of the points (N, 3) of a sweep in its own ego frame."""
        if isinstance(self.ground, str):
            return _GROUND_WITHOUT_MAP[self.ground](points)
        return self.ground.is_ground(transform(city_SE3_ego, points))


@functools.lru_cache(maxsize=8)  # consecutive pairs share their log
def _read_log(folder: Path, true_flow: bool, ground: str) -> _Log:
    pose_file = folder / "city_SE3_egovehicle.feather"
    poses = read_feather(pose_file, ["timestamp_ns", *POSE_COLUMNS])
    annotation_file = folder / "annotations.feather"  # the test split has none
    return _Log(
        pose_file=pose_file,
        poses=dict(zip(poses["timestamp_ns"].to_pylist(), read_numbers(pose_file, poses, POSE_COLUMNS), strict=True)),
        ground=_read_ground(folder / "map", ground),
        boxes=_read_boxes(annotation_file) if true_flow and annotation_file.exists() else None,
    )


POSE_COLUMNS = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")


def _poses(values: np.ndarray) -> np.ndarray:
    """Rows of (qw, qx, qy, qz, tx, ty, tz), (..., 7), as transforms (..., 4, 4), not finite where a row is no pose."""
    quaternion = values[..., :4]
    is_rotation = (quaternion**2).sum(axis=-1, keepdims=True) > 1e-6  # False for NaN, too; SciPy raises for such
    rotation = Rotation.from_quat(np.where(is_rotation, quaternion, (1, 0, 0, 0)), scalar_first=True).as_matrix()
    return _rigid(rotation, np.where(is_rotation, values[..., 4:], np.nan))


def _read_sweep(file: Path) -> np.ndarray:
    """(N, 3) float64 in the sweep's own frame. A row with a number that is not finite becomes NaN in x, y and z."""
    points = read_cloud(file).astype(np.float64)
    if not np.abs(points).max() < 1e9:  # a file may hold what float32 cannot
        points[~(np.abs(points) < 1e9).all(axis=1)] = np.nan
    return points


def _read_ground(folder: Path, ground: str) -> GroundRaster | GroundVectorMap | str:
    """By name, or what the map folder has: a raster, else a vector map, else "points"."""
    if ground == "":
        choices = {"raster": RASTER_FILES, "vector": VECTOR_FILES}
        found = (name for name, patterns in choices.items() if any(any(folder.glob(each)) for each in patterns))
        ground = next(found, "points")
    readers = {"raster": _read_ground_raster, "vector": _read_ground_vector_map}
    return readers[ground](folder) if ground in readers else ground


RASTER_FILES = ("*_ground_height_surface____*.npy", "*___img_Sim2_city.json")
VECTOR_FILES = ("log_map_archive_*.json",)


def _read_ground_vector_map(folder: Path) -> GroundVectorMap:
    files = list(folder.glob(VECTOR_FILES[0]))
    if len(files) != 1:
        raise DataError(
            f"{folder}: a log's vector map is one {VECTOR_FILES[0]}, found {[file.name for file in files]}; download "
            f"the map folder, or take another ground: points, none"
        )
    try:
        content = json.loads(files[0].read_text())
        areas = [area["area_boundary"] for area in content["drivable_areas"].values()]
        lines = [area + area[:1] for area in areas]  # closed
        for lane in content["lane_segments"].values():
            lines += [lane["left_lane_boundary"], lane["right_lane_boundary"]]
        lines = [np.array([[point[axis] for axis in "xyz"] for point in line], dtype=float) for line in lines if line]
        if not lines or not all(np.isfinite(line).all() for line in lines):
            raise ValueError("its areas and lanes have no points, or points that are no numbers")
        return GroundVectorMap(lines)
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:
        raise DataError(f"{files[0]}: the vector map cannot be read ({error}); download it again") from error


def _read_ground_raster(folder: Path) -> GroundRaster:
    files = [file for pattern in RASTER_FILES for file in folder.glob(pattern)]
    if len(files) != 2:
        raise DataError(
            f"{folder}: a log's map needs one {RASTER_FILES[0]} and one {RASTER_FILES[1]}, found "
            f"{[file.name for file in files]}; download the map folder of the Sensor data set, or take another ground: "
            f"vector, points, none"
        )
    try:
        height = np.load(files[0], allow_pickle=False)
        if height.ndim != 2 or height.dtype.kind not in "fiu":
            raise ValueError(f"its shape is {height.shape}, expected (rows, columns), its type {height.dtype}")
        img_Sim2_city = json.loads(files[1].read_text())
        rotation, translation = np.reshape(img_Sim2_city["R"], (2, 2)), np.reshape(img_Sim2_city["t"], 2)
        scale = float(img_Sim2_city["s"])
        if not np.isfinite([*rotation.ravel(), *translation, scale]).all():
            raise ValueError("its Sim2 is no number")
        return GroundRaster(height, rotation, translation, scale)
    except (TypeError, ValueError, KeyError, EOFError, OSError) as error:
        raise DataError(
            f"{folder}: the ground raster cannot be read ({error}); download the map folder again"
        ) from error


def _read_boxes(file: Path) -> dict[int, list[Box]]:
    """All boxes of a log by time stamp, in file order.

    Boxes without a point in them (num_interior_pts, 17 % of the rows) are dropped, at either end of a pair. No
    document says so, but with it the labels of av2's own tools come out to the last point, and without it they do not.
    """
    size_columns = ("length_m", "width_m", "height_m")
    table = read_feather(
        file, ["timestamp_ns", "track_uuid", "category", "num_interior_pts", *size_columns, *POSE_COLUMNS]
    )
    stamps, tracks, names = (table[name].to_pylist() for name in ("timestamp_ns", "track_uuid", "category"))
    unknown = sorted(map(str, set(names) - set(CATEGORIES)))
    if unknown:
        raise DataError(f"{file}: unknown categories {unknown}; Argoverse 2 has {CATEGORIES[1:]}")
    number = {name: index for index, name in enumerate(CATEGORIES)}
    points_in = read_numbers(file, table, ["num_interior_pts"])[:, 0]
    sizes, poses = (read_numbers(file, table, columns) for columns in (size_columns, POSE_COLUMNS))
    ego_SE3_boxes = _poses(poses)
    if not (np.isfinite(sizes).all() and np.isfinite(ego_SE3_boxes).all()):
        raise DataError(f"{file}: a box has a size or pose that is no number; download it again")
    boxes: dict[int, list[Box]] = {}
    for i in np.flatnonzero(points_in >= 1):
        box = Box(tracks[i], number[names[i]], sizes[i], ego_SE3_boxes[i])
        boxes.setdefault(stamps[i], []).append(box)
    return boxes


def read_feather(file: Path, columns: list[str], source: pyarrow.NativeFile | None = None) -> pyarrow.Table:
    """A Feather file that has these columns; source: its content, where it lies in an archive.

    Raises DataError naming the file and the way out.
    """
    if source is None and not file.exists():
        raise DataError(f"{file}: no such file; download the log again or remove it")
    try:
        table = feather.read_table(source or file, memory_map=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a whole Feather file ({error}); download or make it again") from error
    missing = sorted(set(columns) - set(table.column_names))
    if missing:
        raise DataError(f"{file}: has no columns {missing} (it has {table.column_names}); is it the right file?")
    stamp_type = table["timestamp_ns"].type if "timestamp_ns" in columns else pyarrow.int64()
    if not pyarrow.types.is_integer(stamp_type):
        raise DataError(f"{file}: its column timestamp_ns is {stamp_type}, expected integers; download it again")
    return table


def read_numbers(file: Path, table: pyarrow.Table, columns: Sequence[str]) -> np.ndarray:
    """The named columns of a file's table side by side, (rows, columns) float64; NaN for a null."""
    try:
        return stack(table, columns).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: has no numbers in {list(columns)} ({error}); download it again") from error


def stack(table: pyarrow.Table, columns: Sequence[str]) -> np.ndarray:
    """The named columns side by side, (rows, columns), in their own dtype."""
    return np.stack([table[name].to_numpy() for name in columns], axis=1)
