"""Contract, point 2: all passes see the same random numbers, and the step uses up those of one pass."""

from __future__ import annotations

import copy
import itertools
import random

import numpy
import pytest
import torch
from gam_helpers import METHODS, PASSES, batch, closure_of, make, mlp, regression, trainer
from torch import nn

from gam_fused.step import session
from gam_fused.transaction import randomness
from gam_fused.transaction.randomness import source_of


class WatchedDropout(nn.Dropout):
    """Remembers which elements it kept."""

    def __init__(self):
        super().__init__(0.5)
        self.masks = []

    def forward(self, x):
        self.masks.append(super().forward(torch.ones_like(x)))
        return x * self.masks[-1]


def dropout_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), WatchedDropout(), nn.Linear(16, 2))


@pytest.mark.parametrize("method", METHODS)
def test_dropout_masks_are_the_same_in_all_passes(method):
    model = dropout_net()
    optimizer, closure = trainer(method, model, regression(model, *batch()))
    steps = []
    for _ in range(3):
        model[2].masks.clear()
        optimizer.step(closure)
        masks = list(model[2].masks)
        assert len(masks) == PASSES[method]
        assert all(torch.equal(m, masks[0]) for m in masks)
        steps.append(masks[0])
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[1], steps[2])


@pytest.mark.parametrize("oracle_method", ["finite_difference", "exact"])
def test_the_oracles_own_pass_is_replayed_too(oracle_method):
    model = dropout_net()
    optimizer, closure = trainer(oracle_method, model, regression(model, *batch()), oracle="sam", sam_rho=0.3)
    optimizer.step(closure)
    assert len(model[2].masks) == PASSES[oracle_method] + 1
    assert all(torch.equal(m, model[2].masks[0]) for m in model[2].masks)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_the_step_leaves_the_state_that_one_plain_pass_leaves(method, base):
    model = dropout_net()
    plain = copy.deepcopy(model)
    x, y = batch()
    optimizer, closure = trainer(method, model, regression(model, x, y), base)
    torch.manual_seed(7)
    for _ in range(3):
        regression(plain, x, y)().backward()
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_noise_drawn_by_the_closure_itself_is_replayed(method):
    model = mlp()
    x, y = batch()
    drawn = []

    def noisy():
        drawn.append(torch.randn_like(x))
        return regression(model, x + 0.1 * drawn[-1], y)()

    optimizer, closure = trainer(method, model, noisy)
    optimizer.step(closure)
    assert len(drawn) == PASSES[method]
    assert all(torch.equal(d, drawn[0]) for d in drawn)


def test_interval_off_steps_draw_once():
    model = dropout_net()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()), interval=3)
    for _ in range(3):
        optimizer.step(closure)
    masks = model[2].masks
    assert len(masks) == 4 + 1 + 1
    assert all(torch.equal(m, masks[0]) for m in masks[:4])
    assert not torch.equal(masks[4], masks[0])
    assert not torch.equal(masks[5], masks[4])


@pytest.mark.parametrize("method", ["sam", "finite_difference", "accelerated"])
def test_preserve_rng_state_false_draws_anew_in_each_pass(method):
    model = dropout_net()
    optimizer, closure = trainer(method, model, regression(model, *batch()), preserve_rng_state=False)
    optimizer.step(closure)
    masks = model[2].masks
    assert len(masks) == PASSES[method]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(masks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_leaves_the_users_generator_alone(dtype):
    model = mlp(dtype)
    optimizer = make(model.parameters())
    closure = closure_of(optimizer, regression(model, *batch(dtype=dtype)))
    before = torch.get_rng_state()
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), before)


def _numpy_normal():
    return torch.from_numpy(numpy.random.randn(3))  # draws pairs, and keeps one in stock


GLOBAL = {
    "torch": lambda: torch.rand(3),
    "random": lambda: torch.tensor([random.random() for _ in range(3)]),
    "random, words anew": lambda: torch.tensor([random.random() for _ in range(400)][-3:]),
    "random, a whole turn": lambda: torch.tensor([random.random() for _ in range(312)][-3:]),  # the position comes back
    "random.gauss": lambda: torch.tensor([random.gauss(0, 1) for _ in range(3)]),
    "numpy": lambda: torch.from_numpy(numpy.random.rand(3)),
    "numpy normal": _numpy_normal,
    "random.gauss, one of a pair": lambda: torch.tensor([random.gauss(0, 1)]),
    "numpy normal, one of a pair": lambda: torch.from_numpy(numpy.random.randn(1)),
}
OWN = {
    "torch.Generator": lambda: (g := torch.Generator().manual_seed(0), lambda: torch.rand(3, generator=g)),
    "numpy.random.Generator": lambda: (g := numpy.random.default_rng(0), lambda: torch.from_numpy(g.random(3))),
    "numpy.random.RandomState": lambda: (g := numpy.random.RandomState(0), lambda: torch.from_numpy(g.randn(3))),
    "random.Random": lambda: (g := random.Random(0), lambda: torch.tensor([g.gauss(0, 1) for _ in range(3)])),
}


def draws_of_steps(draw, method, seed=lambda: None, steps=3, **options):
    """What each pass of some steps drew, and what comes after them."""
    model, seen = mlp(), []
    seed()

    def loss_fn():
        seen.append(draw())
        return regression(model, *batch())()

    optimizer, closure = trainer(method, model, loss_fn, lr=0.0, **options)
    for _ in range(steps):
        optimizer.step(closure)
    return [seen[i : i + PASSES[method]] for i in range(0, len(seen), PASSES[method])], draw()


