"""ZeroFlow: scene flow by distillation (Vedder et al., ICLR 2024, arXiv 2305.10424). The method and its command line.

A slow label-free teacher (nsfp.py) labels pairs of sweeps (data.py); a fast student (fastflow3d.py) learns from these
pseudo-labels (train.py). Here is what joins them, in the order in which the data flows:
  the label store      one file a pair, found by log and time stamps, never by position
  the loss             `speed_weight` and `distillation_loss`
  the evaluation       of a student, a teacher, labels or a baseline, by the metrics of metrics.py
  the use              `predict`, the student on two clouds of your own
  the commands         `python zeroflow.py --help`

Points are (N, 3) float32 in metres, in the ego frame of sweep 0; flow is the residual displacement after ego-motion,
from sweep 0 to sweep 1; row i of a flow belongs to row i of `pc0`, ground included. A row that nobody estimated has
residual 0: it moves as the ego says.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import traceback
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import feather
from tqdm import tqdm

import data
import fastflow3d
import metrics
import nsfp
import synthetic
from data import DataError, PairKey, SweepPair

# --- The label store -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """A teacher's flow for one pair, as it lies on disk.

    flow (N0, 3) float32 metres, residual, 0 where there is none; has_flow (N0,) bool: not ground and in the grid.
    loss: mean truncated squared distance (m²) of the moved points to sweep 1, comparable between teachers.
    """

    key: PairKey
    flow: torch.Tensor
    has_flow: torch.Tensor
    settings: dict
    loss: float
    seconds: float


def make_labels(pairs: Sequence[SweepPair], settings: nsfp.NSFPSettings, device: str = "cpu") -> list[Label]:
    """Run the teacher on the points of each pair that are not ground and lie in the student's grid.

    A fit may diverge: see `check_label`.
    """
    start = time.perf_counter()
    masks = [input_masks(pair) for pair in pairs]
    pc0s = [pair.pc0[has_flow].to(device) for pair, (has_flow, _) in zip(pairs, masks, strict=True)]
    pc1s = [pair.pc1[is_target].to(device) for pair, (_, is_target) in zip(pairs, masks, strict=True)]
    estimates = [estimate.cpu() for estimate in nsfp.estimate_flows(pc0s, pc1s, settings)]
    seconds = (time.perf_counter() - start) / max(1, len(pairs))
    labels = []
    for pair, (has_flow, _), pc0, pc1, estimate in zip(pairs, masks, pc0s, pc1s, estimates, strict=True):
        flow = torch.zeros_like(pair.pc0)
        flow[has_flow] = estimate
        loss = 0.0
        if len(pc0) and len(pc1):
            target = nsfp.Neighbours(pc1)
            loss = nsfp.truncated_sq_distance(pc0 + estimate.to(device), target, settings.truncation_sq).mean().item()
        labels.append(Label(pair.key, flow, has_flow, dataclasses.asdict(settings), loss, seconds))
    return labels


def check_label(label: Label) -> None:
    """Raise DataError for the flow of a fit that diverged: not finite, or as long as the grid.

    To be out of reach costs a fit nothing, so its loss may even be the lowest.
    """
    if not (label.flow.abs() < 2 * max(data.GRID_HALF_EXTENT_M)).all():
        raise DataError(f"{tuple(label.key)}: the fit diverged; try a smaller learning rate or another seed")


def input_masks(pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (N0,), (N1,) of what teacher and student see: not ground, and in the student's grid."""
    return ~pair.is_ground0 & data.is_in_grid(pair.pc0), ~pair.is_ground1 & data.is_in_grid(pair.pc1)


def label_path(labels: str | Path, key: PairKey) -> Path:
    return Path(labels) / key.log_id / f"{key.timestamp0_ns}.feather"


def write_label(labels: str | Path, label: Label) -> Path:
    """Write <labels>/<log_id>/<timestamp0_ns>.feather, whole or not at all. Flow is float16: 0.5 mm steps under 2 m."""
    columns = {name: label.flow[:, i].numpy().astype(np.float16) for i, name in enumerate(data.FLOW_COLUMNS)}
    about = {
        **label.key._asdict(),
        "num_points": len(label.flow),
        "settings": label.settings,
        "settings_hash": settings_hash(label.settings),
        "loss": label.loss,
        "seconds": label.seconds,
    }
    table = pyarrow.table({**columns, "has_flow": label.has_flow.numpy()}).replace_schema_metadata(
        {"zeroflow": json.dumps(about)}
    )
    path = label_path(labels, label.key)
    with atomic_file(path) as file:
        feather.write_feather(table, file, compression="zstd")
    return path


def read_label(labels: str | Path, key: PairKey, num_points: int | None = None) -> Label:
    """Read the label of a pair and check that it is whole and this pair's.

    num_points: rows of sweep 0, where known. Raises DataError naming the file and the way out.
    """
    path = label_path(labels, key)
    if not path.exists():
        raise DataError(f"{path}: no label for this pair; make it with `python zeroflow.py label`")
    remedy = "delete the file and run `python zeroflow.py label` again"
    table = data.read_feather(path, [*data.FLOW_COLUMNS, "has_flow"])
    try:
        about = json.loads(table.schema.metadata[b"zeroflow"])
        found = PairKey(about["log_id"], about["timestamp0_ns"], about["timestamp1_ns"])
        is_whole = settings_hash(about["settings"]) == about["settings_hash"]
        is_whole &= about["num_points"] == table.num_rows
        loss, seconds = about["loss"], about["seconds"]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a label of this project ({error!r}); {remedy}") from error
    if not is_whole:
        raise DataError(f"{path}: its rows or settings are not those it was written with; {remedy}")
    if found != key:
        raise DataError(f"{path}: is the label of {tuple(found)}, not of {tuple(key)}; {remedy}")
    if num_points is not None and num_points != table.num_rows:
        sweep = f"{key.timestamp0_ns} of log {key.log_id}"
        raise DataError(f"{path}: has {table.num_rows} rows, its sweep has {num_points} points ({sweep}); {remedy}")
    flow = torch.from_numpy(data.stack(table, data.FLOW_COLUMNS).astype(np.float32))
    has_flow = torch.from_numpy(table["has_flow"].to_numpy())
    return Label(key, flow, has_flow, about["settings"], loss, seconds)


class LabelFolder(NamedTuple):
    """Labels beside a data set: the pairs that have one, and how to read a pair's."""

    keys: list[PairKey]
    read: Callable[[SweepPair], Label]  # raises DataError naming the file


def open_labels(labels: str | Path, dataset: data.Pairs) -> LabelFolder:
    """A folder that `label` has written, or one of the labels that the paper's authors have published.

    Raises DataError if it has no label for any pair of the data.
    """
    published = {} if (Path(labels) / "settings.json").exists() else _published_files(Path(labels), dataset)
    if published:
        folder = LabelFolder(list(published), functools.partial(_read_published, published))
    else:
        made = [key for key in dataset.keys if label_path(labels, key).exists()]
        folder = LabelFolder(made, functools.partial(_read_own, labels))
    if not folder.keys:
        raise DataError(f"{labels}: no label for any of {len(dataset)} pairs; run `python zeroflow.py label`")
    return folder


def _read_own(labels: str | Path, pair: SweepPair) -> Label:
    return read_label(labels, pair.key, len(pair.pc0))


