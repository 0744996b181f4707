"""Faults that random comparisons with torch alone have found: the same model or optimizer, with and without FusedGAM."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from gam_helpers import freeze, same
from torch import nn

from gam_fused import FusedGAM

# What a forward moves, and how it writes to it.


def inplace(m, name, new):
    getattr(m, name).copy_(new)


def through_data(m, name, new):
    getattr(m, name).data.copy_(new)


def through_numpy(m, name, new):
    getattr(m, name).detach().numpy()[...] = new.numpy()


def in_inference_mode(m, name, new):
    with torch.inference_mode():
        getattr(m, name).copy_(new)


def other_memory(m, name, new):
    getattr(m, name).data = new


def swapped(m, name, new):
    torch.utils.swap_tensors(getattr(m, name), as_there(m, name, new))


def assigned(m, name, new):
    setattr(m, name, as_there(m, name, new))


def into_the_dict(m, name, new):
    (m._parameters if name in m._parameters else m._buffers)[name] = as_there(m, name, new)


def taken_out_and_registered(m, name, new):
    new, is_parameter = as_there(m, name, new), name in m._parameters
    delattr(m, name)
    (m.register_parameter if is_parameter else m.register_buffer)(name, new)


def grown(m, name, new):
    getattr(m, name).data = torch.cat([new, new[:1]])[-4:]


def as_there(m, name, new):
    return nn.Parameter(new, requires_grad=False) if name in m._parameters else new


ROW = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7
TENSORS = {
    "buffer": lambda: ROW.clone(),
    "conjugate buffer": lambda: torch.complex(ROW, ROW / 2).conj(),
    "expanded buffer": lambda: torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).expand(2, 3),
    "sparse buffer": lambda: ROW.to_sparse().coalesce(),
    "frozen": lambda: nn.Parameter(ROW.clone(), requires_grad=False),
}


class Follower(nn.Module):
    """A trained weight, and a tensor that each forward moves after the weight, from its call number `start` on."""

    def __init__(self, kind, write, start, place):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.kind, self.write, self.start = kind, write, start
        if place == "there":
            self.put(self)
        elif place == "below":
            self.owner()

    def put(self, owner):
        t = TENSORS[self.kind]()
        (owner.register_parameter if isinstance(t, nn.Parameter) else owner.register_buffer)("t", t)

    def owner(self):
        if hasattr(self, "t"):
            return self
        if not hasattr(self, "below"):
            self.below = nn.Sequential(nn.Module())
            self.put(self.below[0])
        return self.below[0]

    @torch.no_grad()
    def follow(self):
        self.calls += 1
        owner = self.owner()
        before = content(owner.t)
        if int(self.calls) >= self.start:
            factor = 0.5 + float(self.w.detach().sum()) * 0.1
            t = owner.t.detach()
            self.write(owner, "t", t * factor if t.layout is torch.strided else (t * factor).coalesce())
        return before + content(owner.t)

    def forward(self, x):
        return ((self.w * x).sum() * (1 + 0.1 * self.follow()) - 1) ** 2


def content(t):
    t = t.detach().to_dense()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return (t.flatten() * torch.linspace(0.3, 1.1, t.numel(), dtype=torch.float64)).sum()


def moves_as_under_torch(kind, write, start, place, method, steps=6):
    """Some steps, one of which is skipped and one of which fails; those are none under torch alone."""
    plain, model = Follower(kind, write, start, place), Follower(kind, write, start, place)
    x = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    sgd = torch.optim.SGD([plain.w], lr=0.01)
    optimizer = FusedGAM([model.w], torch.optim.SGD, lr=0.01, rho=0.0, method=method, model=model)
    for i in range(steps):
        calls = []

        def closure(i=i, calls=calls):
            calls.append(model(x))
            if i == 3 and len(calls) == 2:
                raise MemoryError
            return calls[-1] * (float("nan") if i == 1 and len(calls) == 2 else 1.0)

        try:
            optimizer.step(closure)
        except MemoryError:
            assert i == 3
        if i not in (1, 3):
            sgd.zero_grad()
            plain(x).backward()
            sgd.step()
        torch.testing.assert_close(model.w, plain.w, rtol=1e-9, atol=1e-12)
        assert model.state_dict().keys() == plain.state_dict().keys()
        for mine, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(content(mine), content(theirs), rtol=1e-9, atol=1e-12)


UNTOLD = (through_data, through_numpy, in_inference_mode)


@pytest.mark.parametrize("method", ["sam", "finite_difference"])
@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize(
    "write", [inplace, *UNTOLD, other_memory, assigned, into_the_dict, taken_out_and_registered], ids=lambda f: f.__name__
)
def test_a_frozen_parameter_moves_however_it_is_written_to(write, start, method):
    """Also where it begins to move in a later step, and also in a step that fails just then."""
    for place in ("there", "below"):
        moves_as_under_torch("frozen", write, start, place, method)
    moves_as_under_torch("frozen", write, 3, "there", method, steps=3)


@pytest.mark.parametrize("write", [inplace, through_data, other_memory, assigned], ids=lambda f: f.__name__)
def test_a_frozen_parameter_that_the_first_pass_makes(write):
    moves_as_under_torch("frozen", write, 1, "nowhere", "finite_difference", steps=1)


@pytest.mark.parametrize("write", [grown, taken_out_and_registered], ids=lambda f: f.__name__)
def test_a_buffer_that_the_first_pass_makes(write):
    moves_as_under_torch("buffer", write, 1, "nowhere", "sam", steps=1)


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("buffer", taken_out_and_registered),
        ("expanded buffer", taken_out_and_registered),
        ("conjugate buffer", inplace),
        ("conjugate buffer", through_data),
        ("sparse buffer", other_memory),
        ("sparse buffer", swapped),
    ],
    ids=lambda f: f if isinstance(f, str) else f.__name__,
)
def test_a_buffer_moves_however_it_is_written_to(kind, write):
    for method in ("sam", "finite_difference"):
        moves_as_under_torch(kind, write, 1, "there", method)


@pytest.mark.parametrize("size", [4, 40])
def test_a_momentum_encoder_that_starts_as_a_copy(size):
    """In the first step, nothing tells that it moves: it is what it follows, and is written to through `.data`."""

    class MoCo(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
            nn.init.zeros_(self.q.bias)
            self.k = copy.deepcopy(self.q).requires_grad_(False)
            self.other = nn.Linear(size, size).double().requires_grad_(False)  # may be larger than all that is trained

        def forward(self, x):
            for p, q in zip(self.k.parameters(), self.q.parameters(), strict=True):
                p.data.mul_(0.5).add_(q.data, alpha=0.5)
            return (self.head(self.q(x)) - self.k(x)).square().mean()

    plain, model, x = MoCo(), MoCo(), torch.randn(8, 4, dtype=torch.float64)
    trained = lambda m: [p for p in m.parameters() if p.requires_grad]  # noqa: E731
    sgd = torch.optim.SGD(trained(plain), lr=0.1)
    optimizer = FusedGAM(trained(model), torch.optim.SGD, lr=0.1, rho=0.0, model=model)
    for _ in range(5):
        optimizer.step(lambda: model(x))
        sgd.zero_grad()
        plain(x).backward()
        sgd.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-12)


# Handlers of signals that the closure sets.


def signalled(closure_of_step):
    """What a handler's closure and the signals of its own tell: (in the step, after it, in the next step)."""
    p, got, told = nn.Parameter(torch.ones(1)), [], []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append("user"))
    try:
        optimizer = FusedGAM([p], torch.optim.SGD, lr=0.1, method="sam")
        closure, end = closure_of_step(got)
        for step in range(2):
            optimizer.step(lambda: (closure(), p.sum())[1])
            if step == 0:
                told.append(list(got))
                end()
            got.clear()
            signal.raise_signal(signal.SIGUSR1)
            told.append(list(got))
            got.clear()
        return told
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_calls_the_one_before():
    """As libraries do that are first used inside the closure."""

    def closure_of_step(got):
        old = []

        def closure():
            if not old:
                old.append(signal.getsignal(signal.SIGUSR1))
                signal.signal(signal.SIGUSR1, lambda n, f: (got.append("library"), old[0](n, f)))
            signal.raise_signal(signal.SIGUSR1)

        return closure, lambda: None

    both = ["library", "user"]
    assert signalled(closure_of_step) == [both * 2, both, both]


