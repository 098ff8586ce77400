"""The kinds of files that fuzz.py changes: how to write a valid one, and how commands read it."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import test_challenge
import test_clouds
import test_published_labels
import test_waymo
import torch
from conftest import SMALL
from pyarrow import feather
from scipy.spatial.transform import Rotation

import challenge
import clouds
import data
import demo
import fastflow3d
import labels
import nsfp
import synthetic
import train
import viz
import zeroflow

RESUME_LIMIT_S = 8

# What a reader found: name -> arrays and numbers. The first word of a name tells how to judge it.
Values = dict[str, object]

# --- Valid files ----------------------------------------------------------------------------------

TEACHER = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2, priors=1)
GRID = fastflow3d.MODELS["narrow"].half_extent_m


def write_street(folder: Path) -> None:
    """A split with one log of three sweeps, and whatever is made of a split."""
    synthetic.write_logs(folder / "split", 1, SMALL)
    split = data.open_dataset(folder / "split")
    first, second = split[0], split[1]

    # The first pair has a label, the second one a note why it has none.
    label = zeroflow.make_labels([first], TEACHER, GRID)[0]
    flow = torch.where(label.has_flow[:, None], first.flow, 0.0)
    label = dataclasses.replace(label, flow=flow, loss=0.1, seconds=1.0)
    labels.claim_folder(folder / "labels", zeroflow.label_settings(TEACHER, GRID))
    labels.write_label(folder / "labels", label)
    labels._write_failure(folder / "labels", second.key, "the fit diverged")

    # Published labels: the older layout for the first pair, the newer one for the second.
    test_published_labels.write_published(folder / "published", first, 0, first.flow.numpy())
    columns = dict(zip(data.FLOW_COLUMNS, second.flow.numpy().T, strict=True))
    table = pyarrow.table({**columns, "is_valid": second.is_valid.numpy()})
    feather.write_feather(table, folder / "published" / second.log_id / "0000000001.feather")

    # Masks and submissions, as a zip and as a folder.
    test_challenge.write_masks(split, folder / "masks.zip", split.pair_keys[:1])
    for year in challenge.CHALLENGES:
        file = folder / f"submission-{year}.zip"
        challenge.write_submission(file, split, test_challenge.truth, year)
    for file in folder.glob("*.zip"):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder / file.stem)
    write_run(folder)


def write_run(folder: Path) -> None:
    """A run of two steps, with one validation."""
    settings = train.resolve({"data": ("split",), "labels": ("labels",), "device": "cpu"})
    small = {"model": "narrow", "steps": 2, "batch_size": 1, "micro_batch": 1, "workers": 0}
    settings = dataclasses.replace(settings, **small, out=str(folder / "run"))
    train.train(run_samples(folder), settings, folder / "run")
    scores = {"step": 2, "paper_three_way": 0.1, "bucketed_dynamic_mean": 0.5}
    with open(folder / "run" / "log.jsonl", "a") as log:
        log.write(json.dumps(scores) + "\n")
    demo_settings = dataclasses.asdict(demo.DemoSettings())
    (folder / "run" / "demo.json").write_text(json.dumps(demo_settings))


def run_samples(folder: Path) -> train.Samples:
    split = data.open_dataset(folder / "split", true_flow=False)
    return train.Samples([train.LabeledPairs(split, folder / "labels", GRID)])


def write_published_weights(folder: Path) -> None:
    """A Lightning checkpoint of the normal model, in float16 to halve its size."""
    model = fastflow3d.FastFlow3D(fastflow3d.MODELS["normal"])
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor
    torch.save({"state_dict": tensors, "epoch": 1}, folder / "weights.ckpt")


def write_waymo(folder: Path) -> None:
    """A segment of three sweeps, in which six boxes of 15 m move by 1 m per sweep."""
    boxes = []
    size = {f"[LiDARBoxComponent].box.size.{axis}": 15.0 for axis in "xyz"}
    for stamp in range(3):
        for i in range(6):
            x, y = (20, 0, -20)[i % 3] + stamp, (12, -12)[i // 3]
            place = test_waymo.pose(0, 0, 0, x, y, 0)
            boxes.append(test_waymo.box(stamp, f"truck {i}", place) | size)
    test_waymo.write_segment(folder / "split", boxes=boxes)


def scene(shift: float) -> np.ndarray:
    """(800, 3) float32: level ground, and on it a block that has moved by `shift` meters."""
    rng = np.random.default_rng(0)
    ground = np.column_stack([rng.uniform(-20, 20, (600, 2)), rng.normal(-1.7, 0.02, 600)])
    block = rng.uniform((6, 2, -1.4), (10, 4, 0.2), (200, 3)) + (shift, 0, 0)
    return np.vstack([ground, block]).astype(np.float32)


def write_clouds(folder: Path, suffix: str, form: str = "", names: str = "{:06d}") -> None:
    """Three clouds of a format."""
    (folder / "clouds").mkdir()
    for i in range(3):
        points, file = scene(0.5 * i), folder / "clouds" / (names.format(i) + suffix)
        if suffix == ".npy":
            np.save(file, points)
        elif suffix == ".npz":
            np.savez_compressed(file, points=points)
        elif suffix == ".bin":
            np.column_stack([points, np.ones(len(points), "<f4")]).tofile(file)
        elif suffix == ".feather":
            feather.write_feather(pyarrow.table(dict(zip("xyz", points.T, strict=True))), file)
        elif suffix == ".pcd":
            test_clouds.write_pcd(file, points, form)
        else:
            write_ply(file, points, form)


def write_ply(file: Path, points: np.ndarray, form: str) -> None:
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat {form} 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    if form == "ascii":
        body = "".join(f"{x} {y} {z}\n" for x, y, z in points.tolist()).encode()
    else:
        body = points.astype(">f4" if "big" in form else "<f4").tobytes()
    file.write_bytes(header.encode() + body)


def write_kitti_poses(folder: Path) -> None:
    """Poses of a camera that moves 1.2 m along its z axis, and where the lidar is."""
    write_clouds(folder, ".npy")
    rows = [f"1 0 0 0 0 1 0 0 0 0 1 {1.2 * i:.6f}\n" for i in range(3)]
    (folder / "clouds" / "poses.txt").write_text("".join(rows))
    camera_SE3_lidar = "0 -1 0 0.01 0 0 -1 -0.08 1 0 0 -0.27"
    (folder / "clouds" / "calib.txt").write_text(f"P0: 1 0\nTr: {camera_SE3_lidar}\n")


def write_timed_poses(folder: Path, suffix: str) -> None:
    """Clouds named by time, ten poses per second (two more than clouds), in a slight left turn."""
    write_clouds(folder, ".npy", names="1583836591{}00000000")
    seconds = [1583836590.9 + 0.1 * i for i in range(5)]
    turns = Rotation.from_rotvec([(0, 0, 0.02 * i) for i in range(5)]).as_quat()  # w last
    rows = np.column_stack([seconds, 1.2 * np.arange(5), np.zeros((5, 2)), turns])
    if suffix == ".txt":
        text = "".join(" ".join(f"{number:.6f}" for number in row) + "\n" for row in rows)
        (folder / "clouds" / "poses.txt").write_text(text)
        return
    columns = dict(zip(data.POSE_COLUMNS, rows[:, [7, 4, 5, 6, 1, 2, 3]].T, strict=True))
    stamps = [1583836590_900000000 + 100_000_000 * i for i in range(5)]
    table = pyarrow.table({"timestamp_ns": stamps, **columns})
    feather.write_feather(table, folder / "clouds" / "city_SE3_egovehicle.feather")


def write_single_poses(folder: Path) -> None:
    """One 4 x 4 pose, as text and as .npy."""
    pose = test_waymo.pose(0, 0, 0.1, 1.2, 0, 0)
    np.savetxt(folder / "pose.txt", pose)
    np.save(folder / "pose.npy", pose)


# --- Reading them ---------------------------------------------------------------------------------
# Every function takes the folder that a function above has written, and maybe the changed file.


def read_pairs(folder: Path, file: Path, counted: str = "", **options) -> Values:
    """All pairs of a split. counted: "ground" or "dynamic", points that must not all disappear."""
    place = folder / "split" if (folder / "split").exists() else folder / "clouds"
    pairs = data.open_dataset(place, **options)
    values = {"pairs": len(pairs)}
    for i in range(len(pairs)):
        pair = pairs[i]
        values |= {f"points 0 of pair {i}": pair.pc0, f"points 1 of pair {i}": pair.pc1}
        values |= {f"mask 0 of pair {i}": pair.is_ground0, f"mask 1 of pair {i}": pair.is_ground1}
        values |= {} if pair.lidar1 is None else {f"pose of the lidar {i}": pair.lidar1}
        for name in data.TRUTH_FIELDS:
            if getattr(pair, name) is not None:
                values[f"{name} of pair {i}"] = getattr(pair, name)
        if counted == "ground":
            values[f"count of ground points of pair {i}"] = pair.is_ground0.sum()
        if counted == "dynamic" and pair.is_dynamic is not None:
            values[f"count of dynamic points of pair {i}"] = pair.is_dynamic.sum()

        # How fast the ego drives and turns, in m/s and degrees/s.
        pose = pair.ego1_SE3_ego0.numpy()
        seconds = (pair.timestamp1_ns - pair.timestamp0_ns) / 1e9
        values[f"speed of pair {i}"] = np.linalg.norm(pose[:3, 3]) / seconds
        turn = np.arccos(np.clip((np.trace(pose[:3, :3]) - 1) / 2, -1, 1))
        values[f"turn of pair {i}"] = np.degrees(turn) / seconds
    values["notes"] = [*pairs.notes, *pairs.skipped]
    return values


def read_label(folder: Path, file: Path, name: str = "labels") -> Values:
    """What `check` and training read of a folder of labels."""
    split = data.open_dataset(folder / "split")
    states = labels.label_status(split, folder / name).states
    values = {f"state {state}": len(keys) for state, keys in states.items()}
    label_folder = labels.open_labels(folder / name, split)
    for i in label_folder.indices:
        key = split.pair_keys[i]
        label = label_folder.read(split.read(key))
        values |= {f"flow {key}": label.flow, f"mask {key}": label.has_flow}
        values[f"count of labeled points {key}"] = label.has_flow.sum()
    return values


def claim_labels(folder: Path, file: Path) -> Values:
    """What `label` reads before it adds labels to a folder."""
    labels.claim_folder(folder / "labels", zeroflow.label_settings(TEACHER, GRID))
    return {}


def read_checkpoint(folder: Path, file: Path) -> Values:
    model = fastflow3d.load_checkpoint(file)
    return {f"weights {name}": tensor for name, tensor in model.state_dict().items()}


def resume_run(folder: Path, file: Path) -> Values:
    """Resume a run for its third step. If it goes on for long, it is told to stop."""
    settings = train.resolve({"resume": True, "out": str(folder / "run")})
    train.check_settings(settings)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    signal.alarm(RESUME_LIMIT_S)
    try:
        settings = dataclasses.replace(settings, steps=3)
        model = train.train(run_samples(folder), settings, folder / "run")
    finally:
        signal.alarm(0)
    if model is None:
        return {"stopped": True}
    return {f"weights {name}": tensor for name, tensor in model.state_dict().items()}


def draw_curve(folder: Path, file: Path) -> Values:
    lines = train.read_log(folder / "run")
    if lines:
        viz.learning_curve_figure(lines).savefig(io.BytesIO(), dpi=30)
    return {"lines": str(lines)}


def resume_demo(folder: Path, file: Path) -> Values:
    settings = dataclasses.asdict(demo._resumed(demo.DemoSettings(), folder / "run"))
    return {f"number {name}": value for name, value in settings.items() if name != "picture"}


def read_pose(folder: Path, file: Path) -> Values:
    return {"pose": clouds.read_pose(file)}


def read_one_cloud(folder: Path, file: Path) -> Values:
    return {"points": clouds.no_returns_to_nan(clouds.read_cloud(file))}


def read_masks(folder: Path, file: Path, name: str) -> Values:
    """What `submit` reads of masks."""
    split = data.open_dataset(folder / "split")
    masks = challenge.ChallengeFiles(folder / name)
    values = {}
    for key in challenge._masked_members(split, masks).values():
        mask = masks.mask(split.read(key))
        values |= {f"mask of {key}": mask, f"count of scored points of {key}": mask.sum()}
    return values


def read_submission(folder: Path, file: Path, name: str) -> Values:
    """What `evaluate` reads of a submission."""
    split = data.open_dataset(folder / "split")
    predictions = challenge.ChallengePredictions(folder / name, split)
    values = {"pairs": len(predictions.pair_keys)}
    for key in predictions.pair_keys:
        pair = split.read(key)
        values[f"flow {key}"], values[f"dynamic {key}"] = predictions(pair)
        zeroflow.check_flow(values[f"flow {key}"], pair)
    return values


# --- The kinds ------------------------------------------------------------------------------------

PLY_FORMS = ("ascii", "binary_little_endian", "binary_big_endian")
PCD_FORMS = ("ascii", "binary", "binary_compressed")

# Valid files that are written together, because they need each other.
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "street": write_street,
    "weights": write_published_weights,
    "waymo": write_waymo,
    "kitti": write_kitti_poses,
    "tum": functools.partial(write_timed_poses, suffix=".txt"),
    "timed": functools.partial(write_timed_poses, suffix=".feather"),
    "single": write_single_poses,
}
for _suffix in (".bin", ".npy", ".npz", ".feather"):
    LAYOUTS[f"cloud{_suffix}"] = functools.partial(write_clouds, suffix=_suffix)
for _suffix, _forms in ((".ply", PLY_FORMS), (".pcd", PCD_FORMS)):
    for _form in _forms:
        _write = functools.partial(write_clouds, suffix=_suffix, form=_form)
        LAYOUTS[f"cloud{_suffix}-{_form}"] = _write


class Kind(NamedTuple):
    """A kind of file."""

    form: str  # of its content, a key of fuzz_changes.FORMS
    layout: str  # a key of LAYOUTS
    file: str  # its place there
    read: Callable[[Path, Path], Values]
    errors: tuple[type, ...] = ()  # that the reader may raise beside DataError and OSError


_partial = functools.partial
_by_raster = _partial(read_pairs, ground="raster", counted="ground")
_by_lines = _partial(read_pairs, ground="vector", counted="ground")
_with_ground = _partial(read_pairs, counted="ground")
_with_truth = _partial(read_pairs, counted="dynamic")
_published = _partial(read_label, name="published")
_LOG = "split/*"

KINDS = {
    "av2-sweep": Kind("table", "street", f"{_LOG}/sensors/lidar/*0001*.feather", read_pairs),
    "av2-poses": Kind("table", "street", f"{_LOG}/city_SE3_egovehicle.feather", _with_ground),
    "av2-calibration": Kind("table", "street", f"{_LOG}/calibration/*.feather", read_pairs),
    "av2-annotations": Kind("table", "street", f"{_LOG}/annotations.feather", _with_truth),
    "av2-raster": Kind("npy", "street", f"{_LOG}/map/*.npy", _by_raster),
    "av2-sim2": Kind("json", "street", f"{_LOG}/map/*Sim2*", _by_raster),
    "av2-vector-map": Kind("json", "street", f"{_LOG}/map/log_map*", _by_lines),
    "label": Kind("table", "street", "labels/*/*.feather", read_label),
    "label-settings": Kind("json", "street", "labels/settings.json", read_label),
    "label-claim": Kind("json", "street", "labels/settings.json", claim_labels),
    "label-failure": Kind("json", "street", "labels/*/*.broken.json", read_label),
    "published-npz": Kind("npz", "street", "published/*/*.npz", _published),
    "published-feather": Kind("table", "street", "published/*/*.feather", _published),
    "checkpoint": Kind("checkpoint", "street", "run/last.pt", read_checkpoint, (ValueError,)),
    "weights": Kind("checkpoint", "weights", "weights.ckpt", read_checkpoint, (ValueError,)),
    "resume": Kind("checkpoint", "street", "run/last.pt", resume_run),
    "log": Kind("json lines", "street", "run/log.jsonl", draw_curve),
    "resume-log": Kind("json lines", "street", "run/log.jsonl", resume_run),
    "demo-settings": Kind("json", "street", "run/demo.json", resume_demo),
    "cloud.bin": Kind("bin", "cloud.bin", "clouds/000001.bin", read_pairs),
    "cloud.npy": Kind("npy", "cloud.npy", "clouds/000001.npy", read_pairs),
    "cloud.npz": Kind("npz", "cloud.npz", "clouds/000001.npz", read_pairs),
    "cloud.feather": Kind("table", "cloud.feather", "clouds/000001.feather", read_one_cloud),
    "poses-kitti": Kind("text", "kitti", "clouds/poses.txt", read_pairs),
    "calibration": Kind("text", "kitti", "clouds/calib.txt", read_pairs),
    "poses-tum": Kind("text", "tum", "clouds/poses.txt", read_pairs),
    "poses-feather": Kind("table", "timed", "clouds/*.feather", read_pairs),
    "pose-text": Kind("text", "single", "pose.txt", read_pose),
    "pose-npy": Kind("npy", "single", "pose.npy", read_pose),
    "mask-zip": Kind("zip", "street", "masks.zip", _partial(read_masks, name="masks.zip")),
    "mask-folder": Kind("table", "street", "masks/*/*.feather", _partial(read_masks, name="masks")),
}
for _suffix, _forms in ((".ply", PLY_FORMS), (".pcd", PCD_FORMS)):
    for _name in (f"cloud{_suffix}-{_form}" for _form in _forms):
        KINDS[_name] = Kind("text", _name, f"clouds/000001{_suffix}", read_pairs)
for _year in challenge.CHALLENGES:
    for _suffix, _form, _files in ((".zip", "zip", ""), ("", "table", "/*/*.feather")):
        _name = f"submission-{_year}{_suffix}"
        KINDS[_name] = Kind(_form, "street", _name + _files, _partial(read_submission, name=_name))
for _tag in ("lidar", "lidar_pose", "lidar_calibration", "vehicle_pose", "lidar_box"):
    _read = _with_truth if _tag == "lidar_box" else read_pairs
    KINDS[f"waymo-{_tag}"] = Kind("parquet", "waymo", f"split/{_tag}/seg.parquet", _read)
