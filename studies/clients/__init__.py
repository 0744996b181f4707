"""Small clients with people's usual training code: does FusedGAM, at its defaults, reach the loss of the base optimizer?

client.py      what a client is
mnist.py       the network of torch's MNIST example        characters.py  a character model like nanoGPT's
digits.py      a vision transformer and an LSTM            physics.py     a physics-informed network
catalogue.py   all of them, by name
training.py    one run
report.py      rows, the table, the page
"""
