"""A street that needs no download: two spinning lidars drive along it and write Argoverse 2 logs.

Houses, poles, trees, clutter, parked and moving cars, trucks, cyclists and pedestrians are placed
along an arc of road over uneven ground. Rays are cast against boxes and ellipsoids. Ranges get
noise, and some returns are lost. The files have Argoverse 2's own layout (sweeps, poses, tracked
boxes, ground raster, calibration, vector map), so the real reader reads them, and their boxes give
the true flow, as they do for real logs.

Three things are simpler than in real data. A sweep is a snapshot, while a real one takes 0.1 s and
is motion-compensated. Everything that moves is rigid, as the true flow from boxes assumes: no legs
swing. And the intensity is made up.

The same settings and library versions give the same bytes. Everything is placed in a street frame
(meters, origin where the ego starts, x along the road, z up). Its origin lies some 5 km from the
origin of the city frame, as in real logs. This file needs numpy, scipy, pyarrow, tqdm and data.py.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from numpy.random import Generator
from pyarrow import feather
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import data


@dataclass(frozen=True)
class StreetSettings:
    """Size and noise of the sweeps. The defaults give sweeps as large as real ones."""

    azimuths: int = 1800  # rays per beam and turn; the number of points is in proportion
    beam_step: int = 1  # use every n-th of the 32 beams of each lidar
    range_m: float = 150.0  # surfaces beyond this distance give no return
    sweeps: int = 6  # sweeps per log, 0.1 s apart
    range_noise_m: float = 0.015  # standard deviation of the measured range
    dropout: float = 0.08  # share of returns that are lost
    seed: int = 0  # another seed gives other streets
    # vary the kind of street, traffic (up to 25 m/s) and LiDAR (one of three kinds) from log to log
    world: bool = False


PRESETS = {
    # 80,000 to 100,000 points per sweep, as in Argoverse 2.
    "full": StreetSettings(),
    # About 6,000 points within 25.6 m that are not ground: for `python train.py`.
    "small": StreetSettings(azimuths=380, beam_step=2, range_m=30.0),
    # 1,000 to 2,000 such points: for the notebooks.
    "teaching": StreetSettings(azimuths=190, beam_step=4, range_m=30.0),
    # Streets of all kinds, seen by several kinds of LiDAR: for a student that works on any LiDAR.
    "world": StreetSettings(range_m=80.0, sweeps=3, range_noise_m=0.02, world=True),
}

# Argoverse 2 has two lidars of 32 beams on the roof, one above the other. The lower one hangs
# upside down and is turned by half a turn.
BEAM_ELEVATIONS_DEG = np.array(
    [-25, -15.64, -11.31, -8.84, -7.25, -6.15, -5.33, -4.67, -4, -3.67, -3.33]
    + [-3, -2.67, -2.33, -2, -1.67, -1.33, -1, -0.67, -0.33, 0, 0.33]
    + [0.67, 1, 1.33, 1.67, 2.33, 3.33, 4.67, 7, 10.33, 15]
)
LIDAR_ORIGINS = np.array([[1.35, 0.0, 1.64], [1.35, 0.0, 1.53]])  # in the ego frame
EGO_HEIGHT_M = 0.33  # of the ego frame's origin above the ground
MIN_RANGE_M = 1.5  # a closer surface gives no return

CITY_OFFSET = np.array([5000.0, 2300.0, 15.0])  # of the street frame in the city frame
CITY = "PIT"
SWEEP_NS = 100_000_000


@dataclass(frozen=True)
class Sensor:
    """One or two lidars on a roof, and the frame in which their points are given."""

    origins: np.ndarray  # (L, 3) in the ego frame; the second lidar hangs upside down
    elevations_deg: np.ndarray  # (E,) of the beams of each
    ego_height_m: float  # of the ego frame's origin above the ground
    sweep_ns: int  # from one sweep to the next
    azimuths: float  # rays per beam and turn, as a share of those in the settings


AV2_SENSOR = Sensor(LIDAR_ORIGINS, BEAM_ELEVATIONS_DEG, EGO_HEIGHT_M, SWEEP_NS, 1.0)

# Two lidars of other data sets, whose points are given in the lidar's own frame. As in KITTI: 64
# beams, the upper half of them closer together, ten turns a second, 1.73 m above the ground. As in
# nuScenes: 32 beams, twenty turns a second, 1.84 m above the ground.
_KITTI_BEAMS = np.concatenate([np.linspace(2, -8.33, 32), np.linspace(-8.83, -24.33, 32)])
_NUSCENES_BEAMS = np.linspace(10.67, -30.67, 32)
KITTI_SENSOR = Sensor(np.zeros((1, 3)), _KITTI_BEAMS, 1.73, SWEEP_NS, 1.1)
NUSCENES_SENSOR = Sensor(np.zeros((1, 3)), _NUSCENES_BEAMS, 1.84, SWEEP_NS // 2, 0.6)


def write_logs(out: str | Path, logs: int, settings: StreetSettings) -> None:
    """Write logs `street-<seed>-<number>` into the folder `out`.

    Logs that exist already are left as they are. A log appears under its name only once all of it
    is written.
    """
    for number in tqdm(range(logs), desc="street", unit="log", disable=logs < 2):
        folder = Path(out) / f"street-{settings.seed:03d}-{number:04d}"
        if folder.exists():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)

        # Write into a hidden folder beside it, which readers skip, and rename it at the end.
        with tempfile.TemporaryDirectory(
            prefix=".", dir=folder.parent, ignore_cleanup_errors=True
        ) as hidden:
            unfinished = Path(hidden) / folder.name
            _write_log(unfinished, folder.name, settings, number)
            if not folder.exists():  # another process may have been faster
                unfinished.rename(folder)


# --- The street -----------------------------------------------------------------------------------

BOX, ELLIPSOID = 0, 1


@dataclass(frozen=True)
class Part:
    """A solid in the frame of its thing: x forward, y left, z up from the ground, in meters."""

    shape: int  # BOX or ELLIPSOID
    center: tuple[float, float, float]
    half: tuple[float, float, float]  # half the box's size, or the ellipsoid's radii
    # How far a ray penetrates leaves or wire, on average, before it returns; 0: it is solid.
    clear_m: float = 0.0


@dataclass(frozen=True)
class Thing:
    """Something on the street: its parts, its place when the log starts, and its motion."""

    parts: tuple[Part, ...]
    s: float  # meters along the road, ahead of the ego's start
    left: float  # meters to the left of the ego's lane
    heading: float = 0.0  # rad, from the direction of the road
    s_mps: float = 0.0  # when the log starts
    left_mps: float = 0.0
    category: str | None = None  # Argoverse 2's; None: it gets no box
    turn_radps: float = 0.0  # counterclockwise, as rad/s: velocity and heading turn together

    def at(self, time_s: float) -> tuple[complex, float]:
        """Its place, s + i left in meters, and its heading, when some seconds have passed."""
        # A turning thing moves along the chord of its arc, in the direction that it has half-way.
        angle = self.turn_radps * time_s
        chord_s = time_s * np.sinc(angle / 2 / np.pi) * np.exp(0.5j * angle)
        velocity = complex(self.s_mps, self.left_mps)
        return complex(self.s, self.left) + velocity * chord_s, self.heading + angle

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest corner (3,) in the thing's own frame."""
        center = np.array([part.center for part in self.parts])  # (parts, 3)
        half = np.array([part.half for part in self.parts])
        return (center - half).min(axis=0), (center + half).max(axis=0)


