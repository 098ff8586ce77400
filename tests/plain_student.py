"""The student again, as plainly as can be: loops over points and cells, from the published description alone.

It shares no code with fastflow3d.py, only the names of the tensors. Slow; the tests compare with it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from fastflow3d import FastFlow3D, FastFlow3DSettings


def seeded_model(settings: FastFlow3DSettings, pc0: torch.Tensor, pc1: torch.Tensor, seed: int = 0) -> FastFlow3D:
    """A student, in evaluation mode, whose every tensor is random, and whose flow of this pair is decimetres.

    A tenth more of any tensor moves some flow by more than a millimetre, on the tests' clouds (a test says so).
    """
    generator = torch.Generator().manual_seed(seed)
    model = FastFlow3D(settings).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:  # what GELU takes, the encoder's weights give back, so that all of its layers count
            gain = 2.5 if "encoder" in name or "embedder" in name else 1.0
            tensor.copy_(noise * (gain / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_((0.2 * noise).exp())
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(0.45 * noise)
        elif name.endswith("weight"):  # of a batch norm
            tensor.copy_(1 + 0.1 * noise)
    pillar_weight = state["embedder.feature_net.pfn_layers.0.0.weight"]
    pillar_weight *= 3
    pillar_weight[:, :3] /= torch.tensor(settings.half_extent_m)
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
    """Flows, and each point's (row, column) or None. In training the running statistics in `state` are updated."""
    images0, cells0 = zip(*[_picture(state, settings, points, training) for points in pc0s], strict=True)
    images1, _ = zip(*[_picture(state, settings, points, training) for points in pc1s], strict=True)
    image0, image1 = torch.stack(images0), torch.stack(images1)
    motion = _unet(state, settings, image0, image1, training)
    flows = []
    for sample, (points, cells) in enumerate(zip(pc0s, cells0, strict=True)):
        flow = [torch.zeros(3)] * len(points)
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            row, column = cell
            known = [maps[sample, :, row, column] for maps in (image0, image1, motion)]
            x = torch.cat([*known, points[i] - _center(settings, row, column)])
            hidden = state["head.decoder.0.weight"] @ x + state["head.decoder.0.bias"]
            flow[i] = state["head.decoder.2.weight"] @ _gelu(hidden) + state["head.decoder.2.bias"]
        flows.append(torch.stack(flow) if flow else torch.zeros(0, 3))
    return flows, list(cells0)


def _picture(state, settings, points, training) -> tuple[torch.Tensor, list]:
    """One cloud's pseudo-image (C, Y, X), and the cell of each of its points."""
    rows, columns = settings.cells
    size, half = np.float32(settings.cell_m), np.float32(settings.half_extent_m)
    cells = []
    for x, y, z in points.numpy():
        index = None
        if -half[2] <= z < half[2]:  # what is NaN is not
            with np.errstate(invalid="ignore"):
                column, row = np.floor((x + half[0]) / size), np.floor((y + half[1]) / size)
            if 0 <= column < columns and 0 <= row < rows:
                index = int(row), int(column)
        cells.append(index)
    members = {}
    for i, index in enumerate(cells):
        if index is not None:
            members.setdefault(index, []).append(i)
    image = torch.zeros(state["embedder.feature_net.pfn_layers.0.0.weight"].shape[0], rows, columns)
    if not members:
        return image, cells
    features = []
    for (row, column), mine in members.items():
        p = points[mine]
        features.append(torch.cat([p, p - p.mean(dim=0), p - _center(settings, row, column)], dim=1))
    x = torch.cat(features) @ state["embedder.feature_net.pfn_layers.0.0.weight"].T
    x = _norm(state, "embedder.feature_net.pfn_layers.0.1", x, 1e-3, 0.01, training).clamp(min=0)
    means = [part.mean(dim=0) for part in x.split([len(mine) for mine in members.values()])]
    row, column = torch.tensor(list(members)).T
    return image.index_put((torch.arange(len(image))[:, None], row, column), torch.stack(means, dim=1)), cells


def _center(settings, row, column) -> torch.Tensor:
    half = settings.half_extent_m
    return torch.tensor([(column + 0.5) * settings.cell_m - half[0], (row + 0.5) * settings.cell_m - half[1], 0.0])


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
                if x.shape[-2:] != (1, 1):
                    x = _norm(state, f"backbone.{name}.batchnorm", x, 1e-5, 0.1, training)
                x = _gelu(x)
            maps.append(x)
        return maps

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
    if training and count > 1:
        batch_mean, batch_var = x.mean(dim=axes), x.var(dim=axes, unbiased=False)
        with torch.no_grad():
            state[f"{name}.num_batches_tracked"] += 1
            state[f"{name}.running_mean"] = (1 - momentum) * mean + momentum * batch_mean
            state[f"{name}.running_var"] = (1 - momentum) * var + momentum * batch_var * count / (count - 1)
        mean, var = batch_mean, batch_var
    shape = (-1, *[1] * (x.ndim - 2))
    weight, bias = state[f"{name}.weight"].view(shape), state[f"{name}.bias"].view(shape)
    return (x - mean.view(shape)) / (var.view(shape) + eps).sqrt() * weight + bias


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))
