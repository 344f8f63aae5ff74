# make repro    everything, from data to tables and figures        make test    every test
#
# PYTHON=…   the interpreter for the environment (default: python3.11, else another Python from 3.11 to 3.13)
# VENV=…     the folder of the environment (default: .venv)

VENV ?= .venv
ifndef PYTHON
# Each interpreter is run, not only looked up, because a version manager may offer a name that does not start.
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && command -v "$$p" && break; done)
endif

SHELL := bash
VENV_PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))
BIN := $(VENV_PATH)/bin
STAMP := $(VENV)/.installed
CORES := $(shell getconf _NPROCESSORS_ONLN)
PIP = "$(BIN)/python" -m pip install --disable-pip-version-check

# DVC stages and Jupyter kernels find the environment's programs.
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export JUPYTER_PLATFORM_DIRS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env data profile repro benchmark smoke test test-browser lab docs checkpoints cohort lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## Create the environment in .venv from requirements.txt (other targets do this when needed)

# The stamp is a copy of the installed requirements. It is removed first and written last, so that an interrupted
# installation is repeated. An environment without a working interpreter is emptied.
$(STAMP): requirements.txt pyproject.toml
	@if cat $^ | cmp -s - "$@"; then touch "$@"; exit; fi; set -e; \
	test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found as python3.11 or python3;" \
		"expected one of them, or its name: make PYTHON=…" >&2; exit 1; }; \
	rm -f "$@"; \
	if test -f "$(VENV)/pyvenv.cfg" && ! "$(BIN)/python" -c '' 2>/dev/null; then clear=--clear; fi; \
	set -x; \
	"$(PYTHON)" -m venv $$clear "$(VENV)"; \
	$(PIP) -r requirements.txt; \
	$(PIP) --no-deps --no-build-isolation -e .; \
	cat $^ > "$@"

profile: $(STAMP) ## Write the values of a profile into params.yaml (PROFILE=smoke, demo or paper)
	"$(BIN)/python" -m study.config.profiles "$(PROFILE)"
	"$(BIN)/python" -m study.config.pipeline

repro: $(STAMP) ## Run the changed stages, from data to tables and figures (JOBS=4: four at a time; FROM=train: repeat from there)
	@$(if $(PROFILE),echo "error: make repro runs params.yaml as it is; expected make profile PROFILE=$(PROFILE) first" >&2; exit 1)
	"$(BIN)/python" -m study.pipeline $(if $(JOBS),--jobs "$(JOBS)") $(if $(GPUS),--gpus "$(GPUS)") $(if $(FROM),--from "$(FROM)")

smoke: $(STAMP) ## Run everything in the smoke profile, in a copy that is removed afterwards (KEEP=1 keeps it)
	@set -euo pipefail; started=$$SECONDS; \
	copy="$$(mktemp -d "$${TMPDIR:-/tmp}/gridreg-smoke.XXXXXX")"; \
	trap 'status=$$?; if [ -n "$(KEEP)" ]; then echo "kept: $$copy"; \
		else rm -rf "$$copy"; [ $$status = 0 ] || echo "failed; make smoke KEEP=1 keeps the copy to look into" >&2; fi; \
		exit $$status' EXIT; \
	trap 'exit 130' INT TERM HUP; \
	git ls-files -z --cached --others --exclude-standard \
		| while IFS= read -r -d '' file; do if [ -e "$$file" ]; then printf '%s\0' "$$file"; fi; done \
		| tar --null -T - -cf - | tar -xf - -C "$$copy"; \
	unset $$(git rev-parse --local-env-vars); \
	cd "$$copy"; \
	rm dvc.lock; \
	export DVC_SITE_CACHE_DIR="$$copy/.scratch/dvc"; \
	git init --quiet; git add --all; \
	git -c user.name=smoke -c user.email=smoke@localhost -c commit.gpgsign=false -c core.hooksPath=/dev/null \
		commit --quiet --message 'copy for the smoke run'; \
	$(MAKE) --no-print-directory profile PROFILE=smoke VENV="$(VENV_PATH)"; \
	$(MAKE) --no-print-directory repro PROFILE= VENV="$(VENV_PATH)" JOBS="$(or $(JOBS),3)"; \
	echo "tables and figures, after $$((SECONDS - started)) s:"; \
	ls -l figures

