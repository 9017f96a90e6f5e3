"""What is compared: ways to call `generate`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from transformers_msd.bench.assistants import Simulated
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.drafters.ensemble.drafter import EnsembleDrafter
from transformers_msd.drafters.msd import MSDDrafter
from transformers_msd.drafters.ngrams import NgramDrafter
from transformers_msd.drafters.runtime import StaticRuntime
from transformers_msd.drafters.vlm import VLMDrafter
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.traits.tokens import visual_token_ids
from transformers_msd.trees.tree import TreeConfig


@dataclass(frozen=True)
class Method:
    """
    A way to decode.

    Args:
        name (`str`):
            What reports call it.
        call (`dict[str, Any]`):
            What it adds to the arguments of `generate`.
        drafts_trees (`bool`):
            Whether it is one of ours, and so returns statistics and can be split into phases.
        is_exact (`bool`):
            Whether samples from a seed are plain's, too.
        is_batched (`bool`):
            Whether it takes several prompts.
    """

    name: str
    call: dict[str, Any] = field(default_factory=dict)
    drafts_trees: bool = False
    is_exact: bool = True
    is_batched: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether an error in it is one of this package or of the call, not of a baseline."""
        return self.drafts_trees or not self.call

    @property
    def has_plain_forwards(self) -> bool:
        """Whether the target's forwards run as in plain `generate`, on a cache of the same kind."""
        return "cache_implementation" not in self.call

    @property
    def runtime(self) -> StaticRuntime | None:
        """What drafts by compiled code, where it is one."""
        assistant = self.call.get("assistant_model")
        return assistant if isinstance(assistant, StaticRuntime) else None

    @property
    def num_captures(self) -> int | None:
        """Functions that its runtime has compiled, where there is one."""
        return None if self.runtime is None else self.runtime.num_captures

    @property
    def simulated(self) -> Simulated | None:
        """The simulated draft, where it is one."""
        assistant = self.call.get("assistant_model") if self.runtime is None else self.runtime.assistant
        return assistant if isinstance(assistant, Simulated) else None

    def free(self) -> None:
        """Give back what its runtime keeps, where there is one."""
        if self.runtime is not None:
            self.runtime.free()


PLAIN = Method("plain generate")
COMPILED_PLAIN = "plain, static cache, compiled"


def make_methods(
    arguments: BenchArguments, target: PreTrainedModel, drafts: dict[str, PreTrainedModel]
) -> tuple[list[Method], list[tuple[str, str]]]:
    """
    List all that is compared, plain `generate` first, and what is not, with the reason.

    Args:
        arguments ([`BenchArguments`]):
            Settings of the benchmark.
        target ([`~transformers.PreTrainedModel`]):
            The target.
        drafts (`dict[str, PreTrainedModel]`):
            Drafts by the names they get in reports.
    """
    methods, left_out = [PLAIN], []
    if "static" in arguments.baselines:
        methods.append(_static(target, arguments.compile_on_cpu))
    if "prompt_lookup" in arguments.baselines:
        if arguments.random_weights:
            left_out.append(("prompt lookup", "random weights repeat nothing of a prompt"))
        else:
            # It would copy places of pictures, for which a forward then lacks the pictures, and Transformers raise.
            visual = visual_token_ids(target.config)
            call = {"prompt_lookup_num_tokens": 10} | ({"suppress_tokens": visual} if visual else {})
            methods.append(Method("prompt lookup", call, is_exact=False, is_batched=False))
    if "ngrams" in arguments.baselines and not arguments.random_weights:
        methods.append(Method("n-grams", {"assistant_model": NgramDrafter()}, drafts_trees=True))
    vocab_size = target.config.get_text_config().vocab_size
    for name, draft in drafts.items():
        reads_features = isinstance(draft, FeatureDraftModel)
        if "assisted" in arguments.baselines and not reads_features:
            if draft.config.get_text_config().vocab_size == vocab_size:
                call = {"assistant_model": draft}
                methods.append(Method(f"assisted generation, {name}", call, is_exact=False, is_batched=False))
            else:
                left_out.append((f"assisted generation, {name}", "it needs vocabularies of one size"))
        for assistant, label in _assistants(arguments, draft, name):
            methods += _ours(arguments, target, assistant, label)
    return methods, left_out


def _ours(arguments: BenchArguments, target: PreTrainedModel, assistant: Any, label: str) -> list[Method]:
    """List the ways to draft with an assistant: by each runtime, as it is and simulated."""
    drafting = [] if arguments.random_weights and arguments.simulate_acceptance else [(assistant, "")]
    for probability in arguments.simulate_acceptance:
        drafting.append((Simulated(assistant, probability), f", simulated {probability:g}"))
    methods = []
    for runtime in dict.fromkeys(arguments.runtimes):
        for own, suffix in drafting:
            call, name = {"assistant_model": own}, f"{label}{suffix}"
            if runtime != "eager":
                # One for each method: it holds what was compiled from the warm-up on.
                call = {"assistant_model": StaticRuntime(own)} | _compile_settings(target)
                name = f"{label}, {runtime} compiled{suffix}"
            if runtime == "all":
                call["cache_implementation"] = "static"
            methods.append(Method(name, call, drafts_trees=True))
    return methods


def _static(target: PreTrainedModel, compile_on_cpu: bool) -> Method:
    call = {"cache_implementation": "static"}
    if target.device.type == "cpu" and not compile_on_cpu:
        return Method("plain, static cache", call)
    return Method(COMPILED_PLAIN, call | _compile_settings(target))


def _compile_settings(target: PreTrainedModel) -> dict[str, Any]:
    """Return how to compile: on a GPU as Transformers does by default."""
    if target.device.type != "cpu":
        return {}
    compile_config = CompileConfig(mode="default")
    compile_config._compile_all_devices = True
    return {"compile_config": compile_config}


def _assistants(arguments: BenchArguments, draft: PreTrainedModel, name: str) -> list[tuple[Any, str]]:
    """Make the assistants of one draft, one for each tree and view."""
    kinds: list[tuple[Any, str]] = []
    for tree in arguments.tree_configs or [None]:
        if isinstance(draft, FeatureDraftModel):
            kinds.append((MSDDrafter(draft, tree), name))
            continue
        kinds.append((VLMDrafter(draft, tree_config=tree), name))
        for views in arguments.views:
            label = f"{name}, {views.replace(',', ' + ').replace('_', ' ')}"
            kinds.append((EnsembleDrafter(draft, tuple(views.split(",")), tree_config=tree), label))
    assistants = []
    for assistant, label in kinds:
        tree = assistant.tree_config
        if arguments.random_weights:
            assistant.tree_config = tree = replace(tree, gate=False, ngrams=False)
        assistants.append((assistant, f"{label} {_shape(tree)}"))
    return assistants


def _shape(tree: TreeConfig) -> str:
    sizes = f"{tree.num_nodes}/{tree.depth}/{tree.top_k}"
    if tree.topology is not None:
        return f"static {sizes}"
    return f"{sizes}/{tree.min_probability:g}" if tree.min_probability else sizes


def draft_names(paths: list[str]) -> list[str]:
    """Name drafts by their folders, by more of the path where these are equal."""
    for num_parts in range(1, 10):
        names = ["/".join(Path(path).parts[-num_parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"`draft_models` must differ, got {paths}. Name each once; give several `trees` instead.")
