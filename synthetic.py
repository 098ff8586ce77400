"""A street that needs no download: two spinning lidars drive down it, and what they see is written as Argoverse 2 logs.

Houses, poles, trees, clutter, parked and moving cars, trucks, cyclists and pedestrians stand and move along an arc of
road over uneven ground. Rays are cast against boxes and ellipsoids; ranges get noise, some returns are lost. The files
have Argoverse 2's own layout (sweeps, poses, tracked boxes, ground raster, calibration, vector map), so the real reader
reads them, and boxes give the true flow as they do for real logs.

What it is not: a sweep is a snapshot (real ones take 0.1 s and are motion-compensated), nobody's legs swing (boxes, and
so true flow, are rigid), and intensity is made up.

Same settings and library versions, same bytes. Everything is placed in a street frame (metres, origin where the ego
starts), which lies some 5 km from the origin of the city frame, as real logs do.
This file needs numpy, scipy, pyarrow, tqdm and data.py.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import feather
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import data


@dataclass(frozen=True)
class StreetSettings:
    """Size and dirt of the sweeps. The defaults are a full sweep; see PRESETS."""

    azimuths: int = 1800  # rays per turn and beam: the number of points is in proportion
    beam_step: int = 1  # every so many beams of each lidar's 32 are used
    range_m: float = 150.0  # no returns from farther away
    sweeps: int = 6  # per log, 0.1 s apart
    range_noise_m: float = 0.015  # standard deviation
    dropout: float = 0.08  # share of returns that are lost
    seed: int = 0


PRESETS = {
    "full": StreetSettings(),  # 80,000 to 100,000 points
    "small": StreetSettings(
        azimuths=380, beam_step=2, range_m=30.0
    ),  # 6,000 not ground within 25.6 m: `python train.py`
    "teaching": StreetSettings(azimuths=190, beam_step=4, range_m=30.0),  # 1,000 to 2,000 such points: the notebooks
}

# Argoverse 2's two lidars on the roof: one upright, one upside down half a turn away.
BEAM_ELEVATIONS_DEG = np.array(
    [-25, -15.64, -11.31, -8.84, -7.25, -6.15, -5.33, -4.67, -4, -3.67, -3.33, -3, -2.67, -2.33, -2, -1.67]
    + [-1.33, -1, -0.67, -0.33, 0, 0.33, 0.67, 1, 1.33, 1.67, 2.33, 3.33, 4.67, 7, 10.33, 15]
)
LIDAR_ORIGINS = np.array([[1.35, 0.0, 1.64], [1.35, 0.0, 1.53]])  # in the ego frame
EGO_HEIGHT_M = 0.33  # of the ego frame's origin above the ground
CITY_OFFSET = np.array([5000.0, 2300.0, 15.0])  # of the street frame in the city frame
CITY = "PIT"
SWEEP_NS = 100_000_000


def write_logs(out: str | Path, logs: int, settings: StreetSettings) -> None:
    """Write logs `street-<seed>-<number>` into the folder `out`; those that are there already are left as they are.

    A log appears under its name only when all of it is written.
    """
    for number in tqdm(range(logs), desc="street", unit="log", disable=logs < 2):
        folder = Path(out) / f"street-{settings.seed:03d}-{number:04d}"
        if folder.exists():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
            _write_log(Path(unfinished) / folder.name, folder.name, settings, number)
            if not folder.exists():  # another run may have been faster
                (Path(unfinished) / folder.name).rename(folder)


# --- The street ------------------------------------------------------------------------------------------------------

BOX, ELLIPSOID = 0, 1


@dataclass(frozen=True)
class Part:
    """A solid in its thing's frame: x forward, z up from the ground below."""

    shape: int  # BOX or ELLIPSOID
    center: tuple[float, float, float]
    half: tuple[float, float, float]  # half sizes, or radii


