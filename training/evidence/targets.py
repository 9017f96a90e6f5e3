"""
Which architectures of the installed Transformers are served, tried one by one: a tiny model of random weights of each,
as a target with an MSD draft and as its own draft.

    python -m training.evidence.targets                  # all of them, into docs/targets.json
    python -m training.evidence.targets llama mllama     # some, printed
    python -m training.evidence.targets --write          # docs/targets.md from docs/targets.json

Prompts are two of different lengths in a batch, of text and, where a model takes them, with a picture each, for some
also with a video each. Answers are greedy and sampled. `make targets` does it on the lowest and the newest
Transformers.
"""

import argparse
import json
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from training.evidence.targets_page import DOCS, kind, write_page
from training.evidence.tiny import FIRST_SPECIAL, make_model, make_prompts, model_types, sees_pictures
from training.evidence.tiny_fields import VIDEOS, VOCAB_SIZE
from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter


TREE = TreeConfig(num_nodes=16, depth=4, top_k=3, gate=False)
NUM_TOKENS, SECONDS = 20, 240


def answers(model: PreTrainedModel, prompts: dict[str, torch.Tensor], assistant: Any = None) -> list[torch.Tensor]:
    """Answer prompts, greedily and sampled."""
    tokens = []
    for do_sample in (False, True):
        torch.manual_seed(5)
        settings = {"do_sample": do_sample, "max_new_tokens": NUM_TOKENS, "disable_compile": True}
        settings["suppress_tokens"] = list(range(FIRST_SPECIAL, VOCAB_SIZE))
        tokens.append(model.generate(**prompts, **settings, assistant_model=assistant))
    return tokens


def say(error: Exception) -> str:
    """Put an error into one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_ours(error: Exception) -> bool:
    """Tell whether an error was raised by this package."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals["__name__"].startswith("transformers_msd.")


def outcome(
    model: PreTrainedModel,
    prompts: dict[str, torch.Tensor],
    plain: list[torch.Tensor] | None,
    make_assistant: Callable[[], Any],
) -> str:
    """Tell what comes of a draft: `equal`, `refused: why`, or a fault."""
    ran: list[int] = []
    # A model may generate by another inside it.
    generators = [part for part in model.modules() if isinstance(part, GenerationMixin)]
    hooks = [part.register_forward_pre_hook(lambda *args: ran.append(1)) for part in generators]
    try:
        drafted = answers(model, prompts, make_assistant())
    except ValueError as error:
        return f"{'refused' if is_ours(error) and not ran else 'LATE'}: {' '.join(str(error).split())}"
    except Exception as error:  # whatever it is, it is a fault to be shown
        return f"FAILS: {say(error)}"
    finally:
        for hook in hooks:
            hook.remove()
    if plain is None:
        return "UNEQUAL: plain `generate` raises"
    return "equal" if all(torch.equal(*both) for both in zip(plain, drafted, strict=True)) else "UNEQUAL"


def plain_answers(model: PreTrainedModel, prompts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Answer prompts without a draft; raise an error where answers differ from run to run."""
    plain = answers(model, prompts)
    if not all(torch.equal(*both) for both in zip(plain, answers(model, prompts), strict=True)):
        raise ValueError("answers differ from run to run")
    return plain


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise an error after some time."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def attempt(model: PreTrainedModel, seen: str = "") -> dict[str, str]:
    """Try a model with prompts of one kind, against what plain `generate` answers if it does."""

    def msd() -> MSDDraftModel:
        torch.manual_seed(1)
        draft = MSDDraftModel(MSDConfig.from_target(model.config)).eval()
        draft.tree_config = TREE
        return draft

    kind_of_prompt = f", {seen}" if seen else ""
    plain, wrong = None, ""
    with time_limit():
        try:
            prompts = make_prompts(model, seen)
        except Exception as error:
            return {f"not tried{kind_of_prompt}": f"no prompt: {say(error)}"}
        try:
            plain = plain_answers(model, prompts)
        except Exception as error:
            wrong = f"plain `generate`: {say(error)}"
        drafts = {"MSD draft": msd, "its own draft": lambda: VLMDrafter(model, tree_config=TREE)}
        found = {f"{name}{kind_of_prompt}": outcome(model, prompts, plain, make) for name, make in drafts.items()}
    # What plain `generate` can't answer can still be refused.
    if plain is None and {kind(said) for said in found.values()} != {"refused"}:
        return {f"not tried{kind_of_prompt}": wrong}
    return found


def row(model_type: str) -> dict[str, str]:
    """Try an architecture with prompts of text and, unless it is refused anyway, with pictures and videos."""
    try:
        with time_limit():
            model = make_model(model_type)
    except Exception as error:
        return {"not tried": f"no tiny model: {say(error)}"}
    found = attempt(model)
    if sees_pictures(model) and {kind(said) for said in found.values()} != {"refused"}:
        pictures = attempt(model, "pictures")
        found = pictures if "not tried" in found and "not tried, pictures" not in pictures else found | pictures
        found |= attempt(model, "videos") if model_type in VIDEOS else {}
    return found


def main() -> None:
    """Try models and print or save what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="some of them, all by default")
    parser.add_argument("--write", action="store_true", help="write docs/targets.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.write:
        write_page()
        return
    results = {}
    for name in arguments.model_types or model_types():
        results[name] = row(name)
        print(f"{name}: {results[name]}", flush=True)
    if not arguments.model_types:
        path = DOCS / "targets.json"
        every = json.loads(path.read_text()) if path.exists() else {}
        every[transformers.__version__] = results
        path.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
