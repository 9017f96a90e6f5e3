"""A trace says what happened, and changes nothing: the tokens of the call, its rounds, its probabilities, its page."""

import ast
import functools
import html
import json
import threading
import tomllib
from contextvars import copy_context
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from other_devices import make_block, make_eagle3, make_msd
from PIL import Image, ImageChops
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, LogitsProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessor
from zoo import PAD_ID, make_draft_model, make_inputs, make_target

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import (
    EnsembleDrafter,
    NgramDrafter,
    StaticRuntime,
    TreeConfig,
    VLMDrafter,
    speculative_trace,
)
from transformers_msd.cli import main
from transformers_msd.tracing.call import TracedCall
from transformers_msd.tracing.page import render
from transformers_msd.tracing.pictures import seen_pictures
from transformers_msd.tracing.pieces import Pieces


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
CHECKPOINTS = Path(__file__).parents[1] / "training/tiny_world/checkpoints"
STATIC = {"cache_implementation": "static", "disable_compile": True}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20}
ENDS = {"eos_token_id": list(range(3, 9)), "pad_token_id": PAD_ID}


def make_drafter(name: str) -> Any:
    target = make_target("llava")
    if name in ("msd", "rests", "runtime"):
        draft = make_msd(target, "cpu")
        draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3) if name == "rests" else TREE
        return StaticRuntime(draft) if name == "runtime" else draft
    if name == "eagle3":
        return make_eagle3(target, "cpu")
    if name == "block":
        return make_block(target, "cpu")
    if name == "vlm":
        return VLMDrafter(make_draft_model("llava"), tree_config=TREE)
    if name == "ensemble":
        return EnsembleDrafter(make_draft_model("llava"), tree_config=TREE)
    return NgramDrafter()


def generate(num_rows: int = 1, seed: int = 0, **call: Any) -> Any:
    target, inputs = make_target("llava"), make_inputs("llava", (1, 0, 2)[:num_rows])
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True, "suppress_tokens": [90, 91]}
    return target.generate(**inputs, **settings | call)


@functools.cache
def plain_of(num_rows: int, settings: str) -> Any:
    return generate(num_rows, **ast.literal_eval(settings))


def emitted(call: TracedCall, row: int) -> list[int]:
    return [token_id for each in call.rounds if each.rows[row] for token_id in each.rows[row].token_ids]


DRAFTERS = ("msd", "eagle3", "block", "vlm", "ensemble", "ngrams", "runtime")
# How a call of several sequences ends, and processors that read ids, are the same for all drafters.
OTHERS = ({}, SAMPLED, ENDS, ENDS | SAMPLED, {"repetition_penalty": 1.3} | SAMPLED)
CASES = [(name, num_rows, settings) for name in DRAFTERS for num_rows in (1, 3) for settings in OTHERS[:2]]
CASES += [("msd", 3, settings) for settings in OTHERS[2:]]


@pytest.mark.parametrize(("name", "num_rows", "settings"), CASES)
def test_tokens_are_plains_and_the_trace_holds_them(name: str, num_rows: int, settings: dict[str, Any]) -> None:
    settings = settings | (STATIC if name == "runtime" else {})
    plain = plain_of(num_rows, repr(settings))
    with speculative_trace() as trace:
        drafted = generate(num_rows, assistant_model=make_drafter(name), **settings)
    assert torch.equal(drafted.sequences, plain.sequences)
    (call,) = trace.calls
    stats = drafted.speculative_stats
    length = make_inputs("llava", (1, 0, 2)[:num_rows])["input_ids"].shape[1]
    for row, tokens in enumerate(plain.sequences[:, length:].tolist()):
        ends = [step + 1 for step, token_id in enumerate(tokens) if token_id in settings.get("eos_token_id", [])]
        assert emitted(call, row) == tokens[: min([len(tokens), *ends])]
        rounds = [each.rows[row] for each in call.rounds[1:] if each.rows[row]]
        assert [len(own.token_ids) for own in rounds] == [n for n in stats.acceptance_lengths[:, row].tolist() if n]
        for own in rounds:
            tree = own.tree
            assert [tree.token_ids[node] for node in own.accepted] == own.token_ids[: len(own.accepted)]
            assert [tree.parents[node] for node in own.accepted] == [0, *own.accepted][: len(own.accepted)]
            assert len(own.token_ids) - len(own.accepted) in (0, 1)
            assert all(parent < node for node, parent in enumerate(tree.parents))
    assert sum(each.kind == "plain" for each in call.rounds) >= stats.num_plain_steps
    kinds = {each.kind for each in call.rounds}
    assert call.rounds[0].kind == "prefill"
    assert name == "ngrams" or "drafted" in kinds
    assert json.loads(json.dumps(trace.to_dict())) == trace.to_dict()


