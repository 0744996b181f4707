"""Every pass starts from the same buffers and frozen parameters, and the step leaves them as its first pass did."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, freeze, make, same, weights
from torch import nn

from gam_fused import FusedGAM, FusedSAM
from gam_fused.transaction import model_state


class Queue(nn.Module):
    """A memory queue: the forward reads it, then writes the newest features at its pointer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, 6))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(8, dtype=torch.bool))

    def forward(self, x):
        out = x + self.queue.mean(0)
        rows = (self.at + torch.arange(4)) % 8
        self.queue[rows] = x[:4].detach()
        self.seen[rows] = True
        self.at += 4
        return out


class Codebook(nn.Module):
    """An EMA codebook that is assigned, not written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(6))

    def forward(self, x):
        out = x * self.codes
        self.codes = 0.9 * self.codes + 0.1 * x.detach().abs().mean(0)
        return out


class Data(Codebook):
    """The same through `.data`."""

    def forward(self, x):
        out = x * self.codes
        self.codes.data = 0.9 * self.codes.data + 0.1 * x.detach().abs().mean(0)
        return out


class InPlaceData(Codebook):
    def forward(self, x):
        out = x * self.codes
        self.codes.data.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return out


class Grows(nn.Module):
    """A buffer whose shape the forward changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("past", torch.ones(1, 6))

    def forward(self, x):
        out = x * self.past.mean(0)
        self.past.resize_(len(self.past) + 1, 6)[-1] = x.detach()[0]
        return out


class Late(nn.Module):
    """Its buffer comes with the first forward, by itself or inside a module of its own."""

    def __init__(self, inside: bool):
        super().__init__()
        self.register_buffer("from_the_start", torch.ones(6))
        self.inside, self.made = inside, False

    def forward(self, x):
        if not self.made:
            self.made = True
            if self.inside:
                self.child = nn.BatchNorm1d(6, affine=False)
                self.child.register_buffer("scale", torch.ones(6))
            else:
                self.register_buffer("scale", torch.ones(6))
        owner = self.child if self.inside else self
        out = x * owner.scale.clone()
        owner.scale.mul_(0.5)
        return out


class Encoder(nn.Module):
    """A momentum encoder: frozen parameters that every forward moves towards the trained ones, then reads."""

    def __init__(self, how: str, frozen_too: int = 0):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.k = copy.deepcopy(self.q).requires_grad_(False)
        self.large = nn.Linear(6, frozen_too).requires_grad_(False) if frozen_too else None
        self.how = how
        with torch.no_grad():
            self.k.weight.zero_()

    def forward(self, x):
        with torch.no_grad():
            for a, b in zip(self.q.parameters(), self.k.parameters(), strict=True):
                if self.how == "in place":
                    b.mul_(0.9).add_(a, alpha=0.1)
                elif self.how == "data in place":
                    b.data.mul_(0.9).add_(a.data, alpha=0.1)
                else:
                    b.data = 0.9 * b.data + 0.1 * a.data
        return self.q(x) - self.k(x)