@dataclass(frozen=True)
class Thing:
    """Something on the street, placed along the road (s metres ahead of the ego's start, `left` metres beside it)."""

    parts: tuple[Part, ...]
    s: float
    left: float
    heading: float = 0.0  # rad, from the direction of the road
    s_mps: float = 0.0
    left_mps: float = 0.0
    category: str | None = None  # labelled with a box, if any

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (3,) in its own frame."""
        center, half = (np.array([getattr(part, name) for part in self.parts]) for name in ("center", "half"))
        return (center - half).min(axis=0), (center + half).max(axis=0)


@dataclass(frozen=True)
class Street:
    """A log's world: an arc of road, waves of ground, things, and the ego that drives along."""

    curvature: float  # 1/m
    waves: np.ndarray  # (W, 4): amplitude (m), wave numbers along x and y (rad/m), phase
    things: list[Thing]
    ego_mps: float

    def place(self, s, left) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and the road's heading (rad) in the street frame, at s along the road and `left` beside it."""
        heading = self.curvature * np.asarray(s, dtype=float)
        chord = s * np.sinc(heading / 2 / np.pi)  # of the arc; the road's middle lies at half its heading
        x, y = chord * np.cos(heading / 2), chord * np.sin(heading / 2)
        return x - left * np.sin(heading), y + left * np.cos(heading), heading

    def ground_z(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return sum(a * np.sin(kx * x + ky * y + phase) for a, kx, ky, phase in self.waves)

    def street_SE3_ego(self, time_s: float) -> np.ndarray:
        """The ego follows the road and tilts with the ground."""
        x, y, heading = self.place(self.ego_mps * time_s, 0.0)
        ahead, aside = np.array([np.cos(heading), np.sin(heading)]), np.array([-np.sin(heading), np.cos(heading)])
        slope_ahead, slope_aside = (
            self.ground_z(x + step[0], y + step[1]) - self.ground_z(x - step[0], y - step[1])
            for step in (ahead / 2, aside / 2)
        )
        rotation = Rotation.from_euler("ZYX", [heading, -np.arctan(slope_ahead), np.arctan(slope_aside)])
        return _pose(rotation, (x, y, self.ground_z(x, y) + EGO_HEIGHT_M))

    def street_SE3_thing(self, thing: Thing, time_s: float) -> np.ndarray:
        """Things stay upright and rest on the ground."""
        x, y, heading = self.place(thing.s + thing.s_mps * time_s, thing.left + thing.left_mps * time_s)
        return _pose(Rotation.from_euler("Z", float(heading) + thing.heading), (x, y, self.ground_z(x, y)))


def _pose(rotation: Rotation, translation) -> np.ndarray:
    target_SE3_source = np.eye(4)
    target_SE3_source[:3, :3], target_SE3_source[:3, 3] = rotation.as_matrix(), translation
    return target_SE3_source


def make_street(settings: StreetSettings, number: int) -> Street:
    """The world of log `number`, drawn from the seed and the number alone."""
    rng = np.random.default_rng([settings.seed, number])
    ego_mps = rng.uniform(4, 12)
    behind, ahead = -settings.range_m - 15, settings.range_m + 15 + 0.1 * settings.sweeps * ego_mps
    sharpest = min(1 / 40, 4.5 / (ahead - behind))  # the road must not bite its own tail
    wave_length = rng.uniform(20, 60, 4)
    direction = rng.uniform(0, 2 * np.pi, 4)
    waves = np.stack(
        [
            0.003 * wave_length,  # up to 18 cm, slopes of a few per cent
            2 * np.pi / wave_length * np.cos(direction),
            2 * np.pi / wave_length * np.sin(direction),
            rng.uniform(0, 2 * np.pi, 4),
        ],
        axis=1,
    )
    things = [*_traffic(rng, behind, ahead, ego_mps), *_sidewalks(rng, behind, ahead), *_scenery(rng, behind, ahead)]
    return Street(rng.uniform(-sharpest, sharpest), waves, things, ego_mps)


def _spaced(rng, behind: float, ahead: float, least: float, most: float, gap: float = 0.0):
    """Positions along the road at random distances, none within `gap` of the ego's start."""
    s = behind + rng.uniform(0, most)
    while s < ahead:
        if abs(s) > gap:
            yield s
        s += rng.uniform(least, most)


def _traffic(rng, behind: float, ahead: float, ego_mps: float):
    """Cars, trucks and buses in four rows, the ego's own lane among them, and cyclists between the rows."""
    rows = (  # left of the ego, metres a second, smallest and largest distance of two neighbours, gap around the ego
        (0.0, ego_mps * rng.uniform(0.8, 1.2), 9, 22, 10),
        (4.4, -rng.uniform(4, 13), 8, 20, 0),
        (-4.4, 0.0, 7, 24, 0),
        (9.0, 0.0, 7, 24, 0),
    )
    for left, s_mps, least, most, gap in rows:
        for s in _spaced(rng, behind, ahead, least, most, gap):
            is_long = rng.random() < 0.08 and abs(s) > 20  # close by, one would hold most of what moves
            category, parts = _truck(rng) if is_long else ("REGULAR_VEHICLE", _car(rng))
            beside = left + rng.normal(0, 0.1)
            yield Thing(parts, s, beside, np.pi if s_mps < 0 else 0.0, s_mps * rng.uniform(0.97, 1.03), 0.0, category)
    for left, sign in ((-2.5, 1), (6.7, -1)):
        for s in _spaced(rng, behind, ahead, 8, 28, 5):
            yield Thing(_cyclist(rng), s, left, 0.0 if sign > 0 else np.pi, sign * rng.uniform(3, 7), 0.0, "BICYCLIST")


def _sidewalks(rng, behind: float, ahead: float):
    """Pedestrians who walk along, cross or stand, and small things that are labelled or not."""
    for left in (-7.4, 12.0):
        for s in _spaced(rng, behind, ahead, 3, 12):
            speed, heading = rng.uniform(0.7, 1.9), rng.choice([0, np.pi]) + rng.normal(0, 0.3)
            kind = rng.random()
            if kind < 0.25:
                speed = 0.0
            elif kind < 0.45:
                heading = rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.2)
            velocity = speed * np.cos(heading), speed * np.sin(heading)
            yield Thing(_pedestrian(rng), s, left + rng.uniform(-1, 1), heading, *velocity, "PEDESTRIAN")
        for s in _spaced(rng, behind, ahead, 5, 15):
            yield Thing(_clutter(rng), s, left + rng.uniform(-1.6, 1.6), rng.uniform(0, np.pi))
        for s in _spaced(rng, behind, ahead, 12, 50):
            half = rng.uniform(0.12, 0.18)
            cone = Part(ELLIPSOID, (0, 0, 0.35), (half, half, 0.4))
            yield Thing((cone,), s, left * 0.82, category="CONSTRUCTION_CONE")


