"""What a run leaves in its folder: a checkpoint to go on from, a CSV of its curve, and one JSON when it is done.

Each is written beside its place and then moved there, so that a kill at any moment leaves the old or the new one.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from examples.digits.report import without_nan


class Files:
    """`<folder>/<name>.pt`, `.csv` and `.json`."""

    def __init__(self, folder: str, name: str):
        self.checkpoint, self.curve, self.result = (Path(folder, f"{name}.{kind}") for kind in ("pt", "csv", "json"))
        Path(folder).mkdir(parents=True, exist_ok=True)

    def load(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The last checkpoint of a run with these settings, or None.

        Raises:
            SystemExit: it is of another run.
        """
        if not self.checkpoint.exists():
            return None
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        differ = [name for name in settings if saved["settings"].get(name) != settings[name]]
        if differ:
            there = ", ".join(f"{name} {saved['settings'].get(name)}" for name in differ)
            here = ", ".join(f"{name} {settings[name]}" for name in differ)
            raise SystemExit(f"{self.checkpoint} is of a run with {there}, not {here}; move it away or give another --out")
        return saved

    def save(self, checkpoint: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write(self.checkpoint, buffer.getvalue())

    def write_curve(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write(self.curve, text.getvalue().encode())

    def write_result(self, result: dict[str, Any]) -> None:
        write(self.result, (json.dumps(without_nan(result), indent=1) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """All of `content`, or what was there before."""
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
