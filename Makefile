# Thin names for scripts/tasks.py, which works without make too. Another Python: make demo PYTHON=python3.12
# Arguments for what is run: make test ARGS="-k plan", make demo ARGS="--seed 3"
PYTHON ?= python3
.PHONY: demo test test-oldest lint clean

demo:  ## Make .venv, install, generate a video dense and sparse into outputs/
	@$(PYTHON) scripts/tasks.py demo $(ARGS)

test:  ## Make .venv, install, run the tests
	@$(PYTHON) scripts/tasks.py test $(ARGS)

test-oldest:  ## The tests that see diffusers, with the oldest versions that pyproject.toml allows
	@$(PYTHON) scripts/tasks.py test-oldest $(ARGS)

lint:  ## Format check, ruff, the four floors, house rules
	@$(PYTHON) scripts/tasks.py lint $(ARGS)

clean:
	rm -rf .venv .venv-oldest outputs build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
