"""One rule accepts drafted tokens, and the noise makes every sample that of plain `torch.multinomial`."""

import torch
from test_tree import make_tree

from transformers_msd.trees.noise import NoiseTape
from transformers_msd.trees.verify import verify


def test_verify_descends_while_the_choice_is_a_child() -> None:
    tree = make_tree(
        [[7, 1, 3, 1, 2], [7, 1, 3, 1, 2], [7, 1, 3, 1, 2]], [[-1, 0, 0, 2, 3], [-1, 0, 0, 2, 3], [-1, 0, 0, 2, 3]], 3
    )
    choices = torch.tensor([[3, 9, 1, 2, 4], [3, 9, 5, 2, 4], [6, 9, 1, 2, 4]])
    acceptance = verify(tree, choices)
    assert acceptance.num_accepted.tolist() == [3, 1, 0]
    assert acceptance.path.tolist() == [[0, 2, 3, 4], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert acceptance.token_ids[0].tolist() == [3, 1, 2, 4]
    assert acceptance.token_ids[1, :2].tolist() == [3, 5]
    assert acceptance.token_ids[2, :1].tolist() == [6]


def test_verify_ignores_fillers_and_choices_never_made() -> None:
    tree = make_tree([[7, 3, -1]], [[-1, 0, -1]], 1)
    acceptance = verify(tree, torch.tensor([[3, -1, -1]]))
    assert acceptance.num_accepted.tolist() == [1]
    assert acceptance.path.tolist() == [[0, 1]]


def test_noise_draws_what_multinomial_draws() -> None:
    probabilities = torch.randn(5, 3, 50, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.manual_seed(1)
    plain = [torch.multinomial(step, 1)[:, 0] for step in probabilities]
    after = torch.get_rng_state()

    torch.manual_seed(1)
    tape = NoiseTape(3, 50, torch.device("cpu"))
    tape.open()
    # Asked for out of order and ahead, as a tree asks.
    tape.at(7)
    for step in (4, 0, 2, 1, 3):
        assert torch.equal((probabilities[step] / tape.at(step)).argmax(-1), plain[step])
    rows = tape.rows_at({0: 2, 1: 0, 2: 4})
    assert torch.equal(rows, torch.stack([tape.at(2)[0], tape.at(0)[1], tape.at(4)[2]]))
    tape.free(3)
    assert torch.equal((probabilities[4] / tape.at(4)).argmax(-1), plain[4])
    tape.leave(5)
    assert torch.equal(torch.get_rng_state(), after)
