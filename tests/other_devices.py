"""
A program: drafts on a second device type, `fgpu`, that has CUDA's rules for tensors of several devices, and prints
what differs from plain `generate` there or raises. Its arguments are the folder of the module that makes the device,
and `all` for all cases.
"""

import copy
import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel
from zoo import IMAGE_ID, VIDEO_ID, VOCAB_SIZE, make_draft_model, make_inputs, make_target

from training.evidence.tiny import make_model
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


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.9, "top_k": 20},
    "by the ids": {"do_sample": True, "repetition_penalty": 1.3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def make_msd(target: PreTrainedModel, device: str, **overrides: Any) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config, **overrides)).eval()
    draft.tree_config = TREE
    if draft.head is not None:
        draft.choose_tokens(torch.rand(VOCAB_SIZE), make_target("llava").get_output_embeddings())
    return draft.to(device)


def make_eagle3(target: PreTrainedModel, device: str, **overrides: Any) -> Eagle3DraftModel:
    torch.manual_seed(1)
    config = Eagle3Config.from_target(target.config, head_dim=8, **overrides)
    if "qwen" in target.config.model_type:  # positions on its axes
        config = Eagle3Config(**config.to_dict() | {"mrope_section": [2, 1, 1]})
    draft = Eagle3DraftModel(config).eval()
    draft.tree_config = TREE
    draft.choose_tokens(torch.rand(VOCAB_SIZE), make_target("llava").get_output_embeddings())
    return draft.to(device)


def make_block(target: PreTrainedModel, device: str, **overrides: Any) -> BlockDraftModel:
    torch.manual_seed(1)
    config = BlockDraftConfig.from_target(target.config, block_size=4, **overrides)
    draft = BlockDraftModel(config).eval()
    if draft.edge_to is not None:
        torch.nn.init.normal_(draft.edge_to.weight)
    draft.tree_config = TREE
    if draft.head is not None:
        draft.choose_tokens(torch.rand(VOCAB_SIZE), make_target("llava").get_output_embeddings())
    return draft.to(device)


def make_visual(target: PreTrainedModel, device: str) -> dict[str, PreTrainedModel]:
    """Make drafts that read pictures in ways of their own."""
    torch.manual_seed(1)
    drafts = {
        "HiViS": HiViSDraftModel(HiViSConfig.from_target(target.config)),
        "ViSpec": ViSpecDraftModel(ViSpecConfig.from_target(target.config)),
    }
    for draft in drafts.values():
        draft.tree_config = TREE
    return {name: draft.eval().to(device) for name, draft in drafts.items()}


def split(target: PreTrainedModel) -> PreTrainedModel:
    """Spread a LLaVA over both devices, as `device_map="auto"` does."""
    text = "model.language_model"
    places = {"model.vision_tower": 0, "model.multi_modal_projector": 0, f"{text}.embed_tokens": 0}
    places |= {f"{text}.rotary_emb": 0, f"{text}.layers.0": 0, f"{text}.layers.1": 1, f"{text}.norm": 1, "lm_head": 1}
    device_map = {name: f"fgpu:{place}" for name, place in places.items()}
    return dispatch_model(copy.deepcopy(target), device_map=device_map, force_hooks=True)


def cases() -> Iterator[tuple[str, PreTrainedModel, Any, str]]:
    """Name, target, assistant, and where the inputs are."""
    whole, small = make_target("llava"), make_draft_model("llava")
    here = copy.deepcopy(whole).to("fgpu:0")
    for device in ("fgpu:0", "fgpu:1", "cpu"):
        other = copy.deepcopy(small).to(device)
        yield f"MSD on {device}", here, make_msd(whole, device), "fgpu:0"
        yield f"a draft VLM on {device}", here, VLMDrafter(other, tree_config=TREE), "fgpu:0"
        yield f"an ensemble on {device}", here, EnsembleDrafter(other, tree_config=TREE), "fgpu:0"
        yield f"n-grams, {device}", here, NgramDrafter(), "fgpu:0"
        yield f"a runtime on {device}", here, StaticRuntime(make_msd(whole, device)), "fgpu:0"
    yield "MSD with a head of its own", here, make_msd(whole, "fgpu:1", draft_vocab_size=40), "fgpu:0"
    yield "MSD that pools", here, make_msd(whole, "fgpu:1", visual_pool_size=2), "fgpu:0"
    for device in ("fgpu:0", "fgpu:1"):
        draft = make_eagle3(whole, device, draft_vocab_size=40)
        yield f"EAGLE-3 on {device}", here, draft, "fgpu:0"
        yield f"a runtime, EAGLE-3 on {device}", here, StaticRuntime(draft), "fgpu:0"
        draft = make_block(whole, device, edge_rank=4, visual_rows="decoupled")
        yield f"a block on {device}", here, draft, "fgpu:0"
        yield f"a runtime, a block on {device}", here, StaticRuntime(draft), "fgpu:0"
    block = make_block(whole, "fgpu:1", draft_vocab_size=40, mask_token_id=5, visual_rows="dropped")
    yield "a block with a head of its own", here, block, "fgpu:0"
    for name, draft in make_visual(whole, "fgpu:1").items():
        yield f"{name} on fgpu:1", here, draft, "fgpu:0"
        yield f"a runtime, {name}", here, StaticRuntime(copy.deepcopy(draft).to("fgpu:0")), "fgpu:0"
    apart = [copy.deepcopy(small).to(device) for device in ("fgpu:1", "fgpu:0")]
    yield (
        "an ensemble on two devices",
        here,
        EnsembleDrafter(apart, ("multimodal",), "kld", tree_config=TREE),
        "fgpu:0",
    )
    yield "tokens on the CPU, EAGLE-3", here, make_eagle3(whole, "fgpu:0", decoupled=True), "cpu"
    yield "tokens on the CPU", here, make_msd(whole, "fgpu:0"), "cpu"
    yield "tokens on the CPU, draft VLM", here, VLMDrafter(copy.deepcopy(small).to("fgpu:0"), tree_config=TREE), "cpu"
    spread = split(whole)
    for device in (str(spread.device), "fgpu:1"):
        yield f"a spread target, MSD on {device}", spread, make_msd(whole, device), "fgpu:0"
        yield f"a spread target, EAGLE-3 on {device}", spread, make_eagle3(whole, device), "fgpu:0"
        yield f"a spread target, a block on {device}", spread, make_block(whole, device, edge_rank=4), "fgpu:0"
        drafter = VLMDrafter(copy.deepcopy(small).to(device), tree_config=TREE)
        yield f"a spread target, draft VLM on {device}", spread, drafter, "fgpu:0"


