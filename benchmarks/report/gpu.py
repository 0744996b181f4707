"""What only `make gpu` records: the device, its stages, the finite difference's cosine, trained networks."""

from __future__ import annotations

from typing import Any

Table = tuple[list[str], list[list[str]]]


def device(machine: dict[str, Any]) -> list[str]:
    """A line about the GPU, where there is one."""
    if "gpu" not in machine:
        return []
    names = {"multiprocessors": "multiprocessors", "L2_MiB": "MiB of L2", "memory_GiB": "GiB"}
    parts = [f"{machine[key]} {unit}" for key, unit in names.items() if key in machine]
    versions = {"driver": "driver", "cuda": "CUDA", "nvcc": "nvcc", "triton": "Triton"}
    parts += [f"{name} {machine[key]}" for key, name in versions.items() if machine.get(key)]
    return [f"{machine['gpu']}: {', '.join(parts)}."]


def stages(found: dict[str, dict[str, Any]]) -> Table:
    """How each stage went."""
    rows = [[name, entry["status"].splitlines()[0], f"{entry['seconds']:.0f}"] for name, entry in found.items()]
    return ["stage", "", "seconds"], rows


def cosine(found: dict[str, Any]) -> Table:
    """A row for each stage of training and precision, a column for each rho'."""
    lengths = list(dict.fromkeys(row["rho_prime"] for row in found["rows"]))
    rows: dict[tuple[int, str], dict[float, str]] = {}
    for row in found["rows"]:
        rows.setdefault((row["step"], row["precision"]), {})[row["rho_prime"]] = f"{row['cosine']:.4f}"
    header = [f"{found['network']}, after steps", "precision", *(f"rho' {length:g}" for length in lengths)]
    return header, [[str(step), name, *(values.get(n, "") for n in lengths)] for (step, name), values in rows.items()]


def trained(found: list[dict[str, Any]]) -> Table:
    """A row for each run."""
    header = ["task", "seed", "", "steps", "passes", "seconds", "training loss", "judged", "judged by"]
    rows = [
        [r["task"], str(r["seed"]), r["contender"], str(r["steps"]), f"{r['passes']:g}", f"{r['seconds']:.1f}",
         f"{r['training_loss']:.4f}", f"{r['judged']:.4f}", r["metric"]]
        for r in found
    ]  # fmt: skip
    return header, rows


SECTIONS = (
    ("The finite difference and the exact product", "cosine", cosine),
    ("Networks trained to the end", "trained", trained),
    ("Stages", "stages", stages),
)
