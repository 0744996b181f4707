"""The parts of examples/paper: networks, presets, augmentation, the order of images, options."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from paper_recipes import models, vision
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torchvision.datasets import cifar as downloads_of_cifar
from torchvision.datasets import utils as downloads

from examples.paper import cifar, data, imagenet, loading, methods, transfer
from examples.paper.pyramidnet import PyramidNet
from examples.paper.wide_resnet import WideResNet
from gam_fused import FusedGAM

pytestmark = pytest.mark.frameworks

SCRIPTS = {"cifar": cifar, "imagenet": imagenet, "transfer": transfer}

# Millions of parameters with 10 classes, or 1000, as the papers of the networks or torchvision and timm have them.
CIFAR = {"resnet18": 11.17, "resnet101": 42.51, "resnext50": 22.99, "wrn28_2": 1.47, "wrn28_10": 36.48, "vit_tiny": 5.36}
CIFAR |= {"pyramidnet110": 28.485, "pyramidnet110_narrow": 18.324}
IMAGENET = {"resnet50": 25.56, "resnet101": 44.55, "vit_s32": 22.88, "vit_b32": 88.22}


def check(network, size, classes, millions):
    with torch.device("meta"):
        network = network()
        assert network(torch.empty(2, 3, size, size)).shape == (2, classes)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(1e6 * millions, abs=5e3)


@pytest.mark.parametrize("name", sorted(models.CIFAR.keys() - {"tiny", "plain"}))
def test_networks_for_cifar(name):
    check(lambda: models.CIFAR[name](10), 32, 10, CIFAR[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet101", "resnext50"])
def test_small_images_stay_large_enough(name):
    with torch.device("meta"):
        net = models.CIFAR[name](10)
        shapes = []
        net.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
        net(torch.empty(1, 3, 32, 32))
    assert shapes == [(4, 4)]


@pytest.mark.parametrize("name", models.IMAGENET)
def test_networks_for_imagenet(name):
    check(lambda: models.IMAGENET[name](1000, 224), 224, 1000, IMAGENET[name])


@pytest.mark.parametrize(("name", "millions"), [("efficientnet_b0", 4.055), ("swin_t", 27.548)])
def test_networks_for_finetuning(name, millions):
    check(lambda: models.pretrained(name, 37, weights=False), 224, 37, millions)


BUILT = [lambda: WideResNet(10, 2, 5), lambda: PyramidNet(14, 12, 5), lambda: PyramidNet(20, 12, 5, narrow=True)]


@pytest.mark.parametrize("build", BUILT, ids=["wide", "pyramid", "narrow"])
def test_networks_of_this_folder_have_gradients_everywhere(build):
    torch.manual_seed(0)
    network = build()
    x = torch.randn(4, 3, 32, 32)
    network(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    sizes = []
    for module in network:
        x = module(x)
        sizes.append(tuple(x.shape[2:]))
    assert list(dict.fromkeys(sizes)) == [(32, 32), (16, 16), (8, 8), (1, 1), ()]


# Methods.


def options(task, *arguments):
    return SCRIPTS[task].options(["--data", "fake", *arguments])


def combinations():
    """Script, model and dataset."""
    for model, dataset in itertools.product(models.CIFAR, ("cifar10", "cifar100")):
        yield "cifar", model, dataset
    for model in models.IMAGENET:
        yield "imagenet", model, "imagenet"
    for model, dataset in itertools.product(models.PRETRAINED, transfer.DATASETS):
        yield "transfer", model, dataset


@pytest.mark.parametrize(("task", "model", "dataset"), list(combinations()))
def test_every_preset_builds_and_steps(task, model, dataset, capsys):
    given = ["--model", model, "--dataset", dataset]
    built = []
    for method, preset in itertools.product(methods.METHODS, (None, *methods.PRESETS)):
        if preset and "gam" not in method:
            continue
        arguments = [*given, "--method", method, *(["--preset", preset] if preset else [])]
        if preset == "released" and (task != "cifar" or method == "sam+gam" or model == "vit_tiny"):
            with pytest.raises(SystemExit):
                options(task, *arguments)
            assert "--preset" in capsys.readouterr().err
            continue
        chosen = options(task, *arguments)
        net = nn.Linear(4, 3)
        before = net.weight.clone()
        optimizer = methods.optimizer(chosen, net, None)
        x, y = torch.randn(16, 4), torch.randint(3, (16,))
        if isinstance(optimizer, FusedGAM):
            optimizer.step(lambda batch, net=net: cross_entropy(net(batch[0]), batch[1]), (x, y))
        else:
            cross_entropy(net(x), y).backward()
            optimizer.step()
        assert not torch.equal(net.weight, before)
        assert optimizer.param_groups[0]["lr"] == chosen.lr
        built.append((method, methods.preset_of(chosen)))
    kinds = {"base", "sam", "gam", "sam+gam"}
    assert {method for method, _ in built} == kinds


RELEASED = {
    ("cifar100", "resnet18"): (0.2, 0.02, 0.6, (1.0, 0.5), 0.03),
    ("cifar100", "wrn28_10"): (0.2, 0.02, 0.6, (1.0, 0.5), 0.03),
    ("cifar100", "pyramidnet110"): (0.2, 0.04, 0.5, (1.0, 0.7), 0.05),
    ("cifar10", "resnet101"): (0.2, 0.03, 0.1, (1.0, 0.9), 0.05),
    ("cifar10", "pyramidnet110"): (0.2, 0.03, 0.1, (1.0, 0.9), 0.03),
}


@pytest.mark.parametrize(("dataset", "model"), RELEASED)
def test_the_released_values(dataset, model):
    found = methods.settings(options("cifar", "--dataset", dataset, "--model", model, "--method", "gam"))
    assert found.pop("method") == "accelerated"
    assert found.pop("interval") == 1
    assert tuple(found[name] for name in ("rho", "rho_prime", "alpha", "beta", "gamma")) == RELEASED[dataset, model]
    assert len(found) == 5


@pytest.mark.parametrize(("ratio", "interval"), [("1", 1), ("0.5", 2), ("0.1", 10), ("0.05", 20)])
def test_ratio(ratio, interval):
    optimizer = methods.optimizer(options("cifar", "--method", "sam+gam", "--ratio", ratio), nn.Linear(2, 2), None)
    assert optimizer.interval == interval
    assert optimizer.oracle == "sam"
    assert optimizer.rho_prime == 0.1, "SAM's radius on CIFAR-100"


def test_set_goes_over_the_preset():
    chosen = options("cifar", "--method", "gam", "--preset", "algorithm1", "--set", "alpha=inf", "max_ratio=0.5", "rho=0.1")
    found = methods.settings(chosen)
    assert (found["alpha"], found["max_ratio"], found["rho"]) == (math.inf, 0.5, 0.1)
    assert options("cifar", "--method", "gam", "--set", "beta=(1.0,0.4)").set == {"beta": (1.0, 0.4)}


REFUSED = {
    "--preset and --ratio are for gam": ["--method", "sam", "--ratio", "0.1"],
    "--set gives arguments to FusedGAM": ["--set", "rho=0.1"],
    "--ratio 0 must be over 0": ["--method", "gam", "--ratio", "0"],
    "--ratio 0.75 is not every n-th step": ["--method", "gam", "--ratio", "0.75"],
    "cannot be divided among 3 processes": [],
    "--cuda-graphs is for sam and gam": ["--cuda-graphs"],
    "--cuda-graphs needs a CUDA device": ["--cuda-graphs", "--method", "gam"],
    "invalid assignment value: 'rho'": ["--method", "gam", "--set", "rho"],
    "--label-noise: 1.5 is not between 0 and 1": ["--label-noise", "1.5"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3" if "3 processes" in message else "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        options("cifar", *REFUSED[message])
    assert message in capsys.readouterr().err


def test_what_was_changed_is_told():
    chosen = options("cifar", "--lr", "0.05", "--batch-size", "128", "--epochs", "100", "--model", "resnet18")
    assert chosen.changed == {"lr": 0.05, "epochs": 100}
    assert (chosen.weight_decay, chosen.label_smoothing) == (5e-4, 0.1)
    vit = options("imagenet", "--model", "vit_b32")
    assert (vit.changed, vit.epochs, vit.batch_size, vit.weight_decay) == ({}, 300, 256, 1e-4)
    assert options("transfer", "--dataset", "pets").image_size == 224
    assert options("transfer", "--dataset", "cifar10").image_size == 32


# Data.


def test_label_smoothing_is_that_of_the_released_code():
    """Which gives each wrong class an equal part of 0.1; torch's gives the right one a part too."""
    job = cifar.make(options("cifar", "--dataset", "cifar10", "--model", "plain", "--workers", "0"))
    x, y = torch.randn(16, 10, requires_grad=True), torch.randint(10, (16,))
    target = torch.full((16, 10), 0.1 / 9).scatter(1, y[:, None], 0.9)
    expected = torch.autograd.grad(kl_div(log_softmax(x, 1), target, reduction="batchmean"), x)
    found = torch.autograd.grad(cross_entropy(x, y, label_smoothing=job.label_smoothing), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.6, 0.8])