def _scenery(rng, behind: float, ahead: float):
    """Houses shoulder to shoulder, with gaps, and a row of poles and trees on each side."""
    for front, side in ((-12.0, -1), (16.5, 1)):
        s = behind
        while s < ahead:
            width, height, setback = rng.uniform(5, 13), rng.uniform(3, 9), rng.uniform(0, 2.5)
            middle = front + side * (setback + 3)
            house = Part(BOX, (0, 0, height / 2 - 0.5), (width / 2, 3, height / 2 + 0.5))
            porch = Part(BOX, (rng.uniform(-0.3, 0.3) * width, -side * 3, 1.2), (rng.uniform(0.5, 1.5), 0.7, 1.7))
            yield Thing((house, porch), s + width / 2, middle)
            s += width + max(0.0, rng.uniform(-3, 8))
        for s in _spaced(rng, behind, ahead, 7, 20):
            radius = rng.uniform(0.06, 0.2)
            stem = Part(BOX, (0, 0, 2.5), (radius, radius, 3))
            crown = Part(ELLIPSOID, (0, 0, rng.uniform(3, 4.5)), tuple(rng.uniform(0.8, 1.8, 3)))
            yield Thing((stem, crown) if rng.random() < 0.5 else (stem,), s, front - side * 6.3, rng.uniform(0, np.pi))


def _car(rng) -> tuple[Part, ...]:
    length, width, height = rng.uniform(3.9, 5.1), rng.uniform(1.7, 2.0), rng.uniform(1.4, 1.85)
    waist, cabin = 0.55 * height, length * rng.uniform(0.24, 0.32)
    return (
        Part(BOX, (0, 0, (waist + 0.2) / 2), (length / 2, width / 2, (waist - 0.2) / 2)),
        Part(BOX, (-0.07 * length, 0, (waist + height) / 2), (cabin, 0.43 * width, (height - waist) / 2)),
        Part(ELLIPSOID, (0.3 * length, 0, waist), (0.19 * length, 0.4 * width, 0.15)),
    )


def _truck(rng) -> tuple[str, tuple[Part, ...]]:
    if rng.random() < 0.3:
        half = rng.uniform(4.5, 6)
        return "BUS", (Part(BOX, (0, 0, 1.6), (half, 1.25, 1.4)), Part(BOX, (0, 0, 3.1), (half / 2, 0.8, 0.15)))
    load = rng.uniform(1.8, 3)
    cab = Part(BOX, (load + 0.9, 0, 1.3), (0.9, 1.05, 1.0))
    return "BOX_TRUCK", (Part(BOX, (0, 0, 1.9), (load, 1.2, rng.uniform(1.2, 1.5))), cab)


