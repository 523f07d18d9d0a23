# A fresh machine needs Python 3.11, git and make; this file does the rest.
#
#   make data       set up, prepare the tiny policy and the mini competitions
#   make train      that, then train and plot
#   make test       set up, run the tests that CI runs; make test-long: all tests
#   make study      the ablations, hours on two cores; again to go on; STUDY=--final: held-out data
#   make clean      remove what these made, except for runs/

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA driver gets the CUDA builds, any other one the CPU builds.
REQUIREMENTS := $(shell nvidia-smi >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
# Where PyTorch's `+cpu` wheels are when the configured index has none.
CPU_WHEELS := https://download.pytorch.org/whl/cpu
SEED ?= 0
RUN ?= runs/first

.PHONY: setup data train study test test-long clean
.DELETE_ON_ERROR:

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-cpu.txt
	@echo "installing Python packages into $(VENV): about 4 GB (with CUDA more), two to five minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS) || \
		{ [ $(REQUIREMENTS) = requirements-cpu.txt ] && $(BIN)/pip install --quiet \
		--disable-pip-version-check -r $(REQUIREMENTS) --extra-index-url $(CPU_WHEELS); }
	@# vLLM asks for a torchvision whose build does not match torch's and breaks transformers;
	@# the policy is text only.
	$(BIN)/pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

data: data/competitions/DONE data/policy/config.json

data/competitions/DONE: examples/mini_mlebench.py examples/mini_mlebench_references.json | setup
	rm -rf data/competitions
	$(BIN)/python examples/mini_mlebench.py --out data/competitions
	touch $@

data/policy/config.json: examples/tiny_policy.py examples/mini_mlebench.py | setup
	$(BIN)/python examples/tiny_policy.py --out data/policy

train: data
	$(BIN)/python train.py --preset tiny --run-dir "$(RUN)" --seed $(SEED)
	$(BIN)/python examples/plot.py "$(RUN)" --out "$(RUN)/curves.png"
	@echo "learning curves: $(RUN)/curves.png"

study: data
	$(BIN)/python examples/study.py --out runs/study $(STUDY)

test: setup
	$(BIN)/python -m pytest -q -m "not long" -rs --durations=10

test-long: setup
	$(BIN)/python -m pytest -q -rs --durations=20

clean:
	rm -rf $(VENV) data .pytest_cache .hypothesis
