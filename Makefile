# The README's two: `make demo` and `make test`. Each makes .venv and installs what it needs when that is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED ?= 0

BENCHMARKS := auxiliary_head fm_sizes history_join kge_csd_cost kge_eval kge_train latents_size materialize random_reads serve sharded_tables soak_serve sweep_overhead sweep_search train_fm train_vm

.PHONY: demo test test-slow unit setup fmt lint type bench bench-feast bench-feast-online soak fuzz golden ci clean

demo: setup  ## the whole loop on real data, to a served score and a report
	$(BIN)/loopfm demo $(ARGS)

test: setup  ## every test but the slow ones, with coverage of the core; a Ray cluster takes the machine, all others share it
	bash .ci/services $(BIN)
	$(BIN)/pytest -m "not slow and not ray" -n 2 --dist loadfile --cov --cov-report= $(ARGS)
	$(BIN)/pytest -m "not slow and ray" --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=90 $(ARGS)

test-slow: setup  ## the long suites as well
	bash .ci/services $(BIN)
	$(BIN)/pytest $(ARGS)

unit: setup  ## no Ray, no servers, no browser: for the inner loop
	$(BIN)/pytest -m "not slow and not ray and not s3 and not redis and not browser" -q $(ARGS)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/pip install --quiet uv
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[demo,redis,otel,onnx,bench,dev]'
	touch $(STAMP)

fmt: setup  ## format and mend what can be mended
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/mypy

bench: setup  ## figures against their peers, as JSON
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json || exit 1; done

bench-feast: setup .venv-feast/.installed  ## the history join with Feast's Ray store in the same run
	$(BIN)/python benchmarks/history_join.py --json --no-growth --events 400000 --requests 5000 --users 2000 \
		--feast-python .venv-feast/bin/python $(ARGS)

bench-feast-online: setup .venv-feast/.installed  ## reads of histories with Feast's online store in the same run
	$(BIN)/python benchmarks/serve.py --json --contenders '' --feast-python .venv-feast/bin/python $(ARGS)

soak: setup  ## ten minutes of load on the scoring service with everything in it that happens to one
	$(BIN)/python benchmarks/soak_serve.py --json $(ARGS)

fuzz: setup  ## thousands of generated requests against the contract
	LOOPFM_FUZZ_EXAMPLES=1500 $(BIN)/pytest tests/serving/test_fuzz.py -q $(ARGS)

.venv-feast/.installed: benchmarks/feast-requirements.txt
	test -x .venv-feast/bin/python || $(BIN)/uv venv --python $(BIN)/python .venv-feast
	$(BIN)/uv pip install --quiet --python .venv-feast/bin/python -r benchmarks/feast-requirements.txt
	touch $@

golden: setup  ## rewrite the golden numbers; review the diff
	$(BIN)/pytest tests/golden --golden-rewrite -q

ci: lint type test

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
