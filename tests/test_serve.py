"""A server with a draft answers as plain `generate` does, tells how well it drafted, and outlives what it is sent."""

import base64
import inspect
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
import torch
from transformers import AutoConfig, GenerationConfig
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import GenerateManager

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDConfig, MSDDraftModel, NgramDrafter, SpeculativeStats, StaticRuntime, VLMDrafter
from transformers_msd.call.stats import observer
from transformers_msd.cli import main
from transformers_msd.cli.serving import DraftedModels
from transformers_msd.drafters.attached import attachment_of


ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "training/tiny_world/checkpoints"
TARGET, DRAFT, DRAFT_VLM = (str(CHECKPOINTS / name) for name in ("target", "draft", "draft_vlm"))
NUM_TOKENS = 16
# Two of each group: without a picture, with one, with several, and second turns.
PROMPTS = evaluation_prompts(2)
TEXT = [{"role": "user", "content": "Describe a picture."}]
SAMPLED = {"do_sample": True, "temperature": 2.0, "max_new_tokens": NUM_TOKENS, "eos_token_id": 2, "pad_token_id": 0}
BEAMS = {"num_beams": 2, "max_new_tokens": NUM_TOKENS, "eos_token_id": 2, "pad_token_id": 0}
ENDLESS = {"max_new_tokens": 1900, "eos_token_id": 3, "pad_token_id": 0}


@dataclass(frozen=True)
class Answer:
    """What a client is told."""

    text: str
    num_tokens: int
    stats: dict[str, Any] | None


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ask a server of its own process, which ends cleanly once all tests have asked it."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "transformers_msd.cli", "serve", TARGET, "--draft-model", DRAFT]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=environment | {"HF_HOME": str(folder)},
        )
    said = folder / "log"
    try:
        while "Uvicorn running" not in said.read_text():
            assert process.poll() is None, said.read_text()
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=240)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM  # once it has ended all else, uvicorn ends by what it was sent
    finally:
        process.kill()
    assert "Application shutdown complete." in said.read_text()


@pytest.fixture(scope="module")
def target() -> Any:
    return load_target()


