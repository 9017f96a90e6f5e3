"""The master claim: with a draft the tokens are those of plain `generate()`, whatever the target and the options."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Oracle
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.generation import LogitsProcessor, StoppingCriteria
from zoo import (
    ARCHITECTURES,
    EOS_ID,
    FIRST_TEXT_ID,
    PAD_ID,
    READ_EMBEDS,
    VOCAB_SIZE,
    make_draft_model,
    make_inputs,
    make_target,
)

from transformers_msd import (
    BlockDraftConfig,
    BlockDraftModel,
    Eagle3Config,
    Eagle3DraftModel,
    EnsembleDrafter,
    HiViSConfig,
    HiViSDraftModel,
    MSDConfig,
    MSDDraftModel,
    NgramDrafter,
    StaticRuntime,
    TreeConfig,
    ViSpecConfig,
    ViSpecDraftModel,
    VLMDrafter,
)
from transformers_msd.compat import CACHE
from transformers_msd.traits.tokens import visual_token_ids
from transformers_msd.trees.topology import EAGLE


NUM_TOKENS = 20


class FavourByRow(LogitsProcessor):
    """Favours another token in each row, depending on the prefix."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        favoured = (input_ids[:, -1] + 7 * rows + input_ids.shape[1]) % VOCAB_SIZE
        return scores.index_put((rows, favoured), scores.new_tensor(3.0), accumulate=True)


class LengthByRow(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        num_tokens = input_ids.shape[1] - self.prompt_length
        return torch.tensor([num_tokens >= 12 + 3 * row for row in range(len(input_ids))], device=input_ids.device)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a character per id of the tiny vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({character(token_id): token_id for token_id in range(VOCAB_SIZE)}, "!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=character(PAD_ID))


def character(token_id: int) -> str:
    return chr(ord("!") + token_id)


def allow_by_row(row: int, input_ids: torch.Tensor) -> list[int]:
    return list(range(FIRST_TEXT_ID + row, VOCAB_SIZE, 1 + int(input_ids[-1]) % 2))


def eos_ids(truth: torch.Tensor, steps: tuple[int, ...]) -> list[int]:
    """Choose a token for each step: the last one until then that is new in its row, and that no row starts with."""
    starts = set(truth[:, :3].flatten().tolist())
    chosen = []
    for most in steps:
        new = {
            step: token_id
            for row in truth.tolist()
            for step, token_id in enumerate(row[: most + 1])
            if token_id not in {*row[:step], *starts, *chosen}
        }
        chosen += [new[max(new)]] if new else []
    return chosen


# Options by name. Those of `ENDS` get the tokens that the call would generate without them.
BOTH: dict[str, dict[str, Any]] = {
    "default": {},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "encoder_no_repeat_ngram": {"encoder_no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [7, 8], [19, 40]]},
    "sequence_bias": {"sequence_bias": [[[11], 4.0], [[12, 13], 6.0]]},
    "suppressed_tokens": {"suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [19, 20]},
    "forced_eos": {"forced_eos_token_id": EOS_ID},
    "prefix_allowed": {"prefix_allowed_tokens_fn": allow_by_row},
    "custom_processor": {"logits_processor": [FavourByRow()]},
    "prefill_chunks": {"prefill_chunk_size": 5},
    "renormalized": {"renormalize_logits": True, "remove_invalid_values": True},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.8},
    "epsilon": {"epsilon_cutoff": 0.01},
    "eta": {"eta_cutoff": 0.02},
    "top_h": {"top_h": 0.5},
    "warpers_and_penalty": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "return_sequences": {"num_return_sequences": 3},
}
ENDS: dict[str, Callable[[torch.Tensor, int], dict[str, Any]]] = {
    "max_new_tokens": lambda truth, prompt: {"max_new_tokens": 15},
    "max_length": lambda truth, prompt: {"max_length": prompt + 14, "max_new_tokens": None},
    "eos": lambda truth, prompt: {"eos_token_id": eos_ids(truth, (11,))},
    "eos_list": lambda truth, prompt: {"eos_token_id": eos_ids(truth, (13, 9, 11))},
    "min_new_tokens": lambda truth, prompt: {"eos_token_id": eos_ids(truth, (8,)), "min_new_tokens": 10},
    "min_length": lambda truth, prompt: {"eos_token_id": eos_ids(truth, (8,)), "min_length": prompt + 10},
    "decay": lambda truth, prompt: {
        "eos_token_id": eos_ids(truth, (12,)),
        "exponential_decay_length_penalty": (9, 1.2),
    },
    "stop_string": lambda truth, prompt: {
        "stop_strings": ["".join(character(int(token_id)) for token_id in truth[0, 10:12])],
        "tokenizer": make_tokenizer(),
    },
    "custom_criterion": lambda truth, prompt: {"stopping_criteria": [LengthByRow(prompt)]},
    "custom_criterion_and_eos": lambda truth, prompt: {
        "stopping_criteria": [LengthByRow(prompt)],
        "eos_token_id": eos_ids(truth, (13,)),
    },
}
TABLE = [
    *((name, do_sample) for name in BOTH for do_sample in (False, True)),
    *((name, True) for name in SAMPLED),
    *((name, do_sample) for name in ENDS for do_sample in (False, True)),
]

# Of these eager attention is tried in each run.
EAGER = (
    "default",
    "custom_processor",
    "prefill_chunks",
    "warpers_and_penalty",
    "return_sequences",
    "eos",
    "custom_criterion_and_eos",
)


def generate(target: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True}
    return target.generate(**inputs, **settings | kwargs)


def ended_inside(oracle: Oracle, ends: list[int]) -> bool:
    """Whether some row ended within a block: the round in which it ended had accepted tokens beyond."""
    steps = [1] * len(ends)
    for tree, committed in zip(oracle.trees, [*oracle.committed[1:], None], strict=True):
        for row, end in enumerate(ends):
            truth, node, length = oracle.token_ids[row], 0, 0
            edges = list(zip(tree.parents[row].tolist(), tree.token_ids[row].tolist(), strict=True))
            while steps[row] + length < len(truth) and (node, truth[steps[row] + length]) in edges:
                node = edges.index((node, truth[steps[row] + length]))
                length += 1
            if steps[row] < end < steps[row] + length + 1:
                return True
            steps[row] += 0 if committed is None else int(committed.lengths[row])
    return False


def inputs_of(architecture: str, batch_size: int, device: str) -> dict[str, torch.Tensor]:
    inputs = make_inputs(architecture, (1,) if batch_size == 1 else (2, 0, 1))
    return {name: values.to(device) for name, values in inputs.items()}


@functools.cache
def said_without_end(
    architecture: str, attn_implementation: str, do_sample: bool, batch_size: int, device: str
) -> torch.Tensor:
    """What plain decoding says and would go on to say, whatever the option."""
    target = make_target(architecture, attn_implementation, device)
    inputs = inputs_of(architecture, batch_size, device)
    output = generate(target, inputs, do_sample=do_sample, max_new_tokens=NUM_TOKENS + 6)
    return output.sequences[:, inputs["input_ids"].shape[1] :]


@functools.cache
def make_msd(architecture: str, attn_implementation: str, device: str, **overrides: int) -> MSDDraftModel:
    """Make a random draft; who sets its tree sets it before each call."""
    target = make_target(architecture, attn_implementation, device)
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config, **overrides)).eval().to(device)
    if draft.head is not None:
        draft.choose_tokens(torch.rand(VOCAB_SIZE), target.get_output_embeddings())
    return draft


def make_eagle3(target: torch.nn.Module) -> Eagle3DraftModel:
    """Make a draft on three layers of a target, with its positions."""
    torch.manual_seed(1)
    text_config = target.config.get_text_config()
    sizes = {name: getattr(text_config, name) for name in ("hidden_size", "vocab_size", "num_attention_heads")}
    own = LlamaConfig(**sizes, intermediate_size=48, num_hidden_layers=1, head_dim=8)
    axes = [2, 1, 1] if "qwen" in target.config.model_type else None
    config = Eagle3Config(
        text_config=own,
        feature_layers=[0, 1, -1],
        visual_token_ids=visual_token_ids(target.config),
        mrope_section=axes,
        tree_config={"num_nodes": 8, "depth": 3, "top_k": 3, "gate": False},
    )
    draft = Eagle3DraftModel(config).eval()
    draft.draft_token_ids.copy_(torch.arange(sizes["vocab_size"]))
    return draft.to(target.device)


def make_block(target: torch.nn.Module) -> BlockDraftModel:
    """Make a draft that says all levels at once, of positions in turn and of what follows what."""
    torch.manual_seed(1)
    far = {"windows": [6], "conv_kernel_size": 2, "conv_group_size": 8, "edge_rank": 4, "edge_type": "bilinear"}
    config = BlockDraftConfig.from_target(target.config, **far, visual_rows="decoupled", block_size=4)
    draft = BlockDraftModel(config).eval()
    for name, weight in draft.named_parameters():
        if "_conv." in name or name == "edge_to.weight":
            torch.nn.init.normal_(weight)
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
    return draft.to(target.device)


def check_tokens(
    architecture: str,
    attn_implementation: str,
    option: str,
    do_sample: bool,
    batch_size: int,
    drafts: str = "all",
    device: str = "cpu",
) -> None:
    """
    Compare plain decoding with oracles and, in one cell of the table, with all of the drafts or with a share of them:
    a random draft, on fixed shapes, too; one that may rest and a draft model; or an ensemble and n-grams.
    """
    target = make_target(architecture, attn_implementation, device)
    inputs = inputs_of(architecture, batch_size, device)
    get_random_state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    prompt_length = inputs["input_ids"].shape[1]
    kwargs: dict[str, Any] = {"do_sample": do_sample}
    # Beyond the end of the call the oracle must know what the target would have said.
    beyond = said_without_end(architecture, attn_implementation, do_sample, batch_size, device)
    if option in ENDS:
        kwargs |= ENDS[option](beyond, prompt_length)
    else:
        kwargs |= BOTH.get(option, SAMPLED.get(option))
    plain = generate(target, inputs, **kwargs)
    truth = plain.sequences[:, prompt_length:]
    random_state = get_random_state()
    beyond = torch.cat([truth, beyond[:, truth.shape[1] :]], dim=1) if option in ENDS else truth
    ends = ends_of(truth, kwargs)

    draft = make_msd(architecture, attn_implementation, device)
    gates = {"all": (False, True), "msd": (False,), "vlm": (True,), "views": ()}[drafts]
    for gate in gates if attn_implementation == "sdpa" else gates[:1]:
        draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=gate)
        drafted = generate(target, inputs, **kwargs, assistant_model=draft)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert torch.equal(get_random_state(), random_state)

    has_shapes = drafts in ("all", "msd") and architecture in ("llava", "qwen2_vl", "gemma3")
    if batch_size > 1 and attn_implementation == "sdpa" and has_shapes:
        static = {"cache_implementation": "static", "disable_compile": True}
        drafted = generate(target, inputs, **kwargs | static, assistant_model=StaticRuntime(draft))
        assert torch.equal(drafted.sequences, plain.sequences)
        assert torch.equal(get_random_state(), random_state)

    if option == "default":
        fewer = make_msd(architecture, attn_implementation, device, draft_vocab_size=20)
        drafted = generate(target, inputs, **kwargs, assistant_model=fewer)
        assert torch.equal(drafted.sequences, plain.sequences)
        others = [make_eagle3(target)]
        if attn_implementation == "sdpa" or (batch_size > 1 and do_sample):  # masks of both kinds
            others.append(make_block(target))
        for assistant in (*others, *map(StaticRuntime, others)):
            static = {"disable_compile": True} if isinstance(assistant, StaticRuntime) else {}
            drafted = generate(target, inputs, **kwargs | static, assistant_model=assistant)
            assert torch.equal(drafted.sequences, plain.sequences)
            assert torch.equal(get_random_state(), random_state)
        static_tree = TreeConfig(topology=EAGLE, gate=False)
        draft.tree_config = static_tree
        for assistant in (draft, VLMDrafter(make_draft_model(architecture, device), tree_config=static_tree)):
            drafted = generate(target, inputs, **kwargs, assistant_model=assistant)
            assert torch.equal(drafted.sequences, plain.sequences)

    if option == "default" and do_sample and batch_size > 1 and attn_implementation == "sdpa":
        for config_class, model_class in ((HiViSConfig, HiViSDraftModel), (ViSpecConfig, ViSpecDraftModel)):
            other = model_class(config_class.from_target(target.config)).eval().to(device)
            other.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
            drafted = generate(target, inputs, **kwargs, assistant_model=other)
            assert torch.equal(drafted.sequences, plain.sequences)
            assert torch.equal(get_random_state(), random_state)

    # A draft model that is often right, alone and with two views, and whose trees are as large as it is sure.
    tree = TreeConfig(num_nodes=8, depth=3, top_k=3, min_probability=0.02)
    model = make_draft_model(architecture, device)
    drafters: list[Any] = [VLMDrafter(model, tree_config=tree)] if drafts in ("all", "vlm") else []
    if drafts in ("all", "views"):
        drafters.append(NgramDrafter())
    # The drafts' own attention in any case; views need a draft that takes `inputs_embeds`.
    if drafts in ("all", "views") and attn_implementation == "sdpa" and architecture in READ_EMBEDS:
        drafters.append(EnsembleDrafter(model, tree_config=tree))
    for drafter in drafters:
        drafted = generate(target, inputs, **kwargs, assistant_model=drafter)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert torch.equal(get_random_state(), random_state)

    # An end falls inside a block by chance: among a few oracles there is one that the claim is tested at.
    for seed in range(20):
        oracle = Oracle(beyond, VOCAB_SIZE, seed=seed)
        guided = generate(target, inputs, **kwargs, assistant_model=oracle)
        assert torch.equal(guided.sequences, plain.sequences)
        assert torch.equal(get_random_state(), random_state)
        lengths = guided.speculative_stats.acceptance_lengths
        accepted_differently = batch_size == 1 or bool((lengths != lengths[:, :1]).any())
        inside = option not in ENDS or ended_inside(oracle, ends)
        if guided.speculative_stats.mean_acceptance_length >= 2 and accepted_differently and inside:
            break
    else:
        pytest.fail("No oracle had τ >= 2, rows that accepted different numbers, and an end inside a block.")
    for layer, plain_layer in zip(guided[CACHE].layers, plain[CACHE].layers, strict=True):
        # Rounding differs with the number of rows in a forward.
        torch.testing.assert_close(layer.keys, plain_layer.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, plain_layer.values, atol=1e-4, rtol=1e-4)

    # Where only tokens are returned, ended rows take no further part.
    for assistant in (*([draft] if gates else []), *drafters, oracle) if batch_size > 1 and option in ENDS else ():
        tokens = generate(target, inputs, **kwargs, assistant_model=assistant, return_dict_in_generate=False)
        assert torch.equal(tokens, plain.sequences)
        assert torch.equal(get_random_state(), random_state)


