"""Drafts that `generate` finds by the name of a repository, without an import."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from oracle import Oracle
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import hub
from zoo import TEXT, VOCAB_SIZE, make_inputs

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.models.sharing import write_custom_generate


# By someone who has never heard of the package.
STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM

target = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
prompt = torch.arange(3, 15)[None]
call = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
plain = target.generate(prompt, **call)
drafted = target.generate(prompt, **call, custom_generate=sys.argv[2], trust_remote_code=True)
assert torch.equal(plain.sequences, drafted.sequences)
print(drafted.speculative_stats.num_drafted)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, and a draft that comes with `custom_generate`."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("target", "draft")}
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    target.generation_config.eos_token_id = None
    target.save_pretrained(places["target"])
    draft = MSDDraftModel(MSDConfig.from_target(target.config))
    draft.tree_config = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)
    draft.save_pretrained(places["draft"], custom_generate=True)
    return places


def test_a_stranger_names_the_repository(folders: dict[str, Path]) -> None:
    command = (sys.executable, "-c", STRANGER, str(folders["target"]), str(folders["draft"]))
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 0


def test_a_target_brings_its_draft(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folders["target"])
    whole.save_pretrained(tmp_path)
    write_custom_generate(tmp_path, str(folders["draft"]))
    target = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    inputs = make_inputs("llama", (0, 0), lengths=(12, 9))
    for do_sample in (False, True):
        call = {"max_new_tokens": 20, "do_sample": do_sample, "return_dict_in_generate": True}
        torch.manual_seed(1)
        plain = whole.eval().generate(**inputs, **call)
        torch.manual_seed(1)
        drafted = target.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **call)
        assert drafted.speculative_stats.num_drafted > 0
        assert torch.equal(drafted.sequences, plain.sequences)
    # What is None is said by the user.
    whole.generation_config.eos_token_id = target.generation_config.eos_token_id = int(plain.sequences[0, -3])
    call |= {"eos_token_id": None, "do_sample": False}
    outputs = [model.generate(**inputs, **call).sequences for model in (whole, target)]
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] == inputs["input_ids"].shape[1] + 20


def test_a_draft_that_is_passed_is_taken(folders: dict[str, Path]) -> None:
    target = AutoModelForCausalLM.from_pretrained(folders["target"]).eval()
    inputs = make_inputs("llama", (0,), lengths=(12,))
    call: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **call).sequences
    oracle = Oracle(plain[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE)
    call |= {"custom_generate": str(folders["draft"]), "assistant_model": oracle}
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.generate(**inputs, **call, trust_remote_code=False)
    drafted = target.generate(**inputs, **call, trust_remote_code=True)
    assert torch.equal(drafted.sequences, plain)
    assert drafted.speculative_stats.mean_acceptance_length > 2


def test_drafts_without_it_stay_without(folders: dict[str, Path], tmp_path: Path) -> None:
    draft = MSDDraftModel.from_pretrained(folders["draft"])
    draft.save_pretrained(tmp_path)
    assert not (tmp_path / "custom_generate").exists()
    with pytest.raises(ValueError, match="Call `draft.push_to_hub"):
        draft.save_pretrained(tmp_path, custom_generate=True, push_to_hub=True)


NAMES = ["back\\Users\\x", 'three"""quotes', "one'quote", 'ends in "', "{braces}", "new\nline", "ünï", "a b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_brings_its_draft(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    draft = MSDDraftModel.from_pretrained(folders["draft"])
    draft.save_pretrained(tmp_path / name, custom_generate=True)
    target = AutoModelForCausalLM.from_pretrained(folders["target"]).eval()
    inputs = make_inputs("llama", (0,), lengths=(12,))
    call: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **call).sequences
    drafted = target.generate(**inputs, **call, custom_generate=str(tmp_path / name), trust_remote_code=True)
    assert torch.equal(drafted.sequences, plain)
    assert drafted.speculative_stats.num_drafted > 0


@pytest.mark.parametrize(
    ("given", "named"),
    [(True, "HERE/draft"), ("me/it", "me/it"), (Path("other"), "HERE/other"), (Path("/some/where"), "/some/where")],
    ids=str,
)
def test_the_draft_is_loaded_from_the_place_that_was_given(
    folders: dict[str, Path], given: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    MSDDraftModel.from_pretrained(folders["draft"]).save_pretrained("draft", custom_generate=given)
    text = (tmp_path / "draft/custom_generate/generate.py").read_text(encoding="utf-8")
    assert f"DRAFT = {named.replace('HERE', str(tmp_path))!r}\n" in text


def test_a_folder_that_was_moved_says_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    MSDDraftModel.from_pretrained(folders["draft"]).save_pretrained(tmp_path / "before", custom_generate=True)
    (tmp_path / "before").rename(tmp_path / "moved")
    target = AutoModelForCausalLM.from_pretrained(folders["target"]).eval()
    call = {"custom_generate": str(tmp_path / "moved"), "trust_remote_code": True, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="must be where it was saved, got nothing in .*/before. Name its place as"):
        target.generate(**make_inputs("llama", (0,), lengths=(12,)), **call)


@pytest.mark.parametrize("given", [3, 0, "", ["me/it"], [], b"me/it", {"draft": "me/it"}], ids=repr)
def test_what_names_no_draft_is_told_and_nothing_written(
    folders: dict[str, Path], given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = MSDDraftModel.from_pretrained(folders["draft"])
    monkeypatch.setattr(hub, "hf_api", lambda: pytest.fail("the Hub was asked"))
    for save in (
        lambda: draft.save_pretrained(tmp_path / "draft", custom_generate=given),
        lambda: draft.push_to_hub("me/my-draft", custom_generate=given),
    ):
        with pytest.raises(ValueError, match="`custom_generate` must be true or false, or the repository or folder"):
            save()
    with pytest.raises(ValueError, match="`draft` must be the repository or folder that it is loaded from"):
        write_custom_generate(tmp_path / "draft", given)
    assert list(tmp_path.iterdir()) == []
    assert "save_pretrained" not in vars(draft)


@pytest.mark.parametrize(("given", "named"), [(True, "me/my-draft"), ("me/other", "me/other")])
def test_it_is_uploaded_with_the_draft(
    folders: dict[str, Path], given: bool | str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = MSDDraftModel.from_pretrained(folders["draft"])
    uploaded: dict[str, str] = {}

    def upload(self: MSDDraftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> str:
        uploaded.update({str(file.relative_to(working_dir)): repo_id for file in Path(working_dir).rglob("*.*")})
        uploaded["text"] = (Path(working_dir) / "custom_generate/generate.py").read_text()
        return repo_id

    # The Hub is not at hand: what would be uploaded is looked at instead.
    monkeypatch.setattr(hub, "hf_api", lambda: Mock(create_repo=lambda repo_id, **_: Mock(repo_id=repo_id)))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Mock())
    monkeypatch.setattr(MSDDraftModel, "_upload_modified_files", upload)
    draft.push_to_hub("me/my-draft", custom_generate=given)
    assert f"DRAFT = {named!r}" in uploaded["text"]
    assert {"custom_generate/generate.py", "custom_generate/requirements.txt", "config.json"} <= set(uploaded)
    assert "save_pretrained" not in vars(draft)
