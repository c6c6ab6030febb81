#!/bin/sh
# Optional system packages (Debian or Ubuntu). Without them the exercises that need them are reported as skipped.
#   util-linux   lscpu, for the topology exercise        numactl           the binding that it suggests
#   iproute2     ip and tc, for the virtual cluster      slurm-wlm, munge  a Slurm of our own on it, in chapter 3
#   libaio-dev   for DeepSpeed's NVMe offload, chapter 5     g++                compiles it
#   pdsh         starts the ranks of the deepspeed launcher on other hosts, chapter 5
#   wrk          loads the routers of chapter 7, which a client in Python cannot
#   dpkg-dev, xz-utils   unpack the sources of chapter 8's control plane     openssl   makes its key
#   prometheus, redis-server   answer chapter 8's queries and hold its queue; started by the exercises alone
set -eu
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install util-linux, numactl, iproute2, slurm, munge, libaio, g++, pdsh, wrk, openssl, prometheus and redis with your system's package manager" >&2
    exit 0
fi
missing=""
for package in util-linux numactl iproute2 munge slurmctld slurmd slurm-client libaio-dev g++ pdsh wrk dpkg-dev xz-utils openssl prometheus redis-server; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ]; then
    echo "needs root: sudo apt-get install -y$missing" >&2
    exit 1
fi
# The packages bring services; we start Slurm's daemons ourselves, and only for an exercise: none now, and none at boot.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
for service in munge slurmctld slurmd prometheus redis-server; do
    case " $missing " in
    *" $service "*) systemctl disable --quiet "$service" 2>/dev/null || true ;;
    esac
done
