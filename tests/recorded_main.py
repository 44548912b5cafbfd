"""The program with every read of its config recorded: python -m tests.recorded_main READS --config=... --workdir=...

Recording starts when the checks of the config are done, so that a value that is only checked counts as not read.
"""

import json
import sys
from pathlib import Path

from absl import app
from ml_collections import ConfigDict

from warp_jax import main
from warp_jax.experiment import jobs, preparation

READS = Path(sys.argv.pop(1))


def _groups(config, path=""):
    yield id(config), path
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _groups(value, f"{path}{key}.")


class Recorder:
    """Replaces ConfigDict's access by key, through which all others go, by one that notes the key."""

    def __init__(self):
        self.reads = set()
        self._get, self._to_json = ConfigDict.__getitem__, ConfigDict.to_json

    def start(self, config):
        paths = dict(_groups(config))

        def get(group, key):
            self.reads.add(f"{paths.get(id(group), '?')}{key}")
            return self._get(group, key)

        def to_json(group):
            ConfigDict.__getitem__ = self._get
            text = self._to_json(group)
            ConfigDict.__getitem__ = get
            return text

        ConfigDict.__getitem__, ConfigDict.to_json = get, to_json


recorder = Recorder()
load_corpora = preparation.load_corpora


def recorded_load_corpora(config):
    """The first reading of the config after its checks."""
    recorder.start(config)
    return load_corpora(config)


preparation.load_corpora = recorded_load_corpora
run_part = jobs.run_part


def recorded_run(*arguments):
    """The job, then the list of what it has read."""
    line = run_part(*arguments)
    READS.write_text(json.dumps(sorted(recorder.reads)))
    return line


jobs.run_part = recorded_run
app.run(main.main, flags_parser=main.parse_flags)
