"""How flat a loss is around the weights: the measures of the paper, for reports and diagnostics, not for training.

Every measure takes `loss_fn` and `params` first:

    loss_fn   () -> 0-d real tensor: the loss at the parameters' current values, without calling backward; or the mean over
              the mini-batches of a loader, `over_batches(model, criterion, loader)`.
    params    the floating-point leaf tensors to differentiate by or to move (possibly of several dtypes and devices), or
              a module, which means its trainable parameters. With `over_batches` the default is the model's parameters.

All passes of a measure see the same loss: the RNG states of torch (on the CPU and the parameters' devices), Python and numpy
are restored before each, and so are the buffers of a module passed as `params` or to `over_batches`. Afterwards weights,
`p.grad`, `requires_grad`, generators, buffers and training modes are as before, bit for bit, also after an error in any
pass or Ctrl-C. With a plain `loss_fn` and a list of tensors the model is not known, so its buffers and modes are not
managed: call `model.eval()` first.

Random vectors come from a separate generator, seeded by `seed`: equal seeds give equal results. All norms are L2 over
all `params` together. Biases are moved like any other weight unless left out of `params`. Callers may be under
`torch.no_grad` or `torch.inference_mode`.
"""

from gam_fused.flatness import plots
from gam_fused.flatness.batches import over_batches
from gam_fused.flatness.density import SpectralDensity, spectral_density
from gam_fused.flatness.eigenvalues import hessian_eigenvalues
from gam_fused.flatness.landscape import loss_landscape
from gam_fused.flatness.minima import MinimaDensity, local_minima_density
from gam_fused.flatness.objective import BatchedLoss
from gam_fused.flatness.one_step import first_order_estimate, zeroth_order_estimate
from gam_fused.flatness.sharpness import first_order_flatness, zeroth_order_flatness
from gam_fused.flatness.summary import report
from gam_fused.flatness.trace import TraceEstimate, hessian_trace

__all__ = [
    "BatchedLoss",
    "MinimaDensity",
    "SpectralDensity",
    "TraceEstimate",
    "first_order_estimate",
    "first_order_flatness",
    "hessian_eigenvalues",
    "hessian_trace",
    "local_minima_density",
    "loss_landscape",
    "over_batches",
    "plots",
    "report",
    "spectral_density",
    "zeroth_order_estimate",
    "zeroth_order_flatness",
]
