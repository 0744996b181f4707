"""Measures over a loader's mini-batches are those of the whole, on the model's device and in the mode that is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gam_helpers import batch, batch_norm_net, freeze, mlp, regression, same
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gam_fused import flatness

MEASURES = {
    "eigenvalues": lambda loss, *p: flatness.hessian_eigenvalues(loss, *p, k=3, tolerance=1e-8),
    "trace": lambda loss, *p: flatness.hessian_trace(loss, *p, samples=10)[0],
    "hutch++": lambda loss, *p: flatness.hessian_trace(loss, *p, samples=12, method="hutch++")[0],
    "density": lambda loss, *p: flatness.spectral_density(loss, *p, steps=5).nodes,
    "R0": lambda loss, *p: flatness.zeroth_order_flatness(loss, *p, rho=0.3, steps=5),
    "R1": lambda loss, *p: flatness.first_order_flatness(loss, *p, rho=0.3, steps=5),
    "R0 by one step": lambda loss, *p: flatness.zeroth_order_estimate(loss, *p, rho=0.3),
    "R1 by one step": lambda loss, *p: flatness.first_order_estimate(loss, *p, rho=0.3),
    "landscape": lambda loss, *p: flatness.loss_landscape(loss, *p, points=3),
    "minima": lambda loss, *p: flatness.local_minima_density(loss, *p, directions=3).minima,
}
mse = nn.functional.mse_loss


def pieces(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("name", MEASURES)
def test_mini_batches_of_unequal_length_give_the_whole(name):
    model, (x, y) = mlp(torch.float64), batch(11, dtype=torch.float64)
    whole = MEASURES[name](regression(model, x, y), model.parameters())
    parts = MEASURES[name](flatness.over_batches(model, mse, pieces(x, y, [4, 6, 1])))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_the_mean_is_over_samples():
    model, (x, y) = mlp(torch.float64), batch(11, dtype=torch.float64)
    loss = flatness.over_batches(model, mse, pieces(x, y, [4, 6, 1]))
    torch.testing.assert_close(loss(), regression(model, x, y)().detach())
    assert loss().dtype == torch.float64
    first = flatness.over_batches(model, mse, pieces(x, y, [4, 6, 1]), batches=2)
    torch.testing.assert_close(first(), regression(model, x[:10], y[:10])().detach())


def test_the_model_is_in_eval_mode_unless_told():
    model, (x, y) = batch_norm_net(torch.float64), batch(12, (1, 8, 8), 4, dtype=torch.float64)
    model.train()
    model(x)  # so that running statistics are not those of the batch
    loader = [(x, y)]
    of_mode = {True: regression(model.train(), x, y)().item(), False: regression(model.eval(), x, y)().item()}
    for training, expected in of_mode.items():
        assert flatness.over_batches(model, mse, loader, training=training)().item() == pytest.approx(expected, rel=1e-12)


def test_a_loader_that_shuffles_and_augments_does_so_alike_in_every_pass():
    """Each pass sees the same mini-batches, augmentations and dropout masks: the loss has a Hessian."""

    class Noisy(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            x, y = batch(12, dtype=torch.float64)
            return x[i] + torch.randn(3, dtype=torch.float64), y[i]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    loader = DataLoader(Noisy(), 5, shuffle=True)
    loss = flatness.over_batches(model, mse, loader, training=True)
    assert loss() == loss()
    landscape = flatness.loss_landscape(loss, directions=1, radius=1e-12, points=5)
    torch.testing.assert_close(landscape, loss().expand(5), rtol=1e-9, atol=0.0)
    torch.rand(1)
    assert loss() != flatness.over_batches(model, mse, loader)()


def test_params_may_be_some_of_the_models():
    model, (x, y) = mlp(torch.float64), batch(dtype=torch.float64)
    loss = flatness.over_batches(model, mse, [(x, y)])
    torch.testing.assert_close(
        flatness.hessian_trace(loss, [model[2].weight], 2),
        flatness.hessian_trace(regression(model, x, y), [model[2].weight], 2),
    )
    model[0].requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert flatness.hessian_trace(loss)[0] == flatness.hessian_trace(loss, trainable)[0]


class Augmented(Dataset):
    """Samples with noise of the worker's generator."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.full((3,), float(i)) + torch.randn(3), torch.zeros(2)


def test_persistent_workers_augment_alike_in_every_pass_and_go_on_with_the_epoch_under_way():
    torch.manual_seed(0)
    loader = DataLoader(Augmented(), 3, num_workers=1, persistent_workers=True)
    torch.manual_seed(1)
    expected = [x for x, _ in loader]
    torch.manual_seed(1)
    epoch = iter(DataLoader(Augmented(), 3, num_workers=1, persistent_workers=True))
    seen = [next(epoch)[0]]
    loss = flatness.over_batches(mlp(), mse, loader)
    workers = loader._iterator
    assert loss() == loss()
    assert loader._iterator is workers
    seen += [x for x, _ in epoch]
    assert all(map(torch.equal, seen, expected))


def order(loader):
    return [x.flatten().tolist() for x, _ in loader]