def _published_files(labels: Path, dataset: data.Pairs) -> dict[PairKey, Path]:
    """Of the pairs that have one: `<log_id>/<i:010d>_<place in a batch:03d>.npz`, or, as later code bases write them,
    `<log_id>/<i:010d>.feather`, i being sweep 0's place in its log."""
    files = {}
    for log_id in dataset.stamps if labels.is_dir() else ():
        for file in sorted((labels / log_id).glob("*")):
            match = re.fullmatch(r"([0-9]{10})(_[0-9]{3}\.npz|\.feather)", file.name)
            if match:
                files[log_id, int(match[1])] = file
    places = {(log_id, stamp): i for log_id, stamps in dataset.stamps.items() for i, stamp in enumerate(stamps)}
    found = {key: files.get((key.log_id, places[key[:2]])) for key in dataset.keys} if files else {}
    return {key: file for key, file in found.items() if file is not None}


def _read_published(files: dict[PairKey, Path], pair: SweepPair) -> Label:
    """A published label. Read as data; they hold no loss.

    The .npz files number the points without ground, so they fit only if our ground is theirs: since they cover what
    lies in the grid, and so do we, their rows must be ours (but for 1 %: points on the grid's border).
    """
    file = files.get(pair.key)
    if file is None:
        raise DataError(f"{tuple(pair.key)}: the published labels have none for this pair")
    if file.suffix == ".feather":
        table = data.read_feather(file, [*data.FLOW_COLUMNS, "is_valid"])
        if table.num_rows != len(pair.pc0):
            raise DataError(
                f"{file}: has {table.num_rows} rows, its sweep has {len(pair.pc0)} points; is it of this log?"
            )
        has_flow = torch.from_numpy(table["is_valid"].to_numpy().astype(bool)) & input_masks(pair)[0]
        estimate = torch.from_numpy(data.stack(table, data.FLOW_COLUMNS).astype(np.float32))
        flow, seconds = torch.where(has_flow[:, None], estimate, 0.0), math.nan
    else:
        rows, estimate, seconds = _read_published_npz(file)
        not_ground = (~pair.is_ground0).nonzero()[:, 0]
        expected = input_masks(pair)[0][not_ground].nonzero()[:, 0]
        if np.setxor1d(rows, expected).size > 0.01 * len(expected):
            raise DataError(
                f"{file}: labels other points than those that sweep {pair.timestamp0_ns} of log {pair.log_id} has off "
                "the ground and in the grid; is it of this sweep, and was the ground found by the same rule?"
            )
        is_ours = rows < len(not_ground)
        flow, has_flow = torch.zeros_like(pair.pc0), torch.zeros_like(pair.is_ground0)
        flow[not_ground[rows[is_ours]]], has_flow[not_ground[rows[is_ours]]] = estimate[is_ours], True
    if not (flow.abs() < 2 * max(data.GRID_HALF_EXTENT_M)).all():
        raise DataError(f"{file}: has flow that is no number, or as long as the grid; download it again")
    return Label(pair.key, flow, has_flow, {"teacher": "published"}, math.nan, seconds)


def _read_published_npz(file: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """valid_idxes (K,) int64, flow (K, 3) and the seconds it took. Raises DataError naming the file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            estimate = torch.from_numpy(arrays["flow"].astype(np.float32)).reshape(-1, 3)
            rows = torch.from_numpy(arrays["valid_idxes"].astype(np.int64)).flatten()
            seconds = float(np.sum(arrays["delta_time"]))
        if len(estimate) != len(rows) or len(rows.unique()) != len(rows) or (rows < 0).any():
            raise ValueError(f"{len(estimate)} rows of flow for {len(rows.unique())} different valid_idxes")
    except Exception as error:  # of zip, zlib, the header, the shapes, memory
        raise DataError(f"{file}: is no published label ({error}); download it again") from error
    return rows, estimate, seconds


def settings_hash(settings: dict) -> str:
    """Sixteen hexadecimal digits that differ where the settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator:
    """A binary file that appears under its name only when it is whole and on disk; an old one stays until then."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); what was there is unchanged"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


# --- Labelling many pairs --------------------------------------------------------------------------------------------

PAIRS_AT_ONCE = {"cpu": 1, "cuda": 16}  # fitted side by side by one process


@dataclass(frozen=True)
class LabelCount:
    """What a run of `label_dataset` did: labels made, labels found whole, and (pair, reason) of those set aside."""

    made: int
    found: int
    failed: list[tuple[PairKey, str]]


def label_dataset(
    dataset: data.Pairs,
    labels: str | Path,
    settings: nsfp.NSFPSettings,
    workers: int = 0,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    max_broken: float = 0.05,
) -> LabelCount:
    """Make those labels of shard i of n that are missing or torn.

    workers: processes, one thread each; 0: one a core, at most 8 for a GPU; 1: no process but this one.

    A pair that cannot be read or fitted, or whose process dies, is set aside with the reason, and tried again by the
    next run. Raises DataError if the folder holds other settings' labels, or if more than a share of `max_broken` of
    the shard's pairs (counted as 100 at least) is broken; OSError where a label cannot be written: then none could.
    """
    claim_folder(labels, settings)
    wanted = settings_hash(dataclasses.asdict(settings))
    mine = [i for i, key in enumerate(dataset.keys) if shard_of(key, shard[1]) == shard[0]]
    check = tqdm(mine, desc="check", unit="label", disable=len(mine) < 1000)
    missing = [i for i in check if not _has_label(labels, dataset.keys[i], wanted)]
    at_once = PAIRS_AT_ONCE[torch.device(device).type]
    chunks = [missing[i : i + at_once] for i in range(0, len(missing), at_once)]
    most = usable_cores() if device == "cpu" else min(8, usable_cores())  # each has a context and a batch on the GPU
    processes = 0 if workers == 1 else min(workers or most, len(chunks))
    failed, allowed = [], max_broken * max(100, len(mine))
    name = "teacher" if shard[1] == 1 else f"teacher {shard[0]}/{shard[1]}"
    with tqdm(total=len(missing), desc=name, unit="pair", disable=not missing) as progress:
        for chunk, errors in _in_processes(chunks, processes, (dataset, labels, settings, device)):
            for index, error in zip(chunk, errors, strict=True):
                if error is not None:
                    failed.append((dataset.keys[index], error))
                    _set_aside(labels, *failed[-1])
            progress.update(len(chunk))
            if len(failed) > allowed:
                raise DataError(
                    f"{len(failed)} pairs could not be labelled, more than --max-broken {max_broken} of {len(mine)}; "
                    f"mend the data, or allow more; the first is {tuple(failed[0][0])}: {failed[0][1]}"
                )
    return LabelCount(len(missing) - len(failed), len(mine) - len(missing), failed)


def claim_folder(labels: str | Path, settings: nsfp.NSFPSettings) -> None:
    """Write the teacher's settings into a new folder of labels, or raise DataError if it has been given others."""
    file, wanted = Path(labels) / "settings.json", dataclasses.asdict(settings)
    for left_over in Path(labels).rglob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process has finished it, or swept it up
            if time.time() - left_over.stat().st_mtime > 3600:  # of a process that was killed: no file takes so long
                left_over.unlink()
    if not file.exists():
        if next(itertools.chain(Path(labels).glob("*/*.feather"), Path(labels).glob("*/*.npz")), None):
            raise DataError(f"{file}: is missing, so whose labels are these? Restore it, or choose another folder")
        proposal = file.with_name(f".settings.{uuid.uuid4().hex}.tmp")
        with atomic_file(proposal) as out:
            out.write(json.dumps(wanted, indent=2).encode())
        try:
            os.link(proposal, file)
        except FileExistsError:
            pass  # another run was first: let us see whether it wants the same
        except OSError:  # a file system without links: there, of two runs that start at once, the last one wins
            os.replace(proposal, file)
        proposal.unlink(missing_ok=True)
    found = folder_settings(labels)
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if names:
        differences = ", ".join(f"{name} {found.get(name)!r} there, {wanted.get(name)!r} here" for name in names)
        raise DataError(f"{labels}: holds labels of other settings ({differences}); choose another folder")


def folder_settings(labels: str | Path) -> dict:
    """The settings that a folder's labels were made with."""
    file = Path(labels) / "settings.json"
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: is no JSON ({error}); restore it, or label into another folder") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file}: holds no settings; restore it, or label into another folder")
    return settings


