# make setup   .venv from the pinned requirements; quick when nothing changed
# make demo    a federation of 20 on this machine, from nothing to a trained adapter
# make test    lint, types, unit tests and the process federation (CI adds the containers)
# make audit   known vulnerabilities in the pinned packages, where their databases can be reached
# make bench   every benchmark, results under benchmarks/results/
# make wheelhouse   every wheel an image needs, for a build without a registry

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-stamp

PACKAGES := app compat superlink supernode certs embedded evaluation medfed

.PHONY: setup demo test lint audit bench wheelhouse clean

setup: $(STAMP)

$(STAMP): requirements/runtime.txt requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; hint: install Python 3.11 or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/medfed demo

test: setup lint
	@$(BIN)/medfed prepare
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@git ls-files -co --exclude-standard -- '*Dockerfile' | xargs $(BIN)/hadolint
	@git ls-files -co --exclude-standard -- '*.sh' .ci/run | xargs $(BIN)/shellcheck
	@git ls-files -co --exclude-standard -- '*.yml' '*.yaml' | xargs $(BIN)/yamllint --strict

# Asks databases on the internet, so it is not part of `test`; its packages stay out of .venv.
audit:
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@build/audit/bin/pip-audit --disable-pip --no-deps --requirement requirements/runtime.txt

bench: setup
	@$(BIN)/python -m benchmarks.training
	@$(BIN)/python -m benchmarks.rounds
	@$(BIN)/python -m benchmarks.gateway

wheelhouse: setup
	@PYTHON=$(BIN)/python requirements/wheelhouse.sh

clean:
	rm -rf $(VENV)
	rm -f wheelhouse/*.whl wheelhouse/.complete
