# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Genes and weights of the published model, for the demo's last step.
PUBLISHED := model_cards/stimg-mae-16x16x512
BROWSER := $(VENV)/.browser

.PHONY: demo test test-transformers lint clean

# torch first: pinned, so that pip does not resolve to a newer build and its CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[plot,spatialdata,app,data,train,eval,dev]'
	touch $@

# A browser for the test of the page, from Debian's packages. Without it that test is skipped and says what is missing,
# and the next `make test` tries again.
$(BROWSER): | $(STAMP)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium and chromium-driver for the test of the page."; \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 300 sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver' \
			>$(VENV)/browser.log 2>&1 && touch $@ || echo "No browser could be installed: see $(VENV)/browser.log."; \
	fi

# Phantom tissue -> pretraining -> embeddings of slides the model has not seen -> probe table with all baselines.
demo: $(STAMP)
	rm -rf demo
	$(BIN)/python data_processing/phantom.py --output demo/slides --num-slides 8
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train/run_pretrain.py --config train/configs/demo.yaml
	$(BIN)/python eval/run_domain_detection.py --model demo/model --output_dir demo \
		--slides demo/slides/phantom_06.h5ad demo/slides/phantom_07.h5ad --num_splits 3 --mlp_epochs 50 \
		--max_train_spots 400
	$(BIN)/stimg embed demo/slides/phantom_06.h5ad --model demo/model --output demo/phantom_06.h5ad \
		--plot demo/phantom_06.png --num-domains 6
	$(BIN)/python data_processing/phantom.py --output demo/human --num-slides 1 --genes-of $(PUBLISHED)
	$(BIN)/stimg embed demo/human/phantom_00.h5ad --output demo/published.h5ad --plot demo/published.png --num-domains 6
	@echo "The table is demo/table.md, the figures are demo/maps_slides.png, demo/ari.png and demo/smoothing.png;"
	@echo "what the published model makes of a phantom with its genes is demo/published.h5ad and demo/published.png."

# A file a process: fixtures are shared within a file. A thread each, so that processes do not wait for each other.
test: $(STAMP) $(BROWSER) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# What depends on transformers, with another version of it: make test-transformers VERSION=5.17.0
VERSION ?= 5.17.0
test-transformers: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/other_transformers.py $(VERSION) --numprocesses auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo
