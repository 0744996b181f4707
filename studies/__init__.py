"""Studies behind the package's defaults and claims; each writes what it found to studies/results.

sweep_digits.py   the sweep from which the default hyperparameters are chosen   `python -m studies.sweep_digits`
probe_cosine.py   how long the probe of the finite difference should be         `python -m studies.probe_cosine`
interval/         GAM on a fraction of the steps: accuracy and cost             `python -m studies.interval`
clients/          FusedGAM in the place of small clients' base optimizers       `python -m studies.clients`
"""
