"""The training loop: a student (fastflow3d.py) learns from a teacher's pseudo-labels.

ZeroFlow, section 3 (Vedder et al., ICLR 2024), on a CPU, a GPU, or several GPUs under torchrun:

    python train.py                          the whole method on a synthetic street (demo.py)
    python train.py --preset zeroflow-1x --data av2/train --labels labels --val av2/val --out run
    python train.py --resume --out run       continue after an interruption
    torchrun --nproc-per-node 4 train.py --preset zeroflow-1x ...

The file follows the data: settings, a run, samples, batches, training, several processes, and the
run's folder. That folder holds last.pt (the newest checkpoint), best.pt (the best one on --val),
log.jsonl (one line per step and per validation) and settings.json. runs.py keeps a run safe when
its files, its processes, or the machine fail.

An interruption costs nothing but time. On a CPU, a run that is killed at any instant and resumed
ends with the weights of an undisturbed run, bit for bit. On SIGTERM, which clusters send before
they take a machine back, it writes last.pt and ends with status 0; if a worker dies, it does the
same, with status 1.

Points are (N, 3) float32 in meters, in the ego frame of sweep 0, without ground; flow is residual.
The defaults are the published recipe. Clipping, a falling learning rate and bfloat16 are ours, and
are off by default. `zeroflow.speed_weight` has the speed weights of the paper and of its code.
"""

from __future__ import annotations

import os
import sys

# torch's threads wait for each other by spinning. If another process is busy, too, this takes the
# core that the awaited thread needs. This lets them sleep; it works only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# In a file or a log, a progress bar is one line per minute. This works only before tqdm is loaded.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "60")

import bisect
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import data
import fastflow3d
import labels
import runs
import zeroflow
from data import DataError, Outage
from runs import Log, Reader, ignore_signals, shared, stop_signals
from runs import read_log as read_log  # also available as train.read_log

# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainSettings:
    """One flat list of options. The defaults are the published recipe; see PRESETS for others."""

    # What to learn from.

    # other defaults: street, world, zeroflow-1x (-3x, -5x), zeroflow-xl-1x (...), fastflow3d (-xl)
    preset: str | None = None
    data: tuple[str, ...] = ()  # splits, logs or folders of clouds to learn from
    labels: tuple[str, ...] = ()  # one folder of labels for each --data, in the same order
    supervised: bool = False  # learn from the true flow instead of labels, as FastFlow3D does
    fraction: float = 1.0  # share of the pairs to use; a smaller share is part of a larger one
    # only the first sweeps of each log: a number or `all`, one for each --data; published: 145
    sweeps_per_log: tuple[int | None, ...] = (None,)
    # only this many pairs of each log, evenly spread, or `all`; 12 of LiDAR logs is 3x, 24 is 5x
    pairs_per_log: tuple[int | None, ...] = (None,)
    # where ground comes from; auto: the first of raster, vector and points that a log has
    ground: Literal["auto", "raster", "vector", "points", "none"] = "auto"
    poses: str | None = None  # file of poses for a folder of clouds, if it is not beside them
    rate_hz: float = 10.0  # sweeps per second of clouds whose names are not time stamps
    columns: int | None = None  # numbers per point in .bin clouds; none: recognized
    # ignore nearer points of clouds (the ego's own body); 0: keep all; none: 2.5 for clouds
    min_range_m: float | None = None
    val: str | None = None  # a split or log with annotations to evaluate on
    cache: str | None = None  # folder for files of an s3:// address; none: in ~/.cache
    # limit the cache to this size by deleting the least recently used logs; none: keep all
    cache_gb: float | None = None

    # The student, and how it learns.

    # start from the weights of this checkpoint or published file, for example weights/street.pt
    # (--model small); published: start from random ones
    init: str | None = None
    model: Literal["narrow", "small", "normal", "xl"] = "normal"  # size of the student
    epochs: int = 50  # how often every pair is shown; later code of the authors: 20
    steps: int | None = None  # how many steps to train; none: as many as the epochs have
    batch_size: int = 64  # pairs per step, over all processes
    # pairs that pass the network together and share batch norm's statistics; published: 16
    micro_batch: int = 16
    lr: float = 2e-6  # learning rate of Adam; later code of the authors: 2e-4
    cosine: bool = False  # warm up for 5 % of the steps, then fall to 0; published: constant rate
    # how the speed of a point weighs its error; published: as the published code does
    speed_weight: Literal["formula", "published", "none"] = "formula"
    # leave out points that `fast` was not sure about: the best motion explains sweep 1 better than
    # no motion does, but by less than this factor; published: learn from all
    doubt: float | None = None
    squared_error: bool = False  # square the error of each point; published: its length
    weighted_share: float = 1.0  # share of the steps, the first ones, that use the speed weight
    # show each pair as it is, or with left and right or front and back exchanged; published: no
    mirror: bool = False
    turn: bool = False  # turn each pair by a random angle around the vertical axis; published: no
    height_m: float = 0.0  # raise or lower each pair by up to this many meters; published: 0
    clip_norm: float | None = None  # clip the gradient of a step to this norm; published: none
    # number format of the U-Net; bfloat16 is faster on processors that support it
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0  # of the student's first weights and of the order of pairs
    device: str = "auto"  # cpu or cuda; auto: cuda if there is a GPU

    # The run.

    out: str = "run"  # folder for checkpoints and log
    resume: bool = False  # continue the run in --out with its stored settings
    workers: int = 4  # processes that read pairs ahead, for each GPU
    checkpoint_every: int = 100  # steps between checkpoints
    validate_every: int | None = None  # steps between validations; none: once per epoch
    # share of the pairs of --val, evenly spread, for validations; all are evaluated at the end
    val_share: float = 0.05
    max_broken: float = 0.05  # stop if more than this share of the pairs shown is unreadable


