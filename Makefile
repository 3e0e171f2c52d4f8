# Two commands to begin with: `make serve` and `make test`. Needs Python 3.11+, make and gcc.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
MODEL ?=
TRACE ?=
MINUTES ?= 30

.DEFAULT_GOAL := help
.PHONY: help serve test test-split test-models test-gpu bench bench-all bench-programs bench-replay bench-split
.PHONY: soak bench-context bench-prefetch bench-storage bench-waits bench-hints bench-tree bench-transfer bench-host-attention bench-host-dtype bench-plan bench-gpu gpu-bundle readme lint model clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

serve: $(VENV)/.ready ## a server with --enable-smg on 127.0.0.1:30000; MODEL=path, ARGS="server flags"
	@$(RUN) -m tools.serve $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

test: $(VENV)/.ready ## the whole test suite; ARGS="pytest flags"
	@$(RUN) -m tools.demo_model >/dev/null
	@$(RUN) -m pytest $(ARGS)

test-split: $(VENV)/.ready ## the experimental split of prefill and decode, killed in every way
	@SMG_TEST_SPLIT=1 $(RUN) -m pytest tests/e2e/test_split.py $(ARGS)

test-models: $(VENV)/.ready ## models whose layers differ, at every page size, against the model itself
	@SMG_TEST_MODELS=1 $(RUN) -m pytest tests/e2e/test_models.py tests/e2e/test_fp8.py tests/e2e/test_modes.py tests/e2e/test_simulator.py $(ARGS)

test-gpu: $(VENV)/.ready ## only what needs a CUDA device; ARGS="pytest flags"
	@$(RUN) -m pytest tests/gpu $(ARGS)

bench: $(VENV)/.ready ## stock SGLang and ours on the same workloads: table, JSON, PNG; ARGS="flags"
	@$(RUN) -m bench $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-all: $(VENV)/.ready ## every benchmark, recorded in bench/results; ARGS=--quick for under 20 minutes
	@$(RUN) -m bench.suite $(ARGS)

readme: $(VENV)/.ready ## writes the README's flags and picture, and docs/measured.md from bench/results
	@$(RUN) -m tools.flag_table
	@$(RUN) -m bench.suite.measured $(ARGS)

bench-programs: $(VENV)/.ready ## SGLang frontend programs on stock and ours, outputs compared; ARGS="flags"
	@$(RUN) -m bench.programs $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-replay: $(VENV)/.ready ## TRACE=file on stock and ours, or on ARGS="--url URL ..."
	@$(RUN) -m bench.replay $(if $(TRACE),"$(TRACE)") $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-tree: $(VENV)/.ready ## our radix tree beside SGLang's two; ARGS="flags"
	@$(RUN) bench/tree.py $(ARGS)

bench-context: $(VENV)/.ready ## a context four times the device pool, streamed and not; ARGS="flags"
	@$(RUN) -m bench.context $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-prefetch: $(VENV)/.ready ## host hits that wait, loaded at admission and before; ARGS="flags"
	@$(RUN) -m bench.prefetch $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

soak: $(VENV)/.ready ## MINUTES=30 of everything at once, with kills; nothing may be left behind; ARGS="flags"
	@$(RUN) -m bench.soak --minutes $(MINUTES) $(ARGS)

bench-storage: $(VENV)/.ready ## a prefix cold, in storage, in host memory, on the device; ARGS="flags"
	@$(RUN) -m bench.storage $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-waits: $(VENV)/.ready ## questions to a new document, all at once, waiting for each other or not; ARGS="flags"
	@$(RUN) -m bench.waits $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-hints: $(VENV)/.ready ## agents that come back after a pause, with hints and without; ARGS="flags"
	@$(RUN) -m bench.hints $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-split: $(VENV)/.ready ## streams beside long prompts, on one worker and split; ARGS="flags"
	@$(RUN) -m bench.split $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-transfer: $(VENV)/.ready ## how fast pages move between device pool and host memory; ARGS="flags"
	@$(RUN) bench/transfer.py $(ARGS)

bench-host-attention: $(VENV)/.ready ## decode attention over host pages: kernel, torch, plain read; ARGS="flags"
	@$(RUN) bench/host_attention.py $(ARGS)

bench-plan: $(VENV)/.ready ## what `smg_sglang plan` says of this CPU beside what it does; ARGS="flags"
	@$(RUN) bench/plan.py $(ARGS)

bench-host-dtype: $(VENV)/.ready ## the next token after host hits from fp8 pages; ARGS="flags"
	@$(RUN) -m bench.host_dtype $(if $(MODEL),--model-path "$(MODEL)") $(ARGS)

bench-gpu: $(VENV)/.ready ## copies and attention on a CUDA device; results go to bench/results
	@$(RUN) bench/transfer.py --device cuda
	@$(RUN) bench/gpu_attention.py $(ARGS)
	@$(RUN) -m bench.gpu_context

gpu-bundle: $(VENV)/.ready ## an archive for a GPU machine without a registry (docs/gpu.md); ARGS="flags"
	@$(RUN) -m tools.gpu_bundle $(ARGS)

lint: $(VENV)/.ready ## formatting, lint, types and import layers
	@$(VENV)/bin/ruff format --check --quiet . || { $(VENV)/bin/ruff format --check .; exit 1; }
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy -p smg_sglang -p tools
	@$(VENV)/bin/lint-imports

model: $(VENV)/.ready ## the demo model; the last line is its folder
	@$(RUN) -m tools.demo_model

clean: ## removes what tests, tools and benchmarks left here; keeps .venv
	@rm -rf build dist bench/out .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .benchmarks
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## removes .venv too
	@rm -rf $(VENV) *.egg-info

$(VENV)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: name another one, as in make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) tools/set_up.py