@dataclass(frozen=True)
class Street:
    """The world of one log: an arc of road, waves of ground, things, and the speed of the ego."""

    curvature: float  # 1/m
    waves: np.ndarray  # (W, 4): amplitude (m), wave numbers along x and y (rad/m), phase
    things: list[Thing]
    ego_mps: float
    sensor: Sensor = AV2_SENSOR
    tilt_deg: tuple[float, float] = (0.0, 0.0)  # pitch and roll of the ego frame on level ground

    def place(self, s, left) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x, y (m) and the road's heading (rad) in the street frame.

        s, left: meters along the road from the ego's start, and to the left of the ego's lane.
        """
        heading = self.curvature * np.asarray(s, dtype=float)

        # The chord from the start of the arc to its point at s points along half the heading there.
        # Its length is s * sin(h/2) / (h/2); numpy's sinc(x) is sin(pi x) / (pi x).
        chord = s * np.sinc(heading / 2 / np.pi)
        x, y = chord * np.cos(heading / 2), chord * np.sin(heading / 2)
        return x - left * np.sin(heading), y + left * np.cos(heading), heading

    def ground_z(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the height of the ground, in meters, at x, y of the street frame."""
        return sum(a * np.sin(kx * x + ky * y + phase) for a, kx, ky, phase in self.waves)

    def street_SE3_ego(self, time_s: float) -> np.ndarray:
        """Return the ego's pose (4, 4). The ego follows the road and tilts with the ground."""
        x, y, heading = self.place(self.ego_mps * time_s, 0.0)

        # The slope is the difference of the ground's height over 1 m, ahead and to the left.
        ahead = np.array([np.cos(heading), np.sin(heading)]) / 2
        aside = np.array([-np.sin(heading), np.cos(heading)]) / 2
        slopes = []
        for dx, dy in (ahead, aside):
            slopes.append(self.ground_z(x + dx, y + dy) - self.ground_z(x - dx, y - dy))

        # A positive pitch turns the nose down, so uphill is negative.
        pitch, roll = -np.arctan(slopes[0]), np.arctan(slopes[1])
        pitch, roll = (pitch, roll) + np.radians(self.tilt_deg)
        rotation = Rotation.from_euler("ZYX", [heading, pitch, roll])
        return _pose(rotation, (x, y, self.ground_z(x, y) + self.sensor.ego_height_m))

    def street_SE3_thing(self, thing: Thing, time_s: float) -> np.ndarray:
        """Return a thing's pose (4, 4). Things stay upright and rest on the ground."""
        place, thing_heading = thing.at(time_s)
        x, y, heading = self.place(place.real, place.imag)
        rotation = Rotation.from_euler("Z", float(heading) + thing_heading)
        return _pose(rotation, (x, y, self.ground_z(x, y)))


def _pose(rotation: Rotation, translation) -> np.ndarray:
    target_SE3_source = np.eye(4)
    target_SE3_source[:3, :3] = rotation.as_matrix()
    target_SE3_source[:3, 3] = translation
    return target_SE3_source


def make_street(settings: StreetSettings, number: int) -> Street:
    """Return the world of log `number`. It depends on the settings and the number alone.

    The order in which random numbers are drawn is part of the street: another order gives another
    street.
    """
    rng = np.random.default_rng([settings.seed, number])
    if settings.world:
        return _any_street(settings, rng)
    ego_mps = rng.uniform(4, 12)

    # The street reaches 15 m farther than the lidars see from the ego's first and last position.
    behind = -settings.range_m - 15
    ahead = settings.range_m + 15 + 0.1 * settings.sweeps * ego_mps

    # The whole arc turns by at most 4.5 rad, so that the road does not meet itself.
    sharpest = min(1 / 40, 4.5 / (ahead - behind))

    waves = _waves(rng)
    things = [
        *_traffic(rng, behind, ahead, ego_mps),
        *_sidewalks(rng, behind, ahead),
        *_scenery(rng, behind, ahead),
    ]
    return Street(rng.uniform(-sharpest, sharpest), waves, things, ego_mps)


def _waves(rng: Generator) -> np.ndarray:
    """Four waves of up to 18 cm, with slopes of a few percent; see `Street.waves`."""
    wave_length = rng.uniform(20, 60, 4)
    direction = rng.uniform(0, 2 * np.pi, 4)
    amplitude = 0.003 * wave_length
    wave_number_x = 2 * np.pi / wave_length * np.cos(direction)
    wave_number_y = 2 * np.pi / wave_length * np.sin(direction)
    phase = rng.uniform(0, 2 * np.pi, 4)
    return np.stack([amplitude, wave_number_x, wave_number_y, phase], axis=1)


def _spaced(
    rng: Generator,
    behind: float,
    ahead: float,
    least: float,
    most: float,
    gap: float = 0.0,
) -> Iterator[float]:
    """Positions along the road, `least` to `most` meters apart.

    None is within `gap` meters of the ego's start.
    """
    s = behind + rng.uniform(0, most)
    while s < ahead:
        if abs(s) > gap:
            yield s
        s += rng.uniform(least, most)


def _traffic(rng: Generator, behind: float, ahead: float, ego_mps: float) -> Iterator[Thing]:
    """Cars, trucks and buses in four rows, and cyclists between the rows."""
    # Of each row: meters to the left of the ego, speed (m/s), least and most distance between
    # neighbors, and the gap around the ego. In order: the ego's own lane, the oncoming lane, and
    # two parking lanes.
    rows = (
        (0.0, ego_mps * rng.uniform(0.8, 1.2), 9, 22, 10),
        (4.4, -rng.uniform(4, 13), 8, 20, 0),
        (-4.4, 0.0, 7, 24, 0),
        (9.0, 0.0, 7, 24, 0),
    )
    for left, row_mps, least, most, gap in rows:
        heading = np.pi if row_mps < 0 else 0.0
        for s in _spaced(rng, behind, ahead, least, most, gap):
            # A long vehicle next to the ego would hold most of the moving points.
            is_long = rng.random() < 0.08 and abs(s) > 20
            category, parts = _truck(rng) if is_long else ("REGULAR_VEHICLE", _car(rng))
            beside = left + rng.normal(0, 0.1)
            s_mps = row_mps * rng.uniform(0.97, 1.03)
            yield Thing(parts, s, beside, heading, s_mps, category=category)

    # Cyclists ride along with the ego on its right, and towards it on the far side.
    for left, sign in ((-2.5, 1), (6.7, -1)):
        heading = np.pi if sign < 0 else 0.0
        for s in _spaced(rng, behind, ahead, 8, 28, 5):
            parts = _cyclist(rng)
            yield Thing(parts, s, left, heading, sign * rng.uniform(3, 7), category="BICYCLIST")


def _sidewalks(rng: Generator, behind: float, ahead: float) -> Iterator[Thing]:
    """On either side of the road: pedestrians, clutter and cones."""
    for left in (-7.4, 12.0):
        for s in _spaced(rng, behind, ahead, 3, 12):
            yield _walker(rng, s, left)

        # Clutter has no category. To the labels it is background, like a bush or a mailbox.
        for s in _spaced(rng, behind, ahead, 5, 15):
            yield Thing(_clutter(rng), s, left + rng.uniform(-1.6, 1.6), rng.uniform(0, np.pi))

        # Cones are labeled, but they never move: foreground is not the same as moving.
        for s in _spaced(rng, behind, ahead, 12, 50):
            radius = rng.uniform(0.12, 0.18)
            cone = Part(ELLIPSOID, (0, 0, 0.35), (radius, radius, 0.4))
            yield Thing((cone,), s, left * 0.82, category="CONSTRUCTION_CONE")


def _walker(rng: Generator, s: float, left: float) -> Thing:
    """A pedestrian near s, left. A quarter stand, a fifth cross the road, the others walk along."""
    speed_mps = rng.uniform(0.7, 1.9)
    heading = rng.choice([0, np.pi]) + rng.normal(0, 0.3)
    kind = rng.random()
    if kind < 0.25:
        speed_mps = 0.0
    elif kind < 0.45:
        heading = rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.2)

    # Pedestrians look ahead: the velocity points along the heading.
    s_mps, left_mps = speed_mps * np.cos(heading), speed_mps * np.sin(heading)
    parts = _pedestrian(rng)
    return Thing(parts, s, left + rng.uniform(-1, 1), heading, s_mps, left_mps, "PEDESTRIAN")


def _scenery(rng: Generator, behind: float, ahead: float) -> Iterator[Thing]:
    """On either side: a row of houses with gaps, and a row of poles and trees before it."""
    for front, side in ((-12.0, -1), (16.5, 1)):  # side: -1 is right of the road, 1 left
        s = behind
        while s < ahead:
            # The house reaches into the uneven ground. Its porch is on the side of the road.
            width, height, setback = rng.uniform(5, 13), rng.uniform(3, 9), rng.uniform(0, 2.5)
            house = Part(BOX, (0, 0, height / 2 - 0.5), (width / 2, 3, height / 2 + 0.5))
            porch_x = rng.uniform(-0.3, 0.3) * width
            porch = Part(BOX, (porch_x, -side * 3, 1.2), (rng.uniform(0.5, 1.5), 0.7, 1.7))
            yield Thing((house, porch), s + width / 2, front + side * (setback + 3))
            s += width + max(0.0, rng.uniform(-3, 8))

        # A pole is a stem without a crown.
        for s in _spaced(rng, behind, ahead, 7, 20):
            radius = rng.uniform(0.06, 0.2)
            stem = Part(BOX, (0, 0, 2.5), (radius, radius, 3))
            crown = Part(ELLIPSOID, (0, 0, rng.uniform(3, 4.5)), tuple(rng.uniform(0.8, 1.8, 3)))
            parts = (stem, crown) if rng.random() < 0.5 else (stem,)
            yield Thing(parts, s, front - side * 6.3, rng.uniform(0, np.pi))


def _car(rng: Generator) -> tuple[Part, ...]:
    """A body from 0.2 m above the road to the waist, a cabin on top of it, and a rounded hood."""
    length, width, height = rng.uniform(3.9, 5.1), rng.uniform(1.7, 2.0), rng.uniform(1.4, 1.85)
    waist, cabin = 0.55 * height, length * rng.uniform(0.24, 0.32)
    body_center, body_half = (waist + 0.2) / 2, (waist - 0.2) / 2
    cabin_center, cabin_half = (waist + height) / 2, (height - waist) / 2
    return (
        Part(BOX, (0, 0, body_center), (length / 2, width / 2, body_half)),
        Part(BOX, (-0.07 * length, 0, cabin_center), (cabin, 0.43 * width, cabin_half)),
        Part(ELLIPSOID, (0.3 * length, 0, waist), (0.19 * length, 0.4 * width, 0.15)),
    )


def _truck(rng: Generator) -> tuple[str, tuple[Part, ...]]:
    """A bus or a box truck: its category and its parts."""
    if rng.random() < 0.3:
        half = rng.uniform(4.5, 6)
        body = Part(BOX, (0, 0, 1.6), (half, 1.25, 1.4))
        roof = Part(BOX, (0, 0, 3.1), (half / 2, 0.8, 0.15))
        return "BUS", (body, roof)
    half = rng.uniform(1.8, 3)
    cab = Part(BOX, (half + 0.9, 0, 1.3), (0.9, 1.05, 1.0))
    load = Part(BOX, (0, 0, 1.9), (half, 1.2, rng.uniform(1.2, 1.5)))
    return "BOX_TRUCK", (load, cab)


