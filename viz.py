"""Every figure of the project, so that no other module imports matplotlib.

Bird's-eye views have meters on both axes, equal aspect, the ego at the origin, x (forward) to the
right and y (left) up. Sweep 0 is blue, sweep 1 orange, ground gray. Flow arrows are at true scale.
Points, flows and sweeps are tensors in the ego frame of sweep 0, in meters. Every function named
`..._figure` returns a matplotlib Figure, to be saved with `.savefig(file)`; `Film` makes the frames
of a film, which look.py writes to a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

import metrics
from data import DYNAMIC_THRESHOLD_M, SweepPair

SWEEP0, SWEEP1, GROUND = "tab:blue", "tab:orange", "0.8"

# Colors of methods by name, wherever methods are compared. Others take matplotlib's in turn.
METHODS = {
    "no-motion": "0.6",
    "nearest": "tab:brown",
    "zero raw": "0.3",
    "teacher": "tab:purple",
    "fast": "tab:purple",
    "nsfp": "tab:pink",
    "better teacher": "indigo",
    "student": "tab:green",
    "student of the better teacher": "tab:olive",
    "student, squared error": "yellowgreen",
    "supervised": "tab:cyan",
}

# Colors of groups of points, wherever groups are compared. Static points are gray, as in a flow.
GROUPS = {"moving": "tab:red", "background": "0.5"}


def _color_of(name: str) -> str | None:
    """The color of a method or a group of points; None for others."""
    return GROUPS.get(name, METHODS.get(name))


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


MOST_SPEED_MPS = 10.0  # the color of a flow is full from this speed on


def flow_figure(
    pair: SweepPair,
    flows: dict[str, torch.Tensor],
    half_m: float = 25.6,
    around: tuple[float, float] | None = None,
) -> Figure:
    """Both sweeps after ego-motion, then one panel per named residual flow (N0, 3), by color.

    Where the pair has a true flow, a second row shows the error of each of the flows, but not of
    the one named "truth". around: (x, y) in meters of the center, instead of the ego; in a window
    of less than 40 m, flow has arrows, too.
    """
    estimates = {name: flow for name, flow in flows.items() if name != "truth"}
    is_scored = pair.flow is not None and len(estimates) > 0
    shown = estimates if is_scored else flows
    titles = ["sweep 0 (blue), sweep 1 (orange)", *(f"flow: {name}" for name in shown)]
    if is_scored:
        titles += ["true flow", *(f"error: {name}" for name in estimates)]
    columns = len(shown) + 1 if is_scored else min(3, len(titles))
    window = None
    if around is not None:
        x, y = around
        window = (x - half_m, x + half_m, y - half_m, y + half_m)
    figure, axes = from_above(titles, columns, half_m, panel_in=4.5, window=window)

    # The ground does not move, but it shows where the road is.
    size = 2.0 if half_m > 20 else 12.0
    kept0, kept1 = ~pair.is_ground0, ~pair.is_ground1
    for ax in axes:
        draw_points(ax, pair.pc0[pair.is_ground0], GROUND, size=size / 2)
    draw_points(axes[0], pair.pc0[kept0], SWEEP0, size=size)
    draw_points(axes[0], pair.pc1[kept1], SWEEP1, size=size)

    # The first row has the flow of each method, the second one the truth and the errors.
    points, most_m = pair.pc0[kept0], MOST_SPEED_MPS * _seconds(pair)
    for ax, flow in zip(axes[1:], shown.values(), strict=False):
        _draw_flow_by_color(ax, points, flow[kept0], most_m, half_m, size)
    _draw_color_wheel(axes[columns - 1], MOST_SPEED_MPS, "m/s", still=0.6, power=0.5)
    if is_scored:
        _draw_flow_by_color(axes[columns], points, pair.flow[kept0], most_m, half_m, size)
        for ax, (name, flow) in zip(axes[columns + 1 :], estimates.items(), strict=True):
            error = (flow - pair.flow)[kept0].norm(dim=1)
            order = error.argsort()  # large errors are few, but they are what one looks for
            dots = draw_values(ax, points[order], error[order], (0, MOST_ERROR_M), size)
            ax.set_title(f"error: {name}, {error.mean():.3f} m on average")
        figure.colorbar(dots, ax=axes, label="end-point error (m)", extend="max", shrink=0.6)
    return figure


def _draw_flow_by_color(
    ax: Axes, points: torch.Tensor, flow: torch.Tensor, most_m: float, half_m: float, size: float
) -> None:
    """Points (N, 3) colored by flow (N, 3), full at most_m; in a small window with arrows, too."""
    order = flow.norm(dim=1).argsort()  # moving points are few: draw them last, on top
    colors = flow_colors(flow[order], most_m, still=0.6, power=0.5)
    draw_points(ax, points[order], colors, size=size)
    if half_m <= 20:
        # Eighty arrows are enough: more of them would hide the colors.
        moving = (flow.norm(dim=1) >= DYNAMIC_THRESHOLD_M).nonzero()[:, 0]
        some = moving[:: len(moving) // 80 + 1]
        draw_flow(ax, points[some], flow[some], color="0.2")


def _seconds(pair: SweepPair) -> float:
    """Between both sweeps. Two clouds without times are taken to be 0.1 s apart."""
    return pair.seconds or 1 / metrics.SWEEPS_PER_S


def draw_points(
    ax: Axes, points: torch.Tensor, color: str | np.ndarray, alpha: float = 1.0, size: float = 2.0
) -> None:
    """Draw points (N, 3); color: one for all, or (N, 3) RGB."""
    style = {"s": size, "color": color, "alpha": alpha, "linewidths": 0, "rasterized": True}
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


def draw_flow(ax: Axes, points: torch.Tensor, flow: torch.Tensor, color: str = "tab:red") -> None:
    """Draw an arrow at true scale for each point (N, 3) whose flow (N, 3) is 5 cm or more."""
    # Shorter arrows would be dots, thousands of them.
    is_moving = flow.norm(dim=1) >= DYNAMIC_THRESHOLD_M
    start, step = np.asarray(points[is_moving, :2]), np.asarray(flow[is_moving, :2])
    true_scale = {"angles": "xy", "scale_units": "xy", "scale": 1}
    ax.quiver(*start.T, *step.T, color=color, width=0.003, **true_scale)


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

    is_input (N0,) bool: the points that are drawn, beside the ground. Raises ValueError without a
    true flow.
    """
    if pair.flow is None:
        raise ValueError("this pair has no true flow, so no error either; see flow_figure")
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
    _legend_outside(figure, "right upper", title="true speed")
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
            ax.plot(metrics.RINGS_M, errors, marker="o", color=_color_of(name), label=name)
        ax.set(title=title, xlabel="max(|x|, |y|), from (m)", xticks=metrics.RINGS_M)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("EPE (m)")
    axes[0].set_ylim(bottom=0)
    _legend_outside(figure, "lower center")
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
        color = _color_of(name)
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
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _legend_outside(figure: Figure, place: str, title: str | None = None) -> None:
    """One legend for all panels of a figure, beside or below them, with each name once.

    place: "right upper" or "lower center". The figure needs a constrained or compressed layout.
    """
    named = {}
    for ax in figure.axes:
        handles, names = ax.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            named.setdefault(name, handle)
    columns = 1 if place == "right upper" else min(4, max(1, len(named)))
    style = {"loc": f"outside {place}", "ncols": columns, "title": title}
    figure.legend(named.values(), named.keys(), **style)


