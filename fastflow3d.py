"""The student: FastFlow3D (Jund et al., RA-L 2022) as ZeroFlow published it.

Both sweeps become pictures seen from above (pillars), a U-Net with shared weights looks at both, and a small head
gives every point of sweep 0 the flow of its pillar, corrected by where in the pillar the point lies.

Points are (N, 3) float32 in metres, in the ego frame of sweep 0, ground removed; flow is the residual displacement
after ego-motion, from sweep 0 to sweep 1; row i of a flow belongs to row i of its pc0. Batches are lists of clouds.
A point with a NaN coordinate or outside the grid gets flow 0 and False in `is_in_grid`. There is no cap on points.

Everything is as ZeroFlow's published code computes it, since its weights are what people have, and the names in
`state_dict()` are those of the published files without their prefix `model.`; `load_checkpoint` reads both.
`FastFlow3D` is there to be read and trained; its `prepare_inference` gives the same function in a faster form.

On a GPU, torch's convolutions are TF32 by default; for parity at 1e-4 set `torch.backends.cudnn.allow_tf32 = False`
before the first call.

This file needs torch, and none of its siblings.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
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

    def __post_init__(self):
        if len(self.level_channels) != len(self.level_blocks):
            raise ValueError(f"{len(self.level_channels)} level_channels for {len(self.level_blocks)} level_blocks")
        if not self.cell_m > 0 or len(self.half_extent_m) != 3 or not all(0 < x < 1e4 for x in self.half_extent_m):
            raise ValueError(f"half_extent_m {self.half_extent_m}, cell_m {self.cell_m}: must be positive, x, y and z")
        multiple = 2 ** len(self.level_channels)  # each level halves the map
        for half, cells in zip(self.half_extent_m[1::-1], self.cells, strict=True):
            if abs(cells * self.cell_m - 2 * half) > 1e-3 or cells % multiple:
                raise ValueError(f"{2 * half} m in cells of {self.cell_m} m: must be a multiple of {multiple} cells")

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
        check_clouds(pc0s, pc1s)
        # Under autocast, which is for the U-Net, metres stay float32: 51.2 m in bfloat16 has steps of 0.25 m.
        in_float32 = torch.autocast(pc0s[0].device.type, enabled=False)
        with in_float32:
            image0, slot, offset = self.embedder(pc0s)  # (B, C, Y, X), (N,), (N, 3), N the points of all pc0s
            image1, _, _ = self.embedder(pc1s)
        motion = self.backbone(image0, image1)  # (B, 2C, Y, X)
        flow, is_in_grid = torch.zeros_like(offset), slot >= 0
        with in_float32:
            known = [pixels(maps) for maps in (image0, image1, motion)]  # (B·Y·X, C), twice, and (B·Y·X, 2C)
            flow[is_in_grid] = self.head(known, slot[is_in_grid], offset[is_in_grid])
        ends = list(itertools.accumulate(len(pc0) for pc0 in pc0s))
        rows = [slice(end - len(pc0), end) for pc0, end in zip(pc0s, ends, strict=True)]
        return [flow[mine] for mine in rows], [is_in_grid[mine] for mine in rows]

    def prepare_inference(self, dtype: torch.dtype = torch.float32) -> FastFlow3DInference:
        """The same function in evaluation mode, faster, on the same device; a copy, which cannot be trained.

        dtype: torch.bfloat16 is faster still where the processor has such instructions, and errs by millimetres.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: choose torch.float32 or torch.bfloat16")
        return FastFlow3DInference(copy.deepcopy(self).float(), dtype)


def check_clouds(pc0s: Sequence[torch.Tensor], pc1s: Sequence[torch.Tensor]) -> None:
    """Raise ValueError where lists of clouds are not what a model takes."""
    if not pc0s or len(pc0s) != len(pc1s):
        raise ValueError(f"{len(pc0s)} clouds of sweep 0 and {len(pc1s)} of sweep 1: give as many, and one at least")
    for cloud in (*pc0s, *pc1s):
        if cloud.ndim != 2 or cloud.shape[1] != 3 or cloud.dtype != torch.float32:
            raise ValueError(f"a cloud is (N, 3) float32, this one is {tuple(cloud.shape)} {cloud.dtype}")


