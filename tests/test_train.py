"""The trainer: it learns, repeats itself, and loses nothing, on a street of two short logs."""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

import commands
import data
import fastflow3d
import labels
import nsfp
import runs
import train
import zeroflow

QUICK_TEACHER = dataclasses.replace(
    nsfp.TEACHERS["fast"], hidden_channels=16, batch_points=128, iterations=20
)


STREET = train.TrainSettings(**train.PRESETS["street"], device="cpu")


def samples_that_move(n: int = 2) -> list[train.Sample]:
    """Points on the left that go ahead by half a meter, points on the right that go back."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(n):
        pc0 = (
            20 * (2 * torch.rand(400, 3, generator=generator) - 1) * torch.tensor([1, 1, 0.1])
        ).round()
        label = torch.tensor([0.5, 0.0, 0.0]) * pc0[:, 1:2].sign()
        has_flow, weight = torch.ones(400, dtype=torch.bool), torch.ones(400)
        samples.append(train.Sample(pc0, pc0 + label, label, has_flow, weight))
    return samples


def test_a_student_learns_what_its_labels_say_and_a_seed_repeats_it():
    settings = dataclasses.replace(STREET, steps=40, lr=1e-2, clip_norm=5.0, mirror=False)
    samples = samples_that_move()
    model, again = train.train(samples, settings).eval(), train.train(samples, settings).eval()
    pc0, pc1, label, *_ = samples[0]
    with torch.no_grad():
        flow = model([pc0], [pc1])[0][0]
        assert (flow - label).norm(dim=1).mean() < 0.5 * label.norm(
            dim=1
        ).mean()  # half of no motion's
        assert torch.equal(flow, again([pc0], [pc1])[0][0])
    quick = dataclasses.replace(settings, steps=1)
    first, other = (
        train.train(samples, dataclasses.replace(quick, seed=seed)).state_dict() for seed in (0, 1)
    )
    assert not torch.equal(first["head.decoder.0.weight"], other["head.decoder.0.weight"])


def test_bfloat16_learns_too_and_the_student_stays_float32():
    settings = dataclasses.replace(STREET, steps=60, lr=1e-2, clip_norm=5.0, mirror=False)
    settings = dataclasses.replace(settings, dtype="bfloat16")
    samples = samples_that_move()
    model = train.train(samples, settings).eval()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    pc0, pc1, label, *_ = samples[0]
    with torch.no_grad():
        flow = model([pc0], [pc1])[0][0]
    assert (flow - label).norm(dim=1).mean() < 0.5 * label.norm(dim=1).mean()
    other = train.train(samples, dataclasses.replace(settings, steps=2, dtype="float32")).eval()
    same = train.train(samples, dataclasses.replace(settings, steps=2)).eval()
    assert not torch.equal(
        other.state_dict()["head.decoder.0.weight"], same.state_dict()["head.decoder.0.weight"]
    )


def test_mirrored_pairs_exchange_left_and_right_and_front_and_back_alike():
    """All four forms come up; clouds and labels change together; a resume draws the same again."""
    (sample,) = samples_that_move(1)
    pair = [[sample.pc0], [sample.pc1], [sample.label], [sample.has_flow]]
    batch, forms = train.Batch(*pair, weights=[], seconds=[0.1], broken=0), set()
    settings = train.TrainSettings(mirror=True)
    for number in range(40):
        generators = [torch.Generator().manual_seed(number) for _ in range(2)]
        mirrored, again = (train.varied(batch, settings, generator) for generator in generators)
        assert torch.equal(mirrored.pc0s[0], again.pc0s[0])
        for sign in itertools.product((1.0, -1.0), (1.0, -1.0), (1.0,)):
            changed = [part * torch.tensor(sign) for part in (sample.pc0, sample.pc1, sample.label)]
            found = [mirrored.pc0s[0], mirrored.pc1s[0], mirrored.labels[0]]
            if all(map(torch.equal, found, changed)):
                forms.add(sign)
                break
        else:
            raise AssertionError("in none of the four forms")
    assert len(forms) == 4


def test_a_run_can_begin_with_the_weights_of_a_file(tmp_path, student_file):
    """Also after a resume, when the file may be gone."""
    file = tmp_path / "first.pt"
    shutil.copy(student_file, file)
    samples, folder = samples_that_move(1), tmp_path / "run"
    settings = dataclasses.replace(STREET, steps=4, init=str(file), out=str(folder))
    model, _ = train.new_student(settings)
    given = fastflow3d.load_checkpoint(file).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    assert model.training
    whole = train.train(samples, settings).state_dict()

    # Half of the steps, and then the rest without the file.
    stopped, one_step = [], train.one_step

    def stop_after_two(*arguments):
        stopped.append(1)
        if len(stopped) == 3:
            raise KeyboardInterrupt
        return one_step(*arguments)

    train.one_step = stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(samples, dataclasses.replace(settings, checkpoint_every=2), folder)
    finally:
        train.one_step = one_step
    file.unlink()
    resumed = train.train(samples, dataclasses.replace(settings, resume=True), folder)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.state_dict().items())

    # What cannot be the beginning is refused before anything is read.
    places = {"data": ("nowhere",), "labels": ("nowhere",), "init": str(student_file)}
    wrong = dataclasses.replace(train.TrainSettings(), **places, device="cpu")
    with pytest.raises(data.DataError, match="holds a student of --model narrow, not of normal"):
        train.check_settings(wrong)
    with pytest.raises(data.DataError, match="--init: .*first.pt: no such file"):
        train.check_settings(dataclasses.replace(wrong, init=str(file)))


def test_turned_and_raised_pairs_are_rigid_and_their_flow_turns_with_them():
    """All angles and heights come up; the flow still leads from the moved sweep 0 to sweep 1."""
    pc0 = torch.rand(50, 3, dtype=torch.float32) * 40 - 20
    label = torch.rand(50, 3) - 0.5
    batch = train.Batch([pc0], [pc0 + label], [label], [], [], [0.1], 0)
    settings = train.TrainSettings(turn=True, height_m=0.5)
    angles, heights = [], []
    for number in range(100):
        generator = torch.Generator().manual_seed(number)
        turned = train.varied(batch, settings, generator)
        moved0, moved1, flow = turned.pc0s[0], turned.pc1s[0], turned.labels[0]
        torch.testing.assert_close(moved0 + flow, moved1, atol=1e-5, rtol=0)
        up = moved0[:, 2] - pc0[:, 2]
        assert (up - up[0]).abs().max() < 1e-6 and torch.equal(flow[:, 2], label[:, 2])
        # By complex numbers: a turn multiplies all of them by the same one, of length 1.
        factor = torch.view_as_complex(moved0[:, :2].contiguous()) / torch.view_as_complex(
            pc0[:, :2].contiguous()
        )
        assert (factor - factor[0]).abs().max() < 1e-4 and abs(abs(factor[0]) - 1) < 1e-5
        angles.append(factor[0].angle().item())
        heights.append(up[0].item())
    quarters = np.histogram(angles, bins=4, range=(-np.pi, np.pi))[0]
    assert quarters.min() > 10 and min(heights) < -0.4 and max(heights) > 0.4
    assert max(map(abs, heights)) <= 0.5 + 1e-6


def test_each_step_has_the_weight_the_mask_and_the_rate_that_the_settings_say(monkeypatch):
    """Speed weight for the first part of the steps; only rows with a label and in the grid."""
    seen = []

    def loss(flows, labels, masks, weight, *more):
        assert more[-1] == settings.squared_error
        seen.append((weight, [int(mask.sum()) for mask in masks]))
        return distillation_loss(flows, labels, masks, weight, *more)

    distillation_loss = zeroflow.distillation_loss
    monkeypatch.setattr(zeroflow, "distillation_loss", loss)
    samples = samples_that_move(1)
    samples[0].pc0[:30] += 1000  # out of the grid
    samples[0].has_flow[380:] = False
    settings = dataclasses.replace(STREET, steps=4, speed_weight="published", weighted_share=0.75)
    train.train(samples, settings)
    assert seen == [("published", [350])] * 3 + [("none", [350])]
    seen.clear()
    settings = dataclasses.replace(settings, squared_error=True)
    train.train(samples, settings)
    assert len(seen) == 4
    rates = [train.learning_rate(step, 100, settings) for step in (0, 4, 50, 99)]
    assert rates == pytest.approx(
        [2e-3 * share for share in (0.2, 0.99606, 0.5, 0.0002467)], rel=1e-3
    )
    published = train.TrainSettings()
    assert [train.learning_rate(step, 100, published) for step in (0, 99)] == [2e-6, 2e-6]
    train.train(samples, dataclasses.replace(settings, supervised=True, steps=1))
    assert seen[-1][0] == "none"  # of true flow, background weighs less, and speed does not count


def test_the_whole_batchs_gradient_is_clipped_where_that_is_asked_for(monkeypatch):
    """Adam would hide it: what the optimizer sees is looked at."""
    norms, step = [], torch.optim.Adam.step

    def seen(self):
        grads = [
            parameter.grad.norm() for group in self.param_groups for parameter in group["params"]
        ]
        norms.append(torch.stack(grads).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", seen)
    for clip in (None, 1e-3):
        train.train(
            samples_that_move(4), dataclasses.replace(STREET, steps=1, batch_size=4, clip_norm=clip)
        )
    assert norms[0] > 0.1 and norms[1] == pytest.approx(1e-3, rel=1e-3)


# --- Batches --------------------------------------------------------------------------------------


def test_every_epoch_shows_every_sample_in_an_order_of_its_own():
    settings = dataclasses.replace(STREET, batch_size=3)
    batches = [train.batch_of(step, 9, settings) for step in range(6)]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(9))
    assert batches[:3] != batches[3:]
    assert batches[4] == train.batch_of(4, 9, settings)  # whatever came before
    assert batches != [
        train.batch_of(step, 9, dataclasses.replace(settings, seed=1)) for step in range(6)
    ]
    assert {len(train.batch_of(step, 10, settings)) for step in range(9)} == {
        3
    }  # one is left over each time
    left_over = [
        set(range(10)) - {i for s in range(3) for i in train.batch_of(3 * e + s, 10, settings)}
        for e in range(9)
    ]
    assert len(set().union(*left_over)) > 3  # not always the same
    assert sorted(train.batch_of(5, 2, settings)) == [0, 1]  # fewer samples than a batch


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_a_batch_whose_samples_do_not_depend_on_their_number(world):
    settings = dataclasses.replace(STREET, batch_size=8, micro_batch=2)
    for step in range(5):
        shares = [train.micro_batches(step, 20, settings, rank, world) for rank in range(world)]
        assert sorted(i for share in shares for part in share for i in part) == sorted(
            train.batch_of(step, 20, settings)
        )
        assert all(len(part) == 2 for share in shares for part in share) and all(shares)
    many = [train.micro_batches(0, 20, settings, rank, 8) for rank in range(8)]
    assert [len(part) for share in many for part in share] == [
        1
    ] * 8  # smaller, so that all have one


def test_loaded_batches_are_the_samples_of_their_rows_with_and_without_workers():
    samples = []
    for i in range(6):
        points = torch.full((i + 1, 3), float(i))
        samples.append(train.Sample(*[points] * 4, torch.ones(i + 1), broken=int(i == 3)))
    settings = dataclasses.replace(STREET, batch_size=4, micro_batch=2)
    for workers in (0, 2):
        steps = train.load(samples, dataclasses.replace(settings, workers=workers), first_step=1)
        for step in (1, 2, 3):
            batches, parts = next(steps), train.micro_batches(step, 6, settings)
            assert len(batches) == len(parts) == 2
            for batch, rows in zip(batches, parts, strict=True):
                assert [int(pc0[0, 0]) for pc0 in batch.pc0s] == rows
                assert [len(pc0) for pc0 in batch.pc0s] == [i + 1 for i in rows]
                assert [len(weight) for weight in batch.weights] == [i + 1 for i in rows]
                assert len(batch.pc1s) == len(batch.labels) == len(batch.has_flow) == 2
                assert batch.broken == (3 in rows)


def test_a_batch_in_parts_has_the_gradient_of_the_sum_over_its_samples(tmp_path):
    samples = samples_that_move(4)
    settings = dataclasses.replace(
        STREET, steps=1, batch_size=4, micro_batch=1, clip_norm=None, lr=1.0, cosine=False
    )
    settings = dataclasses.replace(settings, mirror=False)
    torch.manual_seed(settings.seed)
    model = (
        fastflow3d.FastFlow3D(fastflow3d.MODELS["narrow"])
        .to(memory_format=torch.channels_last)
        .train()
    )
    total = 0.0
    for i in train.batch_of(0, 4, settings):
        pc0, pc1, label, has_flow, *_ = samples[i]
        flows, inside = model([pc0], [pc1])
        loss = zeroflow.distillation_loss(flows, [label], [has_flow & inside[0]])
        loss.backward()
        total += loss.item()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    train.train(samples, settings, tmp_path)
    (line,) = train.read_log(tmp_path)
    assert line["gradient"] == pytest.approx(norm, rel=1e-4) and line["loss"] == pytest.approx(
        total / 4, rel=1e-5
    )


# --- Samples --------------------------------------------------------------------------------------


def test_samples_are_the_rows_that_are_not_ground_with_their_own_labels(tmp_path, street):
    labels.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    pc0, pc1, label, has_flow, weight, *_ = train.LabeledPairs(street, tmp_path)[1]
    pair = street[1]
    assert torch.equal(pc0, pair.pc0[~pair.is_ground0]) and torch.equal(
        pc1, pair.pc1[~pair.is_ground1]
    )
    stored = labels.read_label(tmp_path, pair.key)
    assert torch.equal(label, stored.flow[~pair.is_ground0]) and weight.eq(1).all()
    assert torch.equal(has_flow, stored.has_flow[~pair.is_ground0])
    # FastFlow3D's: the true flow, of all points in the grid, where background weighs a tenth.
    for grid in (data.GRID_HALF_EXTENT_M, (10.0, 20.0, 3.0)):
        pc0, pc1, label, has_flow, weight, *_ = train.LabeledPairs(street, None, grid)[1]
        is_inside = (pc0.abs() < torch.tensor(grid)).all(dim=1)
        assert torch.equal(label, pair.flow[~pair.is_ground0]) and torch.equal(has_flow, is_inside)
        is_foreground = pair.category[~pair.is_ground0] > 0
        assert torch.equal(weight, torch.where(is_foreground, 1.0, 0.1))
        assert weight.unique().numel() == 2 and 0 < is_inside.sum()
    assert is_inside.sum() < data.input_masks(pair)[0].sum()


def test_points_that_the_teacher_was_not_sure_about_are_left_out_if_asked_for(tmp_path, street):
    """Those whose gain is from 1 to less than the doubt, and none of which it is not known."""
    labels.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    label = labels.read_label(tmp_path, street.pair_keys[0])
    gains = torch.tensor([0.5, 1.0, 1.25, 1.5, 9.0, torch.nan])  # exact in float16
    gain = gains[torch.arange(len(label.flow)) % 6]
    labels.write_label(tmp_path, dataclasses.replace(label, gain=gain))
    kept = ~street[0].is_ground0
    is_doubtful = torch.isin(gain, torch.tensor([1.0, 1.25]))
    assert (is_doubtful & label.has_flow).any()
    for doubt, expected in ((None, label.has_flow), (1.5, label.has_flow & ~is_doubtful)):
        sample = train.LabeledPairs(street, tmp_path, doubt=doubt)[0]
        assert torch.equal(sample.has_flow, expected[kept])


def test_a_pair_without_a_label_is_left_out_and_no_label_at_all_is_an_error(
    tmp_path, street, capsys
):
    with pytest.raises(data.DataError, match="no label for any of 4 pairs; run"):
        train.LabeledPairs(street, tmp_path)
    labels.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    capsys.readouterr()
    labels.label_path(tmp_path, street.pair_keys[1]).unlink()
    pairs = train.LabeledPairs(street, tmp_path)
    err = capsys.readouterr().err
    assert f"{tmp_path}: 1 of 4 pairs have no label and are left out; the first is " in err
    assert str(tuple(street.pair_keys[1])) in err
    assert len(pairs) == 3
    assert torch.equal(
        pairs[1][0], street[2].pc0[~street[2].is_ground0]
    )  # row 1 is now pair 2, with pair 2's label
    assert torch.equal(
        pairs[1][2], labels.read_label(tmp_path, street.pair_keys[2]).flow[~street[2].is_ground0]
    )


def test_a_share_of_the_samples_is_part_of_a_larger_one_whatever_their_order(tmp_path, street):
    labels.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    whole = train.LabeledPairs(street, tmp_path)
    shares = [train.Samples([whole], fraction) for fraction in (0.25, 0.5, 1.0)]
    rows = [set(share.keys()) for share in shares]
    assert [len(share) for share in shares] == [1, 2, 4] and rows[0] < rows[1] < rows[2]
    # The first half by SHA-256. The hash is that of the list, so that older runs can be resumed.
    digests = [hashlib.sha256(repr(key).encode()).hexdigest() for key in street.pair_keys]
    first = sorted(range(4), key=digests.__getitem__)[:2]
    assert list(shares[1].keys()) == [street.pair_keys[i] for i in sorted(first)]
    content = repr([digests[i] for i in sorted(first)] + [whole.teacher])
    assert shares[1].hash == hashlib.sha256(content.encode()).hexdigest()
    assert len({share.hash for share in shares}) == 3
    # Which pairs a share has does not depend on the order of the parts. The hash does depend on it,
    # since batches would differ.
    halves = [train.LabeledPairs(street, tmp_path) for _ in range(2)]
    halves[0].indices, halves[1].indices = [0, 1], [2, 3]
    one_way, other_way = train.Samples(halves, 0.5), train.Samples(halves[::-1], 0.5)
    assert set(one_way.keys()) == set(other_way.keys()) == rows[1]
    assert one_way.hash != other_way.hash
    swapped = train.LabeledPairs(street, tmp_path)
    swapped.indices = [0, 1, 2, 0]
    assert train.Samples([swapped]).hash != shares[2].hash  # as many, and not the same
    two = train.Samples([whole, whole])
    assert len(two) == 8 and torch.equal(two[5][0], whole[1][0])
    kept = train.LabeledPairs(street, tmp_path, keep=True)
    assert kept[2][0] is kept[2][0] and whole[2][0] is not whole[2][0]


def test_a_second_process_in_the_folder_of_a_run_is_refused_until_the_first_has_ended(
    tmp_path, street
):
    """Killed, so that nothing is cleaned up."""
    labels.label_dataset(street, tmp_path / "labels", QUICK_TEACHER, workers=1)
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import runs, train
log = runs.Log(pathlib.Path({str(tmp_path / "run")!r}), 0, 0, train.TrainSettings())
print("locked", flush=True)
time.sleep(60)
"""
    samples = train.Samples([train.LabeledPairs(street, tmp_path / "labels")])
    settings = dataclasses.replace(STREET, steps=1)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(data.DataError, match="another process is training in this folder"):
            train.train(samples, settings, tmp_path / "run")
        process.kill()
    assert train.train(samples, settings, tmp_path / "run") is not None

    # A process that has trained, and lives on, keeps nobody out.
    code = code.replace("time.sleep(60)", "")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_broken_pair_is_replaced_and_counted_and_too_many_stop_the_run(tmp_path, street, capsys):
    labels.label_dataset(street, tmp_path / "labels", QUICK_TEACHER, workers=1)
    pairs = train.LabeledPairs(street, tmp_path / "labels")
    torn = labels.label_path(tmp_path / "labels", street.pair_keys[1])
    torn.write_bytes(b"torn")
    samples = train.Samples([pairs])
    stand_in, err = samples[1], capsys.readouterr().err
    assert torch.equal(stand_in.pc0, pairs[2].pc0) and stand_in.broken == 1
    assert "replaced by another pair: " in err and str(torn) in err
    assert samples[2].broken == 0 and not capsys.readouterr().err
    settings = dataclasses.replace(STREET, steps=8)  # two epochs of four
    assert train.train(samples, settings, tmp_path / "run") is not None
    assert (
        train.read_log(tmp_path / "run")[-1]["broken"] == 2
        and capsys.readouterr().err.count("replaced by") == 2
    )
    with pytest.raises(
        data.DataError,
        match="1 of . pairs could not be read, more than --max-broken 0.005; repair the",
    ):
        train.train(samples, dataclasses.replace(settings, max_broken=0.005))
    for key in street.pair_keys:
        labels.label_path(tmp_path / "labels", key).write_bytes(b"torn")
    with pytest.raises(data.DataError, match="none of 4 pairs in a row can be read; the first: "):
        samples[0]


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, street, street_folder) -> list[str]:
    """Options that train on a small street as on anybody's logs."""
    labels.label_dataset(street, tmp_path / "labels", QUICK_TEACHER, workers=1)
    options = {
        "data": street_folder,
        "labels": tmp_path / "labels",
        "out": tmp_path / "run",
        "device": "cpu",
    }
    options |= {"model": "narrow", "batch-size": 2, "micro-batch": 1, "lr": 1e-3, "workers": 0}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_training_on_logs_and_labels_of_ones_own(tmp_path, own, street_folder, capsys):
    more = ["--val", street_folder, "--epochs", 2, "--val-share", 0.5, "--fraction", 1.0]
    assert commands.train_main([*own, *map(str, more)]) == 0
    out = capsys.readouterr().out
    assert "student " in out and "teacher " not in out  # nobody labelled the validation logs
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    stored = checkpoint["train_settings"]
    assert tuple(stored["data"]) == (str(street_folder),) and stored["epochs"] == 2
    lines = train.read_log(tmp_path / "run")
    steps, scores = ([line for line in lines if key in line] for key in ("loss", "paper_three_way"))
    assert [line["step"] for line in steps] == [1, 2, 3, 4]  # two epochs of four pairs by two
    assert [line["step"] for line in scores] == [2, 4] and "bucketed_dynamic_mean" in scores[
        0
    ]  # one an epoch
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["state"]
    assert best["best"] == min(line["paper_three_way"] for line in scores)
    student = zeroflow.from_student(fastflow3d.load_checkpoint(tmp_path / "run" / "best.pt"))
    pairs = data.open_dataset(street_folder)
    narrow = fastflow3d.MODELS["narrow"].half_extent_m
    half = [pairs[0], pairs[2]]  # half of them, evenly spread
    numbers = zeroflow.evaluate(half, student, narrow).numbers
    assert numbers["paper_three_way"] == pytest.approx(best["best"], abs=1e-5)
    # One torn sweep of the validation logs costs its pairs, not the run; logs without annotations
    # are refused at once.
    shutil.copytree(street_folder, tmp_path / "val")
    sorted((tmp_path / "val").glob("*/sensors/lidar/*.feather"))[-1].write_bytes(b"torn")
    more = [*map(str, ["--val", tmp_path / "val", "--steps", 1, "--out", tmp_path / "second"])]
    assert commands.train_main([*own, *more]) == 0 and "student " in capsys.readouterr().out
    shutil.copytree(
        street_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("annotations.feather")
    )
    assert (
        commands.train_main(
            [*own, "--val", str(tmp_path / "bare"), "--out", str(tmp_path / "third")]
        )
        == 1
    )
    assert "has no annotations to compare with" in capsys.readouterr().err


