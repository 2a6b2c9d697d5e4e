"""Generate the examples in docs/ with the current code: a report and an executed notebook.

    python scripts/make_docs_examples.py report      # docs/report-example.html
    python scripts/make_docs_examples.py notebook    # docs/tour.ipynb; needs nbclient and ipykernel

The report comes from the commands in docs/report.md, the notebook from `CELLS`. Both run in a temporary folder.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
CELLS = (
    "# A tour\n\n"
    "From a teacher to a measured INT8 file, on the built-in images: ten kinds of object in four styles. Three styles "
    "have labels; of the fourth, 200 sketches train without labels. The page *Python* lists every function.",
    'import edgekd\n\nrun = edgekd.train(unlabelled="toy:sketch", out="runs/tour")\nrun',
    "An INT8 file for ONNX Runtime. It is calibrated on training images and compared with the torch student.",
    'artifact = edgekd.export(run.folder, precision="int8")[-1]\nartifact',
    "The exported file at work; it needs no torch.",
    "from edgekd.data import toy\n\n"
    'model = edgekd.load(artifact.folder)\npicture = toy.draw(toy.CLASSES[0], "sketch", 7)\npicture',
    "model.predict(picture)[0]",
    "Speed and accuracy of that file, in domain and on other sketches than those that trained.",
    "report = edgekd.benchmark(run.folder, quick=True)\nreport",
)
"""Cells of the notebook; see `is_code`."""


def is_code(cell: str) -> bool:
    """Return whether a cell is code."""
    try:
        compile(cell, "cell", "exec")
    except SyntaxError:
        return False
    return not cell.startswith("#")


def make_report() -> None:
    """Run the commands of docs/report.md and store the page."""
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    block = re.search(r"report-example\.html\) is the.*?```console\n(.*?)```", text, re.DOTALL)
    assert block is not None
    with tempfile.TemporaryDirectory() as folder:
        for line in block[1].splitlines():
            words = shlex.split(line.removeprefix("$ edgekd "))
            print(line, flush=True)
            done = subprocess.run([sys.executable, "-m", "edgekd.cli", *words], cwd=folder)
            if done.returncode not in (0, 1):  # 1: a gate failed; the report shows it
                raise SystemExit(done.returncode)
        (page,) = Path(folder).glob("runs/*/benchmark/report.html")
        shutil.copyfile(page, DOCS / "report-example.html")


def make_notebook() -> None:
    """Execute `CELLS` and store the notebook, without output printed during execution."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    for number, cell in enumerate(CELLS):
        kind = nbformat.v4.new_code_cell if is_code(cell) else nbformat.v4.new_markdown_cell
        notebook.cells.append(kind(cell, id=f"cell-{number}"))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.output_type == "execute_result"]
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, DOCS / "tour.ipynb")


if __name__ == "__main__":
    {"report": make_report, "notebook": make_notebook}[sys.argv[1]]()
