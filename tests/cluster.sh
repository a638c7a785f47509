#!/usr/bin/env bash
# heft.sub, heft_exec.sh and container.def on a real HTCondor pool. Run as root:
#
#   tests/cluster.sh RIG [image|smoke|sweep|twins|resubmit|vacate|hold|all]
#
# RIG is a script that runs such a pool on this machine: `RIG up`, `RIG submit DIR heft.sub ARGS...` (copies DIR,
# submits as a normal user, waits, copies back to DIR.out), `RIG user CMD...`, `RIG sif DIR container.def OUT.sif`.
# With RIG_PYTHON=DIR there is no container: on the execute machine, DIR holds a python3 that has the packages.
# RIG_DISK=16GB: request no more disk, on a machine that has less than 64 GB free.
set -euo pipefail
rig=$1
part=${2:-all}
cd "$(dirname "$0")/.."
work=${CLUSTER_WORK:-$(mktemp -d)}
export CLUSTER_WORK=$work
image=$work/container.sif

say() { printf '\n== %s\n' "$*"; }
wants() { [ "$part" = all ] || [ "$part" = "$1" ]; }

copy() { # DIR: the repository's files as they are now
    mkdir -p "$1"
    comm -23 <(git ls-files -co --exclude-standard | sort -u) <(git ls-files -d | sort) | tar -cf - -T - | tar -xf - -C "$1"
}

fresh() { # DIR: what a user has after cloning, with an image and an empty token file
    rm -rf "$1" "$1.out"
    copy "$1"
    (umask 077 && : >"$1/.hf_token")
    [ -z "${RIG_DISK:-}" ] || sed -i "s/^request_disk .*/request_disk = $RIG_DISK/" "$1/heft.sub"
    if [ -z "${RIG_PYTHON:-}" ]; then ln -f "$image" "$1/"; return; fi
    sed -i "s#^container_image.*#environment = PATH=$RIG_PYTHON:/usr/bin:/bin#" "$1/heft.sub"
}

queue_rows() { # DIR VARIABLES ROW...: as a user would, the single queue of heft.sub off, a table on
    sed -i '/^queue$/,$d' "$1/heft.sub"
    { echo "queue $2 from ("; printf ' %s\n' "${@:3}"; echo ")"; } >>"$1/heft.sub"
}

start() { # NAME ARGS...: submit $work/NAME in the background, as $submit; its words go to NAME.log
    RIG_WAIT=${RIG_WAIT:-1200} "$rig" submit "$work/$1" heft.sub "${@:2}" >"$work/$1.log" 2>&1 &
    submit=$! log=$work/$1.log
    execute=$("$rig" user condor_config_val EXECUTE)
}

sandbox() { # SIGN: the running job's file or folder of this name, if it is there
    "$rig" root find "$execute" -path "*/output/$1" -size +0 2>/dev/null || true
}

wait_for() { # SIGN: until the running job has this file
    until sandbox "smoke/$1" | grep -q .; do
        kill -0 "$submit" || { cat "$log"; exit 1; }
        sleep 0.3
    done
}

end_by() { # CMD...: end the running job so, and wait until its sandbox, not a later one, is gone
    local there
    there=$(sandbox smoke)
    "$@"
    while sandbox smoke | grep -qxF "$there"; do sleep 0.3; done
}

kill_job() { # as the kernel does where memory is short
    "$rig" root kill -KILL "$("$rig" root pgrep -of "python.*heft_finetuning.py")"
}

same() { # NAME: its result is that of the undisturbed run
    test -d "$work/smoke.out" || "$0" "$rig" smoke
    diff "$work"/{smoke,"$1"}.out/results/smoke/lora3-reft3.predictions.jsonl
    python3 - "$work"/{smoke,"$1"}.out/results/smoke/lora3-reft3.json <<'PYTHON'
import json, sys
a, b = (json.load(open(file)) for file in sys.argv[1:])
assert a["loss"] == b["loss"] and a["accuracy"] == b["accuracy"], "another result than undisturbed"
print("the result of the undisturbed run:", a["accuracy"])
PYTHON
}

if wants image && [ -z "${RIG_PYTHON:-}" ]; then
    say "image: apptainer build, with its %test"
    copy "$work/source"
    time "$rig" sif "$work/source" container.def "$image"
    ls -l "$image"
fi

if wants smoke; then
    say "smoke: condor_submit heft.sub extra=--smoke"
    fresh "$work/smoke"
    RIG_WAIT=${RIG_WAIT:-900} "$rig" submit "$work/smoke" heft.sub extra=--smoke
    ls -l "$work/smoke.out/results/smoke" "$work/smoke.out/condor_outs"
    test -s "$work/smoke.out/results/smoke/lora3-reft3.json"
fi

