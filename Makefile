# Each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two threads unless the caller says otherwise: more than there are cores makes small models crawl.
export OMP_NUM_THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

# Chains of an experiment at a time: two of one thread each do more on two cores than one of two threads.
JOBS ?= 2

.PHONY: fit test test-slow lint bench data pdtr metaquery r1v picture clean

# Modules are compiled when they are first imported, which most of what is installed never is.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --editable

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) '.[dev]'
	touch $@

fit: $(VENV)/.installed
	$(BIN)/python -m lightning_modules.cli fit -c configs/edit.yaml

test: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev $(VENV)/.quant
	$(BIN)/python -m pytest -m slow --timeout 3000
	PYTHONPATH=$(VENV)/quant $(BIN)/python -m pytest tests/lightning_modules -k "eight_bit or float8"

# Beside the environment and not in it: diffusers imports torchao wherever it is, which then talks at each start.
$(VENV)/.quant: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(VENV)/quant 'torchao>=0.18,<0.19'
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/framework_overhead.py
	$(BIN)/python tests/benchmarks/build_shards.py
	$(BIN)/python tests/benchmarks/select_records.py
	$(BIN)/python tests/benchmarks/serve_triplets.py
	$(BIN)/python tests/benchmarks/plan_billion.py
	$(BIN)/python tests/benchmarks/connector_mfu.py
	$(BIN)/python tests/benchmarks/compiled_bf16.py
	$(BIN)/python tests/benchmarks/verify_answers.py
	test -d runs/pdtr_base/latest/export || $(BIN)/python -m lightning_modules.cli fit -c configs/pdtr_base.yaml
	$(BIN)/python tests/benchmarks/rl_cost.py

data: $(VENV)/.installed
	$(BIN)/python -m data_pipeline build -c configs/data/scenes.yaml --output data/scenes/level1
	$(BIN)/python -m data_pipeline inspect data/scenes/level1

pdtr: $(VENV)/.installed
	$(BIN)/python -m lightning_modules.experiments -c configs/experiments/pdtr.yaml --jobs $(JOBS)

metaquery: $(VENV)/.installed
	$(BIN)/python -m lightning_modules.experiments -c configs/experiments/metaquery.yaml --jobs $(JOBS)

r1v: $(VENV)/.dev  # math-verify is among what it installs
	$(BIN)/python -m lightning_modules.experiments -c configs/experiments/r1v.yaml --jobs $(JOBS)

picture:  # the README's picture: the last grid of the last finished `make fit`
	cp "$$(ls runs/edit/latest/samples/*.png | tail -n 1)" notebooks/edit_samples.png

.PHONY: browser
browser:  # for the test of inspect's page; where none can be installed, that test is reported as skipped
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install chromium; } \
	    >/dev/null 2>&1 || echo "no browser could be installed: its test will be skipped"; \
	fi

clean:
	rm -rf pocket data runs
