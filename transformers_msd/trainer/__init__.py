"""Training of drafts, on TRL. Needs the extra `train`."""

from transformers_msd.compat import TRAINER_NAMES, check_names


check_names(TRAINER_NAMES)

from transformers_msd.trainer.callbacks import AcceptanceLengthCallback
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.metrics import AcceptanceLength, ExactMatch
from transformers_msd.trainer.parity import check_parity
from transformers_msd.trainer.trainer import MSDTrainer
from transformers_msd.trainer.vlm import VLMDraftTrainer
from transformers_msd.trainer.vocabulary import cut_vocabulary


__all__ = [
    "AcceptanceLength",
    "AcceptanceLengthCallback",
    "ExactMatch",
    "MSDTrainer",
    "MSDTrainingConfig",
    "VLMDraftTrainer",
    "check_parity",
    "cut_vocabulary",
]
