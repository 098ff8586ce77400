"""The student: FastFlow3D (Jund et al., RA-L 2022) as ZeroFlow published it.

Both sweeps become pictures seen from above (pillars), a U-Net with shared weights looks at both, and a small head
gives every point of sweep 0 the flow of its pillar, corrected by where in the pillar the point lies.

Points are (N, 3) float32 in metres, in the ego frame of sweep 0, ground removed; flow is the residual displacement
after ego-motion, from sweep 0 to sweep 1; row i of a flow belongs to row i of its pc0. Batches are lists of clouds.
A point with a NaN coordinate or outside the grid gets flow 0 and False in `is_in_grid`. There is no cap on points.

Everything is as ZeroFlow's published code computes it, since its weights are what people have, and the names in
`state_dict()` are those of the published files without their prefix `model.`.

On a GPU, torch's convolutions are TF32 by default; for parity at 1e-4 set `torch.backends.cudnn.allow_tf32 = False`.

This file needs torch, and none of its siblings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class FastFlow3DSettings:
    """Size of the student. The defaults are the published normal model; see MODELS for the others."""

    half_extent_m: tuple[float, float, float] = (51.2, 51.2, 3.0)  # the grid is [-half, half) in x, y, z
    cell_m: float = 0.2  # side of a pillar
    pillar_channels: int = 32
    level_channels: tuple[int, ...] = (64, 128, 256)  # of the U-Net's encoder; each level halves the resolution
    level_blocks: tuple[int, ...] = (4, 6, 6)
    head_channels: int = 32

    @property
    def cells(self) -> tuple[int, int]:
        """(rows along y, columns along x) of the pseudo-image."""
        return tuple(round(2 * self.half_extent_m[axis] / self.cell_m) for axis in (1, 0))


MODELS = {
    "normal": FastFlow3DSettings(),  # 512 x 512 cells, 6.8 million parameters
    "xl": FastFlow3DSettings(
        cell_m=0.1, pillar_channels=64, level_channels=(128, 256, 512, 1024), level_blocks=(4, 6, 6, 6)
    ),  # 1024 x 1024 cells, 110.6 million parameters
    "narrow": FastFlow3DSettings(
        half_extent_m=(25.6, 25.6, 3.0),
        cell_m=0.4,
        pillar_channels=8,
        level_channels=(16, 32, 64),
        level_blocks=(2, 2, 2),
    ),  # ours, for a CPU and the small street: 128 x 128 cells, 0.24 million parameters
}


class FastFlow3D(nn.Module):
    """pillars -> pseudo-images (both frames) -> U-Net -> per-point head."""

    def __init__(self, settings: FastFlow3DSettings = MODELS["normal"]):
        super().__init__()
        self.settings = settings
        self.embedder = PillarEmbedder(settings)
        self.backbone = UNet(settings)
        self.head = PointHead(settings)

    def forward(
        self, pc0s: Sequence[torch.Tensor], pc1s: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Lists of clouds (N, 3) float32 -> list of flows (N0, 3) and list of is_in_grid (N0,) bool, one row a row.

        The order of the frames matters in training: running statistics see all of pc0 first, then pc1.
        """
        image0, cells0, offsets0 = self.embedder(pc0s)  # (B, C, Y, X), then a list a cloud
        image1, _, _ = self.embedder(pc1s)
        grid_flow = self.backbone(image0, image1)  # (B, 2C, Y, X)
        images = torch.cat([image0, image1], dim=1)  # (B, 2C, Y, X)
        flows, masks = [], []
        for pc0, cell, offset, image, motion in zip(pc0s, cells0, offsets0, images, grid_flow, strict=True):
            is_in_grid = cell >= 0  # (N,)
            flow = torch.zeros_like(pc0)
            flow[is_in_grid] = self.head(image, motion, cell[is_in_grid], offset[is_in_grid]).to(flow.dtype)
            flows.append(flow)
            masks.append(is_in_grid)
        return flows, masks


# --- Points to pillars to a picture ----------------------------------------------------------------------------------


