"""
Which architectures of the installed Transformers are served, tried one by one: a tiny model of random weights of each,
as a target with an MSD draft and as its own draft.

    python -m training.evidence.targets                  # all of them, into docs/targets.json
    python -m training.evidence.targets llama mllama     # some, printed
    python -m training.evidence.targets --write          # docs/targets.md from docs/targets.json

Prompts are text, two of different lengths in a batch; answers are greedy and sampled. `make targets` does it on the
lowest and the newest Transformers.
"""

import argparse
import json
import re
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter


DOCS = Path(__file__).parents[2] / "docs"
TREE = TreeConfig(num_nodes=16, depth=4, top_k=3, gate=False)
VOCAB_SIZE, NUM_TOKENS, SECONDS, WIDTH = 96, 20, 60, 119
# What a size is cut to, by the names that configs give it.
SIZES = {
    VOCAB_SIZE: ("vocab_size", "vocab_size_per_layer_input"),
    32: (
        *(
            "hidden_size",
            "d_model",
            "n_embd",
            "embed_dim",
            "dim",
            "word_embed_proj_dim",
            "hidden_dim",
            "dim_model_base",
        ),
        *("projection_dim", "out_hidden_size", "encoder_hidden_size", "text_hidden_size", "projector_hidden_size"),
    ),
    48: ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"),
    16: ("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "image_size"),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"),
        *("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "moe_k", "temporal_patch_size"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("patch_size", "rotary_dim"),
    ),
    8: ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "hidden_size_per_layer_input"),
    1: ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "moe_num_shared_experts"),
    256: ("max_position_embeddings", "n_positions", "max_seq_len"),
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 1}
PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
# What follows from the number of layers or the sizes of heads, and is better left to the config.
LEFT_OUT = (
    "layer_types",
    "per_layer_config",
    "mlp_layer_types",
    "rope_parameters",
    "no_rope_layers",
    "model_type",
    "dtype",
)
# Models of positions on three axes.
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl")
# Models whose configs don't find their rotary embedding by themselves.
ROPE = ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")


def model_types() -> dict[str, str]:
    """Map the types of all models that answer in text to the names of their classes."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {name: found if isinstance(found, str) else found[0] for name, found in sorted(names.items())}


def cut(fields: dict[str, Any]) -> dict[str, Any]:
    """Cut the sizes of a config, and of those inside it, by their names."""
    small = {}
    for name, value in fields.items():
        if name == "layer_types" and value:
            # One layer of each of two kinds, where there are two.
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[0], kinds[-1]]
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict) and name.endswith("config"):
            small[name] = cut(value) | {"model_type": value["model_type"]} if "model_type" in value else cut(value)
        elif name in SPECIAL:
            small[name] = SPECIAL[name]
        elif name in PLACES:
            small[name] = VOCAB_SIZE - 1 - PLACES.index(name)
        elif name == "num_key_value_heads" and "kv_lora_rank" in fields:
            small[name] = SIZE_OF["num_attention_heads"]  # latent attention: as many as of queries
        elif name in SIZE_OF and isinstance(value, int) and not isinstance(value, bool):
            small[name] = SIZE_OF[name]
        else:
            small[name] = value
    return small


def make_model(model_type: str) -> PreTrainedModel:
    """Make a tiny model of random weights, large enough that an answer depends on all tokens."""
    model_class = getattr(transformers, model_types()[model_type])
    if not issubclass(model_class, GenerationMixin):
        raise ValueError("it has no `generate`")
    whole: PreTrainedConfig = CONFIG_MAPPING[model_type]()
    fields = cut(whole.to_dict())
    if model_type in MROPE:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        fields["text_config"] = fields["text_config"] | {"rope_parameters": rope}
    if model_type in ROPE:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = type(whole)(**fields)
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    if sum(parameter.numel() for parameter in model.parameters()) > 5e7:
        raise ValueError("its config has sizes that are not cut here")
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def make_prompts() -> dict[str, torch.Tensor]:
    """Two prompts of text, the first of them shorter."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB_SIZE - len(PLACES) - 1, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answers(model: PreTrainedModel, assistant: Any = None) -> list[torch.Tensor]:
    """Answer the prompts, greedily and sampled."""
    tokens = []
    for do_sample in (False, True):
        torch.manual_seed(5)
        settings = {"do_sample": do_sample, "max_new_tokens": NUM_TOKENS, "disable_compile": True}
        settings["suppress_tokens"] = list(range(VOCAB_SIZE - len(PLACES), VOCAB_SIZE))
        tokens.append(model.generate(**make_prompts(), **settings, assistant_model=assistant))
    return tokens