def test_label_noise(fraction):
    labels = [i % 10 for i in range(1000)]
    wrong = data.with_wrong_labels(labels, fraction, 10, seed=1)
    assert sum(a != b for a, b in zip(labels, wrong, strict=True)) == 1000 * fraction
    assert set(wrong) == set(range(10))
    assert wrong == data.with_wrong_labels(labels, fraction, 10, seed=1)
    assert wrong != data.with_wrong_labels(labels, fraction, 10, seed=2)


def test_label_noise_is_in_training_alone():
    job = cifar.make(options("cifar", "--model", "plain", "--label-noise", "0.5", "--workers", "0"))
    train, test = data.load("cifar10", "fake")
    labels = [job.images[0, i][1] for i in range(len(train))]
    assert sum(a != b for a, b in zip(labels, train.targets, strict=True)) == len(train) / 2
    assert torch.cat([y for _, y in job.tests]).tolist() == test.targets


@pytest.mark.parametrize("augmentation", data.AUGMENTATIONS)
def test_an_image_depends_on_seed_epoch_and_index_alone(augmentation):
    train, _ = data.load("cifar10", "fake")
    transform, _ = data.cifar_transforms("cifar10", augmentation)
    images = loading.Augmented(train, transform, None, seed=3)
    state = torch.get_rng_state()
    first = [images[1, i][0] for i in range(8)]
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers do not move"
    torch.manual_seed(99)
    assert all(torch.equal(a, images[1, i][0]) for i, a in enumerate(first))
    assert any(not torch.equal(a, images[2, i][0]) for i, a in enumerate(first))
    other_seed = loading.Augmented(train, transform, None, seed=4)
    assert any(not torch.equal(a, other_seed[1, i][0]) for i, a in enumerate(first))
    assert first[0].shape == (3, 32, 32)


