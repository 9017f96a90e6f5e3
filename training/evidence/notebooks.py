"""
Run the notebooks again and keep what they say: `python -m training.evidence.notebooks [NAME ...]`.

Needs nbclient and ipykernel, which the extra `dev` brings. They run on one thread, offline, the first of
them where Jupyter would run it, in its own folder.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook


ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run_notebooks(paths: Sequence[Path]) -> list[NotebookNode]:
    """
    Run notebooks from top to bottom, one after another in a kernel that is emptied before each, for the imports take
    longer than what they show.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    cells = [cell for notebook in notebooks for cell in (new_code_cell("%reset -f"), *notebook.cells)]
    whole = new_notebook(cells=cells, metadata=METADATA)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    with tempfile.TemporaryDirectory() as home:  # what `transformers-msd tune` measured here must not size the trees
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of this clone
        settings = {"OMP_NUM_THREADS": "1", "HF_HOME": home, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        client = NotebookClient(whole, timeout=1800, record_timing=False, resources=resources)
        client.execute(env=os.environ | settings)
    for notebook in notebooks:
        notebook.metadata = nbformat.from_dict(METADATA)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, 1):
            cell.execution_count = number
            cell.outputs = lasting(cell.outputs)
    return notebooks


def lasting(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """
    Keep of what a cell shows what is the same in every run: no warnings, which tell of the environment, what it prints
    in one piece, and one format of each picture.
    """
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "image/png" in output.data:
            output.data.pop("image/jpeg", None)
        kept.append(output)
    return kept


def texts_of(notebook: NotebookNode) -> list[str]:
    """Return all that the cells of a notebook say, without their pictures."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                texts.append(output.text)
            else:
                texts += [text for kind, text in sorted(output.data.items()) if kind.startswith("text/")]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
    paths = [NOTEBOOKS / f"{name}.ipynb" for name in parser.parse_args().names]
    for path, notebook in zip(paths, run_notebooks(paths), strict=True):
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
