"""Labels on disk, and labeling many pairs: what is missing is made, and no fault spoils a label."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather

import commands
import data
import fastflow3d
import labels
import nsfp
import synthetic
import zeroflow

ROOT = Path(zeroflow.__file__).parent
QUICK = dataclasses.replace(
    nsfp.TEACHERS["fast"], priors=1, hidden_channels=8, batch_points=64, iterations=3, refine="none"
)
QUICK_OPTIONS = (
    "--priors 1 --hidden-channels 8 --batch-points 64 --iterations 3 --workers 1 --refine none"
).split()
QUICK_SETTINGS = zeroflow.label_settings(QUICK)  # what a label stores
NO_GAIN = torch.tensor([])  # of a label in whose gain nobody is interested


def a_label(n: int = 50) -> zeroflow.Label:
    generator = torch.Generator().manual_seed(n)
    has_flow = torch.rand(n, generator=generator) < 0.7
    flow = torch.randn(n, 3, generator=generator) * has_flow[:, None]
    gain = torch.where(has_flow, torch.rand(n, generator=generator), torch.nan)
    key, loss, seconds, fingerprint = data.PairKey("log", 1, 2), 0.25, 1.5, "a1" * 8
    return zeroflow.Label(key, flow, has_flow, QUICK_SETTINGS, loss, seconds, fingerprint, gain)


def a_made_label(pair: data.SweepPair, settings: nsfp.NSFPSettings = QUICK) -> zeroflow.Label:
    return zeroflow.make_labels([pair], settings)[0]


def tables(folder: Path, dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What must be equal between two runs: the rows. Seconds, in the metadata, may differ."""
    found = [labels.read_label(folder, key) for key in dataset.pair_keys]
    return [(label.flow, label.has_flow) for label in found]


def assert_same_tables(folder: Path, expected: Path, dataset) -> None:
    for one, two in zip(tables(folder, dataset), tables(expected, dataset), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, street) -> Path:
    """The labels of the street by a run that nothing disturbed. Read only."""
    folder = tmp_path_factory.mktemp("labels")
    labels.label_dataset(street, folder, QUICK, workers=1)
    return folder


# --- One label ------------------------------------------------------------------------------------


def test_a_label_comes_back_by_its_name_to_half_a_millimeter(tmp_path):
    label = a_label()
    path = labels.write_label(tmp_path, label)
    assert path == tmp_path / "log" / "1.feather"
    assert [file.name for file in path.parent.iterdir()] == [
        "1.feather"
    ]  # no temporary file is left
    found = labels.read_label(tmp_path, label.key, num_points=50)
    assert torch.equal(found.has_flow, label.has_flow)
    is_slow = label.flow.abs() < 2
    assert (found.flow - label.flow)[is_slow].abs().max() <= 0.0005
    assert (found.settings, found.loss, found.seconds) == (label.settings, 0.25, 1.5)
    assert found.fingerprint == "a1" * 8
    torch.testing.assert_close(found.gain, label.gain, atol=0, rtol=1e-3, equal_nan=True)
    assert feather.read_table(path).schema.names == [
        "flow_tx_m",
        "flow_ty_m",
        "flow_tz_m",
        "has_flow",
        "gain",
    ]


def test_a_label_of_an_older_version_has_no_known_gain(tmp_path, monkeypatch):
    whole = pyarrow.table
    without = lambda columns: whole({k: v for k, v in columns.items() if k != "gain"})  # noqa: E731
    monkeypatch.setattr(labels.pyarrow, "table", without)
    label = a_label()
    labels.write_label(tmp_path, label)
    found = labels.read_label(tmp_path, label.key)
    assert found.gain.shape == (50,) and found.gain.isnan().all()
    assert torch.equal(found.has_flow, label.has_flow)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def _fewer_rows(path):
    feather.write_feather(feather.read_table(path).slice(1), path)


def _other_settings(path):
    table = feather.read_table(path)
    about = table.schema.metadata[b"zeroflow"].replace(b'"iterations": 3', b'"iterations": 4')
    feather.write_feather(table.replace_schema_metadata({"zeroflow": about}), path)


def _foreign(path):
    columns = {name: np.zeros(50, np.float16) for name in ("flow_tx_m", "flow_ty_m", "flow_tz_m")}
    feather.write_feather(pyarrow.table({**columns, "has_flow": np.ones(50, bool)}), path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_cut, "1.feather: not a whole Feather file"),
        (
            _fewer_rows,
            "1.feather: its rows or settings have changed since it was written; delete the file",
        ),
        (
            _other_settings,
            "1.feather: its rows or settings have changed since it was written; delete the file",
        ),
        (_foreign, "1.feather: not a label of this project .* delete the file"),
        (lambda path: path.unlink(), "1.feather: does not exist; make it with"),
    ],
)
def test_a_label_that_is_not_whole_is_named_with_the_way_out(tmp_path, break_it, message):
    label = a_label()
    break_it(labels.write_label(tmp_path, label))
    with pytest.raises(data.DataError, match=message):
        labels.read_label(tmp_path, label.key)


def test_the_label_of_another_pair_is_refused(tmp_path):
    path = labels.write_label(tmp_path, a_label())
    shutil.copy(path, path.with_name("7.feather"))
    with pytest.raises(
        data.DataError, match=r"7.feather: is the label of \('log', 1, 2\), not of \('log', 7, 8\)"
    ):
        labels.read_label(tmp_path, data.PairKey("log", 7, 8))
    with pytest.raises(
        data.DataError, match=r"1.feather: is the label of \('log', 1, 2\), not of \('log', 1, 3\)"
    ):
        labels.read_label(tmp_path, data.PairKey("log", 1, 3))
    with pytest.raises(data.DataError, match="1.feather: has 50 rows, its sweep has 51 points"):
        labels.read_label(tmp_path, data.PairKey("log", 1, 2), num_points=51)


def test_no_bit_of_a_label_can_flip_unnoticed(tmp_path):
    label = a_label()
    path = labels.write_label(tmp_path, label)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        spoiled = bytearray(whole)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        with pytest.raises(data.DataError, match=r"1\.feather: .*; delete the file and run"):
            labels.read_label(tmp_path, label.key)
    path.write_bytes(whole)
    labels.read_label(tmp_path, label.key)


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(tmp_path):
    content = labels.write_label(tmp_path, a_label()).read_bytes()
    metadata = json.loads(
        feather.read_table(pyarrow.BufferReader(content)).schema.metadata[b"zeroflow"]
    )
    checksum = metadata["checksum"].encode()
    assert hashlib.sha256(content.replace(checksum, b"0" * 64)).hexdigest() == checksum.decode()


@pytest.mark.parametrize("length", [math.nan, math.inf, -math.inf, 102.5, -1000.0])
def test_a_whole_label_with_a_flow_that_cannot_be_is_torn_and_made_again(
    tmp_path, street, undisturbed, length
):
    shutil.copytree(undisturbed, tmp_path / "labels")
    made = labels.read_label(tmp_path / "labels", street.pair_keys[2])
    flow = made.flow.clone()
    flow[7, 1] = length
    labels.write_label(tmp_path / "labels", dataclasses.replace(made, flow=flow))
    with pytest.raises(data.DataError, match="has flow that is not finite, or as long as the grid"):
        labels.read_label(tmp_path / "labels", made.key)
    assert counts(street, tmp_path / "labels") == [3, 0, 1, 0, 0]
    assert done(labels.label_dataset(street, tmp_path / "labels", QUICK, workers=1)) == (1, 3, 0)
    assert_same_tables(tmp_path / "labels", undisturbed, street)


