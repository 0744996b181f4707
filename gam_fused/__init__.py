"""Gradient norm Aware Minimization (Zhang et al., CVPR 2023, arXiv 2303.03108) with fused kernels, as a torch optimizer."""

from gam_fused import flatness, graphs, schedules
from gam_fused.hessian_vector import finite_difference_hvp
from gam_fused.optimizer import FusedGAM, FusedSAM
from gam_fused.rooms import available_backends

__version__ = "0.1.0"
__all__ = ["FusedGAM", "FusedSAM", "available_backends", "finite_difference_hvp", "flatness", "graphs", "schedules"]
