"""A draft model of its own sees what the target sees, keeps its cache, and never changes a token."""

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from zoo import ARCHITECTURES, IMAGE_ID, TEXT, make_draft_model, make_inputs, make_target

from transformers_msd import EnsembleDrafter, TreeConfig, VLMDrafter
from transformers_msd.compat import CACHE
from transformers_msd.drafters.draft_model import DraftModel


TREE = TreeConfig(num_nodes=9, depth=4, top_k=2, gate=False, ngrams=False)
# A tree would try what is likeliest over the whole path, a chain what the target says next.
CHAIN = TreeConfig(num_nodes=5, depth=4, top_k=1, gate=False, ngrams=False)
NUM_TOKENS = 24


def generate(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return target.generate(**inputs, return_dict_in_generate=True, **{"max_new_tokens": NUM_TOKENS} | kwargs)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_images", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_target_drafting_for_itself_is_always_right(architecture, num_images, do_sample):
    target = make_target(architecture)
    inputs = make_inputs(architecture, num_images)
    plain = generate(target, inputs, do_sample=do_sample)
    # A copy: models with several position axes keep some of them on the model.
    drafter = VLMDrafter(copy.deepcopy(target), tree_config=CHAIN)
    drafted = generate(target, inputs, do_sample=do_sample, assistant_model=drafter)
    assert torch.equal(drafted.sequences, plain.sequences)
    lengths = drafted.speculative_stats.acceptance_lengths
    assert (lengths[:-1] == CHAIN.depth + 1).all(), lengths


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_accept_different_numbers_keep_their_place(architecture, do_sample):
    target = make_target(architecture)
    inputs = make_inputs(architecture, (2, 0, 1))
    plain = generate(target, inputs, do_sample=do_sample, max_new_tokens=40)
    drafter = VLMDrafter(make_draft_model(architecture), tree_config=TREE)
    drafted = generate(target, inputs, do_sample=do_sample, max_new_tokens=40, assistant_model=drafter)
    assert torch.equal(drafted.sequences, plain.sequences)
    lengths = drafted.speculative_stats.acceptance_lengths
    assert (lengths != lengths[:, :1]).any()
    assert drafted.speculative_stats.mean_acceptance_length > 1.5


def test_several_rows_of_one_prompt():
    target = make_target("llava")
    inputs = make_inputs("llava", (1, 2))
    options = {"do_sample": True, "num_return_sequences": 3}
    plain = generate(target, inputs, **options)
    drafted = generate(target, inputs, **options, assistant_model=VLMDrafter(copy.deepcopy(target), tree_config=CHAIN))
    assert torch.equal(drafted.sequences, plain.sequences)
    assert (drafted.speculative_stats.acceptance_lengths[:-1] == CHAIN.depth + 1).all()


def test_draft_sees_the_picture():
    model = make_target("llava")
    inputs = make_inputs("llava", (1,))
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0, 1, 2, 3) + 1}
    token = torch.tensor([[5]])
    with torch.no_grad():
        first, again, swapped = (
            DraftModel.start(model, prompt).extend(token, torch.tensor([1]), [1]) for prompt in (inputs, inputs, other)
        )
    assert torch.equal(first, again)
    assert (first - swapped).abs().max() > 1e-2
    seeing = generate(model, inputs, assistant_model=VLMDrafter(model, tree_config=TREE))
    misled = generate(model, inputs, assistant_model=VLMDrafter(model, draft_inputs=other, tree_config=TREE))
    assert torch.equal(seeing.sequences, misled.sequences)
    taus = [output.speculative_stats.mean_acceptance_length for output in (seeing, misled)]
    assert taus[0] > taus[1]


def test_picture_is_encoded_once_and_the_tree_is_not_run_again():
    target = make_target("llava")
    draft = copy.deepcopy(target)
    encoded, widths = [], []
    draft.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    draft.lm_head.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    generate(target, make_inputs("llava", (1,)), assistant_model=VLMDrafter(draft, tree_config=CHAIN))
    assert sum(encoded) == 1
    # The first round runs the root and three levels; every other one the leaf, which was accepted unseen, and the
    # root, and again three levels.
    prefill, *rounds = widths
    assert prefill == 1
    assert rounds[:4] == [1, 1, 1, 1]
    assert rounds[4:8] == [2, 1, 1, 1]


def test_language_model_drafts_from_the_text_alone():
    torch.manual_seed(3)
    draft = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    target = make_target("llava")
    inputs = make_inputs("llava", (2, 0, 1))
    seen = []
    draft.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    drafted = generate(target, inputs, assistant_model=VLMDrafter(draft, tree_config=TREE))
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)
    text = [[token for token in row if token not in (IMAGE_ID, 0)] for row in inputs["input_ids"].tolist()]
    assert [[token for token in row if token != 0] for row in seen[0].tolist()] == text


