"""Bad input: each case raises an error that names the culprit, and nothing is lost."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from gam_helpers import METHODS, batch, closure_of, make, mlp, regression, same, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from gam_fused import FusedGAM, FusedSAM, flatness
from gam_fused.memory import differentiated
from gam_fused.methods import TAKES

NAN, INF = float("nan"), float("inf")
HYPERPARAMETERS = [
    ({"rho": -0.1}, "rho", "-0.1", "0"),
    ({"rho": NAN}, "rho", "nan", "finite"),
    ({"rho": INF}, "rho", "inf", "finite"),
    ({"rho_prime": 0.0}, "rho_prime", "0.0", "greater"),
    ({"rho_prime": -1.0}, "rho_prime", "-1.0", "greater"),
    ({"rho_prime": NAN}, "rho_prime", "nan", "finite"),
    ({"alpha": NAN}, "alpha", "nan", "finite"),
    ({"alpha": INF, "max_ratio": None}, "alpha", "inf", "finite"),
    ({"max_ratio": INF}, "max_ratio", "inf", "finite"),
    ({"max_ratio": -0.5}, "max_ratio", "-0.5", "at least 0"),
    ({"flatness_fraction": 0.0}, "flatness_fraction", "0.0", "greater than 0"),
    ({"flatness_fraction": 2.0}, "flatness_fraction", "2.0", "at most 1"),
    ({"alpha": (0.1, 0.2)}, "alpha", "(0.1, 0.2)", "accelerated"),
    ({"method": "accelerated", "gamma": -0.5}, "gamma", "-0.5", "0"),
    ({"method": "accelerated", "gamma": NAN}, "gamma", "nan", "finite"),
    ({"method": "accelerated", "beta": NAN}, "beta", "nan", "finite"),
    ({"method": "accelerated", "beta": 1.5}, "beta", "1.5", "between 0 and 1"),
    ({"method": "accelerated", "alpha": (0.1, NAN)}, "alpha", "nan", "finite"),
    ({"method": "accelerated", "alpha": (0.1, 0.2, 0.3)}, "alpha", "(0.1, 0.2, 0.3)", "pair"),
    ({"method": "accelerated", "oracle": "sam"}, "oracle", "sam", "finite_difference"),
    ({"method": "sam", "oracle": "sam"}, "oracle", "sam", "finite_difference"),
    ({"method": "sharp"}, "method", "sharp", "accelerated"),
    ({"oracle": "adam"}, "oracle", "adam", "loss"),
    ({"backend": "quantum"}, "backend", "quantum", "reference"),
    ({"interval": 0}, "interval", "0", "1"),
    ({"interval": -3}, "interval", "-3", "1"),
    ({"oracle": "sam", "sam_rho": -1.0}, "sam_rho", "-1.0", "0"),
    ({"oracle": "sam", "sam_rho": NAN}, "sam_rho", "nan", "finite"),
    ({"xi": -1.0}, "xi", "-1.0", "0"),
    ({"xi": NAN}, "xi", "nan", "finite"),
    ({"max_grad_norm": 0.0}, "max_grad_norm", "0.0", "greater"),
    ({"max_grad_norm": NAN}, "max_grad_norm", "nan", "finite"),
    ({"perturb_sync": "sometimes"}, "perturb_sync", "sometimes", "global"),
]
TYPES = [
    ({"rho": "big"}, "rho", "big"),
    ({"interval": 1.5}, "interval", "1.5"),
    ({"momentun": 0.9}, "momentun", "SGD"),
    ({"model": "resnet"}, "model", "resnet"),
    ({"grad_scaler": 1024}, "grad_scaler", "1024"),
    ({"base_optimizer": "SGD"}, "base_optimizer", "SGD"),
    ({"base_optimizer": nn.Linear}, "Linear", ""),
]


def _id(case):
    return "-".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else None


@pytest.mark.parametrize(("options", "name", "value", "allowed"), HYPERPARAMETERS, ids=_id)
def test_hyperparameters_are_refused_by_name_and_value(options, name, value, allowed):
    built = []

    def factory(params):
        built.append(params)
        return torch.optim.SGD(params, lr=0.1)

    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        FusedGAM(mlp().parameters(), factory, **options)
    assert value in str(caught.value)
    assert allowed in str(caught.value)
    assert not built, "checked before anything is built"


@pytest.mark.parametrize(("options", "name", "value"), TYPES, ids=_id)
def test_wrong_types_and_unknown_names(options, name, value):
    with pytest.raises(TypeError) as caught:
        FusedGAM(
            mlp().parameters(),
            **{"base_optimizer": torch.optim.SGD, **({"lr": 0.1} if "base" not in str(options) else {}), **options},
        )
    assert name in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize("name", ["rho", "perturb"])
def test_group_entries_are_checked(name):
    model = mlp()
    bad = {"rho": -0.5, "perturb": 0.5}[name]
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), name: bad}]
    with pytest.raises((ValueError, TypeError), match=rf"{name}(.|\n)*{re.escape(str(bad))}"):
        make(groups)
    optimizer = make(model[0].parameters())
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.add_param_group({"params": model[2].parameters(), name: bad})
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1


NONSENSE = [("rho", NAN), ("rho", -1.0), ("alpha", NAN), ("rho_prime", 0.0), ("gamma", -1.0)]


@pytest.mark.parametrize(
    ("method", "name", "bad"),
    [(m, *case) for m in METHODS for case in NONSENSE if getattr(TAKES[m], case[0]) is not None],
)
def test_hyperparameters_changed_to_nonsense_are_refused_by_the_step(method, name, bad):
    model = mlp()
    optimizer = make(model.parameters(), method=method)
    closure = closure_of(optimizer, regression(model, *batch()))
    optimizer.step(closure)
    good = optimizer.param_groups[0]["rho"] if name == "rho" else getattr(optimizer, name)
    before = snapshot(optimizer)["weights"]

    def put(value):
        if name == "rho":
            optimizer.param_groups[0]["rho"] = value
        else:
            setattr(optimizer, name, value)

    put(bad)
    with pytest.raises(ValueError, match=name):
        optimizer.step(closure)
    put(good)
    same(snapshot(optimizer)["weights"], before)
    optimizer.step(closure)


@pytest.mark.parametrize(
    ("base", "name", "bad"),
    [
        (torch.optim.SGD, "lr", NAN),
        (torch.optim.SGD, "lr", torch.tensor(NAN)),
        (torch.optim.SGD, "lr", None),
        (torch.optim.SGD, "weight_decay", NAN),
        (torch.optim.SGD, "momentum", INF),
        (torch.optim.AdamW, "eps", NAN),
        (torch.optim.AdamW, "betas", (NAN, 0.9)),
    ],
    ids=_id,
)
def test_the_bases_hyperparameters_changed_to_nonsense_are_refused_by_the_step(base, name, bad):
    model = mlp()
    optimizer = make(model.parameters(), base)
    closure = closure_of(optimizer, regression(model, *batch()))
    optimizer.step(closure)
    before, good = snapshot(optimizer), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = bad
    with pytest.raises((ValueError, TypeError), match=f"{name.replace('betas', 'beta1')} of group 0.*(nan|inf|None)"):
        optimizer.step(closure)
    optimizer.param_groups[0][name] = good
    same(snapshot(optimizer), before)
    optimizer.step(closure)


def test_a_base_that_is_not_fused_may_have_no_learning_rate():
    model = mlp()
    optimizer = make(model.parameters(), torch.optim.RMSprop)
    step = optimizer.base_optimizer.step

    def own_rate():
        optimizer.param_groups[0]["lr"] = 0.01
        step()
        optimizer.param_groups[0]["lr"] = None

    optimizer.base_optimizer.step, optimizer.param_groups[0]["lr"] = own_rate, None
    before = snapshot(optimizer)["weights"]
    optimizer.step(closure_of(optimizer, regression(model, *batch())))
    assert all(not torch.equal(a, b) for a, b in zip(snapshot(optimizer)["weights"], before, strict=True))
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()


@pytest.mark.parametrize("base_keyword", [{"lr": -1.0}, {"momentum": -0.5}, {"nesterov": True}], ids=_id)
def test_the_bases_own_checks_are_heard(base_keyword):
    with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
        FusedGAM(mlp().parameters(), torch.optim.SGD, **{"lr": 0.1, **base_keyword})


@pytest.mark.parametrize("params", [[], (), [{"params": []}]], ids=["list", "tuple", "group"])
def test_no_parameters(params):
    def run():
        make(params).step(lambda: torch.zeros((), requires_grad=True))

    with pytest.raises((ValueError, RuntimeError), match=r"empty|no param"):
        run()


def test_params_none_needs_an_instance():
    with pytest.raises((ValueError, TypeError), match="instance"):
        FusedGAM(None, torch.optim.SGD, lr=0.1)


def test_an_instance_with_other_parameters_or_keywords():
    base = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="instance"):
        FusedGAM(mlp().parameters(), base)
    with pytest.raises((ValueError, TypeError), match="momentum"):
        FusedGAM(None, base, momentum=0.9)


def test_fused_sam_has_one_method():
    with pytest.raises(TypeError, match="method"):
        FusedSAM(mlp().parameters(), torch.optim.SGD, method="exact", lr=0.1)


def interleaved():
    whole = torch.zeros(6)
    return [whole[:4].requires_grad_(), whole[2:].requires_grad_()]


PARAMETERS = {
    "complex": (lambda: [torch.zeros(3, 2, dtype=torch.complex64, requires_grad=True)], r"\(3, 2\)"),
    "sparse": (lambda: [torch.eye(3).to_sparse().requires_grad_()], r"\(3, 3\)"),
    "expanded": (lambda: [nn.Parameter(torch.zeros(1, 2).expand(3, 2))], r"\(3, 2\)"),
    "overlapping": (lambda: [nn.Parameter(torch.zeros(8).as_strided((3, 3), (1, 1)))], r"\(3, 3\)"),
    "lazy": (lambda: list(nn.LazyLinear(2).parameters()), r"parameter 0 of group 1 \(no shape yet.*call the model once"),
    "sharing_memory": (interleaved, r"\(4,\)"),
    "not_a_tensor": (lambda: [1.0], "float"),
    "not_a_leaf": (lambda: [torch.zeros(3, requires_grad=True) * 2], "leaf"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_cannot_work_are_named_at_construction(kind):
    make_params, named = PARAMETERS[kind]
    with pytest.raises((TypeError, ValueError), match=named):
        make([{"params": [torch.zeros(5, requires_grad=True)]}, {"params": make_params()}])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["one_group", "two_groups", "added"])
def test_a_parameter_listed_twice(form):
    p = torch.zeros(3, 2, requires_grad=True)
    forms = {
        "one_group": lambda: make([p, p]),
        "two_groups": lambda: make([{"params": [p]}, {"params": [p]}]),
        "added": lambda: make([p]).add_param_group({"params": [p]}),
    }
    with pytest.raises(ValueError, match=r"more than|twice|duplicate"):
        forms[form]()
    with pytest.raises(ValueError, match=r"shares memory(.|\n)*group"):
        make([p, p.detach().requires_grad_()])


def test_a_group_with_a_bad_parameter_is_not_added():
    optimizer = make(mlp().parameters())
    with pytest.raises((TypeError, ValueError), match=r"complex"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1


def vector(model, x, y):
    return ((model(x) - y) ** 2).mean(0)


CLOSURES = {
    "missing": (None, "closure"),
    "returns_nothing": (lambda model, x, y: lambda: None, "None"),
    "returns_a_number": (lambda model, x, y: lambda: 0.5, "0.5"),
    "returns_a_vector": (lambda model, x, y: lambda: vector(model, x, y), r"\(2,\)"),
    "returns_a_detached_loss": (lambda model, x, y: lambda: regression(model, x, y)().detach(), "backward"),
    "returns_others_first": (lambda model, x, y: lambda: ("x", regression(model, x, y)()), r"returned \('x', tensor"),
    "a_loss": (lambda model, x, y: regression(model, x, y)(), "function that computes the loss.*Tensor"),
    "of_another_model": (lambda model, x, y: lambda: regression(mlp(seed=9), x, y)(), "no optimized parameter"),
}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("method", METHODS)
def test_closures_that_cannot_work(method, kind, base):
    model = mlp()
    optimizer = make(model.parameters(), base, method, lr=0.01)
    good = closure_of(optimizer, regression(model, *batch()), backward=False)
    optimizer.step(good)
    before = snapshot(optimizer)
    factory, named = CLOSURES[kind]
    with pytest.raises((RuntimeError, TypeError), match=named):
        optimizer.step(factory and factory(model, *batch()))
    same(snapshot(optimizer), before)
    optimizer.step(good)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
@pytest.mark.parametrize("names", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("bad", [0, 1])
def test_sparse_gradients_are_named(method, names, bad):
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(3, 1), "words": nn.Embedding(7, 3, sparse=True)})
    dense, count = nn.Embedding(7, 3, _weight=model["words"].weight), iter(range(100))
    optimizer = make(model.named_parameters() if names else model.parameters(), method=method)
    before = snapshot(optimizer)

    def closure():
        optimizer.zero_grad()
        words = model["words"] if next(count) == bad else dense
        loss = model["head"](words(torch.tensor([1, 2]))).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"sparse(.|\n)*\(7, 3\)|\(7, 3\)(.|\n)*sparse") as caught:
        optimizer.step(closure)
    assert ("words.weight" in str(caught.value)) is names
    assert "group 0" in str(caught.value)
    same(snapshot(optimizer), before)
    optimizer.step(closure)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_parameters_cut_or_turned_in_their_memory(backend):
    """`p.data` set to another part of the same memory: its address stays, its elements do not."""
    for change in (lambda t: t[:2], lambda t: t.t()):
        results = []
        for own_memory in (True, False):
            torch.manual_seed(0)
            p, scale = nn.Parameter(torch.randn(6, 6)), torch.randn(6, 6)
            optimizer = make([p], momentum=0.0, backend=backend)
            optimizer.step(lambda p=p, scale=scale: (scale * p**2).sum())
            p.data = change(p.data).clone() if own_memory else change(p.data)
            factor = scale[: len(p)]
            optimizer.step(lambda p=p, factor=factor: (factor * p**2).sum())
            results.append(p.detach().contiguous())
        torch.testing.assert_close(*results)


def test_errors_name_the_device_of_the_parameter():
    optimizer = make([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0 \(shape \(2,\), torch.float32, meta\) is on the meta device"
    ):
        optimizer.step(lambda: None)


def test_a_parameter_that_the_closure_unfreezes_is_named():
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = make(model.parameters())

    def closure():
        model[0].bias.requires_grad_(True)
        return regression(model, *batch())()

    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(.*\) require a gradient, which it did not before"):
        optimizer.step(closure)


def test_rho_set_as_an_attribute_is_an_error_that_names_the_entry():
    optimizer = make(mlp())
    with pytest.raises(AttributeError, match=r"each param group: .*\['rho'\] = "):
        optimizer.rho = 0.2
    with pytest.raises(AttributeError, match=r"each param group: .*\['rho'\] = "):
        print(optimizer.rho)
    adadelta = FusedGAM(mlp(), torch.optim.Adadelta, lr=0.1)
    with pytest.raises(AttributeError, match=r"\['gam_rho'\] = "):
        adadelta.rho = 0.2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make_script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(2, 3))])
def test_modules_of_torchscript_are_refused_by_name(make_script):
    scripted = make_script(mlp())
    with pytest.raises(TypeError, match=r"TorchScript \(BatchNorm1d\)"):  # has nothing but buffers
        make(mlp().parameters(), model=make_script(nn.BatchNorm1d(3, affine=False)))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(TypeError, match=r"TorchScript \(Sequential\).*FusedGAM\(model.parameters\(\)"):
            make(model)
        with pytest.raises(TypeError, match=r"TorchScript \(Sequential\)"):
            make(model.parameters(), model=model)
    optimizer = make(scripted.parameters())
    optimizer.step(regression(scripted, *batch()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_modules_of_torchscript_that_hold_nothing_are_welcome():
    expected = mlp()
    model = nn.Sequential(*expected, torch.jit.script(nn.Sequential(nn.Identity(), nn.Identity())))
    other = copy.deepcopy(expected)
    make(expected).step(regression(expected, *batch()))
    make(nn.Sequential(*other, model[-1])).step(regression(other, *batch()))
    for p, q in zip(other.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_module_of_torchscript_that_comes_later_is_refused_by_name():
    model = mlp()
    optimizer = make(model)
    model.append(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="TorchScript"):
        optimizer.step(regression(model, *batch()))


def test_a_tensor_of_several_numbers_is_no_number():
    with pytest.raises(TypeError, match=r"rho must be a number, but is tensor\(\[0., 0.\]\)"):
        make(mlp().parameters(), rho=torch.zeros(2))


def test_hooks_that_take_the_gradients_are_named():
    model = mlp()
    optimizer = make(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match="register_post_accumulate_grad_hook"):
        optimizer.step(regression(model, *batch()))


def test_exact_names_hooks_that_it_would_not_run():
    """Nothing is accumulated: under every other method they run."""
    model, seen = mlp(), []
    model[2].bias.register_post_accumulate_grad_hook(seen.append)
    make(model, method="sam").step(regression(model, *batch()))
    assert len(seen) == 2
    optimizer = make(model, method="exact")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"register_post_accumulate_grad_hook do not run, and parameter 3 of group 0"):
        optimizer.step(regression(model, *batch()))
    same(snapshot(optimizer), before)


@pytest.mark.parametrize("method", METHODS)
def test_exact_refuses_activation_checkpointing_that_hides_parameters(method):
    """Reentrant: only backward() reaches what lies inside, and with `exact` it would silently not be trained."""
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)

    def closure():
        hidden = checkpoint(model[:2], x.detach().requires_grad_(), use_reentrant=reentrant)
        return (model[2](hidden) - y).square().mean()

    optimizer, reentrant = make(model, method=method), True
    before = snapshot(optimizer)
    if method == "exact":
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            optimizer.step(closure)
        same(snapshot(optimizer), before)
        reentrant = False
    optimizer.step(closure)
    twin = mlp(torch.float64)
    make(twin, method=method).step(lambda: (twin(x) - y).square().mean())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_exact_allows_activation_checkpointing_that_hides_none():
    """Of a frozen part below the trained one."""
    model, twin = mlp(torch.float64), mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    model[:2].requires_grad_(False)
    twin[:2].requires_grad_(False)

    def closure():
        hidden = checkpoint(model[:2], x.detach().requires_grad_(), use_reentrant=True)
        return (model[2](hidden) - y).square().mean()

    make(model, method="exact").step(closure)
    make(twin, method="exact").step(lambda: (twin(x) - y).square().mean())
    same(list(model.parameters()), list(twin.parameters()))


class Once(torch.autograd.Function):
    """As custom kernels are, of deformable convolutions for one: without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize("last", [False, True])
