"""Views of a prompt: with its pictures, without, with small ones, or with words in their place (arXiv 2601.20357)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from transformers_msd.drafters.ensemble.readable import check_ids, check_no_video, encode
from transformers_msd.traits.tokens import visual_token_ids


@dataclass(frozen=True)
class ViewPrompt:
    """
    One prompt as a view shows it.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(length, hidden_size)`):
            Input embeddings of the draft model.
        position_ids (`torch.Tensor` of shape `(num_axes, length)`, *optional*):
            Positions where they don't just count, for models with several axes.
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor | None = None


class Prompts:
    """
    The prompts of a call, as a draft model can read them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The draft model.
        inputs (`dict[str, torch.Tensor]`):
            Prompts as for `generate`: `input_ids`, `attention_mask`, and what belongs to the pictures.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        check_no_video(inputs)
        self.model = model
        self.inputs = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        self.real = mask.bool()
        self.ids = [row[real] for row, real in zip(ids, self.real, strict=True)]
        # Where there are no pictures, tokens that would stand for them are read as any other.
        self.image_token_id = next(iter(visual_token_ids(model.config)), None) if self.num_pictures else None

    def embed(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Return the embeddings of tokens, of shape `(num_tokens, hidden_size)`."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.model.device)
        return self.model.get_input_embeddings()(ids)

    @property
    def num_pictures(self) -> int:
        """Pictures of all prompts; a later turn may tell the sizes of those that its cache has seen."""
        if "pixel_values" not in self.inputs:
            return 0
        for name in ("image_grid_thw", "image_sizes", "pixel_values"):
            if name in self.inputs:
                return len(self.inputs[name])
        return 0

    @cached_property
    def pictures(self) -> list[torch.Tensor]:
        """What the model makes of each picture, of shape `(num_tokens, hidden_size)`; encoded when first asked for."""
        return encode(self.model, self.inputs) if self.num_pictures else []

    def replace_pictures(self, replacements: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Embed all prompts, each picture's tokens replaced.

        Args:
            replacements (`list[torch.Tensor]`):
                What stands for each picture, of shape `(num_tokens, hidden_size)`, in the order of the pictures.
        """
        runs = [self._runs(*row) for row in zip(self.inputs["input_ids"], self.real, strict=True)]
        lengths = [len(run) for prompt in runs for run, _ in prompt if self._is_picture(run)]
        counts, rest, embedded = iter(self._pictures_per_run(lengths)), list(replacements), []
        for prompt in runs:
            pieces = [self.embed(())]
            for run, real in prompt:
                if self._is_picture(run):
                    own = [rest.pop(0) for _ in range(next(counts))]
                    # A picture all of whose tokens are masked is not seen.
                    seen = real.tensor_split(len(own)) if own else ()
                    pieces += [picture for picture, is_seen in zip(own, seen, strict=True) if is_seen.any()]
                else:
                    pieces.append(self.embed(run[real]))
            embedded.append(torch.cat(pieces))
        return embedded

    def _is_picture(self, run: torch.Tensor) -> bool:
        return self.image_token_id is not None and bool(run[0] == self.image_token_id)

    def _runs(self, ids: torch.Tensor, real: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Split ids, and which of them are real, where text ends and pictures begin, and the other way round."""
        is_picture = ids == (-1 if self.image_token_id is None else self.image_token_id)
        ends = (is_picture[1:] != is_picture[:-1]).nonzero()[:, 0] + 1
        return list(zip(*(torch.tensor_split(each, ends.cpu()) for each in (ids, real)), strict=True))

    def _pictures_per_run(self, lengths: list[int]) -> list[int]:
        """Tell how many pictures each run of image tokens holds."""
        if len(lengths) == self.num_pictures:
            return [1] * len(lengths)
        # By the sizes that the draft makes of them, or, where the target has others, as if all were of one size.
        ends, size = list(accumulate(lengths)), sum(lengths) // self.num_pictures
        for sizes in ([len(picture) for picture in self.pictures], [size] * self.num_pictures):
            places = [0, *accumulate(sizes)]
            if set(ends) <= set(places):
                return [stop - start for start, stop in pairwise([0, *map(places.index, ends)])]
        raise ValueError(
            f"Pictures of different sizes must have text between them, got {self.num_pictures} pictures in "
            f"{len(lengths)} places. Put a word between them, or use `VLMDrafter`."
        )


class View(Protocol):
    """Shows all prompts of a call in its own way; later turns whose views are equal go on with the draft's cache."""

    def __call__(self, prompts: Prompts) -> list[ViewPrompt]:
        """Return one `ViewPrompt` for each prompt."""


@dataclass(frozen=True)
class Multimodal:
    """The prompt as it is."""

    def __call__(self, prompts: Prompts) -> list[ViewPrompt]:
        embeds = prompts.replace_pictures(prompts.pictures)
        inputs = prompts.inputs
        # Without types of tokens a model counts positions.
        is_counted = not prompts.num_pictures or "mm_token_type_ids" not in inputs
        if is_counted or not hasattr(prompts.model.model, "get_rope_index"):
            return [ViewPrompt(rows) for rows in embeds]
        # Pictures have positions on several axes.
        positions, _ = prompts.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs.get("attention_mask"),
        )
        return [ViewPrompt(rows, positions[:, i, prompts.real[i]]) for i, rows in enumerate(embeds)]


@dataclass(frozen=True)
class TextOnly:
    """
    The text without its pictures.

    Args:
        replacement_ids (`tuple[int, ...]`, *optional*, defaults to `()`):
            Tokens in the place of each picture. The published drafts had a newline there.
    """

    replacement_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_ids(self.replacement_ids, "TextOnly.replacement_ids")

    def __call__(self, prompts: Prompts) -> list[ViewPrompt]:
        replacement = prompts.embed(self.replacement_ids)
        return [ViewPrompt(rows) for rows in prompts.replace_pictures([replacement] * prompts.num_pictures)]


@dataclass(frozen=True)
class Pooled:
    """
    The prompt with small pictures: the features of the vision tower averaged before the projector.

    Of pictures that a model cuts into tiles, the whole at low resolution is taken.

    Args:
        height, width (`int`, *optional*, defaults to 12):
            Visual tokens of a picture, vertically and horizontally.
    """

    height: int = 12
    width: int = 12

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`Pooled.{name}` must be a whole number, 1 at least, got {value!r}.")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise a `ValueError` for a model whose pictures can't be pooled."""
        if not (hasattr(model.model, "vision_tower") and hasattr(model.model, "multi_modal_projector")):
            raise ValueError(
                f"Pictures can be pooled in models of the LLaVA family, got {type(model).__name__}. Leave the view "
                "`pooled` out."
            )

    def __call__(self, prompts: Prompts) -> list[ViewPrompt]:
        return [ViewPrompt(rows) for rows in prompts.replace_pictures(self._pool(prompts))]

    def _pool(self, prompts: Prompts) -> list[torch.Tensor]:
        if prompts.num_pictures == 0:
            return []
        base, config = prompts.model.model, prompts.model.config
        pixels = prompts.inputs["pixel_values"].to(prompts.model.dtype)
        pixels = pixels[:, 0] if pixels.ndim == 5 else pixels
        layers = config.vision_feature_layer
        states = base.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        features = torch.cat(chosen, dim=-1)
        side = int(features.shape[1] ** 0.5)
        features = features[:, features.shape[1] - side**2 :]  # without a class token
        grid = features.transpose(1, 2).unflatten(-1, (side, side))
        pooled = F.adaptive_avg_pool2d(grid, (self.height, self.width)).flatten(2).transpose(1, 2)
        return list(base.multi_modal_projector(pooled))


@dataclass(frozen=True)
class Caption:
    """
    The text with captions in the place of its pictures.

    Args:
        ids (`tuple[int, ...]` or `Callable`):
            Tokens in the place of each picture, or a function of the call's inputs that returns one list of tokens for
            each picture.
    """

    ids: tuple[int, ...] | Callable[[Mapping[str, Any]], Sequence[Sequence[int]]]

    def __post_init__(self) -> None:
        if not callable(self.ids):
            check_ids(self.ids, "Caption.ids")

    def __call__(self, prompts: Prompts) -> list[ViewPrompt]:
        captions = [self.ids] * prompts.num_pictures
        if callable(self.ids) and captions:
            captions = self.ids(prompts.inputs)
        if len(captions) != prompts.num_pictures:
            raise ValueError(
                f"A caption is needed for each of {prompts.num_pictures} pictures, got {len(captions)}. Return one "
                "list of tokens for each."
            )
        return [ViewPrompt(rows) for rows in prompts.replace_pictures([prompts.embed(ids) for ids in captions])]


VIEWS: dict[str, Callable[[], View]] = {"multimodal": Multimodal, "text_only": TextOnly, "pooled": Pooled}


def left_pad(rows: list[ViewPrompt]) -> dict[str, torch.Tensor]:
    """Put prompts into one left-padded batch."""
    lengths = [len(row.inputs_embeds) for row in rows]
    longest = max(*lengths, 1)
    embeds = [F.pad(row.inputs_embeds, (0, 0, longest - length, 0)) for row, length in zip(rows, lengths, strict=True)]
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    batch = {"inputs_embeds": torch.stack(embeds), "attention_mask": mask.to(embeds[0].device)}
    if any(row.position_ids is not None for row in rows):
        num_axes = next(len(row.position_ids) for row in rows if row.position_ids is not None)
        counted = [torch.arange(length, device=mask.device).expand(num_axes, -1) for length in lengths]
        axes = [
            count if row.position_ids is None else row.position_ids.to(mask.device)
            for row, count in zip(rows, counted, strict=True)
        ]
        if num_axes == 3:  # the axis that counts tokens comes before those of the pictures
            axes = [torch.cat([count[:1], own]) for count, own in zip(counted, axes, strict=True)]
        padded = [F.pad(own, (longest - length, 0)) for own, length in zip(axes, lengths, strict=True)]
        batch["position_ids"] = torch.stack(padded, dim=1)
    return batch
