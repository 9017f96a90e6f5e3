"""Targets whose weights lie in other forms or places: shared by processes, offloaded, quantised."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from oracle import Oracle
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)
from zoo import TEXT, VOCAB_SIZE, make_inputs

from transformers_msd import (
    BlockDraftConfig,
    BlockDraftModel,
    MSDConfig,
    MSDDraftModel,
    StaticRuntime,
    TreeConfig,
    VLMDrafter,
)
from transformers_msd.drafters.loading import load_assistant


TREE = TreeConfig(num_nodes=16, depth=4, top_k=3, gate=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**TEXT | {"hidden_size": 64, "tie_word_embeddings": False}))
    target.generation_config.eos_token_id = None
    target.save_pretrained(path)
    return path


def test_two_processes_share_a_target(folder: Path) -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    script = str(Path(__file__).parent / "tensor_parallel.py")
    run = subprocess.run([*command, script, str(folder)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    first, second = json.loads(run.stdout.strip().splitlines()[-1])
    assert first == second
    assert first["is_shared"]
    assert first["equal"] == [True] * 4
    assert min(first["tau"][1::2]) > 2


def on_disk(folder: Path, offloaded: Path) -> PreTrainedModel:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    places |= dict.fromkeys(("model.layers.0", "lm_head"), "disk")
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=offloaded)


def on_the_host(folder: Path, offloaded: Path) -> PreTrainedModel:
    return cpu_offload(AutoModelForCausalLM.from_pretrained(folder), execution_device=torch.device("cpu"))


def check(target: PreTrainedModel, drafts_itself: bool, draft: MSDDraftModel | None = None) -> None:
    target.eval()
    torch.manual_seed(1)
    draft = draft or MSDDraftModel(MSDConfig.from_target(target.config)).to(target.dtype).eval()
    draft.tree_config = TREE
    inputs = make_inputs("llama", (0, 0), lengths=(12, 9))
    for do_sample in (False, True):
        settings = {"do_sample": do_sample, "max_new_tokens": 24, "return_dict_in_generate": True}
        torch.manual_seed(3)
        plain = target.generate(**inputs, **settings).sequences
        oracle = Oracle(plain[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE)
        for assistant in (draft, oracle, *([VLMDrafter(target, tree_config=TREE)] if drafts_itself else [])):
            torch.manual_seed(3)
            drafted = target.generate(**inputs, **settings, assistant_model=assistant)
            assert torch.equal(drafted.sequences, plain)
            assert drafted.speculative_stats.mean_acceptance_length > (1 if assistant is draft else 2)


@pytest.mark.parametrize("offload", [on_disk, on_the_host])
def test_weights_that_come_when_they_are_needed(folder: Path, tmp_path: Path, offload: Callable) -> None:
    target = offload(folder, tmp_path)
    assert any(weight.is_meta for weight in target.parameters())
    check(target, drafts_itself=False)
    with pytest.raises(ValueError, match="is offloaded"):
        target.generate(torch.arange(5)[None], assistant_model=VLMDrafter(target))


@pytest.mark.parametrize("offload", [on_disk, on_the_host])
@pytest.mark.parametrize("kind", ["on its features", "a block that reads stored embeddings", "of its own"])
def test_drafts_are_loaded_where_such_a_target_runs(
    kind: str, folder: Path, tmp_path: Path, offload: Callable
) -> None:
    target, place = offload(folder, tmp_path), tmp_path / "draft"
    torch.manual_seed(1)
    if kind == "of its own":
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(place)
    elif kind == "on its features":
        MSDDraftModel(MSDConfig.from_target(target.config)).save_pretrained(place)
    else:
        scales = {"embedding_scale": 1.0, "output_multiplier": 1.0}
        layers = {"feature_layers": [1, 2], "block_size": 4}
        BlockDraftModel(BlockDraftConfig.from_target(target.config, **scales, **layers)).save_pretrained(place)
    assistant = load_assistant(str(place), target)
    drafts = assistant.models if kind == "of its own" else [assistant]
    assert {weight.device for draft in drafts for weight in draft.parameters()} == {torch.device("cpu")}
    assistant.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=2, gate=False)
    call = make_inputs("llama", (0, 0), lengths=(12, 9)) | {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(target.generate(**call, assistant_model=assistant), target.generate(**call))


def test_weights_of_8_bits(folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is no dependency")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    assert type(target.lm_head.weight) is torch.nn.Parameter
    assert type(target.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    check(target, drafts_itself=True)


def test_a_draft_of_8_bits(folder: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is no dependency")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    whole = MSDDraftModel(MSDConfig.from_target(target.config, draft_vocab_size=60))
    said = target.generate(**make_inputs("llama", (0, 0), lengths=(12, 9)), max_new_tokens=24)
    whole.choose_tokens(said.flatten().bincount(minlength=VOCAB_SIZE).float(), target.get_output_embeddings())
    whole.save_pretrained(tmp_path)
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    draft = MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=settings).eval()
    assert type(draft.fc.weight) is not torch.nn.Parameter
    check(target, drafts_itself=False, draft=draft)
    runtime = StaticRuntime(draft)
    prompt = make_inputs("llama", (0,), lengths=(12,)) | {"max_new_tokens": 24, "do_sample": False}
    drafted = target.generate(**prompt, assistant_model=runtime, compile_config=CompileConfig(backend="aot_eager"))
    assert runtime.num_captures > 0
    assert torch.equal(drafted, target.generate(**prompt))
