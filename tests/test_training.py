"""The training program from end to end on tiny settings, its data, its table and its picture's label placement."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the training program needs scikit-learn")
pytest.importorskip("matplotlib", reason="the training program needs matplotlib")

from examples.digits import __main__ as program
from examples.digits.data import POOL, load
from examples.digits.methods import BASES, METHODS, Method
from examples.digits.net import conv_net
from examples.digits.plot import spread
from examples.digits.report import diverged, summary, table, without_folder
from examples.digits.training import Settings, run, train_step

EXAMPLES = Path(__file__).parents[1] / "examples"


def rows_of(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_the_program_writes_a_table_a_document_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "step_times", partial(program.step_times, rounds=2))
    given = ["--out", str(tmp_path / "new"), "--epochs", "1", "--seeds", "1", "--workers", "1"]
    program.main([*given, "--bases", "SGD", "--methods", "base", "finite_difference"])
    assert "largest Hessian eigenvalue" in capsys.readouterr().out
    document = json.loads((tmp_path / "new" / "digits.json").read_text())
    assert [row["label"] for row in document["rows"]] == ["SGD", "SGD + GAM"]
    assert document["rows"][0]["cost"] == 1.0
    assert len(document["runs"]) == 2
    assert document["machine"]["torch"] == torch.__version__
    assert (tmp_path / "new" / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, base):
    data, model = load(seed=0), conv_net(seed=0)
    optimizer = Method(name, base, base_options={"lr": 1e-3}).optimizer(model)
    losses = [float(train_step(model, optimizer, data.images[:64], data.true_labels[:64])) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_seed_gives_the_same_run_twice():
    first, second = (run(Method("sam"), 3, Settings(epochs=1, validation=True)) for _ in range(2))
    assert first["eigenvalue"] > 0
    assert {**first, "step_ms": 0} == {**second, "step_ms": 0}


def test_a_fifth_of_the_labels_is_wrong():
    data = load(seed=4)
    assert len(data.images) == POOL
    assert int((data.labels != data.true_labels).sum()) == POOL // 5
    assert not torch.equal(data.labels, load(seed=5).labels)
    assert torch.equal(data.test_labels, load(seed=5).test_labels)


def test_validation_never_sees_a_test_image_and_takes_the_pool_in_five_folds():
    test_images = rows_of(load(seed=0).test_images)
    pool = rows_of(load(seed=0).images)
    judged = []
    for seed in range(100, 105):
        data = load(seed, validation=True)
        assert (len(data.images), len(data.test_images)) == (400, 100)
        assert not rows_of(data.images) & rows_of(data.test_images)
        assert not (rows_of(data.images) | rows_of(data.test_images)) & test_images
        judged += list(data.test_images)
    assert rows_of(judged) == pool


def test_the_table_shows_divergence_and_costs():
    sgd = {"base": "SGD", "name": "base", "label": "SGD", "options": {}, "base_options": {}}
    good = {**sgd, "test": 0.8, "eigenvalue": 4.0, "step_ms": 2.0, "loss": 0.1}
    bad = {**good, "name": "sam", "label": "SGD + SAM", "eigenvalue": float("nan"), "step_ms": 5.0}
    guessing = {**bad, "eigenvalue": 1.0, "loss": 2.31}
    assert [diverged(r) for r in (good, bad, guessing)] == [False, True, True]
    rows = summary([good, {**good, "test": 0.9}, bad, guessing])
    assert [r["cost"] for r in rows] == [1.0, 2.5]
    text = table(rows)
    assert "85.0 +- 7.1" in text
    assert "2 of 2 runs diverged" in text


def test_a_diverged_run_is_reported_not_raised():
    result = run(Method("base", base_options={"lr": 1e20}), 0, Settings(epochs=1, validation=True))
    assert math.isnan(result["eigenvalue"])
    assert diverged(result)


def test_a_document_tells_no_folder():
    assert without_folder(["--seeds", "3", "--out", "/somewhere", "--quick"]) == ["--seeds", "3", "--quick"]
    assert without_folder(["--out=/somewhere"]) == without_folder(["--out", "/somewhere"]) == []


def test_labels_of_the_picture_do_not_overlap():
    heights = spread([1.0] * 4, [50.0, 50.0, 51.0, 90.0], reach=1.0, gap=5.0, bottom=0.0, top=100.0)
    assert heights[3] == 90.0
    assert min(b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)) > 4.9


def test_examples_stand_on_their_own():
    for path in EXAMPLES.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (benchmarks|studies)", path.read_text(), re.MULTILINE), path
