"""The label store, the loss, the metrics by hand and on a real pair, and the commands as a user types them."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather

import data
import fastflow3d
import nsfp
import zeroflow

ROOT = Path(zeroflow.__file__).parent
QUICK = dataclasses.replace(nsfp.TEACHERS["fast"], hidden_channels=8, batch_points=64, iterations=3)


def a_label(n: int = 50) -> zeroflow.Label:
    generator = torch.Generator().manual_seed(n)
    has_flow = torch.rand(n, generator=generator) < 0.7
    flow = torch.randn(n, 3, generator=generator) * has_flow[:, None]
    return zeroflow.Label(data.PairKey("log", 1, 2), flow, has_flow, dataclasses.asdict(QUICK), loss=0.25, seconds=1.5)


def a_pair(points, flow=None, category=None, is_dynamic=None, is_valid=None) -> data.SweepPair:
    """A pair of given points (N, 3) of sweep 0, none of them ground; sweep 1 is the same points."""
    n, points = len(points), torch.as_tensor(points, dtype=torch.float32)
    no = torch.zeros(n, dtype=torch.bool)
    return data.SweepPair(
        pc0=points,
        pc1=points,
        is_ground0=no,
        is_ground1=no,
        ego1_SE3_ego0=torch.eye(4, dtype=torch.float64),
        log_id="log",
        timestamp0_ns=0,
        timestamp1_ns=1,
        flow=torch.zeros(n, 3) if flow is None else torch.as_tensor(flow, dtype=torch.float32),
        category=torch.zeros(n, dtype=torch.uint8) if category is None else torch.tensor(category, dtype=torch.uint8),
        is_dynamic=no if is_dynamic is None else torch.tensor(is_dynamic),
        is_valid=~no if is_valid is None else torch.tensor(is_valid),
    )


# --- The label store -------------------------------------------------------------------------------------------------


def test_a_label_comes_back_by_its_name_to_half_a_millimetre(tmp_path):
    label = a_label()
    path = zeroflow.write_label(tmp_path, label)
    assert path == tmp_path / "log" / "1.feather"
    assert [file.name for file in path.parent.iterdir()] == ["1.feather"]  # no temporary file is left
    found = zeroflow.read_label(tmp_path, label.key, num_points=50)
    assert torch.equal(found.has_flow, label.has_flow)
    is_slow = label.flow.abs() < 2
    assert (found.flow - label.flow)[is_slow].abs().max() <= 0.0005
    assert (found.settings, found.loss, found.seconds) == (label.settings, 0.25, 1.5)
    assert feather.read_table(path).schema.names == ["flow_tx_m", "flow_ty_m", "flow_tz_m", "has_flow"]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def _fewer_rows(path):
    feather.write_feather(feather.read_table(path).slice(1), path)


def _other_settings(path):
    table = feather.read_table(path)
    about = table.schema.metadata[b"zeroflow"].replace(b'"iterations": 3', b'"iterations": 4')
    feather.write_feather(table.replace_schema_metadata({"zeroflow": about}), path)


def _foreign(path):
    columns = {name: np.zeros(50, np.float16) for name in ("flow_tx_m", "flow_ty_m", "flow_tz_m")}
    feather.write_feather(pyarrow.table({**columns, "has_flow": np.ones(50, bool)}), path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_cut, "1.feather: not a whole Feather file"),
        (_fewer_rows, "1.feather: its rows or settings are not those it was written with; delete the file"),
        (_other_settings, "1.feather: its rows or settings are not those it was written with; delete the file"),
        (_foreign, "1.feather: not a label of this project .* delete the file"),
        (lambda path: path.unlink(), "1.feather: no label for this pair; make it with"),
    ],
)
def test_a_label_that_is_not_whole_is_named_with_the_way_out(tmp_path, break_it, message):
    label = a_label()
    break_it(zeroflow.write_label(tmp_path, label))
    with pytest.raises(data.DataError, match=message):
        zeroflow.read_label(tmp_path, label.key)


def test_the_label_of_another_pair_is_refused(tmp_path):
    path = zeroflow.write_label(tmp_path, a_label())
    shutil.copy(path, path.with_name("7.feather"))
    with pytest.raises(data.DataError, match=r"7.feather: is the label of \('log', 1, 2\), not of \('log', 7, 8\)"):
        zeroflow.read_label(tmp_path, data.PairKey("log", 7, 8))
    with pytest.raises(data.DataError, match=r"1.feather: is the label of \('log', 1, 2\), not of \('log', 1, 3\)"):
        zeroflow.read_label(tmp_path, data.PairKey("log", 1, 3))
    with pytest.raises(data.DataError, match="1.feather: has 50 rows, its sweep has 51 points"):
        zeroflow.read_label(tmp_path, data.PairKey("log", 1, 2), num_points=51)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="power cut"), zeroflow.atomic_file(path) as file:
        file.write(b"ne")
        raise RuntimeError("power cut")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with zeroflow.atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_labels_are_for_points_that_are_not_ground_and_in_the_grid(street):
    pair = street[0]
    label = zeroflow.make_label(pair, QUICK)
    expected = ~pair.is_ground0 & (pair.pc0[:, 2].abs() < 3)  # the street ends before the grid's sides do
    assert torch.equal(label.has_flow, expected) and expected.any() and not expected.all()
    assert not label.flow[~expected].any() and label.flow[expected].any()
    moved, target = pair.pc0[expected] + label.flow[expected], pair.pc1[~pair.is_ground1 & (pair.pc1[:, 2].abs() < 3)]
    assert label.loss == pytest.approx(nsfp.truncated_chamfer(moved, target).item())


def test_labelling_makes_exactly_what_is_missing_or_torn(tmp_path, street):
    made = lambda count: (count.made, count.found, count.failed)  # noqa: E731
    assert made(zeroflow.label_dataset(street, tmp_path, QUICK, workers=1)) == (4, 0, [])
    paths = [zeroflow.label_path(tmp_path, key) for key in street.keys]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    paths[1].unlink()
    _cut(paths[2])
    assert made(zeroflow.label_dataset(street, tmp_path, QUICK, workers=1)) == (2, 2, [])
    for i in (0, 3):
        assert (paths[i].read_bytes(), paths[i].stat().st_mtime_ns) == before[i]
    for i in range(4):  # the same flow as in the undisturbed run
        assert torch.equal(
            zeroflow.read_label(tmp_path, street.keys[i]).flow, zeroflow.make_label(street[i], QUICK).flow.half()
        )
    with pytest.raises(data.DataError, match="holds labels of other settings"):
        zeroflow.label_dataset(street, tmp_path, dataclasses.replace(QUICK, seed=1), workers=1)


def test_a_pair_that_cannot_be_read_costs_one_label(tmp_path, street_folder):
    shutil.copytree(street_folder, tmp_path / "street")
    pairs = data.open_dataset(tmp_path / "street")
    _cut(tmp_path / "street" / pairs.keys[0].log_id / "sensors" / "lidar" / f"{pairs.keys[0].timestamp0_ns}.feather")
    count = zeroflow.label_dataset(pairs, tmp_path / "labels", QUICK, workers=2)
    assert (count.made, count.found) == (3, 0)
    ((key, reason),) = count.failed
    assert key == pairs.keys[0] and f"{key.timestamp0_ns}.feather: not a whole Feather file" in reason


def test_several_workers_make_the_labels_that_one_makes(tmp_path, street):
    for workers in (1, 2):
        zeroflow.label_dataset(street, tmp_path / str(workers), QUICK, workers)
    for key in street.keys:
        one, two = (zeroflow.read_label(tmp_path / str(workers), key) for workers in (1, 2))
        assert torch.equal(one.flow, two.flow) and torch.equal(one.has_flow, two.has_flow)


def test_rows_of_nan_and_sweeps_of_nothing_but_ground_pass_through(street):
    """A NaN row gets no flow and disturbs no other; a pair without input gets a label without flow."""
    pair = street[0]
    pc0 = pair.pc0.clone()
    row = int((~pair.is_ground0).nonzero()[7])
    pc0[row] = torch.nan
    label = zeroflow.make_label(dataclasses.replace(pair, pc0=pc0), QUICK)
    assert not label.has_flow[row] and not label.flow[row].any() and label.flow.isfinite().all()
    student = zeroflow.from_student(fastflow3d.FastFlow3D(fastflow3d.MODELS["narrow"]))
    flow = student(dataclasses.replace(pair, pc0=pc0))[0]
    assert flow.isfinite().all() and not flow[row].any() and flow.any()

    everything = torch.ones_like(pair.is_ground0)
    empty = dataclasses.replace(pair, is_ground0=everything)
    label = zeroflow.make_label(empty, QUICK)
    assert not label.has_flow.any() and not label.flow.any() and label.loss == 0
    assert not student(empty)[0].any() and not zeroflow.nearest_neighbour(empty).any()
    result = zeroflow.evaluate([empty], zeroflow.timed(zeroflow.no_motion))
    assert result["points"] == 0 and math.isnan(result["grid_three_way"])


def test_a_fit_that_diverged_costs_one_label_and_is_reported(tmp_path, street):
    count = zeroflow.label_dataset(street, tmp_path, dataclasses.replace(QUICK, learning_rate=1e30), workers=1)
    assert (count.made, len(count.failed)) == (0, 4)


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


# --- The metrics -----------------------------------------------------------------------------------------------------


def test_three_way_epe_by_hand():
    epe = zeroflow.ThreeWayEPE()
    epe.add(
        torch.tensor([1.0, 3.0, 0.5, 7.0]), torch.tensor([zeroflow.FD, zeroflow.FD, zeroflow.FS, zeroflow.NOT_COUNTED])
    )
    assert epe.parts[:2] == (2.0, 0.5) and math.isnan(epe.parts[2])  # no background: NaN, not 0
    assert epe.three_way == 1.25 and epe.epe == 1.5  # ... and out of the mean
    epe.add(torch.tensor([0.1, 0.3, 0.2, 0.2]), torch.full((4,), zeroflow.BS))
    assert epe.parts == pytest.approx((2.0, 0.5, 0.2))
    assert epe.three_way == pytest.approx(0.9)
    assert epe.epe == pytest.approx((1 + 3 + 0.5 + 0.8) / 7)
    assert math.isnan(zeroflow.ThreeWayEPE().three_way)


def test_grid_groups_by_hand():
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    points = [[0, 0, 0], [50, 50, 0], [0, 0, 2.9], [51.2, 0, 0], [0, 0, -3.1]]
    pair = a_pair(points, category=[car, car, 0, car, 0], is_dynamic=[True, False, False, True, False])
    assert zeroflow.grid_groups(pair).tolist() == [0, 1, 2, -1, -1]
    ground = dataclasses.replace(pair, is_ground0=torch.tensor([True, False, True, False, False]))
    assert zeroflow.grid_groups(ground).tolist() == [-1, 1, -1, -1, -1]


def test_paper_groups_by_hand():
    """Category, displacement in a sweep, place -> group."""
    FD, FS, BS, out = zeroflow.FD, zeroflow.FS, zeroflow.BS, zeroflow.NOT_COUNTED
    rows = [
        ("REGULAR_VEHICLE", 0.051, (0, 0, 0), FD),  # above 0.5 m/s
        ("REGULAR_VEHICLE", 0.049, (0, 0, 0), FS),
        ("PEDESTRIAN", 0.2, (35, -35, 0), FD),
        ("PEDESTRIAN", 0.2, (35.1, 0, 0), out),  # beyond 35 m
        ("WHEELED_RIDER", 0.2, (0, 0, 0), FD),
        ("MESSAGE_BOARD_TRAILER", 0.0, (0, 0, 0), FS),
        ("NONE", 0.0, (0, 0, 0), BS),
        ("STOP_SIGN", 0.0, (0, 0, 0), BS),  # labelled, but background
        ("CONSTRUCTION_CONE", 0.2, (0, 0, 0), BS),
        ("DOG", 0.2, (0, 0, 0), out),  # in no group
        ("ANIMAL", 0.0, (0, 0, 0), out),
    ]
    names, steps, points, groups = zip(*rows, strict=True)
    pair = a_pair(
        points,
        flow=[[step, 0, 0] for step in steps],
        category=[data.CATEGORIES.index(name) for name in names],
        is_valid=[False] * len(rows),  # invalid points are not excluded
    )
    assert zeroflow.paper_groups(pair).tolist() == list(groups)
    movers = {name for i, name in enumerate(data.CATEGORIES) if zeroflow._PAPER_MOVERS[i]}
    background = (
        "NONE BOLLARD CONSTRUCTION_BARREL CONSTRUCTION_CONE MOBILE_PEDESTRIAN_CROSSING_SIGN SIGN STOP_SIGN".split()
    )
    assert movers == set(data.CATEGORIES) - set(background) - {"ANIMAL", "DOG"}


def test_evaluation_pools_points_and_gives_the_mean_over_pairs_beside_it():
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    one = a_pair([[0, 0, 0]], flow=[[1, 0, 0]], category=[car], is_dynamic=[True])
    three = a_pair([[0, 0, 0]] * 3, flow=[[2, 0, 0]] * 3, category=[car] * 3, is_dynamic=[True] * 3)
    result = zeroflow.evaluate([one, three], zeroflow.timed(zeroflow.no_motion))
    assert result["grid_three_way_fd"] == pytest.approx(7 / 4)
    assert result["grid_three_way_pair_mean"] == pytest.approx(1.5)
    assert (result["pairs"], result["points"]) == (2, 4)
    perfect = zeroflow.evaluate([one, three], lambda pair: (pair.flow, 0.1))
    assert perfect["grid_epe"] == perfect["paper_three_way"] == 0 and perfect["seconds_per_pair"] == 0.1


def test_baselines_on_the_real_pair_are_the_known_numbers(av2_pair):
    known = {"no-motion": (0.0193, 0.2234, 0.6645, 0.0057, 0.0), "nearest": (0.0624, 0.2349, 0.6089, 0.0496, 0.0462)}
    keys = ("grid_epe", "grid_three_way", "grid_three_way_fd", "grid_three_way_fs", "grid_three_way_bs")
    for name, numbers in known.items():
        result = zeroflow.evaluate([av2_pair], zeroflow.timed(zeroflow.BASELINES[name]))
        assert [result[key] for key in keys] == pytest.approx(numbers, abs=3e-4), name


def test_the_fast_teacher_more_than_halves_the_error_of_no_motion_on_the_real_pair(av2_pair):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = zeroflow.evaluate([av2_pair], zeroflow.from_teacher(nsfp.TEACHERS["fast"]))
    torch.set_num_threads(threads)
    assert result["grid_three_way"] < 0.2234 / 2
    assert result["grid_epe"] < 0.030


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
    assert "2 labels made" in done.stdout and "0 found, 0 failed" in done.stdout
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
        (("evaluate", "--data", street_folder, "--labels", tmp_path), "feather: no label for this pair; make it with"),
        (("evaluate", "--data", street_folder, "--checkpoint", tmp_path / "no.pt"), "no.pt: no such file"),
        (("synthesize", "--out", street_folder, "--logs", 1), "is not empty; choose a new folder"),
        (("label", "--data", street_folder, "--labels", tmp_path, "--device", "tpu"), "--device 'tpu': choose cpu"),
        (("evaluate", "--data", street_folder, "--baseline", "nearest", "--seed", 1), "without --teacher"),
    ):
        assert zeroflow.main([*map(str, arguments)]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert message in line
    with pytest.raises(SystemExit):
        zeroflow.main(["label", "--data", "x", "--labels", "y", "--no-such-setting", "1"])
