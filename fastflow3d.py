"""The student: FastFlow3D (Jund et al., RA-L 2022), the network as ZeroFlow published it.

    PillarEmbedder  draws each sweep as seen from above: a pseudo-image with one pixel per pillar
                    (a column of space, as in PointPillars, Lang et al., CVPR 2019)
    UNet            encodes both pseudo-images with the same weights, then decodes them together
    PointHead       reads each point's pixel, adds where in its pillar the point lies: its flow

Points are (N, 3) float32 in meters, in the ego frame of sweep 0 (x forward, y left, z up), with
ground removed. Flow is the residual displacement after ego-motion compensation, from sweep 0 to
sweep 1, in meters. Row i of a flow belongs to row i of its pc0. A batch is a list of clouds.
A point with a NaN coordinate or outside the grid (z counts, too) gets flow 0 and False in
`is_in_grid`. The number of points is not limited.

Where paper and published code differ, this file follows the code, whose weights people have.
`state_dict()` has the names of the published files without their prefix `model.`. On a GPU, set
`torch.backends.cudnn.allow_tf32 = False` before the first call to match their flow to 1e-4 m.
This file needs only torch; the faster form that `prepare_inference` returns is in inference.py.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Clouds = Sequence[Tensor]  # a batch: B clouds (N, 3) float32, each of its own length


@dataclasses.dataclass(frozen=True)
class FastFlow3DSettings:
    """Size of the student. The defaults are the published normal model; MODELS has the others."""

    # the grid is [-half, half) in x, y and z, in meters
    half_extent_m: tuple[float, float, float] = (51.2, 51.2, 3.0)
    cell_m: float = 0.2  # side of a pillar, in meters
    pillar_channels: int = 32  # channels of a pseudo-image
    level_channels: tuple[int, ...] = (64, 128, 256)  # per encoder level, each half the resolution
    level_blocks: tuple[int, ...] = (4, 6, 6)  # convolutions per encoder level
    head_channels: int = 32  # hidden channels of the per-point head

    def __post_init__(self):
        extent_m, cell_m, levels = self.half_extent_m, self.cell_m, len(self.level_channels)
        if levels != len(self.level_blocks):
            raise ValueError(f"{levels} level_channels for {len(self.level_blocks)} level_blocks")
        if not cell_m > 0 or len(extent_m) != 3 or not all(0 < half < 1e4 for half in extent_m):
            found = f"half_extent_m {extent_m}, cell_m {cell_m}"
            raise ValueError(f"{found}: must be positive, x, y and z")

        # Each level halves the map. One of a single pixel would have no statistics for batch norm.
        rows, columns = self.cells
        for half, cells in ((extent_m[1], rows), (extent_m[0], columns)):
            if abs(cells * cell_m - 2 * half) > 1e-3 or cells % 2**levels:
                found = f"{2 * half} m in cells of {cell_m} m"
                raise ValueError(f"{found}: must be a multiple of {2**levels} cells")
        if rows == columns == 2**levels:
            found = f"{rows} x {columns} cells make the coarsest map a single pixel"
            raise ValueError(f"{found}: double half_extent_m in x or y")

    @property
    def cells(self) -> tuple[int, int]:
        """(rows along y, columns along x) of the pseudo-image."""
        half_x, half_y, _ = self.half_extent_m
        return round(2 * half_y / self.cell_m), round(2 * half_x / self.cell_m)


MODELS = {
    "normal": FastFlow3DSettings(),  # 512 x 512 cells, 6.8 million parameters: published
    # 1024 x 1024 cells, 110.6 million parameters: published
    "xl": FastFlow3DSettings(
        cell_m=0.1,
        pillar_channels=64,
        level_channels=(128, 256, 512, 1024),
        level_blocks=(4, 6, 6, 6),
    ),
    # 256 x 256 cells, 0.94 million parameters: ours, for any LiDAR on a CPU
    "small": FastFlow3DSettings(
        cell_m=0.4,
        pillar_channels=16,
        level_channels=(32, 64, 128),
        level_blocks=(2, 2, 2),
    ),
    # 128 x 128 cells, 0.24 million parameters: ours, for a CPU and the small synthetic street
    "narrow": FastFlow3DSettings(
        half_extent_m=(25.6, 25.6, 3.0),
        cell_m=0.4,
        pillar_channels=8,
        level_channels=(16, 32, 64),
        level_blocks=(2, 2, 2),
    ),
}


class FastFlow3D(nn.Module):
    """Pillars -> pseudo-images of both sweeps -> U-Net -> per-point head."""

    def __init__(self, settings: FastFlow3DSettings = MODELS["normal"]):
        super().__init__()
        self.settings = settings
        self.is_foreign = False  # loaded from a file that does not tell its grid: `load_checkpoint`
        self.embedder = PillarEmbedder(settings)
        self.backbone = UNet(settings)
        self.head = PointHead(settings)

    def forward(self, pc0s: Clouds, pc1s: Clouds) -> tuple[list[Tensor], list[Tensor]]:
        """B pairs of clouds (N0, 3), (N1, 3) -> B flows (N0, 3) in meters, B is_in_grid (N0,)."""
        check_clouds(pc0s, pc1s)
        # Under autocast, which is meant for the U-Net, coordinates must stay float32: near 51.2 m
        # two neighboring bfloat16 numbers are 0.25 m apart. Sweep 0 comes first, as published: in
        # training, the running statistics depend on the order.
        in_float32 = torch.autocast(pc0s[0].device.type, enabled=False)
        with in_float32:
            image0, slot, offset = self.embedder(pc0s)  # (B, C, Y, X), (B, N), (B, N, 3)
            image1, _, _ = self.embedder(pc1s)  # (B, C, Y, X)
        motion = self.backbone(image0, image1)  # (B, 2C, Y, X)

        # A point in the grid reads the pixel of its pillar. All others read the first pixel, but
        # then get flow 0.
        is_in_grid = slot >= 0  # (B, N)
        with in_float32:
            maps = [pixels(image0), pixels(image1), pixels(motion)]  # (B·Y·X, C) twice, 2C
            flow = self.head(maps, slot.clamp(min=0).flatten(), offset.flatten(0, 1))  # (B·N, 3)
        flow = torch.where(is_in_grid[..., None], flow.view_as(offset), 0.0)  # (B, N, 3)

        # Cut off what has filled up the shorter clouds.
        flows = [flow[i, : len(pc0)] for i, pc0 in enumerate(pc0s)]
        masks = [is_in_grid[i, : len(pc0)] for i, pc0 in enumerate(pc0s)]
        return flows, masks

    def prepare_inference(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A faster copy, for evaluation only: an `inference.FastFlow3DInference`.

        In bfloat16 it is faster still, if the processor supports it; flows change by millimeters.
        """
        try:
            from inference import FastFlow3DInference
        except ImportError as error:
            raise ImportError("prepare_inference: copy inference.py too, beside this") from error
        return FastFlow3DInference(self, dtype)