def text_cases() -> Iterator[tuple[str, PreTrainedModel, Any, str]]:
    """The same of targets that keep states, see windows, share keys or scale embeddings; of text alone."""
    for name in ("lfm2", "qwen3_5_text", "falcon_h1", "gemma2", "gemma4_text", "granite"):
        target = make_model(name).to("fgpu:0")
        draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval().to("fgpu:1")
        draft.tree_config = TREE
        yield f"{name}, MSD on fgpu:1", target, draft, "fgpu:0"
        yield f"{name}, a runtime", target, StaticRuntime(copy.deepcopy(draft).to("fgpu:0")), "fgpu:0"


def axes_cases() -> Iterator[tuple[str, PreTrainedModel, Any, str]]:
    """Drafts that read positions on several axes."""
    whole = make_target("qwen2_5_vl")
    here = copy.deepcopy(whole).to("fgpu:0")
    for device in ("fgpu:0", "fgpu:1"):
        yield f"EAGLE-3 with axes on {device}", here, make_eagle3(whole, device), "fgpu:0"


def two_turns(
    target: PreTrainedModel, assistant: Any, inputs: dict[str, torch.Tensor], call: dict[str, Any]
) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Return tokens and scores of an answer, and of a second turn where there can be one."""
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True} | call
    settings["disable_compile"] = True
    settings["suppress_tokens"] = [IMAGE_ID, VIDEO_ID]  # there is no picture for what a random target says
    torch.manual_seed(0)
    torch.fgpu.manual_seed_all(0)
    first = target.generate(**inputs, **settings, assistant_model=assistant)
    turns = [(first.sequences, first.scores)]
    if call.get("cache_implementation") is None and call.get("num_return_sequences") is None:
        ids = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -15:])], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask, CACHE: first[CACHE]}
        second = target.generate(**turn, **settings, assistant_model=assistant)
        turns.append((second.sequences, second.scores))
    return turns


def difference(drafted: list[Any], plain: list[Any]) -> str | None:
    """Say how drafting differs from plain decoding."""
    for (tokens, scores), (plain_tokens, plain_scores) in zip(drafted, plain, strict=True):
        if tokens.device != plain_tokens.device or not torch.equal(tokens, plain_tokens):
            return "other tokens"
        for ours, theirs in zip(scores, plain_scores, strict=True):
            if ours.device != theirs.device or not torch.allclose(ours, theirs, atol=1e-4):
                return "other scores"
    return None


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import fgpu  # noqa: F401

    torch.set_num_threads(1)
    # Two of three fields of each case and option, or all of them.
    fields = product(enumerate(cases()), enumerate(CALLS))
    whole = [
        (*case, option, "llava")
        for (row, case), (column, option) in fields
        if (row + column) % 3 != 2 or "all" in sys.argv[2:]
    ]
    text = [(*case, option, "llama") for case, option in product(text_cases(), ("greedy", "sampled"))]
    axes = [(*case, option, "qwen2_5_vl") for case, option in product(axes_cases(), ("greedy", "sampled"))]
    faults, num_cases = {}, 0
    plain: dict[tuple[PreTrainedModel, str, str], list[Any]] = {}  # by target, place of the inputs, and option
    for name, target, assistant, device, option, prompts in whole + text + axes:
        inputs = make_inputs(prompts, (1, 0, 2))
        # Transformers moves tokens to where the model is, but no pictures.
        places = dict.fromkeys(("pixel_values", "image_grid_thw"), "fgpu:0")
        inputs = {key: value.to(places.get(key, device)) for key, value in inputs.items()}
        try:
            if (target, device, option) not in plain:
                plain[target, device, option] = two_turns(target, None, inputs, CALLS[option])
            drafted = two_turns(target, assistant, inputs, CALLS[option])
            found = difference(drafted, plain[target, device, option])
        except RuntimeError as error:
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        num_cases += 1
        if found:
            faults[f"{name}, {option}"] = found
    print(json.dumps({"num_cases": num_cases, "faults": faults}))
