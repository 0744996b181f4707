"""Lets pages link to files of the repository, with paths that work in the repository too.

README.md becomes the front page. Every file outside of docs/ that a page links to is copied into the site, to `repository/`.
A link to one that does not exist is a warning, which `mkdocs build --strict` turns into an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FRONT = "index.md"
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.hooks.repository")


def links(text: str) -> set[str]:
    """Relative links of a page, without their anchors."""
    return {match[2] for match in LINK.finditer(CODE.sub("", text))}


def home(name: str) -> Path:
    """Where a page of the site lies in the repository."""
    if name == FRONT:
        return ROOT / "README.md"
    return ROOT / name.removeprefix("repository/") if name.startswith("repository/") else ROOT / "docs" / name


def name_of(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    path = path.relative_to(ROOT)
    if path.as_posix() == "README.md":
        return FRONT
    return path.relative_to("docs").as_posix() if path.parts[0] == "docs" else f"repository/{path.as_posix()}"


def target(name: str, link: str) -> Path:
    return Path(os.path.normpath(home(name).parent / link))


def on_files(files, config):
    """Add the front page, and what pages link to, and what those link to."""
    files.append(File.generated(config, FRONT, abs_src_path=str(ROOT / "README.md")))
    waiting = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    while waiting:
        name = waiting.pop()
        for link in sorted(links(home(name).read_text())):
            path = target(name, link)
            if not path.is_file():
                log.warning("%s links to %s, which is not a file", home(name).relative_to(ROOT), link)
            elif files.get_file_from_path(name_of(path)) is None:
                files.append(File.generated(config, name_of(path), abs_src_path=str(path)))
                if path.suffix == ".md":
                    waiting.append(name_of(path))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as seen from the page's place in the site."""
    here = page.file.src_uri

    def rewritten(match):
        path = target(here, match[2])
        if not path.is_file():
            return match[0]
        return f"{match[1]}{os.path.relpath(name_of(path), Path(here).parent)}{match[3] or ''}{match[4]}"

    return LINK.sub(rewritten, markdown)