def shard_of(key: PairKey, shards: int) -> int:
    """0 ... shards - 1: the shard of a pair, the same on every machine, whatever else the data set holds."""
    digest = hashlib.sha256(f"{key.log_id}/{key.timestamp0_ns}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % shards


def chosen_shard(text: str = "", environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(i, n) of `--shard i/n`, else torchrun's RANK and WORLD_SIZE, else a SLURM array's, else (0, 1): everything."""
    where = f"--shard {text}"
    if text:
        shard, _, shards = text.partition("/")
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        shard, shards, where = environment["RANK"], environment["WORLD_SIZE"], "RANK/WORLD_SIZE"
    elif "SLURM_ARRAY_TASK_ID" in environment:
        shard, shards = environment["SLURM_ARRAY_TASK_ID"], environment.get("SLURM_ARRAY_TASK_COUNT", "")
        where = "SLURM_ARRAY_TASK_ID/SLURM_ARRAY_TASK_COUNT"
    else:
        return 0, 1
    if not (shard.isdecimal() and shards.isdecimal() and int(shard) < int(shards)):
        raise DataError(f"{where}: {shard!r} of {shards!r} is no shard; shards are 0/n ... n-1/n, so say --shard i/n")
    return int(shard), int(shards)


def usable_cores() -> int:
    """Cores for this process: those a scheduler lets it run on, shared with torchrun's other ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def label_state(labels: str | Path, key: PairKey, wanted: str) -> tuple[str, Label | str]:
    """What there is for a pair: ("made", its label), or "missing", "torn" or "foreign" and what is wrong with it.

    A label is made if it validates, not if a file of its name exists; foreign, if its settings' hash is not `wanted`.
    """
    path = label_path(labels, key)
    if not path.exists():
        return "missing", ""
    try:
        label = read_label(labels, key)
    except DataError as error:
        return "torn", str(error)
    if settings_hash(label.settings) != wanted:
        return "foreign", f"{path}: is of other settings than its folder's settings.json; move it away"
    return "made", label


def _has_label(labels: str | Path, key: PairKey, wanted: str) -> bool:
    state, found = label_state(labels, key, wanted)
    if state == "foreign":
        raise DataError(found)
    return state == "made"


def _broken_path(labels: str | Path, key: PairKey) -> Path:
    return label_path(labels, key).with_suffix(".broken.json")


def _set_aside(labels: str | Path, key: PairKey, reason: str) -> None:
    with atomic_file(_broken_path(labels, key)) as file:
        file.write(json.dumps({**key._asdict(), "reason": reason}, indent=2).encode())


def _label_chunk(chunk: Sequence[int], dataset, labels, settings, device) -> list[str | None]:
    """Write the labels of some pairs. For each of them what was wrong with it, None if nothing was."""
    errors, pairs = dict.fromkeys(chunk), {}
    for index in chunk:
        try:
            pairs[index] = dataset[index]
        except (ValueError, OSError) as error:  # a file that cannot be read
            errors[index] = str(error)
    for index, label in zip(pairs, make_labels(list(pairs.values()), settings, device), strict=True):
        try:
            check_label(label)
        except DataError as error:
            errors[index] = str(error)
        else:
            write_label(labels, label)
            _broken_path(labels, label.key).unlink(missing_ok=True)
    return list(errors.values())


def _in_processes(
    chunks: Sequence[Sequence[int]], processes: int, state: tuple
) -> Iterator[tuple[Sequence[int], list]]:
    """Yield (chunk, result of `_label_chunk`) as they are done, in so many processes; 0: in this one.

    Each process has a pipe of its own, so that when one dies (out of memory, killed) it is known which chunk it had:
    that one is reported, and another process goes on with the rest. No standard pool does this.
    """
    if processes == 0:
        with one_thread():
            for chunk in chunks:
                yield chunk, _label_chunk(chunk, *state)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process whose torch has run threads may hang
    waiting, crew, busy = iter(chunks), [], {}  # busy: pipe -> (its process, its chunk)

    def hire() -> tuple:
        pipe, theirs = context.Pipe()
        crew.append(context.Process(target=_work, args=(theirs,), daemon=True))
        crew[-1].start()
        theirs.close()  # so that the pipe ends when the process does
        return pipe, crew[-1]

    def hand_over(pipe, process, *first) -> None:
        chunk = next(waiting, None)
        if chunk is not None:
            busy[pipe] = process, chunk
            with contextlib.suppress(ConnectionError):  # it has died meanwhile: `recv` will tell
                for message in (*first, chunk):
                    pipe.send(message)

    try:
        for pipe, process in [hire() for _ in range(processes)]:
            hand_over(pipe, process, state)
        while busy:
            for pipe in multiprocessing.connection.wait(list(busy)):
                process, chunk = busy.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    died = f"its process died (exit code {process.exitcode}; -9: killed, often for want of memory)"
                    result = [died] * len(chunk)
                    hand_over(*hire(), state)
                else:
                    if isinstance(result, Exception):
                        raise result
                    hand_over(pipe, process)
                yield chunk, result
    finally:
        for process in crew:
            if process.pid:  # else it never started, and an error about that is on its way
                process.kill()


def _work(pipe) -> None:
    """What a process of `_in_processes` does until the pipe ends: take a chunk, give its result or an exception."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        state = pipe.recv()
        while True:
            chunk = pipe.recv()
            try:
                result = _label_chunk(chunk, *state)
            except Exception as error:  # a label that cannot be written, or a mistake of ours: the run stops with it
                if not isinstance(error, OSError):
                    error.add_note(traceback.format_exc())  # a traceback itself does not travel
                result = error
            pipe.send(result)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread: the teacher's matrices are too small to gain from a second, and times compare better."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def label_status(dataset: data.Pairs, labels: str | Path) -> tuple[dict[str, dict[PairKey, str]], list[float]]:
    """The pairs by the state of their label, each with what is wrong, and the seconds that those made have taken.

    States: "made", "missing", "torn", "set aside" by `label`, and "foreign": of other settings than the folder's.
    """
    states = {name: {} for name in ("made", "missing", "torn", "set aside", "foreign")}
    wanted, seconds = settings_hash(folder_settings(labels)), []
    for key in tqdm(dataset.keys, desc="check", unit="label", disable=len(dataset) < 1000):
        state, found = label_state(labels, key, wanted)
        if state == "made":
            seconds.append(found.seconds)
            found = ""
        elif state != "foreign":
            with contextlib.suppress(FileNotFoundError):  # never set aside, or made by a run of this moment
                found, state = json.loads(_broken_path(labels, key).read_text())["reason"], "set aside"
        states[state][key] = found
    return states, seconds


# --- The loss --------------------------------------------------------------------------------------------------------


def speed_weight(speed_mps: torch.Tensor, kind: str = "formula") -> torch.Tensor:
    """Weight of a point by the speed (m/s) of its label, of the shape of `speed_mps`.

    "formula": the paper's max(0.1, min(1, 1.8 s - 0.8)): 0.1 below 0.5 m/s, 1 above 1 m/s.
    "published": what the published code computes, min and max swapped: 0.1 at every speed. The published runs are
    therefore close to unweighted ones, since Adam hardly minds a constant factor.
    "none": 1.
    """
    if kind == "formula":
        return (1.8 * speed_mps - 0.8).clamp(0.1, 1.0)
    if kind == "published":
        return torch.full_like(speed_mps, 0.1)
    if kind == "none":
        return torch.ones_like(speed_mps)
    raise ValueError(f"speed weight {kind!r}: choose formula, published or none")


def distillation_loss(
    estimates: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    weight: str = "formula",
    point_weights: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The paper's loss for lists of estimates (N, 3), labels (N, 3) and masks (N,) bool of the rows that count.

    Per sample sum(w · |estimate - label|) / N over the N rows of the mask, summed over the batch. Note: divided by N,
    not by the sum of the weights. A sample without rows adds 0. w is the weight of the label's speed, times that of
    point_weights (N,) where given: with `weight` "none", 0.1 for background and 1 for the rest it is FastFlow3D's loss.
    """
    total = estimates[0].new_zeros(())
    for i, (estimate, label, mask) in enumerate(zip(estimates, labels, masks, strict=True)):
        error = (estimate[mask] - label[mask]).norm(dim=1)  # (N,) metres
        weights = speed_weight(metrics.SWEEPS_PER_S * label[mask].norm(dim=1), weight)
        if point_weights is not None:
            weights = weights * point_weights[i][mask]
        total = total + (weights * error).sum() / max(1, len(error))
    return total


# --- The evaluation --------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Of one pair: residual flow (N0, 3) on the CPU, the seconds it took, and what moves (N0,) if a method says so."""

    flow: torch.Tensor
    seconds: float
    is_dynamic: torch.Tensor | None = None


Estimator = Callable[[SweepPair], Estimate]
Student = fastflow3d.FastFlow3D | fastflow3d.FastFlow3DInference


def evaluate(
    dataset: Sequence[SweepPair],
    estimator: Estimator,
    challenge_mask: Callable[[SweepPair], torch.Tensor | None] | None = None,
    pair_three_ways: dict[int, float] | None = None,
    max_broken: float = 0.0,
) -> dict[str, float]:
    """Every metric of metrics.py over a data set with true flow, as a flat dictionary; metres and seconds.

    Means pool all points. grid_three_way_pair_mean is the mean over pairs of each pair's own, where a sweep with one
    big car near by counts no more than another; `pair_three_ways` is given each of them, by index. challenge_mask: the
    (N0,) points of the 2023 challenge, without which the av2 numbers are NaN. seconds_per_pair is the median.
    A pair that cannot be read or estimated is said on stderr and left out, up to a share of `max_broken` of the pairs
    (counted as 100 at least); "broken" counts them.
    Raises DataError for the pair that is one too many, or has no true flow, or if no pair is left.
    """
    scores, seconds, broken = metrics.Scores(data.CATEGORIES), [], 0
    for index in tqdm(range(len(dataset)), desc="evaluate", unit="pair", disable=len(dataset) < 2):
        try:
            pair = dataset[index]
            estimate = estimator(pair)
            mask = challenge_mask(pair) if challenge_mask else None
        except (DataError, OSError) as error:
            broken += 1
            if broken > max_broken * max(100, len(dataset)):
                more = f"; {broken} of {len(dataset)} are broken so far, see --max-broken" if broken > 1 else ""
                raise DataError(f"{error}{more}") from error
            print(f"left out: {error}", file=sys.stderr)
            continue
        if pair.flow is None:
            raise DataError(
                f"{tuple(pair.key)}: no true flow to compare with; evaluate a split with annotations.feather"
            )
        check_flow(estimate.flow, pair)
        scores.add(
            estimate.flow,
            pair.flow,
            points=pair.pc0,
            category=pair.category,
            is_dynamic=pair.is_dynamic,
            is_valid=pair.is_valid,
            is_ground=pair.is_ground0,
            is_input=input_masks(pair)[0],
            raw=None if mask is None else [data.total_flow(flow, pair) for flow in (estimate.flow, pair.flow)],
            is_in_mask=mask,
            says_dynamic=estimate.is_dynamic,
        )
        seconds.append(estimate.seconds)
        if pair_three_ways is not None:
            pair_three_ways[index] = scores.pair_three_ways[-1]
    if not seconds:
        raise DataError(f"none of {len(dataset)} pairs could be evaluated; see above")
    counts = {"pairs": len(seconds), "broken": broken}
    return counts | scores.numbers() | {"seconds_per_pair": float(np.median(seconds))}


def check_flow(flow: torch.Tensor, pair: SweepPair) -> None:
    """Raise DataError for a flow (N0, 3) that is not finite at a point that is: it would count as no error at all."""
    is_lost = ~flow.isfinite().all(dim=1) & pair.pc0.isfinite().all(dim=1)
    if is_lost.any():
        raise DataError(
            f"{tuple(pair.key)}: flow is not finite at {int(is_lost.sum())} points; did the training diverge?"
        )


def timed(estimate: Callable[[SweepPair], torch.Tensor], warm_up: bool = False) -> Estimator:
    """Make an Estimator of a function, with its wall time (until the flow is back on the CPU)."""
    is_cold = warm_up

    def estimator(pair: SweepPair) -> Estimate:
        nonlocal is_cold
        if is_cold:
            estimate(pair)
            is_cold = False
        start = time.perf_counter()
        flow = estimate(pair).cpu()  # on a GPU, the time until the flow has come back
        return Estimate(flow, time.perf_counter() - start)

    return estimator


def no_motion(pair: SweepPair) -> torch.Tensor:
    """Baseline: nothing moves but the ego."""
    return torch.zeros_like(pair.pc0)


def nearest_neighbour(pair: SweepPair) -> torch.Tensor:
    """Baseline: every point goes to the nearest of sweep 1 (both without ground and in the grid, no truncation)."""
    is_source, is_target = input_masks(pair)
    flow = torch.zeros_like(pair.pc0)
    source, target = pair.pc0[is_source], pair.pc1[is_target]
    if len(target):
        flow[is_source] = target[nsfp.Neighbours(target).nearest(source)] - source
    return flow


BASELINES = {"no-motion": no_motion, "nearest": nearest_neighbour}


def from_labels(labels: LabelFolder) -> Estimator:
    """The flow of a label folder, with the seconds it once took."""

    def estimator(pair: SweepPair) -> Estimate:
        label = labels.read(pair)
        return Estimate(label.flow, label.seconds)

    return estimator


def from_teacher(settings: nsfp.NSFPSettings, device: str = "cpu") -> Estimator:
    """The teacher itself, run anew on every pair."""

    def estimator(pair: SweepPair) -> Estimate:
        label = make_labels([pair], settings, device)[0]
        check_label(label)
        return Estimate(label.flow, label.seconds)

    return estimator


def from_predictions(predictions: data.ChallengePredictions) -> Estimator:
    """Flow out of a challenge's files, which do not say how long it took."""

    def estimator(pair: SweepPair) -> Estimate:
        flow, is_dynamic = predictions(pair)
        return Estimate(flow, math.nan, is_dynamic)

    return estimator


def from_student(model: Student) -> Estimator:
    """A student in evaluation mode, on the device it lies on. What it has no estimate for keeps residual 0."""
    model.eval()
    return timed(lambda pair: _student_flow(model, pair)[0], warm_up=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """The headline numbers of several results of `evaluate`, a line each."""
    columns = {
        "grid 3-way": "grid_three_way",
        "FD": "grid_three_way_fd",
        "FS": "grid_three_way_fs",
        "BS": "grid_three_way_bs",
        "EPE": "grid_epe",
        "pair mean": "grid_three_way_pair_mean",
        "paper 3-way": "paper_three_way",
    }
    width = max(map(len, rows))
    lines = [" ".join([" " * width, *(f"{name:>11}" for name in columns), f"{'ms a pair':>11}"])]
    for name, row in rows.items():
        cells = [f"{row[key]:11.4f}" for key in columns.values()]
        lines.append(" ".join([f"{name:<{width}}", *cells, f"{1e3 * row['seconds_per_pair']:11.1f}"]))
    return "\n".join(lines)


def write_submission(
    file: Path,
    dataset: data.Pairs,
    estimator: Estimator,
    challenge: int,
    masks: data.ChallengeFiles | None = None,
    is_supervised: bool = False,
) -> int:
    """Write the zip that a challenge (2023 or 2024) takes, whole or not at all. Returns the number of pairs in it.

    masks: the 2023 challenge's, which then say which pairs and points it scores; None: both as av2's tools choose them.
    Raises DataError where a pair that is scored cannot be estimated: a submission that lacks one is refused.
    """
    members = data.challenge_members(dataset, challenge)
    if masks is not None:
        every = {(key.log_id, str(key.timestamp0_ns)): key for key in data.neighbours(dataset)}
        lost = [name for name in masks.members if name not in every]
        if lost:
            raise DataError(
                f"{masks.path}: masks {'/'.join(lost[0])}, which no two sweeps of the data are; is it of this split?"
            )
        members = {f"{'/'.join(name)}.feather": every[name] for name in masks.members}
    with atomic_file(file) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if challenge == 2024:
            archive.writestr("metadata.json", json.dumps({"Is Supervised?": is_supervised}))
        for name, key in tqdm(members.items(), desc="submit", unit="pair"):
            pair = dataset.read(key)
            mask = None if challenge == 2024 else masks.mask(pair) if masks else dataset.challenge_mask(pair)
            if challenge == 2023 and mask is None:
                raise DataError(f"{key.log_id}: no ground raster to make a mask of; give --masks")
            flow = estimator(pair).flow
            check_flow(flow, pair)
            archive.writestr(name, data.challenge_file(pair, flow, challenge, mask))
    return len(members)


# --- Use -------------------------------------------------------------------------------------------------------------


def predict(
    model: Student,
    pc0: np.ndarray | torch.Tensor,
    pc1: np.ndarray | torch.Tensor,
    ego1_SE3_ego0: np.ndarray | torch.Tensor | None = None,
    is_ground0: np.ndarray | torch.Tensor | None = None,
    is_ground1: np.ndarray | torch.Tensor | None = None,
    total: bool = False,
) -> np.ndarray | torch.Tensor:
    """Residual flow (N0, 3) float32 in metres of every row of pc0 (N0, 3), given pc1 (N1, 3); an array as pc0 is one.

    With a pose (4, 4), each cloud is in its own ego frame, and `total` asks for the raw flow, ego-motion included;
    without one both are in the same frame. Ground masks (N,) bool; without them nothing is ground.
    Ground, NaN and what lies outside the model's grid keep residual 0: they move as the ego says (a NaN to NaN).
    Raises ValueError where shapes do not fit, or the model is in training mode.
    """
    pair = data.pair_of_clouds(pc0, pc1, ego1_SE3_ego0, is_ground0, is_ground1)
    flow, _ = _student_flow(model, pair)
    if total:
        flow = data.total_flow(flow, pair)
    return flow.to(pc0.device) if isinstance(pc0, torch.Tensor) else flow.numpy()


@torch.no_grad()
def _student_flow(model: Student, pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual flow (N0, 3), and has_flow (N0,): not ground, and in the model's grid; on the CPU."""
    if model.training:
        raise ValueError("the student is in training mode; call model.eval() or model.prepare_inference()")
    device = next(model.parameters()).device
    rows = ~pair.is_ground0
    flows, masks = model([pair.pc0[rows].to(device)], [pair.pc1[~pair.is_ground1].to(device)])
    flow, has_flow = torch.zeros_like(pair.pc0), torch.zeros_like(rows)
    flow[rows], has_flow[rows] = flows[0].cpu(), masks[0].cpu()
    return flow, has_flow


def write_flow(path: Path, flow: torch.Tensor, has_flow: torch.Tensor) -> None:
    """Flow (N, 3) and has_flow (N,) as .feather, with the columns of a label but in float32, or .npz; whole or not."""
    with atomic_file(path) as file:
        if path.suffix == ".npz":
            np.savez(file, flow=flow.numpy(), has_flow=has_flow.numpy())
        else:
            columns = {name: flow[:, i].numpy() for i, name in enumerate(data.FLOW_COLUMNS)}
            feather.write_feather(pyarrow.table({**columns, "has_flow": has_flow.numpy()}), file)


# --- The commands ----------------------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser, settings_class: type) -> None:
    """An option --name for every field of a dataclass of settings, typed as its default; a tuple's may be repeated."""
    for field in dataclasses.fields(settings_class):
        kind, action = type(field.default), "store"
        if kind is tuple:
            kind, action = int if "int" in str(field.type) else str, "append"
        parse = _parse_bool if kind is bool else kind
        note = f"(default of {settings_class.__name__}: {field.default!r})"
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=parse, action=action, metavar=kind.__name__, help=note)


def chosen_settings(arguments: argparse.Namespace, base):
    """`base` with the fields that were given on the command line."""
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(base)}
    try:
        return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:  # settings that do not go together
        raise DataError(error) from error


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise DataError(
            f"--device {device!r}: choose cpu{', or cuda' if torch.cuda.is_available() else ': no GPU here'}"
        )


def _synthesize(arguments: argparse.Namespace) -> int:
    settings = chosen_settings(arguments, synthetic.PRESETS[arguments.preset])
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        raise DataError(f"{arguments.out}: is not empty; choose a new folder")
    print(f"settings: {settings}")
    synthetic.write_logs(arguments.out, arguments.logs, settings)
    pairs = data.open_dataset(arguments.out)
    print(f"{arguments.logs} logs, {len(pairs)} pairs, in {arguments.out}")
    return 0


def _label(arguments: argparse.Namespace) -> int:
    settings = chosen_settings(arguments, nsfp.TEACHERS[arguments.teacher])
    print(f"settings: {settings}")
    check_device(arguments.device)
    shard, device = chosen_shard(arguments.shard), arguments.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise DataError(f"torchrun's rank {device}: start as many ranks as there are GPUs, or say --device cpu")
    dataset = open_and_tell(arguments.data, arguments, true_flow=False)
    start = time.perf_counter()
    count = label_dataset(
        dataset, arguments.labels, settings, arguments.workers, device, shard, max_broken=arguments.max_broken
    )
    for key, reason in count.failed:
        print(f"no label for {tuple(key)}: {reason}", file=sys.stderr)
    made = f"{count.made} labels made in {(time.perf_counter() - start) / 60:.1f} min"
    print(
        f"{arguments.labels}, shard {shard[0]}/{shard[1]}: {made}, {count.found} found, {len(count.failed)} set aside",
        flush=True,
    )
    # torchrun stops all ranks as soon as one fails: there a pair set aside must not cost the others their work.
    return 1 if count.failed and "TORCHELASTIC_RUN_ID" not in os.environ else 0


def _status(arguments: argparse.Namespace) -> int:
    if arguments.shards < 1:
        raise DataError(f"--shards {arguments.shards}: must be positive")
    dataset = open_and_tell(arguments.data, arguments, true_flow=False)
    if not (Path(arguments.labels) / "settings.json").exists():
        raise DataError(f"{arguments.labels}: is no folder of labels; make it with `python zeroflow.py label`")
    states, seconds = label_status(dataset, arguments.labels)
    counts = ", ".join(f"{len(pairs)} {state}" for state, pairs in states.items() if pairs or state != "foreign")
    for state in ("set aside", "torn"):
        for key, reason in states[state].items():
            print(f"{state}: {tuple(key)}: {reason}")
    for key in states["foreign"]:
        print(f"of other settings: {label_path(arguments.labels, key)}; move it away")
    to_make = [*states["missing"], *states["torn"]]
    again = [f"{i}/{arguments.shards}" for i in sorted({shard_of(key, arguments.shards) for key in to_make})]
    if again:
        print("run again:", " ".join(f"--shard {shard}" for shard in again))
    hours = None
    if seconds:
        each_s = float(np.mean(seconds))
        hours = len(to_make) * each_s / 3600
    if to_make and seconds:
        price = f", {hours * arguments.price:.2f} $" if arguments.price else ""
        print(f"left: {hours:.2f} hours of one worker, at {each_s:.2f} s a pair{price}")
    if arguments.json:
        numbers = {state.replace(" ", "_"): len(pairs) for state, pairs in states.items()}
        with atomic_file(Path(arguments.json)) as file:
            file.write(json.dumps({**numbers, "run_again": again, "hours_left": hours}, indent=2).encode())
    print(f"{arguments.labels}: {counts}, of {len(dataset)} pairs")
    return 0 if len(states["made"]) == len(dataset) else 1


def _check(arguments: argparse.Namespace) -> int:
    check_device(arguments.device)
    dataset = open_and_tell(arguments.data, arguments)
    found = survey(dataset, arguments.sample)
    found["kind"] = type(dataset).__name__.removesuffix("Pairs")
    found["bytes"] = sum(file.stat().st_size for file in Path(arguments.data).rglob("*") if file.is_file())
    if arguments.labels:
        found |= survey_labels(dataset, arguments.labels, arguments.sample)
    broken = [*found["broken"], *found.get("labels_broken", [])]
    is_usable = len(broken) <= arguments.max_broken * found["pairs_read"] and found.get("labels_found", 1) > 0
    hours = found["seconds_recorded"] / 3600
    print(f"{arguments.data}: {found['kind']}, {found['logs']} logs, {found['pairs']} pairs, {hours:.3g} hours", end="")
    print(f", {len(found['skipped'])} neighbours or files that make no pair")
    print(f"disk: {found['bytes'] / 1e9:.2f} GB")
    for line in broken:
        print(f"broken: {line}")
    print(f"read: {found['pairs_read']} pairs, evenly spread, {len(found['broken'])} broken", end="")
    if len(found["broken"]) < found["pairs_read"]:
        found |= cost(dataset, arguments.device, arguments.model)
        print(f", {1e3 * found['seconds_to_read']:.0f} ms a pair, {found['pairs_with_true_flow']} with true flow")
        shares = (
            f"{found['share_not_ground']:.0%} not ground, {found['share_input']:.0%} that and in the student's grid"
        )
        print(f"points a sweep: {found['points_least']} to {found['points_most']}, {shares}")
        label_hours, train_hours = (found["pairs"] * found[f"seconds_to_{what}"] / 3600 for what in ("label", "train"))
        print(f"labels by fast: {found['seconds_to_label']:.2f} s a pair here, {label_hours:.3g} hours of one worker")
        train = f"training {arguments.model}: {found['seconds_to_train']:.2f} s a pair here"
        print(f"{train}, {train_hours:.3g} hours an epoch", end="")
    print()
    if arguments.labels:
        lacking = found["labels_lacking"]
        where = f": {', '.join(f'{count} of {log}' for log, count in list(lacking.items())[:5])}" if lacking else ""
        more = f" and of {len(lacking) - 5} more logs" if len(lacking) > 5 else ""
        print(f"{arguments.labels}: {found['labels_found']} labels, {sum(lacking.values())} pairs without{where}{more}")
    if arguments.json:
        with atomic_file(Path(arguments.json)) as file:
            file.write(json.dumps({**found, "is_usable": is_usable}, indent=2).encode())
    reason = (
        "there is no label" if not found.get("labels_found", 1) else f"more than {arguments.max_broken:.0%} is broken"
    )
    print("can be used" if is_usable else f"cannot be used: {reason}")
    return 0 if is_usable else 1


def spread(dataset: data.Pairs, sample: int) -> list[int]:
    """Indices of `sample` pairs (0: all), evenly spread."""
    count = min(sample or len(dataset), len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def survey(dataset: data.Pairs, sample: int) -> dict:
    """What a data set holds, from reading `sample` of its pairs; `broken` says what is wrong with those it cannot."""
    spans = [stamps[-1] - stamps[0] for stamps in dataset.stamps.values() if stamps]
    result = {"logs": len(dataset.stamps), "pairs": len(dataset), "seconds_recorded": sum(spans) / 1e9}
    points, shares, seconds, broken, with_true_flow = [], [], [], [], 0
    for index in tqdm(spread(dataset, sample), desc="check", unit="pair"):
        start = time.perf_counter()
        try:
            pair = dataset[index]
        except (DataError, OSError) as error:
            broken.append(str(error))
            continue
        seconds.append(time.perf_counter() - start)
        points.append(len(pair.pc0))
        shares.append([mask.float().mean().item() for mask in (~pair.is_ground0, input_masks(pair)[0])])
        with_true_flow += pair.flow is not None
    result |= {"skipped": dataset.skipped, "broken": broken, "pairs_read": len(points) + len(broken)}
    if points:
        not_ground, is_input = np.mean(shares, axis=0).tolist()
        result |= {"points_least": min(points), "points_most": max(points), "pairs_with_true_flow": with_true_flow}
        result |= {
            "share_not_ground": not_ground,
            "share_input": is_input,
            "seconds_to_read": float(np.median(seconds)),
        }
    return result


def survey_labels(dataset: data.Pairs, labels: str, sample: int) -> dict:
    """How many pairs have a label, how many of each log have none, and what is wrong with those of `sample` pairs."""
    try:
        folder = open_labels(labels, dataset)
    except DataError as error:
        folder = LabelFolder([], None)
        print(error, file=sys.stderr)
    has_label, lacking, broken = set(folder.keys), collections.Counter(), []
    lacking.update(key.log_id for key in dataset.keys if key not in has_label)
    for index in spread(dataset, sample):
        if dataset.keys[index] in has_label:
            try:
                pair = dataset[index]
            except (DataError, OSError):
                continue  # a sweep that cannot be read is no fault of its label
            try:
                folder.read(pair)
            except (DataError, OSError) as error:
                broken.append(str(error))
    return {"labels_found": len(folder.keys), "labels_lacking": dict(lacking), "labels_broken": broken}


def cost(dataset: data.Pairs, device: str, model: str) -> dict[str, float]:
    """Seconds that the `fast` teacher and a step of a student take for the first pair that can be read."""
    for index in range(len(dataset)):
        with contextlib.suppress(DataError, OSError):
            pair = dataset[index]
            break
    start = time.perf_counter()
    with one_thread():
        make_labels([pair], nsfp.TEACHERS["fast"], device)
    return {
        "seconds_to_label": time.perf_counter() - start,
        "seconds_to_train": _seconds_to_train(pair, device, model),
    }


def _seconds_to_train(pair: SweepPair, device: str, name: str) -> float:
    """Of one pair in a student's step, the second time."""
    model = fastflow3d.FastFlow3D(fastflow3d.MODELS[name]).to(device, memory_format=torch.channels_last).train()
    pc0, pc1 = pair.pc0[~pair.is_ground0].to(device), pair.pc1[~pair.is_ground1].to(device)
    for _ in range(2):
        start = time.perf_counter()
        flows, _ = model([pc0], [pc1])
        flows[0].norm(dim=1).sum().backward()
        flows[0].cpu()  # by then a GPU is done, too
    return time.perf_counter() - start


def open_and_tell(path: str, options, true_flow: bool = True) -> data.Pairs:
    """Open a data set as options (parsed, or TrainSettings) say; on stderr, what was assumed, and what is no pair."""
    chosen = {name: getattr(options, name) for name in ("ground", "pairs_per_log", "sweeps_per_log", "rate_hz")}
    dataset = data.open_dataset(path, true_flow, poses=options.poses or None, **chosen)
    for line in (*dataset.notes, *dataset.skipped):
        print(line, file=sys.stderr)
    return dataset


def add_data_options(sub: argparse.ArgumentParser) -> None:
    """--data, and how to take it: see `data.open_dataset`."""
    sub.add_argument("--data", required=True, help="a split (folder of logs), one log, or a folder of clouds")
    sub.add_argument("--ground", default="", help=f"{', '.join(data.GROUNDS)} (default: the first that there is)")
    sub.add_argument(
        "--pairs-per-log", type=int, default=0, help="12 of LiDAR logs: the paper's 3x; 24: 5x (default: all)"
    )
    sub.add_argument(
        "--sweeps-per-log", type=int, default=0, help="the first; 145 as the published code (default: all)"
    )
    sub.add_argument("--poses", default="", metavar="FILE", help="poses of a folder of clouds, if not beside them")
    sub.add_argument("--rate-hz", type=float, default=10.0, help="of clouds without time stamps (default: 10)")


def add_max_broken(sub: argparse.ArgumentParser, of: str = "pairs (counted as 100 at least)") -> None:
    text = f"give up where more of the {of} are broken (default: %(default)s)"
    sub.add_argument("--max-broken", type=float, default=0.05, metavar="SHARE", help=text)


def _evaluate(arguments: argparse.Namespace) -> int:
    estimator = _chosen_estimator(arguments)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
    dataset, masks = open_and_tell(arguments.data, arguments), _masks(arguments)
    pairs_before = len(dataset)
    if arguments.labels:
        labels = open_labels(arguments.labels, dataset)
        estimator = from_labels(labels)
        _cut_to(dataset, labels.keys, arguments.labels)
    if arguments.predictions:
        predictions = data.ChallengePredictions(arguments.predictions, dataset, masks)
        estimator = from_predictions(predictions)
        _cut_to(dataset, predictions.keys, f"{arguments.predictions}, as for the challenge of {predictions.challenge}")
    mask = masks.mask if masks else dataset.challenge_mask
    pair_three_ways = {}
    result = evaluate(dataset, estimator, mask, pair_three_ways, arguments.max_broken)
    name = next(str(value) for value in (getattr(arguments, source) for source in SOURCES) if value)
    print(table({name: result}), metrics.report(result), sep="\n\n")
    is_whole = result["pairs"] == pairs_before and len(dataset.stamps) == metrics.AV2_VAL_LOGS
    if is_whole and Path(arguments.data).name == "val":
        print(metrics.beside_the_paper(name, result))
    if arguments.json:
        with atomic_file(Path(arguments.json)) as file:
            known = {key: None if math.isnan(value) else value for key, value in result.items()}  # JSON has no NaN
            file.write(json.dumps(known, indent=2).encode())
    if arguments.figures:
        _draw_figures(arguments.figures, dataset, estimator, name, result, pair_three_ways)
    if result["broken"]:
        print(f"{result['broken']} pairs were left out; stderr says why")
    return 1 if result["broken"] else 0


def _cut_to(dataset: data.Pairs, keys: list[PairKey], what: str) -> None:
    """Leave only these pairs in the data set, and say so."""
    has = set(keys)
    without = [key for key in dataset.keys if key not in has]
    first = f"; without is, for one, {tuple(without[0])}" if without else ""
    print(f"{what}: has {len(keys)} of {len(dataset)} pairs{first}")
    dataset.keys = keys


SOURCES = ("checkpoint", "labels", "teacher", "baseline", "predictions")


def _masks(arguments: argparse.Namespace) -> data.ChallengeFiles | None:
    return data.ChallengeFiles(arguments.masks) if arguments.masks else None


def _chosen_estimator(arguments: argparse.Namespace) -> Estimator | None:
    """What --checkpoint, --teacher or --baseline names; None for what needs the data first."""
    check_device(arguments.device)
    settings = chosen_settings(arguments, nsfp.TEACHERS[arguments.teacher or "fast"])
    if not arguments.teacher and settings != nsfp.TEACHERS["fast"]:
        raise DataError("settings of a teacher were given without --teacher")
    if arguments.dtype != "float32" and not arguments.checkpoint:
        raise DataError("--dtype: is the student's; give its --checkpoint")
    if arguments.checkpoint:
        return from_student(_load_student(arguments))
    if arguments.teacher:
        print(f"settings: {settings}")
        torch.set_num_threads(1)
        return from_teacher(settings, arguments.device)
    return timed(BASELINES[arguments.baseline], warm_up=True) if arguments.baseline else None


def _draw_figures(folder: Path, dataset, estimator: Estimator, name: str, result: dict, pair_three_ways: dict) -> None:
    """Error by speed and distance, error against time, and the worst and the median pair (by grid three-way)."""
    import viz  # matplotlib is loaded only when a picture is asked for

    figures = {
        "error_by_speed": viz.error_by_speed_figure({name: result}),
        "error_by_distance": viz.error_by_distance_figure({name: result}),
        "error_against_time": viz.error_against_time_figure({name: result}),
    }
    known = [index for index, value in pair_three_ways.items() if not math.isnan(value)]
    order = sorted(known, key=pair_three_ways.get)  # best first
    for place, index in (("median", order[len(order) // 2]), ("worst", order[-1])) if order else ():
        pair = dataset[index]
        title = f"the {place} pair: {pair.log_id}, {pair.timestamp0_ns}; grid 3-way {pair_three_ways[index]:.3f} m"
        half_m = data.GRID_HALF_EXTENT_M[0]
        figures[f"{place}_pair"] = viz.error_map_figure(pair, estimator(pair).flow, input_masks(pair)[0], title, half_m)
    for file, figure in figures.items():
        figure.savefig(folder / f"{file}.png", dpi=120)
    print(f"figures: {folder}/" + ".png, ".join(figures) + ".png")


def _submit(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix != ".zip":
        raise DataError(f"{arguments.out}: choose a name that ends in .zip")
    if arguments.masks and arguments.challenge == 2024:
        raise DataError("--masks: are of the 2023 challenge; that of 2024 scores every point")
    if arguments.supervised and arguments.challenge == 2023:
        raise DataError("--supervised: is asked in 2024 only")
    estimator, masks = _chosen_estimator(arguments), _masks(arguments)
    dataset = open_and_tell(arguments.data, arguments, true_flow=False)
    if arguments.labels:
        estimator = from_labels(open_labels(arguments.labels, dataset))
    count = write_submission(arguments.out, dataset, estimator, arguments.challenge, masks, arguments.supervised)
    print(f"{arguments.out}: {count} pairs for the challenge of {arguments.challenge}")
    return 0


def _load_student(arguments: argparse.Namespace) -> Student:
    check_device(arguments.device)
    try:
        model = fastflow3d.load_checkpoint(arguments.checkpoint)
    except ValueError as error:
        raise DataError(error) from error
    return model.prepare_inference(getattr(torch, arguments.dtype)).to(arguments.device)


def _predict(arguments: argparse.Namespace) -> int:
    for file, suffixes in ((arguments.out, (".feather", ".npz")), (arguments.picture, (".png", ".pdf", ".svg"))):
        if file is not None and file.suffix not in suffixes:
            raise DataError(f"{file}: choose a name that ends in {' or '.join(suffixes)}")
    if arguments.picture is not None and not arguments.picture.parent.is_dir():
        raise DataError(f"{arguments.picture}: there is no such folder; make it first")
    clouds = [data.read_cloud(file) for file in (arguments.cloud0, arguments.cloud1)]
    pose = data.read_pose(arguments.pose) if arguments.pose else None
    if pose is None:
        print("no --pose: both clouds are taken as in one frame, so residual flow is all there is")
    grounds = [None, None]
    if arguments.ground == "points":
        grounds = [data.is_ground_without_map(cloud) for cloud in clouds]
        print(f"ground: {grounds[0].mean():.0%} and {grounds[1].mean():.0%} of the points, found without a map")
    model, pair = _load_student(arguments), data.pair_of_clouds(*clouds, pose, *grounds)
    start = time.perf_counter()
    flow, has_flow = _student_flow(model, pair)
    seconds = time.perf_counter() - start
    write_flow(arguments.out, data.total_flow(flow, pair) if arguments.total else flow, has_flow)
    if arguments.picture:
        import viz  # matplotlib is loaded only when a picture is asked for

        viz.flow_figure(pair, {"student": flow}, model.settings.half_extent_m[0]).savefig(arguments.picture, dpi=120)
    if pair.is_ground0.all():
        print("all points of sweep 0 are taken for ground; leave it in by --ground none")
    elif not has_flow.any():
        extent = " x ".join(f"{2 * half:g}" for half in model.settings.half_extent_m)
        print(f"no point lies in the student's grid of {extent} m about the ego: are these clouds in an ego frame?")
    moving = int((flow.norm(dim=1) >= data.DYNAMIC_THRESHOLD_M).sum())
    kind = "total" if arguments.total else "residual"
    print(
        f"{arguments.out}: {kind} flow of {len(flow)} points, {int(has_flow.sum())} of them estimated in "
        f"{seconds:.2f} s, {moving} moving by 5 cm or more"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="ZeroFlow: scene flow via distillation.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example: python zeroflow.py {name} {example}"
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "synthesize", _synthesize, "write a synthetic street in Argoverse 2's layout", "--out street --logs 10"
    )
    sub.add_argument("--out", required=True, type=Path, help="folder of the new logs; must be new or empty")
    sub.add_argument("--logs", required=True, type=int)
    sub.add_argument(
        "--preset", choices=synthetic.PRESETS, default="full", help="size of a sweep (default: %(default)s)"
    )
    add_settings(sub, synthetic.StreetSettings)

    sub = command(
        "label", _label, "let the teacher label pairs; makes what is missing", "--data av2/train --labels labels"
    )
    add_data_options(sub)
    sub.add_argument("--labels", required=True, help="folder of the labels, one file a pair")
    sub.add_argument("--teacher", choices=nsfp.TEACHERS, default="fast", help="(default: %(default)s)")
    sub.add_argument("--workers", type=int, default=0, help="processes, one thread each (default: one a core)")
    sub.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
    sub.add_argument(
        "--shard", default="", metavar="I/N", help="part I of 0 ... N-1 (default: torchrun's rank, SLURM's array, all)"
    )
    add_max_broken(sub)
    add_settings(sub, nsfp.NSFPSettings)

    sub = command(
        "status",
        _status,
        "count the labels made, missing, torn and set aside; exit status 0 if all are made",
        "--data av2/train --labels labels --shards 16 --price 2.5",
    )
    add_data_options(sub)
    sub.add_argument("--labels", required=True, help="a folder that `label` writes")
    sub.add_argument("--shards", type=int, default=1, help="name those of so many shards that are to be run again")
    sub.add_argument("--price", type=float, default=0.0, help="dollars an hour of one worker (a core, or a GPU)")
    sub.add_argument("--json", metavar="FILE", help="write the counts, shards to run again and hours here")

    sub = command(
        "check",
        _check,
        "say what a data set holds, what is broken, and what it would cost; exit status 0 if it can be used",
        "--data av2/train --labels labels",
    )
    add_data_options(sub)
    sub.add_argument("--labels", default="", help="a folder that `label` writes, or of published labels")
    sub.add_argument("--model", choices=fastflow3d.MODELS, default="normal", help="whose training step is timed")
    sub.add_argument(
        "--sample", type=int, default=20, help="pairs to read, spread evenly; 0: all (default: %(default)s)"
    )
    sub.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
    sub.add_argument("--json", metavar="FILE", help="write the numbers here")
    add_max_broken(sub, "pairs read")

    def sources(sub: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
        add_data_options(sub)
        source = sub.add_mutually_exclusive_group(required=True)
        source.add_argument("--checkpoint", help="a student: of train.py, or a published file")
        source.add_argument("--labels", help="a folder that `label` has written")
        source.add_argument("--teacher", choices=nsfp.TEACHERS, help="run the teacher now")
        source.add_argument("--baseline", choices=BASELINES)
        sub.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the student's U-Net")
        sub.add_argument("--masks", metavar="FILE", help="the masks of the 2023 challenge, a zip or a folder")
        return source

    sub = command("evaluate", _evaluate, "compare flow with the truth", "--data av2/val --checkpoint run/last.pt")
    sources(sub).add_argument("--predictions", help="a submission to either challenge: a zip, or a folder")
    sub.add_argument("--json", metavar="FILE", help="write all numbers here, flat; metrics.py says what they mean")
    add_max_broken(sub)
    sub.add_argument(
        "--figures", type=Path, metavar="DIR", help="draw errors by speed, distance and time, and two pairs"
    )
    add_settings(sub, nsfp.NSFPSettings)

    sub = command(
        "submit",
        _submit,
        "write the archive that a scene flow challenge takes",
        "--data av2/test --checkpoint run/last.pt --challenge 2024 --out submission.zip",
    )
    sources(sub)
    sub.add_argument("--challenge", type=int, choices=data.CHALLENGES, required=True)
    sub.add_argument("--out", type=Path, required=True, metavar="ZIP")
    sub.add_argument("--supervised", action="store_true", help="say that it learnt from human labels (2024)")
    add_settings(sub, nsfp.NSFPSettings)

    sub = command(
        "predict",
        _predict,
        "estimate the flow between two clouds of your own, one row a point of CLOUD0",
        "--checkpoint run/last.pt 0.bin 1.bin --pose ego1_SE3_ego0.txt --out flow.npz --picture flow.png",
    )
    sub.add_argument("--checkpoint", required=True, help="a student: of train.py, or a published file")
    sub.add_argument(
        "cloud0", type=Path, metavar="CLOUD0", help=".feather (x, y, z), .bin (KITTI), .npy, .npz, .ply, .pcd"
    )
    sub.add_argument("cloud1", type=Path, metavar="CLOUD1", help="the next sweep")
    sub.add_argument("--pose", type=Path, metavar="FILE", help="ego1_SE3_ego0, 4 x 4, as text or .npy")
    text = "how ground is found, which gets no flow of its own (default: %(default)s)"
    sub.add_argument("--ground", choices=("points", "none"), default="points", help=text)
    sub.add_argument("--out", required=True, type=Path, metavar="FILE", help=".feather or .npz: flow and has_flow")
    sub.add_argument("--total", action="store_true", help="write raw flow, ego-motion included, not residual flow")
    sub.add_argument("--picture", type=Path, metavar="FILE", help="bird's-eye view: .png, .pdf or .svg")
    sub.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the student's U-Net")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
