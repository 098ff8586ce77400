"""The trainer: a student (fastflow3d.py) learns from a teacher's pseudo-labels, on one GPU, a CPU, or under torchrun.

    python train.py                                                        the whole method on a synthetic street
    python train.py --preset zeroflow-1x --data ROOT --labels DIR --val ROOT --out RUN        the published recipe
    python train.py --resume true --out RUN                                            go on where a run was stopped
    torchrun --nproc-per-node 4 train.py --preset zeroflow-1x ...                               on several GPUs

Without --data it makes the street, lets the teacher label it (both are kept in the user's cache folder), trains a small
student and compares all on logs that neither has seen. Every field of `TrainSettings` is an option --name value; a
preset is a handful of them.

Nothing is lost: the folder --out holds last.pt, previous.pt and best.pt (each whole or not there), and log.jsonl, a
line a step. On a CPU, a run that was stopped at any instant and resumed has the weights of one that was not, bit for
bit. On SIGTERM, which is how clusters take a machine back, it writes last.pt and ends with status 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import data
import fastflow3d
import nsfp
import synthetic
import zeroflow


@dataclass(frozen=True)
class TrainSettings:
    """One flat list. The defaults are the published recipe; without `data` the preset `street` changes some."""

    # What to learn from. Options with a plural meaning may be given once for each --data, in its order.
    preset: str = ""  # one of PRESETS: other defaults
    data: tuple[str, ...] = ()  # a split, a log, or a folder of clouds; several: the Sensor and the LiDAR data set
    labels: tuple[str, ...] = ()  # the labels of each, as `python zeroflow.py label` writes them, or published ones
    supervised: bool = False  # learn from the true flow instead of labels: FastFlow3D
    fraction: float = 1.0  # share of the pairs; a smaller one is part of a larger one
    sweeps_per_log: tuple[int, ...] = (0,)  # the first ones; 145 as the published code; 0: all
    pairs_per_log: tuple[int, ...] = (0,)  # at regular intervals: 12 of LiDAR logs is 3x, 24 is 5x; 0: all
    ground: str = ""  # raster, vector, points, none; empty: the first that there is. See data.open_dataset
    poses: str = ""  # of a folder of clouds, if not beside them
    rate_hz: float = 10.0  # of clouds without time stamps
    val: str = ""  # a split or a log with annotations, to evaluate on

    # The student and how it learns.
    model: str = "normal"  # narrow, normal or xl: see fastflow3d.MODELS
    epochs: int = 50  # a later code base by the paper's authors: 20
    steps: int = 0  # if not 0, instead of epochs
    batch_size: int = 64  # pairs a step, over all processes
    micro_batch: int = 16  # pairs at a time, of which batch norm takes its statistics: published, 16 on each of 4 GPUs
    lr: float = 2e-6  # of Adam. The later code base: 2e-4
    cosine: bool = False  # 5 % warm-up, then down to 0. Published: constant
    speed_weight: str = "formula"  # formula, published or none: see zeroflow.speed_weight
    weighted_share: float = 1.0  # of the steps, the first ones, weigh points by speed, the rest not
    clip_norm: float = 0.0  # of the whole batch's gradient, 0: none, as published
    dtype: str = "float32"  # of the U-Net, as published; or bfloat16: faster on processors that know it
    seed: int = 0
    device: str = ""  # cpu or cuda; empty: cuda where there is one

    # The run.
    out: str = "run"  # the folder of its checkpoints and log
    resume: bool = False  # go on from the newest whole checkpoint in `out`, by the settings stored there
    workers: int = 4  # processes that read pairs ahead, for each GPU
    checkpoint_every: int = 100  # steps
    validate_every: int = 0  # steps; 0: once an epoch
    val_share: float = 0.05  # of the pairs of `val`, evenly spread, at each of these; all of them at the end
    max_broken: float = 0.05  # stop when more of the pairs shown could not be read and were replaced by others
    curve: bool = False  # only draw loss and validation of the run in `out`
    picture: str = ""  # a PNG or PDF file for a bird's-eye view of a pair that the student has not seen

    # The street, where `data` is empty.
    train_logs: int = 30
    test_logs: int = 6


_XL = {"model": "xl", "batch_size": 12, "micro_batch": 2}  # published: 2 on each of 6 GPUs
PRESETS = {
    "street": {
        "model": "narrow",
        "steps": 1500,
        "batch_size": 1,
        "micro_batch": 1,
        "lr": 2e-3,
        "cosine": True,
        "weighted_share": 0.5,
        "clip_norm": 0.5,
        "workers": 0,
    },
    "zeroflow-1x": {"sweeps_per_log": (145,)},
    "zeroflow-3x": {"sweeps_per_log": (145, 0), "pairs_per_log": (0, 12)},  # --data Sensor --data LiDAR
    "zeroflow-5x": {"sweeps_per_log": (145, 0), "pairs_per_log": (0, 24)},
    "zeroflow-xl-1x": {"sweeps_per_log": (145,), **_XL},
    "zeroflow-xl-3x": {"sweeps_per_log": (145, 0), "pairs_per_log": (0, 12), **_XL},
    "zeroflow-xl-5x": {"sweeps_per_log": (145, 0), "pairs_per_log": (0, 24), **_XL},
    "scaling-law": {"train_logs": 100},  # on the street's other settings: see scaling_law
    "fastflow3d": {"sweeps_per_log": (145,), "supervised": True},
    "fastflow3d-xl": {"sweeps_per_log": (145,), "supervised": True, **_XL},
}
PRESETS["scaling-law"] |= PRESETS["street"]
STREET = synthetic.PRESETS["small"]
# Half the work of `fast`; and points so sparse form clusters, and meet sweep 1, from farther away.
STREET_TEACHER = dataclasses.replace(
    nsfp.TEACHERS["fast"], priors=2, iterations=150, cluster_reach=0.8, cluster_points=5, confirm_reach=0.5
)
DTYPES = ("float32", "bfloat16")
TRAIN_SEED, TEST_SEED = 0, 1  # of the street's logs
# What a resumed run may be given anew: where things are, how fast it goes, and the way out where gradients explode.
MAY_CHANGE = {"resume", "out", "data", "labels", "val", "val_share", "workers", "device", "checkpoint_every", "picture"}
MAY_CHANGE |= {"validate_every", "max_broken", "lr", "clip_norm", "dtype"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Train a student on pseudo-labels; without --data, do all of ZeroFlow on a synthetic street.",
        epilog="example: python train.py --preset zeroflow-1x --data av2/train --labels labels --val av2/val --out run",
    )
    zeroflow.add_settings(parser, TrainSettings)
    try:
        settings = resolve(parser.parse_args(argv))
        if settings.curve:
            draw_curve(Path(settings.out))
        else:
            with processes(settings) as settings:
                run(settings)
    except (data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def resolve(arguments: argparse.Namespace) -> TrainSettings:
    """Settings from what was given: over the stored ones of a run that is resumed, else over a preset's."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    out = Path(given.get("out", TrainSettings.out))
    is_begun = any((out / name).exists() for name in CHECKPOINTS)
    if given.get("resume") and (is_begun or not given.get("data")):
        stored = TrainSettings(**newest_checkpoint(out)["train_settings"])
        for name, value in given.items():
            option, kept = name.replace("_", "-"), getattr(stored, name)
            if value != kept and name not in MAY_CHANGE:
                raise data.DataError(f"--{option} {value!r}: the run was begun with {kept!r}; a resumed run keeps it")
        return dataclasses.replace(stored, **{**given, "out": str(out)})
    given["resume"] = False  # there is nothing yet to go on with: the same command begins a run and goes on with it
    preset = given.get("preset", "" if given.get("data") or given.get("curve") else "street")
    if preset and preset not in PRESETS:
        raise data.DataError(f"--preset {preset!r}: choose one of {', '.join(PRESETS)}")
    settings = dataclasses.replace(TrainSettings(), **{**PRESETS.get(preset, {}), **given, "preset": preset})
    return dataclasses.replace(settings, device=settings.device or zeroflow.default_device())


