# Two commands do everything: `make demo` and `make test`. Both install what they need: Debian packages when something
# is missing and we are root (else they say what to install), and a virtual environment in .venv.

PYTHON ?= python3
export PYTHON
VENV := .venv
BIN := $(VENV)/bin
# A process for each CPU, though no more than four: each may run a guest of some GiB. WORKERS=0: all in this one.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadscope --no-loadscope-reorder --durations 20
# What to leave out; 'not long' takes in what test-debuginfo runs.
TESTS ?= not debuginfo and not long

.PHONY: help venv guest-host readers-host storage-host demo test test-unit test-guest test-debuginfo test-long \
	bench bench-filter bench-memory bench-reservation fuzz fuzz-coverage deb check format clean

help:
	@echo 'make demo            crash a real kernel in QEMU, save it, show what was saved'
	@echo 'make test            all tests but those that need debug symbols or hours'
	@echo 'make test-unit       those that need no QEMU'
	@echo 'make test-guest      those that crash real kernels'
	@echo 'make test-debuginfo  crash and drgn on real dumps; downloads about 600 MB of debug symbols once'
	@echo 'make test-long       what takes hours: ten crashes in a row, a save killed at every write, more power cuts'
	@echo 'make check           ruff, mypy --strict'
	@echo "make bench           whole dumps against makedumpfile, cp and zstd, on guests of 2 and 8 GiB"
	@echo "make bench-filter    the page filter's speed against makedumpfile's, on a 4 GiB guest"
	@echo 'make bench-memory    peak memory on sparse vmcores from 1 GiB to 1 TiB'
	@echo 'make bench-reservation  the smallest crashkernel= at which a save succeeds, by trying (BENCH=--peer: makedumpfile too)'
	@echo 'make fuzz            fuzz the parsers for FUZZ_SECONDS (default 60)'
	@echo 'make fuzz-coverage   what of each parser the seeds and the kept corpus reach: lines, branches'
	@echo 'make deb             the Debian package, build/vmcapture_VERSION_all.deb, and what lintian says of it'
	@echo 'make clean           remove what the above made here (the cache of downloads stays)'

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@bash tests/host-packages.sh python
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@echo 'setting up Python packages in $(VENV)'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,check]'
	@touch $@

guest-host:
	@bash tests/host-packages.sh guest

readers-host:
	@bash tests/host-packages.sh readers

storage-host:
	@bash tests/host-packages.sh storage

demo: guest-host venv
	@$(BIN)/python -m tests.guest.demo

test: guest-host readers-host storage-host venv
	$(PYTEST) -m '$(TESTS)'

test-unit: venv
	$(PYTEST) tests/unit tests/fuzz

test-guest: guest-host readers-host storage-host venv
	$(PYTEST) -m '$(TESTS)' tests/guest

test-debuginfo: guest-host readers-host venv
	$(PYTEST) -m 'debuginfo and not long'

test-long: guest-host readers-host storage-host venv
	@bash tests/host-packages.sh deb debian
	$(PYTEST) -m long

# BENCH="--memory 2G --repeat 1" and the like: what to give the benchmark.
BENCH ?=
bench: guest-host venv
	@bash tests/host-packages.sh bench
	@$(BIN)/python -m tests.bench.dump $(BENCH)

bench-filter: guest-host readers-host venv
	@$(BIN)/python -m tests.bench.filter $(BENCH)

bench-memory: venv
	@$(BIN)/python -m tests.bench.memory $(BENCH)

bench-reservation: guest-host venv
	@$(BIN)/python -m tests.bench.reservation $(BENCH)

FUZZ_SECONDS ?= 60
fuzz: venv
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

fuzz-coverage: venv
	$(BIN)/python -m tests.fuzz.run --coverage

# In a copy: what dpkg-buildpackage leaves lies beside and in the sources.
deb:
	@bash tests/host-packages.sh deb
	@bash packaging/deb.sh build

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check capture initramfs tests
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format capture initramfs tests

clean:
	rm -rf $(VENV) demo-crash build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
