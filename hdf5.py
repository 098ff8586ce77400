"""Scenes in HDF5, as the field's most used code base prepares Argoverse 2, Waymo and nuScenes.

One file per log, <scene>.h5, with one group per sweep, named by its time stamp, a decimal integer:

  lidar                  (N, 3 or more) float32, meters; further columns are ignored
  ground_mask            (N,) bool, if there is one; else ground is found without a map
  pose                   (4, 4) float32, world from ego
  flow                   (N, 3) float32, the total flow to the next sweep, ego-motion included
  flow_is_valid          (N,) bool, where the flow is known
  flow_category_indices  (N,) uint8, Argoverse 2's numbers, 0 is none

The last three are there only if the data has annotations. The files need the library h5py, which is
imported when it is needed. Lists of sweeps that may lie beside the files are pickles, and are not
read: the groups are listed instead.

Two things are not in the files. The unit of time stamps differs between data sets; here it is
inferred from their size. And Argoverse 2's points are in the frame of its upper LiDAR, while its
poses are the ego's: those points are moved to the ego frame, with the position of that LiDAR on its
cars, which is known to within centimeters. Argoverse 2 is recognized by its clock, which starts ten
years later than usual.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import clouds
import data
from data import DataError, PairKey, SweepPair

AV2_LIDAR_M = np.array([1.35, 0.0, 1.64])  # of the upper LiDAR in the ego frame; it is not turned
AV2_YEARS_NS = (3.0e17, 4.0e17)  # Argoverse 2's times, in nanoseconds, are of 1979 to 1982

# Times of our years have 10 digits in seconds; each unit adds three.
UNITS_NS = {"seconds": 10**9, "milliseconds": 10**6, "microseconds": 10**3, "nanoseconds": 1}


def open_folder(
    folder: Path,
    true_flow: bool,
    ground: str,
    pairs_per_log: int | None,
    sweeps_per_log: int | None,
    *cloud_options: object,
) -> ScenePairs:
    """The reader that `data.open_dataset` calls for a folder of .h5 files, with its arguments.

    Raises DataError for options that only other data sets have, and if h5py is missing.
    """
    data.refuse_cloud_options(folder, "HDF5", *cloud_options)
    if ground in ("raster", "vector"):
        what = f"ground {ground} needs a map"
        raise DataError(f"{folder}: {what}, and scenes have none; choose auto, points or none")
    return ScenePairs(folder, true_flow, ground, pairs_per_log, sweeps_per_log)


def _h5py(folder: Path):
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{folder}: reading .h5 files needs h5py: pip install h5py") from error
    return h5py


class ScenePairs(data.Pairs):
    """Pairs of consecutive sweeps of all scenes in a folder; see `data.open_dataset`."""

    def __init__(
        self,
        folder: Path,
        true_flow: bool = True,
        ground: str = "auto",
        pairs_per_log: int | None = None,
        sweeps_per_log: int | None = None,
    ):
        super().__init__()
        self.folder, self.true_flow, self.ground = folder, true_flow, ground
        self.unit_ns: dict[str, int] = {}  # log id -> nanoseconds in a unit of its time stamps
        h5py = _h5py(folder)
        for file in sorted(folder.glob("[!.]*.h5")):
            try:
                with data.naming(file, "not a scene in HDF5"), h5py.File(file, "r") as scene:
                    stamps = [int(name) for name in scene if name.isdecimal()]
            except DataError as error:
                self.skipped.append(str(error))
                continue
            if not stamps:
                self.skipped.append(f"{file}: no group is named by a time stamp; is it a scene?")
                continue
            unit = _unit(max(stamps))
            self.unit_ns[file.stem] = UNITS_NS[unit]
            note = f"{folder}: time stamps are assumed to be {unit}, because of their size"
            if note not in self.notes:
                self.notes.append(note)
            stamps_ns = [stamp * UNITS_NS[unit] for stamp in stamps]
            self.add_log(file, file.stem, stamps_ns, pairs_per_log, sweeps_per_log)

    def read(self, key: PairKey) -> SweepPair:
        """Read any two sweeps of a scene."""
        file = self.folder / f"{key.log_id}.h5"
        h5py, unit_ns = _h5py(self.folder), self.unit_ns[key.log_id]
        is_av2 = AV2_YEARS_NS[0] < key.timestamp0_ns < AV2_YEARS_NS[1]
        lidar = AV2_LIDAR_M if is_av2 else None

        # The file is opened again for each pair: an open one cannot be shared with other processes.
        with data.naming(file, "not a scene in HDF5"), h5py.File(file, "r") as scene:
            sweeps = [scene[str(stamp // unit_ns)] for stamp in key[1:]]
            points = [_points(sweep, lidar) for sweep in sweeps]
            is_ground = [self._is_ground(sweep, p) for sweep, p in zip(sweeps, points, strict=True)]
            poses = [_pose(sweep) for sweep in sweeps]
            raw = _raw_truth(sweeps[0], len(points[0])) if self.true_flow else None

        # Poses of each sweep's own ego frame give the ego-motion.
        ego1_SE3_ego0 = data.inverse(poses[1]) @ poses[0]
        with data.naming(file, f"wrong poses of sweeps {key[1]} and {key[2]}"):
            data.check_ego_motion(ego1_SE3_ego0, key.seconds)
        truth = {}
        if raw is not None:
            flow, is_valid, category = raw
            # The total flow leads to where the point is in the next ego frame.
            home = data.transform(data.inverse(ego1_SE3_ego0), points[0] + flow)
            residual = np.where(is_valid[:, None], home - points[0], 0.0).astype(np.float32)
            is_dynamic = np.linalg.norm(residual, axis=1) >= data.DYNAMIC_THRESHOLD_M
            values = (np.nan_to_num(residual), category, is_dynamic, is_valid)
            truth = dict(zip(data.TRUTH_FIELDS, values, strict=True))
        return data.make_pair(key, points, is_ground, ego1_SE3_ego0, truth, lidar)

    def _is_ground(self, sweep, points: np.ndarray) -> np.ndarray:
        """(N,) bool: the file's own mask, or found from the points."""
        if self.ground == "none":
            return np.zeros(len(points), dtype=bool)
        if self.ground == "auto" and "ground_mask" in sweep:
            mask = sweep["ground_mask"][:]
            if mask.shape != (len(points),):
                raise ValueError(f"{sweep.name}: ground_mask has shape {mask.shape}")
            return mask.astype(bool)
        return clouds.is_ground_without_map(points)


