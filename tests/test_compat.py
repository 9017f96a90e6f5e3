"""Old names and new ones work on every supported Transformers, and what a release lacks is told on import."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import ModelOutput
from zoo import make_inputs, make_target

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.compat import CACHE, CACHE_NAMES, SUPPORTED


TESTS = Path(__file__).parent
PROJECT = TESTS.parent
TREE = TreeConfig(num_nodes=8, depth=3, top_k=3, gate=False)


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_canary_tells_every_name_that_is_gone_or_has_other_parameters() -> None:
    lines = run(str(TESTS / "rename_names.py")).splitlines()
    assert len(lines) > 40
    for line in lines:
        path, message = line.split("|", 1)
        package = path.split(":")[0].split(".")[0]
        assert f"`{path.replace(':', '.')}" in message, f"{path}: {message}"
        assert f"pip install '{package}{SUPPORTED[package]}'" in message


def test_a_version_that_was_not_tested_warns_once() -> None:
    program = """
import json, transformers, warnings
transformers.__version__ = "5.99.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers_msd
print(json.dumps([str(warning.message) for warning in caught if "transformers-msd" in str(warning.message)]))
"""
    (message,) = json.loads(run("-c", program))
    assert "5.99.0" in message
    assert f"pip install 'transformers{SUPPORTED['transformers']}'" in message


def test_bounds_are_those_of_the_package() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert f"transformers{SUPPORTED['transformers']}" in project["dependencies"]
    assert f"torch{SUPPORTED['torch']}" in project["dependencies"]
    for package in ("datasets", "trl"):
        assert f"{package}{SUPPORTED[package]}" in project["optional-dependencies"]["train"]


@pytest.fixture(scope="module")
def draft() -> MSDDraftModel:
    torch.manual_seed(1)
    draft = MSDDraftModel(MSDConfig.from_target(make_target("llava").config)).eval()
    draft.tree_config = TREE
    return draft


def make_rows(draft: MSDDraftModel, num_rows: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    size = draft.config.get_text_config().hidden_size
    return {"inputs_embeds": torch.randn(1, num_rows, size), "features": torch.randn(1, num_rows, size)}


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_draft_takes_its_cache_by_either_name(draft: MSDDraftModel, name: str) -> None:
    rows = make_rows(draft, 6)
    whole = draft(**rows).last_hidden_state
    cache = DynamicCache(config=draft.config.get_text_config())
    draft(**{key: value[:, :4] for key, value in rows.items()}, **{name: cache}, use_cache=True)
    assert cache.get_seq_length() == 4  # a cache under an unknown name would be swallowed in silence
    rest = draft(**{key: value[:, 4:] for key, value in rows.items()}, **{name: cache}).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=1e-5)


def test_both_names_at_once_raise(draft: MSDDraftModel) -> None:
    both = {name: DynamicCache() for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="got both"):
        draft(**make_rows(draft, 3), **both)
    target, inputs = make_target("llava"), make_inputs("llava")
    with pytest.raises(ValueError, match=r"got both|not used by the model"):
        target.generate(**inputs, **both, assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize("name", CACHE_NAMES[: 1 + CACHE_NAMES.index(CACHE)])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_name_without_a_cache_takes_none_away(draft: MSDDraftModel, name: str, is_first: bool) -> None:
    target, inputs, cache = make_target("llava"), make_inputs("llava"), DynamicCache()
    given = {other: None for other in CACHE_NAMES if other != name} if CACHE_NAMES[0] != CACHE else {}
    given = {name: cache, **given} if is_first else {**given, name: cache}
    plain = target.generate(**inputs, max_new_tokens=6)
    assert torch.equal(target.generate(**inputs, **given, assistant_model=draft, max_new_tokens=6), plain)
    assert cache.get_seq_length() == plain.shape[1] - 1


@pytest.mark.parametrize("name", CACHE_NAMES[: 1 + CACHE_NAMES.index(CACHE)])
def test_generate_takes_a_cache_by_every_name_that_transformers_knows(draft: MSDDraftModel, name: str) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **settings)
    for cache in (DynamicCache(), StaticCache(config=target.config.get_text_config(), max_cache_len=64)):
        drafted = target.generate(**inputs, **{name: cache}, **settings, assistant_model=draft)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert drafted[CACHE] is cache
        assert cache.get_seq_length() == plain.sequences.shape[1] - 1


def test_outputs_are_read_by_every_name_that_transformers_knows(draft: MSDDraftModel) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    drafted = target.generate(**inputs, assistant_model=draft, max_new_tokens=6, return_dict_in_generate=True)
    rows = draft(**make_rows(draft, 3), use_cache=True)
    for output in (drafted, rows):
        assert isinstance(output, ModelOutput)
        for name in CACHE_NAMES[: 1 + CACHE_NAMES.index(CACHE)]:
            assert isinstance(getattr(output, name), DynamicCache)
            assert output[name] is output[CACHE]


def test_a_cache_under_a_name_that_transformers_lacks_raises(draft: MSDDraftModel) -> None:
    target, inputs = make_target("llava"), make_inputs("llava")
    with pytest.raises(ValueError, match="not used by the model"):
        target.generate(**inputs, past_kv=DynamicCache(), assistant_model=draft, max_new_tokens=4)


def test_no_call_of_ours_is_deprecated(tmp_path: Path) -> None:
    assert json.loads(run("-Wdefault", str(TESTS / "every_call.py"), str(tmp_path)).splitlines()[-1]) == []
