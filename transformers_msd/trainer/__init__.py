"""Training of drafts, on TRL. Needs the extra `train`."""

from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.trainer import MSDTrainer


__all__ = ["MSDTrainer", "MSDTrainingConfig"]
