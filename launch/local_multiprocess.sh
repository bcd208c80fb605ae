#!/usr/bin/env bash
# Trains with N processes on this machine, to try out what several hosts would do:
#
#   launch/local_multiprocess.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# Each has one CPU device, unless --config.mesh.cpu_devices says otherwise. CHANGE by environment:
#   PYTHON  the interpreter (python)
#   LOGS    directory of process-0.log, process-1.log, ... (logs); what is there is added to
# Process 0 prints on the terminal too. SIGTERM, Ctrl-C and SIGHUP reach every process as SIGTERM,
# so that all save and leave; a second one kills them. The exit status is that of the process that
# was first to fail, once all have ended. Needs bash 4.4 or later.
set -u
case ${1:-} in
  '' | 0* | *[!0-9]*) echo "error: '${1:-}' is not a number of processes; use 2" >&2 && exit 2 ;;
esac
count=$1 python=${PYTHON:-python} logs=${LOGS:-logs}
shift
case " $*" in
  *" --config.mesh.cpu_devices"*) ;;
  *) set -- "$@" --config.mesh.cpu_devices=1 ;; # at the end: --config=FILE must come before it
esac
mkdir -p "$logs" || exit 2

# Below the ports that systems hand out themselves, so that nothing else takes it in the meantime.
port=$((20000 + 2 * (RANDOM % 5000)))
taken() { (exec 4<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
while taken "$port" || taken $((port + 1)); do port=$((port + 2)); done # JAX takes the second one

# On Linux: a group for each, so that what a process leaves behind can be ended with it, and SIGTERM
# from the kernel should this script be killed. Elsewhere plain processes.
guard=(env)
linux=(setsid setpriv --pdeathsig TERM)
if "${linux[@]}" true 2>/dev/null; then guard=("${linux[@]}"); fi
# tee outlives the signals and the terminal: process 0 still writes to it while it saves.
exec 3> >(trap '' INT TERM HUP PIPE && exec tee -a "$logs/process-0.log")
tee=$! asked=0 status=0 pids=()
tell() { for pid in "${pids[@]}"; do kill -s "$1" -- "$2$pid" 2>/dev/null; done; }
trap 'asked=$((asked + 1)); if [ "$asked" -gt 1 ]; then tell KILL -; tell KILL ""; fi
  if [ "$asked" -eq 1 ]; then tell TERM ""; fi' TERM INT HUP

for ((i = 0; i < count && asked == 0; i++)); do
  if [ "$i" -gt 0 ]; then exec 5>>"$logs/process-$i.log"; else exec 5>&3; fi
  "${guard[@]}" "$python" -m lmscale_jax.main --cluster=hosts --coordinator="127.0.0.1:$port" \
    --num_processes="$count" --process_id="$i" "$@" </dev/null >&5 2>&1 3>&- 5>&- &
  pids[i]=$!
done
if [ "$asked" -gt 0 ]; then tell TERM ""; fi # the last one may have been started in between
while [ "${#pids[@]}" -gt 0 ]; do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    wait "${pids[i]}" || status=$((status ? status : $?))
    kill -s KILL -- "-${pids[i]}" 2>/dev/null
    unset "pids[i]"
  done
  sleep 0.1
done
exec 3>&- 5>&-
wait "$tee"
exit "$status"
