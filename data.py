"""From files to pairs of sweeps: Argoverse 2 readers, ego-motion, ground and true flow.

Points are (N, 3) float32 in metres, in the ego frame of sweep 0 (x forward, y left, z up). Flow is the *residual*
displacement after ego-motion, from sweep 0 to sweep 1: a parked car has none, however fast we drive past it.
Row i of a flow belongs to row i of `pc0`. Rows are never dropped or reordered; ground is a mask.

Transforms are named `target_SE3_source` (4 x 4, float64) and read right to left, as in av2-api:
`ego1_SE3_ego0 = inv(city_SE3_ego1) @ city_SE3_ego0`. City coordinates are some 5,000 m, where float32 has steps of
half a millimetre, so poses are composed in float64 and only the result, in an ego frame, becomes float32.

Source: Argoverse 2 (Wilson et al., NeurIPS 2021) and the conventions of ZeroFlow (Vedder et al., ICLR 2024).
This file needs numpy, scipy, pyarrow and torch, and none of its siblings.
"""

from __future__ import annotations

import functools
import itertools
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import feather
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


def open_dataset(path: str | Path, true_flow: bool = True) -> Argoverse2Pairs:
    """Open an Argoverse 2 split (a folder of logs) or a single log as a map-style data set of `SweepPair`.

    Reads folder listings only: no sweep, pose or box is read before a pair is asked for.
    `true_flow=False` leaves the annotations unread, which is all that label-free training needs.
    Raises DataError where the folder is no data set, saying what would be one.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give a folder of Argoverse 2 logs, or one log")
    # A log that is still being written or copied has a name with a dot in front.
    children = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    logs = [path] if _is_log(path) else [child for child in children if _is_log(child)]
    if logs:
        pairs = Argoverse2Pairs(logs, true_flow)
        if len(pairs) == 0:
            raise DataError(
                f"{path}: no two consecutive sweeps in {len(logs)} logs; download the sweeps, or another log"
            )
        return pairs
    splits = [child.name for child in children if any(_is_log(grandchild) for grandchild in child.iterdir())]
    if splits:
        raise DataError(f"{path}: holds the splits {', '.join(splits)}; choose one, as in {path / splits[0]}")
    raise DataError(f"{path}: no Argoverse 2 log in it (a log is a folder with sensors/lidar/<timestamp_ns>.feather)")


def _is_log(folder: Path) -> bool:
    return (folder / "sensors" / "lidar").is_dir()


class Argoverse2Pairs(torch.utils.data.Dataset):
    """All pairs of consecutive sweeps of some Argoverse 2 logs, in the order of log id and time.

    keys: the PairKey of every pair. skipped: a line for every two neighbours that are no pair, with the reason.
    stamps: all sweeps of each log, in the order of time, whether they make pairs or not.
    """

    def __init__(self, logs: list[Path], true_flow: bool = True):
        self.true_flow = true_flow
        self.keys: list[PairKey] = []
        self.skipped: list[str] = []
        self.stamps: dict[str, list[int]] = {}
        self._folders = {log.absolute().name: log for log in logs}
        for log_id, log in self._folders.items():
            stamps = sorted(_sweep_timestamp_ns(file) for file in (log / "sensors" / "lidar").glob("*.feather"))
            self.stamps[log_id] = stamps
            for stamp0, stamp1 in itertools.pairwise(stamps):
                gap_ns = stamp1 - stamp0
                if 0 < gap_ns <= MAX_GAP_NS:
                    self.keys.append(PairKey(log_id, stamp0, stamp1))
                else:
                    self.skipped.append(f"{log}: no pair at {stamp0}: the next sweep is {gap_ns / 1e9:.2f} s later")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> SweepPair:
        """Read one pair. Raises DataError naming the file that is missing, empty or broken."""
        key = self.keys[index]
        folder = self._folders[key.log_id]
        log = _read_log(folder, self.true_flow)
        points0, points1 = (_read_sweep(folder, stamp) for stamp in key[1:])  # each in its own ego frame, float64
        city_SE3_ego0, city_SE3_ego1 = (log.city_SE3_ego(stamp) for stamp in key[1:])
        ego1_SE3_ego0 = inverse(city_SE3_ego1) @ city_SE3_ego0
        truth = {}
        if log.boxes is not None:
            boxes0, boxes1 = (log.boxes.get(stamp, []) for stamp in key[1:])
            truth = dict(zip(_TRUTH_FIELDS, true_residual_flow(points0, boxes0, boxes1, ego1_SE3_ego0), strict=True))
        return SweepPair(
            pc0=torch.from_numpy(points0.astype(np.float32)),
            pc1=torch.from_numpy(transform(inverse(ego1_SE3_ego0), points1).astype(np.float32)),
            is_ground0=torch.from_numpy(log.ground.is_ground(transform(city_SE3_ego0, points0))),
            is_ground1=torch.from_numpy(log.ground.is_ground(transform(city_SE3_ego1, points1))),
            ego1_SE3_ego0=torch.from_numpy(ego1_SE3_ego0),
            **key._asdict(),
            **{name: torch.from_numpy(values) for name, values in truth.items()},
        )

    def challenge_mask(self, pair: SweepPair) -> torch.Tensor | None:
        """(N0,) bool: the points that the 2023 challenge scores, by av2's rule of ground; None without its raster."""
        log = _read_log(self._folders[pair.log_id], self.true_flow)
        if not isinstance(log.ground, GroundRaster):
            return None
        points = pair.pc0.double().numpy()
        points_city = transform(log.city_SE3_ego(pair.timestamp0_ns), points)
        is_ground = log.ground.is_ground(points_city, AV2_GROUND_THRESHOLD_M, np.trunc)
        return torch.from_numpy((np.abs(points[:, :2]) <= 50).all(axis=1) & ~is_ground)


