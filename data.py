"""Argoverse 2 files become pairs of sweeps: points, ego-motion, ground masks, and true flow.

Points are (N, 3) float32 in meters, in the ego frame of sweep 0 (x forward, y left, z up). Flow is
the *residual* displacement after ego-motion compensation, from sweep 0 to sweep 1: a parked car
has none, however fast we drive past it. Row i of a flow belongs to row i of `pc0`. Rows are never
dropped or reordered: masks mark the ground, and the points outside the grid.

Transforms are called `target_SE3_source` (4 x 4, float64) and read from right to left, as in
av2-api: `ego1_SE3_ego0 = inverse(city_SE3_ego1) @ city_SE3_ego0`. City coordinates reach 5,000 m,
where float32 has steps of half a millimeter. Poses are therefore composed in float64, and only the
result, in an ego frame, becomes float32.

Sources: Argoverse 2 (Wilson et al., NeurIPS 2021), whose flow labels follow the av2 package, and
ZeroFlow (Vedder et al., ICLR 2024). Unlike the published ZeroFlow code, ground points stay in the
cloud, and flow is residual everywhere; `total_flow` converts it to Argoverse 2's raw flow.

This file works when copied alone; it imports waymo.py and other readers only when it needs them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import itertools
import json
import os
import sys
import uuid
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import feather
from scipy.spatial.transform import Rotation

# The student's grid as published: x and y in [-51.2, 51.2) m, z in [-3, 3) m.
GRID_HALF_EXTENT_M = (51.2, 51.2, 3.0)
GROUND_THRESHOLD_M = 0.40  # ZeroFlow: ground is up to 40 cm above the map's surface
MAX_GAP_NS = 150_000_000  # sweeps come every 0.1 s; a longer gap means that one is missing
DYNAMIC_THRESHOLD_M = 0.05  # av2: a point that moves less than 5 cm per sweep is static

# More than this comes from a broken file: other units, another sweep's pose, mixed up tracks.
MAX_EGO_SPEED_MPS, MAX_EGO_TURN_DEG_PER_S = 60.0, 120.0
FARTHEST_POINT_M = 10_000.0  # from the middle of its sweep
MAX_POINT_SPEED_MPS = 300.0  # reached by the ends of a bus if its box is turned around

# av2 numbers its categories: 0 is NONE (background), then thirty names in alphabetical order.
# The published ZeroFlow code starts at -1 (background) instead.
CATEGORIES = (
    "NONE ANIMAL ARTICULATED_BUS BICYCLE BICYCLIST BOLLARD BOX_TRUCK BUS CONSTRUCTION_BARREL "
    "CONSTRUCTION_CONE DOG LARGE_VEHICLE MESSAGE_BOARD_TRAILER MOBILE_PEDESTRIAN_CROSSING_SIGN "
    "MOTORCYCLE MOTORCYCLIST OFFICIAL_SIGNALER PEDESTRIAN RAILED_VEHICLE REGULAR_VEHICLE "
    "SCHOOL_BUS SIGN STOP_SIGN STROLLER TRAFFIC_LIGHT_TRAILER TRUCK TRUCK_CAB VEHICULAR_TRAILER "
    "WHEELCHAIR WHEELED_DEVICE WHEELED_RIDER"
).split()

GROUNDS = ("auto", "raster", "vector", "points", "none")  # where a ground mask can come from
TRUTHS = ("av2", "grown")  # how boxes become flow, see `true_residual_flow` and `grown_flow`
TRUTH_FIELDS = ("flow", "category", "is_dynamic", "is_valid")  # of a SweepPair, where known
FLOW_COLUMNS = ("flow_tx_m", "flow_ty_m", "flow_tz_m")  # of every file that holds flow
POSE_COLUMNS = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
# Names do not start with a dot: for each file x, a Mac may add a file ._x.
RASTER_FILES = ("[!.]*_ground_height_surface____*.npy", "[!.]*___img_Sim2_city.json")
VECTOR_FILES = ("log_map_archive_*.json",)

Extent = tuple[float, float, float]


class DataError(ValueError):
    """A file or folder that cannot be used. The message names it and tells what to do."""


class Outage(RuntimeError):
    """A server could not be reached for minutes. Not a DataError, since no pair is broken."""


@contextlib.contextmanager
def naming(file: Path, problem: str, remedy: str = "download or make it again") -> Iterator[None]:
    """Convert what a broken file raises inside to a DataError: "file: problem (reason); remedy"."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{file}: {problem} ({reason}); {remedy}") from error


class PairKey(NamedTuple):
    """Identifies a pair, wherever its files are and whatever its position in a list."""

    log_id: str
    timestamp0_ns: int
    timestamp1_ns: int

    @property
    def seconds(self) -> float:
        return (self.timestamp1_ns - self.timestamp0_ns) / 1e9


