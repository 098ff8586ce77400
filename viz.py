"""Every figure of the project, so that no other module imports matplotlib.

Bird's-eye views have meters on both axes, equal aspect, the ego at the origin, x (forward) to the
right and y (left) up. Sweep 0 is blue, sweep 1 orange, ground gray. Flow arrows are at true scale.
Points, flows and sweeps are tensors in the ego frame of sweep 0, in meters. Every function named
`..._figure` returns a matplotlib Figure, to be saved with `.savefig(file)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

import metrics
from data import DYNAMIC_THRESHOLD_M, SweepPair

SWEEP0, SWEEP1, GROUND = "tab:blue", "tab:orange", "0.8"

# Colors of methods by name, wherever methods are compared. Others take matplotlib's in turn.
METHODS = {
    "no-motion": "0.6",
    "teacher": "tab:purple",
    "fast": "tab:purple",
    "student": "tab:green",
}

# Line styles of vertical marks, in turn.
MARK_STYLES = ("--", ":", "-.")


# --- Seen from above ------------------------------------------------------------------------------


def from_above(
    titles: Sequence[str],
    columns: int = 2,
    half_m: float = 25.6,
    panel_in: float = 5.0,
    window: tuple | None = None,
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes: one panel per title, all with the same limits.

    half_m: the panels reach so far from the ego, which is drawn at the origin. window: (x from, x
    to, y from, y to) in meters instead, without the ego. panel_in: width of a panel in inches.
    """
    x0, x1, y0, y1 = window or (-half_m, half_m, -half_m, half_m)
    rows = math.ceil(len(titles) / columns)
    panel_height_in = panel_in * (y1 - y0) / (x1 - x0)
    figure = Figure(figsize=(panel_in * columns, panel_height_in * rows), layout="compressed")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()

    # The last row may have more places than there are titles.
    for ax in axes[len(titles) :]:
        ax.remove()
    axes = axes[: len(titles)]

    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlim=(x0, x1), ylim=(y0, y1), aspect="equal")
        if window is None:
            ax.plot(0, 0, marker=">", color="black", zorder=3)  # the ego, which looks to the right
        ax.set(xlabel="x, forward (m)", ylabel="y, left (m)")
        ax.label_outer()
    return figure, axes


def flow_figure(pair: SweepPair, flows: dict[str, torch.Tensor], half_m: float = 25.6) -> Figure:
    """Both sweeps after ego-motion, and beside them one panel per named residual flow (N0, 3)."""
    # The first panel shows what the method is given, in the colors of the module docstring.
    titles = ["sweep 0 (blue), sweep 1 (orange)", *(f"residual flow: {name}" for name in flows)]
    figure, axes = from_above(titles, half_m=half_m)
    draw_points(axes[0], pair.pc0[pair.is_ground0], GROUND)
    draw_points(axes[0], pair.pc0[~pair.is_ground0], SWEEP0)
    draw_points(axes[0], pair.pc1[~pair.is_ground1], SWEEP1)

    # The ground does not move, and its points would only hide the arrows.
    points = pair.pc0[~pair.is_ground0]
    for ax, flow in zip(axes[1:], flows.values(), strict=True):
        draw_points(ax, points, SWEEP0, alpha=0.25)
        draw_flow(ax, points, flow[~pair.is_ground0])
    return figure


def draw_points(ax: Axes, points: torch.Tensor, color: str, alpha: float = 1.0) -> None:
    """Draw points (N, 3)."""
    style = {"s": 2.0, "color": color, "alpha": alpha, "linewidths": 0, "rasterized": True}
    ax.scatter(points[:, 0], points[:, 1], **style)


