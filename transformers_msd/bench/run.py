"""One benchmark from its settings to its report."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from transformers_msd.bench.divergence import find_divergences
from transformers_msd.bench.measure import Run, run_method, run_methods
from transformers_msd.bench.methods import COMPILED_PLAIN, PLAIN, Method, draft_names, make_methods
from transformers_msd.bench.models import load_model, named_config, random_draft, random_target
from transformers_msd.bench.prompts import batched, load_prompts, random_prompts
from transformers_msd.bench.saved import is_measured, origin
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.bench.settling import TOLERANCE, Settling, unsettled
from transformers_msd.bench.summary import summarize
from transformers_msd.compat import attention_of
from transformers_msd.drafters.loading import check_fits, load_draft
from transformers_msd.models.places import check_place
from transformers_msd.trainer.loading import encode_prompts, load_processor
from transformers_msd.traits.sizes import num_bytes_per_step


Inputs = dict[str, torch.Tensor]


def run_benchmark(
    arguments: BenchArguments,
    command: str,
    on_run: Callable[[str, int, int], None] | None = None,
    on_cell: Callable[[dict[str, Any]], None] | None = None,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Run a benchmark.

    Args:
        arguments ([`BenchArguments`]):
            Its settings.
        command (`str`):
            The command that reports name.
        on_run (`Callable`, *optional*):
            Called after every run of a method with what it belongs to, its number, and how many there are at the most.
        on_cell (`Callable`, *optional*):
            Called with the report after every comparison.
        before (`dict[str, Any]`, *optional*):
            A report of the same settings, whose comparisons are not measured again.

    Returns:
        `dict[str, Any]`: The report as it is saved in JSON. Times are in seconds, memory in bytes.
    """
    target, drafts, make_batches, num_prompts = _prepare(arguments)
    methods, left_out = make_methods(arguments, target, drafts)
    report: dict[str, Any] = {
        "target": arguments.target_model or f"{arguments.random_weights}, random weights",
        "drafts": {name: draft.num_parameters() for name, draft in drafts.items()},
        "num_parameters": target.num_parameters(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": attention_of(target.config),
        "num_bytes_per_step": num_bytes_per_step(target),
        "floor_seconds": None,
        "command": command,
        "num_prompts": num_prompts,
        "settings": asdict(arguments),
        **{name: [] if before is None else before[name] for name in ("cells", "counted_temperatures", "divergences")},
    } | origin(arguments)
    if arguments.memory_bandwidth is not None:
        report["floor_seconds"] = report["num_bytes_per_step"] / (arguments.memory_bandwidth * 1e9)
    wanted = [
        (temperature, batch_size)
        for temperature in arguments.temperatures
        for batch_size in arguments.batch_sizes
        if not is_measured(report, temperature, batch_size)
    ]
    counter = _Counter([_num_runs(arguments, methods, size, num_prompts) for _, size in wanted], on_run)
    for temperature in arguments.temperatures:
        settings = _call_settings(arguments, temperature)
        for batch_size in [size for own, size in wanted if own == temperature]:
            batches, floor_seconds = make_batches(batch_size), report["floor_seconds"]
            cell = _run_cell(arguments, target, batches, methods, settings, batch_size, floor_seconds, counter.count)
            cell["left_out"] = [{"name": name, "reason": reason} for name, reason in left_out] + cell["left_out"]
            report["cells"].append({"temperature": temperature, "batch_size": batch_size} | cell)
            counter.end_cell()
            if on_cell is not None:
                on_cell(report)
        if arguments.num_divergences and temperature not in report["counted_temperatures"]:
            ours = [method for method in methods if method.drafts_trees and method.simulated is None]
            batches = make_batches(1)
            report["divergences"] += [
                {"temperature": temperature}
                | count_divergences(target, batches, method, settings, arguments.num_divergences, arguments.seed)
                for method in ours
            ]
            report["counted_temperatures"].append(temperature)
            if on_cell is not None:
                on_cell(report)
    return report


def _run_cell(
    arguments: BenchArguments,
    target: PreTrainedModel,
    batches: list[Inputs],
    methods: list[Method],
    settings: dict[str, Any],
    batch_size: int,
    floor_seconds: float | None,
    on_run: Callable[[str], None],
) -> dict[str, Any]:
    """Compare all methods at one temperature and batch size."""
    own = _methods_of_cell(methods, batch_size)
    left_out = [
        (method.name, "Transformers answers one prompt at a time there") for method in methods if method not in own
    ]
    mode = f"T = {settings['temperature']:g}" if settings["do_sample"] else "greedy"
    label = f"{mode}, batch size {batch_size}"
    notify, settling = partial(on_run, label), Settling(arguments)
    results, failures = run_methods(
        target, batches, own, settings, settling.most, arguments.seed, notify, settling.is_enough
    )
    compiled_plain = next((result for result in results if result.method.name == COMPILED_PLAIN), None)
    rows = [summarize(result, results[0], compiled_plain, floor_seconds) for result in results]
    for result in results:
        result.method.free()
    plain_runs = results[0].passes[-1]
    for result, row in zip(results, rows, strict=True):
        if result.method.is_exact or not settings["do_sample"]:
            row |= _equality(target, batches, settings, arguments.seed, result.passes[-1], plain_runs)
    return {
        "label": label,
        "num_batches": len(batches),
        "num_passes": len(results[0].passes),
        "tolerance": TOLERANCE,
        "unsettled": unsettled(results),
        "methods": rows,
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out + failures],
    }


