"""The scripts of examples/paper from end to end, a few steps each on fake data."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import paper_recipes
import pytest
import ranks
import torch
from on_gpu import NO_DEVICE
from torch.nn.functional import cross_entropy

from examples.paper import cifar, files, imagenet, loading, stepping, training, transfer

pytestmark = pytest.mark.frameworks
PROGRAM = Path(__file__).with_name("paper_recipes.py")

FEW = ["--data", "fake", "--workers", "0", "--batch-size", "16"]  # 4 steps an epoch
TINY = [*FEW, "--model", "tiny", "--lr", "0.02"]
# All that a run has to find again: augmentation, dropout, a loss scale, plain steps between GAM's, wrong labels.
ALL = [*TINY, "--method", "sam+gam", "--preset", "eighth", "--ratio", "0.5", "--precision", "fp16", "--epochs", "3"]
ALL += ["--augmentation", "autoaugment", "--label-noise", "0.2", "--checkpoint-every", "3"]


def run(script, folder, *arguments):
    """The JSON of a run and its last checkpoint."""
    script.main([*arguments, "--out", str(folder)])
    return result_of(folder)


def result_of(folder):
    (path,) = Path(folder).glob("*.json")
    return json.loads(path.read_text()), torch.load(path.with_suffix(".pt"), weights_only=True)


def check_equal(found, expected, where=""):
    """All bits of two checkpoints, but for the time that steps took."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"seconds"}:
            check_equal(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_equal(one, other, f"{where}[{i}]")
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected, where


@pytest.fixture(autouse=True)
def _on_the_cpu(request, monkeypatch):
    """The same bits on every machine; processes that start here see no GPU either."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class Killed(BaseException):
    """Not an Exception: nothing on the way may take it for one."""


def stop_after(steps, monkeypatch):
    """The next run ends before its step number `steps` + 1."""
    taken = 0

    def counting(*arguments, **keywords):
        step = stepping.how_to_step(*arguments, **keywords)

        def counted(x, y):
            nonlocal taken
            if taken == steps:
                raise Killed
            taken += 1
            return step(x, y)

        return counted

    monkeypatch.setattr(training, "how_to_step", counting)


# From end to end.


@pytest.mark.parametrize("method", ["base", "gam", "sam", "sam+gam"])
def test_cifar(method, tmp_path):
    result, checkpoint = run(cifar, tmp_path, *TINY, "--method", method, "--epochs", "5")
    losses = [row["loss"] for row in result["rows"]]
    assert losses[-1] < 0.8 * losses[0]
    assert [row["step"] for row in result["rows"]] == [4, 8, 12, 16, 20]
    assert result["top1"] == result["rows"][-1]["top1"]
    assert result["best_top1"] == max(row["top1"] for row in result["rows"])
    assert result["skipped_steps"] == 0
    assert result["step_ms"] > 0
    assert result["settings"]["method"] == method
    assert checkpoint["schedule"]["_last_lr"] == [0.0]
    assert checkpoint["model"]["1.num_batches_tracked"] == 20, "once a step, and none while testing"
    with next(tmp_path.glob("*.csv")).open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses


OTHERS = {
    "imagenet": (imagenet, ["--model", "vit_s32", "--image-size", "32", "--epochs", "2"]),
    "efficientnet_b0": (transfer, ["--dataset", "food101", "--image-size", "32", "--steps", "8", "--lr", "0.02"]),
    "swin_t": (transfer, ["--model", "swin_t", "--dataset", "cifar100", "--steps", "4", "--lr", "0.0005"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_scripts(name, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "EVALUATE_EVERY", 2)
    script, arguments = OTHERS[name]
    method = "base" if name == "swin_t" else "gam"
    result, checkpoint = run(script, tmp_path, *FEW, *arguments, "--method", method)
    losses = [row["loss"] for row in result["rows"]]
    assert losses[-1] < losses[0]
    assert result["settings"]["base"] == ("SGD" if name == "efficientnet_b0" else "AdamW")
    assert all(torch.isfinite(t).all() for t in checkpoint["model"].values())


@pytest.mark.parametrize("method", ["base", "sam"])
def test_the_loop_is_the_usual_one(method, tmp_path):
    """Two epochs by hand, with torch's SGD; SAM of no radius is SGD."""
    arguments = [*FEW, "--model", "plain", "--lr", "0.02", "--epochs", "2"]
    _, found = run(cifar, tmp_path, *arguments, "--method", method, *(["--set", "rho=0.0"] if method == "sam" else []))
    options = cifar.options(arguments)
    torch.manual_seed(options.seed)
    job = cifar.make(options)
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for step, batch in enumerate(loading.Steps(64, 16, 0, 8, seed=0)):
        images, labels = zip(*(job.images[place] for place in batch), strict=True)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 8)) / 2
        optimizer.zero_grad()
        cross_entropy(job.model(torch.stack(images)), torch.tensor(labels), label_smoothing=0.1 * 100 / 99).backward()
        optimizer.step()
    torch.testing.assert_close(found["model"], job.model.state_dict())


