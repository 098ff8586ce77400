"""Files of the challenges: written, read back, and given to Argoverse's own tools.

The comparison with those tools is skipped where the av2 package is not installed.
"""

import dataclasses
import functools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather

import challenge
import commands
import data
import metrics
import synthetic
import viz
import zeroflow


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    """Two logs of eight sweeps: fourteen pairs.

    2023 scores pairs 0, 5 and 10 of these, 2024 pairs 0 and 5 of each log.
    """
    folder = tmp_path_factory.mktemp("challenge") / "val"
    settings = synthetic.StreetSettings(azimuths=190, beam_step=4, range_m=70.0, sweeps=8, seed=3)
    synthetic.write_logs(folder, 2, settings)
    return folder


@pytest.fixture(scope="module")
def logs(split) -> data.Argoverse2Pairs:
    return data.open_dataset(split)


def truth(pair: data.SweepPair) -> zeroflow.Estimate:
    return zeroflow.Estimate(pair.flow, 0.0)


def with_errors(pair: data.SweepPair) -> zeroflow.Estimate:
    """The truth with an error of some decimeters, different for each point."""
    generator = torch.Generator().manual_seed(pair.timestamp0_ns % 1000)
    error = 0.2 * torch.randn(pair.pc0.shape, generator=generator)
    return zeroflow.Estimate(torch.where(pair.is_ground0[:, None], 0.0, pair.flow + error), 0.0)


def evaluated(
    dataset: data.Argoverse2Pairs, file: Path, masks: challenge.ChallengeFiles | None = None
) -> dict:
    """The numbers of an archive, as the command `evaluate` computes them."""
    predictions = challenge.ChallengePredictions(file, dataset, masks)
    predicted = data.subset(dataset, predictions.pair_keys)
    mask = masks.mask if masks else functools.partial(challenge.mask_of, dataset)
    estimator = challenge.from_predictions(predictions)
    return zeroflow.evaluate(predicted, estimator, challenge_mask=mask).numbers


def write_masks(dataset: data.Argoverse2Pairs, file: Path, keys, prefix: str = "") -> dict:
    """Masks unlike those that we would make: every other point of some pairs."""
    masks = {}
    with zipfile.ZipFile(file, "w") as archive:
        for key in keys:
            pair = dataset[dataset.pair_keys.index(key)]
            masks[key] = np.arange(len(pair.pc0)) % 2 == 0
            name = f"{prefix}{key.log_id}/{key.timestamp0_ns}.feather"
            archive.writestr(name, table_as_bytes(pyarrow.table({"mask": masks[key]})))
    return masks


def table_as_bytes(table: pyarrow.Table) -> bytes:
    out = pyarrow.BufferOutputStream()
    feather.write_feather(table, out)
    return out.getvalue().to_pybytes()


def read_member(file: Path, name: str) -> pyarrow.Table:
    with zipfile.ZipFile(file) as archive:
        return feather.read_table(pyarrow.BufferReader(archive.read(name)))


# --- What is written ------------------------------------------------------------------------------


def test_2023_scores_every_fifth_pair_of_the_split_and_2024_of_each_log(tmp_path):
    """Log a has 8 sweeps, one of them late; b has 2; c has 13.

    A pair with a gap is counted, too, as Argoverse's tools do.
    """
    step = 100_000_000
    stamps = {
        "a": [i * step for i in (0, 1, 2, 3, 7, 8, 9, 10)],
        "b": [0, step],
        "c": [i * step for i in range(13)],
    }
    for log, every in stamps.items():
        (tmp_path / log / "sensors" / "lidar").mkdir(parents=True)
        for stamp in every:
            (tmp_path / log / "sensors" / "lidar" / f"{stamp}.feather").touch()
    dataset = data.open_dataset(tmp_path)
    assert len(dataset) == 6 + 1 + 12
    named = challenge.challenge_members(dataset, 2023)
    # In a row: a 0 to 6, b 7, c 8 to 19; so 0 and 5 of a, 10 (the third of c) and 15 (its eighth).
    assert list(named) == [
        "a/0.feather",
        f"a/{8 * step}.feather",
        f"c/{2 * step}.feather",
        f"c/{7 * step}.feather",
    ]
    numbered = challenge.challenge_members(dataset, 2024)
    assert list(numbered) == [
        f"{log}/{i:010d}.feather" for log, i in zip("aabccc", (0, 5, 0, 0, 5, 10), strict=True)
    ]
    assert numbered["c/0000000010.feather"] == ("c", 10 * step, 11 * step)


def test_a_file_of_2023_has_raw_flow_and_is_dynamic_of_the_masked_points(tmp_path, logs):
    file = tmp_path / "submission.zip"
    assert challenge.write_submission(file, logs, truth, 2023) == 3
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == sorted(challenge.challenge_members(logs, 2023))
    for name, key in challenge.challenge_members(logs, 2023).items():
        pair, table = logs[logs.pair_keys.index(key)], read_member(file, name)
        mask = challenge.mask_of(logs, pair).numpy()
        assert set(table.column_names) == {*data.FLOW_COLUMNS, "is_dynamic"}
        assert [str(table[column].type) for column in data.FLOW_COLUMNS] == ["halffloat"] * 3
        assert table.num_rows == mask.sum() < len(mask) and str(table["is_dynamic"].type) == "bool"
        is_dynamic = (pair.flow.norm(dim=1) > 0.05).numpy()
        np.testing.assert_array_equal(table["is_dynamic"].to_numpy(), is_dynamic[mask])
        E, p = pair.ego1_SE3_ego0.numpy(), pair.pc0.double().numpy()
        expected = ((p + pair.flow.numpy()) @ E[:3, :3].T + E[:3, 3] - p)[mask]
        written = data.stack(table, data.FLOW_COLUMNS)
        np.testing.assert_allclose(written, expected, atol=2e-3)  # float16 of meters


def test_a_file_of_2024_has_residual_flow_of_all_points_and_all_are_valid(tmp_path, logs):
    file = tmp_path / "submission.zip"
    assert challenge.write_submission(file, logs, with_errors, 2024, is_supervised=True) == 4
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("metadata.json")) == {"Is Supervised?": True}
        assert all(info.compress_type == zipfile.ZIP_DEFLATED for info in archive.infolist())
        members = challenge.challenge_members(logs, 2024)
        assert sorted(archive.namelist()) == sorted([*members, "metadata.json"])
    for name, key in challenge.challenge_members(logs, 2024).items():
        pair, table = logs[logs.pair_keys.index(key)], read_member(file, name)
        assert set(table.column_names) == {*data.FLOW_COLUMNS, "is_valid"}
        assert table["is_valid"].to_numpy().all()
        assert table.num_rows == len(pair.pc0)
        written = data.stack(table, data.FLOW_COLUMNS)
        np.testing.assert_allclose(written, with_errors(pair).flow, atol=1e-3)
        assert (written[pair.is_ground0.numpy()] == 0).all()


def test_a_file_of_2026_has_residual_flow_of_all_points_of_every_pair_and_nothing_else(
    tmp_path, logs
):
    """And it is told from one of 2023, whose files have the same names, by its columns."""
    file = tmp_path / "submission.zip"
    keys = challenge.consecutive_keys(logs)
    assert challenge.write_submission(file, logs, with_errors, 2026) == len(keys)
    with zipfile.ZipFile(file) as archive:
        names = [f"{key.log_id}/{key.timestamp0_ns}.feather" for key in keys]
        assert sorted(archive.namelist()) == sorted(names)
    predictions = challenge.ChallengePredictions(file, logs)
    assert predictions.challenge == 2026 and predictions.pair_keys == logs.pair_keys
    for pair in (logs[0], logs[5]):
        table = read_member(file, f"{pair.log_id}/{pair.timestamp0_ns}.feather")
        assert table.column_names == list(data.FLOW_COLUMNS)
        assert {str(column.type) for column in table.columns} == {"halffloat"}
        expected = with_errors(pair).flow
        assert table.num_rows == len(pair.pc0)
        np.testing.assert_allclose(data.stack(table, data.FLOW_COLUMNS), expected, atol=1e-3)
        flow, is_dynamic = predictions(pair)
        assert is_dynamic is None and (flow - expected).abs().max() < 1e-3


