# capfilt: `make quickstart` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test check format bench chaos lock clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>&- \
	  || { echo "$(PYTHON): $$($(PYTHON) --version 2>&1); capfilt needs Python 3.11 or 3.12:" \
	  "name one, as in: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

quickstart: install  ## two bootstrapping rounds on the embedded sample world
	$(BIN)/capfilt run configs/quickstart.yaml
	$(BIN)/capfilt report runs/quickstart

check: install  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## every check, and all tests but the long ones of chaos
	$(BIN)/pytest -n 2 --dist loadfile tests/unit
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install  ## every benchmark but that of chaos, at sizes for two cores
	$(BIN)/python -m tests.bench.quickstart
	$(BIN)/python -m tests.bench.table1 --threads 1
	$(BIN)/python -m tests.bench.pretrain
	$(BIN)/python -m tests.bench.capfilt
	$(BIN)/python -m tests.bench.download
	$(BIN)/python -m tests.bench.dedup
	$(BIN)/python -m tests.bench.scale --gpus 4 8 --shards 200 --seconds 1
	$(BIN)/python -m tests.bench.scale --raylets --gpus 8 --shards 200 --seconds 4
	$(BIN)/python -m tests.bench.requests_a_shard

chaos: install  ## what takes long: workers killed ten times, jobs, nodes that come and go, firings
	$(BIN)/python -m tests.bench.chaos
	$(BIN)/pytest tests/chaos

lock:  ## pin what is installed now
	(head -1 requirements.lock; $(BIN)/pip freeze --all --exclude capfilt --exclude pip \
	  | sed 's/^\(torch==[0-9.]*\)+cpu/\1/') > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
