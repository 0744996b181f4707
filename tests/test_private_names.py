"""Names that torch and Lightning do not promise: when one goes, it is told here by its name, and not by what breaks."""

from __future__ import annotations

import ast
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.amp.grad_scaler import OptState
from torch.nn.utils import parametrize
from torch.optim import optimizer as torch_optimizer

import gam_fused
from gam_fused import torch_private

PACKAGE = Path(gam_fused.__file__).parent
MODULES_OF_PRIVATE_NAMES = {"torch_private.py", "lightning_private.py"}
PROMISED = {"_getframe", "_version"}  # of Python and of torch, in spite of the underscore


@pytest.mark.parametrize("name", torch_private._OWN)
def test_tables_of_hooks(name):
    assert not getattr(torch.optim.SGD([torch.zeros(1)], lr=0.1), name)


@pytest.mark.parametrize("name", torch_private._GLOBAL)
def test_tables_of_global_hooks(name):
    assert not getattr(torch_optimizer, name)


@pytest.mark.parametrize("name", ["_storage_Use_Count", "_storage_address"])
def test_functions_of_storages(name):
    assert hasattr(torch._C, name), "gradients are then told apart by `_is_view` alone, and more of them copied"


def test_the_comparison_of_many_tensors():
    assert torch_private.compared_with([torch.zeros(2)])(torch.zeros(2)), "gradients are then asked one by one"


def test_weights_that_parametrizations_keep():
    with parametrize.cached():
        assert parametrize._cache == {}


def test_hooks_after_backward():
    p = torch.zeros(1, requires_grad=True)
    assert not torch_private.has_hooks_after_backward(p)
    p.register_post_accumulate_grad_hook(print)
    assert torch_private.has_hooks_after_backward(p)


def test_functions_of_a_first_derivative_alone():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    x = torch.ones(1, requires_grad=True)
    assert torch_private.once_differentiable_in(Once.apply(x).grad_fn).endswith("Once")
    assert not torch_private.once_differentiable_in((2 * x).grad_fn)


def test_subclasses_that_are_not_asked():
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_):
            raise AssertionError("asked")

    t = torch.zeros(1).as_subclass(Refusing)
    with torch_private.as_they_are():
        assert t._version == 0


def test_stages_of_a_scaler():
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert torch_private.scaler_stage(scaler, optimizer) is OptState.READY
    optimizer.param_groups[0]["params"][0].grad = scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)
    assert torch_private.scaler_stage(scaler, optimizer) is OptState.UNSCALED


def test_the_dtype_of_a_cast():
    cast = torch.zeros(2, requires_grad=True).to(torch.bfloat16)
    assert torch_private.dtype_cast_to(cast.grad_fn) is torch.bfloat16


def test_views():
    assert torch_private.is_view(torch.zeros(4)[1:])
    assert not torch_private.is_view(torch.zeros(4))


def test_what_an_lr_scheduler_looks_for():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "_opt_called" not in vars(optimizer)
    optimizer.step()
    assert vars(optimizer)["_opt_called"]


@pytest.mark.parametrize("name", ["_disable_dynamo", "_dynamo"])
def test_names_of_the_compiler(name):
    assert hasattr(torch, name)


def test_names_of_fsdp():
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no torch.distributed")
    assert hasattr(fsdp.FSDPModule, "_get_fsdp_state")


def test_functions_of_trees():
    node = torch.nn.utils.rnn.PackedSequence(torch.zeros(1), torch.zeros(1))
    assert not torch_private.tree_is_leaf(node)
    assert torch_private.tree_is_leaf(torch.zeros(1))
    children, spec = torch_private.tree_flatten([node, (1, 2)], is_leaf=lambda child: isinstance(child, tuple))
    assert children == [node, (1, 2)]
    assert torch_private.tree_unflatten([3, (4,)], spec) == [3, (4,)]


def test_process_groups_tell_their_devices():
    distributed = pytest.importorskip("torch.distributed", reason="this torch has no torch.distributed")
    assert hasattr(distributed.ProcessGroup, "_device_types")


def test_an_optimizer_that_scalers_leave_alone():
    assert "_step_supports_amp_scaling" in Path(torch.amp.grad_scaler.__file__).read_text()
    assert gam_fused.FusedGAM._step_supports_amp_scaling


def test_names_of_lightning():
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    from gam_fused.integrations import lightning_private as private

    loop = private.AutomaticOptimization
    for name in ("_make_zero_grad_fn", "_make_step_fn", "_make_backward_fn", "_optimizer_step"):
        assert hasattr(loop, name), name
    for name in ("_after_closure", "_wrap_closure"):
        assert hasattr(private.Precision, name), name
    assert callable(private.block_parallel_sync_behavior)
    kwargs = SimpleNamespace(trainer=SimpleNamespace(lightning_module=private.pl.LightningModule()))
    build = private.pl.loops.training_epoch_loop._TrainingEpochLoop._build_kwargs
    assert private.batch_in(build(kwargs, OrderedDict(), "the batch", 0)) == "the batch"
    assert hasattr(private.pl.Trainer, "fit_loop") or hasattr(private.pl.loops.fit_loop._FitLoop, "_should_accumulate")


def _private_names(source: Path) -> set[str]:
    """Names with a leading underscore that a module reads of anything but itself, its own classes and its own objects."""
    tree = ast.parse(source.read_text())
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    own |= {t.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in read - own - PROMISED if name.startswith("_") and not name.startswith(("__", "_foreach_"))}


@pytest.mark.parametrize("source", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_else_reads_private_names(source):
    if source.name in MODULES_OF_PRIVATE_NAMES:
        assert _private_names(source), "this is where they are"
    else:
        assert not _private_names(source)
