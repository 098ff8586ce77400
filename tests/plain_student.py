"""The student again, written as plainly as possible: loops over points and cells.

It follows the published description alone and shares no code with fastflow3d.py, only the names of
the tensors. It is slow; the tests compare the student with it. Below it are the small students and
the clouds that these tests use.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from fastflow3d import MODELS, FastFlow3D, FastFlow3DSettings, assign_cells

# 32 x 32 cells
TINY = dataclasses.replace(MODELS["narrow"], half_extent_m=(6.4, 6.4, 3.0))

# the published channels, 64 x 64 cells
NORMAL = dataclasses.replace(MODELS["normal"], half_extent_m=(6.4, 6.4, 3.0))

# the published levels and blocks, an eighth of the channels, 64 x 64 cells
XL = dataclasses.replace(
    MODELS["xl"],
    half_extent_m=(3.2, 3.2, 3.0),
    pillar_channels=8,
    level_channels=(16, 32, 64, 128),
)

# 8 x 16 cells, so that rows and columns differ; the coarsest map is as small as it may be, 1 x 2
SMALLEST = dataclasses.replace(TINY, half_extent_m=(3.2, 1.6, 3.0))


def seeded_model(
    settings: FastFlow3DSettings, pc0: torch.Tensor, pc1: torch.Tensor, seed: int = 0
) -> FastFlow3D:
    """A student in evaluation mode with random tensors, whose flow of this pair is decimeters.

    On the tests' clouds, 10 % more of any tensor changes some flow by over a millimeter (a test
    checks that), so that no error in any tensor can hide.
    """
    generator = torch.Generator().manual_seed(seed)
    model = FastFlow3D(settings).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            # Each GELU makes features smaller. The encoder's weights make up for it, so that the
            # features of all of its layers have an effect.
            gain = 2.5 if "encoder" in name or "embedder" in name else 1.0
            tensor.copy_(noise * (gain / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_((0.2 * noise).exp())
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(0.45 * noise)
        elif name.endswith("weight"):  # of a batch norm
            tensor.copy_(1 + 0.1 * noise)
    # Coordinates reach tens of meters, offsets within a cell decimeters: give both the same effect.
    pillar_weight = state["embedder.feature_net.pfn_layers.0.0.weight"]
    pillar_weight *= 3
    pillar_weight[:, :3] /= torch.tensor(settings.half_extent_m)
    # Scale the output, so that the flow of this pair has a known spread and mean.
    with torch.no_grad():
        (flow,), (is_in_grid,) = model([pc0], [pc1])
        scale = 0.15 / flow[is_in_grid].std(dim=0)
        state["head.decoder.2.weight"] *= scale[:, None]
        shift = torch.tensor([0.3, -0.3, 0.1]) - scale * flow[is_in_grid].mean(dim=0)
        state["head.decoder.2.bias"].mul_(scale).add_(shift)
    return model


def plain_student(
    state: dict[str, torch.Tensor],
    settings: FastFlow3DSettings,
    pc0s: list[torch.Tensor],
    pc1s: list[torch.Tensor],
    training: bool = False,
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Flows (N0, 3), and each point's (row, column) or None where it is outside.

    In training, the running statistics in `state` are updated.
    """
    images0, cells0 = zip(
        *[_picture(state, settings, points, training) for points in pc0s], strict=True
    )
    images1, _ = zip(*[_picture(state, settings, points, training) for points in pc1s], strict=True)
    image0, image1 = torch.stack(images0), torch.stack(images1)
    motion = _unet(state, settings, image0, image1, training)
    flows = []
    for sample, (points, cells) in enumerate(zip(pc0s, cells0, strict=True)):
        flow = [torch.zeros(3)] * len(points)
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            # The head: what the pillar knows, and where in its cell the point lies.
            row, column = cell
            known = [maps[sample, :, row, column] for maps in (image0, image1, motion)]
            x = torch.cat([*known, points[i] - _center(settings, row, column)])
            hidden = state["head.decoder.0.weight"] @ x + state["head.decoder.0.bias"]
            flow[i] = state["head.decoder.2.weight"] @ _gelu(hidden) + state["head.decoder.2.bias"]
        flows.append(torch.stack(flow) if flow else torch.zeros(0, 3))
    return flows, list(cells0)


