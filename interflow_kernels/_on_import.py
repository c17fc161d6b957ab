"""Runs something of ours right after a part of PyTorch has been imported: nobody waits for the import of a part that he does not use."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[], None]]] = {}


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds what the other finders find; behind a module that is waited for, it runs what waits."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        actions = _waiting.pop(name, None)  # so that the search below does not come back here
        if actions is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # of this one loader
        return spec


_watcher = _Watcher()


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Runs `action` now where the module `name` is imported, else right after its import. What it raises, the import raises."""
    if name in sys.modules:
        action()
        return
    _waiting.setdefault(name, []).append(action)
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
