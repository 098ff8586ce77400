"""The student in weights/: its file is the one of its card, and reaches the errors stated there."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

import commands
import data
import fastflow3d
import synthetic
import zeroflow

CARD = Path(commands.OUR_WEIGHTS).with_name("README.md").read_text()
GRID = fastflow3d.MODELS["small"].half_extent_m


@pytest.fixture(scope="module")
def student() -> zeroflow.Estimator:
    return zeroflow.from_student(
        fastflow3d.load_checkpoint(commands.OUR_WEIGHTS).prepare_inference()
    )


def test_the_file_is_the_one_that_its_card_names_and_it_is_small():
    content = commands.OUR_WEIGHTS.read_bytes()
    assert f"`{hashlib.sha256(content).hexdigest()}`" in CARD and len(content) < 8e6
    model = fastflow3d.load_checkpoint(commands.OUR_WEIGHTS)
    assert model.settings == fastflow3d.MODELS["small"] and not model.is_foreign


def test_on_the_real_pair_it_has_the_errors_that_its_card_states(student, av2_pair):
    numbers = zeroflow.evaluate([av2_pair], student, GRID).numbers
    (row,) = (line for line in CARD.splitlines() if line.startswith("| the real Argoverse 2 pair"))
    stated = [float(cell.strip(" *")) for cell in row.split("|")[3:7]]
    names = ["grid_three_way", "grid_three_way_fd", "grid_three_way_fs", "grid_three_way_bs"]
    assert [numbers[name] for name in names] == pytest.approx(stated, abs=0.001)


def test_on_streets_of_another_seed_it_has_less_than_half_of_the_error_of_no_motion(
    student, tmp_path
):
    """Three pairs at full density, whose ratio was .39."""
    settings = dataclasses.replace(synthetic.PRESETS["world"], seed=20, sweeps=2)
    synthetic.write_logs(tmp_path, 3, settings)
    pairs = data.open_dataset(tmp_path)
    error, still = (
        zeroflow.evaluate(pairs, estimator, GRID).numbers["grid_three_way"]
        for estimator in (student, zeroflow.from_baseline("no-motion", GRID))
    )
    assert 0.05 < error < 0.5 * still
