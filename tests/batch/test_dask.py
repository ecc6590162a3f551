"""Dask: the results are those of a plain run, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from phantom import make_bundle, nifti, save, smooth
from same_results import assert_same_results

from pipeline.batch.case_worker import Task
from pipeline.batch.claims import claims_of_run
from pipeline.batch.coordinator import Coordinator
from pipeline.batch.dask_executor import _DaskRun, dask_executor
from pipeline.batch.identity import settle_identity
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, read_record
from pipeline.batch.runner import Guard, run_batch, segment_cases
from pipeline.batch.tables import write_tables
from pipeline.cli.app import main
from pipeline.errors import ConfigError, InterruptedRunError, RunStoppedError
from pipeline.inference.case_model import Prediction, PreparedCase
from pipeline.inference.model import Model
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv
from pipeline.types import Case

distributed = pytest.importorskip("distributed")
from pipeline.batch import dask_worker  # noqa: E402

SMALL = (9, 11, 8)  # one window of the tiny network


def inputs(folder: Path, count: int) -> Path:
    """A folder of volumes without two alike."""
    for number in range(count):
        image = nifti(smooth((9 + number % 3, 11, 8), seed=number))
        save(folder / "in" / f"sub-{number:02d}.nii.gz", image)
    return folder / "in"


@pytest.fixture
def settings(tiny_bundle_3d: Path) -> dict[str, Any]:
    """Arguments of open_bundle."""
    return {"bundle": str(tiny_bundle_3d), "device": "cpu"}


@pytest.mark.slow
def test_local_workers_leave_what_a_plain_run_leaves(
    settings: dict[str, Any], model_3d: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a file that cannot be read; nothing is left in the folder of temporary files."""
    folder = inputs(tmp_path, 5)
    (folder / "sub-01.nii.gz").write_bytes(b"nothing")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)  # paths may be relative
    before = sorted(tmp_path.iterdir())
    cases = find_cases(["in"], model_3d.spec)
    segment_cases(model_3d, cases, "plain")
    seen: list[str] = []
    summary = run_batch(
        model_3d,
        cases,
        "out",
        dask_executor("local", settings, jobs=2),
        progress=lambda record: seen.append(record.case),
    )
    assert dict(summary.counts) == {"done": 4, "failed": 1}
    assert sorted(seen) == [case["case"] for case in cases]
    assert_same_results(Path("out"), Path("plain"))
    assert list(temporary.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out", tmp_path / "plain"])


def deadly_predict(tmp_path: Path, deaths: int) -> Callable[[Model, PreparedCase], Prediction]:
    """A step that kills its process at one of the cases, at most so many times."""

    def predict(model: Any, prepared: Any) -> Any:
        import os  # the function is sent to the workers by value
        import signal

        from pipeline.inference import predict_prepared

        if prepared.case["image"].meta["filename_or_obj"].endswith("deadly.nii.gz"):
            killed = len(list(tmp_path.glob("killed-*")))
            if killed < deaths:
                (tmp_path / f"killed-{killed}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return predict_prepared(model, prepared)

    return predict


@pytest.mark.stress
@pytest.mark.parametrize("deaths", [1, 9])
def test_a_case_that_kills_its_worker(
    deaths: int, settings: dict[str, Any], model_3d: Model, tmp_path: Path
) -> None:
    """Once: it is tried again. Always: it is given up after two deaths, and no other case is."""
    folder = inputs(tmp_path, 8)
    save(folder / "deadly.nii.gz", nifti(smooth(SMALL, seed=99)))
    cases = find_cases([folder], model_3d.spec)
    executor = dask_executor("local", settings, jobs=2)
    out = tmp_path / "out"
    summary = run_batch(model_3d, cases, out, executor, predict=deadly_predict(tmp_path, deaths))
    expected = {"done": 9} if deaths == 1 else {"done": 8, "quarantined": 1}
    assert dict(summary.counts) == expected
    assert len(list(tmp_path.glob("killed-*"))) == min(deaths, 2)
    if deaths == 1:
        segment_cases(model_3d, cases, tmp_path / "plain")
        assert_same_results(out, tmp_path / "plain")
    else:
        row = read_csv(out / "cases.csv")[0]
        assert (row["case"], row["status"]) == ("deadly", "quarantined")
        assert "the process died 2 times" in row["message"] and "Dask's worker" in row["message"]


@pytest.mark.stress
def test_a_case_that_takes_too_long(
    settings: dict[str, Any], model_3d: Model, tmp_path: Path
) -> None:
    """Its worker ends and is started again; the case fails, with the option in its message."""

    def predict(model: Any, prepared: Any) -> Any:
        import time

        from pipeline.inference import predict_prepared

        if prepared.case["image"].meta["filename_or_obj"].endswith("slow.nii.gz"):
            time.sleep(600)
        return predict_prepared(model, prepared)

    folder = inputs(tmp_path, 3)
    save(folder / "slow.nii.gz", nifti(smooth(SMALL, seed=99)))
    cases = find_cases([folder], model_3d.spec)
    executor = dask_executor("local", settings, jobs=1, case_timeout=4.0)
    summary = run_batch(model_3d, cases, tmp_path / "out", executor, predict=predict)
    assert dict(summary.counts) == {"done": 3, "failed": 1}
    row = read_csv(tmp_path / "out" / "cases.csv")[0]
    assert row["case"] == "slow"
    assert row["message"].startswith("took longer than --case-timeout allows, 4 s")


def start_segment(folder: Path, bundle: str, out: Path, *options: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "pipeline.cli", "segment", str(folder), "-o", str(out)]
    return subprocess.Popen(
        [*command, "--bundle", bundle, "--device", "cpu", *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait until a condition is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)
    return value


def is_alive(group: int) -> bool:
    """Whether a process of a group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def records(out: Path) -> list[Path]:
    """The records of cases that were done."""
    return list((out / ".volseg" / "records").glob("*/*.json"))


@pytest.mark.stress
def test_ctrl_c_and_again(settings: dict[str, Any], model_3d: Model, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal: status 130, no claim, no process, no traceback.

    The same command then continues.
    """
    folder, out = inputs(tmp_path, 50), tmp_path / "out"
    command = (folder, settings["bundle"], out, "--dask", "local", "--jobs", "2")
    process = start_segment(*command)
    wait_for(lambda: len(records(out)) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    done = len(records(out))
    assert 3 <= done < 50
    assert "Error: interrupted (SIGINT); " in stderr and "start the same command again" in stderr
    assert "Traceback" not in stderr and "distributed" not in stderr, stderr
    assert not list((out / ".volseg" / "claims").glob("*/*"))
    wait_for(lambda: not is_alive(process.pid), 10)
    process = start_segment(*command)
    stderr = process.communicate(timeout=600)[1]
    assert process.returncode == 0, stderr
    assert f"{done} of them from an earlier run" in stderr
    segment_cases(model_3d, find_cases([folder], model_3d.spec), tmp_path / "plain")
    assert_same_results(out, tmp_path / "plain")


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """The address of a scheduler of its own, without workers."""
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    where = ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
    dashboard = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    process = subprocess.Popen([*command, *where, *dashboard], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: file.exists() and file.stat().st_size)
        yield json.loads(file.read_text())["address"]
    finally:
        process.kill()
        process.wait()


def start_worker(address: str, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """A worker with a nanny."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address]
    # without an address its server of HTTP would listen to all networks
    loopback = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    local = [*loopback, "--local-directory", str(folder)]
    return subprocess.Popen(
        [*command, *local, "--nthreads", "1", "--memory-limit", "0", *options],
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )


@pytest.mark.stress
def test_workers_of_a_scheduler_and_one_is_killed(
    scheduler: str, settings: dict[str, Any], model_3d: Model, tmp_path: Path
) -> None:
    """Workers start in another folder and join after the run; one is killed with its nanny."""
    folder, out = inputs(tmp_path, 40), tmp_path / "out"
    process = start_segment(folder, settings["bundle"], out, "--dask", scheduler)
    workers = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        workers.append(start_worker(scheduler, tmp_path / name, "--no-nanny"))
    try:
        begun = out / ".volseg" / "begun"

        def under_way() -> bool:
            return any(str(workers[0].pid) in text_of(path) for path in begun.glob("*/*"))

        wait_for(under_way)
        workers[0].kill()
        stderr = process.communicate(timeout=600)[1]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert process.returncode == 0, stderr
    assert "a process died with 1 cases" in (out / "volseg.log").read_text()
    segment_cases(model_3d, find_cases([folder], model_3d.spec), tmp_path / "plain")
    assert_same_results(out, tmp_path / "plain")


def text_of(path: Path) -> str:
    """The text of a file that may be gone."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


class FakeFuture:
    """A future of Dask that a test answers."""

    def __init__(self, key: str, task: Task, options: dict[str, Any]) -> None:
        self.key, self.task, self.options = key, task, options
        self.cancelled = False
        self.answer: Any = None
        self.callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def result(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True

    def done(self, answer: Any) -> None:
        self.answer = answer
        for callback in self.callbacks:
            callback(self)


class FakeClient:
    """A client of Dask whose workers answer by a function."""

    status = "running"

    def __init__(self, workers: dict[str, dict[str, float]], answer: Callable[..., Any]) -> None:
        self.workers, self.answer = workers, answer
        self.submitted: list[FakeFuture] = []
        self.most = 0

    def register_plugin(self, plugin: Any, name: str) -> None:
        self.plugin = plugin

    def unregister_worker_plugin(self, name: str) -> None:
        assert name == self.plugin.name

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {name: {"resources": has} for name, has in self.workers.items()}}

    def submit(self, function: Any, plugin: str, task: Task, **options: Any) -> FakeFuture:
        assert function is dask_worker.do_case and plugin == self.plugin.name
        future = FakeFuture(f"key-{len(self.submitted)}", task, options)
        self.submitted.append(future)
        answer = self.answer(task, options)
        if answer is not None:
            threading.Timer(0.01, future.done, [answer]).start()
        return future


def reply(outcome: Any, worker: str = "tcp://a", **content: Any) -> dask_worker.Reply:
    return dask_worker.Reply(outcome=outcome, worker=worker, **content)


def finished(task: Task, worker: str = "tcp://a") -> dask_worker.Reply:
    return reply("finished", worker, record=CaseRecord(case=task.name, status="done"))


@pytest.fixture
def fake_run(model_3d: Model, tmp_path: Path) -> Iterator[Callable[..., _DaskRun]]:
    """A function that returns a run of four cases on a fake client."""
    out = OutputFolder.create(tmp_path / "out")
    identity = settle_identity(out, model_3d, overwrite=False)
    with claims_of_run(out) as claims:
        coordinator = Coordinator(out, claims, identity)
        coordinator.add([Task(case=Case(case=name, image=f"{name}.nii")) for name in "abcd"])
        guard = Guard(out, coordinator, claims)
        settings = dask_worker.RunSettings(
            run=claims.holder.run,
            bundle={"bundle": str(model_3d.root), "device": "auto"},
            folder=out.root,
            start=Path.cwd(),
            identity=identity,
            case_timeout=7.0,
        )

        def make(client: FakeClient) -> _DaskRun:
            fake: Any = client
            return _DaskRun(fake, coordinator, guard, settings, 2, "tcp://s")

        yield make


def test_cases_ahead_are_bounded(fake_run: Callable[..., _DaskRun]) -> None:
    """Two per worker: one is computed, one waits."""
    client = FakeClient({"tcp://a": {}}, lambda task, options: None)
    run = fake_run(client)
    run._register()
    run._look_at_workers()
    run._fill()
    assert [future.task.name for future in client.submitted] == ["a", "b"]
    client.submitted[0].done(finished(client.submitted[0].task))
    run._receive()
    run._fill()
    assert [future.task.name for future in client.submitted] == ["a", "b", "c"]
    run._leave()
    assert [future.cancelled for future in client.submitted] == [False, True, True]


@pytest.mark.parametrize("gpus", [0, 1])
def test_workers_that_declare_gpus_get_the_cases(
    gpus: int, fake_run: Callable[..., _DaskRun]
) -> None:
    workers: dict[str, dict[str, float]] = {"tcp://a": {"GPU": 1} if gpus else {}, "tcp://b": {}}
    client = FakeClient(workers, lambda task, options: finished(task))
    run = fake_run(client)
    run.run()
    assert run.coordinator.counts == {"done": 4}
    wanted = {"GPU": 1} if gpus else None
    assert all(future.options["resources"] == wanted for future in client.submitted)
    assert all(future.options["retries"] == 2 for future in client.submitted)


def test_an_unfit_worker_gets_no_more_cases(fake_run: Callable[..., _DaskRun]) -> None:
    """The others do its cases, and the log has the reason once."""

    def answer(task: Task, options: dict[str, Any]) -> dask_worker.Reply:
        if options["workers"] is None:
            return reply("unfit", "tcp://b", text="it has another bundle")
        return finished(task)

    client = FakeClient({"tcp://a": {}, "tcp://b": {}}, answer)
    run = fake_run(client)
    run.run()
    assert run.coordinator.counts == {"done": 4}
    assert all(future.options["workers"] == ["tcp://a"] for future in client.submitted[4:])
    log = (run.guard.out.root / "volseg.log").read_text()
    assert log.count("tcp://b gets no cases: it has another bundle") == 1


def test_cases_of_workers_that_are_gone_are_given_to_others(
    fake_run: Callable[..., _DaskRun],
) -> None:
    client = FakeClient({"tcp://a": {}}, lambda task, options: None)
    run = fake_run(client)
    run.unfit["tcp://b"] = "it has another bundle"
    run._register()
    run._look_at_workers()
    run._fill()
    client.workers = {"tcp://c": {}}
    run._looked = 0.0
    run._look_at_workers()
    assert [future.cancelled for future in client.submitted] == [True, True, False, False]
    assert [future.options["workers"] for future in client.submitted[2:]] == [["tcp://c"]] * 2
    assert sorted(flight.task.name for flight in run.flights.values()) == ["a", "b"]


KILLED = distributed.KilledWorker("key", SimpleNamespace(address="tcp://a"), 3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply("unfit", text="no OpenVINO here"), "no worker of Dask can go on; tcp://a: no OpenV"),
        (reply("stopped", text="the disk is full"), "the disk is full"),
        (KILLED, "workers of Dask die before they begin a case"),
    ],
)
def test_what_stops_a_run(answer: Any, message: str, fake_run: Callable[..., _DaskRun]) -> None:
    client = FakeClient({"tcp://a": {}}, lambda task, options: answer)
    with pytest.raises(RunStoppedError, match=message):
        fake_run(client).run()
    assert not fake_run(client).flights


def test_a_lost_scheduler_stops_the_run(fake_run: Callable[..., _DaskRun]) -> None:
    client = FakeClient({"tcp://a": {}}, lambda task, options: CancelledError())
    run = fake_run(client)
    threading.Timer(0.1, setattr, [client, "status", "closed"]).start()
    with pytest.raises(RunStoppedError, match="tcp://s: the connection to the scheduler is lost"):
        run.run()


@pytest.mark.parametrize("begun", [True, False])
def test_dask_gives_a_case_up(begun: bool, fake_run: Callable[..., _DaskRun]) -> None:
    """It counts as a death if the case was begun, not if it only waited at the worker."""
    answers = iter([KILLED])
    marks: list[dask_worker.Mark] = []

    def answer(task: Task, options: dict[str, Any]) -> Any:
        return next(answers, finished(task))

    client = FakeClient({"tcp://a": {}}, answer)
    run = fake_run(client)
    if begun:
        marks.append(dask_worker.Mark(run.guard.out, run.settings.run, "a"))
        assert marks[0].begin("Dask's worker tcp://a") == ""
    run.run()
    assert run.coordinator.counts == {"done": 4}
    log = (run.guard.out.root / "volseg.log").read_text()
    assert ("a process died with 1 cases: Dask's worker tcp://a, is gone" in log) == begun
    assert not any(mark.path.exists() for mark in marks)


def test_replies_become_records(fake_run: Callable[..., _DaskRun]) -> None:
    """A death twice, a timeout, a bug: each fails its case only."""
    answers = {
        "a": reply("died", text="Dask's worker tcp://a"),
        "b": reply("timed out"),
        "c": reply("failed", text="ZeroDivisionError: surprise"),
    }
    client = FakeClient({"tcp://a": {}}, lambda task, _: answers.get(task.name) or finished(task))
    run = fake_run(client)
    run.run()
    assert run.coordinator.counts == {"done": 1, "quarantined": 1, "failed": 2}
    errors = {name: read_record(run.guard.out.record(name)) for name in "abc"}
    texts = {name: record.error for name, record in errors.items() if record is not None}
    assert "died 2 times" in texts["a"] and "tcp://a, is gone" in texts["a"]
    assert "--case-timeout allows, 7 s" in texts["b"]
    assert "ZeroDivisionError: surprise (a bug of volseg" in texts["c"]
    write_tables(run.guard.out.root)


def test_a_signal_ends_the_run(fake_run: Callable[..., _DaskRun]) -> None:
    client = FakeClient({"tcp://a": {}}, lambda task, options: None)
    run = fake_run(client)
    threading.Timer(0.1, run.guard.on_signal, [signal.SIGINT, None]).start()
    with pytest.raises(InterruptedRunError, match="SIGINT"):
        run.run()
    assert all(future.cancelled for future in client.submitted)


def test_marks(tmp_path: Path) -> None:
    """A mark tells that a run began a case; marks of runs that are gone are removed."""
    out = OutputFolder.create(tmp_path / "out")
    mark = dask_worker.Mark(out, "run1", "a/b")
    assert mark.begin("one") == ""
    assert mark.begin("two") == "one"
    assert mark.begin("three") == ""
    mark.time_out()
    assert mark.begin("four") == dask_worker.TIMED_OUT
    assert mark.begin("five") == ""
    mark.end()
    assert mark.begin("six") == ""
    living = dask_worker.Mark(out, "run2", "a/b")
    assert living.begin("other") == ""
    (out.runs / "run2.json").touch()
    dask_worker.remove_marks(out, "run3")
    assert not mark.path.exists() and living.path.exists()
    dask_worker.remove_marks(out, "run2")
    assert not (out.state / "begun").exists()


@pytest.fixture
def run_settings(model_3d: Model, tmp_path: Path) -> dask_worker.RunSettings:
    """The settings of a run that a worker gets."""
    out = OutputFolder.create(tmp_path / "out")
    return dask_worker.RunSettings(
        run="run1",
        bundle={"bundle": str(model_3d.root), "device": "cpu"},
        folder=out.root,
        start=Path.cwd(),
        identity=settle_identity(out, model_3d, overwrite=False),
    )


@pytest.fixture
def plugin(run_settings: dask_worker.RunSettings) -> dask_worker.CasePlugin:
    """A plugin in a worker, which is this process."""
    plugin = dask_worker.CasePlugin(run_settings)
    plugin.setup(SimpleNamespace(address="tcp://a", state=SimpleNamespace(nthreads=1)))
    return plugin


def test_a_worker_with_another_bundle_is_unfit(
    plugin: dask_worker.CasePlugin, tmp_path: Path
) -> None:
    """It is opened once, however many cases come."""
    other = make_bundle(tmp_path / "other", seed=1)
    plugin.settings.bundle["bundle"] = str(other)  # type: ignore[index]
    answer = plugin.case(Task(case=Case(case="a", image="a.nii")))
    assert answer.outcome == "unfit"
    assert "the bundle that the worker has is another one (bundle other, not " in answer.text
    assert "weights_sha256" in answer.text
    plugin.settings.bundle["bundle"] = "gone"  # type: ignore[index]
    assert plugin.case(Task(case=Case(case="b", image="b.nii"))) == answer


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_worker_without_the_folder_is_unfit(
    content: str | None, plugin: dask_worker.CasePlugin
) -> None:
    """No folder there, or another run's."""
    identity = plugin.settings.folder / ".volseg" / "identity.json"
    identity.unlink()
    if content is not None:
        identity.write_text(content)
    answer = plugin.case(Task(case=Case(case="a", image="a.nii")))
    assert answer.outcome == "unfit"
    assert "does not find the run's output folder there" in answer.text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(RunStoppedError("full"), "stopped"), (ZeroDivisionError("surprise"), "failed")],
)
def test_errors_come_back_as_replies(
    error: Exception,
    outcome: str,
    plugin: dask_worker.CasePlugin,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one whose causes form a cycle, which Dask's scheduler would follow for ever."""
    cause = RuntimeError("cause")
    error.__cause__, cause.__cause__ = cause, error
    monkeypatch.setattr(dask_worker, "open_worker", raiser(error))
    answer = plugin.case(Task(case=Case(case="a", image="a.nii")))
    assert answer.outcome == outcome
    assert answer.text in ("full", "RuntimeError: cause")


def test_errors_of_files_are_for_dask_to_try_again(
    plugin: dask_worker.CasePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are raised, without causes and contexts."""
    error = OSError(116, "Stale file handle", "/shared/x")
    error.__cause__ = error.__context__ = OSError("before")
    monkeypatch.setattr(dask_worker, "open_worker", raiser(error))
    with pytest.raises(OSError, match="Stale file handle: '/shared/x'") as caught:
        plugin.case(Task(case=Case(case="a", image="a.nii")))
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def raiser(error: Exception) -> Callable[[Any], Any]:
    def raise_error(settings: Any) -> Any:
        raise error

    return raise_error


def test_a_plugin_does_a_case_once(
    plugin: dask_worker.CasePlugin, model_3d: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that was lost is given again from the record; a case that was begun has died."""
    out = OutputFolder(tmp_path / "out")
    save(tmp_path / "in" / "a.nii.gz", nifti(smooth(SMALL)))
    task = Task(case=Case(case="a", image="in/a.nii.gz"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dask_worker, "holds_claim", lambda out, run, case: True)
    object.__setattr__(plugin.settings, "start", tmp_path)
    mark = dask_worker.Mark(out, "run1", "a")
    mark.begin("somebody")
    assert plugin.case(task) == reply("died", text="somebody")
    first = plugin.case(task)
    assert first.outcome == "finished" and first.record is not None
    assert first.record.status == "done" and first.record.image == ("in/a.nii.gz",)
    written = (out.root / "a_seg.nii.gz").stat().st_mtime_ns
    assert plugin.case(task) == first
    assert (out.root / "a_seg.nii.gz").stat().st_mtime_ns == written
    assert not mark.path.exists()


def test_paths_are_relative_to_the_folder_of_the_client(tmp_path: Path) -> None:
    """Where the worker has another one; images in memory stay as they are."""
    image = nifti()
    one = Task(case=Case(case="a", image="a.nii"))
    several = Task(case=Case(case="a", image=["a.nii", image, "/b.nii"]))
    assert dask_worker._with_paths(one, Path.cwd()) is one
    assert dask_worker._with_paths(one, tmp_path).case["image"] == tmp_path / "a.nii"
    moved = dask_worker._with_paths(several, tmp_path).case["image"]
    assert moved == [tmp_path / "a.nii", image, Path("/b.nii")]


def test_no_scheduler(model_3d: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[dask_executor.__module__], "CONNECT_SECONDS", 0.3)
    executor = dask_executor("tcp://127.0.0.1:1", {"bundle": str(model_3d.root)})
    with pytest.raises(ConfigError, match=r"--dask tcp://127.*: no scheduler answers there"):
        run_batch(model_3d, [], tmp_path / "out", executor)
    executor = dask_executor("nonsense://1", {"bundle": str(model_3d.root)})
    with pytest.raises(ConfigError, match="expected local, or an address"):
        run_batch(model_3d, [], tmp_path / "out", executor)


def test_dask_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'volseg\[dask\]'"):
        dask_executor("local", {"bundle": "x"})


@pytest.mark.parametrize("option", [["--jobs", "2"], ["--max-memory", "2G"]])
def test_options_of_local_workers_do_not_fit_a_scheduler(option: list[str], tmp_path: Path) -> None:
    arguments = ["segment", "x.nii", "-o", str(tmp_path / "out"), "--dask", "tcp://127.0.0.1:1"]
    result = CliRunner().invoke(main, [*arguments, *option])
    assert result.exit_code == 2
    assert f"{option[0]} is for workers that volseg starts on this machine" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_distributed_is_imported_when_used() -> None:
    """It costs a second."""
    code = "import sys, pipeline.batch; sys.exit('distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
