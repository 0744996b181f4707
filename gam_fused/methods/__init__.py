"""The methods as sequences of passes; they read as the paper's pseudo-code (line numbers: Algorithm 1, arXiv 2303.03108).

Each function runs one step. Coefficients are in `coefficients`, formulas in the backends.
"""

from __future__ import annotations

from gam_fused.flatness.hessian_vector import ascent, hessian_vector_product
from gam_fused.step.step import Step


def plain(step: Step) -> None:
    """A step between GAM steps (`interval`): d = h_loss."""
    g0 = step.gradient("theta")
    if step.optimizer._sam_rho is None:
        step.update(x3=g0, table="plain")
    else:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        del g0
        step.update(x3=step.gradient("theta1"), table="plain")


def sam(step: Step) -> None:
    """d = g1: Foret et al., ICLR 2021."""
    g0 = step.gradient("theta")
    step.ascend(0, g0)  # theta1 = theta + rho g0/|g0|
    del g0
    step.update(x3=step.gradient("theta1"))


def finite_difference(step: Step) -> None:
    """Algorithm 1 with Appendix D's Hessian-vector products: d = h_loss + (alpha rho/rho') (g3 - g2)."""
    g0 = step.gradient("theta", keep=True)  # line 5
    h_loss, extra = g0, _needs_oracle_pass(step)
    if extra:
        step.ascend(0, g0, oracle=True)  # theta + sam_rho g0/|g0|
        h_loss = step.gradient("oracle", keep=True)
    step.ascend(0, g0)  # theta1 = theta + rho' g0/|g0|
    g1 = step.gradient("theta1", keep=step.optimizer.oracle == "sam")  # line 6: f ~ (g1 - g0)/rho'
    if step.optimizer.oracle == "sam" and not extra:
        h_loss = g1
    step.ascend(1, g1, minus=g0)  # line 7: theta2 = theta + rho (g1 - g0)/|g1 - g0|
    del g0, g1
    g2 = step.gradient("theta2")
    acc = step.ascend(2, g2, fold=h_loss)  # theta3 = theta2 + rho' g2/|g2|;  acc = h_loss - c g2
    del g2, h_loss
    g3 = step.gradient("theta3")  # line 8: h_norm ~ (rho/rho') (g3 - g2)
    step.update(x3=g3, acc=acc, guard_direction=extra)  # line 10


def accelerated(step: Step) -> None:
    """Algorithm 2 of the paper's appendix: d = h+ - gamma (h- minus its projection on h+)."""
    g0 = step.gradient("theta", keep=True)
    step.ascend(0, g0)  # theta1 = theta + rho' g0/|g0|
    g1 = step.gradient("theta1", keep=True)
    step.ascend(1, g1, minus=g0)  # theta2 = theta + rho (g1 - g0)/|g1 - g0|
    g2 = step.gradient("theta2")
    h_minus = step.ascend(2, g2, fold=g0)  # theta3 = theta2 + rho' g2/|g2|;  h- = beta g0 + (1 - beta) g2
    del g0, g2
    g3 = step.gradient("theta3")
    step.update(x1=g1, x3=g3, acc=h_minus)  # h+ = alpha g1 + (1 - alpha) g3


def exact(step: Step) -> None:
    """Algorithm 1 with Hessian-vector products by double backward: d = h_loss + alpha h_norm."""
    params = step.plan.params
    graph, g = step.differentiable_gradient("theta")  # line 5
    v, step.extras["gradient_norm"] = ascent(g, step)
    f = step.averaged(step.as_lists(hessian_vector_product(graph, params, v)))  # line 6
    del graph, v
    h_loss, extra = g, _needs_oracle_pass(step)
    if extra:
        step.ascend(0, g, oracle=True)  # theta + sam_rho g/|g|
        h_loss = step.gradient("oracle", keep=True)
    step.ascend(0, f)  # line 7: theta_adv = theta + rho f/|f|
    graph, g_adv = step.differentiable_gradient("theta_adv")
    v, step.extras["adversarial_gradient_norm"] = ascent(g_adv, step)
    hv = step.averaged(step.as_lists(hessian_vector_product(graph, params, v)))  # line 8
    del graph, v
    step.update(x3=hv, acc=step.accumulator(h_loss), guard_direction=True)  # line 10


def _needs_oracle_pass(step: Step) -> bool:
    """With oracle="sam", h_loss = grad L(theta + sam_rho g0/|g0|). At sam_rho == rho' that is finite_difference's g1."""
    optimizer = step.optimizer
    return optimizer._sam_rho is not None and (optimizer.method == "exact" or optimizer._sam_rho != optimizer.rho_prime)


METHODS = {"sam": sam, "finite_difference": finite_difference, "accelerated": accelerated, "exact": exact}
