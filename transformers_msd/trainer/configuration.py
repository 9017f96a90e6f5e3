"""Settings of a training run."""

from dataclasses import dataclass, field
from os import PathLike

from trl import SFTConfig

from transformers_msd.models.places import check_output
from transformers_msd.trainer.fields import check_least, check_types


STAGES = ("text", "multimodal", "ramp")
_NOT_NEGATIVE = ("learning_rate", "feature_noise", "weight_decay", "max_grad_norm", "num_train_epochs")
_AT_LEAST_1 = (
    "num_blocks",
    "num_unroll_steps",
    "head_chunk_size",
    "top_k_loss_tokens",
    "max_length",
    "per_device_train_batch_size",
)
# Of Transformers, which takes anything for them.
_BASE_FIELDS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "seed", "weight_decay")
_LOSS_WEIGHTS = ("feature_loss_weight", "token_loss_weight", "top_k_loss_weight", "probability_loss_weight")


@dataclass
class MSDTrainingConfig(SFTConfig):
    r"""
    Settings of an [`MSDTrainer`]. Those of [`~trl.SFTConfig`] that concern its loss are ignored.

    Other defaults than there are MSD's (arXiv 2505.14260): `learning_rate=5e-5`, `adam_beta2=0.95`,
    `max_grad_norm=0.5`, `max_length=2048`, `assistant_only_loss=True`; and `activation_checkpointing=False`, which
    saves nothing in one layer, and `ddp_find_unused_parameters=False`, since a draft has none.

    Args:
        feature_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the smooth L1 loss between predicted and true features (MSD, arXiv 2505.14260).
        token_loss_weight (`float`, *optional*, defaults to 0.1):
            Weight of the cross-entropy between the draft's and the target's distributions (MSD). Small drafts learn
            faster with 1.
        top_k_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the cross-entropy over the target's likeliest tokens (HASS, arXiv 2408.15766, uses 1.0 in a last
            stretch).
        top_k_loss_tokens (`int`, *optional*, defaults to 10):
            How many tokens that loss looks at.
        probability_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the L1 distance between the draft's and the target's probabilities (ViSpec, arXiv 2509.15235,
            uses 10.0, and no feature loss, in its second stage).
        feature_noise (`float`, *optional*, defaults to 0.2):
            Width of the uniform noise on the target's features, scaled by 512 over the length of the row (EAGLE, arXiv
            2401.15077). It follows from `seed`, the epoch and the row, and there is none in evaluation.
        num_unroll_steps (`int`, *optional*, defaults to 1):
            Forwards of the draft per step. From the second on it reads its own features, as in decoding (HASS, arXiv
            2408.15766, uses 3). MSD trains with 1.
        unroll_decay (`float`, *optional*, defaults to 1.0):
            How much each of these steps weighs beside the one before (EAGLE-3, arXiv 2503.01840, uses 0.8, and 7
            steps).
        num_blocks (`int`, *optional*, defaults to 64):
            Blocks begun in a row at a time, at tokens that are drawn, where a [`BlockDraftModel`] is trained; it has
            `unroll_decay` for its levels.
        prefix_weights (`bool`, *optional*, defaults to `False`):
            Whether a level of a block weighs as much as it is likely that those before it stand, and not by
            `unroll_decay` (SpecDiff-2, arXiv 2511.00606).
        stage (`str`, *optional*, defaults to `"ramp"`):
            `"text"` trains on the rows of text alone. `"multimodal"` trains on all rows, with and without pictures,
            shuffled together. `"ramp"` trains on rows of text in the first half of the steps; in the second half each
            row is one with pictures by a probability that rises from 0 to 1 (MSD), and an epoch is as long as the
            fewer of the two kinds.
        head_chunk_size (`int`, *optional*, defaults to 512):
            Rows whose logits are in memory at a time.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Norm the gradient is clipped to."})
    max_length: int | None = field(
        default=2048, metadata={"help": "Longer rows are cut, or dropped if they hold pictures."}
    )
    assistant_only_loss: bool = field(default=True, metadata={"help": "Train on the assistant's tokens alone."})
    # Unset, it is off, or as `gradient_checkpointing` says, Transformers' older name of it, which TRL turns on.
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations to save memory.", "nargs": "?", "const": True}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of `activation_checkpointing`.", "nargs": "?", "const": True}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters that a step does not use."}
    )
    use_cpu: bool = field(
        default=False,
        metadata={"help": "Leave accelerators alone. There is no `device`: the launcher deals devices to processes."},
    )
    feature_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the smooth L1 loss on features."})
    token_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the soft cross-entropy on tokens."})
    top_k_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy over the target's likeliest tokens."}
    )
    top_k_loss_tokens: int = field(default=10, metadata={"help": "How many tokens that loss looks at."})
    probability_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the L1 distance between the probabilities of tokens."}
    )
    feature_noise: float = field(
        default=0.2, metadata={"help": "Width of the uniform noise on the target's features, times 512 over length."}
    )
    num_unroll_steps: int = field(
        default=1, metadata={"help": "Forwards of the draft per step; from the second on it reads its own features."}
    )
    unroll_decay: float = field(default=1.0, metadata={"help": "Weight of a forward beside the one before."})
    num_blocks: int = field(
        default=64, metadata={"help": "Blocks begun in a row at a time, where a block draft is trained."}
    )
    prefix_weights: bool = field(
        default=False,
        metadata={"help": "Weigh a block's levels by the chance that those before stand, not by `unroll_decay`."},
    )
    stage: str = field(
        default="ramp",
        metadata={
            "help": "`text` alone, all rows (`multimodal`), or text, then pictures (`ramp`).",
            "choices": STAGES,
        },
    )
    head_chunk_size: int = field(default=512, metadata={"help": "Rows whose logits are in memory at a time."})

    @property
    def step_weights(self) -> list[float]:
        """Weights of the unrolled steps, 1 in all."""
        weights = [self.unroll_decay**step for step in range(self.num_unroll_steps)]
        return [weight / sum(weights) for weight in weights]

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str | PathLike | None):
            raise ValueError(f"`output_dir` must be a folder's name, got {self.output_dir!r}. Write it in quotes.")
        super().__post_init__()
        check_output(self.output_dir, "output_dir")
        check_types(self, (*MSDTrainingConfig.__annotations__, *_BASE_FIELDS))
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {STAGES}, got {self.stage!r}.")
        for name in (*_LOSS_WEIGHTS, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"`{name}` must be a number that is not negative, got {value}.")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"`adam_beta2` must be at least 0 and less than 1, got {self.adam_beta2}.")
        if self.max_steps == 0:
            raise ValueError("`max_steps` must be at least 1, or -1 for all of `num_train_epochs`, got 0.")
        if self.max_steps < 0 and self.num_train_epochs == 0:
            raise ValueError("`num_train_epochs` must be above 0, or `max_steps` at least 1, got 0.")
        if not any(getattr(self, name) for name in _LOSS_WEIGHTS):
            raise ValueError(f"Nothing would be learned: all of {', '.join(_LOSS_WEIGHTS)} are 0. Set one of them.")
        check_least(self, **dict.fromkeys(_AT_LEAST_1, 1))
        if not 0 < self.unroll_decay <= 1:
            raise ValueError(f"`unroll_decay` must be above 0 and at most 1, got {self.unroll_decay}.")
        if self.activation_checkpointing and self.num_unroll_steps > 1:
            raise ValueError(
                "`activation_checkpointing` drops the cache that unrolled steps read, got "
                f"`num_unroll_steps={self.num_unroll_steps}`. Turn one of them off."
            )
