PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint

demo: $(VENV)/installed  ## the complete job in miniature, on the CPU
	$(BIN)/python demo.py

test: $(VENV)/installed  ## all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/installed  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A Python that is too old or has no venv is reported before anything is installed.
$(VENV)/installed: requirements.txt
	@found=$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); \
	cure="make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11"; \
	case "$$found" in \
	3.1[1-9].* | 3.[2-9][0-9].* | [4-9].*) \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; } ;; \
	"") echo "error: $(PYTHON) can't be run: install Python 3.11 or newer, and name it: $$cure" >&2; exit 2 ;; \
	*) echo "error: $(PYTHON) is Python $$found, and 3.11 or newer is needed: $$cure" >&2; exit 2 ;; \
	esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