def _cyclist(rng) -> tuple[Part, ...]:
    return (
        Part(BOX, (0, 0, 0.5), (0.85, 0.06, 0.45)),
        Part(ELLIPSOID, (-0.1, 0, 1.15), (0.28, rng.uniform(0.2, 0.28), 0.42)),
        Part(ELLIPSOID, (0.1, 0, 1.65), (0.12, 0.12, 0.15)),
    )


def _pedestrian(rng) -> tuple[Part, ...]:
    height, width = rng.uniform(1.1, 1.95), rng.uniform(0.18, 0.3)
    stride = rng.uniform(0, 0.25)
    body = [
        Part(BOX, (stride, 0.1, 0.23 * height), (0.08, 0.08, 0.23 * height)),
        Part(BOX, (-stride, -0.1, 0.23 * height), (0.08, 0.08, 0.23 * height)),
        Part(ELLIPSOID, (0, 0, 0.66 * height), (rng.uniform(0.12, 0.22), width, 0.24 * height)),
        Part(ELLIPSOID, (0.03, 0, 0.93 * height), (0.1, 0.09, 0.07 * height)),
    ]
    if rng.random() < 0.3:  # a bag
        body.append(Part(BOX, (rng.uniform(-0.3, 0.1), width, 0.5 * height), (0.18, 0.08, 0.2)))
    return tuple(body)


def _clutter(rng) -> tuple[Part, ...]:
    half = rng.uniform(0.15, 0.6, 3)
    return (Part(int(rng.integers(2)), (0, 0, half[2] * 0.9), tuple(half)),)


# --- The lidars ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Returns of one sweep.

    points (N, 3) in the ego frame; laser (N,) 0..63; offset_ns (N,); thing (N,) index into the street's, -1 for ground.
    """

    points: np.ndarray
    laser: np.ndarray
    offset_ns: np.ndarray
    thing: np.ndarray


def cast_sweep(street: Street, time_s: float, settings: StreetSettings, rng: np.random.Generator) -> Sweep:
    """What the two lidars see of the street at one moment."""
    street_SE3_ego = street.street_SE3_ego(time_s)
    ego_SE3_things = [data.inverse(street_SE3_ego) @ street.street_SE3_thing(thing, time_s) for thing in street.things]
    sweeps = []
    for lidar, origin in enumerate(LIDAR_ORIGINS):
        beams = np.arange(0, 32, settings.beam_step)
        elevation = np.radians(BEAM_ELEVATIONS_DEG[beams] * (1 if lidar == 0 else -1))[:, None]  # (E, 1)
        turn = (np.arange(settings.azimuths) + rng.random()) / settings.azimuths  # (A,), never twice the same
        azimuth = 2 * np.pi * turn + np.pi * lidar
        level = np.cos(elevation)
        ray = np.stack(np.broadcast_arrays(level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)))
        # (3, E, A), unit length, ego frame
        distance = _cast_at_ground(street, street_SE3_ego, origin, ray, settings.range_m)  # (E, A)
        hit = np.full(distance.shape, -1)
        for index, (thing, ego_SE3_thing) in enumerate(zip(street.things, ego_SE3_things, strict=True)):
            _cast_at_thing(thing, ego_SE3_thing, index, origin, ray, azimuth[0], distance, hit, settings.range_m)
        distance += rng.normal(0, settings.range_noise_m, distance.shape)
        is_return = (distance > 1.5) & (distance < settings.range_m) & (rng.random(distance.shape) >= settings.dropout)
        beam, column = np.nonzero(is_return)
        points = origin + (distance[is_return] * ray[:, is_return]).T
        sweeps.append((points, beams[beam] + 32 * lidar, turn[column] % 1 * SWEEP_NS, hit[is_return]))
    return Sweep(*(np.concatenate(parts) for parts in zip(*sweeps, strict=True)))


def _cast_at_ground(street: Street, street_SE3_ego: np.ndarray, origin: np.ndarray, ray: np.ndarray, range_m: float):
    """Distance (E, A) to the ground, inf where a ray meets none within range.

    Each step is as long as the gap below the ray allows if the ground were as steep as it gets anywhere, so that no
    ray can step through a hill.
    """
    steepest = (street.waves[:, 0] * np.hypot(street.waves[:, 1], street.waves[:, 2])).sum()
    start = data.transform(street_SE3_ego, origin)  # (3,) in the street frame
    direction = street_SE3_ego[:3, :3] @ ray.reshape(3, -1)  # (3, R)
    closing = steepest * np.hypot(direction[0], direction[1]) - direction[2]  # how fast the gap can shrink
    distance = np.full(direction.shape[1], np.inf)
    flying = np.flatnonzero(closing > 0)
    travelled = np.zeros(len(flying))
    for _ in range(40):
        x, y, z = start[:, None] + travelled * direction[:, flying]
        gap = z - street.ground_z(x, y)
        is_down = gap < 0.005
        distance[flying[is_down]] = travelled[is_down]
        travelled += gap / closing[flying]
        goes_on = ~is_down & (travelled < range_m)
        flying, travelled = flying[goes_on], travelled[goes_on]
    return distance.reshape(ray.shape[1:])


def _cast_at_thing(thing, ego_SE3_thing, index, origin, ray, first_azimuth, distance, hit, range_m) -> None:
    """Shorten `distance` (E, A), and set `hit` to `index`, where rays meet the thing before anything else."""
    low, high = thing.bounds()
    center = data.transform(ego_SE3_thing, (low + high) / 2) - origin
    radius, away = np.linalg.norm(high - low) / 2, np.hypot(center[0], center[1])
    if away - radius > range_m:
        return
    # Only the columns that can look at it: a slice of the turn around its bearing.
    azimuths = ray.shape[2]
    half_angle = np.arcsin(min(1.0, radius / away)) if away > radius else np.pi
    bearing = np.arctan2(center[1], center[0]) - first_azimuth
    first, last = (int(np.floor((bearing + sign * half_angle) / (2 * np.pi) * azimuths)) for sign in (-1, 1))
    columns = np.arange(first, min(last + 2, first + azimuths)) % azimuths
    thing_SE3_ego = data.inverse(ego_SE3_thing)
    start = data.transform(thing_SE3_ego, origin)
    direction = np.tensordot(thing_SE3_ego[:3, :3], ray[:, :, columns], axes=1)  # (3, E, n)
    nearest = np.full(direction.shape[1:], np.inf)
    for part in thing.parts:
        cast = _cast_at_box if part.shape == BOX else _cast_at_ellipsoid
        half = np.array(part.half)[:, None, None]
        scaled_start = (start - part.center)[:, None, None] / half
        nearest = np.minimum(nearest, cast(scaled_start, direction / half))
    is_first = nearest < distance[:, columns]
    distance[:, columns] = np.where(is_first, nearest, distance[:, columns])
    hit[:, columns] = np.where(is_first, index, hit[:, columns])


def _cast_at_box(start: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Distance to the cube [-1, 1]^3 from outside, inf where it is missed.

    In coordinates scaled by a box's half sizes a ray is still a ray, and its parameter still metres.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-1 - start) / direction, (1 - start) / direction
    enter, leave = np.minimum(one, other).max(axis=0), np.maximum(one, other).min(axis=0)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


def _cast_at_ellipsoid(start: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Distance to the unit sphere from outside, in coordinates scaled by an ellipsoid's radii."""
    a, b, c = (direction**2).sum(axis=0), (direction * start).sum(axis=0), (start**2).sum() - 1
    root = b**2 - a * c
    enter = (-b - np.sqrt(np.maximum(root, 0))) / a
    return np.where((root >= 0) & (enter > 0), enter, np.inf)


# --- The files -------------------------------------------------------------------------------------------------------


def _write_log(folder: Path, log_id: str, settings: StreetSettings, number: int) -> None:
    street = make_street(settings, number)
    rng = np.random.default_rng([settings.seed, number, 1])
    city_SE3_street = _pose(Rotation.identity(), CITY_OFFSET)
    first_ns = 315_966_000_000_000_000 + number * 60_000_000_000
    pose_rows, box_rows = [], []
    for i in range(settings.sweeps):
        timestamp_ns, time_s = first_ns + i * SWEEP_NS, i * SWEEP_NS * 1e-9
        sweep = cast_sweep(street, time_s, settings, rng)
        _write_sweep(folder / "sensors" / "lidar" / f"{timestamp_ns}.feather", sweep)
        street_SE3_ego = street.street_SE3_ego(time_s)
        pose_rows.append({"timestamp_ns": timestamp_ns, **_pose_columns(city_SE3_street @ street_SE3_ego)})
        points_in = np.bincount(sweep.thing + 1, minlength=len(street.things) + 1)[1:]
        for index, thing in enumerate(street.things):
            # Boxes are of things that the lidar sees, and of every eighth thing anyway: AV2 has boxes without points.
            if thing.category is not None and (points_in[index] > 0 or index % 8 == 0):
                ego_SE3_thing = data.inverse(street_SE3_ego) @ street.street_SE3_thing(thing, time_s)
                row = _box_columns(thing, ego_SE3_thing)
                track = {
                    "timestamp_ns": timestamp_ns,
                    "track_uuid": f"{log_id}-{index:04d}",
                    "category": thing.category,
                }
                box_rows.append({**track, **row, "num_interior_pts": int(points_in[index])})
    _write_feather(folder / "city_SE3_egovehicle.feather", pose_rows)
    _write_feather(folder / "annotations.feather", box_rows)
    sensors = [("up_lidar", (1.0, 0, 0, 0)), ("down_lidar", (0, 1.0, 0, 0))]  # the second hangs upside down
    calibration = [
        {"sensor_name": name, **dict(zip(data.POSE_COLUMNS, (*map(float, quaternion), *origin), strict=True))}
        for (name, quaternion), origin in zip(sensors, LIDAR_ORIGINS.tolist(), strict=True)
    ]
    _write_feather(folder / "calibration" / "egovehicle_SE3_sensor.feather", calibration)
    _write_map(folder / "map", log_id, street, settings)


