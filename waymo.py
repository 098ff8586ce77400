"""The Waymo Open Dataset v2 as pairs of sweeps, read from its parquet files with pyarrow: no TensorFlow.

Source: Waymo Open Dataset (Sun et al., CVPR 2020), release 2.0, a file for each segment and tag:
`<split>/{lidar, lidar_pose, lidar_calibration, vehicle_pose, lidar_box}/<context_name>.parquet`.
A sweep is the first return of the TOP lidar, which is what ZeroFlow (Vedder et al., ICLR 2024) used; the four
short-range lidars are not read. Points in no-label zones stay, and count as background.

A point is where the laser hit, in the vehicle frame of the sweep's time stamp (x forward, y left, z up, origin about on
the ground under the rear axle). The vehicle moves while the lidar turns, so every pixel has a pose of its own. World
coordinates are some 15 km, so all is float64 until a point is back in a vehicle frame; but the pixels' poses are
float32 in the files, and at 15 km that has steps of 1 mm: no reader places a point better than that.

The release has no map, so ground is found from the points alone, and no flow: that follows from the tracked boxes by
the rule of Argoverse 2's labels (`data.true_residual_flow`, which grows boxes by 0.2 m in length and width). Boxes
without a lidar point are dropped.

Speed: Waymo writes some 50 sweeps, each of five lidars, into one row group, and a row costs as much as all before it in
its group. Read in order, a sweep is the next few rows; read at random, a pair takes a second or more. To train at
random, write every file of lidar and lidar_pose once again, TOP alone, a row a group (`pq` is pyarrow.parquet):
    pq.write_table(pq.read_table(file, filters=[("key.laser_name", "=", 1)]), new_file, row_group_size=1)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet
from scipy.spatial.transform import Rotation

import data

TOP = 1  # key.laser_name of the 64-beam lidar on the roof
CATEGORY_NAMES = {1: "REGULAR_VEHICLE", 2: "PEDESTRIAN", 3: "SIGN", 4: "BICYCLIST"}  # Waymo's box types in av2's words

STAMP, LASER, OBJECT_ID = "key.frame_timestamp_micros", "key.laser_name", "key.laser_object_id"
RANGE_IMAGE = "[LiDARComponent].range_image_return1"
PIXEL_POSES = "[LiDARPoseComponent].range_image_return1"
WORLD_SE3_VEHICLE = "[VehiclePoseComponent].world_from_vehicle.transform"
VEHICLE_SE3_LIDAR = "[LiDARCalibrationComponent].extrinsic.transform"
INCLINATION = "[LiDARCalibrationComponent].beam_inclination"
BOX = "[LiDARBoxComponent]"


class WaymoPairs(data.Pairs):
    """All pairs of consecutive sweeps of a split (training, validation or testing), in the order of segment and time.

    Segments are the files of lidar/; log_id is the context name. Opening reads the time stamps of vehicle_pose and
    nothing else. `true_flow=False` leaves the boxes unread; the testing split has none. The other arguments are those
    of `data.open_dataset`. A segment without time stamps is skipped, and `skipped` says why.
    """

    def __init__(self, split: str | Path, true_flow: bool = True, pairs_per_log: int = 0, sweeps_per_log: int = 0):
        super().__init__()
        self.split, self.true_flow = Path(split), true_flow
        # A file that is still being copied has a name with a dot in front.
        for file in sorted(f for f in (self.split / "lidar").glob("*.parquet") if not f.name.startswith(".")):
            try:
                micros = _read_table(self.split / "vehicle_pose" / file.name, [STAMP])[STAMP].to_numpy()
            except data.DataError as error:  # costs its segment
                self.skipped.append(str(error))
                continue
            self._add_log(file, file.stem, (micros * 1000).tolist(), pairs_per_log, sweeps_per_log)

    def read(self, key: data.PairKey) -> data.SweepPair:
        file_name = f"{key.log_id}.parquet"
        (points0, is_ground0), (points1, is_ground1) = (_read_sweep(self.split, file_name, stamp) for stamp in key[1:])
        pose_file = self.split / "vehicle_pose" / file_name
        world_SE3_ego0, world_SE3_ego1 = (_world_SE3_vehicle(pose_file, stamp) for stamp in key[1:])
        ego1_SE3_ego0 = data.inverse(world_SE3_ego1) @ world_SE3_ego0
        truth = {}
        box_file = self.split / "lidar_box" / file_name
        if self.true_flow and box_file.exists():
            boxes0, boxes1 = (_read_boxes(box_file).get(stamp, []) for stamp in key[1:])
            values = data.true_residual_flow(points0, boxes0, boxes1, ego1_SE3_ego0)
            truth = dict(zip(data.TRUTH_FIELDS, values, strict=True))
        # Masks are copied: the sweep is shared with the next pair.
        return data.make_pair(key, [points0, points1], [is_ground0.copy(), is_ground1.copy()], ego1_SE3_ego0, truth)


@functools.lru_cache(maxsize=4)  # consecutive pairs share a sweep; 4 MB each
def _read_sweep(split: Path, file_name: str, timestamp_ns: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) float64 in the vehicle frame of the sweep's stamp, and which are ground, (N,) bool."""
    lidar_file, pose_file = split / "lidar" / file_name, split / "lidar_pose" / file_name
    range_image = _Images(lidar_file, RANGE_IMAGE).read(timestamp_ns, ("H", "W", 4))
    pixel_poses = _Images(pose_file, PIXEL_POSES).read(timestamp_ns, (*range_image.shape[:2], 6))
    vehicle_SE3_lidar, inclinations = _read_calibration(split / "lidar_calibration" / file_name, len(range_image))
    world_SE3_vehicle = _world_SE3_vehicle(split / "vehicle_pose" / file_name, timestamp_ns)
    points = range_image_to_points(range_image[..., 0], pixel_poses, inclinations, vehicle_SE3_lidar, world_SE3_vehicle)
    if not np.isfinite(points).all(axis=1).any():
        raise data.DataError(f"{lidar_file}: the sweep has no points at {timestamp_ns // 1000} us; download it again")
    return points, data.is_ground_without_map(points)