def check_clouds(pc0s: Clouds, pc1s: Clouds) -> None:
    """Raise ValueError unless these are two equally long lists of (N, 3) float32 clouds."""
    if not pc0s or len(pc0s) != len(pc1s):
        found = f"{len(pc0s)} clouds of sweep 0 and {len(pc1s)} of sweep 1"
        raise ValueError(f"{found}: give as many, and at least one")
    for cloud in (*pc0s, *pc1s):
        if cloud.ndim != 2 or cloud.shape[1] != 3 or cloud.dtype != torch.float32:
            raise ValueError(f"a cloud is (N, 3) float32, not {tuple(cloud.shape)} {cloud.dtype}")


class PillarEmbedder(nn.Module):
    """Clouds to pseudo-images: nine numbers per point, a linear layer, a mean per pillar."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        self.settings = settings
        self.feature_net = PillarFeatureNet(settings.pillar_channels)

    def forward(self, clouds: Clouds) -> tuple[Tensor, Tensor, Tensor]:
        """B clouds, of N points at most -> images (B, C, Y, X); and for each point of each cloud:

        slot (B, N) int64, the point's pixel counted through all B images, or -1 outside the grid;
        offset (B, N, 3), from the center of the point's cell to the point, in meters; 0 outside.
        """
        # All clouds at once, the shorter ones filled up with NaN, which lies in no cell. Points
        # outside the grid become 0 and are left out of every sum, instead of being cut out: then no
        # shape depends on where points lie, and the host never has to wait for a GPU.
        points = nn.utils.rnn.pad_sequence(clouds, batch_first=True, padding_value=torch.nan)
        cell, center = assign_cells(points, self.settings)  # (B, N), (B, N, 3)
        is_inside = cell >= 0  # (B, N)
        offset = torch.where(is_inside[..., None], points - center, 0.0)  # (B, N, 3)
        points = torch.where(is_inside[..., None], points, 0.0)  # (B, N, 3)

        # The pillars are the pixels of all images, most of them empty.
        rows, columns = self.settings.cells
        image = torch.arange(len(clouds), device=cell.device)[:, None]  # (B, 1)
        slot = torch.where(is_inside, image * rows * columns + cell, -1)  # (B, N)
        images = self.feature_net(points, offset, slot, len(clouds) * rows * columns)  # (B·Y·X, C)

        # In memory, the channels of a pixel stay side by side. torch calls this channels_last:
        # convolutions are fastest in it, and `pixels` need not copy.
        images = images.unflatten(0, (len(clouds), rows, columns)).permute(0, 3, 1, 2)
        return images, slot, offset


def assign_cells(points: Tensor, settings: FastFlow3DSettings) -> tuple[Tensor, Tensor]:
    """points (..., 3) -> cell (...) int64, row · columns + column or -1; its center (..., 3)."""
    rows, columns = settings.cells

    def on_device(*values: float) -> Tensor:
        # Filled on the device: a copy from the host would make the host wait for the GPU.
        return torch.stack([points.new_full((), value) for value in values])

    # The published index is floor((p - min) / cell) of float32 *tensors*. Argoverse's float16
    # coordinates often lie exactly on cell borders, so rounding matters: in float64, or when
    # multiplying by 1 / cell (as CUDA does to divide by a Python number), hundreds of a sweep's
    # points change cell, and their flow changes by up to 0.76 m. So we divide by a tensor.
    half = on_device(*settings.half_extent_m)  # (3,)
    size = on_device(settings.cell_m, settings.cell_m, 2 * settings.half_extent_m[2])  # (3,)
    index = ((points + half) / size).floor()  # (..., 3): column, row, 0 in z; NaN stays NaN

    # Comparing with NaN gives False. The number of a cell is exact in float32: it is below 2**24.
    is_inside = ((index >= 0) & (index < on_device(columns, rows, 1))).all(dim=-1)  # (...)
    cell = torch.where(is_inside, index[..., 1] * columns + index[..., 0], -1.0).long()
    return cell, (index + 0.5) * size - half


class PillarFeatureNet(nn.Module):
    """Linear, batch norm and ReLU on each point, then the mean over each pillar."""

    def __init__(self, channels: int):
        super().__init__()
        linear = nn.Linear(9, channels, bias=False)
        norm = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)
        self.pfn_layers = nn.ModuleList([nn.Sequential(linear, norm, nn.ReLU())])

    def forward(self, points: Tensor, offset: Tensor, pillar: Tensor, count: int) -> Tensor:
        """points, offset (B, N, 3) of B clouds -> (count, C), the mean over each pillar's points.

        pillar (B, N): the point's pillar in [0, count), or -1: such a point is left out.
        """
        pillar_of_all = pillar.flatten()  # (B·N,)
        means = mean_by_pillar(points.flatten(0, 1), pillar_of_all, count)  # (count, 3)
        mean = means.index_select(0, pillar_of_all.clamp(min=0)).view_as(points)  # (B, N, 3)
        numbers = torch.cat([points, points - mean, offset], dim=2)  # (B, N, 9)
        linear, norm, relu = self.pfn_layers[0]
        if self.training:
            features = linear_and_norm(linear, norm, numbers, pillar >= 0).flatten(0, 1)  # (B·N, C)
        else:
            features = norm(linear(numbers.flatten(0, 1)))  # (B·N, C)
        return mean_by_pillar(relu(features), pillar_of_all, count)


def linear_and_norm(
    linear: nn.Linear, norm: nn.BatchNorm1d, numbers: Tensor, is_inside: Tensor
) -> Tensor:
    """Both layers in training. As published, each of B clouds is normalized by its own statistics.

    numbers (B, N, 9), is_inside (B, N): the points that count -> (B, N, C).
    """
    # Mean and covariance of the nine numbers over the points that count.
    is_inside = is_inside[..., None]  # (B, N, 1)
    size = is_inside.sum(dim=1, keepdim=True)  # (B, 1, 1)
    mean = (is_inside * numbers).sum(dim=1, keepdim=True) / size.clamp(min=1)  # (B, 1, 9)
    deviation = is_inside * (numbers - mean)
    covariance = deviation.mT @ deviation / size.clamp(min=1)  # (B, 9, 9)

    # A channel is w · x, the sum of the nine numbers x with weights w. So its mean is w · mean, and
    # its variance w · covariance · w. That saves several passes over all B·N·C features.
    mean = linear(mean)  # (B, 1, C)
    var = (linear.weight @ covariance * linear.weight).sum(dim=2)[:, None]  # (B, 1, C)
    mean, var = follow_clouds(norm, mean, var, size)

    # scale · (w · x - mean) + bias is linear in x, too, with other weights for each cloud.
    scale = norm.weight / (var + norm.eps).sqrt()  # (B, 1, C)
    return numbers @ (linear.weight.T * scale) + (norm.bias - scale * mean)


def follow_clouds(
    norm: nn.BatchNorm1d, mean: Tensor, var: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Change a norm's running statistics as if the B clouds came one after the other.

    mean, var (B, 1, C); size (B, 1, 1), the number of points. Returns what normalizes the clouds:
    mean and var again, but for a cloud of a single point, which has no variance, the running
    statistics at its turn. Such a cloud does not change them.
    """
    size = size.to(mean.dtype)
    has_var = size > 1  # (B, 1, 1)
    unbiased_var = var.detach() * size / (size - 1).clamp(min=1)  # as in torch's batch norm
    momentum = norm.momentum * has_var.to(mean.dtype)
    means, variances = [], []
    for i in range(len(mean)):
        norm.running_mean.lerp_(mean[i, 0].detach(), momentum[i, 0])
        norm.running_var.lerp_(unbiased_var[i, 0], momentum[i, 0])
        means.append(norm.running_mean.clone())
        variances.append(norm.running_var.clone())
    norm.num_batches_tracked += has_var.sum()
    mean = torch.where(has_var, mean, torch.stack(means)[:, None])
    return mean, torch.where(has_var, var, torch.stack(variances)[:, None])