class PairKeys(Sequence[PairKey]):
    """The keys of many pairs. In arrays, because six million tuples would take a gigabyte."""

    def __init__(self, keys: Iterable[PairKey] = ()):
        self._log_ids: dict[str, int] = {}  # each log's id -> its number, 0, 1, ...
        self._log_id_of: list[str] = []  # by number
        self._logs, self._stamps0, self._stamps1 = array("l"), array("q"), array("q")
        self.extend(keys)

    def extend(self, keys: Iterable[PairKey]) -> None:
        """Add keys at the end."""
        for log_id, timestamp0_ns, timestamp1_ns in keys:
            number = self._log_ids.setdefault(log_id, len(self._log_ids))
            if number == len(self._log_id_of):
                self._log_id_of.append(log_id)
            self._logs.append(number)
            self._stamps0.append(timestamp0_ns)
            self._stamps1.append(timestamp1_ns)

    def __len__(self) -> int:
        return len(self._logs)

    def __getitem__(self, index: int | slice) -> PairKey | PairKeys:
        if isinstance(index, slice):
            return PairKeys(self[i] for i in range(*index.indices(len(self))))
        log_id = self._log_id_of[self._logs[index]]
        return PairKey(log_id, self._stamps0[index], self._stamps1[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class SweepPair:
    """Two sweeps, both in the ego frame of sweep 0. All tensors are on the CPU."""

    pc0: torch.Tensor  # (N0, 3) float32, meters
    pc1: torch.Tensor  # (N1, 3) float32, meters
    is_ground0: torch.Tensor  # (N0,) bool
    is_ground1: torch.Tensor  # (N1,) bool
    ego1_SE3_ego0: torch.Tensor  # (4, 4) float64
    log_id: str
    timestamp0_ns: int
    timestamp1_ns: int
    # The truth, from tracked boxes; None where the data set has no annotations.
    flow: torch.Tensor | None = None  # (N0, 3) float32, meters, residual
    category: torch.Tensor | None = None  # (N0,) uint8, an index into CATEGORIES
    is_dynamic: torch.Tensor | None = None  # (N0,) bool, moves by DYNAMIC_THRESHOLD_M or more
    is_valid: torch.Tensor | None = None  # (N0,) bool, False if its object is gone in sweep 1
    # Where the LiDAR was in sweep 1; None if it is unknown where it is mounted.
    lidar1: torch.Tensor | None = None  # (3,) float64, meters

    @property
    def key(self) -> PairKey:
        return PairKey(self.log_id, self.timestamp0_ns, self.timestamp1_ns)

    @property
    def seconds(self) -> float:
        return self.key.seconds

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what a method gets: clouds, ground masks, the pose, and the LiDAR."""
        # The last bits of a product depend on the CPU. Rounded to 1 dm, and the pose to 0.1 mm,
        # the numbers are the same on all of them. Adding 0 turns -0 into 0.
        points = [(points.nan_to_num() * 10).round() + 0 for points in (self.pc0, self.pc1)]
        pose = self.ego1_SE3_ego0.round(decimals=4) + 0
        parts = [*points, pose, self.is_ground0, self.is_ground1]
        if self.lidar1 is not None:
            parts.append((self.lidar1 * 10).round() + 0)
        content = b"".join(part.numpy().tobytes() for part in parts)
        return hashlib.blake2b(content, digest_size=8).hexdigest()


# --- Opening a data set ---------------------------------------------------------------------------


def open_dataset(
    path: str | Path,
    true_flow: bool = True,
    ground: str = "auto",
    pairs_per_log: int | None = None,
    sweeps_per_log: int | None = None,
    poses: str | Path | None = None,
    rate_hz: float = 10.0,
    columns: int | None = None,
    min_range_m: float | None = None,
    cache: str | Path | None = None,
    cache_gb: float | None = None,
    truth: str = "av2",
) -> Pairs:
    """Open an Argoverse 2 split or log, a Waymo split, a folder of clouds or HDF5 scenes, as pairs.

    path: a folder, or the address s3://bucket/... of a split or log of Argoverse 2 in its bucket.

    true_flow: False leaves the annotations unread; training without labels needs none.
    ground: where the mask comes from. "raster" and "vector" are Argoverse 2's maps, "points" needs
    no map, "none" masks nothing; "auto" takes the first of raster, vector, points that a log has.
    pairs_per_log: this many at even intervals; None: all. 12 and 24 are drawn as the published
    script draws the paper's 3x and 5x from the LiDAR data set, see `paper_draw`.
    sweeps_per_log: only the first ones; None: all. The published code takes 145 of a Sensor log.
    poses, rate_hz, columns, min_range_m: for folders of clouds only, see `clouds.CloudPairs`.
    cache, cache_gb: for addresses only, see `remote.open_remote`.
    truth: how Argoverse 2's boxes become flow: "av2" as its own tools do it; "grown" as many papers
    since 2025 do, see `grown_flow`.
    A folder that cannot be read is skipped, with a line in the result's `skipped`.
    Raises DataError if the folder is not a data set, and names the splits that it holds.
    """
    address, path = str(path), Path(path)
    if ground not in GROUNDS:
        raise DataError(f"ground {ground!r}: choose {', '.join(GROUNDS)}")
    if truth not in TRUTHS:
        raise DataError(f"truth {truth!r}: choose {', '.join(TRUTHS)}")
    for name, count in (("pairs_per_log", pairs_per_log), ("sweeps_per_log", sweeps_per_log)):
        if count is not None and count < 1:
            raise DataError(f"{name} {count}: give a number of 1 or more, or None for all")
    cloud_options = (poses, rate_hz, columns, min_range_m)
    if address.startswith("s3://"):
        refuse_cloud_options(path, "Argoverse 2's", *cloud_options)
        remote = _import_reader("remote", f"{address}: an address")
        options = {"pairs_per_log": pairs_per_log, "sweeps_per_log": sweeps_per_log, "truth": truth}
        return remote.open_remote(address, true_flow, ground, cache, cache_gb, **options)
    with naming(path, "cannot be opened", "give a folder that you may read"):
        if not path.is_dir():
            found = "is a file" if path.exists() else "no such folder"
            raise DataError(f"{path}: {found}; give a folder of Argoverse 2 logs, or one log")
        # The path to the folder of a log's sweeps is taken as the log.
        log = parent_of(parent_of(path))
        if is_log(log) and log_id_of(path) == "lidar" and any(path.glob("*.feather")):
            path = log
        logs, skipped = ([path], []) if is_log(path) else subfolders(path, is_log)

    # The names of the subfolders tell the kind of data set. This only lists folders: sweeps are
    # read when a pair is asked for, so a split of a thousand logs opens in half a second.
    if logs:
        refuse_cloud_options(path, "Argoverse 2's", *cloud_options)
        pairs = Argoverse2Pairs(logs, true_flow, ground, pairs_per_log, sweeps_per_log, truth)
    else:
        if truth != "av2":
            raise DataError(f"{path}: truth {truth!r} is for Argoverse 2's boxes; leave it out")
        if is_waymo(path):
            reader = _import_reader("waymo", f"{path}: a Waymo split")
        elif is_hdf5(path):
            reader = _import_reader("hdf5", f"{path}: scenes in HDF5")
        else:
            what = "no Argoverse 2 log in it (is it one folder too high?), and any other data"
            reader = _import_reader("clouds", f"{path}: {what}")
        options = (true_flow, ground, pairs_per_log, sweeps_per_log, *cloud_options)
        try:
            pairs = reader.open_folder(path, *options)
        except DataError as error:
            raise DataError(f"{error}{_reasons(skipped)}") from error
    pairs.skipped[:0] = skipped
    if len(pairs) == 0:
        found = f"no two consecutive sweeps in {len(pairs.stamps)} logs"
        raise DataError(f"{path}: {found}; add more sweeps{_reasons(pairs.skipped)}")
    return pairs


def _reasons(skipped: list[str]) -> str:
    return f" ({len(skipped)} skipped: {'; '.join(skipped[:3])})" if skipped else ""


def subfolders(folder: Path, is_wanted: Callable[[Path], bool]) -> tuple[list[Path], list[str]]:
    """The wanted folders in a folder, sorted; and one line per folder that cannot be used."""
    wanted, skipped = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        # A log that is still being written or copied has a name that starts with a dot.
        try:
            if not entry.name.startswith(".") and entry.is_dir() and is_wanted(Path(entry)):
                entry.name.encode()  # it is the id of a log, which labels store as UTF-8
                wanted.append(Path(entry))
        except (OSError, UnicodeError) as error:  # such as lost+found, which only root may read
            skipped.append(f"{entry.path}: {error}; rename it or change its permissions")
    return wanted, skipped


def is_log(folder: Path) -> bool:
    return (folder / "sensors" / "lidar").is_dir()


def is_waymo(folder: Path) -> bool:
    return (folder / "lidar").is_dir() and (folder / "vehicle_pose").is_dir()


def is_hdf5(folder: Path) -> bool:
    return any(folder.glob("[!.]*.h5"))


def refuse_cloud_options(path: Path, whose: str, *values: object) -> None:
    """Raise DataError if any of poses, rate_hz, columns, min_range_m is not its default."""
    defaults = {"poses": None, "rate_hz": 10.0, "columns": None, "min_range_m": None}
    for (name, default), value in zip(defaults.items(), values, strict=True):
        if value != default:
            raise DataError(f"{path}: {name} {value} is not for {whose} folders; leave it out")


def _import_reader(name: str, what: str) -> ModuleType:
    """Another of our files, imported only when needed: this one must work without them."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{what} needs {name}.py ({error}); copy {name}.py too") from error


def log_id_of(folder: Path) -> str:
    """The folder's own name, also for "." and ".."."""
    return os.path.basename(os.path.abspath(folder))


def parent_of(folder: Path) -> Path:
    """The folder above, also for "." and ".."."""
    return Path(os.path.abspath(folder)).parent


class Pairs(torch.utils.data.Dataset):
    """Pairs of consecutive sweeps, ordered by log and time. Every reader is a subclass."""

    def __init__(self):
        self.pair_keys = PairKeys()
        # One line with the reason per file that is not a sweep, and per two that form no pair.
        self.skipped: list[str] = []
        self.notes: list[str] = []  # what a user should know
        # log id -> the times (ns) of all its sweeps, sorted, whether they form pairs or not
        self.stamps: dict[str, array[int]] = {}

    def __len__(self) -> int:
        return len(self.pair_keys)

    def __getitem__(self, index: int) -> SweepPair:
        return self.read(self.pair_keys[index])

    def read(self, key: PairKey) -> SweepPair:
        """Read any two sweeps of a log. Raises DataError naming the file that cannot be used."""
        raise NotImplementedError

    def note(self, line: str) -> None:
        """Add to `notes` what only reading shows, and report it on stderr, once per process."""
        if line not in self.notes:
            self.notes.append(line)
            print(line, file=sys.stderr)

    def add_log(
        self,
        path: Path,
        log_id: str,
        stamps: Collection[int],
        pairs_per_log: int | None,
        sweeps_per_log: int | None,
        max_gap_ns: int = MAX_GAP_NS,
    ) -> None:
        """Add the pairs of one log, from the times (ns) of its sweeps; path: for messages."""
        # A number of more than 63 bits is not a time: it would be some 300 years from now.
        times = [stamp for stamp in stamps if stamp < 2**63]
        if len(times) < len(stamps):
            found = f"{len(stamps) - len(times)} sweeps are named by numbers of over 63 bits"
            self.skipped.append(f"{path}: {found}, which are not times in ns; rename them")
        self.stamps[log_id] = array("q", sorted(times))
        # Two sweeps with a missing one between them do not form a pair: objects move too far.
        keys, used = {}, self.stamps[log_id][:sweeps_per_log]  # index of sweep 0 -> pair
        for index, (stamp0, stamp1) in enumerate(itertools.pairwise(used)):
            gap_ns = stamp1 - stamp0
            if 0 < gap_ns <= max_gap_ns:
                keys[index] = PairKey(log_id, stamp0, stamp1)
            else:
                reason = f"the next sweep is {gap_ns / 1e9:.2f} s later"
                self.skipped.append(f"{path}: no pair at {stamp0}: {reason}")
        if pairs_per_log in PAPER_DRAWS:
            drawn = [index for index in paper_draw(len(used), pairs_per_log) if index in keys]
        else:
            every = list(keys)
            drawn = [every[i] for i in evenly_spread(len(every), pairs_per_log)]
        self.pair_keys.extend(keys[index] for index in drawn)


PAPER_DRAWS = (12, 24)  # pairs of a log of the LiDAR data set: the paper's 3x, and its 5x


def paper_draw(sweeps: int, wanted: int) -> list[int]:
    """The sweeps of a log at which the published script takes a pair, for 3x (12) or 5x (24).

    5x has the pairs of 3x, and as many halfway between them. There may be a few more if the length
    of the log is not a multiple of the step.
    """
    step = (sweeps - 1) // 11
    if step == 0:
        return list(range(sweeps - 1))  # a short log: every pair
    starts = (0,) if wanted == 12 else (0, step // 2)
    chosen = {index for start in starts for index in range(start, sweeps - 1, step)}
    return sorted(chosen)


def evenly_spread(count: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` (None: all) of `count` items, at even intervals."""
    # Nested: 24 of a log include its 12, so a bigger training set only adds to a smaller one.
    wanted = count if wanted is None else min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


def subset(dataset: Pairs, pair_keys: Sequence[PairKey]) -> Pairs:
    """A copy of the data set that has only these pairs, in the order given."""
    # Shallow: the copy shares the logs with the original, which keeps its own list of pairs.
    part = copy.copy(dataset)
    part.pair_keys = PairKeys(pair_keys)
    return part


class Argoverse2Pairs(Pairs):
    """Pairs of consecutive sweeps of Argoverse 2 logs; for the arguments see `open_dataset`."""

    def __init__(
        self,
        logs: list[Path],
        true_flow: bool = True,
        ground: str = "auto",
        pairs_per_log: int | None = None,
        sweeps_per_log: int | None = None,
        truth: str = "av2",
    ):
        super().__init__()
        self.true_flow, self.ground, self.truth = true_flow, ground, truth
        self._folders = {log_id_of(log): log for log in logs}
        for log in logs:
            try:
                stamps = self._stamps(log / "sensors" / "lidar")
                self.add_log(log, log_id_of(log), stamps, pairs_per_log, sweeps_per_log)
            except OSError as error:
                self.skipped.append(f"{log}: {error}; change its permissions")

    def _stamps(self, lidar: Path) -> list[int]:
        """The times (ns) of a log's sweeps, from the names of their files."""
        stamps, strange = [], {}
        for name in self._names(lidar):
            stem, suffix = os.path.splitext(name)
            # Only names as `str` writes numbers: the time 7 would not lead back to a file 007.
            if suffix == ".feather" and stem.isdecimal() and str(int(stem)) == stem:
                stamps.append(int(stem))
            elif suffix == ".feather":  # a Mac may add ._x for each x: one line for all of them
                strange["._" if stem.startswith("._") else name] = name
        wanted = "a sweep is named <timestamp_ns>.feather; remove or rename this file"
        self.skipped += [f"{lidar / name}: {wanted}" for name in strange.values()]
        return stamps

    def _names(self, lidar: Path) -> list[str]:
        """The names of the files in a log's folder of sweeps."""
        return sorted(os.listdir(lidar))

    def log(self, log_id: str) -> Log:
        """Poses, ground and boxes of a log, read from its files."""
        folder = self._folders[log_id]
        with naming(folder, "the log cannot be read", "download it again or remove it"):
            return _read_log(folder, self.truth if self.true_flow else None, self.ground)

    def read(self, key: PairKey) -> SweepPair:
        folder, log = self._folders[key.log_id], self.log(key.log_id)

        # Each sweep in its own ego frame, with its own pose: the ego moves between the two.
        points, is_ground, city_SE3_egos = [], [], []
        for stamp in (key.timestamp0_ns, key.timestamp1_ns):
            sweep = read_points(folder / "sensors" / "lidar" / f"{stamp}.feather")
            points.append(nan_bad_rows(sweep))
            city_SE3_egos.append(log.city_SE3_ego(stamp))
            is_ground.append(log.is_ground(points[-1], city_SE3_egos[-1]))
            if self.ground != "none" and (is_ground[-1].all() or not is_ground[-1].any()):
                self.note(f"{folder}: all or no points of a sweep are ground: is it the right map?")
        ego1_SE3_ego0 = inverse(city_SE3_egos[1]) @ city_SE3_egos[0]
        with naming(log.pose_file, f"wrong poses of sweeps {key[1]} and {key[2]}"):
            check_ego_motion(ego1_SE3_ego0, key.seconds)

        # The true flow, unless there are no boxes or they are not wanted.
        truth = {}
        if log.boxes is not None:
            boxes0, boxes1 = (log.boxes.get(stamp, []) for stamp in key[1:])
            flow_of = grown_flow if self.truth == "grown" else true_residual_flow
            values = flow_of(points[0], boxes0, boxes1, ego1_SE3_ego0)
            truth = dict(zip(TRUTH_FIELDS, values, strict=True))
            if not boxes0:
                self.note(f"{folder}: sweeps without boxes: all their points count as background")
        return make_pair(key, points, is_ground, ego1_SE3_ego0, truth, log.lidar)


def make_pair(
    key: PairKey,
    points: list[np.ndarray],
    is_ground: list[np.ndarray],
    ego1_SE3_ego0: np.ndarray,
    truth: dict[str, np.ndarray],
    lidar: np.ndarray | None = None,
) -> SweepPair:
    """A pair from two sweeps (N, 3) float64, each still in its own ego frame.

    truth: name in TRUTH_FIELDS -> values for sweep 0; empty where unknown.
    lidar: (3,) where the LiDAR is mounted, in the ego frame, if that is known.
    """
    if truth:
        speed_mps = np.abs(truth["flow"]).max(initial=0) / max(abs(key.seconds), 1e-9)
        if not speed_mps <= MAX_POINT_SPEED_MPS:
            found = f"its boxes move at {speed_mps:.0f} m/s between {key[1]} and {key[2]}"
            raise DataError(f"{key.log_id}: {found}; download its annotations again")
    # Sweep 1 moves into the frame of sweep 0 here. Only after that do points become float32.
    ego0_SE3_ego1 = inverse(ego1_SE3_ego0)
    points1_in_ego0 = transform(ego0_SE3_ego1, points[1])
    lidar1 = None if lidar is None else torch.from_numpy(transform(ego0_SE3_ego1, lidar[None])[0])
    return SweepPair(
        torch.from_numpy(points[0].astype(np.float32)),
        torch.from_numpy(points1_in_ego0.astype(np.float32)),
        *(torch.from_numpy(mask) for mask in is_ground),
        torch.from_numpy(ego1_SE3_ego0),
        *key,
        **{name: torch.from_numpy(values) for name, values in truth.items()},
        lidar1=lidar1,
    )


# --- Ground and grid ------------------------------------------------------------------------------


def input_masks(
    pair: SweepPair, half_extent_m: Extent = GRID_HALF_EXTENT_M
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N0,) and (N1,) bool: the points that the method sees, not ground and inside the grid."""
    # This is the one mask: teacher, student, and score use it, so that they are compared on the
    # same points.
    is_input0 = ~pair.is_ground0 & is_in_grid(pair.pc0, half_extent_m)
    is_input1 = ~pair.is_ground1 & is_in_grid(pair.pc1, half_extent_m)
    return is_input0, is_input1


def is_in_grid(points: torch.Tensor, half_extent_m: Extent = GRID_HALF_EXTENT_M) -> torch.Tensor:
    """(N,) bool: which points (N, 3) lie in [-half, half) in x, y, and z. False for NaN."""
    half = points.new_tensor(half_extent_m)
    return ((points >= -half) & (points < half)).all(dim=1)


@dataclass(frozen=True)
class GroundRaster:
    """Height of the ground on an image with pixels of 30 cm."""

    # A city point (x, y) falls into the pixel (column, row) = s * (R @ (x, y) + t).
    height: np.ndarray  # (rows, columns) float16, meters, NaN where unknown
    R: np.ndarray  # (2, 2)
    t: np.ndarray  # (2,) meters
    s: float  # pixels per meter

    def is_ground(
        self,
        points_city: np.ndarray,
        threshold_m: float = GROUND_THRESHOLD_M,
        snap: Callable[[np.ndarray], np.ndarray] = np.round,
    ) -> np.ndarray:
        """(N,) bool: at most `threshold_m` above the ground, or anywhere below it.

        The defaults are ZeroFlow's rule; the rule of the av2 package, and of the masks of the 2023
        challenge, is `threshold_m=0.30, snap=np.trunc`. Where no height is known: not ground.
        """
        # The pixel of each point stays a float for now: NaN cannot become an index.
        pixel = snap(self.s * (points_city[:, :2] @ self.R.T + self.t))  # (N, 2)
        column, row = pixel[:, 0], pixel[:, 1]

        # Look up the height below the points that are on the map; the others keep NaN.
        rows, columns = self.height.shape
        is_inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        inside_row, inside_column = row[is_inside].astype(int), column[is_inside].astype(int)
        ground_z = np.full(len(points_city), np.nan)
        ground_z[is_inside] = self.height[inside_row, inside_column]

        # Points below the surface are ground, too: they are reflections. Off the map the height is
        # NaN, and a comparison with NaN is False, so those points are kept.
        return points_city[:, 2] - ground_z <= threshold_m


# --- True flow from tracked boxes -----------------------------------------------------------------


class Box(NamedTuple):
    """A tracked box at one time stamp, in the ego frame of that time stamp."""

    track: str
    category: int  # index into CATEGORIES
    size: np.ndarray  # (3,) length, width, height in meters
    ego_SE3_box: np.ndarray  # (4, 4)


def true_residual_flow(
    points: np.ndarray, boxes0: list[Box], boxes1: list[Box], ego1_SE3_ego0: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flow that the tracked boxes imply, as av2's own tools make it, but residual.

    points (N, 3) float64 in the ego frame of sweep 0; boxes in file order (later ones overwrite).
    Returns flow (N, 3) float32, category (N,) uint8, is_dynamic (N,) bool, is_valid (N,) bool.
    """
    # Points outside all boxes are background: they move only with the ego-motion, so their residual
    # is exactly zero. A row that is not finite is in no box, and is not valid.
    flow = np.zeros((len(points), 3))
    category = np.zeros(len(points), dtype=np.uint8)
    is_valid = np.isfinite(points[:, 0] + points[:, 1] + points[:, 2])
    moved_SE3_ego0s = _motions_of_boxes(boxes0, boxes1, ego1_SE3_ego0)

    sweep = _SortedPoints(points)
    for box, moved_SE3_ego0 in zip(boxes0, moved_SE3_ego0s, strict=True):
        # Length and width grow by 0.2 m in total: points on a car's skin belong to the car.
        rows = sweep.rows_in(box, (0.2, 0.2, 0.0))
        category[rows] = box.category
        is_valid[rows] = moved_SE3_ego0 is not None
        flow[rows] = 0.0
        if moved_SE3_ego0 is not None:
            flow[rows] = transform(moved_SE3_ego0, points[rows]) - points[rows]
    is_dynamic = np.linalg.norm(flow, axis=1) >= DYNAMIC_THRESHOLD_M
    return flow.astype(np.float32), category, is_dynamic, is_valid


def grown_flow(
    points: np.ndarray, boxes0: list[Box], boxes1: list[Box], ego1_SE3_ego0: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`true_residual_flow` with boxes that grow with speed, as in many papers since 2025.

    In 0.1 s a fast car moves partly out of its box, so its ends would count as background. This
    follows the code that these papers use (OpenSceneFlow, March 2025), whose rule is not quite the
    one that is described: see the comment on `displacement`. Boxes without points count, too.
    """
    flow = np.zeros((len(points), 3))
    category = np.zeros(len(points), dtype=np.uint8)
    is_valid = np.isfinite(points).all(axis=1)
    moved_SE3_ego0s = _motions_of_boxes(boxes0, boxes1, ego1_SE3_ego0)

    sweep = _SortedPoints(points)
    for box, moved_SE3_ego0 in zip(boxes0, moved_SE3_ego0s, strict=True):
        rows = sweep.rows_in(box)
        if moved_SE3_ego0 is None:
            is_valid[rows] = False
            continue
        # The description says "mean displacement". The code takes the norm over the *points*, for
        # x, y, and z each, and then the mean of the three: it grows with the root of the number of
        # points. A parked car of 400 points whose box jitters by 6 mm is over the threshold.
        motion = transform(moved_SE3_ego0, points[rows]) - points[rows]
        displacement = np.linalg.norm(motion, axis=0).mean()
        if displacement > 0.04:
            rows = sweep.rows_in(box, (0.2 + min(displacement / 2, 2.0), 0.2, 0.2))
        category[rows] = box.category
        flow[rows] = transform(moved_SE3_ego0, points[rows]) - points[rows]
    is_dynamic = np.linalg.norm(flow, axis=1) >= DYNAMIC_THRESHOLD_M
    return flow.astype(np.float32), category, is_dynamic, is_valid


def _motions_of_boxes(
    boxes0: list[Box], boxes1: list[Box], ego1_SE3_ego0: np.ndarray
) -> list[np.ndarray | None]:
    """For each box of sweep 0 the transform (4, 4), in ego frame 0, that moves its points.

    None if the object is gone in sweep 1.
    """
    ego1_SE3_box1 = {box.track: box.ego_SE3_box for box in boxes1}
    moved_SE3_ego0s: list[np.ndarray | None] = []
    for box in boxes0:
        moved_SE3_ego0 = None
        if box.track in ego1_SE3_box1:
            # The points move with their box: from ego 0 into the box as it is at time 0, out of
            # the box as it is at time 1, and back to ego 0. The last step removes the ego-motion.
            ego0_SE3_box1 = inverse(ego1_SE3_ego0) @ ego1_SE3_box1[box.track]
            moved_SE3_ego0 = ego0_SE3_box1 @ inverse(box.ego_SE3_box)
        moved_SE3_ego0s.append(moved_SE3_ego0)
    return moved_SE3_ego0s


class _SortedPoints:
    """The points of a sweep sorted by x, so that each box tests only a short slice of them."""

    def __init__(self, points: np.ndarray):
        self.points = points  # (N, 3)
        self.by_x = np.argsort(points[:, 0])  # NaN comes last
        self.sorted_x = points[self.by_x, 0]

    def rows_in(self, box: Box, growth: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
        """Indices of the points in a box; growth: meters added to length, width, height."""
        half = (box.size + growth) / 2
        # Candidates lie within half a diagonal of the center, in x and in y.
        center_x, center_y = box.ego_SE3_box[:2, 3]
        reach = np.linalg.norm(half)
        first, last = np.searchsorted(self.sorted_x, (center_x - reach, center_x + reach))
        near = self.by_x[first:last]
        near = near[np.abs(self.points[near, 1] - center_y) <= reach]
        # In the box's own frame, where its sides are parallel to the axes, the test is exact.
        points_box = transform(inverse(box.ego_SE3_box), self.points[near])
        return near[(np.abs(points_box) <= half).all(axis=1)]


# --- Ego-motion -----------------------------------------------------------------------------------


def check_ego_motion(ego1_SE3_ego0: np.ndarray, seconds: float) -> None:
    """Raise ValueError if no vehicle can move like this in that time."""
    seconds = max(abs(seconds), 1e-9)  # two sweeps at the same moment have the same pose
    speed = np.linalg.norm(ego1_SE3_ego0[:3, 3]) / seconds
    turn = np.degrees(Rotation.from_matrix(ego1_SE3_ego0[:3, :3]).magnitude()) / seconds
    if not (speed <= MAX_EGO_SPEED_MPS and turn <= MAX_EGO_TURN_DEG_PER_S):
        most = f"{MAX_EGO_SPEED_MPS:.0f} m/s and {MAX_EGO_TURN_DEG_PER_S:.0f} degrees/s"
        raise ValueError(f"{speed:.0f} m/s and {turn:.0f} degrees/s; a vehicle does at most {most}")


def total_flow(residual: torch.Tensor, pair: SweepPair) -> torch.Tensor:
    """Convert residual flow to Argoverse 2's raw flow, both (N0, 3) float32."""
    assert residual.shape == pair.pc0.shape, (residual.shape, pair.pc0.shape)
    # The end point is *transformed* into the ego frame of sweep 1: ego1_SE3_ego0 @ (p + r) - p.
    # Adding the residual to the rigid flow is 8 cm wrong for a car at 15 m/s seen from an ego that
    # turns at 30 degrees/s: the residual must turn, too.
    points = pair.pc0.double()
    rotation, translation = pair.ego1_SE3_ego0[:3, :3], pair.ego1_SE3_ego0[:3, 3]
    return ((points + residual.double()) @ rotation.T + translation - points).float()


def residual_flow(total: torch.Tensor, pair: SweepPair) -> torch.Tensor:
    """The residual of a raw flow (N0, 3), float32: the inverse of `total_flow`."""
    assert total.shape == pair.pc0.shape, (total.shape, pair.pc0.shape)
    points = pair.pc0.double()
    rotation, translation = pair.ego1_SE3_ego0[:3, :3], pair.ego1_SE3_ego0[:3, 3]
    # For row vectors, v @ R applies the inverse rotation.
    return ((points + total.double() - translation) @ rotation - points).float()


def transform(target_SE3_source: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) of the source frame in the target frame; give float64."""
    moved = points @ target_SE3_source[:3, :3].T
    moved += target_SE3_source[:3, 3]  # in place: twice as fast
    return moved


def inverse(target_SE3_source: np.ndarray) -> np.ndarray:
    """source_SE3_target (..., 4, 4) of a rigid transform."""
    rotation = np.swapaxes(target_SE3_source[..., :3, :3], -1, -2)
    translation = target_SE3_source[..., :3, 3:]
    return rigid(rotation, -(rotation @ translation)[..., 0])


def rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Transforms (..., 4, 4) from rotations (..., 3, 3) and translations (..., 3)."""
    target_SE3_source = np.zeros((*translation.shape[:-1], 4, 4))
    target_SE3_source[..., :3, :3] = rotation
    target_SE3_source[..., :3, 3] = translation
    target_SE3_source[..., 3, 3] = 1.0
    return target_SE3_source


def poses_from_rows(values: np.ndarray) -> np.ndarray:
    """Transforms (..., 4, 4) from rows of POSE_COLUMNS (..., 7); NaN where a row is not a pose."""
    if not values.size:
        return np.zeros((*values.shape[:-1], 4, 4))  # SciPy before 1.16 refuses empty arrays
    # SciPy raises for a quaternion of zeros. Such rows get any rotation, and NaN as translation.
    quaternion = values[..., :4]
    is_rotation = (quaternion**2).sum(axis=-1, keepdims=True) > 1e-6  # False for NaN
    quaternion = np.where(is_rotation, quaternion, (1, 0, 0, 0))
    rotation = Rotation.from_quat(quaternion, scalar_first=True).as_matrix()
    return rigid(rotation, np.where(is_rotation, values[..., 4:], np.nan))


# --- The files of a log ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """What all sweeps of a log share."""

    # Poses stay rows of numbers until they are needed, so that a broken one affects only the pairs
    # that use it.
    pose_file: Path
    poses: dict[int, np.ndarray]  # time stamp -> (7,), see POSE_COLUMNS
    ground: Any  # GroundRaster or another map with `is_ground`, or "points" or "none"
    boxes: dict[int, list[Box]] | None  # by time stamp; None: unknown, or not wanted
    lidar: np.ndarray | None  # (3,) where it is mounted, in the ego frame; None: unknown

    def city_SE3_ego(self, timestamp_ns: int) -> np.ndarray:
        remedy = "download the file again or remove the sweep"
        if timestamp_ns not in self.poses:
            raise DataError(f"{self.pose_file}: no pose for sweep {timestamp_ns}; {remedy}")
        city_SE3_ego = poses_from_rows(self.poses[timestamp_ns])
        if not np.isfinite(city_SE3_ego).all():
            found = f"the pose of sweep {timestamp_ns} is not finite"
            raise DataError(f"{self.pose_file}: {found}; {remedy}")
        return city_SE3_ego

    def is_ground(self, points: np.ndarray, city_SE3_ego: np.ndarray) -> np.ndarray:
        """(N,) bool of the points (N, 3) of a sweep in its own ego frame."""
        if self.ground == "none":
            return np.zeros(len(points), dtype=bool)
        if self.ground == "points":
            clouds = _import_reader("clouds", f"{self.pose_file}: the ground without a map")
            return clouds.is_ground_without_map(points)
        return self.ground.is_ground(transform(city_SE3_ego, points))


@functools.lru_cache(maxsize=8)  # consecutive pairs share their log
def _read_log(folder: Path, truth: str | None, ground: str) -> Log:
    pose_file = folder / "city_SE3_egovehicle.feather"
    table = read_feather(pose_file, ["timestamp_ns", *POSE_COLUMNS])
    stamps = table["timestamp_ns"].to_pylist()
    poses = dict(zip(stamps, read_numbers(pose_file, table, POSE_COLUMNS), strict=True))
    annotation_file = folder / "annotations.feather"  # the test split has none
    has_boxes = truth is not None and annotation_file.exists()
    boxes = _read_boxes(annotation_file, truth) if has_boxes else None
    lidar_file = folder / "calibration" / "egovehicle_SE3_sensor.feather"
    lidar = _read_lidar(lidar_file) if lidar_file.exists() else None
    return Log(pose_file, poses, _read_ground(folder / "map", ground), boxes, lidar)


def _read_lidar(file: Path) -> np.ndarray:
    """(3,) where the LiDAR is mounted, in the ego frame: the middle of the two on the roof."""
    columns = ["tx_m", "ty_m", "tz_m"]
    table = read_feather(file, ["sensor_name", *columns])
    is_lidar = [name in ("up_lidar", "down_lidar") for name in table["sensor_name"].to_pylist()]
    places = read_numbers(file, table, columns)[is_lidar]  # (2, 3)
    if len(places) == 0 or not np.abs(places).max() < 10:  # False for NaN
        raise DataError(f"{file}: no lidar within 10 m of the ego; download it again or remove it")
    return places.mean(axis=0)


def _read_ground(folder: Path, ground: str) -> Any:
    """The map that `ground` names; "points" and "none" are returned as they are."""
    if folder.is_dir():
        os.listdir(folder)  # raises without permission, where `glob` would find nothing
    if ground == "auto":
        has_raster = any(any(folder.glob(pattern)) for pattern in RASTER_FILES)
        has_lines = any(folder.glob(VECTOR_FILES[0]))
        ground = "raster" if has_raster else "vector" if has_lines else "points"
    if ground == "vector":
        vectormap = _import_reader("vectormap", f"{folder}: ground from a vector map")
        return vectormap.read_ground(_map_file(folder, VECTOR_FILES[0]))
    return _read_ground_raster(folder) if ground == "raster" else ground


def _map_file(folder: Path, pattern: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        found = f"needs one {pattern}, found {[file.name for file in files]}"
        raise DataError(f"{folder}: a log's map {found}; download it, or choose another ground")
    return files[0]


def _read_ground_raster(folder: Path) -> GroundRaster:
    height_file, sim2_file = (_map_file(folder, pattern) for pattern in RASTER_FILES)
    with naming(folder, "the ground raster cannot be read", "download the map folder again"):
        height = np.load(height_file, allow_pickle=False)
        if height.ndim != 2 or height.dtype.kind not in "fiu":
            raise ValueError(f"its shape is {height.shape}, its type {height.dtype}")
        if not any(np.isfinite(row).any() for row in height):
            raise ValueError("no pixel has a height")
        # Sim2 is the similarity transform from city coordinates (meters) to pixels of the image.
        img_Sim2_city = json.loads(sim2_file.read_bytes())
        rotation = np.reshape(img_Sim2_city["R"], (2, 2))
        translation = np.reshape(img_Sim2_city["t"], 2)
        scale = float(img_Sim2_city["s"])
        is_rotation = np.abs(rotation @ rotation.T - np.eye(2)).max() < 1e-3
        if not (is_rotation and np.isfinite(translation).all() and 0 < scale < np.inf):
            raise ValueError(f"its Sim2 is not finite, or its R or s is wrong: {img_Sim2_city}")
        return GroundRaster(height, rotation, translation, scale)


def _read_boxes(file: Path, truth: str) -> dict[int, list[Box]]:
    """All boxes of a log by time stamp, in file order."""
    size_columns = ("length_m", "width_m", "height_m")
    names = ["timestamp_ns", "track_uuid", "category", "num_interior_pts"]
    table = read_feather(file, [*names, *size_columns, *POSE_COLUMNS])
    stamps, tracks, categories = (table[name].to_pylist() for name in names[:3])
    unknown = sorted(map(str, set(categories) - set(CATEGORIES)))
    if unknown:
        raise DataError(f"{file}: unknown categories {unknown}; Argoverse 2 has {CATEGORIES[1:]}")

    index = {name: i for i, name in enumerate(CATEGORIES)}
    counts = read_numbers(file, table, ["num_interior_pts"])[:, 0]
    sizes = read_numbers(file, table, size_columns)
    ego_SE3_boxes = poses_from_rows(read_numbers(file, table, POSE_COLUMNS))
    columns = (tracks, [index[category] for category in categories], sizes, ego_SE3_boxes)
    # Times in another unit, or of another log, would leave every sweep without a box.
    files = set(os.listdir(file.parent / "sensors" / "lidar"))
    has_sweep = any(f"{stamp}.feather" in files for stamp in stamps)
    least_points = 0 if truth == "grown" else 1
    return boxes_by_stamp(file, stamps, has_sweep, counts, columns, least_points)


def boxes_by_stamp(
    file: Path,
    stamps: list[int],
    has_sweep: bool,
    counts: np.ndarray,
    columns: tuple,
    least_points: int = 1,
) -> dict[int, list[Box]]:
    """The boxes of a file by time stamp, in file order; columns: one for each field of a Box.

    has_sweep: whether any stamp equals a sweep's. counts: the number of points in each box.
    Raises DataError where motion would otherwise be lost or invented without notice.
    """
    # Boxes without a point inside (17 % of the rows) are dropped, in either sweep of a pair. This
    # is not documented, but with it our labels equal the av2 package's to the last point.
    boxes: dict[int, list[Box]] = {}
    tracks, categories, sizes, ego_SE3_boxes = columns
    for i in np.flatnonzero(counts >= least_points).tolist():
        box = Box(tracks[i], categories[i], sizes[i], ego_SE3_boxes[i])
        boxes.setdefault(stamps[i], []).append(box)

    # A log with a broken box is refused as a whole: its points would count as background.
    is_finite = np.isfinite(ego_SE3_boxes).all() and ((sizes > 0) & np.isfinite(sizes)).all()
    is_one_object = True  # False if two boxes of one sweep have no track, or the same one
    for of_sweep in boxes.values():
        is_one_object &= len({box.track for box in of_sweep} - {None, ""}) == len(of_sweep)
    for is_wrong, reason in (
        (not is_finite, "a box has a size or pose that is not a number, or a size of 0 or less"),
        (np.isnan(counts).any(), "the number of points in a box is missing"),
        (stamps and not boxes, "no box contains a point, as if nothing moved"),
        (stamps and not has_sweep, "no time stamp (in ns) equals a sweep's"),
        (not is_one_object, "a track id is missing, or twice in one sweep"),
    ):
        if is_wrong:
            raise DataError(f"{file}: {reason}; download it again")
    return boxes


# --- Any file -------------------------------------------------------------------------------------


def _read_xyz(file: Path) -> np.ndarray:
    return stack(read_feather(file, ["x", "y", "z"]), "xyz")


def read_points(file: Path, read: Callable[[Path], np.ndarray] = _read_xyz) -> np.ndarray:
    """(N, 3): the points of a sweep, in the file's own floating dtype.

    read: reads a file's array (N, 3 or more); the default reads Argoverse 2's Feather files.
    Raises DataError naming the file, also where its points are implausible.
    """
    with naming(file, "its points cannot be read"):
        if not file.is_file():
            raise DataError(f"{file}: no such file; download it again, or give another")
        points = np.asarray(read(file))
        # An array of three long rows is a transposed cloud.
        if points.ndim != 2 or not 3 <= points.shape[1] <= max(16, len(points)):
            raise ValueError(f"its shape is {points.shape}, expected (N, 3)")
        points = points[:, :3]
        if points.dtype.kind not in "fiuO":  # O: a column with nulls
            raise ValueError(f"its values are {points.dtype}, expected numbers")
        # torch lacks some types of NumPy, such as those in another byte order.
        if points.dtype not in (np.float16, np.float32):
            points = points.astype(np.float64)
    try:
        check_points(points)
    except ValueError as error:
        raise DataError(f"{file}: {error}; download it again or remove it") from error
    return points


def check_points(points: np.ndarray) -> None:
    """Raise ValueError if an array (N, 3) cannot be a sweep of a LiDAR."""
    # A thousand rows are enough, unless none of them is a return.
    sample = nan_bad_rows(points[:: len(points) // 1_000 + 1])
    if np.isnan(sample).all():
        sample = nan_bad_rows(points)
    sample = sample[np.isfinite(sample[:, 0])]
    if not len(sample):
        raise ValueError("the sweep has no points")
    # The LiDARs of cars see up to 300 m. Other units, and bytes read as the wrong type, go beyond.
    away_m = np.abs(sample - np.median(sample, axis=0)).max(axis=1)
    where = "over 1 km apart" if (away_m > 1_000).mean() > 0.1 else ""
    where = "nearly all at one place" if (away_m < 1e-3).mean() > 0.9 else where
    if where and len(sample) >= 20:
        raise ValueError(f"the points are {where} (are they x, y, z in meters?)")


def nan_bad_rows(points: np.ndarray) -> np.ndarray:
    """(N, 3) float64. A row that is not a point becomes all NaN, but stays where it is."""
    with np.errstate(invalid="ignore"):  # broken files may hold signaling NaN
        points = points.astype(np.float64)
    # One test of all is cheaper than one per row.
    if not np.abs(points).max(initial=0) < FARTHEST_POINT_M:
        points[~(np.abs(points) < 1e9).all(axis=1)] = np.nan  # more than float32 can hold
        # A flipped bit can put a point a million meters away. (Clouds in city coordinates begin
        # that far from their origin. If many points stray, the file is wrong: see check_points.)
        is_finite = np.isfinite(points[:, 0])
        middle = np.median(points[is_finite], axis=0) if is_finite.any() else np.zeros(3)
        is_stray = np.abs(points - middle).max(axis=1) > FARTHEST_POINT_M
        if is_stray.sum() < 0.1 * is_finite.sum():
            points[is_stray] = np.nan
    # Many drivers write 0 0 0 for a ray without a return.
    rows = np.flatnonzero(points[:, 0] == 0)
    points[rows[(points[rows] == 0).all(axis=1)]] = np.nan
    return points


def read_feather(file: Path, columns: list[str], content: bytes | None = None) -> pyarrow.Table:
    """A file that must have these columns, else DataError; content: its bytes, if in an archive."""
    with naming(file, "not a whole Feather file"):
        if content is None and not file.exists():
            raise DataError(f"{file}: no such file; download the log again or remove it")
        # pyarrow does not accept every name: it must be UTF-8, and ~ becomes the home folder.
        content = file.read_bytes() if content is None else content
        table = feather.read_table(pyarrow.BufferReader(content))
        table.validate(full=True)  # a wrong offset of a text would crash the process later
    names = table.column_names
    wrong = sorted(name for name in set(columns) if names.count(name) != 1)
    if wrong:
        found = f"has no columns {wrong}, or has them twice (it has {names})"
        raise DataError(f"{file}: {found}; is it the right file?")
    # Times must be integers: as floats they would be off by up to 128 ns, and name another sweep.
    if "timestamp_ns" in columns and not pyarrow.types.is_integer(table["timestamp_ns"].type):
        found = f"its column timestamp_ns is {table['timestamp_ns'].type}, expected integers"
        raise DataError(f"{file}: {found}; download it again")
    return table


def read_numbers(file: Path, table: pyarrow.Table, columns: Sequence[str]) -> np.ndarray:
    """The named columns of a file's table side by side, (rows, columns) float64; NaN for a null."""
    with naming(file, f"expected numbers in {list(columns)}", "download it again"):
        return stack(table, columns).astype(np.float64)


def stack(table: pyarrow.Table, columns: Sequence[str]) -> np.ndarray:
    """The named columns side by side, (rows, columns), in their own dtype."""
    arrays = [table[name].to_numpy() for name in columns]
    has_lists = any(pyarrow.types.is_nested(table[name].type) for name in columns)
    if has_lists or not {array.dtype.kind for array in arrays} <= set("fiuO"):  # O: nulls, or text
        raise TypeError(f"they are {[str(table[name].type) for name in columns]}")
    return np.stack(arrays, axis=1)


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder, also behind symbolic links; unreadable ones count as 0."""
    total = 0
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when it is complete. Raises OSError naming it."""
    # Write beside the target, under a name that no other process uses, and rename at the end.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on disk before the rename: a power cut leaves old or new
        os.replace(unfinished, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); what was there is unchanged"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
