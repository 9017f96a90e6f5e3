"""Models that scale embeddings before their layers, or logits behind their head: drafts read and say what they do."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CompileConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from zoo import TEXT, make_inputs, make_target

from training.evidence.tiny import make_model, make_prompts
from transformers_msd import CallInputs, Committed, MSDConfig, MSDDraftModel, StaticRuntime, Target, TreeConfig
from transformers_msd.drafters.msd_candidates import MSDCandidateGenerator
from transformers_msd.drafters.wrapped import Wrapped
from transformers_msd.trainer.data import hidden_states
from transformers_msd.traits.scales import Scales, logits_of, look_up, scales_of
from transformers_msd.traits.tokens import is_embedded_token


FIELDS = TEXT | {"tie_word_embeddings": False}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
# What is found of each. An embedding that scales by itself is a table of scaled rows.
MODELS = {
    "llama": (lambda: LlamaConfig(**FIELDS), Scales()),
    "granite": (
        lambda: GraniteConfig(**FIELDS, embedding_multiplier=12.0, logits_scaling=8.0),
        Scales(embeddings=12.0, logits=0.125),
    ),
    "cohere": (lambda: CohereConfig(**FIELDS, logit_scale=0.0625), Scales(logits=0.0625)),
    "gemma2": (lambda: Gemma2Config(**FIELDS, **GEMMA, final_logit_softcapping=0.5), Scales(cap=0.5)),
    # A factor of many digits, and one that divides in one model and multiplies in another.
    "granite_odd": (
        lambda: GraniteConfig(**FIELDS, embedding_multiplier=10.0248, logits_scaling=0.7),
        Scales(embeddings=10.0248, logits=1 / 0.7),
    ),
    "hyperclovax": (lambda: HyperCLOVAXConfig(**FIELDS, logits_scaling=0.25), Scales(logits=0.25)),
    # So high that nothing shows of it.
    "gemma2_high": (lambda: Gemma2Config(**FIELDS, **GEMMA, final_logit_softcapping=30.0), Scales(cap=30.0)),
    "gemma3_text": (lambda: Gemma3TextConfig(**FIELDS, **GEMMA), Scales()),
}


class Spy(Wrapped):
    """A draft whose target and first rows are kept."""

    def candidate_generator(self, target: Target, inputs: CallInputs) -> Any:
        candidates = super().candidate_generator(target, inputs)
        draft, self.rows = candidates.draft, []

        def keep(committed: Committed) -> Any:
            self.rows.append(committed)
            return draft(committed)

        candidates.draft, self.target = keep, target
        return candidates


def make_draft(target: PreTrainedModel) -> MSDDraftModel:
    torch.manual_seed(1)
    return MSDDraftModel(MSDConfig.from_target(target.config)).eval()


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(MODELS[name][0](), dtype=dtype).eval()
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_draft_reads_what_layers_read_and_its_logits_are_made_like_theirs(name, dtype):
    target, inputs = make(name, dtype), make_inputs("llama", (4, 9))
    draft = make_draft(target).to(dtype)
    draft.tree_config = TreeConfig(num_nodes=6, depth=3, top_k=2, gate=False)
    spy = Spy(draft)
    settings = {"max_new_tokens": 8, "do_sample": False, "assistant_model": spy, "return_dict_in_generate": True}
    output = target.generate(**inputs, **settings)
    assert scales_of(target) == MODELS[name][1]
    with torch.no_grad():
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
        whole = target(output.sequences, attention_mask=mask, output_hidden_states=True)
    read, features = whole.hidden_states[0], whole.hidden_states[-1]
    torch.testing.assert_close(spy.target.embed(output.sequences), read)
    torch.testing.assert_close(spy.target.logits(features), whole.logits.to(dtype), atol=1e-2, rtol=1e-2)
    # The row of a root, whose token no forward has seen, reads as those of accepted nodes.
    for rows in spy.rows:
        real = torch.arange(rows.token_ids.shape[1]) <= rows.last_rows[:, None]
        torch.testing.assert_close(rows.inputs_embeds[real], spy.target.embed(rows.token_ids[real]))


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_stored_also_of_a_table_that_is_offloaded(name):
    target, ids = make(name), torch.arange(6).view(2, 3)
    stored = target.get_input_embeddings().weight[ids].clone()
    cpu_offload(target, execution_device=torch.device("cpu"))
    assert target.get_input_embeddings().weight.is_meta
    assert torch.equal(look_up(target, ids, 2.0), 2 * stored)
    assert target.get_input_embeddings().weight.is_meta


def test_factor_that_the_model_around_a_text_model_does_not_heed_is_none():
    # Granite's own class divides logits, LLaVA's around Granite does not.
    target, inputs = make_target("llava"), make_inputs("llava", (1,))
    text_config = GraniteConfig(**FIELDS, embedding_multiplier=12.0, logits_scaling=8.0)
    config = LlavaConfig(**target.config.to_dict() | {"text_config": text_config.to_dict()})
    torch.manual_seed(0)
    target = LlavaForConditionalGeneration(config).eval()
    target.generate(**inputs, max_new_tokens=3, do_sample=False, assistant_model=make_draft(target))
    assert scales_of(target) == Scales(embeddings=12.0)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_given_as_embeddings_are_told_as_text(name):
    target, inputs = make(name), make_inputs("llama", (4, 9))
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    assert is_embedded_token(embeds, target.get_input_embeddings()).all()
    embeds[1, -3] += 0.1  # such a row is no token's
    spy = Spy(make_draft(target))
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    drafted = target.generate(**call, max_new_tokens=8, do_sample=False, assistant_model=spy)
    assert torch.equal(drafted, target.generate(**call, max_new_tokens=8, do_sample=False))
    visual = spy.rows[0].visual_mask
    assert visual.sum(-1).tolist() == [0, 1]
    assert scales_of(target) == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_training_finds_the_scales(name):
    target, inputs = make(name), make_inputs("llama", (4, 9))
    read, features = hidden_states(target, dict(inputs), [])
    assert scales_of(target) == MODELS[name][1]
    with torch.no_grad():
        outputs = target(**inputs, output_hidden_states=True)
    torch.testing.assert_close(read, outputs.hidden_states[0])
    torch.testing.assert_close(logits_of(target, features), outputs.logits, atol=1e-4, rtol=1e-4)


def odd_embeddings(target: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings some of which are no token's, beside ids of which some stand for none."""
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[:, -4] = torch.randn(embeds.shape[-1])
    return {"inputs_embeds": embeds, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([2]), -200)}


