# make         the virtual environment .venv (fast when it is up to date)
# make demo    images from the reference model, with and without caching, in out/demo
# make test    ruff, mypy, pytest; root on Debian installs Chromium for it
# make data    Fashion-MNIST, for training and judging the reference model only
# make clean   what the targets above and the tools wrote, .venv and .data excepted

PYTHON ?= python3.11
DATASET := dataset-fashion-mnist

.DEFAULT_GOAL := .venv/installed
.PHONY: .venv demo test browser data clean

.venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	.venv/bin/tokencache demo --out out/demo

# One thread a test process: the processes share the cores already. Each takes half of the files, whose fixtures are then made once.
test: .venv/installed browser
	.venv/bin/ruff check .
	.venv/bin/mypy -p tokencache_compile
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

# The report's test opens it in Chromium, and is skipped where there is none (but not where CI is set).
browser:
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update --quiet && apt-get install -y --quiet --no-install-recommends chromium || echo "Chromium could not be installed."; \
	else \
		echo "No Chromium, and not root on Debian: the report's test in a browser is skipped."; \
	fi

data:
	@set -e; if [ "$$(id -u)" = 0 ]; then \
		apt-get update; \
		apt-get install -y --no-install-recommends $(DATASET); \
	else \
		mkdir -p .data; \
		(cd .data && rm -f $(DATASET)_*.deb && apt-get download $(DATASET)); \
		dpkg-deb -x .data/$(DATASET)_*.deb .data; \
		echo "Not root, so nothing was installed. Set this before training or judging:"; \
		echo "    export FASHION_MNIST_DIR=$(CURDIR)/.data/usr/share/datasets/fashion-mnist"; \
	fi

clean:
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
