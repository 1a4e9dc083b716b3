"""Packing: sequences into blocks of one length, with little room left over and none cut."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the numbers of the sequences in each block.

    Best fit decreasing: the longest sequence comes first, and each goes into the block with the least room that
    suffices. This takes at most 11/9 of the fewest blocks possible, and 4 more (Johnson 1974, "Fast algorithms for bin
    packing"). For the training of language models see Ding et al. 2024, arXiv 2404.10830.

    Args:
        lengths: lengths of the sequences, 1 to `capacity`.
        capacity: length of a block.

    Raises:
        ValueError: a sequence does not fit into any block, or is empty.
    """
    blocks: list[list[int]] = []
    rooms: list[int] = []  # the room left in some block, rising, each number once
    with_room: dict[int, list[int]] = {}
    for sequence in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[sequence]
        if not 1 <= length <= capacity:
            raise ValueError(f"sequence {sequence} has the length {length}: a block takes 1 to {capacity}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            block, room = len(blocks), capacity
            blocks.append([])
        else:
            room = rooms[place]
            block = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        blocks[block].append(sequence)
        room -= length
        if room:
            if not with_room.setdefault(room, []):
                insort(rooms, room)
            with_room[room].append(block)
    return blocks
