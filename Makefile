# Everything runs in its own virtual environment, .venv, which is reused until pyproject.toml changes.
#   make demo    draw a sheet of pictures from configs/demo_prompts.txt
#   make test    run the tests        (make test PYTEST_ARGS="-k ring" for some of them)
#   make soak    faults and odd input against a server of its own, ten minutes (make soak SOAK_ARGS="--minutes 60")
#   make lint    ruff and mypy
#   make clean   remove the environment, caches and out/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT := out/demo
PYTEST_ARGS ?=
SOAK_ARGS ?=
# mypy cannot follow the mapping of folders to import names (see pyproject.toml); these links show it the same thing.
LINKS := $(VENV)/links/tetrion
ROOMS := configs engine entrypoints kernels

.PHONY: demo test soak lint clean

demo: $(VENV)/.installed
	rm -rf $(DEMO_OUTPUT)
	$(BIN)/tetrion generate --prompts configs/demo_prompts.txt --seed 8 --output $(DEMO_OUTPUT)
	@echo "The contact sheet is $(CURDIR)/$(DEMO_OUTPUT)/sheet.png"
	@$(BIN)/python -m benchmarks.embedded_model.demo_edits --output $(DEMO_OUTPUT)/edits.png

test: $(VENV)/.installed-test
	$(BIN)/python -P -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

soak: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.soak all $(SOAK_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(LINKS)
	for room in $(ROOMS); do ln -sfn ../../../$$room $(LINKS)/$$room; done
	MYPYPATH=$(VENV)/links $(BIN)/mypy -p tetrion

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Tetrion needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: a larger set brings everything a smaller one does.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test,dev]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-test