def test_a_handler_over_a_handler():
    def closure_of_step(got):
        libraries = iter(["first", "second"])

        def closure():
            name = next(libraries, None)
            if name:
                old = signal.getsignal(signal.SIGUSR1)
                signal.signal(signal.SIGUSR1, lambda n, f: (got.append(name), old(n, f)))

        return closure, lambda: None

    assert signalled(closure_of_step) == [[], ["second", "first", "user"], ["second", "first", "user"]]


def test_a_handler_that_is_set_again_after_the_step():
    def closure_of_step(got):
        old = []

        def closure():
            if not old:
                old.append(signal.signal(signal.SIGUSR1, lambda *_: got.append("for a while")))
            elif old[0] is not None:
                signal.raise_signal(signal.SIGUSR1)

        def end():
            signal.signal(signal.SIGUSR1, old[0])
            old[0] = None

        return closure, end

    assert signalled(closure_of_step) == [["for a while"], ["user"], ["user"]]


# Base optimizers of other people's.


def test_the_bases_own_zero_grad_is_called():
    class Base(torch.optim.SGD):
        cleared = 0

        def zero_grad(self):
            self.cleared += 1
            super().zero_grad()

    p = nn.Parameter(torch.ones(1))
    optimizer = FusedGAM([p], Base, lr=0.1)
    p.grad = torch.ones(1)
    optimizer.zero_grad()
    assert optimizer.base_optimizer.cleared == 1
    assert p.grad is None
    p.grad = torch.ones(1)
    FusedGAM([p], torch.optim.SGD, lr=0.1).zero_grad(set_to_none=False)
    assert p.grad == 0


