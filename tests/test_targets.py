"""What docs/targets.md says of architectures is so on this Transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from training.evidence.targets import row
from training.evidence.targets_page import kinds_of, page
from training.evidence.tiny import model_types


DOCS = Path(__file__).parents[1] / "docs"
RESULTS = json.loads((DOCS / "targets.json").read_text())
# Of each kind some: served and refused for different reasons, with and without pictures, that take them in other ways.
NAMES = (
    *("gpt2", "opt", "llava", "llava_next", "qwen2_vl", "paligemma", "idefics3", "blip-2", "phi4_multimodal"),
    *("gemma3", "mllama", "bloom", "qwen3_5", "git", "janus", "pix2struct"),
)


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_served_or_refused_as_the_page_says(name: str) -> None:
    said = RESULTS.get(transformers.__version__)
    if said is None:
        pytest.skip(f"the page was not written on Transformers {transformers.__version__}")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert kinds_of(row(name)) == kinds_of(said[name])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("version", RESULTS)
def test_no_architecture_has_a_fault(version: str) -> None:
    for name, found in RESULTS[version].items():
        assert {*kinds_of(found).values()} <= {"equal", "refused", "not tried"}, name


def test_the_page_is_written_from_the_results() -> None:
    assert (DOCS / "targets.md").read_text() == "\n".join(page(RESULTS)) + "\n"
    assert len(model_types()) > 200
