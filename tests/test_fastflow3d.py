"""The student against the published names and shapes, a deliberately plain one (plain_student.py), its invariances."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_student import plain_student, seeded_model

import fastflow3d
from fastflow3d import MODELS, FastFlow3D

TINY = dataclasses.replace(MODELS["narrow"], half_extent_m=(6.4, 6.4, 3.0))  # 32 x 32 cells
NORMAL = dataclasses.replace(MODELS["normal"], half_extent_m=(6.4, 6.4, 3.0))  # the published channels, 64 x 64 cells
XL = dataclasses.replace(  # the published levels and blocks, an eighth of the channels, 64 x 64 cells
    MODELS["xl"], half_extent_m=(3.2, 3.2, 3.0), pillar_channels=8, level_channels=(16, 32, 64, 128)
)


def cloud(n: int, seed: int = 0, half: float = 6.0) -> torch.Tensor:
    points = half * (2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) - 1)
    return points * torch.tensor([1.0, 1.0, 0.4])


def a_model(settings=TINY, seed: int = 0) -> FastFlow3D:
    half = settings.half_extent_m[0]
    return seeded_model(settings, cloud(1500, half=half), cloud(1500, seed=1, half=half), seed)


def odd_cloud(settings, seed: int) -> torch.Tensor:
    """Ordinary points; on cell borders, and one ulp beside them; outside; NaN and infinite; one point seven times."""
    half, size = np.float32(settings.half_extent_m[0]), np.float32(settings.cell_m)
    borders = (np.arange(settings.cells[1] + 1) * size - half).astype(np.float32)
    x = np.concatenate([borders, *(np.nextafter(borders, np.float32(end)) for end in (-99, 99))])
    x = np.concatenate([x, borders.astype(np.float16).astype(np.float32)])
    on_borders = torch.from_numpy(np.stack([x, np.random.default_rng(seed).permutation(x), 0 * x], axis=1))
    outside = torch.tensor(
        [[half, 0, 0], [0, -2 * half, 0], [0, 0, 3], [0, 0, -3.001], [np.nan, 0, 0], [0, 0, np.nan], [0, -np.inf, 0]]
    )
    points = torch.cat([cloud(400, seed, half), on_borders, outside, cloud(1, seed).expand(7, 3) * (half / 6)])
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]


def odd_batch(settings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    nothing, one = torch.zeros(0, 3), torch.tensor([[0.1, 0.1, 0.1]])
    pc0s = [odd_cloud(settings, 1), odd_cloud(settings, 2), nothing, one]
    return pc0s, [odd_cloud(settings, 3), nothing, odd_cloud(settings, 4), one]


# --- What was published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters", "tensors"), [("normal", 6_815_619, 148), ("xl", 110_618_147, 198)])
def test_names_shapes_and_counts_are_the_published_ones(name, parameters, tensors):
    with torch.device("meta"):  # shapes without memory
        model = FastFlow3D(MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    ours = [f"model.{key}\t{tuple(t.shape)}\t{t.dtype}" for key, t in model.state_dict().items()]
    published = (Path(__file__).parent / f"student_keys_{name}.txt").read_text().splitlines()
    assert ours == published and len(ours) == tensors
    assert MODELS[name].cells == {"normal": (512, 512), "xl": (1024, 1024)}[name]


def test_norms_are_the_published_ones():
    model = FastFlow3D(TINY)
    pillar_norm = model.embedder.feature_net.pfn_layers[0][1]
    assert (pillar_norm.eps, pillar_norm.momentum) == (1e-3, 0.01)
    assert model.backbone.encoder_step_1[0].batchnorm.eps == 1e-5


# --- Points to pillars -----------------------------------------------------------------------------------------------


def test_cells_are_the_floor_of_a_float32_division():
    """On cell borders, one ulp beside them, and at float16 coordinates, numpy's float32 agrees point by point."""
    settings = MODELS["normal"]
    borders = (np.arange(-260, 261) * np.float32(0.2)).astype(np.float32)
    halves = np.linspace(-52, 52, 40_000).astype(np.float16).astype(np.float32)
    x = np.concatenate([borders, np.nextafter(borders, np.float32(99)), np.nextafter(borders, np.float32(-99)), halves])
    points = np.stack([x, x[::-1], np.zeros_like(x)], axis=1)
    cell, center = fastflow3d.assign_cells(torch.from_numpy(points), settings)
    index = np.floor((points[:, :2] - np.float32(-51.2)) / np.float32(0.2))
    inside = ((index >= 0) & (index < 512)).all(axis=1)
    np.testing.assert_array_equal(cell, np.where(inside, index[:, 1] * 512 + index[:, 0], -1))
    assert (np.abs(points - center.numpy())[inside][:, :2] <= 0.1001).all()
    wrong = np.floor((points[:, 0].astype(np.float64) + 51.2) / 0.2)
    assert (wrong != index[:, 0]).sum() > 100, "float64 would have put these points elsewhere"