def range_image_to_points(
    ranges: np.ndarray,
    pixel_poses: np.ndarray,
    inclinations: np.ndarray,
    vehicle_SE3_lidar: np.ndarray,
    world_SE3_vehicle: np.ndarray,
) -> np.ndarray:
    """The pixels that have a range > 0, row by row, as points (N, 3) float64 in the vehicle frame of the sweep.

    ranges (H, W) metres; pixel_poses (H, W, 6) roll, pitch, yaw, x, y, z, the vehicle in the world when that pixel was
    measured; inclinations (H,) radians, ascending as in the files, while row 0 of the image is the highest beam.
    Column 0 looks backwards and the columns turn clockwise seen from above, *in the vehicle's frame*: the lidar's own
    azimuth is smaller by the yaw at which it is mounted, which the extrinsic adds again.
    """
    width = ranges.shape[1]
    row, column = np.nonzero(ranges > 0)
    mounted_yaw = np.arctan2(vehicle_SE3_lidar[1, 0], vehicle_SE3_lidar[0, 0])
    azimuth = ((width - column - 0.5) / width * 2 - 1) * np.pi - mounted_yaw
    inclination = inclinations[::-1][row]
    distance = ranges[row, column].astype(np.float64)
    level = distance * np.cos(inclination)
    xyz = (level * np.cos(azimuth), level * np.sin(azimuth), distance * np.sin(inclination))
    points_lidar = np.stack(xyz, axis=1)  # (N, 3)
    points_vehicle = data.transform(vehicle_SE3_lidar, points_lidar)  # of the pixel's own moment
    points_world = _to_world(points_vehicle, pixel_poses[row, column].astype(np.float64))
    return data.transform(data.inverse(world_SE3_vehicle), points_world)


