"""What the documentation shows works."""

import re
from pathlib import Path

import pytest
import torch

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.world.rows import evaluation_prompts


DOCS = Path(__file__).parents[1] / "docs"


def snippet(page: str, marker: str) -> str:
    """Return the Python block of a page that holds some text."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return next(block for block in blocks if marker in block)


@pytest.mark.parametrize("do_sample", [False, True])
def test_drafter_of_ones_own(do_sample):
    namespace: dict = {}
    exec(snippet("drafters.md", "class Echo"), namespace)
    target, processor = load_target()
    inputs = encode_prompts(processor, [prompt for prompt in evaluation_prompts(3) if prompt["group"] == "images"][:1])
    outputs = []
    for assistant in (None, namespace["Echo"]()):
        torch.manual_seed(0)
        outputs.append(
            target.generate(
                **inputs,
                do_sample=do_sample,
                max_new_tokens=60,
                assistant_model=assistant,
                return_dict_in_generate=True,
            )
        )
    plain, drafted = outputs
    assert torch.equal(drafted.sequences, plain.sequences)
    assert drafted.speculative_stats.num_accepted > 0


def test_pages_link_to_files_that_exist():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "training/tiny_world/README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
