"""The scripts in recipes/, run beside programs that stand in for SLURM's, and on a local Ray."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import labels
import nsfp

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
    for recipe in sorted((ROOT / "recipes").iterdir()):
        language = "python" if recipe.suffix == ".py" else ""
        assert f"```{language}\n{recipe.read_text()}```" in text, recipe


def label_by_ray(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "recipes" / "label_ray.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)


def test_ray_makes_the_labels_that_one_process_makes_and_a_broken_pair_costs_only_its_shard(
    tmp_path, street_folder
):
    pytest.importorskip("ray", reason="ray is not installed; it is needed for its recipe only")
    split = tmp_path / "street"
    shutil.copytree(street_folder, split)
    pairs = data.open_dataset(split)
    broken = split / pairs.pair_keys[0].log_id / "sensors" / "lidar"
    (broken / f"{pairs.pair_keys[0].timestamp0_ns}.feather").write_bytes(b"no sweep")
    quick = ["--iterations", "2", "--priors", "1", "--refine", "none"]
    options = ["--shards", "3", "--data", split, "--labels", tmp_path / "labels", *quick]
    done = label_by_ray(*options)
    assert done.returncode == 1, done.stderr
    shards = {labels.shard_of(key, 3) for key in pairs.pair_keys}
    failed = labels.shard_of(pairs.pair_keys[0], 3)
    assert f"start again for: {failed}/3\n" in done.stdout and "no sweep" not in done.stdout
    assert all(f"shard {shard}/3: " in done.stdout for shard in shards)

    settings = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2, priors=1, refine="none")
    labels.label_dataset(pairs, tmp_path / "here", settings, workers=1)
    for key in pairs.pair_keys[1:]:
        there, here = (labels.read_label(tmp_path / name, key) for name in ("labels", "here"))
        assert torch.equal(there.flow, here.flow) and torch.equal(there.has_flow, here.has_flow)


def test_ray_is_given_what_can_work(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed; it is needed for its recipe only")
    folders = ["--labels", tmp_path, "--data"]
    for arguments, message in (
        ([*folders, "av2/train"], "av2/train: give an absolute path"),
        ([*folders, tmp_path, "--cpus", "1"], "--cpus: give 2 or more"),
    ):
        done = label_by_ray(*arguments)
        assert done.returncode == 2 and message in done.stderr
