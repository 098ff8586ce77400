"""The loss, the evaluation by hand and on a real pair, and the commands as a user types them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import a_pair
from plain_student import seeded_model
from pyarrow import feather

import data
import fastflow3d
import nsfp
import train
import zeroflow

ROOT = Path(zeroflow.__file__).parent


# --- The loss --------------------------------------------------------------------------------------------------------


def test_speed_weights_by_formula_and_as_published():
    speed = torch.tensor([0.2, 0.7, 2.0])
    torch.testing.assert_close(zeroflow.speed_weight(speed), torch.tensor([0.1, 0.46, 1.0]))
    torch.testing.assert_close(zeroflow.speed_weight(speed, "published"), torch.tensor([0.1, 0.1, 0.1]))
    torch.testing.assert_close(zeroflow.speed_weight(speed, "none"), torch.ones(3))
    for s, w in zip(speed.tolist(), zeroflow.speed_weight(speed).tolist(), strict=True):
        assert w == pytest.approx(max(0.1, min(1.0, 1.8 * s - 0.8)))
    with pytest.raises(ValueError, match="speed weight 'fast': choose"):
        zeroflow.speed_weight(speed, "fast")


def test_the_loss_by_hand():
    """Two samples: errors 0.3 and 0.4 at label speeds 2 m/s (weight 1) and 0 (0.1); one masked row; an empty sample."""
    label = torch.tensor([[0.2, 0, 0], [0, 0, 0], [9, 9, 9.0]])
    estimate = torch.tensor([[0.2, 0.3, 0], [0, 0, 0.4], [0, 0, 0.0]], requires_grad=True)
    mask = torch.tensor([True, True, False])
    empty = (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.bool))
    loss = zeroflow.distillation_loss(*([a, b] for a, b in zip((estimate, label, mask), empty, strict=True)))
    assert loss.item() == pytest.approx((1 * 0.3 + 0.1 * 0.4) / 2)
    unweighted = zeroflow.distillation_loss([estimate] * 2, [label] * 2, [mask] * 2, weight="none")
    assert unweighted.item() == pytest.approx(2 * (0.3 + 0.4) / 2)  # summed over the batch, as published
    loss.backward()
    torch.testing.assert_close(estimate.grad, torch.tensor([[0, 0.5, 0], [0, 0, 0.05], [0, 0, 0.0]]))


def test_no_rows_give_a_loss_of_zero_that_can_be_stepped_on():
    estimate = torch.zeros(2, 3, requires_grad=True)
    loss = zeroflow.distillation_loss([estimate], [torch.zeros(2, 3)], [torch.zeros(2, dtype=torch.bool)])
    loss.backward()
    assert loss.item() == 0 and not estimate.grad.any()
    at_label = torch.zeros(2, 3, requires_grad=True)  # the norm has no gradient at 0: it must not be NaN
    zeroflow.distillation_loss([at_label], [torch.zeros(2, 3)], [torch.ones(2, dtype=torch.bool)]).backward()
    assert at_label.grad.isfinite().all()


# --- The evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_pools_points_and_gives_the_mean_over_pairs_beside_it():
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    one = a_pair([[0, 0, 0]], flow=[[1, 0, 0]], category=[car], is_dynamic=[True])
    three = a_pair([[0, 0, 0]] * 3, flow=[[2, 0, 0]] * 3, category=[car] * 3, is_dynamic=[True] * 3)
    result = zeroflow.evaluate([one, three], zeroflow.timed(zeroflow.no_motion))
    assert result["grid_three_way_fd"] == pytest.approx(7 / 4)
    assert result["grid_three_way_pair_mean"] == pytest.approx(1.5)
    assert (result["pairs"], result["points"]) == (2, 4)
    perfect = zeroflow.evaluate([one, three], lambda pair: zeroflow.Estimate(pair.flow, 0.1))
    assert perfect["grid_epe"] == perfect["paper_three_way"] == 0 and perfect["seconds_per_pair"] == 0.1


def test_baselines_on_the_real_pair_are_the_known_numbers(av2_pair):
    known = {"no-motion": (0.0193, 0.2234, 0.6645, 0.0057, 0.0), "nearest": (0.0624, 0.2349, 0.6089, 0.0496, 0.0462)}
    keys = ("grid_epe", "grid_three_way", "grid_three_way_fd", "grid_three_way_fs", "grid_three_way_bs")
    for name, numbers in known.items():
        result = zeroflow.evaluate([av2_pair], zeroflow.timed(zeroflow.BASELINES[name]))
        assert [result[key] for key in keys] == pytest.approx(numbers, abs=3e-4), name


def test_the_fast_teacher_beats_no_motion_on_the_real_pair_where_it_moves_and_on_the_whole(av2_pair):
    with zeroflow.one_thread():
        result = zeroflow.evaluate([av2_pair], zeroflow.from_teacher(nsfp.TEACHERS["fast"]))
    assert result["grid_three_way"] < 0.10  # no motion: .2234
    assert result["grid_epe"] < 0.012  # .0193


# --- Use -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_file(tmp_path_factory, street):
    """A checkpoint of random weights whose flow of the small street's first pair is decimetres."""
    pair = street[0]
    model = seeded_model(fastflow3d.MODELS["narrow"], pair.pc0[~pair.is_ground0], pair.pc1[~pair.is_ground1])
    file = tmp_path_factory.mktemp("student") / "student.pt"
    torch.save(fastflow3d.checkpoint_of(model), file)
    return file


