"""The paper's experiments at its scale, for a machine with a GPU: sections 5.2, 5.3 and 5.5, tables 1, 2 and 3.

    python -m examples.paper.cifar --dataset cifar100 --model resnet18 --method gam
    torchrun --nproc-per-node 8 -m examples.paper.imagenet --model resnet50 --method sam+gam --data /data/imagenet
    python -m examples.paper.transfer --dataset pets --model swin_t --method gam
    python -m examples.paper.report out/paper

cifar.py, imagenet.py, transfer.py   one run of an experiment: its networks, data and settings
report.py, published.json            the tables of a folder of runs beside the paper's numbers
methods.py                           SGD or AdamW, SAM, GAM, SAM + GAM, and the presets of their hyperparameters
training.py                          the loop of all runs
run.py, files.py                     command line, ranks; checkpoints, CSV and JSON of a run
data.py, loading.py                  torchvision's datasets and transforms; batches that a killed run finds again
models.py                            torchvision's and timm's networks, with wide_resnet.py and pyramidnet.py

docs/paper.md says what was chosen where the paper is silent.
"""