def test_true_flow_and_several_roots_are_learnt_from(tmp_path, own, street_folder, capsys):
    shutil.copytree(street_folder, tmp_path / "copy")
    folders = [[str(street_folder), str(tmp_path / "copy")], [str(tmp_path / "labels")] * 2]
    two = [*own, "--data", *folders[0], "--labels", *folders[1], "--pairs-per-log", "all", "1"]
    assert commands.train_main([*two, "--steps", "1"]) == 0
    settings = train.TrainSettings(data=tuple(folders[0]), labels=(str(tmp_path / "labels"),) * 2)
    assert len(train.open_samples(dataclasses.replace(settings, pairs_per_log=(None, 1)))) == 4 + 2
    for counts, expected in (((1,), 2 + 2), ((None, 1), 4 + 2)):  # the last one holds for the rest
        chosen = dataclasses.replace(settings, pairs_per_log=counts)
        assert len(train.open_samples(chosen)) == expected
    three = dataclasses.replace(
        settings, data=(*settings.data, settings.data[0]), labels=settings.labels[:1] * 3
    )
    assert len(train.open_samples(dataclasses.replace(three, pairs_per_log=(None, 1)))) == 4 + 2 + 2
    supervised = [*own, "--steps", "1", "--supervised"]
    assert commands.train_main(supervised) == 1
    assert "--supervised: learns from the true flow; leave --labels out" in capsys.readouterr().err
    del supervised[supervised.index("--labels") : supervised.index("--labels") + 2]
    assert commands.train_main([*supervised, "--out", str(tmp_path / "supervised")]) == 0


