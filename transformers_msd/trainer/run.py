"""One process of a training run, as `transformers-msd train` launches it: `python -m transformers_msd.trainer.run`."""

import argparse
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import yaml
from transformers import AutoConfig, PrinterCallback, ProcessorMixin
from transformers.integrations import unset_hf_deepspeed_config
from trl import TrlParser

from transformers_msd.models.auto import OURS
from transformers_msd.models.places import check_output
from transformers_msd.trainer.base import DraftTrainer
from transformers_msd.trainer.callbacks import AcceptanceLengthCallback
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.dataset import answer_token_ids, rows_of_stage, usable_rows
from transformers_msd.trainer.loading import check_template, device_of, load_processor
from transformers_msd.trainer.plan import Plan, lengths_of, make_plan, sample_rows
from transformers_msd.trainer.progress import ProgressCallback, keep_bars_out_of_logs
from transformers_msd.trainer.recipe import (
    DraftArguments,
    check_draft,
    draft_config,
    load_draft_vlm,
    load_target,
    make_draft,
    read_recipe,
)
from transformers_msd.trainer.rows import hold_out, load_rows
from transformers_msd.trainer.trainer import MSDTrainer, check_draft_settings
from transformers_msd.trainer.vlm import VLMDraftTrainer, check_settings


def _mapping(text: str) -> dict[str, Any] | None:
    if text.lower() == "none":
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be fields and values, as '{{draft_vocab_size: 32000}}', got {text!r}")
    return value


class RecipeParser(TrlParser):
    """Parses command lines and recipes; a recipe says what to train, and sets nothing else ([`read_recipe`])."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest == "draft_config":  # argparse reads no mappings
                action.type = _mapping

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}, on the command line or in `--config`. `--help` lists all options.\n")

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        args = list(sys.argv[1:] if args is None else args)
        if "--config" in args[:-1]:
            read_recipe(args[args.index("--config") + 1])
        return super().parse_args_and_config(args, **kwargs)


def make_parser() -> RecipeParser:
    """Make the parser of recipes and command lines."""
    parser = RecipeParser([DraftArguments, MSDTrainingConfig], prog="transformers-msd train", allow_abbrev=False)
    if not sys.stderr.isatty():
        parser.set_defaults(disable_tqdm=True)  # in a log lines are read, not bars
    return parser


def train(arguments: DraftArguments, args: MSDTrainingConfig) -> DraftTrainer:
    """Train, evaluate and save the draft of a recipe."""
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard the target as it is loaded; `prepare_target` does it
    check_draft(arguments)
    check_output(args.output_dir, "output_dir", target=arguments.target_model)
    target, processor = load_target(arguments)
    if args.assistant_only_loss:
        check_template(processor)
    rows, prompts = hold_out(
        load_rows(arguments, isinstance(processor, ProcessorMixin)), arguments.num_eval_prompts, args.seed
    )
    torch.manual_seed(args.seed)
    trainer_class, make = (VLMDraftTrainer, load_draft_vlm) if arguments.draft_vlm else (MSDTrainer, make_draft)
    trainer = trainer_class(
        model=make(arguments, target.config),
        target=target,
        args=args,
        train_dataset=rows,
        eval_dataset=prompts if len(prompts) else None,
        processing_class=processor,
    )
    if len(prompts):
        trainer.add_callback(AcceptanceLengthCallback(trainer, prompts, arguments.eval_max_new_tokens))
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressCallback())
    trainer.train(resume_from_checkpoint=checkpoint_of(args))
    trainer.save_model()
    trainer.create_model_card(dataset_name=arguments.datasets)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.datasets)
    return trainer


def checkpoint_of(args: MSDTrainingConfig) -> str | bool | None:
    """Return the checkpoint to go on from; True is the newest."""
    resume = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(resume).lower(), resume)


def plan(arguments: DraftArguments, args: MSDTrainingConfig, num_processes: int) -> Plan:
    """Resolve a recipe without loading a weight."""
    if arguments.draft_vlm:
        check_settings(args)
    check_output(args.output_dir, "output_dir", target=arguments.target_model)
    config = AutoConfig.from_pretrained(arguments.target_model)
    processor = load_processor(arguments.target_model)
    rows, _ = hold_out(
        load_rows(arguments, isinstance(processor, ProcessorMixin)), arguments.num_eval_prompts, args.seed
    )
    if args.assistant_only_loss:
        check_template(processor)
    rows = usable_rows(rows, processor, args.max_length)
    dtype = config.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    draft = draft_config(arguments, config)
    if not arguments.draft_vlm:
        check_draft_settings(OURS[draft.model_type], args)
    text_rows, _ = rows_of_stage(rows, args.stage)
    trained = rows.select(text_rows) if args.stage == "text" else rows
    sample = sample_rows(trained)
    lengths = lengths_of(sample, processor)
    num_supervised = sum(lengths) / len(lengths)
    if args.assistant_only_loss:
        num_supervised = sum(map(len, answer_token_ids(sample, processor))) / len(sample)
    device = device_of("cpu" if args.use_cpu else None)
    return make_plan(config, draft, args, dtype or torch.float32, rows, lengths, num_supervised, device, num_processes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("transformers_msd").setLevel(logging.INFO)
    keep_bars_out_of_logs()
    # What remains are options of the launcher.
    draft_arguments, training_config, _ = make_parser().parse_args_and_config(return_remaining_strings=True)
    try:
        train(draft_arguments, training_config)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).debug("training ended", exc_info=True)
        sys.exit(f"transformers-msd: {' '.join(str(error).split())}")