def mean_by_pillar(values: Tensor, pillar: Tensor, count: int) -> Tensor:
    """values (N, C) -> their mean per pillar (count, C), 0 in a pillar without points.

    pillar (N,): the value's pillar in [0, count), or -1: such a value is left out.
    """
    is_inside, pillar = (pillar >= 0).to(values.dtype), pillar.clamp(min=0)
    size = values.new_zeros(count).index_add_(0, pillar, is_inside)
    share = is_inside / size.index_select(0, pillar).clamp(min=1)  # (N,)
    # In place, because a second pseudo-image would take longer than the sum.
    means = values.new_zeros(count, values.shape[1])
    return means.index_add_(0, pillar, values * share[:, None])


class UNet(nn.Module):
    """Two pseudo-images (B, C, Y, X) -> one map of motion (B, 2C, Y, X)."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        channels = [settings.pillar_channels, *settings.level_channels]  # finest to coarsest
        self.levels = len(settings.level_channels)
        for i, blocks in enumerate(settings.level_blocks):
            steps = [ConvBlock(channels[i], channels[i + 1], stride=2)]
            steps += [ConvBlock(channels[i + 1], channels[i + 1]) for _ in range(blocks - 1)]
            self.add_module(f"encoder_step_{i + 1}", nn.Sequential(*steps))

        # On the way up, each step joins the coarser map with both sweeps' features one level finer.
        widths = [2 * c for c in reversed(channels)]  # of both sweeps, coarsest to finest
        for i in range(self.levels):
            self.add_module(f"decoder_step{i + 1}", DecoderStep(widths[i], widths[i + 1]))
        last = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.add_module(f"decoder_step{self.levels + 1}", last)

    def forward(self, image0: Tensor, image1: Tensor) -> Tensor:
        # One sweep after the other through the same weights, as published. Both in one batch would
        # be faster, but batch norm would then mix their statistics in training.
        features0, features1 = self._encode(image0), self._encode(image1)
        skips = [torch.cat(both, dim=1) for both in zip(features0, features1, strict=True)]
        x = skips.pop()  # the coarsest, for the normal model (B, 512, 64, 64)
        for i in range(self.levels):
            x = self.get_submodule(f"decoder_step{i + 1}")(x, skips.pop())
        return self.get_submodule(f"decoder_step{self.levels + 1}")(x)  # (B, 2C, Y, X)

    def _encode(self, image: Tensor) -> list[Tensor]:
        """The pseudo-image (B, C, Y, X) and each level's map, each half as wide and high."""
        features = [image]
        for i in range(self.levels):
            features.append(self.get_submodule(f"encoder_step_{i + 1}")(features[-1]))
        return features


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, exact GELU; (B, C_in, Y, X) -> (B, C_out, Y, X) / stride."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
        self.batchnorm = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.batchnorm(self.conv(x)))