if wants sweep; then
    say "sweep: three rows, then one with a mistake among them"
    fresh "$work/sweep"
    queue_rows "$work/sweep" "epochs_lora, epochs_reft" "0 0" "0 1" "1 0" "nought 1"
    RIG_WAIT=${RIG_WAIT:-900} "$rig" submit "$work/sweep" heft.sub extra=--smoke && { echo "the mistake went unseen"; exit 1; }
    ls "$work/sweep.out/results/smoke"
    for run in lora0-reft0 lora0-reft1 lora1-reft0; do test -s "$work/sweep.out/results/smoke/$run.json"; done
    grep -h "heft: error" "$work"/sweep.out/condor_outs/*_3.err
    test "$(grep -l 'heft: error' "$work"/sweep.out/condor_outs/*.err | wc -l)" = 1
    test "$(cat "$work"/sweep.out/condor_outs/*_3.log | grep -c '^001 ')" = 1 # a mistake is not tried again
fi

if wants twins; then
    say "twins: two rows train the same stage 1 at once, with other last bits, as on two kinds of GPU"
    fresh "$work/twins"
    # small micro-batches are slow: 3 + 0 ends last, and the stage 1 that stays in output/ is not that of 3 + 3
    queue_rows "$work/twins" "epochs_lora, epochs_reft, extra" "3 3 --smoke" "3 0 --smoke --tokens-per-microbatch 64"
    submit_twins() { # from what came home; all must end with 0
        rm -f "$work"/twins/condor_outs/*_*
        # the pool's second GPU is a small one, and its disk has no room for twice 64 GB
        RIG_WAIT=${RIG_WAIT:-1800} "$rig" submit "$work/twins" heft.sub -append "request_disk = 16GB" \
            -append "gpus_minimum_memory = 8000" -append "gpus_minimum_capability = 7.0"
        rm -rf "$work/twins"
        mv "$work/twins.out" "$work/twins"
    }
    submit_twins
    python3 - "$work"/twins/results/smoke/lora3-reft{3,0}.json <<'PYTHON'
import json, sys
a, b = (json.load(open(file))["loss"]["lora"] for file in sys.argv[1:])
assert len(a) == len(b) > 0 and a != b, "one of the two did not train a stage 1 of its own"
PYTHON

    say "twins: the same again, then once more without the results"
    submit_twins
    grep -h "already done" "$work"/twins/condor_outs/*.out
    test "$(grep -l "already done" "$work"/twins/condor_outs/*.out | wc -l)" = 2
    rm -rf "$work/twins-results"
    mkdir "$work/twins-results"
    mv "$work"/twins/results/smoke/*.json* "$work/twins-results"
    submit_twins
    diff "$work"/{twins-results,twins/results/smoke}/lora3-reft3.predictions.jsonl
fi

if wants resubmit; then
    say "resubmit: killed hard after the first checkpoint, not tried again, submitted again from the same folder"
    fresh "$work/resubmit"
    start resubmit -append "max_retries = 0" extra=--smoke
    wait_for lora3/checkpoint.pt
    end_by kill_job
    wait "$submit" && { echo "the kill went unseen"; exit 1; }
    cat "$work/resubmit.log"
    test -s "$work/resubmit.out/output/smoke/lora3/checkpoint.pt"
    rm -rf "$work/again" "$work/again.out"
    mv "$work/resubmit.out" "$work/again"
    start again extra=--smoke
    wait "$submit" || { cat "$work/again.log"; exit 1; }
    cat "$work/again.log"
    grep -h "resuming from" "$work"/again.out/condor_outs/*.out
    same again

    say "retry: killed hard after the first checkpoint of each stage; the same job starts again by itself"
    fresh "$work/retry"
    start retry extra=--smoke
    for sign in lora3/checkpoint.pt lora3-reft3/checkpoint.pt; do
        wait_for "$sign"
        end_by kill_job
    done
    wait "$submit" || { cat "$work/retry.log"; exit 1; }
    cat "$work/retry.log"
    grep -h "resuming from" "$work"/retry.out/condor_outs/*.out
    test "$(cat "$work"/retry.out/condor_outs/*.log | grep -c '^001 ')" = 3
    same retry
fi

if wants vacate; then
    say "vacate: condor_vacate_job in stage 1, stage 2 and the evaluation of one job"
    fresh "$work/vacate"
    start vacate extra=--smoke
    for sign in lora3/checkpoint.pt lora3-reft3/checkpoint.pt lora3-reft3/heft.json; do
        wait_for "$sign"
        end_by "$rig" user condor_vacate_job -all
    done
    wait "$submit" || { cat "$work/vacate.log"; exit 1; }
    cat "$work/vacate.log"
    cat "$work"/vacate.out/condor_outs/*.out
    grep -c "Job was evicted\|Job was checkpointed" "$work"/vacate.out/condor_outs/*.log
    same vacate
fi

if wants hold; then
    say "hold: held in stage 1, more memory requested, released; it continues"
    fresh "$work/hold"
    RIG_HOLD_WAIT=1 start hold extra=--smoke # the rig's status is then that of a held job
    wait_for lora3/checkpoint.pt
    end_by "$rig" user condor_hold -all
    "$rig" user condor_qedit -constraint 'JobStatus == 5' RequestMemory 49152
    "$rig" user condor_release -all
    wait "$submit" || true
    cat "$work/hold.log"
    grep -h "resuming from" "$work"/hold.out/condor_outs/*.out
    same hold
fi
say "done: $part ($work)"
