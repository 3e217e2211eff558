# Every target sets up what it needs in .venv; after the first time that takes a second.
BIN := $(CURDIR)/.venv/bin
PYTHON ?= python3
export PATH := $(BIN):$(PATH)
export PYTHONWARNINGS := ignore::UserWarning:multiprocessing.resource_tracker

.PHONY: setup demo mini mini-ablations mini-methods mini-controls mini-rivals fashion fashion-spaces claims test campaign
.PHONY: gpu-check lint format lock clean

setup: .venv/installed

# Exact versions from the lock, by uv, which comes by pip. Compiled once, so that every short process starts quickly.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	"type make setup PYTHON=python3.12, say, and delete .venv if an older one made it" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@test -x $(BIN)/uv || python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/.venv uv pip install --quiet --compile-bytecode --requirement requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv uv pip install --quiet --no-deps --editable .
	@touch $@

# EDM on real digits, three seeds: results/demo. `make mini` continues from there: every family and setting, results/mini.
demo mini: setup
	@cd mini && dvc repro notebooks@$@ $(if $(filter mini,$@),page)
	@echo; cat results/$@/table.md; echo "w-curves and executed notebooks are in results/$@"

mini-ablations: setup
	@cd mini/ablations && dvc repro
	@cd mini && dvc repro --single-item --force page
	@for ablation in cross part guidance; do echo; cat results/mini/ablations/$$ablation/table.md; done

# The search by surface against the whole grid, also on fresh seeds.
mini-methods: setup
	@cd mini/methods && dvc repro && cd .. && dvc repro --single-item --force notebooks@mini page
	@echo; cat results/mini/methods.md

# What else the gain could come from: controls, other features, and what `neon diagnose` says beforehand.
mini-controls: setup
	@cd mini/controls && dvc repro
	@$(BESIDE)
	@echo; cat results/mini/controls/table.md results/mini/spaces.md results/mini/diagnose.md

# SIMS, autoguidance and DDO on the same bases, and S made with GMO.
mini-rivals: setup
	@cd mini/rivals && dvc repro
	@$(BESIDE)
	@echo; cat results/mini/rivals/table.md results/mini/gmo/table.md

# The notebook of both and the page, from all results that are there.
BESIDE = cd mini && dvc repro --single-item --force controls page

# Fashion-MNIST, a family after the other, with the tables and notebooks after each: results/fashion. Hours on two cores;
# docs/fashion.md says how to start it for one family, and on a GPU.
FAMILIES := edm flow var imm
fashion: setup
	@cd fashion && dvc repro plan baselines && for family in $(FAMILIES); do \
	dvc repro final@$$family && dvc repro --single-item --force report || exit 1; done
	@python -m mini.readme
	@cat results/fashion/table.md results/fashion/levels.md

# Do the two feature spaces agree? After `make fashion`.
fashion-spaces: setup
	@cd fashion && for family in $(FAMILIES); do dvc repro spaces@$$family || exit 1; done
	@python -m mini.readme
	@cat results/fashion/spaces/*/spaces.md

# The verdict on each claim of the paper, from the results as they are; also into README.md and docs.
claims: setup
	@cd mini && dvc repro --single-item claims
	@python -m mini.readme
	@python -m report.claims results/mini $(wildcard results/fashion) results/paper

test: setup
	pytest

# Hostile files and mutated ones, commands that are killed, stopped or without room, and worlds of all families, for up
# to an hour; resumes when it was interrupted. The table of docs/reliability.md.
campaign: setup
	python tests/hostile --out docs/reliability.md

# What a GPU makes of it, at most 20 minutes: results/gpu and docs/gpu.md. ARGS="--rehearse" needs no GPU.
gpu-check: setup
	python -m benchmarks.gpu $(ARGS); status=$$?; python -m benchmarks.gpu.page && exit $$status

lint: setup
	ruff check
	ruff format --check

format: setup
	ruff check --fix
	ruff format

lock:
	uv pip compile --universal --python-version 3.11 --extra dev --extra all --no-annotate --no-header \
		--no-emit-index-url --upgrade pyproject.toml --output-file requirements.lock

clean:
	rm -rf mini/runs results/demo
