"""What to use for names of other SAM and GAM implementations: for errors that say so. Their loops: docs/migration.md."""

from __future__ import annotations

PAGE = "docs/migration.md"

_STEP = (
    "every pass is made by optimizer.step(closure), where closure() computes the loss: leave out other passes and backward"
)
_CLOSURE = "give step the closure: optimizer.step(lambda: loss_fn(model(x), y))"
_PART = "it is a part of optimizer.step(closure) here"
_RHO_SCHEDULE = "gam_fused.schedules.ProportionalRho(optimizer, max_rho, min_rho), or set group['rho'] between steps"
_BUFFERS = "with FusedGAM(model, ...) or model=model, batch-norm statistics update once per step"

ATTRIBUTES = {
    # davda54/sam, pytorch_optimizer, Composer; the last two: ASAM
    "first_step": _STEP,
    "second_step": _STEP,
    "ascent_step": _STEP,
    "descent_step": _STEP,
    # GSAM and GAM of their authors, and pytorch_optimizer
    "set_closure": _CLOSURE,
    "forward_backward_func": _CLOSURE,
    "update_rho_t": _RHO_SCHEDULE,
    "rho_t": "the radius is the group entry 'rho'",
    "perturb_weights": _PART,
    "unperturb": _PART,
    "un_perturb": _PART,
    "grad_norm_ascent": _PART,
    "gradient_decompose": _PART,
    "sync_grad": "see perturb_sync=",
    "sub_e_w": _PART,
    "grad_norm": "optimizer.diagnostics()['gradient_norm']",
    "maybe_no_sync": "see perturb_sync=",
    "enable_running_stats": _BUFFERS,
    "disable_running_stats": _BUFFERS,
}

KEYWORDS = {
    "grad_rho": "rho_prime=, the length of the probe along the gradient",
    "grad_norm_rho": "rho=, the radius in which the gradient norm is minimised",
    "grad_rho_scheduler": "rho_prime=; change optimizer.rho_prime between steps",
    "grad_norm_rho_scheduler": _RHO_SCHEDULE,
    "rho_scheduler": _RHO_SCHEDULE,
    "grad_beta_1": "alpha=(grad_beta_1, grad_beta_3) with method='accelerated'",
    "grad_beta_2": "beta=(1.0, abs(grad_beta_2)) with method='accelerated'",
    "grad_beta_3": "alpha=(grad_beta_1, grad_beta_3) with method='accelerated'",
    "grad_gamma": "gamma= with method='accelerated'",
    "perturb_eps": "xi=",
    "sam_eps": "xi=",
    "epsilon": "xi= for GAM's divisions; eps= for the base optimizer's",
    "max_norm": "max_grad_norm=",
    "grad_reduce": "perturb_sync=",
    "args": "rho=, rho_prime=, alpha=, beta= and gamma=",
    "use_gc": "a hook: optimizer.base_optimizer.register_step_pre_hook(...) finds the combined direction in p.grad",
}


def explain(name: str) -> str | None:
    """For a name of another implementation, attribute or keyword: what to use instead, as the end of an error's text.

    None for any other name.
    """
    instead = ATTRIBUTES.get(name) or KEYWORDS.get(name)
    return f"{name} belongs to another implementation; here: {instead}. See {PAGE}" if instead else None
