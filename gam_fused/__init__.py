"""Gradient norm Aware Minimization (Zhang et al., CVPR 2023, arXiv 2303.03108) as a torch optimizer with fused kernels."""

from gam_fused import flatness, graphs, schedules
from gam_fused.backends import available_backends
from gam_fused.flatness.hessian_vector import finite_difference_hvp
from gam_fused.optimizer import FusedGAM, FusedSAM

__version__ = "0.2.0"
__all__ = ["FusedGAM", "FusedSAM", "available_backends", "finite_difference_hvp", "flatness", "graphs", "schedules"]
