"""The main job: SGD and AdamW against SAM and GAM on handwritten digits with wrong labels. `python -m examples.digits`.

data.py      500 training images (20 % of the labels replaced), a validation fold of them, 1,297 test images
net.py       a small convolutional net with batch norm
methods.py   what is compared: each method on each base optimizer
training.py  one run: train, measure the step, the accuracy and the largest Hessian eigenvalue
jobs.py      many runs over worker processes
report.py    the table and the JSON
plot.py      the picture
"""