def test_a_wrapper_that_does_not_call_torchs_constructor():
    """As published lookahead optimizers are: torch alone steps, saves and copies it."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, params, lr):
            self.inner = torch.optim.AdamW(params, lr=lr)
            self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults

        def step(self, closure=None):
            return self.inner.step(closure)

    p, q = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, plain = FusedGAM([p], Lookahead, lr=0.1, rho=0.0), torch.optim.AdamW([q], lr=0.1)
    for _ in range(3):
        optimizer.step(lambda: p.square().sum())
        plain.zero_grad()
        q.square().sum().backward()
        plain.step()
    torch.testing.assert_close(p, q)
    assert len(optimizer.state_dict()["state"]) == 1


# Frozen parameters of the optimizer's own groups.


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_parameter_that_the_closure_unfreezes_is_named(base):
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = FusedGAM([p, q], base, lr=0.1)

    def closure():
        q.requires_grad_(True)
        loss = (p * q).square().sum()
        loss.backward()
        q.requires_grad_(False)
        return loss

    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .*unfreeze"):
        optimizer.step(closure)
    assert p == q == 1
    assert p.grad is None
    assert q.grad is None


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_what_was_left_in_a_frozen_parameters_grad_moves_nothing(base):
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    q.grad = torch.ones(1)
    q.requires_grad_(False)
    FusedGAM([p, q], base, lr=0.1).step(lambda: p.sum())
    assert q == 1
    assert p != 1


# Loading.


def test_entries_of_the_users_own_in_the_state_may_have_any_shape():
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedGAM([p], torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(lambda: p.sum())
    optimizer.state[p]["mine"] = torch.arange(2.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["mine"].tolist() == [0, 1]


def trained(base, **options):
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedGAM([p], base, lr=0.1, **options)
    optimizer.step(lambda: p.sum())
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step(lambda: p.square().sum())
    return p, optimizer, saved


def test_a_hook_that_fails_after_loading_changes_nothing():
    _, optimizer, saved = trained(torch.optim.SGD, momentum=0.9)
    before = freeze(copy.deepcopy(optimizer.state_dict()))

    def hook(_):
        raise ValueError("not this one")

    optimizer.register_load_state_dict_post_hook(hook)
    with pytest.raises(ValueError, match="not this one"):
        optimizer.load_state_dict(saved)
    same(freeze(optimizer.state_dict()), before)


def test_a_base_that_loads_into_its_own_tensors_and_fails():
    class Base(torch.optim.RMSprop):
        def load_state_dict(self, state_dict):
            for p, entry in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
                for name, value in entry.items():
                    self.state[p][name].copy_(value)
            if "bad" in state_dict:
                raise ValueError("not this one")

    _, optimizer, saved = trained(Base)
    before = freeze(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match="not this one"):
        optimizer.load_state_dict({**saved, "bad": True})
    same(freeze(optimizer.state_dict()), before)
