"""
Cut a draft VLM out of the real LLaVA: its tower, projector, embeddings and first layers.

    python -m training.real_llava.first_layers --target LLAVA --output DRAFT_VLM --num_layers 5

Cut, it says nothing sensible; distilled from the target (draft_vlm.yaml), it drafts.
"""

import argparse
from copy import deepcopy
from pathlib import Path

from transformers import AutoProcessor, LlavaForConditionalGeneration


def first_layers(target: LlavaForConditionalGeneration, num_layers: int) -> LlavaForConditionalGeneration:
    """Return a model of a LLaVA's weights that ends behind the first layers of its language model."""
    config = deepcopy(target.config)
    config.text_config.num_hidden_layers = num_layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:num_layers]
    draft = LlavaForConditionalGeneration(config).to(target.dtype)
    own = draft.state_dict()
    draft.load_state_dict({name: weight for name, weight in target.state_dict().items() if name in own})
    draft.generation_config = deepcopy(target.generation_config)
    return draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_layers", type=int, default=5)
    arguments = parser.parse_args()
    target = LlavaForConditionalGeneration.from_pretrained(arguments.target)
    draft = first_layers(target, arguments.num_layers)
    draft.save_pretrained(arguments.output)
    AutoProcessor.from_pretrained(arguments.target).save_pretrained(arguments.output)
    print(f"{draft.num_parameters():,} parameters in {arguments.output}")


if __name__ == "__main__":
    main()
