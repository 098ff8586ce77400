"""A short version of fuzz.py: changed files of every kind, read in processes of their own."""

import functools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


def outcomes_of(*command: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit status, the printed table by row and column, and everything that was printed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=TESTS, capture_output=True, text=True, timeout=600
    )
    lines = done.stdout.splitlines()
    heading = next((i for i, line in enumerate(lines) if re.match(r" {26}", line)), len(lines))
    table = {}
    for line in lines[heading + 1 :]:
        name, *counts = line.split()
        table[name] = dict(zip(lines[heading].split(), counts, strict=True))
    return done.returncode, table, done.stdout + done.stderr


def test_changed_files_never_raise_another_error_nor_crash_nor_hang():
    """Three changes of each kind. More by hand: python tests/fuzz.py --per-kind 40."""
    status, table, printed = outcomes_of("fuzz.py", "--per-kind", "3")
    assert status == 0, printed
    assert [table["total"][name] for name in ("escape", "crash", "hang")] == ["-"] * 3, printed
    assert int(table["total"]["refused"]) > 50, printed  # most changes are noticed


def test_every_outcome_is_recognized():
    status, table, printed = outcomes_of("-c", "import test_fuzz; test_fuzz.fuzz_made_up_readers()")
    assert status == 1 and len(table) == 10, printed
    for outcome, counts in table.items():
        assert outcome == "total" or counts[outcome] == "2", printed


def fuzz_made_up_readers() -> None:
    """Run fuzz.py on readers each of which has one outcome, for any file that is not valid."""
    import fuzz

    import data

    valid = bytes(range(256))

    def read(folder: Path, file: Path, outcome: str) -> dict:
        if file.read_bytes() == valid or outcome == "same":
            return {"speed of the ego": 1.0}
        # What is returned without an error is judged by its values: 60 m/s is the limit.
        match outcome:
            case "refused":
                raise data.DataError(f"{file}: is torn")
            case "unnamed":
                raise data.DataError("a file is torn")
            case "said":
                print("the ego drives at 100 m/s", file=sys.stderr)
            case "escape":
                raise KeyError("speed")
            case "crash":
                os.abort()
            case "hang":
                time.sleep(1000)
        return {"speed of the ego": {"plausible": 2.0, "said": 100.0}.get(outcome, math.nan)}

    # Only the made-up kinds, which share one valid file. Processes that are forked see this, too.
    fuzz.TIME_LIMIT_S = 2
    fuzz.LAYOUTS["made up"] = lambda folder: (folder / "made-up.dat").write_bytes(valid)
    fuzz.KINDS.clear()
    for outcome in fuzz.OUTCOMES:
        made_up = functools.partial(read, outcome=outcome)
        fuzz.KINDS[outcome] = fuzz.Kind("bytes", "made up", "made-up.dat", made_up)
    sys.argv[1:] = ["--per-kind", "2"]
    sys.exit(fuzz.main())
