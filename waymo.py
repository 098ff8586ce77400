"""Pairs of sweeps from the Waymo Open Dataset v2, read from its parquet files without TensorFlow.

Source: Waymo Open Dataset (Sun et al., CVPR 2020), release 2.0, one file per segment and tag:
`<split>/{lidar, lidar_pose, lidar_calibration, vehicle_pose, lidar_box}/<context_name>.parquet`.
A sweep is the first return of the TOP lidar, as in ZeroFlow (Vedder et al., ICLR 2024). The four
short-range lidars are not read. Points in no-label zones stay, and count as background.

Points are (N, 3) in meters, in the vehicle frame of the sweep's time stamp: x forward, y left, z
up, the origin on the ground (about) under the rear axle. The vehicle moves while the lidar turns,
so every pixel has a pose of its own. World coordinates are about 15 km, so everything is float64
until a point is back in a vehicle frame. The pixels' poses, however, are stored as float32, which
has steps of 1 mm at 15 km: no reader can place a point more exactly than that.

The release has neither maps nor flow. Ground is therefore found from the points alone
(`clouds.is_ground_without_map`), and true flow follows from the tracked boxes by the rule of
Argoverse 2's labels (`data.true_residual_flow`, which grows boxes by 0.2 m in length and width).
Boxes without a lidar point are dropped. ZeroFlow's own numbers on Waymo are not comparable: they
used the older release 1.4.2, its flow labels, and ground from its maps.

Speed: Waymo writes about 50 sweeps of five lidars each into one row group, and reading a row takes
as long as reading all rows before it in its group. Read in order, a sweep is just the next few
rows. Read in random order, a pair takes a second or more. To train in random order, rewrite each
file of lidar and lidar_pose once, with the TOP lidar only and one row per group (`pq` is
pyarrow.parquet):
    top = pq.read_table(file, filters=[("key.laser_name", "=", 1)])
    pq.write_table(top, new_file, row_group_size=1)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

import clouds
import data

TOP = 1  # key.laser_name of the 64-beam lidar on the roof

# Waymo's types of boxes by Argoverse 2's names of categories.
CATEGORY_NAMES = {1: "REGULAR_VEHICLE", 2: "PEDESTRIAN", 3: "SIGN", 4: "BICYCLIST"}

STAMP = "key.frame_timestamp_micros"
LASER = "key.laser_name"
OBJECT_ID = "key.laser_object_id"
RANGE_IMAGE = "[LiDARComponent].range_image_return1"
PIXEL_POSES = "[LiDARPoseComponent].range_image_return1"
WORLD_SE3_VEHICLE = "[VehiclePoseComponent].world_from_vehicle.transform"
VEHICLE_SE3_LIDAR = "[LiDARCalibrationComponent].extrinsic.transform"
INCLINATION = "[LiDARCalibrationComponent].beam_inclination"
BOX = "[LiDARBoxComponent]"


def open_folder(
    folder: Path,
    true_flow: bool,
    ground: str,
    pairs_per_log: int | None,
    sweeps_per_log: int | None,
    poses: str | Path | None,
    rate_hz: float,
    columns: int | None,
    min_range_m: float | None,
) -> WaymoPairs:
    """The reader that `data.open_dataset` calls for a Waymo split; its arguments.

    Raises DataError for options that only other data sets have.
    """
    data.refuse_cloud_options(folder, "Waymo's", poses, rate_hz, columns, min_range_m)
    if ground not in ("auto", "points"):
        raise data.DataError(f"{folder}: ground {ground} is not for Waymo's folders; choose points")
    return WaymoPairs(folder, true_flow, pairs_per_log, sweeps_per_log)


class WaymoPairs(data.Pairs):
    """All pairs of consecutive sweeps of a split (training, validation or testing).

    Segments are the files of lidar/ in the order of their names; the log id is the context name.
    Opening a split reads the time stamps of vehicle_pose and nothing else. With `true_flow=False`
    the boxes are not read; the testing split has none. The other arguments are described in
    `data.open_dataset`. A segment whose time stamps cannot be read is skipped, and `skipped` holds
    the reason. Raises DataError if the folder lidar/ cannot be read.
    """

    def __init__(
        self,
        split: str | Path,
        true_flow: bool = True,
        pairs_per_log: int | None = None,
        sweeps_per_log: int | None = None,
    ):
        super().__init__()
        self.split = Path(split)
        self.true_flow = true_flow
        lidar = self.split / "lidar"
        with data.naming(lidar, "cannot be read", "change its permissions"):
            names = sorted(os.listdir(lidar))
        for name in names:
            # A dot begins the name of a file that is still being copied, or that a Mac has added.
            if name.startswith(".") or not name.endswith(".parquet"):
                continue
            try:
                with data.naming(lidar / name, "cannot be used", "rename it"):
                    name.encode()  # it is the id of the log, which labels store as UTF-8
                    table = _read_table(self.split / "vehicle_pose" / name, [STAMP])
            except data.DataError as error:
                self.skipped.append(str(error))
                continue
            log_id = name.removesuffix(".parquet")
            self.add_log(lidar / name, log_id, _stamps_ns(table), pairs_per_log, sweeps_per_log)

    def read(self, key: data.PairKey) -> data.SweepPair:
        """Read any two sweeps of a segment.

        Raises DataError naming the file that is missing or broken.
        """
        file_name = f"{key.log_id}.parquet"
        points0, is_ground0, _ = _read_sweep(self.split, file_name, key.timestamp0_ns)
        points1, is_ground1, lidar = _read_sweep(self.split, file_name, key.timestamp1_ns)

        pose_file = self.split / "vehicle_pose" / file_name
        world_SE3_ego0 = _world_SE3_vehicle(pose_file, key.timestamp0_ns)
        world_SE3_ego1 = _world_SE3_vehicle(pose_file, key.timestamp1_ns)
        ego1_SE3_ego0 = data.inverse(world_SE3_ego1) @ world_SE3_ego0
        stamps = f"{key.timestamp0_ns} and {key.timestamp1_ns} ns"
        with data.naming(pose_file, f"wrong poses of sweeps {stamps}", "download it again"):
            data.check_ego_motion(ego1_SE3_ego0, key.seconds)

        # A sweep without boxes among labeled ones has no objects, so all its points are background.
        truth = {}
        box_file = self.split / "lidar_box" / file_name
        with data.naming(box_file, "its boxes cannot be used", "download it again"):
            if self.true_flow and box_file.exists():
                boxes = _read_boxes(box_file, pose_file)
                boxes0 = boxes.get(key.timestamp0_ns, [])
                boxes1 = boxes.get(key.timestamp1_ns, [])
                values = data.true_residual_flow(points0, boxes0, boxes1, ego1_SE3_ego0)
                truth = dict(zip(data.TRUTH_FIELDS, values, strict=True))
                if not boxes0:
                    found = "sweeps without boxes: all their points count as background"
                    self.note(f"{box_file}: {found}")

        # The cache gives the same sweep to the next pair, so changing a pair in place must not
        # change the cached arrays. Masks are copied here, and points by `make_pair`, which makes
        # them float32.
        is_ground = [is_ground0.copy(), is_ground1.copy()]
        points = [points0, points1]
        return data.make_pair(key, points, is_ground, ego1_SE3_ego0, truth, lidar)


# --- From a range image to points -----------------------------------------------------------------


@functools.lru_cache(maxsize=4)  # consecutive pairs share a sweep; 4 MB each
def _read_sweep(
    split: Path, file_name: str, timestamp_ns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (N, 3) float64, is_ground (N,) bool, and where the LiDAR is mounted (3,).

    Points and place are in the vehicle frame of the sweep's stamp.
    """
    lidar_file = split / "lidar" / file_name
    range_image = _Images(lidar_file, RANGE_IMAGE).read(timestamp_ns, ("H", "W", 4))
    height, width = range_image.shape[:2]
    pose_file = split / "lidar_pose" / file_name
    pixel_poses = _Images(pose_file, PIXEL_POSES).read(timestamp_ns, (height, width, 6))

    calibration_file = split / "lidar_calibration" / file_name
    vehicle_SE3_lidar, inclinations = _read_calibration(calibration_file, height)
    world_SE3_vehicle = _world_SE3_vehicle(split / "vehicle_pose" / file_name, timestamp_ns)

    # The channels of a range image are range, intensity, elongation, and "in a no-label zone".
    ranges = range_image[..., 0]
    points = range_image_to_points(
        ranges, pixel_poses, inclinations, vehicle_SE3_lidar, world_SE3_vehicle
    )
    points = data.nan_bad_rows(points)
    try:
        data.check_points(points)
    except ValueError as error:
        micros = timestamp_ns // 1000
        raise data.DataError(f"{lidar_file}: {error} at {micros} us; download it again") from error
    return points, clouds.is_ground_without_map(points), vehicle_SE3_lidar[:3, 3]


