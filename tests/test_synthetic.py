"""The street: what its rays hit, what its labels state, and that it depends on the seed alone."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import data
import synthetic
from synthetic import PRESETS


@pytest.fixture(scope="module")
def full_pair(tmp_path_factory) -> data.SweepPair:
    folder = tmp_path_factory.mktemp("full")
    synthetic.write_logs(folder, 1, dataclasses.replace(PRESETS["full"], sweeps=2))
    return data.open_dataset(folder)[0]


def files(folder) -> dict[str, bytes]:
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_street(tmp_path):
    settings = dataclasses.replace(PRESETS["teaching"], sweeps=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write_logs(tmp_path / name, 2, dataclasses.replace(settings, seed=seed))
    a, b, c = (files(tmp_path / name) for name in "abc")

    # A log has 2 sweeps, poses, boxes, calibration and 3 map files.
    assert a == b
    assert len(a) == 2 * 8

    # No two sweeps are alike, neither of two seeds nor of two logs of one seed.
    sweeps = []
    for made in (a, c):
        sweeps += [content for name, content in made.items() if "/lidar/" in name]
    assert len(sweeps) == len(set(sweeps)) == 8


def test_finished_logs_are_left_alone_and_unfinished_ones_are_made_again(tmp_path):
    settings = dataclasses.replace(PRESETS["teaching"], sweeps=2)
    synthetic.write_logs(tmp_path, 1, settings)
    before = files(tmp_path)

    # What a killed process leaves behind: a hidden folder with a log that lacks a sweep.
    shutil.copytree(tmp_path / "street-000-0000", tmp_path / ".killed" / "street-000-0001")
    next((tmp_path / ".killed").rglob("lidar/*.feather")).unlink()
    assert len(data.open_dataset(tmp_path)) == 1  # half a log is not read

    synthetic.write_logs(tmp_path, 2, settings)
    assert len(data.open_dataset(tmp_path)) == 2
    every = files(tmp_path).items()
    after = {name: content for name, content in every if not name.startswith(".killed")}
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)


@pytest.mark.parametrize(
    ("preset", "least", "most"), [("teaching", 1000, 2000), ("small", 5000, 7000)]
)
def test_presets_have_the_points_they_promise(tmp_path, preset, least, most):
    synthetic.write_logs(tmp_path, 5, dataclasses.replace(PRESETS[preset], sweeps=2))
    for pair in data.open_dataset(tmp_path):
        is_near = data.is_in_grid(pair.pc0, (25.6, 25.6, 1000.0))
        assert least <= (~pair.is_ground0 & is_near).sum() <= most

        # Of what a method sees, enough is labeled, and enough moves.
        is_input, _ = data.input_masks(pair)
        assert 0.1 < ((pair.category > 0) & is_input).sum() / is_input.sum() < 0.5
        assert 0.02 < (pair.is_dynamic & is_input).sum() / is_input.sum() < 0.35


def test_a_full_sweep_is_as_large_as_a_real_one(full_pair):
    assert 80_000 <= len(full_pair.pc0) <= 100_000
    assert 0.1 < full_pair.is_ground0.float().mean() < 0.4


def test_no_single_thing_holds_most_of_a_sweep():
    """At the start and at the end of a log. Nor does one thing hold most of the labeled points."""
    for number in range(12):
        street = synthetic.make_street(PRESETS["small"], number)
        is_labeled = np.array([thing.category is not None for thing in street.things])
        for time_s in (0.0, 0.5):
            rng = np.random.default_rng(0)
            sweep = synthetic.cast_sweep(street, time_s, PRESETS["small"], rng)
            is_thing = sweep.thing >= 0
            counts = np.bincount(sweep.thing[is_thing], minlength=len(street.things))
            assert counts.max() / counts.sum() < 0.3
            assert counts[is_labeled].max() / counts[is_labeled].sum() < 0.4


def test_rays_end_on_the_surfaces_they_hit():
    """Without noise every point lies on the ground, or on a part of the thing that it names."""
    settings = dataclasses.replace(PRESETS["small"], range_noise_m=0.0, dropout=0.0)
    street = synthetic.make_street(settings, 3)
    sweep = synthetic.cast_sweep(street, 0.2, settings, np.random.default_rng(0))
    points = data.transform(street.street_SE3_ego(0.2), sweep.points)

    # A ray lands within 5 mm above the ground.
    on_ground = points[sweep.thing == -1]
    ground_z = street.ground_z(on_ground[:, 0], on_ground[:, 1])
    np.testing.assert_allclose(on_ground[:, 2], ground_z, atol=0.01)
    assert len(on_ground) > 500

    # In units of its half sizes, a box has 1 as the largest coordinate, an ellipsoid as the length.
    for index in np.unique(sweep.thing[sweep.thing >= 0]):
        thing = street.things[index]
        thing_SE3_street = np.linalg.inv(street.street_SE3_thing(thing, 0.2))
        local = data.transform(thing_SE3_street, points[sweep.thing == index])
        off_surface = []
        for part in thing.parts:
            scaled = np.abs(local - part.center) / part.half
            is_box = part.shape == synthetic.BOX
            size = scaled.max(axis=1) if is_box else np.linalg.norm(scaled, axis=1)
            off_surface.append(np.abs(size - 1))
        assert np.min(off_surface, axis=0).max() < 1e-6, thing


def test_nearer_things_hide_farther_ones():
    """A low wall at 5 m before a high one at 8 m: the lidar sees the second above the first."""
    low = synthetic.Part(synthetic.BOX, (0, 0, 1.0), (0.1, 20, 1.0))
    high = synthetic.Part(synthetic.BOX, (0, 0, 5.0), (0.1, 20, 5.0))
    things = [synthetic.Thing((high,), 8.0, 0.0), synthetic.Thing((low,), 5.0, 0.0)]
    street = synthetic.Street(0.0, np.zeros((1, 4)), things, 0.0)
    settings = synthetic.StreetSettings(azimuths=360, range_m=50, range_noise_m=0.0, dropout=0.0)
    sweep = synthetic.cast_sweep(street, 0.0, settings, np.random.default_rng(0))
    is_ahead = np.abs(np.arctan2(sweep.points[:, 1], sweep.points[:, 0])) < 0.5
    far = sweep.points[is_ahead & (sweep.thing == 0)]
    near = sweep.points[is_ahead & (sweep.thing == 1)]
    assert len(far) and len(near)

    # The lidars are at most 1.97 m above the ground, below the wall's 2 m, so a ray that passes
    # over the wall keeps rising.
    assert far[:, 2].min() > 2.0 - synthetic.EGO_HEIGHT_M


def test_a_wall_hides_the_ground_behind_it_up_to_its_edges():
    """Six meters of wall, 2 m high and 8 m ahead: only a small part of the turn can see it."""
    wall = synthetic.Part(synthetic.BOX, (0, 0, 1.0), (0.1, 3.0, 1.0))
    thing = synthetic.Thing((wall,), 8.0, 0.0)
    street = synthetic.Street(0.0, np.zeros((1, 4)), [thing], 0.0)
    settings = synthetic.StreetSettings(range_m=50, range_noise_m=0.0, dropout=0.0)
    sweep = synthetic.cast_sweep(street, 0.0, settings, np.random.default_rng(0))
    on_wall = sweep.points[sweep.thing == 0]
    assert on_wall[:, 1].min() < -2.98 and on_wall[:, 1].max() > 2.98

    # Where does the ray to a ground point cross the front of the wall? The lidars are at x = 1.35.
    ground = sweep.points[sweep.thing == -1]
    behind = ground[ground[:, 0] > 8.1]
    crossing_y = behind[:, 1] * (7.9 - 1.35) / (behind[:, 0] - 1.35)
    assert len(behind) > 1000
    assert np.abs(crossing_y).min() > 3.0


def test_each_laser_has_its_elevation_and_the_lower_lidar_hangs_upside_down():
    settings = dataclasses.replace(PRESETS["small"], range_noise_m=0.0)
    street = synthetic.make_street(settings, 0)
    sweep = synthetic.cast_sweep(street, 0.0, settings, np.random.default_rng(0))
    for lidar, (origin, sign) in enumerate(zip(synthetic.LIDAR_ORIGINS, (1, -1), strict=True)):
        is_mine = sweep.laser // 32 == lidar
        x, y, z = (sweep.points[is_mine] - origin).T
        expected = sign * synthetic.BEAM_ELEVATIONS_DEG[sweep.laser[is_mine] % 32]
        np.testing.assert_allclose(np.degrees(np.arctan2(z, np.hypot(x, y))), expected, atol=1e-6)


def test_true_flow_carries_moving_points_onto_the_surfaces_of_sweep_1(full_pair):
    is_moving = full_pair.is_dynamic & full_pair.is_valid & ~full_pair.is_ground0
    is_moving &= data.is_in_grid(full_pair.pc0)
    assert is_moving.sum() > 1000
    start, flow = full_pair.pc0[is_moving], full_pair.flow[is_moving]
    target = cKDTree(full_pair.pc1[~full_pair.is_ground1].numpy())
    before, _ = target.query(start.numpy())
    after, _ = target.query((start + flow).numpy())
    assert np.mean(before) > 0.2  # decimeters
    assert np.median(after) < 0.05 and np.mean(after) < 0.1  # centimeters


def test_boxes_hold_what_was_cast_and_give_the_motion_that_was_meant(full_pair):
    """No moving point is left outside its box. Pedestrians walk, and cars drive."""
    speeds = {}
    for name in ("PEDESTRIAN", "REGULAR_VEHICLE"):
        is_mover = full_pair.category == data.CATEGORIES.index(name)
        is_mover &= full_pair.is_dynamic
        speeds[name] = (10 * full_pair.flow[is_mover].norm(dim=1)).unique()  # m/s
    assert 0.5 < speeds["PEDESTRIAN"].min() and speeds["PEDESTRIAN"].max() < 2.5
    assert 3 < speeds["REGULAR_VEHICLE"].min() and speeds["REGULAR_VEHICLE"].max() < 20

    # Cast the first sweep of full_pair again, to learn which thing each point belongs to.
    settings = dataclasses.replace(PRESETS["full"], sweeps=2)
    street = synthetic.make_street(settings, 0)
    sweep = synthetic.cast_sweep(street, 0.0, settings, np.random.default_rng([0, 0, 1]))
    is_mover = [thing.s_mps != 0 or thing.left_mps != 0 for thing in street.things]
    is_mover.append(False)  # the ground, which is thing -1
    is_moving = torch.from_numpy(np.array(is_mover)[sweep.thing]) & ~full_pair.is_ground0
    assert len(is_moving) == len(full_pair.pc0)

    # Range noise puts a few points outside.
    assert (full_pair.category[is_moving] > 0).float().mean() > 0.995


# --- Streets of all kinds -------------------------------------------------------------------------

# Few rays are enough to know what is written; the streets themselves do not depend on them.
WORLD = dataclasses.replace(PRESETS["world"], azimuths=120, beam_step=4)


def test_what_turns_follows_its_arc_and_looks_along_it():
    """By a thousand small straight steps."""
    part = synthetic.Part(synthetic.BOX, (0, 0, 1), (2, 1, 1))
    thing = synthetic.Thing((part,), 5.0, -3.0, 0.4, 6.0, 2.5, turn_radps=-0.8)
    place, velocity, step_s = complex(5, -3), complex(6, 2.5), 0.7 / 1000
    for _ in range(1000):
        velocity *= np.exp(-0.4j * step_s)
        place += velocity * step_s
        velocity *= np.exp(-0.4j * step_s)
    found, heading = thing.at(0.7)
    assert abs(found - place) < 1e-6
    assert heading == pytest.approx(0.4 - 0.8 * 0.7)


def test_leaves_are_hit_in_other_places_in_each_sweep_and_some_rays_get_through():
    """A hedge 2 m thick, 5 m ahead, before a wall; a ray gets 1 m deep on average."""
    hedge = synthetic.Part(synthetic.BOX, (0, 0, 2.0), (1.0, 20, 2.0), clear_m=1.0)
    wall = synthetic.Part(synthetic.BOX, (0, 0, 5.0), (0.1, 20, 5.0))
    things = [synthetic.Thing((hedge,), 6.0, 0.0), synthetic.Thing((wall,), 9.0, 0.0)]
    street = synthetic.Street(0.0, np.zeros((1, 4)), things, 0.0)
    settings = synthetic.StreetSettings(azimuths=720, range_m=50, range_noise_m=0.0, dropout=0.0)
    rng = np.random.default_rng(0)
    depths = []
    for _ in range(2):
        sweep = synthetic.cast_sweep(street, 0.0, settings, rng)
        x, y, z = sweep.points.T
        azimuth, rise = np.arctan2(y, x - 1.35), (z - 1.6) / np.hypot(x - 1.35, y)
        is_level = (np.abs(azimuth) < 0.2) & (np.abs(rise) < 0.05)
        in_hedge = sweep.points[(sweep.thing == 0) & is_level]
        on_wall = sweep.points[(sweep.thing == 1) & is_level]
        assert in_hedge[:, 0].min() > 5 - 1e-9 and in_hedge[:, 0].max() < 7 + 1e-9
        # Of rays that cross 2 m, a share of exp(-2) gets through: those at the sides cross more.
        through = len(on_wall) / (len(on_wall) + len(in_hedge))
        assert through == pytest.approx(np.exp(-2), abs=0.03)
        depths.append(in_hedge[:, 0] - 5)
    # An exponential distribution of mean 1, cut off at 2, has the mean 1 - 2 / (exp(2) - 1).
    assert np.mean(np.concatenate(depths)) == pytest.approx(1 - 2 / (np.exp(2) - 1), abs=0.05)
    assert len(np.intersect1d(*depths)) == 0


def test_the_world_has_fast_traffic_in_all_directions_and_three_kinds_of_lidar():
    streets = [synthetic.make_street(WORLD, number) for number in range(60)]
    speeds_s, speeds_left, turning = [], [], 0
    for street in streets:
        vehicles = [thing for thing in street.things if thing.category == "REGULAR_VEHICLE"]
        speeds_s += [thing.s_mps for thing in vehicles]
        speeds_left += [thing.left_mps for thing in vehicles]
        turning += sum(thing.turn_radps != 0 for thing in vehicles)
    assert max(speeds_s) > 18 and min(speeds_s) < -18
    assert max(speeds_left) > 12 and min(speeds_left) < -12
    assert np.hypot(speeds_s, speeds_left).max() < 34 and turning > 10
    beams = [len(street.sensor.elevations_deg) * len(street.sensor.origins) for street in streets]
    gaps_ns = {street.sensor.sweep_ns for street in streets}
    assert gaps_ns == {50_000_000, 100_000_000}
    assert beams.count(32) > 3  # nuScenes
    heights = [street.sensor.ego_height_m for street in streets]
    assert min(heights) < 0.5 and 1.6 < max(heights) < 2.1


def test_in_the_world_nothing_drives_through_anything_else():
    """At three moments, the corners and the middle of whatever moves are in no other footprint."""
    for number in range(6):
        street = synthetic.make_street(WORLD, number)
        labeled = [
            thing for thing in street.things if thing.category not in (None, "CONSTRUCTION_CONE")
        ]
        for time_s in (0.0, 0.15, 0.3):
            for thing in labeled:
                low, high = thing.bounds()
                place, heading = thing.at(time_s)
                corners = [complex(x, y) for x in (low[0], high[0]) for y in (low[1], high[1])]
                points = place + np.array([0, *corners]) * np.exp(1j * heading)
                for other in labeled:
                    low, high = other.bounds()
                    place, heading = other.at(time_s)
                    inside = (points - place) * np.exp(-1j * heading)
                    is_in = (inside.real > low[0]) & (inside.real < high[0])
                    is_in &= (inside.imag > low[1]) & (inside.imag < high[1])
                    assert other is thing or not is_in.any()


def test_logs_of_the_world_are_read_with_their_own_lidar_rate_and_motion(tmp_path):
    """True flow, from the boxes in the files, is the motion of the street's own things."""
    settings = dataclasses.replace(WORLD, range_noise_m=0.0, dropout=0.0)
    synthetic.write_logs(tmp_path, 8, settings)
    dataset = data.open_dataset(tmp_path)
    assert len(dataset) == 8 * (settings.sweeps - 1) and dataset.skipped == []
    compared = 0
    for number in range(8):
        pair, street = dataset[2 * number], synthetic.make_street(settings, number)
        sensor = street.sensor
        assert pair.seconds == sensor.sweep_ns / 1e9
        in_ego0 = np.linalg.inv(pair.ego1_SE3_ego0.numpy())
        expected = data.transform(in_ego0, sensor.origins.mean(axis=0)[None])[0]
        np.testing.assert_allclose(pair.lidar1, expected, atol=1e-9)

        # Cast again, to learn which thing each point belongs to, and move the points with it.
        rng = np.random.default_rng([settings.seed, number, 1])
        sweep = synthetic.cast_sweep(street, 0.0, settings, rng)
        street_SE3_ego = street.street_SE3_ego(0.0)
        for index in np.unique(sweep.thing[sweep.thing >= 0]):
            thing = street.things[index]
            rows = np.flatnonzero((sweep.thing == index) & pair.is_valid.numpy())
            if thing.category != "REGULAR_VEHICLE" or not len(rows):
                continue
            poses = [street.street_SE3_thing(thing, time_s) for time_s in (0.0, pair.seconds)]
            moved = (
                np.linalg.inv(street_SE3_ego) @ poses[1] @ np.linalg.inv(poses[0]) @ street_SE3_ego
            )
            points = sweep.points[rows]
            meant = data.transform(moved, points) - points
            is_close = np.abs(pair.flow[rows].numpy() - meant).max(axis=1) < 0.01
            assert is_close.mean() > 0.9, thing  # x, y, z are stored as float16
            compared += len(rows)
    assert compared > 1000