def messages_of(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Write a prompt as clients do, its pictures as data URLs."""
    pictures = iter(prompt["images"])

    def part(content: dict[str, Any]) -> dict[str, Any]:
        if content["type"] != "image":
            return content
        written = io.BytesIO()
        next(pictures).save(written, "PNG")
        data = base64.b64encode(written.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [message | {"content": [part(each) for each in message["content"]]} for message in prompt["messages"]]


def stats_in(usage: Any) -> dict[str, Any] | None:
    return getattr(usage, "speculative_decoding", None)


def ask(client: Any, messages: list[dict[str, Any]], stream: bool = False, **options: Any) -> Answer:
    """Send one request, and put its answer together."""
    options = {"model": TARGET, "messages": messages, "max_completion_tokens": NUM_TOKENS} | options
    if not stream:
        answer = client.chat.completions.create(**options)
        text = answer.choices[0].message.content
        return Answer(text, answer.usage.completion_tokens, stats_in(answer.usage))
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return Answer(text, chunks[-1].usage.completion_tokens, stats_in(chunks[-1].usage))


def say(target: Any, prompt: dict[str, Any], draft: MSDDraftModel | None = None, **settings: Any) -> Answer:
    """Let the target answer here."""
    model, processor = target
    inputs = encode_prompts(processor, [prompt])
    settings = settings or {"max_new_tokens": NUM_TOKENS}
    output = model.generate(**inputs, **settings, assistant_model=draft, return_dict_in_generate=True)
    token_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    names = ("mean_acceptance_length", "num_rounds", "num_drafted", "num_accepted", "num_plain_steps")
    stats = None if draft is None else {name: getattr(output.speculative_stats, name) for name in names}
    return Answer(processor.decode(token_ids, skip_special_tokens=True), len(token_ids), stats)


def test_eight_requests_at_once_get_the_answers_they_would_get_alone(client: Any, target: Any) -> None:
    draft = MSDDraftModel.from_pretrained(DRAFT, dtype=torch.float32)
    assert len(PROMPTS) == 8
    assert any(prompt["images"] for prompt in PROMPTS)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [
            pool.submit(ask, client, messages_of(prompt), stream=number % 2 == 1)
            for number, prompt in enumerate(PROMPTS)
        ]
    for prompt, answer in zip(PROMPTS, asked, strict=True):
        plain, drafted = say(target, prompt), say(target, prompt, draft)
        assert answer.result() == replace(plain, stats=drafted.stats)
        assert answer.result().stats["mean_acceptance_length"] > 2


def test_sampled_answers_are_those_of_their_own_seeds(client: Any, target: Any) -> None:
    prompts, seeds = PROMPTS[:2] * 2, range(4)
    settings = {"generation_config": json.dumps(SAMPLED)}
    with ThreadPoolExecutor(len(seeds)) as pool:
        asked = [
            pool.submit(ask, client, messages_of(prompt), stream=seed % 2 == 1, seed=seed, extra_body=settings)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    texts = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        torch.manual_seed(seed)
        texts.append(say(target, prompt, generation_config=GenerationConfig(**SAMPLED)).text)
    assert [answer.result().text for answer in asked] == texts
    assert len(set(texts)) == len(texts)


def test_a_request_that_can_not_be_drafted_is_answered_without_a_draft(client: Any, target: Any) -> None:
    answer = ask(client, messages_of(PROMPTS[0]), extra_body={"generation_config": json.dumps(BEAMS)})
    assert answer.text == say(target, PROMPTS[0], generation_config=GenerationConfig(**BEAMS)).text
    assert answer.stats is None


def test_other_endpoints_tell_how_well_they_were_drafted(client: Any) -> None:
    prompt = "USER: Describe a picture.\nASSISTANT:"
    whole = client.completions.create(model=TARGET, prompt=prompt, max_tokens=NUM_TOKENS)
    *parts, last = client.completions.create(model=TARGET, prompt=prompt, max_tokens=NUM_TOKENS, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert stats_in(last.usage) == stats_in(whole.usage)
    assert stats_in(whole.usage)["num_accepted"] > 0
    options = {"model": TARGET, "input": "Describe a picture.", "max_output_tokens": NUM_TOKENS}
    *_, last = client.responses.create(**options, stream=True)
    response = client.responses.create(**options, stream=False)
    assert response.output_text == last.response.output_text
    assert stats_in(response.usage) == stats_in(last.response.usage)
    assert stats_in(response.usage)["num_accepted"] > 0


BROKEN = {
    "no messages": {"messages": None},
    "messages are a text": {"messages": "Describe a picture."},
    "no role": {"messages": [{"content": "Describe a picture."}]},
    "content is a number": {"messages": [{"role": "user", "content": 3}]},
    "no picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    "negative length": {"max_completion_tokens": -1},
    "length is a text": {"max_completion_tokens": "some"},
    "seed is a text": {"seed": "some"},
    "unknown field": {"wat": 1},
    "another model": {"model": DRAFT},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_requests_are_told_and_the_server_goes_on(name: str, client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, TEXT, extra_body=BROKEN[name])
    assert error.value.status_code == {"unknown field": 422, "another model": 400}.get(name, 500)
    # After an answer of 500 uvicorn hangs up, which the client may notice late.
    assert ask(client.with_options(max_retries=1), TEXT, max_completion_tokens=4).num_tokens == 4


def test_a_stream_that_breaks_says_why(client: Any) -> None:
    with pytest.raises(openai.APIError) as error:
        ask(client, TEXT, stream=True, max_completion_tokens=-1)
    assert error.value.body == "`max_new_tokens` must be greater than 0, but is -1."


def test_a_client_that_leaves_stops_its_own_answer_alone(client: Any, target: Any) -> None:
    settings = {"generation_config": json.dumps(ENDLESS)}
    options = {"model": TARGET, "messages": messages_of(PROMPTS[0]), "stream": True, "extra_body": settings}
    with ThreadPoolExecutor(2) as pool:
        leaving = client.chat.completions.create(**options)
        next(iter(leaving))
        others = [pool.submit(ask, client, messages_of(prompt)) for prompt in PROMPTS[:2]]
        leaving.close()
    for prompt, answer in zip(PROMPTS, others, strict=False):
        assert answer.result().text == say(target, prompt).text


def test_no_second_model_is_loaded(client: Any) -> None:
    last = [
        client.post("../load_model", cast_to=str, body={"model": model}).splitlines()[-2] for model in (DRAFT, TARGET)
    ]
    assert f"must be asked for {TARGET}" in json.loads(last[0].removeprefix("data: "))["message"]
    assert json.loads(last[1].removeprefix("data: "))["status"] == "ready"


def test_a_model_that_was_unloaded_comes_back_with_its_draft(client: Any) -> None:
    before = ask(client, TEXT)
    client.post("../reset", cast_to=object)
    assert ask(client, TEXT) == before
    assert before.stats is not None


def test_every_option_of_transformers_serve_is_taken(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    ours = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    theirs = {name for name in inspect.signature(Serve.__init__).parameters if not name.startswith("cb_")}
    # The model is an argument of ours, which is always given, and so never unloaded by itself.
    assert theirs - ours == {"self", "force_model", "model_timeout", "non_blocking"}


@pytest.mark.parametrize(
    ("draft_model", "is_compiled", "drafts"),
    [(None, False, NgramDrafter), (DRAFT, True, StaticRuntime), (DRAFT_VLM, False, VLMDrafter)],
)
def test_without_a_draft_ngrams_draft_and_what_drafts_may_be_compiled(
    draft_model: str | None, is_compiled: bool, drafts: type
) -> None:
    models = DraftedModels(draft_model, is_compiled, device="cpu", force_model=TARGET)
    name = models.process_model_name(TARGET)
    model, _ = models.load_model_and_processor(name)
    attached = attachment_of(model)
    assert isinstance(attached.assistant_model, drafts)
    assert models.load_model_and_processor(name)[0] is model
    assert attachment_of(model) is attached  # once, not with every request


def test_a_small_vlm_drafts_what_is_served(target: Any) -> None:
    models = DraftedModels(DRAFT_VLM, False, device="cpu", dtype="float32", force_model=TARGET)
    served = models.load_model_and_processor(models.process_model_name(TARGET))
    prompt = next(prompt for prompt in PROMPTS if prompt["images"])
    said: list[SpeculativeStats] = []
    token = observer.set(said.append)
    answer = say(served, prompt)
    observer.reset(token)
    assert answer == say(target, prompt)
    assert said[0].mean_acceptance_length > 2


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MSDDraftModel(MSDConfig.from_target(AutoConfig.from_pretrained(DRAFT_VLM))).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"^transformers-msd: .*draft") as error:
        main(["serve", TARGET, "--draft_model", str(tmp_path), "--device", "cpu"])
    assert "\n" not in str(error.value)
    monkeypatch.delattr(GenerateManager, "async_submit")
    with pytest.raises(SystemExit, match=r"^transformers-msd: .*lacks .*GenerateManager\.async_submit"):
        main(["serve", TARGET])
