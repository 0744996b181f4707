"""Hugging Face's Trainer and Accelerate give the same bits as a plain loop."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from gam_helpers import batch, freeze, make, mixed_net, regression, same
from torch import nn
from torch.nn.utils import clip_grad_norm_

pytest.importorskip("accelerate", reason="needs the package accelerate")
pytest.importorskip("transformers", reason="needs the package transformers")

import accelerate
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState

from gam_fused import FusedGAM, FusedSAM
from gam_fused.integrations import BatchClosure, all_micro_batches
from gam_fused.integrations.transformers import GAMTrainerMixin

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
BATCHES, SIZE = 10, 4  # with an accumulation of 4 the last step of an epoch has 2
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Model(nn.Module):
    """Batch norm, dropout, and the Trainer's way of calling a model."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = mixed_net(), []

    def forward(self, x, labels):
        self.seen.append(len(x))
        return {"loss": (self.net(x) - labels).square().mean()}


class GAMTrainer(GAMTrainerMixin, transformers.Trainer):
    pass


class Classifier(Model):
    """A loss that is a sum over labels which are not -100, divided by the number that the Trainer counts."""

    def forward(self, x, labels, num_items_in_batch=None, **kwargs):
        logits = self.net(x)
        self.seen.append((len(x), float(num_items_in_batch)))
        return {"loss": nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch}


def tensors(counts=False):
    """Of all batches. `counts`: labels of a `Classifier`, some missing."""
    x, y = batch(BATCHES * SIZE)
    return (x, torch.where(torch.arange(len(y)) % 3 == 0, -100, (y[:, 0] > 0).long())) if counts else (x, y)


def rows(counts=False):
    x, y = tensors(counts)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


