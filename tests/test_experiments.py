"""The experiments: the scaling law in small, and why a student may beat its teacher."""

import dataclasses
import math
import types

import pytest
import torch
from test_train import STREET

import data
import demo
import experiments
import fastflow3d
import nsfp
import train
import zeroflow


@pytest.fixture
def tiny_law(monkeypatch):
    """Amounts of one and two logs, and steps of one to four."""
    kinds = {experiments.STUDENT: (1, 2), experiments.SUPERVISED: (1,), experiments.BETTER: (2,)}
    monkeypatch.setattr(experiments, "SCALING_LOGS", kinds)
    seeds = {experiments.STUDENT: (0, 1), experiments.SUPERVISED: (0, 1), experiments.BETTER: (0,)}
    monkeypatch.setattr(experiments, "SCALING_SEEDS", seeds)
    monkeypatch.setattr(experiments, "VALIDATION_LOGS", 1)
    monkeypatch.setattr(experiments, "LEAST_STEPS", 1)
    monkeypatch.setattr(experiments, "MOST_STEPS", 4)
    monkeypatch.setattr(experiments, "LEAST_SHOWN", 0)
    return demo.DemoSettings(train_logs=2, test_logs=1)


def test_the_scaling_law_trains_every_student_once(tmp_path, cache, monkeypatch, capsys, tiny_law):
    trained, loop = [], train.train

    def seen(samples, settings):
        trained.append((settings.supervised, settings.seed, len(samples), settings.steps))
        return loop(samples, settings)

    monkeypatch.setattr(train, "train", seen)
    monkeypatch.setattr(experiments, "WORTHWHILE", 0.0)  # more steps never pay: all take one step
    settings = dataclasses.replace(STREET, steps=1)
    law = experiments.ScalingLaw(settings, tiny_law, tmp_path)
    law.train_all(experiments.SUPERVISED)
    tried = [(True, 0, 5, 1), (True, 0, 5, 2)]
    assert trained == [*tried, (True, 1, 5, 1)]
    law.show()
    out = capsys.readouterr().out
    pseudo = [(False, seed, pairs, 1) for seed in (0, 1) for pairs in (5, 10)]
    pseudo += [(False, 0, 5, 2), (False, 0, 10, 2)]  # tried in vain
    pseudo += [(False, 0, 10, 1)]  # of the better teacher
    assert sorted(trained[3:]) == sorted(pseudo)
    values = [law.errors(experiments.STUDENT, 2, seed, 1)["test"] for seed in (0, 1)]
    mean = f"{sum(values) / 2:.4f}  ({values[0]:.4f}, {values[1]:.4f})"
    assert f"{'student':28} {2:4} logs, {1:6} steps: {mean}" in out
    assert (tmp_path / "scaling_law.png").read_bytes().startswith(b"\x89PNG")
    count = len(trained)
    experiments.ScalingLaw(settings, tiny_law, tmp_path).show()
    assert len(trained) == count  # not again
    other = experiments.ScalingLaw(dataclasses.replace(settings, lr=1e-4), tiny_law, tmp_path)
    other.train_all(experiments.SUPERVISED)
    assert len(trained) == count + 3


def test_steps_are_doubled_as_long_as_validation_logs_gain_by_it(cache, tmp_path, tiny_law):
    """More logs begin with the steps of fewer; the better teacher's students copy the other's."""
    law = experiments.ScalingLaw(STREET, tiny_law, tmp_path)
    errors = {(1, 1): 0.10, (1, 2): 0.09, (1, 4): 0.089, (2, 2): 0.08, (2, 4): 0.07}
    law.errors = lambda kind, logs, seed, steps: {"validation": errors[logs, steps]}
    assert law.steps(experiments.STUDENT, 1) == 2 and law.steps(experiments.STUDENT, 2) == 4
    assert law.steps(experiments.BETTER, 2) == 4


