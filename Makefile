# Each target works from a fresh clone. CLOISTER_ENGINE=cpu|cuda|none overrides the choice of engine.
.PHONY: setup run test test-full lint lock clean

setup: ## .venv with the pinned engine for this host
	@scripts/setup.sh run

run: setup ## the starter model behind the gateway; Ctrl-C drains and stops it
	@exec .venv/bin/python -S scripts/foreground.py .venv/bin/cloister up

test: ## every check and test, long campaigns at reduced counts
	@scripts/setup.sh test
	@scripts/promtool.sh
	@scripts/test.sh

test-full: ## the campaigns at full count; the summary goes to docs/evidence/
	@scripts/setup.sh test
	@scripts/promtool.sh
	@scripts/test-full.sh

lint: ## style and types only
	@scripts/setup.sh test
	@scripts/lint.sh

lock: ## resolve the lock files anew; `make lock UPGRADE=1` looks for newer versions
	@scripts/lock.sh $(if $(UPGRADE),--upgrade)

clean: ## all that was made here, but not the state in .cloister
	@rm -rf .venv .python build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