def test_points_outside_the_grid_and_nan_have_no_cell():
    points = torch.tensor(
        [[-6.4, -6.4, -3], [6.4, 0, 0], [0, -6.41, 0], [0, 0, 3], [0, 0, -3.01], [torch.nan, 0, 0], [0, 0, torch.inf]]
    )
    assert fastflow3d.assign_cells(points, TINY)[0].tolist() == [0, -1, -1, -1, -1, -1, -1]
    assert fastflow3d.assign_cells(torch.tensor([[-6.4, -5.9, 0.0]]), TINY)[0].item() == 32  # second row, first column


# --- The whole function, against the plain one ------------------------------------------------------------------------


def watch_steps(monkeypatch) -> list:
    """Grows by one with each decoder step that is computed only where it is needed."""
    steps, step_at = [], fastflow3d._step_at
    monkeypatch.setattr(fastflow3d, "_step_at", lambda *args: steps.append(1) or step_at(*args))
    return steps


ONE_PIXEL = dataclasses.replace(TINY, half_extent_m=(1.6, 1.6, 3.0))  # 8 x 8 cells: the coarsest map is one pixel


@torch.no_grad()
@pytest.mark.parametrize("settings", [NORMAL, XL, TINY, ONE_PIXEL], ids=["normal", "xl", "tiny", "one pixel"])
@pytest.mark.parametrize("share", [None, -1.0, 0.4, 1.0], ids=["as it is", "fast", "fast, part sparse", "fast, sparse"])
def test_the_student_is_the_plain_one(settings, share, monkeypatch):
    """In evaluation mode, to 2e-5 m, point by point, whatever the points; and in the same cells.

    The fast one with decoder steps computed everywhere, only where needed, and some this way and some that.
    """
    model, (pc0s, pc1s) = a_model(settings), odd_batch(settings)
    if share == 0.4 and settings is not ONE_PIXEL:
        pc0s[:2] = [pc0[(pc0 > 0).all(dim=1) | pc0.isnan().any(dim=1)] for pc0 in pc0s[:2]]  # a corner of the map
        steps = watch_steps(monkeypatch)
    monkeypatch.setattr(fastflow3d, "SPARSE_FROM", 0)
    monkeypatch.setattr(fastflow3d, "SPARSE_SHARE", share)
    run = model if share is None else model.prepare_inference()
    flows, masks = run(pc0s, pc1s)
    expected, cells = plain_student(model.state_dict(), settings, pc0s, pc1s)
    for i in range(len(pc0s)):
        torch.testing.assert_close(flows[i], expected[i], atol=2e-5, rtol=0)
        assert masks[i].tolist() == [cell is not None for cell in cells[i]]
        found, _ = fastflow3d.assign_cells(pc0s[i], settings)
        assert found.tolist() == [-1 if cell is None else cell[0] * settings.cells[1] + cell[1] for cell in cells[i]]
    if share == 0.4 and settings is not ONE_PIXEL:
        assert 0 < len(steps) < len(settings.level_blocks)
    assert masks[0].any() and not masks[0].all()
    speeds = flows[0][masks[0]].norm(dim=1)
    assert speeds.median() > 0.1 and speeds.max() > 0.3, "flows so small would hide errors"