def test_rows_that_only_give_tokens_are_noted_until_they_end() -> None:
    plain = generate(3, return_dict_in_generate=False, **ENDS)
    with speculative_trace() as trace:
        drafted = generate(3, return_dict_in_generate=False, assistant_model=make_drafter("msd"), **ENDS)
    assert torch.equal(drafted, plain)
    length = len(make_inputs("llava", (1, 0, 2))["input_ids"][0])
    for row, tokens in enumerate(plain[:, length:].tolist()):
        ends = [step + 1 for step, token_id in enumerate(tokens) if token_id in ENDS["eos_token_id"]]
        assert emitted(trace.calls[0], row) == tokens[: min([len(tokens), *ends])]


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"repetition_penalty": 1.3}, {"repetition_penalty": 1.3} | SAMPLED])
def test_probabilities_are_those_of_target_and_draft(settings: dict[str, Any]) -> None:
    plain = generate(output_scores=True, **settings)
    with speculative_trace() as trace:
        generate(assistant_model=make_drafter("vlm"), **settings)
    (call,) = trace.calls
    tokens = emitted(call, 0)
    said = [probability for each in call.rounds for probability in each.rows[0].probabilities]
    expected = [scores[0].softmax(-1)[token_id] for scores, token_id in zip(plain.scores, tokens, strict=True)]
    torch.testing.assert_close(torch.tensor(said), torch.stack(expected), rtol=1e-3, atol=1e-5)
    inputs, draft = make_inputs("llava"), make_draft_model("llava")
    for each in call.rounds[1:]:
        own = each.rows[0]
        tree, step = own.tree, own.start
        children = [node for node, parent in enumerate(tree.parents) if parent == 0]
        of_target = plain.scores[step][0].softmax(-1)[[tree.token_ids[node] for node in children]]
        found = torch.tensor([tree.target[node] for node in children])
        torch.testing.assert_close(found, of_target, rtol=1e-3, atol=1e-5)
        if settings.get("do_sample"):  # ranked with noise: there are no probabilities to tell
            assert set(tree.draft) == {None}
            continue
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:step]])], dim=1)
        with torch.no_grad():
            logits = draft(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        drafted = [node for node in children if not tree.is_ngram[node]]
        expected = logits.softmax(-1)[[tree.token_ids[node] for node in drafted]]
        torch.testing.assert_close(
            torch.tensor([tree.draft[node] for node in drafted]), expected, rtol=1e-3, atol=1e-5
        )


def test_what_stood_in_the_text_is_told_from_what_was_drafted() -> None:
    with speculative_trace() as trace:
        generate(assistant_model=make_drafter("msd"), max_new_tokens=40)
        generate(assistant_model=NgramDrafter(), max_new_tokens=40)
    sources = [{each for own in call.rounds for each in own.rows[0].tree.is_ngram[1:]} for call in trace.calls]
    assert sources == [{False, True}, {True}]


def test_rounds_in_which_drafting_rests_say_so() -> None:
    with speculative_trace() as trace:
        drafted = generate(assistant_model=make_drafter("rests"), max_new_tokens=40)
    assert torch.equal(drafted.sequences, generate(max_new_tokens=40).sequences)
    rests = [each for each in trace.calls[0].rounds if each.is_resting]
    assert drafted.speculative_stats.num_plain_steps == sum(each.kind == "plain" for each in rests) > 0
    assert {each.kind for each in rests} <= {"plain", "drafted"}  # n-grams are tried meanwhile


def test_times_add_up_to_those_of_the_call() -> None:
    with speculative_trace() as trace:
        generate(assistant_model=make_drafter("msd"))
    for each in trace.calls[0].rounds:
        assert min(each.seconds.values()) >= 0
        assert each.seconds["verify"] > 0
        assert (each.seconds["draft"] > 0) == (each.kind != "prefill")


def test_only_calls_inside_are_noted_each_thread_for_itself() -> None:
    drafter, found = make_drafter("msd"), {}

    def run(seed: int) -> None:
        with speculative_trace() as trace:
            generate(seed=seed, assistant_model=drafter, **SAMPLED)
        found[seed] = trace.calls

    with speculative_trace() as outer:
        threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
        threads.append(threading.Thread(target=lambda: generate(assistant_model=drafter)))
        context = copy_context()
        threads.append(
            threading.Thread(target=lambda: context.run(generate, assistant_model=drafter, max_new_tokens=5))
        )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    generate(assistant_model=drafter)
    assert [len(calls) for calls in found.values()] == [1, 1]
    assert [len(emitted(call, 0)) for call in outer.calls] == [5]


def test_a_call_that_fails_leaves_the_rounds_it_came_to() -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 16:
                raise KeyError("enough")
            return scores

    with speculative_trace() as trace, pytest.raises(KeyError):
        generate(assistant_model=make_drafter("msd"), logits_processor=[Fails()])
    tokens = emitted(trace.calls[0], 0)
    assert tokens
    assert generate().sequences[0, 12 : 12 + len(tokens)].tolist() == tokens


def test_a_trace_keeps_no_graph_alive() -> None:
    target, inputs = make_target("llava"), dict(make_inputs("llava"))
    pixels = inputs.pop("pixel_values").clone().requires_grad_() * 1
    with speculative_trace() as trace:
        target.generate(**inputs, pixel_values=pixels, max_new_tokens=2, assistant_model=NgramDrafter())
    kept = trace.calls[0].pixels["pixel_values"]
    assert torch.equal(kept, pixels)
    assert (kept.grad_fn, kept.device.type) == (None, "cpu")


def test_an_empty_trace_says_what_to_do() -> None:
    with speculative_trace() as trace:
        generate()
    assert trace._repr_html_() == "SpeculativeTrace(0 calls, 0 rounds)"
    with pytest.raises(ValueError, match="in the same thread"):
        trace.save("nowhere.html")


class Other:
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processor": "llava-hf/llava-1.5-7b-hf"}, "`processor` must be a tokenizer, .* got str"),
        ({"processor": Other()}, "got Other"),
        ({"images": ["photo.jpg"]}, "`images` must be a list of PIL's pictures, got str"),
        ({"images": "a"}, "got str"),
        ({"images": [Image.new("RGB", (2, 2)), torch.zeros(3, 2, 2)]}, "got Tensor"),
    ],
)
def test_what_can_not_be_shown_is_told_before_the_calls(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), speculative_trace(**given):
        pass


