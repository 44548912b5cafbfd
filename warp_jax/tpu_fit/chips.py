"""TPU chips: memory, peaks and links; and the names of slices of them.

Figures are of what JAX calls a device: a chip, or on tpu7x one of its two halves. Where they come from:
- hbm_bytes: libtpu 0.0.42.1, whose out-of-memory errors for 2x2 or 2x2x1 chips name the limit ("exceeds available HBM
  (15.75G)"). A chip has a little more, which the system keeps.
- v5e, v5p, v6e, tpu7x: https://docs.cloud.google.com/tpu/docs/v5e and so on. Versions of the page of v5e differ on its
  memory, 819 GB/s or 800 GiB/s; here the lower.
- v4: https://docs.cloud.google.com/tpu/docs/v4; its links: https://arxiv.org/abs/2304.01433, table 4.
"""

import math
import re
from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
    """Of one JAX device; the peaks are the published ones, of which programs reach a part.

    hbm_bytes: memory for programs. hbm_bandwidth: bytes/s. bf16_flops: FLOP/s in products of matrices.
    ici_bandwidth: bytes/s sent over all links at once, one way: half of the pages' bidirectional bandwidth per chip. A
    collective along one axis of the torus has two links of these, and one where that axis is no ring.
    links: of a chip to neighbours, two for each axis of a slice. slice_chips: chips of the largest slice.
    config_name: chip_config_name for `jax.experimental.topologies.get_topology_desc`, if it needs one to give the
    devices that JAX has on the hardware.
    """

    name: str
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    ici_bandwidth: float
    links: int
    slice_chips: int
    config_name: str = ""


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
    """The chip and the number of chips of a slice such as v5e:8x8 or v5p:4x4x4. Raises ValueError for other names."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"topology: got {name!r}, want one of {', '.join(CHIPS)} and a shape, such as v5e:8x8")
    chip, axes = CHIPS[kind], CHIPS[kind].links // 2
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise ValueError(f"topology: got {name!r}, want {axes} sizes for {kind}, such as {kind}:{'x'.join('4' * axes)}")
    chips = math.prod(map(int, shape.split("x")))
    if chips > chip.slice_chips:
        raise ValueError(f"topology: got {name!r}, {chips} chips, want a slice of {kind}: {chip.slice_chips} at most")
    return chip, chips
