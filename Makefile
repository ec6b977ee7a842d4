# make demo | make test | make figures: the first of them to run sets up a virtual environment, .venv.
# Another Python: make demo PYTHON=python3.12

PYTHON = python3

demo: .venv/ready
	.venv/bin/python train.py --demo

test: .venv/ready
	.venv/bin/python -m pytest tests

figures: .venv/ready
	NANOLLM_THREADS=1 .venv/bin/python docs/figures.py

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanollm needs Python 3.11 or newer: say PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: demo test figures clean
