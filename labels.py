"""Labels on disk, and making many of them on many machines.

The teacher takes seconds per pair, so its labels are made once and kept, one file per pair. A label
is found by log and time stamps, never by position in a list, so a missing file shifts nothing.

  <folder>/settings.json                         the teacher's settings, and the grid
  <folder>/<log_id>/<timestamp0_ns>.feather      a label: row i belongs to row i of sweep 0
  <folder>/<log_id>/<timestamp0_ns>.broken.json  why a pair could not be labeled

Columns: flow_tx_m, flow_ty_m, flow_tz_m (float16; residual flow in meters, ego frame of sweep 0),
has_flow (bool; the point is not ground and lies in the grid), and gain (float16; how certain the
flow is, see `nsfp.TeacherFlow`; labels of an older version do not have it). The metadata holds a
checksum of the file, and a fingerprint of the points, ground and ego-motion that the teacher was
given: many drives have the same names and time stamps, and poses or maps may be added after
labeling.

Processes and machines need not communicate: each makes the missing labels of its shard, and a file
is written completely or not at all. Any run may be killed and started again. The labels that the
paper's authors have published can be used in the same way.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import time
import traceback
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import feather
from torch import Tensor
from tqdm import tqdm

import data
import nsfp
import zeroflow
from data import DataError, PairKey, SweepPair
from zeroflow import Label

# --- One label ------------------------------------------------------------------------------------


def label_path(folder: str | Path, key: PairKey) -> Path:
    """The file of a pair's label."""
    return Path(folder) / key.log_id / f"{key.timestamp0_ns}.feather"


def write_label(folder: str | Path, label: Label) -> Path:
    """Write a label, whole or not at all. Raises OSError naming the file."""
    # float16 halves the file; its steps are at most 0.5 mm for flow shorter than 2 m.
    columns = {}
    for i, name in enumerate(data.FLOW_COLUMNS):
        columns[name] = label.flow[:, i].numpy().astype(np.float16)  # (N0,)
    columns["has_flow"] = label.has_flow.numpy()
    columns["gain"] = label.gain.numpy().astype(np.float16)
    table = pyarrow.table(columns)

    # The metadata tells which pair the label belongs to, even if the file is renamed or moved.
    metadata = {
        **label.key._asdict(),
        "num_points": len(label.flow),
        "settings": label.settings,
        "settings_hash": settings_hash(label.settings),
        "loss": label.loss,
        "seconds": label.seconds,
        "fingerprint": label.fingerprint,
        "checksum": _NO_CHECKSUM,
    }
    table = table.replace_schema_metadata({"zeroflow": json.dumps(metadata)})
    content = io.BytesIO()
    feather.write_feather(table, content, compression="zstd")

    # The checksum is of the whole file, with zeros in its own place: no flipped bit goes unnoticed.
    checksum = hashlib.sha256(content.getvalue()).hexdigest()
    path = label_path(folder, label.key)
    with data.atomic_file(path) as file:
        file.write(content.getvalue().replace(_NO_CHECKSUM.encode(), checksum.encode()))
    return path


_NO_CHECKSUM = 64 * "0"
_LABEL_AGAIN = "delete the file and run `python zeroflow.py label` again"


def read_label(folder: str | Path, key: PairKey, num_points: int | None = None) -> Label:
    """Read the label of a pair, and check that it is complete and belongs to that pair.

    num_points: rows of sweep 0, where known. Raises DataError naming the file and the remedy.
    """
    path = label_path(folder, key)
    # The checksum comes first: pyarrow may crash on a file with a wrong offset.
    content = _read_unspoiled(path)
    table = data.read_feather(path, [*data.FLOW_COLUMNS, "has_flow"], content)
    flow, has_flow = _flow_columns(path, table, "has_flow", _LABEL_AGAIN)
    gain = torch.full_like(flow[:, 0], torch.nan)
    if "gain" in table.column_names:
        gain = torch.from_numpy(data.read_numbers(path, table, ["gain"])[:, 0]).float()
    try:
        metadata = json.loads(table.schema.metadata[b"zeroflow"])
        found = PairKey(*(metadata[name] for name in PairKey._fields))
        about = [metadata[name] for name in ("settings", "loss", "seconds", "fingerprint")]
        is_plausible = zeroflow.is_plausible(flow, metadata["settings"]["half_extent_m"])
    except (TypeError, KeyError, ValueError) as error:
        what = f"not a label of this project ({error!r})"
        raise DataError(f"{path}: {what}; {_LABEL_AGAIN}") from error

    # A whole file may still be the wrong one: renamed, or of another copy of the log.
    if not is_plausible:
        raise DataError(f"{path}: {_IMPLAUSIBLE}; {_LABEL_AGAIN}")
    if found != key:
        what = f"is the label of {tuple(found)}, not of {tuple(key)}"
        raise DataError(f"{path}: {what}; {_LABEL_AGAIN}")
    if num_points is not None and num_points != table.num_rows:
        rows = f"has {table.num_rows} rows, its sweep has {num_points} points"
        sweep = f"{key.timestamp0_ns} of log {key.log_id}"
        raise DataError(f"{path}: {rows} ({sweep}); {_LABEL_AGAIN}")
    return Label(key, flow, has_flow, *about, gain)


_IMPLAUSIBLE = "has flow that is not finite, or as long as the grid"