_TRUTH_FIELDS = ("flow", "category", "is_dynamic", "is_valid")


# --- Ego-motion ------------------------------------------------------------------------------------------------------


def transform(target_SE3_source: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) of the source frame in the target frame, in the dtype of the inputs (float64 wanted)."""
    return points @ target_SE3_source[:3, :3].T + target_SE3_source[:3, 3]


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
    What is in no box is background and moves as the ego says, so its residual is exactly zero.
    """
    flow = np.zeros((len(points), 3))
    category = np.zeros(len(points), dtype=np.uint8)
    is_valid = np.ones(len(points), dtype=bool)
    ego1_SE3_track = {box.track: box.ego_SE3_box for box in boxes1}
    by_x = np.argsort(points[:, 0], kind="stable")  # a box then looks at a slice of the sweep, not at all of it
    sorted_x = points[by_x, 0]
    for box in boxes0:
        # Length and width grow by 0.2 m in total, as in av2: points on the skin of a car belong to the car.
        half = (box.size + (0.2, 0.2, 0.0)) / 2
        reach, center_x = np.linalg.norm(half), box.ego_SE3_box[0, 3]
        near = by_x[slice(*np.searchsorted(sorted_x, (center_x - reach, center_x + reach)))]
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
    """(N, 3): the points of a .feather (x, y, z), .bin (KITTI: x, y, z, intensity, float32), .npy or .npz file.

    In the file's own floating dtype. An .npy array is (N, 3 or more), of which the first three columns count; an .npz
    file holds one such array, or names it `points`. Raises DataError naming the file and the way out.
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
    if not np.isfinite(points).all(axis=1).any():
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


_CLOUD_READERS = {
    ".feather": lambda file: stack(read_feather(file, ["x", "y", "z"]), "xyz"),
    ".bin": _read_kitti,
    ".npy": lambda file: np.load(file, allow_pickle=False),
    ".npz": _read_npz,
}


def read_pose(file: str | Path) -> np.ndarray:
    """A rigid transform (4, 4) float64 from an .npy file or four lines of text. Raises DataError naming the file."""
    file = Path(file)
    try:
        pose = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file.read_text().splitlines())
        return check_pose(pose)
    except Exception as error:  # see read_cloud
        raise DataError(f"{file}: not a 4 x 4 pose as text or .npy ({error})") from error


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


def challenge_members(dataset: Argoverse2Pairs, challenge: int) -> dict[str, PairKey]:
    """Name in a submission -> pair, of the pairs that a challenge scores.

    2023: every fifth of all the split's pairs in a row, `<log>/<timestamp0_ns>.feather`. 2024: every fifth of each log,
    `<log>/<i of sweep 0:010d>.feather`. Two neighbours with a gap between them count, too, as they did there.
    """
    neighbours = [
        (i, PairKey(log_id, *pair))
        for log_id, stamps in dataset.stamps.items()
        for i, pair in enumerate(itertools.pairwise(stamps))
    ]
    if challenge == 2023:
        return {f"{key.log_id}/{key.timestamp0_ns}.feather": key for _, key in neighbours[::EVERY]}
    return {f"{key.log_id}/{i:010d}.feather": key for i, key in neighbours if i % EVERY == 0}


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
        files = [PurePosixPath(name) for name in sorted(names) if name.endswith(".feather")]
        self.members = {(file.parent.name, file.stem): str(file) for file in files}

    def read(self, log_id: str, name: str, columns: list[str], rows: int) -> pyarrow.Table:
        """One file. Raises DataError naming it where it is missing or torn, or has other columns or rows."""
        if (log_id, name) not in self.members:
            raise DataError(f"{self.path}: has no {log_id}/{name}.feather; is it of this split?")
        member, content = self.members[log_id, name], None
        file = self.path / member
        if self._archive is not None:
            try:
                content = pyarrow.BufferReader(self._archive.read(member))
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
                raise DataError(f"{file}: cannot be unpacked ({error}); download or make it again") from error
        table = read_feather(file, columns, content)
        if table.num_rows != rows:
            raise DataError(f"{file}: has {table.num_rows} rows, expected {rows}; is it of this sweep and these masks?")
        return table

    def mask(self, pair: SweepPair) -> torch.Tensor:
        """(N0,) bool: the points of a pair that the 2023 challenge scores, where these are its masks."""
        table = self.read(pair.log_id, str(pair.timestamp0_ns), ["mask"], len(pair.pc0))
        return torch.from_numpy(table["mask"].to_numpy().astype(bool))


class ChallengePredictions:
    """Predictions on disk in the layout of either challenge, which their names tell: a folder, or a submission.

    keys: the pairs of `dataset` that have one. masks: those of the 2023 challenge; None: made as av2 makes them.
    """

    def __init__(self, path: str | Path, dataset: Argoverse2Pairs, masks: ChallengeFiles | None = None):
        self.files = ChallengeFiles(path)
        self._mask = dataset.challenge_mask if masks is None else masks.mask
        self._names = {}  # pair -> (log_id, name of the file)
        is_numbered = all(len(name) == 10 for _, name in self.files.members)
        self.challenge = 2024 if is_numbered else 2023
        for key in dataset.keys:
            number = f"{dataset.stamps[key.log_id].index(key.timestamp0_ns):010d}"
            member = key.log_id, number if is_numbered else str(key.timestamp0_ns)
            if member in self.files.members:
                self._names[key] = member
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
    """What belongs to a whole log: poses, ground, and boxes by time stamp where it is annotated and they are wanted."""

    pose_file: Path
    poses: dict[int, np.ndarray]  # time stamp: quaternion (w, x, y, z) and translation
    ground: GroundRaster
    boxes: dict[int, list[Box]] | None

    def city_SE3_ego(self, timestamp_ns: int) -> np.ndarray:
        if timestamp_ns not in self.poses:
            raise DataError(
                f"{self.pose_file}: no pose for sweep {timestamp_ns}; download the file again or remove the sweep"
            )
        if not np.isfinite(self.poses[timestamp_ns]).all():
            raise DataError(
                f"{self.pose_file}: the pose of sweep {timestamp_ns} is no number; download it again or remove that"
            )
        return _poses(self.poses[timestamp_ns])


@functools.lru_cache(maxsize=8)  # consecutive pairs share their log
def _read_log(folder: Path, true_flow: bool) -> _Log:
    pose_file = folder / "city_SE3_egovehicle.feather"
    poses = read_feather(pose_file, ["timestamp_ns", *POSE_COLUMNS])
    annotation_file = folder / "annotations.feather"  # the test split has none
    return _Log(
        pose_file=pose_file,
        poses=dict(zip(poses["timestamp_ns"].to_pylist(), stack(poses, POSE_COLUMNS), strict=True)),
        ground=_read_ground_raster(folder / "map"),
        boxes=_read_boxes(annotation_file) if true_flow and annotation_file.exists() else None,
    )


POSE_COLUMNS = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")


def _poses(values: np.ndarray) -> np.ndarray:
    """Rows of (qw, qx, qy, qz, tx, ty, tz), (..., 7), as transforms (..., 4, 4)."""
    return _rigid(Rotation.from_quat(values[..., :4], scalar_first=True).as_matrix(), values[..., 4:])


def _read_sweep(folder: Path, timestamp_ns: int) -> np.ndarray:
    """(N, 3) float64 in the sweep's own ego frame; the files hold float16."""
    return read_cloud(folder / "sensors" / "lidar" / f"{timestamp_ns}.feather").astype(np.float64)