# --- Films ----------------------------------------------------------------------------------------
# Films are dark, so that moving points stand out.

NIGHT, NIGHT_GROUND, NIGHT_STILL = 0.06, 0.2, 0.45  # gray levels: background, ground, static points
VIEWS = ("ego", "world", "3d")


class Film:
    """The frames of a film: one panel per method, each with the points in the colors of its flow.

    names: of the methods. view: "ego", from above with the ego at the origin, looking to the right;
    "world", the same but turned as the map is, so that static surroundings do not turn; "3d", from
    above and behind the ego. half_m: how far a panel reaches from the ego. pixels: its width.
    """

    def __init__(
        self, names: Sequence[str], half_m: float = 51.2, view: str = "ego", pixels: int = 480
    ):
        if view not in VIEWS:
            raise ValueError(f"view {view!r}: choose one of {', '.join(VIEWS)}")
        self.half_m, self.view = half_m, view
        height = pixels * 5 // 8 if view == "3d" else pixels
        self.shape = (height, pixels)

        # The figure is made once. A frame only replaces its pictures and its caption.
        columns = min(3, len(names)) if view != "3d" else min(2, len(names))
        rows = math.ceil(len(names) / columns)
        title_px, caption_px = 26, 30
        size = (columns * pixels, rows * (height + title_px) + caption_px)
        self.figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100)
        self.figure.set_facecolor(str(NIGHT))
        self.canvas = FigureCanvasAgg(self.figure)
        self.pictures = []
        for i, name in enumerate(names):
            left, top = i % columns * pixels, (i // columns) * (height + title_px) + title_px
            place = (left / size[0], 1 - (top + height) / size[1])
            ax = self.figure.add_axes((*place, pixels / size[0], height / size[1]))
            ax.set_axis_off()
            ax.set_title(name, color="white", fontsize=11, pad=4)
            self.pictures.append(ax.imshow(np.zeros((*self.shape, 3)), vmin=0, vmax=1))
            if i == 0:
                self._draw_legend(ax)
        self.caption = self.figure.text(0.01, 8 / size[1], "", color="white", fontsize=10)

    def _draw_legend(self, ax: Axes) -> None:
        """The color wheel, and from above a scale bar."""
        style = {"still": NIGHT_STILL, "power": 0.5, "corner": (0.02, 0.02)}
        _draw_color_wheel(ax, MOST_SPEED_MPS, "m/s", is_ahead_up=self.view == "3d", **style)
        for text in ax.texts:
            text.set_color("white")
        if self.view != "3d":
            height, width = self.shape
            length = 10 * width / (2 * self.half_m)  # pixels
            right, y = width - 0.03 * width, height - 0.04 * height
            ax.plot([right - length, right], [y, y], color="white", linewidth=2)
            ax.text(right - length / 2, y - 6, "10 m", color="white", ha="center", fontsize=9)

    def frame(
        self,
        pair: SweepPair,
        flows: Sequence[torch.Tensor],
        caption: str = "",
        world_SE3_ego0: np.ndarray | None = None,
    ) -> np.ndarray:
        """One frame (height, width, 3) uint8, with one flow (N0, 3) per panel.

        world_SE3_ego0: (4, 4), how the ego is turned; only the view "world" needs it.
        """
        turn = np.eye(3)
        if self.view == "world" and world_SE3_ego0 is not None:
            turn = np.asarray(world_SE3_ego0)[:3, :3]
        points = pair.pc0.double().numpy() @ turn.T  # (N, 3)
        is_ground = pair.is_ground0.numpy()
        for picture, flow in zip(self.pictures, flows, strict=True):
            mps = torch.from_numpy(flow.double().numpy() @ turn.T) / _seconds(pair)
            colors = flow_colors(mps, MOST_SPEED_MPS, NIGHT_STILL, power=0.5)
            colors[is_ground] = NIGHT_GROUND
            picture.set_data(self._paint(points, colors, mps.norm(dim=1).numpy(), is_ground))
        self.caption.set_text(caption)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[:, :, :3].copy()

    def _paint(
        self, points: np.ndarray, colors: np.ndarray, speed: np.ndarray, is_ground: np.ndarray
    ) -> np.ndarray:
        """A picture (height, width, 3) of points (N, 3) in colors (N, 3)."""
        image = np.full((*self.shape, 3), NIGHT)
        row, column, depth = self._project(points)
        # What is painted last is on top: seen from above the fastest, else the nearest.
        order = np.argsort(-depth if self.view == "3d" else np.where(is_ground, -1, speed))
        height, width = self.shape
        is_small = is_ground | (depth > 40) if self.view == "3d" else is_ground
        for offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
            # Ground has one pixel, everything else four.
            chosen = order if offset == (0, 0) else order[~is_small[order]]
            r, c = row[chosen] + offset[0], column[chosen] + offset[1]
            is_inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            rows, columns = r[is_inside].astype(int), c[is_inside].astype(int)
            image[rows, columns] = colors[chosen[is_inside]]
        return image

    def _project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N,) row, column and depth (m) of points (N, 3); NaN, or far outside, if not seen."""
        height, width = self.shape
        if self.view != "3d":
            scale = width / (2 * self.half_m)  # pixels per meter
            row = (self.half_m - points[:, 1]) * scale
            column = (points[:, 0] + self.half_m) * scale
            return row, column, np.zeros(len(points))

        # A camera behind and above the ego looks down at a place ahead of it.
        back, up, ahead = 0.45 * self.half_m, 0.35 * self.half_m, 0.25 * self.half_m
        pitch = math.atan2(up, back + ahead)
        x, z = points[:, 0] + back, points[:, 2] - up
        depth = x * math.cos(pitch) - z * math.sin(pitch)
        above = x * math.sin(pitch) + z * math.cos(pitch)
        with np.errstate(divide="ignore", invalid="ignore"):
            zoom = np.where(depth > 1.0, 0.62 * width / depth, np.nan)
        return height / 2 - zoom * above, width / 2 - zoom * points[:, 1], depth


# --- Your own logs --------------------------------------------------------------------------------


def side_view_figure(
    panels: dict[str, dict[str, torch.Tensor]],
    title: str,
    colors: dict[str, str],
    grid_z_m: float | None = None,
    half_m: float = 25.6,
    z_m: tuple[float, float] = (-5.0, 7.0),
) -> Figure:
    """Points seen from the right side of the car: x to the right, z up, one panel below the other.

    panels: title -> group -> points (N, 3). colors: group -> color. grid_z_m: the grid reaches from
    -grid_z_m to grid_z_m, which is shaded.
    """
    # Both axes have the same scale, so the height follows from the width; titles take the rest.
    height_in = 1.2 + len(panels) * (0.5 + 9.5 * (z_m[1] - z_m[0]) / (2 * half_m))
    figure = Figure(figsize=(10.5, height_in), dpi=80, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, (name, groups) in zip(axes, panels.items(), strict=True):
        if grid_z_m is not None:
            ax.axhspan(-grid_z_m, grid_z_m, color="0.94", label="inside the grid")
        for group, points in groups.items():
            style = {"s": 2.5, "color": colors[group], "linewidths": 0, "rasterized": True}
            ax.scatter(points[:, 0], points[:, 2], **style)
            ax.scatter([], [], s=30, color=colors[group], label=group)  # for the legend
        ax.plot(0, 0, marker=">", color="black", linestyle="", label="origin of the frame")
        ax.set(title=name, xlim=(-half_m, half_m), ylim=z_m, aspect="equal", ylabel="z, up (m)")
    axes[-1].set_xlabel("x, forward (m)")
    _legend_outside(figure, "lower center")
    figure.suptitle(title)
    return figure


def torn_sweep_figure(
    clouds: dict[str, torch.Tensor],
    window: tuple[float, float, float, float],
    place: tuple[float, float, float],
    title: str,
) -> Figure:
    """The same sweep in two versions, from above: everything, and a window enlarged.

    clouds: name -> points (N, 3), twice. window: (x from, x to, y from, y to) in meters. place: (x,
    y, radius) of a circle in the window, around what the title talks about.
    """
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    whole, near = figure.subplots(1, 2)
    colors = (GROUPS["background"], "tab:red")
    for (name, points), color in zip(clouds.items(), colors, strict=True):
        draw_points(whole, points, color, size=4.0)
        draw_points(near, points, color, size=30.0)
        near.scatter([], [], color=color, label=name)  # for the legend
    whole.plot(0, 0, marker=">", color="black")  # the ego, which looks to the right
    whole.set(title="the sweep, from above", xlim=(-26, 26), ylim=(-26, 26), aspect="equal")
    _enlarge(whole, near, window, "the box enlarged")
    near.add_patch(Circle(place[:2], place[2], fill=False, edgecolor="black", linewidth=1.5))
    for ax in (whole, near):
        ax.set(xlabel="x, forward (m)", ylabel="y, left (m)")
    _legend_outside(figure, "lower center")
    figure.suptitle(title)
    return figure


def _enlarge(whole: Axes, near: Axes, window: tuple, title: str) -> None:
    """Draw a window (x from, x to, y from, y to) into a panel, and limit another panel to it."""
    x0, x1, y0, y1 = window
    whole.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="black", linewidth=1)
    near.set(title=title, xlim=(x0, x1), ylim=(y0, y1), aspect="equal")


def judged_figure(panels: dict[str, dict[str, float]], title: str) -> Figure:
    """One panel per number, with a bar per method; lower is better, and the lowest has a star.

    panels: name of the number, with its unit -> method -> value. A value that a method does not
    have is NaN, and its bar is missing.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    others = ("tab:orange", "tab:brown", "tab:pink", "tab:olive")  # of methods without a color
    for ax, (name, values) in zip(axes, panels.items(), strict=True):
        methods, heights = list(values), np.array(list(values.values()))
        best = int(np.nanargmin(heights))
        for place, (method, height) in enumerate(values.items()):
            color = METHODS.get(method, others[place % len(others)])
            # Nothing that a method of no motion moves could be rigid: that is not a 0.
            if math.isnan(height):
                ax.text(place, 0, "none", ha="center", va="bottom", color="0.4", fontsize=8)
                continue
            ax.bar(place, height, color=color)
            text = f"★ {height:.3f}" if place == best else f"{height:.3f}"
            ax.text(place, height, text, ha="center", va="bottom", fontsize=8)
        ax.set(title=name, xticks=range(len(methods)), xlim=(-0.6, len(methods) - 0.4))
        ax.set_xticklabels(methods, rotation=35, ha="right")
        ax.margins(y=0.15)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    figure.suptitle(title)
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
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(**_BELOW)
    return figure


