"""The first computation of a network by OpenVINO, in a process of its own.

OpenVINO can crash while it compiles a network: version 2026.4.1 ends with a segmentation fault for
some residual encoders on processors with AMX. A crash of this process would end a whole run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from pipeline.errors import OpenVinoError
from pipeline.inference.openvino_child import REFUSED

CHILD = Path(__file__).with_name("openvino_child.py")
# a large network takes some seconds to compile; a slow and busy machine may need a hundred times
# as long
LIMIT_SECONDS = 600
# sent from outside, by a user, a job's time limit or a machine without memory: they say nothing
# of the network
_SENT = {getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}
_CHARACTERS = 300  # of an error of OpenVINO's


def first_output(
    model: Path,
    x: torch.Tensor,
    hints: Mapping[str, Any],
    shapes: Sequence[Sequence[int]] = (),
    *,
    folder: Path,
) -> torch.Tensor:
    """Return a model's output for one input, computed by OpenVINO in a process of its own.

    Args:
        model: the .xml file.
        x: (1, C, *spatial) float32.
        hints: for `compile_model`.
        shapes: other shapes of inputs that the model is compiled for; -1 for any size.
        folder: for the files that the two processes exchange.

    Returns:
        (1, classes, *size) float32.

    Raises:
        OpenVinoError: the process crashed, did not end in time, or gave no such output. The error
            is `lasting` where the network is to blame.
    """
    given, found = folder / "input.npy", folder / "output.npy"
    np.save(given, x.detach().cpu().contiguous().numpy())
    request = {
        "openvino": _openvino_folder(),
        "model": str(model),
        "hints": dict(hints),
        "shapes": [list(x.shape), *map(list, shapes)],
        "input": str(given),
        "output": str(found),
        "limit": LIMIT_SECONDS + 60,
    }
    _run_child(request, folder)
    try:
        output = np.load(found)
        if output.dtype != np.float32 or output.ndim != x.ndim or len(output) != len(x):
            raise ValueError(f"{output.dtype} {output.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise OpenVinoError(f"a test of OpenVINO gave no usable output ({error})") from error
    return torch.from_numpy(output)


def _run_child(request: Mapping[str, Any], folder: Path) -> None:
    """Run the other process to its end; it imports nothing from the working folder."""
    if not sys.executable:
        raise OpenVinoError("OpenVINO cannot be tried: this program has no Python interpreter")
    log = folder / "log"
    try:
        with log.open("wb") as stream:
            code = _exit_code([sys.executable, "-P", str(CHILD), json.dumps(request)], stream)
        said = log.read_text("utf-8", errors="replace")
    except OSError as error:
        raise OpenVinoError(f"OpenVINO cannot be tried ({error})") from error
    if code == 0:
        return
    name = _signal_name(code)
    if name is not None:
        raise OpenVinoError(
            f"OpenVINO {_version()} crashed while it compiled the network ({name})",
            lasting=-code not in _SENT,
        )
    if code == REFUSED:
        shown = textwrap.shorten(said, _CHARACTERS, placeholder=" …")
        raise OpenVinoError(f"OpenVINO {_version()} refuses the network: {shown}", lasting=True)
    shown = said.strip().rpartition("\n")[2][:_CHARACTERS]
    raise OpenVinoError(f"OpenVINO cannot be tried: exit code {code}, {shown or 'no message'}")


def _exit_code(command: Sequence[str], log: IO[bytes]) -> int:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=LIMIT_SECONDS,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        raise OpenVinoError(
            f"OpenVINO {_version()} did not compile the network in {LIMIT_SECONDS} seconds",
            lasting=True,
        ) from None


def _signal_name(code: int) -> str | None:
    """Return the name of what killed a process; None for one that ended by itself."""
    if os.name == "nt":  # exception codes, such as 0xC0000005
        return f"0x{code:08X}" if code > 0xFFFF else None
    if code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _openvino_folder() -> str:
    from importlib.util import find_spec

    found = find_spec("openvino")
    if found is None or found.origin is None:
        raise OpenVinoError("openvino is not installed")
    return str(Path(found.origin).parents[1])


def _version() -> str:
    from importlib.metadata import version

    return version("openvino")
