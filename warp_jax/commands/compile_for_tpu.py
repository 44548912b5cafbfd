"""Compile all programs of a config for TPUs, on a machine without one, and check that they fit in memory.

  pip install 'warp_jax[tpu-aot]'
  warp-jax compile --config=gemma_7b --topology=v5e:8x8
  warp-jax compile --config=gemma_7b --topology=v5e:16x16 --mesh=1,16,16 --json=fit.json

Exit code 0: all programs fit; 3: some do not fit, and the output names them and the nearest setting that fits; 2: bad
input. Nothing is run, so speed and numbers are not tested. If a model's files are missing, config.model.size is used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would wait for a metadata server
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax
    from jax.experimental import topologies

    from warp_jax import settings as typed
    from warp_jax.tpu_fit import chips, compile, memory, tables


DOES_NOT_FIT = 3  # exit code

CONFIG = cli.define_config("config", "Config file, or the name of one of warp_jax, such as gemma_7b.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Chip type and shape of the slice, such as v5e:8x8 or v5p:4x4x4.")
SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, connected by the data centre's network.", lower_bound=1)
MESH = flags.DEFINE_list(
    "mesh", None, "Chips along data, fsdp and tensor (or only the last two); default: config.mesh."
)
PROGRAMS = flags.DEFINE_list("programs", ["all"], "Programs to compile, by their names in the table.")
SPARE = flags.DEFINE_float("spare", 0.1, "Share of a chip's memory to leave free.", lower_bound=0, upper_bound=0.9)
SUGGEST = flags.DEFINE_bool("suggest", True, "If a program does not fit, search for the nearest setting that fits.")
flags.register_validator(
    "mesh",
    lambda sizes: not sizes or (len(sizes) in (2, 3) and all(size.lstrip("-").isdigit() for size in sizes)),
    message="want two or three whole numbers, such as 8,8",
)
JSON = flags.DEFINE_string("json", "", "JSON file to write all figures to.")


def get_devices(chip: chips.Chip, topology: str, slices: int) -> Sequence[jax.Device]:
    """Return the devices of a topology that need not exist. Raises ValueError for bad names, or without libtpu."""
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.config_name:
        options["chip_config_name"] = chip.config_name
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"topology: {topology}: {error}; want a name like v5e:8x8, and libtpu (pip install 'warp_jax[tpu-aot]')"
        ) from error


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    try:
        chip, _ = chips.parse_topology(str(TOPOLOGY.value))
        settings = typed.from_config(CONFIG.value.to_dict())
        if MESH.value:
            settings = settings.replace({"mesh": tuple(map(int, ["1", *MESH.value][-3:]))})
        devices = get_devices(chip, str(TOPOLOGY.value), SLICES.value)
        plan = compile.make_plan(settings, devices)
        settings = settings.replace({"mesh": tuple(plan.mesh.devices.shape)})
        names = [] if PROGRAMS.value == ["all"] else PROGRAMS.value
        memory.check_names(plan, names)
    except (ValueError, OSError) as error:
        cli.fail(error)
    say = functools.partial(print, file=sys.stderr, flush=True)
    started = time.monotonic()

    def on_program(done: compile.Compiled) -> None:
        say(f"{done.name}: compiled in {done.seconds:.0f} s ({time.monotonic() - started:.0f} s in total)")

    check_plan = functools.partial(memory.check, limit=(1 - SPARE.value) * chip.hbm_bytes, on_program=on_program)
    fit = check_plan(plan, names)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    slices = f"{SLICES.value} x " if SLICES.value > 1 else ""
    compilers = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{slices}{TOPOLOGY.value}, mesh (data, fsdp, tensor) = {settings.mesh}; {compilers}\n")
    print(tables.table(fit, chip, SPARE.value))
    if not names and not fit.failing:
        print("\nLower bound on the time of an RL step, from the chip's published peaks (not a measurement):\n")
        print(tables.step_table(settings, fit, chip))
    changes = None
    if fit.failing and SUGGEST.value:
        say("searching for the nearest setting that fits")
        try_plan = functools.partial(compile.make_plan, devices=devices)
        changes = memory.search(settings, fit.failing, names, make_plan=try_plan, check_plan=check_plan)
        print(tables.advice(changes))
    if JSON.value:
        about = {"command": " ".join(sys.argv), "mesh": settings.mesh, "versions": versions, "suggestion": changes}
        files.write_json(Path(JSON.value), about | tables.as_json(fit, chip))
    if fit.failing:
        sys.exit(DOES_NOT_FIT)


def start() -> None:
    """Parse the flags and run."""
    cli.run(
        main,
        required=("config", "topology"),
        example="--config=gemma_7b --topology=v5e:8x8",
        load=functools.partial(cli.load_config, CONFIG),
    )