def draw_values(
    ax: Axes,
    points: torch.Tensor,
    values: torch.Tensor,
    limits: tuple[float, float],
    size: float = 2.0,
) -> PathCollection:
    """Draw points (N, 3), colored by values (N,) between the limits.

    Returns what `figure.colorbar` needs.
    """
    colors = {"c": values, "cmap": "viridis", "vmin": limits[0], "vmax": limits[1]}
    return ax.scatter(points[:, 0], points[:, 1], s=size, linewidths=0, rasterized=True, **colors)


def draw_flow(ax: Axes, points: torch.Tensor, flow: torch.Tensor) -> None:
    """Draw an arrow at true scale for each point (N, 3) whose flow (N, 3) is 5 cm or more."""
    # Shorter arrows would be dots, thousands of them.
    is_moving = flow.norm(dim=1) >= DYNAMIC_THRESHOLD_M
    start, step = np.asarray(points[is_moving, :2]), np.asarray(flow[is_moving, :2])
    true_scale = {"angles": "xy", "scale_units": "xy", "scale": 1}
    ax.quiver(*start.T, *step.T, color="tab:red", width=0.003, **true_scale)


# --- Errors ---------------------------------------------------------------------------------------
# `rows`: name of a method -> its numbers, as zeroflow.evaluate returns them.

MOST_ERROR_M = 0.5  # the end of the colors of error maps, the same for all, so that they compare


def error_map_figure(
    pair: SweepPair,
    flow: torch.Tensor,
    is_input: torch.Tensor,
    title: str,
    half_m: float = 51.2,
) -> Figure:
    """The true flow, and beside it the end-point error of the estimated `flow` (N0, 3).

    is_input (N0,) bool: the points that are drawn, beside the ground.
    """
    panels = ["true residual flow", "end-point error"]
    figure, axes = from_above(panels, half_m=half_m, panel_in=6.0)
    points = pair.pc0[is_input]
    error = (flow - pair.flow)[is_input].norm(dim=1)

    # The ground is not scored, but it shows where the road is.
    for ax in axes:
        draw_points(ax, pair.pc0[pair.is_ground0], GROUND)
    draw_points(axes[0], points, SWEEP0, alpha=0.25)
    draw_flow(axes[0], points, pair.flow[is_input])

    # Large errors are few, but they are what one looks for: draw them last, on top.
    order = error.argsort()
    dots = draw_values(axes[1], points[order], error[order], (0, MOST_ERROR_M))
    figure.colorbar(dots, ax=axes, label="end-point error (m)", extend="max", shrink=0.8)
    figure.suptitle(title)
    return figure


