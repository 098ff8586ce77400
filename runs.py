"""What keeps a training run safe: its folder, its signals, and the processes that read for it.

A run's folder holds last.pt (the newest checkpoint), best.pt (the best one so far), log.jsonl (one
line per step and per validation) and settings.json. All of them appear whole or not at all, and
they are read whatever has happened to them: torn by a kill, or written by another version.

SIGTERM and Ctrl-C are noted, and looked at where it is safe to stop. Pairs are read ahead by worker
processes, which may be killed, lack memory, or stand still because a network disk does: `Reader`
waits for them, but looks around once per second.

This file knows nothing about learning; train.py uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import multiprocessing.connection
import signal
import sys
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

import data
import fastflow3d
from data import DataError, Outage

# --- The folder of a run --------------------------------------------------------------------------


def _lock(folder: Path) -> BinaryIO:
    """An open file by which this process keeps others out of a run's folder.

    The system lets go of it when the process ends, however it ends. Raises DataError if another
    process has it: two runs in one folder would overwrite each other's checkpoints.
    """
    lock = (folder / ".lock").open("ab")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = "another process is training in this folder"
        raise DataError(f"{folder}: {what}; wait for it, or choose another --out") from error
    except OSError:  # a disk that knows no locks
        pass
    return lock


class Log:
    """Writes the files of a run's folder; with None for a folder, it writes nothing.

    step: of the checkpoint from which the run goes on. validated: step of the last validation that
    was finished by then. settings: a dataclass.
    """

    def __init__(self, folder: Path | None, step: int, validated: int, settings: Any):
        self.folder, self.file, self.lock = folder, None, None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(folder)
        for unfinished in folder.glob(".*.tmp"):  # of a process that was killed
            unfinished.unlink()
        with data.atomic_file(folder / "settings.json") as file:
            file.write(json.dumps(dataclasses.asdict(settings), indent=2).encode())

        # Steps since the checkpoint are done again, so their lines are cut off. So is the line of a
        # validation after the checkpoint's own step, unless the checkpoint knows of it.
        lines = []
        for line in read_log(folder):
            is_known = "loss" in line or validated == step
            if line["step"] < step or (line["step"] == step and is_known):
                lines.append(json.dumps(line) + "\n")
        with data.atomic_file(folder / "log.jsonl") as file:
            file.write("".join(lines).encode())
        self.file = open(folder / "log.jsonl", "ab", buffering=0)

    def write(self, line: dict) -> None:
        """Add a line to log.jsonl, which can be read while the run goes on."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            remedy = "make room, then continue with --resume"
            reason = f"cannot be written ({error.strerror}); {remedy}"
            raise OSError(error.errno, reason, str(self.file.name)) from error

    def close(self) -> None:
        """Let other processes train in the folder. Checkpoints can still be saved."""
        for file in (self.file, self.lock):
            if file is not None:
                file.close()

    def save(self, checkpoint: dict, name: str) -> None:
        """Write a checkpoint. If the power fails, either the old file or the new one is whole."""
        if self.folder is None:
            return
        with data.atomic_file(self.folder / name) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # On a full disk, torch raises an error of its own, which hides the disk's.
                raise error.__context__ or error from None


# What the line of a step has, and what the line of a validation has.
_LINES = {"step", "loss", "weight"}, {"step", "paper_three_way", "bucketed_dynamic_mean"}


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl. Others than such lines are reported and left out."""
    file, lines, broken = folder / "log.jsonl", [], []
    texts = file.read_bytes().splitlines() if file.exists() else []
    for number, text in enumerate(texts, start=1):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        if _is_line(line):
            lines.append(line)
        elif number < len(texts):  # the last one may be torn: the run goes on, or was killed
            broken.append(number)
    if broken:
        what = f"{len(broken)} of {len(texts)} lines cannot be read and are left out"
        print(f"{file}: {what}; the first is line {broken[0]}", file=sys.stderr)
    return lines


def _is_line(line: Any) -> bool:
    """Whether this is the line of a step or of a validation, with numbers as values."""
    if not isinstance(line, dict) or not any(names <= set(line) for names in _LINES):
        return False
    values = [value for name, value in line.items() if name != "weight"]
    are_numbers = all(
        type(value) is float or (type(value) is int and abs(value) < 2**63) for value in values
    )
    return are_numbers and type(line["step"]) is int


def newest_checkpoint(folder: Path, kinds: dict[str, type]) -> dict:
    """The last.pt of a run. Loads data, never code. Raises DataError if it is missing or torn.

    kinds: name of a part of the checkpoint -> the dataclass whose fields it stores. A checkpoint of
    another version may have a field more or less: `notes` lists what was ignored or set.
    """
    file = folder / "last.pt"
    if not file.exists():
        raise DataError(f"--resume: {folder} holds no last.pt; to begin a run, give its --data")
    try:
        # With weights_only, a file from elsewhere cannot run code.
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"model", "optimizer", *kinds} - set(checkpoint)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        checkpoint["model"] = fastflow3d.plain_names(checkpoint["model"])
        checkpoint["notes"] = []
        for part, kind in kinds.items():
            checkpoint[part], notes = fitted(checkpoint[part], kind)
            checkpoint["notes"] += notes
    except Exception as error:  # a torn file makes torch raise all kinds
        what = f"is torn, or not the checkpoint of a run ({error})"
        raise DataError(unusable(file, what)) from error
    return checkpoint


def unusable(file: Path, what: str) -> str:
    """The message for a checkpoint that cannot be used: what is wrong with it, and a way out."""
    short = " ".join(what.split())[:250]
    return f"{file}: {short}; to go on from an older one, copy {file.with_name('best.pt')} over it"


def fitted(stored: dict, kind: type) -> tuple[dict, list[str]]:
    """All fields of a dataclass, with the stored values where there are any; and notes.

    The notes are one line per field that is stored but unknown here, or known but not stored.
    Raises ValueError for a value of another type.
    """
    hints = typing.get_type_hints(kind)
    known = {name: value for name, value in stored.items() if name in hints}
    for name, value in known.items():
        if not _has_type(value, hints[name]):
            raise ValueError(f"{name} is {value!r}")
    values = dataclasses.asdict(kind(**known))
    notes = [f"{name} is unknown here and ignored" for name in stored if name not in hints]
    notes += [f"{name} is not stored, now {values[name]}" for name in hints if name not in stored]
    return values, notes


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a stored value fits the type of its field."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(each, inner[0]) for each in value)
    if typing.get_origin(hint) is Literal:
        return value in inner
    if inner:  # a union
        return any(_has_type(value, each) for each in inner)
    return type(value) in ((int, float) if hint is float else (hint,))


# --- Signals --------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C are added to, to be looked at where it is safe to stop."""
    # The handler only takes a note: a run that ended anywhere would lose the steps since last.pt.
    caught: list[int] = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda received, _: caught.append(received))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Workers --------------------------------------------------------------------------------------