class Follower(nn.Module):
    """A target network that the forward reads, then replaces."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.k = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)

    def forward(self, x):
        out = self.q(x) - self.k(x)
        self.k = copy.deepcopy(self.k)
        with torch.no_grad():
            self.k[0].weight.lerp_(self.q.weight, 0.1)
        return out


class Changing(nn.Module):
    """Its layer is another one in every forward."""

    def __init__(self):
        super().__init__()
        self.now = nn.Softplus()

    def forward(self, x):
        out = self.now(x)
        self.now = nn.Tanh() if isinstance(self.now, nn.Softplus) else nn.Softplus()
        return out


NETS = {
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(6, 2))
    ),
    "spectral_norm_parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2)
    ),
    "queue": lambda: nn.Sequential(nn.Linear(6, 6), Queue(), nn.Linear(6, 2)),
    "codebook": lambda: nn.Sequential(nn.Linear(6, 6), Codebook(), nn.Linear(6, 2)),
    "data": lambda: nn.Sequential(nn.Linear(6, 6), Data(), nn.Linear(6, 2)),
    "data in place": lambda: nn.Sequential(nn.Linear(6, 6), InPlaceData(), nn.Linear(6, 2)),
    "grows": lambda: nn.Sequential(nn.Linear(6, 6), Grows(), nn.Linear(6, 2)),
    "late": lambda: nn.Sequential(nn.Linear(6, 6), Late(False), nn.Linear(6, 2)),
    "late module": lambda: nn.Sequential(nn.Linear(6, 6), Late(True), nn.Linear(6, 2)),
    "encoder": lambda: nn.Sequential(Encoder("in place"), nn.Linear(6, 2)),
    "encoder, data": lambda: nn.Sequential(Encoder("data"), nn.Linear(6, 2)),
    "encoder, data in place": lambda: nn.Sequential(Encoder("data in place"), nn.Linear(6, 2)),
    "follower": lambda: nn.Sequential(Follower(), nn.Linear(6, 2)),
    "changing": lambda: nn.Sequential(nn.Linear(6, 6), Changing(), nn.Linear(6, 2)),
    "encoder, data, beside much": lambda: nn.Sequential(Encoder("data", 100), nn.Linear(6, 2)),
}


def net(name):
    torch.manual_seed(0)
    return NETS[name]()


def moved(model, optimizer):
    """All that is not trained."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    tensors = {**dict(model.named_buffers()), **{n: p for n, p in model.named_parameters() if id(p) not in trained}}
    return freeze(tensors)


def trained_of(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("name", NETS)
def test_at_equal_weights_all_passes_compute_the_same_loss(name, backend):
    model = net(name)
    x, _ = batch(features=(6,))
    losses = []

    def closure():
        loss = model(x).square().mean()
        losses.append(loss.item())
        return loss

    optimizer = FusedGAM(trained_of(model), torch.optim.SGD, lr=0.0, rho=0.0, rho_prime=1e-30, model=model, backend=backend)
    for _ in range(3):
        losses.clear()
        optimizer.step(closure)
        assert len(losses) == 4
        assert len(set(losses)) == 1, losses
    assert optimizer.diagnostics()["sharpness"] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_the_step_leaves_what_one_forward_leaves(name, method):
    model = net(name)
    twin = copy.deepcopy(model)
    x, _ = batch(features=(6,))
    optimizer = make(trained_of(model), method=method, lr=0.0, model=model)
    for i in range(3):
        optimizer.step(lambda: model(x).square().mean())
        twin(x)
        same(moved(model, optimizer), moved(twin, make(trained_of(twin), method=method)), f"step {i}")


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("name", [n for n in NETS if not n.startswith("late")])
def test_a_failure_restores_all_of_it(name, bad):
    model = net(name)
    x, _ = batch(features=(6,))
    calls = []

    def closure():
        calls.append(1)
        loss = model(x).square().mean()
        if fails and len(calls) == bad + 1:
            raise RuntimeError("bad batch")
        return loss

    optimizer, fails = make(trained_of(model), model=model), False
    optimizer.step(closure)
    before, fails = (weights(optimizer), moved(model, optimizer)), True
    calls.clear()
    with pytest.raises(RuntimeError, match="bad batch"):
        optimizer.step(closure)
    same([weights(optimizer), moved(model, optimizer)], list(before))


def test_a_skipped_step_leaves_all_of_it_as_before():
    for name in NETS:
        if name.startswith("late"):
            continue
        model = net(name)
        x, _ = batch(features=(6,))
        optimizer, factor = make(trained_of(model), model=model), 1.0
        optimizer.step(lambda model=model, x=x: model(x).square().mean())
        before = weights(optimizer), moved(model, optimizer)
        factor = float("inf")
        optimizer.step(lambda model=model, x=x, factor=factor: model(x).square().mean() * factor)
        assert optimizer.skipped_steps == 1
        same([weights(optimizer), moved(model, optimizer)], list(before), name)


def test_a_large_frozen_part_is_neither_copied_nor_looked_for_in_vain(monkeypatch):
    """A frozen backbone under a small head: its memory is never read."""
    monkeypatch.setattr(model_state, "_COPIED_TO_LEARN", 0)
    model = nn.Sequential(nn.Linear(6, 300).requires_grad_(False), nn.ReLU(), nn.Linear(300, 2))
    optimizer = FusedGAM(model[2].parameters(), torch.optim.SGD, lr=0.1, model=model)
    x, _ = batch(features=(6,))
    optimizer.step(lambda: model(x).square().mean())
    state = optimizer.session.model_state
    assert state.begin()._layout.frozen == []
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2))
    optimizer = FusedGAM(trained_of(model), torch.optim.SGD, lr=0.1, model=model)
    for _ in range(8):
        optimizer.step(lambda: model(x).square().mean())
    assert optimizer.session.model_state.begin()._layout.frozen == [], "copied a few times, then known not to move"


