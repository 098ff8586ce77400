"""Data that several tests share: a small street made once, and a real Argoverse 2 pair where one is at hand."""

import os
from pathlib import Path

import pytest

import data
import synthetic

SMALL = synthetic.StreetSettings(azimuths=190, beam_step=4, range_m=25.6, sweeps=3)


@pytest.fixture(scope="session")
def street_folder(tmp_path_factory) -> Path:
    """Two logs of three sweeps, about 1,500 points each that are not ground. Read only: copy before you break it."""
    folder = tmp_path_factory.mktemp("street")
    synthetic.write_logs(folder, 2, SMALL)
    return folder


@pytest.fixture(scope="session")
def street(street_folder) -> data.Argoverse2Pairs:
    return data.open_dataset(street_folder)


@pytest.fixture(scope="session")
def av2_folder() -> Path:
    """A real split that holds two sweeps of log 7fab2350-7eaf-3b7e-a39d-6937a4c1bede, named by AV2_SAMPLE."""
    if "AV2_SAMPLE" not in os.environ:
        pytest.skip("needs real Argoverse 2 sweeps: set AV2_SAMPLE to the split that holds log 7fab2350")
    return Path(os.environ["AV2_SAMPLE"])


@pytest.fixture(scope="session")
def av2_pair(av2_folder) -> data.SweepPair:
    return data.open_dataset(av2_folder)[0]