def range_image_to_points(
    ranges: np.ndarray,
    pixel_poses: np.ndarray,
    inclinations: np.ndarray,
    vehicle_SE3_lidar: np.ndarray,
    world_SE3_vehicle: np.ndarray,
) -> np.ndarray:
    """The pixels with a range > 0, row by row, as points (N, 3) float64 in the vehicle frame.

    ranges: (H, W) meters; 0 or negative where nothing came back.
    pixel_poses: (H, W, 6) roll, pitch, yaw, x, y, z: the vehicle in the world when that pixel was
    measured.
    inclinations: (H,) radians, ascending as in the files, while row 0 of the image is the highest
    beam.
    world_SE3_vehicle: (4, 4), the pose at the sweep's time stamp, in whose frame the points are.
    """
    height, width = ranges.shape
    row, column = np.nonzero(ranges > 0)  # (N,) each
    distance = ranges[row, column].astype(np.float64)
    inclination = inclinations[::-1][row]

    # Column 0 looks backwards, and the columns turn clockwise seen from above, *in the vehicle's
    # frame*. In the lidar's own frame the azimuth is smaller by the yaw at which the lidar is
    # mounted; the extrinsic transform adds that yaw again.
    mounted_yaw = np.arctan2(vehicle_SE3_lidar[1, 0], vehicle_SE3_lidar[0, 0])
    azimuth = ((width - column - 0.5) / width * 2 - 1) * np.pi - mounted_yaw

    level_distance = distance * np.cos(inclination)
    x = level_distance * np.cos(azimuth)
    y = level_distance * np.sin(azimuth)
    z = distance * np.sin(inclination)
    points_lidar = np.stack([x, y, z], axis=1)  # (N, 3)

    # From the lidar to the vehicle as it was at the pixel's own moment, from there to the world,
    # and back into the vehicle as it was at the sweep's time stamp.
    points_vehicle = data.transform(vehicle_SE3_lidar, points_lidar)
    points_world = _to_world(points_vehicle, pixel_poses[row, column].astype(np.float64))
    return data.transform(data.inverse(world_SE3_vehicle), points_world)


