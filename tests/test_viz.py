"""Figures that explain: what they show is what the code does."""

import pytest
import torch
from matplotlib.colors import to_rgb

import fastflow3d
import viz
from fastflow3d import FastFlow3DSettings

SETTINGS = {
    "narrow": fastflow3d.MODELS["narrow"],
    "not square, two levels": FastFlow3DSettings(
        half_extent_m=(6.4, 3.2, 3.0),
        cell_m=0.4,
        pillar_channels=3,
        level_channels=(5, 7),
        level_blocks=(1, 2),
        head_channels=11,
    ),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_shapes_in_the_drawing_of_the_network_are_those_of_a_forward_pass(settings):
    model = fastflow3d.FastFlow3D(settings).eval()
    shapes, into_head = {}, []

    def keep(name):
        def hook(module, inputs, output):
            shapes[name] = tuple(output.shape[1:])

        return hook

    def keep_pseudo_image(module, inputs):
        shapes["embedder"] = tuple(inputs[0].shape[1:])

    model.backbone.register_forward_pre_hook(keep_pseudo_image)
    for name, part in model.backbone.named_children():
        part.register_forward_hook(keep(name))
    for part in model.head.decoder:
        part.register_forward_hook(lambda part, inputs, output: into_head.append(inputs[0].shape))
    cloud = torch.rand(20, 3)
    (flow,), _ = model([cloud], [cloud])
    assert viz.network_shapes(settings) == shapes

    texts = viz.network_figure(settings).axes[0].texts
    drawn = {text.get_gid(): text.get_text() for text in texts if text.get_gid()}
    as_text = {name: " × ".join(map(str, shape)) for name, shape in shapes.items()}
    assert drawn == as_text

    # The head: what goes in, its hidden channels, and the flow.
    (head,) = [text.get_text() for text in texts if text.get_text().startswith("head")]
    total = head.split("= ")[1].split()[0]
    hidden, last = head.split("→ ")[1:]
    found = [int(number) for number in (total, hidden, last)]
    assert found == [into_head[0][1], into_head[2][1], flow.shape[1]]

    # Before the pillars, nine numbers describe a point.
    per_point = model.state_dict()["embedder.feature_net.pfn_layers.0.0.weight"].shape[1]
    assert any(text.get_text().startswith(f"{per_point} numbers per point") for text in texts)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_arrows_of_the_drawing_bring_to_the_decoder_are_the_channels_of_both_sweeps(
    settings,
):
    model = fastflow3d.FastFlow3D(settings).eval()
    brought = []
    for i in range(len(settings.level_channels)):
        step = model.backbone.get_submodule(f"decoder_step{i + 1}")
        step.register_forward_hook(lambda step, inputs, output: brought.append(inputs[1].shape[1]))
    cloud = torch.rand(20, 3)
    model([cloud], [cloud])
    texts = [text.get_text() for text in viz.network_figure(settings).axes[0].texts]
    drawn = [int(text.split(": ")[1]) for text in texts if text.startswith("both sweeps: ")]
    coarsest = 2 * settings.level_channels[-1]  # beside the last encoder, not on an arrow
    assert drawn == [*brought, coarsest]


def test_a_receptive_field_is_drawn_at_its_true_size():
    points = torch.rand(5, 3)
    square = (-1.0, 3.0, 2.0, 4.5)
    figure = viz.receptive_field_figure(points, points, {"a field": square}, "title")
    (patch,) = figure.axes[0].patches
    x, y, width, height = *patch.get_xy(), patch.get_width(), patch.get_height()
    assert (x, x + width, y, y + height) == square
    assert figure.axes[0].get_aspect() == 1


def test_a_claim_becomes_the_title_and_known_names_get_their_colors():
    lines = {"background": ([0, 1], [0, 1]), "moving": ([0, 1], [1, 0]), "odd": ([0, 1], [1, 1])}
    figure = viz.lines_figure(lines, "x", "y")
    before = figure.axes[0].lines[2].get_color()
    viz.claim(figure, "the claim")
    assert figure.axes[0].get_title() == "the claim"
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors == [viz.GROUPS["background"], viz.GROUPS["moving"], before]

    histogram = viz.histogram_figure({"moving": torch.rand(50)}, "x", (0, 1))
    bars = viz.claim(histogram, "the claim").axes[0].patches
    assert len({bar.get_facecolor() for bar in bars}) == 1
    assert bars[0].get_edgecolor() == bars[-1].get_edgecolor()


def test_a_claim_marks_places_in_every_panel_but_not_in_a_color_bar():
    images = {"one": torch.rand(4, 4), "two": torch.rand(4, 4)}
    figure = viz.claim(viz.images_figure(images, 2.0, "value"), "both", {"here": (1.0, 0.5, 0.3)})
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [["here"], ["here"], []]
    assert figure.axes[0].patches[0].center == (1.0, 0.5)


def test_a_run_is_drawn_with_its_validations_and_the_level_of_no_motion():
    steps = [{"step": i, "loss": 1.0 / i, "weight": "formula"} for i in (1, 2)]
    steps += [{"step": i, "loss": 1.0 / i, "weight": "none"} for i in (3, 4)]
    scores = [{"step": 2, "paper_three_way": 0.3}, {"step": 4, "paper_three_way": 0.1}]
    figure = viz.learned_figure(steps + scores, {"formula": 0.5, "none": 0.7}, 0.2)
    of_loss, of_validation = ({line.get_label(): line for line in ax.lines} for ax in figure.axes)
    # The level of no motion changes with the weight, at the step where the loss does.
    assert of_loss["no-motion"].get_ydata().tolist() == [0.5, 0.5, 0.7, 0.7]
    assert set(of_validation["no-motion"].get_ydata()) == {0.2}
    validated = of_validation["student, validated"]
    assert list(validated.get_xdata()) == [2, 4] and list(validated.get_ydata()) == [0.3, 0.1]


def test_costs_are_bars_with_their_dollars_from_top_to_bottom():
    ax = viz.costs_figure({"labels": 1234.4, "training": 49.0}).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [1234.4, 49.0]
    assert [text.get_text() for text in ax.texts] == ["$1,234", "$49"]
    assert ax.yaxis_inverted()


def test_the_best_bar_has_a_star_and_a_number_that_is_missing_has_no_bar():
    numbers = {"no-motion": float("nan"), "nearest": 0.5, "student": 0.25}
    (ax,) = viz.judged_figure({"a number (m)": numbers}, "title").axes
    assert [bar.get_height() for bar in ax.patches] == [0.5, 0.25]
    assert [text.get_text() for text in ax.texts] == ["none", "0.500", "★ 0.250"]


def test_a_side_view_has_x_to_the_right_z_up_and_the_height_of_the_grid():
    points = {"kept": torch.tensor([[1.0, 9.0, 2.0]])}
    figure = viz.side_view_figure({"a panel": points}, "title", {"kept": "tab:blue"}, grid_z_m=3.0)
    (ax,) = figure.axes
    assert ax.collections[0].get_offsets().tolist() == [[1.0, 2.0]]
    band = ax.patches[0].get_window_extent().transformed(ax.transData.inverted())
    assert (round(band.y0, 6), round(band.y1, 6)) == (-3.0, 3.0)


def test_a_legend_covers_no_data_and_has_each_name_once():
    one = {"student": {"here": 0.2, "there": 0.1}, "teacher": {"here": 0.3, "there": 0.4}}
    by_speed, by_distance = {}, {}
    for label in viz.metrics.CLASSES:
        for speed in ("below_0.5_mps", "0.5_to_2_mps", "above_2_mps"):
            by_speed[f"grid_epe_{label}_{speed}"] = float("nan")
    for group in ("fd", "fs", "bs"):
        for inner in viz.metrics.RINGS_M:
            by_distance[f"grid_epe_{group}_from_{inner}_m"] = 0.1
    against_time = {"seconds_per_pair": 0.1, "paper_three_way": 0.1}
    steps = [{"step": i, "loss": 0.1, "weight": "none" if i > 9 else "formula"} for i in range(20)]
    score = {"step": 19, "paper_three_way": 0.1, "bucketed_dynamic_mean": 0.9}
    law = {kind: {3: [0.1, 0.2]} for kind in ("student", "supervised", "better")}
    levels = {"no-motion": 0.3, "teacher": 0.1, "better teacher": 0.05}
    cloud = torch.rand(9, 3)

    figures = [
        viz.bars_figure(one, "error (m)"),
        viz.histogram_figure({"moving": torch.rand(50)}, "x", (0, 1), {"mark": 0.5}),
        viz.lines_figure({"student": ([0, 1], [0, 1])}, "x", "y"),
        viz.error_by_speed_figure({"teacher": by_speed, "student": by_speed}),
        viz.error_by_distance_figure({"teacher": by_distance, "student": by_distance}),
        viz.error_against_time_figure({"student": against_time}),
        viz.learning_curve_figure([*steps, score]),
        viz.scaling_law_figure(law, levels),
        viz.clouds_figure({"one": (cloud, cloud), "two": (cloud, cloud)}),
        viz.pillars_figure(cloud, cloud, 0.2, (0, 2), (0, 1)),
        viz.claim(viz.bars_figure(one, "error (m)"), "a claim"),
    ]
    for figure in figures:
        viz.FigureCanvasAgg(figure).draw()
        of_panels = [ax.get_legend() for ax in figure.axes if ax.get_legend() is not None]
        legends = [*figure.legends, *of_panels]
        assert legends
        for legend in legends:
            names = [text.get_text() for text in legend.get_texts()]
            assert names and len(set(names)) == len(names)
            box = legend.get_window_extent()
            assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes), names


def test_a_method_has_the_same_color_in_every_figure():
    bars = viz.bars_figure({"nearest": {"a": 1.0}, "student": {"a": 2.0}}, "error (m)")
    drawn = [patch.get_facecolor()[:3] for patch in bars.axes[0].patches]
    assert drawn == [to_rgb(viz.METHODS["nearest"]), to_rgb(viz.METHODS["student"])]
    lines = viz.lines_figure({"student": ([0, 1], [0, 1])}, "x", "y").axes[0].lines
    assert lines[0].get_color() == viz.METHODS["student"]
    errors = {"teacher": {"a": [1.0]}, "student": {"a": [2.0]}, "fewer steps": {"a": [3.0]}}
    dots = [
        line for line in viz.ablation_figure(errors, "claim").axes[0].lines if len(line.get_xdata())
    ]
    colors = [line.get_color() for line in dots if line.get_marker() == "o"]
    assert colors == [viz.METHODS["teacher"], viz.METHODS["student"], viz.METHODS["teacher"]]

    # Two methods share a color only if they are the same one under two names.
    others = {name: color for name, color in viz.METHODS.items() if name != "fast"}
    assert len(set(others.values())) == len(others)
