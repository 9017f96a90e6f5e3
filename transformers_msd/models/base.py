"""What drafts on a target's features have in common, whatever their layers are."""

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from transformers_msd.compat import stock_drafting_error
from transformers_msd.models.configuration import checked_tree
from transformers_msd.models.files import BROKEN, check_folder, remove_replaced
from transformers_msd.models.places import check_finite, check_output
from transformers_msd.models.sharing import check_custom_generate, write_custom_generate
from transformers_msd.traits.scales import Scales, look_up
from transformers_msd.trees.tree import TreeConfig


class FeatureDraftModel(PreTrainedModel):
    """
    A draft that reads hidden states of the target: row `r` pairs the embedding of token `r + 1` with those at token
    `r`, and predicts what a head needs to say token `r + 2`.

    A head of its own, where it has one, knows the tokens of `draft_token_ids`, in this order.
    """

    main_input_name = "inputs_embeds"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    fc: nn.Linear
    head: nn.Linear | None
    # What says how it drafts, in a model card, and its tag there.
    method: str
    tag: str
    # What rows of the target's embedding table are multiplied by; what its own layers read is read if it is `None`.
    embedding_scale: float | None = None
    # What is done to logits of its own head or of the target's; what the target does to its own if it is `None`.
    logit_scales: Scales | None = None
    # Whether its predictions are the target's features, which it can be trained on.
    predicts_features = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name, settings = str(pretrained_model_name_or_path), {"ignore_mismatched_sizes": True} | kwargs
        if "state_dict" not in kwargs:
            check_folder(name, kwargs.get("subfolder") or "", needs_config="config" not in kwargs)
        try:
            draft, loaded = super().from_pretrained(
                pretrained_model_name_or_path, *args, **settings | {"output_loading_info": True}
            )
        except BROKEN as error:
            raise ValueError(f"The weights in {name} can't be read: {error}. Copy the folder again.") from None
        wrong = {kind: sorted(map(str, loaded[kind])) for kind in ("missing_keys", "unexpected_keys")}
        if "ignore_mismatched_sizes" not in kwargs:
            wrong["mismatched_keys"] = sorted(map(str, loaded["mismatched_keys"]))
        if any(wrong.values()):
            raise ValueError(f"The weights in {name} must be those of its config, got {wrong}. Copy the folder again.")
        check_finite(draft, name)
        return (draft, loaded) if kwargs.get("output_loading_info") else draft

    def __getattr__(self, name: str) -> Any:
        if name == "generation_config":  # Transformers' own way of drafting asks for it first
            raise stock_drafting_error(self)
        return super().__getattr__(name)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.fc:
            # `fc` feeds the residual stream directly: it keeps the scale of its input, whatever the width.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    @property
    def tree_config(self) -> TreeConfig:
        """Tree to draft with; it is saved with the model."""
        return checked_tree(self.config.tree_config or {}, self.most_levels)

    @tree_config.setter
    def tree_config(self, tree_config: TreeConfig) -> None:
        self.config.tree_config = asdict(checked_tree(tree_config, self.most_levels))

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Hidden states of the target that are read, numbered as `output_hidden_states` returns them."""
        return (-1,)

    @property
    def reads_placeholders(self) -> bool:
        """Whether a visual token enters as the embedding of its placeholder, and not as a visual feature."""
        return False

    @property
    def needs_tokens(self) -> bool:
        """Whether the tokens of its own head are still to be chosen."""
        return self.head is not None and bool((self.draft_token_ids < 0).any())

    @property
    def reads_axes(self) -> bool:
        """Whether positions are the target's, on several axes, and not the places of tokens in their sequence."""
        return False

    @property
    def pools(self) -> bool:
        """Whether some rows of a prompt are read as one, or not at all."""
        return False

    @property
    def renumbers(self) -> bool:
        """Whether positions count the rows that are read, and not all tokens of a sequence."""
        return False

    @property
    def most_levels(self) -> int | None:
        """How deep a tree it can draft; as deep as any when it is `None`."""
        return None

    def pool(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        visual_mask: torch.Tensor,
        real: torch.Tensor,
        context: torch.Tensor | None,
        begins_visual: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """
        Choose the rows of a prompt that are read, as in training.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
                Input embeddings of tokens `r + 1`, visual features merged in.
            features (`torch.Tensor` of shape `(batch_size, num_rows, len(feature_layers) * hidden_size)`):
                What is read of the target at tokens `r`.
            position_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
                Places of tokens `r`.
            visual_mask (`torch.Tensor` of shape `(batch_size, num_rows)`):
                Whether tokens `r + 1` are visual.
            real (`torch.Tensor` of shape `(batch_size, num_rows)`):
                Which rows are real, without a gap in a sequence; what lies behind them is filler.
            context (`torch.Tensor` of shape `(batch_size, context_size)`, *optional*):
                What earlier prompts of the sequences have left to be read with each feature; none at the start.
            begins_visual (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Whether token 0, whose feature the first row reads, is visual, where the rows are the first of their
                sequences.

        Returns:
            `tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]`: Those of the first three that change,
            by name, features with what is read with them behind; which rows are kept, of shape `(batch_size,
            num_rows)`, the last of each sequence among them; what rows after these are to read with their features.
        """
        return {}, real, context

    def embed(self, token_ids: torch.Tensor, target: Any) -> torch.Tensor:
        """Embeddings of tokens as the layer reads them: the [`Target`]'s, unless the draft has its own."""
        if (own := self.get_input_embeddings()) is not None:
            return own(token_ids.to(own.weight.device))
        scale = self.embedding_scale
        return target.embed(token_ids) if scale is None else look_up(target.model, token_ids, scale).to(target.device)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """
        Turn what is read of the target into what the layer reads.

        Args:
            features (`torch.Tensor` of shape `(..., len(feature_layers) * hidden_size)`):
                Hidden states of the target, one layer behind the other, and the context of [`FeatureDraftModel.pool`]
                behind them, where there is one.

        Returns:
            `torch.Tensor` of shape `(..., hidden_size)`, or wider where the layer reads more.
        """
        return features

    def deepen(self, features: torch.Tensor, depth: int) -> torch.Tensor:
        """
        Turn the draft's own predictions into what the layer reads of them a level deeper.

        Args:
            features (`torch.Tensor` of shape `(..., hidden_size)`):
                Predictions, with the context behind them as for [`FeatureDraftModel.fuse`].
            depth (`int`):
                Levels below the root, from 1.

        Returns:
            `torch.Tensor` of the shape that [`FeatureDraftModel.fuse`] gives.
        """
        return features

    def logits(self, features: torch.Tensor, target: Any) -> torch.Tensor:
        """
        Turn predicted features into logits of the target's vocabulary; tokens that are not drafted get the lowest.

        Args:
            features (`torch.Tensor` of shape `(..., hidden_size)`):
                Predicted features.
            target ([`Target`]):
                The target, whose head drafts use that have none.
        """
        if self.head is None:
            return target.logits(features, self.logit_scales)
        own = (self.logit_scales or target.scales).of_logits(self.own_logits(features))
        logits = own.new_full((*own.shape[:-1], self.config.get_text_config().vocab_size), torch.finfo(own.dtype).min)
        return logits.index_copy_(-1, self.draft_token_ids, own)

    def own_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Turn predicted features `(..., hidden_size)` into what a head of its own says of the tokens it knows."""
        return self.head(features)

    @torch.no_grad()
    def choose_tokens(self, counts: torch.Tensor, head: nn.Module) -> None:
        """
        Choose the tokens that its own head knows, and take over what the target's head knows of them.

        Args:
            counts (`torch.Tensor` of shape `(vocab_size,)`):
                How often the target says each token.
            head (`torch.nn.Module`):
                Head of the target.
        """
        token_ids = counts.topk(self.head.out_features).indices.sort().values
        self.draft_token_ids.copy_(token_ids)
        # Called, not looked into: it may be quantised.
        weight = next(head.parameters())
        dtype = weight.dtype if weight.is_floating_point() else self.dtype
        probes = torch.eye(self.config.get_text_config().hidden_size, dtype=dtype, device=weight.device)
        columns = head(probes) - head(torch.zeros_like(probes[:1]))
        self.head.weight.copy_(columns[:, token_ids.to(columns.device)].T)

    def check_target(self, target: PreTrainedModel | PreTrainedConfig) -> None:
        """
        Raise a `ValueError` unless this draft can read the target's features and use its embeddings and head.

        Args:
            target (`PreTrainedModel` or `PreTrainedConfig`):
                Model to draft for, or its config.
        """
        self.config.check_target(target)

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, custom_generate: bool | str | Path = False, **kwargs: Any
    ) -> None:
        """
        Save the draft as Transformers saves any model.

        Args:
            save_directory (`str` or `Path`):
                Folder to save to.
            custom_generate (`bool`, `str` or `Path`, *optional*, defaults to `False`):
                Whether to write `custom_generate/generate.py` beside it, by which `generate(custom_generate=folder,
                trust_remote_code=True)` drafts without an import. A name is the repository, or the folder, that it
                will load the draft from; `save_directory` by default.
            args, kwargs:
                As in [`~transformers.PreTrainedModel.save_pretrained`].
        """
        check_custom_generate(custom_generate, bool(kwargs.get("push_to_hub")))
        check_output(save_directory, "save_directory")  # Transformers only logs that it is a file
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.should_save_on_this_rank(args[0] if args else kwargs.get("is_main_process", True)):
            # Transformers has removed shards of earlier saves, and nothing else of them.
            remove_replaced(save_directory, shards_stay=True, variant=kwargs.get("variant"))
        if custom_generate:
            write_custom_generate(save_directory, Path(save_directory) if custom_generate is True else custom_generate)

    def push_to_hub(self, repo_id: str, *, custom_generate: bool | str = False, **kwargs: Any) -> str:
        """
        Upload the draft as Transformers uploads any model.

        Args:
            repo_id (`str`):
                Repository to upload to.
            custom_generate (`bool` or `str`, *optional*, defaults to `False`):
                Whether to upload `custom_generate/generate.py`, too, by which `generate(custom_generate=repo_id,
                trust_remote_code=True)` drafts without an import. A name is the repository of the draft, if another.
            kwargs:
                As in [`~transformers.PreTrainedModel.push_to_hub`].
        """
        check_custom_generate(custom_generate)
        if not custom_generate:
            return super().push_to_hub(repo_id, **kwargs)
        # It saves by a method of the draft, and uploads what that leaves.
        place = repo_id if custom_generate is True else custom_generate
        self.save_pretrained = partial(self.save_pretrained, custom_generate=place)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            del self.save_pretrained
