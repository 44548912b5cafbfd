#!/usr/bin/env bash
# Not tested on a real cluster, only with fake sbatch, srun and scontrol. Needs bash 4.4.
set -euo pipefail

usage() {
  cat <<'TEXT'
Submit WARP to Slurm: for each iteration, an array job of the runs and a job that merges them.

  [VARIABLE=value ...] scripts/launch/slurm.sh [--dry_run] --config=FILE --workdir=FOLDER [--config.x.y=value ...]

Start it in the folder of this project, in its Python environment. The workdir must be on a file system that all nodes
share. The numbers of iterations and runs are read from the config. The merge starts when all runs of its iteration have
succeeded, and the next iteration starts after the merge.

A job is requeued and resumes (sbatch --requeue) after a preemption, after the loss of a node, near its time limit, and
after a failure, except on bad input (exit code 2), if a function of yours failed (70) or after RESTARTS restarts. Five
minutes before its time limit it is asked to save and end; if it has not ended GRACE seconds later, it is requeued. If a
job fails finally, Slurm cancels the jobs that depend on it. Run the same command again to resume: finished parts end at
once.

Variables (defaults in brackets):
NODES           hosts per job; with more than one, srun starts one process on each, with --multihost (1)
SBATCH_OPTIONS  more options for sbatch, separated by spaces (none), such as
                "--partition=gpu --gpus-per-node=8 --time=12:00:00"
RESTARTS        number of restarts of a job, for any reason, after which a failure is final (20)
PAUSE           seconds between a failure and the requeue; longer than KillWait of Slurm (60)
GRACE           seconds to save in (240)
PYTHON          Python of the jobs (python)
DRY_RUN         1: as --dry_run: print the sbatch commands and submit nothing (0)
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

counts() { # print the numbers of iterations and runs; a wrong option ends with one line and exit code 2
  "$PYTHON" - "$@" <<'CODE'
import sys
from absl import flags
from warp_jax import cli

config = cli.define_config("config", "")
flags.DEFINE_string("workdir", None, "")
flags.DEFINE_string("accept", "", "")
example = "--config=configs/gemma_7b.py --workdir=runs/gemma_7b"
cli.parse_flags(sys.argv, required=("config", "workdir"), example=example, load=lambda: config.value and config.value.seed)
print(config.value.warp.num_iterations, config.value.warp.num_runs)
CODE
}

queue() { # submit a job and set job_id: name (runs_1, ...), options of sbatch, this script, arguments of inside()
  local name=$1 more line
  read -r -a more <<<"$SBATCH_OPTIONS"
  local command=(sbatch --parsable --job-name="warp_$name" --nodes="$NODES" --ntasks-per-node=1)
  command+=(--requeue --open-mode=append --signal=B:USR1@300 "${more[@]}" "${@:2}")
  if [[ $DRY_RUN == 1 ]]; then
    job_id=$name
    printf -v line ' %q' "${command[@]}"
    echo "${line# }"
  else
    job_id=$("${command[@]}")
    job_id=${job_id%%;*} # without the name of the cluster
    echo "warp_$name: job $job_id"
  fi
}

submit() {
  local numbers iterations runs i after=()
  numbers=$(counts "$@") || exit $?
  read -r iterations runs <<<"$numbers"
  for ((i = 1; i <= iterations; i++)); do
    queue "runs_$i" --array="1-$runs" "${after[@]}" "$0" inside run "$i" "$@"
    queue "merge_$i" --dependency="afterok:$job_id" --kill-on-invalid-dep=yes "$0" inside merge "$i" "$@"
    after=(--dependency="afterok:$job_id" --kill-on-invalid-dep=yes)
  done
}

requeue() { # reason, for the log
  local job=$SLURM_JOB_ID
  # SLURM_JOB_ID of a task may be the id of the whole array: requeue only this task
  [[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  echo "$1: requeued" >&2
  scontrol requeue "$job" && requeued=1
}

ask_to_save() { # pass USR1 on to main (srun does so), and wake this job GRACE seconds later
  signalled=1
  kill -USR1 "$step"
  [[ -z $watcher ]] || return 0
  (sleep "$GRACE" >/dev/null 2>&1 && kill -ALRM $$) & # without the redirection, sleep would hold the job's output open
  watcher=$!
}

inside() { # body of a job: run or merge, iteration, arguments of warp_jax.main
  local task=(--merge) iteration=$2 nodes=$SLURM_JOB_NUM_NODES multihost=() step signalled code requeued=0 watcher=""
  [[ $1 == merge ]] || task=(--run="$SLURM_ARRAY_TASK_ID")
  shift 2
  if ((nodes > 1)); then
    multihost=(--multihost)
    # without this, JAX uses one device per process under Slurm
    [[ -z ${SLURM_GPUS_ON_NODE-} ]] || JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  trap ask_to_save USR1
  trap 'signalled=1; requeue "not saved in $GRACE s" || true' ALRM
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "$PYTHON" -m warp_jax.main "$@" "${task[@]}" --iteration="$iteration" "${multihost[@]}" &
  step=$!
  while true; do
    signalled=0 code=0
    wait "$step" || code=$?
    ((signalled)) || break # a signal interrupts wait, but not the step
  done
  [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
  # all codes except 2 and 70: srun returns the highest code, so that of a killed task hides 75 (try again) of the others
  if ((code != 0 && code != 2 && code != 70 && ! requeued && ${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
    [[ $watcher ]] || sleep "$PAUSE" # a job that is being cancelled or preempted is killed during this pause
    ((requeued)) || requeue "exit code $code" || true
  fi
  exit "$code"
}

: "${NODES=1}" "${SBATCH_OPTIONS=}" "${RESTARTS=20}" "${PAUSE=60}" "${GRACE=240}" "${PYTHON=python}" "${DRY_RUN=0}"
if [[ ${1-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
[[ $NODES =~ ^[1-9][0-9]*$ ]] || fail "NODES: got '$NODES', want an integer >= 1; see --help"
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS: got '$RESTARTS', want an integer >= 0; see --help"
[[ $PAUSE =~ ^[0-9]+$ ]] || fail "PAUSE: got '$PAUSE', want a number of seconds; see --help"
[[ $GRACE =~ ^[0-9]+$ ]] || fail "GRACE: got '$GRACE', want a number of seconds; see --help"
[[ $DRY_RUN =~ ^[01]$ ]] || fail "DRY_RUN: got '$DRY_RUN', want 0 or 1; see --help"
command -v "$PYTHON" >/dev/null || fail "PYTHON: got '$PYTHON', want a Python program on PATH; see --help"
case ${1-} in
inside) inside "${@:2}" ;;
-h | --help | help) usage ;;
*) submit "$@" ;;
esac
