"""The committed notebooks: each is a complete, fresh run without a line on stderr.

`pytest --nbval` runs them.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_eight_notebooks_and_their_solutions_and_the_readme_links_them_in_order():
    names = [notebook.name for notebook in NOTEBOOKS]
    assert [name[:3] for name in names] == [*(f"{i:02}_" for i in range(1, 9)), "sol"]
    links = re.findall(r"\(notebooks/(\w+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert links == names


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_committed_notebook_is_a_fresh_run_without_errors_or_warnings(notebook):
    content = json.loads(notebook.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert all("".join(cell["source"]).strip() for cell in content["cells"]), "an empty cell"
    cells = code_cells(notebook)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not run once, in order"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "without its figures"
    assert notebook.stat().st_size < 1_000_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_every_link_between_notebooks_leads_somewhere(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    files = [link.split("#")[0] for link in links]
    assert not [file for file in files if not (notebook.parent / file).exists()]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_cell_whose_output_is_not_compared_still_ran_and_asserts_nothing(notebook):
    """A claim belongs into a cell of its own, where nothing is ignored."""
    for cell in code_cells(notebook):
        if "nbval-ignore-output" in cell["metadata"].get("tags", []):
            assert cell["outputs"] and "assert" not in "".join(cell["source"])
