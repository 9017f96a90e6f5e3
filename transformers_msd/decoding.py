"""The decoding loop: draft a tree, verify it in one forward of the target, keep what the target would have said."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from transformers_msd.caches.captures import Captures
from transformers_msd.caches.carried import carry, take_carried
from transformers_msd.caches.check import check_cache, check_rows
from transformers_msd.call.emission import Emission
from transformers_msd.call.outputs import SpeculativeDecoderOnlyOutput
from transformers_msd.call.sampling import Sampler
from transformers_msd.call.stats import observer
from transformers_msd.compat import CACHE, num_prompt_columns
from transformers_msd.drafters.base import CallInputs, TreeAssistant, feature_layers_of, name_of, tree_config_of
from transformers_msd.drafters.gate import Evidence, Gate
from transformers_msd.drafters.ngrams import NgramBranches, Outcomes
from transformers_msd.target.attending import by_groups
from transformers_msd.target.stateful import StatefulTarget
from transformers_msd.target.target import Target
from transformers_msd.tracing.trace import trace_call
from transformers_msd.traits.support import check_reach, keeps_states
from transformers_msd.traits.tokens import encoded_token_ids
from transformers_msd.trees.noise import NoiseTape
from transformers_msd.trees.verify import verify


@dataclass(frozen=True)
class _Turn:
    """What a call leaves for the next turn on its cache."""

    drafted: Any
    evidence: Evidence
    outcomes: Outcomes


def tree_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant: TreeAssistant,
    arguments: dict[str, Any],
    streamer: BaseStreamer | None = None,
    captures: Captures | None = None,
    **model_kwargs: Any,
) -> SpeculativeDecoderOnlyOutput | torch.Tensor:
    """
    Generate the tokens of plain greedy or sampled decoding, several per forward of the target.

    Args:
        model (`PreTrainedModel`):
            The target.
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Ids of the prompt, as far as there are any.
        logits_processor (`LogitsProcessorList`):
            Processors of the call.
        stopping_criteria (`StoppingCriteriaList`):
            Criteria of the call.
        generation_config (`GenerationConfig`):
            Settings of the call.
        assistant (`TreeAssistant`):
            What the user passed as `assistant_model`.
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate` as the user passed them.
        streamer (`BaseStreamer`, *optional*):
            Streamer of the call.
        captures ([`Captures`], *optional*):
            Compiles what has fixed shapes: drafting and, with a static cache, the target.
        model_kwargs (`dict[str, Any]`):
            What `generate` prepared for the target's forward passes.
    """
    cache = model_kwargs[CACHE]
    check_cache(cache)
    make_target = StatefulTarget if keeps_states(model.config) else Target
    target_captures = captures if isinstance(cache, StaticCache) else None
    target = make_target(model, model_kwargs, generation_config, target_captures, feature_layers_of(assistant))
    returns_state = generation_config.return_dict_in_generate or vars(cache).get("_is_user_defined", False)
    emission = Emission(input_ids, stopping_criteria, generation_config, streamer, returns_state, observer.get())
    prompt_length = num_prompt_columns(input_ids, cache, model_kwargs, generation_config)
    target.max_steps = emission.max_steps
    check_rows(cache, len(input_ids), prompt_length, emission.max_steps or 1)
    tree_config = tree_config_of(assistant)
    num_nodes = 0 if tree_config is None else tree_config.num_nodes
    is_fixed = isinstance(cache, StaticCache)
    check_reach(model, model_kwargs, prompt_length, emission.max_steps, num_nodes, is_fixed)
    turn = take_carried(cache) or _Turn(None, Evidence(), Outcomes())

    unfit = encoded_token_ids(model.config)
    noise = None
    trace = trace_call(
        *(model, name_of(arguments.get("assistant_model", assistant)), generation_config.do_sample, arguments),
        *(input_ids, model_kwargs.get("attention_mask")),
    )
    with ExitStack() as leaving:
        leaving.callback(trace.finish, emission)
        # Whatever ends the call: the caller's cache and the generator are as plain's after the complete steps.
        if returns_state:
            leaving.callback(lambda: target.leave(emission.num_steps))
        # The prefill is a round, too: its tree is a root alone, the last token of the prompt.
        tree, outputs = target.prefill(input_ids)
        trace.mark("verify")
        leaving.enter_context(by_groups())
        cache, vocab_size = target.cache, outputs.logits.shape[-1]
        if generation_config.do_sample:
            noise = NoiseTape(len(input_ids), vocab_size, input_ids.device)
            leaving.callback(lambda: noise.leave(emission.num_steps))
            noise.open()
        sampler = Sampler(logits_processor, emission, noise)
        candidates = Gate(
            assistant.candidate_generator(target, CallInputs(arguments, sampler, turn.drafted, captures)),
            emission,
            is_active=tree_config is None or tree_config.gate,
            evidence=turn.evidence,
        )
        branches = None
        if tree_config is not None and tree_config.ngrams and tree_config.topology is None:
            branches = NgramBranches(
                tree_config, emission, sampler, vocab_size, unfit, turn.outcomes, captures is not None
            )
        while True:
            logits = outputs.logits[:, -tree.num_nodes :].to(input_ids.device, torch.float32, copy=True)
            choices, scores = sampler.choose(tree, logits)
            acceptance = verify(tree, choices)
            emission.emit(tree, acceptance, scores, logits, outputs.hidden_states)
            committed = target.commit(tree, acceptance, outputs, emission.tokens_of_rows)
            trace.mark("rest")
            trace.note(tree, choices, scores, acceptance, emission)
            if emission.is_done:
                break
            kept = emission.going_on()
            if kept is not None and captures is None and candidates.keep_sequences(kept):
                target.keep_sequences(kept)
                emission.keep_sequences(kept)
                committed = committed.keep_sequences(kept)
            if noise is not None:
                noise.free(min(emission.lengths))
            tree = candidates.draft(committed)
            if not candidates.is_resting:
                tree = tree.with_roots(committed.root_token_ids, unfit, vocab_size)
            trace.drafted(tree, candidates.is_resting)
            if branches is not None:
                tree = branches.graft(tree, candidates.forward_cost)
            tree = target.fit(emission.pad(tree))
            trace.mark("draft")
            outputs = target.forward_tree(tree)
            trace.mark("verify")

    stats = emission.finish(target.num_repeated)
    if returns_state:
        carry(cache, _Turn(candidates.carry(committed, target), candidates.evidence, turn.outcomes))
    if not generation_config.return_dict_in_generate:
        return emission.sequences
    return SpeculativeDecoderOnlyOutput(
        sequences=emission.sequences,
        scores=emission.outputs.scores,
        logits=emission.outputs.logits,
        hidden_states=emission.outputs.hidden_states,
        speculative_stats=stats,
        **{CACHE: cache},
    )
