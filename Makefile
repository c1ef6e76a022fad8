# `make` lists the targets; each sets up what it needs. Wanted beforehand: Python 3.11 or newer with its venv module.
BIN := .venv/bin
# One thread a process and no spinning: the suite starts many ranks on few cores.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# Two files of tests at a time: many tests wait, and those that compute over many ranks fill more cores by themselves.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# On a GPU machine the Python that has torch is used as it is, and the checkout without being installed.
GPU_PYTHON ?= python3
TRITON ?= 3.6.0
BARE := PYTHONPATH=.src PYTHONSAFEPATH=1 $(GPU_PYTHON)

.PHONY: help venv demo test deepspeed-test parity soak lint types gpu-test hazards random-cases bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .venv/done  ## .venv with stepladder, editable, in the versions of constraints.txt

demo: .venv/done  ## prepare, train, kill, resume, split over four processes and sample: some three minutes
	@$(BIN)/stepladder demo

test: .venv/done  ## the whole CPU suite
	$(QUIET) $(BIN)/python -m pytest -m "not gpu" $(TWO)

deepspeed-test: .venv/done  ## DeepSpeed with weights and moments on a disk, $DISK (.): some minutes, once, to compile its reader
	PATH=$(CURDIR)/$(BIN):$$PATH PYTHONPATH=tests $(QUIET) $(BIN)/python tests/nvme.py $(DISK)

parity: .venv/done  ## every model of the parity matrix on every layout, and its table into the README: ten minutes
	PYTHONPATH=tests $(QUIET) $(BIN)/python tests/parity.py

soak: .venv/done  ## 50 kills at random moments of a run of four processes; its losses must be those of an undisturbed one
	$(BIN)/python tests/soak.py

lint: .venv/done  ## ruff, and shellcheck of the jobs
	$(BIN)/ruff check
	$(BIN)/shellcheck slurm/*.sbatch .ci/run

types: .venv/done  ## pyright
	$(BIN)/pyright

gpu-test:  ## the tests that need a GPU, with $GPU_PYTHON (python3) as it is
	$(BARE) -m pytest -m gpu $$(grep -l mark.gpu tests/*.py)

# CI compiles by the Triton that goes with constraints.txt; the code of another version differs, and what is wrong in it.
hazards: .venv/done  ## what compilers get wrong in the kernels, of all head sizes, by $TRITON (3.6.0): half an hour, no GPU
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .venv/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=.venv/triton-$(TRITON):.src:tests PYTHONSAFEPATH=1 $(BIN)/python tests/aot.py

random-cases:  ## 10,000 random small cases of the kernels against fp64, on a GPU machine, with $GPU_PYTHON as it is
	PYTHONPATH=.src:tests PYTHONSAFEPATH=1 $(GPU_PYTHON) tests/random_cases.py

bench:  ## the measurements of tests/bench, on a GPU machine, with $GPU_PYTHON as it is; more with more GPUs
	$(BARE) tests/bench/dense.py
	@n=$$(nvidia-smi -L | wc -l); test $$n -eq 1 || { \
	  for b in "ladder.py" "ladder.py --copies" "dtensor_tp.py" "pipeline.py" "nccl_parity.py"; do \
	    $(BARE) -m torch.distributed.run --nproc-per-node $$n tests/bench/$$b || exit 1; done; \
	  $(BARE) tests/bench/scaling.py; }

clean:  ## remove what make made, but no runs
	rm -rf .venv .pytest_cache .ruff_cache

# pip's -c does not reach the environment in which a package is built; the only one built here is this one.
.venv/done: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for p in python3.11 python3.12 python3.13 python3; do \
	    if $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      echo "making .venv with $$p; installing takes a minute or two, once"; exec $$p -m venv --clear .venv; fi; \
	  done; \
	  echo "make: found no Python 3.11 or newer that makes virtual environments; on Debian and Ubuntu" \
	    "'sudo apt-get install python3-venv' brings the missing part" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@