@pytest.mark.parametrize("batches", [None, 2])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_loader_that_accelerate_has_prepared_does_not_count_passes(batches):
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    from accelerate.data_loader import DataLoaderDispatcher, prepare_data_loader

    x, y = torch.arange(12.0).unsqueeze(1), torch.zeros(12, 1)
    plain = DataLoader(TensorDataset(x, y), 3, shuffle=True, generator=torch.Generator().manual_seed(3))

    def prepared(**how):
        return prepare_data_loader(plain, use_seedable_sampler=True, data_seed=5, num_processes=1, process_index=0, **how)

    for how in ({}, {"dispatch_batches": True, "put_on_device": True}):
        reference, loader = prepared(**how), prepared(**how)
        assert isinstance(loader, DataLoaderDispatcher) == bool(how)
        expected = [order(reference) for _ in range(3)]
        assert expected[0] != expected[1]
        loss = flatness.over_batches(nn.Linear(1, 1), mse, loader, batches=batches)
        found = [order(loader)]
        values, epoch = [loss(), loss()], iter(loader)
        assert not accelerate.state.GradientState().in_dataloader
        second = [next(epoch)[0].flatten().tolist()]
        values += [loss(), loss()]
        assert accelerate.state.GradientState().active_dataloader is loader
        found += [second + [x.flatten().tolist() for x, _ in epoch], order(loader)]
        assert found == expected
        assert values[0] == values[1]
        assert values[2] == values[3]
        assert not accelerate.state.GradientState().in_dataloader


def test_mini_batches_that_accelerate_skips_are_not_measured():
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.full((1,), float(i)), torch.zeros(1)) for i in range(12)])

    whole = accelerate.data_loader.prepare_data_loader(DataLoader(Stream(), 3), num_processes=1, process_index=0)
    loader, model = accelerate.skip_first_batches(whole, 2), nn.Linear(1, 1)
    for batches in (None, 1):
        expected = flatness.over_batches(model, mse, list(loader), batches=batches)()
        assert flatness.over_batches(model, mse, loader, batches=batches)() == expected


@pytest.mark.parametrize("how", [{"dispatch_batches": True, "put_on_device": True}, {"rng_types": ["torch"]}])
def test_over_all_ranks_a_loader_that_communicates_is_refused(how, monkeypatch):
    data_loader = pytest.importorskip("accelerate.data_loader", reason="needs the package accelerate")
    loader = data_loader.prepare_data_loader(DataLoader(Augmented(), 3), num_processes=1, process_index=0, **how)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(TypeError, match=f"{type(loader).__name__} that Accelerate has prepared.*give a plain DataLoader"):
        flatness.over_batches(mlp(), mse, loader, all_ranks=True)
    flatness.over_batches(mlp(), mse, DataLoader(Augmented(), 3), all_ranks=True)


class Names(nn.Module):
    """As a model of Hugging Face: takes arguments by name, returns the loss in one of three ways."""

    def __init__(self, way):
        super().__init__()
        self.net, self.way = mlp(torch.float64), way

    def forward(self, x, labels):
        loss = mse(self.net(x), labels)
        if self.way == "attribute":
            return type("Output", (), {"loss": loss})
        return {"dict": {"loss": loss}, "tuple": (loss, None), "tensor": loss}[self.way]


@pytest.mark.parametrize("way", ["attribute", "dict", "tuple", "tensor"])
def test_a_model_may_return_the_loss(way):
    model, (x, y) = Names(way), batch(dtype=torch.float64)
    loss = flatness.over_batches(model, None, [{"x": x[:3], "labels": y[:3]}, {"x": x[3:], "labels": y[3:]}])
    torch.testing.assert_close(loss(), mse(model.net(x), y).detach())


def test_several_inputs_and_a_loss_of_ones_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(torch.float64)

        def forward(self, a, b):
            return self.net(a + b)

    model, (x, y) = Two(), batch(dtype=torch.float64)
    expected = mse(model.net(2 * x), y).detach()
    torch.testing.assert_close(flatness.over_batches(model, mse, [(x, x, y)])(), expected)
    own = flatness.over_batches(model, None, [x], batch_loss=lambda model, x: mse(model(x, x), y))
    torch.testing.assert_close(own(), expected)


def test_what_cannot_be_measured_is_said():
    model, (x, y) = mlp(), batch()
    with pytest.raises(TypeError, match="used up after one pass: give a DataLoader or a list"):
        flatness.over_batches(model, mse, iter([(x, y)]))
    with pytest.raises(TypeError, match="criterion needs mini-batches"):
        flatness.over_batches(model, mse, [x])()
    with pytest.raises(TypeError, match="gets its arguments by name"):
        flatness.over_batches(model, None, [(x, y)])()
    with pytest.raises(TypeError, match="but not both"):
        flatness.over_batches(model, mse, [(x, y)], batch_loss=lambda *_: None)
    with pytest.raises(TypeError, match="how many samples"):
        flatness.over_batches(model, mse, [(1, 2)])()
    with pytest.raises(ValueError, match="no samples"):
        flatness.over_batches(model, mse, [])()
    with pytest.raises(ValueError, match=r"0-d.*\(8, 2\)"):
        flatness.over_batches(model, lambda a, b: a - b, [(x, y)])()
    with pytest.raises(ValueError, match="batches=0"):
        flatness.over_batches(model, mse, [(x, y)], batches=0)
    with pytest.raises(RuntimeError, match="init_process_group"):
        flatness.over_batches(model, mse, [(x, y)], all_ranks=True)
    with pytest.raises(TypeError, match="only if loss_fn comes from over_batches"):
        flatness.hessian_trace(lambda: 0)