# --- Points to pillars to a picture ----------------------------------------------------------------------------------


class PillarEmbedder(nn.Module):
    """Clouds to pseudo-images: nine numbers a point, one linear layer, the mean over each pillar."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        self.settings = settings
        self.feature_net = PillarFeatureNet(settings.pillar_channels)

    def forward(self, clouds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> pseudo-images (B, C, Y, X); of all points in a row: slot (N,) int64, image · Y · X + cell, or -1 outside;
        offset to the cell's centre (N, 3)."""
        slots, offsets, used_slots, pillars = [], [], [], []
        rows, columns = self.settings.cells
        for i, points in enumerate(clouds):
            cell, center = assign_cells(points, self.settings)  # (N,), (N, 3)
            offset = points - center
            inside = cell >= 0
            used, pillar = cell[inside].unique(return_inverse=True)  # (K,) cells with points; (N,) in 0 ... K - 1
            pillars.append(self.feature_net(points[inside], offset[inside], pillar, len(used)))  # (K, C)
            used_slots.append(i * rows * columns + used)
            slots.append(torch.where(inside, i * rows * columns + cell, -1))
            offsets.append(offset)
        pillars = torch.cat(pillars)
        images = pillars.new_zeros(len(clouds) * rows * columns, pillars.shape[1])
        images.index_copy_(0, torch.cat(used_slots), pillars)  # in place: a second such picture is what would cost
        # The channels of a pixel lie side by side (channels_last).
        images = images.unflatten(0, (len(clouds), rows, columns)).permute(0, 3, 1, 2)
        return images, torch.cat(slots), torch.cat(offsets)