class Losses(transformers.TrainerCallback):
    def __init__(self):
        self.seen, self.norms = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(100 + state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


def trainer(model, folder, optimizers=(None, None), more=(), **arguments):
    arguments = {"num_train_epochs": 2, "save_strategy": "no", "max_grad_norm": 0.0, **arguments}
    given = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=SIZE, learning_rate=0.05, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, train_sampling_strategy="sequential", dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    data = rows(counts=isinstance(model, Classifier))
    return GAMTrainer(model, given, train_dataset=data, optimizers=optimizers, callbacks=[Losses(), *more])


def losses_of(result) -> Losses:
    return next(c for c in result.callback_handler.callbacks if isinstance(c, Losses))


def plain_loop(model, optimizer, schedule, accumulate=1, bf16=False, epochs=2, counts=False):
    """What the Trainer should do. Returns the losses of the steps and the norms of their gradients.

    `counts`: the model's loss is a sum, which it divides by the number of items in all micro-batches.
    """
    x, y = tensors(counts)
    batches = list(zip(x.split(SIZE), y.split(SIZE), strict=True))
    losses, norms = [], []
    for _ in range(epochs):
        for start in range(0, BATCHES, accumulate):
            micro = batches[start : start + accumulate]

            def closure(micro):
                total = 0.0
                number = sum((b != -100).sum() for _, b in micro)
                for a, b in micro:
                    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                        loss = model(a, b, number)["loss"] if counts else model(a, b)["loss"] / len(micro)
                    loss.backward()
                    total += loss.detach()
                return total

            torch.manual_seed(100 + len(losses))
            losses.append(float(optimizer.step(closure, micro)))
            norms.append(float(optimizer.diagnostics()["gradient_norm"]))
            schedule.step()
    return losses, norms


def contents(model, optimizer):
    return freeze([dict(model.state_dict()), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_trainer(accumulate, clip, bf16, tmp_path):
    results = []
    for kind in ("Trainer", "plain"):
        model = Model()
        optimizer = make(model.parameters(), model=model, lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if kind == "Trainer":
            options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip, "bf16": bf16}
            result = trainer(model, tmp_path, (optimizer, schedule), **options)
            result.train()
            assert result.accelerator.sync_gradients
            assert result.state.global_step == 2 * -(-BATCHES // accumulate)
            told = losses_of(result).seen, losses_of(result).norms
        else:
            optimizer.max_grad_norm = clip or None
            told = plain_loop(model, optimizer, schedule, accumulate, bf16)
        results.append((contents(model, optimizer), told))
    same(results[0][0], results[1][0])
    for mine, plain in zip(results[0][1], results[1][1], strict=True):
        assert mine == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("kind", [Model, Classifier])
@pytest.mark.parametrize(("fraction", "part", "accumulate"), [(1 / 4, 2, 1), (3 / 4, 3, 4)])
def test_flatness_from_a_part_of_the_batch(fraction, part, accumulate, kind, tmp_path):
    """Nothing has to be said but the fraction; losses are divided by the number of items in the part."""
    results = []
    for loop in ("Trainer", "plain"):
        model = kind()
        optimizer = make(model.parameters(), model=model, lr=0.05, flatness_fraction=fraction)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if loop == "Trainer":
            result = trainer(model, tmp_path, (optimizer, schedule), gradient_accumulation_steps=accumulate)
            result.train()
            losses = losses_of(result).seen
        else:
            losses, _ = plain_loop(model, optimizer, schedule, accumulate, counts=kind is Classifier)
        results.append((contents(model, optimizer), losses, model.seen))
    same(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)
    assert results[0][2] == results[1][2]
    lengths = [seen if kind is Model else seen[0] for seen in results[0][2]]
    assert lengths[: 5 * accumulate] == accumulate * [SIZE] + 4 * accumulate * [part]


def test_a_trainers_own_way_of_counting_counts_parts_too(tmp_path):
    """`get_batch_samples` is what the Trainer offers to be overridden."""

    class Counts(GAMTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            samples, number = super().get_batch_samples(epoch_iterator, num_batches, device)
            return samples, number * 10

    model = Classifier()
    optimizer = make(model.parameters(), model=model, flatness_fraction=3 / 4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    result = trainer(model, tmp_path, (optimizer, schedule), max_steps=1, gradient_accumulation_steps=4)
    result.__class__ = Counts
    result.train()
    labels = tensors(counts=True)[1][:16].view(4, 4) != -100
    assert model.seen == 4 * [(4, 10 * labels.sum())] + 16 * [(3, 10 * labels[:, :3].sum())]


def test_a_step_that_is_not_told_the_number_of_items_does_not_count_them(tmp_path):
    class Untold(GAMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            assert num_items_in_batch is not None
            return super().training_step(model, inputs)

    class Spy(Classifier):
        def forward(self, x, labels, num_items_in_batch=None, **kwargs):
            told.append(num_items_in_batch)
            return super().forward(x, labels, 1.0)

    told, model = [], Spy()
    optimizer = make(model.parameters(), model=model, flatness_fraction=3 / 4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    result = trainer(model, tmp_path, (optimizer, schedule), max_steps=1)
    result.__class__ = Untold
    result.train()
    assert told == [None] * 5


def test_trainer_makes_the_optimizer_and_resumes(tmp_path):
    """`optimizer_cls_and_kwargs`, the Trainer's param groups, a checkpoint in the middle of training."""
    states = []
    for resume in (None, tmp_path / "checkpoint-10"):
        model = Model()
        result = trainer(model, tmp_path, save_strategy="epoch")
        result.optimizer_cls_and_kwargs = (FusedGAM, {"base_optimizer": torch.optim.AdamW, "lr": 0.01})
        result.train(resume_from_checkpoint=None if resume is None else str(resume))
        optimizer = result.optimizer.optimizer
        assert isinstance(optimizer, FusedGAM)
        assert len(optimizer.param_groups) == 2
        assert result.state.global_step == 20
        assert model.net[1].num_batches_tracked == 20
        states.append(contents(model, optimizer))
    same(*states)


def test_trainer_serves_other_optimizers(tmp_path):
    states = []
    for kind in (GAMTrainer, transformers.Trainer):
        model = Model()
        result = trainer(model, tmp_path, gradient_accumulation_steps=4, max_grad_norm=0.05)
        result.__class__ = kind
        result.train()
        states.append(freeze(dict(model.state_dict())))
    same(*states)


class Acts(transformers.TrainerCallback):
    """Clips in `on_pre_optimizer_step`, and notes what it and `on_optimizer_step` find."""

    def __init__(self, model, spoil=None):
        self.model, self.spoil, self.calls = model, spoil, []

    def found(self):
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        weights = freeze([dict(self.model.net.named_parameters()), self.model.net[1].num_batches_tracked])
        return float(torch.stack(norms).norm()) if norms else None, weights

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.found()[1][0]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.calls.append(("before", state.global_step, *self.found()))
        same(self.calls[-1][3][0], self.start)
        clip_grad_norm_(self.model.parameters(), 0.05)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.calls.append(("after", state.global_step, *self.found()))
        control.should_training_stop = state.global_step == 15


@pytest.mark.parametrize("clip", [0.0, 0.08])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_callbacks_act_on_the_direction(accumulate, clip, tmp_path):
    model, reference = Model(), Model()
    optimizer = make(model.parameters(), model=model, lr=0.05, max_grad_norm=3.0)
    acts = Acts(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip}
    result = trainer(model, tmp_path, (optimizer, schedule), [acts], **options)
    result.train()
    plain = make(reference.parameters(), model=reference, lr=0.05, max_grad_norm=clip or 3.0)
    plain.base_optimizer.register_step_pre_hook(lambda *_: clip_grad_norm_(reference.parameters(), 0.05) and None)
    steps = 16 if accumulate == 1 else 6  # a callback stops the first
    losses, _ = plain_loop(reference, plain, torch.optim.lr_scheduler.ExponentialLR(plain, 0.9), accumulate)
    if accumulate == 4:
        same(contents(model, optimizer), contents(reference, plain))
    assert losses_of(result).seen == pytest.approx(losses[:steps], abs=1e-4)
    assert [call[:2] for call in acts.calls] == [(when, i) for i in range(steps) for when in ("before", "after")]
    for before, after in zip(acts.calls[::2], acts.calls[1::2], strict=True):
        assert after[2] == pytest.approx(min(before[2], 0.05), rel=1e-4)
        assert not clip or before[2] < 0.0801
        assert before[3][1] == after[3][1]  # buffers have moved once
    assert optimizer.max_grad_norm == 3.0
    assert not optimizer.base_optimizer._optimizer_step_pre_hooks
    assert "on_pre_optimizer_step" not in vars(result.callback_handler)


def test_callbacks_of_transformers_and_others_leave_the_update_fused(tmp_path, monkeypatch):
    class Own(transformers.TrainerCallback):
        __module__ = "transformers.trainer_jit_checkpoint"

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise AssertionError("weights are perturbed, or of the next step already")

    def never(*_, **__):
        raise AssertionError("the base optimizer was stepped by itself")

    model = Model()
    optimizer = make(model.parameters(), model=model, lr=0.05)
    monkeypatch.setattr(type(optimizer.base_optimizer), "step", never)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    result = trainer(model, tmp_path, (optimizer, schedule), [Own()], max_grad_norm=0.05)
    result.train()
    assert result.state.global_step == 2 * BATCHES


def test_a_skipped_step_has_no_gradients_to_act_on(tmp_path):
    model = Model()
    optimizer = make(model.parameters(), model=model, lr=0.05)
    acts = Acts(model)
    compute = model.forward
    losses = []

    def forward(x, labels):
        losses.append(None)
        return {"loss": compute(x, labels)["loss"] * (float("nan") if 4 < len(losses) <= 8 else 1.0)}

    model.forward = forward
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer(model, tmp_path, (optimizer, schedule), [acts], max_steps=3).train()
    assert optimizer.skipped_steps == 1
    assert [(when, norm is None) for when, _, norm, _ in acts.calls] == [
        *[("before", False), ("after", False)],
        ("after", True),
        *[("before", False), ("after", False)],
    ]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its precision for the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=gpu)])
def test_accelerate(precision, tmp_path):
    """`prepare`, `backward` of micro-batches, scheduler; and a checkpoint in the middle gives the rest again."""
    accelerator = Accelerator(mixed_precision=precision, cpu=precision != "fp16", gradient_accumulation_steps=2)
    x, y = (t.to(accelerator.device) for t in batch(8))

    def run(steps, save_at=None, load=False):
        model = mixed_net()
        optimizer = make(model.parameters(), model=model, lr=0.05, grad_scaler=accelerator.scaler)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        prepared = accelerator.prepare(model, optimizer, schedule)
        if load:
            accelerator.load_state(str(tmp_path))
        for step in range(steps):

            def closure(model=prepared[0]):
                for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                    accelerator.backward(regression(model, a, b)())

            prepared[1].step(all_micro_batches(closure))
            prepared[2].step()
            if step + 1 == save_at:
                accelerator.save_state(str(tmp_path))
        accelerator.free_memory()
        return model, optimizer

    torch.manual_seed(3)
    model, optimizer = run(4, save_at=2)
    rest, rest_optimizer = run(2, load=True)
    same(contents(rest, rest_optimizer), contents(model, optimizer))
    assert model[1].num_batches_tracked == 8
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05 * 0.9**4)
    if precision == "no":
        torch.manual_seed(3)
        plain = mixed_net()
        plain_optimizer = make(plain.parameters(), model=plain, lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(plain_optimizer, 0.9)
        for _ in range(4):

            def closure():
                for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                    (regression(plain, a, b)() / 2).backward()

            plain_optimizer.step(closure)
            schedule.step()
        same(contents(model, optimizer), contents(plain, plain_optimizer))


def accumulating(accelerator, batches=4):
    """Accelerate's own loop. Returns the weights, which start at zero, and how many steps went through."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = FusedSAM(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.0)
    loader = torch.utils.data.DataLoader(torch.eye(4)[:batches], batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x in loader:
        with accelerator.accumulate(model):

            def closure(x=x):
                loss = -model(x).sum()
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
            optimizer.zero_grad()
    return model.weight.detach()


@pytest.mark.parametrize("batches", [3, 4])  # the end of the data also ends an accumulation
def test_accelerates_accumulation_is_an_error(batches):
    with pytest.raises(RuntimeError, match=r"gradient_accumulation_steps=4.*all_micro_batches"):
        accumulating(Accelerator(cpu=True, gradient_accumulation_steps=4), batches)


def test_accelerates_accumulation_is_found_whoever_sets_it():
    accelerator = Accelerator(cpu=True)
    accumulating(accelerator)
    accelerator.gradient_accumulation_steps = 2
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps=2"):
        accumulating(accelerator)
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps=2"):  # all accelerators of a process share it
        accumulating(Accelerator(cpu=True, gradient_accumulation_steps=2))
    accelerator.gradient_accumulation_steps = 1
    same(freeze([accumulating(accelerator)]), freeze([torch.ones(1, 4)]))


def test_all_micro_batches_in_a_closure_that_says_so():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer = accelerator.prepare(model, FusedSAM(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.0))

    @all_micro_batches
    def closure():
        for x in torch.eye(4).chunk(4):
            accelerator.backward(-model(x).sum())

    optimizer.step(closure)
    same(freeze([model.weight]), freeze([torch.full((1, 4), 0.25)]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_with_flatness_from_a_part_of_the_batch(accumulate):
    """Its optimizer takes a closure only, which brings its batch along."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    micro = list(zip(*(t.chunk(accumulate) for t in batch(16)), strict=True))
    results = []
    for prepared in (True, False):
        model = mixed_net()
        optimizer = make(model.parameters(), model=model, flatness_fraction=1 / 4)
        lengths = []
        stepper = accelerator.prepare(model, optimizer)[1] if prepared else optimizer

        def closure(batches, model=model, prepared=prepared, lengths=lengths):
            for x, y in batches:
                lengths.append(len(x))
                loss = regression(model, x, y)()
                accelerator.backward(loss) if prepared else (loss / accumulate).backward()

        torch.manual_seed(3)
        for _ in range(3):
            if prepared:
                stepper.step(all_micro_batches(BatchClosure(closure, micro)))
            else:
                stepper.step(closure, micro)
        n = 16 // accumulate
        assert lengths == 3 * (accumulate * [n] + 4 * accumulate * [max(n // 4, 2)])
        results.append(contents(model, optimizer))
    same(*results)


@pytest.mark.parametrize("wrap", [BatchClosure, lambda f, b: BatchClosure(all_micro_batches(f), b)])
def test_who_says_that_all_micro_batches_are_run(wrap):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(4, 1)
    optimizer = accelerator.prepare(FusedSAM(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.0))
    closure = wrap(lambda x: accelerator.backward(-model(x).sum()), torch.eye(4))
    with pytest.raises(RuntimeError, match="all_micro_batches") if wrap is BatchClosure else nullcontext():
        optimizer.step(closure)


def test_a_prepared_step_without_its_batch_is_an_error():
    model = nn.Linear(4, 1)
    optimizer = FusedSAM(model.parameters(), torch.optim.SGD, lr=1.0, flatness_fraction=1 / 2)
    with pytest.raises(ValueError, match=r"flatness_fraction=0\.5 needs .*gam_fused\.integrations\.BatchClosure"):
        Accelerator(cpu=True).prepare(optimizer).step(lambda: model(torch.eye(4)).sum())


def test_optimizers_that_are_not_prepared_are_none_of_accelerates_business():
    for accelerator in (None, Accelerator(cpu=True, gradient_accumulation_steps=2)):
        model = mixed_net()
        make(model.parameters(), model=model).step(regression(model, *batch()))
        assert accelerator is None or accelerator.gradient_accumulation_steps == 2


def test_what_others_call_their_own():
    """Names that `integrations` uses; a version without one of them needs another way there."""
    assert accelerate.optimizer.GradientState().num_steps == 1
    assert AcceleratedOptimizer.step.__code__
    assert callable(transformers.trainer_callback.CallbackHandler.call_event)
    for event in ("on_pre_optimizer_step", "on_optimizer_step"):
        assert callable(getattr(transformers.TrainerCallback, event))


def test_accelerates_way_of_stepping_with_a_scaler():
    """Its fp16 needs a GPU; its optimizer, `scaler.step(optimizer, closure)` and all, takes a scaler of the CPU."""
    Accelerator(cpu=True)
    results = []
    for wrapped in (False, True):
        model = mixed_net()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = make(model.parameters(), model=model, grad_scaler=scaler)
        loss_fn = regression(model, *batch())
        stepper = AcceleratedOptimizer(optimizer, scaler=scaler) if wrapped else optimizer
        torch.manual_seed(3)
        for bad in (False, True, False):
            stepper.zero_grad()
            stepper.step(lambda s=scaler, f=loss_fn, bad=bad: s.scale(f() * (float("inf") if bad else 1.0)).backward())
            if not wrapped:
                scaler.update()
        assert scaler.get_scale() == 128.0
        assert optimizer.skipped_steps == 1
        results.append(contents(model, optimizer))
    same(*results)


@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_the_examples(name):
    pytest.importorskip("sklearn", reason="needs the package scikit-learn")
    import importlib

    train = importlib.import_module(f"examples.loops.{name}").train
    assert train(epochs=6, limit=256, **({"cpu": True} if name == "accelerate" else {"use_cpu": True})) > 0.5
