"""The scripts in recipes/, run by bash beside programs that stand in for SLURM's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def slurm(tmp_path):
    """A folder of programs: `srun` runs its arguments, `scontrol` notes them, and what the script
    starts notes its own, waits, and ends with the status in $STATUS; on SIGTERM with 0.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    work = f"""#!{sys.executable}
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("checkpoint", file=open("notes", "a")), sys.exit()))
print("work", *sys.argv[1:], file=open("notes", "a"))
deadline = time.monotonic() + float(os.environ.get("SECONDS_OF_WORK", 0))
while time.monotonic() < deadline:
    time.sleep(0.02)
sys.exit(int(os.environ.get("STATUS", 0)))
"""
    programs = {
        "srun": '#!/bin/bash\nexec "$@"\n',
        "scontrol": '#!/bin/bash\necho scontrol "$@" >> notes\n',
        "python": work,
        "torchrun": work,
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start(recipe: str, slurm: Path, **environment) -> subprocess.Popen:
    environment = {"PATH": f"{slurm}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
    command = ["bash", str(ROOT / "recipes" / recipe), "--data", "a folder"]
    return subprocess.Popen(command, cwd=slurm.parent, env=environment)


def notes(slurm: Path) -> list[str]:
    file = slurm.parent / "notes"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(slurm: Path, line: str) -> None:
    deadline = time.monotonic() + 20
    while line not in "\n".join(notes(slurm)) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("recipe", ["label.sbatch", "train.sbatch"])
@pytest.mark.parametrize("status", [0, 3])
def test_a_job_ends_with_the_status_of_its_work(recipe, status, slurm):
    assert start(recipe, slurm, STATUS=str(status)).wait(30) == status
    command = "zeroflow.py label" if recipe == "label.sbatch" else "train.py --resume"
    assert notes(slurm)[0].endswith(f"{command} --data a folder") and len(notes(slurm)) == 1


@pytest.mark.parametrize(
    ("array", "job"), [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "5_2")]
)
def test_a_labeling_task_whose_time_is_over_goes_back_into_the_queue(array, job, slurm):
    process = start("label.sbatch", slurm, SECONDS_OF_WORK="2", **array)
    wait_for(slurm, "work")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) != 0, "it is not completed"
    assert notes(slurm)[1] == f"scontrol requeue {job}"


def test_a_training_job_whose_time_is_over_writes_a_checkpoint_before_it_is_requeued(slurm):
    process = start("train.sbatch", slurm, SECONDS_OF_WORK="20", SLURM_GPUS_ON_NODE="2")
    wait_for(slurm, "work")
    process.send_signal(signal.SIGUSR1)
    process.wait(30)
    assert notes(slurm)[1:] == ["checkpoint", "scontrol requeue 7"]
    assert notes(slurm)[0].startswith("work --nproc-per-node 2 train.py")


def test_the_docs_print_the_recipes_as_they_are():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for recipe in sorted((ROOT / "recipes").glob("*.sbatch")):
        assert f"```\n{recipe.read_text()}```" in text, recipe