def learned_figure(
    lines: list[dict], no_motion_loss: dict[str, float], no_motion_error: float
) -> Figure:
    """The loss and the validations of a run, each beside what predicting no motion would get.

    lines: of the run's log. no_motion_loss: speed weight, as the log names it -> the loss of no
    motion, in meters. no_motion_error: its paper three-way on the validation pairs, in meters.
    """
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "paper_three_way" in line]
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    level = {"color": METHODS["no-motion"], "linestyle": "--", "label": "no-motion"}

    # The level of no motion jumps with the loss where the run changes its speed weight.
    _draw_loss(axes[0], steps)
    at = [line["step"] for line in steps]
    axes[0].plot(at, [no_motion_loss[line["weight"]] for line in steps], **level)
    axes[0].set(title="distillation loss, on the pairs that it learns from", xlabel="")

    # A validation is a single measurement, so each one has a marker.
    at, errors = zip(*((line["step"], line["paper_three_way"]) for line in scores), strict=True)
    axes[1].plot(at, errors, color=METHODS["student"], marker="o", label="student, validated")
    axes[1].axhline(no_motion_error, **level)
    axes[1].set(title="validation, on streets that it never sees", xlabel="step")
    axes[1].set(ylabel="paper three-way (m)", ylim=(0, None))
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def costs_figure(costs: dict[str, float]) -> Figure:
    """One horizontal bar per named cost in dollars, from top to bottom."""
    figure = Figure(figsize=(9, 0.7 + 0.45 * len(costs)), layout="constrained")
    ax = figure.subplots()
    bars = ax.barh(list(costs), list(costs.values()), color=SWEEP0)
    ax.bar_label(bars, labels=[f"${cost:,.0f}" for cost in costs.values()], padding=4)
    ax.set(xlabel="dollars")
    ax.invert_yaxis()
    ax.margins(x=0.12)  # room for the labels
    ax.grid(axis="x", alpha=0.3)
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