def test_a_scene_that_counts_in_microseconds_keeps_its_own_numbers_in_2026(logs):
    dataset = data.subset(logs, logs.pair_keys)
    log_id = logs.pair_keys[0].log_id
    dataset.unit_ns = {log_id: 1000}
    name, key = next(iter(challenge.challenge_members(dataset, 2026).items()))
    assert name == f"{log_id}/{key.timestamp0_ns // 1000}.feather"


def test_given_masks_decide_which_pairs_and_points_are_written(tmp_path, logs):
    keys = [logs.pair_keys[i] for i in (2, 9)]
    masks = write_masks(logs, tmp_path / "masks.zip", keys, prefix="val-masks/")
    given = challenge.ChallengeFiles(tmp_path / "masks.zip")
    file = tmp_path / "submission.zip"
    assert challenge.write_submission(file, logs, truth, 2023, given) == 2
    for key in keys:
        table = read_member(file, f"{key.log_id}/{key.timestamp0_ns}.feather")
        assert table.num_rows == masks[key].sum()
    numbers = evaluated(logs, file, given)
    assert numbers["pairs"] == 2 and numbers["av2_three_way"] < 1e-3
    with pytest.raises(data.DataError, match="is it of this sweep and these masks"):
        evaluated(logs, file)  # our own masks have other points
    # Points outside the mask have no prediction, so they are taken to be static.
    predictions = challenge.ChallengePredictions(file, logs, given)
    pair = logs[2]
    is_outside = ~torch.from_numpy(masks[pair.key])
    assert predictions(pair)[0][is_outside].eq(0).all() and pair.pc0.norm() > 0


def test_given_masks_decide_which_pairs_the_av2_numbers_are_of(tmp_path, split, logs, capsys):
    """The official masks cover some pairs only. All other numbers are still of all pairs."""
    write_masks(logs, tmp_path / "masks.zip", [logs.pair_keys[2]])
    found = {}
    for name, options in {"all": [], "masked": ["--masks", str(tmp_path / "masks.zip")]}.items():
        numbers = tmp_path / "numbers.json"
        evaluate = ["evaluate", "--data", str(split), "--baseline", "nearest"]
        assert commands.main([*evaluate, "--json", str(numbers), *options]) == 0
        found[name] = json.loads(numbers.read_text())
    given = challenge.ChallengeFiles(tmp_path / "masks.zip")
    nearest = zeroflow.timed(zeroflow.nearest_neighbor)
    alone = zeroflow.evaluate([logs[2]], nearest, challenge_mask=given.mask).numbers
    masked, unmasked = found["masked"], found["all"]
    assert masked["av2_three_way"] == pytest.approx(alone["av2_three_way"])
    assert masked["av2_three_way"] != pytest.approx(unmasked["av2_three_way"], abs=1e-4)
    assert masked["grid_three_way"] == unmasked["grid_three_way"] and masked["pairs"] == 14
    submit = ["submit", "--data", str(split), "--baseline", "nearest"]
    submit += ["--challenge", "2023", "--out", str(tmp_path / "s.zip")]
    assert commands.main([*submit, "--masks", str(tmp_path / "masks.zip")]) == 0
    assert "s.zip: 1 pairs for the challenge of 2023" in capsys.readouterr().out
    write_masks(
        logs, tmp_path / "foreign.zip", [logs.pair_keys[2]], prefix="x"
    )  # xstreet-..., which is not our log
    assert commands.main([*submit, "--masks", str(tmp_path / "foreign.zip")]) == 1
    assert "where no pair of consecutive sweeps of the data begins" in capsys.readouterr().err


