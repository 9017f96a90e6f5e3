"""Drafting with several views of a prompt, or several models, at once (IbED; TABED, arXiv 2601.20357)."""

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import compress, product
from math import inf
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from transformers_msd.drafters.base import CallInputs
from transformers_msd.drafters.draft_model import DraftModel
from transformers_msd.drafters.ensemble.readable import check_encodes, check_no_video
from transformers_msd.drafters.ensemble.views import VIEWS, Multimodal, Pooled, Prompts, View, left_pad
from transformers_msd.drafters.model import ModelCandidateGenerator, ModelDrafter
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.tokens import visual_token_ids
from transformers_msd.trees.host import keep_rows, to_device
from transformers_msd.trees.tree import TreeConfig


WEIGHTINGS = ("kld", "tvd", "grid")
GRID_STEPS = 10
# As many as it takes to be quick; each is as large as what a view says.
MIXTURES_AT_A_TIME = 16
_EPSILON = 1e-6


class EnsembleDrafter(ModelDrafter):
    """
    Drafts with one small model that reads several views of the prompt as rows of one batch; the tree grows from the
    weighted mean of their probabilities.

    Args:
        draft_vlm ([`~transformers.PreTrainedModel`] or a sequence of them):
            A VLM or language model of the target's tokens, or several, each of which reads all views.
        views (`tuple[str | View, ...]`, *optional*, defaults to `("multimodal", "text_only")`):
            `"multimodal"`, `"text_only"`, `"pooled"`, or objects such as `Caption(ids)`, `Pooled(6, 6)`, your own.
        weights (`tuple[float, ...]` or `str`, *optional*, defaults to `"grid"`):
            A weight for each view of each model, the views of the first model first (equal ones are IbED), or how to
            find them from what the target said so far (TABED): `"grid"` takes those in steps of 0.1 that would most
            often have drafted its token, and of these the closest to its distribution; `"kld"` and `"tvd"` are the
            inverse of each view's divergence from it, Kullback-Leibler or total variation.
        window (`int`, *optional*, defaults to 0):
            Latest tokens that weights are found from; 0 takes all.
        draft_inputs (`dict[str, Any]`, *optional*):
            What the draft's own processor makes of the prompt, where it differs from the target's.
        tree_config ([`TreeConfig`], *optional*):
            Tree to draft, 32 nodes by default.
    """

    def __init__(
        self,
        draft_vlm: PreTrainedModel | Sequence[PreTrainedModel],
        views: Sequence[str | View] = ("multimodal", "text_only"),
        weights: Sequence[float] | str = "grid",
        window: int = 0,
        draft_inputs: Mapping[str, Any] | None = None,
        tree_config: TreeConfig | None = None,
    ) -> None:
        super().__init__(draft_vlm if isinstance(draft_vlm, Sequence) else [draft_vlm], draft_inputs, tree_config)
        if not isinstance(views, list | tuple) or not views or not all(map(_is_view, views)):
            raise ValueError(
                f"`views` must be some of {sorted(VIEWS)}, or objects that are called with a `Prompts`, got {views!r}."
            )
        self.views = tuple(VIEWS[view]() if isinstance(view, str) else view for view in views)
        num_weights = len(self.models) * len(self.views)
        if isinstance(weights, str):
            if weights not in WEIGHTINGS:
                raise ValueError(f"`weights` must be numbers or one of {WEIGHTINGS}, got {weights!r}.")
        elif (
            not isinstance(weights, list | tuple)
            or len(weights) != num_weights
            or not all(isinstance(weight, int | float) and 0 <= weight < inf for weight in weights)
            or not sum(weights)
        ):
            raise ValueError(
                f"`weights` must be {num_weights} numbers, none negative, not all 0, got {weights!r}. Give one for "
                "each view of each model."
            )
        if not isinstance(window, int) or isinstance(window, bool) or window < 0:
            raise ValueError(f"`window` must not be negative, and a whole number, got {window!r}. 0 takes all tokens.")
        self.weights = weights
        self.window = window

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        super().check_target(target, arguments)
        for model in self.models:
            if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
                raise ValueError(
                    f"Views are prompts of `inputs_embeds`, got {type(model).__name__}, whose `generate` takes none. "
                    "Use `VLMDrafter`, or another draft."
                )
        inputs = arguments if self.draft_inputs is None else self.draft_inputs
        check_no_video(inputs)
        if inputs.get("pixel_values") is not None:
            for view in self.views:
                for model in self.models:
                    if isinstance(view, Pooled) and visual_token_ids(model.config):
                        view.check_model(model)
                    if isinstance(view, Multimodal) and visual_token_ids(model.config):
                        check_encodes(model, inputs, Refusal)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "EnsembleCandidateGenerator":
        return EnsembleCandidateGenerator(self, target, inputs)