def assign_cells(points: torch.Tensor, settings: FastFlow3DSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell (N,) int64, row · columns + column, -1 outside or NaN; and the centre (N, 3) of each point's cell.

    The published index is floor((p - min) / cell) of float32 *tensors*. Argoverse's float16 coordinates often lie
    exactly on cell borders, so the rounding matters: with float64, or with a multiplication by 1 / cell (what CUDA
    makes of a division by a Python number), hundreds of a sweep's points change cell and their flow changes by up to
    0.76 m. Hence both operands are tensors on the device.
    """
    rows, columns = settings.cells

    def on_device(*values: float) -> torch.Tensor:  # filled there: a copy would make the host wait for the device
        return torch.stack([points.new_full((), value) for value in values])

    half = on_device(*settings.half_extent_m)
    size = on_device(settings.cell_m, settings.cell_m, 2 * settings.half_extent_m[2])
    index = ((points + half) / size).floor()  # (N, 3): column, row, 0; NaN stays NaN
    is_inside = ((index >= 0) & (index < on_device(columns, rows, 1))).all(dim=1)
    cell = torch.where(is_inside, index[:, 1] * columns + index[:, 0], -1.0).long()  # exact: below 2**24
    return cell, (index + 0.5) * size - half


class PillarFeatureNet(nn.Module):
    """Linear, batch norm, ReLU on each point, then the mean over each cell."""

    def __init__(self, channels: int):
        super().__init__()
        norm = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)
        self.pfn_layers = nn.ModuleList([nn.Sequential(nn.Linear(9, channels, bias=False), norm, nn.ReLU())])

    def forward(self, points: torch.Tensor, offset: torch.Tensor, pillar: torch.Tensor, count: int) -> torch.Tensor:
        """points, offset (N, 3); pillar (N,), the number of each point's pillar in [0, count) -> (count, C)."""
        from_mean = points - mean_by_pillar(points, pillar, count)[pillar]
        features = torch.cat([points, from_mean, offset], dim=1)  # (N, 9)
        linear, norm, relu = self.pfn_layers[0]
        features = linear(features)
        # Statistics are of one cloud at a time, as published; a single point has none and takes the running ones.
        if len(points) > 1 or not self.training:
            features = norm(features)
        else:
            features = F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return mean_by_pillar(relu(features), pillar, count)


def mean_by_pillar(values: torch.Tensor, pillar: torch.Tensor, count: int) -> torch.Tensor:
    """values (N, C), pillar (N,) in [0, count) -> (count, C): the mean of each pillar's values, 0 of no points."""
    sums = values.new_zeros(count, values.shape[1]).index_add(0, pillar, values)
    sizes = values.new_zeros(count).index_add(0, pillar, values.new_ones(len(values)))
    return sums / sizes.clamp(min=1)[:, None]


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

    def forward(self, known: Sequence[torch.Tensor], slot: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """known: maps by pixel (B·Y·X, C), 4C in all; slot (N,), each point's pixel; offset (N, 3) -> flow (N, 3)."""
        # index_select, since the gradient of [slot] adds up in whatever order the threads come.
        per_point = [x.index_select(0, slot).float() for x in known]
        return self.decoder(torch.cat([*per_point, offset], dim=1))


def pixels(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, Y, X) -> (B·Y·X, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


# --- The same function, faster ---------------------------------------------------------------------------------------

SPARSE_FROM = 32  # pillar channels: with fewer, gathering pixels costs more than it saves
SPARSE_SHARE = 0.7  # of a map's pixels: with more of them needed, all of them are no slower
ROWS_AT_ONCE = 1024  # pixels gathered at a time: their neighbours then fit into the processor's cache


class FastFlow3DInference(nn.Module):
    """What `FastFlow3D.prepare_inference` returns: its function in evaluation mode, called the same way, but faster.

    - Batch norm is now a scale and a shift, and goes into the weights of the layer before it.
    - Both frames go through the encoder in one pass; what forbids that in training are the statistics.
    - The decoder is linear: a 3x3 convolution followed by a 1x1 one, or by the head's first layer, is one 3x3
      convolution, with half the outputs to compute. (u3, *before* a 3x3 one, stays: it costs 1 %, and its bias must
      not act beyond the border, where the published code pads with zeros after it.)
    - On a CPU, decoder steps are computed only at the pixels on which a point's flow depends, where that pays.
    - Channels lie side by side (channels_last), as pillars come and as convolutions are fastest.
    - On a GPU all clouds are one tensor, shapes do not depend on where points lie, and the host waits for nothing: the
      whole is one CUDA graph, captured at the first call, and again where there are more clouds or points. Use a copy a
      thread: they would share its buffers.

    Coordinates, pillar net and the head's last layers are float32 whatever `dtype` and autocast say. There is no
    torch.compile, since on a CPU that needs a C++ compiler.
    """

    def __init__(self, model: FastFlow3D, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.settings, self.dtype = model.settings, dtype
        self._graph = None  # on a GPU: (CUDA graph, the points it reads, the results it writes)
        linear, norm, _ = model.embedder.feature_net.pfn_layers[0]
        self.pillar_net = _with_norm(linear, norm)

        net, (into_head, _, self.out) = model.backbone, model.head.decoder
        self.encoder, size = nn.ModuleList(), self.settings.cells
        for i in range(net.levels):
            size = tuple((n + 1) // 2 for n in size)
            blocks = net.get_submodule(f"encoder_step_{i + 1}")
            convs = [block.conv if size == (1, 1) else _with_norm(block.conv, block.batchnorm) for block in blocks]
            self.encoder.append(nn.Sequential(*(layer for conv in convs for layer in (conv, nn.GELU()))))

        steps = [net.get_submodule(f"decoder_step{i + 1}") for i in range(net.levels)]
        last = net.get_submodule(f"decoder_step{net.levels + 1}")
        channels = 2 * self.settings.pillar_channels
        images, motion, offset = into_head.weight.split((channels, channels, 3), dim=1)
        self.from_images, self.from_offset = _linear(images), _linear(offset)
        self.coarsest, self.u3s, self.convs = steps[0].u1_u2[0], nn.ModuleList(), nn.ModuleList()
        for step, finer in zip(steps, [*steps[1:], None], strict=True):
            u4, u5 = step.u4_u5
            if finer is not None:
                u1 = finer.u1_u2[0]
                convs = [u4, _then_linear(u5, u1.weight.flatten(1), u1.bias)]
            else:
                convs = [u4, u5, _then_linear(last, motion, into_head.bias)]
            self.u3s.append(step.u3)
            self.convs.append(nn.ModuleList(convs))
        for part in (self.encoder, self.coarsest, self.u3s, self.convs):
            part.to(dtype=dtype, memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, pc0s: Sequence[torch.Tensor], pc1s: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """As `FastFlow3D.forward`: clouds (N, 3) float32 -> flows (N0, 3) float32, is_in_grid (N0,) bool."""
        check_clouds(pc0s, pc1s)
        # One tensor, pc0s before pc1s, filled up with NaN, which lies in no cell.
        points = nn.utils.rnn.pad_sequence([*pc0s, *pc1s], batch_first=True, padding_value=torch.nan)  # (2B, N, 3)
        with torch.autocast(points.device.type, enabled=False):
            flows, masks = (self._replay if points.is_cuda else self._flow)(points)  # (B, N, 3), (B, N)
        flows = [flow[: len(pc0)] for flow, pc0 in zip(flows, pc0s, strict=True)]
        return flows, [mask[: len(pc0)] for mask, pc0 in zip(masks, pc0s, strict=True)]

    def _flow(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """points (2B, N, 3) -> flow (B, N, 3), is_in_grid (B, N)."""
        batch = len(points) // 2
        images, slot, offset = self._pillars(points)  # (2B, C, Y, X), (2B·N,), (2B·N, 3)
        maps = [images]
        for level in self.encoder:
            maps.append(level(maps[-1]))  # (2B, C, Y, X), each half as wide as the one before
        slot, offset = slot.chunk(2)[0], offset.chunk(2)[0]  # from here on, those of pc0
        is_in_grid = slot >= 0
        is_asked = None
        if points.device.type == "cpu" and self.settings.pillar_channels >= SPARSE_FROM:
            is_asked = torch.zeros(batch, *self.settings.cells, dtype=torch.bool)  # the pixels that hold points of pc0
            is_asked.view(-1)[slot[is_in_grid]] = True
        motion = self._decode(maps, is_asked)  # (B, head_channels, Y, X)
        pixel = slot.clamp(min=0)  # points outside look at the first one, to no effect
        image0, image1, motion = (pixels(x).index_select(0, pixel).float() for x in (*images.chunk(2), motion))
        hidden = self.from_images(torch.cat([image0, image1], dim=1)) + motion + self.from_offset(offset)
        flow = torch.where(is_in_grid[:, None], self.out(F.gelu(hidden)), 0.0)  # (B·N, 3)
        shape = batch, points.shape[1]
        return flow.unflatten(0, shape), is_in_grid.unflatten(0, shape)

    def _pillars(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`PillarEmbedder` for points (2B, N, 3) in one go -> pseudo-images (2B, C, Y, X), slot (2B·N,), offset."""
        count, size = points.shape[:2]
        cells = self.settings.cells[0] * self.settings.cells[1]
        points = points.flatten(0, 1)  # (2B·N, 3)
        cell, center = assign_cells(points, self.settings)
        image = torch.arange(count, device=cell.device)[:, None].expand(count, size).flatten()
        slot = torch.where(cell >= 0, image * cells + cell, -1)
        row = torch.where(cell >= 0, slot, count * cells)  # points outside meet in one more row, cut off at the end
        # Pillars are numbered along the rows. There are at most as many as points: a size that the host knows.
        is_used = torch.zeros(count * cells + 1, dtype=torch.long, device=cell.device).index_fill_(0, row, 1)
        pillar = is_used.cumsum(0).index_select(0, row) - 1  # (2B·N,)
        offset = points - center
        from_mean = points - mean_by_pillar(points, pillar, len(points))[pillar]
        features = F.relu(self.pillar_net(torch.cat([points, from_mean, offset], dim=1)))
        features = mean_by_pillar(features, pillar, len(points)).to(self.dtype)[pillar]  # each point's pillar's
        images = features.new_zeros(len(is_used), features.shape[1]).index_copy_(0, row, features)[:-1]
        images = images.unflatten(0, (count, *self.settings.cells)).permute(0, 3, 1, 2)
        return images, slot, offset

    def _decode(self, maps: list[torch.Tensor], is_asked: torch.Tensor | None) -> torch.Tensor:
        """Maps (2B, C, Y, X), finest first -> what the head makes of their motion (B, head_channels, Y, X).

        is_asked (B, Y, X): compute it at these pixels at least; None: everywhere.
        """
        x = self.coarsest(torch.cat(maps[-1].chunk(2), dim=1))
        plan = _pixels_needed(is_asked, [len(convs) for convs in self.convs])
        for frames, u3, convs, needed in zip(maps[-2::-1], self.u3s, self.convs, plan, strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            if needed is not None:
                x = _step_at(needed, x, frames, u3, convs)
            else:
                x = torch.cat([x, u3(torch.cat(frames.chunk(2), dim=1))], dim=1)
                for conv in convs:
                    x = conv(x)
        return x

    @torch.inference_mode(False)  # or buffers made under it could not be written to without it
    def _replay(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`_flow` as a CUDA graph: one launch for all its kernels."""
        images, count, _ = points.shape
        with torch.no_grad(), torch.cuda.device(points.device):
            if self._graph is None or self._graph[1].shape[0] != images or self._graph[1].shape[1] < count:
                self._graph = None  # its memory is free before the next one takes some
                self._graph = self._captured(images, -(-count // 16384) * 16384)
            graph, inputs, outputs = self._graph
            inputs.fill_(torch.nan)[:, :count] = points
            graph.replay()
            return tuple(output[:, :count].clone() for output in outputs)  # the next replay overwrites them

    def _captured(self, images: int, count: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, tuple]:
        inputs = torch.full((images, count, 3), torch.nan, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels now: while a graph is captured they must not
            for _ in range(3):
                self._flow(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The default stream is of whichever GPU captured first; and other threads, of a data loader say, may allocate.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = self._flow(inputs)
        return graph, inputs, outputs

    def _apply(self, *args, **kwargs):
        self._graph = None  # it holds the addresses of the tensors that are about to move
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_graph": None}  # a graph can be neither copied nor saved


def _pixels_needed(is_asked: torch.Tensor | None, convs: list[int]) -> list[list[torch.Tensor] | None]:
    """For each decoder step, coarsest first: the pixels (B, Y, X) to know before each of its convolutions, and after.

    None for a step that is to be computed everywhere.
    """
    plan = []
    for count in reversed(convs):
        needed = None
        if is_asked is not None:
            needed = [is_asked]
            for _ in range(count):
                needed.insert(0, _dilated(needed[0]))
            if needed[0].float().mean() > SPARSE_SHARE:
                needed = None
            else:  # upsampling looks at the coarser pixel and its neighbours
                is_asked = _dilated(F.max_pool2d(needed[0].float(), 2) > 0)
        if needed is None:
            is_asked = None  # then so are all coarser ones
        plan.insert(0, needed)
    return plan


def _dilated(mask: torch.Tensor) -> torch.Tensor:
    """(B, Y, X) bool: a mask's pixels and their eight neighbours."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def _step_at(
    needed: list[torch.Tensor], coarser: torch.Tensor, frames: torch.Tensor, u3: nn.Conv2d, convs: nn.ModuleList
) -> torch.Tensor:
    """A decoder step where it is needed, and 0 elsewhere. Between convolutions only the needed pixels exist, as rows.

    needed: of `_pixels_needed`; coarser (B, C, Y, X), upsampled; frames (2B, C, Y, X) -> (B, C_out, Y, X).
    """
    pixel = F.pad(needed[0].flatten().nonzero()[:, 0], (1, 0))  # (1 + K,); the first row becomes the border's zeros
    skip = torch.cat([pixels(frame).index_select(0, pixel) for frame in frames.chunk(2)], dim=1)
    x = torch.cat([pixels(coarser).index_select(0, pixel), F.linear(skip, u3.weight.flatten(1), u3.bias)], dim=1)
    for conv, known, wanted in zip(convs, needed, needed[1:], strict=False):
        x[0] = 0.0
        row = F.pad(known.flatten().cumsum(0).view_as(known) * known, (1, 1, 1, 1))  # (B, Y + 2, X + 2): row in x
        height, width = known.shape[1:]
        around = torch.stack([row[:, i : i + height, j : j + width][wanted] for i in range(3) for j in range(3)], dim=1)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, 9·C)
        x = torch.cat(
            [
                F.linear(x.index_select(0, some.flatten()).view(len(some), -1), weight, conv.bias)
                for some in F.pad(around, (0, 0, 1, 0)).split(ROWS_AT_ONCE)  # (1 + K, 9)
            ]
        )
    out = x.new_zeros(wanted.numel(), x.shape[1]).index_copy_(0, wanted.flatten().nonzero()[:, 0], x[1:])
    return out.unflatten(0, wanted.shape).permute(0, 3, 1, 2)


def _with_norm(layer: nn.Linear | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Linear | nn.Conv2d:
    """A layer and the batch norm after it, in evaluation mode, as one layer."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * scale
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale
    return _with_weights(layer, layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1)), bias)


def _then_linear(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution and a linear layer of its channels, weight (C_out, C), as one convolution."""
    both = torch.einsum("om,mikl->oikl", weight.double(), conv.weight.double())
    return _with_weights(conv, both, weight.double() @ conv.bias.double() + bias.double())


def _with_weights(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear | nn.Conv2d:
    layer.weight, layer.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    return layer


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


# --- Files -----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> FastFlow3D:
    """The student in a checkpoint of train.py, or in a published Lightning file (normal or XL, recognised by its
    tensors), float32, on the CPU, in evaluation mode. Loads data, never code.

    Raises ValueError naming the file, and which tensors are missing, unknown, of another shape or not finite.
    """
    foreign = f"{path}: not a checkpoint of train.py, nor a published one"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; train.py writes checkpoints") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{foreign}: torn, no file of torch, or one that runs code, which is refused") from error
    except Exception as error:  # whatever else a torn or foreign file makes torch raise
        raise ValueError(f"{foreign} ({error!r})") from error
    try:
        if "state_dict" in checkpoint:
            tensors = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
            candidates = [MODELS["normal"], MODELS["xl"]]
        else:
            tensors, candidates = checkpoint["model"], [FastFlow3DSettings(**checkpoint["model_settings"])]
        wrong, settings = min(((_differences(each, tensors), each) for each in candidates), key=lambda x: len(x[0]))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{foreign} ({error!r})") from error
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path}: does not hold the student it should: {'; '.join(wrong[:5])}{more}")
    with torch.device("meta"):  # names and shapes without memory: the file's tensors become the model's
        model = FastFlow3D(settings)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(kinds[name]) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def _differences(settings: FastFlow3DSettings, tensors: dict[str, torch.Tensor]) -> list[str]:
    """What keeps these named tensors from being a model of these settings, a line each."""
    with torch.device("meta"):
        expected = FastFlow3D(settings).state_dict()
    lines = [f"{name} is missing" for name in expected if name not in tensors]
    lines += [f"{name} is unknown" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        ours, found = expected[name], tensors[name]
        if not isinstance(found, torch.Tensor) or found.shape != ours.shape:
            shape = tuple(getattr(found, "shape", ("no tensor",)))
            lines.append(f"{name} is {shape}, expected {tuple(ours.shape)}")
        elif found.dtype not in _FILE_DTYPES[ours.is_floating_point()] or found.layout != torch.strided:
            lines.append(f"{name} is {found.dtype}, {found.layout}, expected {ours.dtype}")
        elif not found.to(ours.dtype).isfinite().all():
            lines.append(f"{name} is not finite")
    return lines


_FILE_DTYPES = {True: (torch.float32, torch.float16, torch.bfloat16, torch.float64), False: (torch.int64, torch.int32)}


def checkpoint_of(model: FastFlow3D) -> dict:
    """What `load_checkpoint` needs: the model's settings and tensors."""
    return {"model_settings": dataclasses.asdict(model.settings), "model": model.state_dict()}
