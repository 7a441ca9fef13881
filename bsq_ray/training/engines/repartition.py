"""Partitions of ZeRO for another number of workers, from those that hold their elements.

    old   |   rank 0   |   rank 1   |   rank 2   | (padding)
    new   |  rank 0 |  rank 1 |  rank 2 |  rank 3 | (padding)     rank 2 reads the old ranks 1 and 2

With a sixteenth of the workers, each reads about sixteen old partitions; with more workers, one or two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsq_ray.runtime._zero_checkpoint_internals import FlatGroup


class Piece(NamedTuple):
    """Consecutive elements of a new partition: elements `start` to `stop` of the partition of an old rank.

    A piece without a rank is padding; only its number of elements, `stop` - `start`, counts.
    """

    rank: int | None
    start: int
    stop: int


def part_size(segment: int, alignment: int, world_size: int) -> int:
    """Return the number of elements of each worker's part of a segment, padding included."""
    return -(-segment // (alignment * world_size)) * alignment


def partition_pieces(group: FlatGroup, rank: int, old_world_size: int, world_size: int) -> Iterator[Piece]:
    """Yield the pieces of the partition of a rank among `world_size` workers, in order."""
    offset = 0
    for segment in group.segments:
        old_size = part_size(segment, group.alignment, old_world_size)
        size = part_size(segment, group.alignment, world_size)
        position, stop = min(rank * size, segment), min((rank + 1) * size, segment)
        padding = size - (stop - position)
        while position < stop:
            old_rank, start = divmod(position, old_size)
            num_elements = min(stop - position, old_size - start)
            yield Piece(old_rank, offset + start, offset + start + num_elements)
            position += num_elements
        if padding:
            yield Piece(None, 0, padding)
        offset += old_size


def source_ranks(groups: Sequence[FlatGroup], rank: int, old_world_size: int, world_size: int) -> set[int]:
    """Return the ranks whose old partitions a rank among `world_size` workers reads, at least one."""
    pieces = (piece for group in groups for piece in partition_pieces(group, rank, old_world_size, world_size))
    # A rank with nothing but padding still needs values that are the same on all ranks, such as the number of steps.
    return {piece.rank for piece in pieces if piece.rank is not None} or {0}


def repartition_groups(
    groups: Sequence[FlatGroup],
    rank: int,
    old_world_size: int,
    world_size: int,
    sources: Mapping[int, Sequence[Mapping[str, Tensor]]],
) -> list[dict[str, Tensor]]:
    """Return the flat tensors of a rank among `world_size` workers, by group and name.

    Args:
        sources: flat tensors by group and name, by old rank; those of `source_ranks`.

    Raises:
        ValueError: the old workers divided the parameters into other groups.
    """
    for old_rank, tensors in sources.items():
        if len(tensors) != len(groups):
            # ZeRO-3 divides groups above a billion elements per worker further.
            raise ValueError(
                f"rank {old_rank} of the checkpoint has {len(tensors)} parameter groups, but a rank of {world_size} "
                f"workers has {len(groups)}; resume with {old_world_size} workers"
            )
    return [
        repartition(group, rank, old_world_size, world_size, {old: tensors[index] for old, tensors in sources.items()})
        for index, group in enumerate(groups)
    ]


def repartition(
    group: FlatGroup, rank: int, old_world_size: int, world_size: int, sources: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the flat tensors of a group for a rank among `world_size` workers, by name.

    Args:
        sources: flat tensors of the group by name, by old rank; those of `source_ranks`.
    """
    pieces = list(partition_pieces(group, rank, old_world_size, world_size))
    names = next(iter(sources.values()))
    return {name: torch.cat([_values(piece, name, like, sources) for piece in pieces]) for name, like in names.items()}


def _values(piece: Piece, name: str, like: Tensor, sources: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
    if piece.rank is None:
        return like.new_zeros(piece.stop - piece.start)
    return sources[piece.rank][name][piece.start : piece.stop]
