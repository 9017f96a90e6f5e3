"""A target with layers that keep a state: nothing can be taken out of it, so what was accepted is run once more."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers.utils import ModelOutput

from transformers_msd.caches.blocks import holds_rows
from transformers_msd.caches.states import States
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.host import keep_rows, to_device
from transformers_msd.trees.masks import causal_mask, take_rows
from transformers_msd.trees.tree import TokenTree
from transformers_msd.trees.verify import Acceptance


# Tokens that run again with every tree, before they are run alone for once.
MOST_BEHIND = 12


@dataclass
class _Sequence:
    """
    How far one sequence has come, in generated tokens that have a row.

    Args:
        absorbed (`int`):
            Tokens that its states and the settled columns of its cache hold.
        standing (`int`):
            Tokens that have come to stand; those that are not absorbed run again with the next tree.
    """

    absorbed: int = 0
    standing: int = 0

    @property
    def num_behind(self) -> int:
        return self.standing - self.absorbed


class StatefulTarget(Target):
    """
    A target whose states stand still where a round did not accept all that it ran.

    States can't drop rejected tokens. They are put back to where they stood, and the tokens that were accepted run
    again at the head of the next forward, which reads the weights in any case. Trees are chains, for a state can't
    branch. Args as [`Target`] has them.
    """

    def _settle_prompt(self, batch_size: int, device: torch.device) -> None:
        super()._settle_prompt(batch_size, device)
        self._states, self._states_of_prompt = States(self.cache), States(self.cache)
        self._sequences = [_Sequence() for _ in range(batch_size)]
        self._standing = self.room.lengths
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def lengths(self) -> torch.Tensor:
        return self._standing

    @property
    def host_lengths(self) -> list[int]:
        return [self._prompt_length + sequence.standing for sequence in self._sequences]

    def fit(self, tree: TokenTree) -> TokenTree:
        # A filler would keep states from going on to the end of a chain.
        return super().fit(tree.chain()) if self._captures is not None else tree.chain().to(self.device)

    def forward_tree(self, tree: TokenTree) -> ModelOutput:
        behind = [own.num_behind for own in self._sequences]
        if tree.num_nodes == 1 and len(set(behind)) > 1:
            self._catch_up()  # else plain steps would go on with as many rows
        elif max(behind) > MOST_BEHIND:
            self._absorb(min(filter(None, behind)))
        behind = [own.num_behind for own in self._sequences]
        if not any(behind):
            return super().forward_tree(tree)
        # Accepted tokens, then the tree, then fillers: what comes later changes nothing before.
        places = to_device(behind, tree.token_ids.device)[:, None]
        places = places + torch.arange(tree.num_nodes, device=places.device)
        self.num_repeated += sum(behind)
        ids = pad(self._ids_behind(max(behind)), (0, tree.num_nodes)).scatter(1, places, tree.token_ids)
        outputs = self._forward(ids)
        outputs.logits = take_rows(outputs.logits, places.to(outputs.logits.device))
        outputs.hidden_states = tuple(
            None if own is None else take_rows(own, places.to(own.device)) for own in outputs.hidden_states
        )
        return outputs

    def _masks(self, visible: torch.Tensor) -> dict[str, torch.Tensor | None]:
        masks = super()._masks(visible)
        for name, layer in zip(self._layer_types, self.cache.layers, strict=True):
            if name in masks and not holds_rows(layer):
                masks[name] = None  # a state is read in order
        return masks

    def _ids_behind(self, num_rows: int) -> torch.Tensor:
        """Tokens of each sequence that have come to stand behind its states, `(batch_size, num_rows)`."""
        rows = [
            tokens[own.absorbed : own.standing][:num_rows]
            for tokens, own in zip(self._tokens, self._sequences, strict=True)
        ]
        return to_device([row + [0] * (num_rows - len(row)) for row in rows], self._standing.device)

    def _forward(self, ids: torch.Tensor) -> ModelOutput:
        return self.forward_rows(
            ids, torch.arange(ids.shape[1], device=ids.device), causal_mask(*ids.shape, ids.device)
        )

    def commit(
        self, tree: TokenTree, acceptance: Acceptance, outputs: ModelOutput, tokens: list[list[int]]
    ) -> Committed:
        self._tokens = [list(row) for row in tokens]
        self._num_nodes = tree.num_nodes
        return super().commit(tree, acceptance, outputs, tokens)

    def _settle(self, path: torch.Tensor, most: int, lengths: torch.Tensor, host_lengths: list[int]) -> None:
        num_rows = max(own.num_behind for own in self._sequences) + self._num_nodes  # of the forward
        for own, now in zip(self._sequences, host_lengths, strict=True):
            own.standing = now - self._prompt_length
        self._standing = lengths
        self._take_up(num_rows)

    def _take_up(self, num_rows: int) -> None:
        """Absorb the sequences of which all `num_rows` rows of the last forward stand; put others' states back."""
        stand = [own.num_behind == num_rows for own in self._sequences]
        self._states.settle(stand)
        for own, has_stood in zip(self._sequences, stand, strict=True):
            own.absorbed += num_rows if has_stood else 0
        # A sequence that ran ahead of its end goes back behind it.
        if any(back := [own.num_behind < 0 for own in self._sequences]):
            self._go_back(back)
        self._settle_columns(num_rows)

    def _go_back(self, back: list[bool]) -> None:
        """Let some sequences stand behind the prompt, nothing absorbed."""
        self._states.take(self._states_of_prompt, back)
        for own, goes in zip(self._sequences, back, strict=True):
            own.absorbed = 0 if goes else own.absorbed

    def _settle_columns(self, num_rows: int) -> None:
        host_lengths = [self._prompt_length + own.absorbed for own in self._sequences]
        lengths = to_device(host_lengths, self._standing.device)
        rows = None
        if not self.room.is_in_place:
            rows = torch.arange(num_rows, device=lengths.device).expand(len(lengths), -1)
        self.room.settle(rows, lengths, host_lengths)

    def _absorb(self, num_rows: int) -> None:
        """Run the first tokens behind the states alone, in sequences that have so many."""
        standing = [own.standing for own in self._sequences]
        self.num_repeated += sum(min(own.num_behind, num_rows) for own in self._sequences)
        self._forward(self._ids_behind(num_rows))
        for own in self._sequences:
            own.standing = own.absorbed + min(own.num_behind, num_rows)
        self._take_up(num_rows)
        for own, before in zip(self._sequences, standing, strict=True):
            own.standing = before

    def keep_sequences(self, kept: list[bool]) -> None:
        super().keep_sequences(kept)
        self._standing = keep_rows(self._standing, kept)
        self._states.drop_from_cache(kept)
        for states in (self._states, self._states_of_prompt):
            states.keep_sequences(kept)
        self._sequences, self._tokens = (
            [one for one, stays in zip(own, kept, strict=True) if stays] for own in (self._sequences, self._tokens)
        )

    @torch.no_grad()
    def leave(self, num_steps: int) -> None:
        if self.room is None:
            return
        # What a round said that was not committed is not run: it ends with the slowest row.
        most = min(max(num_steps - 1, 0), *(own.standing for own in self._sequences))
        try:
            self._states.settle([False] * len(self._sequences))  # wherever a forward was broken off
            if any(back := [own.absorbed > most for own in self._sequences]):
                self._go_back(back)
            self._settle_columns(0)
            for own in self._sequences:
                own.standing = most
            self._catch_up()
        finally:
            super().leave(most + 1)

    def _catch_up(self) -> None:
        """Absorb all tokens that have come to stand."""
        while behind := [own.num_behind for own in self._sequences if own.num_behind]:
            self._absorb(min(behind))
