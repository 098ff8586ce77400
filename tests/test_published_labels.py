"""Labels that the paper's authors have published: both layouts, and files that do not fit."""

from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather

import data
import labels
import nsfp
import train
import zeroflow

ROOT = Path(zeroflow.__file__).parent


def write_published(folder: Path, pair: data.SweepPair, index: int, flow: np.ndarray) -> Path:
    """Write a label as the paper's authors did.

    One row per point in the grid that is not ground, numbered among those that are not ground.
    """
    not_ground = np.flatnonzero(~pair.is_ground0.numpy())
    is_inside = (np.abs(pair.pc0.numpy()[not_ground]) < (51.2, 51.2, 3)).all(axis=1)
    file = folder / pair.log_id / f"{index:010d}_000.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = np.flatnonzero(is_inside)
    np.savez(file, flow=flow[not_ground[rows]][None], valid_idxes=rows, delta_time=12.5)
    return file


def test_published_labels_come_back_to_their_rows(tmp_path, street, capsys):
    """Labels of sweeps 0 and 1 of the first log; the second log has none."""
    flows = [
        np.random.default_rng(i).normal(size=(len(street[i].pc0), 3)).astype(np.float32)
        for i in (0, 1)
    ]
    for i in (0, 1):
        write_published(tmp_path, street[i], i, flows[i])
    label_folder = labels.open_labels(tmp_path, street)
    assert list(label_folder.indices) == [0, 1]
    for i in (0, 1):
        label = label_folder.read(street[i])
        is_input = data.input_masks(street[i])[0]
        assert torch.equal(label.has_flow, is_input) and label.seconds == 12.5
        assert (label.flow.numpy()[is_input] == flows[i][is_input]).all() and label.flow[
            ~is_input
        ].eq(0).all()
    samples = train.LabeledPairs(street, tmp_path)
    assert (
        len(samples) == 2 and f"{tmp_path}: 2 of 4 pairs have no label" in capsys.readouterr().err
    )
    keep = ~street[1].is_ground0
    assert torch.equal(samples[1][2], label_folder.read(street[1]).flow[keep])
    # The layout of later code bases: a row a point.
    later = tmp_path / "later" / street.pair_keys[2].log_id / "0000000000.feather"
    later.parent.mkdir(parents=True)
    pair = street[2]
    flow = np.random.default_rng(9).normal(size=pair.pc0.shape).astype(np.float32)
    is_valid = np.arange(len(flow)) % 2 == 0
    columns = {name: flow[:, i] for i, name in enumerate(data.FLOW_COLUMNS)}
    feather.write_feather(pyarrow.table({**columns, "is_valid": is_valid}), later)
    label_folder = labels.open_labels(tmp_path / "later", street)
    label, expected = label_folder.read(pair), data.input_masks(pair)[0].numpy() & is_valid
    assert list(label_folder.indices) == [2] and (label.has_flow.numpy() == expected).all()
    assert (label.flow.numpy() == np.where(expected[:, None], flow, 0)).all()


def test_published_labels_of_the_lidar_data_set_have_a_folder_for_each_pair(tmp_path, street):
    """Named by log and time stamp; a folder of another time stamp is nobody's."""
    pair = street[3]
    flow = np.random.default_rng(3).normal(size=pair.pc0.shape).astype(np.float32)
    file = write_published(tmp_path, pair, 0, flow)
    file.parent.rename(tmp_path / f"{pair.log_id}_{pair.timestamp0_ns}")
    (tmp_path / f"{pair.log_id}_1").mkdir()
    (tmp_path / f"{street[0].log_id}_{street[0].timestamp0_ns}").mkdir()  # without a label
    label_folder = labels.open_labels(tmp_path, street)
    assert list(label_folder.indices) == [3]
    label, is_input = label_folder.read(pair), data.input_masks(pair)[0]
    assert (label.flow.numpy()[is_input] == flow[is_input]).all()


