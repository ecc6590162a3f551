from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import prod

import pytest
import torch

from pipeline.errors import VolumeError
from pipeline.inference.aggregator import (
    FLOAT32,
    HALO,
    ScoreBlock,
    WindowGrid,
    aggregate,
    buffer_bytes,
    group_windows,
    window_grid,
)
from pipeline.inference.sliding_window import WindowInferer

ROI = (6, 5, 7)
SIZES = [(6, 5, 7), (13, 17, 9), (20, 6, 23), (7, 6, 8)]
CELLS = list(product((1, 2, 99), repeat=3))


def scores(starts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Numbers that depend on the window's place only."""
    return [
        torch.randn(3, *ROI, generator=torch.Generator().manual_seed(hash(start) % 2**31))
        for start in starts
    ]


def together(windows: WindowGrid) -> torch.Tensor:
    """The volume from its blocks, each voxel of which must have been given, and the repeated ones alike."""
    whole = torch.full((3, *windows.shape), float("nan"))
    for block in aggregate(windows, scores, torch.linspace(0.5, 2, prod(ROI)).reshape(ROI), 3):
        at = (
            slice(None),
            *(slice(i, i + n) for i, n in zip(block.start, block.scores.shape[1:], strict=True)),
        )
        known = ~whole[at].isnan()
        assert torch.equal(whole[at][known], block.scores[known])
        whole[at] = block.scores
    return whole


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", SIZES)
def test_cells_of_any_size_give_the_same_bits(size: tuple[int, ...], overlap: float) -> None:
    """How much is held at a time changes nothing, and every voxel is given."""
    windows = window_grid(size, ROI, overlap)
    expected = together(windows)
    assert not expected.isnan().any()
    plans = {group_windows(windows, 3, limit).cell for limit in (0, 3e4, 6e4, 1e5, 2e5)}
    for cell in plans:
        assert torch.equal(together(replace(windows, cell=cell)), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_cells_of_any_shape_give_the_same_values(cell: tuple[int, int, int]) -> None:
    """Also those that `fit` does not choose, whose sums run in another order."""
    windows = window_grid((20, 16, 23), ROI, 0.5)
    torch.testing.assert_close(
        together(replace(windows, cell=cell)), together(windows), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", SIZES)
def test_blocks_repeat_one_voxel_of_their_neighbours(size: tuple[int, ...]) -> None:
    """So that linear interpolation finds both neighbours of each position in one block."""
    windows = replace(window_grid(size, ROI, 0.5), cell=(1, 1, 1))
    found = [(b.start, b.scores.shape[1:]) for b in aggregate(windows, scores, torch.ones(ROI), 3)]
    for axis, n in enumerate(size):
        ends = sorted({(start[axis], start[axis] + shape[axis]) for start, shape in found})
        assert ends[0][0] == 0
        assert ends[-1][1] == n
        assert all(after[0] == before[1] - HALO for before, after in pairwise(ends))


@pytest.mark.parametrize("placement", ["even", "monai"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows_cover_the_volume_and_stay_in_it(placement: str, overlap: float) -> None:
    """Ascending, the first at the front, the last at the end, none further apart than the overlap allows."""
    for n in range(6, 40):
        (starts,) = window_grid((n,), (6,), overlap, placement).starts  # type: ignore[arg-type]
        assert starts[0] == 0
        assert starts[-1] == n - 6
        assert all(
            0 < b - a <= max(1, int(6 * (1 - overlap))) + (placement == "even")
            for a, b in pairwise(starts)
        )


def test_both_placements_need_equally_many_windows() -> None:
    """Even spacing costs nothing."""
    for n in range(6, 60):
        assert len(window_grid((n,), (6,), 0.3).starts[0]) == len(
            window_grid((n,), (6,), 0.3, "monai").starts[0]
        )


def test_a_limit_is_kept_where_it_can_be() -> None:
    """The largest cells below it; the smallest ones where there is none."""
    windows = window_grid((96, 80, 64), (16, 16, 16), 0.5)
    whole = buffer_bytes(windows, 9)
    assert whole == FLOAT32 * 10 * 96 * 80 * 64
    assert group_windows(windows, 9, whole) == windows
    for part in (2, 4, 7):
        assert (
            whole / part / 8
            < buffer_bytes(group_windows(windows, 9, whole / part), 9)
            <= whole / part
        )
    assert group_windows(windows, 9, 1).cell == (1, 1, 1)


def test_what_nobody_looked_at_is_background() -> None:
    """A window that is left out counts nothing."""
    windows = window_grid((12, 5, 7), ROI, 0.0)
    (block,) = aggregate(
        windows,
        lambda starts: [None if start[0] else torch.ones(3, *ROI) for start in starts],
        torch.ones(ROI),
        3,
    )
    assert (block.scores[:, :6] == 1).all()
    assert (block.scores[:, 6:].argmax(0) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    """With where they are."""
    windows = replace(window_grid((12, 5, 7), ROI, 0.0), cell=(1, 1, 1))
    with pytest.raises(
        VolumeError, match=r"NaN or infinity in the block that starts at voxel \(5, 0, 0\)"
    ):
        list(
            aggregate(
                windows,
                lambda starts: [torch.full((3, *ROI), bad if s[0] else 0.0) for s in starts],
                torch.ones(ROI),
                3,
            )
        )


def test_a_block_is_let_go_before_the_next_is_made() -> None:
    """Or twice the memory would be held; also with what cuts, times and collects blocks around it."""
    alive: list[weakref.ReferenceType[torch.Tensor]] = []

    def network(patch: torch.Tensor) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        return torch.cat([patch, -patch], 1)

    def finish(pieces: Iterator[ScoreBlock], image: torch.Tensor) -> torch.Tensor:
        for block in pieces:
            alive.append(weakref.ref(block.scores))
            del block
        return image

    x = torch.randn(1, 1, 40, 5, 7)
    WindowInferer(ROI, 0.5, held_bytes=0, finish=finish)(x, network)
    assert len(alive) > 5
    alive.clear()
    WindowInferer(ROI, 0.5, held_bytes=0)(x, network)
