PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: video test lint types setup clean

## make a video with the built-in model, on two stages
video: setup
	$(BIN)/cineline generate "a red square moving left on a blue background" --pp 2 --output out.mp4

## lint, type-check and test
test: setup lint types
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples

types: setup
	$(BIN)/mypy

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out.mp4
