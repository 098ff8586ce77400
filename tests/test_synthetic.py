"""The street: what its rays hit, what its labels claim, and that a seed is all it depends on."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import data
import synthetic
import zeroflow
from synthetic import PRESETS


@pytest.fixture(scope="module")
def full_pair(tmp_path_factory) -> data.SweepPair:
    folder = tmp_path_factory.mktemp("full")
    synthetic.write_logs(folder, 1, dataclasses.replace(PRESETS["full"], sweeps=2))
    return data.open_dataset(folder)[0]


def files(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_another_street(tmp_path):
    settings = dataclasses.replace(PRESETS["teaching"], sweeps=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write_logs(tmp_path / name, 2, dataclasses.replace(settings, seed=seed))
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 2 * 8  # a log: 2 sweeps, poses, boxes, calibration and 3 map files
    sweeps = [content for made in (a, c) for name, content in made.items() if "/lidar/" in name]
    assert len(sweeps) == len(set(sweeps)) == 8  # no two alike, neither of two seeds nor of two logs of one


def test_logs_that_are_there_are_left_alone_and_unfinished_ones_are_made_anew(tmp_path):
    settings = dataclasses.replace(PRESETS["teaching"], sweeps=2)
    synthetic.write_logs(tmp_path, 1, settings)
    before = files(tmp_path)
    shutil.copytree(tmp_path / "street-000-0000", tmp_path / ".killed" / "street-000-0001")  # and its sweeps are fewer
    next((tmp_path / ".killed").rglob("lidar/*.feather")).unlink()
    assert len(data.open_dataset(tmp_path)) == 1  # half a log is no log
    synthetic.write_logs(tmp_path, 2, settings)
    assert len(data.open_dataset(tmp_path)) == 2
    after = {name: content for name, content in files(tmp_path).items() if not name.startswith(".killed")}
    assert before.items() <= after.items() and len(after) == 2 * len(before)


@pytest.mark.parametrize(("preset", "least", "most"), [("teaching", 1000, 2000), ("small", 5000, 7000)])
def test_presets_have_the_points_they_promise(tmp_path, preset, least, most):
    synthetic.write_logs(tmp_path, 5, dataclasses.replace(PRESETS[preset], sweeps=2))
    for pair in data.open_dataset(tmp_path):
        near = data.is_in_grid(pair.pc0, (25.6, 25.6, 1000.0))
        assert least <= (~pair.is_ground0 & near).sum() <= most
        seen = zeroflow.input_masks(pair)[0]
        assert 0.1 < ((pair.category > 0) & seen).sum() / seen.sum() < 0.5
        assert 0.02 < (pair.is_dynamic & seen).sum() / seen.sum() < 0.35


def test_a_full_sweep_is_as_large_as_a_real_one(full_pair):
    assert 80_000 <= len(full_pair.pc0) <= 100_000
    assert 0.1 < full_pair.is_ground0.float().mean() < 0.4


def test_no_single_thing_holds_most_of_a_sweep():
    """At the start and at the end of a log; nor does one hold most of what is labelled."""
    for number in range(12):
        street = synthetic.make_street(PRESETS["small"], number)
        is_labelled = np.array([thing.category is not None for thing in street.things])
        for time_s in (0.0, 0.5):
            sweep = synthetic.cast_sweep(street, time_s, PRESETS["small"], np.random.default_rng(0))
            counts = np.bincount(sweep.thing[sweep.thing >= 0], minlength=len(street.things))
            assert counts.max() / counts.sum() < 0.3
            assert counts[is_labelled].max() / counts[is_labelled].sum() < 0.4


def test_rays_end_on_the_surfaces_they_hit():
    """Without noise every point lies on the ground, or on a part of the thing it is said to lie on, and on its ray."""
    settings = dataclasses.replace(PRESETS["small"], range_noise_m=0.0, dropout=0.0)
    street = synthetic.make_street(settings, 3)
    sweep = synthetic.cast_sweep(street, 0.2, settings, np.random.default_rng(0))
    points = data.transform(street.street_SE3_ego(0.2), sweep.points)
    on_ground = points[sweep.thing == -1]
    np.testing.assert_allclose(on_ground[:, 2], street.ground_z(on_ground[:, 0], on_ground[:, 1]), atol=0.01)
    assert len(on_ground) > 500
    for index in np.unique(sweep.thing[sweep.thing >= 0]):
        thing = street.things[index]
        local = data.transform(np.linalg.inv(street.street_SE3_thing(thing, 0.2)), points[sweep.thing == index])
        off_surface = []
        for part in thing.parts:
            scaled = np.abs(local - part.center) / part.half
            size = scaled.max(axis=1) if part.shape == synthetic.BOX else np.linalg.norm(scaled, axis=1)
            off_surface.append(np.abs(size - 1))
        assert np.min(off_surface, axis=0).max() < 1e-6, thing


def test_nearer_things_hide_farther_ones():
    """A wall at 5 m before a wall at 8 m: the lidar sees the first and, over its top, the second."""
    wall = synthetic.Part(synthetic.BOX, (0, 0, 1.0), (0.1, 20, 1.0))
    high = synthetic.Part(synthetic.BOX, (0, 0, 5.0), (0.1, 20, 5.0))
    things = [synthetic.Thing((high,), 8.0, 0.0), synthetic.Thing((wall,), 5.0, 0.0)]
    street = synthetic.Street(0.0, np.zeros((1, 4)), things, 0.0)
    settings = synthetic.StreetSettings(azimuths=360, range_m=50, range_noise_m=0.0, dropout=0.0)
    sweep = synthetic.cast_sweep(street, 0.0, settings, np.random.default_rng(0))
    ahead = np.abs(np.arctan2(sweep.points[:, 1], sweep.points[:, 0])) < 0.5
    far = sweep.points[ahead & (sweep.thing == 0)]
    assert len(far) and len(sweep.points[ahead & (sweep.thing == 1)])
    # The lidars hang at most 1.97 m high, below the wall's 2 m: what passes over it rises on.
    assert far[:, 2].min() > 2.0 - synthetic.EGO_HEIGHT_M


def test_true_flow_carries_moving_points_onto_the_surfaces_of_sweep_1(full_pair):
    is_moving = full_pair.is_dynamic & full_pair.is_valid & ~full_pair.is_ground0 & data.is_in_grid(full_pair.pc0)
    target = cKDTree(full_pair.pc1[~full_pair.is_ground1].numpy())
    start = full_pair.pc0[is_moving]
    before, after = (target.query(points.numpy())[0] for points in (start, start + full_pair.flow[is_moving]))
    assert is_moving.sum() > 1000
    assert np.mean(before) > 0.2  # decimetres
    assert np.median(after) < 0.05 and np.mean(after) < 0.1  # centimetres


def test_boxes_hold_what_was_cast_and_tell_the_motion_that_was_meant(full_pair):
    """Nothing that moves is left outside its box, and pedestrians walk while cars drive."""
    speeds = {}
    for name in ("PEDESTRIAN", "REGULAR_VEHICLE"):
        mine = (full_pair.category == data.CATEGORIES.index(name)) & full_pair.is_dynamic
        speeds[name] = (10 * full_pair.flow[mine].norm(dim=1)).unique()
    assert 0.5 < speeds["PEDESTRIAN"].min() and speeds["PEDESTRIAN"].max() < 2.5
    assert 3 < speeds["REGULAR_VEHICLE"].min() and speeds["REGULAR_VEHICLE"].max() < 20
    settings = dataclasses.replace(PRESETS["full"], sweeps=2)  # as full_pair was made: cast its first sweep again
    street = synthetic.make_street(settings, 0)
    sweep = synthetic.cast_sweep(street, 0.0, settings, np.random.default_rng([0, 0, 1]))
    moves = np.array([thing.s_mps != 0 or thing.left_mps != 0 for thing in street.things] + [False])[sweep.thing]
    moves = torch.from_numpy(moves) & ~full_pair.is_ground0
    assert len(moves) == len(full_pair.pc0)
    assert (full_pair.category[moves] > 0).float().mean() > 0.995  # range noise puts a few points outside