def test_labels_are_smoothed_in_training_alone(tmp_path):
    one_step = [*FEW, "--model", "plain", "--batch-size", "64", "--epochs", "1"]
    (plain, _), (smooth, _) = (
        run(cifar, tmp_path / s, *one_step, "--lr", "0", "--label-smoothing", s) for s in ("0", "0.5")
    )
    assert abs(smooth["loss"] - plain["loss"]) > 1e-3
    assert smooth["rows"][0]["test_loss"] == plain["rows"][0]["test_loss"]


def test_the_learning_rate_rises_and_falls():
    run = SimpleNamespace(job=SimpleNamespace(steps=100, warmup=0.1))
    rates = [training.Training._cosine(run, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[10], rates[55], rates[100]) == (1.0, pytest.approx(0.5), pytest.approx(0.0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["base", "gam"])
def test_autocast(precision, method, tmp_path, monkeypatch):
    used = set()

    def with_spy(classes):
        net = paper_recipes.tiny(classes)
        net[0].register_forward_hook(lambda module, inputs, output: used.add(output.dtype))
        return net

    monkeypatch.setitem(paper_recipes.models.CIFAR, "tiny", with_spy)
    arguments = ["--method", method, "--precision", precision, "--channels-last", "--epochs", "3"]
    result, checkpoint = run(cifar, tmp_path, *TINY, *arguments)
    assert result["rows"][-1]["loss"] < 0.8 * result["rows"][0]["loss"]
    assert used == {stepping.PRECISIONS[precision]}
    assert ("scaler" in checkpoint) == (precision == "fp16")


def test_channels_last(tmp_path):
    _, expected = run(cifar, tmp_path / "first", *TINY, "--epochs", "1")
    _, found = run(cifar, tmp_path / "last", *TINY, "--epochs", "1", "--channels-last")
    assert found["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not expected["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-4, atol=1e-5)


def test_compiled_and_captured_steps_are_those_of_the_loop(tmp_path, monkeypatch):
    asked = []

    def compiled(network):
        asked.append("compile")
        return network

    def captured(optimizer, loss_of, example):
        asked.append("capture")
        assert [t.shape for t in example] == [(16, 3, 32, 32), (16,)]
        return lambda *batch: optimizer.step(lambda b: loss_of(*b), batch)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(stepping, "capture_step", captured)
    arguments = [*TINY, "--method", "gam", "--epochs", "2"]
    _, expected = run(cifar, tmp_path / "plain", *arguments)
    _, found = run(cifar, tmp_path / "compiled", *arguments, "--compile")
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    with monkeypatch.context() as with_gpu:
        with_gpu.setattr(torch.cuda, "is_available", lambda: True)
        options = cifar.options([*arguments, "--cuda-graphs"])
    options.out = str(tmp_path / "graphs")
    cifar.launch(options, cifar.make)
    torch.testing.assert_close(result_of(tmp_path / "graphs")[1]["model"], expected["model"], rtol=0, atol=0)
    assert asked == ["compile", "capture"]


def test_deterministic_is_for_the_run_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training.Training, "run", lambda self: seen.append(torch.are_deterministic_algorithms_enabled()) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(cifar, tmp_path, *TINY, "--deterministic")
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


# Going on.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        return run(cifar, tmp_path_factory.mktemp("uninterrupted"), *ALL)


@pytest.mark.parametrize("steps", [1, 3, 5, 11])
def test_a_run_that_was_stopped_goes_on_exactly(steps, uninterrupted, tmp_path, monkeypatch):
    result, expected = uninterrupted
    with monkeypatch.context() as patched:
        stop_after(steps, patched)
        with pytest.raises(Killed):
            run(cifar, tmp_path, *ALL)
    assert not list(tmp_path.glob("*.json"))
    assert len(list(tmp_path.glob("*.pt"))) == (steps >= 3)
    torch.manual_seed(12345)  # a new process starts elsewhere
    found_result, found = run(cifar, tmp_path, *ALL)
    check_equal(found, expected)
    assert found_result["top1"] == result["top1"]
    assert result["settings"]["gam"]["interval"] == 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_run_that_was_killed_goes_on_exactly(uninterrupted, tmp_path):
    """In a process of its own, with a worker that loads images, killed as soon as there is a checkpoint."""
    arguments = [*ALL, "--workers", "1", "--out", str(tmp_path)]
    command = [sys.executable, str(PROGRAM), "cifar", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "SECONDS_PER_STEP": "0.4"})
    end = time.monotonic() + ranks.TIMEOUT
    while not list(tmp_path.glob("*.pt")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "killed before it was done"
    _, found = run(cifar, tmp_path, *ALL)
    check_equal(found, uninterrupted[1])


def test_a_checkpoint_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    path = tmp_path / "run.pt"
    files.write(path, b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write(path, b"after")
    assert path.read_bytes() == b"before"


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(4, patched)
        with pytest.raises(Killed):
            run(cifar, tmp_path, *ALL)
    with pytest.raises(SystemExit, match=r"is of a run with channels_last False, not channels_last True; move it away"):
        run(cifar, tmp_path, *ALL, "--channels-last")
    run(cifar, tmp_path, *ALL)
    with pytest.raises(SystemExit, match="is of a run with"):  # also where it is done
        run(cifar, tmp_path, *ALL, "--channels-last")


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    run(cifar, tmp_path, *TINY, "--epochs", "1")
    stop_after(0, monkeypatch)
    run(cifar, tmp_path, *TINY, "--epochs", "1")
    assert "is there already" in capsys.readouterr().out


# Several processes.


def of_two_ranks(rank, folder):
    torch.cuda.is_available = lambda: False
    with pytest.MonkeyPatch.context() as patched:
        stop_after(5, patched)
        with pytest.raises(Killed):
            cifar.main([*ALL, "--out", f"{folder}/stopped"])
    cifar.main([*ALL, "--out", f"{folder}/stopped"])
    cifar.main([*ALL, "--out", f"{folder}/whole"])


def test_two_ranks_go_on_exactly(tmp_path):
    ranks.run(2, of_two_ranks, str(tmp_path))
    (_, found), (_, expected) = result_of(tmp_path / "stopped"), result_of(tmp_path / "whole")
    check_equal(found, expected)
    first, second = (own["random"][0] for own in found["of_ranks"])
    assert not torch.equal(first, second), "dropout differs between ranks"
    # Both have judged the same network, that of the checkpoint.
    options = cifar.options(ALL)
    alone = training.Training(options, cifar.make(options), torch.device("cpu"), files.Files(str(tmp_path), "alone"), {})
    alone.model.load_state_dict(expected["model"])
    for name, value in alone._evaluate().items():
        assert expected["rows"][-1][name] == pytest.approx(value, rel=1e-5)


def test_torchrun_computes_what_one_process_does(tmp_path):
    arguments = [*FEW, "--model", "plain", "--method", "gam", "--lr", "0.02", "--epochs", "2"]
    _, expected = run(cifar, tmp_path / "one", *arguments)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(PROGRAM), "cifar", *arguments, "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, timeout=ranks.TIMEOUT, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    result, found = result_of(tmp_path / "two")
    assert result["settings"]["processes"] == 2
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-4, atol=1e-5)
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["top1"] == other["top1"]


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_DEVICE), reason=NO_DEVICE or "there")
def test_captured_steps_go_on_exactly_on_a_gpu(tmp_path, monkeypatch):
    """And compute what eager steps do."""
    arguments = [*TINY, "--method", "gam", "--ratio", "0.5", "--precision", "bf16", "--channels-last", "--deterministic"]
    arguments += ["--epochs", "3", "--checkpoint-every", "3"]
    _, eager = run(cifar, tmp_path / "eager", *arguments)
    _, expected = run(cifar, tmp_path / "whole", *arguments, "--cuda-graphs")
    torch.testing.assert_close(expected["model"], eager["model"], rtol=1e-2, atol=1e-2)
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        with pytest.raises(Killed):
            run(cifar, tmp_path / "stopped", *arguments, "--cuda-graphs")
    _, found = run(cifar, tmp_path / "stopped", *arguments, "--cuda-graphs")
    check_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_DEVICE), reason=NO_DEVICE or "there")
@pytest.mark.parametrize("method", ["base", "sam+gam"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_goes_on_exactly_on_a_gpu(method, precision, tmp_path, monkeypatch):
    arguments = [
        *TINY,
        "--method",
        method,
        "--precision",
        precision,
        "--deterministic",
        "--epochs",
        "3",
        "--checkpoint-every",
        "3",
    ]
    _, expected = run(cifar, tmp_path / "whole", *arguments)
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        with pytest.raises(Killed):
            run(cifar, tmp_path / "stopped", *arguments)
    _, found = run(cifar, tmp_path / "stopped", *arguments)
    check_equal(found, expected)