def ends_of(truth: torch.Tensor, kwargs: dict[str, Any]) -> list[int]:
    """Tokens of each row up to and with the one that ended it."""
    ends = []
    for row in truth.tolist():
        end = len(row)
        if kwargs.get("eos_token_id"):
            end = min([step + 1 for step, token_id in enumerate(row) if token_id in kwargs["eos_token_id"]] + [end])
        ends.append(end)
    return ends


OPTIONS = (*BOTH, *SAMPLED, *ENDS)
CELLS = [
    (architecture, attn_implementation, *cell, batch_size)
    for architecture in ARCHITECTURES
    for attn_implementation in ("sdpa", "eager")
    for cell in TABLE
    for batch_size in (1, 3)
]
COLUMNS = ("architecture", "attn_implementation", "option", "do_sample", "batch_size")


def is_in_each_run(architecture: str, attn_implementation: str, option: str, do_sample: bool, batch_size: int) -> bool:
    """
    Tell which cells are not slow. Masks are written in another way for eager attention, whatever becomes of the
    logits: a few options will do. And as on the fields of one colour of a chessboard, each option meets each
    architecture, and each batch size each option, greedy and sampled.
    """
    if option == "default":
        return True
    is_eager = attn_implementation == "eager"
    places = ARCHITECTURES.index(architecture), OPTIONS.index(option), do_sample, batch_size == 1, is_eager
    return sum(places) % 2 == 0 and (not is_eager or option in EAGER)