def test_a_bit_that_flipped_in_the_middle_is_found_where_the_whole_label_is_read(
    tmp_path, street, undisturbed, monkeypatch
):
    """Looking for what is missing reads only the ends of labels: a few, here none, are compared."""
    monkeypatch.setattr(labels, "COMPARED", 0)
    folder = tmp_path / "labels"
    shutil.copytree(undisturbed, folder)
    path = labels.label_path(folder, street.pair_keys[2])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert counts_of_sample(street, folder, 0) == [4, 0, 0, 0, 0]
    assert done(labels.label_dataset(street, folder, QUICK, workers=1)) == (0, 4, 0)
    status = labels.label_status(street, folder, sample=0, whole=True)
    assert list(status.states["torn"]) == [street.pair_keys[2]]
    assert done(labels.label_dataset(street, folder, QUICK, workers=1, whole=True)) == (1, 3, 0)
    assert_same_tables(folder, undisturbed, street)


def test_what_the_end_of_a_label_tells_is_what_the_whole_label_tells(
    tmp_path, street, undisturbed, monkeypatch
):
    """For a whole label, one of another pair, one cut anywhere near its end, and none at all."""
    key, other = street.pair_keys[:2]
    path = labels.label_path(tmp_path, key)
    whole = labels.label_path(undisturbed, key).read_bytes()
    contents = [whole, labels.label_path(undisturbed, other).read_bytes()]
    contents += [whole[:-cut] for cut in (1, 6, 7, 100, 1000, len(whole))]
    contents += [whole.replace(b'"checksum"', b'"checksun"'), whole.replace(b'"loss"', b'loss"')]
    wanted = labels.settings_hash(labels.folder_settings(undisturbed))
    path.parent.mkdir()
    for content in contents:
        path.write_bytes(content)
        found = [
            labels.label_state(tmp_path, key, wanted, [path.name], whole) for whole in (False, True)
        ]
        assert found[0][0] == found[1][0] == ("made" if content == whole else "torn")
        assert math.isnan(found[0][2]) or found[0][2] == labels.read_label(tmp_path, key).seconds
    # A label of other settings, and one that is not in the listing of its folder.
    path.write_bytes(whole)
    assert labels.label_state(tmp_path, key, "other", [path.name])[0] == "foreign"
    assert labels.label_state(tmp_path, key, wanted, [])[0] == "missing"


def _sealed(path: Path, change) -> None:
    """Write a label as `write_label` does, but with other columns or metadata."""
    table = feather.read_table(path, memory_map=False)
    metadata = json.loads(table.schema.metadata[b"zeroflow"])
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    change(columns, metadata)
    table = pyarrow.table(columns)
    metadata["checksum"] = "0" * 64
    feather.write_feather(table.replace_schema_metadata({"zeroflow": json.dumps(metadata)}), path)
    content = path.read_bytes()
    checksum = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content.replace(b"0" * 64, checksum))


def _set(name, values):
    return lambda columns, metadata: columns.update({name: pyarrow.array(values)})


def _settings(**changes):
    return lambda columns, metadata: metadata["settings"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("has_flow", [None] + [True] * 49), "has_flow is bool with 1 nulls, expected bool"),
        (_set("has_flow", list(range(50))), "has_flow is int64 with 0 nulls, expected bool"),
        (_set("has_flow", ["yes"] * 50), "has_flow is string with 0 nulls, expected bool"),
        (_set("flow_ty_m", ["1.5"] * 50), "flow_ty_m is string, expected floating-point numbers"),
        (_set("flow_ty_m", [[1.5]] * 50), "flow_ty_m is list<item: double>, expected floating"),
        (_set("flow_ty_m", [1] * 50), "flow_ty_m is int64, expected floating-point numbers"),
        (_set("flow_ty_m", [None] + [1.5] * 49), "has flow that is not finite, or as long as"),
        (_set("flow_ty_m", [1e300] * 50), "has flow that is not finite, or as long as the grid"),
        (lambda columns, metadata: columns.pop("flow_ty_m"), "has no columns .'flow_ty_m'."),
        (lambda columns, metadata: metadata.pop("fingerprint"), "not a label of this project"),
        (lambda columns, metadata: metadata.pop("settings"), "not a label of this project"),
        (_settings(half_extent_m=None), "not a label of this project"),
        (_settings(half_extent_m=["wide"]), "not a label of this project"),
    ],
)
def test_a_label_of_other_columns_or_metadata_is_named(tmp_path, change, message):
    label = a_label()
    path = labels.write_label(tmp_path, label)
    _sealed(path, lambda columns, metadata: None)
    labels.read_label(tmp_path, label.key)
    _sealed(path, change)
    with pytest.raises(data.DataError, match=rf"1\.feather: .*{message}"):
        labels.read_label(tmp_path, label.key)


def test_a_label_that_is_a_folder_is_named(tmp_path):
    labels.label_path(tmp_path, a_label().key).mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"1\.feather: cannot be read \(Is a directory\)"):
        labels.read_label(tmp_path, a_label().key)


# --- Labels of another input ----------------------------------------------------------------------


def _other_points(pair: data.SweepPair) -> data.SweepPair:
    return dataclasses.replace(pair, pc1=pair.pc1.roll(1, 0))


def _other_pose(pair: data.SweepPair) -> data.SweepPair:
    pose = pair.ego1_SE3_ego0.clone()
    pose[0, 3] += 0.01
    return dataclasses.replace(pair, ego1_SE3_ego0=pose)


def _other_ground(pair: data.SweepPair) -> data.SweepPair:
    ground = pair.is_ground1.clone()
    ground[0] = ~ground[0]
    return dataclasses.replace(pair, is_ground1=ground)


class Changed(data.Pairs):
    """A data set all of whose pairs have changed, but not their names or numbers of points."""

    def __init__(self, dataset: data.Pairs, change):
        super().__init__()
        self.dataset, self.change = dataset, change
        self.pair_keys, self.stamps = dataset.pair_keys, dataset.stamps

    def read(self, key: data.PairKey) -> data.SweepPair:
        return self.change(self.dataset.read(key))


@pytest.mark.parametrize("change", [_other_points, _other_pose, _other_ground])
def test_labels_of_other_points_poses_or_ground_are_refused_and_left_alone(
    tmp_path, street, undisturbed, change
):
    folder = tmp_path / "labels"
    shutil.copytree(undisturbed, folder)
    labels.label_path(folder, street.pair_keys[0]).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    other = Changed(street, change)
    message = (
        r"\.feather: was made from other points, poses or ground than the data has now; "
        "if the data has changed, delete the label; if not, choose another folder"
    )
    with pytest.raises(data.DataError, match=message):
        labels.open_labels(folder, other).read(other[1])
    labels.open_labels(folder, street).read(street[1])
    with pytest.raises(data.DataError, match=message):
        labels.label_dataset(other, folder, QUICK, workers=1)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    status = labels.label_status(other, folder)
    assert [len(keys) for keys in status.states.values()] == [0, 1, 0, 0, 3]
    assert "was made from other points" in status.states["foreign"][street.pair_keys[1]]
    assert counts_of_sample(other, folder, 0) == [3, 1, 0, 0, 0]  # by themselves they are whole
    assert counts(street, folder) == [3, 1, 0, 0, 0]


def test_a_data_set_with_a_pair_twice_is_refused(tmp_path, street):
    twice = data.subset(street, [*street.pair_keys, street.pair_keys[1]])
    with pytest.raises(
        data.DataError, match="1 of 5 pairs are in the data set twice; was the same"
    ):
        labels.label_dataset(twice, tmp_path / "labels", QUICK, workers=1)
    assert not (tmp_path / "labels").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="power cut"), data.atomic_file(path) as file:
        file.write(b"ne")
        raise RuntimeError("power cut")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with data.atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_labels_are_for_points_that_are_not_ground_and_in_the_grid(street):
    pair = street[0]
    label = a_made_label(pair)
    expected = ~pair.is_ground0 & (
        pair.pc0[:, 2].abs() < 3
    )  # the street ends before the grid's sides do
    assert torch.equal(label.has_flow, expected) and expected.any() and not expected.all()
    assert not label.flow[~expected].any() and label.flow[expected].any()
    moved, target = (
        pair.pc0[expected] + label.flow[expected],
        pair.pc1[~pair.is_ground1 & (pair.pc1[:, 2].abs() < 3)],
    )
    distance_sq = torch.cdist(moved.double(), target.double()).square().min(dim=1).values
    assert label.loss == pytest.approx(
        distance_sq.where(distance_sq < 2, 0.0).mean().item(), rel=1e-4
    )


# --- Labeling many pairs --------------------------------------------------------------------------


def done(count: labels.LabelCount) -> tuple[int, int, int]:
    return count.made, count.found, len(count.failed)


def counts(dataset, folder: Path) -> list[int]:
    """How many labels are made, missing, torn, failed and foreign."""
    return counts_of_sample(dataset, folder, 20)


def counts_of_sample(dataset, folder: Path, sample: int | None) -> list[int]:
    return [len(keys) for keys in labels.label_status(dataset, folder, sample).states.values()]


def test_labeling_makes_exactly_what_is_missing_or_torn(tmp_path, street, undisturbed):
    assert done(labels.label_dataset(street, tmp_path, QUICK, workers=1)) == (4, 0, 0)
    paths = [labels.label_path(tmp_path, key) for key in street.pair_keys]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    paths[1].unlink()  # in the middle of a log
    _cut(paths[2])
    paths[3].write_bytes(b"")
    assert done(labels.label_dataset(street, tmp_path, QUICK, workers=1)) == (3, 1, 0)
    assert (paths[0].read_bytes(), paths[0].stat().st_mtime_ns) == before[0]
    assert_same_tables(tmp_path, undisturbed, street)
    assert torch.equal(tables(tmp_path, street)[1][0], a_made_label(street[1]).flow.half())


def test_changed_settings_are_refused_by_name_and_spoil_nothing(tmp_path, street, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "labels")
    labels.label_path(tmp_path / "labels", street.pair_keys[0]).unlink()
    other = dataclasses.replace(QUICK, iterations=4)
    with pytest.raises(
        data.DataError, match=r"holds labels of other settings \(iterations 3 there, 4 here\)"
    ):
        labels.label_dataset(street, tmp_path / "labels", other, workers=1)
    assert not labels.label_path(tmp_path / "labels", street.pair_keys[0]).exists()
    (tmp_path / "labels" / "settings.json").write_text(json.dumps(zeroflow.label_settings(other)))
    with pytest.raises(
        data.DataError,
        match="feather: was made with other settings than its folder's settings.json",
    ):
        labels.label_dataset(street, tmp_path / "labels", other, workers=1)
    (tmp_path / "labels" / "settings.json").unlink()
    with pytest.raises(
        data.DataError,
        match="settings.json: is missing, so it is unknown how the labels here were made",
    ):
        labels.label_dataset(street, tmp_path / "labels", other, workers=1)
    assert not (tmp_path / "labels" / "settings.json").exists()
    (tmp_path / "labels" / "settings.json").write_text("{")
    with pytest.raises(data.DataError, match="settings.json: is not JSON"):
        labels.label_dataset(street, tmp_path / "labels", QUICK, workers=1)


def test_a_broken_pair_fails_with_its_reason_until_it_is_mended(
    tmp_path, street_folder, undisturbed
):
    shutil.copytree(street_folder, tmp_path / "street")
    pairs, folder = data.open_dataset(tmp_path / "street"), tmp_path / "labels"
    key = pairs.pair_keys[0]
    sweep = tmp_path / "street" / key.log_id / "sensors" / "lidar" / f"{key.timestamp0_ns}.feather"
    whole = sweep.read_bytes()
    _cut(sweep)
    count = labels.label_dataset(pairs, folder, QUICK, workers=2)
    assert done(count) == (3, 0, 1)
    assert count.failed[0][0] == key and f"{sweep}: not a whole Feather file" in count.failed[0][1]
    note = json.loads((folder / key.log_id / f"{key.timestamp0_ns}.broken.json").read_text())
    assert note == {**key._asdict(), "reason": count.failed[0][1]}
    assert counts(pairs, folder) == [3, 0, 0, 1, 0]
    sweep.write_bytes(whole)
    assert done(labels.label_dataset(pairs, folder, QUICK, workers=1)) == (1, 3, 0)
    assert counts(pairs, folder) == [4, 0, 0, 0, 0]
    assert not list(folder.rglob("*.broken.json"))
    assert_same_tables(folder, undisturbed, pairs)


class Faulty:
    """A data set, one of whose pairs does something else than being read.

    It is in this module so that a new process can import it.
    """

    def __init__(self, dataset, index: int, fault, marker: Path | None = None):
        self.dataset, self.pair_keys, self.index, self.fault, self.marker = (
            dataset,
            dataset.pair_keys,
            index,
            fault,
            marker,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> data.SweepPair:
        if index == self.index or self.index < 0:
            self.fault(index)
        return self.dataset[index]


def _kill_this_process(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _divide_by_zero(index: int) -> None:
    print(index / 0)


def _cannot_be_read(index: int) -> None:
    raise OSError(f"sweep {index} cannot be read")


def _needs_a_terabyte(index: int) -> None:
    np.zeros(2**47)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1.00 PiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        lambda: torch.empty(2**47),  # what PyTorch raises on a CPU has no class of its own
    ],
)
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_pair_that_needs_too_much_memory_costs_only_itself(
    tmp_path, street, undisturbed, monkeypatch, error, at_once
):
    """Side by side with the others it takes them along, and they are fitted again one by one."""
    make = zeroflow.make_labels

    def big_pair(pairs, *arguments, **more):
        if any(pair.key == street.pair_keys[1] for pair in pairs):
            if isinstance(error, Exception):
                raise error
            error()
        return make(pairs, *arguments, **more)

    monkeypatch.setattr(zeroflow, "make_labels", big_pair)
    monkeypatch.setitem(labels.PAIRS_AT_ONCE, "cpu", at_once)
    count = labels.label_dataset(street, tmp_path, QUICK, workers=1)
    assert done(count) == (3, 0, 1) and count.failed[0][0] == street.pair_keys[1]
    assert count.failed[0][1].startswith("there was not enough memory (")
    assert count.failed[0][1].endswith("or a cloud of fewer points")
    monkeypatch.undo()
    assert done(labels.label_dataset(street, tmp_path, QUICK, workers=1)) == (1, 3, 0)
    assert_same_tables(tmp_path, undisturbed, street)