class DecoderStep(nn.Module):
    """Upsample the coarser map (B, C, Y/2, X/2) and join it with the finer skip (B, D, Y, X).

    Without norm or activation the whole decoder is linear. One would expect a GELU after each
    convolution, but the published weights were trained without.
    """

    def __init__(self, c_coarser: int, c_skip: int):
        super().__init__()
        upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.u1_u2 = nn.Sequential(nn.Conv2d(c_coarser, c_skip, 1), upsample)
        self.u3 = nn.Conv2d(c_skip, c_skip, 1)
        u4 = nn.Conv2d(2 * c_skip, c_skip, 3, padding=1)
        u5 = nn.Conv2d(c_skip, c_skip, 3, padding=1)
        self.u4_u5 = nn.Sequential(u4, u5)

    def forward(self, coarser: Tensor, skip: Tensor) -> Tensor:
        both = torch.cat([self.u1_u2(coarser), self.u3(skip)], dim=1)  # (B, 2D, Y, X)
        return self.u4_u5(both)  # (B, D, Y, X)


class PointHead(nn.Module):
    """What the pillar knows (both pseudo-images, motion) and where the point lies in it -> flow."""

    def __init__(self, settings: FastFlow3DSettings):
        super().__init__()
        c_in, hidden = 4 * settings.pillar_channels + 3, settings.head_channels
        self.decoder = nn.Sequential(nn.Linear(c_in, hidden), nn.GELU(), nn.Linear(hidden, 3))

    def forward(self, maps: Sequence[Tensor], slot: Tensor, offset: Tensor) -> Tensor:
        """maps: three of (B·Y·X, channels); slot (N,), a row of them; offset (N, 3) -> (N, 3)."""
        # Not x[slot], whose gradient adds up in whatever order the threads arrive: training would
        # not repeat to the last digit. With index_select it does.
        per_point = [x.index_select(0, slot).float() for x in maps]  # (N, C), (N, C), (N, 2C)
        return self.decoder(torch.cat([*per_point, offset], dim=1))


