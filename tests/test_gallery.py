"""The gallery is what the shipped pair says of pictures that may be shipped."""

import json

import pytest


pytest.importorskip("trl")

from training.evidence.gallery import DOCS, measure, page, prompts


def test_the_gallery_is_what_the_shipped_pair_says():
    results = json.loads((DOCS / "gallery.json").read_text())
    assert measure() == results
    assert page(results) == (DOCS / "gallery.md").read_text()


def test_the_pictures_of_the_gallery_are_small():
    sizes = [(DOCS / "gallery" / f"{name}.png").stat().st_size for name, _ in prompts()]
    assert len(sizes) == len(list((DOCS / "gallery").iterdir()))
    assert max(sizes) < 20_000