class EnsembleCandidateGenerator(ModelCandidateGenerator):
    """
    Grows trees from the mean of several views, weighted by how well each said what the target did.

    Args:
        drafter ([`EnsembleDrafter`]):
            Models, views and settings.
        target ([`Target`]):
            The target of the call.
        inputs ([`CallInputs`]):
            Inputs of the call.
    """

    def __init__(self, drafter: EnsembleDrafter, target: Target, inputs: CallInputs) -> None:
        # Further views are rows of the same forward, further models are forwards.
        more = len(drafter.models) * (1 + 0.25 * (len(drafter.views) - 1))
        self.assumed_level_cost = {device: cost * more for device, cost in self.assumed_level_cost.items()}
        super().__init__(drafter, target, inputs, drafter.views)
        # What the views said in the last round: after the root, then after each level of the tree.
        self._said: list[torch.Tensor] = []
        self._weights: torch.Tensor | None = None  # (num_views, batch_size)
        self._history: list[deque[torch.Tensor]] = []

    def start(self, batch_size: int) -> list[DraftModel]:
        self._said = []
        return super().start(batch_size)

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        prompts = Prompts(model, inputs)
        return left_pad([row for view in self._drafter.views for row in view(prompts)])

    def mix(self, logits: torch.Tensor) -> torch.Tensor:
        if self._weights is None:
            weights = self._drafter.weights
            weights = torch.ones(len(logits)) if isinstance(weights, str) else torch.tensor(weights)
            weights = (weights / weights.sum()).to(logits.device)
            self._weights = weights[:, None].expand(-1, logits.shape[1])
        self._said.append(logits)
        return (self._weights[..., None, None] * logits.float().softmax(-1)).sum(0).log()

    def keep_sequences(self, kept: list[bool]) -> bool:
        if not super().keep_sequences(kept):
            return False
        self._said = [keep_rows(logits, kept, dim=1) for logits in self._said]
        self._weights = keep_rows(self._weights, kept, dim=1)
        self._history = list(compress(self._history, kept))
        return True

    def observe(self, committed: Committed, logits: torch.Tensor, matched: torch.Tensor, rows: torch.Tensor) -> None:
        said, self._said = self._said, []
        if not said or not isinstance(self._drafter.weights, str):
            return
        device = logits.device
        num_tokens = committed.token_ids.shape[1]
        # Token i was predicted after token i - 1: the root of the last tree, a row of it, or a token run just now.
        said = torch.cat([*said, logits], dim=2)
        steps = torch.arange(num_tokens, device=device).expand(len(matched), -1)
        in_tree = pad(rows, (0, num_tokens - 1 - rows.shape[1])) + 1
        num_said = said.shape[2] - logits.shape[2]
        places = torch.where(steps[:, 1:] <= matched[:, None], in_tree, num_said + steps[:, 1:] - 1 - matched[:, None])
        places = torch.cat([torch.zeros_like(steps[:, :1]), places], dim=1).clamp(max=said.shape[2] - 1)
        index = places[None, ..., None].expand(len(said), -1, -1, said.shape[-1])
        views = said.gather(2, index).float().log_softmax(-1)
        truth = self._target.logits(committed.features).to(device).float().log_softmax(-1)
        self._learn(views, truth, committed.host_lengths)

    def _learn(self, views: torch.Tensor, truth: torch.Tensor, lengths: list[int]) -> None:
        """
        Find weights from distributions at tokens that came to stand.

        Args:
            views (`torch.Tensor` of shape `(num_views, batch_size, num_tokens, vocab_size)`):
                Log-probabilities of the views.
            truth (`torch.Tensor` of shape `(batch_size, num_tokens, vocab_size)`):
                Those of the target.
            lengths (`list[int]`):
                Tokens of each row.
        """
        measures = self._measure(views, truth)  # (num_candidates, batch_size, num_tokens, num_measures)
        if not self._history:
            self._history = [deque(maxlen=self._drafter.window or None) for _ in lengths]
        weights = list(self._weights.unbind(1))
        for row, length in enumerate(lengths):
            self._history[row].extend(measures[:, row, :length].unbind(1))
            if not self._history[row]:
                continue
            if not self._drafter.window:
                # All of the past is one sum.
                self._history[row] = deque([torch.stack(list(self._history[row])).sum(0)])
            weights[row] = self._choose(torch.stack(list(self._history[row])).sum(0), len(views))
        self._weights = torch.stack(weights, dim=1)

    def _measure(self, views: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Compare views, or mixtures of them, with the target, token by token."""
        probabilities = truth.exp()
        if self._drafter.weights == "tvd":
            return (views.exp() - probabilities).abs().sum(-1, keepdim=True)
        if self._drafter.weights == "kld":
            return _divergence(probabilities, truth, views)[..., None]
        best, said = truth.argmax(-1), views.exp()
        measures = []
        for weights in to_device(simplex(len(views)), views.device).split(MIXTURES_AT_A_TIME):
            mixed = torch.tensordot(weights, said, dims=1).log()
            misses = (mixed.argmax(-1) != best).float()
            measures.append(torch.stack([misses, _divergence(probabilities, truth, mixed)], dim=-1))
        return torch.cat(measures)

    def _choose(self, measured: torch.Tensor, num_views: int) -> torch.Tensor:
        """Choose weights by what was measured, of shape `(num_candidates, num_measures)`."""
        if self._drafter.weights == "grid":
            # Fewest misses first, then the least divergence.
            misses, divergence = measured.unbind(-1)
            divergence = divergence.masked_fill(misses > misses.min(), torch.inf)
            best = divergence.argmin(keepdim=True)  # an index of no dimension would be asked for
            return to_device(simplex(num_views), measured.device)[best][0]
        inverse = 1 / (measured[:, 0] + _EPSILON)
        return inverse / inverse.sum()


def _is_view(view: Any) -> bool:
    return view in VIEWS if isinstance(view, str) else callable(view) and not isinstance(view, type)


@cache
def simplex(num_views: int) -> torch.Tensor:
    """List all weights in steps of 0.1 that sum to 1, of shape `(num_weights, num_views)`."""
    counts = product(range(GRID_STEPS + 1), repeat=num_views)
    return torch.tensor([count for count in counts if sum(count) == GRID_STEPS]) / GRID_STEPS


def _divergence(probabilities: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the target's distribution from a draft's, tokens of probability 0 left out."""
    floor = torch.finfo(log_q.dtype).min / 4
    return (probabilities * (log_p.clamp(min=floor) - log_q.clamp(min=floor))).sum(-1)