def _sweep_timestamp_ns(file: Path) -> int:
    try:
        return int(file.stem)
    except ValueError:
        raise DataError(f"{file}: a sweep is named <timestamp_ns>.feather; remove or rename this file") from None


def _read_ground_raster(folder: Path) -> GroundRaster:
    files = [*folder.glob("*_ground_height_surface____*.npy"), *folder.glob("*___img_Sim2_city.json")]
    if len(files) != 2:
        raise DataError(
            f"{folder}: a log's map needs one *_ground_height_surface____*.npy and one *___img_Sim2_city.json, "
            f"found {[file.name for file in files]}; download the map folder of the Sensor data set"
        )
    try:
        height = np.load(files[0], allow_pickle=False)
        if height.ndim != 2:
            raise ValueError(f"its shape is {height.shape}, expected (rows, columns)")
        img_Sim2_city = json.loads(files[1].read_text())
        rotation, translation = np.reshape(img_Sim2_city["R"], (2, 2)), np.reshape(img_Sim2_city["t"], 2)
        return GroundRaster(height, rotation, translation, float(img_Sim2_city["s"]))
    except (TypeError, ValueError, KeyError, EOFError) as error:
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
    unknown = sorted(set(names) - set(CATEGORIES))
    if unknown:
        raise DataError(f"{file}: unknown categories {unknown}; Argoverse 2 has {CATEGORIES[1:]}")
    number = {name: index for index, name in enumerate(CATEGORIES)}
    sizes, ego_SE3_boxes = stack(table, size_columns), _poses(stack(table, POSE_COLUMNS))
    boxes: dict[int, list[Box]] = {}
    for i in np.flatnonzero(table["num_interior_pts"].to_numpy() >= 1):
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
    return table


def stack(table: pyarrow.Table, columns: Sequence[str]) -> np.ndarray:
    """The named columns side by side, (rows, columns), in their own dtype."""
    return np.stack([table[name].to_numpy() for name in columns], axis=1)