def check_draws(draws, after, expected):
    """All passes of a step drew alike, each step what one pass alone would have, and so goes what follows."""
    for passes, once in zip(draws, expected, strict=False):
        assert all(torch.equal(d, once) for d in passes)
    assert torch.equal(after, expected[-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GLOBAL)
def test_global_generators_are_replayed(name, method):
    draw = GLOBAL[name]

    def seed():
        torch.manual_seed(3), random.seed(3), numpy.random.seed(3)

    seed()
    expected = [draw() for _ in range(4)]
    check_draws(*draws_of_steps(draw, method, seed), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OWN)
def test_generators_of_the_users_own_are_replayed_where_given(name, method):
    _, draw = OWN[name]()
    expected = [draw() for _ in range(4)]
    generator, draw = OWN[name]()
    check_draws(*draws_of_steps(draw, method, generators=[generator]), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_second_of_a_pair_of_normal_numbers_is_replayed_after_the_same_seed(method):
    """numpy's words are then the same as in the step before, and only the number in stock is not."""
    model, seen = mlp(), []

    def loss_fn():
        seen.append(numpy.random.randn(1)[0])
        return regression(model, *batch())()

    optimizer, closure = trainer(method, model, loss_fn, lr=0.0)
    for _ in range(3):
        numpy.random.seed(0)
        numpy.random.randn(1)
        optimizer.step(closure)
    assert len(set(seen)) == 1


def test_passes_that_draw_less_leave_what_the_first_left():
    """As one may on a part of the mini-batch."""
    calls = []

    def draw():
        calls.append(torch.rand(3 if len(calls) % 4 == 0 else 1))
        return calls[-1]

    torch.manual_seed(3)
    expected = [torch.rand(3) for _ in range(4)]
    draws, after = draws_of_steps(draw, "finite_difference", lambda: torch.manual_seed(3))
    for (first, *others), once in zip(draws, expected, strict=False):
        assert torch.equal(first, once)
        assert all(torch.equal(d, once[:1]) for d in others)
    assert torch.equal(after, expected[-1])


@pytest.mark.parametrize("kind", ["PCG64", "MT19937"])
def test_another_global_generator(kind, monkeypatch):
    monkeypatch.setattr(randomness, "_NUMPY", [])  # nothing is known of the one before but what these steps learn
    model, seen = mlp(), []
    optimizer = make(model.parameters())
    before = numpy.random.get_bit_generator()

    def closure():
        seen.append(numpy.random.rand())
        return regression(model, *batch())()

    optimizer.step(closure)
    numpy.random.set_bit_generator(getattr(numpy.random, kind)(0))
    try:
        for _ in range(2):
            optimizer.step(closure)
    finally:
        numpy.random.set_bit_generator(before)
    assert [len(set(seen[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(seen)) == 3


def test_what_is_no_generator_is_refused():
    with pytest.raises(TypeError, match=r"generators=.*int"):
        make(mlp().parameters(), generators=[3])


@pytest.mark.parametrize("name", GLOBAL)
def test_a_failure_puts_global_generators_back(name):
    draw, model = GLOBAL[name], mlp()
    optimizer = make(model.parameters())
    for k in range(3):
        state, calls = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()), []

        def closure(calls=calls, k=k):
            draw()
            calls.append(1)
            if len(calls) == k + 1:
                raise RuntimeError("bad batch")
            return regression(model, *batch())()

        with pytest.raises(RuntimeError, match="bad batch"):
            optimizer.step(closure)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), state[2], strict=True))


class Noisy(torch.optim.SGD):
    """Langevin dynamics: SGD that adds noise in every step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p) * random.random(), alpha=group["lr"] ** 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_draws_gets_new_numbers_in_every_step(method):
    """The generators stand where pass 1 and then the base's update leave them: as in a plain loop with dropout."""
    model, twin = (nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    options = {
        "sam": {"rho": 0.0},
        "accelerated": {"rho": 0.0, "alpha": 1.0, "gamma": 0.0, "rho_prime": 1e-30},
        "gsam": {"rho": 0.0, "alpha": 0.0},
    }
    optimizer = make(model.parameters(), Noisy, method, lr=0.01, **options.get(method, {"alpha": 0.0}))
    plain = Noisy(twin.parameters(), lr=0.01)
    for o, m in ((optimizer, model), (plain, twin)):
        torch.manual_seed(0), random.seed(0)
        for _ in range(4):
            closure = closure_of(o, regression(m, *batch()))
            o.step(closure) if o is optimizer else (closure(), o.step())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_devices_of_the_plan_and_of_the_model_have_generators(monkeypatch):
    monkeypatch.setattr(session, "Generators", lambda devices, own: devices)
    optimizer = make(mlp().parameters())
    optimizer.prepare()
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert optimizer.session.generators_of({other}) == {cpu, other}
    assert optimizer.session.generators_of(set()) == {cpu}


def test_generators_can_be_set_and_are_not_copied():
    model, generator = mlp(), torch.Generator()
    optimizer = make(model.parameters(), generators=[generator])
    assert copy.deepcopy(optimizer).generators == ()
    draws = []

    def closure():
        draws.append(torch.rand(3, generator=generator))
        return regression(model, *batch())()

    optimizer.generators = ()
    optimizer.step(closure)
    assert not torch.equal(draws[0], draws[1])
    optimizer.generators = (generator,)
    optimizer.step(closure)
    assert torch.equal(draws[-1], draws[-2])


@pytest.mark.parametrize("kind", ["drawn", "seeded", "a pair of normal numbers", "not touched"])
def test_pythons_random_state_is_read_again_where_it_has_changed(kind):
    """It is read where CPython keeps it, which takes less time than asking for it."""
    generator = random.Random(3)
    source = source_of(generator)
    before = source.read()
    assert source.read() is before
    assert before == generator.getstate()
    if kind == "drawn":
        generator.random()
    elif kind == "seeded":
        generator.seed(4)
    elif kind == "a pair of normal numbers":
        generator.gauss(0.0, 1.0)
        source.read()
        generator.gauss(0.0, 1.0)  # the other of the pair: no word is drawn
    assert source.read() == generator.getstate()
    assert source.is_at(before) is (kind == "not touched" and source.read() is before)
    source.write(before)
    assert generator.getstate() == before


def test_a_generator_that_keeps_its_state_elsewhere_is_asked():
    class Own(random.Random):
        pass

    source = source_of(Own(3))
    assert source.read() == Own(3).getstate()
    assert not source.is_at(source.read())


def test_a_state_that_gains_an_entry_has_changed():
    class Counting:
        """A generator that numbers what it draws, of which there is no word before the first."""

        def __init__(self):
            self.bit_generator = self
            self.state = {}

        def draw(self):
            self.state = {"drawn": self.state.get("drawn", 0) + 1}
            return torch.tensor([self.state["drawn"]])

    generator = Counting()
    draws, after = draws_of_steps(generator.draw, "finite_difference", generators=[generator])
    check_draws(draws, after, [torch.tensor([n]) for n in (1, 2, 3, 4)])
