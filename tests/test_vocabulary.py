"""A trained draft gets a smaller vocabulary where its target's own words say that it pays."""

import json
from pathlib import Path

import pytest
import torch


pytest.importorskip("trl")

from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import make_target

from training.tiny_world.build.target import CHECKPOINT, encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts, training_dataset
from transformers_msd import (
    BlockDraftModel,
    Eagle3Config,
    Eagle3DraftModel,
    HiViSDraftModel,
    MSDDraftModel,
    ViSpecDraftModel,
    convert_msd_checkpoint,
)
from transformers_msd.cli import main
from transformers_msd.costs.floors import VocabularyCut
from transformers_msd.models.weights import read_embeddings, read_head
from transformers_msd.trainer import cut_vocabulary
from transformers_msd.trainer.dataset import token_counts


GB = 10**9
LLAVA = {"step": 13.5 * GB, "layers": 0.47 * GB, "full_head": 32000 * 8192}
QWEN = {"step": 15.2 * GB, "layers": 0.52 * GB, "full_head": 152064 * 7168}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return training_dataset(300, seed=30)


@pytest.fixture
def draft() -> MSDDraftModel:
    return MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT)


@pytest.mark.parametrize(
    ("pair", "tokens", "width", "tau", "outside", "loss", "gain"),
    [
        (LLAVA, 8000, 4096, 3.88, 0.0510, 0.128, 0.93),
        (LLAVA, 16000, 4096, 3.88, 0.0253, 0.068, 0.97),
        (QWEN, 32000, 3584, 3.18, 0.0314, 0.064, 1.18),
        (QWEN, 32000, 3584, 3.19, 0.0215, 0.045, 1.21),
        (QWEN, 8000, 3584, 3.18, 0.0841, 0.155, 1.13),
    ],
)
def test_what_is_lost_and_gained_at_published_sizes(pair, tokens, width, tau, outside, loss, gain):
    cut = VocabularyCut(
        **pair, own_head=2 * tokens * width, depth=6, num_forwards=6, acceptance_length=tau, share_outside=outside
    )
    assert 1 - cut.cut_acceptance_length / tau == pytest.approx(loss, abs=1e-3)
    assert cut.gain == pytest.approx(gain, abs=5e-3)


def test_a_cut_by_hand():
    # 4 tokens a round and one of 12 accepted tokens outside: 4 rounds of 16 tokens become 5.
    cut = VocabularyCut(100, 10, 40, 15, depth=3, num_forwards=3, acceptance_length=4, share_outside=1 / 12)
    assert (cut.full_cost, cut.cut_cost) == pytest.approx((2.5, 1.75))
    assert cut.cut_acceptance_length == pytest.approx(16 / 5)
    assert cut.gain == pytest.approx(0.8 * 2.5 / 1.75)
    block = VocabularyCut(100, 10, 40, 15, depth=3, num_forwards=1, acceptance_length=4, share_outside=1 / 12)
    assert (block.full_cost, block.cut_cost) == pytest.approx((1.5, 1.25))
    assert VocabularyCut(100, 10, 40, 40, 2, 2, 3, 0.0).gain == 1


