#!/usr/bin/env bash
# Runs a cluster of two builds of Ingle, an older one and this one, in one command:
#
#   tests/old_and_new_builds_work_together.sh [--target-dir FOLDER] [--old BINARY] [--new BINARY] [OLD COMMIT]
#
# Builds the old commit (2bbba00, the last one with protocol version 1 alone) in a temporary worktree, its output in
# --target-dir (target/old-build), and this tree as usual; --old and --new take binaries that are there. Then: workers
# and gateways of both builds join each other, answer with each other's engines, and an answer moves from a worker of
# one build to one of the other when its machine is killed. Needs Linux, git, Rust, curl and Python 3.9.
set -euo pipefail
cd "$(dirname "$0")/.."

commit=2bbba00 old='' new='' target=$PWD/target/old-build
while [ $# -gt 0 ]; do
    case $1 in
    --target-dir) target=$(realpath -m "$2"); shift 2 ;;
    --old) old=$(realpath "$2"); shift 2 ;;
    --new) new=$(realpath "$2"); shift 2 ;;
    -*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) commit=$1; shift ;;
    esac
done
work=$(mktemp -d)
declare -A pids=()
finish() {
    code=$?
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    if [ $code -ne 0 ]; then tail -n 20 "$work"/*.log >&2 || true; fi
    if [ -d "$work/source" ]; then git worktree remove --force "$work/source"; fi
    rm -rf "$work"
    exit $code
}
trap finish EXIT
say() { printf '\n== %s\n' "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

if [ -z "$old" ]; then
    say "building $commit (some minutes)"
    git worktree add --detach "$work/source" "$commit"
    (cd "$work/source" && CARGO_TARGET_DIR=$target cargo build --release --workspace)
    old=$target/release/ingle
fi
if [ -z "$new" ]; then
    say 'building this tree'
    cargo build --release --workspace
    new=${CARGO_TARGET_DIR:-target}/release/ingle
fi

# --------------------------------------------------------------------------------------------------------------------
# Machines: `tower` and `desk` run the new build, `attic` and `shed` the old one; `tower` and `attic` answer.

declare -A build=([tower]=$new [desk]=$new [attic]=$old [shed]=$old)
declare -A model=([tower]=echo [desk]=none [attic]=echo [shed]=none)
declare -A http=() quic=()

# Nothing of the caller's settings.
for name in $(compgen -e INGLE_ || true); do unset "$name"; done

ingle() { # ingle MACHINE ARGUMENT...
    local machine=$1
    shift
    "${build[$machine]}" "$@" --state-dir "$work/$machine"
}
# The value of a Python expression of `s`, the status as MACHINE sees it, and `node(name)`.
asked() { # asked MACHINE EXPRESSION
    ingle "$1" status --json 2>/dev/null | python3 -c '
import json, sys
s = json.load(sys.stdin)
def node(name): return next((n for n in s["nodes"] if n["name"] == name), {"health": {"state": ""}, "models": []})
def state(name): return [m["state"] for m in node(name)["models"]]
print(eval(sys.argv[1]))' "$2" 2>/dev/null || true
}
until_so() { # until_so MACHINE EXPRESSION VALUE
    local got=''
    for _ in $(seq 200); do
        got=$(asked "$1" "$2")
        if [ "$got" = "$3" ]; then return; fi
        sleep 0.2
    done
    fail "$1: waited for $2 to be $3, it is $got"
}
up() { # up MACHINE
    local machine=$1 address=${quic[$1]:-127.0.0.1:0}
    : >"$work/$machine.log"
    "${build[$machine]}" up --http 127.0.0.1:0 --quic "$address" --name "$machine" --model "${model[$machine]}" \
        --no-mdns --state-dir "$work/$machine" >"$work/$machine.log" 2>&1 &
    pids[$machine]=$!
    disown # bash says nothing when it is killed
    for _ in $(seq 200); do
        if grep -q '^Ready: ' "$work/$machine.log"; then break; fi
        sleep 0.2
    done
    http[$machine]=$(sed -n 's|^Ingle node .*http://||p' "$work/$machine.log" | head -n 1)
    until_so "$machine" 'node("'"$machine"'")["name"]' "$machine"
    quic[$machine]=$(asked "$machine" 'node("'"$machine"'")["address"]')
}
join() { # join MACHINE ISSUER
    local token
    token=$(ingle "$2" token --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["token"])')
    ingle "$1" join "${quic[$2]}" --token "$token" --name "$1" >"$work/$1.join.log" 2>&1 || fail "$1 does not join $2"
}
kill_9() { # kill_9 MACHINE
    kill -9 "${pids[$1]}"
    while kill -0 "${pids[$1]}" 2>/dev/null; do sleep 0.1; done
    unset "pids[$1]"
}
stream() { # stream MACHINE FILE TIMES: runs until the answer has ended
    curl --silent --show-error --no-buffer --max-time 120 --dump-header "$2.head" --output "$2" \
        --json '{"model": "echo", "stream": true, "messages": [{"role": "user", "content": "repeat '"$3"' every 50ms: hello "}]}' \
        "http://${http[$1]}/v1/chat/completions"
}
begun() { # begun FILE
    for _ in $(seq 200); do
        if grep -qs '"content":"h' "$1"; then return; fi
        sleep 0.1
    done
    fail "no answer begins: $(cat "$1" 2>/dev/null)"
}
node_of() { tr -d '\r' <"$1.head" | sed -n 's/^x-ingle-node: //p'; }
# Every word came, once and in its place, and the end is an end.
whole() { # whole FILE TIMES
    python3 - "$1" "$2" <<'PYTHON' || fail "the answer is not whole: $1"
import json, sys
events = [line[6:] for line in open(sys.argv[1]).read().split("\n") if line.startswith("data: ")]
assert events and events[-1] == "[DONE]", events[-2:]
chunks = [json.loads(event) for event in events[:-1]]
assert not any("error" in chunk for chunk in chunks), chunks[-1]
choices = [choice for chunk in chunks for choice in chunk["choices"]]
text = "".join(choice["delta"].get("content") or "" for choice in choices)
assert text == "hello " * int(sys.argv[2]), text
assert choices[-1]["finish_reason"] == "stop", choices[-1]
PYTHON
}
answers() { # answers GATEWAY WORKER
    stream "$1" "$work/answer" 5
    whole "$work/answer" 5
    [ "$(node_of "$work/answer")" = "$2" ] || fail "$1 was answered by $(node_of "$work/answer") and not by $2"
    echo "$1 is answered by $2"
}

say 'the two builds'
echo "old: $old ($("$old" --version)), commit $commit"
echo "new: $new ($("$new" --version)), commit $(git rev-parse --short HEAD)"

say 'joining, old to new and new to old'
up tower
join attic tower
up attic
join desk attic
up desk
join shed tower
up shed
for machine in tower attic desk shed; do
    for other in tower attic desk shed; do
        until_so "$machine" 'node("'$other'")["health"]["state"]' alive
    done
    for worker in tower attic; do until_so "$machine" 'state("'$worker'")' "['ready']"; done
done
versions='[(n["name"], n["protocol"]) for n in sorted(s["nodes"], key=lambda n: n["name"]) if n["protocol"]]'
until_so desk "$versions" "[('attic', 1), ('shed', 1), ('tower', 2)]"
until_so tower "$versions" "[('attic', 1), ('desk', 2), ('shed', 1)]"
for machine in desk tower shed attic; do
    until_so "$machine" 'all(n["control_round_trip_ms"] is not None for n in s["nodes"] if n["id"] != s["this_node"])' True
done
echo 'all are alive to all, connections have the versions that they should have, and the control plane answers'

say 'the old worker answers gateways of both builds'
ingle desk drain tower
for gateway in desk shed; do until_so $gateway 'state("tower")' "['draining']"; done
answers desk attic
answers shed attic
if refused=$(ingle desk drain attic 2>&1); then fail 'an old node is not drained by others'; fi
echo "$refused"

say 'the old worker is killed: its answer goes on at the new one'
stream desk "$work/moving" 100 &
moving=$!
begun "$work/moving"
ingle desk drain tower --undo
until_so desk 'state("tower")' "['ready']"
kill_9 attic
wait $moving
[ "$(node_of "$work/moving")" = attic ] || fail 'it did not begin at the old worker'
whole "$work/moving" 100
ingle desk explain last

say 'the new worker answers gateways of both builds'
until_so shed 'node("attic")["health"]["state"]' failed
answers desk tower
answers shed tower

say 'the new worker is killed: its answer goes on at the old one'
stream desk "$work/moving" 100 &
moving=$!
begun "$work/moving"
up attic
until_so desk 'state("attic")' "['ready']"
kill_9 tower
wait $moving
[ "$(node_of "$work/moving")" = tower ] || fail 'it did not begin at the new worker'
whole "$work/moving" 100
ingle desk explain last

say 'the killed one comes back by itself'
up tower
for machine in desk shed attic; do until_so $machine 'node("tower")["health"]["state"]' alive; done
say 'all well'
