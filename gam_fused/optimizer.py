"""FusedGAM and FusedSAM: what a user touches. Passes are in `methods`, one step's machinery in `engine`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused import checks, integrations, methods, settings
from gam_fused.backends import check_backend
from gam_fused.backends.base_optimizers import fused_base
from gam_fused.backends.tensor_lists import upload
from gam_fused.base import keywords
from gam_fused.base.build import build, rho_key
from gam_fused.constants import Control
from gam_fused.memory import flattening
from gam_fused.memory.parameters import check_groups, check_materialized, check_parameters
from gam_fused.memory.plan import Plan
from gam_fused.parallel import ddp, dtensor
from gam_fused.step import checkpoint, coefficients, precision
from gam_fused.step.diagnostics import diagnose
from gam_fused.step.loss_scaling import LossScaling
from gam_fused.step.step import Step
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.model_state import ModelState
from gam_fused.transaction.randomness import source_of

_NO_SETTINGS = ("params", "param_names", "gam")  # entries of a param group that no coefficient depends on


class FusedGAM(Optimizer):
    r"""Gradient norm Aware Minimization (Zhang et al., CVPR 2023, arXiv 2303.03108) around a base optimizer.

    Minimises L(theta) + alpha * R(theta), where R(theta) = rho * max over \|theta' - theta\| <= rho of \|grad L(theta')\| is
    the first-order flatness (equations 3 and 6). One step makes several gradient passes by calling the closure, then one
    update of the base optimizer in the combined direction d:

    ======================= ======================= ====================================================================
    method                  passes                  direction d
    ======================= ======================= ====================================================================
    ``"finite_difference"`` 4                       g0 + (alpha rho/rho') (g3 - g2), Algorithm 1 with Appendix D
    ``"accelerated"``       4                       (1 + gamma s) h+ - gamma h-, Algorithm 2 of the appendix
    ``"exact"``             2, differentiated twice g + alpha rho H(theta_adv) g_adv/\|g_adv\|, Algorithm 1
    ``"sam"``               2                       g1 (Foret et al. 2021), also as `FusedSAM`
    ======================= ======================= ====================================================================

    with g0 = grad L(theta), g1 at theta1 = theta + rho' g0/\|g0\|, g2 at theta2 = theta + rho (g1 - g0)/\|g1 - g0\|, g3 at
    theta3 = theta2 + rho' g2/\|g2\|, h+ = alpha g1 + (1 - alpha) g3, h- = beta g0 + (1 - beta) g2, s = <h-, h+>/\|h+\|^2.

    A step is a transaction: weights return bit for bit before the update, all passes see the same random numbers and start
    from the same buffers, which end as the first pass left them, an exception in any pass leaves everything as it was, and a
    gradient that is not finite in any pass skips the update (`skipped_steps`). Afterwards every `p.grad` is None.

    Args:
        params: a module, for its parameters and `model` at once; or tensors, (name, tensor) pairs or param groups, as
            torch.optim takes them. Dense float32, float64, bfloat16 or float16, of any shapes, on any devices; or DTensors,
            sharded or replicated over any meshes.
        base_optimizer: class or factory, called with `params` and the base's keywords; or an instance (then `params` may be
            None). The updates of exactly torch.optim.SGD, Adam and AdamW are fused. Any other optimizer, and one with step
            hooks of its own, gets d in `p.grad` and is stepped; it is the one case where the host waits for the device, to
            know whether to skip. Where that step fails half-way, weights and state are as it left them.
        method: see above.
        rho: radius of the neighbourhood, in the units of the weights; default and schedule per param group ("rho").
        rho_prime: length of the finite difference's probe. Too small, and it drowns in the rounding of the weights.
        alpha: for ``finite_difference`` and ``exact``: weight of the flatness term, alpha of equation 6. For
            ``accelerated`` something else: the convex weight of g1 in h+, or a pair of weights for g1 and g3.
        beta: ``accelerated`` only: the convex weight of g0 in h-, or a pair of weights for g0 and g2. The authors'
            released code uses h- = g0 + (1 - beta) g2: that is ``beta=(1.0, 1 - beta)``.
        gamma: ``accelerated`` only: weight of the part of h- that is orthogonal to h+.
        xi: of the paper, added to norms that divide. (`eps` is the base optimizer's.)
        adaptive: element-wise scaling as in ASAM: norms of g*|theta|, perturbations rho theta^2 g/norm.
        oracle: ``"loss"``, or ``"sam"``: h_loss = grad L(theta + sam_rho g0/\|g0\|), the paper's SAM + GAM
            (``finite_difference`` and ``exact``).
        sam_rho: radius of that ascent; None means rho_prime, which costs ``finite_difference`` no further pass.
        interval: run the method on every interval-th step (the first one included) and plain steps between.
        model: the module, or modules, whose buffers (batch norm, spectral norm, a memory queue, ...) and frozen parameters
            (a momentum encoder) shall move once per step. What a model that is not given moves cannot be seen: it moves with
            every pass. Which frozen parameters move is learnt from their versions and addresses and, where they take at most
            16 MiB or twice the memory of the trained ones, from copies of them in the first steps and some later ones; of
            larger ones that begin to move, passes 2 to 4 of that one step start from where pass 1 left them. Give the
            DistributedDataParallel wrapper itself, with which ``exact`` and ``perturb_sync="local"`` work, or the root that
            `fully_shard` was applied to.
        preserve_rng_state: replay the random numbers of pass 1 in the others: torch's on the CPU and on the devices in use,
            Python's `random`, numpy's global ones. Without, the finite difference follows the noise of different dropout
            masks. These generators belong to the whole process: what another thread draws from them during a step, such as
            augmentation, comes twice. Give such a thread a generator of its own, or use a DataLoader's worker processes.
        generators: generators of your own that the closure draws from, to be replayed too: torch.Generator,
            numpy.random.Generator, numpy.random.RandomState or random.Random. A copy or unpickled optimizer has none; they
            can be set, as an attribute.
        max_grad_norm: clip d to this L2 norm over all parameters, as torch.nn.utils.clip_grad_norm_ does.
        grad_scaler: the `torch.amp.GradScaler`. Let the closure return the loss without backward; one that calls backward
            itself must do so on ``scaler.scale(loss)``. After every step, ``optimizer.step(closure)`` or
            ``scaler.step(optimizer, closure)``, call ``scaler.update()``. It can be set later, as an attribute.
        perturb_sync: ``"auto"`` or ``"global"``: all ranks perturb alike, by gradients that DDP averages in every pass.
            ``"local"``: each rank perturbs by its own gradients (m-sharpness, m being a rank's batch), and one all-reduce
            per step averages the combined direction, before it is clipped; DDP reduces nothing (its communication hooks do
            not run), and one more copy of the model is kept. Not for sharded parameters. With ``"local"``, a rank whose
            step raised, and which caught that, may step again: the others wait for it. With ``"global"``, as under plain
            DDP, they would take its next pass for the one that failed: let the process end.
        flatten: move parameters into one contiguous buffer per device and dtype.
        backend: ``"auto"`` or one of `gam_fused.available_backends()`.
        base_kwargs: what the base optimizer is built with, for keywords that FusedGAM has too (RMSprop's ``alpha``,
            Adadelta's ``rho``). All others can be given as they are: lr, momentum, weight_decay, eps, ...

    Param groups may set ``rho``, and ``perturb=False`` for parameters that are updated but neither perturbed nor counted
    in norms. Around a base optimizer with a ``rho`` of its own (Adadelta), GAM's is the entry ``gam_rho``. All
    hyperparameters can be changed between steps, as group entries (rho, lr, ...) or attributes (rho_prime, alpha, beta,
    gamma).

    Raises:
        ValueError, TypeError: a hyperparameter or parameter that cannot work, named with what is allowed, before anything
            is built. ``perturb_sync="local"`` without a DistributedDataParallel in `model`; ``exact`` with sharded
            parameters; FSDP1.
        RuntimeError: a backend that is not there.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any] | None,
        base_optimizer: Callable[..., Optimizer] | Optimizer = torch.optim.SGD,
        *,
        method: str = "finite_difference",
        rho: float | None = None,
        rho_prime: float | None = None,
        alpha: settings.Weight | None = None,
        beta: settings.Weight | None = None,
        gamma: float | None = None,
        xi: float = 1e-12,
        adaptive: bool = False,
        oracle: str = "loss",
        sam_rho: float | None = None,
        interval: int = 1,
        model: nn.Module | Iterable[nn.Module] | None = None,
        preserve_rng_state: bool = True,
        generators: Sequence[Any] = (),
        max_grad_norm: float | None = None,
        grad_scaler: Any = None,
        perturb_sync: str = "auto",
        flatten: bool = False,
        backend: str = "auto",
        base_kwargs: dict[str, Any] | None = None,
        **more_base_kwargs: Any,
    ):
        given = {name: value for name, value in locals().items() if value is not _DEFAULTS.get(name, value)}
        checks.one_of("method", method, settings.METHODS)
        unused = settings.NAMES - settings.used_by(method)
        split = keywords.split(base_optimizer, given, unused, more_base_kwargs, base_kwargs)
        own = {"rho": rho, "rho_prime": rho_prime, "alpha": alpha, "beta": beta, "gamma": gamma}
        values = settings.resolve(method, **{k: v for k, v in own.items() if k not in split.taken})
        settings.check_oracle(method, oracle, sam_rho)
        settings.check_perturb_sync(perturb_sync)
        check_backend(backend)
        self.method, self.oracle, self.sam_rho = method, oracle, sam_rho
        self.rho_prime, self.alpha, self.beta, self.gamma = values.rho_prime, values.alpha, values.beta, values.gamma
        self.xi = checks.number("xi", xi, minimum=0.0)
        self.adaptive, self.preserve_rng_state = bool(adaptive), bool(preserve_rng_state)
        self.interval = checks.whole("interval", interval, minimum=1)
        self.max_grad_norm = checks.optional("max_grad_norm", max_grad_norm, above=0.0)
        self.perturb_sync, self.flatten, self.backend = perturb_sync, bool(flatten), backend
        self.generators = tuple(generators)
        for generator in self.generators:
            source_of(generator)  # raises
        self._modules = _as_modules(model)
        if isinstance(params, nn.Module):
            self._modules = self._modules or [params]
            params = params.parameters()
        self._in_step = threading.Lock()
        self._flat_buffers: list[Tensor] = []
        self._amp = LossScaling()
        self._steps_taken = 0
        self._plan: Any = None  # a Plan, from the first step on
        self._last: Step | None = None
        self._precision_watch = precision.Watch()

        base = build(params, base_optimizer, split.of_base)
        self._fused = fused_base(base)
        self.rho_key = rho_key(base)
        self._gam_defaults: dict[str, Any] = {self.rho_key: values.rho, "perturb": True, "gam": {}}
        self._group_values: list[dict[str, Any]] = []  # GAM's entries of each group as they last were
        check_parameters(base.param_groups)
        super().__init__(base.param_groups, {**base.defaults, **self._gam_defaults})
        self.base_optimizer = base
        checkpoint.complete_groups(self)
        checkpoint.link(self)
        check_groups(self.param_groups, self.rho_key)
        ddp.replicas(self._modules, self.perturb_sync, self.method, self.param_groups)  # raises
        self.grad_scaler = grad_scaler
        if self.flatten:
            self._flat_buffers = flattening.flatten(self.param_groups, self._modules, self._flat_buffers)

    # A step.

    @torch._disable_dynamo  # a compiled function around it runs it as it is; what the closure has compiled stays compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update: all passes of the method, then the base optimizer's update in the direction d.

        Args:
            closure: computes the loss of one mini-batch at the current weights. It returns the loss, either after calling
                backward on it (any method but ``exact``), or without (any method; the optimizer then does); alone, or as
                ``(loss, ...)`` or ``{"loss": loss, ...}`` with whatever else shall be seen of the unperturbed pass. It is
                called once per pass and may call `zero_grad`. Without a closure there is nothing to do but to create the
                optimizer state, which is what happens when every lr and every gradient is zero
                (torch.distributed.checkpoint asks for it so); otherwise that is an error.

        Returns:
            What the closure returned in pass 1, at the unperturbed weights, every tensor in it detached.

        Raises:
            RuntimeError: no closure, or one that leaves neither gradients nor a differentiable loss; sparse gradients.
            ValueError: a hyperparameter changed to something that cannot work.
        """
        with Interrupts() as interrupts, torch.no_grad():
            if not self._in_step.acquire(blocking=False):
                raise RuntimeError(
                    "step was called while a step of this optimizer is running: from inside its own closure, or from "
                    "another thread. Its passes are at perturbed weights: call one after the other"
                )
            try:
                return self._step(closure, interrupts)
            finally:
                self._in_step.release()

    def _step(self, closure: Callable[[], Any] | None, interrupts: Interrupts) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("step was called in torch.inference_mode(), in which nothing can be differentiated: leave it")
        if closure is None:
            return checkpoint.create_state(self)
        integrations.check_closure(closure)
        self._amp.begin(self)
        try:
            self._prepare()
            run = methods.METHODS[self.method] if self._steps_taken % self.interval == 0 else methods.plain
            with self._plan.no_sync():
                step = Step(self, closure, interrupts)
                try:
                    run(step)
                    step.finish()
                except BaseException:
                    step.abort()
                    raise
        except BaseException:
            self._amp.abort(self)
            raise
        self._amp.report(step.skipped)
        self._steps_taken += 1
        self._last = step
        self._precision_watch.look(self, step)
        loss, step.loss = step.loss, None  # it may hold outputs, which nobody but the caller shall keep
        return loss

    def _prepare(self) -> None:
        """Bring the plan and the coefficient tables up to date with the param groups."""
        if self._plan is None or not self._plan.is_current(self.param_groups):
            self._rebuild_plan()
        settings = self._settings()
        if settings is not None and settings == self._plan.settings:
            return
        self._plan.settings = None
        checkpoint.complete_groups(self)
        tables = self._tables()
        max_norm = checks.optional("max_grad_norm", self.max_grad_norm, above=0.0) or 0.0
        self._plan.upload(tables, self.xi, max_norm)
        self._plan.state_keys = [self._fused.state_keys(group) for group in self.param_groups] if self._fused else []
        self._plan.settings = self._settings()

    def _tables(self) -> dict[str, Any]:
        """The coefficient tables of all hyperparameters as they stand now, each of them checked."""
        checks.one_of("method", self.method, settings.METHODS)
        values = settings.check(self.method, self._values())
        settings.check_oracle(self.method, self.oracle, self.sam_rho)
        settings.check_perturb_sync(self.perturb_sync)
        checks.number("xi", self.xi, minimum=0.0)
        checks.whole("interval", self.interval, minimum=1)
        check_groups(self.param_groups, self.rho_key)
        return coefficients.tables(self.method, values, self._sam_rho, self.param_groups, self._fused, self.rho_key)

    def _settings(self) -> list[Any] | None:
        """What the coefficient tables follow from, or None where comparing would not tell of a change (tensors, lists)."""
        values = [
            self.method,
            self.rho_prime,
            self.alpha,
            self.beta,
            self.gamma,
            self.oracle,
            self.sam_rho,
            self.perturb_sync,
            self.interval,
            self.xi,
            self.max_grad_norm,
        ]
        for group in self.param_groups:
            for name, value in group.items():
                if name not in _NO_SETTINGS:
                    values += (name, value)
        return [*values, *map(type, values)] if checks.are_constants(values) else None  # True == 1.0

    def _rebuild_plan(self) -> None:
        checkpoint.drop_unstarted(self)
        checkpoint.complete_groups(self)
        check_materialized(self.param_groups)
        check_parameters(self.param_groups)
        if self.flatten:
            self._flat_buffers = flattening.flatten(self.param_groups, self._modules, self._flat_buffers)
        plan = Plan(self.param_groups, self.backend)
        if not plan.params:
            raise RuntimeError("no parameter requires a gradient: unfreeze one, or do not step")
        control = torch.zeros(len(Control), dtype=torch.float64, device="cpu")
        control[Control.LOSS_SCALE] = 1.0
        if self._plan is not None:
            control.copy_(self._plan.blocks[0].control)
        else:
            control[Control.SKIPPED], control[Control.NOISE_STEP] = self._counters
        for number, block in enumerate(plan.blocks):
            control[Control.NOISE_SEED] = number + len(plan.blocks) * block.shard_index
            block.control.copy_(upload(control.clone(), block.control.device))
        plan.replicas = ddp.replicas(self._modules, self.perturb_sync, self.method, self.param_groups)
        plan.fsdp_modules = dtensor.fsdp_modules(self._modules)
        plan.model_state = ModelState(self._modules, plan.params, self.backend) if self._modules else None
        self._plan = plan

    def _values(self) -> settings.Hyperparameters:
        return settings.Hyperparameters(self._gam_defaults[self.rho_key], self.rho_prime, self.alpha, self.beta, self.gamma)

    @property
    def _sam_rho(self) -> float | None:
        """Radius of the SAM oracle, None without one."""
        if self.oracle != "sam":
            return None
        return self.rho_prime if self.sam_rho is None else self.sam_rho

    _step_supports_amp_scaling = True  # torch's word for: `scaler.step` shall not unscale `p.grad` itself

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that the losses are scaled by; it can be set, for loops that make their own."""
        return self._amp.scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        self._amp.use(scaler, next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu")))

    _counters = (0.0, 0.0)  # skipped steps and noise counter to start from, set by a checkpoint

    # What it tells.

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. Reading it waits for the device."""
        return int(self._plan.blocks[0].control[Control.SKIPPED]) if self._plan else int(self._counters[0])

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step saw, as 0-d tensors on the device, without waiting for it; see `gam_fused.step.diagnostics`.

        With sharded parameters every rank must call it.
        """
        return diagnose(self)

    # What torch.optim promises. State and groups are the base optimizer's own, whoever sets them anew.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "base_optimizer" in self.__dict__:  # not yet in torch's constructor
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.state = state

    def __getattr__(self, name: str) -> Any:
        """What only the base optimizer has, such as `train()` and `eval()` of schedule-free ones."""
        base = self.__dict__.get("base_optimizer")
        if base is None or name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; the group may hold ``rho`` and ``perturb``."""
        if "base_optimizer" not in self.__dict__:  # torch's constructor hands over the base's own groups
            return
        number = len(self.param_groups)
        self.base_optimizer.add_param_group({**self._gam_defaults, **param_group})
        try:
            check_parameters(self.param_groups)
            checkpoint.complete_groups(self)
            check_groups(self.param_groups, self.rho_key)
            ddp.replicas(self._modules, self.perturb_sync, self.method, self.param_groups)
        except (TypeError, ValueError):
            del self.param_groups[number:]
            raise

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        if set_to_none:
            self.base_optimizer.zero_grad()
        else:
            self.base_optimizer.zero_grad(set_to_none=False)

    def __repr__(self) -> str:
        names = [
            "method",
            "rho_prime",
            "alpha",
            "beta",
            "gamma",
            "adaptive",
            "interval",
            "max_grad_norm",
            "perturb_sync",
            "backend",
        ]
        names += ["oracle", "sam_rho"] if self.oracle != "loss" else []
        shown = ", ".join(f"{name}={value!r}" for name in names if (value := getattr(self, name)) is not None)
        return super().__repr__().replace("(", f"({shown}", 1)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, in the layout of the base optimizer's own; param groups also hold "rho", "perturb" and "gam"."""
        return checkpoint.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or a checkpoint of the base optimizer's class, of any age.

        A state dict of another method: the optimizer keeps its own method and hyperparameters of GAM.

        Raises:
            ValueError, TypeError: what cannot be loaded, named. Nothing has changed then.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.picklable(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        of_base: dict[str, Any] = {key: state[key] for key in ("state", "param_groups") if key in state}
        super().__setstate__({key: value for key, value in state.items() if key not in of_base})
        if of_base:
            self.base_optimizer.__setstate__(of_base)
        if "_plan" not in self.__dict__:  # unpickled or copied
            self._plan = self._last = None
            self._precision_watch = precision.Watch()
            self._in_step = threading.Lock()
            checkpoint.link(self)
        checkpoint.forget_plan(self)


class FusedSAM(FusedGAM):
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021) on the same engine: `FusedGAM` with ``method="sam"``.

    d = grad L(theta + rho g0/|g0|). Arguments as for `FusedGAM`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any] | None,
        base_optimizer: Callable[..., Optimizer] | Optimizer = torch.optim.SGD,
        *,
        rho: float | None = None,
        **kwargs: Any,
    ):
        if "method" in kwargs:
            raise TypeError("FusedSAM is FusedGAM with method='sam'; for another method use FusedGAM")
        super().__init__(params, base_optimizer, method="sam", rho=rho, **kwargs)


# FusedGAM's own keywords, but `method`, which nobody means for a base optimizer.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(FusedGAM.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("method", "base_kwargs")
}


def _as_modules(model: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module]:
    if model is None or isinstance(model, nn.Module):
        return [] if model is None else [model]
    modules = list(model) if isinstance(model, Iterable) else [model]
    if not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(f"model must be a torch.nn.Module or several, but is {model!r}")
    return modules
