.PHONY: setup run test test-full lint lock clean

setup: ## .venv with the pinned engine for this host
	@sh scripts/system-packages.sh run
	@sh scripts/setup.sh

run: setup ## the starter model behind the gateway; Ctrl-C stops it
	@trap : INT; .venv/bin/cloister up; code=$$?; [ $$code -eq 0 ] || exit $$code

test: ## every check and test, long campaigns at reduced counts
	@sh scripts/system-packages.sh test
	@sh scripts/setup.sh dev
	@sh scripts/test.sh

test-full: ## the campaigns at full count; writes docs/evidence/
	@sh scripts/system-packages.sh test
	@sh scripts/setup.sh dev
	@sh scripts/test-full.sh

lint:
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

lock: ## resolve the lock files anew; needs uv
	@.venv/bin/python scripts/lock.py

clean:
	@rm -rf .venv build .mypy_cache .ruff_cache
