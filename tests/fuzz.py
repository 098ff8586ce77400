"""Change files at random, and see what the project's readers make of them.

    python tests/fuzz.py --per-kind 40 --seed 0 [KIND ...]    a table, and one line per failure
    python tests/fuzz.py --only KIND SEED                     repeat one of them

A small valid file of each kind is written, changed, and read as the commands would read it. The
kind and the seed alone decide what is changed. Reading happens in a process of its own, with limits
on time and memory, because a broken file may crash or block it. The outcome is one of these:

    refused      an error that names the file: a DataError, an OSError, load_checkpoint's ValueError
    unnamed      such an error, but it does not name the file
    same         the values are the same as in the valid file
    plausible    they are other values, which may be true
    said         they cannot be true (see `what_is_implausible`), but a message reports something
    implausible  they cannot be true, and nothing is reported
    escape       any other exception
    crash, hang  the process died, or did not answer within TIME_LIMIT_S

Exit status: 1 after an escape, a crash or a hang.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

# More threads only get in each other's way: the files are small. torch looks at this when imported.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow
import torch
from fuzz_changes import mutate
from fuzz_kinds import KINDS, LAYOUTS, Kind, Values

import data

ROOT = Path(__file__).parent.parent
TIME_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 4 * 2**30  # on top of what the imports take
BAD = ("escape", "crash", "hang")
OUTCOMES = ("refused", "unnamed", "same", "plausible", "said", "implausible", *BAD)

# Beyond these, a value cannot be true.
FARTHEST_POINT_M = 10_000
LONGEST_FLOW_M = 100
FASTEST_EGO_MPS = 60
FASTEST_TURN_DEG_PER_S = 120
LARGEST_WEIGHT = 1e4


class Result(NamedTuple):
    """What came of one changed file."""

    kind: str
    seed: int
    outcome: str  # one of OUTCOMES
    change: str
    detail: str = ""


# --- One file -------------------------------------------------------------------------------------


def try_one(
    kind_name: str,
    seed: int,
    templates: Path,
    tell: Callable[[str], None],
    keep: Path | None = None,
) -> Result:
    """Copy the valid files of a kind, change one of them, read it, and judge the outcome.

    templates: a folder with the valid files of every layout. tell: called with the change before
    the file is read, since reading may end this process. keep: where to save the changed file.
    """
    kind = KINDS[kind_name]
    try:
        reference, known_lines = reference_of(kind_name, templates)
    except (Exception, SystemExit) as error:
        return Result(kind_name, seed, "escape", "not changed: the valid file", repr(error))
    rng = np.random.default_rng([seed, zlib.crc32(kind_name.encode())])
    with tempfile.TemporaryDirectory(dir=templates.parent) as temporary:
        folder, file = copy_of(kind, templates, Path(temporary))
        content, change = mutate(file.read_bytes(), kind.form, rng)
        file.unlink()  # it is a link to the valid file, which must stay as it is
        file.write_bytes(content)
        if keep:
            keep.write_bytes(content)
        tell(change)
        try:
            values, lines = read(kind, folder, file)
        except (Exception, SystemExit) as error:
            outcome, detail = judge_error(error, kind, file)
            return Result(kind_name, seed, outcome, change, detail)

    if is_same(values, reference):
        return Result(kind_name, seed, "same", change)
    # Nobody can notice that whole rows of a .bin file are missing: it has no header.
    is_torn = change.startswith("bytes") and kind.form != "bin"
    wrong = what_is_implausible(values, reference, is_torn)
    reported = [line for line in lines if line not in known_lines]
    if not wrong:
        return Result(kind_name, seed, "plausible", change, first_difference(values, reference))
    outcome = "said" if reported else "implausible"
    return Result(kind_name, seed, outcome, change, "; ".join([wrong, *reported[:1]]))


@functools.cache
def reference_of(kind_name: str, templates: Path) -> tuple[Values, list[str]]:
    """What the reader finds in the valid file. Raises RuntimeError if that is implausible."""
    kind = KINDS[kind_name]
    with tempfile.TemporaryDirectory(dir=templates.parent) as temporary:
        values, lines = read(kind, *copy_of(kind, templates, Path(temporary)))
    wrong = what_is_implausible(values, values, is_torn=False)
    if wrong:
        raise RuntimeError(f"{kind_name}: its valid file is implausible: {wrong}")
    return values, lines


# As a link, the lock of a run would be one and the same for all copies of it.
_NO_LOCK = shutil.ignore_patterns(".lock")


def copy_of(kind: Kind, templates: Path, temporary: Path) -> tuple[Path, Path]:
    """A copy of the valid files, as links, and the one in it that is to be changed."""
    folder = temporary / "files"
    shutil.copytree(templates / kind.layout, folder, copy_function=os.link, ignore=_NO_LOCK)
    return folder, sorted(folder.glob(kind.file))[0]


def read(kind: Kind, folder: Path, file: Path) -> tuple[Values, list[str]]:
    """The values that a kind's reader finds, as arrays and numbers, and all lines it reports."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        values = kind.read(folder, file)
    for name, value in values.items():
        values[name] = value.numpy() if isinstance(value, torch.Tensor) else value
    lines = [*printed.getvalue().splitlines(), *values.pop("notes", ())]
    lines = [line for line in lines if "%|" not in line]  # progress bars
    return values, [line.replace(str(folder), "") for line in lines]


