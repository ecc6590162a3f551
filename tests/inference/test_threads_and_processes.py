"""One model used by several threads, and by processes that were forked, spawned or sent a copy."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from phantom import nifti, save, smooth

from pipeline.api import segment
from pipeline.bundle.opening import open_bundle

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
each_runtime = pytest.mark.parametrize("runtime", ["torch", "openvino"])
HANGING_SECONDS = 120


@pytest.mark.slow
@each_runtime
def test_threads_share_a_model(tiny_bundle: Path, runtime: str) -> None:
    """Each gets the labels of its own image, from a model and from a pickled one."""
    images = [nifti(smooth((17 + i, 24, 21 - 2 * i), seed=i)) for i in range(5)]
    model = open_bundle(tiny_bundle, device="cpu", runtime=runtime)
    alone = [segment(model, image).labels for image in images]
    assert all(len(np.unique(labels)) > 1 for labels in alone)
    for shared in (
        open_bundle(tiny_bundle, device="cpu", runtime=runtime),
        pickle.loads(pickle.dumps(model)),
    ):
        with ThreadPoolExecutor(4) as pool:
            found = [one.labels for one in pool.map(partial(segment, shared), images * 3)]
        for labels, expected in zip(found, alone * 3, strict=True):
            np.testing.assert_array_equal(labels, expected)


# Its own program, because threads that this process started already would hide a fault.
PROCESSES = """
import multiprocessing, sys
import numpy as np, torch
from pipeline.api import load, segment

def compute(model, image, sender):
    torch.set_num_threads(2)
    sender.send(segment(model, image).labels)

def labels_of_a_child(model, image, method):
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=compute, args=(model, image, sender), daemon=True)
    child.start()
    if not receiver.poll(60):
        child.kill()
        sys.exit(f"the {method}ed process hangs")
    labels = receiver.recv()
    child.join()
    return labels

if __name__ == "__main__":
    bundle, image, runtime, *methods = sys.argv[1:]
    found = {}
    for method in methods:
        torch.set_num_threads(1)
        model = load(bundle, device="cpu", runtime=runtime)
        found[method, "opened on one thread"] = labels_of_a_child(model, image, method)
    torch.set_num_threads(2)
    for method in methods:
        model = load(bundle, device="cpu", runtime=runtime)
        found[method, "opened on two threads"] = labels_of_a_child(model, image, method)
        segment(model, image)
        found[method, "computed before"] = labels_of_a_child(model, image, method)
    expected = segment(model, image).labels
    assert len(np.unique(expected)) > 1
    for case, labels in found.items():
        assert np.array_equal(labels, expected), case
"""


@pytest.mark.stress
@each_runtime
def test_processes_share_a_model(tiny_bundle_3d: Path, tmp_path: Path, runtime: str) -> None:
    """The child computes on two threads, whatever its parent did before, and does not hang."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    # large enough for torch to share its work between threads
    image = save(tmp_path / "large.nii.gz", nifti(smooth((33, 41, 37))))
    methods = [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()]
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_bundle_3d), str(image), runtime, *methods],
        capture_output=True,
        text=True,
        check=False,
        timeout=6 * HANGING_SECONDS,
        # threads that wait do not spin: two of them take longer than one on a busy machine
        env=os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr
