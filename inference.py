"""The student's inference, faster: the same function as fastflow3d.py's, but it cannot be trained.

`FastFlow3D.prepare_inference` makes it from a trained student. It is called in the same way: points
(N, 3) float32 in meters in the ego frame of sweep 0, residual flow (N0, 3) in meters. In float32
the flow is the same up to rounding. None of this is in the paper. The ideas are:

- Once trained, batch norm is a scale and a shift, which the weights of the layer before it absorb.
  Without its statistics, both sweeps can go through the encoder in one pass.
- The decoder is linear. A 3x3 convolution followed by a 1x1 convolution, or by the head's first
  layer, is one 3x3 convolution with half as many outputs to compute.
- On a CPU, decoder steps are computed only at the pixels that some point's flow depends on:
  `_pixels_needed` explains which these are, `_step_at` and `_rows_around` how it is done.
- The channels of a pixel lie side by side (channels_last): convolutions are fastest that way.
- On a GPU, the whole function is one CUDA graph: one launch instead of hundreds. See `_replay`.

Coordinates, pillar net and the head's last layers stay float32, whatever dtype and autocast are.
torch.compile is not used, because on a CPU it needs a C++ compiler.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow3d import Clouds, FastFlow3D, UNet, assign_cells, check_clouds, mean_by_pillar, pixels

# Measured on two CPU cores. They change the time that it takes, and the flow only by rounding.
SPARSE_FROM = 32  # pillar channels: with fewer, gathering pixels costs more than it saves
SPARSE_SHARE = 0.7  # of a map's pixels: where more are needed, computing all takes no longer
ROWS_AT_ONCE = 1024  # pixels gathered at a time, so that their neighbors fit into the CPU's cache

Layer = nn.Linear | nn.Conv2d


class FastFlow3DInference(nn.Module):
    """A student for evaluation only. On a GPU, use one copy per thread: calls share its buffers."""

    def __init__(self, model: FastFlow3D, dtype: torch.dtype = torch.float32):
        """dtype of the U-Net: torch.float32 or torch.bfloat16. The model itself is not changed."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: choose torch.float32 or torch.bfloat16")
        super().__init__()
        self.settings, self.dtype = model.settings, dtype
        self._graph = None  # on a GPU: (CUDA graph, the points it reads, the results it writes)
        model = copy.deepcopy(model).float()  # its layers get new weights and become ours

        # Pillar net and encoder: each layer absorbs its norm. GELU is not linear and stays.
        linear, norm, _ = model.embedder.feature_net.pfn_layers[0]
        self.pillar_net = _fold_norm(linear, norm)
        self.encoder = _fold_encoder(model.backbone)

        # The head's first layer sums up what it makes of both pseudo-images, of the motion and of
        # the offset. So we can split it into three layers; the decoder absorbs the one for motion.
        into_head, _, self.out = model.head.decoder
        channels = 2 * self.settings.pillar_channels
        images, motion, offset = into_head.weight.split((channels, channels, 3), dim=1)
        self.from_images, self.from_offset = _linear(images), _linear(offset)

        # What is left of a decoder step: upsampling, u3 for the skip, and 3x3 convolutions.
        self.coarsest = model.backbone.decoder_step1.u1_u2[0]
        self.u3s, self.convs = _fold_decoder(model.backbone, motion, into_head.bias)
        for part in (self.encoder, self.coarsest, self.u3s, self.convs):
            part.to(dtype=dtype, memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pc0s: Clouds, pc1s: Clouds) -> tuple[list[Tensor], list[Tensor]]:
        """As `FastFlow3D.forward`: B pairs of clouds -> B flows (N0, 3), B is_in_grid (N0,)."""
        check_clouds(pc0s, pc1s)
        # One tensor, pc0s before pc1s, filled up with NaN, which lies in no cell.
        clouds = [*pc0s, *pc1s]
        points = nn.utils.rnn.pad_sequence(clouds, batch_first=True, padding_value=torch.nan)
        run = self._replay if points.is_cuda else self._flow
        with torch.autocast(points.device.type, enabled=False):
            flows, masks = run(points)  # (2B, N, 3) -> (B, N, 3), (B, N)
        flows = [flow[: len(pc0)] for flow, pc0 in zip(flows, pc0s, strict=True)]
        masks = [mask[: len(pc0)] for mask, pc0 in zip(masks, pc0s, strict=True)]
        return flows, masks

    def _flow(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points (2B, N, 3), sweeps 0 before sweeps 1 -> flow (B, N, 3), is_in_grid (B, N)."""
        batch, size = len(points) // 2, points.shape[1]
        images, slot, offset = self._pillars(points)  # (2B, C, Y, X), (2B·N,), (2B·N, 3)
        maps = [images]
        for level in self.encoder:
            maps.append(level(maps[-1]))  # (2B, C', Y', X'), half as wide and high each time

        # From here on only points of sweep 0 count, and only pixels that hold one are asked for.
        slot, offset = slot[: batch * size], offset[: batch * size]  # (B·N,), (B·N, 3)
        is_in_grid = slot >= 0
        is_asked = None
        if points.device.type == "cpu" and self.settings.pillar_channels >= SPARSE_FROM:
            is_asked = torch.zeros(batch, *self.settings.cells, dtype=torch.bool)
            is_asked.view(-1)[slot[is_in_grid]] = True
        motion = self._decode(maps, is_asked)  # (B, head_channels, Y, X)

        # The head. Points outside read pixel 0, and their flow is then set to 0. Leaving them out
        # would make shapes depend on where points lie, which a CUDA graph does not allow.
        pixel = slot.clamp(min=0)

        def at_points(image: Tensor) -> Tensor:
            return pixels(image).index_select(0, pixel).float()  # (B·N, channels)

        image0, image1 = images.chunk(2)
        known = torch.cat([at_points(image0), at_points(image1)], dim=1)
        hidden = self.from_images(known) + at_points(motion) + self.from_offset(offset)
        flow = torch.where(is_in_grid[:, None], self.out(F.gelu(hidden)), 0.0)  # (B·N, 3)
        return flow.unflatten(0, (batch, size)), is_in_grid.unflatten(0, (batch, size))

    def _pillars(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`PillarEmbedder` for all clouds at once: points (2B, N, 3) -> pseudo-images
        (2B, C, Y, X), slot (2B·N,), offset (2B·N, 3)."""
        count, size = points.shape[:2]
        cells = self.settings.cells[0] * self.settings.cells[1]
        points = points.flatten(0, 1)  # (2B·N, 3)
        cell, center = assign_cells(points, self.settings)
        offset = points - center
        image = torch.arange(count, device=cell.device)[:, None].expand(count, size).flatten()
        slot = torch.where(cell >= 0, image * cells + cell, -1)

        # Points outside share one additional row after the last pixel, which is cut off at the end.
        row = torch.where(cell >= 0, slot, count * cells)

        # Number the pillars in the order of their rows: is_used 0 1 0 1 adds up to 0 1 1 2, so row
        # 1 holds pillar 0 and row 3 pillar 1. We make room for as many pillars as points, because
        # the host knows that number without waiting for the device.
        is_used = torch.zeros(count * cells + 1, dtype=torch.long, device=cell.device)
        is_used.index_fill_(0, row, 1)
        pillar = is_used.cumsum(0).index_select(0, row) - 1  # (2B·N,)
        from_mean = points - mean_by_pillar(points, pillar, len(points))[pillar]
        features = F.relu(self.pillar_net(torch.cat([points, from_mean, offset], dim=1)))
        features = mean_by_pillar(features, pillar, len(points)).to(self.dtype)  # (2B·N, C)

        # Each point writes the mean of its pillar, all points of a pillar the same one.
        images = features.new_zeros(len(is_used), features.shape[1])
        images = images.index_copy_(0, row, features[pillar])[:-1]  # (2B·Y·X, C)
        images = images.unflatten(0, (count, *self.settings.cells)).permute(0, 3, 1, 2)
        return images, slot, offset

    def _decode(self, maps: list[Tensor], is_asked: Tensor | None) -> Tensor:
        """Maps (2B, C, Y, X), finest first -> the motion as the head reads it (B, hidden, Y, X).

        is_asked (B, Y, X): the pixels at which it must be right; None: everywhere.
        """
        # The first half of each map is sweep 0, the second sweep 1: together 2C channels.
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

    @torch.inference_mode(False)  # buffers made in inference mode could not be written outside it
    def _replay(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """`_flow` as a CUDA graph: captured at the first call, then one launch for all kernels."""
        images, count, _ = points.shape
        with torch.no_grad(), torch.cuda.device(points.device):
            # A graph has fixed shapes: another number of clouds, or more points, need a new one. We
            # leave room up to a multiple of 16,384 points, so that this is rare.
            shape = None if self._graph is None else self._graph[1].shape
            if shape is None or shape[0] != images or shape[1] < count:
                self._graph = None  # frees its memory before the next one takes some
                self._graph = self._captured(images, -(-count // 16384) * 16384)
            graph, inputs, outputs = self._graph
            inputs.fill_(torch.nan)[:, :count] = points
            graph.replay()
            # Copies, since the next replay overwrites the outputs.
            return tuple(output[:, :count].clone() for output in outputs)

    def _captured(self, images: int, count: int) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple]:
        """(graph, its input (images, count, 3), its outputs)."""
        inputs = torch.full((images, count, 3), torch.nan, device="cuda")
        # In their first calls, libraries choose their kernels, which is not allowed in a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._flow(inputs)
        torch.cuda.current_stream().wait_stream(side)

        # On a stream of this GPU, as the default one belongs to whichever GPU captured first; and
        # thread_local, so that other threads, such as a data loader's, may allocate meanwhile.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = self._flow(inputs)
        return graph, inputs, outputs

    def _apply(self, *args, **kwargs):
        self._graph = None  # it holds the addresses of the tensors that are about to move
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_graph": None}  # a graph can be neither copied nor saved


def _pixels_needed(is_asked: Tensor | None, conv_counts: list[int]) -> list[list[Tensor] | None]:
    """Which pixels of each map in the decoder must be known, so that the asked ones become right?

    is_asked (B, Y, X) bool, of the finest map, None for all of it; conv_counts: the number of 3x3
    convolutions of each step, coarsest first. Returns for each step a list of masks (B, Y, X), the
    pixels needed before its first convolution, before its second, ..., after its last; or None for
    a step to be computed everywhere.

    An example with one step of two convolutions on a map of 3 x 3 pixels, followed backwards. The
    only point lies in the upper left pixel, so we ask for `a` after the last convolution. That
    convolution reads a pixel and its eight neighbors, five of which are beyond the border here: it
    needs a, b, d and e. The convolution before it needs their neighbors as well, which is all:

        after the last     before the last     before the first
            a . .               a b .               a b c
            . . .               d e .               d e f
            . . .               . . .               g h i

    Before its convolutions, a step upsamples bilinearly: a pixel is a mixture of the coarser pixel
    in which it lies and of that one's neighbors. So the coarser step is asked for all of these.
    """
    plan = [None] * len(conv_counts)
    if is_asked is None:
        return plan
    for step in reversed(range(len(conv_counts))):
        needed = [is_asked]
        for _ in range(conv_counts[step]):
            needed.insert(0, _with_neighbors(needed[0]))

        # The coarser the map, the fuller. Once one is nearly full, skipping pixels saves nothing.
        if needed[0].float().mean() > SPARSE_SHARE:
            break
        plan[step] = needed
        is_read = F.max_pool2d(needed[0].float(), 2) > 0  # coarser pixels that contain a needed one
        is_asked = _with_neighbors(is_read)
    return plan


def _with_neighbors(mask: Tensor) -> Tensor:
    """mask (B, Y, X) bool -> its pixels and their eight neighbors, of the same shape."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def _step_at(
    needed: list[Tensor], coarser: Tensor, frames: Tensor, u3: nn.Conv2d, convs: nn.ModuleList
) -> Tensor:
    """A decoder step at the needed pixels; all others are 0.

    needed: from `_pixels_needed`; coarser (B, C, Y, X), upsampled; frames (2B, C, Y, X), the skip
    of both sweeps -> (B, C_out, Y, X).

    Between the convolutions we do not keep a map but x (1 + K, C): one row for each of the K needed
    pixels, in reading order. Row 0 stands for everything beyond the border, where a convolution
    pads with zeros.
    """
    # Gather the step's input at the needed pixels. u3 is 1x1: a linear layer of each pixel alone.
    pixel = F.pad(needed[0].flatten().nonzero()[:, 0], (1, 0))  # (1 + K,): row 0 is set below
    skip = torch.cat([pixels(frame).index_select(0, pixel) for frame in frames.chunk(2)], dim=1)
    skip = F.linear(skip, u3.weight.flatten(1), u3.bias)
    x = torch.cat([pixels(coarser).index_select(0, pixel), skip], dim=1)  # (1 + K, C_in)

    # Before each convolution x holds the known pixels, after it the wanted ones, which are fewer.
    for conv, (known, wanted) in zip(convs, itertools.pairwise(needed), strict=True):
        x[0] = 0.0
        x = _convolve_rows(x, _rows_around(known, wanted), conv)

    # Scatter the rows back to the pixels of a map.
    wanted = needed[-1]
    out = x.new_zeros(wanted.numel(), x.shape[1])  # (B·Y·X, C_out)
    out.index_copy_(0, wanted.flatten().nonzero()[:, 0], x[1:])
    return out.unflatten(0, wanted.shape).permute(0, 3, 1, 2)


def _rows_around(known: Tensor, wanted: Tensor) -> Tensor:
    """known, wanted (B, Y, X) bool -> (1 + K, 9): for K wanted pixels, the rows of x to read.

    The last convolution of the example in `_pixels_needed` wants `a` and knows a, b, d and e, which
    are rows 1 to 4 of x. With a border of zeros around the map, `a` reads these rows:

        known          row in x          read for a
                       0 0 0 0 0
        a b .          0 1 2 0 0           0 0 0
        d e .          0 3 4 0 0           0 1 2
        . . .          0 0 0 0 0           0 3 4
                       0 0 0 0 0

    So the result is [[0 0 0 0 0 0 0 0 0], [0 0 0 0 1 2 0 3 4]]; its first line only makes a row 0
    for the next x. Pixels that are not known have row 0, too, but are never read, because known
    contains all neighbors of wanted pixels.
    """
    number = known.flatten().cumsum(0).view_as(known)  # (B, Y, X): 1, 2, 3, ... at known pixels
    row = F.pad(number * known, (1, 1, 1, 1))  # (B, Y + 2, X + 2)
    height, width = known.shape[1:]
    around = []
    for i, j in itertools.product(range(3), range(3)):
        around.append(row[:, i : i + height, j : j + width][wanted])  # (K,)
    return F.pad(torch.stack(around, dim=1), (0, 0, 1, 0))


def _convolve_rows(x: Tensor, around: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution as a matrix product: x (1 + K, C), around (1 + L, 9) -> (1 + L, C_out)."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, 9·C), in the order of `around`
    parts = []
    for some in around.split(ROWS_AT_ONCE):
        neighborhoods = x.index_select(0, some.flatten()).view(len(some), -1)  # (rows, 9·C)
        parts.append(F.linear(neighborhoods, weight, conv.bias))
    return torch.cat(parts)


def _fold_encoder(backbone: UNet) -> nn.ModuleList:
    """Per level a sequence of convolution, GELU, convolution, GELU ..."""
    encoder = nn.ModuleList()
    for i in range(backbone.levels):
        layers = []
        for block in backbone.get_submodule(f"encoder_step_{i + 1}"):
            layers += [_fold_norm(block.conv, block.batchnorm), nn.GELU()]
        encoder.append(nn.Sequential(*layers))
    return encoder


def _fold_decoder(backbone: UNet, weight: Tensor, bias: Tensor) -> tuple[nn.ModuleList, ...]:
    """Per step, coarsest first: its u3, and its list of 3x3 convolutions.

    weight (hidden, 2C), bias (hidden,): the part of the head's first layer that reads the motion.
    """
    steps = [backbone.get_submodule(f"decoder_step{i + 1}") for i in range(backbone.levels)]
    last = backbone.get_submodule(f"decoder_step{backbone.levels + 1}")

    # u5 is followed by the next step's 1x1 convolution u1, and the last 3x3 one by the head.
    all_convs = []
    for step, finer in itertools.pairwise(steps):
        (u4, u5), u1 = step.u4_u5, finer.u1_u2[0]
        all_convs.append([u4, _fold_linear(u5, u1.weight.flatten(1), u1.bias)])
    all_convs.append([*steps[-1].u4_u5, _fold_linear(last, weight, bias)])

    # u3 comes *before* a 3x3 convolution and stays. It takes 1 % of the time, and when merged, its
    # bias would act beyond the border, where the published code pads with zeros after u3.
    u3s = nn.ModuleList(step.u3 for step in steps)
    return u3s, nn.ModuleList(nn.ModuleList(convs) for convs in all_convs)


def _fold_norm(layer: Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    """The same layer, changed so that it also does what the batch norm after it does.

    In evaluation mode, norm(y) = (y - mean) / sqrt(var + eps) · weight + bias = scale · y + shift.
    """
    # In float64 and rounded once at the end, so that folding costs no accuracy.
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    per_output = scale.view(-1, *[1] * (layer.weight.ndim - 1))  # (C_out, 1) or (C_out, 1, 1, 1)
    return _set_weights(layer, layer.weight.double() * per_output, shift)


def _fold_linear(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """The same convolution, changed so that it also applies weight (C_out, C) and bias after it."""
    both = torch.einsum("om,mikl->oikl", weight.double(), conv.weight.double())
    return _set_weights(conv, both, weight.double() @ conv.bias.double() + bias.double())


def _set_weights(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    layer.weight, layer.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    return layer


def _linear(weight: Tensor) -> nn.Linear:
    """A layer with weight (C_out, C) and without bias."""
    # Made on the meta device: weights that torch initializes would change its random numbers.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer
