"""The interval study: statistics on made-up runs, the choice of alpha, passes per step, and the program from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn", reason="the interval study needs scikit-learn")
pytest.importorskip("matplotlib", reason="the interval study needs matplotlib")

from examples.digits.data import load
from examples.digits.net import conv_net
from examples.digits.training import train_step
from gam_fused import FusedGAM
from studies.interval import __main__ as program
from studies.interval import report
from studies.interval.__main__ import evaluate, main, write
from studies.interval.cost import over
from studies.interval.estimates import chosen_alpha, judged, paired_difference, part_kept, result_rows, sweep_rows
from studies.interval.settings import ALPHAS, ORACLES, RATIOS, WINDOW

RESULTS = Path(__file__).parents[1] / "studies" / "results"
NOISE = (0.01, -0.02, 0.0, 0.03, -0.01)  # of a seed, the same in all settings


def made_up(method, accuracies, loss=0.5, eigenvalue=3.0):
    facts = {**asdict(method), "label": method.label, "loss": loss, "eigenvalue": eigenvalue}
    return [{**facts, "seed": seed, "test": accuracy} for seed, accuracy in enumerate(accuracies)]


# Statistics.


def test_the_interval_of_a_paired_difference_is_students():
    estimate = paired_difference([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])  # 0.1, 0.2, 0.3
    reach = 4.302653 * 0.1 / math.sqrt(3)  # t at 97.5 %, 2 degrees of freedom
    assert estimate == pytest.approx({"value": 0.2, "low": 0.2 - reach, "high": 0.2 + reach}, abs=1e-7)
    assert math.isnan(paired_difference([0.5], [0.4])["low"])


def test_the_part_kept_of_a_gain():
    alone = [0.80 + noise for noise in NOISE]
    full = [0.90 + 2 * noise for noise in NOISE]
    half = [(a + b) / 2 for a, b in zip(alone, full, strict=True)]
    assert part_kept(half, alone, full) == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})

    unequal = [a + gain for a, gain in zip(alone, (0.02, 0.05, 0.08, 0.04, 0.06), strict=True)]
    estimate = part_kept(unequal, alone, [a + 0.1 for a in alone])
    assert estimate["value"] == pytest.approx(0.5)
    assert 0.2 < estimate["low"] < 0.42  # means of five of 0.2, 0.5, 0.8, 0.4, 0.6
    assert 0.58 < estimate["high"] < 0.8


@pytest.mark.parametrize("full_gain", [0.0, -0.1], ids=["none", "a loss"])
def test_without_a_full_gain_there_is_no_part_of_it(full_gain):
    alone = [0.80 + noise for noise in NOISE]
    full = [0.80 + full_gain - noise for noise in NOISE]
    assert part_kept(alone, alone, full) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.6, 0.9, "confirmed"), (0.2, 0.4, "refuted"), (0.4, 0.6, "not decided"), (math.nan, math.nan, "not decided")],
)
def test_a_part_of_the_claim_is_judged_by_the_whole_interval(low, high, verdict):
    assert report.verdict_of(low, high, 0.5, above=True) == verdict
    opposite = {"confirmed": "refuted", "refuted": "confirmed"}.get(verdict, verdict)
    assert report.verdict_of(low, high, 0.5, above=False) == opposite


def test_ratios_of_times_are_taken_within_a_round():
    assert over([2.0, 6.0, 20.0], [1.0, 2.0, 10.0])["value"] == 2.0  # the medians' own ratio would be 3


# The choice of alpha.


def test_alpha_is_not_chosen_where_a_run_diverged():
    oracle = ORACLES["sgd"]
    runs = made_up(oracle.method(0.1, 1.0), [0.80, 0.80])
    runs += made_up(oracle.method(0.1, 2.0), [0.85, 0.83])
    runs += made_up(oracle.method(0.1, 4.0), [0.84, 0.84])  # equal to 2
    runs += made_up(oracle.method(0.1, 8.0), [0.95]) + made_up(oracle.method(0.1, 8.0), [0.95], eigenvalue=math.nan)
    runs += made_up(oracle.method(0.5, 1.0), [0.99], loss=math.log(10))
    rows = sweep_rows(runs, ["sgd"])
    assert {(r["ratio"], r["alpha"]): r["diverged"] for r in rows} == {
        (0.1, 1.0): 0,
        (0.1, 2.0): 0,
        (0.1, 4.0): 0,
        (0.1, 8.0): 1,
        (0.5, 1.0): 1,
    }
    assert chosen_alpha(rows, "sgd", 0.1) == 2.0
    assert chosen_alpha(rows, "sgd", 0.5) is None
    assert ("sgd", 0.1, 1.0) in judged(rows, ["sgd"]), "the default alpha is judged beside the chosen one"


# Rows and verdicts.


def study(sparse_gain, sparse_cost):
    """Rows of made-up runs: SGD 80 %, GAM on every step 90 %; at 1/10 `sparse_gain` more than SGD, at `sparse_cost`."""
    oracle, sweep, runs = ORACLES["sgd"], [], made_up(ORACLES["sgd"].alone, [0.8 + noise for noise in NOISE])
    for ratio in RATIOS:
        gain = 0.1 if ratio == 1 else sparse_gain
        wobble = (0.001, -0.001, 0.002, -0.002, 0.0)
        method = oracle.method(ratio, 2.0)
        runs += made_up(method, [0.8 + gain + a + b for a, b in zip(NOISE, wobble, strict=True)])
        runs += made_up(oracle.method(ratio), [0.81 + noise for noise in NOISE])
        sweep += made_up(method, [0.9] * 5)
    windows = []
    for ratio in (0.0, *RATIOS):
        cost = {"value": sparse_cost, "q20": sparse_cost - 0.01, "q80": sparse_cost + 0.01}
        facts = {"oracle": "sgd", "ratio": ratio, "passes_over_alone": oracle.passes(ratio)}
        windows.append({**facts, "over_alone": cost, "over_sgd": cost})
    return result_rows(runs, sweep_rows(sweep, ["sgd"]), ["sgd"], windows)


@pytest.mark.parametrize(
    ("gain", "cost", "most", "cheap", "verdict"),
    [
        (0.09, 1.1, "confirmed", "confirmed", "confirmed"),
        (0.09, 1.3, "confirmed", "refuted", "refuted"),
        (0.02, 1.1, "refuted", "confirmed", "refuted"),
        (0.09, 1.25, "confirmed", "not decided", "not decided"),
        (-0.03, 1.3, "refuted", "refuted", "refuted"),
    ],
)
def test_the_verdict_follows_from_the_runs(gain, cost, most, cheap, verdict):
    rows = study(gain, cost)
    row = report.find(rows, "sgd", 0.1)
    assert row["alpha"] == 2.0
    assert row["over_alone"]["value"] == pytest.approx(gain)
    assert row["over_full"]["value"] == pytest.approx(gain - 0.1)
    assert row["kept"]["value"] == pytest.approx(gain / 0.1)
    (claim,) = report.claims(rows, ["sgd"])
    assert (claim["keeps_most"], claim["cheap"], claim["verdict"]) == (most, cheap, verdict)
    assert f"**{verdict}**" in claim["text"]
    assert f"on 1/10 of the steps (alpha 2) {100 * gain:+.1f} [" in claim["text"]
    assert f"| 1/10 of the steps | 2 | {80.2 + 100 * gain:.1f} +- " in report.table(rows), "NOISE has a mean of 0.2 points"
    assert "| 1/10 of the steps | 1 (default) | 81.2 +- " in report.table(rows)


# Cost.


@pytest.mark.parametrize("ratio", [0.0, *RATIOS])
@pytest.mark.parametrize("key", ORACLES)
def test_passes_are_those_that_the_optimizer_makes(key, ratio):
    model, data, calls = conv_net(seed=0), load(seed=0), [0]
    optimizer = ORACLES[key].method(ratio).optimizer(model)
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for _ in range(WINDOW):
        train_step(model, optimizer, data.images[:8], data.labels[:8])
    assert calls[0] == round(WINDOW * ORACLES[key].passes(ratio))
    assert calls[0] / WINDOW == pytest.approx(ORACLES[key].passes(ratio))


@pytest.mark.parametrize("key", ORACLES)
def test_ratio_0_is_what_the_steps_between_do(key):
    data = load(seed=0)
    trained = []
    for ratio in (0.0, 0.05):
        model = conv_net(seed=0).double()
        optimizer = ORACLES[key].method(ratio).optimizer(model)
        if isinstance(optimizer, FusedGAM):
            optimizer.session.steps_taken = 1  # the next GAM step is the twentieth
        for i in range(5):
            x, y = data.images[16 * i : 16 * (i + 1)].double(), data.labels[16 * i : 16 * (i + 1)]
            train_step(model, optimizer, x, y)
        trained.append(cross_entropy(model(data.images[:64].double()), data.labels[:64]).item())
    assert trained[0] == pytest.approx(trained[1], rel=1e-9)


def test_every_window_holds_whole_intervals_and_the_default_alpha_is_tried():
    for ratio in RATIOS:
        assert WINDOW % round(1 / ratio) == 0
        assert 1.0 in ALPHAS[ratio]


# The program.


def test_the_page_and_the_picture_follow_from_the_recorded_runs(tmp_path):
    result = evaluate(json.loads((RESULTS / "interval.json").read_text()))
    write(result, tmp_path)
    assert (tmp_path / "interval.md").read_text() == (RESULTS / "interval.md").read_text()
    assert (tmp_path / "interval.png").read_bytes().startswith(b"\x89PNG")


def test_the_program_writes_its_results_and_measures_the_cost_anew(tmp_path, capsys, monkeypatch):
    """Of made-up runs, every setting a little better than the one before; their cost is measured."""

    def made_up_runs(jobs, workers):
        facts = {"train": 0.9, "skipped_steps": 0}
        return [made_up(method, [0.8 + 1e-3 * i])[0] | facts | {"seed": seed} for i, (method, seed, _) in enumerate(jobs)]

    monkeypatch.setattr(program, "run_all", made_up_runs)
    out = ["--out", str(tmp_path), "--rounds", "1"]
    main([*out, "--quick", "--oracles", "sgd"])
    first = json.loads((tmp_path / "interval.json").read_text())
    assert [r["ratio"] for r in first["rows"] if r["chosen"]] == [0.0, *RATIOS]
    assert {run["seed"] for run in first["runs"]} == {0, 1}
    assert {run["seed"] for run in first["sweep"]["runs"]} == {100, 101}
    assert first["sweep"]["settings"]["validation"]
    assert not first["settings"]["validation"]
    assert first["machine"]["torch"] == torch.__version__
    assert first["claims"][0]["text"] in capsys.readouterr().out

    (tmp_path / "interval.png").unlink()
    main([*out, "--timing-only"])
    second = json.loads((tmp_path / "interval.json").read_text())
    assert second["timing"]["windows"] != first["timing"]["windows"]
    for part in ("machine", "settings", "runs", "sweep"):
        assert second[part] == first[part], part
    for before, after in zip(first["rows"], second["rows"], strict=True):
        assert {k: v for k, v in before.items() if k[:4] != "cost"} == {k: v for k, v in after.items() if k[:4] != "cost"}
    assert (tmp_path / "interval.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "interval.png").exists()