@torch.no_grad()
def test_predict_gives_every_row_its_flow(student_file, street):
    """Row by row what the model says of the points that are not ground; 0 for ground, NaN and points outside."""
    model, pair = fastflow3d.load_checkpoint(student_file), street[0]
    pc0 = pair.pc0.clone()
    pc0[5], pc0[7] = torch.nan, 1000.0
    keep = ~pair.is_ground0
    (expected,), (inside,) = model([pc0[keep]], [pair.pc1[~pair.is_ground1]])
    ground = {"is_ground0": pair.is_ground0, "is_ground1": pair.is_ground1}
    flow = zeroflow.predict(model, pc0, pair.pc1, **ground)
    assert torch.equal(flow[keep], expected) and flow[~keep].eq(0).all() and flow[[5, 7]].eq(0).all()
    assert expected[inside].norm(dim=1).median() > 0.1 and (~keep).any()
    arrays = [x.numpy() for x in (pc0, pair.pc1, pair.is_ground0, pair.is_ground1)]
    same = zeroflow.predict(model, arrays[0], arrays[1], None, *arrays[2:])
    assert isinstance(same, np.ndarray) and (same == flow.numpy()).all()
    assert not np.allclose(zeroflow.predict(model, arrays[0], arrays[1])[keep.numpy()], same[keep.numpy()], atol=1e-3)
    fast = zeroflow.predict(model.prepare_inference(), pc0, pair.pc1, **ground)
    torch.testing.assert_close(fast, flow, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="in training mode; call model.eval"):
        zeroflow.predict(model.train(), pc0, pair.pc1)


@torch.no_grad()
def test_predict_takes_clouds_in_their_own_frames_and_gives_total_flow(student_file, street):
    model, pair = fastflow3d.load_checkpoint(student_file), street[0]
    pose = pair.ego1_SE3_ego0
    pc1_in_ego1 = data.transform(pose.numpy(), pair.pc1.double().numpy())
    together = zeroflow.predict(model, pair.pc0, pair.pc1)
    apart = zeroflow.predict(model, pair.pc0, pc1_in_ego1, pose)
    torch.testing.assert_close(apart, together, atol=1e-3, rtol=0)  # but for points on borders of cells, rounded
    total = zeroflow.predict(model, pair.pc0, pc1_in_ego1, pose.numpy(), total=True)
    moved = data.transform(pose.numpy(), (pair.pc0 + apart).double().numpy())
    np.testing.assert_allclose(total, moved - pair.pc0.double().numpy(), atol=1e-5)
    assert (total - apart).norm(dim=1).max() > 0.1  # the ego moves


