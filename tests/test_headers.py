"""`.ci/headers.py`: of a wheel only headers are kept; what does not compile against them fails, in the compiler's words."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def headers(tmp_path, monkeypatch) -> ModuleType:
    """The module, with folders of its own, and a wheel of a torch whose one header defines OLD."""
    pytest.importorskip("fsspec", reason="no fsspec to read a wheel with; make headers installs it")
    spec = importlib.util.spec_from_file_location("ci_headers", ROOT / ".ci" / "headers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with zipfile.ZipFile(tmp_path / "torch.whl", "w") as wheel:
        wheel.writestr("torch/include/torch/macros.h", "#define OLD 1\n")
        wheel.writestr("torch/lib/libtorch.so", "large")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "wheel", lambda version: (tmp_path / "torch.whl").as_uri())
    (tmp_path / "build").mkdir()
    return module


def test_only_headers_are_kept_and_read_once(headers, tmp_path, monkeypatch):
    folder = headers.headers("1.2.3")
    assert [path.name for path in (tmp_path / "build").rglob("*") if path.is_file()] == ["macros.h"]
    monkeypatch.delattr(headers, "wheel")
    assert headers.headers("1.2.3") == folder


def test_where_a_server_has_no_ranges_the_whole_wheel_is_downloaded(headers, tmp_path, monkeypatch, capsys):
    def download(command, check):
        assert command[1:4] == ["-m", "pip", "download"]
        shutil.copy(tmp_path / "torch.whl", command[command.index("--dest") + 1])

    monkeypatch.setattr(headers, "wheel", lambda version: "file:///no/such/torch.whl")
    monkeypatch.setattr(headers, "subprocess", SimpleNamespace(run=download))
    assert (headers.headers("1.2.3") / "torch" / "macros.h").exists()
    assert "not by ranges" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++)")
@pytest.mark.parametrize(("name", "compiles"), [("OLD", True), ("NEW", False)])
def test_a_source_that_uses_what_is_missing_fails(headers, tmp_path, monkeypatch, capsys, name, compiles):
    source = tmp_path / "a.cpp"
    source.write_text(f"#include <torch/macros.h>\nint a = {name};\n")
    monkeypatch.setattr(headers, "commands", lambda include, _: [["c++", "-fsyntax-only", f"-I{include}", str(source)]])
    assert headers.compiles("1.2.3") is compiles
    assert ("NEW" in capsys.readouterr().out) is not compiles


def test_every_source_is_compiled(headers, tmp_path, monkeypatch):
    monkeypatch.setattr(headers.toolchain, "cuda_missing", lambda: "")
    monkeypatch.setattr(headers.toolchain, "nvcc", lambda: ("nvcc", (13, 0)))
    compiled = {name for command in headers.commands(tmp_path, tmp_path) for name in command if name.startswith(str(ROOT))}
    sources = [path for kind in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(kind)]
    assert compiled == {str(path) for path in sources}
