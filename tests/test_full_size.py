"""Full sizes: a LLaVA-1.5-7B and a released draft, of random weights, and 2,000 visual rows of the real Qwen2.5-VL."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig, VLMDrafter


ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
LLAVA = DATA / "processors" / "llava-1.5-7b-hf"
QWEN = DATA / "processors" / "qwen2.5-vl-7b-instruct"
PHOTO = DATA / "images" / "demo_originals" / "images" / "llava_waterview.jpg"
GIB = 2**30

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.exists(), reason=f"needs the processors in {DATA}")]


def test_llava_7b_and_a_released_draft_answer_about_a_photo(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 20 * GIB:
        pytest.skip("needs 20 GiB of disk")
    if psutil.virtual_memory().available < 18 * GIB:
        pytest.skip("needs 18 GiB of memory")
    output = tmp_path / "full_size.json"
    command = ["training.evidence.full_size", "--checkpoint", LLAVA, "--photo", PHOTO, "--work", tmp_path]
    try:
        subprocess.run([sys.executable, "-m", *map(str, command), "--output", str(output)], cwd=ROOT, check=True)
    finally:
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
    results = json.loads(output.read_text())
    assert results["equal"]
    assert results["parameters"]["target"] == 7_063_427_072
    assert results["prompt tokens"] > 576


@pytest.mark.skipif(find_spec("torchvision") is None, reason="the processor of Qwen2.5-VL needs torchvision")
def test_two_thousand_visual_rows_of_the_real_qwen_processor() -> None:
    processor = AutoProcessor.from_pretrained(QWEN)
    settings = json.loads((QWEN / "config.json").read_text())
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings |= narrow | {"num_key_value_heads": 2, "max_window_layers": 3, "initializer_range": 0.3}
    settings["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    settings["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    settings["vision_config"] |= {"out_hidden_size": 64, "fullatt_block_indexes": [1]}
    settings["torch_dtype"] = "float32"
    torch.manual_seed(0)
    target = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**settings)).eval()
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    picture = Image.open(PHOTO).convert("RGB").resize((1400, 1204))
    content = [{"type": "image"}, {"type": "text", "text": "Describe it."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == target.config.image_token_id).sum() >= 2000
    for sampling in ({"do_sample": False}, {"do_sample": True}):
        call = sampling | {"max_new_tokens": 24, "eos_token_id": None}
        torch.manual_seed(0)
        plain = target.generate(**inputs, **call)
        for assistant in (draft, VLMDrafter(target, tree_config=TreeConfig(8, 3, 2, gate=False))):
            torch.manual_seed(0)
            assert torch.equal(target.generate(**inputs, **call, assistant_model=assistant), plain)
