"""The notebooks of docs/notebooks run, and show what they show."""

import re
from pathlib import Path

import pytest


pytest.importorskip("ipykernel")
pytest.importorskip("nbclient")
pytest.importorskip("trl")

import nbformat

from training.evidence.notebooks import METADATA, NOTEBOOKS, run_notebooks, texts_of


SLOW = {"train_a_draft"}
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
NUMBER = re.compile(r"\d+\.\d+")


def kept(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_notebooks_show_what_they_show():
    paths = [path for path in ALL if path.stem not in SLOW]
    for path, notebook in zip(paths, run_notebooks(paths), strict=True):
        assert texts_of(notebook) == texts_of(kept(path)), path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_notebooks_that_train_show_what_they_show(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    [notebook] = run_notebooks([path])
    said, before = ("\n".join(texts_of(own)) for own in (notebook, kept(path)))
    assert NUMBER.sub("", said) == NUMBER.sub("", before)
    # Sums of another processor round otherwise, and steps of training spread that.
    assert [float(number) for number in NUMBER.findall(said)] == pytest.approx(
        [float(number) for number in NUMBER.findall(before)], rel=0.15
    )


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebooks_hold_nothing_of_a_machine(path):
    notebook = kept(path)
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for text in texts_of(notebook):
        assert not re.search(r"(^|\s)/\w+/|0x[0-9a-f]{6}|it/s|\d+%\|", text), text


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebooks_link_to_files_that_exist(path):
    words = "\n".join(cell.source for cell in kept(path).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", words):
        assert "://" in link or (path.parent / link).exists(), link


def test_the_drafter_of_the_notebook_is_that_of_the_page():
    code = [cell.source for cell in kept(NOTEBOOKS / "your_own_drafter.ipynb").cells if cell.cell_type == "code"]
    [echo] = [source for source in code if source.startswith("class Echo:")]
    assert echo in (NOTEBOOKS.parent / "drafters.md").read_text()
