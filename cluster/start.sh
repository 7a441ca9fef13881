#!/usr/bin/env bash
# Starts or stops Ray on your own nodes over ssh; the result is that of `ray up cluster/on-premises.yaml`.
#
#   cluster/start.sh HEAD WORKER...           start; the first host is the head node
#   cluster/start.sh --join HEAD WORKER...    start Ray on these workers only, and join the running head node
#   cluster/start.sh --stop HEAD WORKER...    stop Ray on these hosts
#   cluster/start.sh --dry-run HEAD WORKER... print the commands and run none
#
# A host is the address that the nodes use among each other, optionally with a user: ubuntu@10.0.0.2. `--stop` stops all Ray
# processes of that user. Environment variables (default):
#   RAY_BIN              the ray command on every node          (/opt/bsq_ray/.venv/bin/ray)
#   RAY_AUTH_TOKEN_FILE  file with the cluster's token          (~/.ray/auth_token; `ray get-auth-token --generate`)
#   NETWORK_INTERFACE    network interface between the nodes    (eth0)
#   OBJECT_STORE_BYTES   bytes of the object store of each node (64000000000)
#   SSH_COMMAND          the ssh command                        (ssh -o BatchMode=yes -o ConnectTimeout=10)
# Exit status: 0 done, 1 a node failed (the message names each), 2 the call is wrong.
set -euo pipefail

ray=${RAY_BIN:-/opt/bsq_ray/.venv/bin/ray}
token=${RAY_AUTH_TOKEN_FILE:-$HOME/.ray/auth_token}
network=${NETWORK_INTERFACE:-eth0}
store=${OBJECT_STORE_BYTES:-64000000000}
read -ra ssh <<<"${SSH_COMMAND:-ssh -o BatchMode=yes -o ConnectTimeout=10}"
port=6379

wrong() {
  echo "start.sh: $1" >&2
  exit 2
}

action=start dry=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --stop) action=stop ;;
    --join) action=join ;;
    --dry-run) dry=yes ;;
    *) wrong "unknown option $1; use --join, --stop or --dry-run" ;;
  esac
  shift
done
(($#)) || wrong "no hosts; name the head node first, then the workers"

# Runs a command on a host. The token goes through stdin, so that no process list shows it.
on() {
  local host=$1 command=$2
  if [[ $dry ]]; then
    echo "$host: $command"
  elif [[ $action != stop ]]; then
    "${ssh[@]}" "$host" "$command" <"$token"
  else
    "${ssh[@]}" "$host" "$command" </dev/null
  fi
}

# Prints the command that starts Ray. A job uses the programs on the PATH of the head node.
starting() {
  echo "umask 077; mkdir -p ~/.ray && cat > ~/.ray/auth_token &&" \
    "{ ulimit -n 65536 2>/dev/null || ulimit -n \$(ulimit -Hn); } && export PATH=${ray%/*}:\$PATH RAY_AUTH_MODE=token" \
    "RAY_AUTH_TOKEN_PATH=\$HOME/.ray/auth_token RAY_USAGE_STATS_ENABLED=0 NCCL_SOCKET_IFNAME=$network" \
    "GLOO_SOCKET_IFNAME=$network NCCL_IB_DISABLE=1 && $ray start $* --object-store-memory=$store"
}

failed=()
collect() {
  local host
  for host in "$@"; do
    wait "${started[$host]}" || failed+=("$host")
  done
}

declare -A started
if [[ $action == stop ]]; then
  for host in "$@"; do
    on "$host" "$ray stop" &
    started[$host]=$!
  done
  collect "$@"
else
  [[ $dry || -s $token ]] || wrong "no token in $token; create one: $ray get-auth-token --generate"
  head=$1
  shift
  [[ $action == join ]] || on "$head" "$(starting --head "--node-ip-address=${head#*@}" --port=$port --dashboard-host=127.0.0.1)" || {
    echo "start.sh: the head node $head did not start; no worker was started" >&2
    exit 1
  }
  for host in "$@"; do
    on "$host" "$(starting "--address=${head#*@}:$port" "--node-ip-address=${host#*@}")" &
    started[$host]=$!
  done
  collect "$@"
fi
if ((${#failed[@]})); then
  echo "start.sh: failed on ${failed[*]}; the other nodes are done, and the same call with --stop stops them" >&2
  exit 1
fi
