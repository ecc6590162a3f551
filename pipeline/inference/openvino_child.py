"""A process of its own in which OpenVINO compiles and computes a network for the first time.

It is run as a script by `openvino_trial`, with one argument: JSON with

    openvino   folder that Python finds OpenVINO in, should it not be one of the usual ones
    model      path of the .xml file
    hints      for `compile_model`
    shapes     of inputs, for each of which the model is compiled; -1 for any size
    input      path of the input, .npy, of the first of these shapes
    output     path for the output, .npy
    limit      seconds after which the process ends, where nobody waits for it any more

It imports neither volseg nor torch, which would cost seconds. Its exit status is `REFUSED` where
OpenVINO raises an error, whose text is then all that it writes.
"""

import contextlib
import faulthandler
import json
import sys
from typing import Any

import numpy as np

REFUSED = 3


def main() -> None:
    """Compute what the first argument asks for."""
    given = json.loads(sys.argv[1])
    faulthandler.dump_traceback_later(given["limit"], exit=True)
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected: no core dump of it
    sys.path.append(given["openvino"])
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    try:
        output = compute(openvino.Core(), given)
    except Exception as error:  # whatever OpenVINO raises
        sys.stderr.write(f"{type(error).__name__}: {error}")
        sys.exit(REFUSED)
    np.save(given["output"], output)


def compute(core: Any, given: dict[str, Any]) -> Any:
    """Compile the model for each shape, and return its output for the input."""
    model = core.read_model(given["model"])
    compiled = []
    for shape in given["shapes"]:
        sized = model.clone()
        sized.reshape({0: shape})
        compiled.append(core.compile_model(sized, "CPU", given["hints"]))
    request = compiled[0].create_infer_request()
    request.infer({0: np.load(given["input"])})
    return request.get_output_tensor().data


if __name__ == "__main__":
    main()
