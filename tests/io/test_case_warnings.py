from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate

from pipeline.io.case_warnings import add_warnings, warnings_of
from pipeline.io.grid import Grid

WARNINGS = [(), ("one",), ("the first", "the second; with more", "the third")]


def tensor(warnings: tuple[str, ...]) -> MetaTensor:
    grid = Grid(affine=np.diag([2.0, 3.0, 4.0, 1.0]), shape=(5, 6, 7), header=b"")
    image = MetaTensor(torch.zeros(1, 2, 3, 4), meta=grid.to_meta())
    add_warnings(image.meta, *warnings)
    return image


@pytest.mark.parametrize("warnings", WARNINGS)
def test_warnings_survive_collation(warnings: tuple[str, ...]) -> None:
    """Through MONAI's collation, a DataLoader and decollation."""
    (batch,) = DataLoader(Dataset([{"image": tensor(warnings)}]), batch_size=1)
    for collated in (batch, list_data_collate([{"image": tensor(warnings)}])):
        (item,) = decollate_batch(collated)
        assert warnings_of(item["image"].meta) == warnings


def test_cases_with_different_numbers_of_warnings_make_a_batch() -> None:
    """Each keeps its own."""
    batch = list_data_collate([{"image": tensor(warnings)} for warnings in WARNINGS])
    found = [warnings_of(item["image"].meta) for item in decollate_batch(batch)]
    assert found == WARNINGS


def test_warnings_are_added_to_those_before() -> None:
    """In order; without any the key exists all the same, so that batches have equal keys."""
    meta: dict[str, str] = {}
    assert warnings_of(meta) == ()
    add_warnings(meta)
    assert list(meta) == ["warnings"]
    assert warnings_of(meta) == ()
    add_warnings(meta, "a", "b")
    add_warnings(meta, "c")
    assert warnings_of(meta) == ("a", "b", "c")


def test_a_grid_survives_collation() -> None:
    """With an empty header and with one."""
    for header in (b"", b"\x5c\x01\x00\x00"):
        grid = Grid(affine=np.diag([2.0, 3.1, 4.0, 1.0]), shape=(5, 6, 7), header=header)
        image = MetaTensor(torch.zeros(1, 2, 3, 4), meta=grid.to_meta())
        (item,) = decollate_batch(list_data_collate([{"image": image}]))
        found = Grid.from_meta(item["image"].meta)
        np.testing.assert_array_equal(found.affine, grid.affine)
        assert (found.shape, found.header) == (grid.shape, grid.header)
