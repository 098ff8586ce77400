"""Scenes in HDF5, written here from pairs that are known."""

import builtins
import dataclasses

import numpy as np
import pytest
import torch

import data
import hdf5

h5py = pytest.importorskip("h5py", reason="needs the optional library h5py")

CITY = data.rigid(np.eye(3), np.array([4012.3, -1502.7, 20.1]))  # world from the first ego frame
AV2_STAMPS = (315966265259836000, 315966265359836000)


def write_scene(file, pair: data.SweepPair, stamps, shift=(0.0, 0.0, 0.0), **changes) -> None:
    """Both sweeps of a pair, each in its own frame, less a shift.

    changes: name of a data set of the first sweep -> what to write instead; None leaves it out.
    """
    ego1_SE3_ego0 = pair.ego1_SE3_ego0.numpy()
    points1 = data.transform(ego1_SE3_ego0, pair.pc1.double().numpy())
    poses = (CITY, CITY @ data.inverse(ego1_SE3_ego0))
    clouds = (pair.pc0.double().numpy(), points1)
    with h5py.File(file, "w") as scene:
        for i, (stamp, points, pose) in enumerate(zip(stamps, clouds, poses, strict=True)):
            sweep = scene.create_group(str(stamp))
            values = {
                "lidar": np.pad((points - shift).astype(np.float32), ((0, 0), (0, 1))),
                "ground_mask": (pair.is_ground1 if i else pair.is_ground0).numpy(),
                "pose": pose.astype(np.float32),
            }
            if i == 0 and pair.flow is not None:
                values["flow"] = data.total_flow(pair.flow, pair).numpy()
                values["flow_is_valid"] = pair.is_valid.numpy()
                values["flow_category_indices"] = pair.category.numpy()
            values |= changes if i == 0 else {}
            for name, array in values.items():
                if array is not None:
                    sweep[name] = array