def _cyclist(rng: Generator) -> tuple[Part, ...]:
    """A bicycle, a body and a head."""
    return (
        Part(BOX, (0, 0, 0.5), (0.85, 0.06, 0.45)),
        Part(ELLIPSOID, (-0.1, 0, 1.15), (0.28, rng.uniform(0.2, 0.28), 0.42)),
        Part(ELLIPSOID, (0.1, 0, 1.65), (0.12, 0.12, 0.15)),
    )


def _pedestrian(rng: Generator) -> tuple[Part, ...]:
    """Two legs in mid-stride, a body, a head, and for some a bag. The legs do not swing."""
    height, width = rng.uniform(1.1, 1.95), rng.uniform(0.18, 0.3)
    stride = rng.uniform(0, 0.25)
    depth = rng.uniform(0.12, 0.22)
    parts = [
        Part(BOX, (stride, 0.1, 0.23 * height), (0.08, 0.08, 0.23 * height)),
        Part(BOX, (-stride, -0.1, 0.23 * height), (0.08, 0.08, 0.23 * height)),
        Part(ELLIPSOID, (0, 0, 0.66 * height), (depth, width, 0.24 * height)),
        Part(ELLIPSOID, (0.03, 0, 0.93 * height), (0.1, 0.09, 0.07 * height)),
    ]
    if rng.random() < 0.3:
        bag = Part(BOX, (rng.uniform(-0.3, 0.1), width, 0.5 * height), (0.18, 0.08, 0.2))
        parts.append(bag)
    return tuple(parts)


def _clutter(rng: Generator) -> tuple[Part, ...]:
    """One box or ellipsoid of 0.3 to 1.2 m, sunk a little into the ground."""
    half = rng.uniform(0.15, 0.6, 3)
    shape = int(rng.integers(2))
    return (Part(shape, (0, 0, half[2] * 0.9), tuple(half)),)


# --- Streets of all kinds -------------------------------------------------------------------------


class Plan(NamedTuple):
    """Where the lanes of a street are, and how fast the traffic is."""

    behind: float  # m, where the street begins
    ahead: float  # m, where it ends
    ego_mps: float
    usual_mps: float  # of the traffic
    lane_m: float  # width of a lane
    right: int  # lanes to the right of the ego's, in its direction
    left: int  # lanes to the left of it, in its direction
    oncoming: int  # lanes beyond those
    crossing_s: float | None  # where another road crosses, m; None: nowhere

    @property
    def edges(self) -> tuple[float, float]:
        """Meters to the left of the ego: the right and the left edge of the road."""
        return -(self.right + 0.5) * self.lane_m, (self.left + self.oncoming + 0.5) * self.lane_m

    def is_road(self, s: float) -> bool:
        """Whether s, meters along the street, lies on the road that crosses, or close to it."""
        return self.crossing_s is not None and abs(s - self.crossing_s) < 3 * self.lane_m


def _any_street(settings: StreetSettings, rng: Generator) -> Street:
    """Another kind of street, seen by another LiDAR, for each log."""
    sensors = (AV2_SENSOR, KITTI_SENSOR, NUSCENES_SENSOR)
    sensor = sensors[rng.choice(len(sensors), p=(0.6, 0.2, 0.2))]
    ego_height_m = sensor.ego_height_m + rng.normal(0, 0.05)
    sensor = dataclasses.replace(sensor, ego_height_m=ego_height_m)

    seconds = settings.sweeps * sensor.sweep_ns / 1e9
    ego_mps = rng.uniform(1, 20) if rng.random() < 0.85 else 0.0
    behind, ahead = -settings.range_m - 15, settings.range_m + 15 + seconds * ego_mps
    lanes = (rng.integers(0, 3), rng.integers(0, 2), rng.integers(0, 4))
    crossing_s = rng.uniform(-25, 45) if rng.random() < 0.6 else None
    usual_mps, lane_m = rng.uniform(3, 25), rng.uniform(3.0, 3.8)
    plan = Plan(behind, ahead, ego_mps, usual_mps, lane_m, *lanes, crossing_s)

    # Nothing may drive through anything else, the ego included.
    ego = Thing((Part(BOX, (0, 0, 1), (2.5, 1, 1)),), 0.0, 0.0, s_mps=ego_mps)
    things, footprints = [], [_footprint(ego, seconds)]
    for thing in (*_lanes(rng, plan), *_crossing(rng, plan), *_people(rng, plan)):
        footprint = _footprint(thing, seconds)
        if not _meets_any(footprint, footprints):
            things.append(thing)
            footprints.append(footprint)
    things += [*_roadside(rng, plan), *_houses(rng, plan)]

    sharpest = min(1 / 30, 4.5 / (ahead - behind))
    curvature, tilt_deg = rng.uniform(-sharpest, sharpest), tuple(rng.normal(0, 0.7, 2))
    return Street(curvature, _waves(rng), things, ego_mps, sensor, tilt_deg)


def _lanes(rng: Generator, plan: Plan) -> Iterator[Thing]:
    """Traffic along the street: it flows, crawls or stands, lane by lane; and parked rows."""
    for lane in range(-plan.right, plan.left + plan.oncoming + 1):
        sign = -1 if lane > plan.left else 1
        lane_mps = plan.usual_mps * rng.uniform(0.6, 1.2) if rng.random() < 0.8 else 0.0
        if lane == 0:
            lane_mps = plan.ego_mps * rng.uniform(0.8, 1.2)
        for s in _spaced(rng, plan.behind, plan.ahead, 7 + lane_mps, 25 + 3 * lane_mps):
            left = lane * plan.lane_m + rng.normal(0, 0.2)
            heading = (0.0 if sign > 0 else np.pi) + rng.normal(0, 0.02)
            yield _vehicle(rng, s, left, heading, lane_mps * rng.uniform(0.9, 1.1))

    # Parked cars stand along the edges, or across them.
    for edge, outward in zip(plan.edges, (-1, 1), strict=True):
        heading, gap = ((0.0, 5.5), (np.pi / 2, 2.8))[int(rng.random() < 0.25)]
        if rng.random() < 0.6:
            for s in _spaced(rng, plan.behind, plan.ahead, gap, 2.5 * gap):
                turned = heading + rng.choice([0, np.pi]) + rng.normal(0, 0.04)
                beside = edge + outward * (1.3 if gap > 5 else 2.8)
                if not plan.is_road(s):
                    yield _vehicle(rng, s, beside, turned, 0.0)


