"""The target of one call: its prefill, one forward over a tree, and keeping what was accepted."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from transformers_msd.caches.captures import Captures
from transformers_msd.caches.room import Room
from transformers_msd.compat import CACHE, CACHE_NAMES
from transformers_msd.costs.rounds import with_full_fours
from transformers_msd.target.axes import axis_positions
from transformers_msd.target.committed import Committed
from transformers_msd.target.recording import Recorder, side_by_side, with_layers
from transformers_msd.traits.scales import Scales, find_scales, scales_of, wants_scales
from transformers_msd.traits.support import TOKEN_TYPES, dtype_of
from transformers_msd.traits.tokens import is_embedded_token, visual_token_ids, visual_token_mask
from transformers_msd.traits.windows import layer_windows
from transformers_msd.trees.host import keep_rows, to_device
from transformers_msd.trees.masks import take_rows
from transformers_msd.trees.tree import TokenTree
from transformers_msd.trees.verify import Acceptance


# Rows of the prompt that a forward over new tokens must not see again.
PROMPT_ONLY = (*CACHE_NAMES, "attention_mask", "inputs_embeds", "position_ids", "use_cache")


class Target:
    """
    A model as one call decodes with it: owner of the call's cache and positions, never of anything on the model.

    Args:
        model (`PreTrainedModel`):
            The model that generates.
        model_kwargs (`dict[str, Any]`):
            Keyword arguments that `generate` prepared for its forward passes.
        generation_config (`GenerationConfig`):
            The settings of the call.
        captures ([`Captures`], *optional*):
            Compiles the forwards after the prompt, on tensors of fixed shapes.
        feature_layers (`tuple[int, ...]`, *optional*, defaults to the last):
            Hidden states that a draft reads, numbered as `output_hidden_states` returns them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        model_kwargs: dict[str, Any],
        generation_config: GenerationConfig,
        captures: Captures | None = None,
        feature_layers: tuple[int, ...] = (-1,),
    ) -> None:
        self.model, self.feature_layers, self._dtype = model, feature_layers, dtype_of(model)
        self.cache, self._table = model_kwargs[CACHE], model.get_input_embeddings()
        # What it does to embeddings and to logits. Kept here: compiled code must not look into a table of all models.
        self.scales = scales_of(model)
        self._layer_types, self._windows = zip(*layer_windows(model.config), strict=True)
        wanted = with_layers(generation_config.output_hidden_states, feature_layers)
        self._model_kwargs = model_kwargs | {"output_hidden_states": wanted}
        self._captures, self._generation_config = captures, generation_config
        self.room: Room | None = None
        self.max_steps: int | None = None  # new tokens of the call, where it has an end
        self.num_repeated = 0  # accepted tokens that ran again

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens as the target's layers read them, on the device of its features."""
        return self.scales.of_embeddings(self._table(token_ids).to(self.device))

    def logits(self, features: torch.Tensor, scales: Scales | None = None) -> torch.Tensor:
        """Logits `(..., vocab_size)` of features, with its own scales or others, on the device of its features."""
        logits = self.model.get_output_embeddings()(features.to(self.device, self._dtype))
        return (scales or self.scales).of_logits(logits).to(self.device)

    def prefill(self, input_ids: torch.Tensor) -> tuple[TokenTree, ModelOutput]:
        """
        Run the prompt.

        Returns:
            Trees of a root alone, the last tokens of the prompt, and the outputs after them.
        """
        recorder = Recorder(self.model)
        outputs = self._run_prompt(recorder, input_ids)
        self.device = outputs.hidden_states[-1].device
        self._settle_prompt(len(outputs.logits), self.device)
        inputs_embeds, *features = (
            torch.cat([output.hidden_states[layer].to(self.device) for output in recorder.outputs], dim=1)
            for layer in (0, *self.feature_layers)
        )
        last = outputs.hidden_states[-1][:, -1].to(self.device), outputs.logits[:, -1]
        self.num_prompt_rows = inputs_embeds.shape[1]  # columns that the cache lacked
        self._prompt = self._prompt_rows(input_ids.to(self.device), inputs_embeds, side_by_side(features), *last)
        self.begins_visual = self._prompt.visual_mask[:, 0]  # of each sequence
        # The token at the root is not looked at: what follows the prompt was computed with it.
        return TokenTree.root(torch.zeros(len(inputs_embeds), dtype=torch.long, device=self.device)), outputs

    def _run_prompt(self, model: Any, input_ids: torch.Tensor) -> ModelOutput:
        """Let Transformers run the prompt by a model, or by what stands in for it."""
        outputs = type(self.model)._prefill(model, input_ids, self._generation_config, self._model_kwargs)
        if type(outputs.get(CACHE)) is type(self.cache):  # some models run a long prompt in a cache of their own
            self.cache = self._model_kwargs[CACHE] = outputs[CACHE]
        return outputs

    def _settle_prompt(self, batch_size: int, device: torch.device) -> None:
        """Take what the cache holds after the prefill as the settled rows."""
        self._prompt_length = num_columns = int(self.cache.get_seq_length())
        mask = self._model_kwargs.get("attention_mask")
        self._is_unpadded = mask is None
        if mask is None:
            mask = torch.ones(batch_size, num_columns, dtype=torch.long)
        self._prompt_mask = mask.to(device).bool()
        self._num_real = self._prompt_mask.sum(-1)
        self._open_room(torch.full_like(self._num_real, num_columns), [num_columns] * batch_size)

    def _open_room(self, lengths: torch.Tensor, host_lengths: list[int]) -> None:
        place = (self.cache, lengths, host_lengths, None if self._is_unpadded else self._prompt_mask, self._windows)
        self.room = Room(*place) if self._captures is None else self._captures.room(self.model, *place)
        self.room.open()

    def leave(self, num_steps: int) -> None:
        """Give the cache back as plain decoding has it after so many tokens, as far as it has come."""
        if self.room is not None:
            self.room.leave(self._prompt_length + max(num_steps - 1, 0))

    def _prompt_rows(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, features: torch.Tensor, *last: torch.Tensor
    ) -> Committed:
        """Pack the real rows of the prompt to the left, each still paired with its own token."""
        batch_size, num_rows, _ = features.shape
        table, given = self._table, self._model_kwargs.get("inputs_embeds")
        table_rows = None if given is None else given[:, -num_rows:].to(self.device)
        real = self._prompt_mask[:, -num_rows:]
        if input_ids.shape[1] >= num_rows:
            token_ids = input_ids[:, -num_rows:]
            visual_mask = visual_token_mask(token_ids, visual_token_ids(self.model.config))
        else:
            token_ids = input_ids.new_full((batch_size, num_rows), -1)
            visual_mask = ~is_embedded_token(inputs_embeds if table_rows is None else table_rows, table)
        if wants_scales(self.model):
            text = real & ~visual_mask
            if table_rows is not None:
                find_scales(self.model, table_rows[text], inputs_embeds[text], *last)
            elif input_ids.shape[1] >= num_rows:
                find_scales(self.model, table(token_ids[text]), inputs_embeds[text], *last)
            self.scales = scales_of(self.model)
        position_ids = (self._prompt_mask.cumsum(-1) - 1)[:, -num_rows:]
        return Committed(token_ids, inputs_embeds, features, position_ids, visual_mask, real.sum(-1), []).pack(real)

    def fit(self, tree: TokenTree) -> TokenTree:
        """Bring trees to where the target is, filled up to a size that forwards are compiled for, or fast with."""
        tree = tree.to(self.device)
        full = with_full_fours(tree.num_nodes, len(tree.token_ids), self.device.type)
        return tree.widen(full if self._captures is None else self._captures.num_nodes(tree))

    def forward_tree(self, tree: TokenTree) -> ModelOutput:
        """Run all nodes of the trees in one forward; their rows lie behind the cache until `commit`."""
        if tree.num_nodes == 1 and self._is_packed and self._captures is None:
            return self.forward_rows(tree.token_ids, tree.depths, None)
        return self.forward_rows(tree.token_ids, tree.depths, tree.ancestor_mask)

    def forward_rows(self, token_ids: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor | None) -> ModelOutput:
        """
        Run tokens that are no settled part of the sequences, behind the cache.

        Args:
            token_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
                The tokens.
            depths (`torch.Tensor` of shape `(batch_size, num_rows)` or `(num_rows,)`):
                How far each lies behind the first token that has no settled row.
            visible (`torch.Tensor` of shape `(batch_size, num_rows, num_unsettled)`):
                Which of the unsettled rows, these last ones included, each row sees; `None` where it is all of them
                and no column of the cache is padding.
        """
        num_rows = token_ids.shape[1]
        masks = None if visible is None else self._masks(visible)
        kwargs = {name: value for name, value in self._model_kwargs.items() if name not in PROMPT_ONLY}
        for name in TOKEN_TYPES:
            if kwargs.get(name) is not None:
                # All that is generated is text, and so is the end of a prompt.
                kwargs[name] = kwargs[name][:, -1:].to(token_ids.device).expand(-1, num_rows)
        generated = ((self.room.lengths - self._prompt_length)[:, None] + depths + 1).expand_as(token_ids)
        if self.max_steps is not None:
            # What lies behind the last token of the call is never kept, and must not reach further than that.
            generated = generated.clamp(max=max(self.max_steps - 1, 1))
        generated = generated.to(token_ids.device)
        position_ids = self._model_kwargs["position_ids"][..., -1:].to(token_ids.device) + generated
        model_inputs = self.model.prepare_inputs_for_generation(
            token_ids,
            attention_mask=None if masks is None else next(iter(masks.values())),
            position_ids=self._reachable(position_ids),
            use_cache=True,
            is_first_iteration=False,
            **{CACHE: self.cache},
            **kwargs,
        )
        if "logits_to_keep" in model_inputs:  # some models set it, whatever they are given
            model_inputs["logits_to_keep"] = num_rows
        if masks is not None and len(masks) > 1:
            model_inputs["attention_mask"] = masks
        if model_inputs.get("position_ids") is None:
            # A model that drops them counts columns of the cache, padding included.
            model_inputs["position_ids"] = self._prompt_length - 1 + generated
        if self._captures is None:
            return self.model(**model_inputs, return_dict=True)
        return self._captures.forward(self.model, model_inputs)

    def _masks(self, visible: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Make the masks of the next forward: for each type of layers, one alone where all layers see as far."""
        of_windows = {window: self.room.mask(visible, self._dtype, window) for window in dict.fromkeys(self._windows)}
        if len(of_windows) == 1:
            return {"": of_windows[self._windows[0]]}
        return {name: of_windows[window] for name, window in zip(self._layer_types, self._windows, strict=True)}

    def axes(self, places: torch.Tensor) -> torch.Tensor:
        """Positions on the target's axes, `(3, batch_size, num_rows)`, of real tokens of given places."""
        return axis_positions(self._model_kwargs["position_ids"], self._prompt_mask, places)

    def _reachable(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Keep positions to those that the model has."""
        return position_ids

    def commit(
        self, tree: TokenTree, acceptance: Acceptance, outputs: ModelOutput, tokens: list[list[int]]
    ) -> Committed:
        """
        Keep the rows of accepted nodes and drop all others.

        Args:
            tree (`TokenTree`):
                Trees of the round.
            acceptance (`Acceptance`):
                Their accepted paths.
            outputs (`ModelOutput`):
                Outputs of the round's forward.
            tokens (`list[list[int]]`):
                Generated tokens of each row that stand after the round: fewer than accepted where a row ended, and
                fewer than before where it had run ahead of its end.
        """
        # Counted on the host, where the tokens are: the device is told once, and not asked.
        host_lengths = [self._prompt_length - 1 + len(row) for row in tokens]
        new = [max(now - before, 0) for now, before in zip(host_lengths, self.host_lengths, strict=True)]
        roots, lengths, counts = to_device([[row[-1] for row in tokens], host_lengths, new], self.device)
        if self._prompt is not None:
            # Not kept: the embeddings and features of a long prompt are large.
            prompt, self._prompt = self._prompt, None
            return prompt.before(roots, self.embed(roots))
        path = acceptance.path[:, : max(*new, 1)]
        token_ids, position_ids = tree.token_ids, self.num_real_rows[:, None]
        states = [outputs.hidden_states[layer].to(self.device) for layer in (0, *self.feature_layers)]
        if tree.num_nodes > 1:
            token_ids, *states = token_ids.gather(1, path), *(take_rows(rows, path) for rows in states)
            position_ids = position_ids + torch.arange(path.shape[1], device=self.device)
        rows = Committed(
            token_ids=token_ids,
            inputs_embeds=states[0],
            features=side_by_side(states[1:]),
            position_ids=position_ids,
            visual_mask=torch.zeros_like(path, dtype=torch.bool),
            lengths=counts,
            host_lengths=new,
        )
        self._settle(acceptance.path, path.shape[1], lengths, host_lengths)
        return rows.before(roots, self.embed(roots))

    def _settle(self, path: torch.Tensor, most: int, lengths: torch.Tensor, host_lengths: list[int]) -> None:
        """Settle the first rows of accepted paths, `most` of them at most: each sequence has so many columns then."""
        is_in_place = most == 1 and self.room.is_in_place  # roots, where all sequences are of one length
        rows = path[:, :most] if self._captures is None else path  # compiled code moves as many each time
        self.room.settle(None if is_in_place else rows, lengths, host_lengths)

    def keep_sequences(self, kept: list[bool]) -> None:
        """Drop sequences; `kept` tells of each whether it stays."""
        self.room.keep_sequences(kept)
        self._num_real, self._prompt_mask = keep_rows(self._num_real, kept), keep_rows(self._prompt_mask, kept)
        for name, value in self._model_kwargs.items():
            # As Transformers has them: positions may have axes before the batch, or none of the batch.
            dim = -2 if name == "position_ids" else 0
            if torch.is_tensor(value) and value.ndim > 0 and value.shape[dim] == len(kept):
                self._model_kwargs[name] = keep_rows(value, kept, dim)

    @property
    def _is_packed(self) -> bool:
        """Whether all columns of the cache are real and seen, told on the host."""
        return self._is_unpadded and self.room.is_even and set(self._windows) == {None}

    @property
    def lengths(self) -> torch.Tensor:
        """Columns of each sequence that have come to stand, padding of the prompt included: `(batch_size,)`."""
        return self.room.lengths

    @property
    def host_lengths(self) -> list[int]:
        """The same on the host."""
        return self.room.host_lengths

    @property
    def num_real_rows(self) -> torch.Tensor:
        """Real tokens of each sequence that have come to stand, padding of the prompt left out: `(batch_size,)`."""
        return self._num_real + self.lengths - self._prompt_length
