"""Memory, peak rates and links of TPU chips, and the names of TPU slices.

All figures are per JAX device: a chip, or on tpu7x one of the two halves of a chip. Sources:
- hbm_bytes: the limit in out-of-memory errors of libtpu 0.0.42.1 on 2x2 or 2x2x1 chips ("exceeds available HBM
  (15.75G)"). A chip has a little more, which is reserved for the system.
- v5e, v5p, v6e, tpu7x: https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and so on. For the memory bandwidth of v5e,
  versions of that page say 819 GB/s or 800 GiB/s; the lower is used here.
- v4: https://docs.cloud.google.com/tpu/docs/v4; its links: https://arxiv.org/abs/2304.01433, table 4.
"""

import math
import re
from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
    """Figures of one JAX device. Peaks are the published ones; real programs reach only a part of them.

    ici_bandwidth is the rate over all links at once, in one direction: half of the published bidirectional bandwidth
    per chip. A collective along one axis of the torus uses two of the links, or one if that axis is not a ring.
    """

    name: str
    hbm_bytes: int  # memory for programs
    hbm_bandwidth: float  # bytes/s
    bf16_flops: float  # FLOP/s of matrix products
    ici_bandwidth: float  # bytes/s sent to other chips
    links: int  # of a chip to its neighbours, two for each axis of a slice
    slice_chips: int  # in the largest slice
    config_name: str = ""  # chip_config_name of `jax.experimental.topologies.get_topology_desc`, if required


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 1200e9, 275e12, 6 * 50e9, 6, 4096, config_name="megacore"),
        Chip("v5e", int(15.75 * GIB), 819e9, 197e12, 400e9 / 2, 4, 256),
        Chip("v5p", int(95.74 * GIB), 2765e9, 459e12, 1200e9 / 2, 6, 6144),
        Chip("v6e", int(31.25 * GIB), 1638e9, 918e12, 800e9 / 2, 4, 256),
        Chip("tpu7x", int(94.75 * GIB), 7380e9 / 2, 2307e12 / 2, 1200e9 / 2 / 2, 6, 9216),
    )
}


def parse_topology(name: str) -> tuple[Chip, int]:
    """Return the chip type and number of chips of a slice, such as v5e:8x8. Raises ValueError for unknown names."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"topology: got {name!r}, want one of {', '.join(CHIPS)} and a shape, such as v5e:8x8")
    chip, axes = CHIPS[kind], CHIPS[kind].links // 2
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise ValueError(f"topology: got {name!r}, want {axes} sizes for {kind}, such as {kind}:{'x'.join('4' * axes)}")
    chips = math.prod(map(int, shape.split("x")))
    if chips > chip.slice_chips:
        raise ValueError(f"topology: got {name!r}, {chips} chips, want at most {chip.slice_chips} for {kind}")
    return chip, chips
