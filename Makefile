# `make check` runs what CI runs, in the environment that is active.
.PHONY: check lint types test newest bench clean

check: lint types test

lint:
	ruff check .
	ruff format --check .

# The sources of imdc.kernels lie in ./kernels, where mypy would not look for them: it gets a tree of links in which
# they are inside the package.
TREE = build/types
types:
	rm -rf $(TREE)
	mkdir -p $(TREE)/imdc
	ln -s $(CURDIR)/imdc/* $(TREE)/imdc/
	ln -s $(CURDIR)/kernels $(TREE)/imdc/kernels
	cd $(TREE) && MYPYPATH=$(CURDIR)/bench:$(CURDIR)/docs mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache -p imdc $(patsubst %.py,-m %,$(notdir $(wildcard bench/*.py docs/*.py)))

test:
	pytest

# Whatever the registry has now, beyond the upper bound of setup.py too. CONTRIBUTING.md says what to do when it fails.
newest:
	.ci/newcomer --newest

bench:
	python bench/needle.py
	python bench/prefill.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