@pytest.mark.parametrize("vocab_size", [92, 100])
def test_vocabularies_may_be_padded_differently(vocab_size):
    torch.manual_seed(3)
    draft = LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": vocab_size})).eval()
    target = make_target("llama")
    inputs = make_inputs("llama", (1, 1))
    drafted = generate(target, inputs, assistant_model=VLMDrafter(draft, tree_config=TREE))
    assert torch.equal(drafted.sequences, generate(target, inputs).sequences)


def test_another_vocabulary_raises():
    draft = LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": 2000})).eval()
    with pytest.raises(ValueError, match="got 2000 tokens for the draft and 96"):
        generate(make_target("llava"), make_inputs("llava", (1,)), assistant_model=VLMDrafter(draft))


def test_embeddings_alone_need_draft_inputs():
    target = make_target("llama")
    ids = make_inputs("llama", (1,))["input_ids"]
    embeds = {"inputs_embeds": target.get_input_embeddings()(ids)}
    with pytest.raises(ValueError, match="got no `input_ids`"):
        generate(target, embeds, assistant_model=VLMDrafter(target))
    drafter = VLMDrafter(copy.deepcopy(target), draft_inputs={"input_ids": ids}, tree_config=CHAIN)
    drafted = generate(target, embeds, assistant_model=drafter)
    assert torch.equal(drafted.sequences, generate(target, embeds).sequences)
    assert (drafted.speculative_stats.acceptance_lengths[:-1] == CHAIN.depth + 1).all()


@pytest.mark.parametrize("architecture", ["llama", "llava", "qwen2_5_vl"])
def test_second_turn_goes_on_in_the_drafts_cache(architecture):
    target = make_target(architecture)
    inputs = make_inputs(architecture, (1, 1))
    draft = copy.deepcopy(target)
    drafter = VLMDrafter(draft, tree_config=CHAIN)
    first = generate(target, inputs, assistant_model=drafter)
    torch.manual_seed(5)
    ids = torch.cat([first.sequences, torch.randint(3, 80, (2, 6))], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    turn["attention_mask"][:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
    widths = []
    head = draft.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    plain = generate(target, turn, **{CACHE: copy.deepcopy(first[CACHE])})
    second = generate(target, turn, **{CACHE: first[CACHE]}, assistant_model=drafter)
    assert torch.equal(second.sequences, plain.sequences)
    assert (second.speculative_stats.acceptance_lengths[:-1] == CHAIN.depth + 1).all()
    assert max(widths) < 6 + CHAIN.depth + 3  # the prompt is not run again


@pytest.mark.parametrize("drafter_class", [VLMDrafter, EnsembleDrafter])
def test_two_threads_share_a_drafter(drafter_class):
    target = make_target("llava")
    drafter = drafter_class(make_draft_model("llava"), tree_config=TREE)
    prompts = [make_inputs("llava", (1,), seed=seed) for seed in range(2)]
    plain = [generate(target, prompt).sequences for prompt in prompts]
    results: dict[tuple[int, int], torch.Tensor] = {}

    def work(number: int) -> None:
        for attempt in range(3):
            output = target.generate(**prompts[number], max_new_tokens=NUM_TOKENS, assistant_model=drafter)
            results[number, attempt] = output

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number, attempt], plain[number]) for number in range(2) for attempt in range(3))


# Pictures of each as the other does not take them, although both have the same token for them.
@pytest.mark.parametrize(("name", "other"), [("llava", "llava_next"), ("llava_next", "llava"), ("qwen2_vl", "llava")])
def test_a_draft_that_cannot_read_the_pictures_of_another_says_what_to_pass(name, other):
    target, draft = make_target(name), make_draft_model(other)
    inputs, drafter = make_inputs(name, (1,)), VLMDrafter(draft)
    classes = f"made for {type(target).__name__}, got {type(draft).__name__}, which could not: .*: `draft_inputs=...`"
    with pytest.raises(ValueError, match=classes) as raised:
        generate(target, inputs, assistant_model=drafter)
    assert raised.value.__cause__ is not None
    # What its own processor makes is read, and so are prompts without pictures.
    for own, settings in ((inputs, {"draft_inputs": make_inputs(other, (1,))}), (make_inputs(name, (0,)), {})):
        drafted = generate(target, own, assistant_model=VLMDrafter(draft, **settings))
        assert torch.equal(drafted.sequences, generate(target, own).sequences)
    # Other errors stay as they are.
    for wrong, settings in ((make_inputs(name, (0,)), {}), (inputs, {"draft_inputs": make_inputs(other, (1,))})):
        broken = copy.deepcopy(draft)
        broken.register_forward_pre_hook(lambda *args: {}["a key"])
        with pytest.raises(KeyError, match="a key"):
            generate(target, wrong, assistant_model=VLMDrafter(broken, **settings))
