"""
Compare all drafters on the tiny world: `python -m training.tiny_world.measure.compare_drafters`.

Held-out prompts of three kinds, one picture, two pictures, and second turns, are answered by plain `generate` and with
every drafter in turn. All but MSD draft with the same small VLM.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.build.train_draft_vlm import DRAFT_VLM_CHECKPOINT
from training.tiny_world.measure.evaluate import MODES, acceptance_length, timed
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import Caption, EnsembleDrafter, MSDDraftModel, Pooled, TextOnly, TreeConfig, VLMDrafter


GROUPS = ("image", "images", "second turn")
FIXED = TreeConfig(num_nodes=16, depth=5, top_k=3, gate=False, ngrams=False)
DYNAMIC = TreeConfig(num_nodes=24, depth=8, top_k=3, min_probability=0.1, gate=False, ngrams=False)
BY_COSTS = TreeConfig(num_nodes=24, depth=8, top_k=3, ngrams=False)
CAPTION_LENGTH = 24


class Captioner:
    """Lets the draft VLM say what is in each picture, in the words of the prompt's language."""

    def __init__(self, draft_vlm: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self.draft_vlm = draft_vlm
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        side = processor.image_processor.crop_size["height"] // processor.patch_size
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        repeats = torch.where(ids == processor.image_token_id, side**2, 1)
        self.prompt = ids.repeat_interleave(repeats)[None]

    def __call__(self, inputs: Mapping[str, Any]) -> list[list[int]]:
        pictures = inputs["pixel_values"]
        prompt = self.prompt.expand(len(pictures), -1)
        output = self.draft_vlm.generate(
            input_ids=prompt, pixel_values=pictures, max_new_tokens=CAPTION_LENGTH, do_sample=False
        )
        return output[:, prompt.shape[1] :].tolist()


def make_drafters(
    draft_vlm: LlavaForConditionalGeneration, msd: MSDDraftModel, processor: LlavaProcessor
) -> dict[str, Any]:
    """Make every drafter of the table by its name there; a chain of five is the published ensembles' shape."""
    text, pooled, caption = TextOnly(), Pooled(3, 3), Caption(Captioner(draft_vlm, processor))
    ensembles = {
        "M (multimodal)": (("multimodal",), (1.0,)),
        "T (text only)": ((text,), (1.0,)),
        "P (pooled)": ((pooled,), (1.0,)),
        "C (caption)": ((caption,), (1.0,)),
        "IbED, M T": (("multimodal", text), (0.5, 0.5)),
        "TABED, M T": (("multimodal", text), "grid"),
        "TABED, M T P C": (("multimodal", text, pooled, caption), "grid"),
    }
    return {
        **{
            name: EnsembleDrafter(draft_vlm, views, weights, tree_config=FIXED)
            for name, (views, weights) in ensembles.items()
        },
        "Spec-LLaVA, fixed tree": VLMDrafter(draft_vlm, tree_config=FIXED),
        "Spec-LLaVA, dynamic tree": VLMDrafter(draft_vlm, tree_config=DYNAMIC),
        "a small VLM, tree by costs": VLMDrafter(draft_vlm, tree_config=BY_COSTS),
        "MSD": msd,
        "Transformers' assistant": draft_vlm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1, help="speed-ups are medians of so many interleaved runs")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--only", nargs="+", help="names of drafters, all of them by default")
    parser.add_argument("--output", type=Path, help="where the figures are saved as JSON")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    target, processor = load_target()
    draft_vlm = LlavaForConditionalGeneration.from_pretrained(DRAFT_VLM_CHECKPOINT, dtype=torch.float32).eval()
    msd = MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32).eval()
    num_per_group = -(-arguments.num_prompts // len(GROUPS))
    prompts = [prompt for prompt in evaluation_prompts(num_per_group) if prompt["group"] in GROUPS]
    prompts = prompts[: arguments.num_prompts]
    encoded = [(prompt["group"], encode_prompts(processor, [prompt])) for prompt in prompts]
    drafters = make_drafters(draft_vlm, msd, processor)
    drafters = {name: drafters[name] for name in arguments.only or drafters}
    results: dict[str, Any] = {
        "machine": f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU, "
        f"{torch.get_num_threads()} threads, float32"
    }
    num_forwards = 0

    def count(*_: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1

    target.register_forward_hook(count)
    for mode, settings in MODES.items():
        call = settings | {"max_new_tokens": arguments.max_new_tokens}
        for drafter in drafters.values():
            timed(target, 0, **encoded[0][1], **call, assistant_model=drafter)  # warm up
        seconds: dict[tuple[str, str], list[float]] = {}
        figures: dict[tuple[str, str], dict[str, Any]] = {}
        for _ in range(arguments.repeats):
            sums: dict[tuple[str, str], float] = {}
            for name in drafters:
                for group in GROUPS:
                    figures[name, group] = {"lengths": [], "equal": 0, "tokens": 0, "forwards": 0}
            for seed, (group, inputs) in enumerate(encoded):
                plain, elapsed = timed(target, seed, **inputs, **call)
                sums["plain", group] = sums.get(("plain", group), 0.0) + elapsed
                for name, drafter in drafters.items():
                    num_forwards = 0
                    drafted, elapsed = timed(target, seed, **inputs, **call, assistant_model=drafter)
                    sums[name, group] = sums.get((name, group), 0.0) + elapsed
                    figure = figures[name, group]
                    figure["equal"] += torch.equal(drafted.sequences, plain.sequences)
                    figure["tokens"] += drafted.sequences.shape[1] - inputs["input_ids"].shape[1]
                    figure["forwards"] += num_forwards
                    if hasattr(drafted, "speculative_stats"):
                        figure["lengths"].append(drafted.speculative_stats.acceptance_lengths[:, 0].tolist())
            for key, value in sums.items():
                seconds.setdefault(key, []).append(value)
        num_prompts = {group: sum(own == group for own, _ in encoded) for group in GROUPS}
        print(f"\n{mode}; for each group τ, tokens per second and speed-up\n")
        titles = " | ".join(f"{group} ({number})" for group, number in num_prompts.items())
        print(f"| | {titles} | equal |\n|---|" + "---|" * (len(GROUPS) + 1))
        results[mode] = {"prompts": num_prompts, "plain": {}}
        for group in GROUPS:
            rate = figures[next(iter(drafters)), group]["tokens"] / median(seconds["plain", group])
            results[mode]["plain"][group] = {"tokens_per_second": rate}
        rates = [f"1.00, {results[mode]['plain'][group]['tokens_per_second']:.0f}/s, 1.00x" for group in GROUPS]
        print(f"| plain | {' | '.join(rates)} | |")
        for name in drafters:
            cells, results[mode][name] = [], {}
            for group in GROUPS:
                figure = figures[name, group]
                # Stock assistance has no statistics; its rounds are the forwards of the target.
                tau = figure["tokens"] / figure["forwards"]
                if figure["lengths"]:
                    tau = acceptance_length(figure["lengths"])
                pairs = zip(seconds["plain", group], seconds[name, group], strict=True)
                speedup = median(plain / own for plain, own in pairs)
                rate = figure["tokens"] / median(seconds[name, group])
                cells.append(f"{tau:.2f}, {rate:.0f}/s, {speedup:.2f}x")
                results[mode][name][group] = {
                    "tau": tau,
                    "tokens_per_second": rate,
                    "speedup": speedup,
                    "equal": figure["equal"],
                }
            num_equal = sum(figure["equal"] for figure in results[mode][name].values())
            print(f"| {name} | {' | '.join(cells)} | {num_equal} |", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results | {"time": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
