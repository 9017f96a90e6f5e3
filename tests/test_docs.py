"""What the documentation shows works, and what it quotes is said."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import training_args
from transformers.models.llava import modeling_llava

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDDraftModel, TreeConfig
from transformers_msd.compat import CACHE


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("training/*/README.md")]
# A block of Python, and what it prints where a block of text follows.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
# Blocks that need the Hub, or minutes to compile.
NOT_RUN = re.compile(r"\"(org|you)/|StaticRuntime")


def snippet(page: str, marker: str) -> str:
    """Return the Python block of a page that holds some text."""
    return next(block for block, _ in BLOCK.findall((DOCS / page).read_text()) if marker in block)


def run_blocks(page: str, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Run the Python of a page, one block after the other, and compare what is printed."""
    for block, printed in BLOCK.findall((ROOT / page).read_text()):
        if not NOT_RUN.search(block):
            capsys.readouterr()
            exec(compile(block, page, "exec"), namespace)
            assert not printed or capsys.readouterr().out == printed


@pytest.mark.parametrize("page", ["README.md", "docs/inputs.md", "training/tiny_world/README.md"])
def test_page_runs_as_it_stands(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run_blocks(page, {}, capsys)


def test_pages_run_with_the_models_of_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"caption_ids": [5, 6, 7]}
    for page in ("docs/start.md", "docs/index.md", "docs/generate.md", "docs/drafters.md"):
        run_blocks(page, namespace, capsys)


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


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_to_what_exists(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        if "://" not in link:
            linked = page.parent / link if link else page
            assert linked.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {link}#{anchor}"


def said_by(node: ast.AST) -> str:
    """Return the text of a string, with … for what is only known when it is said."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(said_by(part) for part in node.values) if isinstance(node, ast.JoinedStr) else "…"


def quotes() -> list[str]:
    """Return what the page of errors quotes."""
    return re.findall(r"^> (.+)$", (DOCS / "errors.md").read_text(), re.MULTILINE)


def test_errors_are_quoted_as_they_are_said() -> None:
    theirs = [Path(module.__file__) for module in (modeling_llava, training_args)]
    sources = [*(ROOT / "transformers_msd").rglob("*.py"), *theirs]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source.read_text()))]
    said = {re.sub("…+", "…", said_by(node)) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)}
    assert [quote for quote in quotes() if not any(quote in one for one in said)] == []


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Target, draft, and a prompt with a picture."""
    target, processor = load_target()
    inputs = encode_prompts(processor, [prompt for prompt in evaluation_prompts(3) if prompt["group"] == "image"][:1])
    return target, MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32), dict(inputs)


@pytest.mark.parametrize(
    ("begins", "arguments"),
    {
        "Drafting serves greedy": {"num_beams": 2},
        "A call drafts in one way": {"prompt_lookup_num_tokens": 3},
        "`…` is for Transformers": {"num_assistant_tokens": 4},
        "Drafting needs a dynamic": {"cache_implementation": "offloaded"},
        "Drafting needs the cache": {"use_cache": False},
        "Drafting can't return": {"output_attentions": True, "return_dict_in_generate": True},
        "Drafting can't keep": {"synced_gpus": True},
        "Classifier-free": {"guidance_scale": 2.0},
        "`assistant_model` must be a model, or": {"assistant_model": "a/folder"},
    }.items(),
)
def test_refusals_come_as_the_page_quotes_them(pair: Any, begins: str, arguments: dict[str, Any]) -> None:
    target, draft, inputs = pair
    check_quoted(lambda: target.generate(**inputs, **{"assistant_model": draft} | arguments), begins)


def test_mistakes_in_turns_come_as_the_page_quotes_them(pair: Any) -> None:
    target, draft, inputs = pair
    call = {"assistant_model": draft, "max_new_tokens": 4, "return_dict_in_generate": True}
    first = target.generate(**inputs, **call)
    ids = first.sequences
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: first[CACHE]}
    check_quoted(lambda: target.generate(**turn, pixel_values=inputs["pixel_values"], **call), "Image features")
    short = {name: turn[name][:, -1:] for name in ("input_ids", "attention_mask")}
    check_quoted(lambda: target.generate(**short, **{CACHE: first[CACHE]}, **call), "The prompt must go on")
    twice = {name: turn[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    check_quoted(lambda: target.generate(**twice, **{CACHE: first[CACHE]}, **call), "The cache must hold")


def test_wrong_folders_and_trees_come_as_the_page_quotes_them() -> None:
    check_quoted(lambda: TreeConfig(num_nodes=1), "`TreeConfig.…` must be an integer")
    check_quoted(lambda: MSDDraftModel.from_pretrained("./nowhere"), "`…` must be a path")
    check_quoted(lambda: MSDDraftModel.from_pretrained(ROOT / "docs"), "The folder of a draft")


def check_quoted(call: Any, begins: str) -> None:
    """Expect an error of a call that the page quotes, by the words it begins with."""
    (quote,) = [quote for quote in quotes() if quote.startswith(begins)]
    with pytest.raises(ValueError, match=".+".join(map(re.escape, quote.split("…")))):
        call()