def _picture(state, settings, points, training) -> tuple[torch.Tensor, list]:
    """One cloud's pseudo-image (C, Y, X), and the cell of each of its points."""
    # Which cell does each point lie in? numpy's float32 division is the published one.
    rows, columns = settings.cells
    size, half = np.float32(settings.cell_m), np.float32(settings.half_extent_m)
    cells = []
    for x, y, z in points.numpy():
        index = None
        if -half[2] <= z < half[2]:  # False for NaN
            with np.errstate(invalid="ignore"):
                column, row = np.floor((x + half[0]) / size), np.floor((y + half[1]) / size)
            if 0 <= column < columns and 0 <= row < rows:
                index = int(row), int(column)
        cells.append(index)
    members = {}
    for i, index in enumerate(cells):
        if index is not None:
            members.setdefault(index, []).append(i)
    weight = state["embedder.feature_net.pfn_layers.0.0.weight"]
    image = torch.zeros(len(weight), rows, columns)
    if not members:
        return image, cells

    # Nine numbers per point, cell by cell; then linear, norm, ReLU, and the mean of each cell.
    features = []
    for (row, column), mine in members.items():
        p = points[mine]
        features.append(
            torch.cat([p, p - p.mean(dim=0), p - _center(settings, row, column)], dim=1)
        )
    x = torch.cat(features) @ weight.T
    x = _norm(state, "embedder.feature_net.pfn_layers.0.1", x, 1e-3, 0.01, training).clamp(min=0)
    means = [part.mean(dim=0) for part in x.split([len(mine) for mine in members.values()])]
    row, column = torch.tensor(list(members)).T
    where = torch.arange(len(image))[:, None], row, column
    return image.index_put(where, torch.stack(means, dim=1)), cells


def _center(settings, row, column) -> torch.Tensor:
    half = settings.half_extent_m
    x = (column + 0.5) * settings.cell_m - half[0]
    y = (row + 0.5) * settings.cell_m - half[1]
    return torch.tensor([x, y, 0.0])


def _unet(state, settings, image0, image1, training) -> torch.Tensor:
    def conv(x, name, **how):
        return F.conv2d(x, state[f"backbone.{name}.weight"], state[f"backbone.{name}.bias"], **how)

    def encode(image):
        maps = [image]
        for level, count in enumerate(settings.level_blocks, start=1):
            x = maps[-1]
            for i in range(count):
                name = f"encoder_step_{level}.{i}"
                x = conv(x, f"{name}.conv", stride=2 if i == 0 else 1, padding=1)
                x = _norm(state, f"backbone.{name}.batchnorm", x, 1e-5, 0.1, training)
                x = _gelu(x)
            maps.append(x)
        return maps

    # One sweep after the other: in training, batch norm takes its statistics per sweep.
    before, after = encode(image0), encode(image1)
    both = [torch.cat(pair, dim=1) for pair in zip(before, after, strict=True)]
    x = both[-1]
    for step, skip in enumerate(reversed(both[:-1]), start=1):
        a = conv(x, f"decoder_step{step}.u1_u2.0")
        a = F.interpolate(a, scale_factor=2, mode="bilinear", align_corners=False)
        b = conv(skip, f"decoder_step{step}.u3")
        x = conv(torch.cat([a, b], dim=1), f"decoder_step{step}.u4_u5.0", padding=1)
        x = conv(x, f"decoder_step{step}.u4_u5.1", padding=1)
    return conv(x, f"decoder_step{len(settings.level_blocks) + 1}", padding=1)


