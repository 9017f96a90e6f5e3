"""`transformers-msd convert`: turn a published checkpoint into a draft folder, with fewer tokens or for engines."""

import argparse

from transformers import AutoConfig, PreTrainedConfig

from transformers_msd.cli.options import positive
from transformers_msd.models.auto import AutoDraftModel
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.exporting import LAYOUTS, export_draft
from transformers_msd.models.places import check_output, check_place


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a published checkpoint into a draft folder",
        description="Turn a published checkpoint of MSD, EAGLE-3, HiViS, ViSpec, DFlash or DSpark, or a draft folder, "
        "into a draft folder. With --draft_vocab_size one that uses the target's head gets a head of its own for the "
        "tokens that the target says most, where that pays. With --to it is written as an engine reads it: "
        "`speculators` (vLLM) takes EAGLE-3 and blocks as others publish them; `sglang` takes EAGLE-3, and MSD for "
        "targets without pictures. What would be lost is told, and then nothing is written.",
    )
    parser.add_argument("checkpoint", help="folder or Hub repository of the published checkpoint, or of a draft")
    parser.add_argument("--target_model", required=True, help="folder or Hub repository of the target")
    parser.add_argument("--output", required=True, help="folder to write the draft to")
    parser.add_argument("--to", choices=LAYOUTS, help="write the layout of other readers instead of ours")
    parser.add_argument("--draft_vocab_size", type=positive, help="draft only so many tokens, the most frequent")
    parser.add_argument("--counts_from", nargs="+", help="datasets whose answers they are counted in, as in recipes")
    parser.add_argument("--dataset_split", default="train", help="split of Hub datasets")
    parser.add_argument("--acceptance_length", type=float, default=4.0, help="τ with all tokens, which is assumed")
    parser.add_argument("--force", action="store_true", help="draft fewer tokens even where it is slower")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert, cut the vocabulary where that is asked for, and save."""
    if (arguments.draft_vocab_size is None) != (arguments.counts_from is None):
        raise ValueError(
            "`draft_vocab_size` and `counts_from` belong together, got one of them. Give both, or neither to draft "
            "all tokens."
        )
    check_place(arguments.target_model, "target_model")
    check_output(arguments.output, "output", target=arguments.target_model, checkpoint=arguments.checkpoint)
    target_config = AutoConfig.from_pretrained(arguments.target_model)
    draft = AutoDraftModel.from_pretrained(arguments.checkpoint, target_config)
    if arguments.draft_vocab_size:
        draft = _cut(draft, target_config, arguments)
    if arguments.to is None:
        draft.save_pretrained(arguments.output)
    else:
        export_draft(draft, arguments.to, arguments.target_model, arguments.output)
    print(f"Wrote a draft of {draft.num_parameters():,} parameters to {arguments.output}.")


def _cut(
    draft: FeatureDraftModel, target_config: PreTrainedConfig, arguments: argparse.Namespace
) -> FeatureDraftModel:
    """Choose tokens and say what they gain."""
    from transformers_msd.trainer.loading import is_multimodal
    from transformers_msd.trainer.progress import keep_bars_out_of_logs
    from transformers_msd.trainer.recipe import DraftArguments
    from transformers_msd.trainer.rows import load_rows
    from transformers_msd.trainer.vocabulary import check_uses_head, cut_vocabulary

    check_uses_head(draft)
    keep_bars_out_of_logs()
    recipe = DraftArguments(
        target_model=arguments.target_model, datasets=arguments.counts_from, dataset_split=arguments.dataset_split
    )
    recipe.check_places()
    rows = load_rows(recipe, is_multimodal(target_config))
    smaller, cut = cut_vocabulary(
        *(draft, arguments.target_model, rows, arguments.draft_vocab_size),
        acceptance_length=arguments.acceptance_length,
        force=arguments.force,
    )
    print(f"Drafting {arguments.draft_vocab_size:,} of {draft.config.get_text_config().vocab_size:,} tokens: {cut}.")
    return smaller
