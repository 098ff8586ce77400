"""The trainer: it learns, repeats itself, and runs as the README says, on a street of a few logs."""

import dataclasses

import pytest
import torch

import data
import fastflow3d
import nsfp
import train
import zeroflow

QUICK_TEACHER = dataclasses.replace(nsfp.TEACHERS["fast"], hidden_channels=16, batch_points=128, iterations=20)


def samples_that_move(n: int = 2) -> list[tuple[torch.Tensor, ...]]:
    """Blocks of points: those on the left go ahead by half a metre, those on the right back, and labels say so."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(n):
        pc0 = (20 * (2 * torch.rand(400, 3, generator=generator) - 1) * torch.tensor([1, 1, 0.1])).round()
        label = torch.tensor([0.5, 0.0, 0.0]) * pc0[:, 1:2].sign()
        samples.append((pc0, pc0 + label, label, torch.ones(400, dtype=torch.bool)))
    return samples


def test_a_student_learns_what_its_labels_say_and_a_seed_repeats_it():
    settings = train.TrainSettings(steps=40, device="cpu", learning_rate=1e-2, clip_norm=5.0)
    samples = samples_that_move()
    model, again = train.train(samples, settings).eval(), train.train(samples, settings).eval()
    pc0, pc1, label, _ = samples[0]
    with torch.no_grad():
        flow = model([pc0], [pc1])[0][0]
        assert (flow - label).norm(dim=1).mean() < 0.5 * label.norm(dim=1).mean()  # half of no motion's
        assert torch.equal(flow, again([pc0], [pc1])[0][0])
    quick = dataclasses.replace(settings, steps=1)
    first, other = (train.train(samples, dataclasses.replace(quick, seed=seed)).state_dict() for seed in (0, 1))
    assert not torch.equal(first["head.decoder.0.weight"], other["head.decoder.0.weight"])


def test_bfloat16_learns_too_and_the_student_stays_float32():
    settings = train.TrainSettings(steps=40, device="cpu", learning_rate=1e-2, clip_norm=5.0, precision="bfloat16")
    samples = samples_that_move()
    model = train.train(samples, settings).eval()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    pc0, pc1, label, _ = samples[0]
    with torch.no_grad():
        flow = model([pc0], [pc1])[0][0]
    assert (flow - label).norm(dim=1).mean() < 0.5 * label.norm(dim=1).mean()
    other = train.train(samples, dataclasses.replace(settings, steps=2, precision="float32")).eval()
    same = train.train(samples, dataclasses.replace(settings, steps=2)).eval()
    assert not torch.equal(other.state_dict()["head.decoder.0.weight"], same.state_dict()["head.decoder.0.weight"])


def test_each_step_has_the_weight_the_mask_and_the_rate_that_the_settings_say(monkeypatch):
    """Speed weight for the first part of the steps; only rows with a label and in the grid."""
    seen = []

    def loss(flows, labels, masks, weight):
        seen.append((weight, [int(mask.sum()) for mask in masks]))
        return distillation_loss(flows, labels, masks, weight)

    distillation_loss = zeroflow.distillation_loss
    monkeypatch.setattr(zeroflow, "distillation_loss", loss)
    ((pc0, pc1, label, has_flow),) = samples_that_move(1)
    pc0[:30] += 1000  # out of the grid
    has_flow[380:] = False
    settings = train.TrainSettings(steps=4, device="cpu", speed_weight="published", weighted_share=0.75)
    train.train([(pc0, pc1, label, has_flow)], settings)
    assert seen == [("published", [350])] * 3 + [("none", [350])]
    rates = [train.learning_rate(step, dataclasses.replace(settings, steps=100)) for step in (0, 4, 50, 99)]
    assert rates == pytest.approx([2e-3 * share for share in (0.2, 0.99606, 0.5, 0.0002467)], rel=1e-3)


def test_without_clipping_gradients_are_as_they_are():
    still, moved = (
        train.train(
            samples_that_move(1), train.TrainSettings(steps=1, device="cpu", clip_norm=clip, learning_rate=rate)
        )
        for clip, rate in ((0.0, 1e-30), (0.0, 1e-2))
    )
    assert not torch.equal(still.state_dict()["head.decoder.0.weight"], moved.state_dict()["head.decoder.0.weight"])


def test_batches_come_in_the_number_asked_for_and_show_every_sample_once_an_epoch():
    samples = [(torch.full((1, 3), float(i)),) * 4 for i in range(5)]
    settings = train.TrainSettings(steps=6, pairs_per_step=2, device="cpu")
    shown = [[int(pc0[0, 0]) for pc0 in batch[0]] for batch in train.batches(samples, settings)]
    assert len(shown) == 6
    for epoch in (shown[:3], shown[3:]):
        assert sorted(i for batch in epoch for i in batch) == [0, 1, 2, 3, 4]
    assert shown[:3] != shown[3:]


def test_samples_are_the_rows_that_are_not_ground_with_their_own_labels(tmp_path, street):
    zeroflow.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    pc0, pc1, label, has_flow = train.LabelledPairs(street, tmp_path)[1]
    pair = street[1]
    assert torch.equal(pc0, pair.pc0[~pair.is_ground0]) and torch.equal(pc1, pair.pc1[~pair.is_ground1])
    stored = zeroflow.read_label(tmp_path, pair.key)
    assert torch.equal(label, stored.flow[~pair.is_ground0]) and torch.equal(
        has_flow, stored.has_flow[~pair.is_ground0]
    )


def test_a_pair_without_a_label_is_left_out_and_no_label_at_all_is_an_error(tmp_path, street, capsys):
    with pytest.raises(data.DataError, match="no label for any of 4 pairs; run"):
        train.LabelledPairs(street, tmp_path)
    zeroflow.label_dataset(street, tmp_path, QUICK_TEACHER, workers=1)
    capsys.readouterr()
    zeroflow.label_path(tmp_path, street.keys[1]).unlink()
    pairs = train.LabelledPairs(street, tmp_path)
    expected = f"{tmp_path}: 1 of 4 pairs have no label and are left out, {tuple(street.keys[1])} first"
    assert expected in capsys.readouterr().err
    assert len(pairs) == 3
    assert torch.equal(pairs[1][0], street[2].pc0[~street[2].is_ground0])  # row 1 is now pair 2, with pair 2's label
    assert torch.equal(pairs[1][2], zeroflow.read_label(tmp_path, street.keys[2]).flow[~street[2].is_ground0])


def test_the_whole_method_on_a_tiny_street(tmp_path, monkeypatch, capsys):
    """Street, labels, student, table, checkpoint, picture; a second run finds street and labels in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "STREET_TEACHER", QUICK_TEACHER)
    checkpoint, picture = tmp_path / "student.pt", tmp_path / "picture.png"
    arguments = ["--train-logs", "1", "--test-logs", "1", "--steps", "2", "--device", "cpu"]
    assert train.main([*arguments, "--out", str(checkpoint), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert {"no", "nearest", "teacher", "student"} <= set(lines)
    assert "times faster than its teacher" in out and "train_logs=1" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.feather")}

    settings = dataclasses.replace(train.TrainSettings(), train_logs=1, test_logs=1, steps=2, device="cpu")
    rows = train.run(dataclasses.replace(settings, out=str(tmp_path / "again.pt")))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.feather")} == made
    for name, row in rows.items():  # the table prints what evaluate measured
        assert f"{row['grid_three_way']:.4f}" in lines[name.split()[0]]

    # `evaluate --checkpoint` reads the file and finds the same error on the same logs.
    (test_split,) = (tmp_path / "cache").glob("zeroflow/*/test")
    student = zeroflow.from_student(fastflow3d.load_checkpoint(checkpoint).prepare_inference())
    result = zeroflow.evaluate(data.open_dataset(test_split), student)
    assert result["grid_three_way"] == pytest.approx(rows["student"]["grid_three_way"], abs=1e-6)


def test_training_on_logs_and_labels_of_ones_own(tmp_path, street_folder, street, capsys):
    zeroflow.label_dataset(street, tmp_path / "labels", QUICK_TEACHER, workers=1)
    arguments = ["--data", street_folder, "--labels", tmp_path / "labels", "--val", street_folder, "--steps", 2]
    assert train.main([*map(str, arguments), "--out", str(tmp_path / "student.pt"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "student " in out and "teacher " not in out  # nobody labelled the validation logs
    checkpoint = torch.load(tmp_path / "student.pt", weights_only=True)
    assert checkpoint["train_settings"]["data"] == str(street_folder) and checkpoint["train_settings"]["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "--model 'huge': choose one of normal, xl, narrow"),
        (["--data", "somewhere"], "--data and --labels go together"),
        (["--val", "somewhere"], "--val needs --data and --labels"),
        (["--steps", "0"], "--steps 0 --pairs-per-step 1: both must be positive"),
        (["--speed-weight", "fast"], "--speed-weight 'fast': choose formula, published or none"),
        (["--out", "/"], "--out /: is a folder"),
        (["--device", "tpu"], "--device 'tpu': choose cpu"),
        (["--data", "/no/such/folder", "--labels", "labels"], "/no/such/folder: no such folder"),
    ],
)
def test_settings_that_cannot_work_stop_at_once(arguments, message, capsys):
    assert train.main(arguments) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--no-such-setting", "1"])
