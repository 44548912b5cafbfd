#!/usr/bin/env bash
# Submits WARP to Slurm: an array of runs and a merge for each iteration; see usage() below.
# Not run on a real cluster: tested with stand-ins for sbatch, srun and scontrol. Needs bash 4.4.
set -euo pipefail

usage() {
  cat <<'TEXT'
[VARIABLE=value ...] scripts/launch/slurm.sh [--dry_run] --config=FILE --workdir=FOLDER [--config.x.y=value ...]

For each iteration, an array job with one task for each run, and a job that merges them once all have succeeded; the
next iteration starts when that has. All share the workdir, on a file system that all nodes see. How many iterations
and runs there are is read from the config. Start it in the project's folder, its Python environment activated.

A job that is preempted or loses a node is put into the queue again (--requeue), and so is one that comes near its time
limit (USR1 two minutes before), and one that failed, unless on bad input (exit code 2) or after RESTARTS starts; it
goes on where it stopped. When a job fails for good, those that wait for it are cancelled; the same command submits all
again, and what is finished ends at once.

NODES           hosts of each job (1); with more, srun starts one process on each, with --multihost
SBATCH_OPTIONS  more options of sbatch, separated by blanks: "--partition=gpu --gpus-per-node=8 --time=12:00:00"
RESTARTS        how often a job may have been started again, for whatever reason, before a failure is final (20)
PAUSE           seconds between a failure and the queue (60); more than Slurm's KillWait
PYTHON          of the jobs (python)
DRY_RUN         1: as --dry_run: print the sbatch commands, submit nothing
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

counts() { # iterations and runs of the config; an unknown or missing option is one line and exit code 2
  "$PYTHON" - "$@" <<'CODE'
import sys
from absl import flags
from ml_collections import config_flags
from warp_jax import cli

config = config_flags.DEFINE_config_file("config")
flags.DEFINE_string("workdir", None, "")
example = "--config=configs/gemma_7b.py --workdir=runs/gemma_7b"
cli.parse_flags(sys.argv, required=("config", "workdir"), example=example, load=lambda: config.value and config.value.seed)
print(config.value.warp.num_iterations, config.value.warp.num_runs)
CODE
}

queue() { # what is done (run_1, merge_1, ...), options of sbatch, --, arguments of inside(); sets job_id
  local name=$1 more
  shift
  read -r -a more <<<"$SBATCH_OPTIONS"
  local options=(--parsable --job-name="warp_$name" --nodes="$NODES" --ntasks-per-node=1)
  options+=(--requeue --open-mode=append --signal=B:USR1@120 "${more[@]}")
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  local command=(sbatch "${options[@]}" "$0" inside "$@")
  if [[ $DRY_RUN == 1 ]]; then
    job_id=$name
    local word line=""
    for word in "${command[@]}"; do
      [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]] || word=${word@Q}
      line+=" $word"
    done
    echo "${line# }"
  else
    job_id=$("${command[@]}")
    job_id=${job_id%%;*} # the name of the cluster may follow
    echo "warp_$name: job $job_id"
  fi
}

submit() {
  local numbers iterations runs i after=()
  numbers=$(counts "$@") || exit $?
  read -r iterations runs <<<"$numbers"
  for ((i = 1; i <= iterations; i++)); do
    queue "runs_$i" --array="1-$runs" "${after[@]}" -- run "$i" "$@"
    queue "merge_$i" --dependency="afterok:$job_id" --kill-on-invalid-dep=yes -- merge "$i" "$@"
    after=(--dependency="afterok:$job_id" --kill-on-invalid-dep=yes)
  done
}

requeue() { # why
  local job=$SLURM_JOB_ID
  # a task's own id may be that of its array, whose other tasks would start again too
  [[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  echo "$1: into the queue again" >&2
  scontrol requeue "$job" && requeued=1
}

inside() { # run or merge, the iteration, arguments of main: what a job does
  local task=(--merge) iteration=$2 nodes=$SLURM_JOB_NUM_NODES multihost=() step signalled code requeued=0
  [[ $1 == merge ]] || task=(--run="$SLURM_ARRAY_TASK_ID")
  shift 2
  if ((nodes > 1)); then
    multihost=(--multihost)
    # under Slurm, JAX would take one device for each process
    [[ -z ${SLURM_GPUS_ON_NODE-} ]] || JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  trap 'signalled=1; requeue "near the time limit" || true' USR1
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "$PYTHON" -m warp_jax.main "$@" "${task[@]}" --iteration="$iteration" "${multihost[@]}" &
  step=$!
  while true; do
    signalled=0 code=0
    wait "$step" || code=$?
    ((signalled)) || break # a signal ends wait, and not the step
  done
  # any code but 2: with one killed task, srun's is the highest, and hides the 75 (try again) of those that lost it
  if ((code != 0 && code != 2 && ! requeued && ${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
    sleep "$PAUSE" # one that is being cancelled or preempted dies here
    ((requeued)) || requeue "exit code $code" || true
  fi
  exit "$code"
}

: "${NODES=1}" "${SBATCH_OPTIONS=}" "${RESTARTS=20}" "${PAUSE=60}" "${PYTHON=python}" "${DRY_RUN=0}"
if [[ ${1-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
[[ $NODES =~ ^[1-9][0-9]*$ ]] || fail "NODES: got '$NODES', want at least 1; see --help"
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS: got '$RESTARTS', want a number; see --help"
[[ $PAUSE =~ ^[0-9]+$ ]] || fail "PAUSE: got '$PAUSE', want seconds; see --help"
[[ $DRY_RUN =~ ^[01]$ ]] || fail "DRY_RUN: got '$DRY_RUN', want 0 or 1; see --help"
command -v "$PYTHON" >/dev/null || fail "PYTHON: no program $PYTHON; see --help"
case ${1-} in
inside)
  shift
  inside "$@"
  ;;
-h | --help | help) usage ;;
*) submit "$@" ;;
esac
