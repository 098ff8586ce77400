"""The student against the published names and shapes, plain loops, and its invariances."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastflow3d
from fastflow3d import MODELS, FastFlow3D

TINY = dataclasses.replace(MODELS["narrow"], half_extent_m=(6.4, 6.4, 3.0))  # 32 x 32 cells


def seeded_model(settings=TINY, seed: int = 0) -> FastFlow3D:
    """A student whose every tensor, running statistics too, is random, and whose flows are decimetres."""
    generator = torch.Generator().manual_seed(seed)
    model = FastFlow3D(settings)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            is_scale = tensor.ndim == 1 and name.endswith(("running_var", "weight"))  # of a batch norm
            tensor.copy_(1 + 0.1 * noise if is_scale else noise / max(1, tensor[0].numel()) ** 0.5)
    return model.eval()


def cloud(n: int, seed: int = 0, half: float = 6.0) -> torch.Tensor:
    points = half * (2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) - 1)
    return points * torch.tensor([1.0, 1.0, 0.4])


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


def test_pillars_are_the_loop_over_cells():
    model, points = seeded_model(), cloud(300, half=2.0)
    image, _, _ = model.embedder([points])
    linear, norm, _ = model.embedder.feature_net.pfn_layers[0]
    expected = torch.zeros_like(image[0])
    column, row = (((points[:, axis] + 6.4) / 0.4).floor().long() for axis in (0, 1))
    for y, x in {(int(y), int(x)) for y, x in zip(row, column, strict=True)}:
        mine = points[(row == y) & (column == x)]
        center = torch.tensor([-6.4 + (x + 0.5) * 0.4, -6.4 + (y + 0.5) * 0.4, 0.0])
        features = linear(torch.cat([mine, mine - mine.mean(dim=0), mine - center], dim=1))
        scaled = (features - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias
        expected[:, y, x] = scaled.clamp(min=0).mean(dim=0)
    torch.testing.assert_close(image[0], expected, atol=1e-5, rtol=1e-5)


# --- The U-Net and the head ------------------------------------------------------------------------------------------


def plain_unet(state: dict, image0: torch.Tensor, image1: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """The U-Net again, from the published description and the state dict alone, in evaluation mode."""

    def conv(x, name, **how):
        return F.conv2d(x, state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"], **how)

    def block(x, name, stride):
        x = conv(x, f"{name}.conv", stride=stride, padding=1)
        norm = {k: state[f"backbone.{name}.batchnorm.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        if x.shape[-1] > 1:
            centered = x - norm["running_mean"][:, None, None]
            scale = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
            x = centered * scale[:, None, None] + norm["bias"][:, None, None]
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))  # exact GELU

    def encode(image):
        maps = [image]
        for level, count in enumerate(blocks, start=1):
            x = maps[-1]
            for i in range(count):
                x = block(x, f"encoder_step_{level}.{i}", stride=2 if i == 0 else 1)
            maps.append(x)
        return maps

    both = [torch.cat([before, after], dim=1) for before, after in zip(encode(image0), encode(image1), strict=True)]
    x = both[-1]
    for step, skip in enumerate(reversed(both[:-1]), start=1):
        a = conv(x, f"decoder_step{step}.u1_u2.0")
        a = F.interpolate(a, scale_factor=2, mode="bilinear", align_corners=False)
        b = conv(skip, f"decoder_step{step}.u3")
        x = conv(torch.cat([a, b], dim=1), f"decoder_step{step}.u4_u5.0", padding=1)
        x = conv(x, f"decoder_step{step}.u4_u5.1", padding=1)
    return conv(x, f"decoder_step{len(blocks) + 1}", padding=1)


@torch.no_grad()
@pytest.mark.parametrize("half", [6.4, 1.6])  # 32 x 32 cells, and 8 x 8, whose coarsest map is one pixel
def test_unet_and_head_are_the_plain_reimplementation(half):
    settings = dataclasses.replace(TINY, half_extent_m=(half, half, 3.0))
    model, pc0, pc1 = seeded_model(settings), cloud(300, half=half), cloud(250, seed=1, half=half)
    state = model.state_dict()
    (image0, _, _), (image1, _, _) = model.embedder([pc0]), model.embedder([pc1])
    motion = plain_unet(state, image0, image1, settings.level_blocks)
    torch.testing.assert_close(model.backbone(image0, image1), motion, atol=1e-5, rtol=1e-4)

    (flow,), _ = model([pc0], [pc1])
    column, row = (((pc0[:, axis] + half) / 0.4).floor().long() for axis in (0, 1))
    for i in range(len(pc0)):
        at = (0, slice(None), row[i], column[i])
        center = torch.tensor([(column[i] + 0.5) * 0.4 - half, (row[i] + 0.5) * 0.4 - half, 0.0])
        x = torch.cat([image0[at], image1[at], motion[at], pc0[i] - center])
        hidden = state["head.decoder.0.weight"] @ x + state["head.decoder.0.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        expected = state["head.decoder.2.weight"] @ hidden + state["head.decoder.2.bias"]
        torch.testing.assert_close(flow[i], expected, atol=1e-5, rtol=1e-4)


# --- The whole -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_permuting_points_permutes_the_flow():
    model, pc0, pc1 = seeded_model(), cloud(500), cloud(400, seed=1)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    (flow,), (inside,) = model([pc0], [pc1])
    (permuted,), _ = model([pc0[order]], [pc1.flip(0)])
    assert inside.all() and flow.norm(dim=1).mean() > 0.05
    torch.testing.assert_close(permuted, flow[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_nan_and_far_points_change_nothing_for_the_others_and_get_no_flow():
    model, pc0, pc1 = seeded_model(), cloud(500), cloud(400, seed=1)
    odd = torch.tensor([[torch.nan, 0, 0], [100, 0, 0], [0, 0, 50], [0, torch.inf, 0]])
    (flow,), _ = model([pc0], [pc1])
    (with_odd,), (inside,) = model([torch.cat([odd, pc0])], [torch.cat([pc1, odd])])
    assert torch.equal(with_odd[4:], flow)
    assert with_odd[:4].eq(0).all()
    assert inside.tolist() == [False] * 4 + [True] * 500


@torch.no_grad()
def test_every_tensor_and_both_sweeps_matter():
    """No weight is dead, and none is used where another should be: change any, and some flow changes."""
    model, pc0, pc1 = seeded_model(), cloud(500), cloud(400, seed=1)
    (flow,), _ = model([pc0], [pc1])
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        before = tensor.clone()
        tensor.add_(0.1 * tensor + 0.01)
        assert (model([pc0], [pc1])[0][0] - flow).abs().max() > 1e-5, name
        tensor.copy_(before)
    assert not torch.allclose(model([pc0], [pc1 + 0.3])[0][0], flow, atol=1e-3)
    assert not torch.allclose(model([pc1], [pc0])[0][0], model([pc1], [pc1])[0][0], atol=1e-3)


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one():
    model = seeded_model()
    pc0s, pc1s = [cloud(300), cloud(200, seed=5)], [cloud(250, seed=6), cloud(350, seed=7)]
    flows, masks = model(pc0s, pc1s)
    for i in range(2):
        (alone,), (mask,) = model(pc0s[i : i + 1], pc1s[i : i + 1])
        torch.testing.assert_close(flows[i], alone, atol=1e-5, rtol=0)
        assert torch.equal(masks[i], mask)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("n", "m"), [(0, 100), (100, 0), (1, 1), (0, 0)])
def test_clouds_of_no_or_one_point_get_a_flow(training, n, m):
    model = seeded_model().train(training)
    (flow,), (inside,) = model([cloud(n)], [cloud(m, seed=1)])
    assert flow.shape == (n, 3) and inside.shape == (n,) and flow.isfinite().all()
    flow.sum().backward()


def test_in_training_the_statistics_are_taken_per_frame_and_per_cloud():
    model = seeded_model().train()
    model([cloud(300), cloud(200, seed=5)], [cloud(250, seed=6), cloud(350, seed=7)])
    assert model.embedder.feature_net.pfn_layers[0][1].num_batches_tracked == 4  # two clouds, two frames
    assert model.backbone.encoder_step_1[0].batchnorm.num_batches_tracked == 2  # two frames


def test_gradients_are_the_same_each_time_whatever_the_threads_do():
    """Many points in few cells: a sum in the order in which threads come differs in the last digit."""
    pc0, pc1 = cloud(20_000), cloud(20_000, seed=1)
    gradients = []
    for _ in range(4):
        model = seeded_model().train()
        model([pc0], [pc1])[0][0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_running_statistics_see_sweep_0_first():
    """In the pillar net and in the U-Net: one step is two updates by hand, with sweep 0's mean and then sweep 1's."""
    model, pc0, pc1 = seeded_model().train(), cloud(300), cloud(250, half=3.0, seed=6)
    linear, pillar_norm, _ = model.embedder.feature_net.pfn_layers[0]
    first_block = model.backbone.encoder_step_1[0]
    seen = {linear: [], first_block.conv: []}
    expected = {linear: pillar_norm.running_mean.clone(), first_block.conv: first_block.batchnorm.running_mean.clone()}
    for layer in seen:
        layer.register_forward_hook(lambda layer, _, output: seen[layer].append(output.detach()))
    model([pc0], [pc1])
    # Sweep 0 alone through the same weights tells whose turn came first.
    probe = seeded_model().train()
    image0, _, _ = probe.embedder([pc0])
    torch.testing.assert_close(seen[first_block.conv][0], probe.backbone.encoder_step_1[0].conv(image0))
    assert [len(x) for x in seen[linear]] == [300, 250]
    for layer, norm, momentum in ((linear, pillar_norm, 0.01), (first_block.conv, first_block.batchnorm, 0.1)):
        for x in seen[layer]:
            mean = x.mean(dim=0) if x.ndim == 2 else x.mean(dim=(0, 2, 3))
            expected[layer] = (1 - momentum) * expected[layer] + momentum * mean
        torch.testing.assert_close(norm.running_mean, expected[layer], atol=1e-6, rtol=1e-5)


# --- Files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_checkpoint_brings_back_the_same_function(tmp_path):
    model, pc0, pc1 = seeded_model(), cloud(100), cloud(100, seed=1)
    torch.save(fastflow3d.checkpoint_of(model), tmp_path / "student.pt")
    loaded = fastflow3d.load_checkpoint(tmp_path / "student.pt")
    assert not loaded.training and loaded.settings == model.settings
    assert torch.equal(loaded([pc0], [pc1])[0][0], model([pc0], [pc1])[0][0])


class _RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_checkpoint_are_named_and_code_is_not_run(tmp_path):
    torch.save({"model": _RunsCode(tmp_path / "made by code")}, tmp_path / "code.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:100])
    for name in ("code.pt", "other.pt", "torn.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a checkpoint of train.py"):
            fastflow3d.load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere.pt: no such file"):
        fastflow3d.load_checkpoint(tmp_path / "nowhere.pt")
    assert not (tmp_path / "made by code").exists()
