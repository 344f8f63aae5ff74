# make repro    everything, from data to tables and figures        make test    every test
#
# PYTHON=…   the interpreter to build the environment with (default: python3.11, else a python3 that is new enough)
# VENV=…     where the environment is (default: .venv)
# JOBS=…     trainings side by side (default: 2; on GPUs as many as there are, or fit)

VENV ?= .venv
ifndef PYTHON
# An interpreter is tried out, not only looked up: a version manager may offer a name that does not start.
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && command -v "$$p" && break; done)
endif

SHELL := bash
VENV_PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))
BIN := $(VENV_PATH)/bin
STAMP := $(VENV)/.installed

# DVC stages and Jupyter kernels find the environment's programs and the package in this folder.
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
export DVC_NO_ANALYTICS := 1
export JUPYTER_PLATFORM_DIRS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env repro benchmark smoke test test-browser lab checkpoints cohort lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## Make the environment in .venv from requirements.txt (every other target does so, too)

# The stamp is the list that was installed. It goes first and comes last: an interrupted installation is taken up
# again. An environment whose interpreter is gone is emptied.
$(STAMP): requirements.txt requirements-no-deps.txt
	@if cat $^ | cmp -s - "$@"; then touch "$@"; exit; fi; set -e; \
	test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found as python3.11 or python3;" \
		"expected one of them, or its name: make PYTHON=…" >&2; exit 1; }; \
	rm -f "$@"; \
	if test -f "$(VENV)/pyvenv.cfg" && ! "$(BIN)/python" -c '' 2>/dev/null; then clear=--clear; fi; \
	set -x; \
	"$(PYTHON)" -m venv $$clear "$(VENV)"; \
	"$(BIN)/python" -m pip install --disable-pip-version-check -r requirements.txt; \
	"$(BIN)/python" -m pip install --disable-pip-version-check --no-deps -r requirements-no-deps.txt; \
	cat $^ > "$@"

# Data and checkpoints come with the clone, out of the DVC remote inside the repository.
DATA = { test -d data && test -d checkpoints; } || "$(BIN)/dvc" pull --quiet data.dvc checkpoints.dvc

# JOBS stages run side by side, the cores shared between them: small networks gain more from that than from many threads
# each, and costs are the benchmark's, not measured here. Groups follow each other as they need each other. One DVC runs
# up to EACH stages of a group, as it takes seconds to start. `dvc repro` then does what is left.
# Where there are several GPUs, each job slot has its own.
JOBS ?= 2
EACH ?= 3
GPUS ?= $(if $(CUDA_VISIBLE_DEVICES),1,$(shell nvidia-smi --list-gpus 2>/dev/null | wc -l))
ON_ITS_GPU = $(if $(filter-out 0 1,$(GPUS)),--process-slot-var=SLOT bash -c 'CUDA_VISIBLE_DEVICES=$$((SLOT % $(GPUS))) exec "$$@"' -)
BESIDE ?= preprocess@ train@,ablate@,evaluate_untrained@,false_correspondence evaluate@,evaluate_refined@ tables,figures,approximation,uncertainty
CORES := $(shell getconf _NPROCESSORS_ONLN)
define SIDE_BY_SIDE
for stage in $(BESIDE); do stages=$$("$(BIN)/dvc" status --json \
	| "$(BIN)/python" -c 'import json, sys; print(*(n for n in json.load(sys.stdin) if n.startswith(tuple(sys.argv[1].split(",")))))' $$stage) \
	|| exit; share=$$(( ($$(wc -w <<< "$$stages") + $(JOBS) - 1) / $(JOBS) )); \
	OMP_NUM_THREADS=$$(( $(CORES) > $(JOBS) ? $(CORES) / $(JOBS) : 1 )) \
	xargs -r -n $$(( share > 0 && share < $(EACH) ? share : $(EACH) )) -P $(JOBS) $(ON_ITS_GPU) \
	"$(BIN)/dvc" --wait-for-lock repro --single-item <<< "$$stages" || exit; done
endef

