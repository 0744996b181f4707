"""One training step, as each contender takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gam_fused import FusedGAM
from studies.defaults.contender import Contender

Step = Callable[[Tensor, Tensor], Tensor]  # inputs and targets of a batch -> the loss before the step, detached


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy; [n, classes] or [n, context, classes] logits."""
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def stepper(contender: Contender, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The step of this contender."""
    if contender.group:
        group, rho = contender.group, contender.group_rho or 0.0
        return lambda x, y: m_sam_step(model, optimizer, x, y, group, rho)
    if isinstance(optimizer, FusedGAM):
        if contender.fraction < 1.0:
            return lambda x, y: optimizer.step(lambda batch: loss(model, *batch), (x, y)).detach()
        return lambda x, y: optimizer.step(lambda: loss(model, x, y)).detach()
    return lambda x, y: plain_step(model, optimizer, x, y)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A step of the base optimizer alone."""
    optimizer.zero_grad()
    value = loss(model, x, y)
    value.backward()
    optimizer.step()
    return value.detach()


def m_sam_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, group: int, rho: float) -> Tensor:
    """SAM of Foret et al. with m-sharpness: every `group` samples ascend by themselves, the gradients there are averaged.

    Buffers, such as the running statistics of batch norm, are those that the passes at the unperturbed weights leave.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    value = torch.zeros(())
    for inputs, targets in zip(x.split(group), y.split(group), strict=True):
        share = len(inputs) / len(x)
        here = loss(model, inputs, targets)
        value += share * here.detach()
        ascent = torch.autograd.grad(here, parameters)
        for sum_, gradient in zip(total, _gradient_at(model, parameters, ascent, rho, inputs, targets), strict=True):
            sum_.add_(gradient, alpha=share)
    for p, gradient in zip(parameters, total, strict=True):
        p.grad = gradient
    optimizer.step()
    return value


def _gradient_at(
    model: nn.Module, parameters: list[Tensor], ascent: tuple[Tensor, ...], rho: float, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """The gradient at theta + rho ascent/|ascent|; weights and buffers return."""
    kept = [p.detach().clone() for p in parameters], [b.clone() for b in model.buffers()]
    norm = torch.stack([g.norm() for g in ascent]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, ascent, strict=True):
            p.add_(g * (rho / (norm + 1e-12)))
    gradients = torch.autograd.grad(loss(model, inputs, targets), parameters)
    with torch.no_grad():
        for tensors, values in zip((parameters, list(model.buffers())), kept, strict=True):
            for tensor, before in zip(tensors, values, strict=True):
                tensor.copy_(before)
    return gradients