@pytest.mark.parametrize(("dataset", "side"), [("cifar10", 16), ("cifar100", 8)])
def test_cutout(dataset, side):
    transform, _ = data.cifar_transforms(dataset, "cutout")
    white = data.v2.functional.to_pil_image(torch.ones(3, 32, 32))
    torch.manual_seed(0)
    counts = {int((transform.transforms[-1](torch.ones(3, 32, 32)) == 0).all(0).sum()) for _ in range(20)}
    assert counts == {side * side}
    assert transform(white).shape == (3, 32, 32)


def test_the_other_augmentations():
    train, _ = data.imagenet_transforms(64)
    image = data.FakeData(0, 1)[0][0].resize((80, 90))
    assert train(image).shape == (3, 64, 64)
    train, test = data.transfer_transforms("pets", 64)
    assert torch.equal(train(image), test(image)), "no augmentation"
    torch.manual_seed(0)
    small = data.FakeData(0, 1)[0][0]
    train, test = data.transfer_transforms("cifar10", 32)
    assert len({train(small).sum().item() for _ in range(8)}) > 1
    assert data.transfer_transforms("cifar10", 64)[1](small).shape == (3, 64, 64)


def test_steps_are_a_function_of_seed_and_step():
    whole = list(loading.Steps(10, 4, 0, 6, seed=5))
    assert list(loading.Steps(10, 4, 3, 6, seed=5)) == whole[3:]
    assert len(loading.Steps(10, 4, 3, 6, seed=5)) == 3
    assert [{epoch for epoch, _ in batch} for batch in whole] == [{0}, {0}, {1}, {1}, {2}, {2}]
    for epoch in range(3):
        drawn = [index for e, index in itertools.chain(*whole) if e == epoch]
        assert len(set(drawn)) == 8
    assert list(loading.Steps(10, 4, 0, 6, seed=6)) != whole


