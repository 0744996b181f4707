"""The tables of examples/paper: the paper's numbers, and runs beside them."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import paper_recipes
import pytest

from examples.paper import report

pytestmark = pytest.mark.frameworks
assert paper_recipes.models  # imported before timm is, for what it does to torchvision

CIFAR = {"task": "cifar", "dataset": "cifar100", "model": "resnet18", "augmentation": "basic"}
IMAGENET = {"task": "imagenet", "dataset": "imagenet", "model": "vit_s32"}
TRANSFER = {"task": "transfer", "dataset": "pets", "model": "swin_t"}


def run(place, method, top1, seed=0, step_ms=10.0, **settings):
    usual = {"preset": "released" if method == "gam" else None, "ratio": 1.0, "label_noise": 0.0, "precision": "fp32"}
    usual |= {"changed": {}, "set": {}, "fake": False, "method": method, "seed": seed}
    scores = {"top1": top1, "top5": top1 + 10, "best_top1": top1 + 0.5, "best_top5": top1 + 10.5}
    return {"settings": {**place, **usual, **settings}, "step_ms": step_ms, **scores}


def runs(place, method, values, **settings):
    return [run(place, method, value, seed, **settings) for seed, value in enumerate(values)]


def cells(text, label):
    """Of the one row that is called so."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def accuracy(table, *place):
    return {key: cell["top1"] for key, cell in report.published().items() if key[0] == table}[(table, *place)]


def test_the_papers_numbers_bear_out_what_its_text_says():
    resnet18, resnet101 = ("cifar100", "resnet18", "basic"), ("cifar100", "resnet101", "basic")
    efficientnet = ("cifar10", "efficientnet_b0", None)
    assert accuracy("cifar", *resnet18, "sam+gam") - accuracy("cifar", *resnet18, "sam") == pytest.approx(1.18)
    assert accuracy("cifar", *resnet101, "sam+gam") - accuracy("cifar", *resnet101, "sam") == pytest.approx(1.10)
    assert accuracy("transfer", *efficientnet, "gam") - accuracy("transfer", *efficientnet, "base") == pytest.approx(1.11)


def test_the_papers_tables_are_complete():
    keys = list(report.published())
    assert [sum(key[0] == task for key in keys) for task in report.TABLES] == [2 * 5 * 4 * 4, 4 * 4, 2 * 5 * 4]
    for (_, *_, method), cell in report.published().items():
        assert method in report.METHODS
        assert 60 < cell["top1"] < cell.get("top5", 100)
        assert cell.get("sd", 0) <= 0.8
    models = {key[2] for key in keys}
    known = paper_recipes.models
    assert models <= known.CIFAR.keys() | known.IMAGENET.keys() | known.PRETRAINED.keys()


# Over all rows of a table, and both halves of it, added up from its text: base, gam, sam, sam+gam.
SUMS = {
    "cifar": (3530.85, 3577.71, 3569.65, 3597.88),
    "imagenet": (293.11, 298.57, 297.65, 299.41),
    "transfer": (833.29, 841.71, 838.21, 845.15),
}


def test_the_papers_tables_add_up():
    for task, sums in SUMS.items():
        of_task = [(key[-1], cell["top1"]) for key, cell in report.published().items() if key[0] == task]
        for method, expected in zip(report.METHODS, sums, strict=True):
            assert sum(top1 for m, top1 in of_task if m == method) == pytest.approx(expected)


def test_table_of_cifar():
    found = report.report(
        [
            *runs(CIFAR, "sam", [79.0, 79.2, 79.4], step_ms=20.0),
            *runs(CIFAR, "gam", [79.0, 79.1, 79.2], step_ms=40.0),
            *runs(CIFAR, "base", [78.2, 78.4, 78.6]),
        ]
    )
    assert "## Table 1: CIFAR from scratch, top-1" in found
    assert "Table 2" not in found
    assert "Other runs" not in found
    base = cells(found, "cifar100 resnet18 basic base fp32")
    assert base == ["3", "78.40 +- 0.20", "78.32 +- 0.32", "yes", "", "", "", "10.0", ""]
    gam = cells(found, "cifar100 resnet18 basic gam released fp32")
    assert gam == ["3", "79.10 +- 0.10", "79.53 +- 0.30", "yes", "+0.70", "+1.21", "yes", "40.0", "4.00"]
    sam = cells(found, "cifar100 resnet18 basic sam fp32")
    assert sam == ["3", "79.20 +- 0.20", "79.27 +- 0.16", "yes", "+0.80", "+0.95", "yes", "20.0", "2.00"]
    assert found.index(" base ") < found.index(" gam ") < found.index(" sam ")