SHARES = ("msd", "vlm", "views")


def share_of(architecture: str, attn_implementation: str, option: str, do_sample: bool, batch_size: int) -> str:
    """
    Choose the drafts of a field in each run: all of "default", and of others such a share that each meets each
    architecture and each option, greedy and sampled, alone and in a batch. With eager attention each meets each
    architecture. All of them are slow.
    """
    places = [ARCHITECTURES.index(architecture), OPTIONS.index(option), do_sample]
    if option == "default":
        if attn_implementation == "sdpa":
            return "all"
        places[1] = batch_size == 1
    return SHARES[sum(places) % len(SHARES)]


MARKED = [
    *((share_of(*cell), *cell) for cell in CELLS if is_in_each_run(*cell)),
    *(pytest.param("all", *cell, marks=pytest.mark.slow) for cell in CELLS if share_of(*cell) != "all"),
]


@pytest.mark.parametrize(("drafts", *COLUMNS), MARKED, ids=str)
def test_tokens_equal_plain_generate(
    architecture: str, attn_implementation: str, option: str, do_sample: bool, batch_size: int, drafts: str
) -> None:
    check_tokens(architecture, attn_implementation, option, do_sample, batch_size, drafts)


@pytest.mark.gpu
@pytest.mark.parametrize(COLUMNS, CELLS, ids=str)
def test_tokens_equal_plain_generate_on_cuda(
    architecture: str, attn_implementation: str, option: str, do_sample: bool, batch_size: int
) -> None:
    check_tokens(architecture, attn_implementation, option, do_sample, batch_size, device="cuda")


DRAFTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "MSD": lambda target: make_msd("qwen2_5_vl", "sdpa", "cpu"),
    "MSD, fewer tokens": lambda target: make_msd("qwen2_5_vl", "sdpa", "cpu", draft_vocab_size=20),
    "EAGLE-3": make_eagle3,
    "block": make_block,
    "draft model": lambda target: make_draft_model("qwen2_5_vl"),
}


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_that_says_no_numbers_changes_no_token(name: str, do_sample: bool, number: float) -> None:
    target, inputs = make_target("qwen2_5_vl"), inputs_of("qwen2_5_vl", 3, "cpu")
    kwargs = {"do_sample": do_sample, "max_new_tokens": 24}
    plain = generate(target, inputs, **kwargs)
    draft = copy.deepcopy(DRAFTS[name](target))
    for weight in draft.parameters():
        weight.data.fill_(number)
    for ngrams in (False, True):
        tree = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False, ngrams=ngrams)
        drafter: Any = VLMDrafter(draft, tree_config=tree) if name == "draft model" else draft
        drafter.tree_config = tree
        for assistant in (drafter, StaticRuntime(drafter)):
            static = {"disable_compile": True} if assistant is not drafter else {}
            drafted = generate(target, inputs, **kwargs, **static, assistant_model=assistant)
            assert torch.equal(drafted.sequences, plain.sequences)