def test_a_large_frozen_part_is_not_copied_where_buffers_are_replaced(monkeypatch):
    monkeypatch.setattr(model_state, "_COPIED_TO_LEARN", 0)
    monkeypatch.setattr(model_state, "_TIMES_TRAINED", 0)
    model, states = nn.Sequential(nn.Linear(6, 300).requires_grad_(False), nn.Linear(300, 6), Codebook()), []
    done = model_state.StepState.first_pass_done
    monkeypatch.setattr(model_state.StepState, "first_pass_done", lambda state: (done(state), states.append(state)))
    optimizer = FusedGAM(model[1:].parameters(), torch.optim.SGD, lr=0.1, model=model)
    x, _ = batch(features=(6,))
    optimizer.step(lambda: model(x).square().mean())
    assert states[0]._after is not states[0]._layout
    assert states[0]._after.frozen == []


def test_a_frozen_parameter_that_begins_to_move_later():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)
            self.moves = False

        def forward(self, x):
            if self.moves:
                with torch.no_grad():
                    self.k.weight.mul_(0.5)
            return self.q(x) - self.k(x)

    model = Model()
    x, _ = batch(features=(6,))
    optimizer = FusedGAM(model.q.parameters(), torch.optim.SGD, lr=0.0, model=model)
    optimizer.step(lambda: model(x).square().mean())
    model.moves, before = True, model.k.weight.clone()
    for i in range(3):
        optimizer.step(lambda: model(x).square().mean())
        torch.testing.assert_close(model.k.weight, before * 0.5 ** (i + 1), rtol=0, atol=0)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("bad", [None, 0, 2])
def test_a_closure_may_leave_the_model_in_another_training_mode(bad, others):
    """As one that ends with an evaluation does: every pass starts in training mode, as under torch alone."""
    model = net("late").append(nn.BatchNorm1d(2)).append(nn.Dropout(0.5))
    x, _ = batch(features=(6,))
    modes = []

    def closure():
        modes.append([m.training for m in model])
        loss = model(x).square().mean()
        model.train(others and len(modes) > 1)
        if len(modes) - 1 == bad:
            raise RuntimeError("bad batch")
        return loss

    optimizer = make(model)
    if bad is None:
        optimizer.step(closure)
        assert not any(m.training for m in model), "as the first pass left them"
    else:
        with pytest.raises(RuntimeError, match="bad batch"):
            optimizer.step(closure)
        assert all(m.training for m in model)
    assert all(map(all, modes)), modes


def test_training_modes_are_put_back_without_a_call_of_a_modules_own_train():
    """One may do more, as one that merges an adapter into its weights."""
    calls = []

    class Merging(nn.Linear):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    model = nn.Sequential(Merging(6, 6), nn.Dropout(0.5))
    x, _ = batch(features=(6,))

    def closure():
        loss = model(x).square().mean()
        model.eval()
        return loss

    make(model).step(closure)
    assert calls == [False] * 4


