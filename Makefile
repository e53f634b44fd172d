PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: video gpu test test-products test-soak test-chaos test-serve lint types mini mini-ti2v mini-t2v mini-score setup clean

## make a video with the model that ships, on two stages
video: setup
	$(BIN)/cineline generate "a red square moving left on a blue background" --pp 2 --output out.mp4

## what a GPU shows, each step's result written at once; with an interpreter that has all: make gpu PYTHON=python3
FOLDER ?= benchmarks/gpu-results
ifeq ($(origin PYTHON),command line)
gpu:
	$(PYTHON) -m benchmarks.gpu --folder $(FOLDER)
else
gpu: setup
	$(BIN)/python -m benchmarks.gpu --folder $(FOLDER)
endif

## lint, type-check and test
test: setup
	$(MAKE) -j2 --output-sync=target lint types
	$(BIN)/pytest -n 2 --dist loadfile $(addprefix --ignore=,$(ALONE))
	$(BIN)/pytest $(ALONE)

# What times something, or kills it, one test after the other; of all others two at once.
ALONE := $(addprefix tests/test_,$(addsuffix .py,bench chaos cli contract dispatcher durable engine environment \
	faults folder gpu_benchmark hosts hostile hub outbox page progress ray recovery replicas resuming server \
	served_bodies served_events served_page served_parts served_web soak streams timeout watch))

## all products of parallel axes, on four to eight ranks, of which `test` runs one: minutes more
test-products: setup
	$(BIN)/pytest -m products

## ten thousand small requests: memory and descriptors stay as they are
test-soak: setup
	$(BIN)/pytest -m soak -s

## faults at a hundred random moments, of which `test` runs ten: minutes
test-chaos: setup
	$(BIN)/pytest -m chaos

## the service killed at twenty random moments, and asked a thousand things by its own document: minutes
test-serve: setup
	$(BIN)/pytest -m serve

lint: setup
	$(BIN)/ruff check src training tests examples benchmarks
	$(BIN)/ruff format --check src training tests examples benchmarks

types: setup
	$(BIN)/mypy

## train the models that ship once more: hours on two cores, goes on where it was interrupted
mini: setup
	$(MAKE) -j2 mini-ti2v mini-t2v
	$(MAKE) mini-score

mini-ti2v mini-t2v: export OMP_NUM_THREADS = 1
mini-ti2v mini-t2v: export MALLOC_MMAP_THRESHOLD_ = 17179869184
mini-ti2v mini-t2v: export MALLOC_TRIM_THRESHOLD_ = 17179869184
mini-ti2v mini-t2v: export MALLOC_TOP_PAD_ = 268435456
mini-ti2v mini-t2v: setup
	$(BIN)/python -m training make $@

## judge the models that ship: counts, every verdict, and pictures to look at
mini-score: setup
	mkdir -p out/mini
	$(BIN)/python -m training score --model mini-ti2v --prompts 64 --json training/scores/mini-ti2v.json --sheet out/mini/mini-ti2v.png
	$(BIN)/python -m training score --model mini-ti2v --image-to-video --prompts 64 --json training/scores/mini-ti2v-image.json --sheet out/mini/mini-ti2v-image.png
	$(BIN)/python -m training score --model mini-t2v --prompts 128 --json training/scores/mini-t2v.json --sheet out/mini/mini-t2v.png

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out.mp4
