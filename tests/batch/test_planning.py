from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from phantom import nifti, save, smooth

from pipeline.batch import planning
from pipeline.batch.case_worker import Task, failed_record
from pipeline.batch.failures import WorkerDiedError
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.planning import PlannedCase, choose_jobs, forecast_cases, plan_case
from pipeline.batch.records import write_record
from pipeline.batch.suspects import MAX_DEATHS, count_death
from pipeline.inference.model import Model
from pipeline.io.cases import find_cases
from pipeline.types import Case

GIB = 2**30


@pytest.fixture
def cases(model_3d: Model, tmp_path: Path) -> list[Case]:
    """Six volumes, of which one is broken."""
    for i in range(6):
        save(tmp_path / "in" / f"{i}.nii.gz", nifti(smooth((9, 11, 8), seed=i)))
    (tmp_path / "in" / "3.nii.gz").write_bytes(b"broken")
    return find_cases([tmp_path / "in"], model_3d.spec)


@pytest.mark.parametrize(
    ("cores", "memory", "jobs", "threads"),
    [(1, 64, 1, 1), (4, 64, 4, 1), (12, 64, 6, 2), (64, 64, 6, 10), (8, 1, 1, 8), (8, 3, 3, 2)],
)
def test_jobs_fit_into_cores_memory_and_cases(
    cores: int,
    memory: int,
    jobs: int,
    threads: int,
    model_3d: Model,
    cases: list[Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process of the tiny model needs about 0.7 GiB, and 70 % of the memory is planned with."""
    monkeypatch.setattr(planning, "allotted_cores", lambda: cores)
    monkeypatch.setattr(planning, "allotted_memory", lambda: memory * GIB)
    chosen = choose_jobs(model_3d, cases, None, None)
    assert chosen[0] * chosen[1] <= max(cores, 1)
    assert abs(chosen[0] - jobs) <= (1 if memory == 3 else 0)
    if memory != 3:
        assert chosen == (jobs, threads)


def test_what_the_user_wants_counts(
    model_3d: Model, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also more processes than cores; with a limit of memory, one is chosen."""
    monkeypatch.setattr(planning, "allotted_cores", lambda: 8)
    assert choose_jobs(model_3d, cases, 3, None) == (3, 2)
    assert choose_jobs(model_3d, cases, 20, None) == (20, 1)
    assert choose_jobs(model_3d, cases, None, 4 * GIB) == (1, 8)
    assert choose_jobs(model_3d, [], None, None) == (1, 8)


def test_forecasts_name_what_will_fail(model_3d: Model, cases: list[Case], tmp_path: Path) -> None:
    """Broken files, bad names and known problems, without an error; nothing is written."""
    more: list[Case] = [
        {"case": "../out", "image": cases[0]["image"]},
        {"case": "x", "image": cases[0]["image"], "problem": "it is known"},
    ]
    forecasts, seconds = forecast_cases(replace(model_3d), [*cases, *more], tmp_path / "out")
    assert seconds > 0
    assert [bool(item.problem) for item in forecasts] == [
        number in (3, 6, 7) for number in range(8)
    ]
    good = forecasts[0]
    assert good.shape == (9, 11, 8)
    assert good.spacing == pytest.approx((0.9, 1.3, 2.1))
    assert good.windows >= 1
    assert good.memory > 100 * 2**20
    assert not (tmp_path / "out").exists()


def test_a_quarantined_case_is_tried_again_when_its_file_is_replaced(tmp_path: Path) -> None:
    """The same file stays quarantined; another file of that name deserves its own tries."""
    path = save(tmp_path / "in" / "a.nii.gz", nifti(smooth((9, 11, 8), seed=1)))
    out = OutputFolder.create(tmp_path / "out")
    task = Task(case=Case(case="a", image=str(path)))
    record = failed_record(task, {}, WorkerDiedError("it died"), status="quarantined")
    write_record(out, record)
    for _ in range(MAX_DEATHS):
        suspect = count_death(out, "a", "it died", lost=False)

    def planned() -> PlannedCase:
        return plan_case(out, task.case, suspect, endings=["_seg.nii.gz"], check_hashes=False)

    assert planned().state == "quarantined"
    save(path, nifti(smooth((9, 11, 8), seed=7)))
    again = planned()
    assert again.state == "to do" and not again.task.alone
    assert "has changed" in again.task.reason