def test_predict_as_a_user_types_it(tmp_path, student_file, street_folder, street, capsys):
    """Both formats, a picture, total flow; and lines that say what was assumed."""
    pair = street[0]
    sweeps = [street_folder / pair.log_id / "sensors" / "lidar" / f"{stamp}.feather" for stamp in pair.key[1:]]
    np.savetxt(tmp_path / "pose.txt", pair.ego1_SE3_ego0)
    picture, npz, table = (tmp_path / name for name in ("flow.png", "flow.npz", "flow.feather"))
    whole = ["predict", "--checkpoint", str(student_file), *map(str, sweeps), "--device", "cpu"]
    common = [*whole, "--ground", "none"]
    pose = ["--pose", str(tmp_path / "pose.txt")]
    assert zeroflow.main([*common, *pose, "--out", str(npz), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "no --pose" not in out and "ground" not in out
    assert f"residual flow of {len(pair.pc0)} points" in out
    with np.load(npz) as arrays:
        flow, has_flow = arrays["flow"], arrays["has_flow"]
    model = fastflow3d.load_checkpoint(student_file)
    cell, _ = fastflow3d.assign_cells(pair.pc0, model.settings)
    assert (has_flow == (cell >= 0).numpy()).all() and f"{has_flow.sum()} of them estimated" in out
    expected = zeroflow.predict(model, pair.pc0.numpy(), data.read_cloud(sweeps[1]), pair.ego1_SE3_ego0)
    np.testing.assert_allclose(flow, expected, atol=2e-5)
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert zeroflow.main([*common, *pose, "--out", str(table), "--total", "--dtype", "bfloat16"]) == 0
    total = data.total_flow(torch.from_numpy(flow), pair).numpy()
    columns = feather.read_table(table)
    assert columns.column_names == ["flow_tx_m", "flow_ty_m", "flow_tz_m", "has_flow"]
    error = np.linalg.norm(data.stack(columns, columns.column_names[:3]) - total, axis=1)
    assert (columns["has_flow"].to_numpy() == has_flow).all()
    assert 0 < np.median(error) < 1e-2 and np.linalg.norm(total - flow, axis=1).max() > 0.1
    capsys.readouterr()

    assert zeroflow.main([*whole, *pose, "--out", str(npz)]) == 0  # now without the ground, found without a map
    is_ground = [data.is_ground_without_map(data.read_cloud(sweep)) for sweep in sweeps]
    assert f"ground: {is_ground[0].mean():.0%} and {is_ground[1].mean():.0%} of the points" in capsys.readouterr().out
    expected = zeroflow.predict(
        model, pair.pc0.numpy(), data.read_cloud(sweeps[1]), pair.ego1_SE3_ego0, is_ground[0], is_ground[1]
    )
    with np.load(npz) as arrays:
        np.testing.assert_allclose(arrays["flow"], expected, atol=2e-5)
        assert (arrays["flow"][is_ground[0]] == 0).all() and not arrays["has_flow"][is_ground[0]].any()
    assert 0.05 < is_ground[0].mean() < 0.95

    assert zeroflow.main([*common, "--out", str(npz)]) == 0
    assert "no --pose: both clouds are taken as in one frame" in capsys.readouterr().out
    np.save(tmp_path / "city.npy", pair.pc0.numpy() + 5000)
    far = str(tmp_path / "city.npy")
    assert zeroflow.main(["predict", "--checkpoint", str(student_file), far, far, "--out", str(npz)]) == 0
    assert "no point lies in the student's grid of 51.2 x 51.2 x 6 m" in capsys.readouterr().out
    for dtype, bound in (("float32", 1e-6), ("bfloat16", 1e-2)):
        numbers = tmp_path / "numbers.json"
        command = ["evaluate", "--data", str(street_folder), "--checkpoint", str(student_file), "--dtype", dtype]
        assert zeroflow.main([*command, "--json", str(numbers)]) == 0
        error = abs(
            json.loads(numbers.read_text())["grid_epe"]
            - zeroflow.evaluate(street, zeroflow.from_student(model))["grid_epe"]
        )
        assert error < bound and (dtype == "float32" or error > 1e-7)
    capsys.readouterr()
    for arguments, message in (
        ([*common, "--out", "flow.csv"], "flow.csv: choose a name that ends in .feather or .npz"),
        ([*common, "--out", str(npz), "--picture", "flow.docx"], "flow.docx: choose a name that ends in .png"),
        ([*common, "--out", str(npz), "--pose", "no.txt"], "no.txt: not a 4 x 4 pose"),
        ([*common, "--out", str(npz), "--picture", "no/flow.png"], "no/flow.png: there is no such folder"),
        (["evaluate", "--data", "x", "--baseline", "nearest", "--dtype", "bfloat16"], "--dtype: is the student's"),
        ([*common[:3], "a.bin", "b.bin", "--out", str(npz)], "a.bin: no such file"),
        (["predict", "--checkpoint", "no.pt", *common[3:5], "--out", str(npz)], "no.pt: no such file"),
    ):
        assert zeroflow.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_the_lines_of_the_readme_run_as_they_stand(tmp_path, student_file):
    (lines,) = [text for text in (ROOT / "README.md").read_text().split("```python\n") if "zeroflow.predict(" in text]
    (tmp_path / "run").mkdir()
    shutil.copy(student_file, tmp_path / "run" / "last.pt")
    done = subprocess.run(
        [sys.executable, "-c", lines.split("```")[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- The commands ----------------------------------------------------------------------------------------------------


def zeroflow_command(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "zeroflow.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_from_synthesize_to_evaluate_as_a_user_types_it(tmp_path):
    street, labels, numbers = tmp_path / "street", tmp_path / "labels", tmp_path / "numbers.json"
    done = zeroflow_command("synthesize", "--out", street, "--logs", 1, "--preset", "teaching", "--sweeps", 3)
    assert done.stdout.endswith(f"1 logs, 2 pairs, in {street}\n")
    quick = ("--iterations", 3, "--hidden-channels", 8, "--workers", 2)
    done = zeroflow_command("label", "--data", street, "--labels", labels, *quick)
    assert "2 labels made" in done.stdout and "0 found, 0 set aside" in done.stdout
    assert "iterations=3" in done.stdout  # the resolved settings are printed
    assert "0 labels made" in zeroflow_command("label", "--data", street, "--labels", labels, *quick).stdout
    done = zeroflow_command("evaluate", "--data", street, "--labels", labels, "--json", numbers)
    result = json.loads(numbers.read_text())
    assert result["pairs"] == 2 and result["grid_epe"] > 0 and f"{result['grid_epe']:.4f}" in done.stdout
    wanted = (
        "grid_epe grid_three_way grid_three_way_fd grid_three_way_fs grid_three_way_bs paper_three_way seconds_per_pair"
    )
    assert set(wanted.split()) <= set(result)


def test_mistakes_get_one_clear_line_and_a_status(tmp_path, street_folder, capsys):
    for arguments, message in (
        (("evaluate", "--data", tmp_path / "no", "--baseline", "nearest"), "no: no such folder"),
        (
            ("evaluate", "--data", street_folder, "--labels", tmp_path),
            "no label for any of 4 pairs; run `python zeroflow.py",
        ),
        (("evaluate", "--data", street_folder, "--checkpoint", tmp_path / "no.pt"), "no.pt: no such file"),
        (("synthesize", "--out", street_folder, "--logs", 1), "is not empty; choose a new folder"),
        (("label", "--data", street_folder, "--labels", tmp_path, "--device", "tpu"), "--device 'tpu': choose cpu"),
        (("evaluate", "--data", street_folder, "--baseline", "nearest", "--seed", 1), "without --teacher"),
        (("status", "--data", street_folder, "--labels", tmp_path), "is no folder of labels; make it with"),
        (("status", "--data", street_folder, "--labels", tmp_path, "--shards", 0), "--shards 0: must be positive"),
        (("label", "--data", street_folder, "--labels", tmp_path, "--refine", "more"), "refine 'more': choose flow,"),
    ):
        assert zeroflow.main([*map(str, arguments)]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert message in line
    with pytest.raises(SystemExit):
        zeroflow.main(["label", "--data", "x", "--labels", "y", "--no-such-setting", "1"])


# --- Published labels, broken data, and what a folder holds ----------------------------------------------------------


def write_published(folder: Path, pair: data.SweepPair, index: int, flow: np.ndarray) -> Path:
    """A pair's label in the layout of the paper's own: flow of the points off the ground and in the grid, numbered
    among those off the ground."""
    not_ground = np.flatnonzero(~pair.is_ground0.numpy())
    is_inside = (np.abs(pair.pc0.numpy()[not_ground]) < (51.2, 51.2, 3)).all(axis=1)
    file = folder / pair.log_id / f"{index:010d}_000.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = np.flatnonzero(is_inside)
    np.savez(file, flow=flow[not_ground[rows]][None], valid_idxes=rows, delta_time=12.5)
    return file


def test_published_labels_come_back_to_their_rows(tmp_path, street, capsys):
    """Labels of sweeps 0 and 1 of the first log; the second log has none."""
    flows = [np.random.default_rng(i).normal(size=(len(street[i].pc0), 3)).astype(np.float32) for i in (0, 1)]
    for i in (0, 1):
        write_published(tmp_path, street[i], i, flows[i])
    labels = zeroflow.open_labels(tmp_path, street)
    assert labels.keys == street.keys[:2]
    for i in (0, 1):
        label = labels.read(street[i])
        is_input = zeroflow.input_masks(street[i])[0]
        assert torch.equal(label.has_flow, is_input) and label.seconds == 12.5
        assert (label.flow.numpy()[is_input] == flows[i][is_input]).all() and label.flow[~is_input].eq(0).all()
    samples = train.LabelledPairs(street, tmp_path)
    assert len(samples) == 2 and f"{tmp_path}: 2 of 4 pairs have no label" in capsys.readouterr().err
    keep = ~street[1].is_ground0
    assert torch.equal(samples[1][2], labels.read(street[1]).flow[keep])
    # The layout of later code bases: a row a point.
    later = tmp_path / "later" / street.keys[2].log_id / "0000000000.feather"
    later.parent.mkdir(parents=True)
    pair = street[2]
    flow = np.random.default_rng(9).normal(size=pair.pc0.shape).astype(np.float32)
    is_valid = np.arange(len(flow)) % 2 == 0
    columns = {name: flow[:, i] for i, name in enumerate(data.FLOW_COLUMNS)}
    feather.write_feather(pyarrow.table({**columns, "is_valid": is_valid}), later)
    labels = zeroflow.open_labels(tmp_path / "later", street)
    label, expected = labels.read(pair), zeroflow.input_masks(pair)[0].numpy() & is_valid
    assert labels.keys == [pair.key] and (label.has_flow.numpy() == expected).all()
    assert (label.flow.numpy() == np.where(expected[:, None], flow, 0)).all()


def test_published_labels_of_other_points_are_refused_by_name(tmp_path, street):
    """Another sweep's, another rule of ground, rows that do not match, and a file that would run code."""
    pair = street[0]
    flow = np.zeros((len(pair.pc0), 3), dtype=np.float32)
    file = write_published(tmp_path, pair, 0, flow)
    good, labels = dict(np.load(file)), zeroflow.open_labels(tmp_path, street)
    labels.read(pair)
    count = len(good["valid_idxes"])
    for share, is_refused in ((0.02, True), (0.005, False)):  # up to 1 % may differ
        cut = {"valid_idxes": good["valid_idxes"][int(share * count) :], "flow": good["flow"][:, int(share * count) :]}
        np.savez(file, **(good | cut))
        if is_refused:
            with pytest.raises(data.DataError, match="_000.npz: labels other points than those .* ground found by"):
                labels.read(pair)
        else:
            assert labels.read(pair).has_flow.sum() == count - int(share * count) < count
    beyond = {"valid_idxes": np.append(good["valid_idxes"][:-1], 10**6)}  # one row that the sweep does not have
    np.savez(file, **(good | beyond))
    assert labels.read(pair).has_flow.sum() == count - 1
    with pytest.raises(data.DataError, match="the published labels have none for this pair"):
        labels.read(street[3])
    for changes, message in (
        ({"valid_idxes": good["valid_idxes"][:-5]}, "is no published label .* rows of flow for"),
        ({"valid_idxes": np.append(good["valid_idxes"][:-1], 0)}, "is no published label .* different valid_idxes"),
        ({"valid_idxes": np.append(good["valid_idxes"][:-1], -1)}, "is no published label"),
        ({"flow": np.where(good["flow"] == 0, np.nan, 0)}, "has flow that is no number, or as long as the grid"),
        ({"flow": good["flow"] + 500}, "has flow that is no number, or as long as the grid"),
        ({"valid_idxes": good["valid_idxes"] + 40}, "labels other points"),
        ({"flow": np.array([{"run": "me"}])}, "is no published label"),  # a pickle
    ):
        np.savez(file, **(good | changes))
        with pytest.raises(data.DataError, match=f"0000000000_000.npz: {message}"):
            labels.read(pair)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(data.DataError, match="is no published label"):
        labels.read(pair)
    with pytest.raises(data.DataError, match="is missing, so whose labels are these"):
        zeroflow.claim_folder(tmp_path, nsfp.TEACHERS["fast"])  # ours do not go among them
    later = tmp_path / "later" / pair.log_id / "0000000000.feather"
    later.parent.mkdir(parents=True)
    columns = {name: np.zeros(3, dtype=np.float32) for name in data.FLOW_COLUMNS}
    feather.write_feather(pyarrow.table({**columns, "is_valid": np.ones(3, dtype=bool)}), later)
    with pytest.raises(data.DataError, match=r"0000000000.feather: has 3 rows, its sweep has \d+ points"):
        zeroflow.open_labels(tmp_path / "later", street).read(pair)


@pytest.fixture
def broken_folder(tmp_path, street_folder) -> Path:
    """Two logs of three sweeps, of which one sweep is torn: two of four pairs cannot be read."""
    shutil.copytree(street_folder, tmp_path / "split")
    file = sorted((tmp_path / "split").glob("*/sensors/lidar/*.feather"))[1]
    file.write_bytes(file.read_bytes()[:100])
    return tmp_path / "split"


def test_evaluation_names_broken_pairs_and_goes_on_up_to_a_share(tmp_path, broken_folder, street, capsys):
    numbers = tmp_path / "numbers.json"
    command = ["evaluate", "--data", str(broken_folder), "--baseline", "nearest", "--json", str(numbers)]
    assert zeroflow.main(command) == 1  # not all went well
    printed = capsys.readouterr()
    assert printed.err.count("left out: ") == 2 and "not a whole Feather file" in printed.err
    assert "2 pairs were left out; stderr says why" in printed.out
    found = json.loads(numbers.read_text())
    whole = zeroflow.evaluate([street[2], street[3]], zeroflow.timed(zeroflow.nearest_neighbour))
    assert (found["pairs"], found["broken"]) == (2, 2) and found["grid_epe"] == whole["grid_epe"]
    numbers.unlink()
    assert zeroflow.main([*command, "--max-broken", "0.01"]) == 1  # of 100 at least: one may be broken
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
    three_ways = {}
    first_fails = iter([nothing] + [lambda pair: zeroflow.Estimate(0 * pair.flow, 0.0)] * 3)
    zeroflow.evaluate(street, lambda pair: next(first_fails)(pair), pair_three_ways=three_ways, max_broken=1)
    assert sorted(three_ways) == [1, 2, 3]  # by index of the data set


def test_labels_that_cover_some_pairs_are_evaluated_on_those_and_it_is_said(tmp_path, street_folder, street, capsys):
    label = zeroflow.make_labels([street[1]], dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2))[0]
    zeroflow.write_label(tmp_path, label)
    assert zeroflow.main(["evaluate", "--data", str(street_folder), "--labels", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}: has 1 of 4 pairs; without is, for one, {tuple(street.keys[0])}" in printed
    expected = zeroflow.evaluate([street[1]], lambda pair: zeroflow.Estimate(label.flow, 0.0))
    assert f"{expected['grid_three_way']:.4f}" in printed


def test_check_counts_names_what_is_broken_and_says_whether_it_can_be_used(
    tmp_path, street_folder, broken_folder, capsys, monkeypatch
):
    monkeypatch.setattr(zeroflow, "cost", lambda *_: {"seconds_to_label": 2.0, "seconds_to_train": 3.0})
    numbers, labels = tmp_path / "numbers.json", tmp_path / "labels"
    street, quick = data.open_dataset(street_folder), dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2)
    zeroflow.label_dataset(street, labels, quick, workers=1)

    def check(folder, *options) -> tuple[int, str, dict]:
        status = zeroflow.main(["check", "--data", str(folder), "--json", str(numbers), "--device", "cpu", *options])
        return status, capsys.readouterr().out, json.loads(numbers.read_text())

    status, printed, found = check(street_folder, "--labels", str(labels), "--model", "narrow")
    assert status == 0 and "Argoverse2, 2 logs, 4 pairs" in printed and printed.endswith("can be used\n")
    assert (found["pairs_read"], found["broken"], found["pairs_with_true_flow"]) == (4, [], 4) and found["is_usable"]
    assert (found["labels_found"], found["labels_lacking"], found["kind"]) == (4, {}, "Argoverse2")
    assert "labels by fast: 2.00 s a pair here, 0.00222 hours" in printed
    assert "training narrow: 3.00 s a pair here, 0.00333 hours an epoch" in printed
    sizes = [len(pair.pc0) for pair in street]
    assert (found["points_least"], found["points_most"]) == (min(sizes), max(sizes))
    share = np.mean([(~pair.is_ground0).float().mean().item() for pair in street])
    assert found["share_not_ground"] == pytest.approx(share) and found["seconds_recorded"] == pytest.approx(0.4)
    files = [file for file in street_folder.rglob("*") if file.is_file()]
    assert found["bytes"] == sum(file.stat().st_size for file in files) and found["seconds_to_read"] > 0
    assert check(street_folder, "--sample", "2")[2]["pairs_read"] == 2
    assert zeroflow.spread(street, 2) == [0, 2] and zeroflow.spread(street, 0) == [0, 1, 2, 3]

    status, printed, found = check(broken_folder)
    assert status == 1 and printed.count("broken: ") == 2 and "cannot be used: more than 5% is broken" in printed
    assert len(found["broken"]) == 2 and "not a whole Feather file" in found["broken"][0] and not found["is_usable"]
    assert check(broken_folder, "--max-broken", "0.5")[0] == 0
    last = sorted(broken_folder.glob("*/sensors/lidar/*.feather"))[-1]
    last.rename(last.with_stem(str(int(last.stem) + 10**8)))  # a gap
    assert "the next sweep is 0.20 s later" in check(broken_folder)[2]["skipped"][0]
    # A label of other rows: the error names its file and the sweep's points. And pairs without any.
    made = zeroflow.read_label(labels, street.keys[3])
    zeroflow.write_label(labels, dataclasses.replace(made, flow=made.flow[1:], has_flow=made.has_flow[1:]))
    zeroflow.label_path(labels, street.keys[0]).unlink()
    status, printed, found = check(street_folder, "--labels", str(labels))
    file = zeroflow.label_path(labels, street.keys[3])
    assert status == 1 and f"broken: {file}: has {sizes[3] - 1} rows, its sweep has {sizes[3]} points" in printed
    assert found["labels_lacking"] == {street.keys[0].log_id: 1} and len(found["labels_broken"]) == 1
    assert f"{labels}: 3 labels, 1 pairs without: 1 of {street.keys[0].log_id}" in printed
    status, printed, found = check(street_folder, "--labels", str(tmp_path))
    assert status == 1 and found["labels_found"] == 0 and "cannot be used: there is no label" in printed


def test_what_labelling_and_training_cost_is_measured_on_a_pair(street):
    found = zeroflow.cost(street, "cpu", "narrow")
    assert found["seconds_to_label"] > 0.05 and 0 < found["seconds_to_train"] < 60


def test_a_folder_of_clouds_is_labelled_trained_on_and_predicted_as_a_user_types_it(
    tmp_path, street, capsys, monkeypatch
):
    """Two KITTI-like scans without poses or a map."""
    clouds = tmp_path / "drive" / "velodyne"
    clouds.mkdir(parents=True)
    for i, points in enumerate((street[0].pc0, street[0].pc1)):
        np.concatenate([points.numpy(), np.zeros((len(points), 1), "f4")], axis=1).tofile(clouds / f"{i:06d}.bin")
    labels = str(tmp_path / "labels")
    data_and_labels = ["--data", str(clouds), "--labels", labels]
    monkeypatch.setattr(zeroflow, "cost", lambda *_: {"seconds_to_label": 2.0, "seconds_to_train": 3.0})
    assert zeroflow.main(["label", *data_and_labels, "--iterations", "2", "--workers", "1"]) == 0
    assert "taken to be in one frame" in capsys.readouterr().err
    assert zeroflow.main(["check", *data_and_labels, "--device", "cpu", "--model", "narrow"]) == 0
    assert "Cloud, 1 logs, 1 pairs" in capsys.readouterr().out
    # Options of the data reach the reader: poses of elsewhere, a rate, and fewer pairs or sweeps.
    np.savetxt(tmp_path / "elsewhere.txt", np.tile(np.eye(4)[:3].ravel(), (2, 1)))
    options = ["--poses", str(tmp_path / "elsewhere.txt"), "--rate-hz", "5"]
    assert zeroflow.main(["check", "--data", str(clouds), *options, "--json", str(tmp_path / "n.json")]) == 0
    assert "taken to be in one frame" not in capsys.readouterr().err
    assert json.loads((tmp_path / "n.json").read_text())["seconds_recorded"] == pytest.approx(0.2)
    run = ["--steps", "1", "--out", str(tmp_path / "run"), "--device", "cpu", "--model", "narrow", "--workers", "0"]
    assert train.main([*data_and_labels, *run]) == 0
    student = str(tmp_path / "run" / "last.pt")
    files = [str(clouds / f"{i:06d}.bin") for i in (0, 1)]
    out = tmp_path / "flow.feather"
    assert zeroflow.main(["predict", "--checkpoint", student, *files, "--out", str(out), "--device", "cpu"]) == 0
    assert feather.read_table(out).num_rows == len(street[0].pc0)
    for arguments, message in (
        (["evaluate", "--data", str(clouds), "--baseline", "nearest"], "no true flow to compare with"),
        (["check", "--data", str(clouds), "--ground", "raster"], "choose points or none"),
        (
            ["submit", "--data", str(clouds), "--baseline", "nearest", "--challenge", "2023", "--out", "s.zip"],
            "--masks",
        ),
    ):
        assert zeroflow.main(arguments) == 1
        assert message in capsys.readouterr().err
