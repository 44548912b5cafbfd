"""scripts/launch: what would be sent to GKE, Cloud TPU and Slurm, with stand-ins for their programs."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.commands import ENV, ROOT, finish, run, script_command, start
from warp_jax import cli

LAUNCH = ROOT / "scripts" / "launch"
CONFIG = "--config=configs/quickstart.py"  # two iterations of two runs


def _is_bad_input(done, message):
    assert (done.returncode, done.stdout) == (cli.BAD_INPUT, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def _programs(folder, **bodies):
    """PATH with these shell scripts first; each notes its call, and `next FILE` takes the first line off a file."""
    head = f"""#!/usr/bin/env bash
cd {folder}
next() {{ head -n 1 $1; sed -i 1d $1; }}
"""
    for name, body in bodies.items():
        note = f"printf '%s\\x1f' {name} \"$@\" >>calls; printf '\\x1e' >>calls"
        (folder / name).write_text(f"{head}{note}\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _calls(folder):
    """The noted calls, as lists of words."""
    path = folder / "calls"
    return [call.split("\x1f")[:-1] for call in path.read_text().split("\x1e")[:-1]] if path.exists() else []


# GKE


def _jobset(*arguments):
    common = [CONFIG, "--workdir=/warp/runs/x", "--image=example/warp:1", "--claim=work", "--name=job"]
    return run(script_command("launch/jobset.py", *common, *arguments))


@pytest.fixture(scope="module")
def jobset(tmp_path_factory):
    out = tmp_path_factory.mktemp("jobset") / "jobset.yaml"
    values = ["--config.warp.num_runs=3", "--config.front.etas=(0.1, 1.0)", "--accept=device"]
    done = _jobset("--accelerator=v5p", "--topology=4x4x8", *values, "--restarts=7", "--spot", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    return yaml.safe_load(out.read_text())


def test_jobs_of_a_jobset_and_their_order(jobset):
    """Fails when a run or merge is missing, waits for too few, or two jobs could be joined to one JAX program."""
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"replicatedJobs"}
    jobs = jobset["spec"]["replicatedJobs"]
    waits = {job["name"]: job.get("dependsOn") for job in jobs}
    runs = [[f"i{i}-run{m}" for m in (1, 2, 3)] for i in (1, 2)]
    assert list(waits) == [*runs[0], "i1-merge", *runs[1], "i2-merge"]
    for name in runs[0]:
        assert waits[name] is None
    for name in runs[1]:
        assert waits[name] == [{"name": "i1-merge", "status": "Complete"}]
    for i in (1, 2):
        assert waits[f"i{i}-merge"] == [{"name": name, "status": "Complete"} for name in runs[i - 1]]
    assert [job["groupName"] for job in jobs] == list(waits)
    assert {job["replicas"] for job in jobs} == {1}


def test_commands_of_a_jobset(jobset):
    """Fails when a job has another run or iteration, an override is lost, or --multihost is."""
    pods = {j["name"]: j["template"]["spec"]["template"]["spec"] for j in jobset["spec"]["replicatedJobs"]}
    head = ["python", "-m", "warp_jax.main", CONFIG, "--config.warp.num_runs=3", "--config.front.etas=(0.1, 1.0)"]
    for name, what in {
        "i1-run1": "--run=1",
        "i2-run3": "--run=3",
        "i1-merge": "--merge",
        "i2-merge": "--merge",
    }.items():
        (container,) = pods[name]["containers"]
        tail = [what, f"--iteration={name[1]}", "--multihost"]
        assert container["command"] == [*head, "--workdir=/warp/runs/x", "--accept=device", *tail]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment == {
            "JAX_PLATFORMS": "tpu,cpu",
            "MEGASCALE_COORDINATOR_ADDRESS": f"job-{name}-0-0.job",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
        }


def test_pods_of_a_jobset(jobset):
    """Fails when a pod lacks its TPU or volume, bad input is tried again, or what is no failure counts as one."""
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobset["metadata"] == {"name": "job", "annotations": {key: "cloud.google.com/gke-nodepool"}}
    for job in jobset["spec"]["replicatedJobs"]:
        spec = dict(job["template"]["spec"])
        pod = spec.pop("template")["spec"]
        policy = spec.pop("podFailurePolicy")
        assert spec == {
            "completionMode": "Indexed",
            "completions": 32,
            "parallelism": 32,
            "backoffLimit": 7 * 32,
            "podReplacementPolicy": "Failed",
        }
        assert pod["restartPolicy"] == "Never"
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
            "cloud.google.com/gke-tpu-topology": "4x4x8",
            "cloud.google.com/gke-spot": "true",
        }
        assert pod["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "work"}}]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": "work", "mountPath": "/warp"}]
        assert container["resources"] == {kind: {"google.com/tpu": 4} for kind in ("requests", "limits")}
        assert container["image"] == "example/warp:1"
        assert policy == {"rules": _failure_rules(container["name"])}


def _failure_rules(container):
    """Bad input fails the job; a lost peer and an eviction do not count."""
    exits = [{"containerName": container, "operator": "In", "values": codes} for codes in ([2, 70], [75])]
    return [
        {"action": "FailJob", "onExitCodes": exits[0]},
        {"action": "Ignore", "onExitCodes": exits[1]},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


@pytest.mark.parametrize(
    ("accelerator", "topology", "name", "chips", "hosts"),
    [
        ("v5e", "2x2", "tpu-v5-lite-podslice", 4, 1),
        ("v6e", "1x1", "tpu-v6e-slice", 1, 1),
        ("v5e", "8x16", "tpu-v5-lite-podslice", 4, 32),
        ("v5p", "2x2x1", "tpu-v5p-slice", 4, 1),
        ("v5p", "4x4x12", "tpu-v5p-slice", 4, 48),
        ("v5p", "16x16x24", "tpu-v5p-slice", 4, 1536),
    ],
)
def test_slices(accelerator, topology, name, chips, hosts):
    """Fails when a TPU has another name, a host another number of chips, or a job of one host is made for several."""
    done = _jobset(f"--accelerator={accelerator}", f"--topology={topology}")
    manifest = yaml.safe_load(done.stdout)
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector == {
        "cloud.google.com/gke-tpu-accelerator": name,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert (spec["completions"], spec["parallelism"]) == (hosts, hosts)
    several = [hosts > 1] * 3
    assert [
        "--multihost" in container["command"],
        len(container["env"]) == 4,
        "annotations" in manifest["metadata"],
    ] == several


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=4x4x4"], "topology: got 'v6e:4x4x4', want 2 sizes for v6e"),
        (["--topology=4x2"], "--topology: got 4x2, want even sizes, the smallest first"),
        (["--topology=1x4"], "--topology: got 1x4, want even sizes, the smallest first"),
        (["--config.warp.num_runs=6"], "at most 5"),
        (["--config.warp.num_runs", "2"], "--config.warp.num_runs=value in one word"),
        (["--config.warp.num_run=2"], "num_runs"),
        (["--mount=/other"], "want a folder below --mount=/other"),
        (["--name=Job"], "at most 44 lower-case"),
        (["--name=" + "j" * 45], "at most 44 lower-case"),
        (["--claim="], "--claim is missing"),
    ],
)
def test_bad_input_of_jobset(arguments, message):
    """Fails when a manifest that Kubernetes or JobSet refuses is written, or the answer is a traceback."""
    _is_bad_input(_jobset("--accelerator=v6e", "--topology=4x4", *arguments), message)


# Cloud TPU

TPU = {
    "SLICE": "warp",
    "PROJECT": "my-project",
    "ZONE": "us-central1-a",
    "ACCELERATOR_TYPE": "v5p-32",
    "RUNTIME_VERSION": "v2-alpha-tpuv5",
    "REPO": "https://example.com/warp_jax.git",
    "POLL": "0",
}
AT = ["--project=my-project", "--zone=us-central1-a"]
CREATE = ["create", "warp", "--node-id=warp", "--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5"]
GCLOUD = """case "$*" in *describe*) describe $(next states) ;; *ssh*) exit $(next codes) ;; esac"""
DESCRIBE = """describe() {
case $1 in
ABSENT) echo 'ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found.' >&2; exit 1 ;;
OFFLINE) echo 'ERROR: gcloud crashed (ConnectionError): no network' >&2; exit 1 ;;
*) echo "$1" ;;
esac
}
"""
JOB = [CONFIG, "--workdir=/mnt/warp/x", "--config.data.prompt_template=it's $HOME"]


def _cloud_tpu(folder, *arguments, states="", codes="", **environment):
    """Run with a gcloud that tells these states, and these exit codes of commands on the hosts."""
    (folder / "states").write_text(states.replace(" ", "\n"))
    (folder / "codes").write_text(codes.replace(" ", "\n"))
    programs = _programs(folder, gcloud=DESCRIBE + GCLOUD)
    return run([LAUNCH / "cloud_tpu.sh", *arguments], **TPU, **programs, **environment)


def _verbs(folder):
    return " ".join(call[4] for call in _calls(folder) if call[4] != "describe")


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_scripts_are_bash_and_have_a_usage(script):
    """Fails when a script does not parse, or --help asks for variables first."""
    assert run(["bash", "-n", LAUNCH / script]).returncode == 0
    done = run([LAUNCH / script, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/launch/{script} [--dry_run]" in done.stdout


def test_dry_run_of_cloud_tpu(tmp_path):
    """Fails when a flag of gcloud is lost or renamed, or a dry run calls gcloud."""
    extra = {"NFS": "10.0.0.2:/share", "SPOT": "1", "CREATE_FLAGS": "--internal-ips  --network=n", "REF": "v1"}
    done = _cloud_tpu(tmp_path, "--dry_run", "run", *JOB, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    assert _calls(tmp_path) == []
    run(["bash", "-c", done.stdout], **_programs(tmp_path, gcloud=""))
    create, ssh = (words[4:] for words in _calls(tmp_path))
    assert create == [*CREATE, "--spot", "--internal-ips", "--network=n", *AT]
    assert [ssh[:3], ssh[4:]] == [["ssh", "warp", "--worker=all"], AT]
    assert run(["bash", "-n", "-c", ssh[3].removeprefix("--command=")]).returncode == 0
    for command in (
        "sudo mount -t nfs 10.0.0.2:/share /mnt/warp",
        "git clone --quiet https://example.com/warp_jax.git warp_jax",
        "git fetch --quiet origin v1",
        'uv pip install --quiet -e "." "jax[tpu]" --constraint pinned',
    ):
        assert command in ssh[3]


def test_a_bucket_needs_its_client_on_the_hosts(tmp_path):
    """Fails when main ends on every host because gcsfs is missing."""
    done = _cloud_tpu(tmp_path, "--dry_run", "run", CONFIG, "--workdir=gs://bucket/x")
    assert (done.returncode, done.stderr) == (0, "")
    run(["bash", "-c", done.stdout], **_programs(tmp_path, gcloud=""))
    assert 'uv pip install --quiet -e ".[gcs]" "jax[tpu]"' in _calls(tmp_path)[-1][7]


def test_dry_run_of_deleting(tmp_path):
    """Fails when it deletes, or the name of the slice is lost."""
    done = _cloud_tpu(tmp_path, "delete", DRY_RUN="1")
    assert done.stdout == f"gcloud compute tpus queued-resources delete warp --force --quiet {' '.join(AT)}\n"
    assert _calls(tmp_path) == []


def _host(folder, main):
    """A host on which main is this script: the command that it would get, and its environment."""
    assert _cloud_tpu(folder, "run", *JOB, states="ACTIVE", codes="0").returncode == 0
    command = _calls(folder)[-1][7].removeprefix("--command=")
    (folder / "warp_jax" / ".git").mkdir(parents=True)
    (folder / "warp_jax" / ".venv" / "bin").mkdir(parents=True)
    _programs(folder / "warp_jax" / ".venv" / "bin", python=main)
    return f"cd {folder}; {command}", _programs(folder, git="", uv="") | {"HOME": str(folder)}


def _starts_of_main(folder):
    return _calls(folder / "warp_jax" / ".venv" / "bin")


def test_the_command_on_the_hosts(tmp_path):
    """Fails when the shell of a host changes an argument, --multihost or main's exit code is lost, or it runs twice."""
    command, environment = _host(tmp_path, main="echo $JAX_PLATFORMS; exit 75")
    done = run(["bash", "-c", command], **environment)
    assert (done.returncode, done.stdout) == (75, "tpu,cpu\n")
    again = run(["bash", "-c", command], **environment)  # gcloud after a lost connection
    assert (again.returncode, again.stdout) == (75, "")
    assert _starts_of_main(tmp_path) == [["python", "-m", "warp_jax.main", *JOB, "--multihost"]]


