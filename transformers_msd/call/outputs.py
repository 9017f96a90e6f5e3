"""What a call returns besides its tokens."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from transformers_msd.call.stats import SpeculativeStats


@dataclass
class SpeculativeDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """
    Output of `generate` with one of our assistants and `return_dict_in_generate=True`.

    Args:
        speculative_stats ([`SpeculativeStats`]):
            Acceptance statistics of the call. All other fields are those of plain `generate`.
    """

    speculative_stats: SpeculativeStats | None = None


class StepOutputs:
    """
    Scores, logits and hidden states, one element per step as in plain decoding, put together from rounds in which
    every row stood at a step of its own.

    Args:
        generation_config (`GenerationConfig`):
            The settings of the call, which say what is kept.
        batch_size (`int`):
            Rows of the batch.
    """

    def __init__(self, generation_config: GenerationConfig, batch_size: int) -> None:
        returned = generation_config.return_dict_in_generate
        self.scores = () if returned and generation_config.output_scores else None
        self.logits = () if returned and generation_config.output_logits else None
        self.hidden_states = () if returned and generation_config.output_hidden_states else None
        self._layers = generation_config.output_hidden_states
        # Per row, the outputs of each of its tokens: scores, logits, hidden states of every layer.
        self._rows: list[list[tuple[torch.Tensor | None, ...]]] = [[] for _ in range(batch_size)]
        self._prompt_hidden_states: tuple[torch.Tensor | None, ...] | None = None

    def add(
        self,
        path: torch.Tensor,
        counts: list[int],
        scores: torch.Tensor,
        logits: torch.Tensor,
        hidden_states: tuple[torch.Tensor | None, ...],
    ) -> None:
        """
        Keep what a round put out along its paths.

        Args:
            path (`torch.Tensor` of shape `(batch_size, depth + 1)`):
                Node after which each token was chosen.
            counts (`list[int]`):
                Tokens emitted for each row.
            scores (`torch.Tensor` of shape `(batch_size, num_nodes, vocab_size)`):
                Processed scores.
            logits (`torch.Tensor` of shape `(batch_size, num_nodes, vocab_size)`):
                Unprocessed logits.
            hidden_states (`tuple`):
                Hidden states of the nodes, or of the whole prompt in the prefill.
        """
        if self.scores is None and self.logits is None and self.hidden_states is None:
            return
        if self.hidden_states is not None:
            hidden_states = self._select(hidden_states)
        if self.hidden_states is not None and self._prompt_hidden_states is None:
            self._prompt_hidden_states = hidden_states
            hidden_states = (None,) * len(hidden_states)
        kept = (
            scores if self.scores is not None else None,
            logits if self.logits is not None else None,
            *(hidden_states if self.hidden_states is not None else ()),
        )
        for row, count in enumerate(counts):
            nodes = path[row, :count]
            along_path = [None if output is None else output[row, nodes.to(output.device)] for output in kept]
            self._rows[row].extend(
                tuple(None if output is None else output[index] for output in along_path) for index in range(count)
            )

    def _select(self, hidden_states: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Leave only the layers that the user asked for: drafting may need others."""
        if self._layers is True:
            return hidden_states
        layers = [self._layers] if isinstance(self._layers, int) else self._layers
        num_layers = len(hidden_states)
        kept = {layer % num_layers for layer in layers if -num_layers <= layer < num_layers}
        return tuple(h if layer in kept else None for layer, h in enumerate(hidden_states))

    def truncate(self, row: int, length: int) -> None:
        """Drop what belongs to tokens of a row beyond `length`."""
        del self._rows[row][length:]

    def complete(self, step: int) -> None:
        """Put a step together that every row has reached."""
        if not self._rows[0]:
            return
        scores, logits, *hidden_states = (
            None if outputs[0] is None else torch.stack(outputs)
            for outputs in zip(*(row[step] for row in self._rows), strict=True)
        )
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.hidden_states is not None:
            if step == 0:
                self.hidden_states += (self._prompt_hidden_states,)
            else:
                self.hidden_states += (tuple(h if h is None else h[:, None] for h in hidden_states),)
        for row in self._rows:
            row[step] = ()
