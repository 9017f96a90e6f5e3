"""
Make a LLaVA of a real language model: SmolLM2-135M-Instruct learns to see the pictures of the tiny world.

    python -m training.real_llava.build --language_model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --texts instruct_messages.jsonl --output FOLDER

The tiny world's vision tower stays as it is. The projector learns first, alone; then adapters of all linear layers of
the language model learn with it, conversations mixed in so that it still writes English, and are merged into a stock
`LlavaForConditionalGeneration`. What came of it is written to docs/real_llava.json: the loss on held-out conversations
before and after, and how many questions are answered right with the right picture, and with another.
"""

import argparse
import json
import time
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from random import Random

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from training.tiny_world.build.accuracy import accuracy, swap_pictures
from training.tiny_world.build.target import load_target
from training.tiny_world.build.train_target import collate, encode_row
from training.tiny_world.build.vision_warm_up import pixel_values
from training.tiny_world.world.pictures import draw_scene, random_scene
from training.tiny_world.world.rows import attribute_questions, training_rows


DOCS = Path(__file__).parents[2] / "docs"
IMAGE_TOKEN = "<image>"
# As SmolLM2 was taught, its own system turn included; pictures stand where they are.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {%- if message['content'] is string %}{{ message['content'] }}{% else %}
                {%- for content in message['content'] %}{{ content['text'] }}{% endfor %}
            {%- endif %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {%- if message['content'] is string %}{{ message['content'] }}{% else %}
            {%- for content in message['content'] %}
                {%- if content['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ content['text'] }}{% endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LONGEST, ROWS_HELD_OUT, TOKENS_OF_BATCH = 384, 100, 1600
SHARE_OF_TEXT = 0.35


def build_processor(language_model: str, tiny: LlavaProcessor) -> LlavaProcessor:
    """Join the language model's tokenizer, and a token for pictures, with the tiny world's image processor."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    tokenizer.model_max_length, tokenizer.chat_template = 8192, CHAT_TEMPLATE
    tokenizer.image_token, tokenizer.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return LlavaProcessor(
        image_processor=tiny.image_processor,
        tokenizer=tokenizer,
        patch_size=tiny.patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    language_model: PreTrainedModel, tiny: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """Join a language model and the tiny world's vision tower by a projector whose rows look like embeddings."""
    language_model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": processor.tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config=tiny.config.vision_config,
        text_config=language_model.config,
        image_token_id=processor.image_token_id,
        image_seq_length=tiny.config.image_seq_length,
        vision_feature_layer=tiny.config.vision_feature_layer,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = language_model.generation_config
    model.generation_config.update(**ids)
    start_projector(model)
    return model


@torch.no_grad()
def start_projector(model: LlavaForConditionalGeneration) -> None:
    """Make the projector's hidden rows standard normal on pictures, and its outputs as large as embeddings."""
    random = Random(0)
    pixels = pixel_values([draw_scene(random_scene(random, 1, 6)) for _ in range(64)])
    layers = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = layers[model.config.vision_feature_layer][:, 1:].flatten(0, 1)
    projector = model.model.multi_modal_projector
    mean, deviation = features.mean(0), features.std(0)
    projector.linear_1.weight.normal_(0, features.shape[-1] ** -0.5).div_(deviation)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    outputs = projector.linear_2(projector.act(projector.linear_1(features)))
    wanted = model.get_input_embeddings().weight.std()
    projector.linear_2.weight.mul_(wanted / outputs.std())
    projector.linear_2.bias.zero_()


def load_texts(path: str) -> Dataset:
    """Load conversations: a JSONL file, or a dataset of the Hub with `messages`."""
    local = Path(path).is_file()
    return load_dataset("json", data_files=path, split="train") if local else load_dataset(path, split="train")


def text_row(messages: list[dict]) -> dict:
    """Write a conversation of text as the tiny world's rows are written."""
    turns = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    return {"messages": turns, "images": []}


def training_batches(processor: LlavaProcessor, texts: Dataset, num_batches: int, share_of_text: float) -> Iterator:
    """Yield batches of about `TOKENS_OF_BATCH` tokens, of rows of similar length."""
    random, pictures = Random(1), (row for row in training_rows(10**9, seed=7) if row["images"])
    order = random.sample(range(len(texts)), len(texts))
    ready: list[list[dict]] = []
    for _ in range(num_batches):
        if not ready:
            pool = []
            for _ in range(256):
                is_text = random.random() < share_of_text
                row = text_row(texts[order.pop()]["messages"]) if is_text else next(pictures)
                encoded = encode_row(processor, row)
                cut = {name: encoded[name][:LONGEST] for name in ("input_ids", "labels")}
                if (cut["labels"] != -100).any():
                    pool.append(encoded | cut)
            ready = [[]]
            for row in sorted(pool, key=lambda row: len(row["labels"])):
                if len(row["labels"]) * (len(ready[-1]) + 1) > TOKENS_OF_BATCH:
                    ready.append([])
                ready[-1].append(row)
            random.shuffle(ready)
        yield collate(ready.pop(), processor.tokenizer.pad_token_id)


@torch.no_grad()
def text_loss(model: PreTrainedModel, processor: LlavaProcessor, rows: Dataset) -> float:
    """Mean loss of the assistant's tokens of conversations."""
    total, count = 0.0, 0
    for row in rows:
        encoded = encode_row(processor, text_row(row["messages"]))
        ids, labels = encoded["input_ids"][None, :LONGEST], encoded["labels"][1:LONGEST]
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits[: len(labels)], labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def learn(model: PreTrainedModel, batches: Iterator, num_steps: int, rate: float, name: str) -> None:
    """Train what requires gradients; the rate warms up and falls to zero along a cosine."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    start, mean = time.time(), None
    model.train()
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / 20, 1) * (0.5 + 0.5 * cos(pi * step / (num_steps + 1)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 10 == 0 or step == num_steps:
            left = (time.time() - start) / step * (num_steps - step)
            print(f"{name}: step {step} of {num_steps}, loss {mean:.3f}, {left / 60:.0f} min left", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language_model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or repository")
    parser.add_argument("--texts", required=True, help="conversations: a JSONL file of `messages`, or a repository")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--projector_steps", type=int, default=120)
    parser.add_argument("--adapter_steps", type=int, default=900)
    parser.add_argument("--num_questions", type=int, default=200, help="held-out questions about pictures")
    parser.add_argument("--results", type=Path, default=DOCS / "real_llava.json")
    arguments = parser.parse_args()
    start = time.time()
    torch.manual_seed(0)
    tiny, tiny_processor = load_target()
    processor = build_processor(arguments.language_model, tiny_processor)
    language_model = AutoModelForCausalLM.from_pretrained(arguments.language_model, dtype=torch.float32)
    texts = load_texts(arguments.texts)
    held_out = texts.select(range(len(texts) - ROWS_HELD_OUT, len(texts)))
    texts = texts.select(range(len(texts) - ROWS_HELD_OUT))
    model = build_model(language_model, tiny, processor).eval()
    results = {"text loss before": text_loss(model, processor, held_out)}
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    steps = arguments.projector_steps
    learn(model, training_batches(processor, texts, steps, 0.0), steps, 2e-3, "projector")
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
    model.model.multi_modal_projector.requires_grad_(True)
    steps = arguments.adapter_steps
    learn(adapted, training_batches(processor, texts, steps, SHARE_OF_TEXT), steps, 1e-3, "adapters")
    model = adapted.merge_and_unload().to(torch.bfloat16)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    model = model.float()
    results["text loss after"] = text_loss(model, processor, held_out)
    questions = attribute_questions(arguments.num_questions)
    results["right picture"] = accuracy(model, processor, questions)
    results["swapped pictures"] = accuracy(model, processor, swap_pictures(questions))
    results["minutes"] = (time.time() - start) / 60
    results["steps"] = {"projector": arguments.projector_steps, "adapters": arguments.adapter_steps}
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
