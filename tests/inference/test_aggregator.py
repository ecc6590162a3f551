from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import prod

import pytest
import torch

from pipeline.errors import VolumeError
from pipeline.inference.aggregator import (
    FLOAT32_BYTES,
    HALO,
    Placement,
    WindowGrid,
    aggregate,
    buffer_bytes,
    group_windows,
    window_grid,
)
from pipeline.inference.sliding_window import WindowInferer

ROI = (6, 5, 7)
SIZES = [(6, 5, 7), (13, 17, 9), (20, 6, 23), (7, 6, 8)]
GROUP_SIZES = list(product((1, 2, 99), repeat=3))


def scores(starts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return scores that depend on the place of the window only."""
    return [
        torch.randn(3, *ROI, generator=torch.Generator().manual_seed(hash(start) % 2**31))
        for start in starts
    ]


def together(windows: WindowGrid) -> torch.Tensor:
    """Return the volume from its blocks; repeated voxels must be the same in both."""
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


@pytest.mark.parametrize("placement", ["even", "monai"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", SIZES)
def test_groups_of_any_size_give_the_same_bits(
    size: tuple[int, ...], overlap: float, placement: Placement
) -> None:
    """Scores do not depend on how much is held at a time, and every voxel gets one."""
    windows = window_grid(size, ROI, overlap, placement)
    expected = together(windows)
    assert not expected.isnan().any()
    plans = {group_windows(windows, 3, limit).group_size for limit in (0, 3e4, 6e4, 1e5, 2e5)}
    for group_size in plans:
        assert torch.equal(together(replace(windows, group_size=group_size)), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_groups_of_any_shape_give_the_same_values(group_size: tuple[int, int, int]) -> None:
    """Groups that `group_windows` does not choose sum in another order."""
    windows = window_grid((20, 16, 23), ROI, 0.5)
    torch.testing.assert_close(
        together(replace(windows, group_size=group_size)), together(windows), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("placement", ["even", "monai"])
@pytest.mark.parametrize("size", SIZES)
def test_blocks_repeat_one_voxel_of_their_neighbours(
    size: tuple[int, ...], placement: Placement
) -> None:
    """Linear interpolation finds both neighbours of each position in one block."""
    windows = replace(window_grid(size, ROI, 0.5, placement), group_size=(1, 1, 1))
    found = [(b.start, b.scores.shape[1:]) for b in aggregate(windows, scores, torch.ones(ROI), 3)]
    for axis, n in enumerate(size):
        ends = sorted({(start[axis], start[axis] + shape[axis]) for start, shape in found})
        assert ends[0][0] == 0
        assert ends[-1][1] == n
        assert all(after[0] == before[1] - HALO for before, after in pairwise(ends))


@pytest.mark.parametrize("placement", ["even", "monai"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows_cover_the_volume_and_stay_in_it(placement: str, overlap: float) -> None:
    """Starts ascend from 0 to the end, no further apart than the overlap allows."""
    for n in range(6, 40):
        (starts,) = window_grid((n,), (6,), overlap, placement).starts  # type: ignore[arg-type]
        assert starts[0] == 0
        assert starts[-1] == n - 6
        assert all(
            0 < b - a <= max(1, int(6 * (1 - overlap))) + (placement == "even")
            for a, b in pairwise(starts)
        )


def test_both_placements_need_equally_many_windows() -> None:
    """Even spacing costs no additional window."""
    for n in range(6, 60):
        assert len(window_grid((n,), (6,), 0.3).starts[0]) == len(
            window_grid((n,), (6,), 0.3, "monai").starts[0]
        )


def test_a_limit_is_kept_where_it_can_be() -> None:
    """The largest groups within the limit are chosen; single windows where none are."""
    windows = window_grid((96, 80, 64), (16, 16, 16), 0.5)
    whole = buffer_bytes(windows, 9)
    assert whole == FLOAT32_BYTES * 10 * 96 * 80 * 64
    assert group_windows(windows, 9, whole) == windows
    for part in (2, 4, 7):
        assert (
            whole / part / 8
            < buffer_bytes(group_windows(windows, 9, whole / part), 9)
            <= whole / part
        )
    assert group_windows(windows, 9, 1).group_size == (1, 1, 1)


def test_channels_may_lie_next_to_each_other() -> None:
    """The bits of the blocks are the same, and their memory is in that order."""
    windows = replace(window_grid((20, 16, 23), ROI, 0.5), group_size=(1, 2, 3))

    def ordered(starts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        return [one.movedim(0, -1).contiguous().movedim(-1, 0) for one in scores(starts)]

    weights = torch.linspace(0.5, 2, prod(ROI)).reshape(ROI)
    usual = aggregate(windows, scores, weights, 3)
    found = aggregate(windows, ordered, weights, 3, channels_last=True)
    for one, other in zip(usual, found, strict=True):
        assert one.start == other.start
        assert torch.equal(one.scores, other.scores)
        assert other.scores.stride(0) == 1


def test_a_last_window_that_is_shifted_back_shares_little() -> None:
    """It starts 8 voxels after the one before, and is summed in one buffer with it."""
    windows = window_grid((320, 320, 256), (96, 96, 96), 0.25, "monai")
    assert windows.starts[0] == (0, 72, 144, 216, 224)
    single = group_windows(windows, 105, 1)
    assert single.groups(0) == [(0,), (72,), (144,), (216, 224)]
    assert single.groups(2) == [(0,), (72,), (144, 160)]
    shared = 25 * 320 * 256 + 105 * 25 * 256 + 105 * 105 * 25
    assert single.held_voxels() <= 105 * 105 * 113 + shared
    even = group_windows(window_grid((320, 320, 256), (96, 96, 96), 0.25), 105, 1)
    assert even.groups(0) == [(start,) for start in even.starts[0]]


def test_skipped_windows_are_background() -> None:
    """Voxels without any scored window are background."""
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
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    """The message names the block."""
    windows = replace(window_grid((12, 5, 7), ROI, 0.0), group_size=(1, 1, 1))
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


def test_a_block_is_released_before_the_next_is_computed() -> None:
    """Otherwise twice the memory would be held, also by what consumes the blocks."""
    alive: list[weakref.ReferenceType[torch.Tensor]] = []

    def network(patch: torch.Tensor) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        return torch.cat([patch, -patch], 1)

    x = torch.randn(1, 1, 40, 5, 7)
    inferer = WindowInferer(ROI, 0.5, buffer_bytes=0)
    for block in inferer.blocks(x[0], network):
        alive.append(weakref.ref(block.scores))
        del block
    assert len(alive) > 5
    alive.clear()
    inferer(x, network)
