"""What a user asks for, and gets: the rounds of calls, as a page or as plain data."""

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.tracing.call import TracedCall, Untraced
from transformers_msd.tracing.page import render
from transformers_msd.tracing.pictures import data_url, seen_pictures
from transformers_msd.tracing.pieces import Pieces
from transformers_msd.tracing.rounds import TracedRow


_UNTRACED = Untraced()


class SpeculativeTrace:
    """
    Every round of the calls of `generate` that were drafted within [`speculative_trace`]. Notebooks show it as it is.

    Args:
        processor (`Any`, *optional*):
            Processor or tokenizer of the target; without one tokens are written as numbers.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Pictures of the prompts. By default they are made of what the target is given, which shows them as it sees
            them, where the processor is known and no other than LLaVA's or Qwen's order of pixels.

    Raises:
        ValueError: If either is something else.
    """

    def __init__(self, processor: Any = None, images: Sequence[Any] | None = None) -> None:
        # Told before the calls: after them it would be too late.
        if processor is not None and not hasattr(getattr(processor, "tokenizer", processor), "all_special_ids"):
            raise ValueError(
                "`processor` must be a tokenizer, or a processor that has one, got "
                f"{type(processor).__name__}. Load it by `AutoProcessor`, or leave it out."
            )
        if images is not None:
            images = list(images) if isinstance(images, Iterable) else [images]
            if wrong := [type(image).__name__ for image in images if not hasattr(image, "convert")]:
                raise ValueError(
                    f"`images` must be a list of PIL's pictures, got {', '.join(wrong)}. Open files by "
                    "`PIL.Image.open`."
                )
        self._processor, self._images = processor, images
        self._pieces = Pieces(processor)
        self.calls: list[TracedCall] = []

    def to_dict(self) -> dict[str, Any]:
        """Give all that the page shows as lists, numbers and texts, which JSON can hold."""
        return {"calls": [self._call(call) for call in self.calls]}

    def to_html(self) -> str:
        """
        Write the page: one file that needs nothing else.

        Raises:
            ValueError: If no call was traced.
        """
        return render(self._filled())

    def _filled(self) -> dict[str, Any]:
        if not self.calls:
            raise ValueError(
                "A trace must hold a call at least, got none. Call `generate` with an `assistant_model` of this "
                "package inside `with speculative_trace(processor) as trace:`, in the same thread."
            )
        return self.to_dict()

    def save(self, path: str | PathLike[str]) -> None:
        """
        Write a file.

        Args:
            path (`str` or `PathLike`):
                Where to. A name that ends in `.json` gets the data, any other the page.

        Raises:
            ValueError: If no call was traced.
        """
        is_data = Path(path).suffix.lower() == ".json"
        text = json.dumps(self._filled(), ensure_ascii=False) if is_data else self.to_html()
        Path(path).write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        return f"SpeculativeTrace({len(self.calls)} calls, {sum(len(call.rounds) for call in self.calls)} rounds)"

    def _repr_html_(self) -> str:
        if not self.calls:
            return html.escape(repr(self))
        # A page of its own: neither can style or script the other.
        return (
            f'<iframe srcdoc="{html.escape(self.to_html())}" sandbox="allow-scripts" title="Speculative trace" '
            'style="width: 100%; height: 860px; border: 0; border-radius: 8px"></iframe>'
        )

    def _call(self, call: TracedCall) -> dict[str, Any]:
        pictures = list(self._images) if self._images is not None else seen_pictures(call.pixels, self._processor)
        answers = [
            [token_id for each in call.rounds if each.rows[row] for token_id in each.rows[row].token_ids]
            for row in range(len(call.prompts))
        ]
        prompts = [self._prompt(call, prompt) for prompt in call.prompts]
        owners = self._owners(prompts, len(pictures))
        return {
            "target": call.target,
            "drafter": call.drafter,
            "device": call.device.type,
            "sampled": call.is_sampled,
            "pictures": [data_url(picture) for picture in pictures],
            "rows": [
                {"prompt": prompt, "pictures": owned, "num_tokens": len(answer)}
                for prompt, owned, answer in zip(prompts, owners, answers, strict=True)
            ],
            "rounds": [
                {
                    "kind": each.kind,
                    "rests": each.is_resting,
                    "seconds": {part: round(seconds, 6) for part, seconds in each.seconds.items()},
                    "rows": [
                        None if noted is None else self._row(noted, prompt, answer)
                        for noted, prompt, answer in zip(each.rows, call.prompts, answers, strict=True)
                    ],
                }
                for each in call.rounds
                if any(each.rows)
            ],
        }

    def _prompt(self, call: TracedCall, token_ids: list[int]) -> list[dict[str, Any]]:
        """Cut a prompt into text, and runs of tokens that stand for pictures."""
        parts = []
        for is_visual, run in groupby(token_ids, lambda token_id: token_id in call.visual_token_ids):
            run = list(run)
            parts.append({"num_visual": len(run)} if is_visual else {"text": "".join(self._pieces.of(run))})
        return parts

    def _owners(self, prompts: list[list[dict[str, Any]]], num_pictures: int) -> list[list[int]]:
        """Tell which pictures belong to which prompt; all to each, where their number is not that of the places."""
        nums = [sum("num_visual" in part for part in prompt) for prompt in prompts]
        if sum(nums) == num_pictures:
            return [list(range(sum(nums[:row]), sum(nums[: row + 1]))) for row in range(len(nums))]
        return [list(range(num_pictures)) for _ in nums]

    def _row(self, noted: TracedRow, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        before = [*prompt[-4:], *answer[: noted.start]][-4:]
        tree, texts = noted.tree, {-1: (before[:-1], "")}
        for node, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True)):
            path = texts[parent][0]
            texts[node] = ([*path, token_id][-4:], self._pieces.of([token_id], path)[0])
        bonus = None
        if len(noted.token_ids) > len(noted.accepted):
            bonus = {
                "token_id": noted.token_ids[-1],
                "piece": self._pieces.of(noted.token_ids[-1:], answer[: noted.start + len(noted.accepted)])[0],
                "target": noted.probabilities[-1],
            }
        return {
            "start": noted.start,
            "pieces": self._pieces.of(noted.token_ids, before),
            "special": [self._pieces.is_special(token_id) for token_id in noted.token_ids],
            "accepted": noted.accepted,
            "bonus": bonus,
            "tree": {
                "token_ids": tree.token_ids,
                "pieces": [texts[node][1] for node in range(len(tree.token_ids))],
                "parents": tree.parents,
                "draft": tree.draft,
                "target": tree.target,
                "ngram": [int(is_ngram) for is_ngram in tree.is_ngram],
            },
        }


