# make test       the tests (the command the README names)
# make denoise    the main job: learn a denoiser from photographs; table, figure and parameters in outputs/
# make results    docs/results.md from benchmarks/results/*.jsonl
# make lint       style and types
# make docs       the documentation in site/

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check

.PHONY: venv test lint denoise results docs clean

venv: $(VENV)/.installed

# The stamps make a second `make test` skip the installation until pyproject.toml changes.
$(VENV)/.examples: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[examples]'
	@touch $@

$(VENV)/.installed: $(VENV)/.examples
	$(PIP) -e '.[test,examples]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev,docs]'
	@touch $@

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

denoise: $(VENV)/.examples
	$(VENV)/bin/python examples/denoise_photographs.py $(ARGS)

results: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/report.py

docs: $(VENV)/.installed-dev
	$(VENV)/bin/zensical build --clean

clean:
	rm -rf $(VENV) build dist site
