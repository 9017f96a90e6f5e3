"""
A program: decodes on a second device type, `fgpu`, and prints how often a round makes the host wait for it: questions
to the device, and copies to it that are not left to themselves. Its argument is the folder of the module that makes
the device; names of cases behind it print the places in the code, too.
"""

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from other_devices import TREE, make_block, make_eagle3, make_msd, make_visual
from zoo import IMAGE_ID, VIDEO_ID, make_draft_model, make_inputs, make_target

from training.evidence.tiny import make_model
from transformers_msd import (
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    NgramDrafter,
    StaticRuntime,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.costs.calibration import save_costs
from transformers_msd.costs.rounds import Costs
from transformers_msd.drafters.wrapped import Wrapped


DEVICE = "fgpu:0"
ENDS = {"eos_token_id": list(range(3, 9)), "pad_token_id": 0}
UNSURE = TreeConfig(num_nodes=8, depth=3, top_k=3, min_probability=0.005, gate=False)
COSTS = Costs(1.0, [2, 8], [1.2, 1.5], 0.1, 3)
PENALTY = {"repetition_penalty": 1.3}
STATIC = {"cache_implementation": "static", "disable_compile": True}


class Noted(Wrapped):
    """Notes how many waits there were when each round of drafting began."""

    def __init__(self, assistant: Any, events: list[Any]) -> None:
        super().__init__(assistant)
        self.events, self.starts = events, []

    def candidate_generator(self, target: Any, inputs: Any) -> Any:
        candidates = super().candidate_generator(target, inputs)
        draft = candidates.draft

        def noted(committed: Any) -> Any:
            self.starts.append(len(self.events))
            return draft(committed)

        candidates.draft = noted
        return candidates


def cases() -> Iterator[tuple[str, Any, Callable[[], Any], int, dict[str, Any]]]:
    """Name, target, what makes an assistant, size of the batch, and settings of the call."""
    whole, small = make_target("llava"), make_draft_model("llava").to(DEVICE)
    here, exact = copy.deepcopy(whole).to(DEVICE), copy.deepcopy(whole).to(DEVICE)
    msd, unsure = make_msd(whole, DEVICE), make_msd(whole, DEVICE)
    eagle3 = make_eagle3(whole, DEVICE, draft_vocab_size=40)
    block = make_block(whole, DEVICE, edge_rank=4, edge_type="gated", windows=[8], conv_kernel_size=2)
    unsure.tree_config = UNSURE
    tuned, tuned_small = make_msd(whole, DEVICE, num_hidden_layers=2), copy.deepcopy(small)
    tuned_small.config.name_or_path = "tuned"
    for model in (tuned, tuned_small):
        save_costs([COSTS], [model], here)

    def vlm(model: Any = small, tree: TreeConfig = TREE) -> VLMDrafter:
        return VLMDrafter(model, tree_config=tree)

    def ensemble(weights: Any, model: Any = small, tree: TreeConfig = TREE) -> EnsembleDrafter:
        return EnsembleDrafter(model, weights=weights, tree_config=tree)

    calls: dict[str, dict[str, Any]] = {
        "": {},
        ", sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20},
        ", scores": {"output_scores": True, "output_logits": True},
        ", penalty": PENALTY,
        ", penalty, sampled": PENALTY | {"do_sample": True, "min_new_tokens": 4},
        ", a criterion": {"max_time": 1e6},
    }
    for option, call in calls.items():
        for batch_size in (1, 3):
            yield f"MSD{option}", here, lambda: msd, batch_size, call
            yield f"VLM{option}", here, vlm, batch_size, call
            yield f"EAGLE-3{option}", here, lambda: eagle3, batch_size, call
            yield f"block{option}", here, lambda: block, batch_size, call
    for batch_size in (1, 3):
        yield "VLM that is right", here, lambda: vlm(exact), batch_size, {}
        yield "VLM that is right, penalty", here, lambda: vlm(exact), batch_size, PENALTY
        yield "MSD, min_probability", here, lambda: unsure, batch_size, {}
        yield "VLM, min_probability", here, lambda: vlm(tree=UNSURE), batch_size, {}
        yield "MSD, tuned", here, lambda: tuned, batch_size, {}
        yield "VLM, tuned", here, lambda: vlm(tuned_small), batch_size, {}
        yield "VLM, tuned, min_probability", here, lambda: vlm(tuned_small, UNSURE), batch_size, {}
        for weights in ("grid", "kld", "tvd", (1.0, 1.0)):
            yield f"ensemble {weights}", here, lambda weights=weights: ensemble(weights), batch_size, {}
        yield "n-grams", here, NgramDrafter, batch_size, {}
        yield "n-grams, sampled", here, NgramDrafter, batch_size, {"do_sample": True}
        yield "ensemble, tuned", here, lambda: ensemble("grid", tuned_small, UNSURE), batch_size, {}
        for option in ({}, {"do_sample": True}):
            yield f"runtime{option and ', sampled'}", here, lambda: StaticRuntime(msd), batch_size, STATIC | option
        yield "runtime, min_probability", here, lambda: StaticRuntime(unsure), batch_size, STATIC
        yield "runtime, block", here, lambda: StaticRuntime(block), batch_size, STATIC
        yield "runtime, VLM", here, lambda: StaticRuntime(vlm()), batch_size, STATIC
        yield "runtime, ensemble", here, lambda: StaticRuntime(ensemble("grid")), batch_size, STATIC
    for option, call in {"": ENDS, ", penalty": ENDS | PENALTY, ", a criterion": ENDS | {"max_time": 1e6}}.items():
        yield f"rows end{option}", here, lambda: msd, 3, call
    for name, make in {"MSD": lambda: msd, "VLM": vlm, "ensemble": lambda: ensemble("grid")}.items():
        yield f"rows leave, {name}", here, make, 3, ENDS | {"return_dict_in_generate": False}
    for name in ("qwen3_5_text", "gemma2"):
        target = make_model(name).to(DEVICE)
        draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval().to(DEVICE)
        draft.tree_config = TREE
        for batch_size in (1, 3):
            yield name, target, lambda draft=draft: draft, batch_size, {}
    for name, draft in make_visual(whole, DEVICE).items():
        for batch_size in (1, 3):
            yield name, here, lambda draft=draft: draft, batch_size, {}
            yield f"runtime, {name}", here, lambda draft=draft: StaticRuntime(draft), batch_size, STATIC
    qwen = make_target("qwen2_5_vl")
    with_axes = make_eagle3(qwen, DEVICE)
    for batch_size in (1, 3):
        yield "EAGLE-3 with axes", copy.deepcopy(qwen).to(DEVICE), lambda: with_axes, batch_size, {}


def waits(
    target: Any, assistant: Any, batch_size: int, call: dict[str, Any], known: dict[tuple[Any, ...], Any]
) -> list[Counter]:
    """
    Count, by place, what made the host wait in each round of a call but the first, which runs the prompt. The tokens
    must be plain's, which are `known` by what was asked.
    """
    kind = target.config.model_type if hasattr(target.config, "vision_config") else "llama"
    inputs = make_inputs(kind, (1, 0, 2)[:batch_size])
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    settings = {"max_new_tokens": 16, "return_dict_in_generate": True, "do_sample": False} | call
    settings["suppress_tokens"] = [IMAGE_ID, VIDEO_ID]  # there is no picture for what a random target says
    asked = (target, batch_size, repr(call))
    if asked not in known:
        torch.fgpu.manual_seed_all(0)
        known[asked] = target.generate(**inputs, **settings)
    torch.fgpu.manual_seed_all(0)
    with fgpu.trace() as trace:
        inner, is_wrapped = (assistant.assistant, True) if isinstance(assistant, StaticRuntime) else (assistant, False)
        noted = Noted(inner, trace.events)
        drafter = StaticRuntime(noted) if is_wrapped else noted
        drafted = target.generate(**inputs, **settings, assistant_model=drafter)
    drafted, plain = (getattr(output, "sequences", output) for output in (drafted, known[asked]))
    assert torch.equal(drafted, plain), "other tokens"
    rounds = zip(noted.starts[1:], noted.starts[2:], strict=False)
    return [
        Counter((what.split("[")[0], place) for what, _, place in trace.events[a:b] if "nonblocking" not in what)
        for a, b in rounds
    ]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import fgpu

    torch.set_num_threads(1)
    found, known, chosen = {}, {}, sys.argv[2:]
    for name, target, make, batch_size, call in cases():
        full_name = f"{name}, batch of {batch_size}"
        if chosen and full_name not in chosen:
            continue
        rounds = waits(target, make(), batch_size, call, known)
        found[full_name] = [sum(own.values()) for own in rounds]
        if chosen:
            for place, number in sum(rounds, Counter()).most_common():
                print(f"{number / len(rounds):6.2f}", *place, file=sys.stderr)
    print(json.dumps(found))
