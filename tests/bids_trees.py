"""Small BIDS datasets with images, and the BIDS validator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from phantom import nifti, save, smooth

SHAPE = (9, 11, 8)
IMAGES = (
    "sub-01/ses-pre/anat/sub-01_ses-pre_run-1_T1w",
    "sub-01/ses-pre/anat/sub-01_ses-pre_run-2_T1w",
    "sub-01/ses-post/anat/sub-01_ses-post_acq-fast_rec-norm_T1w",
    "sub-02/ses-pre/anat/sub-02_ses-pre_ce-gd_T1w",
)
PARTICIPANTS = "participant_id\tage\tsex\nsub-01\t39\tF\nsub-02\tn/a\tM\nsub-07\t61\tM\n"
# of sub-01; its column age is also in participants.tsv
SESSIONS = "session_id\tage\tacq_time\nses-pre\t39.1\t2020-01-02T03:04:05\nses-post\t40.6\tn/a\n"


def make_dataset(root: Path, images: Sequence[str] = IMAGES) -> Path:
    """Write a BIDS dataset of small images, and return its folder."""
    for seed, name in enumerate(images):
        save(root / f"{name}.nii.gz", nifti(smooth(SHAPE, seed=seed)))
    description = {"Name": "Blobs", "BIDSVersion": "1.10.0", "Authors": ["A", "B"]}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "participants.tsv").write_text(PARTICIPANTS)
    if images == IMAGES:
        (root / "sub-01" / "sub-01_sessions.tsv").write_text(SESSIONS)
    return root


def validator_issues(folder: Path) -> list[str]:
    """Return the errors and warnings of the BIDS validator, one line each.

    Skips the test where the validator is not installed.
    """
    command = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run(
        [command, str(folder), "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DENO_NO_UPDATE_CHECK": "1"},
    )
    issues: list[dict[str, Any]] = json.loads(done.stdout)["issues"]["issues"]
    keys = ("severity", "code", "subCode", "location", "issueMessage")
    return [" ".join(str(issue.get(key, "")) for key in keys) for issue in issues]
