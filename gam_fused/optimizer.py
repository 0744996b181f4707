"""FusedGAM and FusedSAM: arguments and torch.optim's interface. A step is in `step`, its passes in `methods`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fused import torch_private
from gam_fused.backends import check_backend
from gam_fused.base import keywords
from gam_fused.base.build import build, rho_key
from gam_fused.checks import one_of
from gam_fused.memory.parameters import check_parameters
from gam_fused.methods import METHODS, TAKES, plain
from gam_fused.migration import PAGE, explain
from gam_fused.settings import OF_METHODS, Settings, Weight
from gam_fused.step import checkpoint, run
from gam_fused.step.closures import BatchClosure, check_has_batch
from gam_fused.step.diagnostics import diagnose
from gam_fused.step.foreign_loops import check_closure
from gam_fused.step.method import Method
from gam_fused.step.session import Session
from gam_fused.torch_private import not_traced
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.module_tree import check_visible
from gam_fused.transaction.randomness import source_of


class FusedGAM(Optimizer):
    """Gradient norm Aware Minimization (Zhang et al., CVPR 2023, arXiv 2303.03108) around a base optimizer.

    Minimises L(theta) + alpha R(theta), where R(theta) = rho max |grad L(theta')| over |theta' - theta| <= rho is the
    first-order flatness (equations 3 and 6). One step makes several gradient passes by calling the closure, then one update
    of the base optimizer in the combined direction d:

        method             passes  direction d
        finite_difference  4       h_loss + (alpha rho/rho') (g3 - g2)         Algorithm 1, Appendix D
        accelerated        4       h+ - gamma (h- - s h+)                      Algorithm 2
        exact              2 (*)   h_loss + alpha rho H(theta_adv) v_adv       Algorithm 1
        gradient_penalty   2       h_loss + (alpha rho/rho') (g1 - g0)         Zhao et al. 2022
        gsam               2       g1 - alpha (g0 minus its projection on g1)  Zhuang et al. 2022
        sam                2       g1                                          Foret et al. 2021

        (*) with double backward; v_adv = g_adv/|g_adv|

        h_loss = g0 = grad L(theta)         theta1 = theta  + rho' g0/|g0|  (gsam, sam: rho)
             g1 = grad L(theta1)            theta2 = theta  + rho (g1 - g0)/|g1 - g0|
             g2 = grad L(theta2)            theta3 = theta2 + rho' g2/|g2|
             g3 = grad L(theta3)
             h+ = alpha g1 + (1 - alpha) g3
             h- = beta g0 + (1 - beta) g2
             s  = <h-, h+>/|h+|^2

    A step is a transaction. Weights are restored bit for bit before the update. All passes see the same random numbers and
    start from the same buffers, which end as the first pass left them. An exception in any pass leaves all of this as it
    was. A non-finite gradient in any pass skips the update (`skipped_steps`). Afterwards every `p.grad` is None.

    Args:
        params: a module, which then serves as `model` too; or tensors, (name, tensor) pairs or param groups, as
            torch.optim takes them. Dense float32, float64, bfloat16 or float16, of any shapes, on any devices; or DTensors,
            sharded or replicated over any meshes.
        base_optimizer: class or factory, called with `params` and the base's keywords; or an instance (then `params` may be
            None). The updates of exactly torch.optim.SGD, Adam and AdamW are fused. Any other optimizer, and one with step
            hooks of its own, gets d in `p.grad` and its own `step` is called; this is the one case where the host waits for
            the device, to know whether to skip. If that step raises, weights and state are as it left them, buffers and
            generators as after one pass.
        method: see above. ``accelerated``, ``gsam`` and ``sam`` have no bound (`max_ratio`): at their defaults, networks
            without batch norm learn more slowly, and transformers ended clearly worse than with their base. Give them a
            smaller `rho` there, or use a bounded method, whose defaults trained every network of the studies.
        rho: radius in which the gradient norm is minimised, in the units of the weights; param groups may have their own.
        rho_prime: step length of the finite difference (the probe). If it is too short, it is lost in the rounding of the
            weights.
        alpha: for ``finite_difference``, ``exact`` and ``gradient_penalty``: weight of the flatness term, alpha of equation
            6; for ``gsam``: of the surrogate gap. ``accelerated`` uses it differently: the convex weight of g1 in h+, or a
            pair of weights for g1 and g3.
        beta: ``accelerated`` only: the convex weight of g0 in h-, or a pair of weights for g0 and g2. The authors'
            released code uses h- = g0 + (1 - beta) g2: that is ``beta=(1.0, 1 - beta)``.
        gamma: ``accelerated`` only: weight of the part of h- that is orthogonal to h+.
        max_ratio: ``finite_difference``, ``exact`` and ``gradient_penalty``: bound on the flatness term, which enters with
            alpha' = min(alpha, max_ratio |h_loss|/|h_norm|), computed on the device in every step, with norms over perturbed
            parameters. Below 1, d always descends: <d, h_loss> >= (1 - max_ratio) |h_loss|^2. With a bound, alpha may be
            infinite: then only the bound counts. None: no bound, as in the paper. "auto": the method's default. With
            ``perturb_sync="local"`` each rank bounds its own term.
        flatness_fraction: the fraction of the mini-batch on which the flatness term is computed, for
            ``step(closure, batch)``: h_loss uses the whole mini-batch, each further gradient the part only, compared with
            q0 = grad L(theta) on the part. Four passes become 1 + 4 flatness_fraction; ``sam``, ``gsam`` and
            ``gradient_penalty`` take 1 + 2 flatness_fraction. In ``accelerated``, ``gsam`` and ``sam``, g0 + (q_i - q0)
            replaces g_i.
        xi: added to norms in denominators, as in the paper. (`eps` is the base optimizer's.)
        adaptive: element-wise scaling as in ASAM: norms are those of g*|theta|, perturbations are rho theta^2 g/norm.
        oracle: ``"loss"``, or ``"sam"``: h_loss = grad L(theta + sam_rho g0/|g0|), the paper's SAM + GAM
            (``finite_difference``, ``exact`` and ``gradient_penalty``).
        sam_rho: radius of that ascent; None means rho_prime, which costs an extra pass with ``exact`` only.
        interval: run the method on every interval-th step, starting with the first, and plain steps in between: with four
            passes that makes (3 + interval)/interval passes per step. A flatness term that is applied less often may be
            larger: use ``alpha=inf`` and a `max_ratio` of about interval/2, at most 4, on networks with batch norm; on
            others, at most 0.9.
        model: the module, or modules, whose buffers (batch norm, spectral norm, a memory queue, ...) and frozen parameters
            (a momentum encoder) shall update once per step. Buffers of a model that is not passed update in every pass, as
            the optimizer cannot see them. Frozen parameters that change are recognised by their versions and addresses and,
            if they take at most 16 MiB or twice the memory of the trained ones, by comparison with copies of them in the
            first steps and some later ones. When larger ones begin to change, passes 2 to 4 of that one step start from the
            values that pass 1 left. Gradients of its parameters that another optimizer trains are as after a single pass
            (except with ``exact``, which computes none for them). Pass the DistributedDataParallel wrapper itself, which
            ``exact`` and ``perturb_sync="local"`` need, or the root module that `fully_shard` was applied to.
        preserve_rng_state: replay the random numbers of pass 1 in the other passes: torch's on the CPU and on the devices in
            use, Python's `random`, numpy's global ones. Otherwise the noise of different dropout masks dominates the finite
            difference. These generators are shared by the whole process: what another thread draws from them during a step,
            such as augmentation, is drawn twice. Give such a thread its own generator, or use a DataLoader's worker
            processes.
        generators: generators of your own that the closure draws from, to be replayed too: torch.Generator,
            numpy.random.Generator, numpy.random.RandomState or random.Random. A copied or unpickled optimizer has none;
            set them as an attribute.
        max_grad_norm: clip d to this L2 norm over all parameters, as torch.nn.utils.clip_grad_norm_ does.
        grad_scaler: the `torch.amp.GradScaler`. Let the closure return the loss without backward; one that calls backward
            itself must call it on ``scaler.scale(loss)``. After every step, ``optimizer.step(closure)`` or
            ``scaler.step(optimizer, closure)``, call ``scaler.update()``. It can be set later, as an attribute.
        perturb_sync: ``"global"``: all ranks perturb alike, along gradients that DDP averages in every pass.
            ``"local"``: each rank perturbs along its own gradients (m-sharpness, m being a rank's batch), and one all-reduce
            per step averages the combined direction, before it is clipped; DDP does not all-reduce gradients (its
            communication hooks do not run), and one more copy of the model is kept. Not for sharded parameters. With
            ``"local"``, a rank that caught an exception from one of its passes may step again: the others wait for it,
            unless the closure itself communicates, as SyncBatchNorm does. With ``"global"``, and under FSDP2, ranks may
            continue only if the step failed on all of them; a rank that failed alone and steps again gets an error, and the
            others a timeout.
        flatten: move parameters into one contiguous buffer per device and dtype.
        backend: ``"auto"`` or one of `gam_fused.available_backends()`.
        base_kwargs: arguments of the base optimizer whose names FusedGAM uses too (RMSprop's ``alpha``, Adadelta's
            ``rho``). All others can be passed directly: lr, momentum, weight_decay, eps, ...

    Param groups may set ``rho``, and ``perturb=False`` for parameters that are updated but neither perturbed nor counted
    in norms. If the base optimizer has a ``rho`` of its own (Adadelta), GAM's is the entry ``gam_rho``. All
    hyperparameters can be changed between steps, as group entries (rho, lr, ...) or attributes (rho_prime, alpha, beta,
    gamma, max_ratio, flatness_fraction).

    Raises:
        ValueError, TypeError: an invalid hyperparameter or parameter, named with what is allowed, before anything is built.
            ``perturb_sync="local"`` without a DistributedDataParallel in `model`; ``exact`` with sharded
            parameters; FSDP1.
        RuntimeError: a backend that is not available.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any] | None,
        base_optimizer: Callable[..., Optimizer] | Optimizer = torch.optim.SGD,
        *,
        method: str = "finite_difference",
        rho: float | None = None,
        rho_prime: float | None = None,
        alpha: Weight | None = None,
        beta: Weight | None = None,
        gamma: float | None = None,
        max_ratio: float | str | None = "auto",
        flatness_fraction: float = 1.0,
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
        perturb_sync: str = "global",
        flatten: bool = False,
        backend: str = "auto",
        base_kwargs: dict[str, Any] | None = None,
        **more_base_kwargs: Any,
    ):
        if isinstance(params, Optimizer):
            raise TypeError(
                f"params is an optimizer: use {type(self).__name__}(None, optimizer) to wrap it, or "
                f"{type(self).__name__}(params, {type(params).__name__}, lr=..., ...) to make a new one; see {PAGE}"
            )
        if told := [
            text for name in more_base_kwargs if (text := explain(name)) and not keywords.takes(base_optimizer, name)
        ]:
            raise TypeError("; ".join(told))
        arguments = {name: value for name, value in locals().items() if name in _KEYWORDS}
        one_of("method", method, tuple(METHODS))
        given = {name: value for name, value in arguments.items() if value is not _KEYWORDS[name]}
        unused = set(OF_METHODS) - TAKES[method].names
        split = keywords.split(base_optimizer, given, unused, more_base_kwargs, base_kwargs)
        own = {name: arguments[name] for name in _SETTINGS if name in arguments and name not in split.taken}
        self.settings = Settings(method=method, **own).resolved(TAKES)
        check_backend(backend)
        modules, own_generators = _as_modules(model), _as_generators(generators)
        if isinstance(params, nn.Module):
            modules = modules or _as_modules(params)
            params = params.parameters()
        base = build(params, base_optimizer, split.of_base)
        check_parameters(base.param_groups)
        session = Session(base, rho_key(base), self.settings.rho, modules, own_generators)
        super().__init__(base.param_groups, {**base.defaults, **session.entries.defaults})
        self.session = session
        session.entries.complete()
        self.session.check(self.settings, METHODS[method])
        self.grad_scaler = grad_scaler
        self.session.flatten(self.settings)

    # A step.

    @not_traced
    def step(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Any:
        """One update: all passes of the method, then the base optimizer's update in the direction d.

        Args:
            closure: computes the loss of one mini-batch at the current weights. It returns the loss, either after calling
                backward on it (any method but ``exact``), or without (any method; the optimizer then calls it); alone, or as
                ``(loss, ...)`` or ``{"loss": loss, ...}`` with whatever else you want from the unperturbed pass. It is
                called once per pass and may call `zero_grad`. Without a closure, `step` only creates the optimizer state,
                if every lr and every gradient is zero (which is how torch.distributed.checkpoint does that); otherwise that
                is an error.
            batch: the mini-batch, a tensor or any nested structure of tensors; the closure is then called with it,
                ``closure(batch)``, and in the passes of the flatness term with its first `flatness_fraction`, as
                `gam_fused.step.batches.part_of` slices it. Samples must be in random order, and the loss must be their mean.

        Returns:
            What the closure returned in pass 1, at the unperturbed weights, every tensor in it detached: in tuples, lists,
            dicts and whatever torch's pytree knows.

        Raises:
            RuntimeError: no closure, or one that leaves neither gradients nor a differentiable loss; one that writes to a
                tensor of its batch in place; sparse gradients; the last step failed on this rank alone.
            ValueError: a hyperparameter was changed to an invalid value; `flatness_fraction` below 1 without a batch;
                a batch whose tensors disagree about its length; optimizer state made in ``torch.inference_mode()``.
        """
        if batch is not None and closure is not None:
            closure = BatchClosure(closure, batch)
        with Interrupts() as interrupts, torch.no_grad():
            if not self.session.running.acquire(blocking=False):
                raise RuntimeError(
                    "step was called while a step of this optimizer is running: from inside its own closure, or from "
                    "another thread. Weights are perturbed during a step: run one step after the other"
                )
            try:
                return self._step(closure, interrupts)
            finally:
                self.session.running.release()

    def _step(self, closure: Callable[[], Any] | None, interrupts: Interrupts) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step was called in torch.inference_mode(), which disables differentiation; call step outside of it"
            )
        session = self.session
        if closure is None:
            return checkpoint.create_state(session)
        check_closure(closure)
        session.loss_scaling.begin(self)
        try:
            method = _method(self.settings)
            settings = session.prepare(self.settings, method)
            check_has_batch(closure, settings.flatness_fraction)
            if session.failed:
                interrupts.let_through(session.check_not_alone)
            passes = plain.passes if session.steps_taken % settings.interval else method.passes
            with session.no_sync():
                step = run.take(session, settings, method, passes, closure, interrupts)
        except BaseException:
            session.loss_scaling.abort(self)
            raise
        session.loss_scaling.report(session.skipped)
        run.count(session, step.record)
        return step.loss

    def prepare(self) -> Settings:
        """Bring memory and coefficient tables up to date with param groups and hyperparameters, as a step does first.

        Returns:
            The hyperparameters, checked.
        """
        with torch.inference_mode(False), torch.no_grad():  # tensors that are made here have to serve every step
            return self.session.prepare(self.settings, _method(self.settings))

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that losses are scaled with; it can be set, for loops that create their own."""
        scaler: torch.amp.GradScaler | None = self.session.loss_scaling.scaler
        return scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        first = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        self.session.loss_scaling.use(scaler, first)

    _step_supports_amp_scaling = True  # torch's word for: `scaler.step` shall not unscale `p.grad` itself

    @property
    def generators(self) -> tuple[Any, ...]:
        """The user's own generators, which are replayed too; they can be set."""
        return self.session.generators

    @generators.setter
    def generators(self, generators: Sequence[Any]) -> None:
        self.session.generators = _as_generators(generators)

    @property
    def rho_key(self) -> str:
        """The param group entry that holds GAM's radius: "rho", or "gam_rho" if the base has a rho of its own."""
        return self.session.entries.rho_key

    def _refuse_rho(self, _: Any) -> None:
        raise AttributeError(f"rho {self._rho_told}")

    rho = property(None, _refuse_rho)  # set as an attribute, it would change nothing

    @property
    def _rho_told(self) -> str:
        key = self.rho_key
        return f"is an entry of each param group: for group in optimizer.param_groups: group[{key!r}] = ..."

    # What it reports.

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. Reading it waits for the device."""
        return self.session.skipped_steps

    def diagnostics(self) -> dict[str, Tensor]:
        """What the last step saw, as 0-d tensors on the device, without waiting for it.

        `gam_fused.step.diagnostics.diagnose` lists the entries. With sharded parameters every rank must call it.

        Raises:
            RuntimeError: before the first step.
        """
        if self.session.last is None:
            raise RuntimeError("diagnostics() describes the last step, but there has been none yet")
        return diagnose(self.session.last, self.session.precision.autocast_eps)

    def __repr__(self) -> str:
        hidden = {"rho", "xi", "preserve_rng_state", "flatten"}
        hidden |= {name for name, idle in (("oracle", "loss"), ("flatness_fraction", 1.0)) if getattr(self, name) == idle}
        shown = {name: getattr(self.settings, name) for name in _SETTINGS if name not in hidden}
        text = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return super().__repr__().replace("(", f"({text}", 1)

    # What torch.optim promises. State and groups are the base optimizer's own, whoever sets them anew.

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer whose update is made in the direction d. It owns state and param groups."""
        return self.session.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        return self.session.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._in_constructor:
            self.session.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.session.base.state

    @state.setter
    def state(self, state: Any) -> None:
        if not self._in_constructor:
            self.session.base.state = state

    @property
    def _in_constructor(self) -> bool:
        """Whether torch's constructor runs, which would set state and groups anew and add the base's own groups to them."""
        return "session" not in self.__dict__

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base optimizer, such as `train()` and `eval()` of schedule-free ones."""
        session = self.__dict__.get("session")
        if session is None or name.startswith("_") or not hasattr(session.base, name):
            hint = self._rho_told if session and name == "rho" else explain(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}" + (f": {hint}" if hint else ""))
        return getattr(session.base, name)

    if TYPE_CHECKING:  # hyperparameters are attributes that can be set; `Settings` lists them

        def __setattr__(self, name: str, value: Any) -> None: ...

    @not_traced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; the group may hold ``rho`` and ``perturb``."""
        if self._in_constructor:
            return
        number = len(self.param_groups)
        self.session.base.add_param_group({**self.session.entries.defaults, **param_group})
        try:
            check_parameters(self.param_groups)
            self.session.entries.complete()
            self.session.check(self.settings, _method(self.settings))
        except (TypeError, ValueError):
            del self.param_groups[number:]
            raise

    @not_traced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        if set_to_none:
            self.session.base.zero_grad()
        else:
            self.session.base.zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, in the layout of the base optimizer's own; param groups also hold "rho", "perturb" and "gam"."""
        torch_private.before_state_dict(self)
        return torch_private.after_state_dict(self, checkpoint.save(self.session, self.settings))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or a checkpoint of the base optimizer's class from any torch version.

        With a state dict of another method, the optimizer keeps its own method and GAM hyperparameters.

        Raises:
            ValueError, TypeError: the state dict does not fit, with the reason. Nothing has changed then.
        """
        if self.session.running.locked():
            raise RuntimeError(
                "load_state_dict was called during a step of the optimizer, from its closure or another thread"
            )
        state_dict, before = torch_private.before_load(self, state_dict), self.settings
        with Interrupts():
            try:
                with checkpoint.loading(self.session, before, _method(before), state_dict) as loaded:
                    self.settings = loaded
                    torch_private.after_load(self)
                self.session.forget_failure()
            except BaseException:
                self.settings = before
                raise

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but hooks, as torch.optim has it, and what is built anew from the rest."""
        # "step": LR schedulers wrap it per instance.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}

    def __copy__(self) -> FusedGAM:
        """One that steps the same base optimizer, with counters of its own."""
        other = type(self).__new__(type(self))
        other.__setstate__({**self.__getstate__(), "session": copy.copy(self.session)})
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        of_base: dict[str, Any] = {key: state[key] for key in ("state", "param_groups") if key in state}
        super().__setstate__({key: value for key, value in state.items() if key not in of_base})
        if of_base:
            self.session.base.__setstate__(of_base)
        self.session.forget_plan()


def _setting(name: str) -> property:
    """A hyperparameter as an attribute that can be read and set."""

    def get(self: FusedGAM) -> Any:
        return getattr(self.settings, name)

    def put(self: FusedGAM, value: Any) -> None:
        self.settings = replace(self.settings, **{name: value})

    return property(get, put)


_SETTINGS = tuple(field.name for field in fields(Settings))
for _name in _SETTINGS:
    if _name != "rho":  # an entry of param groups
        setattr(FusedGAM, _name, _setting(_name))
# FusedGAM's own keywords and their defaults, except `method`, which is never the base optimizer's.
_KEYWORDS = {
    name: parameter.default
    for name, parameter in inspect.signature(FusedGAM.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("method", "base_kwargs")
}


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


def _method(settings: Settings) -> Method:
    one_of("method", settings.method, tuple(METHODS))
    return METHODS[settings.method]


def _as_generators(generators: Iterable[Any]) -> tuple[Any, ...]:
    generators = tuple(generators)
    for generator in generators:
        source_of(generator)  # raises
    return generators


def _as_modules(model: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module]:
    if model is None:
        return []
    modules = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Iterable) else [model]
    if not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(f"model must be a torch.nn.Module or several, but is {model!r}")
    for module in modules:
        for part in module.modules():
            check_visible(part)
    return modules