def pixels(maps: Tensor) -> Tensor:
    """(B, C, Y, X) -> (B·Y·X, C): one row per pixel."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def load_checkpoint(path: str | Path) -> FastFlow3D:
    """The student in a checkpoint of train.py or in a published file, on the CPU, for evaluation.

    A published file is a Lightning checkpoint of the normal or XL model, recognized by its tensors.
    Such a file tells neither grid nor frames; ours are assumed, and `is_foreign` is True.
    Weights become float32. Loads data, never code. Raises ValueError naming the file and which
    tensors are missing, unknown, of another shape or not finite.
    """
    foreign = f"{path}: not a checkpoint of train.py, nor a published one"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "state_dict" in checkpoint:
            tensors = plain_names(checkpoint["state_dict"])
            candidates = [MODELS["normal"], MODELS["xl"]]
        else:
            tensors = plain_names(checkpoint["model"])
            candidates = [FastFlow3DSettings(**checkpoint["model_settings"])]
        # On the meta device, a model has names and shapes, but no memory.
        with torch.device("meta"):
            models = [FastFlow3D(settings) for settings in candidates]
        differences = [_differences(model.state_dict(), tensors) for model in models]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; train.py writes checkpoints") from None
    except pickle.UnpicklingError as error:
        reason = "torn, not written by torch, or containing code, which is not run"
        raise ValueError(f"{foreign}: {reason}") from error
    except Exception as error:  # a torn or foreign file raises many kinds, in torch and here
        raise ValueError(f"{foreign} ({error!r})") from error

    # The tensors tell which model it is: the one with the fewest differences, which must be none.
    wrong = min(differences, key=len)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        reasons = "; ".join(wrong[:5])
        raise ValueError(f"{path}: does not hold the student it should: {reasons}{more}")

    model = models[differences.index(wrong)]
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)  # the file's tensors become the model's own
    model.is_foreign = "state_dict" in checkpoint
    return model.eval()


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors without what torch's wrappers, and the published files, add to their names."""
    # DistributedDataParallel adds `module.`, torch.compile `_orig_mod.`, which may also stand in
    # the middle, and the published LightningModule `model.`.
    plain = {}
    for name, tensor in tensors.items():
        name = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("model.")
        if name in plain:
            raise ValueError(f"two tensors are called {name}")
        plain[name] = tensor
    return plain


def _differences(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """What prevents named tensors from taking the place of the expected ones: one line each."""
    lines = [f"{name} is unknown" for name in tensors if name not in expected]
    for name, ours in expected.items():
        found = tensors.get(name)
        # Weights may have been saved in another precision, but not as another kind of number.
        if name not in tensors:
            lines.append(f"{name} is missing")
        elif not isinstance(found, Tensor) or found.shape != ours.shape:
            shape = tuple(getattr(found, "shape", ("not a tensor",)))
            lines.append(f"{name} is {shape}, expected {tuple(ours.shape)}")
        elif found.is_floating_point() != ours.is_floating_point() or found.layout != torch.strided:
            lines.append(f"{name} is {found.dtype}, {found.layout}, expected {ours.dtype}")
        elif not found.to(ours.dtype).isfinite().all():
            lines.append(f"{name} is not finite")
    return lines


def checkpoint_of(model: FastFlow3D) -> dict:
    """What `load_checkpoint` needs: the model's settings and tensors."""
    return {"model_settings": dataclasses.asdict(model.settings), "model": model.state_dict()}
