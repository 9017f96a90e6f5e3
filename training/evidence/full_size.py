"""
A rehearsal at full size: LLaVA-1.5-7B and its released MSD draft in their published layouts, with random weights.

    python -m training.evidence.full_size --checkpoint LLAVA_WITHOUT_WEIGHTS --photo PHOTO.jpg --work FOLDER

LLAVA_WITHOUT_WEIGHTS is `llava-hf/llava-1.5-7b-hf` but for its weights: config, processor, and the index that names
every tensor and its file. In FOLDER the three files are filled, 13.2 GiB of bfloat16, and a draft of 32,000 tokens is
written as published. Then `transformers-msd convert`, `from_pretrained` of both, and 16 tokens about a
photo, plain and drafted, each step with its time and the most memory the process had. 20 GiB of memory are enough.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from transformers_msd import MSDDraftModel
from transformers_msd.costs.provenance import hardware


DOCS = Path(__file__).parents[2] / "docs"
INDEX = "model.safetensors.index.json"
# Names in the published files, by the names in the model.
PUBLISHED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
DTYPE = torch.bfloat16
QUESTION = "What is shown here?"


def published_name(name: str) -> str:
    """Return what the published files call a weight."""
    prefix = next(prefix for prefix in PUBLISHED if name.startswith(prefix))
    return PUBLISHED[prefix] + name.removeprefix(prefix)


@torch.no_grad()
def write_target(checkpoint: Path, folder: Path) -> None:
    """
    Write a checkpoint of random weights in the files that an index names.

    Embeddings are large and the head is these, moved by one token, so that no two tokens are nearly as likely.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        shutil.copyfile(file, folder / file.name)
    files = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(checkpoint))
    shapes = {published_name(name): weight.shape for name, weight in model.named_parameters()}
    if shapes.keys() != files.keys():
        raise RuntimeError(f"The index and the model differ in {sorted(shapes.keys() ^ files.keys())[:4]}.")
    torch.manual_seed(0)
    embeddings = torch.empty(shapes[published_name("model.language_model.embed_tokens.weight")], dtype=DTYPE)
    embeddings.normal_(std=10.0)
    for file in sorted(set(files.values())):
        weights = {}
        for name in (name for name, own in files.items() if own == file):
            if name.endswith("embed_tokens.weight"):
                weights[name] = embeddings
            elif name.endswith("lm_head.weight"):
                weights[name] = embeddings.roll(-1, 0) * 0.002
            elif "norm" in name:
                weights[name] = torch.full(shapes[name], float(name.endswith("weight")), dtype=DTYPE)
            else:
                weights[name] = torch.empty(shapes[name], dtype=DTYPE).normal_(std=0.02)
        save_file(weights, folder / file, {"format": "pt"})


def write_draft(folder: Path) -> None:
    """Write a draft as published for LLaVA-1.5-7B: its own copy of 32,000 embeddings, one layer, a bias."""
    folder.mkdir(parents=True, exist_ok=True)
    width, inner, vocab_size = 4096, 11008, 32000
    layer = "layers.0"
    shapes = {"embed_tokens.weight": (vocab_size, width), "fc.weight": (width, 2 * width), "fc.bias": (width,)}
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (width, inner), f"{layer}.post_attention_layernorm.weight": (width,)}
    weights = {name: torch.empty(shape, dtype=DTYPE).normal_(std=0.02) for name, shape in shapes.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "model_type": "llava",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def peak_gib() -> float:
    """Most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/full_size"))
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=DOCS / "full_size.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    results: dict[str, dict] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.time()
        yield
        results[name] = {"seconds": round(time.time() - start, 1), "peak_gib": round(peak_gib(), 1)}
        print(name, results[name], flush=True)

    folders = {name: arguments.work / name for name in ("target", "published", "draft")}
    if not folders["published"].exists():
        with step("write"):
            write_target(arguments.checkpoint, folders["target"])
            write_draft(folders["published"])
    with step("convert, in a process of its own"):
        command = ["convert", str(folders["published"]), "--target_model", str(folders["target"])]
        command += ["--output", str(folders["draft"])]
        subprocess.run([sys.executable, "-m", "transformers_msd.cli", *command], check=True)
    with step("load the target"):
        target = LlavaForConditionalGeneration.from_pretrained(folders["target"], dtype=DTYPE).eval()
        processor = AutoProcessor.from_pretrained(folders["target"])
    with step("load the draft"):
        draft = MSDDraftModel.from_pretrained(folders["draft"], dtype=DTYPE).eval()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(arguments.photo).convert("RGB"), text=text, return_tensors="pt").to(DTYPE)
    call = {"do_sample": False, "max_new_tokens": arguments.max_new_tokens, "return_dict_in_generate": True}
    answers = {}
    for name, assistant in (("plain", None), ("drafted", draft)):
        with step(f"{arguments.max_new_tokens} tokens, {name}"):
            answers[name] = target.generate(**inputs, **call, assistant_model=assistant)
    tokens = [answer.sequences for answer in answers.values()]
    results["prompt tokens"] = inputs["input_ids"].shape[1]
    results["parameters"] = {"target": target.num_parameters(), "draft": draft.num_parameters()}
    results["equal"] = torch.equal(*tokens)
    results["machine"] = hardware(target.device)
    print(json.dumps({name: results[name] for name in ("prompt tokens", "parameters", "equal")}))
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
