"""What a program with types calls. `make types` checks that a type checker follows it."""

from typing import Any, assert_type

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd import (
    AutoDraftModel,
    BlockDraftConfig,
    BlockDraftModel,
    CallInputs,
    Committed,
    Eagle3DraftModel,
    EnsembleDrafter,
    MSDConfig,
    MSDDraftModel,
    NgramDrafter,
    SpeculativeStats,
    StaticRuntime,
    Target,
    TokenTree,
    TreeAssistant,
    TreeCandidateGenerator,
    TreeConfig,
    VLMDrafter,
    attach,
    convert_msd_checkpoint,
    detach,
    disable,
    enable,
    speculative_trace,
)


class Roots(TreeCandidateGenerator):
    def draft(self, committed: Committed) -> TokenTree:
        assert_type(committed.token_ids, torch.Tensor)
        return TokenTree.root(committed.root_token_ids)


class Rooted:
    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        assert_type(inputs.arguments, dict[str, Any])
        return Roots()


def assistants(small: PreTrainedModel, config: PreTrainedConfig) -> list[Any]:
    tree = TreeConfig(num_nodes=24, depth=6, top_k=4)
    assert_type(tree.num_nodes, int)
    draft = MSDDraftModel(MSDConfig.from_target(config))
    draft.tree_config = tree
    block = BlockDraftModel(BlockDraftConfig.from_target(config))
    converted = convert_msd_checkpoint("folder", config)
    assert_type(converted, MSDDraftModel)
    rooted: TreeAssistant = Rooted()
    return [
        draft,
        block,
        AutoDraftModel.from_pretrained("folder", target=config),
        VLMDrafter(small, tree_config=tree),
        EnsembleDrafter(small, views=["multimodal", "text_only"], weights=[0.5, 0.5]),
        NgramDrafter(),
        StaticRuntime(draft),
        rooted,
    ]


def calls(target: PreTrainedModel, processor: Any, draft: Eagle3DraftModel, picture: Image.Image) -> None:
    attach(target, draft)
    with speculative_trace(processor, [picture]) as trace:
        pass
    trace.save("trace.html")
    detach(target)
    disable()
    enable()


def figures(stats: SpeculativeStats) -> tuple[float, int, list[float]]:
    return stats.mean_acceptance_length, stats.num_rounds, stats.acceptance_by_depth
