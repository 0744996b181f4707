"""GAM on a fraction of the iterations (figure 4, section 5.5 of the paper), on the digits. `python -m studies.interval`.

settings.py   oracles, ratios, the values of alpha that are tried, gradient passes per step
cost.py       training speed: whole windows of steps, side by side
estimates.py  the choice of alpha, paired differences, the part of a gain that is kept, the rows of the table
report.py     whether the paper's claims hold here, in words and numbers; the Markdown page
plot.py       the picture
"""
