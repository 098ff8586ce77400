"""The trainer: a student (fastflow3d.py) learns from a teacher's pseudo-labels. One process, one GPU or a CPU.

    python train.py                                              the whole method on a synthetic street, in minutes
    python train.py --data ROOT --labels DIR --val ROOT --model normal ...                  on real, labelled logs

Without --data it makes the street, lets the teacher label it (both are kept in the user's cache folder), trains a small
student and compares all on logs that neither has seen. Every field of `TrainSettings` is an option --name value.

Where the street's recipe departs from the paper (Adam at 2e-6 for 50 epochs of 64 pairs a step, no clipping): see the
settings' comments.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import fastflow3d
import nsfp
import synthetic
import zeroflow


@dataclass(frozen=True)
class TrainSettings:
    """One flat list. The defaults train on the street, in minutes on two cores."""

    # What to learn from. Without `data`, the street.
    data: str = ""  # a split or a log
    labels: str = ""  # its labels, as `python zeroflow.py label` writes them
    val: str = ""  # a split or a log with annotations, to evaluate on at the end
    ground: str = ""  # raster, vector, points, none; empty: the first that there is. See data.open_dataset
    pairs_per_log: int = 0  # 12 of LiDAR logs: the paper's 3x; 24: 5x; 0: all
    sweeps_per_log: int = 0  # the first ones; 145 as the published code; 0: all
    poses: str = ""  # of a folder of clouds, if not beside them
    rate_hz: float = 10.0  # of clouds without time stamps
    out: str = "student.pt"  # the trained student
    picture: str = ""  # a PNG or PDF file for a bird's-eye view of a pair that the student has not seen

    # The student and how it learns.
    model: str = "narrow"  # narrow, normal or xl: see fastflow3d.MODELS
    steps: int = 1500
    pairs_per_step: int = 1  # the paper: 64
    learning_rate: float = 2e-3  # of Adam, after 5 % warm-up, then cosine to 0. The paper: constant 2e-6
    speed_weight: str = "formula"  # formula, published or none: see zeroflow.speed_weight
    weighted_share: float = 0.5  # of the steps, the first ones, weigh points by speed, the rest not. The paper: 1
    clip_norm: float = 0.5  # of the gradient, 0 for none, as the paper
    precision: str = "float32"  # of the U-Net, as the paper; or bfloat16: faster on processors that know it
    seed: int = 0
    device: str = ""  # cpu or cuda; empty: cuda where there is one
    loader_workers: int = 0  # processes that read pairs ahead; worth it on real logs

    # The street, where `data` is empty.
    train_logs: int = 30
    test_logs: int = 6


STREET = synthetic.PRESETS["small"]
# Half the work of `fast`; and points so sparse form clusters, and meet sweep 1, from farther away.
STREET_TEACHER = dataclasses.replace(
    nsfp.TEACHERS["fast"], priors=2, iterations=150, cluster_reach=0.8, cluster_points=5, confirm_reach=0.5
)
PRECISIONS = ("float32", "bfloat16")
TRAIN_SEED, TEST_SEED = 0, 1  # of the street's logs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Train a student on pseudo-labels; without --data, do all of ZeroFlow on a synthetic street.",
        epilog="example: python train.py --data av2/train --labels labels --val av2/val --model normal",
    )
    zeroflow.add_settings(parser, TrainSettings)
    settings = zeroflow.chosen_settings(parser.parse_args(argv), TrainSettings())
    try:
        run(settings)
    except (data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(settings: TrainSettings) -> dict[str, dict[str, float]]:
    """Train, save, evaluate, print. Returns the rows of the printed table."""
    settings = dataclasses.replace(settings, device=settings.device or zeroflow.default_device())
    check_settings(settings)
    print(f"settings: {settings}")
    if settings.data:
        train_set, labels = zeroflow.open_and_tell(settings.data, settings, true_flow=False), settings.labels
        whole = dataclasses.replace(settings, pairs_per_log=0, sweeps_per_log=0)  # those are of what is learnt from
        test_set, test_labels = (zeroflow.open_and_tell(settings.val, whole) if settings.val else None), None
        samples = LabelledPairs(train_set, labels)
    else:
        train_set, test_set, labels = prepare_street(settings)
        test_labels = labels
        labelled = LabelledPairs(train_set, labels)
        samples = [labelled[index] for index in range(len(labelled))]  # small enough to stay in memory
    model = train(samples, settings)
    with zeroflow.atomic_file(Path(settings.out)) as file:
        torch.save({**fastflow3d.checkpoint_of(model), "train_settings": dataclasses.asdict(settings)}, file)
    print(f"wrote {settings.out}")
    if test_set is None:
        return {}

    estimators = {
        "no motion": zeroflow.timed(zeroflow.no_motion),
        "nearest": zeroflow.timed(zeroflow.nearest_neighbour),
    }
    if test_labels is not None:
        estimators["teacher"] = zeroflow.from_labels(zeroflow.open_labels(test_labels, test_set))
    estimators["student"] = zeroflow.from_student(model.prepare_inference())
    with zeroflow.one_thread():  # for every row of the table, so that times can be compared
        rows = {name: zeroflow.evaluate(test_set, estimator) for name, estimator in estimators.items()}
        if "teacher" in rows:  # its labels were made by several processes at once: time it again, alone as the others
            again = zeroflow.from_teacher(STREET_TEACHER)
            rows["teacher"]["seconds_per_pair"] = statistics.median(again(test_set[index])[1] for index in range(3))
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
    if settings.model not in fastflow3d.MODELS:
        raise data.DataError(f"--model {settings.model!r}: choose one of {', '.join(fastflow3d.MODELS)}")
    if bool(settings.data) != bool(settings.labels):
        raise data.DataError(
            "--data and --labels go together: the logs, and the folder `zeroflow.py label` wrote for them"
        )
    if settings.val and not settings.data:
        raise data.DataError("--val needs --data and --labels; without them the street is trained and tested on")
    if settings.picture and settings.data and not settings.val:
        raise data.DataError("--picture shows a pair of --val, which is not given")
    if settings.speed_weight not in ("formula", "published", "none"):
        raise data.DataError(f"--speed-weight {settings.speed_weight!r}: choose formula, published or none")
    if settings.precision not in PRECISIONS:
        raise data.DataError(f"--precision {settings.precision!r}: choose one of {', '.join(PRECISIONS)}")
    if settings.steps < 1 or settings.pairs_per_step < 1:
        raise data.DataError(
            f"--steps {settings.steps} --pairs-per-step {settings.pairs_per_step}: both must be positive"
        )
    if Path(settings.out).is_dir():
        raise data.DataError(f"--out {settings.out}: is a folder; give the name of a file")
    zeroflow.check_device(settings.device)


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


# --- Training --------------------------------------------------------------------------------------------------------


class LabelledPairs(Dataset):
    """What the student learns from: (pc0, pc1, label, has_flow) of every pair that has a label, ground removed.

    pc0 (N0, 3), pc1 (N1, 3), label (N0, 3) float32; has_flow (N0,) bool, the rows that count in the loss.
    Pairs without a label are counted on stderr. Raises DataError if there is no label at all.
    """

    def __init__(self, dataset: data.Pairs, labels: str | Path):
        self.dataset, self.labels = dataset, zeroflow.open_labels(labels, dataset)
        has_label = set(self.labels.keys)
        self.indices = [index for index, key in enumerate(dataset.keys) if key in has_label]
        missing = [key for key in dataset.keys if key not in has_label]
        if missing:
            text = f"{labels}: {len(missing)} of {len(dataset)} pairs have no label and are left out"
            print(f"{text}, {tuple(missing[0])} first", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        pair = self.dataset[self.indices[index]]
        label = self.labels.read(pair)
        keep = ~pair.is_ground0
        return pair.pc0[keep], pair.pc1[~pair.is_ground1], label.flow[keep], label.has_flow[keep]


def train(samples, settings: TrainSettings) -> fastflow3d.FastFlow3D:
    """Fit a new student to samples, a sequence of (pc0, pc1, label, has_flow). On one CPU, same seed, same student."""
    torch.manual_seed(settings.seed)
    model = fastflow3d.FastFlow3D(fastflow3d.MODELS[settings.model])
    model.to(settings.device, memory_format=torch.channels_last).train()  # how convolutions are fastest
    autocast = torch.autocast(torch.device(settings.device).type, torch.bfloat16, settings.precision == "bfloat16")
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    recent_loss = 0.0  # summed on the device: asking for its value waits for the device, so not every step
    progress = tqdm(batches(samples, settings), total=settings.steps, desc="student", unit="step")
    for step, (pc0s, pc1s, labels, has_flow) in enumerate(progress):
        with autocast:
            flows, is_in_grid = model(pc0s, pc1s)
        masks = [known & inside for known, inside in zip(has_flow, is_in_grid, strict=True)]
        weight = settings.speed_weight if step < settings.weighted_share * settings.steps else "none"
        loss = zeroflow.distillation_loss(flows, labels, masks, weight) / len(flows)  # a mean, so that clip_norm stays
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        optimizer.step()
        recent_loss += loss.detach()
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{recent_loss.item() / 50:.4f}", weight=weight)
            recent_loss = 0.0
    return model


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Of step 0, 1, ...: 5 % of the steps linearly up, and a cosine over all of them down to 0."""
    warm_up = min(1.0, (step + 1) / (0.05 * settings.steps))
    return settings.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def batches(samples, settings: TrainSettings) -> Iterator[list[list[torch.Tensor]]]:
    """`steps` batches on the device, each as four lists: pc0s, pc1s, labels, has_flow. Shuffled anew each epoch."""
    loader = DataLoader(
        samples,
        batch_size=settings.pairs_per_step,
        shuffle=True,
        num_workers=settings.loader_workers,
        collate_fn=columns_of,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    step = 0
    while step < settings.steps:
        for batch in loader:
            yield [[tensor.to(settings.device) for tensor in column] for column in batch]
            step += 1
            if step == settings.steps:
                return


def columns_of(rows: list[tuple[torch.Tensor, ...]]) -> list[list[torch.Tensor]]:
    """Ragged batches are lists of tensors."""
    return [list(column) for column in zip(*rows, strict=True)]


def draw(file: str, dataset: data.Pairs, estimators: dict[str, zeroflow.Estimator]) -> None:
    """A picture of the first pair: both sweeps, the truth, and what teacher and student make of it."""
    import viz  # matplotlib is loaded only when a picture is asked for

    pair = dataset[0]
    flows = {name: estimators[name](pair)[0] for name in ("teacher", "student") if name in estimators}
    viz.flow_figure(pair, {"truth": pair.flow, **flows}).savefig(file, dpi=80)
    print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
