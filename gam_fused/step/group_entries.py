"""GAM's entries in the base optimizer's param groups: "rho" (or "gam_rho"), "perturb", and "gam", which checkpoints fill."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from gam_fused import torch_private


class GroupEntries:
    """Keeps them there, whoever rebuilds the groups: the base optimizer, a hook, a load of its own.

    Attributes:
        rho_key: the entry with the radius.
        defaults: what a group holds that does not say otherwise.
    """

    def __init__(self, base: Optimizer, rho_key: str, rho: float):
        self._base, self.rho_key = base, rho_key
        self.defaults: dict[str, Any] = {rho_key: rho, "perturb": True, "gam": {}}
        self._last: list[dict[str, Any]] = []  # of each group as they last were
        self.link()

    def complete(self) -> None:
        """Give them to groups that lack them: added through the base optimizer, or rebuilt.

        They keep what a group of that number had before, as long as there are as many.
        """
        groups = self._base.param_groups
        before = self._last if len(self._last) == len(groups) else [self.defaults] * len(groups)
        for group, values in zip(groups, before, strict=True):
            for name in self.defaults:
                group.setdefault(name, values[name])
        self._last = self.present()

    def present(self) -> list[dict[str, Any]]:
        """Those of each group."""
        return [{name: group[name] for name in self.defaults} for group in self._base.param_groups]

    def enter(self, loaded: Sequence[dict[str, Any]]) -> None:
        """Put loaded ones into the groups, also of a base optimizer that has loaded its own elsewhere."""
        for group, values in zip(self._base.param_groups, loaded, strict=True):
            group.update({name: values[name] for name in self.defaults})
        self.complete()

    def link(self) -> None:
        """Groups keep them when the base optimizer loads a state dict by itself."""
        torch_private.complete(self._base)
        reference = weakref.ref(self)

        def complete(*_: Any) -> None:
            if (entries := reference()) is not None:
                entries.complete()

        self._base.register_load_state_dict_pre_hook(complete)
        self._base.register_load_state_dict_post_hook(complete)
