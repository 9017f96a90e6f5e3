"""The tokens of a call: every row at a length of its own, handed over step by step as plain `generate` does."""

from collections.abc import Callable
from itertools import compress

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from transformers_msd.call.outputs import StepOutputs
from transformers_msd.call.stats import Rounds, SpeculativeStats
from transformers_msd.compat import pad_token_id_of
from transformers_msd.trees.host import has_to_wait, to_device
from transformers_msd.trees.tree import TokenTree
from transformers_msd.trees.verify import Acceptance


# Share of the batch that must have ended for the others to be copied: all copies of a call are of at most 3 batches.
LEAVING_SHARE = 0.25
# Told by exact type: the first are decided on the host, where the tokens are; all of them look at each row by itself,
# and may be asked about steps that are not reached.
HOST_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)
FORGETFUL_CRITERIA = (*HOST_CRITERIA, MaxTimeCriteria, StopStringCriteria)


class Emission:
    """
    Collects accepted tokens and ends the call where plain `generate` ends it.

    A step is one generated token of every row. It is complete once the slowest row has reached it; then it is shown to
    the stopping criteria and the streamer. What faster rows have beyond the last step is dropped.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            The ids of the prompt, as far as the call was given any.
        stopping_criteria (`StoppingCriteriaList`):
            The criteria of the call.
        generation_config (`GenerationConfig`):
            The settings of the call, special tokens prepared.
        streamer (`BaseStreamer`, *optional*):
            The streamer of the call.
        returns_state (`bool`, *optional*, defaults to `True`):
            Whether the call returns more than tokens: statistics, and what the target makes of the pad tokens behind
            an ended row, its cache among them. Where it doesn't, pads are written down without a round.
        observe (`Callable[[SpeculativeStats], None]`, *optional*):
            What is told the statistics besides. Then, too, no row leaves before the others.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        returns_state: bool = True,
        observe: Callable[[SpeculativeStats], None] | None = None,
    ) -> None:
        batch_size = len(input_ids)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        # Of these, what rounds are about: rows of trees and acceptances.
        self.rows = list(range(batch_size))
        # Of the last round: drafted tokens that the draft expected to be accepted, and accepted ones that it did not
        # propose, but the text so far.
        self.num_expected = [0.0] * batch_size
        self.num_ngrams = [0] * batch_size
        self.outputs = StepOutputs(generation_config, batch_size)
        self.num_steps = 0
        self.prompt_ids = input_ids
        self._criteria = stopping_criteria
        self._streamer = streamer
        self._returns_state = returns_state
        self._observe = observe
        self._notes_rounds = returns_state or observe is not None
        self._rounds = Rounds()
        max_length = stopping_criteria.max_length
        # Plain decoding asks its criteria after a token, and so emits one in any case.
        self.max_steps = None if max_length is None else max(max_length - input_ids.shape[1], 1)
        eos = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos_token_ids = {token_id for ids in eos for token_id in ids.tolist()}
        self._on_host = all(type(criterion) in HOST_CRITERIA for criterion in stopping_criteria)
        self._asks_ahead = has_to_wait(input_ids.device) and all(
            type(criterion) in FORGETFUL_CRITERIA for criterion in stopping_criteria
        )
        # What the criteria said of steps of this round that are not complete yet.
        self._verdicts: list[list[bool]] = []
        # Tokens of all rows on the device, as long as they are those of `tokens`.
        self._tail: torch.Tensor | None = None
        # Plain decoding pads ended rows if any criterion has an EOS id, and lets them go on otherwise.
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.pad_token_id = pad_token_id_of(generation_config)
        # Number of tokens up to and with the one that ended a row, and where an EOS token is sure to end it.
        self._ends: list[int | None] = [None] * batch_size
        self._eos_ends: list[int | None] = [None] * batch_size

    @property
    def sequences(self) -> torch.Tensor:
        """The prompt and all complete steps, of shape `(batch_size, sequence_length)`."""
        return self.prefix(self.tail(self.num_steps))

    @property
    def tokens_of_rows(self) -> list[list[int]]:
        """Generated tokens of each of `rows`."""
        return [self.tokens[row] for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """Generated tokens of each row, pads included."""
        return [
            max(len(row), self.num_steps) if is_idle else len(row)
            for row, is_idle in zip(self.tokens, self._idle_rows, strict=True)
        ]

    @property
    def _idle_rows(self) -> list[bool]:
        """Which rows have ended, where rounds say nothing more about them."""
        return [has_ended and not self._returns_state for has_ended in self.pad_rows]

    @property
    def is_done(self) -> bool:
        return all(end is not None for end in self._ends)

    @property
    def pad_rows(self) -> list[bool]:
        """Which rows have ended and go on with pad tokens."""
        return [
            self._pads and (end is not None or eos_end is not None)
            for end, eos_end in zip(self._ends, self._eos_ends, strict=True)
        ]

    def needs_more(self, row: int, tokens: list[int]) -> bool:
        """Whether a row that stood at these tokens would go on."""
        if self._idle_rows[row] or (self.max_steps is not None and len(tokens) >= self.max_steps):
            return False
        return not tokens or tokens[-1] not in self.eos_token_ids or self.pad_rows[row]

    def goes_on(self, row: int) -> bool:
        """Whether a row has not ended."""
        return self.needs_more(row, self.tokens[row]) and not self.pad_rows[row]

    def tail(self, num_steps: int) -> torch.Tensor:
        """
        Give the first generated tokens of all rows, those of rows that have not come so far filled up with pad tokens.

        Args:
            num_steps (`int`):
                How many.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_steps)`, on the device of the prompt.
        """
        if self._tail is None:
            longest = max(map(len, self.tokens))
            filled = [row + [self.pad_token_id] * (longest - len(row)) for row in self.tokens]
            # Long whatever the prompt is, as what plain decoding picks.
            self._tail = to_device(filled, self.prompt_ids.device, torch.long).view(len(filled), longest)
        more = max(num_steps - self._tail.shape[1], 0)
        return pad(self._tail, (0, more), value=self.pad_token_id)[:, :num_steps]

    def prefix(self, tail: torch.Tensor) -> torch.Tensor:
        """Put the prompt before generated tokens: the ids that plain decoding sees."""
        return torch.cat([self.prompt_ids, tail], dim=1)

    def pad(self, tree: TokenTree) -> TokenTree:
        """Let ended rows go on with pad tokens, which are known in advance and so accepted."""
        pad_rows = self.pad_rows
        if not (any(pad_rows) and self._returns_state):
            return tree
        return tree.with_chains(to_device(pad_rows, tree.token_ids.device), self.pad_token_id)

    def going_on(self) -> list[bool] | None:
        """Tell which of `rows` go on, where enough others may leave for it to pay; `None` where they may not."""
        if self._notes_rounds:
            return None
        going = [self.needs_more(row, self.tokens[row]) for row in self.rows]
        return going if going.count(False) >= LEAVING_SHARE * len(going) else None

    def keep_sequences(self, kept: list[bool]) -> None:
        """Take rows out of further rounds; `kept` tells of each of `rows` whether it stays."""
        self.rows = list(compress(self.rows, kept))

    def emit(
        self,
        tree: TokenTree,
        acceptance: Acceptance,
        scores: torch.Tensor,
        logits: torch.Tensor,
        hidden_states: tuple[torch.Tensor | None, ...],
    ) -> None:
        """Take over the tokens of a round, cut where their row ends, and complete the steps that all rows reached."""
        starts = self.lengths
        self._tail, self._verdicts = None, []
        if tree.num_nodes == 1:
            counts = acceptance.path.new_zeros(len(acceptance.path), 3)
        else:
            num_ngrams = torch.zeros_like(acceptance.num_accepted)
            if tree.is_ngram is not None:
                num_ngrams = tree.is_ngram.gather(1, acceptance.path).sum(-1)
            thousandths = (tree.num_expected * 1000).long()
            counts = torch.stack([acceptance.num_accepted, num_ngrams, thousandths], dim=1)
        found = torch.cat([counts, acceptance.token_ids], dim=1).tolist()
        for row, (num_accepted, num_ngrams, thousandths, *token_ids) in zip(self.rows, found, strict=True):
            self.num_ngrams[row], self.num_expected[row] = num_ngrams, thousandths / 1000
            for token_id in token_ids[: num_accepted + 1]:
                if not self.needs_more(row, self.tokens[row]):
                    break
                if token_id < 0:
                    raise RuntimeError("The scores have NaN or inf, or no token is left: nothing can be sampled.")
                self.tokens[row].append(token_id)
            if self._eos_ends[row] is None and self.tokens[row] and self.tokens[row][-1] in self.eos_token_ids:
                self._eos_ends[row] = len(self.tokens[row])
        counts = [length - start for length, start in zip(self.lengths, starts, strict=True)]
        self.outputs.add(acceptance.path, counts, scores, logits, hidden_states)
        if any(starts) and self._notes_rounds:
            self._rounds.starts.append(starts)
            self._rounds.lengths.append(self.lengths)
            self._rounds.num_accepted.append([num_accepted for num_accepted, *_ in found])
            self._rounds.num_drafted.append((tree.parents >= 0).sum(-1))
            self._rounds.num_plain_steps += tree.num_nodes == 1
        while not self.is_done and all(
            is_idle or len(row) > self.num_steps for row, is_idle in zip(self.tokens, self._idle_rows, strict=True)
        ):
            self._complete_step()

    def _complete_step(self) -> None:
        token_ids = [row[self.num_steps] if self.num_steps < len(row) else self.pad_token_id for row in self.tokens]
        self.outputs.complete(self.num_steps)
        self.num_steps += 1
        if self._on_host:
            at_limit = self.max_steps is not None and self.num_steps >= self.max_steps
            ended = [at_limit or token_id in self.eos_token_ids for token_id in token_ids]
        else:
            ended = self._ask_criteria()
        if self._streamer is not None:
            self._streamer.put(torch.tensor(token_ids))
        for row, has_ended in enumerate(ended):
            if has_ended and self._ends[row] is None:
                self._ends[row] = self.num_steps
                if self._pads:
                    self._truncate(row)
        if self.is_done:
            for row in range(len(self.tokens)):
                self._truncate(row)

    def _ask_criteria(self) -> list[bool]:
        """Ask which rows end with the last complete step; what need not be asked step by step, once for a round."""
        if not self._verdicts:
            last = self.num_steps
            if self._asks_ahead:
                going = [row for row, is_idle in zip(self.tokens, self._idle_rows, strict=True) if not is_idle]
                last = max(last, min(map(len, going or self.tokens)))
            prefixes = [self.prefix(self.tail(step)) for step in range(self.num_steps, last + 1)]
            said = [self._criteria(prefix, self.outputs.scores) for prefix in prefixes]
            self._verdicts = torch.stack(said).tolist()
        return self._verdicts.pop(0)

    def _truncate(self, row: int) -> None:
        """Drop the tokens of a row beyond the complete steps."""
        if self._eos_ends[row] is not None and self._eos_ends[row] <= self.num_steps and not self.is_done:
            return  # what follows are the pad tokens that belong there
        del self.tokens[row][self.num_steps :]
        self._tail = None
        self.outputs.truncate(row, self.num_steps)

    def finish(self, num_repeated: int) -> SpeculativeStats:
        """Sum the call up, in which so many tokens were run again, and end the streamer."""
        stats = self._rounds.summarize([end if end is not None else self.num_steps for end in self._ends])
        stats.num_repeated = num_repeated
        if self._observe is not None:  # before who reads the stream takes the call for ended
            self._observe(stats)
        if self._streamer is not None:
            self._streamer.end()
        return stats
