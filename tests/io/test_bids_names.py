from __future__ import annotations

import doctest

import pytest

from pipeline.io import bids_names
from pipeline.io.bids_names import derivative_stem, parse_bids_name


def test_the_examples_are_true() -> None:
    assert doctest.testmod(bids_names).failed == 0


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_T1w.nii.gz",
        "sub-A1_ses-pre_acq-highres_ce-gd_rec-norm_run-02_echo-1_part-mag_T1w.nii",
        "sub-01_space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w.nii.gz",
    ],
)
def test_a_name_is_its_entities_suffix_and_extension(name: str) -> None:
    """The parts put together are the name: nothing is lost or invented."""
    parts = parse_bids_name(name)
    assert parts is not None
    assert f"{parts.entity_text}_{parts.suffix}{parts.extension}" == name


@pytest.mark.parametrize(
    "name",
    [
        "T1w.nii.gz",
        "ses-1_sub-01_T1w.nii.gz",
        "sub-01_acq_T1w.nii.gz",
        "sub-_T1w.nii.gz",
        "sub-01_T1w_old.nii.gz",
        "sub-01_run-1_run-2_T1w.nii.gz",
        "sub-01_T1w.mgz",
        "sub-0 1_T1w.nii.gz",
    ],
)
def test_other_names_have_no_parts(name: str) -> None:
    assert parse_bids_name(name) is None


def test_derivatives_of_different_images_have_different_names() -> None:
    """Whatever differs in the images' names differs in those of the derivatives."""
    entities = ("", "_run-1", "_run-2", "_acq-a_run-1", "_ses-1", "_desc-x")
    names = [f"sub-01{part}_{suffix}" for part in entities for suffix in ("T1w", "T2w", "FLAIR")]
    parsed = [parse_bids_name(name) for name in names]
    stems = {derivative_stem(name) for name in parsed if name is not None}
    assert len(stems) == len(names)
    assert all(stem.count("_desc-volseg") == 1 for stem in stems)
