"""How far something is, and how long it will take: a bar in a terminal, plain lines in a log."""

import sys
import time
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging


INTERVAL = 15.0  # seconds between two lines
_TOLD = ("eval_loss", "eval_acceptance_length", "eval_speedup")


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def keep_bars_out_of_logs() -> None:
    """Turn off the bars of Transformers and Datasets where stderr is no terminal."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


class Progress:
    """
    Tells on stderr how far something is.

    Args:
        unit (`str`):
            What is counted.
        total (`int`):
            How many there will be.
        start (`int`, *optional*, defaults to 0):
            How many an earlier run has done.
        is_shown (`bool`, *optional*, defaults to `True`):
            Whether anything is told: one process of a run does.
        has_bar (`bool`, *optional*):
            Whether a bar is drawn, by default in a terminal; else lines are written.
    """

    def __init__(
        self, unit: str, total: int, start: int = 0, is_shown: bool = True, has_bar: bool | None = None
    ) -> None:
        self.unit, self.total, self.start, self.number, self.about = unit, total, start, start, ""
        self._is_shown, self._began = is_shown, time.perf_counter()
        self._last = self._began
        has_bar = sys.stderr.isatty() if has_bar is None else has_bar
        self._bar = tqdm(total=total, initial=start, unit=unit, leave=False) if has_bar and is_shown else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(is_whole=error[0] is None)

    def update(self, number: int, about: str | None = None) -> None:
        """Note how many are done, and what is said of them; a line follows if the last is old enough."""
        self.number, self.about = number, self.about if about is None else about
        if self._bar is not None:
            self._bar.set_postfix_str(self.about, refresh=False)
            self._bar.update(number - self._bar.n)
        elif time.perf_counter() - self._last >= INTERVAL and number < self.total:
            self.tell(self.about)

    def tell(self, about: str, is_last: bool = False) -> None:
        """Write a line."""
        self._last = time.perf_counter()
        passed, done = self._last - self._began, self.number - self.start
        parts = [f"{self.unit} {self.number:,} of {self.total:,}", *([about] if about else [])]
        if is_last:
            parts.append(f"took {duration(passed)}")
        elif done > 0 and self.number < self.total:
            parts.append(f"{duration(passed / done * (self.total - self.number))} left")
        if self._is_shown:
            sys.stderr.write(f"{', '.join(parts)}\n")
            sys.stderr.flush()

    def close(self, is_whole: bool = True) -> None:
        """Remove the bar, or write the last line."""
        if self._bar is not None:
            self._bar.close()
        elif is_whole:
            self.tell(self.about, is_last=True)


class ProgressCallback(TrainerCallback):
    """Write how far a training run is, its loss, and what every evaluation found."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress = Progress("step", state.max_steps, state.global_step, state.is_world_process_zero, False)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.update(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self._progress.update(state.global_step, f"loss {logs['loss']:.4g}")
        found = [f"{name} {value:.4g}" for name, value in logs.items() if name.startswith(_TOLD)]
        if found:
            self._progress.tell(", ".join(found))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.close()