@pytest.mark.parametrize(("commit", "checked_out"), [("1f" * 20, "1f" * 20), ("1f" * 20 + "+", "FETCH_HEAD")])
def test_a_later_start_installs_what_the_first_did(tmp_path, commit, checked_out):
    """Fails when a moved branch or a newer package changes a workdir, or changes that were not committed count."""
    command, environment = _host(tmp_path, main="")
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# warp_jax==0.1.0 commit {commit}\njax==0.10.2\n")
    assert (
        run(["bash", "-c", command.replace("/mnt/warp/x/requirements.lock", str(lock))], **environment).returncode == 0
    )
    calls = [call for call in _calls(tmp_path) if call[0] in ("git", "uv")]
    assert ["git", "checkout", "--quiet", "--detach", checked_out] in calls
    assert ["uv", "pip", "install", "--quiet", "-e", ".", "jax[tpu]", "--constraint", "pinned"] in calls
    assert (tmp_path / "warp_jax" / "pinned").read_text() == lock.read_text()


def test_a_host_without_the_project(tmp_path):
    """Fails when main starts although its code is not there, or the failure is taken for bad input."""
    command, environment = _host(tmp_path, main="")
    _programs(tmp_path, uv="exit 2")
    assert run(["bash", "-c", command], **environment).returncode == 1
    assert _starts_of_main(tmp_path) == []


