#!/usr/bin/env bash
# A GPU node pool in a managed cluster that you have: tainted, labelled, from 0 to 4 nodes by the cluster's autoscaler.
#
# Prerequisites  the cloud's command line, logged in; a quota of GPUs; CLUSTER, and REGION, ZONE or GROUP as below
# Start    CLUSTER=book REGION=us-east-1 bash ch08_kubernetes/setup/managed.sh eks
#          CLUSTER=book ZONE=us-central1-a bash ch08_kubernetes/setup/managed.sh gke
#          CLUSTER=book GROUP=book bash ch08_kubernetes/setup/managed.sh aks
# Check    kubectl get nodes -L nvidia.com/gpu.product
# Clean    the same with `delete` behind it: no node of the pool is paid for any longer
set -euo pipefail

cloud=${1:-} action=${2:-create} pool=gpus
: "${CLUSTER:?which cluster? set it}"
case "$cloud-$action" in
eks-create)
    # Taints that a pool begins with reach nodes before any pod does.
    eksctl create nodegroup --cluster "$CLUSTER" --region "${REGION:?which region? set it}" --name "$pool" \
        --node-type g6.xlarge --nodes 1 --nodes-min 0 --nodes-max 4 --node-labels book/pool=gpus
    aws eks update-nodegroup-config --region "$REGION" --cluster-name "$CLUSTER" --nodegroup-name "$pool" \
        --taints 'addOrUpdateTaints=[{key=nvidia.com/gpu,value=present,effect=NO_SCHEDULE}]'
    ;;
eks-delete) eksctl delete nodegroup --cluster "$CLUSTER" --region "${REGION:?which region? set it}" --name "$pool" ;;
gke-create)
    # GKE taints GPU nodes nvidia.com/gpu=present:NoSchedule itself; the GPU Operator shall install the driver.
    gcloud container node-pools create "$pool" --cluster "$CLUSTER" --zone "${ZONE:?which zone? set it}" \
        --machine-type g2-standard-8 --accelerator type=nvidia-l4,count=1,gpu-driver-version=disabled \
        --num-nodes 1 --enable-autoscaling --min-nodes 0 --max-nodes 4
    ;;
gke-delete) gcloud container node-pools delete "$pool" --cluster "$CLUSTER" --zone "${ZONE:?which zone? set it}" --quiet ;;
aks-create)
    az aks nodepool add --cluster-name "$CLUSTER" --resource-group "${GROUP:?which resource group? set it}" \
        --name "$pool" --node-vm-size Standard_NC24ads_A100_v4 --node-count 1 --enable-cluster-autoscaler \
        --min-count 0 --max-count 4 --node-taints nvidia.com/gpu=present:NoSchedule --gpu-driver none
    ;;
aks-delete) az aks nodepool delete --cluster-name "$CLUSTER" --resource-group "${GROUP:?which group? set it}" --name "$pool" ;;
*) echo "error: '$cloud $action' is nothing this knows; say eks, gke or aks, and create or delete" >&2; exit 2 ;;
esac
