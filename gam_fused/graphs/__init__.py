"""One CUDA graph for a whole step; see `capture_step`."""

from gam_fused.graphs.capture import CapturedStep, capture_step

__all__ = ["CapturedStep", "capture_step"]
