"""The faster form of the student, compared with the plain student and with the student itself."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from plain_student import (
    NORMAL,
    SMALLEST,
    TINY,
    XL,
    a_model,
    assert_is_the_plain_student,
    cloud,
    odd_batch,
    odd_cloud,
    plain_student,
    seeded_model,
)

import fastflow3d
import inference
from fastflow3d import MODELS, FastFlow3D


def watch_steps(monkeypatch) -> list:
    """A list that grows by one with each decoder step computed only where it is needed."""
    steps, step_at = [], inference._step_at
    monkeypatch.setattr(inference, "_step_at", lambda *args: steps.append(1) or step_at(*args))
    return steps


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [NORMAL, XL, TINY, SMALLEST], ids=["normal", "xl", "tiny", "smallest"]
)
@pytest.mark.parametrize("share", [-1.0, 0.4, 1.0], ids=["dense", "part sparse", "sparse"])
def test_the_fast_student_is_the_plain_one(settings, share, monkeypatch):
    """Point by point, whatever the points are, and whether decoder steps are computed everywhere,
    only where needed, or some this way and some that."""
    model, (pc0s, pc1s) = a_model(settings), odd_batch(settings)
    is_mixed = share == 0.4 and settings is not SMALLEST
    if is_mixed:  # points in a corner of the map only
        is_kept = [(pc0 > 0).all(dim=1) | pc0.isnan().any(dim=1) for pc0 in pc0s[:2]]
        pc0s[:2] = [pc0[mask] for pc0, mask in zip(pc0s[:2], is_kept, strict=True)]
        steps = watch_steps(monkeypatch)
    monkeypatch.setattr(inference, "SPARSE_FROM", 0)
    monkeypatch.setattr(inference, "SPARSE_SHARE", share)
    assert_is_the_plain_student(model.prepare_inference(), model, pc0s, pc1s)
    if is_mixed:
        assert 0 < len(steps) < len(settings.level_blocks)


@torch.no_grad()
def test_both_forms_are_the_plain_student_at_full_size_too():
    """512 x 512 cells, the published normal model, sparse clouds over all of the grid."""
    pc0, pc1 = (cloud(3000, seed, half=52.0) for seed in (0, 1))
    model = seeded_model(MODELS["normal"], pc0, pc1)
    (expected,), (cells,) = plain_student(model.state_dict(), model.settings, [pc0], [pc1])
    for run in (model, model.prepare_inference()):
        (flow,), (inside,) = run([pc0], [pc1])
        torch.testing.assert_close(flow, expected, atol=2e-5, rtol=0)
        assert inside.tolist() == [cell is not None for cell in cells]


def test_the_sparse_decoder_on_a_map_of_3_x_3_pixels(monkeypatch):
    """The example of `_pixels_needed` and `_rows_around`, and torch's own convolution."""
    monkeypatch.setattr(inference, "SPARSE_SHARE", 1.0)
    is_asked = torch.tensor([[[1, 0, 0], [0, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    (needed,) = inference._pixels_needed(is_asked, [2])
    assert needed[2].equal(is_asked)
    assert needed[1].int().tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 0]]]
    assert needed[0].all()
    around = inference._rows_around(needed[1], needed[2])
    assert around.tolist() == [[0] * 9, [0, 0, 0, 0, 1, 2, 0, 3, 4]]

    # The convolution at pixel a, from the rows of a, b, d, e alone.
    conv = torch.nn.Conv2d(5, 7, 3, padding=1)
    maps = torch.randn(1, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    known = fastflow3d.pixels(maps)[[0, 1, 3, 4]]
    x = torch.cat([torch.zeros(1, 5), known])
    result = inference._convolve_rows(x, around, conv)
    torch.testing.assert_close(result[1], conv(maps)[0, :, 0, 0])


def test_without_inference_py_the_message_tells_to_copy_it(tmp_path):
    shutil.copy(fastflow3d.__file__, tmp_path)
    narrow = "fastflow3d.FastFlow3D(fastflow3d.MODELS['narrow'])"
    code = f"import fastflow3d; {narrow}.prepare_inference()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ImportError: prepare_inference: copy inference.py too" in done.stderr


@torch.no_grad()
def test_bfloat16_changes_flows_by_millimeters():
    """The fast one in bfloat16, and the model under autocast; coordinates must stay float32."""
    model, (pc0, pc1) = a_model(NORMAL), (odd_cloud(NORMAL, 1), odd_cloud(NORMAL, 2))
    (flow,), (inside,) = model([pc0], [pc1])
    dtypes = {}
    linear = model.embedder.feature_net.pfn_layers[0][0]
    layers = linear, model.backbone.encoder_step_1[0].conv, model.head.decoder[0]

    def note(layer, _, x):
        dtypes[layer] = x.dtype

    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.autocast("cpu", torch.bfloat16):
        (autocast,), _ = model([pc0], [pc1])
    wanted = [torch.float32, torch.bfloat16, torch.float32]
    assert [dtypes[layer] for layer in layers] == wanted
    for hook in hooks:
        hook.remove()
    prepared = model.prepare_inference(torch.bfloat16)
    layers = prepared.pillar_net, prepared.encoder[0][0], prepared.out
    for layer in layers:
        layer.register_forward_hook(note)
    (fast,), _ = prepared([pc0], [pc1])
    assert [dtypes[layer] for layer in layers] == wanted
    with torch.autocast("cpu", torch.bfloat16):  # no effect: the model has its own dtype
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
    assert not before.requires_grad
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_no_shape_depends_on_where_points_lie(monkeypatch):
    """As a CUDA graph needs it. On the meta device tensors have no values: asking for one fails."""
    model, points = FastFlow3D(TINY), torch.empty(2, 70, 3, device="meta")
    fast = model.prepare_inference()
    fast._graph = "captured where its tensors were"
    fast.to("meta")
    assert fast._graph is None
    flow, inside = fast._flow(points)
    assert flow.shape == (1, 70, 3) and inside.shape == (1, 70)

    # Nor does one of the model to train, whether it trains or not. (There is no autocast for meta.)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    for training in (True, False):
        flows, masks = model.to("meta").train(training)([points[0], points[0, :9]], list(points))
        assert [flow.shape for flow in flows] == [(70, 3), (9, 3)]
        assert [mask.shape for mask in masks] == [(70,), (9,)]
        sum(flow.sum() for flow in flows).backward()


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_fast_model_is_the_same_function(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, (pc0s, pc1s) = a_model(NORMAL), odd_batch(NORMAL)
    expected, masks = model(pc0s, pc1s)
    model.cuda()
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2.5e-2)):
        fast = model.prepare_inference(dtype)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2], [0, 1, 2, 3]):  # captured, replayed, again
            clouds = [[pcs[i].cuda() for i in order] for pcs in (pc0s, pc1s)]
            flows, insides = fast(*clouds)
            torch.cuda.set_sync_debug_mode("error")  # waiting for the device is now an error
            again, _ = fast(*clouds)
            torch.cuda.set_sync_debug_mode("default")
            for i, flow, same, inside in zip(order, flows, again, insides, strict=True):
                torch.testing.assert_close(flow.cpu(), expected[i], atol=bound, rtol=0)
                torch.testing.assert_close(same, flow, atol=bound, rtol=0)
                assert torch.equal(inside.cpu(), masks[i])
