PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/installed  ## the whole job in miniature, on the CPU
	$(BIN)/python demo.py

test: $(VENV)/installed  ## all tests
	$(BIN)/python -m pytest

lint: $(VENV)/installed  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