def run(settings: TrainSettings) -> dict[str, dict[str, float]]:
    """Train, save, evaluate, print. Returns the rows of the printed table."""
    check_settings(settings)
    folder, is_first = Path(settings.out), rank_of()[0] == 0
    say = print if is_first else lambda *_, **__: None  # of several processes the first one speaks
    say(f"settings: {settings}")
    if settings.preset == "scaling-law":
        return scaling_law(settings, folder)
    if settings.data:
        samples, test_labels = open_samples(settings), None
        # Other options are of what is learnt from: what has a truth has a map of its own, and poses.
        whole = dataclasses.replace(TrainSettings(), pairs_per_log=0, sweeps_per_log=0)
        test_set = zeroflow.open_and_tell(settings.val, whole) if settings.val else None
        if test_set is not None and test_set[0].flow is None:
            raise data.DataError(
                f"--val {settings.val}: has no annotations to compare with; give another split, or none"
            )
    else:
        train_set, test_set, test_labels = prepare_street(settings)
        samples = Samples([LabelledPairs(train_set, test_labels, keep=True)], settings.fraction)
    validate = None
    if settings.data and test_set is not None:
        count = max(1, round(settings.val_share * len(test_set)))
        share = Subset(test_set, [i * len(test_set) // count for i in range(count)])
        validate = functools.partial(score, share, settings.max_broken)
    model = train(samples, settings, folder, validate)
    if model is None:
        say(f"stopped by a signal; go on with: python train.py --resume true --out {folder}")
        return {}
    say(f"wrote {folder / 'last.pt'}")
    if is_first:
        draw_curve(folder)
    if test_set is None or not is_first:
        return {}

    estimators = {}
    if not settings.data:  # the street is small enough for company
        estimators["no motion"] = zeroflow.timed(zeroflow.no_motion)
        estimators["nearest"] = zeroflow.timed(zeroflow.nearest_neighbour)
        estimators["teacher"] = zeroflow.from_labels(zeroflow.open_labels(test_labels, test_set))
    estimators["student"] = zeroflow.from_student(model.prepare_inference())
    with zeroflow.one_thread():  # for every row of the table, so that times can be compared
        share = settings.max_broken
        rows = {name: zeroflow.evaluate(test_set, each, max_broken=share) for name, each in estimators.items()}
        if "teacher" in rows:  # its labels were made by several processes at once: time it again, alone as the others
            again = zeroflow.from_teacher(STREET_TEACHER)
            rows["teacher"]["seconds_per_pair"] = statistics.median(
                again(test_set[index]).seconds for index in range(3)
            )
    where = settings.val or "the street, of logs that the student never saw"
    print(f"\n{len(test_set)} pairs of {where}; errors in metres, times of one CPU thread", end="")
    print("" if settings.device == "cpu" else f", the student's of {settings.device}")
    print(zeroflow.table(rows))
    if "teacher" in rows:
        ratio = rows["teacher"]["seconds_per_pair"] / rows["student"]["seconds_per_pair"]
        print(f"the student is {ratio:.0f} times faster than its teacher")
    if settings.picture:
        draw(settings.picture, test_set, estimators)
    return rows


def check_settings(settings: TrainSettings) -> None:
    """Raise DataError for settings that cannot work, before any time is spent."""
    for name, choices in (
        ("model", fastflow3d.MODELS),
        ("speed_weight", ("formula", "published", "none")),
        ("dtype", DTYPES),
    ):
        if getattr(settings, name) not in choices:
            raise data.DataError(
                f"--{name.replace('_', '-')} {getattr(settings, name)!r}: choose one of {', '.join(choices)}"
            )
    roots = len(settings.data)
    if not roots and (settings.supervised or settings.preset not in ("", "street", "scaling-law")):
        raise data.DataError(f"--preset {settings.preset} --supervised {settings.supervised}: needs --data")
    if roots and settings.preset in ("street", "scaling-law"):
        raise data.DataError(f"--preset {settings.preset}: is of the street; leave --data out, or choose another")
    if not roots and rank_of()[1] > 1:
        raise data.DataError("the street is for one process; give --data, or leave torchrun out")
    if settings.supervised and settings.labels:
        raise data.DataError("--supervised learns from the true flow; leave --labels out")
    if not settings.supervised and len(settings.labels) != roots:
        raise data.DataError(
            f"{roots} --data and {len(settings.labels)} --labels: give for each the folder `zeroflow.py label` wrote"
        )
    for name in ("sweeps_per_log", "pairs_per_log"):
        if len(getattr(settings, name)) not in (1, roots):
            count = len(getattr(settings, name))
            raise data.DataError(f"{count} --{name.replace('_', '-')} for {roots} --data: give one, or one for each")
    if settings.val and not settings.data:
        raise data.DataError("--val needs --data; without it the street is trained and tested on")
    if settings.picture and settings.data and not settings.val:
        raise data.DataError("--picture shows a pair of --val, which is not given")
    for name in ("epochs", "batch_size", "micro_batch", "checkpoint_every"):
        if getattr(settings, name) < 1:
            raise data.DataError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be positive")
    if settings.workers < 0 or not settings.lr > 0:
        raise data.DataError(f"--workers {settings.workers} --lr {settings.lr}: workers 0 or more, lr above 0")
    if settings.steps < 0 or not 0 < settings.fraction <= 1:
        raise data.DataError(
            f"--steps {settings.steps} --fraction {settings.fraction}: steps 0 or more, 0 < fraction <= 1"
        )
    if settings.batch_size < rank_of()[1]:
        raise data.DataError(f"--batch-size {settings.batch_size}: is less than the {rank_of()[1]} processes")
    folder = Path(settings.out)
    if folder.exists() and not folder.is_dir():
        raise data.DataError(f"--out {folder}: is a file; give the name of a folder")
    if not settings.resume and any((folder / name).exists() for name in CHECKPOINTS):
        raise data.DataError(f"--out {folder}: holds a run; go on with it by --resume true, or choose another folder")
    zeroflow.check_device(
        torch.device(settings.device).type if settings.device.startswith("cuda:") else settings.device
    )


# --- The street ------------------------------------------------------------------------------------------------------


def prepare_street(settings: TrainSettings) -> tuple[data.Pairs, data.Pairs, Path]:
    """Training pairs, test pairs and the folder of labels of both; made where the cache folder lacks them."""
    # The cache is as good as the code that filled it: a change of these files gives a new folder.
    code = b"".join(Path(module.__file__).read_bytes() for module in (data, nsfp, synthetic, zeroflow))
    what = (STREET, STREET_TEACHER, settings.train_logs, settings.test_logs, TRAIN_SEED, TEST_SEED)
    name = hashlib.sha256(code + repr(what).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeroflow" / f"street-{name}"
    print(f"street and labels: {folder}")
    labels, splits = folder / "labels", {}
    for split, seed, logs in (("train", TRAIN_SEED, settings.train_logs), ("test", TEST_SEED, settings.test_logs)):
        synthetic.write_logs(folder / split, logs, dataclasses.replace(STREET, seed=seed))
        splits[split] = data.open_dataset(folder / split, true_flow=split == "test")
        count = zeroflow.label_dataset(splits[split], labels, STREET_TEACHER)
        if count.failed:
            raise data.DataError(
                f"{folder}: cannot be labelled ({count.failed[0][1]}); delete the folder and run again"
            )
    return splits["train"], splits["test"], labels


# --- The scaling law in small ----------------------------------------------------------------------------------------

# The student learns from pseudo-labels of ever more logs; its supervised twin has labels of the first 30 only.
SCALING_LOGS = {"student": (3, 10, 30, 100), "supervised": (3, 10, 30)}
SCALING_SEEDS = (0, 1, 2)


def scaling_law(settings: TrainSettings, folder: Path) -> dict[str, dict[str, float]]:
    """Error on unseen logs against the number of logs learnt from: scaling_law_*.json, a table, and scaling_law.png.

    Every run has the same number of steps. Runs that are there already are not made again.
    """
    import viz  # matplotlib is loaded only when a picture is asked for

    train_set, test_set, labels = prepare_street(settings)
    recipe = dataclasses.asdict(dataclasses.replace(settings, out="", device="", workers=0, seed=0, resume=False))
    file = folder / f"scaling_law_{_digest(sorted(recipe.items()))[:8]}.json"  # another recipe, another file
    runs = json.loads(file.read_text()) if file.exists() else {}
    teacher = zeroflow.evaluate(test_set, zeroflow.from_labels(zeroflow.open_labels(labels, test_set)))
    baseline = zeroflow.evaluate(test_set, zeroflow.timed(zeroflow.no_motion))
    runs |= {"teacher": teacher["grid_three_way"], "no motion": baseline["grid_three_way"]}
    train_logs = list(train_set.stamps)
    for (kind, amounts), seed in itertools.product(SCALING_LOGS.items(), SCALING_SEEDS):
        for logs in (amount for amount in amounts if amount <= len(train_logs)):
            name = f"{kind}, {logs} logs, seed {seed}"
            if name in runs:
                continue
            print(name)
            where = train_set._folders[train_logs[0]].parent
            part = data.open_dataset(where, true_flow=kind == "supervised")
            part.keys = [key for key in part.keys if key.log_id in train_logs[:logs]]
            samples = Samples([LabelledPairs(part, None if kind == "supervised" else labels, keep=True)])
            chosen = dataclasses.replace(settings, seed=seed, supervised=kind == "supervised")
            model = train(samples, chosen)
            if model is None:
                print("stopped by a signal; the same command goes on")
                return {}
            student = zeroflow.from_student(model.prepare_inference())
            runs[name] = zeroflow.evaluate(test_set, student)["grid_three_way"]
            with zeroflow.atomic_file(file) as out:
                out.write(json.dumps(runs, indent=2).encode())
    points = {
        kind: {
            n: [runs[f"{kind}, {n} logs, seed {seed}"] for seed in SCALING_SEEDS]
            for n in amounts
            if n <= len(train_logs)
        }
        for kind, amounts in SCALING_LOGS.items()
    }
    print(f"\ngrid three-way (m) on {len(test_set)} pairs of unseen logs, seeds {SCALING_SEEDS}; ", end="")
    print(f"no motion {runs['no motion']:.4f}, teacher {runs['teacher']:.4f}")
    for kind, amounts in points.items():
        for logs, values in amounts.items():
            print(f"{kind:10} {logs:4} logs: {statistics.mean(values):.4f}  ({', '.join(f'{v:.4f}' for v in values)})")
    viz.scaling_law_figure(points, runs["teacher"], runs["no motion"]).savefig(folder / "scaling_law.png", dpi=100)
    print(f"wrote {folder / 'scaling_law.png'}")
    return {}


# --- What is learnt from ---------------------------------------------------------------------------------------------


def open_samples(settings: TrainSettings) -> Samples:
    """The labelled pairs of all --data."""
    parts = []
    for i, path in enumerate(settings.data):
        own = {name: getattr(settings, name) for name in ("sweeps_per_log", "pairs_per_log")}
        own = {name: values[i if len(values) > 1 else 0] for name, values in own.items()}
        dataset = zeroflow.open_and_tell(path, dataclasses.replace(settings, **own), true_flow=settings.supervised)
        parts.append(LabelledPairs(dataset, None if settings.supervised else settings.labels[i]))
    return Samples(parts, settings.fraction)


class LabelledPairs(Dataset):
    """What the student learns from: (pc0, pc1, label, has_flow, weight) of every pair with a label, ground removed.

    pc0 (N0, 3), pc1 (N1, 3), label (N0, 3) float32; has_flow (N0,) bool, the rows that count in the loss; weight (N0,).
    labels: None takes the true flow, valid or not, where background weighs 0.1 and foreground 1 (FastFlow3D's loss).
    keep: in memory, once read. Pairs without a label are counted on stderr.
    Raises DataError if there is no label at all.
    """

    def __init__(self, dataset: data.Pairs, labels: str | Path | None, keep: bool = False):
        self.dataset, self.labels = dataset, None if labels is None else zeroflow.open_labels(labels, dataset)
        has_label = set(self.labels.keys if self.labels else dataset.keys)
        self.indices = [index for index, key in enumerate(dataset.keys) if key in has_label]
        self.kept = {} if keep else None
        self.teacher = "true flow" if labels is None else "published"
        if labels is not None and (Path(labels) / "settings.json").exists():
            self.teacher = zeroflow.settings_hash(zeroflow.folder_settings(labels))
        missing = [key for key in dataset.keys if key not in has_label]
        if missing:
            text = f"{labels}: {len(missing)} of {len(dataset)} pairs have no label and are left out"
            print(f"{text}, {tuple(missing[0])} first", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if self.kept is None:
            return self._read(index)
        if index not in self.kept:
            self.kept[index] = self._read(index)
        return self.kept[index]

    def _read(self, index: int) -> tuple[torch.Tensor, ...]:
        pair = self.dataset[self.indices[index]]
        if self.labels is not None:
            label = self.labels.read(pair)
            flow, has_flow, weight = label.flow, label.has_flow, torch.ones(len(pair.pc0))
        elif pair.flow is None:
            raise data.DataError(f"{tuple(pair.key)}: has no true flow to learn from; give a split with annotations")
        else:
            flow, has_flow = pair.flow, zeroflow.input_masks(pair)[0]
            weight = torch.where(pair.category > 0, 1.0, 0.1)
        keep = ~pair.is_ground0
        return pair.pc0[keep], pair.pc1[~pair.is_ground1], flow[keep], has_flow[keep], weight[keep]


STAND_INS = 100  # at most so many are tried for one that cannot be read


class Samples(Dataset):
    """The samples of several `LabelledPairs`, or a share of them, each as (*sample, error).

    Which pairs belong to a share depends on their keys alone, so a smaller share is part of a larger one. Where a
    sample cannot be read, the next that can stands in for it, and `error` says why; else it is "".
    hash: of the list of pairs, and of what made their labels.
    """

    def __init__(self, parts: Sequence[LabelledPairs], fraction: float = 1.0):
        self.rows = [(part, i) for part in parts for i in range(len(part))]
        digests = [_digest(part.dataset.keys[part.indices[i]]) for part, i in self.rows]
        chosen = sorted(range(len(digests)), key=digests.__getitem__)[: max(1, round(fraction * len(digests)))]
        self.rows = [self.rows[i] for i in sorted(chosen)]
        self.hash = _digest([digests[i] for i in sorted(chosen)] + [part.teacher for part in parts])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple:
        errors = []
        for other in range(index, index + min(len(self), STAND_INS)):
            part, i = self.rows[other % len(self)]
            try:
                return *part[i], "; ".join(errors)
            except (data.DataError, OSError) as error:
                errors.append(str(error))
        raise data.DataError(f"none of {len(errors)} pairs in a row can be read; the first: {errors[0]}")


def _digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def batch_of(step: int, count: int, settings: TrainSettings) -> list[int]:
    """Rows of the `count` samples for a step: an epoch shows each at most once, in an order of its own.

    It depends on the seed and the step alone: a resumed run, or one on more GPUs, sees what it would have seen. Fewer
    than a batch are left over at the end of an epoch, other ones each time.
    """
    size = min(settings.batch_size, count)
    epoch, place = divmod(step, steps_per_epoch(count, settings))
    return _order(settings.seed, epoch, count)[place * size : (place + 1) * size]


def steps_per_epoch(count: int, settings: TrainSettings) -> int:
    return count // min(settings.batch_size, count)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(int(_digest((seed, epoch))[:15], 16))
    return torch.randperm(count, generator=generator).tolist()


def micro_batches(step: int, count: int, settings: TrainSettings, rank: int = 0, world: int = 1) -> list[list[int]]:
    """A step's batch in pieces of `micro_batch`, smaller only so that every process has one; those of one process."""
    batch = batch_of(step, count, settings)
    size = min(settings.micro_batch, len(batch) // world)
    return [batch[i : i + size] for i in range(0, len(batch), size)][rank::world]


def load(samples, settings: TrainSettings, first_step: int, rank: int = 0, world: int = 1) -> Iterator[list]:
    """Micro-batches on the device from a step on, without end: lists pc0s, pc1s, labels, has_flow, weights; errors."""
    steps = itertools.count(first_step)
    sampler = (part for step in steps for part in micro_batches(step, len(samples), settings, rank, world))
    is_cuda = settings.device.startswith("cuda")
    loader = DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=settings.workers,
        collate_fn=columns_of,
        pin_memory=is_cuda,
        worker_init_fn=outlive_sigterm,
    )
    for columns, counts, errors in loader:
        columns = [column.to(settings.device, non_blocking=True) for column in columns]
        yield [*(column.split(count) for column, count in zip(columns, counts, strict=True)), errors]


def outlive_sigterm(_) -> None:
    """Clusters send it to a whole group of processes; a worker that died of it would take the last step along."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def columns_of(rows: list[tuple]) -> tuple[list[torch.Tensor], list[list[int]], list[str]]:
    """One tensor a column, since each costs a worker a file handle; how many rows each sample has of it; errors."""
    *columns, errors = zip(*rows, strict=True)
    return [torch.cat(c) for c in columns], [[len(x) for x in c] for c in columns], [e for e in errors if e]


# --- Training --------------------------------------------------------------------------------------------------------


def train(
    samples,
    settings: TrainSettings,
    folder: Path | None = None,
    validate: Callable[[fastflow3d.FastFlow3D], dict] | None = None,
) -> fastflow3d.FastFlow3D | None:
    """Fit a student to samples, a sequence of (pc0, pc1, label, has_flow, weight, error). Checkpoints go to `folder`.

    On one CPU, same seed, same student, however often it was stopped. None if a signal stopped it. Raises DataError
    where too many samples cannot be read, or gradients stay without a finite value.
    """
    rank, world = rank_of()
    state = State(samples_hash=getattr(samples, "hash", ""))
    agree_on(state.samples_hash)
    if len(samples) < world:
        raise data.DataError(f"{len(samples)} pairs for {world} processes; start fewer, or label more")
    torch.manual_seed(settings.seed)
    model = fastflow3d.FastFlow3D(fastflow3d.MODELS[settings.model])
    model.to(settings.device, memory_format=torch.channels_last).train()  # how convolutions are fastest
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    if settings.resume:
        state = restore(folder, model, optimizer, state, settings)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    per_epoch = steps_per_epoch(len(samples), settings)
    total = settings.steps or settings.epochs * per_epoch
    writes = folder is not None and rank == 0
    log = Log(folder if writes else None, state.step)
    if writes and state.step == 0:
        save_last(folder, model, optimizer, state, settings)
    batches = load(samples, settings, state.step, rank, world)
    progress = tqdm(total=total, initial=state.step, desc="student", unit="step", disable=rank > 0)
    with stop_signals() as stopped:
        while state.step < total and not any_of(stopped, settings.device):
            start, step = time.perf_counter(), state.step
            before = [buffer.clone() for buffer in model.buffers()]  # running statistics: part of a step, or not
            is_weighted = step < settings.weighted_share * total and not settings.supervised
            weight = settings.speed_weight if is_weighted else "none"
            mine = len(micro_batches(step, len(samples), settings, rank, world))
            found = gradient(parallel, itertools.islice(batches, mine), mine, weight, settings, stopped)
            if found is None:
                put_back(model, before)
                break
            loss, shown, errors = found
            # Of the whole batch, whatever its parts; without clipping it tells whether all is finite.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf).item()
            optimizer.param_groups[0]["lr"] = learning_rate(step, total, settings)
            if math.isfinite(norm):
                optimizer.step()
            else:
                put_back(model, before)
            optimizer.zero_grad()
            loss, shown, broken = summed(torch.stack([loss, *loss.new_tensor([shown, len(errors)])])).tolist()
            state.count(math.isfinite(norm), int(shown), int(broken), errors, settings)
            pairs_per_s = shown / (time.perf_counter() - start)
            line = {"step": state.step, "loss": loss / shown, "lr": optimizer.param_groups[0]["lr"], "gradient": norm}
            log.write({**line, "weight": weight, "pairs_per_s": pairs_per_s, **state.counts()})
            progress.update()
            if state.step % 50 == 0:
                progress.set_postfix(loss=f"{log.recent_loss():.4f}", pairs_per_s=f"{pairs_per_s:.1f}", weight=weight)
            is_last = state.step == total
            validates = validate is not None and (state.step % (settings.validate_every or per_epoch) == 0 or is_last)
            if writes and (state.step % settings.checkpoint_every == 0 or validates or is_last):
                save_last(folder, model, optimizer, state, settings)
            if writes and validates:
                numbers = validate(model)
                log.write({"step": state.step, **numbers})
                if numbers["paper_three_way"] < state.best:
                    state.best = numbers["paper_three_way"]
                    save(folder / "best.pt", model, optimizer, state, settings)
                    save_last(folder, model, optimizer, state, settings)
    if state.step == total and not stopped:
        return model
    if writes and state.step < total:
        save_last(folder, model, optimizer, state, settings)
    return None


def gradient(
    parallel, batches, count: int, weight: str, settings: TrainSettings, stopped: list[int]
) -> tuple[torch.Tensor, int, list[str]] | None:
    """Add up the gradient of this process's micro-batches: the sum over their samples of the mean over points.

    Returns the sum of losses, on the device (asking for its value waits for the device); how many samples; what could
    not be read. None if a signal came; of several processes none may leave the others waiting, so they stop elsewhere.
    """
    _, world = rank_of()
    autocast = torch.autocast(torch.device(settings.device).type, torch.bfloat16, settings.dtype == "bfloat16")
    loss, shown, every_error = torch.zeros((), device=settings.device), 0, []
    for part, (pc0s, pc1s, labels, has_flow, weights, errors) in enumerate(batches):
        if world == 1 and stopped:
            return None
        with contextlib.nullcontext() if world == 1 or part == count - 1 else parallel.no_sync():
            with autocast:
                flows, is_in_grid = parallel(pc0s, pc1s)
            masks = [known & inside for known, inside in zip(has_flow, is_in_grid, strict=True)]
            part_loss = zeroflow.distillation_loss(flows, labels, masks, weight, weights)
            (part_loss * world).backward()  # several processes average their gradients, and this is a sum
        loss += part_loss.detach()
        shown += len(pc0s)
        every_error += errors
    return None if world == 1 and stopped else (loss, shown, every_error)


@dataclass
class State:
    """Where a run is: everything that a checkpoint holds beside the model, the optimiser and the settings."""

    samples_hash: str = ""  # of the list of pairs that it learns from
    step: int = 0  # steps done
    skipped: int = 0  # of them those whose gradient was not finite, ...
    skipped_in_a_row: int = 0  # ... and how many of these are the last ones
    shown: int = 0  # samples
    broken: int = 0  # of them those that another one stood in for
    best: float = math.inf  # lowest paper_three_way at a validation

    def count(self, is_finite: bool, shown: int, broken: int, errors: list[str], settings: TrainSettings) -> None:
        """A step is done. Raises DataError where this must not go on."""
        self.step += 1
        self.shown += shown
        self.broken += broken
        for error in errors:
            print(f"replaced by another: {error}", file=sys.stderr)
        if broken and self.broken > settings.max_broken * max(100, self.shown):
            raise data.DataError(
                f"{self.broken} of {self.shown} pairs could not be read, more than --max-broken {settings.max_broken}; "
                "mend the data (python zeroflow.py check says where), or allow more"
            )
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 10:
            raise data.DataError(
                f"step {self.step}: the gradient was not finite ten times in a row; go on by --resume true with a "
                "lower --lr, a --clip-norm, or --dtype float32"
            )

    def counts(self) -> dict[str, int]:
        return {"skipped": self.skipped, "broken": self.broken}


def put_back(model: torch.nn.Module, buffers: list[torch.Tensor]) -> None:
    """Undo what an unfinished step did to the running statistics."""
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Of step 0, 1, ...; with `cosine` 5 % of the steps linearly up, and a cosine over all of them down to 0."""
    if not settings.cosine:
        return settings.lr
    return settings.lr * min(1.0, (step + 1) / (0.05 * total)) * 0.5 * (1 + math.cos(math.pi * step / total))


def score(pairs: Sequence[data.SweepPair], max_broken: float, model: fastflow3d.FastFlow3D) -> dict[str, float]:
    """The numbers of a validation: the paper's three-way, and the bucket-normalised one, which may disagree."""
    numbers = zeroflow.evaluate(pairs, zeroflow.from_student(model.prepare_inference()), max_broken=max_broken)
    return {name: numbers[name] for name in ("paper_three_way", "bucketed_dynamic_mean", "grid_three_way")}


# --- Several processes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(settings: TrainSettings) -> Iterator[TrainSettings]:
    """Under torchrun, one process of several, each with a GPU of its own; torchrun ends the others where one dies."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield settings
        return
    is_cuda = settings.device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        settings = dataclasses.replace(settings, device=f"cuda:{os.environ['LOCAL_RANK']}")
    # The others wait while the first one validates.
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        yield settings
    finally:
        dist.destroy_process_group()


def agree_on(text: str) -> None:
    """Raise DataError in all processes unless they have the same: labels may still be coming in."""
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
        if len(set(texts)) > 1:
            raise data.DataError(
                "the processes see different pairs; is labelling still going on? Start when it is done"
            )


def rank_of() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(value: torch.Tensor) -> torch.Tensor:
    """Over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_of(stopped: list, device: str) -> bool:
    """Has any process been told to stop? All of them learn it at the same step."""
    return bool(summed(torch.tensor(float(len(stopped)), device=device))) if dist.is_initialized() else bool(stopped)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C put themselves into, to be looked at where it is safe to stop."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- The run's folder ------------------------------------------------------------------------------------------------

CHECKPOINTS = (".new.pt", "last.pt", "previous.pt")  # newest first; each is whole, or not there


def save_last(folder: Path, model, optimizer, state: State, settings: TrainSettings) -> None:
    """last.pt becomes previous.pt, and the new one last.pt; whenever the power fails, one of the three is whole."""
    new = folder / ".new.pt"
    save(new, model, optimizer, state, settings)
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(new, folder / "last.pt")


def save(file: Path, model, optimizer, state: State, settings: TrainSettings) -> None:
    checkpoint = {
        **fastflow3d.checkpoint_of(model),
        "optimizer": optimizer.state_dict(),
        "state": dataclasses.asdict(state),
        "train_settings": dataclasses.asdict(settings),
    }
    with zeroflow.atomic_file(file) as out:
        torch.save(checkpoint, out)


def newest_checkpoint(folder: Path) -> dict:
    """The newest whole checkpoint of a run. One that is torn is named on stderr. Loads data, never code."""
    torn = []
    for name in CHECKPOINTS:
        if (folder / name).exists():
            try:
                checkpoint = torch.load(folder / name, map_location="cpu", weights_only=True)
                if {"model", "optimizer", "state", "train_settings"} <= set(checkpoint):
                    return checkpoint
                torn.append(f"{folder / name}: is no checkpoint of a run")
            except Exception as error:  # whatever a torn file makes torch raise
                torn.append(f"{folder / name}: is torn ({str(error)[:100]})")
            print(f"{torn[-1]}; taking the one before", file=sys.stderr)
    more = f"; {torn[0]}" if torn else "; to begin a run, give its --data"
    raise data.DataError(f"--resume: {folder} holds no whole checkpoint{more}")


def restore(folder: Path, model, optimizer, state: State, settings: TrainSettings) -> State:
    """Model, optimiser and state as the newest checkpoint has them. Raises DataError if it learns from other pairs."""
    checkpoint = newest_checkpoint(folder)
    stored = State(**checkpoint["state"])
    if stored.samples_hash != state.samples_hash:
        raise data.DataError(
            f"{folder}: its run learns from other pairs than are there now; restore the data and labels"
        )
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    before = checkpoint["train_settings"]
    if (before["val"], before["val_share"]) != (settings.val, settings.val_share):
        stored.best = math.inf  # it was of other pairs
    return stored


class Log:
    """log.jsonl: a line a step, and one a validation. What a resumed run does again is cut off first."""

    def __init__(self, folder: Path | None, step: int):
        self.losses, self.file = collections.deque(maxlen=50), None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(".*.tmp"):  # of a checkpoint that was being written
                left_over.unlink()
            lines = [line for line in read_log(folder) if line["step"] <= step]
            with zeroflow.atomic_file(folder / "log.jsonl") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self.file = open(folder / "log.jsonl", "a")

    def write(self, line: dict) -> None:
        if "loss" in line:
            self.losses.append(line["loss"])
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def recent_loss(self) -> float:
        return statistics.mean(self.losses)


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log; its last one may be torn."""
    lines = []
    if (folder / "log.jsonl").exists():
        for text in (folder / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


# --- Pictures --------------------------------------------------------------------------------------------------------


def draw_curve(folder: Path) -> None:
    """Loss and validation of a run, as curve.png beside its log."""
    import viz  # matplotlib is loaded only when a picture is asked for

    lines = read_log(folder)
    if not lines:
        raise data.DataError(f"{folder}: has no log.jsonl of a run; give the --out of one")
    viz.learning_curve_figure(lines).savefig(folder / "curve.png", dpi=120)
    print(f"wrote {folder / 'curve.png'}")


def draw(file: str, dataset: data.Pairs, estimators: dict[str, zeroflow.Estimator]) -> None:
    """A picture of the first pair: both sweeps, the truth, and what teacher and student make of it."""
    import viz  # matplotlib is loaded only when a picture is asked for

    pair = dataset[0]
    flows = {name: estimators[name](pair)[0] for name in ("teacher", "student") if name in estimators}
    viz.flow_figure(pair, {"truth": pair.flow, **flows}).savefig(file, dpi=80)
    print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