def _unit(stamp: int) -> str:
    """The unit of a time stamp."""
    digits = len(str(stamp))
    return list(UNITS_NS)[min(max(0, (digits - 8) // 3), 3)]


def _points(sweep, lidar: np.ndarray | None) -> np.ndarray:
    """(N, 3) float64 in the ego frame."""
    points = sweep["lidar"][:]
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"{sweep.name}: lidar has shape {points.shape}, expected (N, 3 or more)")
    points = points[:, :3].astype(np.float64)
    data.check_points(points)
    return data.nan_bad_rows(points) + (0.0 if lidar is None else lidar)


def _pose(sweep) -> np.ndarray:
    """(4, 4) float64, world from ego."""
    pose = sweep["pose"][:].astype(np.float64)
    is_rigid = (
        pose.shape == (4, 4) and np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max() < 1e-3
    )
    if not is_rigid or not np.isfinite(pose).all():
        raise ValueError(f"{sweep.name}: pose is not a rigid motion")
    # A float32 rotation is off by 1e-7 per entry, which far from the origin becomes millimeters.
    u, _, vh = np.linalg.svd(pose[:3, :3])
    pose[:3, :3] = u @ vh
    return pose


def _raw_truth(sweep, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Total flow (N, 3) float64, is_valid (N,), category (N,) uint8; None if there is no truth."""
    if "flow" not in sweep:
        return None
    flow = sweep["flow"][:].astype(np.float64)
    is_valid = sweep["flow_is_valid"][:].astype(bool)
    category = sweep["flow_category_indices"][:].astype(np.uint8)
    if flow.shape != (count, 3) or is_valid.shape != (count,) or category.shape != (count,):
        found = f"{flow.shape}, {is_valid.shape} and {category.shape}"
        raise ValueError(f"{sweep.name}: flow, validity and category have shapes {found}")
    if category.max(initial=0) >= len(data.CATEGORIES):
        raise ValueError(f"{sweep.name}: category {category.max()} is unknown")
    return flow, is_valid & np.isfinite(flow).all(axis=1), category
