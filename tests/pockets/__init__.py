"""One tiny config per family and variant. To test one more family, add one entry to a file of this folder."""

import importlib
import pkgutil

from .base import VOCAB, Pocket

__all__ = ["POCKETS", "VOCAB", "Pocket"]

POCKETS: dict[str, Pocket] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name not in ("base", "wrappers"):
        _pockets = importlib.import_module(f"{__name__}.{_module.name}").POCKETS
        assert not _pockets.keys() & POCKETS.keys()
        POCKETS.update({name: pocket for name, pocket in _pockets.items() if pocket.config is not None})
