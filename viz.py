"""Every plot of the project, so that no other module imports matplotlib.

Bird's-eye views: metres on both axes, equal aspect, the ego at the origin, x (forward) to the right, y (left) up.
Sweep 0 is blue, sweep 1 orange, ground grey. Flow arrows are at true scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

import metrics
from data import DYNAMIC_THRESHOLD_M, SweepPair

SWEEP0, SWEEP1, GROUND = "tab:blue", "tab:orange", "0.8"
# Of methods by name, wherever they are compared; others take matplotlib's in turn.
METHODS = {"no motion": "0.6", "teacher": "tab:purple", "fast": "tab:purple", "student": "tab:green"}


def from_above(
    titles: Sequence[str], columns: int = 2, half_m: float = 25.6, panel_in: float = 5.0, window: tuple | None = None
) -> tuple:
    """(figure, its axes): a panel for each title, all with the same limits, in metres, and the ego at the origin.

    window: (x from, to, y from, to) instead, and no ego.
    """
    x0, x1, y0, y1 = window or (-half_m, half_m, -half_m, half_m)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(panel_in * columns, panel_in * rows * (y1 - y0) / (x1 - x0)), layout="compressed")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax in grid[len(titles) :]:
        ax.remove()
    for ax, title in zip(grid, titles, strict=False):
        ax.set(title=title, xlim=(x0, x1), ylim=(y0, y1), aspect="equal")
        if window is None:
            ax.plot(0, 0, marker=">", color="black", zorder=3)  # the ego
        ax.set(xlabel="x, forward (m)", ylabel="y, left (m)")
        ax.label_outer()
    return figure, grid[: len(titles)]


def flow_figure(pair: SweepPair, flows: dict[str, torch.Tensor], half_m: float = 25.6) -> Figure:
    """Both sweeps after ego-motion, then one panel for each named residual flow (N0, 3); save with `.savefig(file)`."""
    titles = ["sweep 0 (blue), sweep 1 (orange)", *(f"residual flow: {name}" for name in flows)]
    figure, axes = from_above(titles, half_m=half_m)
    draw_points(axes[0], pair.pc0[pair.is_ground0], GROUND)
    draw_points(axes[0], pair.pc0[~pair.is_ground0], SWEEP0)
    draw_points(axes[0], pair.pc1[~pair.is_ground1], SWEEP1)
    for ax, flow in zip(axes[1:], flows.values(), strict=True):
        draw_points(ax, pair.pc0[~pair.is_ground0], SWEEP0, alpha=0.25)
        draw_flow(ax, pair.pc0[~pair.is_ground0], flow[~pair.is_ground0])
    return figure


def draw_points(ax: Axes, points: torch.Tensor, color: str, alpha: float = 1.0) -> None:
    """points (N, 3) in metres, seen from above."""
    ax.scatter(points[:, 0], points[:, 1], s=2.0, color=color, alpha=alpha, linewidths=0, rasterized=True)


def draw_values(ax: Axes, points: torch.Tensor, values: torch.Tensor, limits: tuple[float, float], size: float = 2.0):
    """points (N, 3) coloured by values (N,), between limits; returns what a colour bar needs."""
    low, high = limits
    return ax.scatter(
        *points[:, :2].T, s=size, c=values, cmap="viridis", vmin=low, vmax=high, linewidths=0, rasterized=True
    )


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
    figure, axes = from_above(["true residual flow", "end-point error"], half_m=half_m, panel_in=6.0)
    points, error = pair.pc0[is_input], (flow - pair.flow)[is_input].norm(dim=1)
    for ax in axes:
        draw_points(ax, pair.pc0[pair.is_ground0], GROUND)
    draw_points(axes[0], points, SWEEP0, alpha=0.25)
    draw_flow(axes[0], points, pair.flow[is_input])
    order = error.argsort()  # large errors on top
    dots = draw_values(axes[1], points[order], error[order], (0, MOST_ERROR_M))
    figure.colorbar(dots, ax=axes, label="end-point error (m)", extend="max", shrink=0.8)
    figure.suptitle(title)
    return figure


def error_by_speed_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Mean end-point error by class and speed, points in the grid; a panel a method."""
    speeds = {"below_0.5_mps": "below 0.5 m/s", "0.5_to_2_mps": "0.5 to 2 m/s", "above_2_mps": "above 2 m/s"}
    figure = Figure(figsize=(9, 3.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    labels = list(metrics.CLASSES)
    for ax, (name, numbers) in zip(axes, rows.items(), strict=True):
        empty = []
        for i, (speed, text) in enumerate(speeds.items()):
            heights = np.array([numbers[f"grid_epe_{label}_{speed}"] for label in labels])  # NaN of no points
            place = np.arange(len(labels)) + 0.27 * (i - 1)
            ax.bar(place, heights, width=0.25, label=text)
            empty += [*place[np.isnan(heights)]]
        if empty:
            ax.plot(empty, [0] * len(empty), "x", color="0.6", label="no points")
        ax.set(
            title=name, ylabel="EPE (m)", xticks=range(len(labels)), xticklabels=[x.replace("_", " ") for x in labels]
        )
        ax.set_xlim(-0.5, len(labels) - 0.5)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(bottom=-0.04 * axes[0].get_ylim()[1])  # room for the crosses
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
            ax.axhline(error, color=METHODS.get(name), linestyle="--", label=f"{name} (time unknown)")
        else:
            ax.plot(seconds, error, color=METHODS.get(name), marker="*", markersize=14, linestyle="", label=name)
    ax.margins(x=0.2, y=0.1)
    ax.set_yticks([0.05, 0.1, 0.2], ["0.05", "0.1", "0.2"])
    ax.tick_params(axis="y", which="minor", labelleft=False)
    ax.set_title("grey: the paper's, on its data and GPU; in colour: measured here")
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
    window = max(1, len(loss) // 16)
    axes[0].plot(x, loss, color=SWEEP0, alpha=0.25, linewidth=0.8, label="a step")
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    axes[0].plot(x[window - 1 :], smooth, color=SWEEP0, label=f"mean of {window}")
    unweighted = [line["step"] for line in steps if line["weight"] == "none"]
    if 0 < len(unweighted) < len(steps):
        axes[0].axvline(unweighted[0], color="0.4", linestyle=":", label="unweighted from here on")
    axes[0].set(title="distillation loss", xlabel="step", ylabel="loss (m)", ylim=(0, None))
    axes[0].legend()
    if scores:
        x = [line["step"] for line in scores]
        axes[1].plot(x, [line["paper_three_way"] for line in scores], marker="o", label="paper three-way (m)")
        bucketed = [line["bucketed_dynamic_mean"] for line in scores]
        axes[1].plot(x, bucketed, marker="s", label="bucketed, dynamic (1: no motion)")
        axes[1].set(title="validation", xlabel="step", ylabel="error", ylim=(0, None))
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


# --- To explain with -------------------------------------------------------------------------------------------------


def values_figure(
    points: torch.Tensor, values: torch.Tensor, label: str, limits: tuple, half_m: float = 25.6
) -> Figure:
    """points (N, 3) from above, coloured by values (N,) between the limits; label: what they are, with the unit."""
    figure, axes = from_above([f"{len(points):,} points"], columns=1, half_m=half_m, panel_in=6.0)
    dots = draw_values(axes[0], points, values, limits, size=6.0)
    figure.colorbar(dots, ax=axes, label=label, extend="both", shrink=0.8)
    return figure


def clouds_figure(panels: dict[str, tuple], half_m: float = 25.6, window: tuple | None = None) -> Figure:
    """A panel for each title: (pc0 (N, 3), pc1 (M, 3)), and where given, the flow (N, 3) of pc0 as arrows."""
    columns = min(3, len(panels))
    figure, axes = from_above(list(panels), columns=columns, half_m=half_m, panel_in=4.5, window=window)
    for ax, (pc0, pc1, *flow) in zip(axes, panels.values(), strict=True):
        for points, color, name in ((pc0, SWEEP0, "sweep 0"), (pc1, SWEEP1, "sweep 1")):
            size = 5 if window is None else 20
            ax.scatter(*points[:, :2].T, s=size, color=color, alpha=0.7, linewidths=0, label=name)
        if flow:
            draw_flow(ax, pc0, flow[0])
    axes[0].legend(loc="lower left" if window is None else "lower right")
    return figure


def flow_colors(flow: torch.Tensor, most_m: float) -> np.ndarray:
    """(N, 3) RGB of flow (N, 3): the hue is where it goes, seen from above; grey stands, full colour goes most_m."""
    x, y = np.asarray(flow[:, 0]), np.asarray(flow[:, 1])
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    strength = np.clip(np.hypot(x, y) / most_m, 0, 1)[:, None]
    return strength * hsv_to_rgb(np.stack([hue, np.ones_like(hue), np.full_like(hue, 0.9)], 1)) + (1 - strength) * 0.75


def flow_colors_figure(
    points: torch.Tensor, flows: dict[str, torch.Tensor], most_m: float = 1.0, half_m: float = 25.6
) -> Figure:
    """points (N, 3), a panel for each named flow (N, 3), with the colour wheel as legend."""
    columns = 2 if len(flows) == 4 else min(3, len(flows))
    figure, axes = from_above(list(flows), columns=columns, half_m=half_m, panel_in=4.5)
    for ax, flow in zip(axes, flows.values(), strict=True):
        order = flow.norm(dim=1).argsort()  # what moves on top
        color = flow_colors(flow[order], most_m)
        ax.scatter(*points[order, :2].T, s=7.0, color=color, linewidths=0, rasterized=True)
    x, y = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(-1, 1, 101))
    disc = torch.from_numpy(np.stack([x, y, 0 * x], axis=2).reshape(-1, 3) * most_m)
    picture = np.concatenate([flow_colors(disc, most_m), np.hypot(x, y).reshape(-1, 1) <= 1], axis=1)
    wheel = axes[0].inset_axes([0.02, 0.02, 0.2, 0.2])
    wheel.imshow(picture.reshape(101, 101, 4), origin="lower")
    wheel.set_axis_off()
    axes[0].annotate(f"red: ahead\nrim: {most_m:g} m a sweep", (0.23, 0.03), xycoords="axes fraction", fontsize=8)
    return figure


def lines_figure(
    lines: dict[str, tuple], xlabel: str, ylabel: str, marks: dict[str, float] | None = None, log_x: bool = False
) -> Figure:
    """Lines (x, y) by name, y from 0; marks: vertical lines by name, at x; log_x: the scale, ticks where points are."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    ax = figure.subplots()
    for (name, (x, y)), style in zip(lines.items(), itertools.cycle(("-", "--", "-.", ":"))):  # some lie on others
        ax.plot(np.asarray(x), np.asarray(y), linestyle=style, label=name, marker="o" if log_x else "")
    for (name, x), style in zip((marks or {}).items(), ("--", ":", "-."), strict=False):
        ax.axvline(x, color="0.4", linestyle=style, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    if log_x:
        ticks = sorted({x for xs, _ in lines.values() for x in xs})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def histogram_figure(
    values: dict[str, torch.Tensor],
    xlabel: str,
    limits: tuple,
    marks: dict[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Histograms of values (N,) by name, as counts, between the limits; marks: vertical lines by name; log: of y."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    ax = figure.subplots()
    bins = np.linspace(*limits, 61)
    for name, each in values.items():
        ax.hist(np.clip(np.asarray(each), *limits), bins=bins, alpha=0.6, label=name)
    for (name, x), style in zip((marks or {}).items(), ("--", ":", "-."), strict=False):
        ax.axvline(x, color="black", linestyle=style, label=name)
    ax.set(xlabel=f"{xlabel}; the outermost bars hold all beyond", ylabel="points", yscale="log" if log else "linear")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def bars_figure(rows: dict[str, dict[str, float]], ylabel: str, xlabel: str = "") -> Figure:
    """A group of bars for each column, a bar in it for each row: rows by name, of columns by name."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    ax = figure.subplots()
    columns, width = list(next(iter(rows.values()))), 0.8 / len(rows)
    for i, (name, row) in enumerate(rows.items()):
        place = np.arange(len(columns)) + (i - (len(rows) - 1) / 2) * width
        heights = [row[column] for column in columns]
        bars = ax.bar(place, heights, width=0.92 * width, color=METHODS.get(name), label=name)
        ax.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3f}", fontsize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(columns)), xticklabels=columns)
    ax.grid(axis="y", alpha=0.3)
    ax.margins(y=0.25)
    if len(rows) > 1:
        ax.legend(ncols=len(rows), loc="upper center")
    return figure


def images_figure(images: dict[str, torch.Tensor], half_m: float, label: str, lowest: float = 0.0) -> Figure:
    """Maps (Y, X) of a grid that reaches half_m in x and y, a panel for each title, in one scale of colours.

    It begins at `lowest`. What is that or less stays white.
    """
    figure, axes = from_above(list(images), columns=min(3, len(images)), half_m=half_m, panel_in=4.0)
    top = max(float(image.max()) for image in images.values())
    for ax, image in zip(axes, images.values(), strict=True):
        extent = (-half_m, half_m, -half_m, half_m)
        shown = np.ma.masked_less_equal(np.asarray(image), lowest)
        drawn = ax.imshow(shown, origin="lower", extent=extent, cmap="viridis_r", vmin=lowest, vmax=top)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    return figure


def pillars_figure(points: torch.Tensor, centers: torch.Tensor, cell_m: float, x_m: tuple, y_m: tuple) -> Figure:
    """The pillars' grid over points (N, 3) of a few metres, and each point tied to its pillar's centre (N, 3)."""
    figure = Figure(figsize=(8, 8 * (y_m[1] - y_m[0]) / (x_m[1] - x_m[0])), layout="constrained")
    ax = figure.subplots()
    for point, center in zip(points, centers, strict=True):
        ax.plot(*np.stack([point[:2], center[:2]], axis=1), color="0.5", linewidth=0.8)
    ax.scatter(*points[:, :2].T, s=18, color=SWEEP0, zorder=2, label="point")
    ax.scatter(*centers[:, :2].T, s=18, color="black", marker="+", zorder=3, label="centre of its pillar")
    ax.set(xlim=x_m, ylim=y_m, aspect="equal", xlabel="x, forward (m)", ylabel="y, left (m)")
    for axis, (low, high) in ((ax.xaxis, x_m), (ax.yaxis, y_m)):
        borders = np.arange(round(low / cell_m), round(high / cell_m) + 1) * cell_m
        axis.set_ticks(borders, minor=True)
        axis.set_ticks(borders[::2])
    ax.grid(which="both", alpha=0.6)
    ax.legend()
    return figure
