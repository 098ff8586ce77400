"""The demo: the whole method on a street of a log or two."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from test_train import STREET

import commands
import data
import demo
import fastflow3d
import labels
import train
import zeroflow


def times_of_files(cache) -> dict:
    return {file: file.stat().st_mtime_ns for file in cache.rglob("*.feather")}


def test_the_whole_method_on_a_tiny_street(tmp_path, cache, capsys):
    """Street, labels, student, table, checkpoint, picture; a second run finds all in the cache."""
    run, picture = tmp_path / "run", tmp_path / "picture.png"
    logs = ["--train-logs", "1", "--test-logs", "1"]
    arguments = [*logs, "--steps", "2", "--device", "cpu"]
    assert commands.train_main([*arguments, "--out", str(run), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert {"no-motion", "nearest", "teacher", "student"} <= set(lines)
    assert re.search(r"is [0-9]+ times faster than its teacher; [0-9]+ times faster\nthan", out)
    assert "ms/pair" in out
    assert "5 pairs of the street, of logs that the student never saw; errors in meters" in out
    assert "train_logs: 1\n" in out and "preset: street\n" in out
    for file in (picture, run / "curve.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert len(train.read_log(run)) == 2
    files = {".lock", "curve.png", "demo.json", "last.pt", "log.jsonl", "settings.json"}
    assert {file.name for file in run.iterdir()} == files
    stored = json.loads((run / "settings.json").read_text())
    assert stored["preset"] == "street" and stored["steps"] == 2 and stored["clip_norm"] == 0.5
    made = times_of_files(cache)

    settings = dataclasses.replace(STREET, steps=2, out=str(tmp_path / "again"))
    rows = demo.run(settings, demo.DemoSettings(train_logs=1, test_logs=1))
    assert times_of_files(cache) == made
    for name, row in rows.items():  # the table prints what evaluate measured
        assert f"{row['grid_three_way']:.4f}" in lines[name]

    # `evaluate --checkpoint` reads the file and finds the same error on the same logs.
    (test_split,) = cache.glob("*/test")
    student = zeroflow.from_student(fastflow3d.load_checkpoint(run / "last.pt").prepare_inference())
    numbers = zeroflow.evaluate(data.open_dataset(test_split), student, demo.GRID).numbers
    expected = rows["student"]["grid_three_way"]
    assert numbers["grid_three_way"] == pytest.approx(expected, abs=1e-6)

    # The same again would write over a run; a finished one is only evaluated again.
    capsys.readouterr()
    assert commands.train_main([*arguments, "--out", str(run)]) == 1
    assert f"--out {run}: holds a run; continue it with --resume" in capsys.readouterr().err
    assert commands.train_main(["--resume", "--out", str(run)]) == 0
    assert f"{rows['student']['grid_three_way']:.4f}" in capsys.readouterr().out
    assert commands.train_main(["--resume", "--out", str(run), "--train-logs", "2"]) == 1
    assert "--train-logs 2: the run was begun with 1" in capsys.readouterr().err
    assert commands.main(["curve", "--out", str(run)]) == 0
    assert commands.main(["curve", "--out", str(tmp_path / "no")]) == 1


def test_more_logs_are_added_to_the_cache_and_fewer_are_taken_from_it(cache, monkeypatch, capsys):
    """The folder does not depend on their number; a folder of other settings is removed."""
    (cache / "street-of-old").mkdir(parents=True)
    train_set, test_set, folder = demo.prepare_street(demo.DemoSettings(1, 1))
    out = capsys.readouterr().out
    assert (
        f"removed {cache / 'street-of-old'}: " in out
        and f"street and labels: {folder.parent}" in out
    )
    assert [entry.name for entry in cache.iterdir()] == [folder.parent.name]
    made = times_of_files(cache)

    # Labels cover the grid of the smallest student; some points are farther away.
    label_folder, pair = labels.open_labels(folder, test_set), test_set[0]
    assert label_folder.half_extent_m == demo.GRID == (25.6, 25.6, 3.0)
    is_inside = (pair.pc0.abs() < torch.tensor(demo.GRID)).all(dim=1)
    has_flow = label_folder.read(pair).has_flow
    assert torch.equal(has_flow, is_inside & ~pair.is_ground0)
    assert has_flow.sum() < data.input_masks(pair)[0].sum()

    more, _, same_folder = demo.prepare_street(demo.DemoSettings(2, 1))
    assert same_folder == folder and len(more) == 2 * len(train_set)
    assert more.pair_keys[: len(train_set)] == train_set.pair_keys
    times = times_of_files(cache)
    assert len(times) > len(made) and {file: times[file] for file in made} == made
    fewer, _, _ = demo.prepare_street(demo.DemoSettings(1, 1))
    assert fewer.pair_keys == train_set.pair_keys and times_of_files(cache) == times
    assert "removed" not in capsys.readouterr().out
    with pytest.raises(
        data.DataError, match="--train-logs 0 --test-logs 1: give 1 or more of each"
    ):
        demo.prepare_street(demo.DemoSettings(0, 1))
    before = demo.cache_folder()
    monkeypatch.setattr(demo, "CACHE_VERSION", 1000)
    assert demo.cache_folder() != before


def test_without_a_home_or_a_cache_that_can_be_made_it_says_what_to_set(
    tmp_path, cache, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="file/.*cannot be made .*; set XDG_CACHE_HOME to a"):
        demo.prepare_street(demo.DemoSettings(1, 1))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(data.DataError, match="you have no home folder here; set XDG_CACHE_HOME"):
        demo.prepare_street(demo.DemoSettings(1, 1))


def test_settings_of_another_version_go_on_and_torn_ones_are_named(tmp_path):
    for text, expected in (
        ('{"train_logs": 3, "test_logs": 2, "picture": null, "more": 1}', (3, 2)),
        ('{"train_logs": 3}', (3, 6)),
    ):
        (tmp_path / "demo.json").write_text(text)
        found = demo._resumed(demo.DemoSettings(), tmp_path)
        assert (found.train_logs, found.test_logs) == expected
    for content in (b'{"train', b"\xff\xfe", b"17", b"", b'{"train_logs": "3"}'):
        (tmp_path / "demo.json").write_bytes(content)
        with pytest.raises(data.DataError, match="demo.json: is torn, or not JSON .*; begin a new"):
            demo._resumed(demo.DemoSettings(), tmp_path)


def test_what_cannot_go_together_with_the_demo_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert commands.train_main(["--data", "x", "--labels", "y", "--picture", "p.png"]) == 1
    assert "--picture: belongs to the demo" in capsys.readouterr().err
