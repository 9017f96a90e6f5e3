"""What a finished run leaves beside the weights: its curves and a model card."""

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData

from transformers_msd.costs.provenance import commit
from transformers_msd.trainer.origin import hub_id_of, is_hub_id, license_of


logger = logging.getLogger(__name__)
_LOSSES = {"loss": "training", "eval_loss": "evaluation"}
_LENGTHS = ("acceptance_length", "acceptance_length_text", "acceptance_length_image")
_MARK = "<!-- Written by transformers-msd. Without this line the file is yours, and is kept. -->"
_CARD = """\
---
{card_data}
---

{mark}

# {name}

Draft of {target} for speculative decoding with `transformers-msd`: the same tokens as without it, sooner.

```python
from transformers import {target_class}, {processor_class}
{imports}

processor = {processor_class}.from_pretrained("{target_place}")
target = {target_class}.from_pretrained("{target_place}", dtype="{dtype}", device_map="auto")
draft = {loading}
messages = [{{"role": "user", "content": {question}}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(target.device)
target.generate(**inputs, assistant_model=draft, max_new_tokens=100)
```

## Measured

{measured}

τ is the number of tokens emitted per round, the bonus token included (τ - 1 is without it); the prefill and its token
are not counted.

- tree: `{tree}`
- hardware: {hardware}
- dtype of the target: {dtype}

## Trained

- data: {data}
- {num_steps} steps of {rows_per_step} rows, stage `{stage}`
- unrolled steps: {num_unroll_steps}, learning rate: {learning_rate}
- torch {torch}, transformers {transformers}, trl {trl}
- command: `{command}`
- commit: {commit}

![losses and acceptance length](training.png)

{method}
"""


def series(log_history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a value was logged, and the values."""
    points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and acceptance lengths over the steps of a run, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, length_axes = figure.subplots(1, 2)
    for name, label in _LOSSES.items():
        steps, values = series(log_history, name)
        if values:
            loss_axes.plot(steps, values, label=label, marker=".")
    for name in _LENGTHS:
        steps, values = series(log_history, f"eval_{name}")
        if values:
            label = name.removeprefix("acceptance_length").removeprefix("_") or "all"
            length_axes.plot(steps, values, label=f"{label} prompts", marker=".")
    loss_axes.set(title="Loss of the draft", xlabel="step", ylabel="loss, on a logarithmic scale", yscale="log")
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    if length_axes.lines:
        length_axes.axhline(1, color="0.4", linewidth=1, linestyle="--", label="plain decoding")
    else:
        length_axes.text(0.5, 0.5, "not measured", ha="center", transform=length_axes.transAxes)
    length_axes.set(title="Tokens emitted per round on held-out prompts", xlabel="step", ylabel="acceptance length τ")
    length_axes.set(xlim=loss_axes.get_xlim(), ylim=(0, None))
    for axes in (loss_axes, length_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def write_card(path: Path, name: str, values: dict[str, Any], log_history: list[dict[str, Any]]) -> None:
    """
    Write a model card.

    Args:
        path (`Path`):
            File to write.
        name (`str`):
            Name of the draft on the Hub.
        values (`dict[str, Any]`):
            What the card says of the run, apart from what is looked up here.
        log_history (`list[dict[str, Any]]`):
            What the trainer logged, from which the last acceptance lengths and the speed-up are taken.
    """
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        logger.warning("%s is not of a run, and is kept as it is: no model card was written.", path)
        return
    place = values["target"]
    hub_id = hub_id_of(place)
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation=(values["relation"] or None) if hub_id else None,
        datasets=[name for name in map(_repository, values["datasets"]) if "/" in name and is_hub_id(name)] or None,
        **license_of(place),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if values["is_multimodal"] else "text-generation",
        tags=values["tags"],
    )
    card = _CARD.format(
        card_data=data.to_yaml(),
        mark=_MARK,
        name=name,
        target=_told(place, hub_id, values["target_class"]),
        target_place=hub_id or place,
        processor_class="AutoProcessor" if values["is_multimodal"] else "AutoTokenizer",
        question='[{"type": "text", "text": "Hello!"}]' if values["is_multimodal"] else '"Hello!"',
        data=", ".join(f"`{dataset}`" for dataset in values["datasets"]),
        measured=_measured(log_history),
        command=_command(),
        commit=commit(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        **{key: value for key, value in values.items() if key not in ("target", "datasets")},
    )
    ModelCard(card).save(path)


def _repository(dataset: str) -> str:
    """Return the name of a dataset without its config."""
    return dataset if Path(dataset).exists() else dataset.partition(":")[0]


def _told(place: str, hub_id: str | None, target_class: str) -> str:
    """Tell which model the target is."""
    if hub_id is None:
        return f"a local `{target_class}`, loaded from `{place}`," if place else f"a `{target_class}`"
    link = f"[{hub_id}](https://huggingface.co/{hub_id})"
    return link if hub_id == place else f"{link}, a copy of which was loaded from `{place}`,"


def _measured(log_history: list[dict[str, Any]]) -> str:
    rows = []
    for name in _LENGTHS:
        _, values = series(log_history, f"eval_{name}")
        _, speedups = series(log_history, f"eval_{name.replace('acceptance_length', 'speedup')}")
        if values:
            label = name.removeprefix("acceptance_length").removeprefix("_") or "all"
            rows.append(f"| {label} | {values[-1]:.2f} | {f'{speedups[-1]:.2f}x' if speedups else 'not measured'} |")
    if not rows:
        return "No acceptance length was measured in training."
    header = ["| held-out prompts | τ | speed-up over plain `generate` |", "|---|---|---|"]
    return "\n".join([*header, *rows])


def _command() -> str:
    script = Path(sys.argv[0])
    name = "transformers-msd train" if script.parts[-2:] == ("trainer", "run.py") else script.name
    return " ".join([name, shlex.join(sys.argv[1:])]).strip()
