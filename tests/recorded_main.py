"""The program with every read of its settings recorded: python -m tests.recorded_main READS --config=... --workdir=...

Recording starts when the checks of the settings are done: a value that is only checked counts as not read.
"""

import json
import sys
from pathlib import Path

from absl import app

from warp_jax import main
from warp_jax.experiment import jobs, preparation
from warp_jax.settings.groups import Group

READS = Path(sys.argv.pop(1))
paths, reads = {}, set()


def _find_groups(group, path=""):
    paths[id(group)] = path
    for name in type(group).model_fields:
        value = group.__dict__[name]
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(inner, Group):
                _find_groups(inner, f"{path}{name}.{key}." if key else f"{path}{name}.")


def recorded_get(group, name):
    """Attribute access that notes the path of what is read; a dump reads every setting of its group.

    A dump of the whole config, which is written to the workdir and the report, uses none of them.
    """
    if id(group) in paths and not (name == "model_dump" and paths[id(group)] == ""):
        names = type(group).model_fields if name == "model_dump" else [name]
        reads.update(f"{paths[id(group)]}{name}" for name in names)
        if name == "model_dump":
            for field in names:
                if isinstance(inner := group.__dict__[field], Group):
                    recorded_get(inner, "model_dump")
    return object.__getattribute__(group, name)


def after_the_checks(settings):
    """Start recording with the first function that runs after the checks."""
    _find_groups(settings)
    Group.__getattribute__ = recorded_get
    return load_corpora(settings)


def recorded_run(*arguments):
    """Run the job, then save the list of what it has read."""
    line = run_part(*arguments)
    READS.write_text(json.dumps(sorted(reads)))
    return line


load_corpora, run_part = preparation.load_corpora, jobs.run_part
preparation.load_corpora, jobs.run_part = after_the_checks, recorded_run
app.run(main.main, flags_parser=main.parse_flags)
