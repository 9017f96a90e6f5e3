"""
Train a draft for a small text model on what it writes itself, and measure it on held-out beginnings.

`python -m training.evidence.text_model --target FOLDER --independent FOLDER`. The target writes from nothing at
temperature 1; what it wrote from other seeds gives the held-out prompts. For comparison independent models of the same
vocabulary draft for it, in the same trees, alone, all together, and as Transformers' own assistants.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transformers_msd import EnsembleDrafter, MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter
from transformers_msd.trainer import AcceptanceLength, MSDTrainer, MSDTrainingConfig


TREES = (TreeConfig(16, 5, 4, gate=False, ngrams=False), TreeConfig(32, 6, 4, gate=False, ngrams=False))
MODES = {"greedy": {"do_sample": False}, "T=1": {"do_sample": True, "temperature": 1.0, "top_k": 0}}
PROMPT_LENGTH = 12


@torch.no_grad()
def write(target: PreTrainedModel, num_texts: int, length: int, seed: int, batch_size: int = 64) -> list[list[int]]:
    """Let the target write texts from nothing, at temperature 1."""
    torch.manual_seed(seed)
    texts: list[list[int]] = []
    while len(texts) < num_texts:
        start = torch.full((batch_size, 1), target.config.bos_token_id)
        written = target.generate(
            start, do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=target.config.eos_token_id
        )
        for row in written.tolist():
            end = row.index(target.config.eos_token_id) if target.config.eos_token_id in row else len(row)
            texts.append(row[:end])
    return [text for text in texts[:num_texts] if len(text) > 2 * PROMPT_LENGTH]


def measure(target: PreTrainedModel, prompts: list[list[int]], assistant: Any, settings: dict) -> dict[str, float]:
    """Continue the prompts without and with an assistant in turn: τ, speed-up, and how many are equal."""
    rounds, equal, seconds, plain_seconds = [], 0, 0.0, 0.0
    for seed, prompt in enumerate(prompts):
        call = {"input_ids": torch.tensor([prompt]), "max_new_tokens": 100, "return_dict_in_generate": True} | settings
        outputs = []
        for assistant_model in (None, assistant):
            torch.manual_seed(seed)
            start = time.perf_counter()
            outputs.append(target.generate(**call, assistant_model=assistant_model))
            elapsed = time.perf_counter() - start
            if assistant_model is None:
                plain_seconds += elapsed
            else:
                seconds += elapsed
        plain, drafted = outputs
        equal += torch.equal(plain.sequences, drafted.sequences)
        rounds.append(drafted.speculative_stats.acceptance_lengths[:, 0].tolist())
    tau = AcceptanceLength(keep_in_memory=True).compute(predictions=rounds)["acceptance_length"]
    return {"tau": tau, "speedup": plain_seconds / seconds, "equal": equal, "prompts": len(prompts)}


def measure_stock(
    target: PreTrainedModel, prompts: list[list[int]], assistant: PreTrainedModel, settings: dict
) -> dict[str, float]:
    """Continue the prompts with Transformers' assisted generation; its rounds are the forwards of the target."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    num_tokens, seconds, plain_seconds = 0, 0.0, 0.0
    for seed, prompt in enumerate(prompts):
        call = {"input_ids": torch.tensor([prompt]), "max_new_tokens": 100} | settings
        torch.manual_seed(seed)
        start = time.perf_counter()
        target.generate(**call)
        plain_seconds += time.perf_counter() - start
        hook = target.register_forward_hook(count)
        torch.manual_seed(seed)
        start = time.perf_counter()
        num_tokens += target.generate(**call, assistant_model=assistant).shape[1] - len(prompt)
        seconds += time.perf_counter() - start
        hook.remove()
    return {"tau": num_tokens / forwards, "speedup": plain_seconds / seconds, "prompts": len(prompts)}


def train_draft(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> MSDDraftModel:
    """Train a draft on what the target writes."""
    texts = write(target, arguments.num_texts, arguments.length, seed=0)
    print(f"{len(texts)} texts written", flush=True)
    rows = Dataset.from_dict({"input_ids": texts, "labels": texts})
    torch.manual_seed(0)
    draft = MSDDraftModel(MSDConfig.from_target(target.config, intermediate_size=4 * target.config.hidden_size))
    args = MSDTrainingConfig(
        output_dir=str(arguments.work),
        stage="text",
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        token_loss_weight=1.0,
        feature_noise=0.0,
        num_unroll_steps=3,
        head_chunk_size=8192,
        logging_steps=50,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    MSDTrainer(model=draft, target=target, args=args, train_dataset=rows, processing_class=tokenizer).train()
    draft.save_pretrained(arguments.work)
    return draft.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--independent", type=Path, required=True, nargs="+", help="models of the same vocabulary")
    parser.add_argument("--draft", type=Path, help="a trained draft, to measure only")
    parser.add_argument("--num-texts", type=int, default=1280)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("/tmp/text_model"))
    parser.add_argument("--output", type=Path, help="where results are saved as JSON")
    arguments = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).eval()
    target.generation_config.pad_token_id = target.config.eos_token_id
    independent = {
        path.name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in arguments.independent
    }
    if arguments.draft is None:
        draft = train_draft(target, AutoTokenizer.from_pretrained(arguments.target), arguments)
    else:
        draft = MSDDraftModel.from_pretrained(arguments.draft, dtype=torch.float32).eval()
    prompts = [text[:PROMPT_LENGTH] for text in write(target, arguments.num_prompts, 64, seed=1)]
    results: dict[str, dict[str, dict[str, float]]] = {}
    for mode, settings in MODES.items():
        results[mode] = {}
        for tree in TREES:
            draft.tree_config = tree
            shape = f"{tree.num_nodes} nodes in {tree.depth} levels"
            results[mode][f"MSD, {shape}"] = measure(target, prompts, draft, settings)
            drafters = {name: VLMDrafter(model, tree_config=tree) for name, model in independent.items()}
            if len(independent) > 1:
                models = list(independent.values())
                drafters["all together"] = EnsembleDrafter(models, ("text_only",), tree_config=tree)
            for name, drafter in drafters.items():
                results[mode][f"{name}, {shape}"] = measure(target, prompts, drafter, settings)
        for name, model in independent.items():
            results[mode][f"{name}, Transformers' assistant"] = measure_stock(target, prompts, model, settings)
        for name, result in results[mode].items():
            print(mode, name, result, flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