def _crossing(rng: Generator, plan: Plan) -> Iterator[Thing]:
    """Traffic on the road that crosses, and cars that turn into it or out of it."""
    if plan.crossing_s is None:
        return
    low, high = plan.edges
    for lane, sign in ((-1.5, 1), (-0.5, 1), (0.5, -1), (1.5, -1)):
        lane_mps = min(rng.uniform(2, 20), plan.usual_mps) if rng.random() < 0.6 else 0.0
        for left in _spaced(rng, -80, 80, 7 + lane_mps, 25 + 3 * lane_mps):
            # Waiting vehicles stop before the street.
            is_waiting_in_it = lane_mps == 0 and low - 2 < left < high + 2
            s = plan.crossing_s + lane * plan.lane_m + rng.normal(0, 0.2)
            if not is_waiting_in_it:
                yield _vehicle(rng, s, left, sign * np.pi / 2, lane_mps * rng.uniform(0.9, 1.1))
    for _ in range(rng.integers(0, 6)):
        s, left = plan.crossing_s + rng.uniform(-8, 8), rng.uniform(low, high)
        mps, radius = rng.uniform(2, 9), rng.uniform(6, 15) * rng.choice([-1, 1])
        yield _vehicle(rng, s, left, rng.uniform(0, 2 * np.pi), mps, mps / radius)


def _vehicle(
    rng: Generator, s: float, left: float, heading: float, mps: float, turn_radps: float = 0.0
) -> Thing:
    """A car; sometimes a truck, a bus, or somebody on two wheels."""
    kind = rng.random()
    category, parts = "REGULAR_VEHICLE", _car(rng)
    if kind < 0.1 and abs(complex(s, left)) > 12:  # beside the ego it would hide everything else
        category, parts = _truck(rng)
    elif kind < 0.18:
        category, parts = "BICYCLIST", _cyclist(rng)
        mps = min(mps, rng.uniform(3, 9))
    velocity = mps * np.cos(heading), mps * np.sin(heading)
    return Thing(parts, s, left, heading, *velocity, category, turn_radps)


def _people(rng: Generator, plan: Plan) -> Iterator[Thing]:
    """Groups of one to five on the sidewalks, and some who cross the street."""
    for edge, outward in zip(plan.edges, (-1, 1), strict=True):
        for s in _spaced(rng, plan.behind, plan.ahead, 4, 30):
            walker = _walker(rng, s, edge + outward * rng.uniform(3.5, 7))
            if rng.random() < 0.1:
                walker = dataclasses.replace(walker, left=rng.uniform(*plan.edges))
            for _ in range(rng.integers(1, 6)):
                beside = {
                    "s": walker.s + rng.normal(0, 0.8),
                    "left": walker.left + rng.normal(0, 0.8),
                }
                yield dataclasses.replace(walker, parts=_pedestrian(rng), **beside)


def _roadside(rng: Generator, plan: Plan) -> Iterator[Thing]:
    """Clutter, poles, cones, trees, bushes, hedges and fences on either side."""
    for edge, outward in zip(plan.edges, (-1, 1), strict=True):
        for s in _spaced(rng, plan.behind, plan.ahead, 1, rng.uniform(3, 14)):
            left = edge + outward * rng.uniform(2.5, 14)
            make = (_clutter, _pole, _tree, _bush, _hedge)[rng.choice(5)]
            parts, heading = make(rng), rng.normal(0, 0.1)
            if rng.random() < 0.08:
                yield Thing(_cone(rng), s, edge, category="CONSTRUCTION_CONE")
            elif not plan.is_road(s):
                yield Thing(parts, s, left, heading)


def _houses(rng: Generator, plan: Plan) -> Iterator[Thing]:
    """Houses in a row or far apart."""
    for edge, outward in zip(plan.edges, (-1, 1), strict=True):
        front, s = rng.uniform(4, 16), plan.behind
        gap = rng.uniform(0, 4) if rng.random() < 0.6 else rng.uniform(4, 40)
        while s < plan.ahead:
            half = rng.uniform(3, 12), rng.uniform(3, 8), rng.uniform(1.5, 8)
            house = Part(BOX, (0, 0, half[2] - 0.5), half)
            porch = Part(BOX, (rng.uniform(-2, 2), -outward * half[1], 1.2), (1, 0.7, 1.7))
            s += half[0]
            if not (plan.is_road(s - half[0]) or plan.is_road(s) or plan.is_road(s + half[0])):
                yield Thing(
                    (house, porch), s, edge + outward * (front + half[1]), rng.normal(0, 0.1)
                )
            s += half[0] + rng.uniform(-3, gap)


def _pole(rng: Generator) -> tuple[Part, ...]:
    radius, height = rng.uniform(0.04, 0.25), rng.uniform(0.5, 4)
    sign = Part(BOX, (0, 0, 2 * height), (0.02, rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5)))
    stem = Part(BOX, (0, 0, height), (radius, radius, height))
    return (stem, sign) if rng.random() < 0.4 else (stem,)


def _cone(rng: Generator) -> tuple[Part, ...]:
    radius = rng.uniform(0.12, 0.18)
    return (Part(ELLIPSOID, (0, 0, 0.35), (radius, radius, 0.4)),)


def _tree(rng: Generator) -> tuple[Part, ...]:
    """A stem, and a crown that rays can penetrate."""
    radius, height = rng.uniform(0.08, 0.3), rng.uniform(2.5, 5)
    stem = Part(BOX, (0, 0, height / 2), (radius, radius, height / 2))
    crown = Part(ELLIPSOID, (0, 0, height), tuple(rng.uniform(1, 2.8, 3)), rng.uniform(0.3, 1.5))
    return stem, crown


def _bush(rng: Generator) -> tuple[Part, ...]:
    half = rng.uniform(0.3, 1.5, 3)
    return (Part(ELLIPSOID, (0, 0, half[2] * 0.8), tuple(half), rng.uniform(0.1, 0.6)),)


def _hedge(rng: Generator) -> tuple[Part, ...]:
    """A hedge, or a fence of wire or slats through which a part of the rays passes."""
    length, height = rng.uniform(1.5, 6), rng.uniform(0.4, 1.0)
    if rng.random() < 0.5:
        return (Part(BOX, (0, 0, height), (length, rng.uniform(0.2, 0.5), height), 0.2),)
    return (Part(BOX, (0, 0, height), (length, 0.03, height), rng.uniform(0.03, 0.2)),)