def test_activation_checkpointing_moves_buffers_as_in_one_pass():
    """The recomputation in backward moves batch norm a second time, as under torch alone."""
    from torch.utils.checkpoint import checkpoint

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))

    def loss(model):
        return model[3](checkpoint(model[:3], x, use_reentrant=False)).square().mean()

    x, _ = batch(features=(6,))
    model, twin = build(), build()
    optimizer = FusedGAM(model.parameters(), torch.optim.SGD, lr=0.0, model=model)
    optimizer.step(lambda: loss(model))
    loss(twin).backward()
    same(freeze(dict(model.named_buffers())), freeze(dict(twin.named_buffers())))


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("what", ["buffer", "frozen", "slice", "last element"])
def test_what_lies_in_a_trained_parameters_memory_is_left_alone(what, backend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3, 1)
            if what == "frozen":
                self.w = nn.Parameter(self.l.weight.detach(), requires_grad=False)
            else:
                of_weight = {"buffer": slice(None), "slice": slice(1, None), "last element": slice(2, None)}[what]
                self.register_buffer("w", self.l.weight.detach()[:, of_weight])

        def forward(self, x):
            return self.l(x)

    torch.manual_seed(0)
    model, twin = Net(), nn.Linear(3, 1)
    twin.load_state_dict(model.l.state_dict())
    x = torch.randn(8, 3)
    for m, params, module in ((model, model.l.parameters(), model), (twin, twin.parameters(), None)):
        optimizer = FusedSAM(params, torch.optim.SGD, lr=0.1, model=module, backend=backend)
        for _ in range(3):
            optimizer.step(lambda m=m: m(x).square().mean())
    same(freeze(model.l.weight), freeze(twin.weight))


