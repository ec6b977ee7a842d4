"""docs/tour.ipynb: a reader can run it from top to bottom, and it is stored without outputs."""
import json
import math
import re
from pathlib import Path

from conftest import reference

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"


def test_no_output_is_stored():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(cell["metadata"] == {} for cell in cells)


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a kernel of its own, from its own folder, as a notebook is opened."""
    nbformat, nbclient = reference("nbformat"), reference("nbclient")
    reference("ipykernel")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "14.0 [2.0, 4.0, 6.0]" in said and "softmax: True" in said and "wrong_softmax: input 0, element" in said
    first, *_, last = map(float, re.findall(r"step +\d+: loss ([\d.]+)", said))
    assert abs(first - float(re.search(r"ln V = ([\d.]+)", said)[1])) < 0.3 and last < first - 1.5
    assert 1 < math.log(float(re.search(r"perplexity ([\d.]+)", said)[1])) < first - 1.5
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert len(said.split("temperature 0.8")[1]) > 100