def test_pictures_are_kept_as_they_are_given_whatever_holds_them() -> None:
    picture = Image.new("RGB", (4, 4))
    for images in ([picture], iter([picture]), picture):
        with speculative_trace(images=images) as trace:
            generate(assistant_model=NgramDrafter(), max_new_tokens=2)
        for _ in range(2):
            assert len(trace.to_dict()["calls"][0]["pictures"]) == 1


def byte_level() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINTS / "target")


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: words begin with a mark for the space, and what is unknown is written as bytes."""
    words = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581a",
        "\u2581na",
        "ve",
        "a",
        ".",
        "\u2581",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [("\u2581", "a")], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_are_the_text_and_characters_belong_to_their_last_token(make: Any) -> None:
    processor = make()
    tokenizer = getattr(processor, "tokenizer", processor)
    text = " a na\u00efve \U0001f600 a.\u20ac"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Pieces(processor).of(token_ids)
    assert "".join(pieces).lstrip() == text.lstrip()
    smile = next(place for place, piece in enumerate(pieces) if "\U0001f600" in piece)
    assert pieces[smile - 1] == ""
    for place in range(len(token_ids)):  # in the middle of a character, too
        assert Pieces(processor).of(token_ids[place:], token_ids[:place]) == pieces[place:]
    lone = tokenizer.encode("\U0001f600", add_special_tokens=False)[-2:]
    assert "\ufffd" in "".join(Pieces(processor).of([*lone, *tokenizer.encode("a", add_special_tokens=False)]))


def test_pictures_are_what_the_target_sees() -> None:
    _, processor = load_target()
    prompt = next(prompt for prompt in evaluation_prompts(9) if prompt["group"] == "images")
    inputs = encode_prompts(processor, [prompt])
    for seen, given in zip(seen_pictures(dict(inputs), processor), prompt["images"], strict=True):
        assert max(high for _, high in _difference(seen, given)) <= 1
    making = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    given = prompt["images"][0].resize((48, 32))
    inputs = making([given, given.resize((16, 40))], return_tensors="pt")

    class Processor:
        image_processor = making

    seen, other = seen_pictures(dict(inputs), Processor())
    assert max(high for _, high in _difference(seen, given)) <= 1
    assert other.size == (16, 40)
    assert seen_pictures({"pixel_values": torch.zeros(2, 5, 7)}, Processor()) == []


def _difference(one: Image.Image, other: Image.Image) -> Any:
    return ImageChops.difference(one, other.convert("RGB")).getextrema()


class Scripts(HTMLParser):
    """Collects what stands in the script elements of a page, and names of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.scripts = [], []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.names[-1:] == ["script"]:
            self.scripts[-1] += data


EVIL = ["</script><script>alert(1)</script>", "<!--<script>", "/* script */", "/* data */", "&lt;", "\u2028", "]]>"]


def test_no_token_breaks_out_of_the_page() -> None:
    trace = {"calls": [{"pieces": EVIL}]}
    page = Scripts()
    page.feed(render(trace))
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0]) == trace
    assert "innerHTML" not in page.scripts[1]


def test_a_page_asks_for_nothing_but_itself_and_notebooks_frame_it() -> None:
    with speculative_trace() as trace:
        generate(assistant_model=make_drafter("msd"))
    page = trace.to_html()
    assert "default-src 'none'" in page
    assert not [
        word for word in ("http:", "@import", "url(", "src=") if word in page.replace("http://www.w3.org/2000/svg", "")
    ]
    frame = trace._repr_html_()
    assert html.unescape(frame.partition('srcdoc="')[2].partition('"')[0]) == page


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = root / "transformers_msd"
    packed = {path for pattern in patterns["transformers_msd"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == others


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("trl")
    models = f"--target_model {CHECKPOINTS}/target --draft_model {CHECKPOINTS}/draft".split()
    main(["trace", *models, "--output", str(tmp_path / "trace.JSON"), "--max_new_tokens", "24"])
    (call,) = json.loads((tmp_path / "trace.JSON").read_text())["calls"]
    answer = "".join(piece for each in call["rounds"] for piece in each["rows"][0]["pieces"])
    said = capsys.readouterr().out
    assert answer.replace("</s>", "").strip() in said
    assert (call["drafter"], call["sampled"], len(call["pictures"])) == ("MSDDraftModel", False, 1)
    assert [part for part in call["rows"][0]["prompt"] if "num_visual" in part] == [{"num_visual": 36}]
    page = tmp_path / "trace.html"
    main(
        [
            "trace",
            *models[:2],
            "--prompt",
            "Tell me a story.",
            "--temperature",
            "1",
            "--max_new_tokens",
            "8",
            "--output",
            str(page),
        ]
    )
    assert "NgramDrafter" in page.read_text()