def test_what_does_not_agree():
    found = report.report([*runs(CIFAR, "base", [76.0, 76.2]), *runs(CIFAR, "gam", [79.5, 79.6])])
    assert cells(found, "cifar100 resnet18 basic base fp32")[3] == "no"
    gam = cells(found, "cifar100 resnet18 basic gam released fp32")
    assert (gam[3], gam[6]) == ("yes", "no")


def test_one_run_agrees_with_nothing():
    found = report.report([run(CIFAR, "base", 78.3), run(CIFAR, "gam", 79.5)])
    assert cells(found, "cifar100 resnet18 basic base fp32")[:4] == ["1", "78.30", "78.32 +- 0.32", "-"]
    assert cells(found, "cifar100 resnet18 basic gam released fp32")[4:7] == ["+1.20", "+1.21", "-"]


def test_the_narrow_pyramid_stands_beside_the_papers():
    found = report.report([run({**CIFAR, "model": "pyramidnet110_narrow"}, "base", 82.7)])
    assert cells(found, "cifar100 pyramidnet110_narrow basic base fp32")[2] == "82.74 +- 0.12"


def test_what_the_paper_has_not():
    found = report.report(runs({**CIFAR, "model": "vit_tiny"}, "base", [60.0, 60.5]))
    assert cells(found, "cifar100 vit_tiny basic base fp32")[2:4] == ["", "-"]


def test_table_of_imagenet_has_both_accuracies():
    found = report.report(
        [*runs(IMAGENET, "base", [68.2, 68.4]), *runs(IMAGENET, "sam+gam", [70.0, 70.2], preset="algorithm1")]
    )
    first, five = found.split("## Table 2: ImageNet from scratch, top-5")
    assert cells(first, "imagenet vit_s32 base fp32")[1:3] == ["68.30 +- 0.14", "68.26 +- 0.22"]
    assert cells(five, "imagenet vit_s32 base fp32")[1:3] == ["78.30 +- 0.14", "87.39 +- 0.19"]
    assert cells(five, "imagenet vit_s32 sam+gam algorithm1 fp32")[4:6] == ["+1.80", "+0.84"]


def test_table_of_finetuning_has_no_spreads():
    found = report.report(runs(TRANSFER, "base", [93.4, 93.6]))
    assert cells(found, "pets swin_t base fp32")[:4] == ["2", "93.50 +- 0.14", "93.49", "yes"]


def test_best_is_the_best_evaluation():
    found = report.report(runs(CIFAR, "base", [78.2, 78.4, 78.6]), best=True)
    assert cells(found, "cifar100 resnet18 basic base fp32")[1] == "78.90 +- 0.20"


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"ratio": 0.1}, "ratio 0.1"),
        ({"label_noise": 0.4}, "label_noise 0.4"),
        ({"changed": {"epochs": 20}}, 'changed {"epochs": 20}'),
        ({"set": {"rho": 0.1}}, 'set {"rho": 0.1}'),
    ],
)
def test_runs_of_other_settings_are_in_no_table(changed, label):
    usual = runs(CIFAR, "base", [78.2, 78.4])
    found = report.report([*usual, *runs(CIFAR, "gam", [79.0, 79.4], **changed)])
    tables, others = found.split("## Other runs")
    assert " gam " not in tables
    (row,) = [line for line in others.splitlines() if label in line]
    assert "| 2 | 79.20 +- 0.28 |" in row


def test_presets_and_precisions_have_rows_of_their_own():
    many = [
        run(CIFAR, "gam", 79.0, preset=p, precision=q)
        for p, q in itertools.product(("released", "eighth"), ("fp32", "bf16"))
    ]
    assert len(report.rows(many, "top1", best=False)) == 4


def test_mean_and_spread():
    mean, sd = report.mean_sd([1.0, 2.0, 4.0])
    assert (mean, sd) == (pytest.approx(7 / 3), pytest.approx(statistics.stdev([1.0, 2.0, 4.0])))
    assert math.isnan(report.mean_sd([1.0])[1])


def test_a_folder_of_runs(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for i, each in enumerate([*runs(CIFAR, "base", [78.2, 78.4]), run(CIFAR, "base", 5.0, fake=True)]):
        (tmp_path / ("more" if i else ".") / f"{i}.json").write_text(json.dumps(each))
    report.main([str(tmp_path)])
    assert cells(capsys.readouterr().out, "cifar100 resnet18 basic base fp32")[:2] == ["2", "78.30 +- 0.14"]
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nowhere")])
    assert "there is no finished run in" in capsys.readouterr().err
