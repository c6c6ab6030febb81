#!/bin/sh
# Optional system packages (Debian or Ubuntu). Without them the exercises that need them are reported as skipped.
#   util-linux   lscpu, for the topology exercise        numactl   the binding that it suggests
#   iproute2     ip and tc, for the virtual cluster
set -eu
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install util-linux, numactl and iproute2 with your system's package manager" >&2
    exit 0
fi
missing=""
for package in util-linux numactl iproute2; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "needs root: sudo apt-get install -y$missing" >&2
    exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
