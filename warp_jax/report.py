"""front.csv"""

import csv
from warp_jax import warp


def write_report(config, setup, points, workdir):
    rows = [warp.as_row(p) for p in points]
    for r in rows:
        r.pop("evaluation")
    with open(workdir / "front.csv", "w") as f:
        w = csv.DictWriter(f, rows[0].keys())
        w.writeheader()
        w.writerows(rows)
    return "done"
