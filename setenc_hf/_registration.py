"""Make transformers know Set-Encoders the moment it loads its Auto classes or pipelines, and not before.

Importing those takes seconds, which a command that only reads a run need not pay.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# which of our modules registers itself with which of theirs
REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": "setenc_hf.configuration",
    "transformers.models.auto.modeling_auto": "setenc_hf.modeling",
    "transformers.pipelines": "setenc_hf.pipeline",
}


def register_with_transformers() -> None:
    """Register with what transformers has loaded already, and watch for the rest."""
    for theirs, ours in REGISTRATIONS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds a watched module as Python would, and runs our registration behind its own code."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTRATIONS or name in _under_way:
            return None
        _under_way.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            _under_way.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, REGISTRATIONS[name])
        return spec


class _Registering(importlib.abc.Loader):
    def __init__(self, loader: Any, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


_under_way: set[str] = set()
