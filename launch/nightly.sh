#!/usr/bin/env bash
# Trains on the newest data every night, and publishes the result only if it is good enough:
#
#     launch/nightly.sh --dir DIR --config CONFIG [options] -- SOURCE [key=value ...]
#     launch/nightly.sh --dir DIR --rollback
#
# The words after -- are those of `trec-twotower prepare`, which writes DIR/data/NIGHT. Then the night's model is trained
# from the weights of the published one, exported, indexed and evaluated in DIR/runs/NIGHT. If the metric is high enough,
# the link DIR/current is moved to the new run, in one step; otherwise it stays, and the script ends with exit code 4.
# A server reads DIR/current: trec-twotower serve DIR/current
#
# --night NAME     the night's name (default: today's date in UTC). The same name resumes a night that was interrupted.
# --metric NAME    of evaluation.json (default: recall@20)
# --share X        publish if the metric is at least X times that of the published run (default: 0.95). Each run is
#                  measured on the held-out events of its own dataset.
# --set KEY=VALUE  override of the config for the training, repeatable
# --rollback       move DIR/current back to the run that it pointed to before
# PYTHON: the interpreter, else the checkout's .venv, else python3.
set -euo pipefail

complain() { echo "nightly.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

dir='' config='' night=$(date -u +%Y-%m-%d) metric=recall@20 share=0.95 rollback='' overrides=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --dir | --config | --night | --metric | --share | --set)
            [[ $# -gt 1 ]] || complain "$1 needs a value."
            case $1 in
                --dir) dir=$2 ;;
                --config) config=$2 ;;
                --night) night=$2 ;;
                --metric) metric=$2 ;;
                --share) share=$2 ;;
                --set) overrides+=("$2") ;;
            esac
            shift 2 ;;
        --rollback) rollback=1; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        *) complain "'$1' is not an option; see --help." ;;
    esac
done
[[ -n $dir ]] || complain "--dir is missing: give the folder of the nights."
[[ $night =~ ^[A-Za-z0-9._-]+$ && $night != .* ]] || complain "--night is '$night': use letters, digits, '-', '_' and '.'."
[[ $share =~ ^[0-9]*\.?[0-9]+$ ]] || complain "--share is '$share': give a number such as 0.95."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
fi
[[ ! -f $root/trec_twotower/__init__.py ]] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
tt() { "$PYTHON" -m trec_twotower "$@"; }
export TREC_TT_NEXT=0

mkdir -p "$dir"
exec 9> "$dir/nightly.lock"
flock --nonblock 9 || complain "another night runs in $dir: wait until it has ended."

# Point the link NAME of $dir to TARGET; readers see the old target or the new one.
link() { ln -sfn "$2" "$dir/.$1.new" && mv -T "$dir/.$1.new" "$dir/$1"; }

if [[ -n $rollback ]]; then
    [[ -L $dir/current && -L $dir/previous ]] || complain "$dir has no earlier published run to go back to."
    now=$(readlink "$dir/current") before=$(readlink "$dir/previous")
    [[ -d $dir/$before ]] || complain "$dir/$before, the run published before, is gone."
    link current "$before"
    link previous "$now"
    echo "$dir/current is $before again (was $now)."
    exit 0
fi

[[ -n $config ]] || complain "--config is missing."
[[ $# -gt 0 ]] || complain "the source of prepare is missing: give it after --, such as: -- events events=orders.csv"
data=$dir/data/$night run=$dir/runs/$night
[[ ! -L $dir/current || $(readlink "$dir/current") != "runs/$night" ]] || complain "night $night is already published."

[[ -f $data/dataset.yaml ]] || tt prepare "$1" --out "$data" "${@:2}"
start=()
[[ ! -L $dir/current ]] || start=(--init-from "$dir/current")
tt launch train "$config" "data.dataset=$data" "run_dir=$run" "${overrides[@]}" "${start[@]}"
tt launch export "$run"
tt index "$run"
tt launch evaluate "$run" --index

# Print the metric through the index of a run; fails with a message if it is not there.
value() {
    "$PYTHON" - "$1" "$metric" <<'PY'
import json, sys
folder, metric = sys.argv[1:]
found = json.load(open(f"{folder}/evaluation.json"))["metrics"]["two towers, through the index"]
if metric not in found:
    sys.exit(f"nightly.sh: --metric is {metric!r}, but {folder}/evaluation.json has {', '.join(found)}.")
print(found[metric])
PY
}

new=$(value "$run") || exit 2
if [[ -L $dir/current ]]; then
    old=$(value "$dir/current") || exit 2
    if ! "$PYTHON" -c "import sys; sys.exit($new < $share * $old)"; then
        echo "nightly.sh: not published: $metric is $new, below $share times $old of $(readlink "$dir/current")." >&2
        exit 4
    fi
    link previous "$(readlink "$dir/current")"
fi
link current "runs/$night"
echo "published: $dir/current is runs/$night ($metric $new)."
