#!/usr/bin/env bash
# One GPU machine as a cluster: k3s, which finds NVIDIA's container runtime by itself.
#
# Prerequisites  root; NVIDIA driver (nvidia-smi works); nvidia-container-toolkit installed; k3s's installer, read first
#                and saved as ./install-k3s.sh
# Start    sudo bash ch08_kubernetes/setup/k3s-gpu.sh
# Check    kubectl get nodes; kubectl get runtimeclass nvidia
# Clean    sudo k3s-uninstall.sh
set -euo pipefail

nvidia-smi --list-gpus || { echo "error: no GPU is seen; install the driver, then run this again" >&2; exit 2; }
command -v nvidia-container-runtime >/dev/null ||
    { echo "error: nvidia-container-runtime is missing; install nvidia-container-toolkit" >&2; exit 2; }
[ -f install-k3s.sh ] || { echo "error: ./install-k3s.sh is missing; save k3s's installer under this name" >&2; exit 2; }

# With nvidia as the default runtime no pod needs a runtimeClassName.
INSTALL_K3S_EXEC="--default-runtime=nvidia --write-kubeconfig-mode=600" sh install-k3s.sh
KUBECONFIG=/etc/rancher/k3s/k3s.yaml kubectl wait --for=condition=Ready node --all --timeout=120s ||
    { echo "error: the node is not ready after 120 s; see journalctl -u k3s" >&2; exit 2; }
