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
    """Clouds that go half a metre ahead, and labels that say so."""
    generator = torch.Generator().manual_seed(0)
    motion = torch.tensor([0.5, 0.0, 0.0])
    clouds = [20 * (2 * torch.rand(400, 3, generator=generator) - 1) * torch.tensor([1, 1, 0.1]) for _ in range(n)]
    return [(pc, pc + motion, motion.expand(400, 3), torch.ones(400, dtype=torch.bool)) for pc in clouds]


def test_a_student_learns_what_its_labels_say_and_a_seed_repeats_it():
    settings = train.TrainSettings(steps=30, device="cpu", learning_rate=1e-2, clip_norm=5.0)
    samples = samples_that_move()
    before = fastflow3d.FastFlow3D(fastflow3d.MODELS["narrow"]).eval()
    model, again = train.train(samples, settings).eval(), train.train(samples, settings).eval()
    other = train.train(samples, dataclasses.replace(settings, seed=1)).eval()
    pc0, pc1, label, _ = samples[0]
    with torch.no_grad():
        error = {m: (m([pc0], [pc1])[0][0] - label).norm(dim=1).mean() for m in (before, model)}
        assert error[model] < 0.5 * error[before]
        assert torch.equal(model([pc0], [pc1])[0][0], again([pc0], [pc1])[0][0])
        assert not torch.equal(model([pc0], [pc1])[0][0], other([pc0], [pc1])[0][0])


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
    zeroflow.label_path(tmp_path, street.keys[2]).unlink()
    with pytest.raises(data.DataError, match=r"1 of 4 labels are missing, .*\.feather first; run"):
        train.LabelledPairs(street, tmp_path)


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
    student = zeroflow.from_student(fastflow3d.load_checkpoint(checkpoint))
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
        (["--data", "/no/such/folder", "--labels", "labels"], "/no/such/folder: no such folder"),
    ],
)
def test_settings_that_cannot_work_stop_at_once(arguments, message, capsys):
    assert train.main(arguments) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--no-such-setting", "1"])
