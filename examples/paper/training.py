"""The loop of all runs: a step per batch, a cosine schedule, checkpoints, and the test set at intervals."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from examples.paper import methods
from examples.paper.files import Files
from examples.paper.loading import Augmented, Steps, rank, ranks, seed_of, training_batches
from examples.paper.stepping import autocast, how_to_step


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        tests: this rank's batches of the test set.
        label_smoothing: as torch's cross entropy takes it.
        warmup: the part of all steps over which the learning rate rises to its first value.
    """

    model: nn.Module
    images: Augmented
    tests: Iterable[tuple[Tensor, Tensor]]
    steps: int
    evaluate_every: int
    label_smoothing: float = 0.0
    warmup: float = 0.0


class Training:
    """A run: everything that a checkpoint holds, and what is made of it."""

    def __init__(self, options: Namespace, job: Job, device: torch.device, files: Files, settings: dict[str, Any]):
        self.options, self.job, self.device, self.files, self.settings = options, job, device, files, settings
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = job.model.to(device, memory_format=self.layout)
        of_ddp = {"device_ids": [device]} if device.type == "cuda" else {}
        self.network = DistributedDataParallel(self.model, **of_ddp) if ranks() > 1 else self.model
        self.scaler = torch.amp.GradScaler(device.type) if options.precision == "fp16" else None
        self.optimizer = methods.optimizer(options, self.network, self.scaler)
        self.schedule = LambdaLR(self.optimizer, self._cosine)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        if self.scaler:
            self.parts["scaler"] = self.scaler
        self.step, self.seconds = 0, 0.0  # seconds: since the last row
        self.rows: list[dict[str, Any]] = []
        self.losses = torch.zeros((), device=device)  # of the steps since the last row, on this rank
        torch.manual_seed(seed_of(options.seed, rank()))  # dropout differs between ranks

    def _cosine(self, step: int) -> float:
        rising = self.job.warmup * self.job.steps
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (self.job.steps - rising)))

    def run(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            JSON-ready: accuracies in percent at the end, and the best of all rows; milliseconds per step; the rows.
        """
        job, options, take_step = self.job, self.options, None
        batches = Steps(len(job.images.samples), options.batch_size, self.step, job.steps, options.seed)
        self.clock = time.perf_counter()
        with tqdm(total=job.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=rank() > 0) as bar:
            for batch in training_batches(job.images, batches, options.workers):
                x, y = self._on_device(batch)
                if take_step is None:
                    rest = (self.network, self.optimizer, self.scaler, job.label_smoothing)
                    take_step = how_to_step(options, *rest, example=(x, y))
                self.model.train()
                self.losses += take_step(x, y)
                self.schedule.step()
                self.step += 1
                bar.update()
                done = self.step == job.steps
                if self.step % job.evaluate_every == 0 or done:
                    self._add_row()
                    bar.set_postfix_str("loss {loss:.3f}, test {top1:.2f} %".format(**self.rows[-1]))
                if self.step % options.checkpoint_every == 0 or done:
                    self._checkpoint()
        return {
            **{name: self.rows[-1][name] for name in ("loss", "top1", "top5")},
            **{f"best_{name}": max(row[name] for row in self.rows) for name in ("top1", "top5")},
            "step_ms": 1e3 * sum(row["seconds"] for row in self.rows) / self.step,
            "skipped_steps": int(getattr(self.optimizer, "skipped_steps", 0)),
            "rows": self.rows,
        }

    def _on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        x = images.to(self.device, memory_format=self.layout, non_blocking=True)
        return x, labels.to(self.device, non_blocking=True)

    # What is measured.

    def _add_row(self) -> None:
        steps = self.step - (self.rows[-1]["step"] if self.rows else 0)
        loss = summed(self.losses).item() / ranks() / steps  # waits for the device
        self._count_seconds()
        seconds, self.seconds = self.seconds, 0.0
        self.losses.zero_()
        self.rows.append({"step": self.step, "loss": loss, **self._evaluate(), "seconds": round(seconds, 3)})
        self.clock = time.perf_counter()
        if rank() == 0:
            self.files.write_curve(self.rows)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """The loss and the accuracy, in percent, on the test set."""
        if ranks() > 1:
            for buffer in self.model.buffers():  # DDP hands out those of rank 0 before a forward in training only
                dist.broadcast(buffer, 0)
        self.model.eval()
        found = torch.zeros(
            4, dtype=torch.float64, device=self.device
        )  # images, sum of losses, right first, among first five
        for batch in self.job.tests:
            x, y = self._on_device(batch)
            with autocast(self.options.precision, self.device):
                output = self.model(x).float()
            hits = output.topk(5).indices == y[:, None]
            found[0] += len(y)
            found[1] += cross_entropy(output, y, reduction="sum")
            found[2] += hits[:, 0].sum()
            found[3] += hits.sum()
        images, loss, first, five = summed(found).tolist()
        return {"test_loss": loss / images, "top1": 100 * first / images, "top5": 100 * five / images}

    # Checkpoints.

    def _checkpoint(self) -> None:
        self._count_seconds()
        own: dict[str, Any] = {"losses": self.losses.cpu(), "random": [torch.get_rng_state()]}
        if self.device.type == "cuda":
            own["random"].append(torch.cuda.get_rng_state(self.device))
        of_ranks = [own] * ranks()
        if ranks() > 1:
            dist.all_gather_object(of_ranks, own)
        if rank() == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            progress = {"step": self.step, "seconds": self.seconds, "rows": self.rows}
            self.files.save({"settings": self.settings, "of_ranks": of_ranks, **progress, **states})
        self.clock = time.perf_counter()  # what was written is not of a step's time

    def resume(self, saved: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step, self.seconds, self.rows = saved["step"], saved["seconds"], saved["rows"]
        own = saved["of_ranks"][rank()]
        self.losses.copy_(own["losses"])
        host, *on_device = own["random"]
        torch.set_rng_state(host)
        for state in on_device:
            torch.cuda.set_rng_state(state, self.device)


def summed(value: Tensor) -> Tensor:
    """Over ranks; in place."""
    if ranks() > 1:
        dist.all_reduce(value)
    return value
