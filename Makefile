# make setup    .venv with everything, ComfyUI for the tests, the `hywu` command
# make demo     one edit of a real photo in a real ComfyUI -> output/demo.png
# make test     all tests, with transformers 4.57 and 5.x, and parity with the reference's numbers
# make parity CASE=DIR    one golden case (default: the committed one), one line a stage
# make retrain  the bundled small checkpoint from nothing, into .cache/retrain (PHOTOS=DIR: other photos than Debian's wallpapers)
# make ablation the paper's experiments on it -> docs/ablation.md, benchmarks/results/ablation.json
# make lint

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
CASE ?=
PHOTOS ?= .cache/photos

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
READY := $(VENV)/ready
HELD := $(VENV)/constraints.txt
# transformers 5 lies in a folder of its own that PYTHONPATH puts before .venv's 4.57.
TRANSFORMERS5 := .cache/transformers-5
READY5 := $(TRANSFORMERS5)/ready

.PHONY: setup demo test test-transformers-5 parity retrain ablation lint clean

setup: $(READY)
	@$(PY) -m comfyui_hywu.tests.comfy.fetch

# torch comes first and alone, then a constraint holds it: otherwise pip may exchange it for another build of several GB.
# torchvision comes without its dependencies for the same reason, and into a folder of its own that only the test server sees:
# where it is installed but broken (its compiled part wants CUDA) transformers fails too.
$(READY): requirements.txt tests/comfy/requirements.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(HELD)
	$(PIP) -c $(HELD) -r requirements.txt -r tests/comfy/requirements.txt
	$(PIP) --no-deps nixl nixl-cu12 || echo "no NIXL here: that stages read each other's memory is not tested"
	test -d .cache/torchvision/torchvision || $(PIP) --no-deps --target .cache/torchvision $(TORCHVISION)
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(READY5): $(READY)
	rm -rf $(TRANSFORMERS5)
	$(PY) -m pip --disable-pip-version-check freeze --exclude-editable \
		| grep -v -i -E '^(transformers|tokenizers|huggingface[-_]hub|torch)[ =@]' > $(VENV)/constraints-5.txt
	$(PIP) --target $(TRANSFORMERS5) -c $(VENV)/constraints-5.txt "transformers>=5,<6" "huggingface_hub<2"
	touch $@

demo: setup
	$(PY) -m comfyui_hywu.tests.comfy.demo

test: setup test-transformers-5
	$(VENV)/bin/pytest

# What transformers can change: pictures, text, whole edits and parity. ComfyUI's own requirement is what .venv holds.
test-transformers-5: $(READY5)
	PYTHONPATH=$(TRANSFORMERS5) $(PY) -c "import transformers; print('transformers', transformers.__version__); assert transformers.__version__ >= '5'"
	PYTHONPATH=$(TRANSFORMERS5) $(VENV)/bin/pytest -q $(addprefix --ignore tests/,backbone benchmarks checkpoint cluster comfy generator kernels lora placement training)

parity: $(READY)
	@$(PY) -m comfyui_hywu.tests.golden.parity "$(CASE)"

.cache/photos: $(READY)
	$(PY) models/fetch_photos.py $@

retrain: $(READY) $(PHOTOS)
	$(VENV)/bin/hywu train mini --photos $(PHOTOS) --run .cache/retrain

ablation: $(READY) $(PHOTOS)
	$(PIP) -c $(HELD) -r benchmarks/requirements.txt
	$(PY) -m comfyui_hywu.benchmarks.ablation --photos $(PHOTOS) --run .cache/ablation

lint: $(READY)
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) .cache output
