#!/bin/bash
# The batch script of a job: one node_agent.py on each node. Arguments: the command of a node agent.
#
# Shortly before the time limit Slurm sends USR1: the ranks save and exit, and the job is requeued.
# After a preemption or the loss of a node Slurm requeues it automatically.
notice=
trap 'notice=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1

FM_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
export FM_HOSTS
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --kill-on-bad-exit=1 --input=none --label "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the trap has interrupted the wait
    wait "$step"
    code=$?
done
if [ -n "$notice" ] && [ "$code" -ne 0 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