# A legend below a panel, where the panels of a figure have different legends.
_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 3}


def scaling_law_figure(
    points: dict[str, dict[int, list[float]]], levels: dict[str, float]
) -> Figure:
    """The error against the number of logs that were trained on; one panel for each question.

    points: kind of student (see experiments.SCALING_LOGS) -> number of logs -> errors in meters,
    one per seed. levels: errors that do not depend on the number of logs: "no-motion", "teacher"
    and "better teacher".
    """
    student, supervised, better = points
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("more logs without labels beat fewer with them", "two teachers")
    lines = {
        student: ("student, trained on pseudo-labels", METHODS["student"], "o"),
        supervised: ("the same network, trained on true flow", METHODS["supervised"], "s"),
        better: ("student of a better teacher", METHODS["student of the better teacher"], "^"),
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
        dashed = {"color": METHODS["teacher"], "linestyle": "--"}
        ax.axhline(levels["teacher"], label="its teacher", **dashed)
        if better in kinds:
            dashed["color"] = METHODS["better teacher"]
            ax.axhline(levels["better teacher"], label="the better teacher", **dashed)
        else:
            # Beyond the last log that people labeled, the twin cannot get any better.
            logs, errors = list(points[supervised].items())[-1]
            best = {"color": METHODS["supervised"], "linestyle": ":"}
            ax.axhline(np.mean(errors), label=f"its mean with {logs} logs", **best)
            nothing = {"color": METHODS["no-motion"], "linestyle": ":"}
            ax.axhline(levels["no-motion"], label="no-motion", **nothing)
        ax.set(title=title, xscale="log", xlabel="logs trained on", ylim=(0, None))
        # Ticks only where there are points, not at powers of ten.
        ticks = sorted({logs for kind in kinds for logs in points[kind]})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(**(_BELOW | {"ncols": 2}))
    panels[0].set_ylabel("grid three-way EPE on unseen logs (m)")
    return figure


# --- To explain with ------------------------------------------------------------------------------


def pipeline_figure() -> Figure:
    """The method as a drawing: pairs, the slow teacher, its labels, the fast student, its flow."""
    figure = Figure(figsize=(11, 3.4))
    whole = figure.add_axes((0, 0, 1, 1), xlim=(0, 11), ylim=(0, 3.4))
    whole.set_axis_off()

    # A scene with a static wall and a car that drives ahead, in both sweeps.
    steps = np.linspace(0, 1, 12)
    wall = np.stack([4 * steps - 2, np.full(12, 0.9)], axis=1)
    side = np.stack([steps - 0.7, np.full(12, -0.2)], axis=1)
    front = np.stack([np.full(6, 0.3), np.linspace(-0.2, -0.7, 6)], axis=1)
    car = np.concatenate([side, front])
    points = np.concatenate([wall, car])

    def picture(left: float, title: str, ahead: float, show_flow: bool) -> None:
        ax = figure.add_axes((left / 11, 1.0 / 3.4, 1.9 / 11, 1.5 / 3.4))
        ax.set(xlim=(-2.3, 2.3), ylim=(-1.5, 1.6), xticks=[], yticks=[])
        ax.set_title(title, fontsize=10)
        flow = np.zeros((len(points), 3))  # the wall does not move
        flow[len(wall) :, 0] = ahead
        if show_flow:
            ax.scatter(*points.T, s=9, color=flow_colors(torch.from_numpy(flow), 0.6, still=0.6))
            draw_flow(ax, torch.from_numpy(car[::4]), torch.from_numpy(flow[len(wall) :: 4]), "0.2")
        else:
            ax.scatter(*points.T, s=9, color=SWEEP0)
            ax.scatter(*(points + flow[:, :2] + 0.03).T, s=9, color=SWEEP1)

    def box(left: float, text: str, color: str) -> None:
        style = {"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "0.3", "alpha": 0.35}
        whole.text(left, 1.75, text, ha="center", va="center", fontsize=10, bbox=style)

    def arrow(start: tuple, end: tuple, bend: float = 0.0) -> None:
        style = {"arrowstyle": "-|>", "color": "0.2", "connectionstyle": f"arc3,rad={bend}"}
        whole.annotate("", end, start, arrowprops=style)

    picture(0.2, "a pair of sweeps", 0.6, show_flow=False)
    box(3.1, "slow teacher\nNSFP\nfitted to each pair,\nseconds to minutes", METHODS["teacher"])
    picture(4.2, "pseudo-label", 0.6, show_flow=True)
    box(7.25, "fast student\nFastFlow3D\none pass,\nmilliseconds", METHODS["student"])
    picture(8.9, "flow of a new pair", -0.6, show_flow=True)
    for start, end in ((2.1, 2.35), (3.9, 4.2), (6.1, 6.65), (7.95, 8.9)):
        arrow((start, 1.75), (end, 1.75))
    arrow((1.15, 0.95), (7.25, 1.15), bend=0.14)
    whole.text(4.2, 0.2, "the student sees the pairs, too", ha="center", fontsize=9, color="0.3")
    whole.text(6.37, 1.85, "learns", ha="center", fontsize=9, color="0.3")
    title = "ZeroFlow: no human labels; the teacher works once, the student learns to do without it"
    whole.text(5.5, 3.15, title, ha="center", fontsize=11)
    return figure


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
    _legend_outside(figure, "right upper")
    return figure


def flow_colors(
    flow: torch.Tensor, most_m: float, still: float = 0.75, power: float = 1.0
) -> np.ndarray:
    """Return the color (N, 3) RGB of each flow (N, 3), seen from above.

    The hue is the direction: red is straight ahead. A static point is gray, and the color is full
    at most_m and beyond. still: level of that gray. power: below 1, slow motions are colored more.
    """
    x, y = np.asarray(flow[:, 0]), np.asarray(flow[:, 1])
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    full = hsv_to_rgb(np.stack([hue, np.ones_like(hue), np.full_like(hue, 0.9)], axis=1))

    # Blend from gray to the full color.
    strength = np.clip(np.hypot(x, y) / most_m, 0, 1)[:, None] ** power
    return strength * full + (1 - strength) * still


def flow_colors_figure(
    points: torch.Tensor,
    flows: dict[str, torch.Tensor],
    most_m: float = 1.0,
    half_m: float = 25.6,
) -> Figure:
    """Points (N, 3) colored by flow: one panel per named flow (N, 3).

    The legend is a color wheel, beside the last panel of the first row.
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
    _draw_color_wheel(axes[columns - 1], most_m)
    return figure


def _draw_color_wheel(
    ax: Axes,
    most: float,
    unit: str = "m per sweep",
    still: float = 0.75,
    power: float = 1.0,
    corner: tuple[float, float] = (1.02, 0.0),
    is_ahead_up: bool = False,
) -> None:
    """A disc beside a panel, colored as a flow from its center to each of its pixels would be.

    corner: its lower left corner as shares of the panel. is_ahead_up: ahead is up in the panel, not
    to the right.
    """
    x, y = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(-1, 1, 101))
    ahead, left = (y, -x) if is_ahead_up else (x, y)
    flow = np.stack([ahead, left, np.zeros_like(x)], axis=2).reshape(-1, 3)
    rgb = flow_colors(torch.from_numpy(flow), 1.0, still, power).reshape(101, 101, 3)
    is_inside = np.hypot(x, y) <= 1  # outside the disc the picture is transparent
    wheel = ax.inset_axes([*corner, 0.2, 0.2])
    wheel.imshow(np.dstack([rgb, is_inside]), origin="lower")
    wheel.set_axis_off()
    text = f"red: ahead\nrim: {most:g} {unit}"
    above = (corner[0], corner[1] + 0.21)
    ax.annotate(text, above, xycoords="axes fraction", fontsize=8, annotation_clip=False)


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
        line = {"linestyle": style, "color": _color_of(name), "marker": marker}
        ax.plot(np.asarray(x), np.asarray(y), label=name, **line)
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
        inside = np.clip(np.asarray(each), *limits)
        ax.hist(inside, bins=bins, alpha=0.6, color=_color_of(name), label=name)
    for (name, x), style in zip((marks or {}).items(), MARK_STYLES, strict=False):
        ax.axvline(x, color="black", linestyle=style, label=name)
    xlabel = f"{xlabel}; the outermost bars hold everything beyond"
    ax.set(xlabel=xlabel, ylabel="points", yscale="log" if log else "linear")
    ax.grid(alpha=0.3)
    _legend_outside(figure, "right upper")
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
        bars = ax.bar(place, heights, width=0.92 * width, color=_color_of(name), label=name)
        ax.bar_label(bars, fmt=_short, fontsize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(columns)), xticklabels=columns)
    ax.grid(axis="y", alpha=0.3)
    ax.margins(y=0.12)  # room for the numbers on the bars
    if len(rows) > 1:
        _legend_outside(figure, "lower center")
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
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def claim(
    figure: Figure, title: str, places: dict[str, tuple[float, float, float]] | None = None
) -> Figure:
    """Give a figure the claim that it shows as its title, and return it.

    places: text -> (x, y, radius) in meters; a circle with that text in every panel.
    """
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    if any(ax.get_aspect() == 1 for ax in panels):
        figure.set_layout_engine("compressed")  # for panels that may not be stretched
    if len(panels) == 1:
        panels[0].set_title(title)
    else:
        figure.suptitle(title)

    for ax in panels:
        for text, (x, y, radius) in (places or {}).items():
            ax.add_patch(Circle((x, y), radius, fill=False, edgecolor="black", linewidth=1.5))
            style = {"ha": "center", "va": "top", "fontsize": 9, "zorder": 4}
            ax.text(x, y - 1.15 * radius, text, **style)
    return figure


def network_shapes(settings) -> dict[str, tuple[int, int, int]]:
    """Channels, rows and columns of one sample after every step of the student.

    The steps have the names of the student's modules, and come in the order of the forward pass.
    settings: a `fastflow3d.FastFlow3DSettings`.
    """
    rows, columns = settings.cells
    channels = [settings.pillar_channels, *settings.level_channels]  # finest to coarsest
    levels = len(settings.level_channels)

    # Each encoder step halves rows and columns. It sees one sweep at a time.
    shapes = {"embedder": (channels[0], rows, columns)}
    for level in range(1, levels + 1):
        shapes[f"encoder_step_{level}"] = (channels[level], rows >> level, columns >> level)

    # Each decoder step doubles them. From here on, both sweeps are side by side in the channels.
    for step in range(1, levels + 1):
        level = levels - step
        shapes[f"decoder_step{step}"] = (2 * channels[level], rows >> level, columns >> level)
    shapes[f"decoder_step{levels + 1}"] = shapes[f"decoder_step{levels}"]
    return shapes


def network_figure(settings) -> Figure:
    """The student as a drawing, with channels x rows x columns after every step.

    settings: a `fastflow3d.FastFlow3DSettings`. A text with a shape has as its `gid` the name that
    the step has in `network_shapes`.
    """
    levels = len(settings.level_channels)
    width, height = 8.9 + 2.15 * levels, 2.2 + 1.3 * levels
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(1.4 - height, 1.4))
    ax.set_axis_off()

    # Full resolution is drawn at y = 0, and each coarser level below the finer one. The encoder
    # goes down to the right, the decoder up to the right.
    down = [(3.1 + 1.1 * level, -1.3 * level) for level in range(levels + 1)]
    up = [(down[-1][0] + 1.05 * (levels - level), -1.3 * level) for level in range(levels)]
    _draw_encoder(ax, settings, down)
    _draw_decoder(ax, settings, down, up)
    _draw_head(ax, settings, down[0][0], up[0][0])
    title = "The student halves the map and sees farther, then returns to the pillar of each point"
    ax.text(width / 2, 1.28, title, ha="center", va="top", fontsize=12)
    return figure


def _draw_encoder(ax: Axes, settings, down: list[tuple[float, float]]) -> None:
    """Both clouds, their pseudo-images and the maps of the encoder at the places `down`."""
    shapes, sweeps = network_shapes(settings), (SWEEP0, SWEEP1)
    _draw_box(ax, 0.7, 0.3, "sweep 0\nN0 × 3", SWEEP0)
    _draw_box(ax, 0.7, -0.3, "sweep 1\nN1 × 3", SWEEP1)
    _draw_note(ax, 1.85, 0.42, "9 numbers per point,\none linear layer,\nmean per pillar")
    _draw_arrow(ax, (1.2, 0), (2.6, 0))
    _draw_map(ax, shapes, "embedder", "2 pseudo-images", 0, down[0], sweeps)

    # The same weights for both sweeps, one after the other.
    for level in range(1, len(down)):
        name, (x, y) = f"encoder_step_{level}", down[level]
        _draw_map(ax, shapes, name, f"encoder {level}, twice", level, (x, y), sweeps)
        _draw_arrow(ax, (x - 0.56, y + 0.9), (x - 0.2, y + _side(level) / 2 + 0.14))


def _draw_decoder(
    ax: Axes, settings, down: list[tuple[float, float]], up: list[tuple[float, float]]
) -> None:
    """The maps of the decoder at the places `up`, and what they get from the encoder's level."""
    shapes, levels, joined = network_shapes(settings), len(up), (METHODS["student"],)
    channels = [settings.pillar_channels, *settings.level_channels]
    for level in reversed(range(levels)):
        step, (x, y), left = levels - level, up[level], down[level][0]
        _draw_map(ax, shapes, f"decoder_step{step}", f"decoder {step}", level, (x, y), joined)
        _draw_arrow(ax, (x - 0.85, y - 0.92), (x - 0.55, y - 0.5))
        _draw_arrow(ax, (left + 0.66, y), (x - 0.5, y), color="0.6")
        _draw_note(ax, (left + x) / 2 + 0.1, y + 0.1, f"both sweeps: {2 * channels[level]}")
    x, y = down[-1]
    _draw_note(ax, x + 0.45, y, f"both sweeps: {2 * channels[-1]}", ha="left")

    # The last convolution keeps the size.
    x, name = up[0][0] + 1.6, f"decoder_step{levels + 1}"
    _draw_map(ax, shapes, name, f"decoder {levels + 1}", 0, (x, 0), joined)
    _draw_arrow(ax, (x - 1.1, 0), (x - 0.5, 0))


def _draw_head(ax: Axes, settings, left: float, right: float) -> None:
    """The way back to points. left, right: x of the pseudo-images and of the last decoder step."""
    c, hidden, color = settings.pillar_channels, settings.head_channels, METHODS["student"]
    inputs = f"{c} + {c} + {2 * c} + 3 = {4 * c + 3}"
    _draw_arrow(ax, (right + 2.1, 0), (right + 2.5, 0))
    _draw_box(ax, right + 3.4, 0, f"head, for each point\n{inputs}\n→ {hidden} → 3", color)
    _draw_arrow(ax, (right + 4.3, 0), (right + 4.8, 0))
    _draw_box(ax, right + 5.2, 0, "flow\nN0 × 3", color)

    # Over everything else: what the head gets beside the decoder's map.
    _draw_arrow(ax, (left + 0.2, 0.62), (right + 3.1, 0.42), color="0.6", bend=-0.74 / right)
    text = f"both pseudo-images: {c} + {c}, and the offset in the pillar: 3"
    _draw_note(ax, (left + right) / 2 + 1.75, 1.0, text)


def _side(level: int) -> float:
    """Of the square that is drawn for a map. At true scale, the coarsest would be a dot."""
    return 0.9 * 0.8**level


def _draw_map(
    ax: Axes, shapes: dict, name: str, title: str, level: int, place: tuple, colors: tuple
) -> None:
    """A square for each color, one behind the other, with the title and the shape below."""
    (x, y), side = place, _side(level)
    for color, shift in reversed(list(zip(colors, (0.0, 0.12), strict=False))):
        corner = (x - side / 2 + shift, y - side / 2 + shift)
        style = {"facecolor": color, "edgecolor": "0.2", "linewidth": 1.0}
        ax.add_patch(Rectangle(corner, side, side, **style))
    shape = " × ".join(str(number) for number in shapes[name])
    style = {"ha": "center", "va": "top", "fontsize": 9}
    ax.text(x, y - side / 2 - 0.04, title, color="0.3", **style)
    ax.text(x, y - side / 2 - 0.22, shape, gid=name, weight="bold", **style)


def _draw_note(ax: Axes, x: float, y: float, text: str, **style) -> None:
    usual = {"ha": "center", "va": "center", "fontsize": 9, "color": "0.3"}
    ax.text(x, y, text, **(usual | style))


def _draw_box(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    style = {"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": "0.2", "alpha": 0.6}
    _draw_note(ax, x, y, text, color="black", bbox=style)


def _draw_arrow(ax: Axes, start: tuple, end: tuple, color: str = "0.2", bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": color, "connectionstyle": f"arc3,rad={bend}"}
    ax.annotate("", end, start, arrowprops=style)


def receptive_field_figure(
    pc0: torch.Tensor,
    pc1: torch.Tensor,
    squares: dict[str, tuple[float, float, float, float]],
    title: str,
    half_m: float = 25.6,
) -> Figure:
    """Both sweeps (N, 3) from above, and what each step of the network sees of them.

    squares: text -> (x from, x to, y from, y to) in meters, from the smallest to the largest.
    """
    figure, axes = from_above([title], columns=1, half_m=half_m, panel_in=7.0)
    figure.set_size_inches(9.5, 7.0)  # room for the legend
    draw_points(axes[0], pc0, SWEEP0, size=5.0)
    draw_points(axes[0], pc1, SWEEP1, size=5.0)
    for name, color in (("sweep 0", SWEEP0), ("sweep 1", SWEEP1)):
        axes[0].plot([], [], "o", color=color, label=name)

    # From dark to light. The palest colors of the map would not be seen on white.
    shades = np.linspace(0.15, 0.8, len(squares))
    for shade, (text, (x0, x1, y0, y1)) in zip(shades, squares.items(), strict=True):
        style = {"edgecolor": colormaps["magma"](shade), "linewidth": 2.0, "label": text}
        axes[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def stopped_fit_figure(
    losses: Sequence[float],
    last_improvement: int,
    errors: dict[str, Sequence[float]],
    kept: int,
    claim: str,
) -> Figure:
    """The total loss of a fit that stopped by itself and, below, its errors at every iteration.

    last_improvement: the iteration after which the loss no longer improved; the wait from there to
    the end is shaded. kept: the iteration whose flow is the result. errors: name -> error in
    meters at each iteration.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(losses, color="tab:blue", label="total loss")
    top.set(ylabel="loss (m²)", ylim=(0, None))

    # The errors are measured with the true flow, which the fit never sees.
    for (name, values), style in zip(errors.items(), itertools.cycle(("-", "--"))):
        bottom.plot(values, linestyle=style, color=f"C{1 + style.count('--')}", label=name)
    bottom.set(ylabel="EPE (m)", xlabel="iteration", ylim=(0, None))

    # The marks are drawn in both panels, but listed only once in the legend.
    end = len(losses) - 1
    for ax, prefix in ((top, ""), (bottom, "_")):
        waited = f"{prefix}no improvement for {end - last_improvement} iterations"
        ax.axvspan(last_improvement, end, color="0.85", label=waited)
        ax.axvline(kept, color="black", linestyle=":", label=f"{prefix}flow that is kept")
        ax.grid(alpha=0.3)
    figure.suptitle(claim)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def ablation_figure(
    rows: dict[str, dict[str, Sequence[float]]], claim: str, marks: dict[str, float] | None = None
) -> Figure:
    """One dot per seed: a row per variant, and a panel per column, with the errors in meters.

    rows: variant -> column -> one error per seed. The first variant is the one to compare with; its
    range over the seeds is shaded. A variant that METHODS does not name has the teacher's color.
    marks: column -> error of no motion, drawn as a vertical line.
    """
    columns = list(next(iter(rows.values())))
    figure = Figure(figsize=(10, max(2.4, 0.9 + 0.4 * len(rows))), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, columns, strict=True):
        first = next(iter(rows.values()))[column]
        ax.axvspan(min(first), max(first), color="0.88", label="range of the first row")
        for place, (name, row) in enumerate(rows.items()):
            values, color = row[column], _color_of(name) or METHODS["teacher"]
            ax.plot(values, [place] * len(values), "o", color=color, alpha=0.7, ms=5)
            ax.plot(sum(values) / len(values), place, "|", color="black", ms=16)
        if marks and column in marks:
            ax.axvline(marks[column], color="0.4", linestyle="--", label="no motion")
        ax.set(xlabel=f"{column} (m)", yticks=range(len(rows)), yticklabels=list(rows))
        ax.set_xlim(0, None)
        ax.locator_params(axis="x", nbins=5)  # more numbers would run into each other
        ax.grid(axis="x", alpha=0.3)
    axes[0].plot([], [], "o", color="0.4", label="one seed")
    axes[0].plot([], [], "|", color="black", ms=16, label="mean of the seeds")
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row is at the top
    figure.suptitle(claim)
    _legend_outside(figure, "lower center")
    return figure


# --- Frames and ego-motion ------------------------------------------------------------------------


def frames_figure(
    city_SE3_ego0: np.ndarray, city_SE3_ego1: np.ndarray, poles_city: np.ndarray
) -> Figure:
    """A map of the city with the car at both sweeps, the three frames, and their transforms.

    city_SE3_ego0, city_SE3_ego1: (4, 4). poles_city (N, 3): static things, in the city frame; they
    are named A, B, C and so on.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    ax = figure.subplots()

    # The city's axes are drawn in a corner of the map, because its origin is kilometers away.
    city_SE3_corner = np.eye(4)
    city_SE3_corner[:2, 3] = poles_city[:, :2].min(axis=0) + (0.5, -5.0)
    frames = (
        ("city frame, its axes only", city_SE3_corner, "black"),
        ("ego frame of sweep 0", city_SE3_ego0, SWEEP0),
        ("ego frame of sweep 1", city_SE3_ego1, SWEEP1),
    )
    car = np.array([[-2.2, -1], [2.2, -1], [2.2, 1], [-2.2, 1], [-2.2, -1]])
    for name, city_SE3_frame, color in frames:
        turn, place = city_SE3_frame[:2, :2], city_SE3_frame[:2, 3]
        ax.plot(*place, "o", color=color, label=name)
        for axis, direction in zip("xy", 2.8 * turn.T, strict=True):
            style = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "shrinkA": 0}
            ax.annotate("", place + direction, place, arrowprops=style)
            ax.text(*(place + 1.15 * direction), axis, color=color, ha="center", va="center")
        if color != "black":
            ax.plot(*(car @ turn.T + place).T, color=color, alpha=0.6)

    # A transform leads from its source to its target, and is read from right to left.
    corner, ego0, ego1 = (city_SE3_frame[:2, 3] for _, city_SE3_frame, _ in frames)
    for text, source, target, bend in (
        ("city_SE3_ego0", ego0, corner, -0.25),
        ("city_SE3_ego1", ego1, corner, -0.25),
        ("ego0_SE3_ego1", ego1, ego0, 0.25),
    ):
        style = {"arrowstyle": "->", "linestyle": "--", "color": "0.4", "shrinkA": 8, "shrinkB": 8}
        style["connectionstyle"] = f"arc3,rad={bend}"
        ax.annotate("", target, source, arrowprops=style)
        # The middle of such an arc is half of `bend` away from the middle of its chord.
        way = target - source
        middle = (source + target) / 2 + bend / 2 * np.array([way[1], -way[0]])
        style = {"ha": "center", "va": "center", "color": "0.3", "family": "monospace"}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        ax.text(*middle, text, **style)

    ax.plot(*poles_city[:, :2].T, "k^", markersize=9, label="poles, which do not move")
    for letter, pole in zip("ABCDEFGH", poles_city, strict=False):
        ax.text(pole[0] + 0.4, pole[1] + 0.2, letter, fontsize=12)
    ax.set(aspect="equal", xlabel="x in the city frame (m)", ylabel="y in the city frame (m)")
    ax.ticklabel_format(useOffset=False)
    ax.locator_params(nbins=12, integer=True)
    ax.margins(0.15)
    ax.set_title("The poles stay where they are; the frame of the car does not")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def compensation_figure(
    panels: dict[str, tuple], windows: dict[str, tuple], title: str, half_m: float = 25.6
) -> Figure:
    """Two clouds before and after ego-motion compensation, and below each some windows enlarged.

    panels: title -> (pc0 (N, 3), pc1 (M, 3)), without ground. windows: name -> (x from, x to, y
    from, y to) in meters. title: what the figure shows.
    """
    wide = [[name] * len(windows) for name in panels]
    small = [[f"{name}/{window}" for window in windows] for name in panels]
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    axes = figure.subplot_mosaic([sum(wide, []), sum(small, [])], height_ratios=(2, 1))
    for name, (pc0, pc1) in panels.items():
        whole = axes[name]
        for cloud, color, text in ((pc0, SWEEP0, "sweep 0"), (pc1, SWEEP1, "sweep 1")):
            draw_points(whole, cloud, color, size=8.0)
            for window in windows:
                draw_points(axes[f"{name}/{window}"], cloud, color, size=40.0)
            whole.scatter([], [], color=color, label=text)  # for the legend: draw_points has none
        whole.plot(0, 0, marker=">", color="black")  # the ego, which looks to the right
        whole.set(title=name, xlim=(-half_m, half_m), ylim=(-half_m, half_m), aspect="equal")
        whole.set(xlabel="x, forward (m)", ylabel="y, left (m)")

        # Each window is a box in the large panel, under the same name.
        for window, limits in windows.items():
            _enlarge(whole, axes[f"{name}/{window}"], limits, window)
            whole.text(limits[0], limits[3] + 0.5, window)
    _legend_outside(figure, "lower center")
    figure.suptitle(title)
    return figure
