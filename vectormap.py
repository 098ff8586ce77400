"""Ground height from the lines of Argoverse 2's vector maps, for logs that have no height raster.

The 20,000 logs of the LiDAR data set, of which ZeroFlow (Vedder et al., ICLR 2024) takes its 3x and
5x training sets, come without a raster. But the outlines of drivable areas, and both sides of
lanes, lie on the ground. Coordinates are meters in the city frame. Against the raster's mask on two
logs: precision .996 and .985, recall .894 and .945 (the published mean of 20 vertices: .900 and
.985, .905 and .902).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

import data


def read_ground(file: Path) -> GroundVectorMap:
    """Read log_map_archive_*.json. Raises DataError naming it if it is broken."""
    with data.naming(file, "the vector map cannot be read", "download it again"):
        content = json.loads(file.read_bytes())
        # All lines that lie on the ground: the outlines of drivable areas, both sides of lanes.
        outlines = []
        for area in content["drivable_areas"].values():
            boundary = area["area_boundary"]
            outlines.append(boundary + boundary[:1])  # closed: it ends where it began
        for lane in content["lane_segments"].values():
            outlines += [lane["left_lane_boundary"], lane["right_lane_boundary"]]
        lines = []  # (L, 3) each
        for outline in filter(None, outlines):
            lines.append(np.array([[point[axis] for axis in "xyz"] for point in outline], float))
        if not lines or not all(np.isfinite(line).all() for line in lines):
            raise ValueError("its areas and lanes have no points, or points that are not finite")
        return GroundVectorMap(lines)


class GroundVectorMap:
    """Height of the ground from the lines of a map, for logs without a raster (LiDAR data set).

    The height at a place is the mean over the 4 nearest vertices, weighted by inverse distance.
    """

    cell_m, margin_m = 0.5, 100.0

    def __init__(self, lines: list[np.ndarray]):
        """lines: (L, 3) each, city coordinates. Raises ValueError if they span over 2 km."""
        corners = np.concatenate(lines)[:, :2]
        self._low = corners.min(axis=0) - self.margin_m
        extent = corners.max(axis=0) + self.margin_m - self._low
        if extent.max() > 2_000:
            raise ValueError(f"its points span {extent.max():.0f} m; a log spans a few hundred")
        vertices = _densify(lines)
        self._tree, self._vertex_z = cKDTree(vertices[:, :2]), vertices[:, 2]
        # Heights are computed once per cell of 50 cm, when the first point falls into it: six times
        # as fast as once per point, and twenty times in the next sweep of the log.
        self._height = np.full((extent / self.cell_m).astype(int) + 1, np.nan, dtype=np.float32)

    def ground_z(self, xy: np.ndarray) -> np.ndarray:
        """(M,) heights in meters at (M, 2) city coordinates."""
        # At a vertex the distance is 0: 1 mm at least keeps its weight finite.
        count = min(4, len(self._vertex_z))
        distance, nearest = self._tree.query(xy, k=range(1, count + 1))  # (M, 4)
        weight = 1 / np.maximum(distance, 1e-3)
        return (weight * self._vertex_z[nearest]).sum(axis=1) / weight.sum(axis=1)

    def is_ground(
        self, points_city: np.ndarray, threshold_m: float = data.GROUND_THRESHOLD_M
    ) -> np.ndarray:
        """(N,) bool: the rule of data.GroundRaster. Over 100 m from all lines nothing is ground."""
        # The cell of each point, as one number for those inside the map.
        column, row = ((points_city[:, :2] - self._low) / self.cell_m).T
        columns, rows = self._height.shape
        is_inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        cell = column[is_inside].astype(int) * rows + row[is_inside].astype(int)

        # Fill in the cells that no point has visited before, with the height at their centers.
        height = self._height.reshape(-1)  # a view: writing to it fills the map
        unknown = np.unique(cell[np.isnan(height[cell])])
        centers = np.stack(np.divmod(unknown, rows), axis=1) + 0.5
        height[unknown] = self.ground_z(centers * self.cell_m + self._low)

        ground_z = np.full(len(points_city), np.nan)
        ground_z[is_inside] = height[cell]
        return points_city[:, 2] - ground_z <= threshold_m  # False for NaN, as in data.GroundRaster


def _densify(lines: list[np.ndarray]) -> np.ndarray:
    """(V, 3): the vertices of lines, and others between them so that none are over 1 m apart."""
    start = np.concatenate([line[:-1] for line in lines])
    end = np.concatenate([line[1:] for line in lines])
    # A segment of d meters becomes ceil(d) equal steps. Each step gives the vertex where it begins.
    steps = np.ceil(np.linalg.norm((end - start)[:, :2], axis=1)).astype(int)
    segment = np.repeat(np.arange(len(steps)), steps)  # 0 0 0 1 1 ... for 3 steps, 2 steps ...
    step = np.arange(len(segment)) - np.repeat(np.cumsum(steps) - steps, steps)  # 0 1 2 0 1 ...
    vertices = start[segment] + (step / steps[segment])[:, None] * (end - start)[segment]
    last = [line[-1:] for line in lines]
    return np.concatenate([vertices, *last])
