# What the Slurm jobs of chapters 6 and 7 do, one task a node: source job.sh LAUNCH_SCRIPT PORT MODEL ...
launch=$1 port=$2
shift 2
if [ ! -f "$launch" ] || [ -z "${1:-}" ]; then
    echo "error: there is no $launch, or no MODEL; name the model behind $SLURM_JOB_NAME.sbatch" >&2
    exit 2
fi
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# An address, not a name: on many systems a node's own name is its loopback address to itself.
MASTER_ADDR=$(srun --nodes=1 --ntasks=1 --nodelist="$first_node" hostname -I | awk '{print $1}')
export MASTER_ADDR NNODES="$SLURM_JOB_NUM_NODES"
echo "http://$MASTER_ADDR:$port once it is ready"
# shellcheck disable=SC2016 # each task asks for its own number
srun --kill-on-bad-exit=1 --cpu-bind=none bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' task "$launch" "$@" --host 0.0.0.0
