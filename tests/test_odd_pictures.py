"""Pictures that are masked, missing, said by the model itself or new in a later turn change no token of a draft."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import IMAGE_ID, VIDEO_ID, make_draft_model, make_inputs, make_target

from training.evidence.tiny import make_model, make_prompts
from transformers_msd import (
    Caption,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    Prompts,
    TextOnly,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.compat import CACHE
from transformers_msd.drafters.prompts import prompt_of


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
LLAVAS = ("llava", "llava_next")
QWENS = ("qwen2_vl",)
Inputs = dict[str, torch.Tensor]


def msd(architecture: str) -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(make_target(architecture).config)).eval()
    draft.tree_config = TREE
    return draft


def ensemble(architecture: str) -> EnsembleDrafter:
    views = ("multimodal", "text_only", Caption((8, 9)), *(["pooled"] if architecture in LLAVAS else []))
    return EnsembleDrafter(make_draft_model(architecture), views=views, tree_config=TREE)


DRAFTERS: dict[str, Callable[[str], Any]] = {
    "msd": msd,
    "vlm": lambda architecture: VLMDrafter(make_draft_model(architecture), tree_config=TREE),
    "ensemble": ensemble,
    "text": lambda architecture: EnsembleDrafter(make_draft_model("llama"), views=("text_only",), tree_config=TREE),
}


def image_columns(inputs: Inputs, row: int = 0) -> torch.Tensor:
    return (inputs["input_ids"][row] == IMAGE_ID).nonzero()[:, 0]


def masked(inputs: Inputs, columns: slice) -> Inputs:
    """Mask some of the image tokens of the first prompt."""
    mask = inputs["attention_mask"].clone()
    mask[0, image_columns(inputs)[columns]] = 0
    return inputs | {"attention_mask": mask}


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name not in names}


def and_say(inputs: Inputs, *token_ids: int) -> Inputs:
    """Let tokens stand behind a prompt."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([token_ids])], dim=1)
    types = {"mm_token_type_ids": (ids == IMAGE_ID).int()} if "mm_token_type_ids" in inputs else {}
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | types


def video(inputs: Inputs) -> Inputs:
    inputs = and_say(inputs, *[VIDEO_ID] * 4, 5)
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    types = 2 * (inputs["input_ids"] == VIDEO_ID).int()
    return inputs | {
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": types,
    }


CASES: dict[str, tuple[tuple[str, ...], Callable[[str], Inputs]]] = {
    "half a picture masked": (LLAVAS, lambda name: masked(make_inputs(name), slice(2))),
    "the middle masked": (LLAVAS, lambda name: masked(make_inputs(name), slice(1, 2))),
    "a picture masked": ((*LLAVAS, *QWENS), lambda name: masked(make_inputs(name), slice(None))),
    "half of two masked": (LLAVAS, lambda name: masked(make_inputs(name, (2, 0, 1)), slice(-2, None))),
    "the first of two masked": (LLAVAS, lambda name: masked(make_inputs(name, (2, 1)), slice(4))),
    "said without pictures": ((*LLAVAS, *QWENS), lambda name: and_say(make_inputs(name, (0,)), 5, IMAGE_ID, 7)),
    "no pixels": ((*LLAVAS, *QWENS), lambda name: without(make_inputs(name), "pixel_values")),
    "no pixels and no sizes": (
        (*LLAVAS, *QWENS),
        lambda name: without(make_inputs(name), "pixel_values", "image_grid_thw", "image_sizes", "mm_token_type_ids"),
    ),
    "sizes of no picture": (
        QWENS,
        lambda name: make_inputs(name, (0,)) | {"image_grid_thw": torch.tensor([[1, 4, 4]])},
    ),
    "no types of tokens": (QWENS, lambda name: without(make_inputs(name, (2, 0, 1)), "mm_token_type_ids")),
    "a picture alone": (
        LLAVAS,
        lambda name: {
            key: value if key in ("pixel_values", "image_sizes") else value[:, image_columns(make_inputs(name))]
            for key, value in make_inputs(name).items()
        },
    ),
}


def assert_plain(architecture: str, inputs: Inputs, assistant: Any, **settings: Any) -> None:
    target, sequences = make_target(architecture), []
    for each in (None, assistant):
        torch.manual_seed(0)
        sequences.append(
            target.generate(
                **inputs, max_new_tokens=8, do_sample=True, **copy.deepcopy(settings), assistant_model=each
            )
        )
    assert torch.equal(*sequences)