def _read_unspoiled(path: Path) -> bytes:
    """The content of a label's file, if it is as it was written. Raises DataError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        what = "does not exist; make it with `python zeroflow.py label`"
        raise DataError(f"{path}: {what}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_LABEL_AGAIN}") from error
    # The most frequent fault is an interrupted copy, which lacks the end.
    if not content.endswith(b"ARROW1"):
        raise DataError(f"{path}: not a whole Feather file; {_LABEL_AGAIN}")
    stored = re.search(rb'"checksum": "([0-9a-f]{64})"', content)
    if stored is None:
        what = "not a label of this project (it has no checksum; an older version wrote none)"
        raise DataError(f"{path}: {what}; {_LABEL_AGAIN}")
    as_written = content.replace(stored[1], _NO_CHECKSUM.encode())
    if hashlib.sha256(as_written).hexdigest() != stored[1].decode():
        what = "its rows or settings have changed since it was written"
        raise DataError(f"{path}: {what}; {_LABEL_AGAIN}")
    return content


def _read_end(path: Path, key: PairKey) -> dict:
    """The metadata of a label, without its rows: a fiftieth of the time that a whole one takes.

    Raises DataError if the end is missing, as in an interrupted copy, or if it is another pair's.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            end = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_LABEL_AGAIN}") from error
    if not end.endswith(b"ARROW1"):
        raise DataError(f"{path}: not a whole Feather file; {_LABEL_AGAIN}")
    # The last bytes of a Feather file repeat its schema, and with it the metadata, as text.
    stored = re.search(rb'\{"log_id": [^\0]*"checksum": "[0-9a-f]{64}"\}', end)
    try:
        about = json.loads(stored[0])
        found = PairKey(*(about[name] for name in PairKey._fields))
        seconds, of_settings = float(about["seconds"]), str(about["settings_hash"])
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        what = f"not a label of this project ({error!r}; an older version wrote no checksum)"
        raise DataError(f"{path}: {what}; {_LABEL_AGAIN}") from error
    if found != key:
        what = f"is the label of {tuple(found)}, not of {tuple(key)}"
        raise DataError(f"{path}: {what}; {_LABEL_AGAIN}")
    return {"seconds": seconds, "settings_hash": of_settings}


_END_BYTES = 16_384  # the metadata and the schema take about 2 kB


def _flow_columns(
    file: Path, table: pyarrow.Table, mask: str, remedy: str
) -> tuple[Tensor, Tensor]:
    """Flow (N0, 3) float32, NaN for a null, and the named column of bool (N0,)."""
    types = pyarrow.types
    for name in data.FLOW_COLUMNS:
        if not types.is_floating(table[name].type):
            found = f"its column {name} is {table[name].type}, expected floating-point numbers"
            raise DataError(f"{file}: {found}; {remedy}")
    if not types.is_boolean(table[mask].type) or table[mask].null_count:
        found = f"its column {mask} is {table[mask].type} with {table[mask].null_count} nulls"
        raise DataError(f"{file}: {found}, expected bool without nulls; {remedy}")
    with np.errstate(invalid="ignore"):  # a signaling NaN would cause a warning
        flow = torch.from_numpy(data.read_numbers(file, table, data.FLOW_COLUMNS)).float()
    return flow, torch.from_numpy(table[mask].to_numpy().astype(bool))  # (N0, 3), (N0,)


def settings_hash(settings: dict) -> str:
    """Sixteen hexadecimal digits that differ whenever the settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


# --- A folder of labels ---------------------------------------------------------------------------


class ForeignLabel(DataError):
    """A label that is whole, but of other settings than its folder's, or of another input."""


class LabelFolder(NamedTuple):
    """The labels of a data set: which pairs have one, and how to read it."""

    indices: Sequence[int]  # which of the data set's pairs have a label, in ascending order
    read: Callable[[SweepPair], Label]  # raises DataError, or ForeignLabel, naming the file
    half_extent_m: tuple[float, ...]  # of the grid that the labels cover
    teacher: str  # hash of the teacher's settings and the grid, or "published"


def open_labels(folder: str | Path, dataset: data.Pairs) -> LabelFolder:
    """Open a folder that `label_dataset` has written, or one of published labels.

    Raises DataError if it has no label for any pair of the data set.
    """
    label_folder = _open_any(Path(folder), dataset)
    if not label_folder.indices:
        remedy = "run `python zeroflow.py label`, or restore settings.json if that file is lost"
        raise DataError(f"{folder}: has no label for any of {len(dataset)} pairs; {remedy}")
    return label_folder


def _open_any(folder: Path, dataset: data.Pairs) -> LabelFolder:
    """`open_labels` for a folder that may still be empty."""
    # Published labels come without a settings.json.
    if not (folder / "settings.json").exists():
        files = _published_files(folder, dataset)
        read = functools.partial(_read_published, files)
        labeled = array("l", (i for i, key in enumerate(dataset.pair_keys) if key in files))
        return LabelFolder(labeled, read, data.GRID_HALF_EXTENT_M, "published")
    settings = folder_settings(folder)
    teacher = settings_hash(settings)
    # Only the files' names are checked here. Reading all labels of a large data set takes hours.
    names_of = _listing(folder)
    labeled = array("l")
    for i, key in enumerate(dataset.pair_keys):
        if label_path(folder, key).name in names_of(key.log_id):
            labeled.append(i)
    read = functools.partial(_read_own, folder, teacher)
    return LabelFolder(labeled, read, tuple(settings["half_extent_m"]), teacher)


_FOREIGN = "was made with other settings than its folder's settings.json names; move it away"


