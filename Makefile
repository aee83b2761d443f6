# Every target does its own set-up in .venv (scripts/setup.sh); where that is done already it costs nothing.
#   make PYTHON=python3.12 …   another interpreter          make ENGINE=cpu …   another engine than the one that fits
#   make test ARGS='-k wake'   arguments for what is run
#   make build-launcher CONTAINER_IMG_REG=registry.example/me   images; images/image.sh has the other variables

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help install tools demo serve bench test test-fast lint lint-verify validate format clean \
	build-launcher push-launcher build-and-push-launcher build-endpoint push-endpoint build-client push-client

BIN := .venv/bin
CODE := $(wildcard src tests bench scripts)
export PYTHON ENGINE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## install Bullpen and the engine that fits this machine
	@scripts/setup.sh product

tools:
	@scripts/setup.sh dev

demo: install ## start two real vLLM servers warm, beside a cold start for comparison
	$(BIN)/bullpen demo $(ARGS)

serve: install ## start the daemon
	$(BIN)/bullpen serve $(ARGS)

bench: install ## measure starts and memory, and print the tables
	$(BIN)/python -m bench $(ARGS)

test: tools ## run every test, with the real engine too
	$(BIN)/python -m pytest $(ARGS)

FAST := $(addprefix tests/,core engines gate node zygote demo test_layers.py test_requirements.py)
test-fast: tools ## run the rooms' own tests, in under a minute
	$(BIN)/python -m pytest -m 'not real and not slow' $(FAST) $(ARGS)

lint: tools ## check style, types, layers and the code of the messages
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports
	scripts/make_protos.sh --check

lint-verify: lint ## check and change nothing: lint by another name

validate: ## run lint-verify and test
	@$(MAKE) --no-print-directory lint-verify
	@$(MAKE) --no-print-directory test

format: tools ## put the code in the project's format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

build-launcher: ## build the image of the launcher, named after CONTAINER_IMG_REG; docs/images.md
	@images/image.sh build launcher

push-launcher: ## push it
	@images/image.sh push launcher

build-and-push-launcher: ## do both
	@images/image.sh build launcher
	@images/image.sh push launcher

build-endpoint: ## build the image of vllm-bootstrap
	@images/image.sh build endpoint

push-endpoint: ## push it
	@images/image.sh push endpoint

build-client: ## build the image of the Python client
	@images/image.sh build client

push-client: ## push it
	@images/image.sh push client

clean: ## remove .venv and everything made by tools
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
