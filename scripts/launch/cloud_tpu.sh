#!/usr/bin/env bash
# Runs warp_jax.main on every host of a Cloud TPU slice, and goes on after a preemption; see usage() below.
# Not run on a real slice: tested with a stand-in for gcloud; flags and states are those of gcloud 528. Needs bash 4.4.
set -euo pipefail

usage() {
  cat <<'TEXT'
VARIABLE=value ... scripts/launch/cloud_tpu.sh [--dry_run] run --config=FILE --workdir=FOLDER [--config.x.y=value ...]
VARIABLE=value ... scripts/launch/cloud_tpu.sh [--dry_run] status | delete

run     asks for the slice if it is not there (a queued resource and a node, both named SLICE), waits until it is ACTIVE,
        installs the project on all its hosts, and starts the same command on all of them, with --multihost. It stays
        in the foreground, follows what they write, and tries again what failed. The command does not need it: without
        a connection it goes on, with all that it writes in ~/warp_jax.log on each host. Started again, run finds what
        is there and goes on; a command that still runs there is waited for. To end one, delete the slice, or end
        warp_jax.main on the hosts. Exit code 0 when the job is done, 1 when it failed, 2 on bad input.
status  prints the state of the request.
delete  deletes the request and its slice. Nothing else here does, but for RECREATE=1: a slice costs until then.

SLICE             its name: lower-case letters, digits and -
PROJECT, ZONE     of Google Cloud
ACCELERATOR_TYPE  such as v5litepod-16 (v5e), v5p-32, v6e-16
RUNTIME_VERSION   such as v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
REPO, REF         git address of the project that the hosts can read, and a branch, tag or commit (main)
NFS               HOST:/SHARE that all hosts mount at /mnt/warp, where --workdir then lies (a Filestore share);
                  empty: the hosts have a shared file system already
SPOT              1: preemptible, which costs less (0)
RECREATE          1: after a preemption, delete the request, whose slice is gone, and ask for another (0)
CREATE_FLAGS      more flags of gcloud compute tpus queued-resources create, separated by blanks
PYTHON            version for the hosts, which uv fetches (3.12)
RETRIES           failures of the command in a row on an ACTIVE slice, lost connections too (3); exit code 75 is none
STEADY            seconds after which a try that fails is the first in a row again (1800)
POLL              seconds between two looks at the slice (30)
DRY_RUN           1: as --dry_run: print the gcloud commands of a first run, start nothing

ssh to all hosts needs your key in the agent: ssh-add ~/.ssh/google_compute_engine
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

check() { # the name of a variable, the pattern of its whole value, what is wanted
  [[ ${!1-} =~ ^($2)$ ]] || fail "$1: got '${!1-}', want $3; see --help"
}

check_variables() {
  check SLICE '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' 'lower-case letters, digits and -'
  check PROJECT '[a-z][a-z0-9:.-]+' 'a project of Google Cloud'
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-central1-a'
  check DRY_RUN '[01]' '0 or 1'
  [[ $1 == run ]] || return 0
  check ACCELERATOR_TYPE 'v[0-9][a-z]*-[0-9]+' 'a type such as v5p-32'
  check RUNTIME_VERSION '[a-z0-9.-]+' 'a version such as v2-alpha-tpuv5'
  check REPO '[^[:space:]]+' 'the git address of the project'
  check REF '[^[:space:]]+' 'a branch, tag or commit'
  check NFS '|[^[:space:]:]+:/[^[:space:]]*' 'HOST:/SHARE or nothing'
  check SPOT '[01]' '0 or 1'
  check RECREATE '[01]' '0 or 1'
  check PYTHON '3\.[0-9]+' 'a version such as 3.12'
  check RETRIES '[1-9][0-9]*' 'at least 1'
  check STEADY '[0-9]+' 'seconds'
  check POLL '[0-9]+' 'seconds'
}

check_arguments() { # what goes to warp_jax.main
  local all=" $* " workdir="" argument
  [[ $all == *" --config="* ]] || fail "--config is missing; see --help"
  for argument; do [[ $argument != --workdir=* ]] || workdir=${argument#--workdir=}; done
  [[ -n $workdir ]] || fail "--workdir is missing; see --help"
  [[ -z $NFS || $workdir == /mnt/warp/?* ]] || fail "--workdir: got $workdir, want a folder in /mnt/warp, where NFS is"
}

tpus() { # gcloud compute tpus, or with DRY_RUN its command line
  local command=(gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE")
  if [[ $DRY_RUN == 0 ]]; then
    "${command[@]}"
    return
  fi
  local word line=""
  for word in "${command[@]}"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

state() { # of the request; ABSENT if there is none
  if [[ $DRY_RUN == 1 ]]; then
    echo "$dry_state"
    return
  fi
  local errors # what describe says on stderr; on stdout, it answers
  until { errors=$(tpus queued-resources describe "$SLICE" --format='value(state.state)' 2>&1 >&3); } 3>&1; do
    if [[ $errors == *' NOT_FOUND: '* ]]; then
      echo ABSENT
      return
    fi
    echo "$errors" >&2 # no network, no login: nothing is known
    sleep "$POLL"
  done
}

create() {
  local flags=(--node-id="$SLICE" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION") more
  [[ $SPOT == 0 ]] || flags+=(--spot)
  read -r -a more <<<"$CREATE_FLAGS"
  tpus queued-resources create "$SLICE" "${flags[@]}" "${more[@]}"
  dry_state=ACTIVE
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
      [[ $RECREATE == 1 ]] || fail "$SLICE is $now, its slice is gone: delete it and run again, or set RECREATE=1"
      delete
      ;;
    esac
    [[ $DRY_RUN == 1 ]] || echo "$SLICE: $now" >&2
    sleep "$POLL"
  done
}

install_script() { # what each host does first; every line may run again
  echo 'set -eu'
  if [[ -n $NFS ]]; then
    echo 'command -v mount.nfs >/dev/null || sudo apt-get -o DPkg::Lock::Timeout=300 install -qq -y nfs-common'
    printf 'sudo mkdir -p /mnt/warp; mountpoint -q /mnt/warp || sudo mount -t nfs %q /mnt/warp\n' "$NFS"
    echo 'sudo chmod 1777 /mnt/warp || true'
  fi
  # shellcheck disable=SC2016 # expanded on the hosts
  echo 'export PATH=$HOME/.local/bin:$PATH; command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh'
  printf '[ -d warp_jax/.git ] || git clone --quiet %q warp_jax\n' "$REPO"
  printf 'cd warp_jax; git fetch --quiet origin %q; git checkout --quiet --detach FETCH_HEAD\n' "$REF"
  printf '[ -d .venv ] || uv venv --quiet --python %q; uv pip install --quiet -e . "jax[tpu]"\n' "$PYTHON"
}

job_script() { # what runs in the background of a host; its exit code goes to a file
  echo "trap 'echo \$? >~/$1/code' EXIT"
  shift
  echo '('
  install_script
  printf ')\n[ $? = 0 ] || exit 1 # not the 2 of uv, say: it would be bad input\n'
  printf 'cd warp_jax; JAX_PLATFORMS=tpu,cpu .venv/bin/python -m warp_jax.main'
  printf ' %q' "$@" --multihost
}

host_script() { # what a host does: it starts the job, which outlives the connection, and shows what it writes
  local try job
  try=warp_jax_$(date +%s)
  job=$(job_script "$try" "$@")
  # shellcheck disable=SC2016 # expanded on the hosts
  echo 'touch warp_jax.log; seen=$(wc -c <warp_jax.log)'
  # a lost connection is made again by gcloud, with the same script: the job is there already
  echo "if mkdir $try 2>/dev/null; then"
  # the lock makes the job wait for one of another start
  echo "  setsid nohup flock warp_jax.lock bash -c ${job@Q} >>warp_jax.log 2>&1 </dev/null &"
  echo "  echo \$! >$try/pid"
  echo 'fi'
  echo "tail --pid=\$(cat $try/pid) -c +\$((seen + 1)) -f warp_jax.log; exit \$(cat $try/code)"
}

on_all_hosts() {
  tpus tpu-vm ssh "$SLICE" --worker=all --command="$1"
}

run() {
  local failures=0 code began
  while true; do
    wait_until_active
    code=0 began=$SECONDS
    on_all_hosts "$(host_script "$@")" || code=$?
    [[ $code != 0 ]] || break
    ((SECONDS - began < STEADY)) || failures=0
    sleep "$POLL"
    if [[ $(state) != ACTIVE ]]; then
      failures=0
      continue
    fi
    [[ $code != 2 ]] || fail "bad input, see above; $SLICE is still there"
    # a process was lost, or another job makes this very run
    [[ $code != 75 ]] || continue
    failures=$((failures + 1))
    if ((failures == RETRIES)); then
      echo "failed $failures times in a row, at last with exit code $code; $SLICE is still there" >&2
      exit 1
    fi
  done
  [[ $DRY_RUN == 1 ]] || echo "done; $SLICE is still there, and costs: delete it with $0 delete" >&2
}

dry_state=ABSENT
: "${REF=main}" "${NFS=}" "${SPOT=0}" "${RECREATE=0}" "${CREATE_FLAGS=}" "${PYTHON=3.12}"
: "${RETRIES=3}" "${STEADY=1800}" "${POLL=30}" "${DRY_RUN=0}"
if [[ ${1-} == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
[[ $DRY_RUN != 1 ]] || POLL=0
action=${1-}
shift || true
case $action in
run)
  check_variables run
  check_arguments "$@"
  run "$@"
  ;;
status | delete)
  check_variables "$action"
  [[ $# == 0 ]] || fail "unexpected argument $1; see --help"
  if [[ $action == delete ]]; then delete; else tpus queued-resources describe "$SLICE"; fi
  ;;
-h | --help | help) usage ;;
*) fail "got '$action', want run, status or delete; see --help" ;;
esac
