# make serve [MODEL=folder] [SCHEME=mxfp4|mxfp8|w4a8|w4a16|int4_w4a16] [PORT=30000]   serve a model on this machine's CPU
# make stop [PORT=30000]                                                              stop it
# make test                                                                           the whole test suite
# make check                                                                          linters, type checker, resources of kernels
PYTHON ?= python3
VENV ?= .venv
PORT ?= 30000
MODEL ?=
SCHEME ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# What pip would do with one process. A few packages hold files for other Pythons, whose errors are not ours.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
# Tests start many Pythons, which must find each other's bytecode even where the environment says to write none.
PYTEST := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
AMD_ARCHS := gfx950,gfx942,gfx1100,gfx1151

.PHONY: serve stop test test-fast code-objects check format venv clean

serve: $(VENV)/.serve
	$(BIN)/python -m examples.serve --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(if $(SCHEME),--scheme $(SCHEME))

stop:
	$(BIN)/python -m examples.serve --stop --port $(PORT)

# Two test processes share the cores, and whatever they start works with one thread: two threads a process would wait for
# each other more than they compute. Tests that share something expensive are of one xdist_group, which one process runs.
test: code-objects
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadgroup

test-fast: code-objects
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadgroup -m "not serving"

code-objects: $(VENV)/.test
	$(BIN)/amd-mx build --arch $(AMD_ARCHS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/amd-mx packs lint
	$(BIN)/amd-mx build --report

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.serve

$(VENV)/.serve: pyproject.toml cpu_platform/pyproject.toml requirements/torch.txt requirements/sglang-nodeps.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, SGLang and this package into $(VENV) (about 2.5 GB on disk)"
	$(INSTALL) -r requirements/torch.txt
	$(INSTALL) --no-deps -r requirements/sglang-nodeps.txt
	$(INSTALL) -e ".[cpu,example]"
	$(INSTALL) --no-deps ./cpu_platform
	$(COMPILE)
	touch $@

$(VENV)/.test: $(VENV)/.serve requirements/emulator-nodeps.txt
	$(INSTALL) -e ".[build,test,bench]"
	$(INSTALL) --no-deps -r requirements/emulator-nodeps.txt
	$(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