def write_target(
    folder: Path, names: dict[str, str], tied: bool = False, num_files: int = 1, **heads
) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """Write a target, of several files only that with its head; return it without weights, and the weights."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=24, hidden_size=8, intermediate_size=8, tie_word_embeddings=tied, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {names.get(name, name): heads.get(name.replace(".", "_"), weight) for name, weight in weights.items()}
    if num_files > 1:
        (folder / "model.safetensors").unlink()
        files = {name: f"model-{number % num_files}.safetensors" for number, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
        for name, file in files.items():
            if ("embed_tokens" if tied else "lm_head") not in name:
                (folder / file).unlink()
    else:
        save_file(weights, folder / "model.safetensors")
    with torch.device("meta"):
        return LlamaForCausalLM(config), weights


LAYOUTS = {
    "one file": {"names": {}},
    "a published name": {"names": {"lm_head.weight": "language_model.lm_head.weight"}},
    "several files, of which one is there": {"names": {}, "num_files": 20},
    "tied": {"names": {}, "tied": True},
    "tied, by a published name": {
        "names": {"model.embed_tokens.weight": "language_model.model.embed_tokens.weight"},
        "tied": True,
        "num_files": 20,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_is_read_and_nothing_else(layout, tmp_path):
    target, weights = write_target(tmp_path, **LAYOUTS[layout])
    end = "embed_tokens.weight" if LAYOUTS[layout].get("tied") else "lm_head.weight"
    (expected,) = (weight for name, weight in weights.items() if name.endswith(end))
    assert torch.equal(read_head(str(tmp_path), target), expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "of which one is there" not in name])
def test_the_embeddings_are_read_and_nothing_else(layout, tmp_path):
    target, weights = write_target(tmp_path, **LAYOUTS[layout])
    (expected,) = (weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(read_embeddings(str(tmp_path), target), expected)


BROKEN = {
    "no head": (
        {"names": {"lm_head.weight": "other.weight"}},
        "must hold the target's head, lm_head.weight, got none",
    ),
    "no head in several files": (
        {"names": {"lm_head.weight": "other.weight"}, "num_files": 20},
        "must hold the target's head, lm_head.weight, got none",
    ),
    "another shape": ({"names": {}, "lm_head_weight": torch.ones(23, 8)}, r"shape \(24, 8\), got torch.float32 and"),
    "quantised": ({"names": {}, "lm_head_weight": torch.ones(24, 8, dtype=torch.int8)}, "got torch.int8"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_head_that_can_not_be_read_is_told(broken, tmp_path):
    layout, message = BROKEN[broken]
    target, _ = write_target(tmp_path, **layout)
    with pytest.raises(ValueError, match=message):
        read_head(str(tmp_path), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "must hold its weights in safetensors, got none"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "can't be read"),
    ],
)
def test_weights_that_are_not_there_are_told(change, message, tmp_path):
    target, _ = write_target(tmp_path, {})
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_head(str(tmp_path), target)


def test_the_shipped_draft_drafts_a_quarter_of_the_tokens(rows, draft, tmp_path, capsys):
    rows.save_to_disk(tmp_path / "rows")
    options = f"--draft_vocab_size 256 --counts_from {tmp_path}/rows --acceptance_length 4 --output {tmp_path}/draft"
    main(f"convert {DRAFT_CHECKPOINT} --target_model {CHECKPOINT} {options}".split())
    assert "Drafting 256 of 1,024 tokens: a round costs 1." in capsys.readouterr().out
    target, processor = load_target()
    counts = token_counts(rows, processor, target.config.text_config)
    smaller = MSDDraftModel.from_pretrained(tmp_path / "draft")
    chosen = smaller.draft_token_ids
    assert counts[chosen].min() >= counts.index_fill(0, chosen, 0).max() > 0
    assert torch.equal(smaller.head.weight, target.lm_head.weight[chosen].bfloat16())
    assert smaller.state_dict().keys() - draft.state_dict().keys() == {"head.weight", "draft_token_ids"}
    assert all(torch.equal(smaller.state_dict()[name], weight) for name, weight in draft.state_dict().items())
    prompts = evaluation_prompts(2)
    for kwargs in ({"do_sample": False}, {"do_sample": True}):
        outputs = []
        for assistant in (None, smaller.float()):
            torch.manual_seed(0)
            inputs = encode_prompts(processor, prompts[::3])
            call = {"max_new_tokens": 48, "return_dict_in_generate": True, "assistant_model": assistant}
            outputs.append(target.generate(**inputs, **kwargs, **call))
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert outputs[1].speculative_stats.mean_acceptance_length > 2


def test_a_cut_leaves_the_draft_as_it_was(rows, draft):
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    smaller, _ = cut_vocabulary(draft, str(CHECKPOINT), rows, 256)
    for weight in smaller.parameters():
        weight.data.zero_()
    assert draft.head is None
    assert draft.config.draft_vocab_size is None
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())


def test_a_cut_of_too_few_tokens_is_refused_and_nothing_written_unless_forced(rows, tmp_path):
    rows.save_to_disk(tmp_path / "rows")
    options = f"--draft_vocab_size 64 --counts_from {tmp_path}/rows --output {tmp_path}/draft"
    command = f"convert {DRAFT_CHECKPOINT} --target_model {CHECKPOINT} {options}".split()
    with pytest.raises(SystemExit, match="64 of 1024 tokens would make drafting slower: a round costs .* gain 0"):
        main(command)
    assert not (tmp_path / "draft").exists()
    main([*command, "--force"])
    assert MSDDraftModel.from_pretrained(tmp_path / "draft").config.draft_vocab_size == 64


def test_the_share_outside_is_counted_on_rows_that_chose_no_token(draft):
    def row(text: str) -> dict:
        turns = (("user", "Say it."), ("assistant", text))
        return {"messages": [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns]}

    processor = load_target()[1]
    same, others = ("red red red red", "blue blue blue blue"), ("red red red red", "red red red red")
    for texts, share in ((same, 1.0), (others, 0.0)):
        said = {token for ids in processor.tokenizer([*texts], add_special_tokens=False)["input_ids"] for token in ids}
        number = len(said) + 1  # and the token that ends an answer
        _, cut = cut_vocabulary(draft, str(CHECKPOINT), Dataset.from_list([*map(row, texts)]), number, force=True)
        assert cut.share_outside == share


@pytest.mark.parametrize(
    ("draft_class", "settings"),
    [(HiViSDraftModel, {}), (ViSpecDraftModel, {}), (BlockDraftModel, {"edge_rank": 4, "block_size": 6})],
)
def test_drafts_of_other_kinds_are_cut(draft_class, settings, rows):
    target, processor = load_target()
    draft = draft_class(draft_class.config_class.from_target(target.config, **settings))
    smaller, cut = cut_vocabulary(draft, str(CHECKPOINT), rows, 256, force=True)
    assert type(smaller) is draft_class
    assert cut.num_forwards == (1 if draft_class is BlockDraftModel else cut.depth)
    assert all(torch.equal(smaller.state_dict()[name], weight) for name, weight in draft.state_dict().items())
    inputs = encode_prompts(processor, evaluation_prompts(1)[:1])
    plain, drafted = (target.generate(**inputs, max_new_tokens=8, assistant_model=own) for own in (None, smaller))
    assert torch.equal(plain, drafted)


def unanswered(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"messages": row["messages"][:1]})


def own_head(draft: MSDDraftModel) -> MSDDraftModel:
    return MSDDraftModel(type(draft.config).from_dict(draft.config.to_dict() | {"draft_vocab_size": 100}))


def with_every_token(draft: MSDDraftModel) -> Eagle3DraftModel:
    return Eagle3DraftModel(Eagle3Config.from_target(load_target()[0].config))


REFUSED = {
    "a head of its own": ({"draft": own_head}, "got one with a head of its own for 100 tokens"),
    "a head of its own for all": ({"draft": with_every_token}, "got one with a head of its own for 1024 tokens"),
    "all tokens": ({"draft_vocab_size": 1024}, "must be below the target's 1024 tokens, got 1024"),
    "more tokens": ({"draft_vocab_size": 1025}, "must be between 1 and the target's 1024 tokens, got 1025"),
    "no token": ({"draft_vocab_size": 0}, "must be between 1 and the target's 1024 tokens, got 0"),
    "tokens that no answer holds": ({"draft_vocab_size": 1000}, "different tokens that the answers hold, got 1000"),
    "no answers": ({"rows": unanswered}, "must hold turns of the assistant"),
    "an answer in one half": ({"rows": lambda rows: rows.select([0])}, "must hold answers in both of its halves"),
    "less than a token a round": ({"acceptance_length": 0.5}, "`acceptance_length` must be between 1 and 7, one more"),
    "more tokens than levels": ({"acceptance_length": 7.5}, "`acceptance_length` must be between 1 and 7, one more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_cut_is_told(case, rows, draft):
    changes, message = REFUSED[case]
    changes = dict(changes)
    draft = changes.pop("draft", lambda draft: draft)(draft)
    rows = changes.pop("rows", lambda rows: rows)(rows)
    settings = {"draft_vocab_size": 256} | changes
    with pytest.raises(ValueError, match=message):
        cut_vocabulary(draft, str(CHECKPOINT), rows, **settings)


def test_a_draft_folder_is_converted_as_it_is(draft):
    target = load_target()[0]
    converted = convert_msd_checkpoint(DRAFT_CHECKPOINT, target.config)
    assert all(torch.equal(weight, draft.state_dict()[name]) for name, weight in converted.state_dict().items())
    with pytest.raises(ValueError, match="`hidden_size` must be the target's"):
        convert_msd_checkpoint(DRAFT_CHECKPOINT, make_target("llama").config)


@pytest.mark.parametrize("option", ["--draft_vocab_size 8", "--counts_from rows"])
def test_one_option_without_the_other_is_told(option, tmp_path):
    with pytest.raises(SystemExit, match="belong together, got one of them"):
        main(f"convert {DRAFT_CHECKPOINT} --target_model {CHECKPOINT} --output {tmp_path}/draft {option}".split())