def test_no_doubling_ends_before_each_pair_was_shown_often_enough(
    cache, tmp_path, tiny_law, monkeypatch
):
    """A log has five pairs, and 4 steps are doubled until 10 pairs were shown twice: 32 steps."""
    law = experiments.ScalingLaw(STREET, tiny_law, tmp_path)
    assert [law.most_steps(logs) for logs in (1, 2)] == [4, 4]
    monkeypatch.setattr(experiments, "LEAST_SHOWN", 2)
    assert [law.most_steps(logs) for logs in (1, 2)] == [16, 32]
    shown = []

    def errors(kind, logs, seed, steps):
        shown.append((logs, steps))
        return {"validation": 1 / steps}

    law.errors = errors
    assert law.steps(experiments.STUDENT, 2) == 32 and (1, 32) not in shown


def test_a_signal_stops_the_scaling_law_and_nothing_is_kept_of_that_run(
    tmp_path, cache, monkeypatch, capsys, tiny_law
):
    monkeypatch.setattr(train, "train", lambda samples, settings: None)
    monkeypatch.setattr(demo, "DemoSettings", lambda logs: tiny_law)
    out = tmp_path / "law"
    assert (
        experiments.main(["scaling-law", "--out", str(out), "--only", experiments.SUPERVISED]) == 0
    )
    assert "stopped by a signal; repeat the same command to continue" in capsys.readouterr().out
    assert not out.exists() or not list(out.iterdir())


def test_the_command_of_the_scaling_law(tmp_path, monkeypatch, capsys):
    """It takes the recipe of the street, and reports mistakes in one line."""
    calls = []

    class Law:
        def __init__(self, *arguments):
            calls.append(arguments)

        def show(self):
            calls.append("show")

    monkeypatch.setattr(experiments, "ScalingLaw", Law)
    assert experiments.main(["scaling-law", "--out", str(tmp_path)]) == 0
    (settings, logs, folder), _ = calls
    assert (settings.preset, settings.model, settings.dtype) == ("street", "narrow", "float32")
    assert (logs.train_logs, folder) == (300, tmp_path)
    monkeypatch.undo()
    assert experiments.main(["scaling-law", "--out", str(tmp_path), "--train-logs", "0"]) == 1
    assert "error: --train-logs 0" in capsys.readouterr().err


