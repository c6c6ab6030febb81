"""A Kubernetes cluster to learn and to test on: one of yours, kind in Docker, or a control plane on this machine."""
