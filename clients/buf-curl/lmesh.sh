#!/usr/bin/env bash
# A client of lmesh over gRPC with the Buf CLI: ./lmesh.sh chat "What is a mesh?" (or: models, error, cancel, resume).
# Needs buf (pip install buf-bin) and jq.
set -euo pipefail

target=${LMESH_TARGET:-127.0.0.1:50051}
model=${LMESH_MODEL:-smollm2-135m-instruct}
schema=$(cd "$(dirname "$0")/../../protos" && pwd)

# call METHOD JSON: the answer's messages as JSON, each as it comes; a failure as JSON on stderr.
call() {
    buf curl --schema "$schema" --protocol grpc --http2-prior-knowledge --data "$2" \
        ${LMESH_API_KEY:+--header "x-api-key: $LMESH_API_KEY"} \
        "http://$target/lmesh.inference.v1.InferenceService/$1"
}

# request QUESTION [FIELDS]: a greedy conversation of one turn; FIELDS is JSON that is laid over it.
request() {
    jq -n --arg model "$model" --arg question "$1" --argjson fields "${2:-{\}}" '{
        model: $model,
        chat: {messages: [{role: "user", content: $question}]},
        sampling: {temperature: 0},
        stop: {max_tokens: 128}
    } * $fields'
}

# The text as it comes, and the usage at the end.
show() {
    jq --unbuffered --raw-output --join-output '
        if .delta then .delta.text // ""
        elif .finish then .finish.usage | "\nusage: prompt=\(.promptTokens) (cached \(.cachedTokens // 0)) new=\(.completionTokens)\n"
        else "" end'
}

# One line: the code, the stable reason where the server gave one, and the message for people. The reason is the first
# field of google.rpc.ErrorInfo, which buf shows undecoded.
show_error() {
    jq --raw-output '
        ([.details[]? | select(.type == "google.rpc.ErrorInfo") | .value | @base64d
          | " reason=" + capture("(?<reason>[A-Z][A-Z0-9_]+)").reason] | first // "") as $reason
        | "error: \(.code | ascii_upcase)\($reason): \(.message)"'
}

# stream METHOD JSON: the answer, or one line about a failure and exit status 1.
stream() {
    if ! call "$1" "$2" 2> >(show_error >&2) | show; then
        wait # for the line
        return 1
    fi
}

chat() { # streams an answer
    stream Generate "$(request "$1")"
}

error() { # asks for a model that is not there
    { call Generate "$(request "$1" '{"model": "no-such-model"}')" || true; } 2>&1 | show_error
}

new_id() { python3 -c 'import uuid; print(uuid.uuid4())'; }

cancel() { # ends a request from another call, by its id; its own stream then ends with CANCELLED
    local id event ended
    id=$(new_id)
    ended=$(mktemp)
    exec 3< <(call Generate "$(request "$1" "{\"request_id\": \"$id\", \"stop\": {\"max_tokens\": 2000, \"ignore_eos\": true}}")" 2>"$ended" |
        jq --unbuffered --compact-output .)
    while read -r event <&3 && [[ $event != *tokenIds* ]]; do :; done
    call Cancel "{\"request_id\": \"$id\"}" >/dev/null
    cat <&3 >/dev/null
    show_error <"$ended"
    rm -f "$ended"
}

resume() { # breaks off a stream that was detached from its client, and asks for the rest of it
    local id event cursor reader ended
    id=$(new_id)
    ended=$(mktemp)
    local detached='"on_disconnect": "ON_DISCONNECT_DETACH", "detach_ttl": "60s"'
    exec 3< <(exec buf curl --schema "$schema" --protocol grpc --http2-prior-knowledge \
        ${LMESH_API_KEY:+--header "x-api-key: $LMESH_API_KEY"} \
        --data "$(request "$1" "{\"request_id\": \"$id\", $detached}")" \
        "http://$target/lmesh.inference.v1.InferenceService/Generate" 2>"$ended")
    reader=$!
    if ! event=$(jq --compact-output --null-input 'first(inputs | select(.delta.tokenIds))' <&3) || [ -z "$event" ]; then
        show_error <"$ended" >&2
        return 1
    fi
    cursor=$(jq '.delta.tokenIds | length' <<<"$event")
    show <<<"$event"
    kill "$reader" 2>/dev/null || true # as a broken connection would
    printf '\n-- lost the stream after %s tokens --\n' "$cursor"
    stream Resume "{\"request_id\": \"$id\", \"cursor\": [$cursor]}"
}

models() { # lists the models
    call ListModels '{}' | jq --raw-output '.models[] | "\(.id): context \(.maxModelLen), workers \(.workers)"'
}

case ${1:-} in
chat | error | cancel | resume | models) "$1" "${2:-What is the capital of France?}" ;;
*)
    echo "usage: $0 models|chat|error|cancel|resume [question]" >&2
    exit 2
    ;;
esac