_MORE_MEMORY = "give the container more shared memory (docker run --shm-size 8g)"
_SHARED_MEMORY = (
    "there is too little shared memory (/dev/shm) for the pairs that workers read ahead; "
    f"{_MORE_MEMORY}, or continue with --resume and --workers 0"
)
_KILLED = "killed, often for lack of memory; use --resume with fewer --workers"


class Reader:
    """What a DataLoader's workers have read, though they may die or stand still. Close it.

    Give the loader `timeout=1` if it has workers, and `worker_init_fn=ignore_signals`.
    """

    def __init__(self, loader: DataLoader):
        others = multiprocessing.active_children()
        try:
            self.loaded = iter(loader)
        except OSError as error:  # memory, shared memory, or the number of processes allowed
            what = f"{loader.num_workers} workers cannot be started ({error})"
            raise DataError(
                f"{what}; continue with --resume and fewer, or {_MORE_MEMORY}"
            ) from error
        self.workers = [each for each in multiprocessing.active_children() if each not in others]

        # When a worker dies, torch raises an error wherever this process happens to be, even in
        # the middle of a step. Instead, `next` looks at the workers between two steps.
        if self.workers:
            self.handler = signal.getsignal(signal.SIGCHLD)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def next(self, stopped: Sequence[int] = ()) -> Any:
        """The next batch; None if a signal (in `stopped`) came first.

        Raises DataError if a worker died or could not read.
        """
        for seconds in itertools.count():
            if stopped:
                return None
            if seconds and seconds % 60 == 0:
                what = f"no pair has come for {seconds} s; does the disk with the data answer?"
                print(f"{what} (Ctrl-C saves the last step and ends)", file=sys.stderr)
            try:
                return next(self.loaded)
            except (DataError, Outage) as error:
                # The error of a worker begins with the text of a traceback.
                text = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
                raise type(error)(text) from error
            except (RuntimeError, EOFError, OSError) as error:
                if str(error).startswith("DataLoader timed out"):
                    continue
                # Did a worker die just now? Otherwise this is an error of another kind.
                of_sentinel = {worker.sentinel: worker for worker in self.workers}
                ended = multiprocessing.connection.wait(list(of_sentinel), timeout=1)
                if not ended:
                    raise
                # Its end of the pipe closes a moment before the system knows its exit code.
                dead = of_sentinel[ended[0]]
                dead.join()
                code = dead.exitcode
                reasons = {-signal.SIGKILL: _KILLED, -signal.SIGBUS: _SHARED_MEMORY}
                reason = reasons.get(code, "its own message is above")
                raise DataError(f"a worker died (exit code {code}): {reason}") from error

    def close(self) -> None:
        """End the workers, also those that stand still."""
        # Dropping the loader asks the workers to end and waits for them, but for 10 s each.
        patience = threading.Timer(3.0, self._kill)
        patience.start()
        self.loaded = None
        patience.cancel()

        # It is not dropped as long as an error refers to it. Nobody needs the workers any more.
        self._kill()
        for worker in self.workers:
            worker.join()
        if self.workers:
            signal.signal(signal.SIGCHLD, self.handler or signal.SIG_DFL)

    def _kill(self) -> None:
        for worker in self.workers:
            worker.kill()


def ignore_signals(_: int) -> None:
    """What each worker does first."""
    # Ctrl-C, and a cluster's SIGTERM, go to all processes of a run. A worker that died of them
    # would take along the step that waits for its pairs.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def shared(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, in shared memory if this is a worker, which sends them through it anyway."""
    # If there is too little of it, torch's own sending loses the batch, and the trainer would wait
    # for it forever. Here, the trainer gets the error.
    if get_worker_info() is None:
        return tensors
    try:
        return [tensor.share_memory_() for tensor in tensors]
    except RuntimeError as error:
        raise DataError(_SHARED_MEMORY) from error
