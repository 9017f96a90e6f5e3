"""`transformers-msd serve`: Transformers' server, its model with a draft."""

import argparse
from importlib import import_module

from transformers.utils.logging import log_levels

from transformers_msd.cli.options import positive
from transformers_msd.compat import Name, check_names
from transformers_msd.models.places import check_place


_SERVING = "transformers.cli.serving"
_HANDLES = "self, body, request_id"
# What serving.py puts together and overrides, although none of it is documented.
SERVING_NAMES = (
    Name(
        f"{_SERVING}.model_manager:ModelManager.__init__",
        "self, device, dtype, trust_remote_code, attn_implementation, continuous_batching, quantization, "
        "model_timeout, force_model",
    ),
    Name(
        f"{_SERVING}.model_manager:ModelManager.load_model_and_processor",
        "self, model_id_and_revision, progress_callback, tqdm_class, gguf_file",
    ),
    Name(f"{_SERVING}.utils:GenerateManager.submit", "self, fn, args, kwargs"),
    Name(f"{_SERVING}.utils:GenerateManager.async_submit", "self, fn, args, kwargs"),
    Name(f"{_SERVING}.utils:GenerateManager.generate_streaming", attribute="submit"),
    Name(f"{_SERVING}.utils:GenerateManager.generate_non_streaming", attribute="async_submit"),
    Name(f"{_SERVING}.utils:GenerationState.__init__", "self, continuous_batching, compile, cb_config"),
    Name(f"{_SERVING}.utils:GenerationState.get_manager", "self, model_id, use_cb"),
    Name(f"{_SERVING}.chat_completion:ChatCompletionHandler.handle_request", _HANDLES),
    Name(f"{_SERVING}.completion:CompletionHandler.handle_request", _HANDLES),
    Name(f"{_SERVING}.response:ResponseHandler.handle_request", _HANDLES),
    Name(f"{_SERVING}.systemone:SystemOneHandler"),
    Name(f"{_SERVING}.transcription:TranscriptionHandler"),
    Name(
        f"{_SERVING}.server:build_server",
        "model_manager, chat_handler, completion_handler, response_handler, transcription_handler, systemone_handler, "
        "generation_state, enable_cors",
    ),
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model and its draft by OpenAI's API",
        description="Run Transformers' own server (`transformers serve`) for one model, with a draft: the same texts, "
        "sooner. The `usage` of an answer says how well it was drafted, as `speculative_decoding`. Requests are "
        "answered one after the other.",
    )
    parser.add_argument("target_model", help="folder or Hub repository of the model to serve")
    parser.add_argument("--draft_model", help="draft of any kind, or a VLM or language model; n-grams without one")
    parser.add_argument("--device", default="auto", help="device of the model, `auto` spreads it over all there are")
    parser.add_argument("--dtype", default="auto", help="dtype of the model and of its draft")
    parser.add_argument("--attn_implementation", help="implementation of attention, as `sdpa`")
    parser.add_argument("--compile", action="store_true", help="a static cache, and all compiled")
    parser.add_argument("--quantization", choices=["bnb-4bit", "bnb-8bit"], help="quantise the model's weights")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--reasoning", choices=["on", "off", "auto"], default="auto", help="whether the model thinks")
    parser.add_argument("--chat_template_kwargs", help="arguments of the chat template, as JSON")
    parser.add_argument("--decision_config", help="JSON file of the decisions that /v1/systemone makes")
    parser.add_argument("--host", default="localhost", help="address to listen at")
    parser.add_argument("--port", type=positive, default=8000, help="port to listen at")
    parser.add_argument("--enable_cors", action="store_true", help="let pages of any origin ask")
    parser.add_argument(
        "--log_level", choices=log_levels, default="warning", help="level of Transformers' own messages"
    )
    parser.add_argument("--default_seed", type=int, help="seed of what is sampled, set once")
    parser.add_argument("--continuous_batching", action="store_true", help="is refused: it never calls `generate`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, attach, and answer until told to stop."""
    if arguments.continuous_batching:
        raise ValueError(
            "`continuous_batching` must be left out, for it decodes by paged attention and never calls `generate`, "
            "which drafts; `transformers serve` has it, without a draft."
        )
    for name in ("target_model", "draft_model"):
        if getattr(arguments, name) is not None:
            check_place(getattr(arguments, name), name)
    for package in ("fastapi", "openai", "uvicorn"):  # Transformers' parts would not say what they lack
        import_module(package)
    check_names(SERVING_NAMES)
    from transformers_msd.cli.serving import serve

    serve(arguments)
