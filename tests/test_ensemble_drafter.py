"""Several views of a prompt draft together in one batch, each as if it were alone, and never change a token."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from zoo import IMAGE_ID, READ_EMBEDS, TEXT, make_draft_model, make_inputs, make_target

from training.evidence.tiny import FIRST_SPECIAL, make_model, make_prompts
from training.evidence.tiny_fields import VOCAB_SIZE
from transformers_msd import (
    Caption,
    EnsembleDrafter,
    Multimodal,
    Pooled,
    Prompts,
    TextOnly,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.compat import CACHE
from transformers_msd.drafters.draft_model import DraftModel
from transformers_msd.drafters.ensemble.drafter import EnsembleCandidateGenerator, simplex
from transformers_msd.drafters.ensemble.views import left_pad
from transformers_msd.drafters.prompts import prompt_of
from transformers_msd.traits.refusal import Refusal


TREE = TreeConfig(num_nodes=9, depth=4, top_k=2, gate=False, ngrams=False)
CHAIN = TreeConfig(num_nodes=5, depth=4, top_k=1, gate=False, ngrams=False)
LLAVAS = ("llava", "llava_next", "llava_onevision")
ALL_VIEWS = (Multimodal(), TextOnly((7,)), Pooled(1, 2), Caption((8, 9, 10)))


def views_of(architecture: str) -> tuple:
    return ALL_VIEWS if architecture in LLAVAS else tuple(view for view in ALL_VIEWS if not isinstance(view, Pooled))


def generate(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return target.generate(**inputs, return_dict_in_generate=True, **{"max_new_tokens": 24} | kwargs)


@torch.no_grad()
def logits_after(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    draft = DraftModel.start(model, inputs)
    token_ids = torch.full((len(draft.lengths), 2), 5)
    return draft.extend(token_ids, torch.full((len(token_ids),), 2), [2] * len(token_ids))


@pytest.mark.parametrize("architecture", READ_EMBEDS)
@torch.no_grad()
def test_each_view_says_in_the_batch_what_it_says_alone(architecture):
    model = make_target(architecture)
    prompts = Prompts(model, prompt_of(model, model, make_inputs(architecture, (2, 0, 1))))
    views = [view(prompts) for view in views_of(architecture)]
    together = logits_after(model, left_pad([row for rows in views for row in rows]))
    alone = torch.cat([logits_after(model, left_pad([row])) for rows in views for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", READ_EMBEDS)
def test_multimodal_view_is_the_prompt(architecture):
    model = make_target(architecture)
    inputs = prompt_of(model, model, make_inputs(architecture, (2, 0, 1)))
    with torch.no_grad():
        rows = Multimodal()(Prompts(model, inputs))
    torch.testing.assert_close(logits_after(model, left_pad(rows)), logits_after(model, inputs), atol=1e-4, rtol=1e-4)


def test_views_replace_every_picture():
    model = make_target("llava")
    prompts = Prompts(model, make_inputs("llava", (2, 0, 1)))
    text = [[token for token in ids.tolist() if token != IMAGE_ID] for ids in prompts.ids]
    lengths = {
        view: [len(row.inputs_embeds) - len(own) for row, own in zip(view(prompts), text, strict=True)]
        for view in ALL_VIEWS
    }
    assert list(lengths.values()) == [[8, 0, 4], [2, 0, 1], [4, 0, 2], [6, 0, 3]]
    assert [len(row.inputs_embeds) for row in TextOnly()(prompts)] == [len(own) for own in text]
    captions = Caption(lambda inputs: [(11,), (12, 13), (14, 15, 16)])(prompts)
    assert [len(row.inputs_embeds) - len(own) for row, own in zip(captions, text, strict=True)] == [3, 0, 3]
    # Nothing to caption, nobody to ask.
    assert len(Caption(lambda inputs: 1 / 0)(Prompts(model, make_inputs("llava", (0,))))) == 1
    with pytest.raises(ValueError, match="A caption is needed for each of 3 pictures, got 1"):
        Caption(lambda inputs: [(11,)])(prompts)


def test_pooled_view_averages_before_the_projector():
    model = make_target("llava")
    inputs = make_inputs("llava", (1,))
    prompts = Prompts(model, inputs)
    with torch.no_grad():
        # As many as there are: nothing is averaged.
        [same], [whole] = Pooled(2, 2)(prompts), Multimodal()(prompts)
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        mean = states[model.config.vision_feature_layer][:, 1:].mean(1)
        expected = model.model.multi_modal_projector(mean)
        [row] = Pooled(1, 1)(prompts)
    torch.testing.assert_close(same.inputs_embeds, whole.inputs_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row.inputs_embeds[2], expected[0], atol=1e-5, rtol=1e-5)


def test_pooling_another_family_raises():
    target = make_target("qwen2_vl")
    drafter = EnsembleDrafter(make_draft_model("qwen2_vl"), views=("multimodal", "pooled"))
    with pytest.raises(ValueError, match="Pictures can be pooled in models of the LLaVA family"):
        generate(target, make_inputs("qwen2_vl", (1,)), assistant_model=drafter)


# As on the fields of one colour of a chessboard each meets each, greedy and sampled, alone and in a batch in each run.
CELLS = [
    pytest.param(architecture, weights, num_images, do_sample, marks=pytest.mark.slow if sum(places) % 2 else ())
    for row, architecture in enumerate(READ_EMBEDS)
    for column, weights in enumerate(("equal", "kld", "tvd", "grid"))
    for num_images in ((1,), (2, 0, 1))
    for do_sample in (False, True)
    for places in ((row, column, len(num_images) // 2, do_sample),)
]


@pytest.mark.parametrize(("architecture", "weights", "num_images", "do_sample"), CELLS)
def test_tokens_equal_plain_generate(architecture, weights, num_images, do_sample):
    target = make_target(architecture)
    views = views_of(architecture)
    drafter = EnsembleDrafter(
        make_draft_model(architecture),
        views=views,
        weights=(1.0,) * len(views) if weights == "equal" else weights,
        window=4 if weights == "kld" else 0,
        tree_config=TREE,
    )
    inputs = make_inputs(architecture, num_images)
    plain = generate(target, inputs, do_sample=do_sample)
    drafted = generate(target, inputs, do_sample=do_sample, assistant_model=drafter)
    assert torch.equal(drafted.sequences, plain.sequences)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("architecture", READ_EMBEDS)
def test_target_as_its_own_view_is_always_right(architecture, do_sample):
    target = make_target(architecture)
    inputs = make_inputs(architecture, (2, 0, 1))
    drafter = EnsembleDrafter(copy.deepcopy(target), views=("multimodal",), weights=(1.0,), tree_config=CHAIN)
    drafted = generate(target, inputs, do_sample=do_sample, assistant_model=drafter)
    assert torch.equal(drafted.sequences, generate(target, inputs, do_sample=do_sample).sequences)
    assert (drafted.speculative_stats.acceptance_lengths[:-1] == CHAIN.depth + 1).all()


@pytest.mark.parametrize("weights", ["kld", "tvd", "grid"])
def test_weights_go_to_the_one_that_is_right(weights, monkeypatch):
    target = make_target("llama")
    torch.manual_seed(3)
    stranger = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    inputs = make_inputs("llama", (1, 1))
    learned = []
    learn = EnsembleCandidateGenerator._learn

    def spy(self, *args):
        learn(self, *args)
        learned.append(self._weights)

    monkeypatch.setattr(EnsembleCandidateGenerator, "_learn", spy)
    models = [stranger, copy.deepcopy(target)]
    drafter = EnsembleDrafter(models, views=("text_only",), weights=weights, tree_config=CHAIN)
    drafted = generate(target, inputs, assistant_model=drafter)
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)
    assert (learned[-1][1] > 0.95).all()
    equal = EnsembleDrafter(models, views=("text_only",), weights=(1, 1), tree_config=CHAIN)
    taus = [
        generate(target, inputs, assistant_model=assistant).speculative_stats.mean_acceptance_length
        for assistant in (drafter, equal)
    ]
    assert taus[0] > taus[1]


def test_weights_by_hand():
    drafter = EnsembleDrafter(make_draft_model("llama"), views=("text_only", TextOnly((5,))), weights="kld")
    generator = EnsembleCandidateGenerator.__new__(EnsembleCandidateGenerator)
    generator._drafter, generator._history, generator._weights = drafter, [], torch.full((2, 1), 0.5)
    truth = torch.tensor([[[0.5, 0.5]]]).log()
    views = torch.tensor([[[[0.5, 0.5]]], [[[0.25, 0.75]]]]).log()
    generator._learn(views, truth, [1])
    divergence = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    expected = torch.tensor([1 / 1e-6, 1 / (divergence + 1e-6)])
    torch.testing.assert_close(generator._weights[:, 0], expected / expected.sum())
    drafter.weights, generator._history = "grid", []
    # The target says token 1, the first view token 0, the second token 1: any mixture that says 1 is a match, and the
    # closest of these to the target's distribution is 0.3 of the first (0.3 * 0.9 + 0.7 * 0.2 = 0.41).
    truth, views = torch.tensor([[[0.4, 0.6]]]).log(), torch.tensor([[[[0.9, 0.1]]], [[[0.2, 0.8]]]]).log()
    generator._learn(views, truth, [1])
    torch.testing.assert_close(generator._weights[:, 0], torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize(("num_views", "num_weights"), [(1, 1), (2, 11), (3, 66), (4, 286)])
def test_grid_covers_the_simplex(num_views, num_weights):
    weights = simplex(num_views)
    assert weights.shape == (num_weights, num_views)
    torch.testing.assert_close(weights.sum(1), torch.ones(num_weights))


def test_second_turn_goes_on():
    target = make_target("llava")
    inputs = make_inputs("llava", (1, 1))
    drafter = EnsembleDrafter(
        copy.deepcopy(target), views=("multimodal", "text_only"), weights=(1, 0), tree_config=CHAIN
    )
    first = generate(target, inputs, assistant_model=drafter)
    ids = torch.cat([first.sequences, torch.randint(3, 80, (2, 6))], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    turn["attention_mask"][:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
    plain = generate(target, turn, **{CACHE: copy.deepcopy(first[CACHE])})
    second = generate(target, turn, **{CACHE: first[CACHE]}, assistant_model=drafter)
    assert torch.equal(second.sequences, plain.sequences)
    assert (second.speculative_stats.acceptance_lengths[:-1] == CHAIN.depth + 1).all()


@pytest.mark.parametrize("architecture", READ_EMBEDS)
def test_second_turn_on_a_cache_without_its_state_and_without_its_pictures(architecture):
    target, inputs = make_target(architecture), make_inputs(architecture, (2,))
    settings = {"suppress_tokens": [IMAGE_ID]}
    ids = torch.cat([generate(target, inputs, **settings).sequences, torch.tensor([[5, 6]])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # What tells the sizes of pictures or the types of tokens belongs to the text, too.
    turn |= {name: value for name, value in inputs.items() if name in ("image_grid_thw", "image_sizes")}
    if "mm_token_type_ids" in inputs:
        turn["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    plain, drafted = (
        generate(target, turn, **settings, **{CACHE: generate(target, inputs, **settings)[CACHE]}, assistant_model=it)
        for it in (None, EnsembleDrafter(make_draft_model(architecture), tree_config=TREE))
    )
    assert torch.equal(drafted.sequences, plain.sequences)


def test_a_video_is_refused_before_anything_runs():
    target, inputs, ran = make_target("qwen2_vl"), make_inputs("qwen2_vl", (0,)), []
    hook = target.register_forward_pre_hook(lambda *args: ran.append(1))
    inputs |= {"pixel_values_videos": torch.zeros(8, 24), "video_grid_thw": torch.tensor([[1, 2, 4]])}
    with pytest.raises(ValueError, match="got `pixel_values_videos`"):
        generate(target, inputs, assistant_model=EnsembleDrafter(make_draft_model("qwen2_vl")))
    hook.remove()
    assert not ran


def test_a_view_of_ones_own():
    class Shouted:
        """Says the text twice."""

        def __call__(self, prompts: Prompts) -> list:
            rows = TextOnly()(prompts)
            return [type(row)(row.inputs_embeds.repeat(2, 1)) for row in rows]

    target = make_target("llava")
    inputs = make_inputs("llava", (1,))
    drafter = EnsembleDrafter(make_draft_model("llava"), views=("multimodal", Shouted()), tree_config=TREE)
    drafted = generate(target, inputs, assistant_model=drafter)
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": ("sideways",)}, "`views` must be some of"),
        ({"views": ()}, "`views` must be some of"),
        ({"weights": (1.0,)}, "`weights` must be 2 numbers"),
        ({"weights": (0, 0)}, "`weights` must be 2 numbers"),
        ({"weights": "best"}, "`weights` must be numbers or one of"),
        ({"window": -1}, "`window` must not be negative"),
    ],
)
def test_wrong_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        EnsembleDrafter(make_draft_model("llava"), **settings)


def test_ensembles_and_single_drafts_agree_on_what_they_refuse():
    target = make_target("llama")
    embeds = {"inputs_embeds": target.get_input_embeddings()(make_inputs("llama", (1,))["input_ids"])}
    for drafter in (EnsembleDrafter(target, views=("text_only",)), VLMDrafter(target)):
        with pytest.raises(ValueError, match="got no `input_ids`"):
            generate(target, embeds, assistant_model=drafter)


# With a mask of the pieces of pictures, and with positions on four axes.
@pytest.mark.parametrize("name", ["granite_docling", "hunyuan_vl"])
def test_multimodal_view_of_models_that_say_more_of_pictures(name):
    model = make_model(name)
    inputs = make_prompts(model, "pictures")
    with torch.no_grad():
        rows = Multimodal()(Prompts(model, prompt_of(model, model, inputs)))
        said = logits_after(model, left_pad(rows)), logits_after(model, prompt_of(model, model, inputs))
    if name == "hunyuan_vl":  # the other's pictures enter at further layers, too, which a view leaves out
        torch.testing.assert_close(*said, atol=1e-4, rtol=1e-4)
    drafter = EnsembleDrafter(model, ("multimodal", "text_only"), (0.5, 0.5), tree_config=TREE)
    for do_sample in (False, True):
        settings = {"do_sample": do_sample, "suppress_tokens": list(range(FIRST_SPECIAL, VOCAB_SIZE))}
        drafted = generate(model, inputs, assistant_model=drafter, **settings)
        assert torch.equal(drafted.sequences, generate(model, inputs, **settings).sequences)


def test_pictures_that_only_layers_read_are_told():
    model = make_model("granite4_vision")
    with pytest.raises(ValueError, match="which gives what several of its layers read. Use `VLMDrafter`"):
        generate(model, make_prompts(model, "pictures"), assistant_model=EnsembleDrafter(model))


# Whose pictures views can't ask for, and why: by what its class has, or takes besides.
@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("janus", "has none"),
        ("emu3", "has none"),
        ("deepseek_vl", "has none"),
        ("molmo2", "needs .'image_token_pooling', 'image_grids'., too"),
    ],
)
def test_pictures_that_views_cannot_ask_for_are_told_before_anything_runs(name, lack):
    target = make_model(name)
    inputs, ran = make_prompts(target, "pictures", (8,)), []
    target.register_forward_pre_hook(lambda *args: ran.append(1))
    message = f"Views ask a draft for its pictures by `get_image_features`, got {type(target).__name__}, which {lack}"
    with pytest.raises(Refusal, match=message):
        generate(target, inputs, assistant_model=EnsembleDrafter(target))
    assert not ran
    with pytest.raises(ValueError, match=message):
        Prompts(target, inputs).pictures  # noqa: B018
    # Text is read, beside pictures, too.
    for views, own in (("multimodal", make_prompts(target, "", (8,))), ("text_only", inputs)):
        drafted = generate(target, own, assistant_model=EnsembleDrafter(target, views=(views,)))
        assert torch.equal(drafted.sequences, generate(target, own).sequences)
