VENV ?= .venv
PYTHON ?= python3
# Only what is imported is ever compiled: of Transformers a small part.
PIP = pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-lowest test-release test-slow evaluate targets docs docs-serve style quality types dist

# The environment of all commands, its versions those of constraints.txt. torch first: any other order fetches CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/$(PIP) --constraint constraints.txt torch
	$(VENV)/bin/$(PIP) --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

# The lowest versions that pyproject.toml allows.
$(VENV)-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/$(PIP) --constraint constraints-lowest.txt torch
	$(VENV)-lowest/bin/$(PIP) --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/python -m training.tiny_world.demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal --quiet

# What depends on the versions: of the tables of equality batches, one of several cases that differ in what is ours alone,
# and nothing that torch, the same in both environments, compiles for itself.
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest --numprocesses 2 --dist worksteal --quiet \
		-k "not (test_tokens_equal_plain_generate and (eager or -1] or vlm- or views-)) \
		and not (test_all_that_a_call_returns and single) and not (test_tokens_on_fixed_shapes and -one-) \
		and not (test_proposals_are_those_of_the_published and False]) and not (test_memory_savers_train and True-) \
		and not (test_command_launches_a_run and vlm_recipe) and not (test_bench and (every_method or of_a_report \
		or where_they_are_the_same_draws or test_reports_are_written)) \
		and not inductor and not (test_tokens_and_generator and runtime) and not simulated_acceptance and not compiled_methods" \
		tests/test_compat.py tests/test_hook.py tests/test_equality.py tests/test_generate.py tests/test_static.py \
		tests/test_msd_drafter.py tests/test_vlm_drafter.py tests/test_ensemble_drafter.py tests/test_convert.py \
		tests/test_parity.py tests/test_trainer.py tests/test_training_data.py tests/test_recipes.py tests/test_bench.py \
		tests/test_states.py tests/test_mechanisms.py tests/test_draft_layers.py tests/test_attending.py \
		tests/test_eagle3.py tests/test_sharing.py tests/test_sampling.py tests/test_attach.py

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
	$(VENV)/bin/python -m training.tiny_world.measure.evaluate

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
