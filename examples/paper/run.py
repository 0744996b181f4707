"""What the scripts share: the command line, ranks, and a run from its settings to its JSON."""

from __future__ import annotations

import argparse
import ast
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from examples.digits.machine import machine
from examples.paper import methods
from examples.paper.files import Files
from examples.paper.loading import rank, ranks
from examples.paper.stepping import PRECISIONS
from examples.paper.training import Job, Training

NOT_SETTINGS = ("data", "out", "workers", "checkpoint_every")  # where and how, not what
OF_THE_PAPER = ("epochs", "steps", "batch_size", "lr", "weight_decay", "label_smoothing", "image_size")


def command_line(task: str, about: str, models: Iterable[str], datasets: Sequence[str]) -> ArgumentParser:
    """The options of all scripts."""
    parser = ArgumentParser(
        prog=f"python -m examples.paper.{task}", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(task=task)
    add = parser.add_argument
    add("--dataset", choices=datasets, default=datasets[0], help="what is trained on")
    add("--model", choices=list(models), default=next(iter(models)), help="the network")
    add("--method", choices=methods.METHODS, default="base", help="base: SGD, for transformers AdamW")
    add("--preset", choices=methods.PRESETS, help="how GAM is computed (released on CIFAR, otherwise algorithm1)")
    add("--ratio", type=float, default=1.0, help="part of the steps that GAM is in: section 5.5")
    add(
        "--set",
        nargs="+",
        type=assignment,
        default=[],
        metavar="NAME=VALUE",
        help="arguments of FusedGAM over those of the preset",
    )
    add("--seed", type=int, default=0, help="of weights, order, augmentation, wrong labels")
    add("--batch-size", type=int, help="of all processes together")
    add("--lr", type=float, help="the first learning rate of a cosine that ends at 0")
    add("--weight-decay", type=float, help="of all parameters")
    add("--precision", choices=PRECISIONS, default="fp32", help="of autocast")
    add("--channels-last", action="store_true", help="memory layout of images and convolutions")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--cuda-graphs", action="store_true", help="all passes of a step in one CUDA graph")
    add("--deterministic", action="store_true", help="the same bits on a GPU in every run, slower")
    add("--data", default="data", help="folder of the data set, or fake: scikit-learn's digits, to try a script")
    add("--out", default="out/paper", help="folder for checkpoint, CSV and JSON")
    add("--workers", type=int, default=4, help="processes that load images, per GPU")
    add("--checkpoint-every", type=int, default=1000, help="steps")
    return parser


def assignment(text: str) -> tuple[str, Any]:
    """`rho=0.1` as a pair; values are Python's, and inf."""
    name, value = text.split("=")
    return name, float("inf") if value == "inf" else ast.literal_eval(value)


def part(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse(
    parser: ArgumentParser, arguments: Sequence[str] | None, defaults: Callable[[Namespace], dict[str, Any]]
) -> Namespace:
    """The options, with `defaults` in the place of those that were not given; ends the program where they do not fit."""
    options = parser.parse_args(arguments)
    options.set = dict(options.set)
    usual = {name: parser.get_default(name) for name in OF_THE_PAPER if hasattr(options, name)} | defaults(options)
    given = {name: value for name, value in vars(options).items() if name in usual and value is not None}
    options.changed = {name: value for name, value in given.items() if value != usual[name]}
    vars(options).update(usual | given)
    try:
        methods.settings(options)
    except ValueError as error:
        parser.error(str(error))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % processes:
        parser.error(f"--batch-size {options.batch_size} cannot be divided among {processes} processes")
    if options.cuda_graphs and (options.method == "base" or options.precision == "fp16" or options.compile or processes > 1):
        parser.error("--cuda-graphs is for sam and gam on one GPU, without fp16 and --compile")
    if options.cuda_graphs and not torch.cuda.is_available():
        parser.error("--cuda-graphs needs a CUDA device, and torch sees none here")
    return options


def launch(options: Namespace, make: Callable[[Namespace], Job]) -> None:
    """Train what `make` makes, on all processes that torchrun has started; goes on from a checkpoint that is there."""
    with process_group() as device:
        settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
        settings |= {
            "preset": methods.preset_of(options),
            "gam": methods.settings(options),
            "base": methods.base_of(options.model),
        }
        settings |= {"fake": options.data == "fake", "processes": ranks()}
        files = Files(options.out, name_of(options))
        saved = files.load(settings)
        if files.result.exists():
            if rank() == 0:
                print(f"{files.result} is there already.")
            return
        torch.manual_seed(options.seed)
        if rank():
            dist.barrier()  # the first process downloads
        job = make(options)
        if not job.steps:
            raise SystemExit(f"{len(job.images.samples)} images do not fill a batch of {options.batch_size}: --batch-size")
        if ranks() > 1 and not rank():
            dist.barrier()
        with algorithms(options.deterministic):
            training = Training(options, job, device, files, settings)
            if saved:
                training.resume(saved)
            result = training.run()
        if rank() == 0:
            about = {**machine(), **{name: metadata.version(name) for name in ("torchvision", "timm")}}
            if device.type == "cuda":
                about["gpu"] = torch.cuda.get_device_name(device)
            files.write_result({"settings": settings, "machine": about, **result})
            print(f"test accuracy {result['top1']:.2f} %: {files.result}")


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Those that give the same bits every time, or the fastest."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def name_of(options: Namespace) -> str:
    """What the files of a run are called."""
    parts = [options.dataset, options.model, getattr(options, "augmentation", None), options.method, options.preset]
    if options.ratio != 1:
        parts.append(f"ratio{options.ratio:g}")
    if options.data == "fake":
        parts.append("fake")
    if getattr(options, "label_noise", 0):
        parts.append(f"noise{options.label_noise:g}")
    if options.precision != "fp32":
        parts.append(options.precision)
    parts += [f"{name}={value}" for name, value in (options.changed | options.set).items()]
    return "-".join(str(part) for part in (*parts, f"seed{options.seed}") if part)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """This process's device; under torchrun, with a process group."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield torch.device("cuda" if cuda else "cpu")
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