@pytest.mark.parametrize("first", ["buffer", "weight"])
def test_a_buffer_next_to_a_weight_in_memory_moves_once(first):
    """As in one flat buffer of all of a model's tensors."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            one, other = torch.ones(12).split(6)
            self.weight = nn.Parameter(other if first == "buffer" else one)
            self.register_buffer("scale", one if first == "buffer" else other)

        def forward(self):
            self.scale.mul_(0.5)
            return (self.weight * self.scale.clone()).square().sum()

    model = Net()
    optimizer = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for i in range(2):
        optimizer.step(model)
        assert torch.equal(model.scale, torch.full((6,), 0.5 ** (i + 1)))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["assigned", "grown"])
def test_a_buffer_that_later_passes_alone_replace_or_reshape(how, fails):
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.register_buffer("t", torch.ones(1, 6))

        def forward(self, x):
            seen.append(float(self.t.sum()))
            out = super().forward(x) * self.t.sum()
            if len(seen) > 1:
                if how == "assigned":
                    self.t = 2 * self.t
                else:
                    self.t.resize_(len(self.t) + 1, 6)[-1] = 1.0
            return out

    def loss():
        result = model(x).square().mean()
        if fails and len(seen) == 3:
            raise MemoryError
        return result

    seen, (x, _) = [], batch(features=(6,))
    model = Net()
    t, optimizer = model.t, FusedGAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    if fails:
        with pytest.raises(MemoryError):
            optimizer.step(loss)
    else:
        optimizer.step(loss)
    assert seen == [6.0] * (3 if fails else 4)
    assert model.t is t
    assert torch.equal(t, torch.ones(1, 6))


def test_a_parameter_swapped_by_the_closure_is_named():
    """A module that puts a fresh Parameter into the optimizer during its forward, as partial softmax layers do."""
    model = nn.Linear(4, 8)
    table = [nn.Parameter(torch.zeros(0, 8))]
    optimizer = FusedSAM([{"params": model.parameters()}, {"params": table}], torch.optim.SGD, lr=0.1)
    x, before = torch.randn(16, 4), freeze(model.weight)

    def closure():
        table[0] = optimizer.param_groups[1]["params"][0] = nn.Parameter(torch.ones(10, 8))
        return (model(x) @ table[0].T).square().mean()

    with pytest.raises(RuntimeError, match=r"parameter 0 of group 1 .*shape \(0, 8\)"):
        optimizer.step(closure)
    same(freeze(model.weight), before)


MOVES = {
    "data": lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    "double and back": lambda m: m.double().float(),
    "another dtype": lambda m: m.double(),
    "turned": lambda m: setattr(m.weight, "data", m.weight.data.t().contiguous().t()),
}


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_parameter_moved_by_the_closure_is_named_and_restored(move, k, backend):
    torch.manual_seed(0)
    model, calls = nn.Linear(4, 4), []
    optimizer = FusedGAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    x = torch.randn(8, 4)
    before, parameter = freeze(list(model.parameters())), model.weight

    def closure():
        calls.append(1)
        if len(calls) == k + 1:
            move(model)
        return model(x.to(model.weight.dtype)).square().mean()

    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(.*other memory"):
        optimizer.step(closure)
    same(freeze(list(model.parameters())), before)
    assert model.weight is parameter
    assert not optimizer.state
    optimizer.step(lambda: model(x).square().mean())
    assert not torch.equal(freeze(model.weight), before[0])


class Holds(nn.Module):
    """Something with a buffer."""

    def __init__(self, t):
        super().__init__()
        self.register_buffer("t", t)


@pytest.mark.parametrize("kind", ["loss", "container", "weighted loss"])
def test_modules_that_the_closure_makes_for_itself_are_not_the_models(kind, monkeypatch):
    """On a GPU the host would wait in every step, and nothing of it could be captured."""
    model, made = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), []
    x, y = batch(features=(6,))[0], torch.arange(8) % 6

    def closure():
        if kind == "container":
            return nn.Sequential(model, nn.CrossEntropyLoss(torch.ones(6)))[0](x[:8]).square().mean()
        loss_fn = nn.CrossEntropyLoss(torch.ones(6) if kind == "weighted loss" else None)
        made.append(weakref.ref(loss_fn))
        return loss_fn(model(x[:8]), y)

    optimizer, states = FusedGAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model), []
    finish = model_state.StepState.finish
    monkeypatch.setattr(model_state.StepState, "finish", lambda state, flag: (states.append(state), finish(state, flag)))
    for _ in range(2):
        optimizer.step(closure)
        state = states.pop()
        assert state._after is state._layout, "the quick way"
        assert not state._late._initial
    assert all(m() is None for m in made)


def test_a_module_made_by_the_closure_around_a_weight_moves_none():
    model, seen = nn.Linear(6, 6), []
    x, _ = batch(features=(6,))

    def closure():
        Holds(model.weight.detach())
        seen.append(model.weight.detach().clone())
        return model(x).square().mean()

    FusedGAM(model.parameters(), torch.optim.SGD, lr=0.0, model=model).step(closure)
    assert all(not torch.equal(w, seen[0]) for w in seen[1:]), "passes 2 to 4 are at perturbed weights"


def test_a_buffer_that_comes_late_around_a_weight_moves_none():
    class Net(nn.Linear):
        def forward(self, x):
            if "t" not in self._buffers:
                self.register_buffer("t", self.weight.detach())
            seen.append(self.weight.detach().clone())
            return super().forward(x)

    model, seen = Net(6, 6), []
    x, _ = batch(features=(6,))
    FusedGAM(model.parameters(), torch.optim.SGD, lr=0.0, model=model).step(lambda: model(x).square().mean())
    assert all(not torch.equal(w, seen[0]) for w in seen[1:])


@pytest.mark.parametrize("part", ["module", "buffer"])
def test_a_part_of_the_model_in_a_module_of_the_closures_starts_where_pass_1_did(part):
    """With two micro-batches, the second module is made when the first batch has moved the buffers."""
    model, seen = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), []
    x, _ = batch(features=(6,))

    def around():
        if part == "buffer":
            Holds(model[1].running_mean)
        return model if part == "buffer" else nn.Sequential(model, nn.Tanh())

    def closure():
        seen.append(freeze(model[1].running_mean))
        return sum(around()(half).square().mean() for half in x.chunk(2))

    FusedGAM(model.parameters(), torch.optim.SGD, lr=0.0, model=model).step(closure)
    for mean in seen[1:]:
        same(mean, seen[0])
