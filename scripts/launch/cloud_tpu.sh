#!/usr/bin/env bash
# Not tested on a real slice, only with a fake gcloud (flags and states of gcloud 528). Needs bash 4.4.
set -euo pipefail

usage() {
  cat <<'TEXT'
Run warp_jax.main on every host of a Cloud TPU slice.

  VARIABLE=value ... scripts/launch/cloud_tpu.sh [--dry_run] run --config=FILE --workdir=FOLDER [--config.x.y=value ...]
  VARIABLE=value ... scripts/launch/cloud_tpu.sh [--dry_run] status | delete

run     creates the slice if it is missing (a queued resource and a node, both named SLICE), waits until it is ACTIVE,
        installs the project on all hosts, and starts the command with --multihost on each. It stays in the foreground,
        prints the output of the hosts, and retries after failures. The command keeps running if the connection is lost;
        its output is in ~/warp_jax.log on each host. Start run again to reconnect: it waits for a command that is
        still running. To stop the command, delete the slice, or kill warp_jax.main on the hosts.
        Exit codes: 0 the job is done, 1 it failed, 2 bad input, 70 a function of yours failed.
status  prints the state of the request.
delete  deletes the request and its slice. The slice costs money until you delete it (or RECREATE=1 replaces it).

Variables (defaults in brackets; those without one are required):
SLICE             name of the slice: lower-case letters, digits and -
PROJECT, ZONE     project and zone of Google Cloud
ACCELERATOR_TYPE  such as v5litepod-16 (v5e), v5p-32, v6e-16
RUNTIME_VERSION   such as v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
REPO              address of a git repository with this project, readable by the hosts
REF               branch, tag or commit to install at the first start (main); later starts install the commit and the
                  packages in the workdir's requirements.lock
NFS               HOST:/SHARE to mount at /mnt/warp on all hosts, such as a Filestore share; --workdir must be in it
                  (empty: the hosts already share a file system)
SPOT              1: use a spot slice, which is cheaper and may be preempted (0)
RECREATE          1: after a preemption, delete the request and create a new one (0)
CREATE_FLAGS      more flags for gcloud compute tpus queued-resources create, separated by spaces (none)
PYTHON            Python version to install on the hosts with uv (3.12)
RETRIES           consecutive failures on an ACTIVE slice before run stops, lost connections included; exit code 75
                  does not count (3)
STEADY            seconds after which a failure no longer counts as consecutive (1800)
POLL              seconds between checks of the state (30)
DRY_RUN           1: as --dry_run: print the gcloud commands of a first run and execute none (0)

gcloud connects to all hosts with your ssh key: run ssh-add ~/.ssh/google_compute_engine first.
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

check() { # name of a variable, regular expression for its value, description of a valid value
  [[ ${!1-} =~ ^($2)$ ]] || fail "$1: got '${!1-}', want $3; see --help"
}

check_variables() {
  check SLICE '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' 'lower-case letters, digits and -'
  check PROJECT '[a-z][a-z0-9:.-]+' 'the id of a Google Cloud project'
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-central1-a'
  check DRY_RUN '[01]' '0 or 1'
  [[ $1 == run ]] || return 0
  check ACCELERATOR_TYPE 'v[0-9][a-z]*-[0-9]+' 'a type such as v5p-32'
  check RUNTIME_VERSION '[a-z0-9.-]+' 'a version such as v2-alpha-tpuv5'
  check REPO '[^[:space:]]+' 'the address of a git repository'
  check REF '[^[:space:]]+' 'a branch, tag or commit'
  check NFS '|[^[:space:]:]+:/[^[:space:]]*' 'HOST:/SHARE, or empty'
  check SPOT '[01]' '0 or 1'
  check RECREATE '[01]' '0 or 1'
  check PYTHON '3\.[0-9]+' 'a version such as 3.12'
  check RETRIES '[1-9][0-9]*' 'at least 1'
  check STEADY '[0-9]+' 'seconds'
  check POLL '[0-9]+' 'seconds'
}

check_arguments() { # arguments of warp_jax.main
  local all=" $* " workdir="" argument
  [[ $all == *" --config="* ]] || fail "--config is missing; see --help"
  for argument; do [[ $argument != --workdir=* ]] || workdir=${argument#--workdir=}; done
  [[ -n $workdir ]] || fail "--workdir is missing; see --help"
  [[ -z $NFS || $workdir == /mnt/warp/?* ]] || fail "--workdir: got $workdir, want a folder in /mnt/warp, as NFS is set"
}

tpus() { # run gcloud compute tpus; with DRY_RUN=1, print the command
  local line command=(gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE")
  if [[ $DRY_RUN == 0 ]]; then
    "${command[@]}"
  else
    printf -v line ' %q' "${command[@]}"
    echo "${line# }"
  fi
}

state() { # print the state of the request; ABSENT if it does not exist
  local errors # stderr of describe; its stdout goes to the caller
  until { errors=$(tpus queued-resources describe "$SLICE" --format='value(state.state)' 2>&1 >&3); } 3>&1; do
    if [[ $errors == *' NOT_FOUND: '* ]]; then
      echo ABSENT
      return
    fi
    echo "$errors" >&2 # no network or no login: the state is unknown, so try again
    sleep "$POLL"
  done
}

create() {
  local flags=(--node-id="$SLICE" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION") more
  [[ $SPOT == 0 ]] || flags+=(--spot)
  read -r -a more <<<"$CREATE_FLAGS"
  tpus queued-resources create "$SLICE" "${flags[@]}" "${more[@]}"
}

delete() {
  tpus queued-resources delete "$SLICE" --force --quiet
}

wait_until_active() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
    ABSENT) create ;;
    SUSPENDED | FAILED)
      [[ $RECREATE == 1 ]] || fail "$SLICE is $now and its slice is lost: delete it and run again, or set RECREATE=1"
      delete
      ;;
    esac
    echo "$SLICE: $now" >&2
    sleep "$POLL"
  done
}

install_script() { # first commands on each host, safe to repeat: arguments of warp_jax.main
  local argument lock="" project=.
  for argument; do [[ $argument != --workdir=* ]] || lock=${argument#--workdir=}/requirements.lock; done
  [[ $lock != gs://* ]] || project='.[gcs]'
  echo 'set -eu'
  if [[ -n $NFS ]]; then
    echo 'command -v mount.nfs >/dev/null || sudo apt-get -o DPkg::Lock::Timeout=300 install -qq -y nfs-common'
    printf 'sudo mkdir -p /mnt/warp; mountpoint -q /mnt/warp || sudo mount -t nfs %q /mnt/warp\n' "$NFS"
    echo 'sudo chmod 1777 /mnt/warp || true'
  fi
  # shellcheck disable=SC2016 # expanded on the hosts
  echo 'export PATH=$HOME/.local/bin:$PATH; command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh'
  printf '[ -d warp_jax/.git ] || git clone --quiet %q warp_jax\n' "$REPO"
  printf 'cd warp_jax; git fetch --quiet origin %q\n' "$REF"
  # the commit and the packages of the workdir's first start, if there was one
  printf 'cat %q >pinned 2>/dev/null || gcloud storage cat %q >pinned 2>/dev/null || : >pinned\n' "$lock" "$lock"
  # shellcheck disable=SC2016
  echo 'commit=$(sed -n "s/^# warp_jax.* commit \([0-9a-f]\{40\}\)$/\1/p" pinned)'
  # shellcheck disable=SC2016
  echo 'git checkout --quiet --detach "${commit:-FETCH_HEAD}"'
  printf '[ -d .venv ] || uv venv --quiet --python %q; uv pip install --quiet -e "%s" "jax[tpu]" --constraint pinned\n' "$PYTHON" "$project"
}

job_script() { # background job on a host; it writes its exit code to a file
  echo "trap 'echo \$? >~/$1/code' EXIT"
  echo '('
  install_script "${@:2}"
  printf ')\n[ $? = 0 ] || exit 1 # not the code of the failed tool: 2 would mean bad input\n'
  printf 'cd warp_jax; JAX_PLATFORMS=tpu,cpu .venv/bin/python -m warp_jax.main'
  printf ' %q' "${@:2}" --multihost
}

host_script() { # command on a host: start the job, which survives a lost connection, and print its output
  local try job
  try=warp_jax_$(date +%s)
  job=$(job_script "$try" "$@")
  # After a lost connection, gcloud runs the same script again: mkdir lets the job start only once. The lock makes the
  # job wait for the job of an earlier start.
  cat <<TEXT
touch warp_jax.log; seen=\$(wc -c <warp_jax.log)
if mkdir $try 2>/dev/null; then
  setsid nohup flock warp_jax.lock bash -c ${job@Q} >>warp_jax.log 2>&1 </dev/null &
  echo \$! >$try/pid
fi
tail --pid=\$(cat $try/pid) -c +\$((seen + 1)) -f warp_jax.log; exit \$(cat $try/code)
TEXT
}

start() { # run the command on all hosts: arguments of warp_jax.main
  tpus tpu-vm ssh "$SLICE" --worker=all --command="$(host_script "$@")"
}

run() {
  local failures=0 code began
  while true; do
    wait_until_active
    code=0 began=$SECONDS
    start "$@" || code=$?
    [[ $code != 0 ]] || break
    ((SECONDS - began < STEADY)) || failures=0
    sleep "$POLL"
    if [[ $(state) != ACTIVE ]]; then
      failures=0
      continue
    fi
    [[ $code != 2 ]] || fail "bad input, see above; $SLICE still exists"
    if [[ $code == 70 ]]; then
      echo "a function of yours failed, see above; $SLICE still exists" >&2
      exit 70
    fi
    # a process was lost, or another job is training the same run
    [[ $code != 75 ]] || continue
    failures=$((failures + 1))
    if ((failures == RETRIES)); then
      echo "failed $failures times in a row, the last time with exit code $code; $SLICE still exists" >&2
      exit 1
    fi
  done
  echo "done; $SLICE still exists and costs money: delete it with $0 delete" >&2
}

: "${REF=main}" "${NFS=}" "${SPOT=0}" "${RECREATE=0}" "${CREATE_FLAGS=}" "${PYTHON=3.12}"
: "${RETRIES=3}" "${STEADY=1800}" "${POLL=30}" "${DRY_RUN=0}"
if [[ ${1-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
action=${1-}
shift || true
case $action in
run)
  check_variables run
  check_arguments "$@"
  if [[ $DRY_RUN == 1 ]]; then
    create
    start "$@"
  else
    run "$@"
  fi
  ;;
status | delete)
  check_variables "$action"
  [[ $# == 0 ]] || fail "unexpected argument $1; see --help"
  if [[ $action == delete ]]; then delete; else tpus queued-resources describe "$SLICE"; fi
  ;;
-h | --help | help) usage ;;
*) fail "got '$action', want run, status or delete; see --help" ;;
esac
