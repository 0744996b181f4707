"""How flat a loss is around the weights: the measures of the paper, for reports and diagnostics, not for training.

Every function takes `loss_fn` and `params` first:

    loss_fn   () -> 0-d real tensor, the loss at the parameters' present values; it must not call backward, and must give the
              same value for the same weights: fixed data, `model.eval()` or fixed masks, no moving buffers.
    params    the floating-point leaf tensors to differentiate by or to move; several dtypes and devices may be mixed.

Weights come back bit for bit, also when `loss_fn` raises; `p.grad` is never read or written. Random vectors come from a
generator of their own, seeded by `seed`: the global random state is not touched, and equal seeds give equal results.
All norms are L2 over all `params` together. Biases are moved like any other weight unless left out of `params`.
"""

from gam_fused.flatness.landscape import MinimaDensity, local_minima_density, loss_landscape
from gam_fused.flatness.sharpness import first_order_flatness, zeroth_order_flatness
from gam_fused.flatness.spectrum import TraceEstimate, hessian_eigenvalues, hessian_trace

__all__ = [
    "MinimaDensity",
    "TraceEstimate",
    "first_order_flatness",
    "hessian_eigenvalues",
    "hessian_trace",
    "local_minima_density",
    "loss_landscape",
    "zeroth_order_flatness",
]
