"""A training run as a recipe describes it, and its models."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from transformers_msd.drafters.loading import auto_class
from transformers_msd.drafters.model import MOST_PADDING
from transformers_msd.models.auto import OURS
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.places import check_place
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.fields import check_types
from transformers_msd.trainer.loading import check_dtype, load_processor
from transformers_msd.traits.support import is_multimodal


DEFAULT_RECIPE = "recipe.yaml"
MOST_BYTES = 100_000
# Drafts that can be trained.
KINDS = {"msd": OURS["msd_draft"], "eagle3": OURS["eagle3_draft"], "block": OURS["block_draft"]}


@dataclass
class DraftArguments:
    """
    What a recipe says besides [`MSDTrainingConfig`].

    Args:
        target_model (`str`):
            Folder or Hub repository of the target.
        datasets (`list[str]`):
            What to train on, all of it put together: folders saved by `datasets`, JSON, JSONL or Parquet files, or Hub
            datasets as `org/name`, `org/name:config`. Rows hold `messages`, or `conversations` as LLaVA's and
            ShareGPT's data do, and may hold `images` or `image`; paths are relative to their file.
        max_rows_per_dataset (`int`, *optional*):
            Rows taken of each dataset, drawn by a seed of their own; all by default.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of Hub datasets.
        image_folder (`str`, *optional*):
            Folder that the paths of pictures are relative to, instead of their file's.
        num_eval_prompts (`int`, *optional*, defaults to 8):
            Rows of text, and as many with pictures, that are held out to evaluate on.
        eval_max_new_tokens (`int`, *optional*, defaults to 64):
            Length of the answers that the acceptance length is measured on.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype the target is loaded in.
        target_adapter (`str`, *optional*):
            PEFT adapter of the target.
        draft_model (`str`, *optional*):
            Draft to go on from. A new one is made by default.
        draft (`str`, *optional*, defaults to `"msd"`):
            Kind of a new draft: `"msd"`, `"eagle3"` or `"block"`.
        draft_config (`dict`, *optional*):
            Overrides of [`MSDConfig.from_target`], [`Eagle3Config.from_target`] or [`BlockDraftConfig.from_target`].
            Beside `draft_model` they must be what it has.
        draft_vlm (`str`, *optional*):
            Folder or Hub repository of a small VLM (for a target of text alone: a language model) to distil by
            [`VLMDraftTrainer`], instead of training a draft on the target's features. Its vision tower is frozen.
    """

    target_model: str = field(metadata={"help": "Folder or Hub repository of the target."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Folders, files or Hub datasets."})
    max_rows_per_dataset: int | None = field(default=None, metadata={"help": "Rows taken of each dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of Hub datasets."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that picture paths are relative to."})
    num_eval_prompts: int = field(default=8, metadata={"help": "Rows of text, and with pictures, held out."})
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Length of the answers to held-out prompts."})
    dtype: str = field(default="auto", metadata={"help": "Dtype the target is loaded in."})
    target_adapter: str | None = field(default=None, metadata={"help": "PEFT adapter of the target."})
    draft_model: str | None = field(default=None, metadata={"help": "Draft to go on from."})
    draft: str = field(default="msd", metadata={"help": "Kind of a new draft.", "choices": tuple(KINDS)})
    draft_config: dict[str, Any] | None = field(default=None, metadata={"help": "Overrides for a new draft."})
    draft_vlm: str | None = field(default=None, metadata={"help": "Small VLM to distil instead."})

    def check_places(self) -> None:
        """Raise a `ValueError` for a path where nothing is."""
        for name in ("target_model", "target_adapter", "draft_model", "draft_vlm", "image_folder"):
            if getattr(self, name):
                check_place(getattr(self, name), name)
        for dataset in self.datasets:
            check_place(dataset.partition(":")[0], "datasets")

    def __post_init__(self) -> None:
        check_types(self, {field.name for field in fields(self)} - {"datasets"})
        if not isinstance(self.datasets, list) or not all(isinstance(name, str) for name in self.datasets):
            raise ValueError(f"`datasets` must be a list of names, got {self.datasets!r}. Write `[name, other]`.")
        if not self.datasets:
            raise ValueError("`datasets` must name a dataset at least, got none. Set it in the recipe.")
        check_dtype(self.dtype, "dtype")
        for name, least in (("num_eval_prompts", 0), ("eval_max_new_tokens", 1), ("max_rows_per_dataset", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` must be a whole number, {least} at least, got {value!r}.")
        if self.draft not in KINDS:
            raise ValueError(f"`draft` must be one of {tuple(KINDS)}, got {self.draft!r}.")
        if self.draft_vlm and (self.draft_model or self.draft_config or self.draft != "msd"):
            raise ValueError(
                "`draft_vlm` takes the place of a draft on features, got `draft_model`, `draft_config` or "
                "`draft` beside it. Remove one or the other."
            )


# What a recipe from the Hub may say besides: how a draft is trained, not where it goes.
HUB_FIELDS = frozenset(
    {
        *(argument.name for argument in fields(DraftArguments)),
        *MSDTrainingConfig.__annotations__,
        *("adam_beta1", "adam_epsilon", "bf16", "data_seed", "dataloader_num_workers", "disable_tqdm", "eval_steps"),
        *("eval_strategy", "fp16", "gradient_accumulation_steps", "gradient_checkpointing", "logging_steps"),
        *("logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "max_steps", "num_train_epochs", "optim"),
        *("per_device_eval_batch_size", "per_device_train_batch_size", "save_steps", "save_strategy"),
        *("save_total_limit", "seed", "tf32", "warmup_steps", "weight_decay"),
    }
)


def find_recipe(name: str) -> str:
    """
    Find a recipe: a file, or `org/repo` (its `recipe.yaml`) or `org/repo:file.yaml` on the Hub.

    Raises:
        ValueError: If it is neither.
    """
    if Path(name).is_file():
        return name
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+\.ya?ml)?", name) is not None
    if not is_repository or (":" not in name and name.endswith((".yaml", ".yml"))):
        raise ValueError(f"A recipe must be a file, `org/repo` or `org/repo:file.yaml`, got {name!r}. Check the path.")
    repo_id, _, file = name.partition(":")
    return hf_hub_download(repo_id, file or DEFAULT_RECIPE)


class _Loader(yaml.SafeLoader):
    """Loads plain values, and no references, by which a short file could become a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe must not refer to itself (`*name`)")
        return super().compose_node(parent, index)


