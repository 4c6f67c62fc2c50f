# Everything from a fresh clone: `make run` measures, `make test` tests, `make test-slow` runs the tests that this leaves out. All make
# .venv first.
VENV := .venv
SOURCES := pyproject.toml scripts/setup

.PHONY: run test test-slow lint clean

run: $(VENV)/.run
	$(VENV)/bin/blockmoe run

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .

$(VENV)/.run: $(SOURCES)
	scripts/setup
	touch $@

$(VENV)/.test: $(SOURCES)
	scripts/setup test
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist .pytest_cache