def outcome(model: PreTrainedModel, plain: list[torch.Tensor], make_assistant: Callable[[], Any]) -> str:
    """Tell what comes of a draft: `equal`, `refused: why`, or a fault."""
    ran: list[int] = []
    hooks = [model.register_forward_pre_hook(lambda *args: ran.append(1))]
    try:
        drafted = answers(model, make_assistant())
    except ValueError as error:
        return f"{'refused' if not ran else 'LATE'}: {' '.join(str(error).split())}"
    except Exception as error:  # whatever it is, it is a fault to be shown
        return f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        for hook in hooks:
            hook.remove()
    return "equal" if all(torch.equal(*both) for both in zip(plain, drafted, strict=True)) else "UNEQUAL"


def row(model_type: str) -> dict[str, str]:
    """Try an architecture."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        model = make_model(model_type)
        plain = answers(model)
        if not all(torch.equal(*both) for both in zip(plain, answers(model), strict=True)):
            return {"not tried": "plain answers differ from run to run"}
    except Exception as error:
        return {"not tried": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    finally:
        signal.alarm(0)

    def msd() -> MSDDraftModel:
        torch.manual_seed(1)
        draft = MSDDraftModel(MSDConfig.from_target(model.config)).eval()
        draft.tree_config = TREE
        return draft

    return {
        "MSD draft": outcome(model, plain, msd),
        "its own draft": outcome(model, plain, lambda: VLMDrafter(model, tree_config=TREE)),
    }


def write_page() -> None:
    """Write docs/targets.md from docs/targets.json."""
    results = json.loads((DOCS / "targets.json").read_text())
    (DOCS / "targets.md").write_text("\n".join(page(results)) + "\n")


def kind(said: str) -> str:
    """Shorten what came of a model to what must not change."""
    return said.partition(":")[0]


def kinds_of(found: dict[str, str]) -> dict[str, str]:
    """Shorten all that came of a model."""
    return {name: kind(said) for name, said in found.items()}


def page(results: dict[str, dict[str, dict[str, str]]]) -> Iterator[str]:
    """Yield the lines of the page."""
    newest = results[max(results)]
    names: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, found in newest.items():
        kinds = {kind(said) for said in found.values()} if "not tried" not in found else {"not tried"}
        names.setdefault(kinds.pop() if len(kinds) == 1 else "fault", []).append(name)
        for said in sorted(set(found.values())):
            if kind(said) == "refused":
                fact = re.sub(r"^(?!Drafting|The)\w+ ", "The model ", said.removeprefix("refused: "))
                refused.setdefault(fact.partition(". Otherwise")[0], []).append(name)
    faults = [name for other in names.keys() - {"equal", "refused", "not tried"} for name in names[other]]
    yield "# Which targets are served"
    yield ""
    versions = " and ".join(sorted(results))
    yield from fill(
        "A tiny model of random weights of every architecture, with an MSD draft and as its own draft: two prompts of "
        "text in a batch, one padded, greedy and sampled, against plain `generate`. Written by `make targets`, on "
        f"Transformers {versions}. What is tested with pictures stands in [generate.md](generate.md).",
        WIDTH,
    ).splitlines()
    yield ""
    yield f"## Equal: {len(names.get('equal', ()))}"
    yield ""
    yield from wrapped(names.get("equal", ()))
    yield ""
    yield f"## Refused before anything runs: {len(names.get('refused', ()))}"
    yield ""
    yield "| reason | models |"
    yield "|---|---|"
    for fact, models in sorted(refused.items(), key=lambda pair: -len(pair[1])):
        yield f"| {fact} | {', '.join(f'`{name}`' for name in models)} |"
    yield ""
    yield f"## Faults: {len(faults)}"
    yield ""
    yield from ([f"- `{name}`: {newest[name]}" for name in sorted(faults)] or ["None."])
    yield ""
    yield f"## Not tried: {len(names.get('not tried', ()))}"
    yield ""
    yield "The script can't make a small one, or plain `generate` answers no prompt of text, or not twice the same."
    yield ""
    yield from wrapped(names.get("not tried", ()))
    yield ""
    yield "## Where the versions differ"
    yield ""
    differing = [
        f"- `{name}` on {version}: {rows[name]}"
        for version, rows in sorted(results.items())
        for name in sorted(rows.keys() & newest.keys())
        if "not tried" not in rows[name] | newest[name] and kinds_of(rows[name]) != kinds_of(newest[name])
    ]
    yield from (differing or ["Nowhere."])


def wrapped(names: Iterable[str]) -> list[str]:
    """Lines of names."""
    return fill(", ".join(f"`{name}`" for name in names), WIDTH, break_on_hyphens=False).splitlines()


def main() -> None:
    """Try models and print or save what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="some of them, all by default")
    parser.add_argument("--write", action="store_true", help="write docs/targets.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.write:
        write_page()
        return
    results = {}
    for name in arguments.model_types or model_types():
        results[name] = row(name)
        print(f"{name}: {results[name]}", flush=True)
    if not arguments.model_types:
        path = DOCS / "targets.json"
        every = json.loads(path.read_text()) if path.exists() else {}
        every[transformers.__version__] = results
        path.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