def read_recipe(path: str) -> dict[str, Any]:
    """
    Read what a recipe says.

    Raises:
        ValueError: If it is no recipe, or one that would set the environment of the process.
    """
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"A recipe must have {MOST_BYTES} bytes at most, got {size} in {path}.")
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no recipe: {' '.join(str(error).split())}.") from None
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise ValueError(f"A recipe must be a mapping of names to values, got {type(recipe).__name__} in {path}.")
    if "env" in recipe:
        raise ValueError("A recipe can't set environment variables, got `env`. Set them where you call the command.")
    return recipe


def check_hub_recipe(path: str, options: Iterable[str]) -> None:
    """
    Raise a `ValueError` if a recipe from the Hub says what is for whoever runs it to say: where files are written and
    what is sent elsewhere, which processes are started, and how.

    Args:
        path (`str`):
            The recipe.
        options (`Iterable[str]`):
            Options of the command line, which are stronger.
    """
    given = {option.lstrip("-").partition("=")[0].replace("-", "_") for option in options if option.startswith("--")}
    refused = sorted(set(read_recipe(path)) - HUB_FIELDS - given)
    if refused:
        raise ValueError(
            f"A recipe from the Hub can't set {', '.join(f'`{name}`' for name in refused)}. If you want it, say so on "
            f"the command line: `--{refused[0]} ...`."
        )


def load_target(arguments: DraftArguments) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """Load the target of a recipe and its processor."""
    arguments.check_places()
    config = AutoConfig.from_pretrained(arguments.target_model)
    target = auto_class(config).from_pretrained(arguments.target_model, dtype=arguments.dtype)
    if arguments.target_adapter:
        from peft import PeftModel

        target = PeftModel.from_pretrained(target, arguments.target_adapter)
    return target, load_processor(arguments.target_model)


def draft_config(arguments: DraftArguments, target_config: PreTrainedConfig) -> PreTrainedConfig:
    """Make the config of the draft of a recipe: of one on the target's features, or of a draft VLM."""
    if arguments.draft_vlm:
        return AutoConfig.from_pretrained(arguments.draft_vlm)
    if arguments.draft_model:
        # What others published may say no `model_type`.
        found = PreTrainedConfig.get_config_dict(arguments.draft_model)[0].get("model_type")
        if found not in OURS:
            raise ValueError(
                f"`draft_model` must be a draft of ours, got one of `model_type` {found!r} in "
                f"{arguments.draft_model}. Turn what others published into one: `transformers-msd convert`."
            )
        if arguments.draft != "msd" and KINDS[arguments.draft] is not OURS[found]:
            raise ValueError(
                f"`draft_model` must be of the kind that `draft` says, {arguments.draft!r}, got one of `model_type` "
                f"{found!r} in {arguments.draft_model}. Leave `draft` out: the folder says it."
            )
        config = OURS[found].config_class.from_pretrained(arguments.draft_model)
        known, given = config.get_text_config().to_dict() | config.to_dict(), arguments.draft_config or {}
        own = {name: known.get(name) for name, value in given.items() if known.get(name) != value}
        if own:
            raise ValueError(
                f"`draft_config` must be what the draft in {arguments.draft_model} has, {own}, got {given}. Leave it "
                "out to go on from that draft, or leave `draft_model` out for a new one."
            )
        config.check_target(target_config)
        return config
    return KINDS[arguments.draft].config_class.from_target(target_config, **(arguments.draft_config or {}))


def check_draft(arguments: DraftArguments) -> None:
    """Raise a `ValueError` for a draft that can't be one of its target, by their configs: no weights are loaded."""
    arguments.check_places()
    draft_config(arguments, AutoConfig.from_pretrained(arguments.target_model))


def make_draft(arguments: DraftArguments, target_config: PreTrainedConfig) -> FeatureDraftModel:
    """Make or load the draft of a recipe, in float32."""
    config = draft_config(arguments, target_config)
    draft_class = OURS[config.model_type]
    if arguments.draft_model:
        return draft_class.from_pretrained(arguments.draft_model, dtype=torch.float32)
    return draft_class(config)


def load_draft_vlm(arguments: DraftArguments, target_config: PreTrainedConfig) -> PreTrainedModel:
    """
    Load the draft VLM of a recipe, in float32 and with the target's vocabulary.

    Raises:
        ValueError: If one of draft and target reads pictures, and the other does not.
    """
    draft, target = draft_config(arguments, target_config), target_config
    if is_multimodal(draft) != is_multimodal(target):
        raise ValueError(
            f"`draft_vlm` must read what its target reads, got {draft.model_type} for {target.model_type}, one of "
            "which reads text alone. Choose another draft."
        )
    model = auto_class(draft).from_pretrained(arguments.draft_vlm, dtype=torch.float32)
    ours, theirs = (config.get_text_config().vocab_size for config in (draft, target))
    if 0 < abs(ours - theirs) <= MOST_PADDING:
        model.resize_token_embeddings(theirs)
    if is_multimodal(draft):
        model.get_encoder("image").requires_grad_(False)
    return model
