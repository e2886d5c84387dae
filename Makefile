# One line each; what happens is in scripts/. ARGS are passed on: make demo ARGS="--runner threads"
.PHONY: help demo test check bench bench-full bench-peers bench-report soak test-cluster clean

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)
demo:           ## install penstock[demo] into .venv and run the demo
	@scripts/demo $(ARGS)
test:           ## install everything into .venv, static checks, the whole test suite
	@scripts/test $(ARGS)
check:          ## lint, types, import contracts
	@scripts/install all,test && scripts/check $(ARGS)
bench:          ## the table of figures, then the report: about 40 minutes on a quiet machine
	@scripts/bench $(ARGS)
bench-full:     ## the public definition of the RADPS benchmark: hours
	@scripts/bench --full $(ARGS)
bench-peers:    ## Prefect and penstock at the sizes that Prefect can bear, in an environment of its own
	@scripts/bench --peers $(ARGS)
bench-report:   ## tables and plots of the newest results
	@scripts/bench --report $(ARGS)
soak:           ## the long tests, before a release
	@PENSTOCK_TEST_FIGURES=benchmarks/results/record scripts/test -m soak -o session_timeout=0 -o timeout=0 $(ARGS)
test-cluster:   ## only the tests with real Dask, Ray or PostgreSQL
	@scripts/test-cluster $(ARGS)
clean:          ## remove the environment, builds and caches
	@rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
