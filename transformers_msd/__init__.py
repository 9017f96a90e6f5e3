"""Lossless speculative decoding for vision-language models, as a drop-in for Transformers' `generate()`."""

from transformers import AutoConfig, AutoModel

from transformers_msd import compat  # noqa: F401  # first: it says what the installed Transformers lacks
from transformers_msd.call.outputs import SpeculativeDecoderOnlyOutput
from transformers_msd.call.stats import SpeculativeStats
from transformers_msd.drafters.attached import attach, detach
from transformers_msd.drafters.base import CallInputs, TreeAssistant, TreeCandidateGenerator
from transformers_msd.drafters.ensemble.drafter import EnsembleDrafter
from transformers_msd.drafters.ensemble.views import Caption, Multimodal, Pooled, Prompts, TextOnly, ViewPrompt
from transformers_msd.drafters.ngrams import NgramDrafter
from transformers_msd.drafters.runtime import StaticRuntime
from transformers_msd.drafters.vlm import VLMDrafter
from transformers_msd.hook import disable, enable
from transformers_msd.models.auto import AutoDraftModel
from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.eagle3.configuration_eagle3 import Eagle3Config
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.hivis.configuration_hivis import HiViSConfig
from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.convert_msd import convert_msd_checkpoint
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.vispec.configuration_vispec import ViSpecConfig
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.tracing.trace import SpeculativeTrace, speculative_trace
from transformers_msd.trees.tree import TokenTree, TreeConfig


__version__ = "0.1.0"
__all__ = [
    "AutoDraftModel",
    "BlockDraftConfig",
    "BlockDraftModel",
    "CallInputs",
    "Caption",
    "Committed",
    "Eagle3Config",
    "Eagle3DraftModel",
    "EnsembleDrafter",
    "HiViSConfig",
    "HiViSDraftModel",
    "MSDConfig",
    "MSDDraftModel",
    "Multimodal",
    "NgramDrafter",
    "Pooled",
    "Prompts",
    "SpeculativeDecoderOnlyOutput",
    "SpeculativeStats",
    "SpeculativeTrace",
    "StaticRuntime",
    "Target",
    "TextOnly",
    "TokenTree",
    "TreeAssistant",
    "TreeCandidateGenerator",
    "TreeConfig",
    "VLMDrafter",
    "ViSpecConfig",
    "ViSpecDraftModel",
    "ViewPrompt",
    "attach",
    "convert_msd_checkpoint",
    "detach",
    "disable",
    "enable",
    "speculative_trace",
]

for config_class, model_class in (
    (MSDConfig, MSDDraftModel),
    (Eagle3Config, Eagle3DraftModel),
    (BlockDraftConfig, BlockDraftModel),
    (HiViSConfig, HiViSDraftModel),
    (ViSpecConfig, ViSpecDraftModel),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
enable()
