"""Write a JobSet manifest for GKE: in each iteration, one TPU job per run, and one job that merges the runs.

  python scripts/launch/jobset.py --config=configs/gemma_7b.py --workdir=/warp/runs/gemma_7b --claim=warp
      --accelerator=v5p --topology=4x4x4 --image=REGISTRY/warp_jax:TAG --name=gemma-7b --out=gemma.yaml
  kubectl apply -f gemma.yaml

Requirements: an image with this project in its working directory and `jax[tpu]` installed; a PersistentVolumeClaim
that all pods can write (ReadWriteMany, such as Filestore), which is mounted at --mount and holds the workdir; JobSet
0.9 or newer; one node pool of the topology per run. An override --config.x.y=value is passed to all jobs.

- Every run is a separate replicatedJob with one replica, because GKE joins all replicas of one replicatedJob into one
  multi-slice JAX program. groupName and the MEGASCALE variables also describe one slice.
- The merge starts when all runs of its iteration are complete (dependsOn; JobSet allows at most 5), and the runs of the
  next iteration start after the merge.
- A pod restarts and resumes after an eviction, a preemption or the loss of another pod of its job (exit code 75), and
  after other failures up to --restarts times per host of the job. Bad input (exit code 2) and a function of yours that
  failed (70) fail the job at once. When one job has failed, the whole JobSet has failed and does not restart: delete it
  and apply it again to resume.

Not tested on a real cluster: checked against the schemas of JobSet 0.9.1 and 0.13 and the rules of its webhook.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from warp_jax import cli, exit_codes, files
from warp_jax.tpu_fit import chips

ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}  # GKE's names
CHIPS_PER_HOST = 4  # ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t; topology 1x1 has one chip, ...-1t
MAX_DEPENDENCIES = 5
POD_NAME = 63  # characters
CONTAINER = "warp"

CONFIG = cli.define_config("config", "Config file; the image must hold it at the same path.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the runs, a folder below --mount.")
ACCELERATOR = flags.DEFINE_enum("accelerator", None, list(ACCELERATORS), "TPU generation.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips of a job's slice, such as 4x4 (v5e, v6e) or 4x4x4 (v5p).")
IMAGE = flags.DEFINE_string("image", None, "Container image with this project.")
CLAIM = flags.DEFINE_string("claim", None, "Name of the PersistentVolumeClaim that holds the workdir.")
MOUNT = flags.DEFINE_string("mount", "/warp", "Folder at which the pods mount the claim.")
NAME = flags.DEFINE_string("name", None, "Name of the JobSet: lower-case letters, digits and -.")
RESTARTS = flags.DEFINE_integer("restarts", 20, "Restarts of a job after failures, per host, before it fails.", 0)
SPOT = flags.DEFINE_bool("spot", False, "Use spot nodes.")
ACCEPT = flags.DEFINE_string(
    "accept", "", "Inputs that may have changed since the workdir was made: see warp_jax.main."
)
OUT = flags.DEFINE_string("out", "", "File to write with the manifest; default: stdout.")


def count_hosts(accelerator: str, topology: str) -> int:
    """Number of hosts of a TPU slice, of 2x2 chips each. Raises ValueError if GKE has no such slice."""
    _, count = chips.parse_topology(f"{accelerator}:{topology}")
    sizes = [int(size) for size in topology.split("x")]
    if topology not in ("1x1", "2x2x1") and (sizes != sorted(sizes) or any(size % 2 for size in sizes)):
        raise ValueError(f"--topology: got {topology}, want even sizes, the smallest first, or 1x1 or 2x2x1")
    return max(count // CHIPS_PER_HOST, 1)


def check_flags(num_iterations: int, num_runs: int, hosts: int) -> None:
    """Raise ValueError if Kubernetes or JobSet would reject a value."""
    longest = f"{NAME.value}-i{num_iterations}-merge-0-{hosts - 1}-abcde"
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", NAME.value) or len(longest) > POD_NAME:
        most = POD_NAME - len(longest) + len(NAME.value)
        raise ValueError(f"--name: got {NAME.value!r}, want at most {most} lower-case letters, digits and -")
    if num_runs > MAX_DEPENDENCIES:
        raise ValueError(f"config.warp.num_runs: got {num_runs}, want at most {MAX_DEPENDENCIES}, the limit of JobSet")
    if not MOUNT.value.startswith("/") or Path(MOUNT.value) not in Path(WORKDIR.value).parents:
        raise ValueError(f"--workdir: got {WORKDIR.value}, want a folder below --mount={MOUNT.value}")


def config_arguments(argv: Sequence[str]) -> list[str]:
    """Select --config and its overrides from the command line, unchanged."""
    split = [argument for argument in argv if re.fullmatch(r"--?(no)?config(\.[^=]+)?", argument)]
    if split:
        raise ValueError(f"got {split[0]}, want {split[0]}=value in one word")
    return [argument for argument in argv if re.match(r"--?config[.=]", argument)]


def make_jobset(arguments: list[str], num_iterations: int, num_runs: int, hosts: int) -> dict[str, Any]:
    """Make the manifest; `arguments` of warp_jax.main are common to all jobs."""
    jobs: list[dict[str, Any]] = []
    before: list[str] = []
    for i in range(1, num_iterations + 1):
        runs, merge = [f"i{i}-run{m}" for m in range(1, num_runs + 1)], f"i{i}-merge"
        for m, name in enumerate(runs, 1):
            jobs.append(make_job(name, [*arguments, f"--run={m}", f"--iteration={i}"], before, hosts))
        jobs.append(make_job(merge, [*arguments, "--merge", f"--iteration={i}"], runs, hosts))
        before = [merge]
    metadata: dict[str, Any] = {"name": NAME.value}
    if hosts > 1:  # place all pods of a job on one slice
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"replicatedJobs": jobs},
    }


def make_job(name: str, arguments: list[str], after: Sequence[str], hosts: int) -> dict[str, Any]:
    """Make a replicatedJob that runs warp_jax.main on one slice after the jobs in `after`."""
    spec = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": RESTARTS.value * hosts,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": failure_rules()},
        "template": {"spec": make_pod(name, arguments, hosts)},
    }
    depends_on = {"dependsOn": [{"name": other, "status": "Complete"} for other in after]} if after else {}
    return {"name": name, "groupName": name, "replicas": 1, **depends_on, "template": {"spec": spec}}


def failure_rules() -> list[dict[str, Any]]:
    """Rules for a failed pod; the first match applies, and without a match the failure counts towards backoffLimit.

    If one pod of a job is lost, all others exit with TRY_AGAIN; only the failure of the lost pod counts.
    """
    on_exit = [
        {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes}}
        for action, codes in (("FailJob", [cli.BAD_INPUT, exit_codes.USER_FUNCTION]), ("Ignore", [cli.TRY_AGAIN]))
    ]
    return [*on_exit, {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]


def make_pod(name: str, arguments: list[str], hosts: int) -> dict[str, Any]:
    """Make the pod of one host of a job."""
    environment = {"JAX_PLATFORMS": "tpu,cpu"}  # fail without a TPU, instead of running on the CPU
    if hosts > 1:
        arguments = [*arguments, "--multihost"]
        environment["MEGASCALE_COORDINATOR_ADDRESS"] = f"{NAME.value}-{name}-0-0.{NAME.value}"
        environment |= {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    chips_per_host = 1 if TOPOLOGY.value == "1x1" else CHIPS_PER_HOST
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[ACCELERATOR.value],
        "cloud.google.com/gke-tpu-topology": TOPOLOGY.value,
    }
    container = {
        "name": CONTAINER,
        "image": IMAGE.value,
        "command": ["python", "-m", "warp_jax.main", *arguments],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {kind: {"google.com/tpu": chips_per_host} for kind in ("requests", "limits")},
        "volumeMounts": [{"name": "work", "mountPath": MOUNT.value}],
    }
    return {
        "restartPolicy": "Never",  # required by podFailurePolicy; the job makes a new pod
        "nodeSelector": nodes | ({"cloud.google.com/gke-spot": "true"} if SPOT.value else {}),
        "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": CLAIM.value}}],
    }


def main(argv: list[str]) -> None:
    """Write the manifest to --out or stdout."""
    del argv
    warp = CONFIG.value.warp
    try:
        hosts = count_hosts(ACCELERATOR.value, TOPOLOGY.value)
        check_flags(warp.num_iterations, warp.num_runs, hosts)
        accept = [f"--accept={ACCEPT.value}"] if ACCEPT.value else []
        arguments = [*config_arguments(sys.argv[1:]), f"--workdir={WORKDIR.value}", *accept]
        manifest = json.dumps(make_jobset(arguments, warp.num_iterations, warp.num_runs, hosts), indent=2)  # also YAML
        if OUT.value:
            files.write_text(Path(OUT.value), f"{manifest}\n")
    except (ValueError, OSError) as error:
        cli.fail(error)
    print(f"{OUT.value}: {warp.num_iterations} x ({warp.num_runs} runs and a merge)" if OUT.value else manifest)


if __name__ == "__main__":
    sys.path.insert(0, "")  # configs import other configs from this folder, as with python -m warp_jax.main
    cli.run(
        main,
        required=("config", "workdir", "accelerator", "topology", "image", "claim", "name"),
        example="the command in --help",
        load=lambda: CONFIG.value is None or CONFIG.value.warp,
    )
