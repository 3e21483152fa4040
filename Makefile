# Every target sets up what it needs in .venv; a second call finds it done.
PYTHON3 ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test coverage lint verify gpu bench speed

demo: $(READY)
	$(BIN)/dmdr-train

test: $(READY)
	$(BIN)/python -m pytest -m "not verify and not gpu" -n 2 --dist worksteal $(PYTEST_OPTIONS)

# Tests as above, a third slower.
coverage: PYTEST_OPTIONS := --cov=dmdr --cov-report=term-missing:skip-covered
coverage: test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

verify: $(READY)
	$(BIN)/python -m pytest -m verify -s --timeout 0 -o faulthandler_timeout=0

gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu -m gpu -s --durations 0

bench: $(READY)
	$(BIN)/python examples/digits/table.py
	$(BIN)/python examples/digits/objectives.py

speed: $(READY)
	$(BIN)/python -m examples.benchmarks $(SPEED_OPTIONS)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON3) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"
	touch $(READY)
