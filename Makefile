# Every target makes the environment that it needs.
.PHONY: help run test check venv clean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

run: ## serve the bundled model on 4 ranks and balance its experts; ARGS="--ranks 2 ..." for options
	@scripts/venv hf,nixl,server
	@.venv/bin/equipoise run $(ARGS)

test: ## run the tests
	@scripts/test $(ARGS)

check: ## ruff, mypy --strict, import-linter
	@scripts/check

venv: ## make .venv alone
	@scripts/venv hf,nixl,server

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