# Ours, for the small street and a CPU: few steps, at a high rate that falls. Only the first half of
# them weighs by speed.
_STREET = {"model": "narrow", "steps": 8000, "batch_size": 1, "micro_batch": 1, "workers": 0}
_STREET |= {"lr": 2e-3, "cosine": True, "weighted_share": 0.5, "clip_norm": 0.5, "mirror": True}

# Ours, for streets of all kinds seen by several kinds of LiDAR: see `experiments.py weights`. Pairs
# are turned and raised, since a student for any LiDAR must not learn where a road lies, or how high
# above it the ego's origin is.
_WORLD = _STREET | {"model": "small", "steps": 9000, "dtype": "bfloat16", "workers": 1}
_WORLD |= {"turn": True, "height_m": 0.3, "checkpoint_every": 500}

# The paper's runs. 3x and 5x take the Sensor data set first and then the LiDAR data set, of which
# there are three folders: train, val and test. XL was trained on six GPUs with two pairs each.
_1X = {"sweeps_per_log": (145,)}
_3X = {"sweeps_per_log": (145, None), "pairs_per_log": (None, 12)}
_5X = {"sweeps_per_log": (145, None), "pairs_per_log": (None, 24)}
_XL = {"model": "xl", "batch_size": 12, "micro_batch": 2}
PRESETS = {
    "street": _STREET,
    "world": _WORLD,
    "zeroflow-1x": _1X,
    "zeroflow-3x": _3X,
    "zeroflow-5x": _5X,
    "zeroflow-xl-1x": _1X | _XL,
    "zeroflow-xl-3x": _3X | _XL,
    "zeroflow-xl-5x": _5X | _XL,
    "fastflow3d": _1X | {"supervised": True},
    "fastflow3d-xl": _1X | _XL | {"supervised": True},
}
DTYPES = ("float32", "bfloat16")

# Settings that may change when a run is resumed: paths, speed, and remedies for exploding
# gradients. With any other change it would be another run under the same name.
MAY_CHANGE = {"resume", "out", "data", "labels", "val", "val_share", "validate_every", "max_broken"}
MAY_CHANGE |= {"workers", "device", "checkpoint_every", "lr", "clip_norm", "dtype"}
MAY_CHANGE |= {"cache", "cache_gb"}


