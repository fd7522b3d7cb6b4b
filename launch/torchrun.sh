#!/usr/bin/env bash
# Starts a command of `python -m trec_twotower` on several ranks:
#
#     launch/torchrun.sh [--ranks N] COMMAND [ARGUMENTS...]
#     launch/torchrun.sh --ranks 2 train configs/demo.yaml train.epochs=3
#
# Ranks on this machine: --ranks, else NPROC_PER_NODE, else one for each GPU, else 1.
# Several machines: start the same line on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (29500).
# Machines that come and go: NNODES=2:4 RDZV_ENDPOINT=HOST:PORT RDZV_ID=JOB instead.
# MAX_RESTARTS (0): how often ranks are started again after a failure; across machines it needs RDZV_ENDPOINT.
# LOCAL_ADDR: this machine's address for the others, where its host name is not one.
# PYTHON: the interpreter, else the checkout's .venv, else python3.
set -euo pipefail

complain() { echo "torchrun.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -cv -e '^-1$' -e '^$' || true
    elif command -v nvidia-smi > /dev/null; then
        nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

ranks=${NPROC_PER_NODE:-}
case ${1:-} in
    --ranks) ranks=${2:-}; shift; [[ $# -gt 0 ]] && shift ;;
    --ranks=*) ranks=${1#--ranks=}; shift ;;
    -h | --help) usage; exit 0 ;;
esac
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
gpus=$(count_gpus)
[[ -n $ranks ]] || ranks=$((gpus > 0 ? gpus : 1))
[[ $ranks =~ ^[1-9][0-9]*$ ]] || complain "--ranks is '$ranks': give the number of ranks on this machine, 1 or more."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
fi
# From a checkout it runs uninstalled, too.
[[ ! -f $root/trec_twotower/__init__.py ]] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

nodes=${NNODES:-1}
restarts=${MAX_RESTARTS:-0}
where=(--nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="$restarts")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    where+=(--rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="${RDZV_ID:-trec_twotower}")
    [[ -z ${LOCAL_ADDR:-} ]] || where+=(--local-addr="$LOCAL_ADDR")
elif [[ $nodes != 1 ]]; then
    [[ $nodes =~ ^[0-9]+$ ]] || complain "NNODES is '$nodes', a range: set RDZV_ENDPOINT=HOST:PORT and RDZV_ID, too."
    [[ -n ${MASTER_ADDR:-} ]] || complain "NNODES is $nodes but MASTER_ADDR is not set: give the address of node 0."
    [[ -n ${NODE_RANK:-} ]] || complain "NNODES is $nodes but NODE_RANK is not set: 0 to $((nodes - 1)), one each."
    # A restarted rank would find the addresses of the dead ones at a fixed MASTER_PORT.
    [[ $restarts == 0 ]] || complain "MAX_RESTARTS is $restarts on $nodes machines: set RDZV_ENDPOINT=HOST:PORT, too."
    where+=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
elif [[ -n ${MASTER_PORT:-} ]]; then
    where+=(--rdzv-backend=c10d --rdzv-endpoint="localhost:$MASTER_PORT" --rdzv-id="$$" --local-addr=127.0.0.1)
else
    where+=(--standalone --local-addr=127.0.0.1) # a free port: two jobs on one machine do not meet
fi

# Each attempt after a restart gets a store of its own, without the addresses of the dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Without a GPU the ranks share the cores. With one, the tables and towers are on the GPU and a rank needs one thread.
threads=1
[[ $gpus -gt 0 ]] || threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# glibc else gives the blocks of every step back to the kernel and asks for them again: twice the time on CPU.
if [[ ${GLIBC_TUNABLES:-} != *glibc.malloc* ]]; then
    malloc=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}$malloc:glibc.malloc.top_pad=268435456"
fi
# On a GPU: batches differ in size, and blocks of fixed size would leave gaps that no later batch fits.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Ranks that are told to end may write a checkpoint first.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110} # seconds
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

exec "$PYTHON" -m trec_twotower.distributed.launcher "${where[@]}" -m trec_twotower "$@"