def test_published_labels_of_other_points_are_refused_by_name(tmp_path, street):
    """Another sweep or rule for ground, rows that do not match, a file that would run code."""
    pair = street[0]
    flow = np.zeros((len(pair.pc0), 3), dtype=np.float32)
    file = write_published(tmp_path, pair, 0, flow)
    good, label_folder = dict(np.load(file)), labels.open_labels(tmp_path, street)
    label_folder.read(pair)
    count = len(good["valid_idxes"])
    for share, is_refused in ((0.02, True), (0.005, False)):  # up to 1 % may differ
        cut = {
            "valid_idxes": good["valid_idxes"][int(share * count) :],
            "flow": good["flow"][:, int(share * count) :],
        }
        np.savez(file, **(good | cut))
        if is_refused:
            with pytest.raises(
                data.DataError, match="_000.npz: labels other points than those .* ground"
            ):
                label_folder.read(pair)
        else:
            assert label_folder.read(pair).has_flow.sum() == count - int(share * count) < count
    beyond = {
        "valid_idxes": np.append(good["valid_idxes"][:-1], 10**6)
    }  # one row that the sweep does not have
    np.savez(file, **(good | beyond))
    assert label_folder.read(pair).has_flow.sum() == count - 1
    with pytest.raises(data.DataError, match="the published labels do not have this pair"):
        label_folder.read(street[3])
    for changes, message in (
        ({"valid_idxes": good["valid_idxes"][:-5]}, "is not a published label .* rows of flow for"),
        (
            {"valid_idxes": np.append(good["valid_idxes"][:-1], 0)},
            "is not a published label .* different valid_idxes",
        ),
        ({"valid_idxes": np.append(good["valid_idxes"][:-1], -1)}, "is not a published label"),
        (
            {"flow": np.where(good["flow"] == 0, np.nan, 0)},
            "has flow that is not finite, or as long as the grid",
        ),
        ({"flow": good["flow"] + 500}, "has flow that is not finite, or as long as the grid"),
        ({"valid_idxes": good["valid_idxes"] + 40}, "labels other points"),
        ({"flow": np.array([{"run": "me"}])}, "is not a published label"),  # a pickle
    ):
        np.savez(file, **(good | changes))
        with pytest.raises(data.DataError, match=f"0000000000_000.npz: {message}"):
            label_folder.read(pair)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(data.DataError, match="is not a published label"):
        label_folder.read(pair)
    with pytest.raises(data.DataError, match="is missing, so it is unknown"):
        labels.claim_folder(
            tmp_path, zeroflow.label_settings(nsfp.TEACHERS["fast"])
        )  # ours do not go among them
    later = tmp_path / "later" / pair.log_id / "0000000000.feather"
    later.parent.mkdir(parents=True)
    columns = {name: np.zeros(3, dtype=np.float32) for name in data.FLOW_COLUMNS}
    feather.write_feather(pyarrow.table({**columns, "is_valid": np.ones(3, dtype=bool)}), later)
    with pytest.raises(
        data.DataError, match=r"0000000000.feather: has 3 rows, its sweep has \d+ points"
    ):
        labels.open_labels(tmp_path / "later", street).read(pair)


def write_later(folder: Path, pair: data.SweepPair, **changes) -> Path:
    """Write a label in the layout of later code bases, with other columns if given."""
    columns = {name: np.zeros(len(pair.pc0), dtype=np.float32) for name in data.FLOW_COLUMNS}
    columns["is_valid"] = np.ones(len(pair.pc0), dtype=bool)
    file = folder / pair.log_id / "0000000000.feather"
    file.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pyarrow.table({**columns, **changes}), file)
    return file


