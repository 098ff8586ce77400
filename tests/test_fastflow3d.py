"""The student, compared with the published names and shapes and with a deliberately plain student.

plain_student.py holds the latter. test_inference.py tests the faster form.
"""

import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
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
    pillars_cloud_by_cloud,
    plain_student,
    seeded_model,
)

import fastflow3d
from fastflow3d import MODELS, FastFlow3D

# --- What was published ---


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"), [("normal", 6_815_619, 148), ("xl", 110_618_147, 198)]
)
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


# --- Points to pillars ---


def test_cells_are_the_floor_of_a_float32_division():
    """On cell borders, one float32 beside them, and at float16 coordinates: as numpy's float32."""
    settings = MODELS["normal"]
    borders = (np.arange(-260, 261) * np.float32(0.2)).astype(np.float32)
    halves = np.linspace(-52, 52, 40_000).astype(np.float16).astype(np.float32)
    below, above = (np.nextafter(borders, np.float32(end)) for end in (-99, 99))
    x = np.concatenate([borders, above, below, halves])
    points = np.stack([x, x[::-1], np.zeros_like(x)], axis=1)
    cell, center = fastflow3d.assign_cells(torch.from_numpy(points), settings)
    index = np.floor((points[:, :2] - np.float32(-51.2)) / np.float32(0.2))
    inside = ((index >= 0) & (index < 512)).all(axis=1)
    np.testing.assert_array_equal(cell, np.where(inside, index[:, 1] * 512 + index[:, 0], -1))
    assert (np.abs(points - center.numpy())[inside][:, :2] <= 0.1001).all()
    wrong = np.floor((points[:, 0].astype(np.float64) + 51.2) / 0.2)
    assert (wrong != index[:, 0]).sum() > 100, "float64 would have put these points elsewhere"


def test_points_outside_the_grid_and_nan_have_no_cell():
    first_cell = [[-6.4, -6.4, -3]]
    outside = [[6.4, 0, 0], [0, -6.41, 0], [0, 0, 3], [0, 0, -3.01]]
    not_finite = [[torch.nan, 0, 0], [0, 0, torch.inf]]
    points = torch.tensor(first_cell + outside + not_finite)
    assert fastflow3d.assign_cells(points, TINY)[0].tolist() == [0, -1, -1, -1, -1, -1, -1]
    second_row_first_column = torch.tensor([[-6.4, -5.9, 0.0]])
    assert fastflow3d.assign_cells(second_row_first_column, TINY)[0].item() == 32


