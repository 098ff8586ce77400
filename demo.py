"""The whole method on a small street that needs no download: `python train.py` without --data.

It writes a synthetic street (synthetic.py), lets the teacher label it (nsfp.py), trains the
smallest student on the labels, and compares both with two baselines on logs that the student never
saw. The street and its labels are kept in the user's cache folder.

    python train.py --out run        the demo; takes options of the trainer, too

Experiments on the same street are in experiments.py.

Labels, training and scores all use the grid of the smallest student: |x|, |y| < 25.6 m, |z| < 3 m.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import data
import fastflow3d
import labels
import nsfp
import runs
import synthetic
import train
import zeroflow
from data import DataError


@dataclass(frozen=True)
class DemoSettings:
    """What the demo needs besides the settings of the trainer."""

    train_logs: int = 200  # logs of the street to learn from
    test_logs: int = 6  # logs of the street to compare on, which the student never sees
    picture: str | None = None  # draw an unseen pair from above into this PNG or PDF file


GRID = fastflow3d.MODELS["narrow"].half_extent_m
STREET = synthetic.PRESETS["small"]
TRAIN_SEED, TEST_SEED = 0, 1  # of the street's logs

# The street's teacher is a hasty `fast`: one network, half of the steps, and it accepts a motion as
# soon as it explains sweep 1 better than no motion does. So it finds more of the moving points, but
# also moves some static ones. The better teacher takes twice as long. On the street, points are
# sparse: the points of one object, and a moved point and sweep 1, are farther apart.
_SPARSE = {"cluster_reach": 0.8, "cluster_points": 5, "confirm_reach": 0.5, "iterations": 150}
STREET_TEACHER = dataclasses.replace(nsfp.TEACHERS["fast"], priors=1, evidence=1.0, **_SPARSE)
BETTER_TEACHER = dataclasses.replace(nsfp.TEACHERS["fast"], priors=2, **_SPARSE)

NSFP_ITERATIONS = 100  # of the paper's teacher, which are timed; a whole fit takes over a minute

# Raise it when the code of the street or the teacher changes so that the same settings give other
# logs or labels. Otherwise users keep the logs and labels of an older version.
CACHE_VERSION = 5


def run(settings: train.TrainSettings, demo: DemoSettings) -> dict[str, dict[str, float]]:
    """Label, train, compare and print. Returns the rows of the table; after a signal, none."""
    train.check_settings(settings)
    folder = Path(settings.out)
    demo = _resumed(demo, folder) if settings.resume else demo
    train.print_settings(settings)
    train.print_settings(demo)
    train_set, test_set, label_folder = prepare_street(demo)
    with data.atomic_file(folder / "demo.json") as file:
        file.write(json.dumps(dataclasses.asdict(demo), indent=2).encode())

    # The street fits into memory, so each pair is read from disk only once.
    pairs = train.LabeledPairs(train_set, label_folder, GRID, keep=True, doubt=settings.doubt)
    model = train.train_in_folder(train.Samples([pairs], settings.fraction), settings)
    if model is None:
        return {}
    import viz  # matplotlib is loaded only when a picture is drawn

    viz.learning_curve_figure(runs.read_log(folder)).savefig(folder / "curve.png", dpi=120)
    print(f"wrote {folder / 'curve.png'}")

    estimators = {name: zeroflow.from_baseline(name, GRID) for name in zeroflow.BASELINES}
    estimators["teacher"] = labels.from_labels(labels.open_labels(label_folder, test_set))
    estimators["student"] = zeroflow.from_student(model.prepare_inference())
    rows = compare(test_set, estimators, settings.max_broken)
    where = "the street, of logs that the student never saw"
    print(f"\n{len(test_set)} pairs of {where}; {train.units(settings.device)}")
    print(zeroflow.table(rows))
    student_s = rows["student"]["seconds_per_pair"]
    times = rows["teacher"]["seconds_per_pair"] / student_s
    paper = dataclasses.replace(nsfp.TEACHERS["nsfp"], iterations=NSFP_ITERATIONS)
    slow = seconds_of(paper, test_set, 2) / student_s
    print(f"the student is {times:.0f} times faster than its teacher; {slow:.0f} times faster")
    print(f"than {NSFP_ITERATIONS} iterations of the paper's `nsfp`, which takes several hundred")
    if demo.picture:
        pair = test_set[0]
        with zeroflow.one_thread():
            flows = {name: estimators[name](pair).flow for name in ("teacher", "student")}
        viz.flow_figure(pair, {"truth": pair.flow, **flows}).savefig(demo.picture, dpi=80)
        print(f"wrote {demo.picture}")
    return rows


def _resumed(demo: DemoSettings, folder: Path) -> DemoSettings:
    """The demo of the run in this folder. Raises DataError if other logs are asked for."""
    remedy = "begin a new run with another --out"
    stored = DemoSettings(**read_json(folder / "demo.json", remedy, DemoSettings))
    for name in ("train_logs", "test_logs"):
        wanted, kept = getattr(demo, name), getattr(stored, name)
        if wanted not in (kept, getattr(DemoSettings, name)):
            option = f"--{name.replace('_', '-')} {wanted}"
            raise DataError(f"{option}: the run was begun with {kept}; a resumed run keeps it")
    return dataclasses.replace(stored, picture=demo.picture)


def read_json(file: Path, remedy: str, kind: type | None = None) -> dict:
    """The content of a JSON file; kind: its dataclass, perhaps stored by another version."""
    try:
        found = dict(json.loads(file.read_text()))
        return found if kind is None else runs.fitted(found, kind)[0]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: is torn, or not JSON ({error}); {remedy}") from error


def compare(
    test_set: data.Pairs, estimators: dict[str, zeroflow.Estimator], max_broken: float
) -> dict[str, dict[str, float]]:
    """The numbers of some methods, all with one CPU thread, so that times can be compared."""
    rows = {}
    with zeroflow.one_thread():
        for name, each in estimators.items():
            rows[name] = zeroflow.evaluate(test_set, each, GRID, max_broken=max_broken).numbers

    # The labels were made by several processes side by side, each slower than one alone.
    rows["teacher"]["seconds_per_pair"] = seconds_of(STREET_TEACHER, test_set, 3)
    return rows


@zeroflow.one_thread()
def seconds_of(teacher: nsfp.NSFPSettings, dataset: data.Pairs, pairs: int) -> float:
    """The median time that a teacher needs for one of the first pairs."""
    estimator = zeroflow.from_teacher(teacher, GRID)
    return statistics.median(estimator(dataset[index]).seconds for index in range(pairs))


# --- The street -----------------------------------------------------------------------------------


def prepare_street(demo: DemoSettings) -> tuple[data.Pairs, data.Pairs, Path]:
    """Training pairs, test pairs, and the folder with the labels of both; made if not cached."""
    if demo.train_logs < 1 or demo.test_logs < 1:
        found = f"--train-logs {demo.train_logs} --test-logs {demo.test_logs}"
        raise DataError(f"{found}: give 1 or more of each")
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); {_CACHE_REMEDY}") from error
    for old in folder.parent.glob("street-*"):
        if old != folder:
            shutil.rmtree(old)
            print(f"removed {old}: a street of other settings, or of an older version")
    print(f"street and labels: {folder}")

    # Neither the student nor its teacher needs the true flow of the training pairs.
    train_set = open_street("train", TRAIN_SEED, demo.train_logs, true_flow=False)
    test_set = open_street("test", TEST_SEED, demo.test_logs, true_flow=True)
    for dataset in (train_set, test_set):
        count = labels.label_dataset(dataset, folder / "labels", STREET_TEACHER, GRID)
        if count.failed:
            what = f"cannot be labeled ({count.failed[0][1]})"
            raise DataError(f"{folder}: {what}; delete the folder and run again")
    return train_set, test_set, folder / "labels"


_CACHE_REMEDY = "set XDG_CACHE_HOME to a folder for the street and its labels"


def cache_folder() -> Path:
    """Where the street and its labels are kept; other settings have another folder."""
    what = (CACHE_VERSION, STREET, STREET_TEACHER, GRID, TRAIN_SEED, TEST_SEED)
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # in a container, a user may have no home
        raise DataError(f"you have no home folder here; {_CACHE_REMEDY}") from error
    return caches / "zeroflow" / f"street-{digest}"


def open_street(split: str, seed: int, logs: int, true_flow: bool) -> data.Pairs:
    """The pairs of the first logs of a split; logs that are missing are written."""
    folder = cache_folder() / split
    synthetic.write_logs(folder, logs, dataclasses.replace(STREET, seed=seed))

    # Another run may have written more logs than this one asks for.
    dataset = data.open_dataset(folder, true_flow=true_flow)
    chosen = set(list(dataset.stamps)[:logs])
    return data.subset(dataset, [key for key in dataset.pair_keys if key.log_id in chosen])