def _norm(state, name, x, eps, momentum, training) -> torch.Tensor:
    """Batch norm by its formula; x (N, C) or (B, C, Y, X)."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    axes = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1]
    if training and count > 1:  # a single point takes the running statistics
        batch_mean, batch_var = x.mean(dim=axes), x.var(dim=axes, unbiased=False)
        unbiased_var = batch_var * count / (count - 1)
        with torch.no_grad():
            state[f"{name}.num_batches_tracked"] += 1
            state[f"{name}.running_mean"] = (1 - momentum) * mean + momentum * batch_mean
            state[f"{name}.running_var"] = (1 - momentum) * var + momentum * unbiased_var
        mean, var = batch_mean, batch_var
    shape = (-1, *[1] * (x.ndim - 2))
    weight, bias = state[f"{name}.weight"].view(shape), state[f"{name}.bias"].view(shape)
    return (x - mean.view(shape)) / (var.view(shape) + eps).sqrt() * weight + bias


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


# --- Pillars cloud by cloud ---


def pillars_cloud_by_cloud(embedder: torch.nn.Module, clouds: list[torch.Tensor]) -> torch.Tensor:
    """Pseudo-images (B, C, Y, X), made one after the other with torch's own batch norm.

    In training, running statistics are updated after each cloud. An embedder in float64 may be
    given float32 clouds: their cells are found in float32, and the rest is exact.
    """
    settings, pixels, features = embedder.settings, [], []
    rows, columns = settings.cells
    linear, norm, _ = embedder.feature_net.pfn_layers[0]
    for i, cloud in enumerate(clouds):
        cell, center = assign_cells(cloud, settings)
        inside = cell >= 0
        p, offset = (x[inside].to(linear.weight.dtype) for x in (cloud, cloud - center))
        used, pillar, size = cell[inside].unique(return_inverse=True, return_counts=True)

        def mean(values: torch.Tensor, pillar=pillar, size=size) -> torch.Tensor:
            sums = values.new_zeros(len(size), values.shape[1]).index_add(0, pillar, values)
            return sums / size[:, None]

        x = linear(torch.cat([p, p - mean(p)[pillar], offset], dim=1))
        if len(x) > 1 or not embedder.training:
            x = norm(x)
        else:
            # torch refuses to take the variance of a single point. The copies keep what the next
            # clouds do to the running statistics out of this one's gradient.
            running = norm.running_mean.clone(), norm.running_var.clone()
            x = F.batch_norm(x, *running, norm.weight, norm.bias, eps=norm.eps)
        features.append(mean(x.relu()))  # (K, C)
        pixels.append(i * rows * columns + used)  # (K,)
    images = x.new_zeros(len(clouds) * rows * columns, x.shape[1])
    images.index_copy_(0, torch.cat(pixels), torch.cat(features))
    return images.unflatten(0, (len(clouds), rows, columns)).permute(0, 3, 1, 2)


# --- What the tests share ---


def cloud(n: int, seed: int = 0, half: float = 6.0) -> torch.Tensor:
    """n points (n, 3) anywhere in [-half, half) in x and y, and 0.4 of that in z."""
    points = half * (2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) - 1)
    return points * torch.tensor([1.0, 1.0, 0.4])


def a_model(settings: FastFlow3DSettings = TINY, seed: int = 0) -> FastFlow3D:
    """A `seeded_model` whose flow of clouds that fill its grid is decimeters."""
    half = settings.half_extent_m[0]
    return seeded_model(settings, cloud(1500, half=half), cloud(1500, seed=1, half=half), seed)


def odd_cloud(settings: FastFlow3DSettings, seed: int) -> torch.Tensor:
    """Points that are ordinary, on cell borders, one float32 beside, outside, NaN, repeated."""
    half, size = np.float32(settings.half_extent_m[0]), np.float32(settings.cell_m)
    borders = (np.arange(settings.cells[1] + 1) * size - half).astype(np.float32)
    below, above = (np.nextafter(borders, np.float32(end)) for end in (-99, 99))
    x = np.concatenate([borders, below, above, borders.astype(np.float16).astype(np.float32)])
    y = np.random.default_rng(seed).permutation(x)
    on_borders = torch.from_numpy(np.stack([x, y, 0 * x], axis=1))
    outside = torch.tensor([[half, 0, 0], [0, -2 * half, 0], [0, 0, 3], [0, 0, -3.001]])
    not_finite = torch.tensor([[np.nan, 0, 0], [0, 0, np.nan], [0, -np.inf, 0]])
    repeated = cloud(1, seed).expand(7, 3) * (half / 6)
    points = torch.cat([cloud(400, seed, half), on_borders, outside, not_finite, repeated])
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]


def odd_batch(settings: FastFlow3DSettings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Four pairs of odd clouds, empty clouds and clouds of one point."""
    nothing, one = torch.zeros(0, 3), torch.tensor([[0.1, 0.1, 0.1]])
    pc0s = [odd_cloud(settings, 1), odd_cloud(settings, 2), nothing, one]
    return pc0s, [odd_cloud(settings, 3), nothing, odd_cloud(settings, 4), one]


def assert_is_the_plain_student(run, model: FastFlow3D, pc0s: list, pc1s: list) -> None:
    """run, some form of the model, gives the plain student's flow to 2e-5 m, in the same cells."""
    settings = model.settings
    flows, masks = run(pc0s, pc1s)
    expected, cells = plain_student(model.state_dict(), settings, pc0s, pc1s)
    for i in range(len(pc0s)):
        torch.testing.assert_close(flows[i], expected[i], atol=2e-5, rtol=0)
        assert masks[i].tolist() == [cell is not None for cell in cells[i]]
        found, _ = assign_cells(pc0s[i], settings)
        columns = settings.cells[1]
        right = [-1 if cell is None else cell[0] * columns + cell[1] for cell in cells[i]]
        assert found.tolist() == right
    assert masks[0].any() and not masks[0].all()
    speeds = flows[0][masks[0]].norm(dim=1)
    assert speeds.median() > 0.1 and speeds.max() > 0.3, "flows so small would hide errors"
