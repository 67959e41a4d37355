# Both commands work on a machine that has only make and Python 3.11 or newer.
#   make demo   install, and ask the built-in model
#   make test   lint, types and tests; more for pytest in ARGS, e.g. make test ARGS='-k decode', and
#               WORKERS=0 for tests one after the other that may print
#   make lint   lint and types alone; make format mends what can be mended; make clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Conversations are logged in this folder, unless LLM_USER_PATH says otherwise. Kernels that were
# compiled for this processor go to the user's cache.
DEMO := $(or $(LLM_USER_PATH),$(CURDIR)/.demo)
# Many tests use all cores by themselves, and some need 0.6 GB.
WORKERS := 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint format clean

help:
	@sed -n '2,5s/^# //p' Makefile

demo: $(READY)
	LLM_USER_PATH="$(DEMO)" $(BIN)/llm -m flash-moe-tiny "What does os.path.join do?" -o stats 1
	LLM_USER_PATH="$(DEMO)" $(BIN)/llm -m flash-moe-tiny "How do I read a JSON file?"
	LLM_USER_PATH="$(DEMO)" $(BIN)/llm -m flash-moe-tiny "What is 468 + 357?" -o thinking 1

test: lint
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

clean:
	rm -rf $(VENV) .demo dist

# $(PYTHON), or the newest Python that is new enough and can make environments.
$(READY): pyproject.toml
	@python=; for name in $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python; do \
		if $$name -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
		then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer is needed, with venv. On Debian: apt install python3-venv"; \
		exit 1; fi; \
	echo "Installing into $(VENV), once (a minute or two)"; \
	$$python -m venv $(VENV)
	@$(BIN)/pip install -q -e ".[test]"
	@touch $(READY)
