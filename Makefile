# make pretrain   a fresh machine to a trained model and its loss curve
# make test       a fresh machine to a green test run
# make test-all   with the slow tests
# make test-cpus  tests of numbers and bytes once more, as older CPUs and two threads add up
# make test-deepspeed DEEPSPEED=0.16.9   tests of ZeRO with another DeepSpeed, in an environment of its own
# make check      what CI runs before the tests: format, lint, types, language
# make native     the native kernels, built now and not with the first optimizer
# make sanitize   tests of the native kernels, and of CUDA's on the CPU, under ASan and UBSan
# make bench      the measurements that the README quotes (long; they write benchmarks/results/)

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The oldest that is supported; the newest is in constraints.txt, and what all other tests run with.
DEEPSPEED ?= 0.16.9
OTHER := $(VENV)-deepspeed-$(DEEPSPEED)

.PHONY: help pretrain test test-all test-cpus test-deepspeed check native sanitize bench clean

help:
	@sed -n 's/^# make/make/p' Makefile

# Where the words of docs/words.txt are looked for.
WORDED := ARCHITECTURE.md CHANGELOG.md CONTRIBUTING.md csrc docs/design docs/glossary.md lowrank_optim tests

# Installed once, and again only when what is to be installed changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
		"lowrank_optim needs Python 3.10 or newer, and %s is %s. Try: make PYTHON=python3.12 ..." \
		% (sys.executable, sys.version.split()[0]))'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "could not create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV): once, a minute or two"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[examples,dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps galore-torch==1.0 bitsandbytes==0.50.2 || \
		echo "galore-torch or bitsandbytes could not be installed: parity tests will be skipped"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check setuptools wheel && DS_BUILD_OPS=0 DS_ACCELERATOR=cpu \
		$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed || \
		echo "deepspeed could not be installed: tests of ZeRO will be skipped"
	@touch $@

pretrain: $(STAMP)
	$(BIN)/python examples/pretrain.py --compare adamw,galore

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest

# Other instruction sets and threads round sums differently, and MKL and oneDNN hold other memory.
test-cpus: $(STAMP)
	for cpu in "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1" \
			"ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1" \
			"OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE"; do \
		echo "$$cpu"; env $$cpu $(BIN)/python -m pytest -n auto -m cpus $$(grep -rl "mark\.cpus" tests --include='*.py') || exit 1; \
	done

test-deepspeed:
	@$(OTHER)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(OTHER)
	@$(OTHER)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		hypothesis numpy pytest setuptools torch wheel
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(OTHER)/bin/python -m pip install -qq --disable-pip-version-check \
		--no-build-isolation deepspeed==$(DEEPSPEED)
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest tests/distributed/test_zero.py tests/distributed/test_matrix.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell $(WORDED)

native: $(STAMP)
	$(BIN)/python -m lowrank_optim.build

# Sanitizers start before ifunc resolvers could be run, so there is one copy of each loop.
sanitize: $(STAMP)
	LOWRANK_OPTIM_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -DLRO_NO_CLONES -g" \
	LOWRANK_OPTIM_NATIVE=require ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -s tests/kernels/test_native.py -k "native_is or emulated or known or zeros or errors or selections or positions or entries"

bench: $(STAMP)
	$(BIN)/python -m benchmarks.step_time --model 60m
	$(BIN)/python -m benchmarks.step_time --model h1024
	$(BIN)/python -m benchmarks.step_time --all --model 60m --rounds 9
	$(BIN)/python -m benchmarks.versus --model 60m
	$(BIN)/python -m benchmarks.versus --model h1024
	$(BIN)/python -m benchmarks.subspace
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.weight_memory
	$(BIN)/python -m benchmarks.peak_memory
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.native
	$(BIN)/python -m benchmarks.apply
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.host_time
	$(BIN)/python -m benchmarks.quality sweep --steps 200
	$(BIN)/python -m benchmarks.quality final --steps 200

clean:
	rm -rf $(VENV) $(VENV)-deepspeed-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