def test_a_sweep_too_large_to_be_read_costs_its_pair_and_another_fault_the_run(
    tmp_path, street, monkeypatch
):
    count = labels.label_dataset(Faulty(street, 2, _needs_a_terabyte), tmp_path, QUICK, workers=2)
    assert done(count) == (3, 0, 1) and "there was not enough memory" in count.failed[0][1]

    def broken(*arguments, **more):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(zeroflow, "make_labels", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        labels.label_dataset(street, tmp_path, QUICK, workers=1)


def test_a_process_that_dies_costs_the_pair_it_had(tmp_path, street, undisturbed):
    count = labels.label_dataset(Faulty(street, 1, _kill_this_process), tmp_path, QUICK, workers=2)
    assert done(count) == (3, 0, 1)
    assert (
        count.failed[0][0] == street.pair_keys[1]
        and "its process died (exit code -9" in count.failed[0][1]
    )
    assert done(labels.label_dataset(street, tmp_path, QUICK, workers=1)) == (1, 3, 0)
    assert_same_tables(tmp_path, undisturbed, street)


def test_one_worker_on_one_core_is_still_a_process_that_may_die(tmp_path, street, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert labels.usable_cores() == 1
    assert done(labels.label_dataset(Faulty(street, 1, _kill_this_process), tmp_path, QUICK)) == (
        3,
        0,
        1,
    )


UNGUARDED = """
import sys
import data, labels
from test_labels import QUICK, Faulty
as_big_as_the_keys_of_a_real_split = "x" * 300_000
dataset = Faulty(data.open_dataset(sys.argv[1]), None, None, as_big_as_the_keys_of_a_real_split)
print(labels.label_dataset(dataset, sys.argv[2], QUICK, workers=2).failed)
"""


def test_processes_that_cannot_start_are_reported_and_not_waited_for(tmp_path, street_folder):
    """A script without `if __name__ == "__main__"` would start itself again in each process.

    Python refuses that, so no process gets as far as reading its job.
    """
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(script), str(street_folder), str(tmp_path / "labels")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.count("its process died (exit code 1;") == 4, (
        run.stderr
    )


def test_a_mistake_in_a_process_keeps_its_traceback(tmp_path, street):
    with pytest.raises(ZeroDivisionError) as error:
        labels.label_dataset(Faulty(street, 2, _divide_by_zero), tmp_path, QUICK, workers=2)
    assert "in _divide_by_zero" in error.value.__notes__[0]


def test_a_run_stops_when_too_much_is_broken(tmp_path, street):
    broken = Faulty(street, -1, _cannot_be_read)
    with pytest.raises(
        data.DataError,
        match="2 pairs could not .* more than --max-broken 0.01 of 4.*sweep 0 cannot be",
    ):
        labels.label_dataset(broken, tmp_path, QUICK, workers=1, max_broken=0.01)
    assert done(labels.label_dataset(broken, tmp_path, QUICK, workers=1, max_broken=0.04)) == (
        0,
        0,
        4,
    )


class Many:
    """A pair under many names, the first of which cannot be read."""

    def __init__(self, pair: data.SweepPair, count: int, broken: int):
        self.pair, self.broken = pair, broken
        self.pair_keys = [data.PairKey("log", 10 * i, 10 * i + 10) for i in range(count)]

    def __len__(self) -> int:
        return len(self.pair_keys)

    def __getitem__(self, index: int) -> data.SweepPair:
        if index < self.broken:
            raise OSError("cannot be read")
        key = self.pair_keys[index]
        return dataclasses.replace(self.pair, **key._asdict())


def test_a_rerun_with_nothing_but_broken_pairs_left_does_not_stop_at_them(tmp_path, street):
    few = torch.zeros(4, dtype=torch.bool)
    pair = dataclasses.replace(
        street[0], pc0=street[0].pc0[:4], pc1=street[0].pc1[:4], is_ground0=few, is_ground1=few
    )
    many = Many(pair, count=150, broken=7)
    assert done(labels.label_dataset(many, tmp_path, QUICK, workers=1)) == (143, 0, 7)
    assert done(labels.label_dataset(many, tmp_path, QUICK, workers=1)) == (0, 143, 7)
    with pytest.raises(data.DataError, match="8 pairs could not be labeled"):
        labels.label_dataset(Many(pair, count=150, broken=8), tmp_path / "more", QUICK, workers=1)


def test_several_workers_make_the_labels_that_one_makes(tmp_path, street, undisturbed):
    assert done(labels.label_dataset(street, tmp_path, QUICK, workers=2)) == (4, 0, 0)
    assert_same_tables(tmp_path, undisturbed, street)


def test_several_pairs_at_once_as_on_a_gpu_give_a_label_each(tmp_path, street, monkeypatch):
    monkeypatch.setitem(labels.PAIRS_AT_ONCE, "cpu", 3)
    broken = Faulty(street, 1, _cannot_be_read)
    count = labels.label_dataset(broken, tmp_path, QUICK, workers=1)
    assert done(count) == (3, 0, 1) and count.failed[0] == (
        street.pair_keys[1],
        "sweep 1 cannot be read",
    )
    for index in (0, 2, 3):
        label, alone = (
            labels.read_label(tmp_path, street.pair_keys[index]),
            a_made_label(street[index]),
        )
        assert torch.equal(label.has_flow, alone.has_flow)
        torch.testing.assert_close(label.flow, alone.flow, atol=1e-3, rtol=0)


KILLED_AT_A_BOUNDARY = """
import io, os, pathlib, signal, sys
import data, labels
from test_labels import QUICK

dataset = data.open_dataset(sys.argv[1], true_flow=False)
boundary = 0
# Label in a child that is killed at the first, second, ... boundary, until one lives to the end.
while True:
    child = os.fork()
    if child == 0:
        left = boundary

        def at_boundary():
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def wrapped(function):
            def call(*arguments):
                at_boundary()
                result = function(*arguments)
                at_boundary()
                return result
            return call

        data.os.fsync, data.os.replace = map(wrapped, (os.fsync, os.replace))

        class HalfThenWhole(io.FileIO):
            def write(self, content):
                if ".feather" not in self.name.name:
                    return super().write(content)
                half = super().write(content[: len(content) // 2])
                at_boundary()
                return half + super().write(content[half:])

        data.open = HalfThenWhole
        labels.label_dataset(dataset, pathlib.Path(sys.argv[2]) / str(boundary), QUICK, workers=1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    boundary += 1
print(boundary)
"""


def test_kill_9_at_any_file_boundary_then_a_rerun_gives_the_undisturbed_labels(
    tmp_path, street_folder, undisturbed
):
    """Boundaries: before and after the flush and the renaming, of the settings and of each label.

    For a label there is one more, half-way through writing it.
    """
    log = next(path for path in sorted(street_folder.iterdir()) if path.is_dir())
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_AT_A_BOUNDARY, str(log), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    boundaries = int(run.stdout)
    assert boundaries == 4 + 2 * 5
    pairs, left_over = data.open_dataset(log), 0
    for boundary in range(boundaries):
        folder = tmp_path / str(boundary)
        whole = 0
        for key in pairs.pair_keys:  # before the rerun: what has a label's name is whole
            if labels.label_path(folder, key).exists():
                labels.read_label(folder, key)
                whole += 1
        left_over += len(list(folder.rglob("*.tmp")))
        assert done(labels.label_dataset(pairs, folder, QUICK, workers=1)) == (2 - whole, whole, 0)
        assert_same_tables(folder, undisturbed, pairs)
    assert left_over > 5, "the runs were not killed half-way"


def test_a_folder_belongs_to_one_teacher_and_one_grid(tmp_path):
    labels.claim_folder(tmp_path, QUICK_SETTINGS)
    labels.claim_folder(tmp_path, QUICK_SETTINGS)
    assert labels.folder_settings(tmp_path) == QUICK_SETTINGS
    assert QUICK_SETTINGS == dataclasses.asdict(QUICK) | {"half_extent_m": [51.2, 51.2, 3.0]}
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]
    other = zeroflow.label_settings(dataclasses.replace(QUICK, seed=1))
    with pytest.raises(data.DataError, match=r"other settings \(seed 0 there, 1 here\)"):
        labels.claim_folder(tmp_path, other)
    grid = r"\(half_extent_m \[51.2, 51.2, 3.0\] there, \[25.6, 25.6, 3.0\] here\)"
    with pytest.raises(data.DataError, match=f"other settings {grid}"):
        labels.claim_folder(tmp_path, zeroflow.label_settings(QUICK, (25.6, 25.6, 3.0)))


def test_labels_of_another_grid_store_it_and_cover_only_its_points(tmp_path, street):
    half_extent_m = (10.0, 10.0, 3.0)
    count = labels.label_dataset(street, tmp_path, QUICK, half_extent_m, workers=1)
    assert done(count) == (4, 0, 0)
    label_folder = labels.open_labels(tmp_path, street)
    assert label_folder.half_extent_m == half_extent_m
    assert label_folder.teacher != labels.settings_hash(QUICK_SETTINGS)
    for pair in street:
        label = label_folder.read(pair)
        assert label.settings["half_extent_m"] == [10.0, 10.0, 3.0]
        is_near = (pair.pc0.abs() < torch.tensor(half_extent_m)).all(dim=1)
        assert torch.equal(label.has_flow, ~pair.is_ground0 & is_near)
        assert label.has_flow.sum() < data.input_masks(pair)[0].sum()


def test_a_folder_of_an_older_version_which_stored_no_grid_is_refused(tmp_path, street):
    labels.write_label(tmp_path, dataclasses.replace(a_label(), key=street.pair_keys[0]))
    (tmp_path / "settings.json").write_text(json.dumps(dataclasses.asdict(QUICK)))
    for use in (
        lambda: labels.claim_folder(tmp_path, QUICK_SETTINGS),
        lambda: labels.open_labels(tmp_path, street),
        lambda: labels.label_status(street, tmp_path),
    ):
        with pytest.raises(data.DataError, match="other settings .half_extent_m, their grid, is m"):
            use()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "is not JSON of settings"),
        (b"", "is not JSON of settings"),
        (b"17", "is not JSON of settings"),
        (b"null", "is not JSON of settings"),
        (b"[" * 100_000, "is not JSON of settings"),
        (b'{"half_extent_m": ' + b"9" * 5000 + b"}", "is not JSON of settings"),
        (b"{}", "half_extent_m, their grid, is missing there"),
        (b'{"half_extent_m": 5}', "half_extent_m is 5, expected three positive numbers"),
        (b'{"half_extent_m": [5.0, 5.0]}', "half_extent_m is .5.0, 5.0., expected three"),
        (b'{"half_extent_m": [5.0, 5.0, "3"]}', "half_extent_m is .*, expected three positive"),
        (b'{"half_extent_m": [5.0, 5.0, -3.0]}', "half_extent_m is .*, expected three positive"),
        (b'{"half_extent_m": [5.0, 5.0, NaN]}', "half_extent_m is .*, expected three positive"),
        (b'{"half_extent_m": [5.0, 5.0, 1e999]}', "half_extent_m is .*, expected three positive"),
        (b'{"half_extent_m": [5.0, 5.0, ' + b"9" * 400 + b"]}", "expected three positive numbers"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path, street, content, message):
    (tmp_path / "settings.json").write_bytes(content)
    for use in (
        lambda: labels.claim_folder(tmp_path, QUICK_SETTINGS),
        lambda: labels.open_labels(tmp_path, street),
        lambda: labels.label_status(street, tmp_path),
    ):
        with pytest.raises(data.DataError, match=rf"settings\.json: .*{message}"):
            use()


