"""What configs of drafts on a target's features have in common."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.traits.decoders import check_decoder, number_of
from transformers_msd.traits.tokens import special_token_ids
from transformers_msd.trees.tree import TreeConfig


# Fields of configs that say nothing of what a draft computes.
UNSAID = {
    *("architectures", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "use_cache"),
    "tree_config",
}


class DraftConfig(PreTrainedConfig):
    """Base of the configs of drafts on a target's features."""

    def check(self) -> None:
        """Raise a `ValueError` for a tree or a vocabulary that can't be."""
        if self.tree_config is not None:
            TreeConfig.checked(self.tree_config)
        vocab_size = self.get_text_config().vocab_size
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must be between 1 and the target's {vocab_size} tokens, got "
                f"{self.draft_vocab_size}. Leave it out to draft all of them."
            )

    @property
    def target_hidden_size(self) -> int:
        """Width of the target's hidden states."""
        return self.get_text_config().hidden_size

    def check_target(self, target: PreTrainedModel | PreTrainedConfig) -> None:
        """
        Raise a `ValueError` unless such a draft can read a target's features and use its embeddings and head.

        Args:
            target (`PreTrainedModel` or `PreTrainedConfig`):
                Model to draft for, or its config.
        """
        theirs = getattr(target, "config", target).get_text_config()
        ours = {"hidden_size": self.target_hidden_size, "vocab_size": self.get_text_config().vocab_size}
        for name, size in ours.items():
            if size != getattr(theirs, name):
                raise ValueError(
                    f"The draft was made for a target of `{name}` {size}, got {type(target).__name__} with "
                    f"{getattr(theirs, name)}. Load the draft of this target, or train one: "
                    f"`{type(self).__name__}.from_target(target.config)`."
                )
        num_layers, layers = number_of(theirs, "num_hidden_layers") or 0, getattr(self, "feature_layers", [])
        if any(not -num_layers - 1 <= layer <= num_layers for layer in layers):
            raise ValueError(
                f"The draft reads hidden states {layers} of its target, got one of {num_layers} layers. Pass the "
                "target that it was trained for, or other `feature_layers`."
            )

    @classmethod
    def fit_saved(cls, saved: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """
        Bring what a file says into the form that is asked for today.

        Args:
            saved (`dict[str, Any]`):
                Fields of the file that are used.
            given (`dict[str, Any]`):
                Fields that a user sets in place of those of the file.
        """
        return saved

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        found = config_dict.get("model_type")
        if found != cls.model_type:
            raise ValueError(
                f"Expected the config of a draft of ours, of `model_type` {cls.model_type!r}, got {found!r}. Load the "
                "folder of a draft, one that others published by `AutoDraftModel.from_pretrained(folder, "
                f"target=target)`; for a target there is `{cls.__name__}.from_target(target.config)`."
            )
        own = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        given = {name: kwargs.pop(name) for name in own & kwargs.keys()}
        for name in cls.sub_configs_defaults.keys() & given.keys():
            if isinstance(given[name], dict) and isinstance(config_dict.get(name), dict):
                given[name] = config_dict[name] | given[name]
        saved = {name: value for name, value in config_dict.items() if name not in given}
        try:
            return super().from_dict(given | cls.fit_saved(saved, given), **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from None


def checked_tree(tree_config: TreeConfig | Mapping[str, Any], most_levels: int | None) -> TreeConfig:
    """
    Return a tree as it is, and make one of its fields, as deep as the draft can where they don't say how deep.

    Raises:
        ValueError: If it is none, or deeper than a draft of `most_levels` can draft.
    """
    if most_levels is not None and isinstance(tree_config, Mapping):
        tree_config = {"depth": min(TreeConfig.depth, most_levels), **tree_config}
    tree = TreeConfig.checked(tree_config)
    if most_levels is not None and tree.depth > most_levels:
        raise ValueError(
            f"`TreeConfig.depth` must be at most {most_levels}, as many tokens as the draft says in a block, got "
            f"{tree.depth}. Lower it."
        )
    return tree


ConfigType = TypeVar("ConfigType", bound=DraftConfig)


def make_draft_config(
    config_class: type[ConfigType],
    target_config: PreTrainedConfig,
    layer_class: type[PreTrainedConfig],
    layer_fields: Mapping[str, Any],
    own: Mapping[str, Any],
    own_names: tuple[str, ...],
    overrides: Mapping[str, Any],
) -> ConfigType:
    """
    Make the config of a draft for a target.

    Args:
        config_class (`type[DraftConfig]`):
            Class of the config.
        target_config (`PreTrainedConfig`):
            Config of the target.
        layer_class (`type[PreTrainedConfig]`):
            Class of the text config, which is that of the draft's layers.
        layer_fields (`dict[str, Any]`):
            Fields of the text config.
        own (`dict[str, Any]`):
            Fields of the config.
        own_names (`tuple[str, ...]`):
            Names of all of them that may be set.
        overrides (`dict[str, Any]`):
            Fields of both that a user sets.
    """
    text_config = target_config.get_text_config()
    fields = {**layer_fields, **special_token_ids(target_config), "tie_word_embeddings": False}
    unknown = sorted(set(overrides) - set(own_names) - set(fields))
    if unknown:
        raise ValueError(
            f"Overrides must be fields of `{config_class.__name__}` or `{layer_class.__name__}`, got {unknown}. "
            "Check the spelling, or set them on the returned config."
        )
    for name in ("hidden_size", "vocab_size"):
        if name in overrides and overrides[name] != getattr(text_config, name):
            raise ValueError(
                f"`{name}` must be the target's, {getattr(text_config, name)}, got {overrides[name]}: the draft "
                "reads its features and says its tokens. Make a draft smaller with `intermediate_size` or "
                "`draft_vocab_size`."
            )
    visual = overrides.get("visual_token_ids") or ()
    if isinstance(visual, list | tuple) and any(token_id < 0 for token_id in visual if isinstance(token_id, int)):
        raise ValueError(
            f"`visual_token_ids` must be tokens of the target, got {visual}. Pass those that stand for pictures "
            "in what its processor makes of a prompt."
        )
    own = {**own, **{name: overrides[name] for name in own_names if name in overrides}}
    of_layers = {name: value for name, value in overrides.items() if name not in own_names}
    try:
        if of_layers:
            check_decoder(layer_class, fields, of_layers)
        config = config_class(text_config=layer_class(**{**fields, **of_layers}), **own)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from None
    config.check_target(target_config)
    return config


def check_target_config(target_config: Any) -> None:
    """Raise a `ValueError` for what is no config of a target."""
    if not isinstance(target_config, PreTrainedConfig) or isinstance(target_config, DraftConfig):
        raise ValueError(
            f"`target_config` must be the config of a target, got {type(target_config).__name__}. Pass "
            "`target.config`, or what `AutoConfig.from_pretrained` gives."
        )
    if target_config.is_encoder_decoder:
        raise ValueError(
            "`target_config` must be the config of a target that is a decoder alone, got "
            f"{type(target_config).__name__}, which has an encoder, too: drafting does not serve such models."
        )