# --- Judging --------------------------------------------------------------------------------------


def judge_error(error: BaseException, kind: Kind, file: Path) -> tuple[str, str]:
    """The outcome, and a line about an error."""
    message = f"{type(error).__name__}: {error}"
    is_clean = isinstance(error, data.DataError) or type(error) in kind.errors
    if isinstance(error, OSError) and error.filename is not None:
        is_clean, message = True, f"{message} {error.filename}"
    if not is_clean:
        # Where in the project did it come from?
        where = "outside the project"
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).parent == ROOT:
                where = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        return "escape", f"{' '.join(message[:150].split())} ({where})"
    is_named = file.name in message or str(file.parent) in message
    return "refused" if is_named else "unnamed", message.replace(str(file.parent), "...")[:200]


def is_same(values: Values, reference: Values) -> bool:
    return not first_difference(values, reference)


def first_difference(values: Values, reference: Values) -> str:
    for name in {**reference, **values}:
        if name not in values or name not in reference:
            return f"{name} only in {'one' if name in values else 'the valid file'}"
        found, expected = np.asarray(values[name]), np.asarray(reference[name])
        can_be_nan = found.dtype.kind == expected.dtype.kind == "f"
        if found.dtype != expected.dtype or not np.array_equal(found, expected, can_be_nan):
            return name
    return ""


def what_is_implausible(values: Values, reference: Values, is_torn: bool) -> str:
    """The first value that cannot be true, or "".

    The first word of a value's name tells its meaning. is_torn: the bytes were changed, so rows
    that are missing should have been noticed.
    """
    for name, value in values.items():
        expected = reference.get(name)
        wrong = _wrong_with(name.split()[0], np.asarray(value), expected, is_torn)
        if wrong:
            return f"{name} {wrong}"
    return ""


def _wrong_with(meaning: str, value: np.ndarray, expected: object, is_torn: bool) -> str:
    match meaning:
        case "points":
            return _wrong_with_points(value, expected, is_torn)
        case "flow" if not np.isfinite(value).all():
            return "not finite"
        case "flow" if len(value) and np.linalg.norm(value, axis=1).max() > LONGEST_FLOW_M:
            return f"of {np.linalg.norm(value, axis=1).max():.3g} m"
        # Written so that NaN counts as wrong, too.
        case "speed" if not value <= FASTEST_EGO_MPS:
            return f"{value:.3g} m/s"
        case "turn" if not value <= FASTEST_TURN_DEG_PER_S:
            return f"{value:.3g} degrees/s"
        case "pose" if not np.abs(value).max() <= FARTHEST_POINT_M:
            return f"has {np.abs(value).max():.3g}"
        case "weights" if not (np.abs(value.astype(float)) < LARGEST_WEIGHT).all():
            return "not finite, or huge"
        case "number" if value.dtype.kind != "i":
            return f"not a whole number: {value!r}"
        case "pairs" if value < (expected or 0):
            return f"{value} instead of {expected}"
        case "count" if expected and not value:
            return "0"
    return ""


def _wrong_with_points(points: np.ndarray, expected: object, is_torn: bool) -> str:
    finite = points[np.isfinite(points).all(axis=1)]
    if np.abs(finite).max(initial=0) > FARTHEST_POINT_M:
        return f"{np.abs(finite).max():.3g} m away"
    _, counts = np.unique(finite, axis=0, return_counts=True)
    if counts.max(initial=0) > len(finite) / 2:
        return f"{counts.max()} of {len(finite)} at one place"
    if is_torn and expected is not None and len(points) < len(expected):
        return f"{len(points)} instead of {len(expected)}"
    return ""


# --- Many files, in processes that may die --------------------------------------------------------

# Forking is fast, since nothing has to be imported again. It is safe because this process neither
# reads a file nor computes anything: no library has started a thread in it.
FORK = multiprocessing.get_context("fork")