@torch.no_grad()
def test_at_full_size_too():
    """512 x 512 cells, the published normal model, sparse clouds over all of the grid."""
    pc0, pc1 = (cloud(3000, seed, half=52.0) for seed in (0, 1))
    model = seeded_model(MODELS["normal"], pc0, pc1)
    (expected,), (cells,) = plain_student(model.state_dict(), model.settings, [pc0], [pc1])
    for run in (model, model.prepare_inference()):
        (flow,), (inside,) = run([pc0], [pc1])
        torch.testing.assert_close(flow, expected, atol=2e-5, rtol=0)
        assert inside.tolist() == [cell is not None for cell in cells]


@pytest.fixture
def four_threads():
    """torch's batch norm adds up a channels_last map in one float32 sum a thread: with one thread it errs by 1e-3."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("settings", [TINY, XL, ONE_PIXEL], ids=["tiny", "xl", "one pixel"])
def test_in_training_gradients_and_running_statistics_are_the_plain_ones(settings, four_threads):
    """Statistics are per cloud and frame in the pillar net, per frame in the U-Net, and sweep 0 comes first.

    A cloud of one point has no statistics and takes the running ones; an empty one has none, and needs none.
    """
    model = a_model(settings).train()
    nothing, one = torch.zeros(0, 3), torch.tensor([[0.1, 0.1, 0.1]])
    pc0s = [odd_cloud(settings, 1), odd_cloud(settings, 2), one, nothing]
    pc1s = [odd_cloud(settings, 3), odd_cloud(settings, 4) * 0.5, nothing, one]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        state[name].requires_grad_()

    flows, _ = model(pc0s, pc1s)
    expected, _ = plain_student(state, settings, pc0s, pc1s, training=True)
    directions = [torch.randn(flow.shape, generator=torch.Generator().manual_seed(5)) for flow in flows]
    sum((flow * way).sum() for flow, way in zip(flows, directions, strict=True)).backward()
    sum((flow * way).sum() for flow, way in zip(expected, directions, strict=True)).backward()

    for flow, right in zip(flows, expected, strict=True):
        torch.testing.assert_close(flow, right, atol=5e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        ours, right = parameter.grad, state[name].grad
        if right is None:  # the norms of a map of one pixel, which are skipped
            assert settings is ONE_PIXEL and ours is None, name
            continue
        if "encoder" in name and name.endswith("conv.bias") and right.norm() < 1e-3:
            assert ours.norm() < 1e-3, name  # batch norm takes the mean away: zero but for rounding
        else:
            assert right.norm() > 1e-3, f"{name}: a gradient of nothing tests nothing"
            assert (ours - right).norm() < 1e-3 * right.norm(), name
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, state[name], atol=1e-5, rtol=1e-5, msg=name)
    assert model.embedder.feature_net.pfn_layers[0][1].num_batches_tracked == 4  # two clouds, two frames


@torch.no_grad()
@pytest.mark.parametrize("settings", [NORMAL, XL], ids=["normal", "xl"])
def test_a_tenth_more_of_any_tensor_moves_some_flow_by_a_millimetre(settings):
    """So no tensor is dead, none is used where another should be, and the tests above see all of them."""
    model, pc0, pc1 = a_model(settings), *(cloud(1500, seed, settings.half_extent_m[0]) for seed in (0, 1))
    (flow,), _ = model([pc0], [pc1])
    assert flow.norm(dim=1).quantile(0.05) > 0.1 and flow.norm(dim=1).quantile(0.95) < 1
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            before = tensor.clone()
            tensor *= 1.1
            assert (model([pc0], [pc1])[0][0] - flow).norm(dim=1).max() > 1e-3, name
            tensor.copy_(before)


# --- Faster ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_errs_by_millimetres():
    """The fast model in bfloat16, and the plain one under autocast, whose metres must stay float32."""
    model, (pc0, pc1) = a_model(NORMAL), (odd_cloud(NORMAL, 1), odd_cloud(NORMAL, 2))
    (flow,), (inside,) = model([pc0], [pc1])
    dtypes = {}
    layers = model.embedder.feature_net.pfn_layers[0][0], model.backbone.encoder_step_1[0].conv, model.head.decoder[0]
    hooks = [layer.register_forward_hook(lambda layer, _, x: dtypes.update({layer: x.dtype})) for layer in layers]
    with torch.autocast("cpu", torch.bfloat16):
        (autocast,), _ = model([pc0], [pc1])
    assert [dtypes[layer] for layer in layers] == [torch.float32, torch.bfloat16, torch.float32]
    for hook in hooks:
        hook.remove()
    prepared = model.prepare_inference(torch.bfloat16)
    layers = prepared.pillar_net, prepared.encoder[0][0], prepared.out
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, x: dtypes.update({layer: x.dtype}))
    (fast,), _ = prepared([pc0], [pc1])
    assert [dtypes[layer] for layer in layers] == [torch.float32, torch.bfloat16, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):  # of no consequence: the model has its own dtype
        assert torch.equal(prepared([pc0], [pc1])[0][0], fast)
    for other in (autocast, fast):
        error = (other - flow).norm(dim=1)[inside]
        assert other.dtype == torch.float32
        assert error.median() < 6e-3 and error.max() < 2.5e-2 and error.median() > 1e-5
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=f"{dtype}: choose"):
            model.prepare_inference(dtype)


def test_a_prepared_model_is_a_copy():
    model, pc0, pc1 = a_model(), cloud(300), cloud(300, seed=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = model.prepare_inference()
    (before,), _ = fast([pc0], [pc1])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    assert torch.equal(fast([pc0], [pc1])[0][0], before)
    assert not before.requires_grad and not any(parameter.requires_grad for parameter in fast.parameters())


def test_no_shape_of_the_fast_model_depends_on_where_points_lie():
    """What a GPU needs: on the meta device, where tensors have no values, whatever asked for one would fail."""
    model, points = FastFlow3D(TINY), torch.empty(2, 70, 3, device="meta")
    fast = model.prepare_inference()
    fast._graph = "captured where its tensors were"
    fast.to("meta")
    assert fast._graph is None
    flow, inside = fast._flow(points)
    assert flow.shape == (1, 70, 3) and inside.shape == (1, 70)
    with pytest.raises(NotImplementedError, match="nonzero"):  # the plain one's do depend
        model.to("meta").embedder(list(points))


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_fast_model_is_the_same_function(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, (pc0s, pc1s) = a_model(NORMAL), odd_batch(NORMAL)
    expected, masks = model(pc0s, pc1s)
    model.cuda()
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2.5e-2)):
        fast = model.prepare_inference(dtype)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2], [0, 1, 2, 3]):  # captured, replayed, and captured anew
            clouds = [[pcs[i].cuda() for i in order] for pcs in (pc0s, pc1s)]
            flows, insides = fast(*clouds)
            torch.cuda.set_sync_debug_mode("error")  # from now on, to wait for the device is an error
            again, _ = fast(*clouds)
            torch.cuda.set_sync_debug_mode("default")
            for i, flow, same, inside in zip(order, flows, again, insides, strict=True):
                torch.testing.assert_close(flow.cpu(), expected[i], atol=bound, rtol=0)
                torch.testing.assert_close(same, flow, atol=bound, rtol=0)
                assert torch.equal(inside.cpu(), masks[i])


# --- Invariances -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_permuting_points_permutes_the_flow():
    model, pc0, pc1 = a_model(), cloud(500), cloud(400, seed=1)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    (flow,), (inside,) = model([pc0], [pc1])
    (permuted,), _ = model([pc0[order]], [pc1.flip(0)])
    assert inside.all() and flow.norm(dim=1).mean() > 0.05
    torch.testing.assert_close(permuted, flow[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_nan_and_far_points_change_nothing_for_the_others_and_get_no_flow():
    model, pc0, pc1 = a_model(), cloud(500), cloud(400, seed=1)
    odd = torch.tensor([[torch.nan, 0, 0], [100, 0, 0], [0, 0, 50], [0, torch.inf, 0]])
    (flow,), _ = model([pc0], [pc1])
    (with_odd,), (inside,) = model([torch.cat([odd, pc0])], [torch.cat([pc1, odd])])
    assert torch.equal(with_odd[4:], flow)
    assert with_odd[:4].eq(0).all()
    assert inside.tolist() == [False] * 4 + [True] * 500


@torch.no_grad()
def test_both_sweeps_matter_and_their_order():
    model, pc0, pc1 = a_model(), cloud(500), cloud(400, seed=1)
    (flow,), _ = model([pc0], [pc1])
    assert not torch.allclose(model([pc0], [pc1 + 0.3])[0][0], flow, atol=1e-3)
    assert not torch.allclose(model([pc1], [pc0])[0][0], model([pc1], [pc1])[0][0], atol=1e-3)


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one():
    model = a_model()
    pc0s, pc1s = [cloud(300), cloud(200, seed=5)], [cloud(250, seed=6), cloud(350, seed=7)]
    flows, masks = model(pc0s, pc1s)
    for i in range(2):
        (alone,), (mask,) = model(pc0s[i : i + 1], pc1s[i : i + 1])
        torch.testing.assert_close(flows[i], alone, atol=1e-5, rtol=0)
        assert torch.equal(masks[i], mask)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("n", "m"), [(0, 100), (100, 0), (1, 1), (0, 0)])
def test_clouds_of_no_or_one_point_get_a_flow(training, n, m):
    model = a_model().train(training)
    (flow,), (inside,) = model([cloud(n)], [cloud(m, seed=1)])
    assert flow.shape == (n, 3) and inside.shape == (n,) and flow.isfinite().all()
    flow.sum().backward()


def test_gradients_are_the_same_each_time_whatever_the_threads_do():
    """Many points in few cells: a sum in the order in which threads come differs in the last digit."""
    pc0, pc1 = cloud(20_000), cloud(20_000, seed=1)
    gradients = []
    for _ in range(4):
        model = a_model().train()
        model([pc0], [pc1])[0][0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_inputs_that_are_no_clouds_are_refused():
    model, points = a_model(), cloud(10)
    for run in (model, model.prepare_inference()):
        for pc0s, pc1s, message in (
            ([points], [], "1 clouds of sweep 0 and 0 of sweep 1"),
            ([], [], "one at least"),
            ([points[:, :2]], [points], r"\(10, 2\)"),
            ([points], [points.double()], "float64"),
            ([points.half()], [points], "float16"),
        ):
            with pytest.raises(ValueError, match=message):
                run(pc0s, pc1s)


def test_settings_that_make_no_grid_are_refused():
    for change, message in (
        ({"cell_m": 0.3}, "multiple of 8 cells"),
        ({"cell_m": 0.0}, "must be positive"),
        ({"half_extent_m": (51.2, float("inf"), 3.0)}, "must be positive"),
        ({"half_extent_m": (51.2, 51.2)}, "must be positive, x, y and z"),
        ({"half_extent_m": (51.2, 51.0, 3.0)}, "102.0 m in cells of 0.2 m"),
        ({"level_blocks": (4, 6)}, "3 level_channels for 2 level_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(MODELS["normal"], **change)


# --- Files -----------------------------------------------------------------------------------------------------------


def lightning(state: dict) -> dict:
    """A published file: what PyTorch Lightning writes around the tensors."""
    return {
        "epoch": 49,
        "global_step": 39650,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 50}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-6}]}],
        "lr_schedulers": [],
    }


@torch.no_grad()
def test_a_checkpoint_brings_back_the_same_function(tmp_path):
    model, pc0, pc1 = a_model(), cloud(100), cloud(100, seed=1)
    torch.save(fastflow3d.checkpoint_of(model), tmp_path / "student.pt")
    loaded = fastflow3d.load_checkpoint(tmp_path / "student.pt")
    assert not loaded.training and loaded.settings == model.settings
    assert torch.equal(loaded([pc0], [pc1])[0][0], model([pc0], [pc1])[0][0])
    with torch.enable_grad():
        flows, _ = loaded.train()([pc0], [pc1])  # and it can be trained on
        flows[0][:5] = 0.0  # the caller's own, to change in place
        flows[0].sum().backward()
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    torch.save(fastflow3d.checkpoint_of(model) | {"model": halves}, tmp_path / "half.pt")
    assert {tensor.dtype for tensor in fastflow3d.load_checkpoint(tmp_path / "half.pt").parameters()} == {torch.float32}


def test_a_published_file_is_recognised_and_its_tensors_are_all_there(tmp_path):
    state = seeded_model(MODELS["normal"], cloud(10), cloud(10)).state_dict()
    torch.save(lightning(state), tmp_path / "normal.ckpt")
    loaded = fastflow3d.load_checkpoint(tmp_path / "normal.ckpt")
    assert not loaded.training and loaded.settings == MODELS["normal"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())

    with torch.device("meta"):
        shapes = FastFlow3D(MODELS["xl"]).state_dict()
    state = {name: torch.ones((), dtype=t.dtype).expand(t.shape) for name, t in shapes.items()}  # a small file
    torch.save(lightning(state), tmp_path / "xl.ckpt")
    assert fastflow3d.load_checkpoint(tmp_path / "xl.ckpt").settings == MODELS["xl"]


def test_wrong_tensors_are_named(tmp_path):
    state = FastFlow3D(TINY).state_dict()
    state["backbone.encoder_step_1.0.conv.bias"] = torch.zeros(7)
    state["head.decoder.2.bias"] = torch.full((3,), torch.nan)
    state["head.decoder.9.bias"] = state.pop("head.decoder.0.bias")
    state["backbone.decoder_step1.u3.bias"] = state["backbone.decoder_step1.u3.bias"].to(torch.complex64)
    torch.save({"model_settings": dataclasses.asdict(TINY), "model": state}, tmp_path / "own.pt")
    with pytest.raises(ValueError) as caught:
        fastflow3d.load_checkpoint(tmp_path / "own.pt")
    for part in (
        "own.pt: does not hold",
        "head.decoder.0.bias is missing",
        "head.decoder.9.bias is unknown",
        r"encoder_step_1.0.conv.bias is (7,), expected (16,)",
        "head.decoder.2.bias is not finite",
        "decoder_step1.u3.bias is torch.complex64",
    ):
        assert part in str(caught.value)

    with torch.device("meta"):
        shapes = FastFlow3D(MODELS["xl"]).state_dict()
    state = {name: torch.ones((), dtype=t.dtype).expand(t.shape) for name, t in shapes.items()}
    del state["backbone.decoder_step5.bias"]
    torch.save(lightning(state), tmp_path / "xl.ckpt")
    with pytest.raises(ValueError, match="student it should: backbone.decoder_step5.bias is missing$"):
        fastflow3d.load_checkpoint(tmp_path / "xl.ckpt")  # recognised as XL all the same


class _RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_checkpoint_are_named_and_code_is_not_run(tmp_path):
    model = FastFlow3D(TINY)
    torch.save({"model": _RunsCode(tmp_path / "made by code")}, tmp_path / "code.pt")
    torch.save(
        lightning(model.state_dict()) | {"callbacks": _RunsCode(tmp_path / "made by code")}, tmp_path / "code.ckpt"
    )
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.txt").write_text("no checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    sparse = {name: tensor.to_sparse() for name, tensor in model.state_dict().items()}
    torch.save(fastflow3d.checkpoint_of(model) | {"model": sparse}, tmp_path / "sparse.pt")
    torch.save({"state_dict": {"model.x": "no tensor"}}, tmp_path / "text.pt")
    torch.save(fastflow3d.checkpoint_of(model) | {"model_settings": {"cell_m": 0.0}}, tmp_path / "settings.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:100])
    names = ("code.pt", "code.ckpt", "other.pt", "list.pt", "text.pt", "settings.pt", "torn.pt")
    names += ("tensor.pt", "text.txt", "empty.pt", "sparse.pt")
    for name in names:
        with pytest.raises(ValueError, match=f"{name}: (not a checkpoint of train.py|does not hold)") as caught:
            fastflow3d.load_checkpoint(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's advice is to run the code
    with pytest.raises(ValueError, match="nowhere.pt: no such file"):
        fastflow3d.load_checkpoint(tmp_path / "nowhere.pt")
    assert not (tmp_path / "made by code").exists()
