"""Several data sets mixed by weight: every virtual shard takes its next sequence from the one that lags most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from saetrain.data.packing import Sequences
from saetrain.data.sharded import ShardedSource
from saetrain.errors import SaetrainError
from saetrain.types import DATASET_ROW_BITS, Cursor, TokenKind, TokenSequence, shown_default


@dataclass(frozen=True, kw_only=True)
class MixSettings:
    """Several data sets: how much of each."""

    mix: Annotated[tuple[float, ...] | None, shown_default("equal", "FLOAT ...")] = None
    """Weights of the data sets, in their order: their shares of the tokens that are trained on."""

    def __post_init__(self) -> None:
        if self.mix is not None and not all(0 < weight < float("inf") for weight in self.mix):
            raise SaetrainError(f"--mix {' '.join(f'{w:g}' for w in self.mix)}: weights must be positive numbers")

    def normalized_shares(self, count: int) -> tuple[float, ...]:
        """The shares of ``count`` data sets, which add up to 1; SaetrainError when the weights are not as many."""
        if self.mix is None:
            return (1 / count,) * count
        if len(self.mix) != count:
            raise SaetrainError(
                f"--mix {' '.join(f'{w:g}' for w in self.mix)}: {len(self.mix)} weights for {count} data "
                f"set{'s' if count > 1 else ''}; give one for each"
            )
        return tuple(weight / sum(self.mix) for weight in self.mix)


def furthest_behind(held: list[int], shares: tuple[float, ...]) -> int:
    """The part whose tokens so far are the smallest multiple of its share."""
    return min(range(len(held)), key=lambda part: held[part] / shares[part])


def tag_part(sequence: TokenSequence, part: int) -> TokenSequence:
    """The sequence with document numbers that say which data set it is from."""
    return TokenSequence(sequence.ids, sequence.kind, sequence.doc + (part << DATASET_ROW_BITS))


class MixedSequences(ShardedSource):
    """Sources mixed shard by shard. Its cursor is every part's cursor with the tokens that it has given."""

    def __init__(
        self, parts: list[ShardedSource], shares: tuple[float, ...], exclude_special: bool, exclude_first: bool
    ) -> None:
        assert len({part.n_shards for part in parts}) == 1, "parts of unequal shards"
        super().__init__(parts[0].n_shards, exclude_special, exclude_first)
        self._parts, self._shares = parts, shares
        self.start_cursor: Cursor = tuple(number for part in parts for number in (*part.start_cursor, 0))

    def _split_cursor(self, cursor: Cursor) -> tuple[list[Cursor], list[int]]:
        """(each part's cursor, the tokens that it has given)."""
        cursors, held, offset = [], [], 0
        for part in self._parts:
            end = offset + len(part.start_cursor)
            cursors.append(cursor[offset:end])
            held.append(cursor[end])
            offset = end + 1
        return cursors, held

    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[TokenSequence], Cursor]:
        """The shard's sequences from ``cursor`` on until they hold ``tokens`` kept tokens, and the next cursor."""
        out: list[TokenSequence] = []
        cursors, held = self._split_cursor(cursor)
        wanted = sum(held) + tokens
        while sum(held) < wanted:
            number = furthest_behind(held, self._shares)
            sequences, cursors[number] = self._parts[number].read(shard, cursors[number], 1)
            held[number] += sum(int(self.keep(sequence).sum()) for sequence in sequences)
            out.extend(tag_part(sequence, number) for sequence in sequences)
        return out, tuple(
            value for part_cursor, count in zip(cursors, held, strict=True) for value in (*part_cursor, count)
        )

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Hand each part its own cursors."""
        split = {shard: self._split_cursor(cursor)[0] for shard, cursor in cursors.items()}
        for number, part in enumerate(self._parts):
            part.hint_cursors({shard: each[number] for shard, each in split.items()})

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Hand ``check`` to each part."""
        for part in self._parts:
            part.set_interrupt_check(check)


class MixedHeldOutSequences(Sequences):
    """Held-out sequences of several data sets, in an order that keeps to their shares as long as each has some."""

    def __init__(self, parts: list[Sequences], shares: tuple[float, ...]) -> None:
        self._parts, self._shares = parts, shares
        self._starts = np.cumsum([0, *map(len, parts)])
        self.text_tokens = sum(part.text_tokens for part in parts)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenSequence:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return tag_part(self._parts[part][index - int(self._starts[part])], part)

    def shuffled_order(self, seed: int) -> np.ndarray:
        """Numbers of the sequences until one data set has no more, each in a mixed order of its own."""
        if seed not in self._orders:
            self._orders[seed] = self._compute_order(seed)
        return self._orders[seed]

    def _compute_order(self, seed: int) -> np.ndarray:
        orders = [part.shuffled_order(seed) for part in self._parts]
        held, taken = [0] * len(orders), [0] * len(orders)
        out = []
        while taken[part := furthest_behind(held, self._shares)] < len(orders[part]):
            number = int(orders[part][taken[part]])
            out.append(int(self._starts[part]) + number)
            held[part] += int((self._parts[part][number].kind == TokenKind.TEXT).sum())
            taken[part] += 1
        return np.array(out, dtype=np.int64)