def test_presets_are_the_papers_runs(own):
    def settings(*arguments):
        given = commands._train_parser([]).parse_args(["--data", "x", *arguments])
        return train.resolve(commands.given_settings(given, train.TrainSettings))

    one = settings("--preset", "zeroflow-1x")
    assert (one.lr, one.epochs, one.batch_size, one.micro_batch, one.clip_norm) == (
        2e-6,
        50,
        64,
        16,
        None,
    )
    assert (one.dtype, one.cosine, one.model, one.sweeps_per_log) == (
        "float32",
        False,
        "normal",
        (145,),
    )
    later = settings("--preset", "zeroflow-1x", "--lr", "2e-4", "--epochs", "20")
    assert (later.lr, later.epochs, later.sweeps_per_log) == (2e-4, 20, (145,))
    assert settings("--preset", "zeroflow-5x").pairs_per_log == (None, 24)
    xl = settings("--preset", "zeroflow-xl-3x")
    assert (xl.model, xl.batch_size, xl.micro_batch, xl.pairs_per_log) == ("xl", 12, 2, (None, 12))
    assert settings("--preset", "fastflow3d").supervised and not one.supervised


# --- Nothing is lost ------------------------------------------------------------------------------

STEPS = 12
# Kills its own process, as the kernel would, at one moment of a run.
DRIVER = """
import os, sys
import commands, train, zeroflow
moment, count = sys.argv[1], 0

def die_after(function, calls):
    def patched(*args, **kwargs):
        global count
        count += 1
        if count == calls:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return patched

if moment == "step":  # a step is two micro-batches: the second one of step 6
    zeroflow.distillation_loss = die_after(zeroflow.distillation_loss, 12)
if moment == "epoch":
    train.Log.write = die_after(train.Log.write, 7)
if moment == "checkpoint":  # the second is half written
    train.torch.save = die_after(train.torch.save, 2)
if moment == "rename":  # of settings.json, log.jsonl, last.pt at steps 0 and 2, and now at step 4
    os.replace = die_after(os.replace, 5)
sys.exit(commands.train_main(sys.argv[2:]))
"""


