"""FIXME."""

from pipeline.inference.aggregator import window_grid
from pipeline.inference.connected_components import largest_components
from pipeline.inference.device import keep_freed_memory, resolve_device
from pipeline.inference.invert import inversion, labels_of_blocks
from pipeline.inference.memory_plan import (
    estimate_memory,
    parse_size,
    peak_bytes,
    plan_memory,
    predict_within,
    ready_bytes,
    reset_peak,
    resident_bytes,
)
from pipeline.inference.predictor import (
    Model,
    Prediction,
    PreparedCase,
    predict_case,
    predict_prepared,
    prepare,
)
from pipeline.inference.runtime import (
    INT8,
    NetworkFunction,
    Runtime,
    compare_runtimes,
    convert_to_openvino,
    noise_window,
    openvino_forward,
    weights_hash,
)
from pipeline.inference.sliding_window import build_inferer
from pipeline.transforms import mirror_padded_box

__all__ = [
    "INT8",
    "Model",
    "NetworkFunction",
    "Prediction",
    "PreparedCase",
    "Runtime",
    "build_inferer",
    "compare_runtimes",
    "convert_to_openvino",
    "estimate_memory",
    "inversion",
    "keep_freed_memory",
    "labels_of_blocks",
    "largest_components",
    "mirror_padded_box",
    "noise_window",
    "openvino_forward",
    "parse_size",
    "peak_bytes",
    "plan_memory",
    "predict_case",
    "predict_prepared",
    "predict_within",
    "prepare",
    "ready_bytes",
    "reset_peak",
    "resident_bytes",
    "resolve_device",
    "weights_hash",
    "window_grid",
]
