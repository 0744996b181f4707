"""README and docs: links resolve, code parses, tests that are named exist, figures are those of the results."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch

import gam_fused

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Those that the site makes of headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pages
def test_links_resolve(page):
    for link, anchor in re.findall(r"\]\(([^)#\s:]*)(#[^)\s]*)?\)", prose(page)):
        path = (page.parent / link) if link else page
        assert path.exists(), f"{link} does not exist"
        assert not anchor or anchor[1:] in anchors(path), f"{link}{anchor} is no heading"


@pages
def test_code_parses(page):
    for block in re.findall(r"^( *)```python\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(textwrap.dedent(block[1]))


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_first_code_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    names = {"model": torch.nn.Linear(4, 3), "loss_fn": torch.nn.functional.cross_entropy, "epochs": 1}
    names["loader"] = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    exec(blocks[0], names)
    assert names["loss"].shape == ()


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^  - .+?: (\S+\.md)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(listed) == {"index.md"} | {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_tests_behind_the_guarantees_exist():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    assert not named - defined
    assert not [name for name in re.findall(r"tests/\w+\.py", text) if not (ROOT / name).is_file()]


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {gam_fused.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == gam_fused.__version__


def table(page: str, head: str) -> dict[str, list[str]]:
    """Rows of the table whose head contains `head`, by their first cell."""
    lines = (ROOT / page).read_text().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and head in line)
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = rest
    return rows


def rows_of_the_study() -> dict[tuple[str, str], dict]:
    document = json.loads((ROOT / "studies" / "results" / "defaults.json").read_text())
    return {(row["network"], row["kind"]): row for row in document["rows"]}


def percent(row: dict) -> str:
    return f"{100 * row['value']:.1f} +- {100 * row['sd']:.1f}"


def test_the_table_of_readme_is_the_study_of_defaults():
    rows = rows_of_the_study()
    kinds = {
        "SGD": "given",
        "SGD, tuned": "base",
        "SGD, tuned, twice as long": "base_long",
        "SAM": "sam",
        "SAM at a small batch": "sam_small_batch",
        "SAM on a quarter of the batch, every 10th step": "sam_part",
        "GAM": "gam",
        "GAM on an eighth of the batch": "gam_part",
    }
    shown = table("README.md", "noisy digits, accuracy")
    assert set(shown) == set(kinds)
    for label, kind in kinds.items():
        digits, mnist = rows["digits", kind], rows["mnist", kind]
        assert digits["seeds"] == mnist["seeds"] == 10
        assert digits["cost"] == mnist["cost"]
        curvatures = [f"{row['eigenvalue']:.1f}" for row in (digits, mnist)]
        assert shown[label] == [f"{digits['cost']:g}", percent(digits), curvatures[0], percent(mnist), curvatures[1]]
    assert [rows[network, "gam_part"]["cost"] for network in ("digits", "mnist")] == [1.5, 1.5]


def test_the_table_of_defaults_is_the_study():
    rows = rows_of_the_study()
    kinds = ("given", "default_finite_difference", "default_exact", "default_accelerated", "default_sam")
    shown = table("docs/studies.md", "| base, as given |")
    settings = json.loads((ROOT / "studies" / "results" / "defaults.json").read_text())["settings"]
    assert list(shown) == [settings[network]["title"] for network in settings]
    for network, cells in zip(settings, shown.values(), strict=True):
        found = [rows[network, kind] for kind in kinds]
        assert cells == [f"{r['value']:.3f} +- {r['sd']:.3f}" if network == "gpt" else percent(r) for r in found]
        given, careful = found[0], found[1:3]
        sign = -1 if network == "gpt" else 1
        for row in careful:  # "no worse than the base beyond the spread of the seeds"
            assert sign * (row["value"] - given["value"]) > -given["sd"] - row["sd"]
            assert not row["failed"]


def test_the_table_of_clients_is_the_study():
    rows = json.loads((ROOT / "studies" / "results" / "clients.json").read_text())["rows"]
    shown = table("docs/studies.md", "physics-informed, Adam")
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["options"]:
            assert list(row["options"]) == ["method"], "the defaults"
            ratios.setdefault(row["options"]["method"], []).append(row["ratio"])
    assert {f"`{method}`": [f"{r:.2f}" for r in found] for method, found in ratios.items()} == shown
    for method in ("finite_difference", "exact", "gradient_penalty"):
        assert max(ratios[method]) <= 1.10


def test_the_table_of_the_studies_is_the_digits_run():
    document = json.loads((ROOT / "benchmarks" / "results" / "digits.json").read_text())
    names = {
        "": "base",
        " + SAM": "sam",
        " + GAM": "finite_difference",
        " + GAM (`finite_difference`)": "finite_difference",
        " + GAM, exact": "exact",
        " + SAM + GAM": "sam_gam",
        " + GAM, accelerated": "accelerated",
        " + SAM, rho 0.2": "sam_tuned",
        " + GAM, rho 0.2": "finite_difference_tuned",
        " + GAM, an eighth of the batch": "finite_difference_part",
    }
    rows = {(row["base"], row["name"]): row for row in document["rows"]}
    shown = table("docs/studies.md", "times the base's cost per step")
    for label, cells in shown.items():
        base = label.split(" ")[0]
        row = rows[base, names[label.removeprefix(base)]]
        accuracy = f"{100 * row['test']:.1f} +- {100 * row['test_sd']:.1f}"
        eigenvalue = f"{row['eigenvalue']:.2f} +- {row['eigenvalue_sd']:.2f}"
        assert cells == [accuracy, eigenvalue, f"{row['cost']:.1f}"], label


def test_the_overhead_of_readme_is_that_of_the_benchmark():
    document = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json").read_text())
    cells = document["suites"]["training"]["cells"]
    gam = {name: cell["GAM, finite_difference"] for name, cell in cells.items()}
    beyond = {name: round(100 * (row["over_passes"][0] - 1), 1) for name, row in gam.items()}
    small = [value for name, value in beyond.items() if gam[name]["images"] in (8, 16)]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"adds {beyond['resnet18_cifar, 128 images, fp32, eager']} % on ResNet-18 (batch 128)" in text
    assert f"{beyond['vit_s_32, 32 images, fp32, eager']} % on ViT-S/32 (batch 32)" in text
    assert f"missed at batch 8 and 16 ({min(small)} to {max(small)} %)" in text
    assert f"takes milliseconds ({beyond['digits, 64 images, fp32, eager']} %)" in text