def test_a_report_is_each_measure_once():
    model, (x, y) = mlp(torch.float64), batch(dtype=torch.float64)
    found = flatness.report(model, mse, pieces(x, y, [5, 3]), rho=0.2, steps=4, samples=6)
    loss = regression(model, x, y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    trace, error = flatness.hessian_trace(loss, model, 6)
    ascent = {"rho": 0.2, "steps": 4, "restarts": 0}
    expected = {
        "loss": loss().item(),
        "gradient_norm": gradient.norm().item(),
        "zeroth_order_flatness": flatness.zeroth_order_flatness(loss, model, **ascent).item(),
        "first_order_flatness": flatness.first_order_flatness(loss, model, **ascent).item(),
        "largest_eigenvalue": flatness.hessian_eigenvalues(loss, model, tolerance=1e-2).item(),
        "trace": trace.item(),
        "trace_error": error.item(),
    }
    assert found == pytest.approx(expected, rel=1e-9)
    assert all(type(value) is float for value in found.values())


def test_a_report_on_a_diverged_model_is_nan():
    model, (x, y) = mlp(), batch()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    assert all(value != value for value in flatness.report(model, mse, [(x, y)]).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MEASURES)
def test_on_a_gpu_they_are_those_of_the_cpu(name):
    """Mini-batches come from the host; dropout draws from the device's generator, which comes back."""
    model, (x, y) = mlp(torch.float64), batch(11, dtype=torch.float64)
    expected = MEASURES[name](regression(model, x, y), model)
    loss = flatness.over_batches(model.cuda(), mse, pieces(x, y, [4, 6, 1]))
    torch.testing.assert_close(MEASURES[name](loss).cpu(), expected, rtol=1e-7, atol=1e-10)
    dropping = nn.Sequential(model, nn.Dropout(0.5))
    state, before = torch.cuda.get_rng_state(), freeze([list(dropping.state_dict().values())])
    loss = flatness.over_batches(dropping, mse, pieces(x, y, [4, 6, 1]), training=True)
    assert loss() == loss()
    MEASURES[name](loss)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    same(freeze([list(dropping.state_dict().values())]), before)


# DistributedDataParallel.


def of_one_process(data):
    model, (x, y) = mlp(torch.float64), data
    return [measure(regression(model, x, y), model) for measure in MEASURES.values()]


def on_a_rank(rank, data):
    model, (x, y) = DistributedDataParallel(mlp(torch.float64)), data
    mine = slice(0, 3) if rank == 0 else slice(3, None)
    loss = flatness.over_batches(model, mse, [(x[mine], y[mine])], all_ranks=True)
    found = [measure(loss) for measure in MEASURES.values()]
    alone = flatness.over_batches(model, mse, [(x, y)])
    if rank == 0:  # nobody waits for the others
        found += [measure(alone) for measure in MEASURES.values()]
        found += [measure(lambda: mse(model(x), y), model) for measure in MEASURES.values()]
    mse(model(x[mine]), y[mine]).backward()  # training goes on
    dist.barrier()
    return freeze(found), freeze([p.grad for p in model.parameters()])


@pytest.mark.processes
def test_all_ranks_measure_the_mean_over_all_their_data():
    data = batch(8, dtype=torch.float64)
    expected = of_one_process(data)
    (first, grads), (second, others) = run(2, on_a_rank, data)
    assert len(first) == 3 * len(expected)
    for i, found in enumerate(first):
        thaw(found, expected[i % len(expected)])
    same(first[: len(expected)], second)
    same(grads, others)


def with_nothing_on_one(rank, data):
    model, loader = mlp(torch.float64), [data] if rank == 0 else []
    loss = flatness.over_batches(model, mse, loader, all_ranks=True)
    return freeze([measure(loss) for measure in MEASURES.values()])


@pytest.mark.processes
def test_a_rank_without_samples_takes_part():
    data = batch(8, dtype=torch.float64)
    first, second = run(2, with_nothing_on_one, data)
    for found, expected in zip(first, of_one_process(data), strict=True):
        thaw(found, expected)
    same(first, second)


def thaw(bits, expected):
    found = bits.view(expected.dtype) if isinstance(bits, torch.Tensor) else bits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_wrappers_are_taken_off():
    model, (x, y) = mlp(torch.float64), batch(dtype=torch.float64)
    expected = flatness.hessian_trace(flatness.over_batches(model, mse, [(x, y)]))
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    loss = flatness.over_batches(compiled, mse, [(x, y)])
    assert loss.model is model
    found = flatness.hessian_trace(loss)
    assert found == expected
