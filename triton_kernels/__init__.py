"""Triton kernels of gam_fused. The folder installs as `gam_fused.triton_kernels`."""

if __name__ != "gam_fused.triton_kernels":
    raise ImportError(
        "this is gam_fused's triton_kernels, which is to be imported as gam_fused.triton_kernels; the bare name found the "
        "source folder on sys.path and belongs to another package. Run Python from elsewhere, or import the full name"
    )