@pytest.mark.parametrize("drafter", ["vlm", "ensemble", "text"])
@pytest.mark.parametrize(
    ("case", "architecture"), [(case, name) for case, (names, _) in CASES.items() for name in names]
)
def test_pictures_as_they_come_change_no_token(case: str, architecture: str, drafter: str) -> None:
    assert_plain(architecture, CASES[case][1](architecture), DRAFTERS[drafter](architecture))


@pytest.mark.parametrize("architecture", QWENS)
def test_a_video_is_drafted_for_or_refused(architecture: str) -> None:
    inputs = video(make_inputs(architecture, (0,)))
    for drafter in ("msd", "vlm"):
        assert_plain(architecture, inputs, DRAFTERS[drafter](architecture))
    with pytest.raises(ValueError, match="got `pixel_values_videos`"):
        assert_plain(architecture, inputs, ensemble(architecture))


class SayImage:
    """Lets a model say the image token at one step."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            scores = scores.index_fill(1, torch.tensor(IMAGE_ID), float(scores.max()) + 100)
        return scores


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("has_state", [False, True], ids=["without state", "with state"])
@pytest.mark.parametrize(
    ("architecture", "tail"),
    # Transformers finds no positions for a picture that Qwen2-VL gets later.
    [*((name, tail) for name in ("llava", "qwen2_vl") for tail in ("text", "image token")), ("llava", "picture")],
)
def test_what_a_model_said_itself_and_what_comes_later_change_no_token(
    architecture: str, has_state: bool, tail: str, drafter: str
) -> None:
    target, inputs, assistant = make_target(architecture), make_inputs(architecture), DRAFTERS[drafter](architecture)
    length = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 5, "do_sample": False, "logits_processor": [SayImage(length + 2)]}
    first = target.generate(
        **inputs, **settings, return_dict_in_generate=True, assistant_model=assistant if has_state else None
    )
    assert first.sequences[0, length + 2] == IMAGE_ID
    said = {name: inputs[name] for name in inputs if name == "mm_token_type_ids"} | {"input_ids": first.sequences}
    turn = and_say(said, *{"text": [5], "image token": [5, IMAGE_ID], "picture": [5]}[tail], 7)
    if tail == "picture":
        later = make_inputs(architecture, seed=4)
        turn = and_say(turn, *[IMAGE_ID] * len(image_columns(later)), 6)
        turn |= {name: later[name] for name in later if name in ("pixel_values", "image_sizes")}
    assert_plain(architecture, turn, assistant, **{CACHE: first[CACHE]})


# By what each of them takes its pictures as.
@pytest.mark.parametrize("name", ["llava", "video_llava", "fuyu"])
def test_a_new_picture_in_a_later_turn_changes_no_token_of_any_kind_of_pixels(name: str) -> None:
    target = make_model(name)
    inputs = make_prompts(target, "pictures", (8,))
    settings = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    sequences = []
    for assistant in (None, VLMDrafter(target, tree_config=TREE)):
        first = target.generate(**inputs, **settings, return_dict_in_generate=True, assistant_model=assistant)
        ids = torch.cat([first.sequences, inputs["input_ids"]], dim=1)
        turn = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: first[CACHE]}
        sequences.append(target.generate(**turn, **settings, assistant_model=assistant))
    assert torch.equal(*sequences)


def test_the_pictures_of_a_call_stand_where_its_cache_ends() -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    turn = and_say(inputs, 5, IMAGE_ID, *[IMAGE_ID] * 4, 6)
    seen = prompt_of(target, target, turn, num_new=5)
    assert image_columns(seen).tolist() == list(range(seen["input_ids"].shape[1]))[-5:-1]
    assert seen["attention_mask"][0].tolist() == [1, 1, 0, 0, 0, 0, *[1] * 7, 0, *[1] * 5]
    assert torch.equal(turn["input_ids"], and_say(inputs, 5, IMAGE_ID, *[IMAGE_ID] * 4, 6)["input_ids"])


def test_neighbours_of_different_sizes_are_told_apart() -> None:
    model = make_target("llava_next")
    inputs = make_inputs("llava_next", (2,))
    inputs["image_sizes"] = torch.tensor([[8, 16], [8, 8]])
    with torch.no_grad():
        sizes = [len(picture) for picture in Prompts(model, inputs).pictures]
        assert len(set(sizes)) == 2
        ids = [[1, 5, *[IMAGE_ID] * sum(sizes), 7]]
        inputs |= {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, len(ids[0]), dtype=torch.long)}
        prompts = Prompts(model, inputs)
        assert len(TextOnly((7, 8))(prompts)[0].inputs_embeds) == 3 + 2 * 2
    for drafter in ("vlm", "ensemble"):
        assert_plain("llava_next", inputs, DRAFTERS[drafter]("llava_next"))