def test_accuracy_and_angle_of_the_2023_challenge_are_of_raw_flow(logs):
    """Relative errors: 11 cm is much for an ego step of 1 m or a residual of 0, little for 2 m."""
    pair = logs[0]
    off = zeroflow.Estimate(pair.flow + torch.tensor([0.11, 0, 0]), 0.0)
    mask = functools.partial(challenge.mask_of, logs)
    numbers = zeroflow.evaluate([pair], lambda _: off, challenge_mask=mask).numbers
    step = np.linalg.norm(pair.ego1_SE3_ego0.numpy()[:3, 3])
    assert step < 1.1 and numbers["av2_acc_relaxed_background_static"] == 0
    far = dataclasses.replace(pair, ego1_SE3_ego0=torch.eye(4, dtype=torch.float64))
    far.ego1_SE3_ego0[0, 3] = -2.0
    mask_of_pair = mask(pair)
    evaluation = zeroflow.evaluate([far], lambda _: off, challenge_mask=lambda _: mask_of_pair)
    numbers = evaluation.numbers
    assert numbers["av2_acc_relaxed_background_static"] == 1  # 5.5 % of two meters
    assert numbers["av2_acc_strict_background_static"] == 0 and numbers["grid_acc_relaxed"] < 0.5


def test_a_pair_with_a_gap_is_not_read_as_a_pair_but_is_in_a_submission(tmp_path, split, logs):
    """As in av2's own loader: in a log without its sweep 6, pair 5 consists of sweeps 5 and 7."""
    shutil.copytree(split / logs.pair_keys[0].log_id, tmp_path / "val" / "log")
    stamp = logs.stamps[logs.pair_keys[0].log_id][6]
    (tmp_path / "val" / "log" / "sensors" / "lidar" / f"{stamp}.feather").unlink()
    dataset = data.open_dataset(tmp_path / "val")
    assert len(dataset) == 5 and len(dataset.skipped) == 1
    assert challenge.write_submission(tmp_path / "s.zip", dataset, truth, 2023) == 2
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert sorted(archive.namelist())[1] == f"log/{dataset.stamps['log'][5]}.feather"


def test_a_submission_without_a_pair_or_with_nan_is_not_written(tmp_path, logs):
    def fails(pair):
        raise data.DataError("no label")

    with pytest.raises(data.DataError, match="no label"):
        challenge.write_submission(tmp_path / "x.zip", logs, fails, 2024)

    def diverged(pair):
        is_sixth = torch.arange(len(pair.flow))[:, None] == 5
        return zeroflow.Estimate(torch.where(is_sixth, torch.nan, pair.flow), 0.0)

    message = "flow is not finite, or over 100 m long, at 1 points; did the training diverge"
    with pytest.raises(data.DataError, match=message):
        challenge.write_submission(tmp_path / "x.zip", logs, diverged, 2024)
    with pytest.raises(data.DataError, match="100 m long, at 1 points"):
        zeroflow.evaluate(logs, diverged, max_broken=1)
    assert not list(tmp_path.iterdir())  # not even half of it


# --- What is read back ----------------------------------------------------------------------------


