# Two commands do everything on a fresh machine with Python, pip and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= export,trt-rtx,train,dev
DEMO_OUT ?= build/tiny-llava
PYTEST_ARGS ?=
# Files of tests shared among processes: most of the time goes into commands that start and leave a core idle.
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Libraries are compiled when they are first imported: of 10,000 files a run needs a few. So what is compiled has to be kept.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint format smoke constraints clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## make the environment in .venv and install everything into it

# Again only when what is installed changes.
$(STAMP): pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" COMPILE=0 tools/install.sh "$(VENV)" "$(EXTRAS)"
	@touch $@

demo: $(STAMP) ## compress, export, build and validate the embedded model into build/tiny-llava
	$(BIN)/infoprune-export tiny-llava --target ort --target trt --flops 0.33 --train-steps 240 --out $(DEMO_OUT)
	@echo "open $(DEMO_OUT)/report.html"

test: $(STAMP) ## run the tests, without the ones that take minutes
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests
	$(PYTEST) $(PYTEST_ARGS)

lint: $(STAMP) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: $(STAMP) ## check in seconds that the installation answers
	tools/smoke.sh "$(VENV)"

constraints: $(STAMP) ## pin the versions of .venv in constraints.txt
	$(BIN)/python tools/pin.py > constraints.txt.part
	mv constraints.txt.part constraints.txt
	@touch $(STAMP)

clean: ## remove what make made, but not .venv
	rm -rf build dist .pytest_cache .ruff_cache
