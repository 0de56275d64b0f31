"""What is remembered, and how much of it."""

import torch

from infoprune_export.compress.lessons import Remembered


def test_things_are_computed_once_while_there_is_room_and_again_past_it():
    asked = []

    def compute(row):
        asked.append(row)
        return torch.full((10,), float(row))

    remembered = Remembered(compute, lambda t: (t,), limit=100)  # two of 40 bytes
    for _ in range(2):
        assert [float(remembered[row][0]) for row in range(3)] == [0, 1, 2]
    assert asked == [0, 1, 2, 2]
    assert sorted(remembered.kept) == [0, 1] and remembered.left == 20


def test_without_a_limit_a_part_of_the_free_memory_is_used():
    assert Remembered(lambda row: torch.zeros(1), lambda t: (t,)).left > 2**20
