"""The design of a comparison: which clips depend on each other. Intervals and tests leave out independent parts of it.

A generated clip is made from a frame of its own reference clip, and several clips may come from one source video or one
input image. Such clips are one group. Clips of one group depend on each other, on both sides; groups are independent.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.files import digest
from dcbench.record import Replicates

BLOCKS = 16
FEWEST = 3  # groups, and blocks, of a side: fewer give no interval


@dataclass(frozen=True)
class Design:
    """The group of each row of two sets, as 64-bit hashes of the groups' names: int64 [n] and [m].

    A group that occurs on both sides ties them. Blocks depend on the hashes only, not on the order of the rows.
    """

    real: np.ndarray
    generated: np.ndarray

    @classmethod
    def of(cls, real: Sequence[str], generated: Sequence[str]) -> "Design":
        """The design of rows with these group names."""
        return cls(codes(real), codes(generated))

    @classmethod
    def independent(cls, real: Tensor, generated: Tensor) -> "Design":
        """Features [n d] and [m d] whose rows are independent: each row is a group, named by its numbers.

        A row that is on both sides is one group: it is a copy, so the sides are tied there.
        """
        return cls(_row_codes(real), _row_codes(generated))

    @property
    def digest(self) -> str:
        """Equal for two runs whose clips have the same groups. Only these can be compared block by block."""
        return digest([sorted(side.tolist()) for side in (self.real, self.generated)], 16)

    @property
    def n_groups(self) -> int:
        """Independent groups of the side that has fewer; of the generated side, if there is no other."""
        counts = [len(np.unique(side)) for side in (self.real, self.generated) if len(side)]
        return min(counts, default=0)

    @property
    def is_grouped(self) -> bool:
        """Whether a side has several rows of one group."""
        return any(len(np.unique(side)) < len(side) for side in (self.real, self.generated))

    def rows(self, real: np.ndarray, generated: np.ndarray) -> "Design":
        """The design of some rows: indices or masks of both sides."""
        return Design(self.real[real], self.generated[generated])

    def strata(self) -> list[np.ndarray]:
        """The groups that are on both sides, on the reference side only, on the generated side only. Sorted hashes.

        A stratum of one or two groups is joined to another, if that one has clips of the same side: it is too small
        for blocks of its own.
        """
        real, generated = np.unique(self.real), np.unique(self.generated)
        tied = np.intersect1d(real, generated)
        single = [part for part in (np.setdiff1d(real, tied), np.setdiff1d(generated, tied)) if len(part)]
        if len(tied) >= FEWEST:
            tied = np.concatenate([tied, *(part for part in single if len(part) < FEWEST)])
            single = [part for part in single if len(part) >= FEWEST]
        elif len(tied) and single:
            largest = max(range(len(single)), key=lambda k: len(single[k]))
            single[largest] = np.concatenate([single[largest], tied])
            tied = tied[:0]
        return [np.sort(part) for part in (tied, *single) if len(part)]

    def blocks(self) -> list[list[np.ndarray]]:
        """For each stratum, at most 16 blocks of groups with near-equal numbers of rows. [] if a stratum is too small.

        Whole groups are in one block. Two samples of different videos are two strata, so each loses its own blocks.
        """
        strata = self.strata()
        if any(len(groups) < FEWEST for groups in strata):
            return []
        rows = Counter(self.real.tolist()) + Counter(self.generated.tolist())
        return [_deal(groups, rows) for groups in strata]


def codes(names: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of each name, int64 [n]."""
    return np.array([_code(name.encode()) for name in names], dtype=np.int64)


def _code(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _row_codes(features: Tensor) -> np.ndarray:
    """A hash of each row's numbers. The second of two equal rows is a group of its own."""
    seen: Counter[bytes] = Counter()
    found = []
    for row in features.double().cpu().contiguous().numpy():
        data = row.tobytes()
        seen[data] += 1
        found.append(_code(f"{seen[data]}/".encode() + data))
    return np.array(found, dtype=np.int64)


def _deal(groups: np.ndarray, rows: Counter[int]) -> list[np.ndarray]:
    """The largest group first, each to the block with the fewest rows. The hashes' order is as good as random."""
    number = min(BLOCKS, len(groups))
    members: list[list[int]] = [[] for _ in range(number)]
    sizes = [0] * number
    for group in sorted(groups.tolist(), key=lambda group: (-rows[group], group)):
        smallest = sizes.index(min(sizes))
        members[smallest].append(group)
        sizes[smallest] += rows[group]
    return [np.array(block, dtype=np.int64) for block in members]


Groups = Design | Sequence[str] | None


def as_design(given: Groups, real: Tensor, generated: Tensor) -> Design:
    """The design of two sets. None: all rows are independent. A list: the group of row i of both sides, a pair."""
    if given is None:
        return Design.independent(real, generated)
    design = given if isinstance(given, Design) else Design.of(given, given)
    sizes, rows = (len(design.real), len(design.generated)), (len(real), len(generated))
    if sizes != rows:
        raise UserError(
            f"groups of {sizes[0]} reference and {sizes[1]} generated rows for {rows[0]} and {rows[1]} rows. A list "
            "of groups needs as many rows on both sides; else give Design.of(groups of real, groups of generated)"
        )
    return design


DesignedStatistic = Callable[[Tensor, Tensor, Design], float]


def replicates(
    statistic: DesignedStatistic, real: Tensor, generated: Tensor, design: Design, biased: bool = False
) -> Replicates | None:
    """The statistic of [n d] and [m d] without each block. None: a side has too few groups, or too few rows are left.

    `biased`: the value falls with the number of clips, as FVD does; comparisons of two models remove that bias.
    """
    strata = []
    for blocks in design.blocks():
        values = []
        total = sum(np.isin(side, np.concatenate(blocks)).sum() for side in (design.real, design.generated))
        for block in blocks:
            keep = [~np.isin(side, block) for side in (design.real, design.generated)]
            removed = sum(int((~side).sum()) for side in keep)
            try:
                value = statistic(
                    real[torch.from_numpy(keep[0])], generated[torch.from_numpy(keep[1])], design.rows(keep[0], keep[1])
                )
            except UserError:  # the value of all clips exists; it has no interval
                return None
            values.append((float(total) / removed, value))
        strata.append(values)
    return Replicates(design=design.digest, strata=strata, biased=biased) if strata else None
