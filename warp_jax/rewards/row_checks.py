"""Checks of the rows that a reward function will read, by the function check_row(row) of its module, if it has one."""

import copy
import importlib
from collections.abc import Iterable
from pathlib import Path

from warp_jax.data.corpus import Corpus


def check(sources: Iterable[str], split: Corpus) -> None:
    """Call check_row of every source 'package.module:function' that has one, for each row of a split.

    Raises ValueError with the place of the row if check_row raises an error.
    """
    names = [source.partition(":")[0] for source in sources if ":" in source and not Path(source).is_dir()]
    modules = [importlib.import_module(name) for name in names]
    for check_row in [module.check_row for module in modules if hasattr(module, "check_row")]:
        for place, row in zip(split.places, split.rows, strict=True):
            try:
                check_row(copy.deepcopy(row))  # it may write into the row
            except (Exception, SystemExit) as error:  # user code can raise anything
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"{place}: {kind}{error}") from error