# First prompts from which a model's scales can't be told, or not from all of their rows, and what is found then.
ODD_PROMPTS = {
    "one token": (lambda target, inputs: {"input_ids": inputs["input_ids"][:, -1:]}, True),
    "no token's": (lambda target, inputs: {"inputs_embeds": torch.randn(1, 9, target.config.hidden_size)}, False),
    "some no token's": (odd_embeddings, True),
    "a row of zeros": (
        lambda target, inputs: {
            "input_ids": torch.zeros(1, 1, dtype=torch.long),
            "attention_mask": torch.ones(1, 1, dtype=torch.long),
        },
        False,
    ),
}


@pytest.mark.parametrize("name", ODD_PROMPTS)
def test_odd_first_prompts_spoil_nothing(name):
    target, inputs = make("granite"), make_inputs("llama", (4,))
    make_prompt, is_found = ODD_PROMPTS[name]
    prompt, draft = make_prompt(target, inputs), make_draft(target)
    call = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(target.generate(**prompt, **call, assistant_model=draft), target.generate(**prompt, **call))
    assert scales_of(target) == (MODELS["granite"][1] if is_found else Scales())
    target.generate(**inputs, **call, assistant_model=draft)
    assert scales_of(target) == MODELS["granite"][1]


def test_compiled_drafting_takes_up_scales_that_are_found_later(monkeypatch):
    target, inputs = make("granite"), make_inputs("llama", (4,))
    draft = make_draft(target)
    draft.tree_config = TreeConfig(num_nodes=6, depth=3, top_k=2, gate=False)
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
    call = {"max_new_tokens": 6, "do_sample": False, "compile_config": compiled}
    runtime, trees, make_tree = StaticRuntime(draft), [], MSDCandidateGenerator.draft
    monkeypatch.setattr(
        MSDCandidateGenerator,
        "draft",
        lambda self, committed: trees.append(make_tree(self, committed)) or trees[-1],
    )
    nobodys = torch.randn(1, inputs["input_ids"].shape[1], target.config.hidden_size)
    target.generate(inputs_embeds=nobodys, **call, assistant_model=runtime)
    drafted = []
    for assistant in (runtime, StaticRuntime(draft)):
        trees.clear()
        target.generate(**inputs, **call, assistant_model=assistant)
        drafted.append([tree.token_ids for tree in trees])
    assert all(torch.equal(*both) for both in zip(*drafted, strict=True))


class Buffered(torch.nn.Module):
    """A head without parameters, as quantised ones are."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.register_buffer("weight", head.weight.detach())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weight.T


def test_heads_of_all_kinds_and_numbers_that_are_none_do_not_matter():
    call = {"max_new_tokens": 6, "do_sample": False}
    inputs = make_inputs("llama", (4,))
    target = make("granite")
    target.lm_head = Buffered(target.lm_head)
    draft = make_draft(target)
    assert torch.equal(target.generate(**inputs, **call, assistant_model=draft), target.generate(**inputs, **call))
    assert scales_of(target) == MODELS["granite"][1]
    target = make("granite", torch.float16)
    with torch.no_grad():
        target.model.norm.weight.mul_(3e4)  # features overflow
    draft = make_draft(target).half()
    assert torch.equal(target.generate(**inputs, **call, assistant_model=draft), target.generate(**inputs, **call))
    assert scales_of(target) == Scales()


def test_pictures_without_tokens_are_answered():
    model = make_model("git")
    prompt = {name: value[1:2] for name, value in make_prompts(model, "pictures").items()}
    call = {"max_new_tokens": 6, "do_sample": False}
    drafted = model.generate(**prompt, **call, assistant_model=make_draft(model))
    assert torch.equal(drafted, model.generate(**prompt, **call))
