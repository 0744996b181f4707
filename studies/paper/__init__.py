"""The paper's tables and figures in small, on data that packages ship. `python -m studies.paper`.

architectures.py  the residual networks
networks.py       what is trained: data, network, base optimizer; `TABLE1`, `NOISE`, `TRANSFER`
transfer.py       pre-trained on the digits 0 to 4, fine-tuned on 5 to 9
contenders.py     SGD, SGD + GAM, SAM, SAM + GAM, and the grids of the paper, a coordinate at a time
jobs.py           one run: a training, or a training and the measures of a figure
measures.py       figures 2, 3 and 5, of one network
parts.py          which runs a table or figure needs
tables.py         from runs to rows, with the paper's gains beside them
report.py         the Markdown page
figures.py        the pictures
"""
