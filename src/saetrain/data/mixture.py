"""Mixture of several data sets: each virtual shard reads next from the data set that is furthest below its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from saetrain.data.packing import Sequences
from saetrain.data.sharded import ShardedSource
from saetrain.errors import SaetrainError
from saetrain.settings import PositiveFactor, Settings
from saetrain.types import DATASET_ROW_BITS, Cursor, ModelBatch, TokenKind, TokenSequence, shown_default


@dataclass(frozen=True, kw_only=True)
class MixSettings(Settings):
    """Mixture of data sets."""

    mix: Annotated[tuple[PositiveFactor, ...] | None, shown_default("equal", "FLOAT ...")] = None
    """Weights of the data sets, in the order of the arguments. They are scaled to shares of the training tokens."""

    def normalized_shares(self, count: int) -> tuple[float, ...]:
        """Return the shares of ``count`` data sets, which add up to 1.

        Raises SaetrainError when the number of weights is not ``count``.
        """
        if self.mix is None:
            return (1 / count,) * count
        if len(self.mix) != count:
            raise SaetrainError(
                f"--mix {' '.join(f'{w:g}' for w in self.mix)}: {len(self.mix)} weights for {count} data "
                f"set{'s' if count > 1 else ''}; pass one weight per data set"
            )
        return tuple(weight / sum(self.mix) for weight in self.mix)


def furthest_behind(held: list[int], shares: tuple[float, ...]) -> int:
    """Return the number of the data set with the fewest tokens relative to its share."""
    return min(range(len(held)), key=lambda part: held[part] / shares[part])


def tag_part(sequence: TokenSequence, part: int) -> TokenSequence:
    """Return the sequence with the data set's number ``part`` in its document numbers (DATASET_ROW_BITS)."""
    return TokenSequence(sequence.ids, sequence.kind, sequence.doc + (part << DATASET_ROW_BITS))


class MixedSequences(ShardedSource):
    """Sources mixed within each shard.

    The cursor is the concatenation, over the parts, of the part's cursor and the tokens read from it.
    """

    def __init__(
        self, parts: list[ShardedSource], shares: tuple[float, ...], exclude_special: bool, exclude_first: bool
    ) -> None:
        assert len({part.n_shards for part in parts}) == 1, "the parts have different numbers of shards"
        super().__init__(parts[0].n_shards, exclude_special, exclude_first)
        self._parts, self._shares = parts, shares
        self.start_cursor: Cursor = tuple(number for part in parts for number in (*part.start_cursor, 0))

    def _split_cursor(self, cursor: Cursor) -> tuple[list[Cursor], list[int]]:
        """Return (cursor of each part, tokens read from each part)."""
        cursors, held, offset = [], [], 0
        for part in self._parts:
            end = offset + len(part.start_cursor)
            cursors.append(cursor[offset:end])
            held.append(cursor[end])
            offset = end + 1
        return cursors, held

    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[ModelBatch], Cursor]:
        """Read the shard's batches from ``cursor`` on, as :meth:`ShardedSource.read`."""
        out: list[ModelBatch] = []
        cursors, held = self._split_cursor(cursor)
        wanted = sum(held) + tokens
        while sum(held) < wanted:
            number = furthest_behind(held, self._shares)
            batches, cursors[number] = self._parts[number].read(shard, cursors[number], 1)
            held[number] += sum(map(self.count_kept, batches))
            out.extend([tag_part(sequence, number) for sequence in batch] for batch in batches)
        return out, tuple(
            value for part_cursor, count in zip(cursors, held, strict=True) for value in (*part_cursor, count)
        )

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Pass each part its own cursors."""
        split = {shard: self._split_cursor(cursor)[0] for shard, cursor in cursors.items()}
        for number, part in enumerate(self._parts):
            part.hint_cursors({shard: each[number] for shard, each in split.items()})

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Pass ``check`` to each part."""
        for part in self._parts:
            part.set_interrupt_check(check)


class MixedHeldOutSequences(Sequences):
    """Held-out sequences of several data sets, ordered so that each prefix has the data sets' shares."""

    def __init__(self, parts: list[Sequences], shares: tuple[float, ...]) -> None:
        self._parts, self._shares = parts, shares
        self._starts = np.cumsum([0, *map(len, parts)])
        self.text_tokens = sum(part.text_tokens for part in parts)
        self.lengths = np.concatenate([part.lengths for part in parts])
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenSequence:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return tag_part(self._parts[part][index - int(self._starts[part])], part)

    def shuffled_order(self, seed: int) -> np.ndarray:
        """Return the numbers of the sequences in shuffled order, up to where one data set runs out."""
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