def drive(moment: str, arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, moment, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pt", weights_only=True)["model"]


def test_a_run_that_is_killed_anywhere_and_resumed_has_the_undisturbed_weights(tmp_path, own):
    """kill -9 within a step, between steps, within a checkpoint, and just before its rename."""
    own = [*own, "--steps", str(STEPS), "--checkpoint-every", "2", "--dtype", "float32"]
    undisturbed, expected = tmp_path / "undisturbed", None
    assert commands.train_main([*own, "--out", str(undisturbed)]) == 0
    expected = weights(undisturbed)
    for moment in ("step", "epoch", "checkpoint", "rename"):
        run = tmp_path / moment
        done = drive(moment, [*own, "--out", str(run)])
        assert done.returncode == -signal.SIGKILL, done.stderr
        if moment == "rename":
            assert len(list(run.glob(".last.pt.*.tmp"))) == 1  # whole, though it has no name yet
            assert train.newest_checkpoint(run)["state"]["step"] == 2
        assert commands.train_main(["--resume", "--out", str(run)]) == 0
        found = weights(run)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), moment
        assert not list(run.glob(".*.tmp"))  # what was left over is gone
        lines = train.read_log(run)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in lines] == [
            line["loss"] for line in train.read_log(undisturbed)
        ]


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path, own, capsys):
    """As a cluster repeats it: nothing to resume; then killed before a checkpoint is due."""
    own = [*own, "--steps", "6", "--resume"]
    assert commands.train_main([*own, "--out", str(tmp_path / "undisturbed")]) == 0
    run = tmp_path / "run"
    assert drive("step", own).returncode == -signal.SIGKILL
    assert train.newest_checkpoint(run)["state"]["step"] == 0
    assert commands.train_main(own) == 0
    expected = weights(tmp_path / "undisturbed")
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in expected.items())
    # A folder may be moved.
    run.rename(tmp_path / "moved")
    assert commands.train_main(["--resume", "--out", str(tmp_path / "moved")]) == 0
    assert not run.exists()