def _write_sweep(file: Path, sweep: Sweep) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = dict(zip("xyz", sweep.points.T.astype(np.float16), strict=True))
    columns["intensity"] = (40 + 3 * (sweep.thing % 50)).astype(np.uint8)
    columns["laser_number"] = sweep.laser.astype(np.uint8)
    columns["offset_ns"] = sweep.offset_ns.astype(np.int32)
    feather.write_feather(pyarrow.table(columns), file, compression="lz4")


def _pose_columns(target_SE3_source: np.ndarray) -> dict[str, float]:
    quaternion = Rotation.from_matrix(target_SE3_source[:3, :3]).as_quat(canonical=True, scalar_first=True)
    return dict(zip(data.POSE_COLUMNS, [*quaternion.tolist(), *target_SE3_source[:3, 3].tolist()], strict=True))


def _box_columns(thing: Thing, ego_SE3_thing: np.ndarray) -> dict[str, float]:
    """The box an annotator would draw: around the thing down to the ground, 5 cm of air above."""
    low, high = thing.bounds()
    low[2], high[2] = 0.0, high[2] + 0.05
    thing_SE3_box = _pose(Rotation.identity(), (low + high) / 2)
    size = dict(zip(("length_m", "width_m", "height_m"), (high - low).tolist(), strict=True))
    return {**size, **_pose_columns(ego_SE3_thing @ thing_SE3_box)}


def _write_map(folder: Path, log_id: str, street: Street, settings: StreetSettings) -> None:
    """Ground raster with its Sim2, and a vector map with the road as one drivable area."""
    folder.mkdir()
    path_x, path_y, _ = street.place(np.linspace(0, 0.1 * settings.sweeps * street.ego_mps, 20), 0.0)
    margin, pixel_m = settings.range_m + 2, 0.3
    low = np.array([path_x.min(), path_y.min()]) - margin
    columns, rows = (int((path.max() - path.min() + 2 * margin) / pixel_m) + 1 for path in (path_x, path_y))
    x, y = low[0] + pixel_m * np.arange(columns), low[1] + pixel_m * np.arange(rows)[:, None]
    height = (street.ground_z(x, y) + CITY_OFFSET[2]).astype(np.float16)
    np.save(folder / f"{log_id}_ground_height_surface____{CITY}.npy", height)
    sim2 = {"R": [1.0, 0.0, 0.0, 1.0], "t": (-(low + CITY_OFFSET[:2])).tolist(), "s": 1 / pixel_m}
    (folder / f"{log_id}___img_Sim2_city.json").write_text(json.dumps(sim2))
    s = np.linspace(-settings.range_m, settings.range_m, 60)
    edge_x, edge_y, _ = street.place(np.concatenate([s, s[::-1]]), np.repeat([-6.0, 10.5], len(s)))
    edge = np.stack([edge_x, edge_y, street.ground_z(edge_x, edge_y)], axis=1) + CITY_OFFSET
    boundary = [dict(zip("xyz", point, strict=True)) for point in edge.round(3).tolist()]
    vector_map = {
        "pedestrian_crossings": {},
        "lane_segments": {},
        "drivable_areas": {"1": {"area_boundary": boundary, "id": 1}},
    }
    (folder / f"log_map_archive_{log_id}____{CITY}_city_00000.json").write_text(json.dumps(vector_map))


def _write_feather(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pyarrow.Table.from_pylist(rows), file)