def error_by_speed_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Mean end-point error by class and speed, of the points in the grid: one panel per method."""
    speeds = {
        "below_0.5_mps": "below 0.5 m/s",
        "0.5_to_2_mps": "0.5 to 2 m/s",
        "above_2_mps": "above 2 m/s",
    }
    figure = Figure(figsize=(9, 3.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    labels = list(metrics.CLASSES)
    names = [label.replace("_", " ") for label in labels]
    for ax, (title, numbers) in zip(axes, rows.items(), strict=True):
        # Three bars side by side for each class. A class without points has no bar but a cross, so
        # that it does not look like an error of 0.
        empty = []
        for i, (speed, text) in enumerate(speeds.items()):
            heights = np.array([numbers[f"grid_epe_{label}_{speed}"] for label in labels])
            place = np.arange(len(labels)) + 0.27 * (i - 1)
            ax.bar(place, heights, width=0.25, label=text)
            empty.extend(place[np.isnan(heights)])
        if empty:
            ax.plot(empty, [0] * len(empty), "x", color="0.6", label="no points")
        ax.set(title=title, ylabel="EPE (m)", xticks=range(len(labels)), xticklabels=names)
        ax.set_xlim(-0.5, len(labels) - 0.5)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(bottom=-0.04 * axes[0].get_ylim()[1])  # room for the crosses
    axes[0].legend(title="true speed")
    return figure


def error_by_distance_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Mean end-point error by distance from the ego: one panel per group of `grid`."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = {"fd": "foreground, dynamic", "fs": "foreground, static", "bs": "background"}
    for ax, (group, title) in zip(axes, titles.items(), strict=True):
        for name, numbers in rows.items():
            # An error is drawn at the inner border of its ring.
            errors = [numbers[f"grid_epe_{group}_from_{inner}_m"] for inner in metrics.RINGS_M]
            ax.plot(metrics.RINGS_M, errors, marker="o", label=name)
        ax.set(title=title, xlabel="max(|x|, |y|), from (m)", xticks=metrics.RINGS_M)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("EPE (m)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    return figure


def error_against_time_figure(rows: dict[str, dict[str, float]]) -> Figure:
    """Three-way EPE (`paper`) against seconds per pair, for the paper's methods and `rows`.

    The paper's numbers are of its own data and GPU.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    ax = figure.subplots()
    ax.set(xscale="log", yscale="log", xlabel="seconds per pair", ylabel="three-way EPE (m)")

    # Some of the paper's methods lie close together, so their names go left and right in turn.
    by_time = sorted(metrics.PAPER.items(), key=lambda row: (row[1][1], row[1][0]))
    left, right = {"xytext": (-6, -3), "ha": "right"}, {"xytext": (6, -3)}
    for (name, (error, ms)), side in zip(by_time, itertools.cycle((left, right))):
        ax.plot(ms / 1e3, error, marker="o", color="0.5", linestyle="")
        style = {"textcoords": "offset points", "color": "0.4", "fontsize": 8}
        ax.annotate(name, (ms / 1e3, error), **style, **side)

    # Predictions from files have an error but no time: they become a line across the figure.
    for name, numbers in rows.items():
        seconds, error = numbers["seconds_per_pair"], numbers["paper_three_way"]
        color = METHODS.get(name)
        if math.isnan(seconds):
            ax.axhline(error, color=color, linestyle="--", label=f"{name} (time unknown)")
        else:
            star = {"marker": "*", "markersize": 14, "linestyle": ""}
            ax.plot(seconds, error, color=color, label=name, **star)

    # Room for the names, and ticks in meters where a logarithmic axis would have powers of ten.
    ax.margins(x=0.2, y=0.1)
    ax.set_yticks([0.05, 0.1, 0.2], ["0.05", "0.1", "0.2"])
    ax.tick_params(axis="y", which="minor", labelleft=False)
    ax.set_title("gray: the paper's, on its data and GPU; in color: measured here")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    return figure


# --- Training -------------------------------------------------------------------------------------