class Reader:
    """A process that tries one file after the other."""

    def __init__(self, templates: Path, keep: Path | None):
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_read_files, args=(theirs, templates, keep), daemon=True)
        self.process.start()
        theirs.close()
        self.job: tuple[str, int] | None = None
        self.change = ""

    def give(self, job: tuple[str, int]) -> None:
        self.job, self.deadline = job, time.monotonic() + TIME_LIMIT_S
        self.pipe.send(job)

    def take(self) -> Result | None:
        """The result, if there is one by now. After a crash or a hang, the process is gone."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()  # first the change, then the result
                if isinstance(message, Result):
                    return message
                self.change = message
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"exit code {self.process.exitcode}; negative: the number of a signal"
            return Result(*self.job, "crash", self.change, reason)
        if time.monotonic() < self.deadline:
            return None
        self.process.kill()
        self.process.join()
        return Result(*self.job, "hang", self.change, f"no answer in {TIME_LIMIT_S} s")


def _read_files(pipe: Connection, templates: Path, keep: Path | None) -> None:
    """What a Reader's process does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in C write there before they crash
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        pipe.send(try_one(*pipe.recv(), templates, pipe.send, keep))


def try_all(
    jobs: list[tuple[str, int]], templates: Path, processes: int, keep: Path | None = None
) -> list[Result]:
    """The results of all jobs, a kind and a seed each, in the same order."""
    waiting, results = jobs[::-1], {}
    readers = [Reader(templates, keep) for _ in range(min(processes, len(jobs)))]
    while len(results) < len(jobs):
        for i, reader in enumerate(readers):
            result = reader.take() if reader.job else None
            if result:
                results[reader.job] = result
                reader.job = None
            # After a crash or a hang, another process goes on.
            if not reader.job and not reader.process.is_alive():
                reader = readers[i] = Reader(templates, keep)
            if waiting and not reader.job:
                reader.give(waiting.pop())
        wait([reader.pipe for reader in readers], timeout=1)
    for reader in readers:
        reader.process.kill()
    return [results[job] for job in jobs]


def write_templates(folder: Path, kinds: list[str]) -> None:
    """Write the valid files of these kinds, in a process of its own: see FORK."""
    for layout in {KINDS[kind].layout: None for kind in kinds}:
        (folder / layout).mkdir(parents=True)
        writer = FORK.Process(target=_write_layout, args=(layout, folder / layout))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"the valid files of {layout} could not be written")


def _write_layout(layout: str, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        LAYOUTS[layout](folder)


# --- The command ----------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """Outcomes by kind, and in total."""
    kinds = list(dict.fromkeys(result.kind for result in results))
    lines = [" " * 26 + " ".join(f"{outcome:>11}" for outcome in OUTCOMES)]
    for kind in [*kinds, "total"]:
        outcomes = Counter(r.outcome for r in results if kind in (r.kind, "total"))
        counts = [str(outcomes[outcome] or "-") for outcome in OUTCOMES]
        lines.append(f"{kind:26}" + " ".join(f"{count:>11}" for count in counts))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Change files at random, and read them.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all")
    parser.add_argument("--per-kind", default=40, type=int, help="changes of each kind of file")
    parser.add_argument("--seed", default=0, type=int, help="of the first change; then one more")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "SEED"), help="repeat one change")
    parser.add_argument("--keep", type=Path, help="with --only: save the changed file here")
    parser.add_argument("--list", default="", help="outcomes to list, such as unnamed,plausible")
    parser.add_argument("--processes", default=2, type=int, help="that read at the same time")
    given = parser.parse_args()
    jobs = []
    for kind in given.kinds or KINDS:
        jobs += [(kind, given.seed + i) for i in range(given.per_kind)]
    if given.only:
        jobs = [(given.only[0], int(given.only[1]))]
    unknown = sorted({kind for kind, _ in jobs} - set(KINDS))
    if unknown:
        parser.error(f"unknown kinds {unknown}; choose of {', '.join(KINDS)}")

    # Copies are links to the valid files, so all of them are in one place.
    with tempfile.TemporaryDirectory() as temporary:
        templates = Path(temporary) / "valid"
        write_templates(templates, [kind for kind, _ in jobs])
        results = try_all(jobs, templates, given.processes, given.keep if given.only else None)
    listed = {"implausible", *BAD, *given.list.split(",")}
    for result in results:
        if result.outcome in listed or given.only:
            print(f"{result.outcome:11} --only {result.kind} {result.seed}: {result.change}")
            print(f"{'':11} {result.detail}")
    print(table(results))
    return int(any(result.outcome in BAD for result in results))


if __name__ == "__main__":
    sys.exit(main())
