"""Look at flow: a drive as a film or as a recording for a viewer, and what can be measured of a
flow without knowing the true one.

This is the code behind `python zeroflow.py show`, `video` and `evaluate` (of data without
annotations); viz.py draws the pictures themselves. Points are (N, 3) in meters in the ego frame of
sweep 0, and flow is residual, as everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import labels
import nsfp
import viz
import zeroflow
from data import DataError, PairKey, SweepPair

# --- Which pairs ----------------------------------------------------------------------------------


def pairs_of_log(
    dataset: data.Pairs, log_id: str | None, start_s: float = 0.0, end_s: float | None = None
) -> list[PairKey]:
    """The pairs of one log (None: the first one) that begin start_s to end_s after its first sweep.

    Raises DataError if there are none.
    """
    # Without a choice, the first log that has pairs.
    log_id = dataset.pair_keys[0].log_id if log_id is None else log_id
    keys = [key for key in dataset.pair_keys if key.log_id == log_id]
    if not keys:
        known = ", ".join(list(dict.fromkeys(key.log_id for key in dataset.pair_keys))[:5])
        raise DataError(f"--log {log_id}: has no pairs here; choose one of {known} ...")
    # Times are shown and given in seconds from the first of those pairs.
    first_ns = keys[0].timestamp0_ns
    chosen = []
    for key in keys:
        at_s = (key.timestamp0_ns - first_ns) / 1e9
        if start_s <= at_s <= (np.inf if end_s is None else end_s):
            chosen.append(key)
    if not chosen:
        length_s = (keys[-1].timestamp0_ns - first_ns) / 1e9
        raise DataError(f"log {log_id}: no pair then; its pairs begin at 0 to {length_s:.1f} s")
    return chosen


def true_flow(pair: SweepPair) -> zeroflow.Estimate:
    """The true flow as a method among others. Raises DataError where there is none."""
    if pair.flow is None:
        raise DataError(f"{tuple(pair.key)}: has no true flow to show; leave --truth out")
    return zeroflow.Estimate(pair.flow, 0.0)


# --- Films ----------------------------------------------------------------------------------------


def film_frames(
    dataset: data.Pairs,
    keys: Sequence[PairKey],
    estimators: dict[str, zeroflow.Estimator],
    view: str = "ego",
    half_m: float = 51.2,
    watch: Callable[[SweepPair, dict[str, torch.Tensor]], None] | None = None,
) -> Iterator[np.ndarray]:
    """The frames (height, width, 3) uint8 of a film of some pairs of a log, one after the other.

    watch: is also called with each pair and its flows by name. A pair that cannot be read has no
    frame and is reported on stderr. Raises DataError if no pair can be read.
    """
    film = viz.Film(list(estimators), half_m, view)
    world_SE3_ego0, count = np.eye(4), 0  # the world is the first ego frame
    for key in tqdm(keys, desc="film", unit="frame"):
        try:
            pair = dataset.read(key)
            flows = {name: each(pair).flow for name, each in estimators.items()}
        except (DataError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        # The caption: which log, when, and how fast the ego is.
        ego1_SE3_ego0 = pair.ego1_SE3_ego0.numpy()
        mps = np.linalg.norm(ego1_SE3_ego0[:3, 3]) / pair.seconds
        at_s = (key.timestamp0_ns - keys[0].timestamp0_ns) / 1e9
        caption = f"{key.log_id[:24]}    {at_s:4.1f} s    ego {mps:4.1f} m/s"
        yield film.frame(pair, list(flows.values()), caption, world_SE3_ego0)
        if watch is not None:
            watch(pair, flows)
        # Each pose follows from the one before, so the world needs no map.
        world_SE3_ego0 = world_SE3_ego0 @ data.inverse(ego1_SE3_ego0)
        count += 1
    if count == 0:
        raise DataError(f"none of {len(keys)} pairs could be shown; the reasons are above")


FILM_SUFFIXES = (".gif", ".webp", ".mp4")


def check_film_file(file: Path) -> None:
    """Raise DataError unless a film can be written there."""
    if file.suffix not in FILM_SUFFIXES:
        raise DataError(f"{file}: choose a name that ends in {', '.join(FILM_SUFFIXES)}")
    if not file.parent.is_dir():
        raise DataError(f"{file}: there is no such folder; make it first")
    if file.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise DataError(f"{file}: needs the program ffmpeg; install it, or choose .gif or .webp")


def write_film(file: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write frames (height, width, 3) uint8 as .gif, .webp or .mp4. Returns how many there were.

    The file appears whole or not at all. For a .gif, all frames are kept in memory until the end,
    with one byte per pixel.
    """
    check_film_file(file)
    count = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal count
        for count, frame in enumerate(frames, start=1):  # noqa: B007 (the count is what we want)
            yield frame

    if file.suffix == ".mp4":
        _write_mp4(file, counted(), fps)
    else:
        images = (Image.fromarray(frame) for frame in counted())
        if file.suffix == ".gif":
            palette = _gif_palette()
            images = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
        first = next(images)
        about = {"save_all": True, "append_images": images, "loop": 0, "duration": 1000 / fps}
        if file.suffix == ".webp":
            about |= {"quality": 60, "method": 4}
        with data.atomic_file(file) as out:
            first.save(out, format=file.suffix[1:].upper(), **about)
    return count