def _to_world(points: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Points (N, 3) by a pose (N, 6) each: Rz(yaw) Ry(pitch) Rx(roll) p + xyz.

    Turn by turn, which takes a tenth of the time of SciPy's Rotation.
    """
    x, y, z = points.T
    (cos_r, cos_p, cos_y), (sin_r, sin_p, sin_y) = np.cos(poses[:, :3].T), np.sin(poses[:, :3].T)
    y, z = cos_r * y - sin_r * z, sin_r * y + cos_r * z
    x, z = cos_p * x + sin_p * z, cos_p * z - sin_p * x
    x, y = cos_y * x - sin_y * y, sin_y * x + cos_y * y
    return np.stack([x, y, z], axis=1) + poses[:, 3:]


# --- Range images, a row at a time -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)  # lidar and lidar_pose of two segments: an open file and a buffer each
class _Images:
    """The TOP images of one file, found by time stamp whatever the order of the rows.

    A row group (500 MB) is read row by row, and the place in it is kept for the next sweep. Not for several threads.
    """

    def __init__(self, file: Path, column: str):
        keys = _read_table(file, [STAMP, LASER, f"{column}.values", f"{column}.shape"], read=[STAMP, LASER])
        rows = np.flatnonzero(keys[LASER].to_numpy() == TOP)
        self._row = dict(zip(keys[STAMP].to_numpy()[rows].tolist(), rows.tolist(), strict=True))
        self._path, self._column = file, column
        with _naming(file):
            self._file = parquet.ParquetFile(file, buffer_size=2**20)
        groups = range(self._file.num_row_groups)
        self._starts = np.cumsum([0] + [self._file.metadata.row_group(group).num_rows for group in groups])
        self._group, self._next, self._batches = -1, 0, iter(())

    def read(self, timestamp_ns: int, expected: tuple[int | str, ...]) -> np.ndarray:
        """(H, W, channels) float32, read-only. A name in the expected shape fits any number."""
        micros = timestamp_ns // 1000
        if micros not in self._row:
            raise data.DataError(
                f"{self._path}: no row of the TOP lidar at {micros} us; download it again or remove the segment"
            )
        row = self._read_row(self._row[micros])
        values, shape = row[f"{self._column}.values"][0].values, tuple(row[f"{self._column}.shape"][0].as_py() or ())
        count = 0 if values is None else len(values)
        fits = len(shape) == 3 and all(isinstance(e, str) or s == e for s, e in zip(shape, expected, strict=True))
        if not fits or count != np.prod(shape):
            raise data.DataError(
                f"{self._path}: {count} values of shape {shape} at {micros} us, expected {expected}; download it again"
            )
        return values.to_numpy(zero_copy_only=False).reshape(shape)

    def _read_row(self, row: int) -> pyarrow.RecordBatch:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group != self._group or row < self._next:
            columns = [f"{self._column}.values", f"{self._column}.shape"]
            self._batches = self._file.iter_batches(1, [group], columns, use_threads=False)
            self._next = self._starts[group]
        self._group = -1  # until the row has been read: after an error nobody goes on from here
        with _naming(self._path):
            batch = next(itertools.islice(self._batches, row - self._next, None))
        self._group, self._next = group, row + 1
        return batch


# --- What belongs to a whole segment ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _read_calibration(file: Path, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the TOP lidar: vehicle_SE3_lidar (4, 4), and the inclinations of its beams, (height,) radians, ascending."""
    parts = [f"{INCLINATION}.{part}" for part in ("min", "max", "values")]
    rows = [row for row in _read_table(file, [LASER, VEHICLE_SE3_LIDAR, *parts]).to_pylist() if row[LASER] == TOP]
    if len(rows) != 1:
        raise data.DataError(f"{file}: {len(rows)} rows of the TOP lidar, expected 1; download it again")
    low, high, values = (rows[0][part] for part in parts)
    if values is None:
        values = low + (np.arange(height) + 0.5) / height * (high - low)
    if len(values) != height:
        raise data.DataError(
            f"{file}: {len(values)} beam inclinations for range images of {height} rows; download it again"
        )
    return _pose(file, rows[0][VEHICLE_SE3_LIDAR]), np.array(values)


def _world_SE3_vehicle(file: Path, timestamp_ns: int) -> np.ndarray:
    return _pose(file, _read_poses(file)[timestamp_ns])


@functools.lru_cache(maxsize=8)
def _read_poses(file: Path) -> dict[int, list[float]]:
    """Sixteen numbers by time stamp in ns; float32 or float64 in the files."""
    table = _read_table(file, [STAMP, WORLD_SE3_VEHICLE])
    stamps_ns = [micros * 1000 for micros in table[STAMP].to_pylist()]
    return dict(zip(stamps_ns, table[WORLD_SE3_VEHICLE].to_pylist(), strict=True))


def _pose(file: Path, values: list[float]) -> np.ndarray:
    """Sixteen numbers, row by row, as (4, 4) float64."""
    try:
        return data.check_pose(np.reshape(np.array(values, dtype=np.float64), (4, 4)))
    except ValueError as error:
        raise data.DataError(f"{file}: a transform in it is no pose ({error}); download it again") from error


@functools.lru_cache(maxsize=8)
def _read_boxes(file: Path) -> dict[int, list[data.Box]]:
    """All boxes of a segment by time stamp in ns, in file order, but those that no lidar point lies in."""
    centre, size = ([f"{BOX}.box.{part}.{axis}" for axis in "xyz"] for part in ("center", "size"))
    names = [STAMP, OBJECT_ID, f"{BOX}.type", f"{BOX}.num_lidar_points_in_box", f"{BOX}.box.heading"]
    table = _read_table(file, [*names, *centre, *size])
    stamps, tracks, types, counts, headings = (table[name].to_pylist() for name in names)
    unknown = sorted(set(types) - set(CATEGORY_NAMES))
    if unknown:
        raise data.DataError(f"{file}: unknown types of boxes {unknown}; Waymo Open has {CATEGORY_NAMES}")
    category = {kind: data.CATEGORIES.index(name) for kind, name in CATEGORY_NAMES.items()}
    vehicle_SE3_boxes = np.tile(np.eye(4), (len(stamps), 1, 1))
    vehicle_SE3_boxes[:, :3, :3] = Rotation.from_rotvec(np.outer(headings, (0, 0, 1))).as_matrix()
    vehicle_SE3_boxes[:, :3, 3] = data.stack(table, centre)
    sizes = data.stack(table, size)
    if not (np.isfinite(sizes).all() and np.isfinite(vehicle_SE3_boxes).all()):
        raise data.DataError(f"{file}: a box has a size or pose that is no number; download it again")
    boxes: dict[int, list[data.Box]] = {}
    for i, micros in enumerate(stamps):
        if counts[i] >= 1:
            box = data.Box(tracks[i], category[types[i]], sizes[i], vehicle_SE3_boxes[i])
            boxes.setdefault(micros * 1000, []).append(box)
    return boxes


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _read_table(file: Path, columns: list[str], read: list[str] | None = None) -> pyarrow.Table:
    """The columns of a file, or of them those to `read`. Raises DataError naming the file and the way out."""
    if not file.exists():
        raise data.DataError(f"{file}: no such file; download this tag of the segment, or remove the segment")
    with _naming(file), parquet.ParquetFile(file) as opened:
        missing = sorted(set(columns) - set(opened.schema_arrow.names))
        if missing:
            raise data.DataError(
                f"{file}: has no columns {missing} (it has {opened.schema_arrow.names}); is it of Waymo Open v2?"
            )
        table = opened.read(read or columns, use_threads=False)
    with_nulls = [name for name in table.column_names if table[name].null_count and name != f"{INCLINATION}.values"]
    if with_nulls:
        raise data.DataError(f"{file}: nulls in the columns {with_nulls}; download it again")
    for name in table.column_names:
        kind = table[name].type
        while not pyarrow.types.is_primitive(kind) and hasattr(kind, "value_type"):  # of what a list is
            kind = kind.value_type
        is_text = name == OBJECT_ID and (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))
        if (
            not is_text
            and not pyarrow.types.is_integer(kind)
            and (name in (STAMP, LASER) or not pyarrow.types.is_floating(kind))
        ):
            raise data.DataError(f"{file}: the column {name} is {table[name].type}; is it of Waymo Open v2?")
    return table


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What pyarrow raises inside is a DataError that names the file."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, StopIteration) as error:
        raise data.DataError(f"{file}: not a whole parquet file ({error}); download it again") from error
