"""
Transformers' server, put together from its own parts. Needs the extra `serve`.

What is ours: a draft is attached to the model that has been loaded, and what a call says of its drafting is written
into the `usage` of its answer.
"""

import argparse
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from contextvars import ContextVar, copy_context
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
import uvicorn
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import nn
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState
from transformers.utils import logging

from transformers_msd import NgramDrafter, SpeculativeStats, StaticRuntime, attach
from transformers_msd.call.stats import observer
from transformers_msd.drafters.loading import load_assistant


# The seed of the request that is being read.
_seed: ContextVar[int | None] = ContextVar("transformers_msd_seed", default=None)


class DraftedModels(ModelManager):
    """
    Loads the one model of a server, and attaches its draft each time it does.

    Args:
        draft_model (`str`, *optional*):
            Folder or repository of the draft; without one n-grams draft.
        is_compiled (`bool`):
            Whether drafting is compiled.
        options (`dict[str, Any]`):
            Those of Transformers' manager.
    """

    def __init__(self, draft_model: str | None, is_compiled: bool, **options: Any) -> None:
        self.draft_model = draft_model
        self.is_compiled = is_compiled
        self.served: tuple[str, str | None] | None = None
        self.drafted: WeakSet[nn.Module] = WeakSet()
        self.lock = Lock()
        super().__init__(**options)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return the model, with its draft attached to it, and its processor; refuse any other."""
        asked = model_id_and_revision, kwargs.get("gguf_file")
        self.served = self.served or asked  # the first is the server's own
        if asked != self.served:
            raise ValueError(
                f"This server must be asked for {self.served[0]}, which its draft is for, got {asked[0]}. Start "
                "another for it."
            )
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        with self.lock:
            if model not in self.drafted:
                drafts = NgramDrafter() if self.draft_model is None else load_assistant(self.draft_model, model)
                attach(model, StaticRuntime(drafts) if self.is_compiled else drafts)
                self.drafted.add(model)
        return model, processor


class InTurn(GenerateManager):
    """Generates one request after the other, each as if it were alone: in its own context, and from its own seed."""

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        return super().submit(copy_context().run, _from_seed, fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(copy_context().run, _from_seed, fn, *args, **kwargs)


def _from_seed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    if (seed := _seed.get()) is not None:
        torch.manual_seed(seed)
    return function(*args, **kwargs)


class Generation(GenerationState):
    """Has such a manager for each model."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.managers: dict[str, InTurn] = {}

    def get_manager(self, model_id: str, use_cb: bool = False) -> InTurn:
        """Return the manager of a model."""
        if model_id not in self.managers:
            self.managers[model_id] = InTurn()
        return self.managers[model_id]


class Reported:
    """
    Answers as one of Transformers' handlers, and says in the `usage` how well the answer was drafted.

    The field is our own. `accepted_prediction_tokens` and `rejected_prediction_tokens` of OpenAI's schema are about
    texts that a request predicts, and count rejected tokens among those of the answer.

    Args:
        handler (`BaseHandler`):
            The handler.
    """

    def __init__(self, handler: BaseHandler) -> None:
        self.handler = handler

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """Answer one request."""
        drafted: list[SpeculativeStats] = []
        seed = body.pop("seed", None)  # Transformers would set it at once, whoever's turn it is
        if seed is not None:
            torch.Generator().manual_seed(seed)  # or say here what is wrong with it
        tokens = observer.set(drafted.append), _seed.set(seed)
        try:
            response = await self.handler.handle_request(body, request_id)
        finally:
            observer.reset(tokens[0])
            _seed.reset(tokens[1])
        if isinstance(response, StreamingResponse):
            response.body_iterator = _reported_stream(response.body_iterator, drafted)
            return response
        return JSONResponse(_reported(json.loads(response.body), drafted), response.status_code)


async def _reported_stream(parts: AsyncIterator[str], drafted: list[SpeculativeStats]) -> AsyncIterator[str]:
    """Pass events on, as Transformers bundles them."""
    async with aclosing(parts):  # who leaves early stops his call
        async for part in parts:
            yield "\n\n".join(_reported_event(event, drafted) for event in part.split("\n\n"))


def _reported_event(event: str, drafted: list[SpeculativeStats]) -> str:
    start, data, answer = event.partition("data: ")
    if start or '"usage":{' not in answer:
        return event
    return data + json.dumps(_reported(json.loads(answer), drafted), ensure_ascii=False, separators=(",", ":"))


def _reported(answer: dict[str, Any], drafted: list[SpeculativeStats]) -> dict[str, Any]:
    """Write into an answer, or an event that ends one, how well it was drafted, if it was."""
    usage = answer.get("response", answer).get("usage")
    if usage and drafted:
        stats = drafted[-1]
        names = ("mean_acceptance_length", "num_rounds", "num_drafted", "num_accepted", "num_plain_steps")
        usage["speculative_decoding"] = {name: getattr(stats, name) for name in names}
    return answer


def serve(arguments: argparse.Namespace) -> None:
    """
    Load a model and its draft, and answer until told to stop.

    Args:
        arguments (`argparse.Namespace`):
            Options of `transformers-msd serve`.
    """
    logging.get_logger("transformers").setLevel(logging.log_levels[arguments.log_level])
    if arguments.default_seed is not None:
        torch.manual_seed(arguments.default_seed)
    try:
        template = json.loads(arguments.chat_template_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`chat_template_kwargs` must be JSON, as '{{\"enable_thinking\": false}}', got "
            f"{arguments.chat_template_kwargs!r}: {error}."
        ) from None
    if arguments.reasoning != "auto":
        template["enable_thinking"] = arguments.reasoning == "on"
    models = DraftedModels(
        arguments.draft_model,
        arguments.compile,
        force_model=arguments.target_model,
        **{name: getattr(arguments, name) for name in ("device", "dtype", "attn_implementation", "quantization")},
        trust_remote_code=arguments.trust_remote_code,
    )
    generation = Generation(compile=arguments.compile)
    app = build_server(
        models,
        Reported(ChatCompletionHandler(models, generation, template)),
        completion_handler=Reported(CompletionHandler(models, generation)),
        response_handler=Reported(ResponseHandler(models, generation, template)),
        transcription_handler=TranscriptionHandler(models, generation),
        systemone_handler=SystemOneHandler(models, generation, template, arguments.decision_config),
        generation_state=generation,
        enable_cors=arguments.enable_cors,
    )
    drafts = "n-grams" if arguments.draft_model is None else arguments.draft_model
    print(f"Serving {arguments.target_model}, drafted for by {drafts}.", flush=True)
    uvicorn.run(app, host=arguments.host, port=arguments.port)
