"""FIXME."""

from pipeline.batch.runner import output_path, run_bundle, segment_cases

__all__ = ["output_path", "run_bundle", "segment_cases"]
