# make quickstart   install and run the main job on real scans, a few minutes on two CPU cores
# make test         install and run all tests that CI runs
# make test-fast    those that start no rank and no other process
# make soak         what takes long or measures time and memory
# make test-browser install and run the tests that need Debian's chromium and chromium-driver
# make lint         ruff and pyright
PYTHON ?= python3
BIN := .venv/bin
# Two processes with several threads each on two cores slow each other down a hundredfold when they spin (OMP's default).
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export WANDB_MODE := offline

.PHONY: install quickstart test test-fast test-browser soak lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,quickstart]'
	touch $@

quickstart: install
	OMP_NUM_THREADS=2 $(BIN)/python data/quickstart.py

test: install
	OMP_NUM_THREADS=1 TORCH_DISTRIBUTED_DEBUG=DETAIL $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not (ranks or process or slow or measures or browser)'

test-browser: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow or measures'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf quickstart .pytest_cache .ruff_cache
