"""What the target picks after every node, and how a draft ranks candidates for it."""

import torch
from transformers.generation import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from transformers_msd.call.emission import Emission
from transformers_msd.call.walk import Walk
from transformers_msd.trees.host import has_to_wait, to_device
from transformers_msd.trees.noise import NoiseTape
from transformers_msd.trees.tree import TokenTree


# Told by exact type: a subclass may look at the ids. These see one row of scores and nothing else.
DRAFT_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
ROW_WISE_PROCESSORS = (
    *DRAFT_WARPERS,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)
# These sort every row that they are asked about. A CPU, which can be asked where the target goes, is spared the others
# where these are this many values.
SORTING_PROCESSORS = (TopPLogitsWarper, TopHLogitsWarper, TypicalLogitsWarper)
MOST_SORTED = 2**17
# These read the ids and keep nothing between two calls: they may be asked about steps that are not reached.
FORGETFUL_PROCESSORS = (
    *ROW_WISE_PROCESSORS,
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)


class Sampler:
    """
    Picks the target's token after every node as plain `generate` would, greedily or with the call's noise.

    Args:
        processors (`LogitsProcessorList`):
            The processors of the call.
        emission (`Emission`):
            Tokens of the call so far.
        noise (`NoiseTape`, *optional*):
            Noise of the call; greedy without it.
    """

    def __init__(self, processors: LogitsProcessorList, emission: Emission, noise: NoiseTape | None) -> None:
        self._processors = processors
        self._row_wise = all(type(processor) in ROW_WISE_PROCESSORS for processor in processors)
        self._forgetful = all(type(processor) in FORGETFUL_PROCESSORS for processor in processors)
        # Those of the processors that a draft can follow.
        self.draft_warpers = tuple(processor for processor in processors if type(processor) in DRAFT_WARPERS)
        self._emission = emission
        self._noise = noise
        # Noise of the last round that was asked for, and where its sequences stood.
        self._round: tuple[dict[int, int], torch.Tensor] | None = None

    def choose(self, tree: TokenTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Pick the target's token after the nodes of a tree.

        Args:
            tree (`TokenTree`):
                The drafted trees.
            logits (`torch.Tensor` of shape `(batch_size, num_nodes, vocab_size)`):
                The target's logits, float32.

        Returns:
            The tokens, of shape `(batch_size, num_nodes)`, and the processed scores, of the shape of `logits`. Where a
            processor reads ids, both hold for the nodes that the target reaches; the other tokens are -1.
        """
        if not self._row_wise or self._sorts_in_vain(tree, logits):
            return self._choose_step_by_step(tree, logits)
        scores = logits
        if self._processors:
            token_ids = tree.token_ids.to(logits.device)
            scores = self._processors(token_ids.flatten()[:, None], logits.flatten(0, 1)).view_as(logits)
        noise = None
        if self._noise is not None:
            noise = self.noise_of_round(tree.depth)
            if tree.num_nodes > 1:
                rows = torch.arange(len(logits), device=noise.device)
                depths = tree.depths.clamp(max=tree.depth).to(noise.device)
                noise = noise[rows[:, None], depths]  # (batch, num_nodes, vocab)
        choices = _pick(scores, noise)
        pad_rows = self._emission.pad_rows
        pad_rows = [pad_rows[row] for row in self._emission.rows]
        if any(pad_rows):
            pad_rows = to_device(pad_rows, choices.device)[:, None]
            choices = choices.masked_fill(pad_rows, self._emission.pad_token_id)
        return choices.to(tree.token_ids.device), scores

    def _sorts_in_vain(self, tree: TokenTree, logits: torch.Tensor) -> bool:
        """Tell whether it takes less time to walk down a tree than to sort the scores of all of its nodes."""
        num_others = tree.num_nodes - tree.depth - 1
        if (
            not num_others
            or has_to_wait(logits.device)
            or not any(type(own) in SORTING_PROCESSORS for own in self._processors)
        ):
            return False
        return num_others * logits.shape[-1] > MOST_SORTED

    def _choose_step_by_step(self, tree: TokenTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Walk down the trees and call the processors as plain decoding does: step by step, all rows at once. A device
        that the host would wait for is not asked how far rows come, if the processors need not know.
        """
        emission, device = self._emission, logits.device
        starts = [len(row) for row in emission.tokens]
        goes_on = [
            row in emission.rows and emission.needs_more(row, emission.tokens[row]) for row in range(len(starts))
        ]
        # Last steps that rows can come to.
        ends = [start + tree.depth for start in starts]
        if emission.max_steps is not None:
            ends = [min(end, emission.max_steps - 1) for end in ends]
        asks = not (self._forgetful and has_to_wait(device))
        walk = Walk(emission, tree.to(device), logits, starts, goes_on)
        step = -1
        while steps := [
            max(start, step + 1) for start, end, goes in zip(starts, ends, goes_on, strict=True) if goes and step < end
        ]:
            step = min(steps)
            # Rows at other steps hold a prefix of the same length, and what comes of it is ignored.
            step_scores = self._processors(walk.prefix(step), walk.logits())
            walk.descend(step, _pick(step_scores, None if self._noise is None else self._noise.at(step)), step_scores)
            if asks:
                goes_on = walk.goes_on.tolist()
        return walk.choices.to(tree.token_ids.device), walk.scores

    @property
    def going_on(self) -> list[bool]:
        """Which rows of the batch have not ended."""
        return [self._emission.goes_on(row) for row in self._emission.rows]

    def rank(self, logits: torch.Tensor, depth: int) -> torch.Tensor:
        """
        Turn draft logits into the log-probabilities by which candidates are ranked.

        Sampling, the noise of the position is already known: adding it to the draft's log-probabilities, as it will be
        to the target's, tries the tokens that the target is likely to *pick* instead of those it is likely to favour
        (drafter-invariant Gumbel coupling, arXiv 2408.07978, here over a tree). It never changes the output.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, nodes, vocab_size)`):
                The draft's logits after nodes of one depth.
            depth (`int`):
                Depth of these nodes, 0 for the root.
        """
        noise = None if self._noise is None else self._noise_after(depth)
        return coupled_log_probs(logits, noise, self.draft_warpers)

    def noise_of_round(self, depth: int) -> torch.Tensor | None:
        """
        Noise by which the tokens of a round are picked.

        Args:
            depth (`int`):
                Most drafted tokens on one path.

        Returns:
            `torch.Tensor` of shape `(batch_size, depth + 1, vocab_size)`, or `None` where nothing is sampled.
        """
        if self._noise is None:
            return None
        steps = self._steps
        if self._round is None or self._round[0] != steps or self._round[1].shape[1] <= depth:
            self._round = steps, torch.stack([self._noise_after(level) for level in range(depth + 1)], dim=1)
        return self._round[1][:, : depth + 1]

    def _noise_after(self, depth: int) -> torch.Tensor:
        """Noise by which the token after nodes of a depth is picked, of shape `(batch_size, vocab_size)`."""
        return self._noise.rows_at({row: step + depth for row, step in self._steps.items()})

    @property
    def _steps(self) -> dict[int, int]:
        """Where the sequences of the round stand."""
        lengths = self._emission.lengths
        return {row: lengths[row] for row in self._emission.rows}


def coupled_log_probs(
    logits: torch.Tensor, noise: torch.Tensor | None, warpers: tuple[LogitsProcessor, ...]
) -> torch.Tensor:
    """
    Turn draft logits into the log-probabilities by which candidates are ranked ([`Sampler.rank`]).

    Args:
        logits (`torch.Tensor` of shape `(batch_size, nodes, vocab_size)`):
            The draft's logits after nodes of one depth.
        noise (`torch.Tensor` of shape `(batch_size, vocab_size)`, *optional*):
            Noise by which the token after them is picked; greedy without it.
        warpers (`tuple[LogitsProcessor, ...]`):
            Row-wise processors of the call.
    """
    scores = logits.float()
    if noise is None:
        return scores.log_softmax(-1)
    scores = _warped(scores.flatten(0, 1), warpers).view_as(scores)
    return (scores - noise.to(scores.device)[:, None].log()).log_softmax(-1)


def _warped(scores: torch.Tensor, warpers: tuple[LogitsProcessor, ...]) -> torch.Tensor:
    """Warp scores `(num_rows, vocab_size)`; what follows a top-k looks at what that has left, and sorts no more."""
    for place, warper in enumerate(warpers):
        if type(warper) is TopKLogitsWarper:
            left, token_ids = scores.topk(min(warper.top_k, scores.shape[-1]))
            left = _warped(left, warpers[place + 1 :])
            return torch.full_like(scores, warper.filter_value).scatter(1, token_ids, left)
        scores = warper(None, scores)
    return scores


def _pick(scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Pick tokens from processed scores `(..., vocab_size)`: the best, or by the noise as `torch.multinomial` does."""
    if noise is None:
        return scores.argmax(-1)
    probs = scores.softmax(-1)
    # Where there are no probabilities plain decoding raises, and so does this if the place is reached.
    return torch.where(probs[..., 0].isnan(), -1, (probs / noise).argmax(-1))
