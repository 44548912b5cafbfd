"""The table of chips against figures that JAX has for its kernels, and names of topologies."""

import pytest
from jax.experimental.pallas import tpu

from warp_jax.tpu_fit import chips

VERSIONS = {"v4": "TPU_V4", "v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_7X"}
DEVICES = {"v4": 1, "v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}  # JAX devices of a chip


@pytest.mark.parametrize("name", chips.CHIPS)
def test_figures_agree_with_those_of_jax(name):
    """Fails when a figure is of another chip, of half a chip, or a device of tpu7x has those of the whole chip."""
    chip = chips.CHIPS[name]
    version = tpu.ChipVersion[VERSIONS[name]]
    core = tpu.get_tpu_info_for_chip(version, 1)
    cores = version.num_physical_tensor_cores_per_chip / DEVICES[name]
    assert chip.bf16_flops == pytest.approx(cores * core.bf16_ops_per_second, rel=0.01)
    assert chip.hbm_bandwidth == pytest.approx(cores * core.mem_bw_bytes_per_second, rel=0.13)  # of v5p by 12 %


@pytest.mark.parametrize(("name", "gib"), [("v4", 32), ("v5e", 16), ("v5p", 96), ("v6e", 32), ("tpu7x", 192)])
def test_programs_get_most_of_the_memory_but_not_all(name, gib):
    """Fails when the limit is the capacity, is of another chip, or GB are taken for GiB."""
    chip = chips.CHIPS[name]
    assert 0.95 * gib * 2**30 < DEVICES[name] * chip.hbm_bytes < gib * 2**30


@pytest.mark.parametrize(
    ("name", "one_way"), [("v4", 50e9), ("v5e", 50e9), ("v5p", 100e9), ("v6e", 100e9), ("tpu7x", 100e9)]
)
def test_links_are_counted_one_way(name, one_way):
    """Fails when the bidirectional bandwidth is taken for what a chip sends, or links or devices are miscounted."""
    chip = chips.CHIPS[name]
    assert chip.links == {"v5e": 4, "v6e": 4}.get(name, 6)
    assert chip.ici_bandwidth * DEVICES[name] == one_way * chip.links


@pytest.mark.parametrize(
    ("topology", "name", "count"),
    [("v5e:8x16", "v5e", 128), ("v6e:1x1", "v6e", 1), ("v5p:4x4x12", "v5p", 192), ("tpu7x:2x2x1", "tpu7x", 4)],
)
def test_a_topology_is_a_chip_and_a_number_of_chips(topology, name, count):
    """Fails when sizes are added, or devices of tpu7x are counted instead of chips."""
    assert chips.parse_topology(topology) == (chips.CHIPS[name], count)


@pytest.mark.parametrize(
    ("topology", "want"),
    [
        ("v5litepod:4x4", "want one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e-16", "such as v5e:8x8"),
        ("", "such as v5e:8x8"),
        ("v5e", "want 2 sizes for v5e, such as v5e:4x4"),
        ("v5e:", "want 2 sizes"),
        ("v5e:4x", "want 2 sizes"),
        ("v5e:0x4", "want 2 sizes"),
        ("v5e:-4x-4", "want 2 sizes"),
        ("v5e:4x4\n", "want 2 sizes"),
        ("v5e:4x4x4", "want 2 sizes"),
        ("v5p:8x8", "want 3 sizes for v5p, such as v5p:4x4x4"),
        ("v5e:32x32", "1024 chips, want at most 256 for v5e"),
    ],
)
def test_other_names_are_refused_in_one_line(topology, want):
    """Fails when a typing error gives some chip or number, or a message says not what was got and wanted."""
    with pytest.raises(ValueError, match="topology: got ") as caught:
        chips.parse_topology(topology)
    assert want in str(caught.value)
    assert repr(topology) in str(caught.value)
    assert "\n" not in str(caught.value)