def test_what_is_wrong_by_group_by_hand(street):
    """Half of the moving points get 0.4 of their motion; static points get 10 cm."""
    pair = street[0]

    def estimator(pair):
        flow, moves = pair.flow.clone(), pair.is_dynamic & (pair.category > 0)
        flow[~moves] += torch.tensor([0.0, 0.06, 0.08])
        is_scored = moves & pair.is_valid & data.input_masks(pair, demo.GRID)[0]
        rows = is_scored.nonzero()[:, 0]
        flow[rows[: len(rows) // 2]] *= 0.4
        return zeroflow.Estimate(flow, 0.0)

    values = experiments.wrong_by_group([pair], estimator)
    is_scored = pair.is_valid & data.input_masks(pair, demo.GRID)[0]
    rows = (is_scored & pair.is_dynamic & (pair.category > 0)).nonzero()[:, 0]
    half = rows[: len(rows) // 2]
    short = 0.6 * pair.flow[half].norm(dim=1).sum().item() / len(rows)
    assert values == pytest.approx([short, short, len(half) / len(rows), 0.1, 0.1], abs=1e-4)


def test_why_compares_labels_with_students_of_both_errors(
    cache,
    monkeypatch,
    capsys,
    tiny_law,
):
    monkeypatch.setattr(experiments, "WHY_SEEDS", (0, 1))
    seen, loop = [], train.train

    def trained(samples, settings):
        seen.append((settings.squared_error, settings.seed, settings.steps))
        return loop(samples, settings)

    monkeypatch.setattr(train, "train", trained)
    experiments.why(dataclasses.replace(STREET, steps=1), tiny_law)
    assert seen == [(False, 0, 1), (False, 1, 1), (True, 0, 1), (True, 1, 1)]
    lines = capsys.readouterr().out.splitlines()
    rows = [
        line for line in lines if line.startswith(("labels of 2 logs", "student", "the teacher"))
    ]
    assert len(rows) == 6 and all(len(row.split()) >= 6 for row in rows)


def test_weights_are_made_kept_and_small(tmp_path, monkeypatch, capsys):
    """The whole recipe with few rays and two steps; the second time nothing is made."""
    few_rays = dataclasses.replace(experiments.WORLD, azimuths=60, beam_step=8, sweeps=2)
    monkeypatch.setattr(experiments, "WORLD", few_rays)
    monkeypatch.setattr(experiments, "WORLD_VALIDATION_LOGS", 1)
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], priors=1, iterations=2, refine="none")
    monkeypatch.setitem(nsfp.TEACHERS, "fast", quick)
    command = ["weights", "--out", str(tmp_path), "--train-logs", "2", "--steps", "2"]
    assert experiments.main(command) == 0
    printed = capsys.readouterr().out
    assert "wrote " + str(tmp_path / "street.pt") in printed
    # No-motion, teacher and student by speed, on the validation streets.
    rows = [line.split() for line in printed[printed.index("end-point errors") :].splitlines()]
    ranges = len(experiments.SPEED_RANGES_MPS)
    assert [len(row) for row in rows[2:]] == [1 + ranges] * 4
    assert [row[0] for row in rows[2:]] == ["points", "no-motion", "fast", "student"]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "train").rglob("*.feather")}
    before = (tmp_path / "street.pt").read_bytes()
    assert experiments.main(command) == 0
    assert times == {file: file.stat().st_mtime_ns for file in times}
    assert (tmp_path / "street.pt").read_bytes() == before and len(before) < 8e6

    # In half precision, the student is the run's, within a thousandth of each weight.
    own = fastflow3d.load_checkpoint(tmp_path / "street.pt").state_dict()
    for name, value in (
        fastflow3d.load_checkpoint(tmp_path / "run" / "last.pt").state_dict().items()
    ):
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)
    # The other kind of labels has a run of its own, which may begin with the weights of the first.
    begin_with = ["--init", str(tmp_path / "run" / "last.pt"), "--steps", "1"]
    assert experiments.main([*command, "--supervised", *begin_with]) == 0
    checkpoint = tmp_path / "run from true flow" / "last.pt"
    first = fastflow3d.load_checkpoint(tmp_path / "run" / "last.pt").state_dict()
    second = fastflow3d.load_checkpoint(checkpoint).state_dict()
    name = "backbone.encoder_step_1.0.conv.weight"
    assert 0 < (first[name] - second[name]).abs().max() < 0.01


def test_errors_by_speed_are_means_over_foreground_points_at_the_rate_of_the_pair():
    """Two sweeps of a LiDAR that turns 20 times a second: 30 cm are 6 m/s there."""
    flow = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0.3, 0, 0], [0.3, 0, 0], [0.01, 0, 0]])
    pair = types.SimpleNamespace(
        pc0=torch.zeros(5, 3),
        is_ground0=torch.zeros(5, dtype=torch.bool),
        pc1=torch.zeros(1, 3),
        is_ground1=torch.zeros(1, dtype=torch.bool),
        is_valid=torch.tensor([True, True, True, False, True]),
        category=torch.tensor([1, 1, 1, 1, 0]),  # the last one is background
        flow=flow,
        seconds=0.05,
    )
    guess = torch.tensor([[0.1, 0, 0], [0.3, 0, 0], [0.3, 0.4, 0], [9.0, 9, 9], [9.0, 9, 9]])
    errors, counts = experiments.errors_by_speed(
        [pair], lambda _: zeroflow.Estimate(guess, 0.0), fastflow3d.MODELS["small"].half_extent_m
    )
    assert counts == [1, 0, 0, 2, 0, 0]
    assert errors[0] == pytest.approx(0.1) and errors[3] == pytest.approx((0.0 + 0.4) / 2)
    assert all(math.isnan(errors[i]) for i in (1, 2, 4, 5))
