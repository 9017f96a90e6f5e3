"""What drafts for whatever a user passes as `assistant_model`."""

from typing import Any

from transformers_msd.drafters.base import TreeAssistant
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.models.base import FeatureDraftModel


# Draft models that a user passes as they are, and the assistants that draft with them.
DRAFTERS = {FeatureDraftModel: MSDDrafter}


def assistant_for(assistant_model: Any) -> TreeAssistant | None:
    """
    Return the assistant that drafts for what was passed as `assistant_model`: itself if it is one, the drafter of a
    draft model, and `None` for whatever belongs to Transformers.
    """
    if isinstance(assistant_model, TreeAssistant) and not isinstance(assistant_model, type):
        return assistant_model
    for draft_class, drafter in DRAFTERS.items():
        if isinstance(assistant_model, draft_class):
            return drafter(assistant_model)
    return None
