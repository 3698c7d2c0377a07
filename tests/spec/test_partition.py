"""Arithmetic of flat pieces: they tile a parameter, whatever its size and the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.spec.partition import Piece, Pieces, cut, even_pieces, padded_piece

numels = st.integers(0, 5000)
rank_counts = st.integers(1, 40)


def elements(pieces: Sequence[Piece]) -> list[int]:
    return [element for piece in pieces for element in range(piece.start, piece.stop)]


@given(numels, rank_counts)
def test_even_pieces_tile_the_parameter_in_order(numel: int, ranks: int) -> None:
    pieces = even_pieces(numel, ranks)
    assert len(pieces) == ranks
    assert elements(pieces) == list(range(numel))
    assert all(0 <= piece.start <= piece.stop <= numel for piece in pieces)
    assert [piece.numel for piece in pieces] == [piece.stop - piece.start for piece in pieces]


@given(numels, rank_counts)
def test_even_pieces_are_a_padded_tensors_rows(numel: int, ranks: int) -> None:
    """ZeRO stage 3 pads to a multiple of the ranks and gives each an equal share: the pieces are those without pad."""
    size = padded_piece(numel, ranks)
    padded = torch.full((ranks * size,), -1)
    padded[:numel] = torch.arange(numel)
    for row, piece in zip(padded.view(ranks, size), even_pieces(numel, ranks), strict=True):
        assert row[row >= 0].tolist() == list(range(piece.start, piece.stop))


@given(numels, rank_counts)
def test_the_padding_is_the_least_that_makes_pieces_equal(numel: int, ranks: int) -> None:
    assert 0 <= padded_piece(numel, ranks) * ranks - numel < ranks
    assert max(piece.numel for piece in even_pieces(numel, ranks)) == padded_piece(numel, ranks)


def test_nine_elements_on_two_ranks() -> None:
    """The case in which DeepSpeed's own setters run past the end."""
    assert list(even_pieces(9, 2)) == [Piece(0, 5), Piece(5, 9)]
    assert padded_piece(9, 2) == 5


def test_more_ranks_than_elements_leave_the_last_ones_empty() -> None:
    assert list(even_pieces(2, 4)) == [Piece(0, 1), Piece(1, 2), Piece(2, 2), Piece(2, 2)]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), rank_counts)
def test_window_pieces_are_what_a_flat_tensor_cut_into_windows_holds(numels: list[int], ranks: int) -> None:
    """Lay real parameters end to end, cut them into windows, and look where each element went."""
    window = max(-(-sum(numels) // ranks), 1)
    flat = torch.cat([torch.full((numel,), parameter) for parameter, numel in enumerate(numels)])
    offset = 0
    for parameter, numel in enumerate(numels):
        pieces = Pieces(numel, window, ranks, offset)
        assert len(pieces) == ranks
        assert elements(pieces) == list(range(numel))
        for rank, piece in enumerate(pieces):
            owned = flat[rank * window : (rank + 1) * window]
            assert piece.numel == int((owned == parameter).sum())
            if piece.numel:
                assert int((owned == parameter).nonzero()[0]) == offset + piece.start - rank * window
        offset += numel


@given(numels, rank_counts)
def test_a_parameter_alone_in_its_windows_has_even_pieces(numel: int, ranks: int) -> None:
    window = padded_piece(numel, ranks)
    assert list(Pieces(numel, window, ranks)) == list(even_pieces(numel, ranks))


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0, [Piece(0, 4), Piece(4, 6), Piece(6, 6)]),
        (3, [Piece(0, 1), Piece(1, 5), Piece(5, 6)]),
        (6, [Piece(0, 0), Piece(0, 2), Piece(2, 6)]),
    ],
)
def test_windows_of_four_by_hand(offset: int, expected: list[Piece]) -> None:
    pieces = Pieces(6, 4, 3, offset)
    assert list(pieces) == expected
    assert pieces[1:] == expected[1:]
    assert pieces[-1] == expected[-1]
    with pytest.raises(IndexError):
        pieces[3]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_a_stretch_is_cut_at_the_multiples(start: int, length: int, size: int) -> None:
    pieces = list(cut(start, start + length, size))
    elements = [index * size + offset + i for index, offset, count in pieces for i in range(count)]
    assert elements == list(range(start, start + length))
    assert all(count and offset + count <= size for _, offset, count in pieces)
    assert all(offset == 0 for _, offset, _ in pieces[1:])
