"""Every plot of the project, so that no other module imports matplotlib.

Bird's-eye views: metres on both axes, equal aspect, the ego at the origin, x (forward) to the right, y (left) up.
Sweep 0 is blue, sweep 1 orange, ground grey. Flow arrows are at true scale.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data import DYNAMIC_THRESHOLD_M, SweepPair

SWEEP0, SWEEP1, GROUND = "tab:blue", "tab:orange", "0.8"


def flow_figure(pair: SweepPair, flows: dict[str, torch.Tensor], half_m: float = 25.6) -> Figure:
    """Both sweeps after ego-motion, then one panel for each named residual flow (N0, 3); save with `.savefig(file)`."""
    columns = 2
    rows = -(-(1 + len(flows)) // columns)
    figure = Figure(figsize=(5 * columns, 5 * rows), layout="compressed")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = grid.flatten()[: 1 + len(flows)]
    for ax in grid.flatten()[len(axes) :]:
        ax.remove()
    draw_points(axes[0], pair.pc0[pair.is_ground0], GROUND)
    draw_points(axes[0], pair.pc0[~pair.is_ground0], SWEEP0)
    draw_points(axes[0], pair.pc1[~pair.is_ground1], SWEEP1)
    axes[0].set_title("sweep 0 (blue), sweep 1 (orange)")
    for ax, (name, flow) in zip(axes[1:], flows.items(), strict=True):
        draw_points(ax, pair.pc0[~pair.is_ground0], SWEEP0, alpha=0.25)
        draw_flow(ax, pair.pc0[~pair.is_ground0], flow[~pair.is_ground0])
        ax.set_title(f"residual flow: {name}")
    for ax in axes:
        ax.set(xlim=(-half_m, half_m), ylim=(-half_m, half_m), aspect="equal")
        ax.plot(0, 0, marker=">", color="black")  # the ego
    figure.supxlabel("x, forward (m)")
    figure.supylabel("y, left (m)")
    return figure


def draw_points(ax: Axes, points: torch.Tensor, color: str, alpha: float = 1.0) -> None:
    """points (N, 3) in metres, seen from above."""
    ax.scatter(points[:, 0], points[:, 1], s=2.0, color=color, alpha=alpha, linewidths=0, rasterized=True)


def draw_flow(ax: Axes, points: torch.Tensor, flow: torch.Tensor) -> None:
    """An arrow, at true scale, for every one of the points (N, 3) whose flow (N, 3) is 5 cm or more."""
    is_moving = flow.norm(dim=1) >= DYNAMIC_THRESHOLD_M
    start, step = np.asarray(points[is_moving, :2]), np.asarray(flow[is_moving, :2])
    ax.quiver(*start.T, *step.T, color="tab:red", angles="xy", scale_units="xy", scale=1, width=0.003)