def test_a_function_without_a_second_derivative_is_named_where_one_is_needed(last):
    """autograd.grad leaves its part of the Hessian out without a word."""
    model = mlp()
    x, y = batch()

    def loss():
        return Once.apply(model(x) - y).mean() if last else (model[2](Once.apply(model[0](x))) - y).square().mean()

    make(model).step(loss)
    with pytest.raises(RuntimeError, match="Once in the loss is marked @once_differentiable"):
        make(model, method="exact").step(loss)
    with pytest.raises(RuntimeError, match="Once in the loss is marked @once_differentiable"):
        flatness.hessian_eigenvalues(loss, model.parameters())
    assert flatness.zeroth_order_flatness(loss, model, 0.1) > 0
    with_one_more = [*model.parameters(), nn.Parameter(torch.zeros(2))]  # which the loss does not depend on
    assert flatness.zeroth_order_flatness(loss, with_one_more, 0.1) > 0


def test_a_graph_of_many_ways_is_gone_through_once(monkeypatch):
    """As residual connections make it: twice as many with each."""
    asked = []
    monkeypatch.setattr(differentiated, "once_differentiable_in", lambda node: asked.append(node) or "")
    weight = nn.Parameter(torch.ones(3))

    def closure():
        x = weight
        for _ in range(8):
            x = x + x.sin()
        return x.sum()

    make([weight], method="exact").step(closure)
    assert len(asked) == 2 * (1 + 2 * 8 + 1), "in two passes: of the sum, of eight times two, of the weight"
