"""The defaults, and accuracy against gradient passes, on several networks. `python -m studies.defaults`.

networks/      one file a network: data, weights, base optimizer, how long it trains
contender.py   one way to train, and its gradient passes by count
contenders.py  the grids that are tried on validation data
steps.py       one training step; m-SAM in plain torch
training.py    one run
jobs.py        which runs, in which order, how long they take
store.py       runs in a file as they finish; what is there is not run again
choose.py      the best of each kind, by validation data alone
rows.py        from runs to the rows of the tables
report.py      the Markdown page
plot.py        the picture
"""