repro: $(STAMP) ## Run everything that changed: data to tables and figures (PROFILE=smoke, demo or paper; none: params.yaml as it is)
	"$(BIN)/python" -m gridreg.params $(if $(PROFILE),--profile "$(PROFILE)") --check
	@$(DATA)
	$(SIDE_BY_SIDE)
	"$(BIN)/dvc" repro --pull

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
	export PYTHONPATH="$$copy" DVC_SITE_CACHE_DIR="$$copy/.scratch/dvc"; \
	git init --quiet; git add --all; \
	git -c user.name=smoke -c user.email=smoke@localhost -c commit.gpgsign=false -c core.hooksPath=/dev/null \
		commit --quiet --message 'copy for the smoke run'; \
	$(MAKE) --no-print-directory repro PROFILE=smoke VENV="$(VENV_PATH)" \
		JOBS=3; \
	echo "tables and figures, after $$((SECONDS - started)) s:"; \
	ls -l figures

benchmark: $(STAMP) ## Measure time and memory of every method again (let nothing else run meanwhile)
	"$(BIN)/papermill" notebooks/06_benchmark.ipynb executed/06_benchmark.ipynb -k python3
	"$(BIN)/dvc" commit --quiet --force benchmark

# On a GPU two runs of one training are not the same to the bit, which tests ask for.
test test-browser: export GRIDREG_ACCELERATOR ?= cpu

test: $(STAMP) ## Run every test, among them the whole pipeline in the smoke profile (ARGS="-m 'not slow'" leaves that out)
	@$(DATA)
	"$(BIN)/python" -m pytest $(ARGS)

lab: $(STAMP) ## Open the notebooks in JupyterLab
	@$(DATA)
	"$(BIN)/python" -m jupyterlab $(ARGS)

checkpoints: $(STAMP) ## Take what the interactive notebooks open from the results: an adaptive Bayesian GridReg for each cohort
	@$(DATA)
	for dataset in prostate pelvis brain; do mkdir -p checkpoints/$$dataset; \
		cp -f results/train/$$dataset/gridreg-bayesian/* checkpoints/$$dataset/ || exit; done
	"$(BIN)/dvc" add checkpoints && "$(BIN)/dvc" push checkpoints.dvc

test-browser: $(STAMP) ## Run the interactive notebooks in a real browser: a Chromium on the path (nothing is installed)
	@$(DATA)
	GRIDREG_BROWSER=required "$(BIN)/python" -m pytest tests/test_browser.py $(ARGS)

cohort: PROFILE ?= paper
cohort: $(STAMP) ## Make the simulated cohort of a profile in cohorts/ (PROFILE=paper; PATIENTS=2: so many a split, to try it out)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m gridreg.cohort --profile "$(PROFILE)" --out "cohorts/$(PROFILE)" --workers "$(CORES)" \
		$(if $(PATIENTS),--patients "$(PATIENTS)")

lock: ## Choose the second section of requirements.txt anew, after a change to the first
	@set -euo pipefail; \
	work="$$(mktemp -d)"; trap 'rm -rf "$$work"' EXIT; \
	sed '/^# ---- Transitive/,$$d' requirements.txt > "$$work/direct.txt"; \
	sed -nE 's/^([A-Za-z0-9._-]+)==.*/\1/p' "$$work/direct.txt" > "$$work/names.txt"; \
	"$(PYTHON)" -m venv "$$work/venv"; \
	"$$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$$work/direct.txt"; \
	"$$work/venv/bin/python" -m pip freeze --all \
		| grep -vixE "($$(sed 's/[-_.]/[-_.]/g' "$$work/names.txt" | paste -sd '|' -)|pip|wheel|triton|nvidia-.*|cuda-.*)==.*" \
		| LC_ALL=C sort -f > "$$work/pins.txt"; \
	{ sed '/^# Nothing of CUDA/q' requirements.txt; cat "$$work/pins.txt"; } > "$$work/new.txt"; \
	cp "$$work/new.txt" requirements.txt; wc -l < "$$work/pins.txt"
