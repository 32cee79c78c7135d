# make study    run a study: STUDY=params/mnist.yaml selects the file, CORES=8 the number of cores;
#               STEP=scores, noise or audit runs that step and what it needs, without the students;
#               MINIATURE=1 runs the study with few images, few steps and small networks;
#               PROFILE=profiles/slurm submits each notebook as a job of a Slurm cluster
# make demo     open the map of the digits in JupyterLab, before any training
# make report   write figures/<study>/report.html and report.pdf of STUDY
# make paper    write the figures and tables of several studies as LaTeX: STUDY="params/a.yaml params/b.yaml"
# make figures  redraw the figures of STUDY, or of every study when STUDY is not given
# make test    all tests but the longest, in less than eight minutes; make test-long runs those
# make lint | lab | clean
STUDY ?= params/digits.yaml
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := .venv/bin
FIRST := tests/test_pipeline.py tests/explorer/test_browser.py tests/test_notebooks.py tests/audit/test_report.py tests/test_golden.py
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Each notebook starts two processes. Without compiled modules, which uv does not install and some
# containers do not keep, they start in twice the time.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: study demo test test-long lab figures report paper lint clean
.DELETE_ON_ERROR:

study: .venv/installed
	@$(BIN)/python -m kdlib study "$(STUDY)" $(STEP) $(if $(MINIATURE),--miniature) $(if $(PROFILE),--profile "$(PROFILE)",--cores $(CORES))

# Three processes, one test file at a time each: on two cores one of them mostly waits, for a kernel
# or a browser. The files that take longest run first; xdist would otherwise start with those of the
# most tests. Without `-m`, pytest runs the tests of both targets.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
test: .venv/installed
	$(PYTEST) -m "not long" $(FIRST) tests kdlib audit

test-long: .venv/installed
	$(PYTEST) -m long tests

# JupyterLab saves outputs into notebooks: this opens copies in lab/, which git ignores.
lab: .venv/installed $(patsubst notebooks/%,lab/%,$(wildcard notebooks/*.ipynb))
	$(BIN)/jupyter lab --notebook-dir=. lab/01_cache.ipynb

# A notebook that has changed is copied again; the earlier copy is kept under a name with the time.
lab/%.ipynb: notebooks/%.ipynb
	@mkdir -p lab
	@if [ -e $@ ]; then kept=lab/$*.$$(date +%Y%m%d-%H%M%S).ipynb; mv $@ $$kept; \
	  echo "$< has changed; the copy of it before is now $$kept"; fi
	@cp $< $@

demo: .venv/installed
	@$(BIN)/python -m kdlib demo

figures: .venv/installed
	@$(BIN)/python -m kdlib figures $(if $(filter file,$(origin STUDY)),all,"$(STUDY)")
	@$(if $(filter file,$(origin STUDY)),$(BIN)/python -m audit all --redraw)

report: .venv/installed
	@$(BIN)/python -m kdlib report "$(STUDY)"

paper: .venv/installed
	@$(BIN)/python -m kdlib paper $(if $(filter file,$(origin STUDY)),,$(STUDY))

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

# The lock holds the hash of every package. pip installs it; uv, where present, is eight times faster.
.venv/installed: requirements.lock pyproject.toml
	@test -d .venv || python3 -m venv .venv
	@if command -v uv >/dev/null; then \
	  VIRTUAL_ENV="$(CURDIR)/.venv" uv pip install --require-hashes -r requirements.lock && \
	  VIRTUAL_ENV="$(CURDIR)/.venv" uv pip install --no-deps -e . ; \
	else \
	  $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q --require-hashes -r requirements.lock && \
	  $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e . ; \
	fi
	@touch $@

# Removes runs and caches. The environment, downloaded data and committed figures stay.
clean:
	rm -rf runs cache .snakemake