def learning_curve_figure(lines: list[dict]) -> Figure:
    """The loss by step, and beside it the errors of validations, from the lines of a run's log."""
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "paper_three_way" in line]
    panels = 2 if scores else 1
    figure = Figure(figsize=(12 if scores else 7, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_loss(axes[0], steps)

    # Both metrics are errors of similar size, so they share an axis.
    if scores:
        at = [line["step"] for line in scores]
        paper = [line["paper_three_way"] for line in scores]
        bucketed = [line["bucketed_dynamic_mean"] for line in scores]
        axes[1].plot(at, paper, marker="o", label="paper three-way (m)")
        axes[1].plot(at, bucketed, marker="s", label="bucketed, dynamic (1: no-motion)")
        axes[1].set(title="validation", xlabel="step", ylabel="error", ylim=(0, None))
        axes[1].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def _draw_loss(ax: Axes, steps: list[dict]) -> None:
    """The loss of every step, its running mean, and the step from which on it is not weighted."""
    at, loss = [line["step"] for line in steps], np.array([line["loss"] for line in steps])
    ax.plot(at, loss, color=SWEEP0, alpha=0.25, linewidth=0.8, label="one step")

    # A mean belongs to the last step of its window, so it begins only when the window is full.
    window = max(1, len(loss) // 16)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    ax.plot(at[window - 1 :], smooth, color=SWEEP0, label=f"mean of {window}")

    # Where a run changes to another loss, its curve may jump.
    unweighted = [line["step"] for line in steps if line["weight"] == "none"]
    if 0 < len(unweighted) < len(steps):
        ax.axvline(unweighted[0], color="0.4", linestyle=":", label="unweighted from here on")
    ax.set(title="distillation loss", xlabel="step", ylabel="loss (m)", ylim=(0, None))
    ax.legend()


def scaling_law_figure(
    points: dict[str, dict[int, list[float]]], levels: dict[str, float]
) -> Figure:
    """The error against the number of logs that were trained on; one panel for each question.

    points: kind of student (see experiments.SCALING_LOGS) -> number of logs -> errors in meters,
    one per seed. levels: errors that do not depend on the number of logs: "no-motion", "teacher"
    and "better teacher".
    """
    student, supervised, better = points
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("more logs without labels beat fewer with them", "two teachers")
    lines = {
        student: ("student, trained on pseudo-labels", SWEEP0, "o"),
        supervised: ("the same network, trained on true flow", SWEEP1, "s"),
        better: ("student of a better teacher", "tab:green", "^"),
    }
    for ax, title, kinds in zip(
        panels, titles, ((student, supervised), (student, better)), strict=True
    ):
        for kind in kinds:
            # A line through the means over seeds, and one marker per seed.
            name, color, marker = lines[kind]
            means = [np.mean(errors) for errors in points[kind].values()]
            ax.plot(list(points[kind]), means, color=color, label=name)
            dots = {"color": color, "marker": marker, "linestyle": "", "alpha": 0.6}
            for logs, errors in points[kind].items():
                ax.plot([logs] * len(errors), errors, **dots)
        ax.axhline(levels["teacher"], color=SWEEP0, linestyle="--", label="its teacher")
        if better in kinds:
            level = levels["better teacher"]
            ax.axhline(level, color="tab:green", linestyle="--", label="the better teacher")
        else:
            ax.axhline(levels["no-motion"], color="0.6", linestyle=":", label="no-motion")
        ax.set(title=title, xscale="log", xlabel="logs trained on", ylim=(0, None))
        # Ticks only where there are points, not at powers of ten.
        ticks = sorted({logs for kind in kinds for logs in points[kind]})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    panels[0].set_ylabel("grid three-way EPE on unseen logs (m)")
    return figure


# --- To explain with ------------------------------------------------------------------------------


def values_figure(
    points: torch.Tensor,
    values: torch.Tensor,
    label: str,
    limits: tuple,
    half_m: float = 25.6,
) -> Figure:
    """Points (N, 3) colored by values (N,) between the limits.

    label: what the values are, with their unit.
    """
    figure, axes = from_above([f"{len(points):,} points"], columns=1, half_m=half_m, panel_in=6.0)
    dots = draw_values(axes[0], points, values, limits, size=6.0)
    figure.colorbar(dots, ax=axes, label=label, extend="both", shrink=0.8)
    return figure


def clouds_figure(
    panels: dict[str, tuple], half_m: float = 25.6, window: tuple | None = None
) -> Figure:
    """Two clouds per panel, and the flow from the first to the second as arrows.

    panels: title -> (pc0 (N, 3), pc1 (M, 3)) or (pc0, pc1, flow (N, 3)).
    """
    columns = min(3, len(panels))
    figure, axes = from_above(
        list(panels), columns=columns, half_m=half_m, panel_in=4.5, window=window
    )
    # A window shows few points, from close by.
    style = {"s": 5 if window is None else 20, "alpha": 0.7, "linewidths": 0}
    for ax, (pc0, pc1, *flow) in zip(axes, panels.values(), strict=True):
        ax.scatter(pc0[:, 0], pc0[:, 1], color=SWEEP0, label="sweep 0", **style)
        ax.scatter(pc1[:, 0], pc1[:, 1], color=SWEEP1, label="sweep 1", **style)
        if flow:
            draw_flow(ax, pc0, flow[0])
    axes[0].legend(loc="lower left" if window is None else "lower right")
    return figure


def flow_colors(flow: torch.Tensor, most_m: float) -> np.ndarray:
    """Return the color (N, 3) RGB of each flow (N, 3), seen from above.

    The hue is the direction: red is straight ahead. A static point is gray, and the color is full
    at most_m and beyond.
    """
    x, y = np.asarray(flow[:, 0]), np.asarray(flow[:, 1])
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    full = hsv_to_rgb(np.stack([hue, np.ones_like(hue), np.full_like(hue, 0.9)], axis=1))

    # Blend from gray to the full color.
    strength = np.clip(np.hypot(x, y) / most_m, 0, 1)[:, None]
    return strength * full + (1 - strength) * 0.75


def flow_colors_figure(
    points: torch.Tensor,
    flows: dict[str, torch.Tensor],
    most_m: float = 1.0,
    half_m: float = 25.6,
) -> Figure:
    """Points (N, 3) colored by flow: one panel per named flow (N, 3).

    The legend is a color wheel, in the first panel.
    """
    # Four panels make a square, anything else up to three panels per row.
    columns = 2 if len(flows) == 4 else min(3, len(flows))
    figure, axes = from_above(list(flows), columns=columns, half_m=half_m, panel_in=4.5)
    for ax, flow in zip(axes, flows.values(), strict=True):
        # Moving points are few: draw them last, on top.
        order = flow.norm(dim=1).argsort()
        style = {"s": 7.0, "linewidths": 0, "rasterized": True}
        x, y = points[order, 0], points[order, 1]
        ax.scatter(x, y, color=flow_colors(flow[order], most_m), **style)
    _draw_color_wheel(axes[0], most_m)
    return figure


def _draw_color_wheel(ax: Axes, most_m: float) -> None:
    """A disc in the corner, colored as a flow from its center to each of its pixels would be."""
    x, y = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(-1, 1, 101))
    flow = np.stack([x, y, np.zeros_like(x)], axis=2).reshape(-1, 3) * most_m
    rgb = flow_colors(torch.from_numpy(flow), most_m).reshape(101, 101, 3)
    is_inside = np.hypot(x, y) <= 1  # outside the disc the picture is transparent
    wheel = ax.inset_axes([0.02, 0.02, 0.2, 0.2])
    wheel.imshow(np.dstack([rgb, is_inside]), origin="lower")
    wheel.set_axis_off()
    text = f"red: ahead\nrim: {most_m:g} m per sweep"
    ax.annotate(text, (0.23, 0.03), xycoords="axes fraction", fontsize=8)


def lines_figure(
    lines: dict[str, tuple],
    xlabel: str,
    ylabel: str,
    marks: dict[str, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Lines (x, y) by name, with y from 0.

    marks: name -> x of a vertical line. log_x: a logarithmic scale, with ticks where the points
    are.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    ax = figure.subplots()

    # Lines may lie on top of each other, so they differ in style, too.
    marker = "o" if log_x else ""
    for (name, (x, y)), style in zip(lines.items(), itertools.cycle(("-", "--", "-.", ":"))):
        ax.plot(np.asarray(x), np.asarray(y), linestyle=style, label=name, marker=marker)
    for (name, x), style in zip((marks or {}).items(), MARK_STYLES, strict=False):
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
    """Histograms of values (N,) by name, as counts, between the limits.

    marks: name -> x of a vertical line. log: a logarithmic scale of the counts.
    """
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    ax = figure.subplots()

    # Values beyond the limits are counted in the outermost bars, and the label tells the reader.
    bins = np.linspace(*limits, 61)
    for name, each in values.items():
        ax.hist(np.clip(np.asarray(each), *limits), bins=bins, alpha=0.6, label=name)
    for (name, x), style in zip((marks or {}).items(), MARK_STYLES, strict=False):
        ax.axvline(x, color="black", linestyle=style, label=name)
    xlabel = f"{xlabel}; the outermost bars hold everything beyond"
    ax.set(xlabel=xlabel, ylabel="points", yscale="log" if log else "linear")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def bars_figure(rows: dict[str, dict[str, float]], ylabel: str, xlabel: str = "") -> Figure:
    """One group of bars per column, with one bar per row in it. rows: name -> column -> value."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    ax = figure.subplots()
    columns = list(next(iter(rows.values())))
    width = 0.8 / len(rows)
    for i, (name, row) in enumerate(rows.items()):
        # The bars of a group are centered around its tick.
        place = np.arange(len(columns)) + (i - (len(rows) - 1) / 2) * width
        heights = [row[column] for column in columns]
        bars = ax.bar(place, heights, width=0.92 * width, color=METHODS.get(name), label=name)
        ax.bar_label(bars, fmt=_short, fontsize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(columns)), xticklabels=columns)
    ax.grid(axis="y", alpha=0.3)
    ax.margins(y=0.25)
    if len(rows) > 1:
        ax.legend(ncols=len(rows), loc="upper center")
    return figure


def _short(value: float) -> str:
    """A value as written on a bar: 1,234 or 0.123."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def images_figure(
    images: dict[str, torch.Tensor], half_m: float, label: str, lowest: float = 0.0
) -> Figure:
    """Maps (Y, X) of a grid that reaches half_m in x and y: one panel per title.

    All panels have the same color scale. label: what the values are, with their unit. lowest: where
    the colors begin. Values of that or less stay white.
    """
    columns = min(3, len(images))
    figure, axes = from_above(list(images), columns=columns, half_m=half_m, panel_in=4.0)
    extent = (-half_m, half_m, -half_m, half_m)
    top = max(float(image.max()) for image in images.values())

    # All panels have the same limits, so any of them serves the color bar.
    for ax, image in zip(axes, images.values(), strict=True):
        shown = np.ma.masked_less_equal(np.asarray(image), lowest)
        colors = {"cmap": "viridis_r", "vmin": lowest, "vmax": top}
        drawn = ax.imshow(shown, origin="lower", extent=extent, **colors)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    return figure


def pillars_figure(
    points: torch.Tensor, centers: torch.Tensor, cell_m: float, x_m: tuple, y_m: tuple
) -> Figure:
    """The grid of pillars over a few points (N, 3), each tied to its pillar's center (N, 3).

    cell_m: width of a pillar. x_m, y_m: (from, to) in meters.
    """
    height_in = 8 * (y_m[1] - y_m[0]) / (x_m[1] - x_m[0])
    figure = Figure(figsize=(8, height_in), layout="constrained")
    ax = figure.subplots()
    for point, center in zip(points, centers, strict=True):
        ax.plot(*np.stack([point[:2], center[:2]], axis=1), color="0.5", linewidth=0.8)
    ax.scatter(points[:, 0], points[:, 1], s=18, color=SWEEP0, zorder=2, label="point")
    cross = {"s": 18, "color": "black", "marker": "+", "zorder": 3}
    ax.scatter(centers[:, 0], centers[:, 1], label="center of its pillar", **cross)
    ax.set(xlim=x_m, ylim=y_m, aspect="equal", xlabel="x, forward (m)", ylabel="y, left (m)")

    # Grid lines are the pillars' borders, multiples of cell_m. Every other one gets a number.
    for axis, (low, high) in ((ax.xaxis, x_m), (ax.yaxis, y_m)):
        borders = np.arange(round(low / cell_m), round(high / cell_m) + 1) * cell_m
        axis.set_ticks(borders, minor=True)
        axis.set_ticks(borders[::2])
    ax.grid(which="both", alpha=0.6)
    ax.legend()
    return figure
