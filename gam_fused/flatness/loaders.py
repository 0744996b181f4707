"""Passes over a data loader that all see the same, and that leave it as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

_COUNTERS = ("epoch", "iteration")  # what samplers and loaders that seed by the pass count up


def check_all_ranks(loader: Any) -> None:
    """Accelerate's loaders whose ranks agree on the order by communication, which a measure does not take part in."""
    if not hasattr(loader, "base_dataloader") or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    kind = type(loader).__name__
    if kind == "DataLoaderDispatcher" or getattr(loader, "rng_types", None):
        raise TypeError(
            f"loader is a {kind} that Accelerate has prepared, whose ranks communicate about their parts of the "
            "data: give a plain DataLoader of this rank's part, for example with a DistributedSampler"
        )


def one_pass(loader: Iterable[Any], batches: int | None) -> Iterator[Any]:
    """The first `batches` mini-batches. Afterwards the loader's next epoch, and one that is under way, are as without."""
    skipped = getattr(loader, "skip_batches", 0)  # of one that Accelerate has prepared
    counters = [(part, name, vars(part)[name]) for part in _parts(loader) for name in _COUNTERS if name in vars(part)]
    iterator = iter(_fresh(getattr(loader, "base_dataloader", loader)))
    try:
        yield from itertools.islice(iterator, skipped, None if batches is None else skipped + batches)
    finally:
        for name in ("_shutdown_workers", "close"):  # of a DataLoader's with workers, of a generator
            if end := getattr(iterator, name, None):
                end()
        for part, name, value in counters:
            setattr(part, name, value)


def generators_of(loader: Any) -> list[torch.Generator]:
    """What a DataLoader, its samplers and its data set draw from."""
    found = {id(g): g for g in (vars(part).get("generator") for part in _parts(loader)) if isinstance(g, torch.Generator)}
    return list(found.values())


def _fresh(loader: Iterable[Any]) -> Iterable[Any]:
    """With workers of its own: persistent ones go on drawing from pass to pass, and serve one iterator, the user's."""
    if not isinstance(loader, DataLoader):
        return loader
    fresh = copy.copy(loader)
    vars(fresh).update(persistent_workers=False, _iterator=None)  # a DataLoader refuses to have attributes set
    return fresh


def _parts(loader: Any) -> list[Any]:
    """The loader and what it draws samples with, wrapped ones too."""
    parts, names = [loader], ("base_dataloader", "dataset", "sampler", "batch_sampler")
    for part in parts:  # grows on the way
        inner = [vars(part).get(name) for name in names] if hasattr(part, "__dict__") else []
        parts += [i for i in inner if hasattr(i, "__dict__") and all(i is not p for p in parts)]
    return [p for p in parts if hasattr(p, "__dict__")]
