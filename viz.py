"""Every plot of the project, so that no other module imports matplotlib.

Bird's-eye views: metres on both axes, equal aspect, the ego at the origin, x (forward) to the right, y (left) up.
Sweep 0 is blue, sweep 1 orange, ground grey. Flow arrows are at true scale.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import metrics
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


# --- Errors ----------------------------------------------------------------------------------------------------------
# `rows`: name of a method -> its numbers, as zeroflow.evaluate gives them.

MOST_ERROR_M = 0.5  # where the colours of error maps end, so that maps can be compared


def error_map_figure(
    pair: SweepPair, flow: torch.Tensor, is_input: torch.Tensor, title: str, half_m: float = 51.2
) -> Figure:
    """The true flow, and beside it the end-point error of `flow` (N0, 3) at the points `is_input` (N0,)."""
    figure = Figure(figsize=(12, 6), layout="compressed")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    points, error = pair.pc0[is_input], (flow - pair.flow)[is_input].norm(dim=1)
    for ax in axes:
        draw_points(ax, pair.pc0[pair.is_ground0], GROUND)
    draw_points(axes[0], points, SWEEP0, alpha=0.25)
    draw_flow(axes[0], points, pair.flow[is_input])
    axes[0].set_title("true residual flow")
    order = error.argsort()  # large errors on top
    dots = axes[1].scatter(
        *points[order, :2].T,
        s=2.0,
        c=error[order],
        cmap="viridis",
        vmin=0,
        vmax=MOST_ERROR_M,
        linewidths=0,
        rasterized=True,
    )
    axes[1].set_title("end-point error")
    figure.colorbar(dots, ax=axes, label="m", extend="max", shrink=0.8)
    for ax in axes:
        ax.set(xlim=(-half_m, half_m), ylim=(-half_m, half_m), aspect="equal")
        ax.plot(0, 0, marker=">", color="black")  # the ego
    figure.suptitle(title)
    figure.supxlabel("x, forward (m)")
    figure.supylabel("y, left (m)")
    return figure


def error_by_speed_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Mean end-point error by class and speed, points in the grid; a panel a method."""
    speeds = {"below_0.5_mps": "below 0.5 m/s", "0.5_to_2_mps": "0.5 to 2 m/s", "above_2_mps": "above 2 m/s"}
    figure = Figure(figsize=(9, 3.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    labels = list(metrics.CLASSES)
    for ax, (name, numbers) in zip(axes, rows.items(), strict=True):
        for i, (speed, text) in enumerate(speeds.items()):
            heights = [numbers[f"grid_epe_{label}_{speed}"] for label in labels]
            ax.bar(np.arange(len(labels)) + 0.27 * (i - 1), heights, width=0.25, label=text)
        ax.set(
            title=name, ylabel="EPE (m)", xticks=range(len(labels)), xticklabels=[x.replace("_", " ") for x in labels]
        )
        ax.set_xlim(-0.5, len(labels) - 0.5)
        ax.grid(axis="y", alpha=0.3)
        for i, label in enumerate(labels):
            if not sum(numbers[f"grid_points_{label}_{speed}"] for speed in speeds):
                ax.annotate("no points", (i, 0), ha="center", va="bottom", color="0.4")
    axes[0].legend(title="true speed")
    return figure


def error_by_distance_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Mean end-point error by distance from the ego, a panel for each group of the grid's three-way."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = {"fd": "foreground, dynamic", "fs": "foreground, static", "bs": "background"}
    for ax, (group, title) in zip(axes, titles.items(), strict=True):
        for name, numbers in rows.items():
            errors = [numbers[f"grid_epe_{group}_from_{inner}_m"] for inner in metrics.RINGS_M]
            ax.plot(metrics.RINGS_M, errors, marker="o", label=name)
        ax.set(title=title, xlabel="max(|x|, |y|), from (m)", xticks=metrics.RINGS_M)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("EPE (m)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    return figure


def error_against_time_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Three-way EPE (`paper`) against seconds a pair: the paper's methods, on its data and GPU, and `rows`."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    ax = figure.subplots()
    ax.set(xscale="log", yscale="log", xlabel="seconds a pair", ylabel="three-way EPE (m)")
    for i, (name, (error, ms)) in enumerate(sorted(metrics.PAPER.items(), key=lambda row: row[1][::-1])):
        ax.plot(ms / 1e3, error, marker="o", color="0.5", linestyle="")
        side = {"xytext": (6, -3)} if i % 2 else {"xytext": (-6, -3), "ha": "right"}  # in turn, since some lie close
        ax.annotate(name, (ms / 1e3, error), textcoords="offset points", color="0.4", fontsize=8, **side)
    for name, numbers in rows.items():
        seconds, error = numbers["seconds_per_pair"], numbers["paper_three_way"]
        if math.isnan(seconds):
            ax.axhline(error, linestyle="--", label=f"{name} (time unknown)")
        else:
            ax.plot(seconds, error, marker="*", markersize=14, linestyle="", label=name)
    ax.margins(x=0.2, y=0.1)
    ax.set_title("grey: the paper's, Argoverse 2's validation split on its GPU; in colour: measured here")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    return figure


# --- Training --------------------------------------------------------------------------------------------------------


def learning_curve_figure(lines: list[dict]) -> Figure:
    """Loss by step, and beside it the errors of validations, from the lines of a run's log."""
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "paper_three_way" in line]
    figure = Figure(figsize=(12 if scores else 7, 4), layout="constrained")
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    x, loss = [line["step"] for line in steps], np.array([line["loss"] for line in steps])
    window = max(1, len(loss) // 50)
    axes[0].plot(x, loss, color=SWEEP0, alpha=0.25, linewidth=0.8, label="a step")
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    axes[0].plot(x[window - 1 :], smooth, color=SWEEP0, label=f"mean of {window}")
    axes[0].set(title="distillation loss", xlabel="step", ylabel="m", ylim=(0, None))
    axes[0].legend()
    if scores:
        x = [line["step"] for line in scores]
        axes[1].plot(x, [line["paper_three_way"] for line in scores], marker="o", label="paper three-way (m)")
        bucketed = [line["bucketed_dynamic_mean"] for line in scores]
        axes[1].plot(x, bucketed, marker="s", label="bucketed, dynamic (1: no motion)")
        axes[1].set(title="validation", xlabel="step", ylim=(0, None))
        axes[1].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def scaling_law_figure(points: dict[str, dict[int, list[float]]], teacher: float, no_motion: float) -> Figure:
    """Error against the number of logs learnt from: kind of labels -> logs -> errors (m), one a seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    names = {"student": "student of pseudo-labels", "supervised": "the same network of true flow"}
    for (kind, amounts), color, marker in zip(points.items(), (SWEEP0, SWEEP1), "os", strict=True):
        ax.plot(list(amounts), [np.mean(errors) for errors in amounts.values()], color=color, label=names[kind])
        for logs, errors in amounts.items():
            ax.plot([logs] * len(errors), errors, color=color, marker=marker, linestyle="", alpha=0.6)
    ax.axhline(teacher, color="black", linestyle="--", label="the teacher of the pseudo-labels")
    ax.axhline(no_motion, color="0.6", linestyle=":", label="no motion")
    ax.set(xscale="log", xlabel="logs learnt from", ylabel="grid three-way EPE on unseen logs (m)", ylim=(0, None))
    ticks = sorted({logs for amounts in points.values() for logs in amounts})
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    return figure