@pytest.mark.parametrize("year", challenge.CHALLENGES)
def test_a_perfect_flow_is_perfect_from_file_to_archive_to_every_metric(tmp_path, logs, year):
    file = tmp_path / "submission.zip"
    challenge.write_submission(file, logs, truth, year)
    numbers = evaluated(logs, file)
    assert numbers["pairs"] == {2023: 3, 2024: 4, 2026: 14}[year]
    # These numbers include points beyond the mask of 2023, which its files do not contain.
    beyond_the_mask = {"grid", "epe"} if year == 2023 else set()
    checked = 0
    for key, value in numbers.items():
        if np.isnan(value) or "points" in key or key in ("pairs", "seconds_per_pair"):
            continue
        if key.split("_")[0] in beyond_the_mask:
            continue
        if "acc" in key or "_cm_" in key:
            assert value == 1, key
        elif "iou" in key:
            assert value > 0.99, key  # float16 moves a flow of 5 cm above the threshold or below it
        else:
            assert value < (0.01 if "angle" in key or "bucketed_dynamic" in key else 1e-3), key
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("year", challenge.CHALLENGES)
def test_an_archive_has_the_same_numbers_as_the_method_that_wrote_it(tmp_path, logs, year):
    file = tmp_path / "submission.zip"
    challenge.write_submission(file, logs, with_errors, year)
    from_archive = evaluated(logs, file)
    members = set(challenge.challenge_members(logs, year).values())
    scored = data.subset(logs, [key for key in logs.pair_keys if key in members])
    mask = functools.partial(challenge.mask_of, logs)
    directly = zeroflow.evaluate(scored, with_errors, challenge_mask=mask).numbers
    headlines = ["three_way_2024", "paper_three_way", "av2_three_way"]
    for key in [*headlines, "bucketed_dynamic_mean", "av2_dynamic_iou"]:
        assert from_archive[key] == pytest.approx(directly[key], abs=2e-3), key
        assert directly[key] > 0.05
    if year == 2024:
        assert from_archive["grid_epe"] == pytest.approx(directly["grid_epe"], abs=1e-4)
    # A folder with the same files gives the same numbers.
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "folder")
    again = evaluated(logs, tmp_path / "folder")
    assert again["av2_three_way"] == from_archive["av2_three_way"]
    assert again["pairs"] == from_archive["pairs"]


def test_dynamic_iou_is_that_of_the_files_column_and_not_of_its_flow(tmp_path, logs):
    """Two files of the same flow: in one of them is_dynamic is False everywhere."""
    file, still = tmp_path / "submission.zip", tmp_path / "still.zip"
    challenge.write_submission(file, logs, truth, 2023)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(still, "w") as changed:
        for name in archive.namelist():
            table = read_member(file, name).drop_columns("is_dynamic")
            nothing_moves = pyarrow.array(np.zeros(table.num_rows, dtype=bool))
            changed.writestr(name, table_as_bytes(table.append_column("is_dynamic", nothing_moves)))
    assert evaluated(logs, still)["av2_dynamic_iou"] == 0
    assert evaluated(logs, file)["av2_dynamic_iou"] > 0.99


def test_points_that_are_not_valid_in_a_2024_file_count_as_not_moving(tmp_path, logs):
    file = tmp_path / "x" / logs.pair_keys[0].log_id / "0000000000.feather"
    file.parent.mkdir(parents=True)
    pair = logs[0]
    flow = np.tile(np.float32([1, 2, 3]), (len(pair.pc0), 1))
    is_valid = np.arange(len(flow)) % 3 == 0
    columns = {name: flow[:, i] for i, name in enumerate(data.FLOW_COLUMNS)}
    feather.write_feather(pyarrow.table({**columns, "is_valid": is_valid}), file)
    predictions = challenge.ChallengePredictions(tmp_path / "x", logs)
    assert predictions.challenge == 2024 and predictions.pair_keys == [logs.pair_keys[0]]
    residual, is_dynamic = predictions(pair)
    assert is_dynamic is None
    assert residual[is_valid].eq(torch.tensor([1.0, 2, 3])).all()
    assert residual[~is_valid].eq(0).all()


