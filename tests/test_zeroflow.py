"""The method: the loss and the evaluation by hand and on a real pair, distillation, prediction."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import a_pair

import data
import fastflow3d
import nsfp
import train
import zeroflow

ROOT = Path(zeroflow.__file__).parent


# --- The loss


def test_speed_weights_by_formula_and_as_published():
    speed = torch.tensor([0.2, 0.7, 2.0])
    torch.testing.assert_close(zeroflow.speed_weight(speed), torch.tensor([0.1, 0.46, 1.0]))
    torch.testing.assert_close(
        zeroflow.speed_weight(speed, "published"), torch.tensor([0.1, 0.1, 0.1])
    )
    torch.testing.assert_close(zeroflow.speed_weight(speed, "none"), torch.ones(3))
    for s, w in zip(speed.tolist(), zeroflow.speed_weight(speed).tolist(), strict=True):
        assert w == pytest.approx(max(0.1, min(1.0, 1.8 * s - 0.8)))
    with pytest.raises(ValueError, match="speed weight 'fast': choose"):
        zeroflow.speed_weight(speed, "fast")


def test_the_loss_by_hand():
    """0.3 m wrong at 2 m/s (weight 1), 0.4 m at 0 m/s (0.1); a masked row; an empty sample."""
    label = torch.tensor([[0.2, 0, 0], [0, 0, 0], [9, 9, 9.0]])
    estimate = torch.tensor([[0.2, 0.3, 0], [0, 0, 0.4], [0, 0, 0.0]], requires_grad=True)
    mask = torch.tensor([True, True, False])
    empty = (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.bool))
    loss = zeroflow.distillation_loss(
        *([a, b] for a, b in zip((estimate, label, mask), empty, strict=True))
    )
    assert loss.item() == pytest.approx((1 * 0.3 + 0.1 * 0.4) / 2)
    squared = zeroflow.distillation_loss([estimate], [label], [mask], "none", squared=True)
    error = (estimate - label)[mask].norm(dim=1)
    torch.testing.assert_close(squared, error.square().mean())
    unweighted = zeroflow.distillation_loss([estimate] * 2, [label] * 2, [mask] * 2, weight="none")
    assert unweighted.item() == pytest.approx(
        2 * (0.3 + 0.4) / 2
    )  # summed over the batch, as published
    loss.backward()
    torch.testing.assert_close(
        estimate.grad, torch.tensor([[0, 0.5, 0], [0, 0, 0.05], [0, 0, 0.0]])
    )


def test_a_speed_counts_by_the_real_time_between_the_sweeps():
    """7 cm are 0.7 m/s at 10 Hz (weight 0.46), 1.4 m/s at 20 Hz (1) and 0.35 m/s at 5 Hz (0.1)."""
    label, estimate = torch.tensor([[0.07, 0, 0]]), torch.tensor([[0.07, 0.5, 0]])
    mask = torch.ones(1, dtype=torch.bool)
    one = ([estimate], [label], [mask])
    for seconds, weight in ((0.1, 0.46), (0.05, 1.0), (0.2, 0.1)):
        loss = zeroflow.distillation_loss(*one, seconds=[seconds])
        assert loss.item() == pytest.approx(weight * 0.5)
    assert zeroflow.distillation_loss(*one) == zeroflow.distillation_loss(*one, seconds=[0.1])
    both = zeroflow.distillation_loss(*(2 * part for part in one), seconds=[0.1, 0.05])
    assert both.item() == pytest.approx((0.46 + 1.0) * 0.5)


def test_the_method_in_memory_knows_the_time_between_the_sweeps(street, monkeypatch):
    """With 0.05 s between the sweeps of the pair, and one step: the loss gets that time."""
    seen, loss = [], zeroflow.distillation_loss
    monkeypatch.setattr(
        zeroflow, "distillation_loss", lambda *a, **more: seen.append(more) or loss(*a, **more)
    )
    pair = dataclasses.replace(street[0], timestamp1_ns=street[0].timestamp0_ns + 50_000_000)
    teacher = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2, priors=1)
    zeroflow.distill([pair], teacher, fastflow3d.MODELS["narrow"], steps=1)
    assert seen == [{"seconds": [0.05]}]


def test_a_label_knows_its_input(street):
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2, priors=1)
    found = [label.fingerprint for label in zeroflow.make_labels(list(street), quick)]
    assert found == [pair.fingerprint for pair in street] and len(set(found)) == len(street)


def test_no_rows_give_a_loss_of_zero_that_can_be_stepped_on():
    estimate = torch.zeros(2, 3, requires_grad=True)
    loss = zeroflow.distillation_loss(
        [estimate], [torch.zeros(2, 3)], [torch.zeros(2, dtype=torch.bool)]
    )
    loss.backward()
    assert loss.item() == 0 and not estimate.grad.any()
    at_label = torch.zeros(
        2, 3, requires_grad=True
    )  # the norm has no gradient at 0: it must not be NaN
    zeroflow.distillation_loss(
        [at_label], [torch.zeros(2, 3)], [torch.ones(2, dtype=torch.bool)]
    ).backward()
    assert at_label.grad.isfinite().all()


# --- The evaluation


def test_evaluation_pools_points_and_gives_the_mean_over_pairs_beside_it():
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    one = a_pair([[0, 0, 0]], flow=[[1, 0, 0]], category=[car], is_dynamic=[True])
    three = a_pair([[0, 0, 0]] * 3, flow=[[2, 0, 0]] * 3, category=[car] * 3, is_dynamic=[True] * 3)
    result = zeroflow.evaluate([one, three], zeroflow.timed(zeroflow.no_motion)).numbers
    assert result["grid_three_way_fd"] == pytest.approx(7 / 4)
    assert result["grid_three_way_pair_mean"] == pytest.approx(1.5)
    assert (result["pairs"], result["points"]) == (2, 4)
    perfect = zeroflow.evaluate(
        [one, three], lambda pair: zeroflow.Estimate(pair.flow, 0.1)
    ).numbers
    assert (
        perfect["grid_epe"] == perfect["paper_three_way"] == 0
        and perfect["seconds_per_pair"] == 0.1
    )


def test_baselines_on_the_real_pair_are_the_known_numbers(av2_pair):
    known = {
        "no-motion": (0.0193, 0.2234, 0.6645, 0.0057, 0.0),
        "nearest": (0.0624, 0.2349, 0.6089, 0.0496, 0.0462),
    }
    keys = (
        "grid_epe",
        "grid_three_way",
        "grid_three_way_fd",
        "grid_three_way_fs",
        "grid_three_way_bs",
    )
    for name, numbers in known.items():
        result = zeroflow.evaluate([av2_pair], zeroflow.from_baseline(name)).numbers
        assert [result[key] for key in keys] == pytest.approx(numbers, abs=3e-4), name


def test_the_fast_teacher_beats_no_motion_on_the_real_pair_where_it_moves_and_on_the_whole(
    av2_pair,
):
    with zeroflow.one_thread():
        teacher = zeroflow.from_teacher(nsfp.TEACHERS["fast"])
        result = zeroflow.evaluate([av2_pair], teacher).numbers
    assert result["grid_three_way"] < 0.10  # no motion: .2234
    assert result["grid_epe"] < 0.012  # .0193


def test_only_points_of_the_given_grid_are_scored_and_labeled():
    """One grid for teacher and score: a point 30 m ahead is inside 51.2 m, not inside 25.6 m."""
    car = data.CATEGORIES.index("REGULAR_VEHICLE")
    pair = a_pair(
        [[10, 0, 0], [30, 0, 0]],
        flow=[[1, 0, 0], [2, 0, 0]],
        category=[car] * 2,
        is_dynamic=[True] * 2,
    )
    for half_extent_m, mean, has_flow in (
        ((51.2, 51.2, 3.0), 1.5, [True, True]),
        ((25.6, 25.6, 3.0), 1.0, [True, False]),
    ):
        evaluation = zeroflow.evaluate([pair], zeroflow.from_baseline("no-motion"), half_extent_m)
        assert evaluation.numbers["grid_three_way_fd"] == pytest.approx(mean)
        assert evaluation.pair_three_ways == {0: pytest.approx(mean)}
        quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2)
        (label,) = zeroflow.make_labels([pair], quick, half_extent_m)
        assert label.has_flow.tolist() == has_flow
        assert label.settings["half_extent_m"] == list(half_extent_m)


def test_a_diverged_fit_is_refused_by_the_size_of_the_grid():
    pair = a_pair([[10, 0, 0]] * 3)
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=2)
    (label,) = zeroflow.make_labels([pair], quick, (25.6, 25.6, 3.0))
    zeroflow.check_label(label)
    for length, is_refused in ((51.1, False), (51.3, True), (float("nan"), True)):
        flow = label.flow.clone()
        flow[1, 2] = length
        long = dataclasses.replace(label, flow=flow)
        if is_refused:
            with pytest.raises(
                data.DataError, match="the fit diverged; try a smaller learning rate"
            ):
                zeroflow.check_label(long)
        else:
            zeroflow.check_label(long)


# --- The method


def test_distillation_in_memory_is_what_the_trainer_does(street):
    """`distill` and the trainer, with settings that mean the same, give the same weights."""
    teacher = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=20, priors=1)
    narrow = fastflow3d.MODELS["narrow"]
    with zeroflow.one_thread():
        torch.manual_seed(3)
        student = zeroflow.distill([street[0]], teacher, narrow, steps=4, learning_rate=1e-3)
        (label,) = zeroflow.make_labels([street[0]], teacher, narrow.half_extent_m)
        pair, keep = street[0], ~street[0].is_ground0
        sample = train.Sample(
            pair.pc0[keep],
            pair.pc1[~pair.is_ground1],
            label.flow[keep],
            label.has_flow[keep],
            torch.ones(int(keep.sum())),
        )
        settings = train.TrainSettings(
            model="narrow",
            steps=4,
            batch_size=1,
            micro_batch=1,
            lr=1e-3,
            seed=3,
            workers=0,
            device="cpu",
        )
        expected = train.train([sample], settings)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    assert not student.training


# --- Use


@torch.no_grad()
def test_predict_gives_every_row_its_flow(student_file, street):
    """The model's flow in the right rows; 0 for ground, NaN and points outside the grid."""
    model, pair = fastflow3d.load_checkpoint(student_file), street[0]
    pc0 = pair.pc0.clone()
    pc0[5], pc0[7] = torch.nan, 1000.0
    keep = ~pair.is_ground0
    (expected,), (inside,) = model([pc0[keep]], [pair.pc1[~pair.is_ground1]])
    ground = {"is_ground0": pair.is_ground0, "is_ground1": pair.is_ground1}
    flow = zeroflow.predict(model, pc0, pair.pc1, **ground)
    assert (
        torch.equal(flow[keep], expected) and flow[~keep].eq(0).all() and flow[[5, 7]].eq(0).all()
    )
    assert expected[inside].norm(dim=1).median() > 0.1 and (~keep).any()
    arrays = [x.numpy() for x in (pc0, pair.pc1, pair.is_ground0, pair.is_ground1)]
    same = zeroflow.predict(model, arrays[0], arrays[1], None, *arrays[2:])
    assert isinstance(same, np.ndarray) and (same == flow.numpy()).all()
    assert not np.allclose(
        zeroflow.predict(model, arrays[0], arrays[1])[keep.numpy()], same[keep.numpy()], atol=1e-3
    )
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
    torch.testing.assert_close(
        apart, together, atol=1e-3, rtol=0
    )  # but for points on borders of cells, rounded
    total = zeroflow.predict(model, pair.pc0, pc1_in_ego1, pose.numpy(), total=True)
    moved = data.transform(pose.numpy(), (pair.pc0 + apart).double().numpy())
    np.testing.assert_allclose(total, moved - pair.pc0.double().numpy(), atol=1e-5)
    assert (total - apart).norm(dim=1).max() > 0.1  # the ego moves
