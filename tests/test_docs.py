"""Every command that README and docs print is one that exists; those that can be are run.

What a user copies from a page must work. So the lines are read from the pages themselves, and run
in a folder with the same names, one page after the other, from top to bottom.
"""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import commands
import data
import experiments
import synthetic

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "weights" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Lines that no test can run: a part of the line, and what is missing.
NOT_RUN = {
    "pip install": "needs the network",
    "torchrun": "starts processes; tests/test_train.py and tests/test_recipes.py do",
    "srun": "needs SLURM",
    "$log": "needs the public bucket",
    "$lidar": "needs the LiDAR data set",
    "--masks": "needs the masks of the challenge",
    "--data scenes": "needs scenes in HDF5; tests/test_hdf5.py makes some",
    "results/latest": "needs the poses of KISS-ICP",
    "other/": "makes streets at full size and learns from them for minutes",
    "experiments.py": "takes hours; tests/test_experiments.py runs it in small",
    "--preset fastflow3d": "the same command as the line above it, with another preset",
    "--view 3d --out drive.mp4": "needs the program ffmpeg; tests/test_look.py has a stand-in",
    "--preset full --seed 7": "takes minutes, as do the two lines that draw it",
    "--data street --truth": "draws the street of the line above it",
    "--resume --out run": "goes on with hours of training; tests/test_train.py does with seconds",
    "synthesize --out street --logs 10": "takes a minute; tests/test_commands.py writes one log",
}

# Whatever is slow at full size gets these, which decide how long it takes and not what is done.
QUICK = {
    "label": "--model narrow --iterations 2 --hidden-channels 8 --priors 1 --workers 1",
    "train.py": "--model narrow --steps 2 --batch-size 1 --micro-batch 1 --workers 0 --seed 0",
    "video": "--fps 10",
    "show": "--at 0",
}


def blocks(page: Path) -> list[str]:
    """The lines of all code blocks of a page that are commands, without their comments."""
    lines, language = [], None  # language: that of the block we are in, None outside
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in ("", "bash", "sh") and re.match(r"(python|torchrun|srun|pip) ", line):
            lines.append(line.split(" #")[0].strip(" &"))
    return lines


def arguments_of(line: str) -> list[list[str]]:
    """The script and the arguments of each of our commands in a line or a sentence."""
    found = re.findall(r"((?:zeroflow|train|experiments|tests/bench)\.py\b[^`&|]*)", line)
    return [shlex.split(each.split(" #")[0]) for each in found]


def printed_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command in a code block or between backticks."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`((?:torchrun|python)\s[^`]*\.py\b[^`]*)`", page.read_text())
        for line in [*blocks(page), *(" ".join(each.split()) for each in inline)]:
            found += [(page.name, words) for words in arguments_of(line)]
    return found


def test_every_printed_command_has_a_script_and_options_that_exist(capsys):
    found = printed_commands()
    assert len(found) > 60
    for page, (script, *words) in found:
        # A page may leave arguments out, and write X for a number.
        if "..." in words or script == "tests/bench.py" or not words:
            continue
        words = ["0" if re.fullmatch(r"[A-Z]", word) else word for word in words]
        words = [word for word in words if word not in ("$@", "$log", "$lidar")]
        try:
            if script == "zeroflow.py":
                parser = commands._parser(words)
            elif script == "train.py":
                parser = commands._train_parser(words)
            else:
                continue
            _, unknown = parser.parse_known_args(words)
        except SystemExit:
            # Required arguments may be missing where a sentence names a command only.
            error = capsys.readouterr().err
            assert "required" in error or "expected" in error, f"{page}: {words}\n{error}"
            continue
        assert not unknown, f"{page}: {script} {' '.join(words)}"


def test_every_benchmark_and_experiment_that_a_page_names_exists():
    benchmarks = (ROOT / "tests" / "bench.py").read_text()
    names = [words[1] for _, words in printed_commands() if words[:1] == ["tests/bench.py"]]
    assert len(names) > 10
    for name in set(names) - {"NAME"}:
        assert f'    "{name}": ' in benchmarks, name
    kinds = [words[1] for _, words in printed_commands() if words[:1] == ["experiments.py"]]
    assert set(kinds) <= {"scaling-law", "why", "weights"} and len(kinds) >= 2
    assert callable(experiments.weights)


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """A folder as a user has it: splits of Argoverse 2, a folder of clouds, and two clouds."""
    folder = tmp_path_factory.mktemp("user")
    sweep = synthetic.StreetSettings(azimuths=190, beam_step=4, range_m=25.6, sweeps=3)
    for seed, split in enumerate(("train", "val", "test")):
        settings = dataclasses.replace(sweep, seed=seed)
        synthetic.write_logs(folder / "av2" / split, 1, settings)

    # The same drive as clouds without annotations, with poses in rows of twelve numbers.
    (folder / "clouds").mkdir()
    pairs = data.open_dataset(folder / "av2" / "train")
    poses, points = [np.eye(4)], [pairs[0].pc0]
    for pair in pairs:
        poses.append(poses[-1] @ np.linalg.inv(pair.ego1_SE3_ego0.numpy()))
        # pc1 lies in the frame of sweep 0; a file has its own.
        ego1_SE3_ego0 = pair.ego1_SE3_ego0
        points.append(pair.pc1.double() @ ego1_SE3_ego0[:3, :3].T + ego1_SE3_ego0[:3, 3])
    for number, cloud in enumerate(points):
        rows = np.zeros((len(cloud), 4), dtype=np.float32)
        rows[:, :3] = cloud.numpy()
        rows.tofile(folder / "clouds" / f"{number:06d}.bin")
        if number < 2:
            rows.tofile(folder / f"{number}.bin")
    np.savetxt(folder / "clouds" / "poses.txt", [pose[:3].ravel() for pose in poses])
    np.savetxt(folder / "ego1_SE3_ego0.txt", np.linalg.inv(poses[1]))

    # Pages take labels and a finished run for granted.
    labels, run = str(folder / "labels"), str(folder / "run")
    for source in ("av2/train", "av2/val", "clouds"):
        words = ["label", "--data", str(folder / source), "--labels", labels]
        assert commands.main([*words, *QUICK["label"].split()]) == 0
    words = ["--data", str(folder / "av2/train"), "--labels", labels, "--out", run]
    assert commands.train_main([*words, *QUICK["train.py"].split()]) == 0
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_commands_of_a_page_run_from_top_to_bottom(page, user, monkeypatch):
    lines = blocks(page)
    run = [line for line in lines if not any(part in line for part in NOT_RUN)]
    if not run:
        pytest.skip("its commands need what no test has, see NOT_RUN")
    monkeypatch.chdir(user)
    monkeypatch.setenv("XDG_CACHE_HOME", str(user / "cache"))
    for line in run:
        ((script, *words),) = arguments_of(line)
        command = script if script == "train.py" else words[0]
        if command == "train.py" and "--out" in words:  # a run's folder must be new
            words[words.index("--out") + 1] += f" of {page.stem}"
        words += QUICK.get(command, "").split()
        main = commands.train_main if script == "train.py" else commands.main
        assert main(words) == 0, line
