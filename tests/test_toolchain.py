"""What setup.py compiles for, without a GPU and without compiling: csrc/toolchain.py."""

from __future__ import annotations

import pytest
import toolchain
import torch

KNOWN = ["compute_80", "compute_86", "compute_89", "compute_90", "compute_100", "compute_120"]
ALL = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with GPUs of the given compute capabilities, a toolkit and a number of cores."""
    for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
case "$1" in --version) echo "release 13.0";; --list-gpu-arch) printf '%s\\n' {" ".join(KNOWN)};; esac
""")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    def set_up(*capabilities: tuple[int, int], cores: int = 2) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(toolchain.os, "cpu_count", lambda: cores)

    return set_up


def codes() -> list[str]:
    return [option.split(",code=")[1] for option in toolchain.architectures()]


def threads() -> list[str]:
    commands = toolchain.compile_commands([], toolchain.Path("objects")).values()
    assert len({command[0] for command in commands}) == 2, "nvcc and the C++ compiler"
    return sorted({option for command in commands for option in command if option.startswith("--threads")})


def test_one_gpu_is_built_for_alone(machine):
    machine((9, 0))
    assert codes() == ["sm_90"]


def test_gpus_of_several_kinds_are_built_for_once_each(machine):
    machine((9, 0), (8, 0), (9, 0))
    assert codes() == ["sm_80", "sm_90"]


def test_without_a_gpu_every_architecture_is_built(machine):
    machine()
    assert codes() == ALL


def test_a_gpu_that_the_toolkit_does_not_know_takes_the_ptx_of_the_full_list(machine):
    machine((13, 0))
    assert codes() == ALL


def test_a_wheel_takes_the_full_list_where_there_is_a_gpu(machine, monkeypatch):
    """As `make wheel` asks for it."""
    machine((9, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "all")
    assert codes() == ALL
    assert "TORCH_CUDA_ARCH_LIST:-all" in (toolchain.CSRC.parent / "Makefile").read_text().split("\nwheel:")[1]


def test_a_list_goes_before_the_gpus(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;10.0a+PTX")
    assert codes() == ["sm_86", "sm_100a", "compute_100a"]


def test_cores_beyond_the_sources_go_to_architectures(machine, monkeypatch):
    machine(cores=16)
    assert threads() == ["--threads=2"]
    monkeypatch.setenv("MAX_JOBS", "4")
    assert threads() == [], "as many compilers as MAX_JOBS says, one thread each"
    monkeypatch.setenv("MAX_JOBS", "64")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert threads() == [], "one architecture is one thread's work"


def test_the_first_error_lines_of_a_compiler():
    printed = f"""nvcc warning : something old
{toolchain.CSRC}/cuda/combine.cuh(12): error: identifier "x" is undefined
    x = 1;
    ^
{toolchain.CSRC}/cuda/combine.cuh(13): error: identifier "y" is undefined
2 errors detected in the compilation of "combine.cu".
"""
    first, second = toolchain.first_errors(printed).splitlines()
    assert first == 'csrc/cuda/combine.cuh(12): error: identifier "x" is undefined'
    assert second == 'csrc/cuda/combine.cuh(13): error: identifier "y" is undefined'
    for line in (
        "nvcc fatal   : Unsupported gpu architecture 'compute_70'",
        "ptxas error   : Entry function uses too much shared data",
        "a.cpp:3:10: fatal error: missing.h: No such file or directory",
        'a.cuh(3): error #20: "x" is undefined',
        "/usr/bin/ld: cannot find -ltorch",
    ):
        assert toolchain.first_errors(f"begins\n{line}\nends") == line
    assert toolchain.first_errors("begins\nKilled\n") == "begins\nKilled"
