#!/usr/bin/env bash
# GPUs that the cluster can give out, and a product on one of them.
#
# Prerequisites  kubectl, with a cluster; the image of images/Dockerfile where verify-gpu.yaml says
# Start    bash ch08_kubernetes/setup/verify-gpu.sh
# Check    its last line: "ok"
# Clean    it deletes its pod itself
set -euo pipefail
here=$(dirname "$0")
kubectl version --request-timeout=10s >/dev/null || { echo "error: no cluster answers; set KUBECONFIG" >&2; exit 2; }
gpus=$(kubectl get nodes -o jsonpath='{range .items[*]}{.status.allocatable.nvidia\.com/gpu}{"\n"}{end}' | awk '{n += $1} END {print n + 0}')
if [ "$gpus" -eq 0 ]; then
    echo "error: no node offers nvidia.com/gpu; is the device plugin running? see kubectl -n gpu-operator get pods" >&2
    exit 2
fi
echo "$gpus GPUs"
trap 'kubectl delete -f "$here/verify-gpu.yaml" --ignore-not-found --wait=false >/dev/null' EXIT
kubectl apply -f "$here/verify-gpu.yaml"
if ! kubectl wait --for=jsonpath='{.status.phase}'=Succeeded pod/verify-gpu --timeout=300s; then
    kubectl describe pod verify-gpu | tail -20 >&2
    kubectl logs verify-gpu >&2 || true
    echo "error: the pod did not succeed in 300 s; see its events above" >&2
    exit 1
fi
kubectl logs verify-gpu
echo ok
