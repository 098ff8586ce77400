"""Three experiments on synthetic streets, which need minutes or hours of two cores.

    python experiments.py scaling-law --out law    error against the number of logs to learn from
    python experiments.py why                      how labels are wrong, and what students learn
    python experiments.py weights --out world      train the student that is in weights/

The first shows the paper's claim: with enough unlabeled logs, a student beats its teacher, and
also a network that learned from human labels of fewer logs. The second shows why this can happen.
Both use the street of `python train.py`. The third makes streets of all kinds, seen by several
kinds of LiDAR, for a student that should work on clouds of any LiDAR.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import data
import demo
import fastflow3d
import labels
import nsfp
import synthetic
import train
import zeroflow
from data import DataError

# --- The scaling law in small ---------------------------------------------------------------------
# Pseudo-labels are cheap, so a student can learn from many more logs than people could label. Its
# supervised twin learns from the true flow of the first 30 logs only.

STUDENT, SUPERVISED, BETTER = "student", "supervised", "student of the better teacher"
SCALING_LOGS = {STUDENT: (3, 10, 30, 100, 300), SUPERVISED: (3, 10, 30), BETTER: (100, 300)}
SCALING_SEEDS = {STUDENT: (0, 1, 2), SUPERVISED: (0, 1, 2), BETTER: (0,)}
VALIDATION_SEED, VALIDATION_LOGS = 2, 12

# All are trained until more steps no longer help. The rule is the same for all: the steps are
# doubled as long as this lowers the error of seed 0 on validation logs by 3 %. More logs never need
# fewer steps. The limit is 8,000 steps, or as many as it takes to show each pair ten times.
LEAST_STEPS, MOST_STEPS, WORTHWHILE, LEAST_SHOWN = 1000, 8000, 0.97, 10
DOUBT = 1.5  # students leave out the points that their teacher was not sure about


class ScalingLaw:
    """Errors of students that were trained on more and more logs; each is a file in `folder`.

    Existing results are not trained again, so the command may be killed and repeated, and several
    processes may train different kinds of students side by side.
    """

    def __init__(self, settings: train.TrainSettings, street: demo.DemoSettings, folder: Path):
        train.check_device(settings.device)
        self.settings, self.folder, self.most_logs = settings, folder, street.train_logs
        _, self.test_set, self.label_folder = demo.prepare_street(street)
        val_set = demo.open_street("val", VALIDATION_SEED, VALIDATION_LOGS, true_flow=True)
        self.unseen = {"test": self.test_set, "validation": val_set}

        # Another recipe or another street has other files of results.
        recipe = dataclasses.replace(settings, out="", device="", workers=0, seed=0, steps=None)
        what = (recipe, street.test_logs, demo.cache_folder().name, demo.BETTER_TEACHER)
        self.digest = hashlib.sha256(repr(what).encode()).hexdigest()[:8]

    def train_all(self, kind: str) -> None:
        """Train the students of a kind: first seed 0 of all amounts, which finds the steps."""
        for seed in SCALING_SEEDS[kind]:
            for logs in self.amounts(kind):
                self.errors(kind, logs, seed, self.steps(kind, logs))

    def amounts(self, kind: str) -> list[int]:
        return [logs for logs in SCALING_LOGS[kind] if logs <= self.most_logs]

    def steps(self, kind: str, logs: int) -> int:
        """How many steps help; the better teacher's students take as many as the other's."""
        kind = STUDENT if kind == BETTER else kind
        steps = LEAST_STEPS
        for amount in self.amounts(kind):
            error = self.errors(kind, amount, 0, steps)["validation"]
            while steps < self.most_steps(amount):
                longer = self.errors(kind, amount, 0, 2 * steps)["validation"]
                if longer > WORTHWHILE * error:
                    break
                steps, error = 2 * steps, longer
            if amount == logs:
                return steps
        raise ValueError(f"{logs} logs: not one of {self.amounts(kind)}")

    def most_steps(self, logs: int) -> int:
        """Where doubling ends for an amount of logs."""
        steps, pairs = MOST_STEPS, logs * (demo.STREET.sweeps - 1)
        while steps < LEAST_SHOWN * pairs:
            steps *= 2
        return steps

    def errors(self, kind: str, logs: int, seed: int, steps: int) -> dict[str, float]:
        """Grid three-ways of a student on test and validation logs. Raises KeyboardInterrupt."""
        file = self.folder / f"{kind}, {logs} logs, {steps} steps, seed {seed}, {self.digest}.json"
        if file.exists():
            return demo.read_json(file, "delete it and run again")
        print(f"{kind}: {logs} logs, {steps} steps, seed {seed}")
        # Its labels: true flow, or those of a teacher, which are made once and kept.
        is_supervised = kind == SUPERVISED
        part = demo.open_street("train", demo.TRAIN_SEED, logs, true_flow=is_supervised)
        source = None if is_supervised else self.label_folder
        if kind == BETTER:
            source = self.label_folder.with_name("labels of the better teacher")
            labels.label_dataset(part, source, demo.BETTER_TEACHER, demo.GRID)
        # The true flow of a twin has no doubtful points.
        doubt = None if is_supervised else self.settings.doubt
        pairs = train.LabeledPairs(part, source, demo.GRID, keep=True, doubt=doubt)
        samples = train.Samples([pairs])
        changes = {"seed": seed, "steps": steps, "supervised": is_supervised, "doubt": doubt}
        model = train.train(samples, dataclasses.replace(self.settings, **changes))
        if model is None:  # a signal came; an unfinished training is not kept
            raise KeyboardInterrupt
        student = zeroflow.from_student(model.prepare_inference())
        errors = {name: error_of(student, unseen) for name, unseen in self.unseen.items()}
        with data.atomic_file(file) as out:
            out.write(json.dumps(errors).encode())
        return errors

    def show(self) -> None:
        """Print all errors and draw them; missing students are trained first."""
        # The teacher's labels of the test logs are there already.
        test_labels = labels.open_labels(self.label_folder, self.test_set)
        lines = {"no-motion": zeroflow.from_baseline("no-motion", demo.GRID)}
        lines["teacher"] = labels.from_labels(test_labels)
        lines["better teacher"] = zeroflow.from_teacher(demo.BETTER_TEACHER, demo.GRID)
        levels = {name: error_of(estimator, self.test_set) for name, estimator in lines.items()}
        found = ", ".join(f"{name} {error:.4f}" for name, error in levels.items())
        print(f"\ngrid three-way (m) on {len(self.test_set)} pairs of unseen logs; {found}")
        points = {}  # kind -> logs -> errors, one per seed
        for kind, seeds in SCALING_SEEDS.items():
            points[kind] = {}
            for logs in self.amounts(kind):
                steps = self.steps(kind, logs)
                values = [self.errors(kind, logs, seed, steps)["test"] for seed in seeds]
                points[kind][logs] = values
                each = ", ".join(f"{value:.4f}" for value in values)
                print(
                    f"{kind:28} {logs:4} logs, {steps:6} steps: {statistics.mean(values):.4f}",
                    end="",
                )
                print(f"  ({each})")
        import viz  # matplotlib is loaded only when a picture is drawn

        viz.scaling_law_figure(points, levels).savefig(self.folder / "scaling_law.png", dpi=100)
        print(f"wrote {self.folder / 'scaling_law.png'}")


@zeroflow.one_thread()  # on a busy machine, threads would wait for each other
def error_of(estimator: zeroflow.Estimator, dataset: data.Pairs) -> float:
    """The grid three-way of a method, in meters."""
    return zeroflow.evaluate(dataset, estimator, demo.GRID).numbers["grid_three_way"]


# --- Why a student may beat its teacher -----------------------------------------------------------

WHY_LOGS, WHY_STEPS, WHY_SEEDS = 30, 3000, (0, 1, 2)


def why(settings: train.TrainSettings, street: demo.DemoSettings) -> None:
    """Print the errors of labels, and of students that are trained with either of two losses.

    A distance teaches the student the median of the labels of similar points, a squared error their
    mean. If a label is right in one pair and far off in the next, the two differ.
    """
    train.check_device(settings.device)
    _, test_set, label_folder = demo.prepare_street(street)
    truth = demo.open_street("train", demo.TRAIN_SEED, street.train_logs, true_flow=True)
    label_of = labels.from_labels(labels.open_labels(label_folder, truth))
    # First the labels of all training pairs, measured against a truth that no student sees.
    names = ("FD", "too short", "missed", "FS", "BS")
    print(f"\n{'':40}" + "".join(f"{name:>11}" for name in names))
    _print_row(f"labels of {street.train_logs} logs", wrong_by_group(truth, label_of))

    part = demo.open_street("train", demo.TRAIN_SEED, street.train_logs, true_flow=False)
    # No --doubt: here the students are to show the errors of all labels.
    samples = train.Samples([train.LabeledPairs(part, label_folder, demo.GRID, keep=True)])
    # Then students with either loss, on logs that they have not seen.
    for is_squared in (False, True):
        for seed in WHY_SEEDS:
            changes = {"seed": seed, "squared_error": is_squared}
            model = train.train(samples, dataclasses.replace(settings, **changes))
            if model is None:
                raise KeyboardInterrupt
            student = zeroflow.from_student(model.prepare_inference())
            name = f"student, {'squared error' if is_squared else 'distance'}, seed {seed}"
            _print_row(name, wrong_by_group(test_set, student))
    label_of = labels.from_labels(labels.open_labels(label_folder, test_set))
    _print_row("the teacher, on the same unseen logs", wrong_by_group(test_set, label_of))


@zeroflow.one_thread()
def wrong_by_group(dataset: data.Pairs, estimator: zeroflow.Estimator) -> list[float]:
    """Errors in meters of moving foreground (FD), static foreground (FS), and background (BS).

    After the first: by how much the flow of FD is too short along the true one, in meters (its
    bias), and the share of FD that gets less than half of its motion.
    """
    sums = np.zeros((2, 5))  # of values, and how many there were
    for pair in dataset:
        is_scored = pair.is_valid & data.input_masks(pair, demo.GRID)[0]
        flow, truth = estimator(pair).flow[is_scored], pair.flow[is_scored]
        error, length = (flow - truth).norm(dim=1), truth.norm(dim=1).clamp(min=1e-9)
        along = (flow * truth).sum(dim=1) / length
        moves, is_foreground = pair.is_dynamic[is_scored], (pair.category > 0)[is_scored]
        moving = moves & is_foreground
        parts = [error[moving], (length - along)[moving], (along < 0.5 * length)[moving].float()]
        parts += [error[~moves & is_foreground], error[~is_foreground]]
        sums += [[part.sum().item() for part in parts], [len(part) for part in parts]]
    return (sums[0] / sums[1].clip(min=1)).tolist()


def _print_row(name: str, values: list[float]) -> None:
    print(f"{name:40}" + "".join(f"{value:11.4f}" for value in values), flush=True)


# --- Weights for any LiDAR ------------------------------------------------------------------------

WORLD = synthetic.PRESETS["world"]
WORLD_LOGS, WORLD_SEED = 600, 10
WORLD_VALIDATION_LOGS, WORLD_VALIDATION_SEED = 10, 11


def weights(settings: train.TrainSettings, logs: int, out: Path) -> None:
    """Train a student on streets of all kinds, and write its weights into out/street.pt.

    settings: of the preset `world`; if supervised, it learns from the true flow. Existing files are
    kept, so the command may be killed and repeated.
    """
    for name, seed, count in (
        ("train", WORLD_SEED, logs),
        ("val", WORLD_VALIDATION_SEED, WORLD_VALIDATION_LOGS),
    ):
        synthetic.write_logs(out / name, count, dataclasses.replace(WORLD, seed=seed))
    label_folders = ()
    if not settings.supervised:
        label_folders = (str(out / "labels"),)
        pairs = data.open_dataset(out / "train", true_flow=False)
        grid = fastflow3d.MODELS[settings.model].half_extent_m
        labels.label_dataset(pairs, label_folders[0], nsfp.TEACHERS["fast"], grid)
    run = out / ("run from true flow" if settings.supervised else "run")
    places = {"data": (str(out / "train"),), "labels": label_folders, "val": str(out / "val")}
    resume = (run / "last.pt").exists()
    changes = {**places, "out": str(run), "resume": resume}
    if not train.run(dataclasses.replace(settings, **changes)):
        raise KeyboardInterrupt  # a signal came

    # Half precision halves the file. It changes flow by less than a millimeter.
    student = fastflow3d.load_checkpoint(run / "last.pt").half()
    with data.atomic_file(out / "street.pt") as file:
        torch.save(fastflow3d.checkpoint_of(student), file)
    print(f"wrote {out / 'street.pt'}")
    show_by_speed(data.open_dataset(out / "val"), out / "street.pt")


# Lowest true speeds of each range (m/s). Static points are a range of their own, the first one.
SPEED_RANGES_MPS = (0.0, 0.5, 2.0, 5.0, 10.0, 15.0)


def show_by_speed(validation: data.Pairs, checkpoint: Path) -> None:
    """Print the errors of no-motion, the `fast` teacher and a student by the true speed."""
    model = fastflow3d.load_checkpoint(checkpoint)
    grid = model.settings.half_extent_m
    methods = {
        "no-motion": zeroflow.from_baseline("no-motion", grid),
        "fast": zeroflow.from_teacher(nsfp.TEACHERS["fast"], grid),
        "student": zeroflow.from_student(model.prepare_inference()),
    }
    ends = [f"to {low:g} m/s" for low in SPEED_RANGES_MPS[1:]] + ["faster"]
    print(f"\nend-point errors (m) of foreground by true speed, on {len(validation)} pairs")
    print(f"{'':12}" + "".join(f"{name:>12}" for name in ends))
    for name, estimator in methods.items():
        errors, counts = errors_by_speed(validation, estimator, grid)
        if name == "no-motion":  # the same points for all
            print(f"{'points':12}" + "".join(f"{count:12}" for count in counts))
        print(f"{name:12}" + "".join(f"{error:12.4f}" for error in errors), flush=True)


@zeroflow.one_thread()
def errors_by_speed(
    dataset: data.Pairs, estimator: zeroflow.Estimator, grid: Sequence[float]
) -> tuple[list[float], list[int]]:
    """Mean end-point error in meters of foreground in each of SPEED_RANGES_MPS, and its points.

    A range without points has the error NaN.
    """
    borders = torch.tensor(SPEED_RANGES_MPS[1:])
    sums, counts = torch.zeros(len(SPEED_RANGES_MPS)), torch.zeros(len(SPEED_RANGES_MPS))
    for pair in dataset:
        is_scored = pair.is_valid & data.input_masks(pair, grid)[0] & (pair.category > 0)
        truth = pair.flow[is_scored]
        error = (estimator(pair).flow[is_scored] - truth).norm(dim=1)
        # LiDARs turn 10 or 20 times a second, so that the same flow may be two speeds.
        speed_mps = truth.norm(dim=1) / pair.seconds
        place = torch.bucketize(speed_mps, borders, right=True)
        sums.index_add_(0, place, error)
        counts += place.bincount(minlength=len(counts))
    return (sums / counts).tolist(), counts.int().tolist()


def main(argv: list[str] | None = None) -> int:
    """Run `python experiments.py scaling-law`, `why` or `weights`. Returns the exit status."""
    example = "example: python experiments.py scaling-law --out law"
    parser = argparse.ArgumentParser(description="Experiments on streets.", epilog=example)
    about = (
        "scaling-law: train on more and more logs; why: compare the errors of labels and students; "
        "weights: train a student for any LiDAR"
    )
    parser.add_argument("command", choices=["scaling-law", "why", "weights"], help=about)
    parser.add_argument("--out", default="law", type=Path, help="folder for what is made")
    about = f"most logs to learn from (default: 300; why: {WHY_LOGS}; weights: {WORLD_LOGS})"
    parser.add_argument("--train-logs", type=int, help=about)
    parser.add_argument("--only", choices=SCALING_LOGS, help="train only students of this kind")
    about = "weights: learn from the true flow instead of labels"
    parser.add_argument("--supervised", action="store_true", help=about)
    about = "weights: how many (default: the preset's)"
    parser.add_argument("--steps", type=int, help=about)
    about = "weights: begin with those of this checkpoint (default: random ones)"
    parser.add_argument("--init", help=about)
    parser.add_argument("--dtype", choices=train.DTYPES, default="float32", help="of the U-Net")
    given = parser.parse_args(argv)
    try:
        if given.command == "weights":
            changes = {"supervised": given.supervised, "init": given.init}
            changes |= {} if given.steps is None else {"steps": given.steps}
            settings = train.resolve({"preset": "world", "data": ("world",), **changes})
            weights(settings, given.train_logs or WORLD_LOGS, given.out)
            return 0
        settings = train.resolve({"preset": "street", "dtype": given.dtype})
        if given.command == "why":
            settings = dataclasses.replace(settings, steps=WHY_STEPS)
            why(settings, demo.DemoSettings(given.train_logs or WHY_LOGS))
            return 0
        # Several processes may train one kind each; without --only, the rest is trained and drawn.
        most_logs = 300 if given.train_logs is None else given.train_logs
        settings = dataclasses.replace(settings, doubt=DOUBT)
        law = ScalingLaw(settings, demo.DemoSettings(most_logs), given.out)
        if given.only:
            law.train_all(given.only)
        else:
            law.show()
    except KeyboardInterrupt:
        print("stopped by a signal; repeat the same command to continue")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
