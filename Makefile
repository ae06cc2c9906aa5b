# Every target builds .venv through pip first, with the versions that constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo docs check quick-tests test test-all test-oldest lint format wheel clean

demo: $(INSTALLED)  ## prepare, estimate, train, infer and evaluate, offline, in some minutes
	$(BIN)/vlmdpo demo

check: $(INSTALLED)  ## lint, and the tests that take a moment: under 90 seconds on 2 cores
	$(MAKE) --no-print-directory -j 2 lint quick-tests

quick-tests: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test: $(INSTALLED)  ## the test suite, on up to four cores, but for further instances of the same checks
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not exhaustive"

test-all: $(INSTALLED)  ## those too: every family, every arrangement of processes
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# What decides whether a library is new enough: exact log-probs, training, asking, saving, nltk's tools,
# and the list of private interfaces.
OLDEST_TESTS := tests/engine/test_forward.py tests/engine/test_decode.py tests/training/test_trl_contract.py \
	tests/commands/test_train.py::test_a_run_leaves_everything_behind \
	tests/commands/test_train.py::test_the_adapter_answers_through_infer_and_eval \
	tests/commands/test_train.py::test_full_fine_tuning_moves_every_part \
	tests/commands/test_train.py::test_stock_and_shared_log_the_same \
	tests/commands/test_export.py::test_a_merged_model_answers_as_base_and_adapter \
	tests/benchmarks/test_nltk_data.py tests/benchmarks/test_chair.py

test-oldest: .venv-oldest/.installed  ## a part of the suite, with the oldest versions that pyproject.toml promises
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -W default $(OLDEST_TESTS)
	$(PYTHON) .ci/oldest.py --record

.venv-oldest/.installed: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv --clear .venv-oldest
	$(PYTHON) .ci/oldest.py >.venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -e . pytest pytest-xdist
	@touch $@

lint: $(INSTALLED)  ## ruff, its formatter's check, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## build/site, by mkdocs-material; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .mkdocs.yml

wheel: $(INSTALLED)  ## build dist/*.whl
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vlmdpo needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
