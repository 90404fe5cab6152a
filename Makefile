# `make demo` and `make test` do all the set-up on a fresh machine; it needs Python 3.11 or newer with venv.
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready
CLUSTER := .venv/.cluster
EXTRAS := .venv/.extras
MLFLOW := .venv/mlflow-server/.ready
OLDEST := .venv-oldest
BUNDLE := dist/device
# Each worker has one half of the files, so that what the tests of a file share is made once; who is done first helps.
PYTEST := $(BIN)/python -m pytest -c pyproject.toml -n 2 --dist worksteal

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

# What the routers are and what runs here is asked once (moe_lab/sweep/remembered.py): then `list` and `plan` are quick.
# The first Python that will do. A name may exist and not run (a version manager's shim), so each is tried.
$(READY): pyproject.toml constraints.txt
	@set -e; rm -f $(READY); \
	for candidate in "$${PYTHON:-python3}" python3 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then echo "moe-lab needs Python 3.11 or newer with the venv module; set PYTHON=..." >&2; exit 1; fi; \
	echo "installing into .venv with $$("$$python" --version)"; \
	"$$python" -m venv --clear .venv; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,export,netron]'; \
	$(BIN)/moe-lab list routers > /dev/null; $(BIN)/moe-lab plan -m 'router=glob(*)' > /dev/null; \
	$(BIN)/moe-lab plan -m experiment=router_swap > /dev/null; \
	touch $(READY)

$(CLUSTER): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,slurm]'
	touch $(CLUSTER)

# The extras that only some tests need; without them these skip.
$(EXTRAS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[ray,slurm,trackers,search,energy,docs,notebook,release]'
	touch $(CLUSTER) $(EXTRAS)

# A server for the tests of tracker=mlflow. The whole of MLflow asks for an older pyarrow than ours, so it is apart.
$(MLFLOW): $(READY)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check mlflow==3.17.2
	touch $(MLFLOW)

.PHONY: help demo test test-quick test-all test-oldest lint docs bench-check bench-experts bench-sweep device-bundle clean
.PHONY: cluster-packages cluster-up cluster-down

demo: $(READY) ## Other routers in a trained model on this machine: a table, and a report page
	$(BIN)/moe-lab -m experiment=router_swap

lint: $(READY) ## Style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror kernels/*.h kernels/*.c* moe_lab/analyses/*.cpp
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: $(READY) ## Lint and the tests that CI runs (under 8 minutes on two cores)
	@$(MAKE) --no-print-directory -j 2 lint test-quick  # types take a minute of one core

test-quick: $(READY)
	$(PYTEST) -m "not slow"

test-all: lint $(EXTRAS) $(MLFLOW) ## Lint and every test
	$(PYTEST)

# torch and what has no lower bound stay at the versions of constraints.txt; scripts/oldest.py says what else.
$(OLDEST)/.ready: pyproject.toml constraints.txt scripts/oldest.py $(READY)
	$(BIN)/python -m venv --clear $(OLDEST)
	$(BIN)/python scripts/oldest.py > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

test-oldest: $(OLDEST)/.ready ## The tests that CI runs, with the oldest packages that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -c pyproject.toml -n 2 --dist worksteal -m "not slow"

# Without --quiet, which makes --strict count no warnings.
docs: $(EXTRAS) ## The documentation site, in build/site; a broken link fails
	$(BIN)/python -m mkdocs build --strict
	@echo 'build/site/index.html'

bench-check: $(READY) ## Every quoted ratio that needs no GPU beside today's; fails if one no longer holds (idle machine)
	$(BIN)/python -m benchmarks.check

bench-experts: $(READY) ## experts=grouped against transformers' experts on this CPU, in alternated rounds
	$(BIN)/python -m benchmarks.experts_cpu

bench-sweep: $(READY) ## What a sweep costs, how fast tables and report are, how often compare is wrong (half an hour)
	$(BIN)/python -m benchmarks.sweep_overhead
	$(BIN)/python -m benchmarks.aggregate
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.aa_study
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.aa_study --load 2

# hydra-core's antlr4 runtime is published as source only, so it is built here.
device-bundle: $(READY) ## Wheels of moe-lab and what a GPU machine without network lacks
	rm -rf $(BUNDLE) build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt -w $(BUNDLE) \
	  . hydra-core omegaconf antlr4-python3-runtime plotly onnxscript onnx-ir nvidia-ml-py
	rm -rf build
	@echo 'There, in the folder that holds $(BUNDLE):'
	@echo 'python3 -m pip install --no-index --no-deps --force-reinstall $(BUNDLE)/*.whl'

cluster-packages: $(CLUSTER) ## What cluster-up needs: the Python packages, and Debian's (root)
	apt-get update --quiet --quiet
	apt-get install --quiet --quiet --yes --no-install-recommends munge slurmctld slurmd slurm-client

cluster-up: $(READY) ## Start a Slurm and a Ray cluster of two nodes on this machine (KIND=ray: only that)
	@$(BIN)/python scripts/cluster.py up $(KIND)

cluster-down: $(READY) ## End them
	@$(BIN)/python scripts/cluster.py down $(KIND)

clean: ## Remove the virtual environment and everything built
	rm -rf .venv $(OLDEST) build dist *.egg-info