def test_ranks_share_a_batch(monkeypatch):
    whole = list(loading.Steps(10, 4, 0, 6, seed=5))
    monkeypatch.setattr(loading, "ranks", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(loading, "rank", lambda rank=rank: rank)
        parts.append(list(loading.Steps(10, 4, 0, 6, seed=5)))
    for batch, one, other in zip(whole, *parts, strict=True):
        assert len(one) == len(other) == 2
        assert sorted(one + other) == sorted(batch)


NAMES = {"cifar100": "CIFAR100", "cars": "StanfordCars", "pets": "OxfordIIITPet", "food101": "Food101"}


@pytest.mark.parametrize("dataset", NAMES)
def test_data_that_cannot_be_had_names_the_folder(dataset, tmp_path, monkeypatch):
    def unreachable(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", unreachable)
    with pytest.raises(SystemExit) as caught:
        data.load(dataset, str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{NAMES[dataset]} is not in {tmp_path} and could not be downloaded (")
    assert f"torchvision.datasets.{NAMES[dataset]} lays them out" in message
    assert ("no network" in message) == (dataset != "cars"), "tried; those of the cars have no server any more"


def test_imagenet_that_is_not_there_names_the_folder(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match=f"ImageNet is not in {tmp_path}: put train/ and val/ there"):
        imagenet.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])


def cifar100_in(folder, monkeypatch):
    (folder / "cifar-100-python").mkdir()
    for name, images in (("train", 6), ("test", 4)):
        batch = {"data": np.full((images, 3072), 128, np.uint8), "fine_labels": list(range(images))}
        (folder / "cifar-100-python" / name).write_bytes(pickle.dumps(batch))
    (folder / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(downloads_of_cifar, "check_integrity", lambda *_: True)  # of the real files


def pets_in(folder, monkeypatch):
    (folder / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
    (folder / "oxford-iiit-pet" / "images").mkdir()
    for name, images in (("trainval", 6), ("test", 4)):
        lines = [f"{name}_cat_{i} {i + 1} 1 1" for i in range(images)]
        (folder / "oxford-iiit-pet" / "annotations" / f"{name}.txt").write_text("\n".join(lines))
        for i in range(images):
            data.FakeData(0, 1)[0][0].save(folder / "oxford-iiit-pet" / "images" / f"{name}_cat_{i}.jpg")


def food101_in(folder, monkeypatch):
    for kind in ("meta", "images/pie"):
        (folder / "food-101" / kind).mkdir(parents=True)
    for name, images in (("train", 6), ("test", 4)):
        (folder / "food-101" / "meta" / f"{name}.json").write_text(json.dumps({"pie": [f"pie/{i}" for i in range(images)]}))
    for i in range(6):
        data.FakeData(0, 1)[0][0].save(folder / "food-101" / "images" / "pie" / f"{i}.jpg")


IN = {"cifar100": cifar100_in, "pets": pets_in, "food101": food101_in}


@pytest.mark.parametrize("dataset", IN)
def test_data_that_is_there_is_not_downloaded(dataset, tmp_path, monkeypatch):
    IN[dataset](tmp_path, monkeypatch)
    monkeypatch.setattr(downloads.urllib.request, "urlopen", None)
    train, test = data.load(dataset, str(tmp_path))
    assert (len(train), len(test)) == (6, 4)
    transform, _ = data.transfer_transforms(dataset, 32)
    image, label = loading.Augmented(train, transform, None, seed=0)[0, 5]
    assert image.shape == (3, 32, 32)
    assert label == (0 if dataset == "food101" else 5)


def test_imagenet_from_a_folder(tmp_path):
    for part, name in itertools.product(("train", "val"), ("cat", "dog")):
        (tmp_path / part / name).mkdir(parents=True)
        data.FakeData(0, 1)[0][0].convert("L").save(tmp_path / part / name / "1.png")
    train, test = data.load("imagenet", str(tmp_path))
    assert [len(train), len(test)] == [2, 2]
    image, label = loading.Augmented(train, data.imagenet_transforms(32)[0], None, seed=0)[0, 1]
    assert (image.shape, label) == ((3, 32, 32), 1)


def test_weights_that_cannot_be_had_name_the_folder(tmp_path, monkeypatch):
    def unreachable(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(
        SystemExit, match=f"weights of swin_t are not in {tmp_path}/hub/checkpoints .* Put swin_t-.*pth there"
    ):
        models.pretrained("swin_t", 10)


def test_pretrained_weights_are_in_all_but_the_last_layer(tmp_path, monkeypatch):
    """By a file of the name that torchvision looks for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(models.PRETRAINED["efficientnet_b0"][1].__class__, "get_state_dict", lambda self, **_: saved)
    torch.manual_seed(1)
    saved = models.models.efficientnet_b0().state_dict()
    found = models.pretrained("efficientnet_b0", 10).state_dict()
    assert {name for name in found if found[name].shape != saved[name].shape} == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(found[name], saved[name]) for name in found if not name.startswith("classifier"))


# torchvision for these tests.


@pytest.mark.parametrize(("torch_version", "torchvision"), [("2.13.0+cpu", "0.28.*"), ("2.10.1", "0.25.*")])
def test_torchvision_is_installed_beside_the_environment(torch_version, torchvision, monkeypatch):
    ran = []
    monkeypatch.setattr(vision, "is_there", lambda: False)
    monkeypatch.setattr(vision.torch, "__version__", torch_version)
    monkeypatch.setattr(vision.sys, "argv", ["vision.py", "--constraint", "requirements-dev.txt"])
    monkeypatch.setattr(vision.subprocess, "run", lambda command, check: ran.append(command))
    vision.main()
    (command,) = ran
    assert command[-4:] == ["--constraint", "requirements-dev.txt", f"torchvision=={torchvision}", "timm"]
    assert "--no-deps" in command
    assert command[command.index("--target") + 1] == str(vision.folder())
    assert torch_version in vision.folder().name


def test_torchvision_of_the_environment_is_used(monkeypatch):
    monkeypatch.setattr(vision.subprocess, "run", None)
    assert vision.is_there()
    vision.main()
