"""The modules in a bundle's own folder, which its configuration names as `scripts.…`.

Every bundle calls its package `scripts`, and Python knows one module of a name. The modules of a
bundle are known to Python only while the bundle is opened or computes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipeline.types import PathOrStr


class BundleImports:
    """Makes the modules in a bundle's folder importable, for a time.

    Args:
        root: the bundle's folder.
    """

    def __init__(self, root: PathOrStr) -> None:
        self.folder = Path(root).resolve()
        self._modules: dict[str, ModuleType] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Import from the bundle's folder first; afterwards, be as before."""
        before = self._taken()
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self.folder))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(self.folder))
            self._modules = self._taken()
            sys.modules.update(before)

    def _taken(self) -> dict[str, ModuleType]:
        """Remove the modules that have a name in the bundle's folder, and return them."""
        own = set()
        for path in self.folder.iterdir():
            if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))):
                own.add(path.stem)
        # a list, because the thread that reads the next case may import something meanwhile
        names = [name for name in list(sys.modules) if name.split(".")[0] in own]
        return {name: sys.modules.pop(name) for name in names}
