"""The commands as a user types them, and what --help promises."""

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import feather

import clouds
import commands
import data
import demo
import fastflow3d
import labels
import nsfp
import synthetic
import train
import zeroflow

ROOT = Path(zeroflow.__file__).parent


def test_where_stderr_is_no_terminal_a_progress_bar_is_a_line_per_minute(tmp_path):
    """Some 20 logs in several seconds: a line at the start, and one at the end."""
    command = [sys.executable, str(ROOT / "zeroflow.py"), "synthesize", "--preset", "teaching"]
    command += ["--logs", "20", "--out", str(tmp_path / "street")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr.count("street:") <= 2 and "20/20" in done.stderr


def test_predict_as_a_user_types_it(tmp_path, student_file, street_folder, street, capsys):
    """Both formats, a picture, total flow; and lines that say what was assumed."""
    pair = street[0]
    sweeps = [
        street_folder / pair.log_id / "sensors" / "lidar" / f"{stamp}.feather"
        for stamp in pair.key[1:]
    ]
    np.savetxt(tmp_path / "pose.txt", pair.ego1_SE3_ego0)
    picture, npz, table = (tmp_path / name for name in ("flow.png", "flow.npz", "flow.feather"))
    whole = ["predict", "--checkpoint", str(student_file), *map(str, sweeps), "--device", "cpu"]
    common = [*whole, "--ground", "none"]
    pose = ["--pose", str(tmp_path / "pose.txt")]
    assert commands.main([*common, *pose, "--out", str(npz), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "no --pose" not in out and "ground" not in out
    assert f"residual flow of {len(pair.pc0)} points" in out
    with np.load(npz) as arrays:
        flow, has_flow = arrays["flow"], arrays["has_flow"]
    model = fastflow3d.load_checkpoint(student_file)
    cell, _ = fastflow3d.assign_cells(pair.pc0, model.settings)
    assert (has_flow == (cell >= 0).numpy()).all() and f"{has_flow.sum()} of them estimated" in out
    expected = zeroflow.predict(
        model, pair.pc0.numpy(), clouds.read_cloud(sweeps[1]), pair.ego1_SE3_ego0
    )
    np.testing.assert_allclose(flow, expected, atol=2e-5)
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert (
        commands.main([*common, *pose, "--out", str(table), "--total", "--dtype", "bfloat16"]) == 0
    )
    total = data.total_flow(torch.from_numpy(flow), pair).numpy()
    columns = feather.read_table(table)
    assert columns.column_names == ["flow_tx_m", "flow_ty_m", "flow_tz_m", "has_flow"]
    error = np.linalg.norm(data.stack(columns, columns.column_names[:3]) - total, axis=1)
    assert (columns["has_flow"].to_numpy() == has_flow).all()
    assert 0 < np.median(error) < 1e-2 and np.linalg.norm(total - flow, axis=1).max() > 0.1
    capsys.readouterr()

    assert (
        commands.main([*whole, *pose, "--out", str(npz)]) == 0
    )  # now without the ground, found without a map
    is_ground = [clouds.is_ground_without_map(clouds.read_cloud(sweep)) for sweep in sweeps]
    assert (
        f"ground: {is_ground[0].mean():.0%} and {is_ground[1].mean():.0%} of the points"
        in capsys.readouterr().out
    )
    expected = zeroflow.predict(
        model,
        pair.pc0.numpy(),
        clouds.read_cloud(sweeps[1]),
        pair.ego1_SE3_ego0,
        is_ground[0],
        is_ground[1],
    )
    with np.load(npz) as arrays:
        np.testing.assert_allclose(arrays["flow"], expected, atol=2e-5)
        assert (arrays["flow"][is_ground[0]] == 0).all() and not arrays["has_flow"][
            is_ground[0]
        ].any()
    assert 0.05 < is_ground[0].mean() < 0.95

    assert commands.main([*common, "--out", str(npz)]) == 0
    assert "no --pose: both clouds are taken to be in one frame" in capsys.readouterr().out
    np.save(tmp_path / "city.npy", pair.pc0.numpy() + 5000)
    far = str(tmp_path / "city.npy")
    assert (
        commands.main(["predict", "--checkpoint", str(student_file), far, far, "--out", str(npz)])
        == 0
    )
    assert "no point lies in the student's grid of 51.2 x 51.2 x 6 m" in capsys.readouterr().out
    for dtype, bound in (("float32", 1e-6), ("bfloat16", 1e-2)):
        numbers = tmp_path / "numbers.json"
        command = [
            "evaluate",
            "--data",
            str(street_folder),
            "--checkpoint",
            str(student_file),
            "--dtype",
            dtype,
        ]
        assert commands.main([*command, "--json", str(numbers)]) == 0
        error = abs(
            json.loads(numbers.read_text())["grid_epe"]
            - zeroflow.evaluate(
                street, zeroflow.from_student(model), model.settings.half_extent_m
            ).numbers["grid_epe"]
        )
        assert error < bound and (dtype == "float32" or error > 1e-7)
    capsys.readouterr()
    for arguments, message in (
        ([*common, "--out", "flow.csv"], "flow.csv: choose a name that ends in .feather or .npz"),
        (
            [*common, "--out", str(npz), "--picture", "flow.docx"],
            "flow.docx: choose a name that ends in .png",
        ),
        ([*common, "--out", str(npz), "--pose", "no.txt"], "no.txt: not a 4 x 4 pose"),
        (
            [*common, "--out", str(npz), "--picture", "no/flow.png"],
            "no/flow.png: there is no such folder",
        ),
        (
            ["evaluate", "--data", "x", "--baseline", "nearest", "--dtype", "bfloat16"],
            "--dtype: is only for a student",
        ),
        ([*common[:3], "a.bin", "b.bin", "--out", str(npz)], "a.bin: no such file"),
        (
            ["predict", "--checkpoint", "no.pt", *common[3:5], "--out", str(npz)],
            "no.pt: no such file",
        ),
    ):
        assert commands.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_the_lines_of_the_readme_run_as_they_stand(tmp_path):
    (lines,) = [
        text
        for text in (ROOT / "README.md").read_text().split("```python\n")
        if "zeroflow.predict(" in text
    ]
    (tmp_path / "weights").mkdir()
    shutil.copy(commands.OUR_WEIGHTS, tmp_path / "weights")
    done = subprocess.run(
        [sys.executable, "-c", lines.split("```")[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- The commands


def zeroflow_command(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "zeroflow.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_from_synthesize_to_evaluate_as_a_user_types_it(tmp_path):
    street, folder, numbers = tmp_path / "street", tmp_path / "labels", tmp_path / "numbers.json"
    done = zeroflow_command(
        "synthesize", "--out", street, "--logs", 1, "--preset", "teaching", "--sweeps", 3
    )
    assert done.stdout.endswith(f"1 logs, 2 pairs, in {street}\n")
    quick = ("--iterations", 3, "--hidden-channels", 8, "--workers", 2)
    done = zeroflow_command("label", "--data", street, "--labels", folder, *quick)
    assert "2 labels made" in done.stdout and "0 found, 0 failed" in done.stdout
    assert "iterations: 3\n" in done.stdout  # the resolved settings are printed
    assert (
        "0 labels made"
        in zeroflow_command("label", "--data", street, "--labels", folder, *quick).stdout
    )
    done = zeroflow_command("evaluate", "--data", street, "--labels", folder, "--json", numbers)
    result = json.loads(numbers.read_text())
    assert (
        result["pairs"] == 2
        and result["grid_epe"] > 0
        and f"{result['grid_epe']:.4f}" in done.stdout
    )
    wanted = "grid_epe grid_three_way grid_three_way_fd grid_three_way_fs grid_three_way_bs "
    wanted += "paper_three_way seconds_per_pair"
    assert set(wanted.split()) <= set(result)


def test_mistakes_get_one_clear_line_and_a_status(tmp_path, street_folder, capsys):
    for arguments, message in (
        (("evaluate", "--data", tmp_path / "no", "--baseline", "nearest"), "no: no such folder"),
        (
            ("evaluate", "--data", street_folder, "--labels", tmp_path),
            "has no label for any of 4 pairs; run `python zeroflow.py",
        ),
        (
            ("evaluate", "--data", street_folder, "--checkpoint", tmp_path / "no.pt"),
            "no.pt: no such file",
        ),
        (("synthesize", "--out", street_folder, "--logs", 1), "is not empty; choose a new folder"),
        (
            ("label", "--data", street_folder, "--labels", tmp_path, "--device", "tpu"),
            "--device 'tpu': choose cpu",
        ),
        (
            ("evaluate", "--data", street_folder, "--baseline", "nearest", "--seed", 1),
            "--seed: is only for a teacher",
        ),
        (
            ("status", "--data", street_folder, "--labels", tmp_path),
            "is not a folder of labels for this data; make it with",
        ),
        (
            ("status", "--data", street_folder, "--labels", tmp_path, "--shards", 0),
            "--shards 0: give the number",
        ),
    ):
        assert commands.main([*map(str, arguments)]) == 1
        (line,) = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error")
        ]
        assert message in line
    folders = ["--data", str(street_folder), "--labels", str(tmp_path)]
    assert commands.main(["label", *folders, "--priors", "0"]) == 1
    assert "priors" in capsys.readouterr().err  # settings that the teacher refuses
    for option in (["--no-such-setting", "1"], ["--refine", "more"], ["--iterations", "many"]):
        with pytest.raises(SystemExit):
            commands.main(["label", *folders, *option])
        assert option[0] in capsys.readouterr().err


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by its name, and train.py's."""
    (subparsers,) = [
        action
        for action in commands._parser([])._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return {**subparsers.choices, "train.py": commands._train_parser([])}


def test_every_option_of_every_command_is_explained():
    count = 0
    for name, parser in parsers().items():
        assert parser.description and "example: python" in parser.epilog
        for action in parser._actions:
            text = (action.help or "").split("(default")[0].strip()
            assert len(text) >= 10, f"{name} {action.option_strings}"
            count += 1
    assert count > 150


@pytest.mark.parametrize(
    "settings_class",
    [nsfp.NSFPSettings, synthetic.StreetSettings, train.TrainSettings, demo.DemoSettings],
)
def test_every_setting_has_a_comment_which_is_its_help_text(settings_class):
    comments = commands.field_comments(settings_class)
    for field in dataclasses.fields(settings_class):
        assert len(comments[field.name]) >= 10, field.name
    # Some comments take several lines of the source, which the help shows as one text.
    source = " ".join(inspect.getsource(settings_class).replace("# ", "").split())
    assert all(comment in source for comment in comments.values())


def test_a_comment_of_several_lines_is_shown_whole():
    text = commands.field_comments(train.TrainSettings)["init"]
    assert text.startswith("start from the weights of") and text.endswith("random ones")


def test_help_shows_the_defaults_that_will_be_used():
    """Of the preset or the teacher on the command line, not those of the dataclass."""

    def default_of(option: str, parser: argparse.ArgumentParser) -> str:
        (action,) = [each for each in parser._actions if option in each.option_strings]
        return re.search(r"\(default: (.*)\)$", action.help)[1]

    assert default_of("--lr", commands._train_parser([])) == "0.002"  # the demo
    assert default_of("--lr", commands._train_parser(["--data", "x"])) == "2e-06"
    xl = commands._train_parser(["--preset", "zeroflow-xl-3x"])
    assert default_of("--model", xl) == "xl" and default_of("--batch-size", xl) == "12"
    assert default_of("--pairs-per-log", xl) == "all 12"
    for argv, width in ([], "64"), (["label", "--teacher", "nsfp"], "128"):
        label = commands._parser(argv)._actions[-1].choices["label"]
        assert default_of("--hidden-channels", label) == width


def test_options_reach_the_settings_with_their_types():
    parse = commands._train_parser([]).parse_args
    text = "--data a b --labels c d --pairs-per-log all 12 --clip-norm 0.5 "
    text += "--resume --no-cosine --steps none"
    given = commands.given_settings(parse(text.split()), train.TrainSettings)
    assert given == {
        "data": ("a", "b"),
        "labels": ("c", "d"),
        "pairs_per_log": (None, 12),
        "clip_norm": 0.5,
        "resume": True,
        "cosine": False,
        "steps": None,
    }


@pytest.fixture
def broken_folder(tmp_path, street_folder) -> Path:
    """Two logs of three sweeps, of which one sweep is torn: two of four pairs cannot be read."""
    shutil.copytree(street_folder, tmp_path / "split")
    file = sorted((tmp_path / "split").glob("*/sensors/lidar/*.feather"))[1]
    file.write_bytes(file.read_bytes()[:100])
    return tmp_path / "split"


def test_evaluation_names_broken_pairs_and_goes_on_up_to_a_share(
    tmp_path, broken_folder, street, capsys
):
    numbers = tmp_path / "numbers.json"
    command = [
        "evaluate",
        "--data",
        str(broken_folder),
        "--baseline",
        "nearest",
        "--json",
        str(numbers),
    ]
    assert commands.main(command) == 1  # not all went well
    printed = capsys.readouterr()
    assert printed.err.count("left out: ") == 2 and "not a whole Feather file" in printed.err
    assert "2 pairs were left out; the reasons are on stderr" in printed.out
    found = json.loads(numbers.read_text())
    whole = zeroflow.evaluate([street[2], street[3]], zeroflow.from_baseline("nearest")).numbers
    assert (found["pairs"], found["broken"]) == (2, 2) and found["grid_epe"] == whole["grid_epe"]
    numbers.unlink()
    assert (
        commands.main([*command, "--max-broken", "0.01"]) == 1
    )  # of 100 at least: one may be broken
    assert "error: " in capsys.readouterr().err and not numbers.exists()

    def nothing(pair):
        raise data.DataError("no")

    with pytest.raises(data.DataError, match="none of 4 pairs could be evaluated"):
        zeroflow.evaluate(street, nothing, max_broken=1)
    with pytest.raises(data.DataError, match="no; 3 of 4 are broken so far, see --max-broken"):
        zeroflow.evaluate(street, nothing, max_broken=0.02)
    many = [street[0]] * 120  # the share is of more than 100 then: 0.05 of 120 are six

    def fails_seven_times(pair, calls=[]):  # noqa: B006
        calls.append(1)
        return zeroflow.Estimate(pair.flow, 0.0) if len(calls) > 7 else nothing(pair)

    with pytest.raises(data.DataError, match="7 of 120 are broken"):
        zeroflow.evaluate(many, fails_seven_times, max_broken=0.05)
    first_fails = iter([nothing] + [lambda pair: zeroflow.Estimate(0 * pair.flow, 0.0)] * 3)
    evaluation = zeroflow.evaluate(street, lambda pair: next(first_fails)(pair), max_broken=1)
    assert sorted(evaluation.pair_three_ways) == [1, 2, 3]  # by index of the data set


def test_labels_that_cover_some_pairs_are_evaluated_on_those_and_it_is_said(
    tmp_path, street_folder, street, capsys
):
    label = zeroflow.make_labels(
        [street[1]], dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2)
    )[0]
    labels.claim_folder(tmp_path, label.settings)
    labels.write_label(tmp_path, label)
    assert commands.main(["evaluate", "--data", str(street_folder), "--labels", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{tmp_path}: has 1 of 4 pairs; the first missing one is {tuple(street.pair_keys[0])}"
        in printed
    )
    expected = zeroflow.evaluate(
        [street[1]], lambda pair: zeroflow.Estimate(label.flow, 0.0)
    ).numbers
    assert f"{expected['grid_three_way']:.4f}" in printed


def test_evaluate_with_boxes_that_grow_with_speed(tmp_path, street_folder, capsys):
    numbers = {}
    for truth in data.TRUTHS:
        file = tmp_path / f"{truth}.json"
        command = ["evaluate", "--data", str(street_folder), "--baseline", "no-motion"]
        assert commands.main([*command, "--truth", truth, "--json", str(file)]) == 0
        assert ("boxes grow with speed" in capsys.readouterr().out) == (truth == "grown")
        numbers[truth] = json.loads(file.read_text())
        assert numbers[truth]["truth"] == truth
    # Without motion, the error is the mean length of the true flow: of more points, it is larger.
    assert numbers["grown"]["epe"] > numbers["av2"]["epe"] > 0


def test_check_counts_names_what_is_broken_and_says_whether_it_can_be_used(
    tmp_path, street_folder, broken_folder, street, capsys, monkeypatch
):
    seconds = {"seconds_to_label": 2.0, "seconds_to_train": 3.0}
    monkeypatch.setattr(commands, "cost", lambda *_: seconds)
    numbers = tmp_path / "numbers.json"

    def check(folder, *options) -> tuple[int, str, dict]:
        command = ["check", "--data", str(folder), "--json", str(numbers), "--device", "cpu"]
        status = commands.main([*command, *options])
        return status, capsys.readouterr().out, json.loads(numbers.read_text())

    assert "labels by fast" not in check(street_folder)[1]  # it takes long, so it must be asked for
    status, printed, found = check(street_folder, "--model", "narrow", "--cost")
    assert status == 0 and printed.endswith("can be used\n") and found["is_usable"]
    assert "Argoverse2, 2 logs, 4 pairs" in printed and found["kind"] == "Argoverse2"
    assert (found["pairs_read"], found["broken"], found["pairs_with_true_flow"]) == (4, [], 4)
    assert "labels by fast: 2.00 s per pair here, 8 seconds" in printed
    assert "training narrow: 3.00 s per pair here, 12 seconds per epoch" in printed
    sizes = [len(pair.pc0) for pair in street]
    assert (found["points_least"], found["points_most"]) == (min(sizes), max(sizes))
    share = np.mean([(~pair.is_ground0).float().mean().item() for pair in street])
    assert found["share_not_ground"] == pytest.approx(share)
    assert found["seconds_recorded"] == pytest.approx(0.4) and found["seconds_to_read"] > 0
    files = [file for file in street_folder.rglob("*") if file.is_file()]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert check(street_folder, "--sample", "2")[2]["pairs_read"] == 2
    assert check(street_folder, "--sample", "all")[2]["pairs_read"] == 4
    assert data.evenly_spread(4, 2) == [0, 2] and data.evenly_spread(4, None) == [0, 1, 2, 3]

    status, printed, found = check(broken_folder)
    assert status == 1 and printed.count("broken: ") == 2 and not found["is_usable"]
    assert "cannot be used: more than 5% is broken" in printed
    assert len(found["broken"]) == 2 and "not a whole Feather file" in found["broken"][0]
    assert check(broken_folder, "--max-broken", "0.5")[0] == 0
    last = sorted(broken_folder.glob("*/sensors/lidar/*.feather"))[-1]
    last.rename(last.with_stem(str(int(last.stem) + 10**8)))  # a gap
    assert "the next sweep is 0.20 s later" in check(broken_folder)[2]["skipped"][0]


def test_check_refuses_clouds_outside_every_grid(tmp_path, capsys):
    """UTM coordinates: nothing is in the grid, so nothing could be learned."""
    folder = tmp_path / "drive" / "clouds"
    folder.mkdir(parents=True)
    points = np.random.default_rng(0).uniform(-20, 20, (500, 3)) + (500_000, 4_000_000, 100)
    for i in range(3):
        np.save(folder / f"{i:06d}.npy", points)
    assert commands.main(["check", "--data", str(folder), "--ground", "none"]) == 1
    assert "cannot be used: no point is in the student's grid" in capsys.readouterr().out


def test_status_counts_labels_and_compares_them_with_their_sweeps(
    tmp_path, street_folder, street, capsys
):
    """A label of other rows is torn: the line names its file and the points of its sweep."""
    folder, numbers = tmp_path / "labels", tmp_path / "numbers.json"
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2)
    labels.label_dataset(street, folder, quick, workers=1)

    def status(*options) -> tuple[int, str, dict]:
        command = ["status", "--data", str(street_folder), "--labels", str(folder)]
        code = commands.main([*command, "--json", str(numbers), *options])
        return code, capsys.readouterr().out, json.loads(numbers.read_text())

    code, printed, found = status()
    assert code == 0 and "4 made, 0 missing, 0 torn" in printed
    assert (found["made"], found["missing"], found["lacking"]) == (4, 0, {})

    made = labels.read_label(folder, street.pair_keys[3])
    rows = {name: getattr(made, name)[1:] for name in ("flow", "has_flow", "gain")}
    shorter = dataclasses.replace(made, **rows)
    labels.write_label(folder, shorter)
    labels.label_path(folder, street.pair_keys[0]).unlink()
    code, printed, found = status("--sample", "all")
    file, points = labels.label_path(folder, street.pair_keys[3]), len(street[3].pc0)
    assert code == 1 and "2 made, 1 missing, 1 torn" in printed
    assert f"{file}: has {points - 1} rows, its sweep has {points} points" in printed
    logs = [street.pair_keys[i].log_id for i in (0, 3)]
    assert found["lacking"] == {log: logs.count(log) for log in logs}
    assert f"no label yet: 1 of {logs[0]}, 1 of {logs[1]}" in printed

    command = ["status", "--data", str(street_folder), "--labels", str(tmp_path)]
    assert commands.main(command) == 1  # a folder without labels


def test_what_labeling_and_training_cost_is_measured_on_a_pair(street):
    found = commands.cost(street, "cpu", "narrow")
    assert found["seconds_to_label"] > 0.05 and 0 < found["seconds_to_train"] < 60


def test_a_folder_of_clouds_is_labeled_trained_on_and_predicted_as_a_user_types_it(
    tmp_path, street, capsys, monkeypatch
):
    """Two KITTI-like scans without poses or a map."""
    drive = tmp_path / "drive" / "velodyne"
    drive.mkdir(parents=True)
    for i, points in enumerate((street[0].pc0, street[0].pc1)):
        np.concatenate([points.numpy(), np.zeros((len(points), 1), "f4")], axis=1).tofile(
            drive / f"{i:06d}.bin"
        )
    data_and_labels = ["--data", str(drive), "--labels", str(tmp_path / "labels")]
    monkeypatch.setattr(
        commands, "cost", lambda *_: {"seconds_to_label": 2.0, "seconds_to_train": 3.0}
    )
    assert commands.main(["label", *data_and_labels, "--iterations", "2", "--workers", "1"]) == 0
    assert "taken to be in one frame" in capsys.readouterr().err
    assert commands.main(["status", *data_and_labels]) == 0
    check = ["check", *data_and_labels[:2], "--device", "cpu", "--model", "narrow"]
    assert commands.main(check) == 0
    assert "Cloud, 1 logs, 1 pairs" in capsys.readouterr().out
    # Options of the data reach the reader: poses of elsewhere, a rate, and fewer pairs or sweeps.
    np.savetxt(tmp_path / "elsewhere.txt", np.tile(np.eye(4)[:3].ravel(), (2, 1)))
    options = ["--poses", str(tmp_path / "elsewhere.txt"), "--rate-hz", "5"]
    assert (
        commands.main(["check", "--data", str(drive), *options, "--json", str(tmp_path / "n.json")])
        == 0
    )
    assert "taken to be in one frame" not in capsys.readouterr().err
    assert json.loads((tmp_path / "n.json").read_text())["seconds_recorded"] == pytest.approx(0.2)
    run = [
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--model",
        "narrow",
        "--workers",
        "0",
    ]
    assert commands.train_main([*data_and_labels, *run]) == 0
    student = str(tmp_path / "run" / "last.pt")
    files = [str(drive / f"{i:06d}.bin") for i in (0, 1)]
    out = tmp_path / "flow.feather"
    assert (
        commands.main(
            ["predict", "--checkpoint", student, *files, "--out", str(out), "--device", "cpu"]
        )
        == 0
    )
    assert feather.read_table(out).num_rows == len(street[0].pc0)
    assert commands.main(["evaluate", "--data", str(drive), "--baseline", "nearest"]) == 0
    assert "no error can be measured" in capsys.readouterr().out
    for arguments, message in (
        (["check", "--data", str(drive), "--ground", "raster"], "choose points or none"),
        (
            [
                "submit",
                "--data",
                str(drive),
                "--baseline",
                "nearest",
                "--challenge",
                "2023",
                "--out",
                "s.zip",
            ],
            "--masks",
        ),
    ):
        assert commands.main(arguments) == 1
        assert message in capsys.readouterr().err
