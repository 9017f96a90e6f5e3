VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test test-slow evaluate style quality

# One environment for all commands, its versions those of constraints.txt. torch first: any other order fetches CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/python -m training.tiny_world.demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest --numprocesses 2 --quiet

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m slow

evaluate: $(VENV)/.installed
	$(VENV)/bin/python -m training.tiny_world.evaluate

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
