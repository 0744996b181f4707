"""A long check: lists too long for the tests, and what no list holds: random cases, faults, arguments. `make soak`.

lists.py         complete lists of cases, in conformance.py and interruptions.py: right directions, schedulers, checkpoints
                 into another backend, exceptions, numbers that are not finite
properties.py    whole steps on random lists of tensors against float64; scale, order, groups, threads, runs
faults.py        a training with random exceptions, signals and numbers that are not finite
ranks.py         the same over two ranks, under DDP and FSDP2: on one of them, or on both
kills.py         trainings that are killed and go on
large.py         a tensor of more elements than 32 bits count
state_dicts.py   state dicts with random damage
operators.py     the compiled operators with random arguments
sanitizers.py    the kernels of csrc/cpu under AddressSanitizer with UBSan, and under ThreadSanitizer

tests/test_soak.py runs a short, fixed form of each. `results/` has the figures of the last run that was kept.
"""
