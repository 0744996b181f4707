"""Diagnostics and flatness during training: a loop of one's own, Lightning, the Hugging Face Trainer."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import batch, bits, make, mixed_net, mlp, regression, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gam_fused import flatness
from gam_fused.integrations.flatness_log import FlatnessLog, figures

mse = nn.functional.mse_loss
HOW = {"steps": 2, "samples": 3, "tolerance": 0.1}
FLATNESS = {"loss", "gradient_norm", "zeroth_order_flatness", "first_order_flatness", "largest_eigenvalue"}
NAMES = {f"flatness/{name}" for name in FLATNESS | {"trace", "trace_error"}}


def test_figures_are_the_report_and_the_diagnostics():
    model, (x, y) = mlp(), batch()
    optimizer = make(model.parameters())
    assert figures(model, mse, [(x, y)], optimizer, **HOW).keys() == NAMES
    optimizer.step(regression(model, x, y))
    found = figures(model, mse, [(x, y)], optimizer, **HOW)
    report = flatness.report(model, mse, [(x, y)], **HOW)
    seen = optimizer.diagnostics()
    assert found == {f"flatness/{k}": v for k, v in report.items()} | {f"gam/{k}": float(v) for k, v in seen.items()}
    assert "gam/sharpness" in found
    assert figures(model, mse, [(x, y)], torch.optim.SGD(model.parameters()), **HOW).keys() == NAMES


def test_diagnostics_are_there_where_the_base_optimizer_wraps_one():
    class Wrapping(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.optimizer = "what it wraps"

    model, (x, y) = mlp(), batch()
    optimizer = make(model.parameters(), Wrapping)
    assert optimizer.optimizer == "what it wraps", "an attribute of the base is handed on"
    optimizer.step(regression(model, x, y))
    assert "gam/sharpness" in figures(model, mse, [(x, y)], optimizer, **HOW)


def test_a_log_writes_after_every_so_many_steps_and_epochs():
    model, (x, y) = mlp(), batch()
    optimizer, written = make(model.parameters()), []
    log = FlatnessLog(model, mse, [(x, y)], optimizer, write=written.append, every_steps=2, every_epochs=2, **HOW)
    counts = []
    for _ in range(4):
        for _ in range(3):
            optimizer.step(regression(model, x, y))
            log.after_step()
            counts.append(len(written))
        log.after_epoch()
    assert counts == [0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7]
    assert len(written) == 8
    assert written[-1] == figures(model, mse, [(x, y)], optimizer, **HOW)


def test_a_log_that_would_never_write_is_an_error():
    with pytest.raises(ValueError, match="nothing would be logged"):
        FlatnessLog(mlp(), mse, [], write=print)
    with pytest.raises(ValueError, match="every_steps=0 must be at least 1"):
        FlatnessLog(mlp(), mse, [], write=print, every_steps=0)


# Lightning.


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_logs_them_and_trains_as_without(accumulate):
    lightning_loops = pytest.importorskip("lightning_loops", reason="needs the package lightning")
    from gam_fused.integrations.lightning_flatness import FlatnessCallback

    class Module(lightning_loops.Module):
        def forward(self, x):
            return self.net(x)

        def log_dict(self, values):
            super().log_dict(values)
            logged.append((self.trainer.global_step, values))

    def weights(*callbacks):
        torch.manual_seed(0)
        module = Module()
        trainer = lightning_loops.fit(module, more=callbacks, accumulate_grad_batches=accumulate)
        return list(map(bits, module.state_dict().values())), trainer

    logged = []
    shuffled = DataLoader(lightning_loops.data(), 5, shuffle=True)
    callback = FlatnessCallback(mse, shuffled, every_steps=4, every_epochs=2, batches=2, **HOW)
    with_log, trainer = weights(callback)
    per_epoch = lightning_loops.BATCHES // accumulate
    steps = [step for step, _ in logged]
    assert steps == [*range(4, 2 * per_epoch + 1, 4), 2 * per_epoch]
    assert logged[0][1].keys() >= NAMES | {"gam/sharpness", "gam/gradient_norm"}
    assert float(trainer.callback_metrics["flatness/trace"]) == pytest.approx(logged[-1][1]["flatness/trace"])
    same(with_log, weights()[0])


# Hugging Face.


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mixed_net()

    def forward(self, x, labels):
        return {"loss": mse(self.net(x), labels)}


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_hugging_face_trainer_logs_them_and_trains_as_without(tmp_path):
    pytest.importorskip("accelerate", reason="needs the package accelerate")
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    from gam_fused.integrations.transformers import GAMTrainerMixin
    from gam_fused.integrations.transformers_flatness import FlatnessCallback

    class Trainer(GAMTrainerMixin, transformers.Trainer):
        pass

    rows = [{"x": x, "labels": y} for x, y in TensorDataset(*batch(20))]

    def train(log):
        model = Named()
        options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
        arguments = transformers.TrainingArguments(tmp_path, **options, gradient_accumulation_steps=2, logging_steps=100)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(make(model.parameters()), None))
        if log:
            loader = DataLoader(rows, 5, shuffle=True)
            trainer.add_callback(FlatnessCallback(trainer, loader, every_steps=2, every_epochs=2, batches=2, **HOW))
        trainer.train()
        return list(map(bits, model.state_dict().values())), trainer.state.log_history

    with_log, history = train(log=True)
    found = [row for row in history if "flatness/trace" in row]
    assert [row["step"] for row in found] == [2, 4, 6, 6]
    assert found[0].keys() >= NAMES | {"gam/sharpness", "gam/gradient_norm"}
    same(with_log, train(log=False)[0])
