VENV ?= .venv
PYTHON ?= python3
# Only what is imported is ever compiled: of Transformers a small part.
PIP = pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-lowest test-release test-slow evaluate targets docs docs-serve style quality types dist

# The environment of all commands, its versions those of constraints.txt. torch first: any other order fetches CUDA.
# Before it pip: the one that comes with Python 3.11 thinks twice as long.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/$(PIP) --upgrade pip
	$(VENV)/bin/$(PIP) --constraint constraints.txt torch
	$(VENV)/bin/$(PIP) --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

# The lowest versions that pyproject.toml allows.
$(VENV)-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/$(PIP) --upgrade pip
	$(VENV)-lowest/bin/$(PIP) --constraint constraints-lowest.txt torch
	$(VENV)-lowest/bin/$(PIP) --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/python -m training.tiny_world.demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal --quiet

# What depends on the versions, and of each table a share; nothing that torch, the same in both environments, compiles.
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest --numprocesses 2 --dist worksteal --quiet --every 4 \
		-k "not (compil or inductor or generates_data or canary or deprecated or stranger)" \
		tests/test_compat.py tests/test_hook.py tests/test_equality.py tests/test_generate.py tests/test_static.py \
		tests/test_msd_drafter.py tests/test_vlm_drafter.py tests/test_ensemble_drafter.py tests/test_convert.py \
		tests/test_parity.py tests/test_trainer.py tests/test_training_data.py tests/test_recipes.py \
		tests/test_bench_parts.py tests/test_states.py tests/test_windows.py tests/test_mechanisms.py \
		tests/test_support.py tests/test_draft_layers.py tests/test_attending.py tests/test_eagle3.py \
		tests/test_block_drafts.py tests/test_visual_drafts.py tests/test_visual_rows.py tests/test_odd_pictures.py \
		tests/test_sharing.py tests/test_sampling.py tests/test_attach.py tests/test_serve.py

# A release beyond the ranges: make test-release RELEASE="transformers==5.25.0"
test-release:
	@test -n "$(RELEASE)" || { echo 'Say which: make test-release RELEASE="transformers==5.25.0"'; exit 2; }
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/$(PIP) --constraint constraints.txt torch
	$(VENV)-release/bin/$(PIP) --constraint constraints.txt --editable ".[dev]"
	$(VENV)-release/bin/$(PIP) --upgrade $(RELEASE)
	$(VENV)-release/bin/python -m pytest --numprocesses 2 --quiet --pythonwarnings "ignore:Tests never ran"

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m slow

evaluate: $(VENV)/.installed
	for draft in draft block; do \
		$(VENV)/bin/python -m training.tiny_world.measure.evaluate --draft training/tiny_world/checkpoints/$$draft || exit; \
	done

# Every architecture of the lowest and of the newest Transformers, into docs/targets.md: a quarter of an hour.
targets: $(VENV)/.installed $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m training.evidence.targets
	$(VENV)/bin/python -m training.evidence.targets
	$(VENV)/bin/python -m training.evidence.targets --write

# The documentation as a site, in build/site, or at http://127.0.0.1:8000 while it is written.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs --quiet build --strict

docs-serve: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs serve --watch transformers_msd

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# Wheel and sdist, looked at, and the wheel of the sdist installed alone into an empty environment and run.
dist:
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/$(PIP) build twine
	$(VENV)-dist/bin/python -m build --outdir dist
	$(VENV)-dist/bin/twine check --strict dist/*
	.ci/stranger $(VENV)-alone install dist/*.whl
	.ci/stranger $(VENV)-alone run

# What a program with types calls, as a type checker sees it: some minutes, for it reads torch and Transformers, too.
types: $(VENV)/.installed
	$(VENV)/bin/$(PIP) mypy
	$(VENV)/bin/mypy --strict --follow-imports silent tests/typed_calls.py

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
