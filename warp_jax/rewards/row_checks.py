"""Checks of the rows that a reward function will read, by the function check_row(row) of its module, if it has one."""

import copy
import functools
import importlib
from collections.abc import Mapping

from warp_jax.data.corpus import Corpus
from warp_jax.pretrained import sources
from warp_jax.rewards import text_reward, time_limit
from warp_jax.types import RewardError


def check(limits: Mapping[str, float], split: Corpus) -> None:
    """Call check_row of every source 'package.module:function' that has one, for each row of a split.

    limits: seconds for one call, by source. Raises RewardError with the place of the row if check_row raises an error,
    exits or takes too long, or if the source cannot be loaded.
    """
    for source, seconds in sorted(limits.items()):
        if ":" not in source or sources.is_folder(source):
            continue
        text_reward.load_function(source, timeout=seconds)
        module = importlib.import_module(source.partition(":")[0])
        if not hasattr(module, "check_row"):
            continue
        for place, row in zip(split.places, split.rows, strict=True):
            name = f"{place}: {module.__name__}.check_row"
            late = f"{name}: no result after {seconds} seconds; fix the function, or raise its timeout"
            call = functools.partial(module.check_row, copy.deepcopy(row))  # it may write into the row
            try:
                error = time_limit.run(call, seconds, late).exception()
            except TimeoutError as timeout:
                raise RewardError(late) from timeout
            if error is not None:  # of any type, exit calls too
                is_plain = isinstance(error, ValueError)
                reason = f": {' '.join(str(error).split())}" if is_plain else f" raised {text_reward.describe(error)}"
                raise RewardError(f"{name}{reason}") from error