def _read_own(folder: Path, teacher: str, pair: SweepPair) -> Label:
    path = label_path(folder, pair.key)
    label = read_label(folder, pair.key, len(pair.pc0))
    # Two runs may have started at the same moment with different settings: see `claim_folder`.
    if settings_hash(label.settings) != teacher:
        raise ForeignLabel(f"{path}: {_FOREIGN}")
    # Two drives may have the same name and times, and poses or ground may have changed.
    if label.fingerprint != pair.fingerprint:
        what = "was made from other points, poses or ground than the data has now"
        remedy = "if the data has changed, delete the label; if not, choose another folder"
        raise ForeignLabel(f"{path}: {what}; {remedy}")
    return label


def _listing(folder: str | Path) -> Callable[[str], set[str]]:
    """A function: id of a log -> names of the files in its folder, which is listed only once."""

    @functools.lru_cache(maxsize=2)  # pairs come log by log
    def names_of(log_id: str) -> set[str]:
        try:
            return set(os.listdir(Path(folder) / log_id))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    return names_of


def folder_settings(folder: str | Path) -> dict:
    """The settings that a folder's labels were made with: the teacher's, and the grid."""
    file = Path(folder) / "settings.json"
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        what = f"is not JSON of settings ({error})"
        raise DataError(f"{file}: {what}; restore it, or label into a new folder") from error
    # Older versions had only one grid and did not store it. Their labels cannot be used.
    if "half_extent_m" not in settings:
        what = "holds labels of other settings (half_extent_m, their grid, is missing there)"
        raise DataError(f"{file}: {what}; label into a new folder")
    grid = settings["half_extent_m"]
    is_grid = isinstance(grid, list) and len(grid) == 3
    if not is_grid or not all(isinstance(half, float) and 0 < half < 1e6 for half in grid):
        what = f"half_extent_m is {str(grid)[:80]}, expected three positive numbers of meters"
        raise DataError(f"{file}: {what}; restore it, or label into a new folder")
    return settings


def from_labels(label_folder: LabelFolder) -> zeroflow.Estimator:
    """The labels as estimates, to be scored like any other method's."""

    def estimator(pair: SweepPair) -> zeroflow.Estimate:
        label = label_folder.read(pair)
        return zeroflow.Estimate(label.flow, label.seconds)

    return estimator


# --- Published labels -----------------------------------------------------------------------------
# The paper's authors named their files <log_id>/<i:010d>_<position in a batch:03d>.npz; later code
# bases write <log_id>/<i:010d>.feather. In both, i counts the sweeps of a log from 0. Each pair of
# the LiDAR data set is a log of its own, named <log_id>_<timestamp0_ns>.


def _published_files(folder: Path, dataset: data.Pairs) -> dict[PairKey, Path]:
    """The published label of every pair that has one."""
    files = {}  # (log id, time stamp of sweep 0) -> file
    for log_id, stamps in dataset.stamps.items():
        for file in sorted((folder / log_id).glob("*")):
            match = _PUBLISHED_NAME.fullmatch(file.name)
            if match and int(match[1]) < len(stamps):
                files[log_id, stamps[int(match[1])]] = file

    # Each pair of the LiDAR data set has a folder of its own, <log_id>_<timestamp0_ns>. There may
    # be 240,000 of them, so they are listed once.
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    for key in dataset.pair_keys:
        name = f"{key.log_id}_{key.timestamp0_ns}"
        if key[:2] not in files and name in names:
            found = [file for file in (folder / name).iterdir() if _PUBLISHED_NAME.match(file.name)]
            if found:
                files[key[:2]] = min(found)
    return {key: files[key[:2]] for key in dataset.pair_keys if key[:2] in files}


_PUBLISHED_NAME = re.compile(r"([0-9]{10})(_[0-9]{3}\.npz|\.feather)")


def _read_published(files: dict[PairKey, Path], pair: SweepPair) -> Label:
    """A published label. The files do not hold a loss, so it is NaN."""
    file = files.get(pair.key)
    if file is None:
        raise DataError(f"{tuple(pair.key)}: the published labels do not have this pair")
    read = _read_published_feather if file.suffix == ".feather" else _read_published_npz
    # A broken file raises errors of a dozen kinds: of zip, zlib, headers, shapes, memory.
    with data.naming(file, "is not a published label", "download it again"):
        flow, has_flow, seconds = read(file, pair)
    if not zeroflow.is_plausible(flow, data.GRID_HALF_EXTENT_M):
        raise DataError(f"{file}: {_IMPLAUSIBLE}; download it again")
    settings = {"teacher": "published", "half_extent_m": list(data.GRID_HALF_EXTENT_M)}
    # There is no fingerprint by the authors, but their rows have been compared with the pair's.
    gain = torch.full_like(flow[:, 0], torch.nan)
    return Label(pair.key, flow, has_flow, settings, math.nan, seconds, pair.fingerprint, gain)


def _read_published_feather(file: Path, pair: SweepPair) -> tuple[Tensor, Tensor, float]:
    """Flow (N0, 3), has_flow (N0,), seconds (unknown: NaN). One row per point of sweep 0."""
    table = data.read_feather(file, [*data.FLOW_COLUMNS, "is_valid"])
    if table.num_rows != len(pair.pc0):
        rows = f"has {table.num_rows} rows, its sweep has {len(pair.pc0)} points"
        raise DataError(f"{file}: {rows}; does it belong to this log?")
    estimate, is_valid = _flow_columns(file, table, "is_valid", "download it again")
    # Their estimate may cover more points than ours would, for instance of a larger grid.
    has_flow = is_valid & data.input_masks(pair)[0]
    return torch.where(has_flow[:, None], estimate, 0.0), has_flow, math.nan