@pytest.mark.parametrize("note", [b"\xff\xfe", b"", b"17", b"{}", b"[" * 100_000, b"null"])
def test_a_note_that_does_not_tell_why_a_pair_failed_is_named(tmp_path, street, note):
    labels.claim_folder(tmp_path, QUICK_SETTINGS)
    path = labels.label_path(tmp_path, street.pair_keys[2]).with_suffix(".broken.json")
    path.parent.mkdir()
    path.write_bytes(note)
    status = labels.label_status(street, tmp_path)
    reason = status.states["failed"][street.pair_keys[2]]
    assert len(status.states["missing"]) == 3 and reason.startswith(f"{path}: gives no reason (")


def test_of_two_runs_that_claim_a_folder_at_once_the_labels_of_one_are_foreign(
    tmp_path, street, monkeypatch
):
    """The second run comes between the first one's look and its claim."""
    other, replace = dataclasses.replace(QUICK, seed=1), os.replace

    def second_is_faster(*arguments):
        monkeypatch.setattr(os, "replace", replace)
        labels.claim_folder(tmp_path, zeroflow.label_settings(other))
        labels.write_label(tmp_path, a_made_label(street[0], other))
        replace(*arguments)

    monkeypatch.setattr(os, "replace", second_is_faster)
    labels.claim_folder(tmp_path, QUICK_SETTINGS)
    with pytest.raises(data.DataError, match=r"other settings \(seed 0 there, 1 here\)"):
        labels.claim_folder(tmp_path, zeroflow.label_settings(other))
    assert counts(street, tmp_path) == [0, 3, 0, 0, 1]
    with pytest.raises(data.DataError, match="was made with other settings than its folder's"):
        labels.label_dataset(street, tmp_path, QUICK, workers=1)
    with pytest.raises(data.DataError, match="was made with other settings than its folder's"):
        labels.open_labels(tmp_path, street).read(street[0])


def test_what_killed_processes_left_half_written_is_swept_up_an_hour_later(
    tmp_path, street, undisturbed
):
    shutil.copytree(undisturbed, tmp_path / "labels")
    folder = tmp_path / "labels" / street.pair_keys[0].log_id
    old, young = folder / ".1.feather.a.tmp", folder / ".1.feather.b.tmp"
    for file, hours in ((old, 2), (young, 0)):
        file.write_bytes(b"half")
        os.utime(file, (time.time() - 3600 * hours,) * 2)
    labels.label_dataset(street, tmp_path / "labels", QUICK, workers=1)
    assert young.exists() and not old.exists()


