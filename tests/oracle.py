"""An assistant that knows what plain decoding says, and spoils some of it: an equality test's best enemy."""

import random
from itertools import compress

import torch

from transformers_msd import CallInputs, Committed, Target, TokenTree, TreeCandidateGenerator, TreeConfig


class Oracle:
    """
    Drafts plain decoding's own tokens, each wrong with a given probability, among decoy branches.

    Args:
        token_ids (`torch.Tensor` of shape `(batch_size, num_steps)`):
            Tokens that plain decoding generated.
        vocab_size (`int`):
            Decoys are drawn below it.
        depth (`int`, *optional*, defaults to 4):
            Drafted tokens on the path of the truth.
        error_rate (`float`, *optional*, defaults to 0.3):
            Probability of a wrong token on it.
        seed (`int`, *optional*, defaults to 0):
            Seed of errors and decoys.
        num_decoys (`int`, *optional*, defaults to 1):
            Decoys beside each node.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        vocab_size: int,
        depth: int = 4,
        error_rate: float = 0.3,
        seed: int = 0,
        num_decoys: int = 1,
    ) -> None:
        self.tree_config = TreeConfig(gate=False, ngrams=False)
        self.token_ids = token_ids.tolist()
        self.vocab_size = vocab_size
        self.depth = depth
        self.error_rate = error_rate
        self.seed = seed
        self.num_decoys = num_decoys
        # Of the last call: what was committed before each round, and what was drafted on it.
        self.committed: list[Committed] = []
        self.trees: list[TokenTree] = []

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "OracleCandidateGenerator":
        return OracleCandidateGenerator(self)


class OracleCandidateGenerator(TreeCandidateGenerator):
    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.random = random.Random(oracle.seed)
        self.rows = list(range(len(oracle.token_ids)))
        self.num_emitted: list[int] | None = None

    def draft(self, committed: Committed) -> TokenTree:
        self.oracle.committed.append(committed)
        if self.num_emitted is None:
            self.num_emitted = [1] * len(committed.lengths)
        else:
            news = committed.lengths.tolist()
            self.num_emitted = [before + new for before, new in zip(self.num_emitted, news, strict=True)]
        rows = [
            self._tree(root, self.oracle.token_ids[row], step)
            for row, root, step in zip(self.rows, committed.root_token_ids.tolist(), self.num_emitted, strict=True)
        ]
        device = committed.token_ids.device
        token_ids, parents = (torch.tensor(values, device=device) for values in zip(*rows, strict=True))
        scores = torch.zeros_like(token_ids, dtype=torch.float32)
        self.oracle.trees.append(TokenTree(token_ids, parents, scores, self.oracle.depth))
        return self.oracle.trees[-1]

    def keep_sequences(self, kept: list[bool]) -> bool:
        self.rows = list(compress(self.rows, kept))
        if self.num_emitted is not None:
            self.num_emitted = list(compress(self.num_emitted, kept))
        return True

    def _tree(self, root: int, truth: list[int], step: int) -> tuple[list[int], list[int]]:
        """Draw a chain of truth and errors; beside each of its nodes stands a decoy, now before it, now after it."""
        token_ids, parents, tip = [root], [-1], 0
        for place in range(step, step + self.oracle.depth):
            token_id = truth[place] if place < len(truth) else self._decoy(())
            if self.random.random() < self.oracle.error_rate:
                token_id = self._decoy((token_id,))
            siblings = [token_id, *(self._decoy((token_id,)) for _ in range(self.oracle.num_decoys))]
            self.random.shuffle(siblings)
            next_tip = len(token_ids) + siblings.index(token_id)
            token_ids += siblings
            parents += [tip] * len(siblings)
            tip = next_tip
        return token_ids, parents

    def _decoy(self, others: tuple[int, ...]) -> int:
        return self.random.choice([token_id for token_id in range(self.oracle.vocab_size) if token_id not in others])