def test_the_job_outlives_its_connection(tmp_path):
    """Fails when a lost connection ends the job or hides its end, or a second start does not wait for it."""
    main = "[ ! -e running ] || echo both; touch running; for i in {1..999}; do [ -e stop ] || sleep 0.02; done"
    command, environment = _host(tmp_path, main=f"{main}; rm running; echo end >&2; exit 3")
    first = start(["setsid", "bash", "-c", command], ENV | environment)
    running = tmp_path / "warp_jax" / ".venv" / "bin" / "running"
    while not running.exists():
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    assert finish(first)[:2] == (-signal.SIGKILL, "")
    again = start(["bash", "-c", command], ENV | environment)
    second = start(["bash", "-c", command.replace("warp_jax_", "warp_jax_2")], ENV | environment)
    time.sleep(0.5)  # in which a second main would start
    (running.parent / "stop").touch()
    outputs = [finish(again), finish(second)]
    assert [code for code, *_ in outputs] == [3, 3]
    assert outputs[0][1].startswith("end\n")
    assert outputs[1][1] == "end\nend\n"
    assert len(_starts_of_main(tmp_path)) == 2


@pytest.mark.parametrize(
    ("states", "codes", "variables", "expected"),
    [
        ("ABSENT WAITING_FOR_RESOURCES ACTIVE", "0", {}, (0, "create ssh")),
        ("ACTIVE SUSPENDING SUSPENDED", "255", {}, (2, "ssh")),
        (
            "ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE ACTIVE ACTIVE",
            "255 1 0",
            {"RECREATE": "1", "RETRIES": "2"},
            (0, "ssh delete create ssh ssh"),
        ),
        ("ACTIVE ACTIVE ACTIVE", "1 0", {}, (0, "ssh ssh")),
        ("ACTIVE ACTIVE ACTIVE ACTIVE", "1 134", {"RETRIES": "2"}, (1, "ssh ssh")),
        (
            "ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE",
            "255 255 0",
            {"RETRIES": "2", "STEADY": "0"},
            (0, "ssh ssh ssh"),
        ),
        ("ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE", "1 75 0", {"RETRIES": "2"}, (0, "ssh ssh ssh")),
        ("ACTIVE ACTIVE", "2", {}, (2, "ssh")),
        ("ACTIVE ACTIVE", "70", {}, (70, "ssh")),
        ("ACTIVE ACTIVE ACTIVE", "74 0", {}, (0, "ssh ssh")),
        ("ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE", "2 0", {"RECREATE": "1"}, (0, "ssh delete create ssh")),
        ("FAILED", "", {}, (2, "")),
        ("OFFLINE ACTIVE OFFLINE OFFLINE ACTIVE ACTIVE", "1 0", {}, (0, "ssh ssh")),
    ],
    ids=[
        "new",
        "preempted",
        "preempted and asked for again",
        "one failure",
        "failures",
        "failures after a long time",
        "lost",
        "bad input",
        "a user's function",
        "disk full for a while",
        "gone",
        "no slice",
        "no network",
    ],
)
def test_states_of_a_slice(states, codes, variables, expected, tmp_path):
    """Fails when a slice is deleted unasked, a preemption counts as a failure, or the exit code is another."""
    done = _cloud_tpu(tmp_path, "run", *JOB, states=states, codes=codes, **variables)
    assert (done.returncode, _verbs(tmp_path)) == expected, done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["run", *JOB], {"ZONE": "europe"}, "ZONE: got 'europe'"),
        (["run", *JOB], {"SLICE": ""}, "SLICE: got ''"),
        (["run", *JOB], {"NFS": "/share"}, "NFS: got '/share'"),
        (["run", CONFIG, "--workdir=/data/x"], {"NFS": "h:/s"}, "want a folder in /mnt/warp"),
        (["run", CONFIG], {}, "--workdir is missing"),
        (["stop"], {}, "got 'stop', want run, status or delete"),
    ],
)
def test_bad_input_of_cloud_tpu(arguments, variables, message, tmp_path):
    """Fails when a variable or argument is not looked at before gcloud is called."""
    environment = TPU | variables | _programs(tmp_path, gcloud="exit 1")
    _is_bad_input(run([LAUNCH / "cloud_tpu.sh", *arguments], **environment), message)
    assert _calls(tmp_path) == []


