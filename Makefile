# Every target makes what it needs: the virtual environment in .venv, and in it the extra that the target asks for.
# With TORCH=2.14.1, say, that is .venv-2.14.1, with this torch, and the triton and setuptools that it requires.
PYTHON ?= python3
TORCH :=
VENV := .venv$(TORCH:%=-%)
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH),$(VENV)/)constraints.txt

# Else every process, workers that compile among them, would compile the Python of torch anew: about 10 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo docs test nightly coverage lint ruff typecheck format bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/dicompile demo

test: $(VENV)/.compiled
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# The exhaustive part of the tests: every configuration of the coverage table under two policies, every golden recording
# compiled, and so on; then hundreds of random sequences of everything that may happen to optimized models.
nightly: $(VENV)/.compiled
	$(BIN)/python -m pytest -m nightly -n auto --maxprocesses 4 --dist loadgroup --ignore tests/state
	$(BIN)/python -m pytest -m nightly -s tests/state

# The site, in out/site; warnings are errors, as in `make test`.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

# The table of what works on which class of model. `make test` checks every fifth class, `make nightly` every line.
coverage: $(VENV)/.compiled
	$(BIN)/python -m tests.zoo.coverage > docs/coverage.md

# Two hours on two quiet cores; `dicompile bench dit` is a tenth of it.
bench: $(VENV)/.installed-bench
	$(BIN)/dicompile bench --json out/bench.json --markdown docs/benchmarks.md
	$(BIN)/dicompile bench --compile-times --json out/compile_times.json --markdown docs/benchmarks.md
	$(BIN)/python examples/overhead.py

lint: ruff typecheck

ruff: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot see that passes/ and runtime/ are dicompile.passes and dicompile.runtime, so it reads an installed copy.
# build/ goes first: setuptools would install modules that were deleted since from there.
typecheck: $(VENV)/.installed-dev
	rm -rf build .typecheck
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target .typecheck .
	$(BIN)/mypy .typecheck/dicompile

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .typecheck .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dicompile passes runtime tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	sed -E -e '/^(triton|setuptools)==/d' -e 's/^torch==.*/torch==$(TORCH)/' $< > $@

# One stamp per extra: a second run installs nothing unless the requirements changed.
# Python compiles what is imported when it is: a third of what compiling all of it takes.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

# Warnings are errors in tests, and some libraries make Python warn when it compiles them.
$(VENV)/.compiled: $(VENV)/.installed-test
	-$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib
	touch $@