class Footprint(NamedTuple):
    """What a thing covers on the ground, at three moments."""

    places: np.ndarray  # (3,) complex: s + i left, m
    headings: np.ndarray  # (3,) rad
    low: np.ndarray  # (3,) its lowest corner, in its own frame
    high: np.ndarray  # (3,) its highest corner
    radius: float  # of a circle around its place that holds it, m


def _footprint(thing: Thing, seconds: float) -> Footprint:
    """A thing now, after half of some seconds, and after all of them."""
    places, headings = zip(*(thing.at(share * seconds) for share in (0.0, 0.5, 1.0)), strict=True)
    low, high = thing.bounds()
    radius = np.hypot(*np.maximum(-low, high)[:2])
    return Footprint(np.array(places), np.array(headings), low, high, radius)


def _meets_any(footprint: Footprint, others: list[Footprint]) -> bool:
    """Whether a thing stands or drives into another one."""
    # Most are too far away, which their circles tell.
    places = np.array([other.places for other in others])  # (O, 3)
    reach = footprint.radius + np.array([other.radius for other in others]) + 0.5  # (O,)
    is_near = (np.abs(places - footprint.places) < reach[:, None]).any(axis=1)
    for index in np.flatnonzero(is_near):
        if _enters(footprint, others[index]) or _enters(others[index], footprint):
            return True
    return False


def _enters(thing: Footprint, other: Footprint) -> bool:
    """Whether one of nine points of a thing lies in another's rectangle, or within 0.3 m of it."""
    # Both are convex and about as large, so nine points each, taken both ways, find all meetings.
    x = np.linspace(thing.low[0], thing.high[0], 3)
    y = np.linspace(thing.low[1], thing.high[1], 3)
    corners = np.add.outer(x, 1j * y).ravel()  # (9,)
    points = thing.places[:, None] + corners * np.exp(1j * thing.headings[:, None])  # (3, 9)
    local = (points - other.places[:, None]) * np.exp(-1j * other.headings[:, None])
    is_inside = (local.real > other.low[0] - 0.3) & (local.real < other.high[0] + 0.3)
    is_inside &= (local.imag > other.low[1] - 0.3) & (local.imag < other.high[1] + 0.3)
    return bool(is_inside.any())


# --- The lidars -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The returns of one sweep, at one moment."""

    points: np.ndarray  # (N, 3) in the ego frame, in meters
    laser: np.ndarray  # (N,) 0 to 63
    offset_ns: np.ndarray  # (N,) when each beam fired, since the start of the turn
    thing: np.ndarray  # (N,) index into the street's things, -1 for ground


class Rays(NamedTuple):
    """The rays of one lidar's turn, in the ego frame: E beams (elevations) times A azimuths."""

    origin: np.ndarray  # (3,)
    direction: np.ndarray  # (3, E, A) unit vectors
    turn: np.ndarray  # (A,) share of the turn that is done, 0 to 1
    azimuth: np.ndarray  # (A,) rad, evenly spaced, counterclockwise
    laser: np.ndarray  # (E,) 0 to 63
    range_m: float


def cast_sweep(street: Street, time_s: float, settings: StreetSettings, rng: Generator) -> Sweep:
    """Return what the lidars see of the street at one moment."""
    street_SE3_ego = street.street_SE3_ego(time_s)
    ego_SE3_street = data.inverse(street_SE3_ego)
    ego_SE3_things = []
    for thing in street.things:
        ego_SE3_things.append(ego_SE3_street @ street.street_SE3_thing(thing, time_s))

    of_lidars = []
    for lidar in range(len(street.sensor.origins)):
        rays = _rays_of(street.sensor, lidar, settings, rng)
        distance, hit = _cast(rays, street, street_SE3_ego, ego_SE3_things, rng)  # (E, A) each

        # Noise, the limits of the range, and lost returns.
        distance += rng.normal(0, settings.range_noise_m, distance.shape)
        is_return = (distance > MIN_RANGE_M) & (distance < settings.range_m)
        is_return &= rng.random(distance.shape) >= settings.dropout

        # From a table of rays to a list of N returns.
        beam, column = np.nonzero(is_return)
        points = rays.origin + (distance[is_return] * rays.direction[:, is_return]).T  # (N, 3)
        offset_ns = rays.turn[column] % 1 * street.sensor.sweep_ns
        of_lidars.append((points, rays.laser[beam], offset_ns, hit[is_return]))
    return Sweep(*(np.concatenate(parts) for parts in zip(*of_lidars, strict=True)))


def _rays_of(sensor: Sensor, lidar: int, settings: StreetSettings, rng: Generator) -> Rays:
    """The rays of one turn of lidar 0 (upright) or 1 (upside down, half a turn away)."""
    # Each turn starts at an angle of its own, so no two sweeps sample the same directions.
    azimuths = round(settings.azimuths * sensor.azimuths)
    turn = (np.arange(azimuths) + rng.random()) / azimuths
    azimuth = 2 * np.pi * turn + np.pi * lidar

    # Upside down, a beam that points up in the lidar's frame points down.
    beams = np.arange(0, len(sensor.elevations_deg), settings.beam_step)
    upright = 1 if lidar == 0 else -1
    elevation = np.radians(sensor.elevations_deg[beams] * upright)[:, None]  # (E, 1)

    level = np.cos(elevation)
    x, y, z = level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)
    direction = np.stack(np.broadcast_arrays(x, y, z))  # (3, E, A)
    laser = beams + len(sensor.elevations_deg) * lidar
    return Rays(sensor.origins[lidar], direction, turn, azimuth, laser, settings.range_m)