def test_a_later_layout_with_odd_columns_is_refused_by_name(tmp_path, street):
    pair, n = street[0], len(street[0].pc0)
    file = write_later(tmp_path, pair)
    label_folder = labels.open_labels(tmp_path, street)
    label_folder.read(pair)
    is_input = data.input_masks(pair)[0]
    row = int(is_input.nonzero()[3])
    hole = [0.0] * n
    hole[row] = None
    for changes, message in (
        ({"is_valid": pyarrow.array([None] + [True] * (n - 1))}, "is_valid is bool with 1 nulls"),
        ({"is_valid": ["yes"] * n}, "is_valid is string with 0 nulls, expected bool"),
        ({"flow_tx_m": ["1.5"] * n}, "flow_tx_m is string, expected floating-point numbers"),
        ({"flow_tx_m": [[1.5]] * n}, "flow_tx_m is list<item: double>, expected floating"),
        ({"flow_tx_m": [True] * n}, "flow_tx_m is bool, expected floating-point numbers"),
        ({"flow_tx_m": pyarrow.array(hole)}, "has flow that is not finite, or as long as the"),
        ({"flow_tx_m": [1e300] * n}, "has flow that is not finite, or as long as the grid"),
    ):
        write_later(tmp_path, pair, **changes)
        with pytest.raises(data.DataError, match=f"0000000000.feather: .*{message}"):
            label_folder.read(pair)
    table = pyarrow.table([[1.0]] * 2 + [[True]] * 3, [*data.FLOW_COLUMNS, "is_valid", "flow_tx_m"])
    feather.write_feather(table, file)
    with pytest.raises(data.DataError, match="0000000000.feather: has .*columns .'flow_tx_m'."):
        label_folder.read(pair)


def test_published_arrays_of_odd_types_are_refused_by_name(tmp_path, street):
    pair = street[0]
    file = write_published(tmp_path, pair, 0, np.zeros((len(pair.pc0), 3), dtype=np.float32))
    good, label_folder = dict(np.load(file)), labels.open_labels(tmp_path, street)
    rows, flow = good["valid_idxes"], good["flow"]
    for changes, message in (
        ({"valid_idxes": rows.astype(float)}, "flow of float32 for valid_idxes of float64"),
        ({"valid_idxes": rows.astype(str)}, "flow of float32 for valid_idxes of <U21"),
        ({"valid_idxes": rows + 2.0**62}, "flow of float32 for valid_idxes of float64"),
        ({"valid_idxes": rows.astype(np.uint64) + np.uint64(2**63)}, "is not a published label"),
        ({"flow": flow.astype(complex)}, "flow of complex128 for valid_idxes"),
        ({"flow": flow.astype(str)}, "flow of <U32 for valid_idxes"),
        ({"flow": flow.astype(float) + 1e300}, "has flow that is not finite, or as long as the"),
        ({"flow": flow[:, :, :2]}, "is not a published label"),
        ({"delta_time": np.array(["soon"])}, "is not a published label"),
    ):
        np.savez(file, **(good | changes))
        with pytest.raises(data.DataError, match=f"0000000000_000.npz: .*{message}"):
            label_folder.read(pair)
    for missing in good:
        np.savez(file, **{name: array for name, array in good.items() if name != missing})
        with pytest.raises(data.DataError, match="_000.npz: is not a published label"):
            label_folder.read(pair)
    for other in (lambda: np.save(file.open("wb"), flow), file.unlink):  # one array; a folder
        other()
        if not file.exists():
            file.mkdir()
        with pytest.raises(data.DataError, match="_000.npz: is not a published label"):
            label_folder.read(pair)


@pytest.mark.parametrize("layout", ["npz", "feather"])
def test_a_published_file_that_is_spoiled_gives_a_clear_error_or_a_flow_that_can_be(
    tmp_path, street, layout
):
    """Cuts and flips everywhere, in the headers above all. Whatever comes, it is not a crash."""
    pair, rng = street[0], np.random.default_rng(0)
    flow = rng.normal(size=(len(pair.pc0), 3)).astype(np.float32)
    if layout == "npz":
        file = write_published(tmp_path, pair, 0, flow)
    else:
        file = write_later(tmp_path, pair, flow_tx_m=flow[:, 0])
    whole, label_folder = file.read_bytes(), labels.open_labels(tmp_path, street)
    label_folder.read(pair)
    # The headers of an archive are at its start, between its members, and at its end.
    edges = np.concatenate([np.arange(400), len(whole) - 1 - np.arange(900)])
    refused = 0
    for place in [*rng.choice(edges, 250, replace=False), *rng.integers(0, len(whole), 50)]:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << rng.integers(8)
        file.write_bytes(spoiled[: rng.integers(len(whole))] if rng.random() < 0.1 else spoiled)
        try:
            label = label_folder.read(pair)
        except data.DataError as error:
            assert file.name in str(error)
            refused += 1
        else:
            assert (label.flow.abs() < 102.4).all()
    assert refused > 100