def _to_world(points: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Points (N, 3), each moved by its own pose (N, 6): Rz(yaw) Ry(pitch) Rx(roll) p + xyz."""
    cos_roll, cos_pitch, cos_yaw = np.cos(poses[:, :3].T)
    sin_roll, sin_pitch, sin_yaw = np.sin(poses[:, :3].T)

    # One rotation after the other takes a tenth of the time of SciPy's Rotation.
    x, y, z = points.T
    y, z = cos_roll * y - sin_roll * z, sin_roll * y + cos_roll * z
    x, z = cos_pitch * x + sin_pitch * z, cos_pitch * z - sin_pitch * x
    x, y = cos_yaw * x - sin_yaw * y, sin_yaw * x + cos_yaw * y
    return np.stack([x, y, z], axis=1) + poses[:, 3:]


# --- Range images, one row at a time --------------------------------------------------------------


@functools.lru_cache(
    maxsize=4
)  # lidar and lidar_pose of two segments: an open file and a buffer each
class _Images:
    """The images of the TOP lidar in one file, found by time stamp whatever the order of the rows.

    A row group (500 MB) is read row by row, and the position in it is kept for the next sweep, so
    that reading in order never reads a row twice. Not for use by several threads.
    """

    def __init__(self, file: Path, column: str):
        self._path = file
        self._column = column

        # Where is the TOP image of each time stamp? The keys alone are small, and read at once.
        columns = [STAMP, LASER, f"{column}.values", f"{column}.shape"]
        keys = _read_table(file, columns, only=[STAMP, LASER])
        rows = np.flatnonzero(keys[LASER].to_numpy() == TOP)
        micros = keys[STAMP].to_numpy()[rows]
        self._row_by_micros = dict(zip(micros.tolist(), rows.tolist(), strict=True))

        with _naming(file):
            self._file = parquet.ParquetFile(_open(file), buffer_size=2**20)
        # The row of the whole file with which each row group starts.
        sizes = []
        for group in range(self._file.num_row_groups):
            sizes.append(self._file.metadata.row_group(group).num_rows)
        self._starts = np.cumsum([0, *sizes])

        self._group = -1  # the row group that is being read, -1 for none
        self._next_row = 0  # the row of the file that `_batches` yields next
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())

    def read(self, timestamp_ns: int, expected: tuple[int | str, ...]) -> np.ndarray:
        """(H, W, channels) float32, read-only. A name in the expected shape fits any number."""
        micros = timestamp_ns // 1000
        if micros not in self._row_by_micros:
            raise data.DataError(
                f"{self._path}: no row of the TOP lidar at {micros} us; download it again or "
                "remove the segment"
            )
        batch = self._read_row(self._row_by_micros[micros])
        values = batch[f"{self._column}.values"][0].values
        shape = tuple(batch[f"{self._column}.shape"][0].as_py() or ())

        # A wrong shape would shift every pixel to another beam and azimuth, so it is checked first.
        count = 0 if values is None else len(values)
        is_whole = all(isinstance(size, int) for size in shape)
        is_expected = is_whole and len(shape) == len(expected) and count == np.prod(shape)
        for size, expected_size in zip(shape, expected, strict=False):
            if not isinstance(expected_size, str):
                is_expected &= size == expected_size
        if not is_expected:
            raise data.DataError(
                f"{self._path}: {count} values of shape {shape} at {micros} us, expected "
                f"{expected}; download it again"
            )
        return values.to_numpy(zero_copy_only=False).reshape(shape)

    def _read_row(self, row: int) -> pyarrow.RecordBatch:
        """One row of the file, by reading on from the last one where that is possible."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        # A group can only be read forwards: a row that has passed means reading it from its start.
        if group != self._group or row < self._next_row:
            columns = [f"{self._column}.values", f"{self._column}.shape"]
            self._batches = self._file.iter_batches(1, [group], columns, use_threads=False)
            self._next_row = self._starts[group]

        # No group is current until the row has been read: after an error the position is unknown,
        # and the next try has to start the group again.
        self._group = -1
        with _naming(self._path):
            batch = next(itertools.islice(self._batches, row - self._next_row, None))
            batch.validate(full=True)
        _check_columns(self._path, batch, f"{self._column}.values")
        self._group = group
        self._next_row = row + 1
        return batch


# --- What belongs to a whole segment --------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _read_calibration(file: Path, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the TOP lidar: vehicle_SE3_lidar (4, 4), and inclinations (height,), ascending radians."""
    parts = [f"{INCLINATION}.{part}" for part in ("min", "max", "values")]
    table = _read_table(file, [LASER, VEHICLE_SE3_LIDAR, *parts])
    rows = [row for row in table.to_pylist() if row[LASER] == TOP]
    if len(rows) != 1:
        raise data.DataError(
            f"{file}: {len(rows)} rows of the TOP lidar, expected 1; download it again"
        )

    # Where the inclinations are not listed, the beams divide the range evenly, each at the middle
    # of its share.
    low, high, inclinations = (rows[0][part] for part in parts)
    if inclinations is None:
        inclinations = low + (np.arange(height) + 0.5) / height * (high - low)
    if len(inclinations) != height:
        raise data.DataError(
            f"{file}: {len(inclinations)} beam inclinations for range images of {height} rows; "
            "download it again"
        )
    # A null in the list becomes NaN, and its beam gives no points.
    return _pose(file, rows[0][VEHICLE_SE3_LIDAR]), np.array(inclinations, dtype=np.float64)


def _world_SE3_vehicle(file: Path, timestamp_ns: int) -> np.ndarray:
    return _pose(file, _read_poses(file).get(timestamp_ns))


@functools.lru_cache(maxsize=8)
def _read_poses(file: Path) -> dict[int, list[float]]:
    """Time stamp in ns -> the sixteen numbers of world_SE3_vehicle; float32 or float64 in files."""
    table = _read_table(file, [STAMP, WORLD_SE3_VEHICLE])
    return dict(zip(_stamps_ns(table), table[WORLD_SE3_VEHICLE].to_pylist(), strict=True))


def _stamps_ns(table: pyarrow.Table) -> list[int]:
    return [micros * 1000 for micros in table[STAMP].to_pylist()]


def _pose(file: Path, values: list[float] | None) -> np.ndarray:
    """Sixteen numbers, row by row, as a transform (4, 4) float64."""
    with data.naming(file, "a transform in it is not a pose", "download it again"):
        return clouds.check_pose(np.reshape(np.array(values, dtype=np.float64), (4, 4)))


@functools.lru_cache(maxsize=8)
def _read_boxes(file: Path, pose_file: Path) -> dict[int, list[data.Box]]:
    """All boxes of a segment by time stamp in ns, in file order, except those without any point."""
    center = [f"{BOX}.box.center.{axis}" for axis in "xyz"]
    size = [f"{BOX}.box.size.{axis}" for axis in "xyz"]
    kind = f"{BOX}.type"
    count = f"{BOX}.num_lidar_points_in_box"
    heading = f"{BOX}.box.heading"
    table = _read_table(file, [STAMP, OBJECT_ID, kind, count, heading, *center, *size])

    kinds = table[kind].to_pylist()
    unknown = sorted(set(kinds) - set(CATEGORY_NAMES))
    if unknown:
        raise data.DataError(
            f"{file}: unknown types of boxes {unknown}; Waymo Open has {CATEGORY_NAMES}"
        )
    category = {kind: data.CATEGORIES.index(name) for kind, name in CATEGORY_NAMES.items()}

    # Boxes are in the vehicle frame of their stamp, and turned about z only.
    vehicle_SE3_boxes = np.tile(np.eye(4), (table.num_rows, 1, 1))
    turn = data.read_numbers(file, table, [heading])[:, 0]  # (boxes,) rad
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    vehicle_SE3_boxes[:, :2, :2] = rotation.transpose(2, 0, 1)
    vehicle_SE3_boxes[:, :3, 3] = data.read_numbers(file, table, center)
    sizes = data.read_numbers(file, table, size)  # (boxes, 3) meters

    stamps_ns = _stamps_ns(table)
    has_sweep = not set(stamps_ns).isdisjoint(_read_poses(pose_file))  # or the unit is wrong
    counts = data.read_numbers(file, table, [count])[:, 0]
    numbers = [category[kind] for kind in kinds]
    columns = (table[OBJECT_ID].to_pylist(), numbers, sizes, vehicle_SE3_boxes)
    return data.boxes_by_stamp(file, stamps_ns, has_sweep, counts, columns)


# --- Parquet --------------------------------------------------------------------------------------


def _read_table(file: Path, columns: list[str], only: list[str] | None = None) -> pyarrow.Table:
    """The named columns of a file. With `only`, all must exist, but just these are read.

    Raises DataError naming the file, what is wrong with it, and how to fix it.
    """
    with _naming(file):
        if not file.exists():
            raise data.DataError(
                f"{file}: no such file; download this tag of the segment, or remove the segment"
            )
        with _open(file) as source, parquet.ParquetFile(source) as opened:
            existing = opened.schema_arrow.names
            wrong = sorted(name for name in set(columns) if existing.count(name) != 1)
            if wrong:
                raise data.DataError(
                    f"{file}: has no columns {wrong}, or has them twice (it has {existing}); is it "
                    "of Waymo Open v2?"
                )
            table = opened.read(only or columns, use_threads=False)
        table.validate(full=True)  # a wrong offset of a text would crash the process later
    _check_columns(file, table, f"{INCLINATION}.values")
    return table


def _open(file: Path) -> pyarrow.OSFile:
    """Open a file of any name. As text, pyarrow takes only UTF-8, and ~ for another folder."""
    return pyarrow.OSFile(os.fsencode(file))


def _check_columns(file: Path, table: pyarrow.Table | pyarrow.RecordBatch, nullable: str) -> None:
    """Raise DataError if a column has nulls, or values of another type than the release has.

    nullable: the one column that may have nulls.
    """
    # The short-range lidars do not list their inclinations; a lost image is reported elsewhere.
    with_nulls = []
    for name in table.schema.names:
        if table[name].null_count and name != nullable:
            with_nulls.append(name)
    if with_nulls:
        raise data.DataError(f"{file}: nulls in the columns {with_nulls}; download it again")

    for name in table.schema.names:
        # What do the lists in a column of lists consist of? A dictionary has values, too.
        kind = table[name].type
        is_list = pyarrow.types.is_nested(kind) or pyarrow.types.is_fixed_size_list(kind)
        kind = getattr(kind, "value_type", kind)

        # Stamps and lasers are integers, and object ids may be text. All else is numbers.
        is_expected = pyarrow.types.is_integer(kind)
        if name == OBJECT_ID:
            is_expected |= pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if name not in (STAMP, LASER):
            is_expected |= pyarrow.types.is_floating(kind)
        if not is_expected or is_list != name.endswith((".values", ".shape", ".transform")):
            raise data.DataError(
                f"{file}: the column {name} is {table[name].type}; is it of Waymo Open v2?"
            )


def _naming(file: Path) -> contextlib.AbstractContextManager:
    return data.naming(file, "not a whole parquet file", "download it again")
