"""Files of the 2023 and 2024 challenges: written, taken by Argoverse's own tools where installed, and read back."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather

import data
import metrics
import synthetic
import viz
import zeroflow


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> data.Argoverse2Pairs:
    """Two logs of eight sweeps: fourteen pairs, of which 0, 5 and 10 (2023), and 0 and 5 of each log (2024) count."""
    folder = tmp_path_factory.mktemp("challenge") / "val"
    settings = synthetic.StreetSettings(azimuths=190, beam_step=4, range_m=70.0, sweeps=8, seed=3)
    synthetic.write_logs(folder, 2, settings)
    return data.open_dataset(folder)


def truth(pair: data.SweepPair) -> zeroflow.Estimate:
    return zeroflow.Estimate(pair.flow, 0.0)


def with_errors(pair: data.SweepPair) -> zeroflow.Estimate:
    """The truth, off by up to decimetres, a different one for each point."""
    generator = torch.Generator().manual_seed(pair.timestamp0_ns % 1000)
    error = 0.2 * torch.randn(pair.pc0.shape, generator=generator)
    return zeroflow.Estimate(torch.where(pair.is_ground0[:, None], 0.0, pair.flow + error), 0.0)


def open_again(dataset: data.Argoverse2Pairs) -> data.Argoverse2Pairs:
    return data.open_dataset(next(iter(dataset._folders.values())).parent)


def evaluated(dataset: data.Argoverse2Pairs, file: Path, masks: data.ChallengeFiles | None = None) -> dict:
    """As the command evaluates an archive."""
    dataset = open_again(dataset)
    predictions = data.ChallengePredictions(file, dataset, masks)
    dataset.keys = predictions.keys
    mask = masks.mask if masks else dataset.challenge_mask
    return zeroflow.evaluate(dataset, zeroflow.from_predictions(predictions), mask)


def write_masks(dataset: data.Argoverse2Pairs, file: Path, keys, prefix: str = "") -> dict:
    """Masks that are not those we would make: every other point of some pairs."""
    masks = {}
    with zipfile.ZipFile(file, "w") as archive:
        for key in keys:
            pair = dataset[dataset.keys.index(key)]
            masks[key] = np.arange(len(pair.pc0)) % 2 == 0
            out = pyarrow.BufferOutputStream()
            feather.write_feather(pyarrow.table({"mask": masks[key]}), out)
            archive.writestr(f"{prefix}{key.log_id}/{key.timestamp0_ns}.feather", out.getvalue().to_pybytes())
    return masks


def read_member(file: Path, name: str) -> pyarrow.Table:
    with zipfile.ZipFile(file) as archive:
        return feather.read_table(pyarrow.BufferReader(archive.read(name)))


# --- What is written -------------------------------------------------------------------------------------------------


def test_every_fifth_pair_counts_of_the_split_in_2023_and_of_each_log_in_2024(tmp_path):
    """Log a has 8 sweeps, one of them late; b has 2; c has 13. Gaps count as pairs, as they did there."""
    step = 100_000_000
    stamps = {"a": [i * step for i in (0, 1, 2, 3, 7, 8, 9, 10)], "b": [0, step], "c": [i * step for i in range(13)]}
    for log, every in stamps.items():
        (tmp_path / log / "sensors" / "lidar").mkdir(parents=True)
        for stamp in every:
            (tmp_path / log / "sensors" / "lidar" / f"{stamp}.feather").touch()
    dataset = data.open_dataset(tmp_path)
    assert len(dataset) == 6 + 1 + 12
    named = data.challenge_members(dataset, 2023)
    # In a row: a 0 to 6, b 7, c 8 to 19; so 0 and 5 of a, 10 (the third of c) and 15 (its eighth).
    assert list(named) == ["a/0.feather", f"a/{8 * step}.feather", f"c/{2 * step}.feather", f"c/{7 * step}.feather"]
    numbered = data.challenge_members(dataset, 2024)
    assert list(numbered) == [f"{log}/{i:010d}.feather" for log, i in zip("aabccc", (0, 5, 0, 0, 5, 10), strict=True)]
    assert numbered["c/0000000010.feather"] == ("c", 10 * step, 11 * step)


def test_a_file_of_2023_has_a_row_a_masked_point_of_raw_flow_and_says_what_moves(tmp_path, logs):
    file = tmp_path / "submission.zip"
    assert zeroflow.write_submission(file, logs, truth, 2023) == 3
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == sorted(data.challenge_members(logs, 2023))
    for name, key in data.challenge_members(logs, 2023).items():
        pair, table = logs[logs.keys.index(key)], read_member(file, name)
        mask = logs.challenge_mask(pair).numpy()
        assert set(table.column_names) == {*data.FLOW_COLUMNS, "is_dynamic"}
        assert [str(table[column].type) for column in data.FLOW_COLUMNS] == ["halffloat"] * 3
        assert table.num_rows == mask.sum() < len(mask) and str(table["is_dynamic"].type) == "bool"
        np.testing.assert_array_equal(table["is_dynamic"].to_numpy(), (pair.flow.norm(dim=1) > 0.05).numpy()[mask])
        E, p = pair.ego1_SE3_ego0.numpy(), pair.pc0.double().numpy()
        expected = ((p + pair.flow.numpy()) @ E[:3, :3].T + E[:3, 3] - p)[mask]
        np.testing.assert_allclose(data.stack(table, data.FLOW_COLUMNS), expected, atol=2e-3)  # float16 of metres


def test_a_file_of_2024_has_a_row_a_point_of_residual_flow_all_valid(tmp_path, logs):
    file = tmp_path / "submission.zip"
    assert zeroflow.write_submission(file, logs, with_errors, 2024, is_supervised=True) == 4
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("metadata.json")) == {"Is Supervised?": True}
        assert all(info.compress_type == zipfile.ZIP_DEFLATED for info in archive.infolist())
        assert sorted(archive.namelist()) == sorted([*data.challenge_members(logs, 2024), "metadata.json"])
    for name, key in data.challenge_members(logs, 2024).items():
        pair, table = logs[logs.keys.index(key)], read_member(file, name)
        assert set(table.column_names) == {*data.FLOW_COLUMNS, "is_valid"} and table["is_valid"].to_numpy().all()
        assert table.num_rows == len(pair.pc0)
        written = data.stack(table, data.FLOW_COLUMNS)
        np.testing.assert_allclose(written, with_errors(pair).flow, atol=1e-3)
        assert (written[pair.is_ground0.numpy()] == 0).all()


def test_given_masks_say_which_pairs_and_points_are_written(tmp_path, logs):
    keys = [logs.keys[i] for i in (2, 9)]
    masks = write_masks(logs, tmp_path / "masks.zip", keys, prefix="val-masks/")
    given = data.ChallengeFiles(tmp_path / "masks.zip")
    file = tmp_path / "submission.zip"
    assert zeroflow.write_submission(file, logs, truth, 2023, given) == 2
    for key in keys:
        table = read_member(file, f"{key.log_id}/{key.timestamp0_ns}.feather")
        assert table.num_rows == masks[key].sum()
    numbers = evaluated(logs, file, given)
    assert numbers["pairs"] == 2 and numbers["av2_three_way"] < 1e-3
    with pytest.raises(data.DataError, match="is it of this sweep and these masks"):
        evaluated(logs, file)  # our own masks have other points
    # The points outside say nothing, so they stand.
    predictions = data.ChallengePredictions(file, logs, given)
    pair = logs[2]
    assert predictions(pair)[0][~torch.from_numpy(masks[pair.key])].eq(0).all() and pair.pc0.norm() > 0


def test_masks_say_which_pairs_the_av2_numbers_are_of(tmp_path, logs, capsys):
    """As the challenge's own masks do: with some pairs only, every other number is still of all."""
    split = str(next(iter(logs._folders.values())).parent)
    write_masks(logs, tmp_path / "masks.zip", [logs.keys[2]])
    found = {}
    for name, options in {"all": [], "masked": ["--masks", str(tmp_path / "masks.zip")]}.items():
        numbers = tmp_path / "numbers.json"
        assert (
            zeroflow.main(["evaluate", "--data", split, "--baseline", "nearest", "--json", str(numbers), *options]) == 0
        )
        found[name] = json.loads(numbers.read_text())
    given = data.ChallengeFiles(tmp_path / "masks.zip")
    alone = zeroflow.evaluate([logs[2]], zeroflow.timed(zeroflow.nearest_neighbour), given.mask)
    assert found["masked"]["av2_three_way"] == pytest.approx(alone["av2_three_way"])
    assert found["masked"]["av2_three_way"] != pytest.approx(found["all"]["av2_three_way"], abs=1e-4)
    assert found["masked"]["grid_three_way"] == found["all"]["grid_three_way"] and found["masked"]["pairs"] == 14
    submit = [
        "submit",
        "--data",
        split,
        "--baseline",
        "nearest",
        "--challenge",
        "2023",
        "--out",
        str(tmp_path / "s.zip"),
    ]
    assert zeroflow.main([*submit, "--masks", str(tmp_path / "masks.zip")]) == 0
    assert "s.zip: 1 pairs for the challenge of 2023" in capsys.readouterr().out
    write_masks(logs, tmp_path / "foreign.zip", [logs.keys[2]], prefix="x")  # xstreet-..., no log of ours
    assert zeroflow.main([*submit, "--masks", str(tmp_path / "foreign.zip")]) == 1
    assert "which no two sweeps of the data are" in capsys.readouterr().err


def test_accuracy_and_angle_of_the_2023_challenge_are_of_raw_flow(logs):
    """An error of 7 cm is 7 % of an ego step of a metre, and all of a residual of nothing."""
    pair = logs[0]
    off = zeroflow.Estimate(pair.flow + torch.tensor([0.11, 0, 0]), 0.0)
    numbers = zeroflow.evaluate([pair], lambda _: off, logs.challenge_mask)
    step = np.linalg.norm(pair.ego1_SE3_ego0.numpy()[:3, 3])
    assert step < 1.1 and numbers["av2_acc_relaxed_background_static"] == 0
    far = dataclasses.replace(pair, ego1_SE3_ego0=torch.eye(4, dtype=torch.float64))
    far.ego1_SE3_ego0[0, 3] = -2.0
    numbers = zeroflow.evaluate([far], lambda _: off, lambda pair: logs.challenge_mask(logs[0]))
    assert numbers["av2_acc_relaxed_background_static"] == 1  # 5.5 % of two metres
    assert numbers["av2_acc_strict_background_static"] == 0 and numbers["grid_acc_relaxed"] < 0.5


def test_a_pair_with_a_gap_is_no_pair_and_still_in_a_submission(tmp_path, logs):
    """As in av2's own loader: of a log whose sweep 6 is lost, pair 5 is of sweeps 5 and 7."""
    shutil.copytree(logs._folders[logs.keys[0].log_id], tmp_path / "val" / "log")
    lost = tmp_path / "val" / "log" / "sensors" / "lidar" / f"{logs.stamps[logs.keys[0].log_id][6]}.feather"
    lost.unlink()
    dataset = data.open_dataset(tmp_path / "val")
    assert len(dataset) == 5 and len(dataset.skipped) == 1
    assert zeroflow.write_submission(tmp_path / "s.zip", dataset, truth, 2023) == 2
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert sorted(archive.namelist())[1] == f"log/{dataset.stamps['log'][5]}.feather"


def test_a_submission_that_would_lack_a_pair_or_a_number_is_not_written(tmp_path, logs):
    def fails(pair):
        raise data.DataError("no label")

    with pytest.raises(data.DataError, match="no label"):
        zeroflow.write_submission(tmp_path / "x.zip", logs, fails, 2024)

    def diverged(pair):
        return zeroflow.Estimate(torch.where(torch.arange(len(pair.flow))[:, None] == 5, torch.nan, pair.flow), 0.0)

    with pytest.raises(data.DataError, match="flow is not finite at 1 points; did the training diverge"):
        zeroflow.write_submission(tmp_path / "x.zip", logs, diverged, 2024)
    with pytest.raises(data.DataError, match="flow is not finite at 1 points"):
        zeroflow.evaluate(logs, diverged, max_broken=1)
    assert not list(tmp_path.iterdir())  # nothing, not half of it


# --- And read back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("challenge", data.CHALLENGES)
def test_a_perfect_flow_is_perfect_from_file_to_archive_to_every_metric(tmp_path, logs, challenge):
    file = tmp_path / "submission.zip"
    zeroflow.write_submission(file, logs, truth, challenge)
    numbers = evaluated(logs, file)
    assert numbers["pairs"] == (3 if challenge == 2023 else 4)
    lying = {"grid", "epe"} if challenge == 2023 else set()  # points beyond the 2023 mask are not in its files
    checked = 0
    for key, value in numbers.items():
        if np.isnan(value) or "points" in key or key in ("pairs", "seconds_per_pair") or key.split("_")[0] in lying:
            continue
        if "acc" in key or "_cm_" in key:
            assert value == 1, key
        elif "iou" in key:
            assert value > 0.99, key  # float16 moves a flow of 5 cm over the threshold or under it
        else:
            assert value < (0.01 if "angle" in key or "bucketed_dynamic" in key else 1e-3), key
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("challenge", data.CHALLENGES)
def test_an_archive_has_the_numbers_of_the_method_that_wrote_it(tmp_path, logs, challenge):
    file = tmp_path / "submission.zip"
    zeroflow.write_submission(file, logs, with_errors, challenge)
    from_archive = evaluated(logs, file)
    dataset = open_again(logs)
    members = set(data.challenge_members(dataset, challenge).values())
    dataset.keys = [key for key in dataset.keys if key in members]
    directly = zeroflow.evaluate(dataset, with_errors, dataset.challenge_mask)
    for key in ("three_way_2024", "paper_three_way", "av2_three_way", "bucketed_dynamic_mean", "av2_dynamic_iou"):
        assert from_archive[key] == pytest.approx(directly[key], abs=2e-3), key
        assert directly[key] > 0.05
    if challenge == 2024:
        assert from_archive["grid_epe"] == pytest.approx(directly["grid_epe"], abs=1e-4)
    # A folder that holds the same files is as good.
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "folder")
    again = evaluated(logs, tmp_path / "folder")
    assert again["av2_three_way"] == from_archive["av2_three_way"] and again["pairs"] == from_archive["pairs"]


def test_the_files_word_on_what_moves_counts_and_not_its_flow(tmp_path, logs):
    """Two files of the same flow: one says that nothing moves."""
    file, still = tmp_path / "submission.zip", tmp_path / "still.zip"
    zeroflow.write_submission(file, logs, truth, 2023)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(still, "w") as changed:
        for name in archive.namelist():
            table = read_member(file, name).drop_columns("is_dynamic")
            out = pyarrow.BufferOutputStream()
            none = np.zeros(table.num_rows, dtype=bool)
            feather.write_feather(table.append_column("is_dynamic", pyarrow.array(none)), out)
            changed.writestr(name, out.getvalue().to_pybytes())
    assert evaluated(logs, still)["av2_dynamic_iou"] == 0 < 0.99 < evaluated(logs, file)["av2_dynamic_iou"]


def test_what_is_not_valid_in_a_2024_file_counts_as_not_moving(tmp_path, logs):
    file = tmp_path / "x" / logs.keys[0].log_id / "0000000000.feather"
    file.parent.mkdir(parents=True)
    pair = logs[0]
    flow = np.tile(np.float32([1, 2, 3]), (len(pair.pc0), 1))
    is_valid = np.arange(len(flow)) % 3 == 0
    columns = {name: flow[:, i] for i, name in enumerate(data.FLOW_COLUMNS)}
    feather.write_feather(pyarrow.table({**columns, "is_valid": is_valid}), file)
    predictions = data.ChallengePredictions(tmp_path / "x", logs)
    assert predictions.challenge == 2024 and predictions.keys == [logs.keys[0]]
    residual, says_dynamic = predictions(pair)
    assert says_dynamic is None
    assert residual[is_valid].eq(torch.tensor([1.0, 2, 3])).all() and residual[~is_valid].eq(0).all()


