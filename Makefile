# make demo   install, train three runs on the quick plan, sample, plot: within ten minutes
# make test   install, ruff, the whole test suite
# make bench  install, measure against other trainers, write bench/results.md: a quarter of an hour
# make proofs test all changed experiments whole and remember it, so that the suite need not
# make soak   every fault test at full length; writes docs/reliability.md: an hour or two
# make check  ruff and the fast tests: before each commit

PYTHON ?= python3
BIN := .venv/bin
RUNS := runs
PROMPT := def read_lines(path):

.PHONY: demo test bench check proofs soak clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "pip>=25.1"
	$(BIN)/pip install -q -c constraints.txt -e ".[export]" --group dev
	touch $@

demo: .venv/installed
	$(BIN)/lmp-trainer --exp gpt2ish --plan quick --out-dir $(RUNS)
	$(BIN)/lmp-trainer --exp gpt2ish_small_init --plan quick --out-dir $(RUNS)
	$(BIN)/lmp-trainer --exp ue --plan quick --out-dir $(RUNS)
	$(BIN)/lmp-generator $(RUNS)/quick/gpt2ish/seed-0 "$(PROMPT)" --max-tokens 120
	$(BIN)/lmp-generator $(RUNS)/quick/ue/seed-0 "$(PROMPT)" --max-tokens 120
	$(BIN)/lmp-plotstats $(RUNS)/quick

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2

bench: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/run.py

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 -m "not slow"

proofs: .venv/installed
	LMP_PROVE=1 $(BIN)/pytest -n 2 -m every_experiment

soak: .venv/installed
	$(BIN)/python tests/faults/soak.py $(SOAK)

clean:
	rm -rf .venv build dist
