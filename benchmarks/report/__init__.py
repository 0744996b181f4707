"""What a run of the suites says: ratios, tables, pictures, and what has moved since another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import figures, tables


def write(record: dict[str, Any], path: Path) -> None:
    """`path` is the JSON's; Markdown and pictures lie beside it."""
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables.document(record))
    figures.save(record, path)