def test_files_that_cannot_be_a_challenges_are_named(tmp_path, logs):
    zeroflow.write_submission(tmp_path / "good.zip", logs, truth, 2024)
    whole = (tmp_path / "good.zip").read_bytes()
    (tmp_path / "torn.zip").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 3 + 2000] = bytes(2000)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("another-log/0000000000.feather", b"")
    short = tmp_path / "short" / logs.keys[0].log_id / "0000000000.feather"
    short.parent.mkdir(parents=True)
    columns = {name: np.zeros(3, dtype=np.float16) for name in data.FLOW_COLUMNS}
    feather.write_feather(pyarrow.table({**columns, "is_valid": np.ones(3, dtype=bool)}), short)
    shutil.copytree(tmp_path / "short", tmp_path / "twice" / "a")
    shutil.copytree(tmp_path / "short", tmp_path / "twice" / "b")
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "short", both)
    shutil.copy(short, both / logs.keys[0].log_id / f"{logs.keys[0].timestamp0_ns}.feather")
    words = tmp_path / "words" / logs.keys[0].log_id / "0000000000.feather"
    words.parent.mkdir(parents=True)
    count = len(logs[0].pc0)
    flow = {name: np.zeros(count, dtype=np.float16) for name in data.FLOW_COLUMNS}
    feather.write_feather(pyarrow.table({**flow, "is_valid": ["no"] * count}), words)
    nulls = tmp_path / "nulls" / logs.keys[0].log_id / "0000000000.feather"
    nulls.parent.mkdir(parents=True)
    none = pyarrow.array([None] + [0.0] * (count - 1))
    feather.write_feather(pyarrow.table({**flow, "flow_tx_m": none, "is_valid": [True] * count}), nulls)
    for name, message in (
        ("twice", "holds both a/.* and b/.*; choose one of the folders"),
        ("both", "holds files of both challenges"),
        ("words", "its column is_valid is string"),
        ("nulls", "its column flow_tx_m is double, or has nulls"),
        ("no.zip", "no.zip: no such file or folder"),
        ("torn.zip", "torn.zip: neither a folder nor a whole zip"),
        ("damaged.zip", "damaged.zip/.*: cannot be unpacked"),
        ("other.zip", "other.zip: no prediction for any pair of the data; expected"),
        ("short", r"0000000000.feather: has 3 rows, expected \d+; is it of this sweep"),
    ):
        with pytest.raises(data.DataError, match=message):
            evaluated(logs, tmp_path / name)


def test_without_a_ground_raster_the_2023_numbers_stay_out_and_its_files_need_masks(tmp_path, logs, monkeypatch):
    monkeypatch.setattr(data.Argoverse2Pairs, "challenge_mask", lambda self, pair: None)
    numbers = zeroflow.evaluate([logs[0]], truth, logs.challenge_mask)
    assert np.isnan(numbers["av2_three_way"]) and numbers["grid_three_way"] == 0
    with pytest.raises(data.DataError, match="no ground raster to make a mask of; give --masks"):
        zeroflow.write_submission(tmp_path / "x.zip", logs, truth, 2023)


