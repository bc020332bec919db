#!/bin/sh
# one-gpu COMMAND...: runs COMMAND with one GPU that no other replica on this host has. Docker gives every replica of a
# service the same devices, so the replicas share them out by locks in a folder that all of them mount. The lock is an
# open file of COMMAND's own: it goes with the process, however that ends.
set -eu
folder=${LMESH_GPU_LOCKS:-/run/lmesh-gpus}
gpus=$(nvidia-smi --query-gpu=uuid --format=csv,noheader)
for gpu in $gpus; do
    exec 9>"$folder/$gpu"
    if flock --nonblock 9; then
        export CUDA_VISIBLE_DEVICES="$gpu"
        exec "$@"
    fi
done
echo "one-gpu: every GPU of this host has a replica already:" $gpus >&2
exit 1
