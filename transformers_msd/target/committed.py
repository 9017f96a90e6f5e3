"""What came to stand in a round, as the target hands it to a draft."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import compress

import torch

from transformers_msd.trees.host import keep_rows
from transformers_msd.trees.masks import take_rows


@dataclass(frozen=True)
class Committed:
    """
    Tokens that now stand, in the form in which a draft reads them: row `r` pairs token `r + 1` with what the target
    knew at token `r`. Rows are packed to the left, padding of the prompt left out; the last row of each sequence holds
    the token emitted last.

    Args:
        token_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Tokens `r + 1`; -1 where a prompt was given as embeddings alone.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Input embeddings of tokens `r + 1`, visual features merged in.
        features (`torch.Tensor` of shape `(batch_size, num_rows, num_layers * hidden_size)`):
            Hidden states of the target at tokens `r`, of the layers that the draft reads, one behind the other: the
            last ones, after its final norm, where it does not say.
        position_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Places of tokens `r` among the real tokens of their sequence.
        visual_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
            Whether tokens `r + 1` are visual.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Rows of each sequence; what lies behind them is filler.
        host_lengths (`list[int]`):
            The same where the device need not be asked.
    """

    token_ids: torch.Tensor
    inputs_embeds: torch.Tensor
    features: torch.Tensor
    position_ids: torch.Tensor
    visual_mask: torch.Tensor
    lengths: torch.Tensor
    host_lengths: list[int]

    @property
    def last_rows(self) -> torch.Tensor:
        """Index of the last row of each sequence, of shape `(batch_size,)`."""
        return (self.lengths - 1).clamp(min=0)

    def pack(self, real: torch.Tensor, host_lengths: list[int] | None = None) -> "Committed":
        """
        Keep the rows marked in `real`, of shape `(batch_size, num_rows)`, packed to the left in their order; how many
        there are of each sequence is asked where it is not given.
        """
        lengths = real.sum(-1)
        host_lengths = lengths.tolist() if host_lengths is None else host_lengths
        rows = (~real).int().sort(dim=1, stable=True).indices[:, : max(*host_lengths, 1)]
        return replace(self._take(rows), lengths=lengths, host_lengths=host_lengths)

    def last(self) -> "Committed":
        """Keep the last row of each sequence alone."""
        host_lengths = [min(length, 1) for length in self.host_lengths]
        rows = self._take(self.last_rows[:, None])
        return replace(rows, lengths=self.lengths.clamp(max=1), host_lengths=host_lengths)

    def _take(self, rows: torch.Tensor) -> "Committed":
        return replace(
            self,
            token_ids=self.token_ids.gather(1, rows),
            inputs_embeds=take_rows(self.inputs_embeds, rows),
            features=take_rows(self.features, rows),
            position_ids=self.position_ids.gather(1, rows),
            visual_mask=self.visual_mask.gather(1, rows),
        )

    def before(self, root_token_ids: torch.Tensor, root_embeds: torch.Tensor) -> "Committed":
        """
        Pair rows that hold a token each and the feature at it with the tokens that follow, the roots last.

        Args:
            root_token_ids (`torch.Tensor` of shape `(batch_size,)`):
                The tokens emitted last.
            root_embeds (`torch.Tensor` of shape `(batch_size, hidden_size)`):
                Their embeddings.
        """
        root_token_ids, root_embeds = root_token_ids[:, None], root_embeds[:, None].to(self.inputs_embeds)
        if self.token_ids.shape[1] == 1:
            is_visual = torch.zeros_like(self.visual_mask)
            return replace(self, token_ids=root_token_ids, inputs_embeds=root_embeds, visual_mask=is_visual)
        rows = torch.arange(self.token_ids.shape[1], device=root_token_ids.device)
        is_last = rows == self.last_rows[:, None]
        return replace(
            self,
            token_ids=torch.where(is_last, root_token_ids, self.token_ids.roll(-1, 1)),
            inputs_embeds=torch.where(is_last[..., None], root_embeds, self.inputs_embeds.roll(-1, 1)),
            visual_mask=~is_last & self.visual_mask.roll(-1, 1),
        )

    def join(self, *later: "Committed") -> "Committed":
        """Put later rows behind these."""
        parts = (self, *later)
        real = [
            torch.arange(part.token_ids.shape[1], device=part.lengths.device) < part.lengths[:, None] for part in parts
        ]
        rows = {
            field.name: torch.cat([getattr(part, field.name) for part in parts], dim=1)
            for field in fields(self)
            if field.name not in ("lengths", "host_lengths")
        }
        host_lengths = [sum(lengths) for lengths in zip(*(part.host_lengths for part in parts), strict=True)]
        return Committed(**rows, lengths=self.lengths, host_lengths=[]).pack(torch.cat(real, dim=1), host_lengths)

    def keep_sequences(self, kept: list[bool]) -> "Committed":
        """Keep some of the sequences; `kept` tells of each whether it stays."""
        host_lengths = list(compress(self.host_lengths, kept))
        rows = {
            field.name: keep_rows(getattr(self, field.name), kept)[:, : max(*host_lengths, 1)]
            for field in fields(self)
            if field.name not in ("lengths", "host_lengths")
        }
        return Committed(**rows, lengths=keep_rows(self.lengths, kept), host_lengths=host_lengths)

    @cached_property
    def root_token_ids(self) -> torch.Tensor:
        """Tokens emitted last, of shape `(batch_size,)`."""
        if self.token_ids.shape[1] == 1:
            return self.token_ids[:, 0]
        return self.token_ids.gather(1, self.last_rows[:, None])[:, 0]