def assert_same_pair(found: data.SweepPair, expected: data.SweepPair) -> None:
    """Poses are float32: at 4 km from the world's origin they are off by half a millimeter."""
    for name, most in (("pc0", 1e-5), ("pc1", 2e-3), ("flow", 2e-3), ("ego1_SE3_ego0", 1e-3)):
        one, two = getattr(found, name).nan_to_num(), getattr(expected, name).nan_to_num()
        if name == "flow":  # where the flow is not known, it is 0 here
            one, two = one[expected.is_valid], two[expected.is_valid]
        assert one.shape == two.shape and (one - two).abs().max() < most, name
    for name in ("is_ground0", "is_ground1", "category", "is_valid"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    # A motion at the border of 5 cm may fall to either side.
    assert (found.is_dynamic != expected.is_dynamic).float().mean() < 1e-3


@pytest.fixture
def pair(street) -> data.SweepPair:
    assert (street[0].pc0.nan_to_num() != 0).any(dim=1).all()
    return street[0]


def test_argoverse_2_comes_back_in_the_ego_frame(tmp_path, pair):
    """Its points are written in the frame of the upper LiDAR, its poses are the ego's."""
    write_scene(tmp_path / "drive.h5", pair, AV2_STAMPS, shift=hdf5.AV2_LIDAR_M)
    (tmp_path / "index_total.pkl").write_bytes(b"code that is never run")
    dataset = data.open_dataset(tmp_path)
    assert dataset.pair_keys == [data.PairKey("drive", *AV2_STAMPS)]
    assert dataset.notes == [
        f"{tmp_path}: time stamps are assumed to be nanoseconds, because of their size"
    ]
    assert_same_pair(dataset[0], pair)
    lidar = torch.from_numpy(hdf5.AV2_LIDAR_M)
    ego0_SE3_ego1 = torch.linalg.inv(pair.ego1_SE3_ego0)
    expected = ego0_SE3_ego1[:3, :3] @ lidar + ego0_SE3_ego1[:3, 3]
    torch.testing.assert_close(dataset[0].lidar1, expected, atol=1e-3, rtol=0)
    assert data.open_dataset(tmp_path, true_flow=False)[0].flow is None


@pytest.mark.parametrize(
    ("first", "unit", "unit_ns"),
    [
        (1532402927647951, "microseconds", 1000),
        (1532402927647951123, "nanoseconds", 1),
        (1532402927647, "milliseconds", 10**6),
    ],
)
def test_of_other_data_the_unit_of_time_is_told_by_its_size(tmp_path, pair, first, unit, unit_ns):
    stamps = (first, first + 10**8 // unit_ns)
    write_scene(tmp_path / "scene.h5", pair, stamps)
    dataset = data.open_dataset(tmp_path)
    assert dataset.pair_keys == [data.PairKey("scene", *(stamp * unit_ns for stamp in stamps))]
    assert f"assumed to be {unit}" in dataset.notes[0]
    assert_same_pair(dataset[0], pair)
    assert dataset[0].lidar1 is None


def test_without_a_truth_or_a_ground_mask_a_scene_can_be_read(tmp_path, pair):
    bare = dataclasses.replace(pair, flow=None)
    write_scene(tmp_path / "a.h5", bare, AV2_STAMPS, ground_mask=None)
    found = data.open_dataset(tmp_path)[0]
    assert found.flow is None and 0.05 < found.is_ground0.float().mean() < 0.9
    assert not data.open_dataset(tmp_path, ground="none")[0].is_ground1.any()
    with pytest.raises(data.DataError, match="ground raster needs a map"):
        data.open_dataset(tmp_path, ground="raster")
    with pytest.raises(data.DataError, match="rate_hz 5.0 is not for HDF5 folders"):
        data.open_dataset(tmp_path, rate_hz=5.0)


def test_a_file_that_is_not_a_scene_costs_only_itself(tmp_path, pair):
    write_scene(tmp_path / "a.h5", pair, AV2_STAMPS)
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:3000])
    with h5py.File(tmp_path / "c.h5", "w") as scene:
        scene["other"] = np.zeros(3)
    dataset = data.open_dataset(tmp_path)
    assert len(dataset) == 1 and len(dataset.skipped) == 2
    assert "b.h5" in dataset.skipped[0] and "c.h5: no group is named" in dataset.skipped[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lidar": None}, "lidar"),
        ({"lidar": np.zeros((5, 2), np.float32)}, r"lidar has shape \(5, 2\)"),
        ({"lidar": np.full((50, 3), np.nan, np.float32)}, "no points"),
        ({"pose": np.ones((4, 4), np.float32)}, "pose is not a rigid motion"),
        ({"pose": np.eye(4, dtype=np.float32)}, "wrong poses of sweeps"),
        ({"ground_mask": np.zeros(3, bool)}, r"ground_mask has shape \(3,\)"),
        ({"flow": np.zeros((3, 3), np.float32)}, "have shapes"),
        ({"flow_is_valid": None}, "flow_is_valid"),
        ({"flow_category_indices": "99"}, "category 99 is unknown"),
        ({"lidar": "text"}, "scalar"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_name_of_the_file(tmp_path, pair, changes, message):
    if changes.get("flow_category_indices") == "99":
        changes = {"flow_category_indices": np.full(len(pair.pc0), 99, np.uint8)}
    write_scene(tmp_path / "a.h5", pair, AV2_STAMPS, **changes)
    with pytest.raises(data.DataError, match=f"a.h5.*{message}"):
        data.open_dataset(tmp_path)[0]


def test_without_the_library_the_message_says_what_to_install(tmp_path, pair, monkeypatch):
    write_scene(tmp_path / "a.h5", pair, AV2_STAMPS)
    real = builtins.__import__

    def no_h5py(name, *rest, **more):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_h5py)
    with pytest.raises(data.DataError, match="needs h5py: pip install h5py"):
        data.open_dataset(tmp_path)