def _read_published_npz(file: Path, pair: SweepPair) -> tuple[Tensor, Tensor, float]:
    """Flow (N0, 3), has_flow (N0,), seconds. Rows count only the points that are not ground."""
    rows, estimate, seconds = _load_npz(file)
    not_ground = (~pair.is_ground0).nonzero()[:, 0]  # (M,) rows of sweep 0
    expected = data.input_masks(pair)[0][not_ground].nonzero()[:, 0]

    # Without this check, a single point that is ground to us but not to the authors would shift all
    # rows after it. The authors labeled the points in the grid, as we do: if their rows match ours,
    # so does their ground. 1 % may differ, because of points on the border of the grid.
    if np.setxor1d(rows, expected).size > 0.01 * len(expected):
        sweep = f"sweep {pair.timestamp0_ns} of log {pair.log_id}"
        raise DataError(
            f"{file}: labels other points than those in the grid and not ground of {sweep}; "
            "does it belong to this sweep, and was the ground found by the same rule?"
        )
    # Each number becomes a row of sweep 0. Numbers beyond its end are part of that 1 %.
    is_known = rows < len(not_ground)
    labeled = not_ground[rows[is_known]]
    flow, has_flow = torch.zeros_like(pair.pc0), torch.zeros_like(pair.is_ground0)
    flow[labeled] = estimate[is_known]
    has_flow[labeled] = True
    return flow, has_flow, seconds


def _load_npz(file: Path) -> tuple[Tensor, Tensor, float]:
    """valid_idxes (K,) int64, flow (K, 3), seconds."""
    # The file comes from the internet, and loading a pickle could run code.
    with np.load(file, allow_pickle=False) as arrays:
        flow, numbers = arrays["flow"], arrays["valid_idxes"]
        seconds = float(np.sum(arrays["delta_time"]))
    if flow.dtype.kind != "f" or numbers.dtype.kind not in "iu":
        raise ValueError(f"flow of {flow.dtype} for valid_idxes of {numbers.dtype}")
    with np.errstate(invalid="ignore"):  # a signaling NaN would cause a warning
        estimate = torch.from_numpy(flow.astype(np.float64)).float().reshape(-1, 3)
    rows = torch.from_numpy(numbers.astype(np.int64)).flatten()
    distinct = len(rows.unique())
    if not len(estimate) == len(rows) == distinct or (rows < 0).any():
        raise ValueError(f"{len(estimate)} rows of flow for {distinct} different valid_idxes")
    return rows, estimate, seconds


# --- The state of a folder ------------------------------------------------------------------------


class LabelStatus(NamedTuple):
    """What a folder of labels holds for the pairs of a data set.

    states: state -> pair -> what is wrong. "made": a valid label. "missing": never tried. "torn": a
    file that is not a valid label. "failed": the last run could not label this pair. "foreign": a
    label of other settings than its folder's, or (in the sample) of other points, poses or ground.
    """

    states: dict[str, dict[PairKey, str]]
    seconds: list[float]  # the teacher's time for each label that is made, where it is known
    is_published: bool


def label_status(
    dataset: data.Pairs, folder: str | Path, sample: int | None = 20, whole: bool = False
) -> LabelStatus:
    """The state of every pair's label.

    sample: how many labels, evenly spread, are also compared with their sweeps (None: all), which
    takes longer. Published labels cannot be read without their sweeps: the others count as made.
    whole: read all labels completely, see `label_state`.
    Raises DataError if the folder is not a folder of labels.
    """
    label_folder = _open_any(Path(folder), dataset)
    is_published = label_folder.teacher == "published"
    if is_published and not label_folder.indices:
        remedy = "make it with `python zeroflow.py label`"
        raise DataError(f"{folder}: is not a folder of labels for this data; {remedy}")

    # Every label is checked by itself, where that is possible.
    found = dict.fromkeys(dataset.pair_keys, ("missing", "", math.nan))
    if is_published:
        labeled = (dataset.pair_keys[i] for i in label_folder.indices)
        found |= dict.fromkeys(labeled, ("made", "", math.nan))
    else:
        found |= _label_states(folder, dataset.pair_keys, label_folder.teacher, whole)

    # A sample is read with its sweep, which also tells whether the rows fit.
    made = [key for key, (state, _, _) in found.items() if state == "made"]
    chosen = data.evenly_spread(len(made), sample)
    for i in tqdm(chosen, desc="compare", unit="label", disable=len(chosen) < 100):
        try:
            pair = dataset.read(made[i])
        except (DataError, OSError):
            continue  # the sweep is broken, not its label
        try:
            found[made[i]] = "made", "", label_folder.read(pair).seconds
        except ForeignLabel as error:
            found[made[i]] = "foreign", str(error), math.nan
        except (DataError, OSError) as error:
            found[made[i]] = "torn", str(error), math.nan

    states = {state: {} for state in ("made", "missing", "torn", "failed", "foreign")}
    for key, (state, reason, _) in found.items():
        states[state][key] = reason
    seconds = [taken for _, _, taken in found.values() if not math.isnan(taken)]
    return LabelStatus(states, seconds, is_published)


def _label_states(
    folder: str | Path, keys: Sequence[PairKey], wanted: str, whole: bool = False
) -> dict:
    """Pair -> its `label_state`."""
    keys = tqdm(keys, desc="check", unit="label", disable=len(keys) < 1000)
    names_of = _listing(folder)
    return {key: label_state(folder, key, wanted, names_of(key.log_id), whole) for key in keys}


