"""Noting the rounds of a call while it runs."""

import time
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from transformers_msd.call.emission import Emission
from transformers_msd.tracing.pictures import PIXELS
from transformers_msd.tracing.rounds import TracedRound, TracedRow, log_probabilities, read_trees, rounded
from transformers_msd.traits.tokens import visual_token_ids
from transformers_msd.trees.host import synchronize
from transformers_msd.trees.tree import TokenTree
from transformers_msd.trees.verify import Acceptance


class Untraced:
    """Stands in a call that nobody traces: notes nothing, asks no device, waits for none."""

    def mark(self, part: str) -> None:
        """
        Note that a part of a round has ended.

        Args:
            part (`str`):
                `"draft"`, `"verify"` or `"rest"`.
        """

    def drafted(self, tree: TokenTree, is_resting: bool) -> None:
        """
        Note what the draft made, before anything is grafted on it.

        Args:
            tree ([`TokenTree`]):
                The trees.
            is_resting (`bool`):
                Whether the draft rests, and these are roots alone.
        """

    def note(
        self,
        tree: TokenTree,
        choices: torch.Tensor,
        scores: torch.Tensor,
        acceptance: Acceptance,
        emission: Emission,
    ) -> None:
        """
        Note a round whose tokens were emitted just now.

        Args:
            tree ([`TokenTree`]):
                The trees that were verified.
            choices (`torch.Tensor` of shape `(num_trees, num_nodes)`):
                The target's token after every node.
            scores (`torch.Tensor` of shape `(num_trees, num_nodes, vocab_size)`):
                Scores that they were chosen from.
            acceptance ([`Acceptance`]):
                Which nodes stand.
            emission ([`Emission`]):
                The tokens of the call.
        """

    def finish(self, emission: Emission) -> None:
        """
        Drop the tokens that did not stand in the end.

        Args:
            emission ([`Emission`]):
                The tokens of the call.
        """


class TracedCall(Untraced):
    """
    One call of `generate`, as numbers on the host. While it runs the device is waited for after every part of a round,
    so that times are those of the parts.

    Args:
        target (`PreTrainedModel`):
            The model that generates.
        drafter (`str`):
            What drafts for it.
        is_sampled (`bool`):
            Whether tokens are sampled.
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate`, pictures among them.
        prompt_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Ids of the prompts.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Which of them are no padding.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: str,
        is_sampled: bool,
        arguments: dict[str, Any],
        prompt_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> None:
        self.target, self.drafter, self.is_sampled = type(target).__name__, drafter, is_sampled
        self.device = prompt_ids.device
        self.visual_token_ids = visual_token_ids(target.config)
        given = {name: arguments[name] for name in PIXELS if name in arguments}
        # A trace outlives its calls: it takes no room on their device.
        self.pixels = {name: own.detach().cpu() if torch.is_tensor(own) else own for name, own in given.items()}
        real = torch.ones_like(prompt_ids)
        if torch.is_tensor(attention_mask) and attention_mask.ndim == 2:
            # A mask may cover rows that have no ids: those of `inputs_embeds`, or of a cache.
            before = attention_mask[:, : prompt_ids.shape[1]]
            real = pad(before, (0, prompt_ids.shape[1] - before.shape[1]), value=1)
        self.prompts = [
            [token_id for token_id, is_real in zip(*row, strict=True) if is_real]
            for row in zip(prompt_ids.tolist(), real.tolist(), strict=True)
        ]
        self.rounds: list[TracedRound] = []
        self._seconds = dict.fromkeys(("draft", "verify", "rest"), 0.0)
        self._lengths = [0] * len(prompt_ids)
        self._have_ended = [False] * len(prompt_ids)
        self._drafted: TokenTree | None = None
        self._is_resting = False
        self._wait()

    def mark(self, part: str) -> None:
        before = self._marked
        self._wait()
        self._seconds[part] += self._marked - before

    def _wait(self) -> None:
        synchronize(self.device)
        self._marked = time.perf_counter()

    def drafted(self, tree: TokenTree, is_resting: bool) -> None:
        self._drafted, self._is_resting = tree, is_resting

    def note(
        self,
        tree: TokenTree,
        choices: torch.Tensor,
        scores: torch.Tensor,
        acceptance: Acceptance,
        emission: Emission,
    ) -> None:
        found = read_trees(tree, self._drafted, choices, scores, self.is_sampled)
        kind = "drafted" if any(len(own.token_ids) > 1 for own in found.trees) else "plain"
        kind = kind if self.rounds else "prefill"
        starts, self._lengths = self._lengths, [len(tokens) for tokens in emission.tokens]
        for row, (start, length) in enumerate(zip(starts, self._lengths, strict=True)):
            if length < start:  # it had run ahead of its end
                self._cut(row, length)
        device = scores.device
        path = acceptance.path.to(device)
        chosen = log_probabilities(scores, path, acceptance.token_ids.clamp(min=0).to(device)).exp().tolist()
        paths, nums_accepted = path.tolist(), acceptance.num_accepted.tolist()
        noted: list[TracedRow | None] = [None] * len(starts)
        for place, row in enumerate(emission.rows):
            token_ids = emission.tokens[row][starts[row] :]
            if not token_ids or self._have_ended[row]:
                continue
            accepted = paths[place][1 : nums_accepted[place] + 1][: len(token_ids)]
            noted[row] = TracedRow(
                starts[row],
                token_ids,
                [rounded(probability) for probability in chosen[place][: len(token_ids)]],
                [found.places[place][node] for node in accepted],
                found.trees[place],
            )
        self.rounds.append(TracedRound(kind, self._is_resting, self._seconds, noted))
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._have_ended = emission.pad_rows
        self._drafted, self._is_resting = None, False
        self._wait()

    def _cut(self, row: int, length: int) -> None:
        """Drop what stands beyond the first tokens of a sequence."""
        for noted in self.rounds:
            if noted.rows[row] is not None:
                noted.rows[row].cut(length)
                if not noted.rows[row].token_ids:
                    noted.rows[row] = None

    def finish(self, emission: Emission) -> None:
        for row, tokens in enumerate(emission.tokens):
            self._cut(row, len(tokens))
