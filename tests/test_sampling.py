"""A second witness of sampling: the tokens follow the exact distribution of a target over a small vocabulary."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from zoo import TEXT, make_inputs
from zoo import VOCAB_SIZE as ZOO_VOCAB_SIZE

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig
from transformers_msd.call import sampling
from transformers_msd.call.sampling import Sampler, coupled_log_probs


VOCAB_SIZE = 6
NUM_TOKENS = 3


def exact_probabilities(
    scores: torch.Tensor,
    prefix: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> torch.Tensor:
    """Probabilities of the next token, `(vocab_size,)`, worked out anew from the definitions of the options."""
    seen = torch.isin(torch.arange(VOCAB_SIZE), prefix)
    penalised = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    probabilities = (torch.where(seen, penalised, scores) / temperature).softmax(-1)
    ordered = probabilities.sort(descending=True)
    nucleus = ordered.indices[ordered.values.cumsum(-1) - ordered.values < top_p]
    kept = torch.zeros(VOCAB_SIZE).index_fill(0, nucleus, 1.0) * probabilities
    return kept / kept.sum()


@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"top_p": 0.8, "repetition_penalty": 1.3}], ids=str)
@torch.no_grad()
def test_samples_follow_the_exact_distribution(settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**TEXT | {"vocab_size": VOCAB_SIZE, "eos_token_id": None, "initializer_range": 0.15})
    target = AutoModelForCausalLM.from_config(config).eval()
    draft = MSDDraftModel(MSDConfig.from_target(config)).eval()
    draft.tree_config = TreeConfig(num_nodes=6, depth=2, top_k=3)
    prompt = torch.tensor([[1, 4, 2]])
    call = {"do_sample": True, "max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True, **settings}

    exact = {}
    for continuation in itertools.product(range(VOCAB_SIZE), repeat=NUM_TOKENS):
        ids = torch.cat([prompt, torch.tensor([continuation])], dim=1)
        logits = target(ids).logits[0, -NUM_TOKENS - 1 : -1]
        steps = range(NUM_TOKENS)
        rows = [exact_probabilities(logits[step], ids[0, : prompt.shape[1] + step], **settings) for step in steps]
        exact[continuation] = float(torch.stack([rows[step][continuation[step]] for step in steps]).prod())
    assert sum(exact.values()) == pytest.approx(1, abs=1e-4)

    num_samples, counts = 3000, dict.fromkeys(exact, 0)
    torch.manual_seed(5)
    accepted = 0
    for _ in range(num_samples // 60):
        output = target.generate(prompt, **call, num_return_sequences=60, assistant_model=draft)
        accepted += output.speculative_stats.num_accepted
        for row in output.sequences[:, 3:].tolist():
            counts[tuple(row)] += 1
    assert accepted > num_samples / 10  # the claim is about tokens that were drafted
    assert all(counts[key] == 0 for key, probability in exact.items() if probability == 0)

    # Pearson's statistic, rare continuations pooled; its normal approximation at 4 standard deviations.
    cells = [(counts[key], num_samples * p) for key, p in exact.items() if num_samples * p >= 5]
    rare = [(counts[key], num_samples * p) for key, p in exact.items() if 0 < num_samples * p < 5]
    if rare:
        cells.append(tuple(map(sum, zip(*rare, strict=True))))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


WARPERS = {
    "top-k": (TopKLogitsWarper(5),),
    "top-k of all": (TopKLogitsWarper(1000), TopPLogitsWarper(0.9)),
    "top-k, top-p": (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)),
    "top-k, top-p that keeps three": (TopKLogitsWarper(20), TopPLogitsWarper(0.01, min_tokens_to_keep=3)),
    "top-k, min-p, top-p": (TopKLogitsWarper(40), TopPLogitsWarper(0.95), MinPLogitsWarper(0.05)),
    "top-p alone": (TopPLogitsWarper(0.8),),
    "top-k twice": (TopKLogitsWarper(20), TopKLogitsWarper(3)),
}


@pytest.mark.parametrize("name", WARPERS)
def test_drafts_are_warped_as_the_target_is(name: str) -> None:
    torch.manual_seed(0)
    logits, noise = 3 * torch.randn(2, 4, 100), torch.rand(2, 100) + 0.1
    expected = logits.flatten(0, 1)
    for warper in WARPERS[name]:
        expected = warper(None, expected)
    expected = coupled_log_probs(expected.view_as(logits), noise, ())
    torch.testing.assert_close(coupled_log_probs(logits, noise, WARPERS[name]), expected)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}, {"typical_p": 0.9}], ids=str)
def test_nodes_that_are_not_reached_are_not_sorted(
    options: dict[str, float], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).eval()
    draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
    draft.tree_config = TreeConfig(num_nodes=12, depth=3, top_k=3, gate=False)
    call = make_inputs("llama", (0,) * batch_size, lengths=(12, 9, 10)[:batch_size]) | options
    call |= {"do_sample": True, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    sorted_rows: list[int] = []
    choose = Sampler._choose_step_by_step

    def choose_noted(self: Sampler, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        processors = self._processors

        class Noted(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                sorted_rows.append(len(scores))
                return scores

        processors.append(Noted())
        chosen = choose(self, *args)
        processors.pop()
        return chosen

    monkeypatch.setattr(Sampler, "_choose_step_by_step", choose_noted)
    outputs = []
    for most in (8 * ZOO_VOCAB_SIZE, 0):  # trees have eight nodes off the longest path
        monkeypatch.setattr(sampling, "MOST_SORTED", most)
        assert not sorted_rows
        torch.manual_seed(3)
        outputs.append(target.generate(**call, assistant_model=draft))
    torch.manual_seed(3)
    plain = target.generate(**call)
    num_rounds = outputs[0].speculative_stats.num_rounds
    assert 0 < sum(sorted_rows) < 4 * batch_size * num_rounds
    for output in outputs:
        assert torch.equal(output.sequences, plain.sequences)
        for own, theirs in zip(output.scores, plain.scores, strict=True):
            torch.testing.assert_close(own, theirs)