def _methods_of_cell(methods: list[Method], batch_size: int) -> list[Method]:
    return [method for method in methods if batch_size == 1 or method.is_batched]


def _num_runs(arguments: BenchArguments, methods: list[Method], batch_size: int, num_prompts: int) -> int:
    """Count the most runs of a cell: of each method for each batch and pass, and again with its phases timed."""
    for_a_batch = sum(1 + method.drafts_trees for method in _methods_of_cell(methods, batch_size))
    return (Settling(arguments).most + 1) * for_a_batch * math.ceil(num_prompts / batch_size)


def _prepare(
    arguments: BenchArguments,
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel], Callable[[int], list[Inputs]], int]:
    """Make models and prompts; the prompts as a function from a batch size to batches."""
    device, seed = arguments.device, arguments.seed
    if arguments.random_weights:
        config = named_config(arguments.random_weights)
        dtype = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        torch.manual_seed(seed)
        target = random_target(config, dtype, device)
        drafts = {"random MSD draft": random_draft(config, dtype, device)}
        prompts = random_prompts(config, arguments.num_rows, arguments.prompt_length, dtype, device, seed)

        def make_batches(batch_size: int) -> list[Inputs]:
            return [
                {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
                for rows in batched(prompts, batch_size)
            ]

        return target, drafts, make_batches, len(prompts)
    names = draft_names(arguments.draft_models)
    check_place(arguments.target_model, "target_model")
    for path in arguments.draft_models:
        check_place(path, "draft_models")
        check_fits(path, arguments.target_model)
    processor = load_processor(arguments.target_model)
    prompts = load_prompts(arguments, AutoConfig.from_pretrained(arguments.target_model))
    target = load_model(arguments.target_model, arguments.dtype, device)
    drafts = {name: load_draft(path, target) for name, path in zip(names, arguments.draft_models, strict=True)}

    def make_batches(batch_size: int) -> list[Inputs]:
        return [encode_prompts(processor, rows).to(device) for rows in batched(prompts, batch_size)]

    return target, drafts, make_batches, len(prompts)


def _call_settings(arguments: BenchArguments, temperature: float) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": temperature > 0}
    if temperature:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return settings


class _Counter:
    """Counts runs; a cell that ends early counts as if it had not."""

    def __init__(self, cells: list[int], on_run: Callable[[str, int, int], None] | None) -> None:
        self._total, self._on_run = sum(cells), on_run
        self._ends = accumulate(cells)
        self._number = 0

    def count(self, label: str) -> None:
        self._number += 1
        if self._on_run is not None:
            self._on_run(label, self._number, self._total)

    def end_cell(self) -> None:
        self._number = next(self._ends)


def _equality(
    target: PreTrainedModel,
    batches: list[Inputs],
    settings: Mapping[str, Any],
    seed: int,
    runs: list[Run],
    plain_runs: list[Run],
) -> dict[str, Any]:
    """Count the rows whose tokens are plain's, and tell where the others first differ."""
    divergences = []
    for index, (inputs, run, plain) in enumerate(zip(batches, runs, plain_runs, strict=True)):
        found = find_divergences(target, inputs, settings, seed + index, plain.tokens, run.tokens)
        divergences += [{"batch": index} | asdict(divergence) for divergence in found]
    num_rows = sum(len(run.tokens) for run in runs)
    return {"num_rows": num_rows, "num_equal": num_rows - len(divergences), "divergences": divergences}


def count_divergences(
    target: PreTrainedModel,
    prompts: list[Inputs],
    method: Method,
    settings: Mapping[str, Any],
    num_generations: int,
    seed: int,
) -> dict[str, Any]:
    """
    Count how many of several generations differ from plain's, and tell by which gap.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        prompts (`list[dict[str, Any]]`):
            Batches of one prompt. Samples are drawn for them in turn, each from another seed; a greedy answer is
            always the same, so that there are no more than prompts.
        method ([`Method`]):
            The method that is compared.
        settings (`dict[str, Any]`):
            Arguments of `generate`.
        num_generations (`int`):
            Generations at most.
        seed (`int`):
            Seed of the first.
    """
    if not settings["do_sample"]:
        num_generations = min(num_generations, len(prompts))
    divergences, num_tokens = [], 0
    for number in range(num_generations):
        inputs, own_seed = prompts[number % len(prompts)], seed + number
        plain = run_method(target, inputs, PLAIN, settings, own_seed)
        run = run_method(target, inputs, method, settings, own_seed)
        num_tokens += plain.num_tokens
        divergences += find_divergences(target, inputs, settings, own_seed, plain.tokens, run.tokens)
    method.free()
    return {
        "name": method.name,
        "num_generations": num_generations,
        "num_tokens": num_tokens,
        "num_different": len(divergences),
        "divergences": [asdict(divergence) for divergence in divergences],
    }
