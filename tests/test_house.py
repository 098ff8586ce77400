"""The house rules: each leaf works alone, and the README keeps its promises about names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALONE = {
    "data.py": "import data, sys; assert data.open_dataset(sys.argv[1])[0].flow.any()",
    "nsfp.py": (
        "import dataclasses, nsfp, torch; pc = torch.rand(50, 3); "
        "quick = dataclasses.replace(nsfp.TEACHERS['fast'], iterations=2); "
        "assert nsfp.estimate_flow(pc, pc + 0.1, quick).shape == (50, 3)"
    ),
    "metrics.py": (
        "import metrics, torch; yes = torch.ones(5, dtype=torch.bool); "
        "scores = metrics.Scores(['NONE']); points = torch.rand(5, 3); "
        "scores.add(points * 0 + 1, points * 0, points, yes * 0, ~yes, yes, ~yes, yes); "
        "assert abs(scores.numbers()['epe'] - 3**0.5) < 1e-6"
    ),
    "fastflow3d.py": (
        "import fastflow3d, torch; "
        "model = fastflow3d.FastFlow3D(fastflow3d.MODELS['narrow']).eval(); "
        "assert model([torch.rand(50, 3)], [torch.rand(50, 3)])[0][0].shape == (50, 3)"
    ),
}


@pytest.mark.parametrize("module", ALONE)
def test_a_leaf_copied_alone_into_an_empty_folder_works(module, tmp_path, street_folder):
    shutil.copy(ROOT / module, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE[module], str(street_folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