def _gif_palette() -> Image.Image:
    """A picture with the 256 colors of a film: grays, and 40 hues in six strengths."""
    # A palette that Pillow makes for each frame would flicker, and spend its colors on gray.
    grays = [[level] * 3 for level in np.linspace(0, 1, 16)]
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles), np.zeros(40)], axis=1)
    colors = [np.array(grays)]
    for strength in np.linspace(1 / 6, 1, 6):
        flow = torch.from_numpy(directions * strength)
        colors.append(viz.flow_colors(flow, 1.0, viz.NIGHT_STILL))
    rows = (np.concatenate(colors) * 255).round().astype(int)  # (256, 3)
    palette = Image.new("P", (1, 1))
    palette.putpalette(rows.flatten().tolist())
    return palette


def _write_mp4(file: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    first = next(frames)
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2  # the format needs even ones
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "film.mp4"
        command = ["ffmpeg", "-loglevel", "error", "-f", "rawvideo", "-pixel_format", "rgb24"]
        command += ["-video_size", f"{width}x{height}", "-framerate", str(fps), "-i", "-"]
        command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", str(made)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stderr=pipe) as process:
            # If ffmpeg ends early, its own message is more useful than the broken pipe.
            with contextlib.suppress(BrokenPipeError):
                for frame in itertools.chain([first], frames):
                    process.stdin.write(frame[:height, :width].tobytes())
            _, message = process.communicate()
        if process.returncode != 0 or not made.exists():
            raise DataError(f"{file}: ffmpeg failed ({message.decode(errors='replace').strip()})")
        with data.atomic_file(file) as out, made.open("rb") as content:
            shutil.copyfileobj(content, out)


# --- A recording for a viewer ---------------------------------------------------------------------


class Recording:
    """A file for the viewer of rerun (rerun.io): points, flow and boxes on a time line.

    Raises DataError if the optional library `rerun-sdk` is not installed.
    """

    def __init__(self, file: Path, dataset: data.Pairs):
        try:
            import rerun
        except ImportError as error:
            what = "needs the library rerun-sdk: pip install rerun-sdk"
            raise DataError(f"{file}: {what}, or leave --rerun out") from error
        self.rerun, self.dataset = rerun, dataset
        self.stream = rerun.RecordingStream("zeroflow")
        self.stream.save(str(file))
        self.stream.log("ego", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)

    def add(self, pair: SweepPair, flows: dict[str, torch.Tensor]) -> None:
        """Both sweeps of a pair, its boxes, and its flows (N0, 3) by name."""
        rerun, stream = self.rerun, self.stream
        stream.set_time("time", timestamp=pair.timestamp0_ns / 1e9)

        # Both sweeps in the colors of every figure: ground gray, sweep 0 blue, sweep 1 orange.
        kept = ~pair.is_ground0
        colors0 = np.where(pair.is_ground0.numpy()[:, None], 60, (31, 119, 180)).astype(np.uint8)
        stream.log("ego/sweep 0", rerun.Points3D(pair.pc0.numpy(), colors=colors0))
        orange = (255, 127, 14)
        stream.log("ego/sweep 1", rerun.Points3D(pair.pc1[~pair.is_ground1].numpy(), colors=orange))

        # Each flow as colored points, and as an arrow where something moves.
        for name, flow in flows.items():
            points, flow = pair.pc0[kept].numpy(), flow[kept]
            mps = flow / pair.seconds
            colors = viz.flow_colors(mps, viz.MOST_SPEED_MPS, viz.NIGHT_STILL, power=0.5)
            colors = (255 * colors).astype(np.uint8)
            moves = (flow.norm(dim=1) >= data.DYNAMIC_THRESHOLD_M).numpy()
            stream.log(f"ego/flow of {name}/points", rerun.Points3D(points, colors=colors))
            arrows = rerun.Arrows3D(
                origins=points[moves], vectors=flow.numpy()[moves], colors=colors[moves]
            )
            stream.log(f"ego/flow of {name}/arrows", arrows)

        # Only Argoverse 2's annotated splits have boxes.
        boxes = self._boxes(pair)
        if boxes:
            drawn = rerun.Boxes3D(
                centers=[box.ego_SE3_box[:3, 3] for box in boxes],
                sizes=[box.size for box in boxes],
                quaternions=[_quaternion(box.ego_SE3_box[:3, :3]) for box in boxes],
                labels=[data.CATEGORIES[box.category] for box in boxes],
            )
            stream.log("ego/boxes", drawn)

    def _boxes(self, pair: SweepPair) -> list[data.Box]:
        """The boxes of sweep 0, where the data set has some."""
        log_of = getattr(self.dataset, "log", None)
        boxes = log_of(pair.log_id).boxes if log_of is not None else None
        return (boxes or {}).get(pair.timestamp0_ns, [])

    def close(self) -> None:
        """Write the rest, and close the file."""
        self.stream.flush()
        self.stream.disconnect()


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """(4,) x, y, z, w of a rotation (3, 3)."""
    return data.Rotation.from_matrix(rotation).as_quat()


# --- Judging without a true flow ------------------------------------------------------------------

SPEEDS_MPS = (0.5, 2.0, 5.0, 10.0)


def judge(
    dataset: Sequence[SweepPair],
    estimator: zeroflow.Estimator,
    half_extent_m: zeroflow.Grid,
    other: zeroflow.Estimator | None = None,
    max_broken: float = 0.0,
) -> dict[str, float]:
    """Judge a method on pairs without a known true flow, by numbers that are not errors.

    Returns means over pairs, of the points that are not ground and lie in the grid; `JUDGED`
    explains them. other: a second method to compare with. Raises DataError if more than the share
    max_broken of the pairs cannot be read, or if no pair can.
    """
    rows, suspicions, broken = [], [], 0
    for index in tqdm(range(len(dataset)), desc="judge", unit="pair", disable=len(dataset) < 2):
        try:
            pair = dataset[index]
            estimate = estimator(pair)
            against = other(pair).flow if other is not None else None
            zeroflow.check_flow(estimate.flow, pair)
        except (DataError, OSError) as error:
            broken += 1
            if broken > max_broken * max(100, len(dataset)):
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        rows.append(_judged(pair, estimate.flow, half_extent_m, against))
        rows[-1]["seconds_per_pair"] = estimate.seconds

        # The warnings about a teacher's labels apply to any flow.
        suspicion = _suspicion(pair, estimate.flow, half_extent_m)
        if suspicion is not None:
            suspicions.append(f"{tuple(pair.key)}: {suspicion}")
    if not rows:
        raise DataError(f"none of {len(dataset)} pairs could be judged; the reasons are above")
    for line in suspicions[:10]:
        print(line, file=sys.stderr)

    # A number that is not defined for a pair is NaN there, and is left out of the mean: for example
    # the rigidity of moving clusters, if nothing moves.
    numbers = {"pairs": len(rows), "broken": broken, "suspicious_pairs": len(suspicions)}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        known = values[~np.isnan(values)]
        numbers[name] = float(known.mean()) if len(known) else float("nan")
    return numbers


# Name of a number -> what it is.
JUDGED = {
    "distance_before_m": "mean distance to the nearest point of sweep 1, without the flow (m)",
    "distance_after_m": "the same after the flow (m)",
    **{f"share_above_{s:g}_mps": f"share of points faster than {s:g} m/s" for s in SPEEDS_MPS},
    "not_rigid_m": "mean deviation of moving clusters from a rigid motion (m)",
    "difference_m": "mean difference of the two methods' flow (m)",
    "difference_moving_m": "the same where either moves by 5 cm or more (m)",
    "suspicious_pairs": "pairs whose flow looks wrong as a whole; the reasons are on stderr",
    "seconds_per_pair": "seconds per pair",
}


def _judged(
    pair: SweepPair,
    flow: torch.Tensor,
    half_extent_m: zeroflow.Grid,
    against: torch.Tensor | None,
) -> dict[str, float]:
    """The numbers of one pair, of flow (N0, 3); against: the flow (N0, 3) of another method."""
    # Does the flow bring sweep 0 closer to sweep 1?
    is_source, is_target = data.input_masks(pair, half_extent_m)
    points, flow, target = pair.pc0[is_source], flow[is_source], pair.pc1[is_target]
    nan = float("nan")
    before = after = nan
    if len(points) and len(target):
        neighbors = nsfp.Neighbors(target)
        reach = labels.PARTNER_REACH_M  # a point farther from sweep 1 counts as this far
        before = neighbors.distance(points, reach, beyond=reach).mean().item()
        after = neighbors.distance(points + flow, reach, beyond=reach).mean().item()
    found = {"distance_before_m": before, "distance_after_m": after}

    # How many points move, how rigidly, and does the other method agree?
    speed = flow.norm(dim=1) / max(pair.seconds, 1e-9)
    for mps in SPEEDS_MPS:
        share = (speed > mps).float().mean().item() if len(speed) else nan
        found[f"share_above_{mps:g}_mps"] = share
    found["not_rigid_m"] = _not_rigid(points, flow)
    if against is not None:
        difference = (flow - against[is_source]).norm(dim=1)
        either = torch.maximum(flow.norm(dim=1), against[is_source].norm(dim=1))
        moving = difference[either >= data.DYNAMIC_THRESHOLD_M]
        found["difference_m"] = difference.mean().item() if len(difference) else nan
        found["difference_moving_m"] = moving.mean().item() if len(moving) else nan
    return found


def _not_rigid(points: torch.Tensor, flow: torch.Tensor) -> float:
    """How far, on average, points (N, 3) of moving clusters are from the best rigid motion."""
    # Only the moving points of a cluster: a car, for example, and not the wall beside it.
    cluster = nsfp.find_clusters(points.double(), 0.5, 10)
    is_moving = (cluster >= 0) & (flow.norm(dim=1) >= data.DYNAMIC_THRESHOLD_M)
    if not is_moving.any():
        return float("nan")
    points, flow = points[is_moving].double(), flow[is_moving].double()
    _, slot = cluster[is_moving].unique(return_inverse=True)
    motion = nsfp.rigid_motions(points, points + flow, slot)
    return (nsfp.move(points, motion, slot) - points - flow).norm(dim=1).mean().item()


def _suspicion(pair: SweepPair, flow: torch.Tensor, half_extent_m: zeroflow.Grid) -> str | None:
    """Why a flow may be wrong as a whole, as `labels.suspicion` finds it for labels."""
    has_flow = data.input_masks(pair, half_extent_m)[0]
    settings = {"half_extent_m": list(half_extent_m)}
    unknown = torch.full_like(flow[:, 0], torch.nan)
    label = zeroflow.Label(pair.key, flow, has_flow, settings, 0.0, 0.0, "", unknown)
    return labels.suspicion(label, pair)
