"""Names of other implementations: what the table says exists here, does not clash with ours, and stands on the page."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gam_fused
from gam_fused import FusedGAM, FusedSAM, migration

PAGE = Path(__file__).parents[1] / migration.PAGE
OURS = set(inspect.signature(FusedGAM.__init__).parameters)


@pytest.mark.parametrize("name", [*migration.ATTRIBUTES, *migration.KEYWORDS])
def test_every_name_is_explained(name):
    assert re.fullmatch(
        rf"{name} belongs to another implementation; here: .+\. See docs/migration\.md", migration.explain(name)
    )


@pytest.mark.parametrize("name", ["lr", "rho", "momentum", "step", "defaults", "foo", ""])
def test_other_names_are_not(name):
    assert migration.explain(name) is None


def test_no_name_is_both_or_ours():
    assert not set(migration.ATTRIBUTES) & set(migration.KEYWORDS)
    assert not set(migration.KEYWORDS) & OURS
    assert not [name for name in migration.ATTRIBUTES if hasattr(FusedGAM, name)]


@pytest.mark.parametrize(
    "base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adadelta]
)
def test_no_keyword_is_a_bases(base):
    assert not set(migration.KEYWORDS) & set(inspect.signature(base.__init__).parameters)


def test_keywords_that_are_named_exist():
    named = {n for text in migration.KEYWORDS.values() for n in re.findall(r"\b(\w+)=(?!=)", text)}
    assert named - OURS <= {"eps", "lambda"}
    assert hasattr(gam_fused.schedules, "ProportionalRho")


@pytest.mark.parametrize("name", ["first_step", "set_closure", "update_rho_t", "gradient_decompose", "enable_running_stats"])
def test_the_page_has_the_names_that_people_search_for(name):
    assert name in PAGE.read_text()


@pytest.mark.parametrize("name", sorted(migration.KEYWORDS))
def test_the_page_has_the_keywords(name):
    assert name in PAGE.read_text()


def blocks() -> list[tuple[int, str]]:
    """The page's Python code of this package, each with the number of its line."""
    text = PAGE.read_text()
    found = re.finditer(r"^```python\n(# now\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start()].count("\n") + 1, m[1]) for m in found]


@pytest.mark.parametrize(("line", "code"), blocks(), ids=lambda value: f"line {value}" if isinstance(value, int) else "")
def test_the_code_of_the_page_uses_what_is_there(line, code):
    calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    calls = [n for n in calls if n.func.id in ("FusedGAM", "FusedSAM")]
    assert calls
    for call in calls:
        keywords = {k.arg for k in call.keywords}
        assert keywords <= OURS | {"lr", "momentum"}


def test_the_code_of_the_page_runs():
    """All but Lightning's, in the order of the page."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    names = {"torch": torch, "model": model, "loss_fn": torch.nn.functional.cross_entropy, "epochs": 2, "steps": 4}
    names["loader"] = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    options = {"grad_rho": 0.02, "grad_norm_rho": 0.2, "grad_beta_1": 0.6, "grad_beta_2": 0.5, "grad_beta_3": 0.4}
    names["args"] = SimpleNamespace(**options, grad_gamma=0.03)
    run = [code for _, code in blocks() if "LightningModule" not in code]
    assert len(run) == 4
    for code in run:
        before = [p.detach().clone() for p in model.parameters()]
        exec(code, names | {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
        assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_step_of_sam_is_first_and_second_step():
    """What `first_step` and `second_step` of other packages compute, written out."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 2, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    model = torch.nn.Linear(2, 1).double()
    theirs = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def loss(weight, bias):
        return torch.nn.functional.mse_loss(x @ weight.T + bias, y)

    g0 = torch.autograd.grad(loss(*theirs), theirs)
    norm = torch.stack([g.norm() for g in g0]).norm()
    perturbed = [(p + 0.05 * g / (norm + 1e-12)).detach().requires_grad_() for p, g in zip(theirs, g0, strict=True)]
    g1 = torch.autograd.grad(loss(*perturbed), perturbed)
    FusedSAM(model, torch.optim.SGD, lr=0.1, rho=0.05).step(lambda: torch.nn.functional.mse_loss(model(x), y))
    for mine, p, g in zip(model.parameters(), theirs, g1, strict=True):
        torch.testing.assert_close(mine.detach(), p.detach() - 0.1 * g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(migration.ATTRIBUTES))
def test_an_attribute_of_another_implementation_points_to_the_page(name):
    optimizer = FusedGAM([torch.zeros(2, requires_grad=True)], torch.optim.SGD, lr=0.1)
    with pytest.raises(AttributeError, match=rf"{name} belongs to another implementation; here: .* See docs/migration.md"):
        getattr(optimizer, name)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)])
@pytest.mark.parametrize("name", sorted(migration.KEYWORDS))
def test_a_keyword_of_another_implementation_points_to_the_page(name, base):
    params = [torch.zeros(2, requires_grad=True)] if isinstance(base, type) else None
    with pytest.raises(TypeError, match=rf"{name} belongs to another implementation; here: .* See docs/migration.md"):
        FusedGAM(params, base, **{name: 0.1})


def test_a_keyword_that_the_base_optimizer_takes_is_its_own():
    def factory(params, rho_scheduler=None):
        return torch.optim.SGD(params, lr=0.1)

    FusedGAM([torch.zeros(2, requires_grad=True)], factory, rho_scheduler=3)


@pytest.mark.parametrize("kind", [FusedGAM, FusedSAM])
def test_an_optimizer_in_the_place_of_parameters_is_told_where_it_goes(kind):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=rf"params is an optimizer: use {kind.__name__}\(None, optimizer\)"):
        kind(optimizer)
    with pytest.raises(TypeError, match="positional"):
        kind([torch.zeros(2, requires_grad=True)], torch.optim.SGD, 0.05)
