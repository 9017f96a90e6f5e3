"""A second witness of sampling: the tokens follow the exact distribution of a target over a small vocabulary."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from zoo import TEXT

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig


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
