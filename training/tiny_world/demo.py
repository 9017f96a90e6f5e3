"""Let the tiny target describe a picture, alone and with its draft: `python -m training.tiny_world.demo`."""

import argparse
import time
from pathlib import Path

import torch
from transformers import BatchFeature, LlavaForConditionalGeneration, TextStreamer
from transformers.utils import logging

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import BLOCK_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import AutoDraftModel, SpeculativeDecoderOnlyOutput, speculative_trace
from transformers_msd.models.base import FeatureDraftModel


MAX_NEW_TOKENS = 160


def answer(
    target: LlavaForConditionalGeneration,
    inputs: BatchFeature,
    streamer: TextStreamer,
    draft: FeatureDraftModel | None,
) -> tuple[SpeculativeDecoderOnlyOutput, float]:
    """Stream an answer; return the output of `generate` and the seconds it took."""
    start = time.perf_counter()
    output = target.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        return_dict_in_generate=True,
        streamer=streamer,
        assistant_model=draft,
    )
    return output, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=0, help="which of the held-out pictures")
    parser.add_argument("--draft", type=Path, default=BLOCK_CHECKPOINT, help="folder of a draft")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="where the picture is saved")
    parser.add_argument("--trace", type=Path, default=Path("outputs/trace.html"), help="where the rounds are shown")
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    target, processor = load_target()
    draft = AutoDraftModel.from_pretrained(arguments.draft, dtype=torch.float32)
    prompts = [prompt for prompt in evaluation_prompts() if prompt["group"] == "image"]
    prompt = prompts[arguments.prompt % len(prompts)]
    inputs = encode_prompts(processor, [prompt])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    prompt["images"][0].resize((480, 480)).save(arguments.output)
    print(f"Picture:  {arguments.output.resolve()}")
    print(f"Question: {prompt['messages'][-1]['content'][-1]['text']}")

    for assistant in (None, draft):  # a first call of each, so that neither pays for warming up
        target.generate(**inputs, max_new_tokens=8, assistant_model=assistant)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("\nThe target alone:")
    plain, plain_seconds = answer(target, inputs, streamer, None)
    print("\nThe target with its draft:")
    drafted, drafted_seconds = answer(target, inputs, streamer, draft)

    num_tokens = plain.sequences.shape[1] - inputs["input_ids"].shape[1]
    tau = drafted.speculative_stats.mean_acceptance_length
    print(f"\nSame tokens:       {'yes' if torch.equal(plain.sequences, drafted.sequences) else 'NO'}")
    print(f"Alone:             {num_tokens / plain_seconds:6.1f} tokens per second")
    print(f"With the draft:    {num_tokens / drafted_seconds:6.1f} tokens per second")
    print(f"Speed-up:          {plain_seconds / drafted_seconds:6.2f}x")
    print(f"Acceptance length: {tau:6.2f} tokens per forward of the target (tau, bonus token included)")

    with speculative_trace(processor, prompt["images"]) as trace:
        target.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, assistant_model=draft)
    arguments.trace.parent.mkdir(parents=True, exist_ok=True)
    trace.save(arguments.trace)
    print(f"Every round:       {arguments.trace.resolve()} (open it in a browser)")


if __name__ == "__main__":
    main()