_trace: ContextVar[SpeculativeTrace | None] = ContextVar("transformers_msd_trace", default=None)


@contextmanager
def speculative_trace(processor: Any = None, images: Sequence[Any] | None = None) -> Iterator[SpeculativeTrace]:
    """
    Note every round of the calls of `generate` that are drafted inside: the tokens stay as they are, and times grow.

    ```python
    >>> with speculative_trace(processor) as trace:
    ...     target.generate(**inputs, assistant_model=draft)
    >>> trace.save("trace.html")
    ```

    Calls of other threads are not noted, unless these run in a copy of this one's context (`contextvars`).

    Args:
        processor (`Any`, *optional*):
            Processor or tokenizer of the target; without one tokens are written as numbers.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Pictures of the prompts, in their order, as [`SpeculativeTrace`] has them.

    Returns:
        [`SpeculativeTrace`], which has a call as soon as it begins.
    """
    trace = SpeculativeTrace(processor, images)
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


def trace_call(
    target: PreTrainedModel,
    drafter: str,
    is_sampled: bool,
    arguments: dict[str, Any],
    prompt_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> Untraced:
    """
    Begin to note a call, where somebody asked for it.

    Args:
        target (`PreTrainedModel`):
            The model that generates.
        drafter (`str`):
            What drafts for it.
        is_sampled (`bool`):
            Whether tokens are sampled.
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate`.
        prompt_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Ids of the prompts.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Which of them are no padding.

    Returns:
        What notes the call, or does nothing.
    """
    trace = _trace.get()
    if trace is None:
        return _UNTRACED
    call = TracedCall(target, drafter, is_sampled, arguments, prompt_ids, attention_mask)
    trace.calls.append(call)
    return call
