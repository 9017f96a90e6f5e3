"""Metrics of drafting, as `evaluate` has them; they work offline."""

import datasets
import evaluate


class AcceptanceLength(evaluate.Metric):
    """
    Acceptance length τ: tokens emitted by rounds over rounds, bonus tokens included (τ - 1 is without them).

    Predictions are one list per prompt, of the tokens that each of its rounds emitted: a row of
    `SpeculativeStats.acceptance_lengths`, zeros left out.

    ```python
    >>> AcceptanceLength().compute(predictions=[[4, 2], [3]])
    {'acceptance_length': 3.0, 'num_tokens': 9, 'num_rounds': 3}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Tokens emitted per round of speculative decoding.",
            citation="",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions: list[list[int]]) -> dict[str, float]:
        num_tokens = sum(sum(rounds) for rounds in predictions)
        num_rounds = sum(len(rounds) for rounds in predictions)
        if num_rounds == 0:
            raise ValueError("`predictions` must hold a round at least, got none. Generate more than one token.")
        if min(min(rounds, default=1) for rounds in predictions) < 1:
            raise ValueError("`predictions` must hold rounds of 1 token at least, got fewer. Leave out the zeros.")
        return {"acceptance_length": num_tokens / num_rounds, "num_tokens": num_tokens, "num_rounds": num_rounds}


class ExactMatch(evaluate.Metric):
    """
    Share of answers that equal their references, spaces at both ends aside.

    ```python
    >>> ExactMatch().compute(predictions=["A cat.", "two "], references=["A dog.", "two"])
    {'exact_match': 0.5}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their references.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        if not predictions:
            raise ValueError("`predictions` must hold an answer at least, got none.")
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": sum(ours.strip() == theirs.strip() for ours, theirs in pairs) / len(references)}