def test_submit_and_evaluate_as_a_user_types_them(tmp_path, logs, capsys):
    split = next(iter(logs._folders.values())).parent
    out, numbers, figures = tmp_path / "s.zip", tmp_path / "n.json", tmp_path / "figures"
    common = ["--data", str(split)]
    assert zeroflow.main(["submit", *common, "--baseline", "nearest", "--challenge", "2024", "--out", str(out)]) == 0
    assert f"{out}: 4 pairs for the challenge of 2024" in capsys.readouterr().out
    evaluate = ["evaluate", *common, "--predictions", str(out), "--json", str(numbers), "--figures", str(figures)]
    assert zeroflow.main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "challenge of 2024: has 4 of 14 pairs" in printed and "paper: ZeroFlow's published code" in printed
    found = json.loads(numbers.read_text())
    assert found["seconds_per_pair"] is None and found["pairs"] == 4  # JSON has no NaN
    keys = "epe grid_epe grid_three_way grid_three_way_fd paper_three_way av2_three_way three_way_2024"
    assert all(f"{found[key]:9.4f}" in printed for key in [*keys.split(), "bucketed_dynamic_mean"])
    pictures = sorted(file.name for file in figures.iterdir())
    names = ("error_against_time", "error_by_distance", "error_by_speed", "median_pair", "worst_pair")
    assert pictures == [f"{name}.png" for name in names]
    assert "as for the challenge of 2024" in printed
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in figures.iterdir())
    for arguments, message in (
        (["submit", *common, "--baseline", "nearest", "--challenge", "2024", "--out", "s.tar"], "ends in .zip"),
        (["submit", *common, "--baseline", "nearest", "--challenge", "2024", "--out", "s.zip", "--masks", "m"], "2023"),
        (
            ["submit", *common, "--baseline", "nearest", "--challenge", "2023", "--out", "s.zip", "--supervised"],
            "in 2024",
        ),
        (["evaluate", *common, "--predictions", "no.zip"], "no.zip: no such file or folder"),
        (["evaluate", *common, "--baseline", "nearest", "--masks", "no.zip"], "no.zip: no such file or folder"),
    ):
        assert zeroflow.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_the_papers_rows_stand_beside_a_whole_validation_split_only(logs, monkeypatch, capsys):
    split = next(iter(logs._folders.values())).parent
    arguments = ["evaluate", "--data", str(split), "--baseline", "no-motion"]
    assert zeroflow.main(arguments) == 0
    assert "the paper, same split" not in capsys.readouterr().out
    monkeypatch.setattr(metrics, "AV2_VAL_LOGS", 2)
    assert zeroflow.main(arguments) == 0
    rows = capsys.readouterr().out.split("the paper, same split")[1].splitlines()[1:]
    assert rows[0].split()[:3] == ["ZeroFlow", "XL", "5x"] and any(row.startswith("no-motion *") for row in rows)


# --- Figures ---------------------------------------------------------------------------------------------------------


def test_error_figures_show_the_numbers_they_are_given(logs):
    pair = logs[0]
    numbers = zeroflow.evaluate(logs, with_errors)
    numbers |= {"paper_three_way": 0.123, "seconds_per_pair": 400.0}
    ax = viz.error_against_time_figure({"ours": numbers}).axes[0]
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in ax.lines}
    assert points["ours"] == [400.0, 0.123] and ax.get_xlim()[1] > 400
    assert [26.285, 0.068] in [line.get_xydata()[0].tolist() for line in ax.lines]
    unknown = viz.error_against_time_figure({"file": numbers | {"seconds_per_pair": float("nan")}}).axes[0]
    assert "file (time unknown)" in [text.get_text() for text in unknown.get_legend().get_texts()]
    axes = viz.error_by_distance_figure({"ours": numbers}).axes
    for ax, group in zip(axes, ("fd", "fs", "bs"), strict=True):
        expected = [numbers[f"grid_epe_{group}_from_{inner}_m"] for inner in (0, 10, 20, 30, 40)]
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)
        assert ax.get_ylim() == axes[0].get_ylim()  # panels to be compared
    bars = viz.error_by_speed_figure({"ours": numbers}).axes[0].patches
    heights = [bar.get_height() for bar in bars if bar.get_width() == 0.25]
    assert numbers["grid_epe_car_above_2_mps"] in heights and len(heights) == 15
    is_input = zeroflow.input_masks(pair)[0]
    flow = with_errors(pair).flow
    colours = viz.error_map_figure(pair, flow, is_input, "title").axes[1].collections[-1]
    expected = np.sort((flow - pair.flow)[is_input].norm(dim=1))
    np.testing.assert_allclose(colours.get_array(), expected)  # large errors are drawn last, on top
    assert colours.get_clim() == (0, 0.5)