# Slurm

SLURM = [LAUNCH / "slurm.sh", CONFIG, "--workdir=/shared/x", "--config.front.etas=(0.1, 1.0)"]
ARGUMENTS = SLURM[1:]


def test_slurm_submits_runs_and_merges_in_order(tmp_path):
    """Fails when a job waits for another one or for none, a task is lost, or a dry run submits or prints otherwise."""
    (tmp_path / "ids").write_text("101;main\n102;main\n103;main\n104;main\n")
    environment = _programs(tmp_path, sbatch="next ids")
    environment |= {"NODES": "2", "SBATCH_OPTIONS": "--partition=gpu  --time=60"}
    command = [*SLURM, "--config.warp.num_runs=3", "--accept=device"]
    dry = run([command[0], "--dry_run", *command[1:]], **environment)
    assert (dry.returncode, dry.stderr, _calls(tmp_path)) == (0, "", [])
    done = run(command, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    common = ["--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=B:USR1@300"]
    common += ["--partition=gpu", "--time=60"]
    waits, array = ("--dependency=afterok:", "--kill-on-invalid-dep=yes"), "--array=1-3"
    jobs = [(1, "run", [array]), (1, "merge", [waits[0] + "101", waits[1]])]
    jobs += [(2, "run", [array, waits[0] + "102", waits[1]]), (2, "merge", [waits[0] + "103", waits[1]])]
    expected = []
    for i, what, options in jobs:
        name = f"--job-name=warp_{'runs' if what == 'run' else what}_{i}"
        job = [str(SLURM[0]), "inside", what, str(i), *ARGUMENTS, "--config.warp.num_runs=3", "--accept=device"]
        expected.append(["sbatch", "--parsable", name, *common, *options, *job])
    assert _calls(tmp_path) == expected
    text = dry.stdout
    for number, name in (("101", "runs_1"), ("102", "merge_1"), ("103", "runs_2")):
        text = text.replace(f"afterok:{name}", f"afterok:{number}")
    assert [shlex.split(line) for line in text.splitlines()] == expected


@pytest.mark.parametrize(
    ("what", "environment", "tail", "devices"),
    [
        ("run", ("1", "8", "2"), ["--run=2", "--iteration=5"], ""),
        ("run", ("4", "8", "3"), ["--run=3", "--iteration=5", "--multihost"], "0,1,2,3,4,5,6,7"),
        ("merge", ("2", "", ""), ["--merge", "--iteration=5", "--multihost"], ""),
    ],
)
def test_a_job_of_slurm(what, environment, tail, devices, tmp_path):
    """Fails when a job has another run, not one process a host with all its devices, or loses main's exit code."""
    nodes = environment[0]
    names = ("SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE", "SLURM_ARRAY_TASK_ID")
    programs = _programs(tmp_path, srun='echo "$JAX_LOCAL_DEVICE_IDS"; exit 2')
    job = [SLURM[0], "inside", what, "5", *ARGUMENTS]
    done = run(job, **programs, **dict(zip(names, environment, strict=True)))
    assert (done.returncode, done.stdout) == (2, f"{devices}\n")
    head = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert _calls(tmp_path) == [[*head, "python", "-m", "warp_jax.main", *ARGUMENTS, *tail]]


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        (0, {}, ""),
        (2, {}, ""),
        (70, {}, ""),
        (74, {}, "77"),
        (75, {}, "77"),
        (75, {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}, "77_2"),
        (137, {"SLURM_RESTART_COUNT": "19"}, "77"),
        (137, {"SLURM_RESTART_COUNT": "20"}, ""),
        (1, {"SLURM_RESTART_COUNT": "1", "RESTARTS": "1"}, ""),
    ],
    ids=[
        "done",
        "bad input",
        "user's function",
        "disk full",
        "lost",
        "task of an array",
        "killed",
        "too often",
        "too often for the user",
    ],
)
def test_a_job_of_slurm_that_failed_is_queued_again(code, variables, requeued, tmp_path):
    """Fails when a lost process cancels what waits, bad input is tried again, or a task takes its whole array along."""
    environment = _programs(tmp_path, srun=f"exit {code}", sleep="", scontrol="")
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "77"} | variables
    done = run([SLURM[0], "inside", "run" if requeued == "77_2" else "merge", "1", *ARGUMENTS], **environment)
    assert done.returncode == code
    assert _calls(tmp_path)[1:] == ([["sleep", "60"], ["scontrol", "requeue", requeued]] if requeued else [])


