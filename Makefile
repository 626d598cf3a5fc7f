# make demo          environment, then raw data -> shards -> encoder -> report in $(DEMO)
# make test          environment with test tools, then the test suite
# make lint          the style check
# make lower         imports, reads, trains and exports in the oldest environment that setup.cfg allows
# make resolve       setup.cfg against the registry: its lowest versions, and wheels for ARM Linux and Python 3.14
# make constraints   the newest versions into constraints.txt, after the test suite has passed with them
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
CONSTRAINTS ?= constraints.txt
PACKAGE ?= --editable .
PIP = $(VENV)/bin/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: demo test lint lower resolve constraints
demo: $(VENV)/.demo
	$(VENV)/bin/dino-depth demo --out $(DEMO)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest $(PYTEST)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

LOWER_TESTS = cli config terminal extras depth readers vit export tiny realdata plausibility metrics lock shard_format storage frozen heads
lower: VENV := $(VENV)-lower
lower:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv --system-certs pip install --quiet --python $(VENV) --resolution lowest-direct --editable '.[render,test]'
	$(VENV)/bin/python -m pytest $(LOWER_TESTS:%=tests/test_%.py)

# Prints nothing unless a version or a wheel is missing.
UV = $(VENV)-uv/bin/uv --system-certs pip compile --quiet --output-file /dev/null
BASE = import configparser as c; s = c.ConfigParser(); s.read("setup.cfg"); print(s["options"]["install_requires"])
resolve:
	$(PYTHON) -m pip install --quiet --upgrade --target $(VENV)-uv uv
	$(UV) --resolution lowest-direct --python-version 3.11 --extra render --extra test setup.cfg
	$(PYTHON) -c '$(BASE)' | $(UV) --only-binary :all: --python-version 3.14 --python-platform aarch64-unknown-linux-gnu -

constraints:
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS=
	{ echo "# Tested together on $$(date -u +%F): $$($(PYTHON) -V), $$(uname -sm). Written by make constraints."; \
	  $(VENV)-newest/bin/python -m pip freeze --exclude-editable; } >constraints.txt

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) $(PACKAGE)'[render]'
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) --editable '.[render,test,onnx,remote]'
	touch $@
