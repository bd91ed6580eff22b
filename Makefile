PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: sample demo space docs dist test quality style clean

sample: $(VENV)/.sample
	$(BIN)/python training_scripts/sample_srdd.py \
		--pretrained_model_name_or_path model_cards/srdd-fruits64 --output sample.png
	@echo "Wrote sample.png"

demo: $(VENV)/.demo
	$(BIN)/python demo/app.py

space:
	rm -rf build/space && mkdir -p build/space
	cp -RL demo/. src/srdd model_cards/srdd-fruits64 build/space/

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4

quality: $(VENV)/.quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) sample.png

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.sample: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.demo: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.docs: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt mkdocs mkdocs-material "mkdocstrings[python]" ruff
	touch $@

$(VENV)/.dist: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt build twine
	touch $@

$(VENV)/.test: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,test,demo]"
	touch $@

$(VENV)/.quality: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt ruff
	touch $@
