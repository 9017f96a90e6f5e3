"""Running methods side by side, and what is noted of every run."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from transformers_msd.bench.assistants import PHASES, PhaseTimer
from transformers_msd.bench.methods import PLAIN, Method
from transformers_msd.trees.host import synchronize


_MOST_WARM_UPS = 16  # runs of one batch that compile something


class Stopwatch(BaseStreamer):
    """Notes when `generate` hands tokens over, and how many, which it does in every mode and decodes no slower by."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """
    One call of `generate`.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_steps)`):
            What was generated, on the CPU, padding behind ended rows included.
        num_tokens (`int`):
            Tokens of it up to the ends of their rows.
        num_decoded (`int`):
            Those of them that came after the first time tokens came.
        seconds (`float`):
            Time of the call.
        decode_seconds (`float`):
            Time after the first tokens.
        later_seconds (`float`):
            Time of all rounds but the first.
        num_rounds (`int`):
            Forwards of the target after the prefill.
        lengths (`list[list[int]]`):
            For each row the tokens that each of its rounds emitted.
        num_plain_steps (`int`):
            Rounds in which nothing was drafted because of the gate.
        peak_memory (`int`, *optional*):
            Bytes allocated on the device at most, above what was before the call. None on a CPU.
        kept_memory (`int`):
            Bytes allocated on the device that are still held after the call.
        phase_seconds (`dict[str, float]`, *optional*):
            Time of the phases in `later_seconds`, where they were timed.
    """

    tokens: torch.Tensor
    num_tokens: int
    num_decoded: int
    seconds: float
    decode_seconds: float
    later_seconds: float
    num_rounds: int
    lengths: list[list[int]]
    num_plain_steps: int = 0
    peak_memory: int | None = None
    kept_memory: int = 0
    phase_seconds: dict[str, float] | None = None


def run_method(
    target: PreTrainedModel,
    inputs: Mapping[str, Any],
    method: Method,
    settings: Mapping[str, Any],
    seed: int,
    timer: PhaseTimer | None = None,
) -> Run:
    """
    Call `generate` once.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        inputs (`dict[str, Any]`):
            A batch of prompts.
        method ([`Method`]):
            How to decode.
        settings (`dict[str, Any]`):
            Arguments of `generate` that all methods share.
        seed (`int`):
            Seed of sampling.
        timer ([`PhaseTimer`], *optional*):
            Of the method's assistant.
    """
    device = target.device
    watch = Stopwatch()
    before = _allocated(device)
    torch.manual_seed(seed)
    synchronize(device)
    with nullcontext(method.call) if timer is None else timer.timed(method.call) as call:
        start = time.perf_counter()
        output = target.generate(**inputs, **settings, **call, streamer=watch, return_dict_in_generate=True)
        synchronize(device)
        end = time.perf_counter()
    peak_memory = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None

    tokens = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
    ends = row_ends(tokens, target.generation_config.eos_token_id)
    if method.drafts_trees:
        stats = output.speculative_stats
        lengths = [[length for length in row if length] for row in stats.acceptance_lengths.T.tolist()]
        num_rounds, num_plain_steps = stats.num_rounds, stats.num_plain_steps
    else:
        # What comes at once is a round's: one token of each row, or of one row several.
        lengths = [watch.counts[1:]] if len(tokens) == 1 else [[1] * (end - 1) for end in ends]
        num_rounds, num_plain_steps = len(watch.counts) - 1, 0
    second = watch.times[1] if len(watch.times) > 1 else end
    del output
    return Run(
        tokens=tokens,
        num_tokens=sum(ends),
        num_decoded=sum(ends) - watch.counts[0],
        seconds=end - start,
        decode_seconds=end - watch.times[0],
        later_seconds=end - second,
        num_rounds=num_rounds,
        lengths=lengths,
        num_plain_steps=num_plain_steps,
        peak_memory=peak_memory,
        kept_memory=_allocated(device) - before,
        phase_seconds=None if timer is None else timer.seconds_since(second),
    )


def _allocated(device: torch.device) -> int:
    """Count the bytes allocated on a GPU, and begin to look for their peak; none on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()  # what a call leaves behind in cycles is no part of the next
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def row_ends(tokens: torch.Tensor, eos_token_id: int | list[int] | None) -> list[int]:
    """Count the tokens of each row up to and with the first EOS token."""
    if eos_token_id is None:
        return [tokens.shape[1]] * len(tokens)
    is_eos = torch.isin(tokens, torch.tensor(eos_token_id))
    before = (is_eos.cumsum(-1) == 0).sum(-1)
    return (before + 1).clamp(max=tokens.shape[1]).tolist()


@dataclass(frozen=True)
class Runs:
    """
    What a method did with all batches of prompts.

    Args:
        method ([`Method`]):
            The method.
        passes (`list[list[Run]]`):
            Runs of each timed pass, one for each batch.
        split (`list[list[Run]]`):
            Runs of each pass in which the phases were timed; none of a method that has no phases.
        warm_up (`list[Run]`):
            Runs that are no part of these: of the pass to warm up, and all in which something was compiled.
    """

    method: Method
    passes: list[list[Run]] = field(default_factory=list)
    split: list[list[Run]] = field(default_factory=list)
    warm_up: list[Run] = field(default_factory=list)


def run_methods(
    target: PreTrainedModel,
    batches: list[Mapping[str, Any]],
    methods: list[Method],
    settings: Mapping[str, Any],
    repeats: int,
    seed: int,
    on_run: Callable[[], None],
    is_enough: Callable[[list[Runs]], bool] | None = None,
) -> tuple[list[Runs], list[tuple[str, str]]]:
    """
    Let all methods answer all batches: once to warm up, then in timed passes, method after method for each batch, so
    that what disturbs the machine disturbs them all. Phases are timed in runs of their own beside these. A run in
    which a runtime compiled something is no part of a pass, and takes place again.

    Args:
        target ([`~transformers.PreTrainedModel`]):
            The target.
        batches (`list[dict[str, Any]]`):
            Batches of prompts.
        methods (`list[Method]`):
            Methods, plain `generate` first.
        settings (`dict[str, Any]`):
            Arguments of `generate` that all methods share.
        repeats (`int`):
            Timed passes at the most.
        seed (`int`):
            Seed of sampling; every batch has one of its own.
        on_run (`Callable`):
            Called after every run.
        is_enough (`Callable`, *optional*):
            Asked after every timed pass whether it may be the last.

    Returns:
        The runs of each method, and the names of baselines that raised an error with what it says.
    """
    assert methods[0] is PLAIN
    # Of each method and batch, what it last said.
    last: dict[tuple[str, int], torch.Tensor] = {}

    def run(runs: Runs, index: int, timer: PhaseTimer | None = None) -> Run:
        method = runs.method
        for _ in range(_MOST_WARM_UPS):
            if method.simulated is not None:
                known = last.get((method.name, index))
                method.simulated.continuation = last[PLAIN.name, index] if known is None else known
                method.simulated.seed = seed + index
            num_captures = method.num_captures
            result = run_method(target, batches[index], method, settings, seed + index, timer)
            last[method.name, index] = result.tokens
            if method.num_captures == num_captures:
                on_run()
                return result
            runs.warm_up.append(result)
        raise ValueError(
            f"A method must stop compiling before it is timed, got {method.name}, which compiled something in each of "
            f"{_MOST_WARM_UPS} runs. Leave it out, or pass prompts of fewer lengths."
        )

    results = [Runs(method) for method in methods]
    failures: list[tuple[str, str]] = []
    for number in range(repeats + 1):
        for result in results:
            result.passes.append([])
            result.split.append([])
        for index in range(len(batches)):
            for result in list(results):
                method = result.method
                try:
                    result.passes[-1].append(run(result, index))
                except Exception as error:
                    if method.is_ours:
                        raise
                    # That it can't answer these prompts belongs into the report.
                    failures.append((method.name, f"it raises {type(error).__name__}: {str(error).splitlines()[0]}"))
                    results.remove(result)
                    continue
                if method.drafts_trees:
                    result.split[-1].append(run(result, index, PhaseTimer(method.call["assistant_model"])))
        if number == 0:
            for result in results:
                result.warm_up.extend(result.passes.pop() + result.split.pop())
        elif is_enough is not None and is_enough(results):
            break
    return results, failures


def split_of(passes: list[list[Run]]) -> dict[str, float]:
    """
    Divide the time of a round among its phases, in seconds, by runs in which they were timed: medians over the passes.

    The first round of each run is left out. Without rounds, there is nothing to divide.
    """
    parts = []
    for runs in passes:
        num_rounds = sum(max(run.num_rounds - 1, 0) for run in runs)
        if num_rounds == 0:
            return {}
        own = {phase: sum(run.phase_seconds[phase] for run in runs) / num_rounds for phase in PHASES}
        parts.append(own | {"rest": sum(run.later_seconds for run in runs) / num_rounds - sum(own.values())})
    return {phase: median(part[phase] for part in parts) for phase in parts[0]}