class PillarEmbedder(nn.Module):
    """Clouds to pseudo-images: nine numbers a point, one linear layer, the mean over each pillar."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        self.settings = settings
        self.feature_net = PillarFeatureNet(settings.pillar_channels)

    def forward(self, clouds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """-> pseudo-images (B, C, Y, X); per cloud cell (N,) int64, -1 outside; offset to the cell's centre (N, 3)."""
        images, cells, offsets = [], [], []
        rows, columns = self.settings.cells
        for points in clouds:
            cell, center = assign_cells(points, self.settings)  # (N,), (N, 3)
            offset = points - center
            inside = cell >= 0
            image = self.feature_net(points[inside], offset[inside], cell[inside], rows * columns)  # (Y·X, C)
            images.append(image.T.reshape(-1, rows, columns))
            cells.append(cell)
            offsets.append(offset)
        return torch.stack(images), cells, offsets


def assign_cells(points: torch.Tensor, settings: FastFlow3DSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell (N,) int64, row · columns + column, -1 outside or NaN; and the centre (N, 3) of each point's cell.

    The published index is floor((p - min) / cell) of float32 *tensors*. Argoverse's float16 coordinates often lie
    exactly on cell borders, so the rounding matters: with float64, or with a multiplication by 1 / cell (what CUDA
    makes of a division by a Python number), hundreds of a sweep's points change cell and their flow changes by up to
    0.76 m. Hence both operands are tensors on the device.
    """
    rows, columns = settings.cells
    half = points.new_tensor(settings.half_extent_m)
    size = points.new_tensor((settings.cell_m, settings.cell_m, 2 * settings.half_extent_m[2]))
    index = ((points + half) / size).floor()  # (N, 3): column, row, 0; NaN stays NaN
    is_inside = ((index >= 0) & (index < index.new_tensor((columns, rows, 1)))).all(dim=1)
    cell = torch.where(is_inside, index[:, 1] * columns + index[:, 0], -1.0).long()  # exact: below 2**24
    return cell, (index + 0.5) * size - half


class PillarFeatureNet(nn.Module):
    """Linear, batch norm, ReLU on each point, then the mean over each cell."""

    def __init__(self, channels: int):
        super().__init__()
        norm = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)
        self.pfn_layers = nn.ModuleList([nn.Sequential(nn.Linear(9, channels, bias=False), norm, nn.ReLU())])

    def forward(self, points: torch.Tensor, offset: torch.Tensor, cell: torch.Tensor, cells: int) -> torch.Tensor:
        """points, offset (N, 3), cell (N,) in [0, cells) -> (cells, C), zero where no point lies."""
        from_mean = points - mean_by_cell(points, cell, cells)[cell]
        features = torch.cat([points, from_mean, offset], dim=1)  # (N, 9)
        linear, norm, relu = self.pfn_layers[0]
        features = linear(features)
        # Statistics are of one cloud at a time, as published; a single point has none and takes the running ones.
        if len(points) > 1 or not self.training:
            features = norm(features)
        else:
            features = F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return mean_by_cell(relu(features), cell, cells)


def mean_by_cell(values: torch.Tensor, cell: torch.Tensor, cells: int) -> torch.Tensor:
    """values (N, C), cell (N,) -> (cells, C): the mean of each cell's values, 0 where there are none."""
    sums = values.new_zeros(cells, values.shape[1]).index_add(0, cell, values)
    counts = values.new_zeros(cells).index_add(0, cell, values.new_ones(len(values)))
    return sums / counts.clamp(min=1)[:, None]


# --- The U-Net -------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two pseudo-images (B, C, Y, X) -> one map (B, 2C, Y, X). The encoder sees one frame at a time, weights shared."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        channels = [settings.pillar_channels, *settings.level_channels]  # finest to coarsest
        self.levels = len(settings.level_channels)
        for i, blocks in enumerate(settings.level_blocks):
            steps = [ConvBlock(channels[i], channels[i + 1], stride=2)]
            steps += [ConvBlock(channels[i + 1], channels[i + 1]) for _ in range(blocks - 1)]
            self.add_module(f"encoder_step_{i + 1}", nn.Sequential(*steps))
        # Going up, each step joins the coarser map and both frames' features one level finer.
        widths = [2 * c for c in reversed(channels)]  # coarsest to finest
        for i in range(self.levels):
            self.add_module(f"decoder_step{i + 1}", DecoderStep(widths[i], widths[i + 1]))
        self.add_module(f"decoder_step{self.levels + 1}", nn.Conv2d(widths[-1], widths[-1], 3, padding=1))

    def forward(self, image0: torch.Tensor, image1: torch.Tensor) -> torch.Tensor:
        # One frame after the other: in training, batch norm takes its statistics per frame, as published.
        features0, features1 = self._encode(image0), self._encode(image1)
        skips = [torch.cat(both, dim=1) for both in zip(features0, features1, strict=True)]  # finest first
        x = skips.pop()
        for i in range(self.levels):
            x = self.get_submodule(f"decoder_step{i + 1}")(x, skips.pop())
        return self.get_submodule(f"decoder_step{self.levels + 1}")(x)

    def _encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The pseudo-image and each level's map, each half as wide as the one before."""
        features = [image]
        for i in range(self.levels):
            features.append(self.get_submodule(f"encoder_step_{i + 1}")(features[-1]))
        return features


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm (but on a map of one pixel, which has no statistics), exact GELU."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
        self.batchnorm = nn.BatchNorm2d(c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if x.shape[-2:] != (1, 1):
            x = self.batchnorm(x)
        return F.gelu(x)


class DecoderStep(nn.Module):
    """Upsample the coarser map, join the finer skip. No norm, no activation: all of it is linear, as published."""

    def __init__(self, c_coarser: int, c_skip: int):
        super().__init__()
        upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.u1_u2 = nn.Sequential(nn.Conv2d(c_coarser, c_skip, 1), upsample)
        self.u3 = nn.Conv2d(c_skip, c_skip, 1)
        self.u4_u5 = nn.Sequential(nn.Conv2d(2 * c_skip, c_skip, 3, padding=1), nn.Conv2d(c_skip, c_skip, 3, padding=1))

    def forward(self, coarser: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.u4_u5(torch.cat([self.u1_u2(coarser), self.u3(skip)], dim=1))


# --- From the picture back to points ---------------------------------------------------------------------------------


class PointHead(nn.Module):
    """What the point's pillar knows (both pseudo-images, U-Net map) and where the point lies in it -> its flow."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        c_in = 4 * settings.pillar_channels + 3
        self.decoder = nn.Sequential(
            nn.Linear(c_in, settings.head_channels), nn.GELU(), nn.Linear(settings.head_channels, 3)
        )

    def forward(
        self, images: torch.Tensor, motion: torch.Tensor, cell: torch.Tensor, offset: torch.Tensor
    ) -> torch.Tensor:
        """images, motion (2C, Y, X); cell (N,); offset (N, 3) -> flow (N, 3) in metres."""
        # index_select, since the gradient of [cell] adds up in whatever order the threads come.
        per_point = [picture.flatten(1).T.index_select(0, cell) for picture in (images, motion)]  # 2 x (N, 2C)
        return self.decoder(torch.cat([*per_point, offset], dim=1))


# --- Files -----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> FastFlow3D:
    """The student in a checkpoint of train.py, on the CPU, in evaluation mode. Loads data, never code.

    Raises ValueError naming the file if it is no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = FastFlow3DSettings(**checkpoint["model_settings"])
        model = FastFlow3D(settings)
        model.load_state_dict(checkpoint["model"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; train.py writes checkpoints") from None
    except Exception as error:  # whatever a broken or foreign file makes torch raise
        raise ValueError(f"{path}: not a checkpoint of train.py ({error})") from error
    return model.eval()


def checkpoint_of(model: FastFlow3D) -> dict:
    """What `load_checkpoint` needs: the model's settings and tensors."""
    return {"model_settings": dataclasses.asdict(model.settings), "model": model.state_dict()}