def test_the_worst_and_the_median_pair_are_drawn(tmp_path, logs, monkeypatch):
    titles = []
    monkeypatch.setattr(viz, "error_map_figure", lambda *a: titles.append(a[3]) or viz.Figure())
    three_ways = dict(enumerate([0.3, float("nan"), 0.1, 0.5, 0.2, 0.4]))
    result = zeroflow.evaluate([logs[0]], truth)
    zeroflow._draw_figures(tmp_path, logs, truth, "name", result, three_ways)
    assert "the median pair" in titles[0] and titles[0].endswith("0.300 m")
    assert "the worst pair" in titles[1] and titles[1].endswith("0.500 m")
    assert f"{logs.keys[3].timestamp0_ns}" in titles[1]


def test_times_are_of_a_warm_method():
    calls = []
    estimator = zeroflow.timed(lambda pair: calls.append(pair) or torch.zeros(1, 3), warm_up=True)
    estimator("a"), estimator("b")
    assert calls == ["a", "a", "b"]


# --- As Argoverse's own tools see it ---------------------------------------------------------------------------------


def test_the_av2_package_takes_a_2023_archive_and_finds_the_same_numbers(tmp_path, logs):
    reason = "the av2 package is not installed; it is needed for comparison only"
    evaluation = pytest.importorskip("av2.evaluation.scene_flow.eval", reason=reason)
    from av2.evaluation.scene_flow.make_submission_archive import validate

    masks, file, annotations = tmp_path / "masks.zip", tmp_path / "submission.zip", tmp_path / "annotations"
    keys = list(data.challenge_members(logs, 2023).values())
    write_masks(logs, masks, keys)
    given = data.ChallengeFiles(masks)
    zeroflow.write_submission(file, logs, with_errors, 2023, given)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "folder")
    validate(tmp_path / "folder", masks)
    for key in keys:
        pair = logs[logs.keys.index(key)]
        rows, raw = given.mask(pair), data.total_flow(pair.flow, pair)
        columns = {name: raw[rows, i].numpy() for i, name in enumerate(data.FLOW_COLUMNS)}
        columns |= {name: getattr(pair, name)[rows].numpy() for name in ("is_dynamic", "is_valid")}
        columns |= {"category_indices": pair.category[rows].numpy()}
        columns |= {"is_close": (pair.pc0[rows, :2].abs() <= 35).all(dim=1).numpy()}
        target = annotations / key.log_id / f"{key.timestamp0_ns}.feather"
        target.parent.mkdir(parents=True, exist_ok=True)
        feather.write_feather(pyarrow.table(columns), target, compression="uncompressed")
    expected = evaluation.results_to_dict(evaluation.evaluate_zip(annotations, file))
    found = evaluated(logs, file, given)
    assert found["av2_three_way"] == pytest.approx(expected["EPE 3-Way Average"], abs=1e-6)
    assert found["av2_dynamic_iou"] == pytest.approx(expected["Dynamic IoU"], abs=1e-9)
    assert found["av2_acc_relaxed_foreground_dynamic_close"] == pytest.approx(
        expected["Accuracy Relax/Foreground/Dynamic/Close"], abs=1e-6
    )
    assert found["av2_angle_error_rad_background_static"] == pytest.approx(
        expected["Angle Error/Background/Static"], abs=1e-6
    )
