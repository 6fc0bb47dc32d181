# make setup   .venv from the pinned requirements, by their hashes; quick when nothing changed
# make requirements   pin anew what requirements/*.in ask for
# make demo    a federation of 20 on this machine, from nothing to a trained adapter
# make test    lint, types, unit tests and the process federation (CI adds the containers)
# make test-oldest   unit tests and a process federation on the oldest Flower that is supported
# make sbom    what is in each image, as CycloneDX JSON under build/sbom/
# make audit   known vulnerabilities in the pinned packages, where their databases can be reached
# make bench   every benchmark, results under benchmarks/results/
# make wheelhouse   every wheel an image needs, for a build without a registry

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-stamp
OLDEST := .venv-flower-1.41
# What must hold on the oldest supported Flower too: all but what is about weights.
OLDEST_SUBSET := tests/unit tests/property tests/e2e/test_processes.py -m "not weights"

PACKAGES := app common compat superlink supernode certs embedded evaluation medfed

.PHONY: setup setup-oldest requirements demo test test-oldest lint audit sbom bench wheelhouse clean

setup: $(STAMP)

$(STAMP): $(wildcard requirements/*.txt) requirements/install.sh pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; hint: install Python 3.11 or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (a few minutes the first time)"
	@requirements/install.sh $(BIN)/python runtime dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The same with the oldest Flower that is supported laid over it.
setup-oldest: $(OLDEST)/.setup-stamp

$(OLDEST)/.setup-stamp: $(wildcard requirements/*.txt) requirements/install.sh pyproject.toml
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest supported Flower into $(OLDEST)"
	@requirements/install.sh $(OLDEST)/bin/python runtime dev flower-1.41
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

requirements: setup
	@$(BIN)/python requirements/compile.py

demo: setup
	@$(BIN)/medfed demo

test: setup lint
	@$(BIN)/medfed prepare
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-oldest: setup-oldest
	@MEDFED_CONTAINER_TESTS= $(OLDEST)/bin/python -m pytest $(OLDEST_SUBSET) $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@git ls-files -co --exclude-standard -- '*Dockerfile' | xargs $(BIN)/hadolint
	@git ls-files -co --exclude-standard -- '*.sh' .ci/run | xargs $(BIN)/shellcheck
	@git ls-files -co --exclude-standard -- '*.yml' '*.yaml' | xargs $(BIN)/yamllint --strict

# The packages of these two stay out of .venv.
sbom:
	@$(PYTHON) -m venv build/sbom-tools
	@build/sbom-tools/bin/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	@mkdir -p build/sbom
	@set -e; for image in superlink supernode; do \
	    { echo '[project]'; echo "name = \"medfed-$$image\""; grep '^version = ' pyproject.toml; } \
	        >build/sbom-tools/$$image.toml; \
	    build/sbom-tools/bin/cyclonedx-py requirements requirements/runtime.txt \
	        --pyproject build/sbom-tools/$$image.toml --mc-type application --output-reproducible \
	        --spec-version 1.6 --validate --output-file build/sbom/$$image.cdx.json; \
	done

# Asks databases on the internet, so it is not part of `test`.
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
	rm -rf $(VENV) $(OLDEST)
	rm -f wheelhouse/*.whl wheelhouse/.complete