def test_files_that_do_not_fit_a_challenge_are_named(tmp_path, logs):
    challenge.write_submission(tmp_path / "good.zip", logs, truth, 2024)
    whole = (tmp_path / "good.zip").read_bytes()
    (tmp_path / "torn.zip").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 3 + 2000] = bytes(2000)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("another-log/0000000000.feather", b"")
    short = tmp_path / "short" / logs.pair_keys[0].log_id / "0000000000.feather"
    short.parent.mkdir(parents=True)
    columns = {name: np.zeros(3, dtype=np.float16) for name in data.FLOW_COLUMNS}
    feather.write_feather(pyarrow.table({**columns, "is_valid": np.ones(3, dtype=bool)}), short)
    shutil.copytree(tmp_path / "short", tmp_path / "twice" / "a")
    shutil.copytree(tmp_path / "short", tmp_path / "twice" / "b")
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "short", both)
    shutil.copy(
        short, both / logs.pair_keys[0].log_id / f"{logs.pair_keys[0].timestamp0_ns}.feather"
    )
    words = tmp_path / "words" / logs.pair_keys[0].log_id / "0000000000.feather"
    words.parent.mkdir(parents=True)
    count = len(logs[0].pc0)
    flow = {name: np.zeros(count, dtype=np.float16) for name in data.FLOW_COLUMNS}
    feather.write_feather(pyarrow.table({**flow, "is_valid": ["no"] * count}), words)
    nulls = tmp_path / "nulls" / logs.pair_keys[0].log_id / "0000000000.feather"
    nulls.parent.mkdir(parents=True)
    none = pyarrow.array([None] + [0.0] * (count - 1))
    feather.write_feather(
        pyarrow.table({**flow, "flow_tx_m": none, "is_valid": [True] * count}), nulls
    )
    for name, message in (
        ("twice", "holds both a/.* and b/.*; choose one of the folders"),
        ("both", "holds files of two challenges"),
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


def test_a_zip_of_a_later_version_and_flow_that_is_not_finite_are_named(tmp_path, logs):
    challenge.write_submission(tmp_path / "good.zip", logs, truth, 2024)
    later = bytearray((tmp_path / "good.zip").read_bytes())
    at = 0
    while (at := later.find(b"PK\x01\x02", at)) >= 0:  # each entry of the directory at the end
        later[at + 6 : at + 8] = (99).to_bytes(2, "little")  # "version needed to extract"
        at += 4
    (tmp_path / "later.zip").write_bytes(later)
    with pytest.raises(data.DataError, match="later.zip: neither a folder nor a whole zip .*9.9"):
        challenge.ChallengeFiles(tmp_path / "later.zip")

    key = logs.pair_keys[0]
    file = tmp_path / "nan" / key.log_id / "0000000000.feather"
    file.parent.mkdir(parents=True)
    count = len(logs[0].pc0)
    columns = {name: np.zeros(count, dtype=np.float16) for name in data.FLOW_COLUMNS}
    columns["flow_ty_m"][5] = np.nan
    for is_valid in (True, False):  # rows that are not valid may hold anything
        feather.write_feather(pyarrow.table({**columns, "is_valid": [is_valid] * count}), file)
        predictions = challenge.ChallengePredictions(tmp_path / "nan", logs)
        if not is_valid:
            assert predictions(logs[0])[0].isfinite().all()
            continue
        message = rf"nan: {key.log_id}/0000000000.feather: flow is not finite at 1 points; make"
        with pytest.raises(data.DataError, match=message):
            predictions(logs[0])


def test_a_mask_with_a_null_or_twice_is_named(tmp_path, logs):
    key = logs.pair_keys[0]
    file = tmp_path / "masks" / key.log_id / f"{key.timestamp0_ns}.feather"
    file.parent.mkdir(parents=True)
    mask = pyarrow.array([None] + [True] * (len(logs[0].pc0) - 1))
    for table, message in (
        (pyarrow.table({"mask": mask}), "its column mask is bool, or has nulls"),
        (pyarrow.table([mask, mask], ["mask", "mask"]), r"has no columns \['mask'\], or has them"),
    ):
        feather.write_feather(table, file)
        with pytest.raises(data.DataError, match=f"{key.timestamp0_ns}.feather: {message}"):
            challenge.ChallengeFiles(tmp_path / "masks").mask(logs[0])


def test_masks_that_lack_a_scored_pair_are_reported(tmp_path, logs, capsys):
    keys = list(challenge.challenge_members(logs, 2023).values())
    write_masks(logs, tmp_path / "all.zip", keys)
    write_masks(logs, tmp_path / "some.zip", keys[:1])
    for name in ("all", "some"):
        masks = challenge.ChallengeFiles(tmp_path / f"{name}.zip")
        challenge.write_submission(tmp_path / "submission.zip", logs, truth, 2023, masks)
        lines = [line for line in capsys.readouterr().err.splitlines() if "no mask" in line]
        if name == "all":
            assert lines == []
        else:
            (line,) = lines
            assert f"some.zip: has no mask for {len(keys) - 1} pairs that count in 2023" in line
            assert keys[1].log_id in line or keys[2].log_id in line


def test_without_a_ground_raster_2023_has_no_numbers_and_needs_masks(tmp_path, logs, monkeypatch):
    monkeypatch.setattr(challenge, "mask_of", lambda dataset, pair: None)
    mask = functools.partial(challenge.mask_of, logs)
    numbers = zeroflow.evaluate([logs[0]], truth, challenge_mask=mask).numbers
    assert np.isnan(numbers["av2_three_way"]) and numbers["grid_three_way"] == 0
    with pytest.raises(data.DataError, match="no ground raster to make a mask of; give --masks"):
        challenge.write_submission(tmp_path / "x.zip", logs, truth, 2023)


def test_submit_and_evaluate_as_a_user_types_them(tmp_path, split, logs, capsys):
    out, numbers, figures = tmp_path / "s.zip", tmp_path / "n.json", tmp_path / "figures"
    common = ["--data", str(split)]
    submit = ["submit", *common, "--baseline", "nearest"]
    assert commands.main([*submit, "--challenge", "2024", "--out", str(out)]) == 0
    assert f"{out}: 4 pairs for the challenge of 2024" in capsys.readouterr().out
    live = str(tmp_path / "live.zip")
    assert commands.main([*submit, "--challenge", "2026", "--out", live]) == 0
    printed = capsys.readouterr().out
    assert f"-F 'file=@{live}' -F 'method_name=NAME'" in printed and "curl -X POST http" in printed
    evaluate = ["evaluate", *common, "--predictions", str(out)]
    assert commands.main([*evaluate, "--json", str(numbers), "--figures", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}, for the challenge of 2024: has 4 of 14 pairs" in printed
    assert "paper: ZeroFlow's published code" in printed
    found = json.loads(numbers.read_text())
    assert found["seconds_per_pair"] is None and found["pairs"] == 4  # JSON has no NaN
    keys = ["epe", "grid_epe", "grid_three_way", "grid_three_way_fd", "paper_three_way"]
    for key in [*keys, "av2_three_way", "three_way_2024", "bucketed_dynamic_mean"]:
        assert f"{found[key]:9.4f}" in printed, key
    pictures = sorted(file.name for file in figures.iterdir())
    names = ["error_against_time", "error_by_distance", "error_by_speed"]
    assert pictures == [f"{name}.png" for name in [*names, "median_pair", "worst_pair"]]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in figures.iterdir())
    submit_2023 = [*submit, "--challenge", "2023"]
    submit_2024 = [*submit, "--challenge", "2024"]
    nearest = ["evaluate", *common, "--baseline", "nearest"]
    for arguments, message in (
        ([*submit_2024, "--out", "s.tar"], "ends in .zip"),
        ([*submit_2024, "--out", "s.zip", "--masks", "m"], "only the 2023 challenge has masks"),
        ([*submit_2023, "--out", "s.zip", "--supervised"], "the 2024 challenge asks for it"),
        (["evaluate", *common, "--predictions", "no.zip"], "no.zip: no such file or folder"),
        ([*nearest, "--masks", "no.zip"], "no.zip: no such file or folder"),
    ):
        assert commands.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_the_papers_rows_are_printed_for_a_whole_validation_split_only(split, monkeypatch, capsys):
    arguments = ["evaluate", "--data", str(split), "--baseline", "no-motion"]
    assert commands.main(arguments) == 0
    assert "the paper, same split" not in capsys.readouterr().out
    monkeypatch.setattr(metrics, "AV2_VAL_LOGS", 2)
    assert commands.main(arguments) == 0
    rows = capsys.readouterr().out.split("the paper, same split")[1].splitlines()[1:]
    assert rows[0].split()[:3] == ["ZeroFlow", "XL", "5x"]
    assert any(row.startswith("no-motion *") for row in rows)


# --- Figures --------------------------------------------------------------------------------------


def test_error_figures_show_the_numbers_they_are_given(logs):
    pair = logs[0]
    numbers = zeroflow.evaluate(logs, with_errors).numbers
    numbers |= {"paper_three_way": 0.123, "seconds_per_pair": 400.0}
    ax = viz.error_against_time_figure({"ours": numbers}).axes[0]
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in ax.lines}
    assert points["ours"] == [400.0, 0.123] and ax.get_xlim()[1] > 400
    assert [26.285, 0.068] in [line.get_xydata()[0].tolist() for line in ax.lines]
    without_time = numbers | {"seconds_per_pair": float("nan")}
    unknown = viz.error_against_time_figure({"file": without_time}).axes[0]
    assert "file (time unknown)" in [text.get_text() for text in unknown.get_legend().get_texts()]
    axes = viz.error_by_distance_figure({"ours": numbers}).axes
    for ax, group in zip(axes, ("fd", "fs", "bs"), strict=True):
        expected = [numbers[f"grid_epe_{group}_from_{inner}_m"] for inner in (0, 10, 20, 30, 40)]
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)
        assert ax.get_ylim() == axes[0].get_ylim()  # panels to be compared
    bars = viz.error_by_speed_figure({"ours": numbers}).axes[0].patches
    heights = [bar.get_height() for bar in bars if bar.get_width() == 0.25]
    assert numbers["grid_epe_car_above_2_mps"] in heights and len(heights) == 15
    is_input = data.input_masks(pair)[0]
    flow = with_errors(pair).flow
    colored = viz.error_map_figure(pair, flow, is_input, "title").axes[1].collections[-1]
    expected = np.sort((flow - pair.flow)[is_input].norm(dim=1))
    np.testing.assert_allclose(colored.get_array(), expected)  # large errors are drawn last, on top
    assert colored.get_clim() == (0, 0.5)