def label_command(
    street_folder: Path, folder: Path, *arguments, prefix=(), **more
) -> subprocess.Popen:
    command = [
        sys.executable,
        *prefix,
        ROOT / "zeroflow.py",
        "label",
        "--data",
        street_folder,
        "--labels",
        folder,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*map(str, command), *QUICK_OPTIONS, *map(str, arguments)], **pipes, **more
    )


def test_two_workers_on_the_same_shard_do_no_harm(tmp_path, street_folder, street, undisturbed):
    runs = [label_command(street_folder, tmp_path) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    assert_same_tables(tmp_path, undisturbed, street)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_a_clear_error_and_leaves_old_labels_whole(
    tmp_path, street_folder, street, undisturbed
):
    """The disk is full for files beyond 4 kB: the settings fit, a label does not."""
    shutil.copytree(undisturbed, tmp_path / "labels")
    missing = labels.label_path(tmp_path / "labels", street.pair_keys[2])
    missing.unlink()
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    limit += "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    run = label_command(street_folder, tmp_path / "labels", prefix=("-c", limit))
    _, errors = run.communicate()
    assert run.returncode == 1
    assert (
        f"cannot be written (File too large); what was there is unchanged: '{missing}'"
        in errors.splitlines()[-1]
    )
    assert not missing.exists() and not list(tmp_path.rglob("*.tmp"))
    assert done(labels.label_dataset(street, tmp_path / "labels", QUICK, workers=1)) == (1, 3, 0)


def test_a_folder_that_cannot_be_written_is_a_clear_error_before_any_work(
    tmp_path, street_folder, capsys
):
    (tmp_path / "file").write_text("not a folder")
    arguments = ("label", "--data", street_folder, "--labels", tmp_path / "file" / "labels")
    assert commands.main([*map(str, arguments), *QUICK_OPTIONS]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line.startswith("error:")
        and "cannot be written (Not a directory)" in line
        and str(tmp_path / "file") in line
    )
    assert (tmp_path / "file").read_text() == "not a folder"


# --- Shards and status ----------------------------------------------------------------------------


def test_shards_are_a_fixed_and_even_partition():
    keys = [data.PairKey(f"log{i}", 100 * j, 100 * j + 100) for i in range(20) for j in range(50)]
    assert [labels.shard_of(key, 16) for key in keys[:6]] == [4, 2, 14, 3, 5, 14]
    counts = np.bincount([labels.shard_of(key, 16) for key in keys], minlength=16)
    assert (
        counts.sum() == 1000 and counts.min() > 35 and counts.max() < 95
    )  # 62.5 each, give or take 7.7


def test_the_shard_comes_from_the_option_else_torchrun_else_a_slurm_array():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8"}
    slurm = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6"}
    assert labels.chosen_shard(None, {}) == (0, 1)
    assert labels.chosen_shard(None, slurm) == (5, 6)
    assert labels.chosen_shard(None, torchrun | slurm) == (3, 8)
    assert labels.chosen_shard("0/2", torchrun | slurm) == (0, 2)
    # Arrays 1-6, and 10-20:2. Of tasks 1, 2 and 9 the last has no shard.
    from_one = slurm | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "1"}
    assert labels.chosen_shard(None, from_one | {"SLURM_ARRAY_TASK_ID": "6"}) == (5, 6)
    assert labels.chosen_shard(None, from_one | {"SLURM_ARRAY_TASK_ID": "1"}) == (0, 6)
    in_steps = slurm | {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2"}
    assert labels.chosen_shard(None, in_steps | {"SLURM_ARRAY_TASK_ID": "14"}) == (2, 6)
    with pytest.raises(data.DataError, match="'8' of '3' is not a shard"):
        gaps = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}
        labels.chosen_shard(None, from_one | gaps)
    for text in ("2/2", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(data.DataError, match=f"--shard {text}: .* shards are 0/n ... n-1/n"):
            labels.chosen_shard(text, {})
    with pytest.raises(
        data.DataError,
        match="SLURM_ARRAY_TASK_ID/SLURM_ARRAY_TASK_COUNT: '6' of '6' is not a shard",
    ):
        labels.chosen_shard(None, slurm | {"SLURM_ARRAY_TASK_ID": "6"})  # an array that starts at 1


def test_shards_share_the_work_and_another_count_relabels_nothing(tmp_path, street, undisturbed):
    made = [
        done(labels.label_dataset(street, tmp_path, QUICK, workers=1, shard=(i, 3)))
        for i in range(3)
    ]
    assert [m for m, _, _ in made] == [
        sum(labels.shard_of(key, 3) == i for key in street.pair_keys) for i in range(3)
    ]
    assert sum(m for m, _, _ in made) == 4 and not any(found for _, found, _ in made)
    for shard in ((0, 2), (1, 2)):
        assert done(labels.label_dataset(street, tmp_path, QUICK, workers=1, shard=shard))[0] == 0
    assert_same_tables(tmp_path, undisturbed, street)


def test_torchrun_labels_with_every_rank_and_one_broken_pair_stops_nobody(
    tmp_path, street_folder, undisturbed
):
    shutil.copytree(street_folder, tmp_path / "street")
    pairs = data.open_dataset(tmp_path / "street")
    key = pairs.pair_keys[0]
    _cut(tmp_path / "street" / key.log_id / "sensors" / "lidar" / f"{key.timestamp0_ns}.feather")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = label_command(tmp_path / "street", tmp_path / "labels", prefix=torchrun)
    out, errors = run.communicate()
    assert run.returncode == 0, errors
    for rank in (0, 1):
        mine = sum(labels.shard_of(other, 2) == rank for other in pairs.pair_keys[1:])
        assert f"labels, shard {rank}/2: {mine} labels made" in out
    assert counts(pairs, tmp_path / "labels") == [3, 0, 0, 1, 0]
    for other in pairs.pair_keys[1:]:
        expected = labels.read_label(undisturbed, other).flow
        assert torch.equal(labels.read_label(tmp_path / "labels", other).flow, expected)


def test_status_counts_names_shards_and_says_what_is_left(
    tmp_path, street_folder, street, undisturbed, capsys
):
    shutil.copytree(undisturbed, tmp_path / "labels")
    folder = tmp_path / "labels"
    arguments = ["status", "--data", str(street_folder), "--labels", str(folder)]
    assert commands.main(arguments) == 0
    assert capsys.readouterr().out.endswith(
        "labels: 4 made, 0 missing, 0 torn, 0 failed, of 4 pairs\n"
    )
    paths = [labels.label_path(tmp_path / "labels", key) for key in street.pair_keys]
    paths[0].unlink()
    _cut(paths[1])
    paths[2].unlink()
    paths[2].with_suffix(".broken.json").write_text(json.dumps({"reason": "the sweep is gone"}))
    label = labels.read_label(tmp_path / "labels", street.pair_keys[3])
    labels.write_label(tmp_path / "labels", dataclasses.replace(label, seconds=1800.0))
    numbers = tmp_path / "numbers.json"
    assert commands.main([*arguments, "--shards", "5", "--json", str(numbers)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("labels: 1 made, 1 missing, 1 torn, 1 failed, of 4 pairs")
    assert "left: 1.00 hours of one worker, at 1800.00 s per pair" in lines
    again = sorted({labels.shard_of(street.pair_keys[i], 5) for i in (0, 1)})
    assert "run again: " + " ".join(f"--shard {shard}/5" for shard in again) in lines
    lacking = {}
    for key in (street.pair_keys[0], street.pair_keys[1]):
        lacking[key.log_id] = lacking.get(key.log_id, 0) + 1
    assert json.loads(numbers.read_text()) == {
        **{"made": 1, "missing": 1, "torn": 1, "failed": 1, "foreign": 0},
        **{"run_again": [f"{shard}/5" for shard in again], "hours_left": 1.0},
        "lacking": lacking,
    }
    assert any(
        line.startswith("torn: ") and f"{paths[1]}: not a whole Feather file" in line
        for line in lines
    )
    assert any("the sweep is gone" in line for line in lines)
    about = zeroflow.label_settings(dataclasses.replace(QUICK, seed=1))
    labels.write_label(tmp_path / "labels", dataclasses.replace(label, settings=about))
    assert commands.main(arguments) == 1
    out = capsys.readouterr().out
    message = f"{paths[3]}: was made with other settings than its folder's settings.json names"
    assert f"{message}; move it away" in out and "1 failed, 1 foreign, of 4 pairs" in out
    shutil.rmtree(tmp_path / "labels")
    assert commands.main(arguments) == 1 and "is not a folder of labels" in capsys.readouterr().err


def test_status_compares_a_sample_with_the_sweeps(tmp_path, street, undisturbed):
    """One label has a row less than its sweep, and one is missing."""
    folder = tmp_path / "labels"
    shutil.copytree(undisturbed, folder)
    made = labels.read_label(folder, street.pair_keys[3])
    rows = {name: getattr(made, name)[1:] for name in ("flow", "has_flow", "gain")}
    fewer = dataclasses.replace(made, **rows)
    path = labels.write_label(folder, fewer)
    labels.label_path(folder, street.pair_keys[0]).unlink()
    for sample in (None, 3, 20):
        status = labels.label_status(street, folder, sample)
        assert list(status.states["missing"]) == [street.pair_keys[0]]
        assert list(status.states["torn"]) == [street.pair_keys[3]]
        rows = f"{path}: has {len(made.flow) - 1} rows, its sweep has {len(made.flow)} points"
        assert rows in status.states["torn"][street.pair_keys[3]]
        assert len(status.seconds) == len(status.states["made"]) == 2 and not status.is_published
    # By itself the label is whole, and of three that are made a sample of one is the first.
    assert counts_of_sample(street, folder, 1) == [3, 1, 0, 0, 0]
    # A folder without any label yet, and one that is not a folder of labels.
    labels.claim_folder(tmp_path / "new", QUICK_SETTINGS)
    assert counts(street, tmp_path / "new") == [0, 4, 0, 0, 0]
    with pytest.raises(data.DataError, match="new: has no label for any of 4 pairs; run"):
        labels.open_labels(tmp_path / "new", street)
    with pytest.raises(
        data.DataError, match="is not a folder of labels for this data; make it with"
    ):
        labels.label_status(street, tmp_path)


def test_a_sweep_that_cannot_be_read_is_no_fault_of_its_label(tmp_path, street_folder, undisturbed):
    shutil.copytree(street_folder, tmp_path / "street")
    pairs = data.open_dataset(tmp_path / "street")
    key = pairs.pair_keys[0]
    _cut(tmp_path / "street" / key.log_id / "sensors" / "lidar" / f"{key.timestamp0_ns}.feather")
    assert counts(pairs, undisturbed) == [4, 0, 0, 0, 0]


def test_status_of_published_labels_reads_a_sample(tmp_path, street):
    """Three pairs have a label, and the third label is one row short."""
    for pair, index in ((street[0], 0), (street[1], 1), (street[2], 0)):
        columns = {name: np.zeros(len(pair.pc0), np.float32) for name in data.FLOW_COLUMNS}
        table = pyarrow.table({**columns, "is_valid": np.ones(len(pair.pc0), bool)})
        table = table.slice(1 if pair.key == street.pair_keys[2] else 0)
        file = tmp_path / pair.log_id / f"{index:010d}.feather"
        file.parent.mkdir(exist_ok=True)
        feather.write_feather(table, file)
    status = labels.label_status(street, tmp_path, None)
    assert status.is_published and status.seconds == []
    assert [len(keys) for keys in status.states.values()] == [2, 1, 1, 0, 0]
    assert "does it belong to this log?" in status.states["torn"][street.pair_keys[2]]
    assert counts_of_sample(street, tmp_path, 2) == [3, 1, 0, 0, 0]  # the first two that are made
    label_folder = labels.open_labels(tmp_path, street)
    assert label_folder.half_extent_m == (51.2, 51.2, 3.0) and label_folder.teacher == "published"
    label = label_folder.read(street[0])
    assert label.settings == {"teacher": "published", "half_extent_m": [51.2, 51.2, 3.0]}


# --- Pairs that give little or nothing ------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("teacher", nsfp.TEACHERS)
def test_pairs_of_no_or_few_points_and_points_out_of_range_get_labels(
    tmp_path, street, count, teacher
):
    pair = street[0]
    rows = (~pair.is_ground0).nonzero()[:count, 0]
    is_ground0 = torch.ones_like(pair.is_ground0)
    is_ground0[rows] = False
    settings = dataclasses.replace(nsfp.TEACHERS[teacher], iterations=3)
    for few, kept in (
        (dataclasses.replace(pair, is_ground0=is_ground0), count),
        (dataclasses.replace(pair, pc0=pair.pc0 + 1000.0), 0),  # out of range
        (dataclasses.replace(pair, pc1=pair.pc1 + 1000.0, is_ground0=is_ground0), count),
        (
            dataclasses.replace(
                pair, is_ground1=torch.ones_like(pair.is_ground1), is_ground0=is_ground0
            ),
            count,
        ),
    ):
        label = a_made_label(few, settings)
        labels.write_label(tmp_path, label)
        found = labels.read_label(tmp_path, pair.key, len(pair.pc0))
        assert (
            int(found.has_flow.sum()) == kept
            and found.flow.isfinite().all()
            and not found.flow[~found.has_flow].any()
        )


def test_rows_of_nan_and_sweeps_of_nothing_but_ground_pass_through(street):
    """A NaN row gets no flow and leaves the others alone; without input, a label has no flow."""
    pair = street[0]
    pc0 = pair.pc0.clone()
    row = int((~pair.is_ground0).nonzero()[7])
    pc0[row] = torch.nan
    label = a_made_label(dataclasses.replace(pair, pc0=pc0))
    assert not label.has_flow[row] and not label.flow[row].any() and label.flow.isfinite().all()
    student = zeroflow.from_student(fastflow3d.FastFlow3D(fastflow3d.MODELS["narrow"]))
    flow = student(dataclasses.replace(pair, pc0=pc0))[0]
    assert flow.isfinite().all() and not flow[row].any() and flow.any()

    everything = torch.ones_like(pair.is_ground0)
    empty = dataclasses.replace(pair, is_ground0=everything)
    label = a_made_label(empty)
    assert not label.has_flow.any() and not label.flow.any() and label.loss == 0
    assert not student(empty)[0].any() and not zeroflow.nearest_neighbor(empty).any()
    result = zeroflow.evaluate([empty], zeroflow.timed(zeroflow.no_motion)).numbers
    assert result["points"] == 0 and math.isnan(result["grid_three_way"])


@pytest.mark.parametrize(
    "wild",
    [
        dataclasses.replace(QUICK, learning_rate=1e30, iterations=10),
        dataclasses.replace(QUICK, learning_rate=1e30, iterations=10, refine="sweep"),
        # Points thrown out of reach cost nothing: the published loop keeps them as its best.
        dataclasses.replace(
            nsfp.TEACHERS["nsfp"], learning_rate=1.0, iterations=40, hidden_channels=32
        ),
    ],
)
def test_a_fit_that_diverged_costs_one_label_and_is_reported(tmp_path, street, wild):
    count = labels.label_dataset(street, tmp_path, wild, workers=1)
    assert (
        done(count) == (0, 0, 4)
        and "the fit diverged; try a smaller learning rate" in count.failed[0][1]
    )
    with pytest.raises(data.DataError, match="the fit diverged"):
        zeroflow.from_teacher(wild)(street[0])


# --- Is the pose wrong? ---------------------------------------------------------------------------

# Half the work of `fast`, for the sparse points of a street.
SPARSE = dataclasses.replace(
    nsfp.TEACHERS["fast"],
    **{"priors": 2, "iterations": 150},
    **{"cluster_reach": 0.8, "cluster_points": 5, "confirm_reach": 0.5},
)


@pytest.fixture(scope="module")
def dense_street(tmp_path_factory) -> data.SweepPair:
    """About 6,000 points that are not ground, a quarter of them on objects that move."""
    folder = tmp_path_factory.mktemp("dense")
    synthetic.write_logs(folder, 1, dataclasses.replace(synthetic.PRESETS["small"], sweeps=2))
    return data.open_dataset(folder)[0]


def _with_wrong_pose(pair: data.SweepPair, *ego0_SE3_wrong0: float) -> data.SweepPair:
    """The pose is wrong by a shift in meters, so sweep 1 lies elsewhere."""
    shift = np.eye(4)
    shift[:3, 3] = ego0_SE3_wrong0
    pc1 = data.transform(shift, pair.pc1.double().numpy()).astype(np.float32)
    pose = pair.ego1_SE3_ego0 @ torch.from_numpy(data.inverse(shift))
    return dataclasses.replace(pair, pc1=torch.from_numpy(pc1), ego1_SE3_ego0=pose)


class OnePair:
    """A data set of one pair that is in memory."""

    def __init__(self, pair: data.SweepPair):
        self.pair, self.pair_keys = pair, [pair.key]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> data.SweepPair:
        return self.pair


def test_a_pose_that_is_wrong_by_11_5_cm_is_found(tmp_path, dense_street):
    """By the length of the motion, whatever its direction; the right pose is not suspected."""
    count = labels.label_dataset(OnePair(dense_street), tmp_path / "right", SPARSE, workers=1)
    assert done(count) == (1, 0, 0) and count.suspicious == []
    for name, shift in (("ahead", (0.115, 0, 0)), ("aside", (0.083, 0.08, 0))):
        wrong = _with_wrong_pose(dense_street, *shift)
        count = labels.label_dataset(OnePair(wrong), tmp_path / name, SPARSE, workers=1)
        ((key, text),) = count.suspicious
        assert done(count) == (1, 0, 0) and key == dense_street.key
        found = re.fullmatch(
            r"(\d+) % of the points share one motion of (\d+\.\d) cm: "
            r"is the pose of this pair wrong\?",
            text,
        )
        assert 50 <= int(found[1]) <= 100 and float(found[2]) == pytest.approx(11.5, abs=1.5)


def test_a_scene_in_which_much_moves_is_not_suspected(dense_street):
    """40 % of the points, 5 m to 25 m ahead, move by 1 m; and a pair of few points."""
    pair = dense_street
    x0, x1 = pair.pc0[:, 0], pair.pc1[:, 0]
    border = float(x0[data.input_masks(pair)[0]].quantile(0.6))
    flow, pc1 = torch.zeros_like(pair.pc0), pair.pc1.clone()
    flow[x0 > border, 1] = 1.0
    pc1[x1 > border, 1] += 1.0
    has_flow = data.input_masks(pair)[0]
    moving = dataclasses.replace(pair, pc1=pc1)
    label = zeroflow.Label(pair.key, flow, has_flow, QUICK_SETTINGS, 0.0, 0.0, "", NO_GAIN)
    assert labels.common_motion(label, moving).meters < 0.05
    assert labels.suspicion(label, moving) is None
    # If all of it moves, it is suspected; if there are hardly any points, it is not.
    flow[:, 1] = 1.0
    wrong = dataclasses.replace(pair, pc1=pair.pc1 + torch.tensor([0.0, 1.0, 0.0]))
    common = labels.common_motion(label, wrong)
    assert common.share > 0.9 and common.meters == pytest.approx(1, abs=0.05) and common.gain > 2
    text = "% of the points share one motion of 1"
    assert text in labels.suspicion(label, wrong)
    few = has_flow & (has_flow.cumsum(0) < 100)
    assert labels.suspicion(dataclasses.replace(label, has_flow=few), wrong) is None
    nothing = dataclasses.replace(label, has_flow=torch.zeros_like(has_flow))
    assert labels.common_motion(nothing, wrong) == (0, 0, 1)


def test_a_sweep_that_is_not_whole_or_another_one_is_suspected(dense_street, street):
    pair = dense_street
    has_flow = data.input_masks(pair)[0]
    flow = torch.zeros_like(pair.pc0)
    label = zeroflow.Label(pair.key, flow, has_flow, QUICK_SETTINGS, 0.0, 0.0, "", NO_GAIN)
    assert labels.share_without_partner(label, pair) < 0.05
    half = dataclasses.replace(pair, pc1=torch.where(pair.pc1[:, 1:2] > 0, pair.pc1, torch.nan))
    other = street[len(street) - 1]
    other = dataclasses.replace(pair, pc1=other.pc1, is_ground1=other.is_ground1)
    for wrong in (half, other):
        share = labels.share_without_partner(label, wrong)
        assert share > 0.25
        text = f"{100 * share:.0f} % of the points have no partner within 1 m in sweep 1: is"
        assert labels.suspicion(label, wrong).startswith(text)
    nothing = torch.full_like(pair.pc1, torch.nan)
    assert labels.share_without_partner(label, dataclasses.replace(pair, pc1=nothing)) == 1
    none = dataclasses.replace(label, has_flow=torch.zeros_like(has_flow))
    assert labels.share_without_partner(none, pair) == 0


def test_the_pose_of_the_real_pair_is_right_to_2_cm_and_a_wrong_one_is_found(av2_pair):
    """With the true flow as the label of the right pose."""
    has_flow = data.input_masks(av2_pair)[0]
    label = zeroflow.Label(
        av2_pair.key, av2_pair.flow, has_flow, QUICK_SETTINGS, 0.0, 0.0, "", NO_GAIN
    )
    assert labels.common_motion(label, av2_pair).meters < 0.03
    assert labels.suspicion(label, av2_pair) is None
    wrong = _with_wrong_pose(av2_pair, 0.0, 0.115, 0.0)
    shifted = dataclasses.replace(label, flow=label.flow + torch.tensor([0.0, 0.115, 0.0]))
    for estimate in (label, shifted):  # a teacher that finds nothing, and one that finds it
        common = labels.common_motion(estimate, wrong)
        assert common.meters == pytest.approx(0.115, abs=0.02) and common.gain > 1.5
        assert common.share > 0.7
