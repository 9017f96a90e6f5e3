"""A program: calls all of Transformers that this package calls, and prints the warnings that say deprecated."""

import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from training_fixtures import make_trainer
from zoo import VOCAB_SIZE, make_draft_model, make_inputs, make_target

from training.tiny_world.build.target import build_model, build_processor
from training.tiny_world.build.train_draft_vlm import build_draft_vlm
from training.tiny_world.world.rows import training_dataset
from transformers_msd import (
    BlockDraftConfig,
    BlockDraftModel,
    Eagle3Config,
    Eagle3DraftModel,
    EnsembleDrafter,
    HiViSConfig,
    HiViSDraftModel,
    MSDConfig,
    MSDDraftModel,
    NgramDrafter,
    StaticRuntime,
    TreeConfig,
    ViSpecConfig,
    ViSpecDraftModel,
    VLMDrafter,
)
from transformers_msd.bench.assistants import PhaseTimer
from transformers_msd.bench.measure import run_method
from transformers_msd.bench.methods import PLAIN, Method
from transformers_msd.compat import CACHE
from transformers_msd.trainer import check_parity


TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)


def draft() -> None:
    """Draft in every way, over two turns."""
    target, inputs = make_target("llava"), make_inputs("llava")
    msd = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    msd.tree_config = TREE
    small = make_draft_model("llava")
    assistants: list[Any] = [msd, VLMDrafter(small, tree_config=TREE), EnsembleDrafter(small, tree_config=TREE)]
    kinds = ((Eagle3DraftModel, Eagle3Config), (BlockDraftModel, BlockDraftConfig), (HiViSDraftModel, HiViSConfig))
    for kind, config in (*kinds, (ViSpecDraftModel, ViSpecConfig)):
        assistants.append(kind(config.from_target(target.config)).eval())
        if assistants[-1].needs_tokens:
            assistants[-1].choose_tokens(torch.arange(VOCAB_SIZE), target.get_output_embeddings())
    assistants.append(NgramDrafter())
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "disable_compile": True}
    for assistant in (*assistants, *(StaticRuntime(assistant) for assistant in assistants)):
        for kind in ("dynamic", "static"):
            call = {"assistant_model": assistant, **settings}
            first = target.generate(**inputs, **call, do_sample=True, cache_implementation=kind)
            if kind == "dynamic":
                target.generate(input_ids=first.sequences, **{CACHE: first[CACHE]}, **call)
    check_parity(target, msd, inputs, max_new_tokens=4)
    for method in (PLAIN, Method("msd", {"assistant_model": msd}, drafts_trees=True)):
        timer = PhaseTimer(msd) if method.drafts_trees else None
        run_method(target, inputs, method, {"max_new_tokens": 4}, seed=0, timer=timer)


def train(folder: Path) -> None:
    """Train a draft of either kind for a step, and save it."""
    processor = build_processor(num_rows=100)
    target, dataset = build_model(processor, num_layers=1), training_dataset(12)
    for name, model in (("msd", None), ("vlm", build_draft_vlm(target))):
        trainer = make_trainer(target, dataset, processor, folder / name, draft=model, save_steps=1)
        trainer.train()
        trainer.evaluate()


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    torch.set_num_threads(1)
    records = Records()
    logging.getLogger("transformers").addHandler(records)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draft()
        train(Path(sys.argv[1]))
    # A module's caller is torch's own `Module.__call__`; what other packages do among themselves is not ours.
    others = re.compile(r"/site-packages/(?!transformers/|torch/nn/)")
    told = [
        f"{warning.category.__name__}: {warning.message} ({warning.filename})"
        for warning in caught
        if not others.search(warning.filename)
    ]
    print(json.dumps([message for message in records.messages + told if "deprecat" in message.lower()]))
