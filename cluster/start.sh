#!/usr/bin/env bash
# Starts Ray on servers of your own, or stops it: what `ray up cluster/on-premises.yaml` does, over plain ssh.
#
#   cluster/start.sh HEAD WORKER...           start; the first host is the head
#   cluster/start.sh --join HEAD WORKER...    start Ray on these workers only, and join the head, which runs
#   cluster/start.sh --stop HEAD WORKER...    stop Ray on these hosts
#   cluster/start.sh --dry-run HEAD WORKER... print the commands and run none
#
# A host is the address the servers know it by, with a user if it needs one: ubuntu@10.0.0.2. `--stop` ends every Ray of that
# user there. Settings are environment variables:
#   RAY_BIN              the ray command on every node          (/opt/bsq_ray/.venv/bin/ray)
#   RAY_AUTH_TOKEN_FILE  file with the cluster's token          (~/.ray/auth_token; `ray get-auth-token --generate`)
#   NETWORK_INTERFACE    network interface between the nodes    (eth0)
#   OBJECT_STORE_BYTES   bytes of the object store of each node (64000000000)
#   SSH_COMMAND          the ssh command                        (ssh -o BatchMode=yes -o ConnectTimeout=10)
# Exit status: 0 all done, 1 a server failed (each is named), 2 the call was wrong.
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
    *) wrong "option $1 is not known; use --join, --stop or --dry-run" ;;
  esac
  shift
done
(($#)) || wrong "name the servers, the head first"

# Runs a command on a host. The token goes through standard input, so that no process list shows it.
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

# A job is run by what the head finds on its path.
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
  [[ $dry || -s $token ]] || wrong "there is no token in $token; make one: $ray get-auth-token --generate"
  head=$1
  shift
  [[ $action == join ]] || on "$head" "$(starting --head "--node-ip-address=${head#*@}" --port=$port --dashboard-host=127.0.0.1)" || {
    echo "start.sh: the head $head did not start; nothing else was started" >&2
    exit 1
  }
  for host in "$@"; do
    on "$host" "$(starting "--address=${head#*@}:$port" "--node-ip-address=${host#*@}")" &
    started[$host]=$!
  done
  collect "$@"
fi
if ((${#failed[@]})); then
  echo "start.sh: failed on ${failed[*]}; the others are done, and the same call with --stop undoes it" >&2
  exit 1
fi