def resolve(given: dict) -> TrainSettings:
    """The settings of a run; given: those fields that the user gave.

    The others come from the run that is resumed, else from the preset, else from the defaults.
    Raises DataError for an unknown preset, or for a change that a resumed run cannot take.
    """
    # A cluster repeats one command. The first time there is nothing to resume yet.
    folder = Path(given.get("out", TrainSettings.out))
    if given.get("resume") and ((folder / "last.pt").exists() or not given.get("data")):
        base = TrainSettings(**newest_checkpoint(folder)["train_settings"])
        for name, value in given.items():
            kept = getattr(base, name)
            if value != kept and name not in MAY_CHANGE:
                what = f"the run was begun with {kept!r}; a resumed run keeps it"
                raise DataError(f"{_option(name)} {value!r}: {what}")
        given = {**given, "out": str(folder)}  # the folder may have been moved
    else:
        preset = given.get("preset", None if given.get("data") else "street")
        if preset is not None and preset not in PRESETS:
            raise DataError(f"--preset {preset!r}: choose one of {', '.join(PRESETS)}")
        base = dataclasses.replace(TrainSettings(), **PRESETS.get(preset, {}))
        given = {**given, "preset": preset, "resume": False}
    settings = dataclasses.replace(base, **given)
    device = default_device() if settings.device == "auto" else settings.device
    return dataclasses.replace(settings, device=device)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_settings(settings: TrainSettings) -> None:
    """Raise DataError for settings that cannot work, before any time is spent."""
    _check_sources(settings)
    if not 0 <= settings.height_m < 10:
        raise DataError(f"--height-m {settings.height_m}: must be 0 or more, and less than 10")
    positive = ["epochs", "steps", "batch_size", "micro_batch", "lr", "clip_norm", "fraction"]
    for name in [*positive, "doubt", "checkpoint_every", "validate_every"]:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise DataError(f"{_option(name)} {value}: must be positive")
    if settings.fraction > 1 or settings.workers < 0:
        found = f"--fraction {settings.fraction} --workers {settings.workers}"
        raise DataError(f"{found}: a fraction is at most 1, and workers are 0 or more")
    world = rank_of()[1]
    if settings.batch_size < world:
        raise DataError(f"--batch-size {settings.batch_size}: is less than the {world} processes")
    check_device(settings.device)
    if settings.init is not None and not settings.resume:
        first_weights(settings)

    # A run never overwrites another one.
    folder = Path(settings.out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: is a file; give the name of a folder")
    if not settings.resume and (folder / "last.pt").exists():
        remedy = "continue it with --resume, or choose another folder"
        raise DataError(f"--out {folder}: holds a run; {remedy}")


def _check_sources(settings: TrainSettings) -> None:
    # Without data the demo runs, which makes a street of its own and labels it.
    folders = len(settings.data)
    if not folders:
        for name in ("val", "supervised"):
            if getattr(settings, name):
                raise DataError(f"{_option(name)}: needs --data")
        if rank_of()[1] > 1:
            raise DataError("the street is for one process; give --data, or leave torchrun out")
    if settings.preset is not None and (settings.preset == "street") == bool(folders):
        remedy = "is for the street; leave --data out" if folders else "needs --data"
        raise DataError(f"--preset {settings.preset}: {remedy}, or choose another preset")

    for path, other in itertools.combinations(settings.data, 2):
        if os.path.realpath(path) == os.path.realpath(other):
            what = "is given twice, so its pairs would count twice"
            raise DataError(f"--data {path} {other}: {what}; give it once")

    # Each folder of data has labels, and may have counts, of its own.
    if settings.supervised and settings.labels:
        raise DataError("--supervised: learns from the true flow; leave --labels out")
    if settings.supervised and settings.doubt is not None:
        raise DataError("--doubt: is for labels; leave it out with --supervised")
    if not settings.supervised and len(settings.labels) != folders:
        found = f"{folders} folders of --data and {len(settings.labels)} of --labels"
        raise DataError(f"{found}: give for each the folder that `zeroflow.py label` wrote")
    for name in ("sweeps_per_log", "pairs_per_log"):
        count = len(getattr(settings, name))
        if count > max(1, folders):
            remedy = f"for {folders} folders of --data: give one for each, or fewer"
            raise DataError(f"{count} numbers of {_option(name)} {remedy}")


def default_device() -> str:
    """cuda if there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise DataError unless the device is cpu, or there is a GPU and it is cuda or cuda:<n>."""
    has_gpu = torch.cuda.is_available()
    if device != "cpu" and not (has_gpu and device.partition(":")[0] == "cuda"):
        choices = "cpu or cuda" if has_gpu else "cpu; there is no GPU here"
        raise DataError(f"--device {device!r}: choose {choices}")


def print_settings(settings: object) -> None:
    """Print settings, a dataclass or a dict, one per line."""
    values = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
    for name, value in values.items():
        print(f"{name}: {value}")


# --- A run ----------------------------------------------------------------------------------------


def run(settings: TrainSettings) -> dict[str, dict[str, float]]:
    """Train on --data, evaluate on --val, and print. Returns the rows of the printed table.

    There are no rows without --val, after a signal, and in all processes but the first.
    """
    check_settings(settings)
    if rank_of()[0] == 0:
        print_settings(settings)
    samples, test_set, validate = open_samples(settings), None, None
    if settings.val is not None:
        # Options of the training data do not apply: annotated logs have a map and poses.
        defaults = TrainSettings(pairs_per_log=None, sweeps_per_log=None)
        defaults = dataclasses.replace(defaults, cache=settings.cache, cache_gb=settings.cache_gb)
        test_set = open_and_report(settings.val, defaults)
        if test_set[0].flow is None:
            what = "has no annotations to compare with"
            raise DataError(f"--val {settings.val}: {what}; give another split, or leave it out")

        # Evaluating all pairs takes hours, so validations use only a few, evenly spread.
        count = max(1, round(settings.val_share * len(test_set)))
        some = Subset(test_set, data.evenly_spread(len(test_set), count))
        validate = functools.partial(score, some, settings.max_broken)
        _report_overlap(samples, test_set, settings.val)

    model = train_in_folder(samples, settings, validate)
    if model is None or test_set is None or rank_of()[0] > 0:
        return {}

    # With one thread, its time can be compared with the times of other methods.
    grid = model.settings.half_extent_m
    with zeroflow.one_thread():
        student = zeroflow.from_student(model.prepare_inference())
        found = zeroflow.evaluate(test_set, student, grid, max_broken=settings.max_broken)
    print(f"\n{len(test_set)} pairs of {settings.val}; {units(settings.device)}")
    print(zeroflow.table({"student": found.numbers}))
    return {"student": found.numbers}


def _report_overlap(samples: Samples, test_set: data.Pairs, name: str) -> None:
    tested = set(test_set.pair_keys)
    count = sum(key in tested for key in samples.keys())
    if count and rank_of()[0] == 0:
        what = f"{count} of its {len(test_set)} pairs are also in the training data"
        print(f"--val {name}: {what}; its errors are lower than on new data", file=sys.stderr)


def train_in_folder(
    samples: Samples, settings: TrainSettings, validate: Validate | None = None
) -> fastflow3d.FastFlow3D | None:
    """`train` into --out, and print the result."""
    folder = Path(settings.out)
    model = train(samples, settings, folder, validate)
    if rank_of()[0] == 0:
        resume = f"stopped by a signal; continue with: python train.py --resume --out {folder}"
        print(resume if model is None else f"wrote {folder / 'last.pt'}")
    return model


def units(device: str) -> str:
    """The units of a printed table, whose student ran on this device."""
    student = "" if device == "cpu" else f", the student's on {device}"
    return f"errors in meters, times of one CPU thread{student}"


def open_and_report(path: str, options, true_flow: bool = True, truth: str = "av2") -> data.Pairs:
    """Open a data set as `options` ask for: anything that has the attributes named here."""
    names = ("ground", "pairs_per_log", "sweeps_per_log", "poses", "rate_hz", "columns")
    names += ("min_range_m", "cache", "cache_gb")
    chosen = {name: getattr(options, name) for name in names}
    dataset = data.open_dataset(path, true_flow, **chosen, truth=truth)

    # What was assumed about the data, and what does not form a pair.
    for line in (*dataset.notes, *dataset.skipped):
        print(line, file=sys.stderr)
    return dataset


def score(
    pairs: Sequence[data.SweepPair], max_broken: float, model: fastflow3d.FastFlow3D
) -> dict[str, float]:
    """The numbers of a validation. The paper's three-way and the bucketed error may disagree."""
    student = zeroflow.from_student(model.prepare_inference())
    grid = model.settings.half_extent_m
    numbers = zeroflow.evaluate(pairs, student, grid, max_broken=max_broken).numbers
    names = ("paper_three_way", "bucketed_dynamic_mean", "grid_three_way")
    return {name: numbers[name] for name in names}


# --- Samples --------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One pair as the student sees it, without ground, and the flow that it should find."""

    pc0: Tensor  # (N0, 3)
    pc1: Tensor  # (N1, 3)
    label: Tensor  # (N0, 3) residual flow
    has_flow: Tensor  # (N0,) bool, the rows that count in the loss
    weight: Tensor  # (N0,) how much each row counts, apart from its speed
    seconds: float = 0.1  # between the two sweeps
    broken: int = 0  # 1 if this pair takes the place of one that could not be read


def open_samples(settings: TrainSettings) -> Samples:
    """The labeled pairs of all folders of --data."""
    grid, parts = fastflow3d.MODELS[settings.model].half_extent_m, []
    for i, path in enumerate(settings.data):
        # Each folder has its own number, and the last number applies to the remaining folders.
        own = {}
        for name in ("sweeps_per_log", "pairs_per_log"):
            values = getattr(settings, name)
            own[name] = values[min(i, len(values) - 1)]
        options = dataclasses.replace(settings, **own)
        dataset = open_and_report(path, options, true_flow=settings.supervised)
        folder = None if settings.supervised else settings.labels[i]
        parts.append(LabeledPairs(dataset, folder, grid, doubt=settings.doubt))
    return Samples(parts, settings.fraction)


class LabeledPairs(Dataset):
    """The pairs of a data set that have a label, as `Sample`s; others are reported on stderr.

    folder: of labels. None uses the true flow in the grid of `half_extent_m`, with the weight 0.1
    for background and 1 for foreground, as in FastFlow3D's loss. keep: keep samples in memory.
    doubt: see `TrainSettings`. Raises DataError if there are no labels.
    """

    def __init__(
        self,
        dataset: data.Pairs,
        folder: str | Path | None,
        half_extent_m: Sequence[float] = data.GRID_HALF_EXTENT_M,
        keep: bool = False,
        doubt: float | None = None,
    ):
        self.dataset, self.half_extent_m, self.doubt = dataset, half_extent_m, doubt
        self.keep, self.kept = keep, {}
        self.label_folder = None if folder is None else labels.open_labels(folder, dataset)
        self.teacher = "true flow" if folder is None else self.label_folder.teacher
        self.indices = range(len(dataset)) if folder is None else self.label_folder.indices

        # Labeling may have failed for some pairs, or may not be done yet. They are left out.
        missing = len(dataset) - len(self)
        if missing:
            first = next((i for i, index in enumerate(self.indices) if i < index), len(self))
            key = tuple(dataset.pair_keys[first])
            what = f"{missing} of {len(dataset)} pairs have no label and are left out"
            print(f"{folder}: {what}; the first is {key}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> data.PairKey:
        """The pair that a sample belongs to."""
        return self.dataset.pair_keys[self.indices[index]]

    def __getitem__(self, index: int) -> Sample:
        sample = self.kept.get(index) or self._read(index)
        if self.keep:
            self.kept[index] = sample
        return sample

    def _read(self, index: int) -> Sample:
        pair = self.dataset[self.indices[index]]
        if self.label_folder is not None:
            label = self.label_folder.read(pair)
            flow, has_flow, weight = label.flow, label.has_flow, torch.ones(len(pair.pc0))
            if self.doubt is not None:
                # Whether such points move is learned from the clear cases of other pairs. An
                # unknown gain is NaN, for which both comparisons are False.
                has_flow = has_flow & ~((label.gain >= 1) & (label.gain < self.doubt))
        elif pair.flow is not None:
            flow, has_flow = pair.flow, data.input_masks(pair, self.half_extent_m)[0]
            weight = torch.where(pair.category > 0, 1.0, 0.1)  # category 0 is background
        else:
            what = "has no true flow to learn from"
            raise DataError(f"{tuple(pair.key)}: {what}; give a split with annotations")

        # Ground is removed here already, so that it is not copied to the device.
        keep = ~pair.is_ground0
        pc0, pc1 = pair.pc0[keep], pair.pc1[~pair.is_ground1]
        return Sample(pc0, pc1, flow[keep], has_flow[keep], weight[keep], pair.seconds)


class Samples(Dataset):
    """The samples of several `LabeledPairs`, or a share of them.

    A pair that cannot be read is reported on stderr, and the next one takes its place. hash: of
    the list of pairs and of their teacher; it tells whether a resumed run still has its data.
    """

    def __init__(self, parts: Sequence[LabeledPairs], fraction: float = 1.0):
        self.parts = list(parts)
        self.ends = list(itertools.accumulate(map(len, self.parts)))  # one part after the other
        count = self.ends[-1]

        # Arrays, since there may be millions of samples, and every loader worker has its own copy
        # of all Python objects. chosen: their places among the samples of all parts.
        self.chosen = np.arange(count)
        if fraction < 1:
            # The pairs with the smallest digests are chosen. As a digest depends on nothing but the
            # pair, a smaller share is part of a larger one, whatever the order of logs.
            digests = (int(_digest(key)[:16], 16) for key in self.keys())
            by_digest = np.argsort(np.fromiter(digests, np.uint64, count), kind="stable")
            self.chosen = np.sort(by_digest[: max(1, round(fraction * count))])

        # Not sorted, since the order decides what each step shows.
        of_pairs = map(_digest, self.keys())
        self.hash = _digest_of_list(itertools.chain(of_pairs, (part.teacher for part in parts)))

    def keys(self) -> Iterator[data.PairKey]:
        """The pair of each sample."""
        for place in self.chosen.tolist():
            part, i = self._find(place)
            yield part.key(i)

    def _find(self, place: int) -> tuple[LabeledPairs, int]:
        """The part to which a place belongs, and the index there."""
        number = bisect.bisect_right(self.ends, place)
        start = self.ends[number - 1] if number else 0
        return self.parts[number], place - start

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):  # by which a loop over all samples ends
            raise IndexError(f"sample {index} of {len(self)}")
        # Single files may be broken. A hundred unreadable pairs in a row have another cause.
        errors = []
        for other in range(index, index + min(len(self), 100)):
            part, i = self._find(int(self.chosen[other % len(self)]))
            try:
                sample = part[i]
            except (DataError, OSError) as error:
                errors.append(str(error))
                continue
            if errors:
                print(f"replaced by another pair: {'; '.join(errors)}", file=sys.stderr)
            return sample._replace(broken=int(bool(errors)))
        what = f"none of {len(errors)} pairs in a row can be read"
        raise DataError(f"{what}; the first: {errors[0]}")


def _digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _digest_of_list(values: Iterable[str]) -> str:
    """`_digest` of the list of these texts, without building the list."""
    digest, before = hashlib.sha256(b"["), ""
    for value in values:
        digest.update(f"{before}{value!r}".encode())
        before = ", "
    digest.update(b"]")
    return digest.hexdigest()


# --- Batches --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A micro-batch on the device: the columns of `Sample`, with one entry per sample."""

    pc0s: Sequence[Tensor]
    pc1s: Sequence[Tensor]
    labels: Sequence[Tensor]
    has_flow: Sequence[Tensor]
    weights: Sequence[Tensor]
    seconds: Sequence[float]
    broken: int  # samples that took the place of others


def load(
    samples: Sequence[Sample],
    settings: TrainSettings,
    first_step: int,
    stopped: Sequence[int] = (),
) -> Iterator[list[Batch]]:
    """The micro-batches of this process, step by step; `workers` read them ahead.

    They end only if a signal (in `stopped`) comes. Raises DataError if a worker dies. Close the
    iterator when it is no longer needed, which ends the workers.
    """

    def parts_of(step: int) -> list[list[int]]:
        return micro_batches(step, len(samples), settings, *rank_of())

    # Indices never end, so that workers read ahead across the borders of steps and epochs.
    loader = DataLoader(
        samples,
        batch_sampler=itertools.chain.from_iterable(map(parts_of, itertools.count(first_step))),
        num_workers=settings.workers,
        collate_fn=join,
        pin_memory=settings.device.startswith("cuda"),
        worker_init_fn=ignore_signals,
        timeout=1 if settings.workers else 0,  # seconds, after which signals are checked
    )
    with contextlib.closing(Reader(loader)) as reader:
        for step in itertools.count(first_step):
            batches = []
            for _ in parts_of(step):
                part = reader.next(stopped)
                if part is None:
                    return
                # A column goes to the device as a whole, and is cut into samples there.
                columns, lengths, seconds, broken = part
                columns = [column.to(settings.device, non_blocking=True) for column in columns]
                lists = [column.split(rows) for column, rows in zip(columns, lengths, strict=True)]
                batches.append(Batch(*lists, seconds, broken))
            yield batches


def join(
    samples: Sequence[Sample],
) -> tuple[list[Tensor], list[list[int]], tuple[float, ...], int]:
    """One tensor per column, the rows that each sample has in it, `seconds`, and `broken`."""
    # A worker needs a file handle for each tensor that it sends, and handles are scarce: five long
    # tensors are better than five for each sample.
    *columns, seconds, broken = zip(*samples, strict=True)
    lengths = [[len(part) for part in column] for column in columns]
    return shared([torch.cat(column) for column in columns]), lengths, seconds, sum(broken)


def micro_batches(
    step: int, count: int, settings: TrainSettings, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """Indices of the samples in each part of a step's batch that belongs to process `rank`."""
    # Parts are smaller than `micro_batch` only if some process would otherwise get none.
    batch = batch_of(step, count, settings)
    size = min(settings.micro_batch, len(batch) // world)
    return [batch[start : start + size] for start in range(0, len(batch), size)][rank::world]


def batch_of(step: int, count: int, settings: TrainSettings) -> list[int]:
    """Indices of the samples, out of `count`, of a step's batch over all processes.

    An epoch shows each sample at most once, in an order of its own. Fewer than a batch are left
    over at its end, different ones each time.
    """
    # The batch depends on the seed and the step alone, so a resumed run, or one on more GPUs, sees
    # what it would have seen.
    size = min(settings.batch_size, count)
    epoch, place = divmod(step, steps_per_epoch(count, settings))
    return _order(settings.seed, epoch, count)[place * size : (place + 1) * size].tolist()


def steps_per_epoch(count: int, settings: TrainSettings) -> int:
    """How many batches `count` samples make."""
    return count // min(settings.batch_size, count)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(_digest((seed, epoch))[:15], 16))
    return torch.randperm(count, generator=generator)


# --- Training -------------------------------------------------------------------------------------

Validate = Callable[[fastflow3d.FastFlow3D], dict]


def train(
    samples: Sequence[Sample],
    settings: TrainSettings,
    folder: Path | None = None,
    validate: Validate | None = None,
) -> fastflow3d.FastFlow3D | None:
    """Fit a student to samples. Returns it in training mode, or None if a signal stopped the run.

    folder: for checkpoints and log; None writes nothing. validate: gives a validation's numbers.
    Raises DataError if too many samples cannot be read, or if gradients are not finite for long.
    """
    rank, world = rank_of()
    state = State(getattr(samples, "hash", ""))
    check_same_pairs(len(samples), state.samples_hash)
    model, optimizer = new_student(settings)
    if settings.resume:
        state = restore(folder, model, optimizer, state, settings)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    per_epoch = steps_per_epoch(len(samples), settings)
    total = settings.steps or settings.epochs * per_epoch

    # Only the first process writes.
    log = Log(folder if rank == 0 else None, state.step, state.validated, settings)
    save = functools.partial(_save, log, model, optimizer, state, settings)
    bar = tqdm(total=total, initial=state.step, desc="student", unit="step", disable=rank > 0)
    with (
        contextlib.closing(log),
        bar as progress,  # closed, also after an error, so that the error has a line of its own
        _threads(settings),
        stop_signals() as stopped,
        contextlib.closing(load(samples, settings, state.step, stopped)) as steps,
    ):
        while True:
            # A validation that was interrupted is repeated after a resume.
            is_last = state.step >= total
            is_due = is_last or state.step % (settings.validate_every or per_epoch) == 0
            validates = validate and is_due and state.validated < state.step and not stopped

            # The checkpoint comes before the validation, which may take longer than many steps. It
            # also comes before the first step: a run that is killed right away can be resumed.
            if validates or is_last or state.step % settings.checkpoint_every == 0:
                save("last.pt")
            if validates:
                if rank == 0:
                    _validate(validate, model, log, state, save)
                state.validated = state.step
                save("last.pt")
            if is_last:
                return None if stopped else model

            # All processes stop before the same step, if any of them was told to.
            start, batches = time.perf_counter(), _next_batches(steps, save)
            if any_of(stopped, settings.device):
                break
            result = one_step(parallel, optimizer, batches, state.step, total, settings, stopped)
            if result is None:
                break
            state.count(result)
            log_step(log, result, state, time.perf_counter() - start, progress)
            state.check(result, settings)
    save("last.pt")
    return None


def _next_batches(steps: Iterator[list[Batch]], save: Callable) -> list[Batch] | None:
    """The batches of the next step; None if a signal came. Saves the run if they do not come."""
    try:
        return next(steps, None)
    except (DataError, Outage):
        save("last.pt")  # the model is as it was after the last complete step
        raise


def _validate(validate: Validate, model, log: Log, state: State, save: Callable) -> None:
    numbers = validate(model)
    log.write({"step": state.step, **numbers})
    if numbers["paper_three_way"] < state.best:
        state.best, state.validated = numbers["paper_three_way"], state.step
        save("best.pt")


def _threads(settings: TrainSettings) -> contextlib.AbstractContextManager:
    # On two idle cores, a second thread saves the small student a fifth of a step's time. Beside
    # other busy processes, two threads wait for each other, and it takes 3 to 10 times as long.
    is_small = settings.model == "narrow" and settings.device == "cpu"
    return zeroflow.one_thread() if is_small else contextlib.nullcontext()


def new_student(settings: TrainSettings) -> tuple[fastflow3d.FastFlow3D, torch.optim.Optimizer]:
    """A student in training mode, and its optimizer.

    Its first weights are those of `init`, or random ones, which depend on the seed.
    """
    torch.manual_seed(settings.seed)
    model = fastflow3d.FastFlow3D(fastflow3d.MODELS[settings.model])
    if settings.init is not None and not settings.resume:
        model = first_weights(settings)
    # Convolutions are fastest if the channels of a pixel are neighbors in memory.
    model.to(settings.device, memory_format=torch.channels_last).train()
    return model, torch.optim.Adam(model.parameters(), lr=settings.lr)


def first_weights(settings: TrainSettings) -> fastflow3d.FastFlow3D:
    """The student in `init`. Raises DataError if it is not of the model to train."""
    try:
        model = fastflow3d.load_checkpoint(settings.init)
    except ValueError as error:
        raise DataError(f"--init: {error}") from error
    names = [name for name, known in fastflow3d.MODELS.items() if known == model.settings]
    if settings.model not in names:
        found = f"holds a student of --model {names[0]}" if names else f"holds {model.settings}"
        raise DataError(f"--init {settings.init}: {found}, not of {settings.model}")
    return model


class StepResult(NamedTuple):
    """What one step did, over all processes."""

    loss: float  # meters, mean over samples
    gradient: float  # its norm before clipping
    lr: float
    weight: str  # speed weight
    shown: int  # samples
    broken: int  # samples that took the place of others

    def is_finite(self) -> bool:
        """Whether loss and gradient were finite. Otherwise the step was skipped."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient)


def one_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    step: int,
    total: int,
    settings: TrainSettings,
    stopped: Sequence[int] = (),
) -> StepResult | None:
    """Step number `step`, from 0, of `total`, on the micro-batches of one batch.

    Returns None, and leaves the model as it was, if a signal (in `stopped`) came before the last
    micro-batch.
    """
    # The true flow is not weighted by speed: its samples weigh background less instead.
    is_weighted = step < settings.weighted_share * total and not settings.supervised
    weight = settings.speed_weight if is_weighted else "none"

    # Batch norm's running statistics change as soon as data passes through. If the step does not
    # take place after all, they must not have changed either.
    statistics_before = [buffer.clone() for buffer in model.buffers()]
    if settings.mirror or settings.turn or settings.height_m:
        # Each step and process draws its own forms; after a resume they are the same.
        number = (settings.seed * 10**7 + step) * 1000 + rank_of()[0]
        generator = torch.Generator().manual_seed(number)
        batches = [varied(batch, settings, generator) for batch in batches]
    sums = add_gradients(model, batches, weight, settings, stopped)
    if sums is None:
        put_back(model, statistics_before)
        return None

    # This norm is of the whole batch, however it was divided. It is finite only if every number of
    # the gradient is.
    longest = math.inf if settings.clip_norm is None else settings.clip_norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), longest).item()
    lr = learning_rate(step, total, settings)
    loss, shown, broken = summed(sums).tolist()
    result = StepResult(loss / shown, norm, lr, weight, int(shown), int(broken))

    # Both must be finite: a flow that has become infinite may have a gradient of zeros.
    optimizer.param_groups[0]["lr"] = lr
    if result.is_finite():
        optimizer.step()
    else:
        put_back(model, statistics_before)
    optimizer.zero_grad()
    return result


def varied(batch: Batch, settings: TrainSettings, generator: torch.Generator) -> Batch:
    """Each pair in another form, so that it teaches more: mirrored, turned, raised or lowered.

    Points that are turned out of the grid do not count in the loss, like all points outside it.
    """
    changed = {"pc0s": [], "pc1s": [], "labels": []}
    for i in range(len(batch.pc0s)):
        form, up = torch.eye(3), torch.zeros(3)
        if settings.mirror:
            form[0, 0], form[1, 1] = 1.0 - 2.0 * torch.randint(2, (2,), generator=generator)
        if settings.turn:
            angle = 2 * math.pi * torch.rand((), generator=generator).item()
            turn = torch.eye(3)
            turn[0, :2] = torch.tensor([math.cos(angle), -math.sin(angle)])
            turn[1, :2] = torch.tensor([math.sin(angle), math.cos(angle)])
            form = turn @ form
        if settings.height_m:
            up[2] = settings.height_m * (2 * torch.rand((), generator=generator).item() - 1)

        # Flow is a difference of two points: it turns with them, and does not rise.
        device = batch.pc0s[i].device
        for name, tensors in changed.items():
            moved = getattr(batch, name)[i] @ form.T.to(device)
            tensors.append(moved if name == "labels" else moved + up.to(device))
    return batch._replace(**changed)


def put_back(model: torch.nn.Module, buffers: Sequence[Tensor]) -> None:
    """Give a model's buffers, such as running statistics, their earlier values."""
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)


def add_gradients(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    weight: str,
    settings: TrainSettings,
    stopped: Sequence[int],
) -> Tensor | None:
    """Add up the gradients of a step's micro-batches, as if they were one batch.

    Returns (3,): the sum of the losses, and how many samples and broken ones there were. None if a
    signal came.
    """
    world, device = rank_of()[1], torch.device(settings.device)
    is_bfloat16 = settings.dtype == "bfloat16"
    sums = torch.zeros(3, device=device)  # reading a value from a GPU would wait for it
    for part, batch in enumerate(batches, start=1):
        # A step may take minutes on a CPU, longer than clusters wait. Several processes stop
        # between steps instead, together, since none may leave the others waiting.
        if stopped and world == 1:
            return None

        # Processes exchange their gradients during a backward pass; once, in the last, is enough.
        is_last = part == len(batches)
        exchange = contextlib.nullcontext() if world == 1 or is_last else model.no_sync()
        with exchange:
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
                flows, is_in_grid = model(batch.pc0s, batch.pc1s)
            masks = [has & inside for has, inside in zip(batch.has_flow, is_in_grid, strict=True)]
            how = (weight, batch.weights, batch.seconds, settings.squared_error)
            loss = zeroflow.distillation_loss(flows, batch.labels, masks, *how)
            # The exchange takes the mean over processes, but the loss is a sum over samples.
            (loss * world).backward()
        sums += torch.stack([loss.detach(), *loss.new_tensor([len(batch.pc0s), batch.broken])])
    return sums


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """For step 0, 1, ... With `cosine`: a linear rise for 5 % of the steps, and a fall to 0."""
    if not settings.cosine:
        return settings.lr
    rise = min(1.0, (step + 1) / (0.05 * total))
    return settings.lr * rise * 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass
class State:
    """How far a run is: what a checkpoint holds beside model, optimizer and settings."""

    samples_hash: str = ""  # of the list of pairs that it learns from
    step: int = 0  # steps done
    skipped: int = 0  # steps that were skipped, because loss or gradient was not finite
    skipped_in_a_row: int = 0  # how many of the most recent steps
    shown: int = 0  # samples
    broken: int = 0  # samples that took the place of unreadable ones
    best: float = math.inf  # lowest paper_three_way of a validation
    validated: int = 0  # step of the last validation

    def count(self, result: StepResult) -> None:
        """Count a step that was done."""
        self.step += 1
        self.shown += result.shown
        self.broken += result.broken
        is_skipped = not result.is_finite()
        self.skipped += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0

    def check(self, result: StepResult, settings: TrainSettings) -> None:
        """Raise DataError if the run must not go on after this step."""
        # At the start of a run, one pair is a large share: count at least a hundred.
        if result.broken and self.broken > settings.max_broken * max(100, self.shown):
            what = f"{self.broken} of {self.shown} pairs could not be read"
            limit = f"more than --max-broken {settings.max_broken}"
            remedy = "repair the data (see `python zeroflow.py check`), or allow more"
            raise DataError(f"{what}, {limit}; {remedy}")

        # A step is skipped now and then, most of all with bfloat16. Ten in a row mean divergence.
        if self.skipped_in_a_row == 10:
            what = f"step {self.step}: loss or gradient was not finite ten times in a row"
            remedy = "use --resume with a lower --lr, a --clip-norm, or --dtype float32"
            raise DataError(f"{what}; {remedy}")


# --- Several processes ----------------------------------------------------------------------------


@contextlib.contextmanager
def processes(settings: TrainSettings) -> Iterator[TrainSettings]:
    """Under torchrun, join the other processes. Gives the settings, with this process's own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield settings
        return

    # torchrun numbers the processes of a machine, and each takes the GPU of its number.
    is_cuda = settings.device.startswith("cuda")
    if is_cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        settings = dataclasses.replace(settings, device=device)

    # Later the others wait while the first process validates, so this timeout is long. The one for
    # the start is shorter: a process that has not joined by then is not going to.
    store, rank, world = _meet()
    timeout = datetime.timedelta(hours=2)
    backend = "nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    try:
        yield settings
    finally:
        dist.destroy_process_group()


START_TIMEOUT = datetime.timedelta(minutes=5)


def _meet() -> tuple[dist.Store, int, int]:
    """Wait until all processes have joined: their shared store, this one's rank, their number.

    Raises DataError if that takes too long.
    """
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        store.set(f"started/{rank}", "")
        store.wait([f"started/{other}" for other in range(world)], START_TIMEOUT)
    except RuntimeError as error:
        minutes = START_TIMEOUT.total_seconds() / 60
        what = f"not all {os.environ['WORLD_SIZE']} processes joined within {minutes:g} minutes"
        reason = str(error).splitlines()[0]
        raise DataError(f"{what} ({reason}); see what they printed, and start all again") from error
    return store, rank, world


def rank_of() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check_same_pairs(count: int, samples_hash: str) -> None:
    """Raise DataError, in all processes, unless they see the same pairs, and enough of them."""
    world = rank_of()[1]
    if world > 1:
        hashes = [None] * world
        dist.all_gather_object(hashes, samples_hash)
        if len(set(hashes)) > 1:
            what = "the processes see different pairs"
            raise DataError(f"{what}; is labeling still going on? Start when it is done")
    if count < world:
        raise DataError(f"{count} pairs for {world} processes; start fewer, or label more")


def summed(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_of(stopped: Sequence[int], device: str) -> bool:
    """Whether any process was told to stop. All of them learn it before the same step."""
    return bool(summed(torch.tensor(float(len(stopped)), device=device)))


# --- The run's folder: see runs.py ----------------------------------------------------------------


def log_step(log: Log, result: StepResult, state: State, seconds: float, progress: tqdm) -> None:
    """Log a step, and show it in the progress bar."""
    rate = result.shown / seconds
    counts = {"step": state.step, "skipped": state.skipped, "broken": state.broken}
    log.write({**result._asdict(), **counts, "pairs_per_s": rate})
    progress.update()
    progress.set_postfix(loss=f"{result.loss:.4f}", weight=result.weight, refresh=False)


def _save(log: Log, model, optimizer, state: State, settings: TrainSettings, name: str) -> None:
    whole = fastflow3d.checkpoint_of(model) | {"optimizer": optimizer.state_dict()}
    parts = {"state": dataclasses.asdict(state), "train_settings": dataclasses.asdict(settings)}
    log.save(whole | parts, name)


def newest_checkpoint(folder: Path) -> dict:
    """The last.pt of a run, as `_save` writes it. Raises DataError if it cannot be used."""
    return runs.newest_checkpoint(folder, {"state": State, "train_settings": TrainSettings})


def restore(folder: Path, model, optimizer, state: State, settings: TrainSettings) -> State:
    """Load model and optimizer from last.pt, and return its state.

    Raises DataError if the run has learned from other pairs than the given `state` names.
    """
    checkpoint, file = newest_checkpoint(folder), folder / "last.pt"
    stored = State(**checkpoint["state"])
    if checkpoint["notes"]:
        found = "; ".join(checkpoint["notes"])
        print(f"{file}: was written by another version: {found}", file=sys.stderr)

    # With other pairs, the same step would show something else: it would not be the same run.
    if stored.samples_hash != state.samples_hash:
        what = "its run learns from other pairs than the data has now"
        raise DataError(f"{folder}: {what}; restore the data and the labels")
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        # torch does not check these, and would fail in the first step.
        for parameter, moments in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape or not moments[name].isfinite().all():
                    raise ValueError(f"the optimizer's {name} does not fit")
            float(moments["step"])
    except Exception as error:  # torch raises several kinds
        what = f"does not fit a {settings.model} student ({error})"
        raise DataError(runs.unusable(file, what)) from error

    # The best error so far cannot be compared with errors on other pairs.
    before = checkpoint["train_settings"]
    if (before["val"], before["val_share"]) != (settings.val, settings.val_share):
        stored.best = math.inf
    return stored


if __name__ == "__main__":
    import commands

    sys.exit(commands.train_main())
