"""The rounds of one call as plain numbers, on the host."""

import math
from dataclasses import dataclass, field

import torch

from transformers_msd.trees.tree import TokenTree


@dataclass
class TracedTree:
    """
    The tree of one sequence in one round: one value for each node, the root first, without fillers.

    Args:
        token_ids (`list[int]`):
            Token of each node; the root's is the token emitted last.
        parents (`list[int]`):
            Index of each node's parent, -1 for the root.
        draft (`list[float | None]`):
            Probability of each node after its parent, as its source says: the draft, or how often n-grams were right.
            `None` for the root, and in sampled calls, whose trees are ranked with the noise of the call.
        target (`list[float | None]`):
            Probability of each node after its parent under the target, processors of the call applied; `None` where
            the target did not come to the parent and the processors read the text so far.
        is_ngram (`list[bool]`):
            Which nodes the draft did not propose, but the text so far.
    """

    token_ids: list[int]
    parents: list[int]
    draft: list[float | None]
    target: list[float | None]
    is_ngram: list[bool]


@dataclass
class TracedRow:
    """
    What a round did for one sequence.

    Args:
        start (`int`):
            Tokens that were generated before.
        token_ids (`list[int]`):
            Tokens emitted: those accepted, and the bonus token unless the sequence ended before it.
        probabilities (`list[float | None]`):
            Probability of each of them under the target, processors of the call applied.
        accepted (`list[int]`):
            Nodes of the accepted path, the root left out.
        tree (`TracedTree`):
            What was drafted.
    """

    start: int
    token_ids: list[int]
    probabilities: list[float | None]
    accepted: list[int]
    tree: TracedTree

    def cut(self, end: int) -> None:
        """Drop what stands beyond the first `end` tokens of the sequence."""
        num_kept = max(end - self.start, 0)
        for own in (self.token_ids, self.probabilities, self.accepted):
            del own[num_kept:]


@dataclass
class TracedRound:
    """
    One forward of the target.

    Args:
        kind (`str`):
            `"prefill"` where the prompt was run, `"drafted"` where a tree was, `"plain"` for a root alone.
        is_resting (`bool`):
            Whether the draft rested, because it did not pay of late.
        seconds (`dict[str, float]`):
            Time to `"draft"` the tree, to `"verify"` it in the target's forward, and for the `"rest"`: choosing
            tokens, keeping their rows of the cache, stopping criteria.
        rows (`list[TracedRow | None]`):
            One for each sequence of the batch; `None` where it had ended, or waited for others.
    """

    kind: str
    is_resting: bool
    seconds: dict[str, float]
    rows: list[TracedRow | None] = field(default_factory=list)


@dataclass
class TracedTrees:
    """
    Trees of the sequences of a round, on the host.

    Args:
        trees (`list[TracedTree]`):
            One for each tree.
        places (`list[dict[int, int]]`):
            Where the nodes of the verified trees are in these, which have no fillers.
    """

    trees: list[TracedTree]
    places: list[dict[int, int]]


def read_trees(
    tree: TokenTree, drafted: TokenTree | None, choices: torch.Tensor, scores: torch.Tensor, is_sampled: bool
) -> TracedTrees:
    """
    Read trees off the device.

    Args:
        tree (`TokenTree`):
            The trees that were verified.
        drafted (`TokenTree`, *optional*):
            What the draft made, before anything was grafted on it.
        choices (`torch.Tensor` of shape `(num_trees, num_nodes)`):
            The target's token after every node, -1 where it was not asked.
        scores (`torch.Tensor` of shape `(num_trees, num_nodes, vocab_size)`):
            Scores that they were chosen from.
        is_sampled (`bool`):
            Whether trees are ranked with noise.
    """
    parents = tree.parents.clamp(min=0).to(scores.device)
    log_probs = log_probabilities(scores, parents, tree.token_ids.to(scores.device))
    is_known = choices.to(scores.device).gather(1, parents) >= 0
    target = log_probs.masked_fill(~is_known, torch.nan).exp().tolist()
    rows = zip(*(own.tolist() for own in (tree.token_ids, tree.parents, tree.scores)), target, strict=True)
    none = torch.zeros_like(tree.parents, dtype=torch.bool)
    ngrams = (none if tree.is_ngram is None else tree.is_ngram).tolist()
    found = TracedTrees([], [])
    for row, ((token_ids, own_parents, own_scores, probabilities), is_ngram) in enumerate(
        zip(rows, ngrams, strict=True)
    ):
        places = _standing(own_parents)
        said = {} if drafted is None else _by_path(*(own[row].tolist() for own in _columns(drafted)))
        paths = _paths(token_ids, own_parents, places)
        draft = []
        for node in places:
            parent = own_parents[node]
            if node == 0 or is_sampled:
                draft.append(None)
            elif is_ngram[node] or paths[node] not in said:
                draft.append(_probability(own_scores[node] - own_scores[parent]))
            else:
                draft.append(_probability(said[paths[node]] - said[paths[node][:-1]]))
        found.trees.append(
            TracedTree(
                [token_ids[node] for node in places],
                [places.get(own_parents[node], -1) for node in places],
                draft,
                [None] + [rounded(probabilities[node]) for node in list(places)[1:]],
                [bool(is_ngram[node]) for node in places],
            )
        )
        found.places.append(places)
    return found


def log_probabilities(scores: torch.Tensor, nodes: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Look up log-probabilities of tokens, without a softmax over all of them.

    Args:
        scores (`torch.Tensor` of shape `(num_trees, num_nodes, vocab_size)`):
            Scores after each node.
        nodes (`torch.Tensor` of shape `(num_trees, num_tokens)`):
            Node after which each token stands.
        token_ids (`torch.Tensor` of shape `(num_trees, num_tokens)`):
            The tokens.
    """
    rows = torch.arange(len(nodes), device=nodes.device)[:, None]
    return scores[rows, nodes, token_ids] - scores.logsumexp(-1).gather(1, nodes)


def rounded(probability: float) -> float | None:
    """Round a probability to four digits; what is none becomes `None`."""
    return float(f"{min(probability, 1.0):.4g}") if 0 <= probability <= 1.001 else None


def _columns(tree: TokenTree) -> tuple[torch.Tensor, ...]:
    return tree.token_ids, tree.parents, tree.scores


def _probability(log_probability: float) -> float | None:
    return rounded(math.exp(log_probability)) if log_probability < 1 else None


def _standing(parents: list[int]) -> dict[int, int]:
    """Number the nodes that hang on the root, fillers left out."""
    places = {0: 0}
    for node, parent in enumerate(parents):
        if node > 0 and parent in places:
            places[node] = len(places)
    return places


def _paths(token_ids: list[int], parents: list[int], places: dict[int, int]) -> dict[int, tuple[int, ...]]:
    """Tokens from the root, which is left out, to each node."""
    paths = {0: ()}
    for node in list(places)[1:]:
        paths[node] = (*paths[parents[node]], token_ids[node])
    return paths


def _by_path(token_ids: list[int], parents: list[int], scores: list[float]) -> dict[tuple[int, ...], float]:
    places = _standing(parents)
    return {path: scores[node] for node, path in _paths(token_ids, parents, places).items()}