benchmark: $(STAMP) ## Measure time and memory of every method again (on an otherwise idle machine)
	"$(BIN)/papermill" notebooks/pipeline/10_benchmark.ipynb executed/10_benchmark.ipynb -k python3
	"$(BIN)/dvc" commit --quiet --force benchmark

# Tests use the CPU, because on a GPU two runs of one training differ in their last bits. Tests run in parallel with one
# thread per process. There is one process more than cores, since one of them only waits for the smoke run.
test test-browser: export GRIDREG_ACCELERATOR ?= cpu
test: export OMP_NUM_THREADS ?= 1

test: $(STAMP) data ## Run every test, among them the whole pipeline in the smoke profile (ARGS="-m 'not slow'" leaves that out)
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/lint-imports" --no-logo
	"$(BIN)/python" -m pytest -n $$(( $(CORES) + 1 )) --dist worksteal --ignore tests/test_browser.py $(ARGS)

test-browser: $(STAMP) data ## Run the interactive notebooks in a Chromium on the path (nothing is installed)
	GRIDREG_BROWSER=required "$(BIN)/python" -m pytest tests/test_browser.py $(ARGS)

lab: $(STAMP) data ## Open the notebooks in JupyterLab
	"$(BIN)/python" -m jupyterlab $(ARGS)

# Data and checkpoints come from the DVC remote inside the repository.
data: $(STAMP)
	@{ test -d data && test -d checkpoints; } || "$(BIN)/python" -m study.pipeline --pull

docs: $(STAMP) data ## Execute the quick start and the lessons, and write their copies into docs/rendered
	"$(BIN)/python" -m study.rendering

checkpoints: $(STAMP) ## Copy the models of the interactive notebooks from the results: an adaptive Bayesian GridReg for each cohort
	for dataset in prostate pelvis brain; do mkdir -p checkpoints/$$dataset; \
		cp -f results/train/$$dataset/gridreg-bayesian/* checkpoints/$$dataset/ || exit; done
	"$(BIN)/dvc" add checkpoints && "$(BIN)/dvc" push checkpoints.dvc

cohort: PROFILE ?= paper
cohort: $(STAMP) ## Make the simulated cohort of a profile in cohorts/ (PROFILE=paper; PATIENTS=2: only two patients per split, for a trial)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m study.cohorts.simulate.cohort --profile "$(PROFILE)" --out "cohorts/$(PROFILE)" \
		--workers "$(CORES)" $(if $(PATIENTS),--patients "$(PATIENTS)")

lock: ## Update the second section of requirements.txt after a change to the first; other versions are kept
	@set -euo pipefail; \
	work="$$(mktemp -d)"; trap 'rm -rf "$$work"' EXIT; \
	sed '/^# ---- Transitive/,$$d' requirements.txt > "$$work/direct.txt"; \
	sed -nE 's/^([A-Za-z0-9._-]+)==.*/\1/p' "$$work/direct.txt" > "$$work/names.txt"; \
	sed '1,/^# ---- Transitive/d' requirements.txt > "$$work/kept.txt"; \
	"$(PYTHON)" -m venv "$$work/venv"; \
	"$$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$$work/direct.txt" \
		$(if $(UPGRADE),,-c "$$work/kept.txt"); \
	"$$work/venv/bin/python" -m pip freeze --all \
		| grep -vixE "($$(sed 's/[-_.]/[-_.]/g' "$$work/names.txt" | paste -sd '|' -)|pip|wheel|triton|nvidia-.*|cuda-.*)==.*" \
		| LC_ALL=C sort -f > "$$work/pins.txt"; \
	{ sed '/^# Nothing of CUDA/q' requirements.txt; cat "$$work/pins.txt"; } > "$$work/new.txt"; \
	cp "$$work/new.txt" requirements.txt; wc -l < "$$work/pins.txt"
