#!/usr/bin/env bash
# Trains on a TPU VM slice, which it creates where there is none, from any machine with gcloud. Run
# it from the checkout, in tmux or the like; what is committed there (HEAD) is what runs:
#
#   NAME=llama ZONE=us-east5-b TYPE=v6e-16 NFS=10.0.0.2:/share launch/tpu_vm.sh \
#     --config=configs/llama_300m.py --workdir=/mnt/share/runs/llama_300m
#
# Ctrl-C makes the workers save and leave; the same command goes on. The slice is left as it is:
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -u
: "${NAME:?name of the slice}" "${ZONE:?its zone}" "${TYPE:?as v6e-16}" "${NFS:?HOST:/SHARE}"
# CHANGE: the image (its name goes with TYPE), and spot or not (CAPACITY= for on demand).
IMAGE=${IMAGE:-v2-alpha-tpuv6e}
CAPACITY=${CAPACITY---spot}
LOGS=${LOGS:-logs/$NAME}
# CHANGE: what every worker needs once: Python 3.11 or later, and the share (Filestore; NFS) at
# /mnt/share. A bucket works as well where its mount takes appends to files, as gcsfuse's does.
SETUP="set -e; sudo apt-get update -q; sudo apt-get install -qy python3.11-venv nfs-common
sudo mkdir -p /mnt/share; mountpoint -q /mnt/share || sudo mount -t nfs $NFS /mnt/share
mkdir -p lmscale; tar -xzf lmscale.tar.gz -C lmscale; cd lmscale
python3.11 -m venv .venv; .venv/bin/pip install -q '.[tpu]'"
# A worker whose ssh was cut may still train; a second process could not use its TPU.
STOP="pkill -u \$USER -x python; while pgrep -u \$USER -x python >/dev/null; do sleep 1; done"
RUN="$STOP; cd lmscale && LMSCALE_CACHE=/mnt/share/cache \
exec .venv/bin/python -m lmscale_jax.main --cluster=tpu $(printf ' %q' "$@")"

tpu() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$ZONE" --quiet; }
workers() { tpu ssh "$NAME" --worker=all --command="$1" "${@:2}"; }
state() { tpu describe "$NAME" --format='value(state)' 2>/dev/null; }
parcel=$(mktemp -d)
trap 'rm -rf "$parcel"' EXIT
trap 'trap "" INT TERM; echo "stopping the workers" >&2; workers "$STOP"; wait; exit 143' INT TERM

git archive --format=tar.gz --output="$parcel/lmscale.tar.gz" HEAD || exit 2
failures=0
while [ "$failures" -lt 5 ]; do
  if [ "$(state)" != READY ]; then
    # Preempted, stopped or not there yet. Creating fails where there is no capacity: ask again.
    [ -z "$(state)" ] || tpu delete "$NAME"
    # shellcheck disable=SC2086  # CAPACITY may be empty or several options
    tpu create "$NAME" --accelerator-type="$TYPE" --version="$IMAGE" $CAPACITY \
      || { sleep 60; continue; }
  fi
  # One log a worker (0.log, 1.log, ...), in a new directory, as gcloud would write over old ones.
  logs=$LOGS/$(date +%Y%m%d-%H%M%S)
  mkdir -p "$logs"
  tpu scp "$parcel/lmscale.tar.gz" "$NAME:" --worker=all && workers "$SETUP" \
    && workers "$RUN" --output-directory="$logs" &
  wait $!
  status=$?
  # 0: done. 2: bad input, which no restart mends. All else goes on from the last checkpoint.
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then exit "$status"; fi
  echo "$(date): status $status, slice $(state); trying again" >&2
  [ "$(state)" != READY ] || failures=$((failures + 1)) # a lost slice is no failure of ours
  sleep 30
done
exit "$status"
