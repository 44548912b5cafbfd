"""Write a JobSet for GKE: for each iteration one TPU job for each run, and one that merges them.

  python scripts/launch/jobset.py --config=configs/gemma_7b.py --workdir=/warp/runs/gemma_7b --claim=warp
      --accelerator=v5p --topology=4x4x4 --image=REGISTRY/warp_jax:TAG --name=gemma-7b --out=gemma.yaml
  kubectl apply -f gemma.yaml

The image holds the project in its working directory, with `jax[tpu]`. The claim is a PersistentVolumeClaim that all
pods can write (ReadWriteMany, such as Filestore), mounted at --mount, where the workdir lies. --config.x.y=value is
handed on. The cluster has JobSet 0.9 or newer, and a node pool of this topology for each run; the merge takes one of
them.

- A run is a replicatedJob of its own, with one replica: GKE joins the replicas of one replicatedJob to one JAX program
  on several slices. groupName and the MEGASCALE variables say one slice too, with the values that a public log of a
  job on one slice of GKE shows.
- dependsOn orders them: the merge waits until all runs of its iteration are Complete (at most 5, JobSet's limit), the
  runs of the next iteration until the merge is.
- A pod starts again and goes on where it stopped: always after an eviction or preemption, and when it lost the other
  pods of its job (exit code 75); after other failures up to --restarts times for each host of its job. Bad input (exit
  code 2) fails the job at once. With the first failed job the JobSet has failed, since it has no failurePolicy of its
  own, and nothing of it starts again; delete and apply it to go on.

Not run on a real cluster: checked against the schemas of JobSet 0.9.1 and 0.13 and the rules of its webhook.
"""

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_flags

from warp_jax import cli, files
from warp_jax.tpu_fit import chips

ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}  # GKE's names
CHIPS_PER_HOST = 4  # ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t; 1x1 is a machine of one chip, ...-1t
MAX_DEPENDENCIES = 5
POD_NAME = 63  # characters
CONTAINER = "warp"

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, in the image too.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder on the claim, below --mount.")
ACCELERATOR = flags.DEFINE_enum("accelerator", None, list(ACCELERATORS), "TPU of each job.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips of each job's slice, such as 4x4 (v5e, v6e) or 4x4x4 (v5p).")
IMAGE = flags.DEFINE_string("image", None, "Container image.")
CLAIM = flags.DEFINE_string("claim", None, "PersistentVolumeClaim for the workdir.")
MOUNT = flags.DEFINE_string("mount", "/warp", "Where the claim is mounted.")
NAME = flags.DEFINE_string("name", None, "Of the JobSet: lower-case letters, digits and -.")
RESTARTS = flags.DEFINE_integer("restarts", 20, "Failures of a job before it is given up, times its hosts.", 0)
SPOT = flags.DEFINE_bool("spot", False, "On spot nodes.")
OUT = flags.DEFINE_string("out", "", "File for the manifest; default: stdout.")


class Slice(NamedTuple):
    """What one job runs on."""

    accelerator: str
    topology: str
    chips_per_host: int
    hosts: int


def find_slice(accelerator: str, topology: str) -> Slice:
    """The slice of a TPU and topology, as GKE names them: hosts of 2x2 chips side by side, the smallest size first."""
    _, count = chips.parse_topology(f"{accelerator}:{topology}")
    sizes = [int(size) for size in topology.split("x")]
    if topology not in ("1x1", "2x2x1") and (sizes != sorted(sizes) or any(size % 2 for size in sizes)):
        raise ValueError(f"--topology: got {topology}, want even sizes, the smallest first (or 1x1, or 2x2x1)")
    chips_per_host = min(count, CHIPS_PER_HOST)
    return Slice(ACCELERATORS[accelerator], topology, chips_per_host, count // chips_per_host)


def check_flags(num_iterations: int, num_runs: int, hosts: int) -> None:
    """Raise ValueError at the first value that Kubernetes or JobSet would refuse."""
    longest = f"{NAME.value}-{merge_name(num_iterations)}-0-{hosts - 1}-abcde"
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", NAME.value) or len(longest) > POD_NAME:
        most = POD_NAME - len(longest) + len(NAME.value)
        raise ValueError(f"--name: got {NAME.value!r}, want at most {most} lower-case letters, digits and -")
    if num_runs > MAX_DEPENDENCIES:
        raise ValueError(f"config.warp.num_runs: got {num_runs}, want at most {MAX_DEPENDENCIES}, JobSet's limit")
    if not MOUNT.value.startswith("/") or Path(MOUNT.value) not in Path(WORKDIR.value).parents:
        raise ValueError(f"--workdir: got {WORKDIR.value}, want a folder below --mount={MOUNT.value}")


def config_arguments(argv: Sequence[str]) -> list[str]:
    """--config and its overrides, as they were written."""
    apart = [argument for argument in argv if re.fullmatch(r"--?(no)?config(\.[^=]+)?", argument)]
    if apart:
        raise ValueError(f"got {apart[0]}, want {apart[0]}=value in one word")
    return [argument for argument in argv if re.match(r"--?config[.=]", argument)]


def make_jobset(arguments: list[str], num_iterations: int, num_runs: int, tpu: Slice) -> dict[str, Any]:
    """The manifest; arguments: of warp_jax.main, for all jobs."""
    jobs: list[dict[str, Any]] = []
    before: list[str] = []
    for i in range(1, num_iterations + 1):
        runs = [f"i{i}-run{m}" for m in range(1, num_runs + 1)]
        for m, name in enumerate(runs, 1):
            jobs.append(make_job(name, [*arguments, f"--run={m}", f"--iteration={i}"], before, tpu))
        jobs.append(make_job(merge_name(i), [*arguments, "--merge", f"--iteration={i}"], runs, tpu))
        before = [merge_name(i)]
    metadata: dict[str, Any] = {"name": NAME.value}
    if tpu.hosts > 1:  # the pods of a job belong on one slice
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"replicatedJobs": jobs},
    }


