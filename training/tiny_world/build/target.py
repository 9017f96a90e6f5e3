"""The tiny world's target: a small but deep LLaVA and its processor."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from training.tiny_world.world.pictures import PICTURE_SIZE
from training.tiny_world.world.rows import training_rows


CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "target"
PATCH_SIZE = 16
VOCABULARY_SIZE = 1024
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- 'USER: ' }}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ content['text'] }}{% endif %}
        {%- endfor %}
        {{- '\\n' }}
    {%- else %}
        {{- 'ASSISTANT:' }}
        {%- generation %}
            {%- for content in message['content'] %}{{ ' ' + content['text'] }}{% endfor %}
            {{- eos_token }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def _texts(num_rows: int) -> Iterator[str]:
    for row in training_rows(num_rows, cells=0.1, copies=0.1):
        for message in row["messages"]:
            text = "".join(content["text"] for content in message["content"] if content["type"] == "text")
            yield f"USER: {text}\n" if message["role"] == "user" else f"ASSISTANT: {text}"


def build_processor(num_rows: int = 6000) -> LlavaProcessor:
    """Build the processor, its byte-level BPE tokenizer trained on the first `num_rows` training rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(num_rows), trainer)
    return join_processor(tokenizer, CHAT_TEMPLATE, 2048)


def join_processor(tokenizer: Tokenizer, chat_template: str, model_max_length: int) -> LlavaProcessor:
    """Join a tokenizer that has the special tokens `<pad>`, `<s>`, `</s>`, `<image>` with an image processor."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": PICTURE_SIZE},
            crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
            padding_side="left",
            model_max_length=model_max_length,
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
        ),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
    )


def build_model(processor: LlavaProcessor, num_layers: int = 16) -> LlavaForConditionalGeneration:
    """Build an untrained target whose text model has `num_layers` layers, in float32."""
    tokenizer = processor.tokenizer
    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=PICTURE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=num_layers,
            num_attention_heads=6,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            **special_ids,
        ),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PICTURE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        **special_ids,
    )
    model = LlavaForConditionalGeneration(config)
    draw_weights(model)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    return model


@torch.no_grad()
def draw_weights(model: LlavaForConditionalGeneration) -> None:
    """
    Draw the weights of projector and text model so that every layer keeps the scale of its input.

    At this width the usual standard deviation of 0.02 makes all attention uniform: the model then takes ten times as
    many steps to look anything up in the picture.
    """
    layers = model.model.language_model.layers
    for module in [*model.model.multi_modal_projector.modules(), *layers.modules()]:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for layer in layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.div_((2 * len(layers)) ** 0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)


def load_target(
    path: Path = CHECKPOINT, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a target and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return model.eval(), LlavaProcessor.from_pretrained(path)


def encode_prompts(processor: LlavaProcessor, prompts: list[dict]) -> BatchFeature:
    """Turn prompts, rows of `messages` and `images` whose last message is the user's, into one left-padded batch."""
    texts = [processor.apply_chat_template(prompt["messages"], add_generation_prompt=True) for prompt in prompts]
    images = [image for prompt in prompts for image in prompt["images"]]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def answer_prompts(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, prompts: list[dict], max_new_tokens: int = 200
) -> list[str]:
    """Answer prompts greedily, all in one batch."""
    inputs = encode_prompts(processor, prompts)
    output_ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.batch_decode(output_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
