"""The pytest plugin of the suites `bench_*.py`: cases from `cases(plan)` of the module, a time limit, what was left out.

Cases run in the order the module gives, the important ones first; when the time is used up the others are left out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, Plan
from benchmarks.clock import Clock
from benchmarks.machine import machine

NO_TIME = "no time left for it"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gam_fused benchmarks")
    group.addoption("--device", type=torch.device, default="cpu")
    group.addoption("--seconds", type=float, default=float("inf"), help="after them no further case begins")
    group.addoption("--lines", type=Path, required=True, help="JSON lines to write: the machine, then one for each case")
    group.addoption("--rehearse", action="store_true", help="tiny sizes: shows that everything runs")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.option.device)
    if device.type == "cuda":
        torch.cuda.init()  # the timers look whether it is
    config.pluginmanager.register(Suite(config, device), "gam_fused suite")


class Suite:
    """One run of one suite."""

    def __init__(self, config: pytest.Config, device: torch.device):
        self.plan = Plan(device, config.option.rehearse)
        self.end = time.monotonic() + config.option.seconds
        self.lines: Path = config.option.lines
        self.write({"machine": machine(device)})

    def write(self, line: dict[str, Any]) -> None:
        """At once, so that a run that is killed leaves what it has measured."""
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", metafunc.module.cases(self.plan), ids=str)

    @pytest.hookimpl
    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self.end:
            pytest.skip(NO_TIME)

    @pytest.hookimpl
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        case: Case = item.callspec.params["case"]  # type: ignore[attr-defined]
        line = {"cell": case.cell, "contestant": case.contestant, "block": case.block}
        if call.excinfo is not None:
            skipped = call.excinfo.errisinstance(pytest.skip.Exception)
            self.write(line | {"why": str(call.excinfo.value) if skipped else f"failed: {call.excinfo.exconly()}"})
        elif call.when == "call":
            benchmark = item.funcargs["benchmark"]  # type: ignore[attr-defined]
            self.write(line | {"seconds": benchmark.stats.stats.data, "facts": benchmark.extra_info})


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    return request.config.pluginmanager.get_plugin("gam_fused suite").plan


@pytest.fixture(scope="session")
def clock(plan: Plan) -> Clock:
    return Clock(plan.device)