def merge_name(iteration: int) -> str:
    """Of a replicatedJob."""
    return f"i{iteration}-merge"


def make_job(name: str, arguments: list[str], after: Sequence[str], tpu: Slice) -> dict[str, Any]:
    """A replicatedJob that runs main on one slice, once the jobs `after` are done."""
    spec = {
        "completionMode": "Indexed",
        "completions": tpu.hosts,
        "parallelism": tpu.hosts,
        "backoffLimit": RESTARTS.value * tpu.hosts,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": failure_rules()},
        "template": {"spec": make_pod(name, arguments, tpu)},
    }
    depends_on = {"dependsOn": [{"name": other, "status": "Complete"} for other in after]} if after else {}
    return {"name": name, "groupName": name, "replicas": 1, **depends_on, "template": {"spec": spec}}


def failure_rules() -> list[dict[str, Any]]:
    """What a failed pod means, the first rule that fits; without one it counts towards backoffLimit.

    One lost pod ends all others of its job with TRY_AGAIN: of these failures, only its own may count.
    """

    def on_exit(action: str, code: int) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}

    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return [on_exit("FailJob", cli.BAD_INPUT), on_exit("Ignore", cli.TRY_AGAIN), evicted]


def make_pod(name: str, arguments: list[str], tpu: Slice) -> dict[str, Any]:
    """One host of a job."""
    environment = {"JAX_PLATFORMS": "tpu,cpu"}  # without a TPU an error, not a run on the CPU
    if tpu.hosts > 1:
        arguments = [*arguments, "--multihost"]
        coordinator = f"{NAME.value}-{name}-0-0.{NAME.value}"
        environment |= {"MEGASCALE_COORDINATOR_ADDRESS": coordinator}
        environment |= {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    nodes = {"cloud.google.com/gke-tpu-accelerator": tpu.accelerator, "cloud.google.com/gke-tpu-topology": tpu.topology}
    container = {
        "name": CONTAINER,
        "image": IMAGE.value,
        "command": ["python", "-m", "warp_jax.main", *arguments],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {kind: {"google.com/tpu": tpu.chips_per_host} for kind in ("requests", "limits")},
        "volumeMounts": [{"name": "work", "mountPath": MOUNT.value}],
    }
    return {
        "restartPolicy": "Never",  # the job makes a new pod, which a podFailurePolicy asks for
        "nodeSelector": nodes | ({"cloud.google.com/gke-spot": "true"} if SPOT.value else {}),
        "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": CLAIM.value}}],
    }


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    warp = CONFIG.value.warp
    try:
        tpu = find_slice(ACCELERATOR.value, TOPOLOGY.value)
        check_flags(warp.num_iterations, warp.num_runs, tpu.hosts)
        arguments = [*config_arguments(sys.argv[1:]), f"--workdir={WORKDIR.value}"]
        manifest = json.dumps(make_jobset(arguments, warp.num_iterations, warp.num_runs, tpu), indent=2)  # is YAML
        if OUT.value:
            files.write_text(Path(OUT.value), f"{manifest}\n")
    except (ValueError, OSError) as error:
        cli.fail(str(error))
    print(f"{OUT.value}: {warp.num_iterations} x ({warp.num_runs} runs and a merge)" if OUT.value else manifest)


if __name__ == "__main__":
    sys.path.insert(0, "")  # configs import one another from this folder, as under python -m warp_jax.main
    parse_flags = functools.partial(
        cli.parse_flags,
        required=("config", "workdir", "accelerator", "topology", "image", "claim", "name"),
        example="the command in --help",
        load=lambda: CONFIG.value is None or CONFIG.value.warp,
    )
    app.run(main, flags_parser=parse_flags)
