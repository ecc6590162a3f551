"""From a volume on the network's grid to labels on the file's own grid.

Modules:
    predictor                one case through the whole path
    case_model               what a batch needs of any model, and what a prediction results in
    model                    a bundle of volseg's, opened
    sliding_window           the network over a volume of any size
    bundle_inferer           the same for callers that bring the network in torch
    windows, aggregator, boxes   batches of windows, and their sums as finished blocks
    block_observer           base class of what collects from these blocks
    foreground, localisation where windows are needed
    test_time_augmentation, overlap_tile, multi_output   other ways to apply a network
    runtime, openvino_models the network in torch or OpenVINO
    cascade                  a second network for a box in smaller voxels
    invert, label_resampling from logits to labels on another grid, block by block
    cropped_volume           background outside of a volume that was cropped
    probabilities, volumes   soft volumes and entropy; volumes in mm³
    refinement, connected_components, quality_checks   after the labels
    quality_features, decision_agreement, predicted_quality   the Dice that labels may have
    memory_plan, process_memory, device, forking   the machine at hand
"""

from pipeline.inference.aggregator import FLOAT32_BYTES, ScoreBlock, buffer_bytes, window_grid
from pipeline.inference.bundle_inferer import bundle_inferer
from pipeline.inference.cascade import load_cascade
from pipeline.inference.case_model import CaseModel, Prediction, PreparedCase
from pipeline.inference.connected_components import clean_components, largest_components
from pipeline.inference.device import has_amx, isa_limit, processor_name, resolve_device
from pipeline.inference.forking import keep_forks_computing
from pipeline.inference.invert import LabelInversion
from pipeline.inference.label_resampling import labels_of_blocks
from pipeline.inference.memory_plan import (
    MemoryEstimate,
    estimate_memory,
    parse_size,
    plan_memory,
    ready_bytes,
)
from pipeline.inference.model import Model
from pipeline.inference.openvino_models import (
    OpenVinoNetwork,
    RuntimeAgreement,
    cache_folder,
    compare_runtimes,
    compute_apart,
    computes_bfloat16,
    convert_by_tracing,
    convert_to_openvino,
    forks_can_compile,
    import_openvino,
    model_hashes,
    noise_window,
    openvino_core,
    weights_hash,
)
from pipeline.inference.predicted_quality import (
    COVERAGE,
    LOW_DICE,
    DiceFit,
    Interval,
    PredictedDice,
    QualityModel,
    Term,
    label_row,
    logistic,
    mean_row,
    read_quality,
    residual_spread,
    write_quality,
)
from pipeline.inference.predictor import (
    evaluate_prepared,
    predict_case,
    predict_prepared,
    prepare,
    streaming_iteration,
)
from pipeline.inference.process_memory import (
    keep_freed_memory,
    peak_bytes,
    release_freed_memory,
    reset_peak,
    resident_bytes,
)
from pipeline.inference.quality_features import QualityFeatures, stored_features
from pipeline.inference.runtime import Runtime, RuntimeDescription
from pipeline.inference.sliding_window import WindowInferer, build_inferer
from pipeline.inference.test_time_augmentation import other_side, side_of
from pipeline.inference.volumes import volumes_mm3

__all__ = [
    "COVERAGE",
    "FLOAT32_BYTES",
    "LOW_DICE",
    "CaseModel",
    "DiceFit",
    "Interval",
    "LabelInversion",
    "MemoryEstimate",
    "Model",
    "OpenVinoNetwork",
    "PredictedDice",
    "Prediction",
    "PreparedCase",
    "QualityFeatures",
    "QualityModel",
    "Runtime",
    "RuntimeAgreement",
    "RuntimeDescription",
    "ScoreBlock",
    "Term",
    "WindowInferer",
    "buffer_bytes",
    "build_inferer",
    "bundle_inferer",
    "cache_folder",
    "clean_components",
    "compare_runtimes",
    "compute_apart",
    "computes_bfloat16",
    "convert_by_tracing",
    "convert_to_openvino",
    "estimate_memory",
    "evaluate_prepared",
    "forks_can_compile",
    "has_amx",
    "import_openvino",
    "isa_limit",
    "keep_forks_computing",
    "keep_freed_memory",
    "label_row",
    "labels_of_blocks",
    "largest_components",
    "load_cascade",
    "logistic",
    "mean_row",
    "model_hashes",
    "noise_window",
    "openvino_core",
    "other_side",
    "parse_size",
    "peak_bytes",
    "plan_memory",
    "predict_case",
    "predict_prepared",
    "prepare",
    "processor_name",
    "read_quality",
    "ready_bytes",
    "release_freed_memory",
    "reset_peak",
    "resident_bytes",
    "residual_spread",
    "resolve_device",
    "side_of",
    "stored_features",
    "streaming_iteration",
    "volumes_mm3",
    "weights_hash",
    "window_grid",
    "write_quality",
]
