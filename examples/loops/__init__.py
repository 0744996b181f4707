"""One short example per training loop that people have: `python -m examples.loops.lightning --epochs 10`, and so on.

mixed_precision.py   a plain loop with GradScaler, accumulation over micro-batches and clipping
lightning.py         Lightning's Trainer with `GAMCallback`
accelerate.py        Hugging Face Accelerate
transformers.py      Hugging Face Trainer with `GAMTrainerMixin`
param_groups.py      groups without weight decay, as timm makes them
compiled.py          torch.compile, and one CUDA graph for the whole step

All train the small convolutional net of examples/digits on its data and return the test accuracy.
"""
