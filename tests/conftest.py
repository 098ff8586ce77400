"""Data that tests share: a small street made once, and a real Argoverse 2 pair if there is one."""

import os
from pathlib import Path

import pytest
import torch
from plain_student import seeded_model

import data
import fastflow3d
import synthetic

SMALL = synthetic.StreetSettings(azimuths=190, beam_step=4, range_m=25.6, sweeps=3)


@pytest.fixture(scope="session")
def street_folder(tmp_path_factory) -> Path:
    """Two logs of three sweeps, each with about 1,500 points that are not ground.

    Read only: copy it before you break it.
    """
    folder = tmp_path_factory.mktemp("street")
    synthetic.write_logs(folder, 2, SMALL)
    return folder


@pytest.fixture(scope="session")
def street(street_folder) -> data.Argoverse2Pairs:
    return data.open_dataset(street_folder)


@pytest.fixture(scope="session")
def av2_folder() -> Path:
    """AV2_SAMPLE: a real split with two sweeps of log 7fab2350-7eaf-3b7e-a39d-6937a4c1bede."""
    if "AV2_SAMPLE" not in os.environ:
        pytest.skip(
            "needs real Argoverse 2 sweeps: set AV2_SAMPLE to the split that holds log 7fab2350"
        )
    return Path(os.environ["AV2_SAMPLE"])


@pytest.fixture(scope="session")
def av2_pair(av2_folder) -> data.SweepPair:
    return data.open_dataset(av2_folder)[0]


@pytest.fixture(scope="session")
def student_file(tmp_path_factory, street):
    """A checkpoint of random weights whose flow of the small street's first pair is decimetres."""
    pair = street[0]
    model = seeded_model(
        fastflow3d.MODELS["narrow"], pair.pc0[~pair.is_ground0], pair.pc1[~pair.is_ground1]
    )
    file = tmp_path_factory.mktemp("student") / "student.pt"
    torch.save(fastflow3d.checkpoint_of(model), file)
    return file


def a_pair(points, flow=None, category=None, is_dynamic=None, is_valid=None) -> data.SweepPair:
    """A pair of given points (N, 3) of sweep 0, none of them ground; sweep 1 is the same points."""
    n, points = len(points), torch.as_tensor(points, dtype=torch.float32)
    no = torch.zeros(n, dtype=torch.bool)
    return data.SweepPair(
        pc0=points,
        pc1=points,
        is_ground0=no,
        is_ground1=no,
        ego1_SE3_ego0=torch.eye(4, dtype=torch.float64),
        log_id="log",
        timestamp0_ns=0,
        timestamp1_ns=1,
        flow=torch.zeros(n, 3) if flow is None else torch.as_tensor(flow, dtype=torch.float32),
        category=torch.zeros(n, dtype=torch.uint8)
        if category is None
        else torch.tensor(category, dtype=torch.uint8),
        is_dynamic=no if is_dynamic is None else torch.tensor(is_dynamic),
        is_valid=~no if is_valid is None else torch.tensor(is_valid),
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the street, and a teacher of it that takes milliseconds."""
    from test_train import QUICK_TEACHER

    import demo

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "STREET_TEACHER", QUICK_TEACHER)
    monkeypatch.setattr(demo, "NSFP_ITERATIONS", 2)
    return tmp_path / "cache" / "zeroflow"
