"""Trees, drawn: how they grow, who sees whom, and which node stands on which."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from transformers_msd import TokenTree, TreeConfig
from transformers_msd.trees.growing import grow_tree
from transformers_msd.trees.masks import tree_attention_mask
from transformers_msd.trees.topology import EAGLE


def make_tree(token_ids: list[list[int]], parents: list[list[int]], depth: int) -> TokenTree:
    token_ids = torch.tensor(token_ids)
    return TokenTree(token_ids, torch.tensor(parents), torch.zeros(token_ids.shape), depth)


class Table:
    """A draft over 4 tokens that always says the same, and notes what it was asked."""

    log_probs = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()

    def __init__(self) -> None:
        self.asked: list[tuple[list, list, list]] = []

    def __call__(self, token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        self.asked.append((token_ids[0].tolist(), slots[0].tolist(), visible[0].int().tolist()))
        return self.log_probs.expand(*token_ids.shape, -1)

    def grow(self, **settings: Any) -> TokenTree:
        return grow_tree(TreeConfig(**settings), torch.tensor([7]), self.log_probs[None], self)


def test_ancestor_mask_and_depths() -> None:
    tree = make_tree([[7, 1, 3, 1, 2], [7, 1, 1, 1, 0]], [[-1, 0, 0, 1, 2], [-1, 0, 1, 2, -1]], depth=3)
    assert tree.ancestor_mask.int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]],
    ]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2], [0, 1, 2, 3, 0]]


def test_ancestors_of_a_long_chain() -> None:
    num_nodes = 40
    tree = make_tree([[0] * num_nodes], [list(range(-1, num_nodes - 1))], depth=num_nodes - 1)
    assert torch.equal(tree.ancestor_mask[0], torch.ones(num_nodes, num_nodes).tril().bool())


def test_grow_keeps_the_most_likely_nodes() -> None:
    table = Table()
    tree = table.grow(num_nodes=6, depth=2, top_k=2)
    # Level 1: token 1 (0.4), token 3 (0.3); level 2: 1-1 (0.16), 1-3 (0.12), 3-1 (0.12), 3-3 (0.09).
    assert tree.token_ids.tolist() == [[7, 1, 3, 1, 3, 1]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1, 2]]
    torch.testing.assert_close(tree.scores.exp(), torch.tensor([[1.0, 0.4, 0.3, 0.16, 0.12, 0.12]]))


def test_grow_shows_each_frontier_node_its_own_path() -> None:
    table = Table()
    table.grow(num_nodes=20, depth=3, top_k=2)
    assert table.asked == [
        ([1, 3], [0, 0], [[1, 0], [0, 1]]),
        # The best of level 2 are 1-1, then 1-3 before 3-1 on a tie: both go on from the first of level 1.
        ([1, 3], [0, 0], [[1, 0, 1, 0], [1, 0, 0, 1]]),
    ]


def test_a_chain_is_top_k_1() -> None:
    tree = Table().grow(num_nodes=4, depth=3, top_k=1)
    assert tree.token_ids.tolist() == [[7, 1, 1, 1]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2]]


def test_a_parent_wins_a_tie_against_its_child() -> None:
    def certain(token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*token_ids.shape, 3)

    tree = grow_tree(TreeConfig(num_nodes=7, depth=4, top_k=3), torch.tensor([7]), torch.zeros(1, 3), certain)
    parents = tree.parents[0].tolist()
    assert all(parent < node for node, parent in enumerate(parents))
    assert parents[:4] == [-1, 0, 0, 0]


def test_a_tree_that_cannot_fill_its_nodes_is_smaller() -> None:
    assert Table().grow(num_nodes=60, depth=1, top_k=10).token_ids.tolist() == [[7, 1, 3, 2, 0]]


def test_a_topology_is_grown_as_it_is() -> None:
    table = Table()
    tree = table.grow(topology=[[0], [1], [0, 1], [1, 0], [1, 2], [1, 0, 0]])
    # Choices of the draft in their order: 1, 3, 2, 0.
    assert tree.token_ids.tolist() == [[7, 1, 3, 3, 1, 2, 1]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 2, 2, 4]]
    torch.testing.assert_close(tree.scores.exp(), torch.tensor([[1.0, 0.4, 0.3, 0.12, 0.12, 0.06, 0.048]]))
    assert table.asked == [([1, 3], [0, 0], [[1, 0], [0, 1]]), ([1], [1], [[0, 1, 1]])]


def test_a_topology_gives_the_tree_its_sizes_and_is_cut_at_the_depth() -> None:
    tree = TreeConfig(topology=EAGLE)
    assert (tree.num_nodes, tree.depth, tree.top_k) == (26, 5, 4)
    assert replace(tree, gate=False) == TreeConfig(topology=EAGLE, gate=False)
    assert TreeConfig(depth=2, topology=EAGLE).num_nodes == 13
    assert TreeConfig.checked(asdict(tree)) == tree


@pytest.mark.parametrize("topology", [[], [0], [[0], []], [[0], [-1]], [[0], ["1"]], [[0, 0]], "eagle"], ids=str)
def test_a_topology_is_paths_of_ranks(topology: list) -> None:
    with pytest.raises(ValueError, match="topology"):
        TreeConfig(topology=topology)


@pytest.mark.parametrize("settings", [{"num_nodes": 1}, {"depth": 0}, {"top_k": 0}, {"depth": 2.5}])
def test_tree_config_refuses_trees_that_draft_nothing(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"TreeConfig.{next(iter(settings))}.*at least"):
        TreeConfig(**settings)


def test_with_chains_replaces_rows() -> None:
    tree = make_tree([[7, 1, 3, 1], [8, 1, 3, 1]], [[-1, 0, 0, 1], [-1, 0, 0, 1]], depth=2)
    padded = tree.with_chains(torch.tensor([False, True]), 0)
    assert padded.token_ids.tolist() == [[7, 1, 3, 1], [8, 0, 0, 0]]
    # The chain is no deeper than the tree; the node that is left over stands on nothing.
    assert padded.parents.tolist() == [[-1, 0, 0, 1], [-1, 0, 1, -1]]


def test_tree_attention_mask() -> None:
    mask = tree_attention_mask(
        torch.tensor([[[True, False, True]]]), torch.tensor([[[True, False], [True, True]]]), torch.bfloat16
    )
    assert mask.shape == (1, 1, 2, 5)
    assert mask.dtype == torch.bfloat16
    assert (mask == 0).int().tolist() == [[[[1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]]]
    assert mask.isfinite().all()


def grow(config: TreeConfig, first: torch.Tensor, later: torch.Tensor) -> tuple[TokenTree, list[int]]:
    """Grow trees of a draft that gives `first` after the root and `later` everywhere else; tell the widths it ran."""
    widths = []

    def expand(token_ids, slots, visible):
        widths.append(token_ids.shape[1])
        assert visible.shape[1:] == (widths[-1], sum(widths))
        return later.log().expand(*token_ids.shape, -1)

    return grow_tree(config, torch.zeros(len(first), dtype=torch.long), first.log(), expand), widths


def test_tree_is_as_large_as_the_draft_is_sure():
    first = torch.tensor([[0.05, 0.9, 0.03, 0.02], [0.3, 0.3, 0.3, 0.1]])
    later = torch.tensor([0.6, 0.3, 0.06, 0.04])
    config = TreeConfig(num_nodes=20, depth=5, top_k=3, min_probability=0.25)
    tree, widths = grow(config, first, later)
    # Row 0: 1 (0.9), 1-0 (0.54), 1-1 (0.27), 1-0-0 (0.324). Row 1: three of 0.3, whose children have 0.18 at most.
    assert widths == [3, 2, 1]
    assert tree.num_nodes == 5
    assert tree.depths.max() == 3
    paths = [[] for _ in range(2)]
    for row in range(2):
        for node in range(1, 5):
            if tree.parents[row, node] >= 0:
                mask = tree.ancestor_mask[row, node].nonzero()[1:, 0]
                paths[row].append(tree.token_ids[row, mask].tolist())
    assert paths[0] == [[1], [1, 0], [1, 1], [1, 0, 0]]
    assert sorted(paths[1]) == [[0], [1], [2]]
    full, widths = grow(TreeConfig(num_nodes=20, depth=5, top_k=3), first, later)
    assert widths == [3] * 4
    assert full.num_nodes == 20


def test_unsure_draft_still_tries_one_token():
    tree, widths = grow(TreeConfig(8, 3, 2, min_probability=0.9), torch.full((2, 4), 0.25), torch.full((4,), 0.25))
    assert widths == []
    assert tree.num_nodes == 2
    assert (tree.parents[:, 1] == 0).all()


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_wrong_probability_raises(value):
    with pytest.raises(ValueError, match="must be at least 0 and less than 1"):
        TreeConfig(min_probability=value)