def label_state(
    folder: str | Path, key: PairKey, wanted: str, names: Collection[str], whole: bool = False
) -> tuple[str, str, float]:
    """The state of one label (see `LabelStatus`), what is wrong, and the teacher's seconds or NaN.

    wanted: hash of the folder's settings. names: of the files in the folder of the pair's log.
    whole: read the label completely, and not only its end. Then no flipped bit goes unnoticed.
    The label is not compared with its sweep.
    """
    # A label is made if it is whole and belongs to the pair; a file of its name is not enough.
    state, reason = "missing", ""
    path = label_path(folder, key)
    if path.name in names:
        try:
            if whole:
                read_label(folder, key)
            about = _read_end(path, key)
        except DataError as error:
            state, reason = "torn", str(error)
        else:
            if about["settings_hash"] == wanted:
                return "made", "", about["seconds"]
            return "foreign", f"{path}: {_FOREIGN}", math.nan

    # Did the last run leave a note? Another one may be labeling the pair and remove the note.
    note = _failure_path(folder, key)
    if note.name not in names:
        return state, reason, math.nan
    with contextlib.suppress(FileNotFoundError):
        try:
            state, reason = "failed", str(json.loads(note.read_text(encoding="utf-8"))["reason"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            state, reason = "failed", f"{note}: gives no reason ({error!r}); delete the file"
    return state, reason, math.nan


def _failure_path(folder: str | Path, key: PairKey) -> Path:
    return label_path(folder, key).with_suffix(".broken.json")


def _write_failure(folder: str | Path, key: PairKey, reason: str) -> None:
    with data.atomic_file(_failure_path(folder, key)) as file:
        file.write(json.dumps({**key._asdict(), "reason": reason}, indent=2).encode())


# --- Labeling many pairs --------------------------------------------------------------------------

PAIRS_AT_ONCE = {"cpu": 1, "cuda": 16}  # pairs that one process fits side by side
COMPARED = 20  # labels that `label_dataset` finds and compares with their sweeps


@dataclass(frozen=True)
class LabelCount:
    """What a run of `label_dataset` did."""

    made: int
    found: int  # labels that were there already
    failed: list[tuple[PairKey, str]]  # pairs that could not be labeled, and why
    suspicious: list[tuple[PairKey, str]]  # labels made that may be wrong, and why


def label_dataset(
    dataset: data.Pairs,
    folder: str | Path,
    settings: nsfp.NSFPSettings,
    half_extent_m: Sequence[float] = data.GRID_HALF_EXTENT_M,
    workers: int | None = None,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    max_broken: float = 0.05,
    whole: bool = False,
) -> LabelCount:
    """Make those labels of shard i of n that are missing or torn.

    workers: processes of one thread each (None: one per core, at most 8 for a GPU); 1 starts none.
    whole: also read existing labels completely, and make those again that are damaged in the
    middle; otherwise only their ends are read, which is fifty times faster.

    A pair fails if it cannot be read or fitted, if there is too little memory for it, or if its
    process dies; the next run tries again. COMPARED of the existing labels, evenly spread, are
    compared with their pairs: comparing all would mean reading every sweep.
    Raises DataError if the folder has labels of other settings or other data, or if more than
    `max_broken` of the shard's pairs (counted as at least 100) fail; OSError if a label cannot be
    written.
    """
    label_settings = zeroflow.label_settings(settings, half_extent_m)
    keys = dataset.pair_keys
    numbers = np.fromiter((_number_of(key) for key in keys), np.uint64, len(keys))
    distinct = len(np.unique(numbers))
    if distinct < len(keys):
        what = f"{len(keys) - distinct} of {len(keys)} pairs are in the data set twice"
        raise DataError(f"{folder}: {what}; was the same folder given twice?")
    claim_folder(folder, label_settings)

    # Which labels exist already? Their ends are read, since a file may be torn.
    mine = np.flatnonzero(numbers % np.uint64(shard[1]) == shard[0]).tolist()
    teacher = settings_hash(label_settings)
    found = _label_states(folder, [keys[i] for i in mine], teacher, whole)
    made = []
    for i in mine:
        state, reason, _ = found[keys[i]]
        if state == "foreign":
            raise DataError(reason)
        if state == "made":
            made.append(i)
    made = _without_torn(dataset, Path(folder), teacher, made)
    missing = sorted(set(mine).difference(made))

    # On a GPU, several pairs take as long as one. So the unit of work is a chunk of pairs.
    at_once = PAIRS_AT_ONCE[torch.device(device).type]
    chunks = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    job = functools.partial(_label_chunk, dataset, folder, settings, half_extent_m, device)
    results = _run(job, chunks, _count_processes(workers, device))

    # A failure leaves a note beside the labels, so that `label_status` can tell the reason later.
    failed, suspicious, allowed = [], [], max_broken * max(100, len(mine))
    name = "teacher" if shard[1] == 1 else f"teacher {shard[0]}/{shard[1]}"
    with tqdm(total=len(missing), desc=name, unit="pair", disable=not missing) as progress:
        for chunk, outcomes in results:
            for i, outcome in zip(chunk, outcomes, strict=True):
                if outcome.failure is not None:
                    failed.append((keys[i], outcome.failure))
                    _write_failure(folder, keys[i], outcome.failure)
                if outcome.suspicion is not None:
                    suspicious.append((keys[i], outcome.suspicion))
            progress.update(len(chunk))
            # With many failures, the data or the settings must be wrong: stop early.
            if len(failed) > allowed:
                what = f"{len(failed)} pairs could not be labeled"
                limit = f"more than --max-broken {max_broken} of {len(mine)}"
                first = f"the first is {tuple(failed[0][0])}: {failed[0][1]}"
                raise DataError(f"{what}, {limit}; fix the data, or allow more; {first}")
    return LabelCount(len(missing) - len(failed), len(made), failed, suspicious)


def _without_torn(dataset: data.Pairs, folder: Path, teacher: str, made: list[int]) -> list[int]:
    """Read a few of these labels with their pairs; return all but those that turn out torn.

    Raises ForeignLabel if one does not belong to its pair's input. Then the user must decide: these
    may be hours of work, such as the labels of another drive.
    """
    torn = set()
    for position in data.evenly_spread(len(made), COMPARED):
        try:
            pair = dataset[made[position]]
        except (ValueError, OSError, MemoryError):
            continue  # the sweep is broken, not its label
        try:
            _read_own(folder, teacher, pair)
        except ForeignLabel:
            raise
        except DataError:
            torn.add(made[position])
    return [i for i in made if i not in torn]


def claim_folder(folder: str | Path, settings: dict) -> None:
    """Write the settings into a new folder; raise DataError if the folder has different ones.

    settings: the teacher's and the grid, as `zeroflow.label_settings` returns them.
    """
    file = Path(folder) / "settings.json"
    _remove_leftovers(Path(folder))
    if not file.exists():
        # Published labels have no such file; ours must not be mixed with them.
        if any(Path(folder).glob("*/*.feather")) or any(Path(folder).glob("*/*.npz")):
            what = "is missing, so it is unknown how the labels here were made"
            raise DataError(f"{file}: {what}; restore it, or choose another folder")
        with data.atomic_file(file) as out:
            out.write(json.dumps(settings, indent=2).encode())

    # Of two runs that start at the same moment with different settings, the last one to write wins.
    # The labels of the other are recognized as foreign, since each carries its settings' hash.
    found = folder_settings(folder)
    wanted = json.loads(json.dumps(settings))  # as read from a file: tuples become lists
    differences = []
    for name in sorted({*found, *wanted}):
        there, here = found.get(name, "missing"), wanted.get(name, "missing")
        if there != here:
            differences.append(f"{name} {there!r} there, {here!r} here")
    if differences:
        what = f"holds labels of other settings ({', '.join(differences)})"
        raise DataError(f"{folder}: {what}; choose another folder")


def _remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files of processes that were killed."""
    # Names are listed by hand, because `rglob` is slow with millions of labels.
    if not folder.is_dir():
        return
    for place in (folder, *(Path(entry) for entry in os.scandir(folder) if entry.is_dir())):
        for name in os.listdir(place):
            if name.startswith(".") and name.endswith(".tmp"):
                _delete_if_old(place / name)


def _delete_if_old(unfinished: Path) -> None:
    # Writing takes less than an hour. Another process may finish or delete the file meanwhile.
    with contextlib.suppress(OSError):
        if time.time() - unfinished.stat().st_mtime > 3600:
            unfinished.unlink()


def shard_of(key: PairKey, shards: int) -> int:
    """The shard of a pair, 0 ... shards - 1: the same on every machine and in every data set."""
    return _number_of(key) % shards


def _number_of(key: PairKey) -> int:
    """A number of 64 bits for the label of a pair, as if drawn at random."""
    # Python's own hash of a text differs from process to process.
    digest = hashlib.sha256(f"{key.log_id}/{key.timestamp0_ns}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def chosen_shard(
    text: str | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """(i, n) of `--shard i/n`, else torchrun's rank, else a SLURM array's task, else (0, 1)."""
    if text is not None:
        source = f"--shard {text}"
        shard, _, shards = text.partition("/")
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        source = "RANK/WORLD_SIZE"
        shard, shards = environment["RANK"], environment["WORLD_SIZE"]
    elif "SLURM_ARRAY_TASK_ID" in environment:
        source = "SLURM_ARRAY_TASK_ID/SLURM_ARRAY_TASK_COUNT"
        shard = environment["SLURM_ARRAY_TASK_ID"]
        shards = environment.get("SLURM_ARRAY_TASK_COUNT", "")
        # An array need not begin at 0, nor count in steps of 1.
        first = environment.get("SLURM_ARRAY_TASK_MIN", "0")
        step = environment.get("SLURM_ARRAY_TASK_STEP", "1")
        if shard.isdecimal() and first.isdecimal() and step.isdecimal() and int(step) > 0:
            shard = str((int(shard) - int(first)) // int(step))
    else:
        return 0, 1
    # A list of tasks with gaps ends up here: some shards would belong to no task.
    if not (shard.isdecimal() and shards.isdecimal() and int(shard) < int(shards)):
        what = f"{shard!r} of {shards!r} is not a shard; shards are 0/n ... n-1/n"
        raise DataError(f"{source}: {what}; choose one with --shard i/n")
    return int(shard), int(shards)


def usable_cores() -> int:
    """Cores that this process may use, its share of them if torchrun started several ranks here."""
    # A scheduler may give a process fewer cores than the machine has. macOS does not report this.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- Can the label be right? ----------------------------------------------------------------------

# After the flow, hardly a point is farther than this from sweep 1: 0 % of a real pair, 0.5 % of
# KITTI's, and up to 5 % on the sparsest streets. If half of sweep 1 is missing, or if it is another
# sweep, half of the points are.
PARTNER_REACH_M = 1.0
MAX_WITHOUT_PARTNER = 0.15
# Most of what a car sees is static. If most points have the same residual motion, it is the car's
# own: the pose is wrong by that much. A motion is noise if it is shorter than this, or if it hardly
# brings sweep 0 closer to sweep 1. With right poses, a real pair has 1.9 cm and a gain of 1.08, and
# sparse streets have up to 7 cm and 1.04. A pose that is wrong by 11.5 cm gives 1.09 to 2.
MIN_MOTION_M = 0.05
MIN_GAIN = 1.07
MIN_POINTS = 100  # of fewer points, most may belong to one car


class CommonMotion(NamedTuple):
    """The rigid motion that most points of a pair share."""

    share: float  # of the points: their flow agrees with it, or they come closer to sweep 1 by it
    meters: float  # how far it moves the points, on average
    gain: float  # mean squared distance to sweep 1, divided by that after the motion


def suspicion(label: Label, pair: SweepPair) -> str | None:
    """Why the label of a pair may be wrong, as one line; None if nothing looks wrong."""
    if label.has_flow.sum() < MIN_POINTS:
        return None
    common = common_motion(label, pair)
    if common.share >= 0.5 and common.meters >= MIN_MOTION_M and common.gain >= MIN_GAIN:
        found = f"{100 * common.share:.0f} % of the points share one motion of"
        return f"{found} {100 * common.meters:.1f} cm: is the pose of this pair wrong?"
    alone = share_without_partner(label, pair)
    if alone > MAX_WITHOUT_PARTNER:
        found = f"{100 * alone:.0f} % of the points have no partner within {PARTNER_REACH_M:g} m"
        return f"{found} in sweep 1: is that sweep whole, the next one, and its pose right?"
    return None


def share_without_partner(label: Label, pair: SweepPair) -> float:
    """The share of labeled points that their flow does not bring near a point of sweep 1."""
    moved = (pair.pc0 + label.flow)[label.has_flow]
    target = _points_of_sweep_1(label, pair)
    if len(moved) == 0 or len(target) == 0:
        return float(len(moved) > 0)
    distance = nsfp.Neighbors(target).distance(moved, PARTNER_REACH_M, beyond=torch.inf)
    return distance.isinf().float().mean().item()


def _points_of_sweep_1(label: Label, pair: SweepPair) -> Tensor:
    """(M, 3): the points of sweep 1 that the teacher saw."""
    return pair.pc1[data.input_masks(pair, label.settings["half_extent_m"])[1]]


def common_motion(label: Label, pair: SweepPair, reach: float = 0.3) -> CommonMotion:
    """The rigid motion by which sweep 0 as a whole lands on sweep 1.

    reach: a point farther than this from sweep 1, in meters, does not count.
    """
    # A motion has six parameters: about 2,000 points are enough. All of them are one cluster.
    rows = label.has_flow.nonzero()[:, 0]
    rows = rows[:: len(rows) // 2000 + 1]
    points, flow = pair.pc0[rows].double(), label.flow[rows].double()  # (N, 3) each
    target = _points_of_sweep_1(label, pair)
    if len(points) == 0 or len(target) == 0:
        return CommonMotion(0.0, 0.0, 1.0)
    cluster = torch.zeros(len(points), dtype=torch.int64)
    about = {"ransac_trials": 50, "inlier_reach": 0.05, "upright": False}  # poses may tilt
    settings = dataclasses.replace(nsfp.TEACHERS["fast"], **about)
    motion = nsfp.motions_by_ransac(points, points + flow, cluster, settings)  # (1, 3, 4)

    # The teacher leaves smooth walls where they are, since sweep 1 cannot show a motion along the
    # wall. In a street of walls most flow is 0. So let sweep 1 decide, by ICP.
    sweep1 = nsfp.Neighbors(target.double())
    for _ in range(10):
        partner, is_found = sweep1.partners(nsfp.move(points, motion, cluster), reach)
        motion = nsfp.rigid_motions(points, partner, cluster, is_found.double())

    moved = nsfp.move(points, motion, cluster)
    before = sweep1.distance(points, reach, beyond=reach)
    after = sweep1.distance(moved, reach, beyond=reach)
    is_shared = (after < before) | ((moved - points - flow).norm(dim=1) < settings.inlier_reach)
    gain = before.square().mean() / after.square().mean().clamp(min=1e-12)
    meters = (moved - points).norm(dim=1).mean()
    return CommonMotion(is_shared.double().mean().item(), meters.item(), gain.item())


# --- Processes ------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """The outcome of labeling one pair."""

    failure: str | None = None  # why it has no label
    suspicion: str | None = None  # why its label may be wrong


def _label_chunk(dataset, folder, settings, half_extent_m, device, chunk) -> list[_Outcome]:
    """Write the labels of some pairs. Returns the outcome of each."""
    outcomes, pairs = dict.fromkeys(chunk, _Outcome()), {}
    for i in chunk:
        try:
            pairs[i] = dataset[i]
        except (ValueError, OSError) as error:  # a file that cannot be read
            outcomes[i] = _Outcome(failure=str(error))
        except MemoryError as error:
            outcomes[i] = _Outcome(failure=_out_of_memory(error))

    # A fit that diverges does not affect the others: they only share the time.
    make = functools.partial(
        zeroflow.make_labels, settings=settings, half_extent_m=half_extent_m, device=device
    )
    made = _labels_or_reasons(list(pairs.values()), make)
    for (i, pair), label in zip(pairs.items(), made, strict=True):
        if isinstance(label, str):
            outcomes[i] = _Outcome(failure=label)
            continue
        try:
            zeroflow.check_label(label)
        except DataError as error:
            outcomes[i] = _Outcome(failure=str(error))
        else:
            # The note of an earlier failure is deleted last: a kill in between loses nothing.
            write_label(folder, label)
            _failure_path(folder, label.key).unlink(missing_ok=True)
            outcomes[i] = _Outcome(suspicion=suspicion(label, pair))
    return list(outcomes.values())


def _labels_or_reasons(pairs: list[SweepPair], make: Callable) -> list[Label | str]:
    """The labels that `make` returns; for a pair that needs too much memory, the reason."""
    try:
        return make(pairs)
    except (MemoryError, RuntimeError) as error:
        reason = _out_of_memory(error)
        if reason is None:
            raise
    # By now the error is gone, and with it the tensors that its traceback held. The pairs may need
    # too much memory together; one by one, perhaps only one of them does.
    if len(pairs) == 1:
        return [reason]
    return [result for pair in pairs for result in _labels_or_reasons([pair], make)]


def _out_of_memory(error: Exception) -> str | None:
    """The reason why a pair failed for lack of memory; None for any other error."""
    # PyTorch raises a RuntimeError; on a CPU, it is not even a subclass.
    text = " ".join(str(error).split())
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    if not isinstance(error, MemoryError) and not any(phrase in text for phrase in phrases):
        return None
    remedy = "use fewer --workers, a machine with more memory, or a cloud of fewer points"
    return f"there was not enough memory ({type(error).__name__}: {text[:200]}); {remedy}"


def _count_processes(workers: int | None, device: str) -> int:
    """How many processes to start; 0: the work is done in this one."""
    if workers is None:
        # Each process on a GPU needs memory there, for its CUDA context and for a chunk of pairs.
        return usable_cores() if device == "cpu" else min(8, usable_cores())
    if workers < 1:
        raise DataError(f"--workers {workers}: must be positive")
    return 0 if workers == 1 else workers


def _run(
    job: Callable[[Sequence[int]], list], chunks: Sequence[Sequence[int]], processes: int
) -> Iterator[tuple[Sequence[int], list]]:
    """Yield (chunk, job(chunk)) in the order in which they are done; 0 processes: this one."""
    # One worker needs no process. An error is easier to find that way, and a debugger works.
    if processes == 0:
        with zeroflow.one_thread():
            for chunk in chunks:
                yield chunk, job(chunk)
        return

    waiting = collections.deque(chunks)
    workers = []
    try:
        # All of them start at once, because each takes seconds to import torch.
        for _ in range(min(processes, len(chunks))):
            workers.append(_Worker(job))
        while True:
            # Idle workers get the next chunk.
            for worker in workers:
                if waiting and worker.chunk is None:
                    worker.give(waiting.popleft())
            busy = {worker.pipe: worker for worker in workers if worker.chunk is not None}
            if not busy:
                return
            for pipe in multiprocessing.connection.wait(list(busy)):
                yield busy[pipe].take()
    finally:
        for worker in workers:
            worker.process.kill()


class _Worker:
    """A process that works on one chunk after the other, and is replaced if it dies.

    The pools of the standard library do not tell which chunk a process had when it was killed, for
    lack of memory for instance. Here each has a pipe of its own, which ends when the process does.
    """

    def __init__(self, job: Callable[[Sequence[int]], list]):
        self.job = job
        self.chunk: Sequence[int] | None = None  # what the process is working on
        self.start()

    def start(self) -> None:
        # spawn: a copy (fork) of a process whose torch has started threads may hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end,), daemon=True)
        self.process.start()
        other_end.close()  # from here on only the process holds it
        self.has_job, self.has_died = False, False

    def give(self, chunk: Sequence[int]) -> None:
        """Let the process work on a chunk."""
        if self.has_died:
            self.start()
        self.chunk = chunk
        # The job is not an argument of the process, because `Process.start` would wait forever for
        # one that refuses to start. If the process is dead by now, `take` will notice.
        with contextlib.suppress(ConnectionError):
            if not self.has_job:
                self.pipe.send(self.job)
                self.has_job = True
            self.pipe.send(chunk)

    def take(self) -> tuple[Sequence[int], list]:
        """The chunk and the job's result, as soon as it is done. Raises what the job raised."""
        chunk, self.chunk = self.chunk, None
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.has_died = True
            self.process.join()
            code = self.process.exitcode
            causes = "-9: killed, often for lack of memory; 1: often a script that labels without"
            causes += ' `if __name__ == "__main__":`'
            reason = f"its process died (exit code {code}; {causes})"
            return chunk, [_Outcome(failure=reason)] * len(chunk)
        # What went wrong with single pairs is part of the result. This is worse: it stops the run.
        if isinstance(result, Exception):
            raise result
        return chunk, result


def _work(pipe: multiprocessing.connection.Connection) -> None:
    """What the process of a worker does until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    torch.set_num_threads(1)  # the teacher's matrices are too small to gain from a second one
    with contextlib.suppress(EOFError, ConnectionError):
        job = pipe.recv()
        while True:
            chunk = pipe.recv()
            try:
                result = job(chunk)
            except Exception as error:  # a label that cannot be written, or a bug: the run stops
                # A traceback does not travel through a pipe, but a note does.
                if not isinstance(error, OSError):
                    error.add_note(traceback.format_exc())
                result = error
            pipe.send(result)