def embed_and_backpropagate(
    embedder: torch.nn.Module, embed, batches: list[list[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Images of each batch, then the gradients of a random sum of them, and the buffers."""
    generator = torch.Generator().manual_seed(9)
    results, total = {}, 0
    for i, clouds in enumerate(batches):
        images = embed(embedder, clouds)
        direction = torch.randn(images.shape, generator=generator)
        total = total + (images * direction.to(images.dtype)).sum()
        results[f"images {i}"] = images.detach()
    total.backward()
    results |= {name: parameter.grad for name, parameter in embedder.named_parameters()}
    return results | dict(embedder.named_buffers())


def all_at_once(embedder, clouds):
    return embedder(clouds)[0]


def odd_batches(settings) -> list[list[torch.Tensor]]:
    """Two micro-batches with clouds of no point, one, two equal points, and none in the grid."""
    nothing, one = torch.zeros(0, 3), torch.tensor([[0.1, 0.2, 0.3]])
    clouds = [odd_cloud(settings, seed) for seed in range(4)]
    outside = torch.full((5, 3), 99.0)
    first = [clouds[0], nothing, one, clouds[1] * 0.5, outside]
    return [first, [one - 0.5, one.expand(2, 3), clouds[2][:100], clouds[3], one]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [NORMAL, SMALLEST], ids=["normal", "smallest"])
def test_pillars_of_a_batch_at_once_are_those_of_its_clouds_one_by_one(settings, training):
    """Images, gradients and running statistics: to 1e-6 of their size, and in float64 to 1e-10."""
    embedder = a_model(settings).embedder.train(training)
    double, batches = copy.deepcopy(embedder).double(), odd_batches(settings)

    # Float32 coordinates beside a border lie in other cells than the same ones in float64.
    in_double = [[cloud.double() for cloud in clouds] for clouds in batches]
    for run, clouds, bound in ((embedder, batches, 1e-6), (double, in_double, 1e-10)):
        exact = copy.deepcopy(double)
        found = embed_and_backpropagate(run, all_at_once, clouds)
        expected = embed_and_backpropagate(exact, pillars_cloud_by_cloud, clouds)
        for name, right in expected.items():
            assert (found[name] - right).double().norm() <= bound * right.double().norm(), name
    counted = embedder.feature_net.pfn_layers[0][1].num_batches_tracked
    assert counted == (5 if training else 0)  # the clouds of at least two points in the grid


def test_pillars_of_a_batch_are_the_same_each_time(four_threads):
    """To the last digit, in whatever order threads finish."""
    batches = [[cloud(20_000, seed) for seed in range(3)], [cloud(9_000, seed=3), cloud(1)]]
    model = a_model().train()
    results = []
    for _ in range(4):
        embedder = copy.deepcopy(model.embedder)
        results.append(embed_and_backpropagate(embedder, all_at_once, batches))
    for result in results[1:]:
        assert all(torch.equal(result[name], first) for name, first in results[0].items())


# --- The whole function, against the plain one ---


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [NORMAL, XL, TINY, SMALLEST], ids=["normal", "xl", "tiny", "smallest"]
)
def test_the_student_is_the_plain_one(settings):
    """In evaluation mode, point by point, whatever the points are."""
    model = a_model(settings)
    assert_is_the_plain_student(model, model, *odd_batch(settings))


@pytest.fixture
def four_threads():
    """torch's batch norm sums a channels_last map in float32, once per thread.

    With one thread the sum is so long that it is off by 1e-3.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("settings", [TINY, XL, SMALLEST], ids=["tiny", "xl", "smallest"])
def test_in_training_gradients_and_running_statistics_are_the_plain_ones(settings, four_threads):
    """Statistics are per cloud in the pillar net, per sweep in the U-Net, and sweep 0 comes first.

    A cloud of one point has no variance and takes the running statistics; an empty one needs none.
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
    directions = []
    for flow in flows:
        generator = torch.Generator().manual_seed(5)
        directions.append(torch.randn(flow.shape, generator=generator))
    sum((flow * way).sum() for flow, way in zip(flows, directions, strict=True)).backward()
    sum((flow * way).sum() for flow, way in zip(expected, directions, strict=True)).backward()

    for flow, right in zip(flows, expected, strict=True):
        torch.testing.assert_close(flow, right, atol=5e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        ours, right = parameter.grad, state[name].grad
        if "encoder" in name and name.endswith("conv.bias") and right.norm() < 1e-3:
            assert ours.norm() < 1e-3, name  # batch norm subtracts the mean: zero up to rounding
        else:
            assert right.norm() > 1e-3, f"{name}: so small a gradient would test nothing"
            assert (ours - right).norm() < 1e-3 * right.norm(), name
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, state[name], atol=1e-5, rtol=1e-5, msg=name)
    pillar_norm = model.embedder.feature_net.pfn_layers[0][1]
    assert pillar_norm.num_batches_tracked == 4  # two clouds of each sweep


@torch.no_grad()
@pytest.mark.parametrize("settings", [NORMAL, XL], ids=["normal", "xl"])
def test_ten_percent_more_of_any_tensor_changes_some_flow_by_a_millimeter(settings):
    """So every tensor is used, and in its own place, and the tests above depend on all of them."""
    model, half = a_model(settings), settings.half_extent_m[0]
    pc0, pc1 = cloud(1500, 0, half), cloud(1500, 1, half)
    (flow,), _ = model([pc0], [pc1])
    assert flow.norm(dim=1).quantile(0.05) > 0.1 and flow.norm(dim=1).quantile(0.95) < 1
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            before = tensor.clone()
            tensor *= 1.1
            assert (model([pc0], [pc1])[0][0] - flow).norm(dim=1).max() > 1e-3, name
            tensor.copy_(before)


# --- Invariances ---


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


def test_gradients_are_the_same_each_time_in_whatever_order_threads_finish():
    """Many points in few cells: sums in another order would differ in the last digit."""
    pc0, pc1 = cloud(20_000), cloud(20_000, seed=1)
    gradients = []
    for _ in range(4):
        model = a_model().train()
        model([pc0], [pc1])[0][0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_inputs_that_are_not_clouds_are_refused():
    model, points = a_model(), cloud(10)
    for run in (model, model.prepare_inference()):
        for pc0s, pc1s, message in (
            ([points], [], "1 clouds of sweep 0 and 0 of sweep 1"),
            ([], [], "at least one"),
            ([points[:, :2]], [points], r"\(10, 2\)"),
            ([points], [points.double()], "float64"),
            ([points.half()], [points], "float16"),
        ):
            with pytest.raises(ValueError, match=message):
                run(pc0s, pc1s)


def test_settings_that_do_not_make_a_grid_are_refused():
    for change, message in (
        ({"cell_m": 0.3}, "multiple of 8 cells"),
        ({"cell_m": 0.0}, "must be positive"),
        ({"half_extent_m": (51.2, float("inf"), 3.0)}, "must be positive"),
        ({"half_extent_m": (51.2, 51.2)}, "must be positive, x, y and z"),
        ({"half_extent_m": (51.2, 51.0, 3.0)}, "102.0 m in cells of 0.2 m"),
        ({"level_blocks": (4, 6)}, "3 level_channels for 2 level_blocks"),
        ({"half_extent_m": (0.8, 0.8, 3.0)}, "8 x 8 cells make the coarsest map a single pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(MODELS["normal"], **change)


# --- Files ---


def lightning(state: dict) -> dict:
    """A published file: what PyTorch Lightning writes around the tensors."""
    return {
        "epoch": 49,
        "global_step": 39650,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 50}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
        "optimizer_states": [
            {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-6}]}
        ],
        "lr_schedulers": [],
    }


@torch.no_grad()
def test_a_checkpoint_brings_back_the_same_function(tmp_path):
    model, pc0, pc1 = a_model(), cloud(100), cloud(100, seed=1)
    torch.save(fastflow3d.checkpoint_of(model), tmp_path / "student.pt")
    loaded = fastflow3d.load_checkpoint(tmp_path / "student.pt")
    assert not loaded.training and loaded.settings == model.settings and not loaded.is_foreign
    assert torch.equal(loaded([pc0], [pc1])[0][0], model([pc0], [pc1])[0][0])
    with torch.enable_grad():
        flows, _ = loaded.train()([pc0], [pc1])  # and it can be trained on
        flows[0][:5] = 0.0  # the caller's own, to change in place
        flows[0].sum().backward()

    halves = {}
    for name, tensor in model.state_dict().items():
        halves[name] = tensor.half() if tensor.is_floating_point() else tensor
    torch.save(fastflow3d.checkpoint_of(model) | {"model": halves}, tmp_path / "half.pt")
    parameters = fastflow3d.load_checkpoint(tmp_path / "half.pt").parameters()
    assert {tensor.dtype for tensor in parameters} == {torch.float32}


def test_names_that_torchs_wrappers_have_given_are_understood(tmp_path):
    model = FastFlow3D(TINY)
    compiled = copy.deepcopy(model)
    compiled.backbone = torch.compile(compiled.backbone)  # compiles nothing before it is called
    whole = torch.compile(model)
    own = fastflow3d.checkpoint_of(model)
    for names in (
        compiled.state_dict(),
        whole.state_dict(),
        {f"module.{name}": tensor for name, tensor in own["model"].items()},
        {f"module.{name}": tensor for name, tensor in whole.state_dict().items()},
        {f"_orig_mod.module.{name}": tensor for name, tensor in own["model"].items()},
    ):
        assert set(names) != set(own["model"])
        torch.save(own | {"model": names}, tmp_path / "wrapped.pt")
        loaded = fastflow3d.load_checkpoint(tmp_path / "wrapped.pt").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in own["model"].items())
    twice = own["model"] | {"module.head.decoder.0.bias": torch.zeros(16)}
    torch.save(own | {"model": twice}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="two tensors are called head.decoder.0.bias"):
        fastflow3d.load_checkpoint(tmp_path / "twice.pt")


def test_a_published_file_is_recognized_and_its_tensors_are_all_there(tmp_path):
    state = seeded_model(MODELS["normal"], cloud(10), cloud(10)).state_dict()
    torch.save(lightning(state), tmp_path / "normal.ckpt")
    loaded = fastflow3d.load_checkpoint(tmp_path / "normal.ckpt")
    assert not loaded.training and loaded.settings == MODELS["normal"] and loaded.is_foreign
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())

    with torch.device("meta"):
        shapes = FastFlow3D(MODELS["xl"]).state_dict()
    # One number per tensor, expanded: a small file.
    state = {name: torch.ones((), dtype=t.dtype).expand(t.shape) for name, t in shapes.items()}
    torch.save(lightning(state), tmp_path / "xl.ckpt")
    assert fastflow3d.load_checkpoint(tmp_path / "xl.ckpt").settings == MODELS["xl"]


def test_wrong_tensors_are_named(tmp_path):
    state = FastFlow3D(TINY).state_dict()
    state["backbone.encoder_step_1.0.conv.bias"] = torch.zeros(7)
    state["head.decoder.2.bias"] = torch.full((3,), torch.nan)
    state["head.decoder.9.bias"] = state.pop("head.decoder.0.bias")
    u3_bias = "backbone.decoder_step1.u3.bias"
    state[u3_bias] = state[u3_bias].to(torch.complex64)
    own = {"model_settings": dataclasses.asdict(TINY), "model": state}
    torch.save(own, tmp_path / "own.pt")
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
    with pytest.raises(
        ValueError, match="student it should: backbone.decoder_step5.bias is missing$"
    ):
        fastflow3d.load_checkpoint(tmp_path / "xl.ckpt")  # recognized as XL all the same


class _RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_files_that_are_not_checkpoints_are_named_and_code_is_not_run(tmp_path):
    model = FastFlow3D(TINY)
    torch.save({"model": _RunsCode(tmp_path / "made by code")}, tmp_path / "code.pt")
    with_code = lightning(model.state_dict()) | {"callbacks": _RunsCode(tmp_path / "made by code")}
    torch.save(with_code, tmp_path / "code.ckpt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.txt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    sparse = {name: tensor.to_sparse() for name, tensor in model.state_dict().items()}
    torch.save(fastflow3d.checkpoint_of(model) | {"model": sparse}, tmp_path / "sparse.pt")
    torch.save({"state_dict": {"model.x": "not a tensor"}}, tmp_path / "text.pt")
    no_grid = fastflow3d.checkpoint_of(model) | {"model_settings": {"cell_m": 0.0}}
    torch.save(no_grid, tmp_path / "settings.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:100])
    names = ("code.pt", "code.ckpt", "other.pt", "list.pt", "text.pt", "settings.pt", "torn.pt")
    names += ("tensor.pt", "text.txt", "empty.pt", "sparse.pt")
    for name in names:
        message = f"{name}: (not a checkpoint of train.py|does not hold)"
        with pytest.raises(ValueError, match=message) as caught:
            fastflow3d.load_checkpoint(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's advice is to run the code
    with pytest.raises(ValueError, match="nowhere.pt: no such file"):
        fastflow3d.load_checkpoint(tmp_path / "nowhere.pt")
    assert not (tmp_path / "made by code").exists()
