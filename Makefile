# make study | test | lab | figures | lint    (STUDY=params/mnist.yaml CORES=8 choose another;
# STEP=scores, noise or audit makes those figures without training a study's student;
# PROFILE=profiles/slurm sends each notebook to a cluster as a job; figures
# without STUDY redraws those of every study)
STUDY ?= params/digits.yaml
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := .venv/bin
LONG := tests/test_pipeline.py tests/test_slurm.py tests/explorer/test_browser.py tests/test_notebooks.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: study test lab figures lint clean
.DELETE_ON_ERROR:

study: .venv/installed
	@$(BIN)/python -m kdlib study $(STUDY) $(STEP) $(if $(PROFILE),--profile $(PROFILE),--cores $(CORES))

# Two files at a time; the long ones first (and not those of the most tests).
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LONG) tests kdlib audit

# JupyterLab saves outputs into the notebooks it shows: it is given copies, which git ignores.
lab: .venv/installed $(patsubst notebooks/%,lab/%,$(wildcard notebooks/*.ipynb))
	$(BIN)/jupyter lab --notebook-dir=. lab/01_cache.ipynb

# A notebook that has changed is copied again, and the copy of it before keeps the time in its name.
lab/%.ipynb: notebooks/%.ipynb
	@mkdir -p lab
	@if [ -e $@ ]; then kept=lab/$*.$$(date +%Y%m%d-%H%M%S).ipynb; mv $@ $$kept; \
	  echo "$< has changed; the copy of it before is now $$kept"; fi
	@cp $< $@

figures: .venv/installed
	@$(BIN)/python -m kdlib figures $(if $(filter file,$(origin STUDY)),all,$(STUDY))

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

# The lock has the hash of every package. uv, where it is installed, does the same eight times faster.
.venv/installed: requirements.lock pyproject.toml
	@test -d .venv || python3 -m venv .venv
	@if command -v uv >/dev/null; then \
	  VIRTUAL_ENV=$(CURDIR)/.venv uv pip install --require-hashes -r requirements.lock && \
	  VIRTUAL_ENV=$(CURDIR)/.venv uv pip install --no-deps -e . ; \
	else \
	  $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q --require-hashes -r requirements.lock && \
	  $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e . ; \
	fi
	@touch $@

# Removes what `make study` made; the environment, downloaded data and committed figures stay.
clean:
	rm -rf runs cache .snakemake