def _cast(
    rays: Rays,
    street: Street,
    street_SE3_ego: np.ndarray,
    ego_SE3_things: list[np.ndarray],
    rng: Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Where each ray ends: its length (E, A), and the thing it hits (E, A), -1 for the ground."""
    distance = _cast_at_ground(rays, street, street_SE3_ego)
    hit = np.full(distance.shape, -1)

    # A ray ends at the nearest surface, whatever the order in which the things are cast.
    for index, (thing, ego_SE3_thing) in enumerate(zip(street.things, ego_SE3_things, strict=True)):
        columns, to_thing = _cast_at_thing(rays, thing, ego_SE3_thing, rng)
        is_nearer = to_thing < distance[:, columns]
        distance[:, columns] = np.where(is_nearer, to_thing, distance[:, columns])
        hit[:, columns] = np.where(is_nearer, index, hit[:, columns])
    return distance, hit


def _cast_at_ground(rays: Rays, street: Street, street_SE3_ego: np.ndarray) -> np.ndarray:
    """Distances (E, A) to the ground, infinite where a ray does not meet it within range.

    Each ray marches. A step is as long as the gap below the ray would allow if the ground were
    everywhere as steep as it gets anywhere, so no ray can step through a hill.
    """
    steepest = (street.waves[:, 0] * np.hypot(street.waves[:, 1], street.waves[:, 2])).sum()
    start = data.transform(street_SE3_ego, rays.origin)  # (3,) in the street frame
    direction = street_SE3_ego[:3, :3] @ rays.direction.reshape(3, -1)  # (3, R)

    # How fast the gap can shrink, in meters per meter. Where it cannot, the ray never lands.
    closing = steepest * np.hypot(direction[0], direction[1]) - direction[2]
    flying = np.flatnonzero(closing > 0)  # the rays that are still on their way
    traveled = np.zeros(len(flying))
    distance = np.full(direction.shape[1], np.inf)

    # A ray that has not landed after 40 steps only grazes the ground, and gives no return.
    for _ in range(40):
        x, y, z = start[:, None] + traveled * direction[:, flying]
        gap = z - street.ground_z(x, y)

        # A ray has landed when it is within 5 mm of the ground.
        is_down = gap < 0.005
        distance[flying[is_down]] = traveled[is_down]
        traveled += gap / closing[flying]
        goes_on = ~is_down & (traveled < rays.range_m)
        flying, traveled = flying[goes_on], traveled[goes_on]
    return distance.reshape(rays.direction.shape[1:])


def _cast_at_thing(
    rays: Rays, thing: Thing, ego_SE3_thing: np.ndarray, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The columns (n,) of rays that can meet the thing, and the distances (E, n) at which they do.

    The distance is infinite where a ray misses. A thing out of range gets no columns.
    """
    # A ball around the thing, seen from the lidar.
    low, high = thing.bounds()
    center = data.transform(ego_SE3_thing, (low + high) / 2) - rays.origin
    radius = np.linalg.norm(high - low) / 2
    away = np.hypot(center[0], center[1])
    _, beams, azimuths = rays.direction.shape
    if away - radius > rays.range_m:
        return np.empty(0, dtype=int), np.empty((beams, 0))

    # Only the slice of the turn in which the ball is seen is cast: this is what makes casting fast.
    half_angle = np.arcsin(min(1.0, radius / away)) if away > radius else np.pi
    bearing = np.arctan2(center[1], center[0]) - rays.azimuth[0]
    first = int(np.floor((bearing - half_angle) / (2 * np.pi) * azimuths))
    last = int(np.floor((bearing + half_angle) / (2 * np.pi) * azimuths))
    columns = np.arange(first, min(last + 2, first + azimuths)) % azimuths

    # In the thing's frame, and scaled by a part's size, the part is a unit cube or a unit sphere. A
    # scaled ray is still a ray, and its parameter is still in meters.
    thing_SE3_ego = data.inverse(ego_SE3_thing)
    start = data.transform(thing_SE3_ego, rays.origin)  # (3,)
    direction = np.tensordot(thing_SE3_ego[:3, :3], rays.direction[:, :, columns], axes=1)
    nearest = np.full(direction.shape[1:], np.inf)  # (E, n)
    for part in thing.parts:
        cast = _cast_at_cube if part.shape == BOX else _cast_at_sphere
        half = np.array(part.half)[:, None, None]
        scaled_start = (start - part.center)[:, None, None] / half
        enter, leave = cast(scaled_start, direction / half)
        if part.clear_m:
            # Leaves and wire: a ray returns from somewhere inside, or gets through. No two sweeps
            # hit the same leaves.
            enter = enter + rng.exponential(part.clear_m, enter.shape)
            enter = np.where(enter < leave, enter, np.inf)
        nearest = np.minimum(nearest, enter)
    return columns, nearest


def _cast_at_cube(start: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which rays enter and leave the cube [-1, 1]^3 from outside.

    The first is infinite where a ray misses it.
    """
    # Per axis, a ray is between the two faces from one crossing to the other. It is inside the cube
    # while that holds for all axes. A ray parallel to a face divides by zero: its crossings are
    # infinite, as they should be, or NaN, which counts as a miss.
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-1 - start) / direction, (1 - start) / direction
    enter = np.minimum(one, other).max(axis=0)
    leave = np.maximum(one, other).min(axis=0)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf), leave


def _cast_at_sphere(start: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for the unit sphere."""
    # |start + t direction|^2 = 1 is a t^2 + 2 b t + c = 0. The ray enters at the smaller root.
    a = (direction**2).sum(axis=0)
    b = (direction * start).sum(axis=0)
    c = (start**2).sum() - 1
    root = b**2 - a * c
    root, is_hit = np.sqrt(np.maximum(root, 0)), root >= 0
    enter, leave = (-b - root) / a, (-b + root) / a
    return np.where(is_hit & (enter > 0), enter, np.inf), leave


# --- The files ------------------------------------------------------------------------------------


def _write_log(folder: Path, log_id: str, settings: StreetSettings, number: int) -> None:
    """Write one log in Argoverse 2's layout."""
    street = make_street(settings, number)
    rng = np.random.default_rng([settings.seed, number, 1])  # noise does not change the street
    city_SE3_street = _pose(Rotation.identity(), CITY_OFFSET)
    first_ns = 315_966_000_000_000_000 + number * 60_000_000_000  # one minute between logs

    pose_rows, box_rows = [], []
    for i in range(settings.sweeps):
        since_first_ns = i * street.sensor.sweep_ns
        timestamp_ns, time_s = first_ns + since_first_ns, since_first_ns * 1e-9
        sweep = cast_sweep(street, time_s, settings, rng)
        _write_sweep(folder / "sensors" / "lidar" / f"{timestamp_ns}.feather", sweep)
        city_SE3_ego = city_SE3_street @ street.street_SE3_ego(time_s)
        pose_rows.append({"timestamp_ns": timestamp_ns, **_pose_columns(city_SE3_ego)})
        box_rows += _box_rows(street, sweep, time_s, timestamp_ns, log_id)

    _write_feather(folder / "city_SE3_egovehicle.feather", pose_rows)
    _write_feather(folder / "annotations.feather", box_rows)
    file = folder / "calibration" / "egovehicle_SE3_sensor.feather"
    _write_calibration(file, street.sensor)
    _write_map(folder / "map", log_id, street, settings)


def _write_sweep(file: Path, sweep: Sweep) -> None:
    """Write a sweep's points with Argoverse 2's columns and types: x, y, z are float16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = dict(zip("xyz", sweep.points.T.astype(np.float16), strict=True))
    columns["intensity"] = (40 + 3 * (sweep.thing % 50)).astype(np.uint8)
    columns["laser_number"] = sweep.laser.astype(np.uint8)
    columns["offset_ns"] = sweep.offset_ns.astype(np.int32)
    feather.write_feather(pyarrow.table(columns), file, compression="lz4")


def _box_rows(
    street: Street, sweep: Sweep, time_s: float, timestamp_ns: int, log_id: str
) -> list[dict]:
    """Rows of annotations.feather for one sweep, boxes in the ego frame."""
    ego_SE3_street = data.inverse(street.street_SE3_ego(time_s))
    points_by_thing = np.bincount(sweep.thing + 1, minlength=len(street.things) + 1)[1:]
    rows = []
    for index, thing in enumerate(street.things):
        # Things that the lidars see get a box. So does every eighth of the others, because
        # Argoverse 2 has boxes without points, too.
        points = int(points_by_thing[index])
        if thing.category is None or (points == 0 and index % 8 != 0):
            continue
        ego_SE3_thing = ego_SE3_street @ street.street_SE3_thing(thing, time_s)
        row = {
            "timestamp_ns": timestamp_ns,
            "track_uuid": f"{log_id}-{index:04d}",
            "category": thing.category,
            **_box_columns(thing, ego_SE3_thing),
            "num_interior_pts": points,
        }
        rows.append(row)
    return rows


def _pose_columns(target_SE3_source: np.ndarray) -> dict[str, float]:
    """A pose (4, 4) as Argoverse 2 stores it: quaternion (w first) and translation, in meters."""
    rotation = Rotation.from_matrix(target_SE3_source[:3, :3])
    quaternion = rotation.as_quat(canonical=True, scalar_first=True)
    numbers = [*quaternion.tolist(), *target_SE3_source[:3, 3].tolist()]
    return dict(zip(data.POSE_COLUMNS, numbers, strict=True))


def _box_columns(thing: Thing, ego_SE3_thing: np.ndarray) -> dict[str, float]:
    """The box an annotator would draw: down to the ground, and with 5 cm of air above."""
    low, high = thing.bounds()
    low[2] = 0.0
    high[2] += 0.05
    thing_SE3_box = _pose(Rotation.identity(), (low + high) / 2)
    size = dict(zip(("length_m", "width_m", "height_m"), (high - low).tolist(), strict=True))
    return {**size, **_pose_columns(ego_SE3_thing @ thing_SE3_box)}


def _write_calibration(file: Path, sensor: Sensor) -> None:
    """Write the poses of the lidars in the ego frame."""
    # Quaternions, w first: the identity, and half a turn about x, which is upside down.
    quaternions = {"up_lidar": (1.0, 0.0, 0.0, 0.0), "down_lidar": (0.0, 1.0, 0.0, 0.0)}
    rows = []
    names = list(quaternions)[: len(sensor.origins)]
    for name, origin in zip(names, sensor.origins.tolist(), strict=True):
        pose = dict(zip(data.POSE_COLUMNS, (*quaternions[name], *origin), strict=True))
        rows.append({"sensor_name": name, **pose})
    _write_feather(file, rows)


def _write_map(folder: Path, log_id: str, street: Street, settings: StreetSettings) -> None:
    """Write the ground raster, and a vector map with the road as one drivable area."""
    folder.mkdir()
    _write_raster(folder, log_id, street, settings)

    # The area's boundary: along the right edge of the road and back along the left one.
    s = np.linspace(-settings.range_m, settings.range_m, 60)
    there_and_back = np.concatenate([s, s[::-1]])
    x, y, _ = street.place(there_and_back, np.repeat([-6.0, 10.5], len(s)))
    boundary = np.stack([x, y, street.ground_z(x, y)], axis=1) + CITY_OFFSET  # (120, 3), city
    corners = [dict(zip("xyz", point, strict=True)) for point in boundary.round(3).tolist()]

    # The reader expects all three tables of a map, even if two are empty.
    vector_map = {
        "pedestrian_crossings": {},
        "lane_segments": {},
        "drivable_areas": {"1": {"area_boundary": corners, "id": 1}},
    }
    file = folder / f"log_map_archive_{log_id}____{CITY}_city_00000.json"
    file.write_text(json.dumps(vector_map))


def _write_raster(folder: Path, log_id: str, street: Street, settings: StreetSettings) -> None:
    """Write the height of the ground (city frame, 0.3 m per pixel), and the Sim2 to its pixels."""
    # The raster reaches as far as the lidars see from anywhere on the ego's path, and 2 m farther.
    seconds = street.sensor.sweep_ns / 1e9 * settings.sweeps
    path_s = np.linspace(0, seconds * street.ego_mps, 20)
    path_x, path_y, _ = street.place(path_s, 0.0)
    margin, pixel_m = settings.range_m + 2, 0.3
    low = np.array([path_x.min(), path_y.min()]) - margin  # of the raster, in the street frame
    columns = int((path_x.max() - path_x.min() + 2 * margin) / pixel_m) + 1
    rows = int((path_y.max() - path_y.min() + 2 * margin) / pixel_m) + 1

    x = low[0] + pixel_m * np.arange(columns)  # (columns,)
    y = low[1] + pixel_m * np.arange(rows)[:, None]  # (rows, 1)
    height = (street.ground_z(x, y) + CITY_OFFSET[2]).astype(np.float16)  # (rows, columns)
    np.save(folder / f"{log_id}_ground_height_surface____{CITY}.npy", height)

    # pixel = s * (R @ xy_city + t)
    t = (-(low + CITY_OFFSET[:2])).tolist()
    sim2 = {"R": [1.0, 0.0, 0.0, 1.0], "t": t, "s": 1 / pixel_m}
    (folder / f"{log_id}___img_Sim2_city.json").write_text(json.dumps(sim2))


def _write_feather(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pyarrow.Table.from_pylist(rows), file)