@pytest.mark.parametrize(("ends", "code"), [(True, 75), (False, 5)], ids=["saved in time", "not saved in time"])
def test_a_job_near_its_time_limit_is_queued_again(ends, code, tmp_path):
    """Fails when USR1 is not passed on, is not followed by one requeue, ends the job, or hides main's exit code.

    A job that ignores the signal is requeued GRACE seconds later; `scontrol requeue` then ends it.
    """
    stub = f"trap '{'exit 75' if ends else ':'}' USR1; touch started; while [ ! -e stop ]; do sleep 0.02; done; exit 5"
    environment = ENV | _programs(tmp_path, srun=stub, scontrol="touch stop")
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1", "PAUSE": "50"}
    environment |= {"GRACE": "50" if ends else "1"}
    job = start([SLURM[0], "inside", "run", "1", *ARGUMENTS], environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == code
    assert _calls(tmp_path)[1:] == [["scontrol", "requeue", "77"]]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([CONFIG], {}, "--workdir is missing"),
        ([*ARGUMENTS, "--run=1"], {}, "no flag --run;"),
        ([*ARGUMENTS, "--config.warp.num_run=1"], {}, "num_runs"),
        (ARGUMENTS, {"NODES": "0"}, "NODES: got '0'"),
        (ARGUMENTS, {"RESTARTS": "-1"}, "RESTARTS: got '-1'"),
        (ARGUMENTS, {"PAUSE": "1m"}, "PAUSE: got '1m'"),
        (ARGUMENTS, {"GRACE": "4m"}, "GRACE: got '4m'"),
        (ARGUMENTS, {"PYTHON": "no_such_python"}, "PYTHON: got 'no_such_python'"),
    ],
)
def test_bad_input_of_slurm(arguments, variables, message, tmp_path):
    """Fails when something is submitted although main would refuse its arguments."""
    _is_bad_input(run([SLURM[0], *arguments], **_programs(tmp_path, sbatch=""), **variables), message)
    assert _calls(tmp_path) == []
