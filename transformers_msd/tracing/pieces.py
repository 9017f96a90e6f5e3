"""What tokens look like: pieces of text that, put one behind the other, are the text."""

from collections.abc import Sequence
from typing import Any


# A character of UTF-8 has four bytes at most, and so is of so many tokens at most.
LONGEST_CHARACTER = 4
UNKNOWN = "\ufffd"


class Pieces:
    """
    Decodes tokens one by one.

    Args:
        processor (`Any`, *optional*):
            A processor, or a tokenizer; without one tokens are written as numbers.
    """

    def __init__(self, processor: Any = None) -> None:
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._of_token: dict[int, str] = {}
        self._special = set() if self._tokenizer is None else set(self._tokenizer.all_special_ids)
        # A word before, as tokenizers drop the space that a text begins with.
        self._before = [] if self._tokenizer is None else self._tokenizer.encode("a", add_special_tokens=False)[-1:]

    def is_special(self, token_id: int) -> bool:
        """Tell whether a token stands for no text."""
        return token_id in self._special

    def of(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """
        Decode tokens. A character that several of them make up belongs to the last; the others are empty.

        Args:
            token_ids (`Sequence[int]`):
                The tokens.
            before (`Sequence[int]`, *optional*):
                Tokens before them, some of which may begin a character.
        """
        token_ids = [*before[-LONGEST_CHARACTER:], *token_ids]
        pieces, begun = [], []
        for token_id in token_ids:
            piece = self._decoded([token_id])
            if not piece.endswith(UNKNOWN) and not (begun and UNKNOWN in piece):
                self._give_up(pieces, begun)
                pieces.append(piece)
                continue
            begun.append(token_id)
            piece = self._decoded(begun)
            if piece.endswith(UNKNOWN):
                pieces.append("")
                if len(begun) == LONGEST_CHARACTER:
                    self._give_up(pieces, begun)
            else:
                pieces.append(piece)
                begun = []
        return pieces[min(len(before), LONGEST_CHARACTER) :]

    def _give_up(self, pieces: list[str], begun: list[int]) -> None:
        """Let the last of some tokens that are no character show what they are."""
        if begun:
            pieces[-1] = self._decoded(begun)
            begun.clear()

    def _decoded(self, token_ids: list[int]) -> str:
        if len(token_ids) == 1:
            if token_ids[0] not in self._of_token:
                self._of_token[token_ids[0]] = self._decode(token_ids)
            return self._of_token[token_ids[0]]
        return self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        if self._tokenizer is None:
            return "".join(f" {token_id}" for token_id in token_ids)
        before, text = (
            self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in (self._before, [*self._before, *token_ids])
        )
        return text.removeprefix(before)