def test_the_worst_and_the_median_pair_are_drawn(tmp_path, split, logs, monkeypatch):
    titles = []

    def error_map_figure(pair, flow, is_input, title, half_m=51.2):
        titles.append(title)
        return viz.Figure()

    three_ways = dict(enumerate([0.3, float("nan"), 0.1, 0.5, 0.2, 0.4]))
    numbers = zeroflow.evaluate([logs[0]], truth).numbers
    evaluation = zeroflow.Evaluation(numbers, three_ways)
    monkeypatch.setattr(viz, "error_map_figure", error_map_figure)
    monkeypatch.setattr(zeroflow, "evaluate", lambda *_, **__: evaluation)
    evaluate = ["evaluate", "--data", str(split), "--baseline", "no-motion"]
    assert commands.main([*evaluate, "--figures", str(tmp_path / "figures")]) == 0
    assert "the median pair" in titles[0] and titles[0].endswith("0.300 m")
    assert "the worst pair" in titles[1] and titles[1].endswith("0.500 m")
    assert f"{logs.pair_keys[3].timestamp0_ns}" in titles[1]


def test_the_first_call_of_a_method_that_warms_up_is_not_timed():
    calls = []
    estimator = zeroflow.timed(lambda pair: calls.append(pair) or torch.zeros(1, 3), warm_up=True)
    for pair in ("a", "b"):
        estimator(pair)
    assert calls == ["a", "a", "b"]


# --- As Argoverse's own tools see it --------------------------------------------------------------


def test_the_av2_package_takes_a_2023_archive_and_finds_the_same_numbers(tmp_path, logs):
    reason = "the av2 package is not installed; it is needed for this comparison only"
    evaluation = pytest.importorskip("av2.evaluation.scene_flow.eval", reason=reason)
    from av2.evaluation.scene_flow.make_submission_archive import validate

    masks, file, annotations = (
        tmp_path / "masks.zip",
        tmp_path / "submission.zip",
        tmp_path / "annotations",
    )
    keys = list(challenge.challenge_members(logs, 2023).values())
    write_masks(logs, masks, keys)
    given = challenge.ChallengeFiles(masks)
    challenge.write_submission(file, logs, with_errors, 2023, given)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "folder")
    validate(tmp_path / "folder", masks)
    for key in keys:
        pair = logs[logs.pair_keys.index(key)]
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