def test_the_best_checkpoint_is_the_best_also_after_a_resume(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    settings = dataclasses.replace(STREET, steps=3, validate_every=1)

    def validate(model):
        return {"paper_three_way": next(scores), "bucketed_dynamic_mean": 1.0}

    def best() -> int:
        return torch.load(tmp_path / "best.pt", weights_only=True)["state"]["step"]

    train.train(samples_that_move(), settings, tmp_path, validate)
    assert best() == 2
    train.train(
        samples_that_move(), dataclasses.replace(settings, steps=4, resume=True), tmp_path, validate
    )
    assert best() == 2  # 1.5 is not better than 1
    train.train(
        samples_that_move(), dataclasses.replace(settings, steps=5, resume=True), tmp_path, validate
    )
    assert best() == 5
    assert [line["lr"] for line in train.read_log(tmp_path) if "lr" in line][0] > 0


def test_a_torn_checkpoint_and_other_data_are_refused_with_a_way_out(
    tmp_path, own, street_folder, capsys
):
    """The best checkpoint is a whole one: copied over the torn one, it goes on from there."""
    own = [*own, "--steps", "6", "--checkpoint-every", "2"]
    own = [*own, "--val", str(street_folder), "--validate-every", "4", "--val-share", "0.5"]
    assert commands.train_main(own) == 0
    run = tmp_path / "run"
    expected = weights(run)
    whole = (run / "last.pt").read_bytes()
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    foreign = [(tmp_path / name).read_bytes() for name in ("foreign.pt", "tensor.pt")]
    for content in (whole[: len(whole) // 2], b"", *foreign):
        (run / "last.pt").write_bytes(content)
        capsys.readouterr()
        assert commands.train_main(["--resume", "--out", str(run)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run / 'last.pt'}: is torn, or not the checkpoint of a run" in line
        assert line.endswith(f"copy {run / 'best.pt'} over it")
    shutil.copy(run / "best.pt", run / "last.pt")
    assert train.newest_checkpoint(run)["state"]["step"] in (4, 6)
    assert commands.train_main(["--resume", "--out", str(run)]) == 0
    found = weights(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for arguments, message in (
        (["--batch-size", "8"], "--batch-size 8: the run was begun with 2; a resumed run keeps it"),
        (["--out", str(tmp_path / "no")], "no holds no last.pt; to begin a run, give its --data"),
    ):
        assert commands.train_main(["--resume", "--out", str(run), *arguments]) == 1
        assert message in capsys.readouterr().err
    labels.label_path(tmp_path / "labels", data.open_dataset(own[1]).pair_keys[0]).unlink()
    assert commands.train_main(["--resume", "--out", str(run)]) == 1
    assert "its run learns from other pairs than the data has now" in capsys.readouterr().err


def test_sigterm_writes_a_checkpoint_and_ends_well_and_the_run_goes_on(tmp_path, own):
    """In the middle of a step, too: what it did to the running statistics is undone."""
    own = [*own, "--steps", str(STEPS), "--checkpoint-every", "1000"]
    assert commands.train_main([*own, "--out", str(tmp_path / "undisturbed")]) == 0
    calls, loss = [], zeroflow.distillation_loss

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == 9:  # the first of two micro-batches of step 5
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    run = tmp_path / "run"
    zeroflow.distillation_loss = terminated
    try:
        assert commands.train_main(own) == 0
    finally:
        zeroflow.distillation_loss = loss
    assert torch.load(run / "last.pt", weights_only=True)["state"]["step"] == 4
    assert commands.train_main(["--resume", "--out", str(run)]) == 0
    expected = weights(tmp_path / "undisturbed")
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in expected.items())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # it is nobody else's business


def test_sigterm_to_a_whole_group_of_processes_ends_well_within_seconds(tmp_path, own):
    """As a cluster sends it: to the processes that read pairs ahead, too."""
    command = [sys.executable, train.__file__, *own, "--steps", "100000", "--workers", "2"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(train.read_log(tmp_path / "run")) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "stopped by a signal; continue with: python train.py --resume --out" in out
    step = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]["step"]
    assert step == len(train.read_log(tmp_path / "run")) >= 5


def test_a_gradient_that_is_not_finite_skips_its_step_and_stops_the_run_if_it_persists(tmp_path):
    samples = samples_that_move(2)
    bad = samples[0]._replace(label=torch.full_like(samples[0].label, torch.inf))
    settings = dataclasses.replace(STREET, steps=4)
    model = train.train([samples[0], bad], settings, tmp_path)
    lines = train.read_log(tmp_path)
    assert (
        lines[-1]["skipped"] == 2
        and sum(not math.isfinite(line["gradient"]) for line in lines) == 2
    )
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    skipped = train.train([bad], dataclasses.replace(settings, steps=1)).state_dict()
    for name, tensor in train.new_student(settings)[0].state_dict().items():
        assert torch.equal(skipped[name], tensor), name  # running statistics, too, are put back
    train.train(
        [samples[0], bad], dataclasses.replace(settings, steps=25)
    )  # now and then is no reason to stop
    with pytest.raises(data.DataError, match="step 10: loss or gradient was not finite ten times"):
        train.train([bad], dataclasses.replace(settings, steps=100), tmp_path / "bad")
    assert len(train.read_log(tmp_path / "bad")) == 10  # the last one is in the log, too


def test_a_loss_that_became_infinite_stops_the_run_although_its_gradient_is_zero(tmp_path):
    """A rate of 1 throws the weights so far off that the flow overflows, and nothing is left."""
    wild = dataclasses.replace(STREET, steps=100, lr=1.0, cosine=False, clip_norm=None)
    with pytest.raises(data.DataError, match="not finite ten times in a row; use --resume"):
        train.train(samples_that_move(2), wild, tmp_path)
    last = train.read_log(tmp_path)[-1]
    assert last["loss"] == math.inf and last["gradient"] == 0


def test_a_loop_over_all_samples_ends(street):
    samples = train.Samples([train.LabeledPairs(street, None)])
    assert len(list(samples)) == len(samples) == len(street)


# --- Workers that die or stand still --------------------------------------------------------------


class FaultyRead:
    """Four pairs are read in each worker (a copy of this process), then something else happens."""

    def __init__(self, fault):
        self.fault, self.reads, self.read = fault, 0, train.LabeledPairs._read

    def __call__(self, pairs, index):
        self.reads += 1
        return self.read(pairs, index) if self.reads <= 4 else self.fault()


def unreadable():
    raise data.DataError("sweep.feather: is torn")


def bug():
    raise ZeroDivisionError("a bug in a reader")


@pytest.fixture
def within(monkeypatch):
    """A hang becomes an error after a minute."""

    def stop(*_):
        raise TimeoutError("this hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def state_of(run: Path) -> dict:
    return torch.load(run / "last.pt", weights_only=True)["state"]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def bus_error():
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.parametrize(
    ("fault", "workers", "message"),
    [
        (killed, 2, "a worker died (exit code -9): killed, often for lack of memory; use --resume"),
        (bus_error, 1, "a worker died (exit code -7): there is too little shared memory (/dev/shm"),
        (unreadable, 2, "none of 4 pairs in a row can be read; the first: sweep.feather: is torn"),
    ],
)
def test_a_worker_that_dies_ends_the_run_in_one_line_with_the_last_whole_step_saved(
    tmp_path, own, within, fault, workers, message, monkeypatch, capfd
):
    own = [*own, "--steps", "8", "--workers", str(workers), "--checkpoint-every", "1000"]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        read = FaultyRead(fault)
        patch.setattr(train.LabeledPairs, "_read", lambda pairs, index: read(pairs, index))
        start = time.monotonic()
        assert commands.train_main(own) == 1
    assert time.monotonic() - start < 30
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert state_of(run)["step"] == len(train.read_log(run)) >= 1
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if fault is killed:  # it goes on from there, to the weights of an undisturbed run
        assert commands.train_main(["--resume", "--out", str(run), "--workers", "0"]) == 0
        other = tmp_path / "undisturbed"
        assert commands.train_main([*own, "--workers", "0", "--out", str(other)]) == 0
        expected, found = weights(other), weights(run)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_whose_workers_stand_still(tmp_path, own, within, number, monkeypatch):
    """As they do when a network disk does not answer."""
    read, run = FaultyRead(lambda: time.sleep(1000)), tmp_path / "run"
    monkeypatch.setattr(train.LabeledPairs, "_read", lambda pairs, index: read(pairs, index))
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    threading.Timer(8, send).start()
    assert commands.train_main([*own, "--steps", "100", "--workers", "2"]) == 0
    assert sent and time.monotonic() - sent[0] < 15
    assert state_of(run)["step"] == len(train.read_log(run)) >= 1
    assert not multiprocessing.active_children()


def test_a_wait_of_a_minute_is_said(capsys):
    class Slow:
        """Gives a batch after 130 s, though nobody has to wait for it here."""

        waits = 0

        def __next__(self):
            self.waits += 1
            if self.waits <= 130:
                raise RuntimeError("DataLoader timed out after 1 seconds")
            return "a batch"

    reader = runs.Reader(torch.utils.data.DataLoader([0]))
    reader.loaded = Slow()
    assert reader.next() == "a batch"
    said = [line.split(";")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"no pair has come for {seconds} s" for seconds in (60, 120)]


def test_too_little_shared_memory_is_said_with_what_to_do(own, within, monkeypatch, capsys):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert commands.train_main([*own, "--workers", "1"]) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error")]
    assert "too little shared memory (/dev/shm)" in line
    assert "docker run --shm-size 8g" in line and "--workers 0" in line


@pytest.mark.parametrize("where", ["step", "worker"])
def test_a_bug_ends_the_process_with_its_traceback_within_seconds(tmp_path, own, where):
    script = tmp_path / "bug.py"
    script.write_text(
        "import sys, time, commands, train, zeroflow\n"
        "def bug(*arguments):\n"
        "    print('the bug, at', time.time(), file=sys.stderr, flush=True)\n"
        "    raise ZeroDivisionError('a bug')\n"
        "if sys.argv[1] == 'step':\n"
        "    zeroflow.distillation_loss = bug\n"
        "else:\n"
        "    train.LabeledPairs._read = bug\n"
        "sys.exit(commands.train_main(sys.argv[2:]))\n"
    )
    command = [sys.executable, str(script), where, *own, "--workers", "1"]
    path = {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, timeout=120
    )
    ended = time.time()
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: a bug")
    last = re.findall(r"the bug, at ([0-9.]+)", done.stderr)[-1]
    assert ended - float(last) < 20


# --- What other versions, full disks and kills leave behind ---------------------------------------


def test_a_checkpoint_of_another_version_goes_on_and_what_differs_is_reported(
    tmp_path, own, capsys
):
    own = [*own, "--steps", "6"]
    assert commands.train_main([*own, "--out", str(tmp_path / "undisturbed")]) == 0
    run = tmp_path / "run"
    assert drive("step", [*own, "--checkpoint-every", "2"]).returncode == -signal.SIGKILL
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["train_settings"]["ema"] = 0.9
    del checkpoint["train_settings"]["rate_hz"], checkpoint["state"]["validated"]
    names = itertools.cycle(["module.", "_orig_mod.", "module._orig_mod.", ""])
    model = {next(names) + name: tensor for name, tensor in checkpoint["model"].items()}
    torch.save(checkpoint | {"model": model}, run / "last.pt")
    capsys.readouterr()
    assert commands.train_main(["--resume", "--out", str(run)]) == 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "last.pt" in each]
    assert "another version: validated is not stored, now 0; ema is unknown here and" in line
    assert line.endswith("ignored; rate_hz is not stored, now 10.0")
    expected, found = weights(tmp_path / "undisturbed"), weights(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    # What cannot be used is refused in one line.
    for part, name, value, message in (
        ("train_settings", "lr", "fast", "not the checkpoint of a run (lr is 'fast')"),
        ("train_settings", "data", (1,), "not the checkpoint of a run (data is (1,))"),
        ("train_settings", "model", "huge", "not the checkpoint of a run (model is 'huge')"),
        ("state", "step", None, "not the checkpoint of a run (step is None)"),
        ("model", "head.decoder.0.bias", torch.ones(7), "does not fit a narrow student (Error"),
        ("optimizer", "param_groups", [], "does not fit a narrow student (loaded state dict has"),
    ):
        broken = checkpoint | {"model": found}
        torch.save(broken | {part: broken[part] | {name: value}}, run / "last.pt")
        assert commands.train_main(["--resume", "--out", str(run)]) == 1
        (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
        assert message in line and line.endswith(f"copy {run / 'best.pt'} over it")


def test_a_log_that_is_torn_or_holds_something_else_does_not_stop_a_resume(tmp_path, capsys):
    settings = dataclasses.replace(STREET, steps=3, checkpoint_every=1)
    train.train(samples_that_move(), settings, tmp_path)
    good = (tmp_path / "log.jsonl").read_bytes().splitlines()
    for bad in (b"\xff\xfe", b"17", b"null", b"[1]", b'{"step": 1}', b'{"loss"', b"[" * 100_000):
        (tmp_path / "log.jsonl").write_bytes(b"\n".join([good[0], bad, *good[1:], b'{"st']))
        assert [line["step"] for line in train.read_log(tmp_path)] == [1, 2, 3]
        what = "1 of 5 lines cannot be read and are left out; the first is line 2"
        assert f"{tmp_path / 'log.jsonl'}: {what}" in capsys.readouterr().err
    more = dataclasses.replace(settings, steps=4, resume=True)
    train.train(samples_that_move(), more, tmp_path)
    capsys.readouterr()
    assert [line["step"] for line in train.read_log(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*good, b'{"st']))  # torn by a kill: normal
    assert len(train.read_log(tmp_path)) == 3 and not capsys.readouterr().err
    for value in ('"1"', "null", "[]", "1" + 400 * "0"):
        line = b'{"step": 1, "weight": "none", "loss": ' + value.encode() + b"}\n"
        (tmp_path / "log.jsonl").write_bytes(line + good[0] + b"\n")
        assert train.read_log(tmp_path) == [json.loads(good[0])], value


def test_a_validation_that_was_killed_is_made_up_for_after_a_resume(tmp_path):
    """Whether its line is in the log already or not; and one that was finished is not repeated."""
    settings, calls = dataclasses.replace(STREET, steps=6, validate_every=2), []

    def validate(model):
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError("killed")
        return {"paper_three_way": float(len(calls)), "bucketed_dynamic_mean": 1.0}

    with pytest.raises(InterruptedError):
        train.train(samples_that_move(), settings, tmp_path, validate)
    assert train.newest_checkpoint(tmp_path)["state"]["step"] == 4
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "paper_three_way": 9.0, "bucketed_dynamic_mean": 9.0}\n')
    again = dataclasses.replace(settings, resume=True)
    assert train.train(samples_that_move(), again, tmp_path, validate) is not None
    scores = [line for line in train.read_log(tmp_path) if "paper_three_way" in line]
    assert [line["step"] for line in scores] == [2, 4, 6]
    assert [line["paper_three_way"] for line in scores] == [1, 3, 4]
    assert train.train(samples_that_move(), again, tmp_path, validate) is not None
    assert len(calls) == 4 and len(train.read_log(tmp_path)) == 9


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path, own, monkeypatch, capsys):
    own, run = [*own, "--steps", "4", "--checkpoint-every", "2"], tmp_path / "run"
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*_):
        raise full

    class FullDisk(io.FileIO):
        """Has room for some of a checkpoint; then torch raises an error of its own at the end."""

        room = 100_000

        def write(self, content):
            return super().write(content) if self.tell() + len(content) < self.room else fails()

    def opened(file, *mode):
        is_checkpoint = ".last.pt." in str(file) and (run / "last.pt").exists()
        return FullDisk(file, *mode) if is_checkpoint else open(file, *mode)

    def after_the_first(function):
        return lambda *args: fails() if (run / "last.pt").exists() else function(*args)

    for target, name, value in (
        (data, "open", opened),
        (os, "fsync", after_the_first(os.fsync)),
        (os, "replace", after_the_first(os.replace)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value, raising=False)
            assert commands.train_main(own) == 1
        (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
        assert "cannot be written (No space left on device); what was there is unchanged" in line
        assert str(run / "last.pt") in line
        files = {file.name for file in run.iterdir()} - {".lock"}
        assert files == {"last.pt", "log.jsonl", "settings.json"}
        assert state_of(run)["step"] == 0
        shutil.rmtree(run)

    # The log may be what no longer fits.
    log = train.Log(tmp_path / "log", 0, 0, STREET)
    FullDisk.room = 0
    log.file = FullDisk(tmp_path / "log" / "log.jsonl", "a")
    with pytest.raises(
        OSError, match=r"cannot be written \(No space left on device\); make room"
    ) as e:
        log.write({"step": 1})
    assert e.value.filename == str(tmp_path / "log" / "log.jsonl")


# --- What a run should tell -----------------------------------------------------------------------


def test_validation_on_pairs_that_are_learned_from_is_said_and_the_same_data_twice_refused(
    tmp_path, own, street_folder, capsys
):
    own = [*own, "--steps", "1"]
    assert commands.train_main([*own, "--val", str(street_folder)]) == 0
    what = f"--val {street_folder}: 4 of its 4 pairs are also in the training data; its errors are"
    assert what in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    log = sorted(street_folder.iterdir())[0]
    shutil.copytree(log, tmp_path / "other" / "another_log")
    more = ["--val", str(tmp_path / "other"), "--out", str(tmp_path / "second")]
    assert commands.train_main([*own, *more]) == 0
    assert "also in the training data" not in capsys.readouterr().err
    (tmp_path / "link").symlink_to(street_folder)
    for other in (str(street_folder) + "/", str(tmp_path / "link")):
        twice = [*own, "--data", str(street_folder), other, "--labels", "a", "b"]
        assert commands.train_main([*twice, "--out", str(tmp_path / "third")]) == 1
        assert "is given twice, so its pairs would count twice" in capsys.readouterr().err


def test_the_time_between_sweeps_reaches_the_loss_and_options_of_clouds_their_reader(
    tmp_path, street, monkeypatch
):
    labels.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    stamps = street.pair_keys[0][1:]
    sample = train.LabeledPairs(street, tmp_path)[0]
    assert sample.seconds == (stamps[1] - stamps[0]) / 1e9 == 0.1
    seen, loss = [], zeroflow.distillation_loss

    def spy(*arguments):
        seen.append(arguments[5])
        return loss(*arguments)

    monkeypatch.setattr(zeroflow, "distillation_loss", spy)
    samples = [each._replace(seconds=0.05 * (i + 1)) for i, each in enumerate(samples_that_move(3))]
    settings = dataclasses.replace(STREET, steps=1, batch_size=3, micro_batch=3)
    train.train(samples, settings)
    assert seen == [tuple(0.05 * (i + 1) for i in train.batch_of(0, 3, settings))]

    opened = []

    def open_dataset(path, true_flow, **options):
        opened.append(options)
        return street

    monkeypatch.setattr(data, "open_dataset", open_dataset)
    train.open_and_report("clouds", dataclasses.replace(STREET, columns=5, min_range_m=0.0))
    assert (opened[0]["columns"], opened[0]["min_range_m"]) == (5, 0.0)


def test_the_small_student_takes_one_thread_and_larger_ones_all(monkeypatch):
    seen, loss, threads = [], zeroflow.distillation_loss, torch.get_num_threads()

    def spy(*arguments):
        seen.append(torch.get_num_threads())
        return loss(*arguments)

    monkeypatch.setattr(zeroflow, "distillation_loss", spy)
    try:
        torch.set_num_threads(2)
        train.train(samples_that_move(1), dataclasses.replace(STREET, steps=1))
        assert seen == [1] and torch.get_num_threads() == 2
        with train._threads(dataclasses.replace(STREET, model="normal")):
            assert torch.get_num_threads() == 2
        # They sleep while they wait, if train.py is what loads torch.
        command = "import train, os; print(os.environ['OMP_WAIT_POLICY'])"
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-c", command],
            env={**environment, "PYTHONPATH": str(Path(train.__file__).parent)},
            capture_output=True,
        )
        assert done.stdout == b"PASSIVE\n", done.stderr
        source = Path(train.__file__).read_text()
        assert source.index("OMP_WAIT_POLICY") < source.index("import torch")
    finally:
        torch.set_num_threads(threads)


# --- Several processes ----------------------------------------------------------------------------


def torchrun(
    arguments: list[str], script: str = train.__file__, processes: int = 2
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        script,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(train.__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes_are_as_one(tmp_path, own):
    """Losses, and gradients too, since Adam would hide a factor.

    At a learning rate of 1e-3, rounding would grow past these bounds within twenty steps.
    """
    own = [*own, "--steps", "20", "--batch-size", "4", "--lr", "1e-4"]
    assert commands.train_main([*own, "--out", str(tmp_path / "one")]) == 0
    done = torchrun([*own, "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    one, two = (train.read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 20
    for key, bound in (("loss", 1e-5), ("gradient", 1e-3)):
        assert [line[key] for line in two] == pytest.approx(
            [line[key] for line in one], rel=bound
        ), key
    assert done.stdout.count("batch_size: 4\n") == 1  # only the first process prints


def test_a_start_to_which_a_process_does_not_come_is_given_up(tmp_path):
    """Without torchrun around, as `srun` starts processes: nobody ends those that wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "start.py"
    script.write_text(
        "import datetime, sys, train\n"
        "train.START_TIMEOUT = datetime.timedelta(seconds=int(sys.argv[1]))\n"
        "with train.processes(train.TrainSettings(device='cpu')):\n"
        "    print('all are here', train.rank_of())\n"
    )
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    about["PYTHONPATH"] = str(Path(train.__file__).parent)

    def start(ranks, timeout_s):
        command, pipe = [sys.executable, str(script), str(timeout_s)], subprocess.PIPE
        environments = [os.environ | about | {"RANK": str(rank)} for rank in ranks]
        return [
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            for environment in environments
        ]

    for process in start([0, 2], timeout_s=3):
        _, errors = process.communicate(timeout=60)
        assert "not all 3 processes joined within 0.05 minutes (" in errors
    for rank, process in enumerate(start([0, 1, 2], timeout_s=60)):
        printed, errors = process.communicate(timeout=60)
        assert printed == f"all are here ({rank}, 3)\n", errors


def test_an_error_within_a_step_ends_the_run_and_its_workers_within_seconds(tmp_path, own):
    """Loader workers ignore signals: unless somebody closes them, Python waits for them forever."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import commands, sys, zeroflow\n"
        "if __name__ == '__main__':\n"
        "    def fails(*arguments):\n"
        "        raise RuntimeError('out of memory, say')\n"
        "    zeroflow.distillation_loss = fails\n"
        "    sys.exit(commands.train_main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(script), *own, "--steps", "1000", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "RuntimeError: out of memory, say" in done.stderr


def test_a_process_that_dies_ends_the_others(tmp_path, own):
    script = tmp_path / "dies.py"
    script.write_text(
        "import commands, os, sys, zeroflow\n"
        "loss, calls = zeroflow.distillation_loss, []\n"
        "def dies(*arguments):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        os._exit(7)\n"
        "    return loss(*arguments)\n"
        "zeroflow.distillation_loss = dies\n"
        "sys.exit(commands.train_main(sys.argv[1:]))\n"
    )
    start = time.monotonic()
    done = torchrun([*own, "--steps", "1000"], str(script))
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["step"] == 1


# --- Real points ----------------------------------------------------------------------------------


def test_the_loop_can_overfit_the_real_pair(av2_pair):
    """Its `fast` labels, where things move: the loss falls to a tenth."""
    grid = fastflow3d.MODELS["narrow"].half_extent_m
    (label,) = zeroflow.make_labels([av2_pair], nsfp.TEACHERS["fast"], grid)
    is_near, is_target = data.input_masks(av2_pair, grid)
    pc0, pc1 = av2_pair.pc0[is_near], av2_pair.pc1[is_target]
    flow, has_flow = label.flow[is_near], label.has_flow[is_near]
    sample = train.Sample(pc0, pc1, flow, has_flow, torch.ones(len(pc0)))
    settings = dataclasses.replace(STREET, steps=60, lr=5e-3, weighted_share=0.0)
    losses, loss = [], zeroflow.distillation_loss

    def seen(*arguments):
        losses.append(loss(*arguments))
        return losses[-1]

    zeroflow.distillation_loss = seen
    try:
        train.train([sample], settings)
    finally:
        zeroflow.distillation_loss = loss
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "best"], "--preset 'best': choose one of street, world, zeroflow-1x"),
        (
            ["--data", "somewhere"],
            "1 folders of --data and 0 of --labels: give for each the folder",
        ),
        (
            ["--data", "a", "--labels", "b", "--pairs-per-log", "1", "2"],
            "2 numbers of --pairs-per-log for 1 folders of --data",
        ),
        (["--val", "somewhere"], "--val: needs --data"),
        (["--preset", "zeroflow-1x"], "--preset zeroflow-1x: needs --data"),
        (["--supervised"], "--supervised: needs --data"),
        (
            ["--preset", "street", "--data", "x", "--labels", "y"],
            "--preset street: is for the street; leave --data out",
        ),
        (["--lr", "-1"], "--lr -1.0: must be positive"),
        (["--batch-size", "0"], "--batch-size 0: must be positive"),
        (["--steps", "0"], "--steps 0: must be positive"),
        (["--clip-norm", "0"], "--clip-norm 0.0: must be positive"),
        (["--fraction", "0"], "--fraction 0.0: must be positive"),
        (["--fraction", "1.5"], "a fraction is at most 1"),
        (["--workers", "-1"], "workers are 0 or more"),
        (["--out", __file__], "test_train.py: is a file; give the name of a folder"),
        (["--device", "tpu"], "--device 'tpu': choose cpu"),
        (["--data", "/no/such/folder", "--labels", "labels"], "/no/such/folder: no such folder"),
    ],
)
def test_settings_that_cannot_work_stop_at_once(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no run of the user's own
    assert commands.train_main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "choose from 'narrow', 'small', 'normal', 'xl'"),
        (["--speed-weight", "fast"], "choose from 'formula', 'published', 'none'"),
        (["--dtype", "float64"], "choose from 'float32', 'bfloat16'"),
        (["--no-such-setting", "1"], "--no-such-setting"),
    ],
)
def test_options_and_choices_that_do_not_exist_stop_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        commands.train_main(arguments)
    assert message in capsys.readouterr().err


def test_the_choices_of_settings_are_those_that_exist():
    """Their types name them, since types are what options are made from."""
    hints = typing.get_type_hints(train.TrainSettings)
    for name, choices in (
        ("model", fastflow3d.MODELS),
        ("ground", data.GROUNDS),
        ("dtype", train.DTYPES),
    ):
        assert set(typing.get_args(hints[name])) == set(choices)
    for weight in typing.get_args(hints["speed_weight"]):
        zeroflow.speed_weight(torch.ones(3), weight)
    for preset in train.PRESETS.values():
        train.TrainSettings(**preset)
    assert {field.name for field in dataclasses.fields(train.TrainSettings)} >= train.MAY_CHANGE
