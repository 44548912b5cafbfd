"""Reports on compiled programs: tables by hand, and the tables of docs/scaling.md against their figures."""

import importlib
import json
from pathlib import Path

import pytest

from tests.settings_of import settings_of
from warp_jax.experiment import architecture
from warp_jax.tpu_fit import chips, compile, hlo, memory, roofline, tables


def _config(**settings):
    return settings_of({"mesh": (2, 2, 2), **settings})


def _traffic(once=0.0, per_loop_step=0.0):
    return hlo.Collectives({"all-gather": hlo.Traffic(2, once)}, {"all-reduce": hlo.Traffic(3, per_loop_step)})


NO_MODEL = {"rewards.sentiment.weight": 0.0, "rewards.length.weight": 1.0}  # no reward model
HALF_GIB = chips.GIB // 2
FITS = compile.Compiled("generation", 1.5, HALF_GIB, HALF_GIB, 4 * HALF_GIB, 2 * HALF_GIB, _traffic(3e9, 2e6))
OVER = compile.Compiled("update", 61.0, HALF_GIB, 0, 5 * HALF_GIB, 2 * HALF_GIB, compile.NO_TRAFFIC)
REFUSED_BY_XLA = compile.Compiled("merge", 2.0, HALF_GIB, 0, 0, HALF_GIB, compile.NO_TRAFFIC, "Used 9.0G of 4.0G hbm")
CHIP = chips.CHIPS["v5e"]._replace(hbm_bytes=4 * chips.GIB)
FOUND = memory.Fit(
    (FITS, OVER, REFUSED_BY_XLA), {"policy": HALF_GIB, "frozen weights": 0, "SFT": chips.GIB}, 6 * HALF_GIB, 4
)


def test_table_by_hand():
    """Fails when a column is another figure, or the verdict hides a program."""
    sent = "3 GB (all-gather 3 GB in 2); 2 MB per token (all-reduce 2 MB in 3)"
    assert tables.table(FOUND, CHIP, 0.25).splitlines()[2:] == [
        f"| generation | 2 | 0.50 | 0.50 | 2.00 | 1.00 | 3.00 | 75 % | {sent} |",
        "| update | 61 | 0.50 | 0.00 | 2.50 | 1.00 | 3.50 | 88 % | nothing |",
        "| merge | 2 | 0.50 | - | - | 0.50 | - | TOO LARGE | nothing |",
        "",
        "In memory between programs, GiB per chip: policy 0.50, SFT 1.00; sum 1.50.",
        "A v5e chip has 4.00 GiB for programs; 25 % must stay free.",
        "",
        "merge alone is too large:",
        "  Used 9.0G of 4.0G hbm",
        "",
        "DOES NOT FIT: update, merge.",
    ]
    assert tables.table(FOUND._replace(programs=(FITS,)), CHIP, 0.25).endswith("All programs fit.")


def test_the_table_adds_the_limits():
    """Fails when the sum is of the last program alone, or of another resource than each program's limit."""
    chip = chips.CHIPS["v5e"]
    works = {
        "generation": roofline.Work(flops=chip.bf16_flops, hbm=3 * chip.hbm_bandwidth),
        "update": roofline.Work(flops=4 * chip.bf16_flops, hbm=chip.hbm_bandwidth),
    }
    assert tables.bounds_table(works, {"generation": 2 * chip.ici_bandwidth}, chip).splitlines()[2:] == [
        "| generation | 1e+03 | 3e+03 | 2e+03 | 3e+03 | memory |",
        "| update | 4e+03 | 1e+03 | 0 | 4e+03 | compute |",
        "| sum | | | | 7e+03 | |",
    ]


def test_advice_is_for_a_shell():
    """Fails when brackets are not quoted, which a shell would read as its own."""
    advice = tables.advice({"model.remat": "full", "mesh": (1, 4, 16)})
    assert advice == "It fits with --config.model.remat=full '--config.mesh=(1,4,16)'"
    assert "No nearby setting" in tables.advice(None)


def test_network_traffic_of_a_token_counts_for_every_token():
    """Fails when the loop's traffic counts once: 3 GB + 6 tokens x 2 MB over 200 GB/s."""
    table = tables.step_table(_config(**NO_MODEL), FOUND, CHIP)
    generation, update = [line.split(" | ") for line in table.splitlines()[2:4]]
    assert (generation[0], generation[3]) == ("| generation", f"{1000 * (3e9 + 6 * 2e6) / 200e9:.3g}")
    assert (update[0], update[3]) == ("| update", "0")
    assert "reward" not in table
    assert "reward" in tables.step_table(_config(), FOUND, CHIP)


def test_settings_of_the_config_reach_the_bound():
    """Fails when the architecture is of another config, or a program has the work of another one."""
    model = {"model.remat": "full", "model.logits_chunk": 4}
    config = _config(mesh=(4, 1, 2), **{"rl.batch_size": 16, **model, **NO_MODEL})
    policy, _ = architecture.planned(config)
    assert policy.remat == "full"
    works = {"generation": roofline.generation(policy, config), "update": roofline.update(policy, config)}
    want = tables.bounds_table(works, {"generation": 3e9 + 6 * 2e6}, CHIP)
    assert tables.step_table(config, FOUND, CHIP) == want


def test_the_largest_buffers_are_named():
    """Fails when the lines of XLA's error that help are not found."""
    error = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.
    Used 24.14G of 15.75G hbm. Exceeded hbm capacity by 8.39G.
    Largest program allocations in hbm:
      1. Size: 4.00G
         Operator: op_name="jit(update)/mul"
         Shape: f32[4096,512]
      2. Size: 1.00G
         Shape: f32[4096]
         Unpadded size: 1.00G"""
    assert tables.biggest_buffers(error) == [
        "Used 24.14G of 15.75G hbm. Exceeded hbm capacity by 8.39G.",
        'Size: 4.00G, "jit(update)/mul", f32[4096,512]',
        "Size: 1.00G, f32[4096], Unpadded size: 1.00G",
    ]


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("path", sorted((DOCS / "scaling").glob("*.json")), ids=lambda path: path.stem)
def test_tables_of_the_docs_are_those_of_their_figures(path):
    """Fails when docs/scaling.md is not what the code makes of docs/scaling/*.json: paste what is missing."""
    text, figures = (DOCS / "scaling.md").read_text(), json.loads(path.read_text())
    found, chip = _fit_of(figures), chips.CHIPS[figures["chip"]]
    name, _, slice_ = path.stem.rpartition("_v")
    config = settings_of({"mesh": figures["mesh"]}, importlib.import_module(f"configs.{name}"))
    assert tables.table(found, chip, 0.1) in text
    table = tables.step_table(config, found, chip)
    step = f"{name} on v{slice_.replace('_', ':')}:\n\n{table}"
    assert f"\n{step}\n\n" in text, step
    assert tables.as_json(found, chip).items() <= figures.items()


def _fit_of(figures):
    """The inverse of `tables.as_json`."""
    programs = []
    for figure in figures["programs"]:
        shares = [
            {kind: hlo.Traffic(**t) for kind, t in figure["traffic"][share].items()}
            for share in ("once", "per_loop_step")
        ]
        values = {name: figure[name] for name in compile.Compiled._fields}
        programs.append(compile.Compiled(**{**values, "traffic": hlo.Collectives(*shares)}))
    return memory.Fit(tuple(programs), figures["resident"], figures["limit_bytes"], figures["chips"])
