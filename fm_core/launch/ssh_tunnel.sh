#!/bin/sh
# Connection to one host of a job, run by pdsh on the submitting host; the other end is node_agent.py.
#
# The node specification goes in, then a heartbeat every four seconds for as long as the job may go on; the
# output of the host comes out. The connection ends when STOP appears, when the ranks of another host have stopped,
# when another host is lost (then it sends "lost"), or with pdsh.
host=$1 control=$2 job=$3 command=$4
# An anonymous file that pdsh holds open.
pdsh=$PPID spec=/proc/$PPID/fd/$FM_NODE_SPEC
unset FM_NODE_SPEC
login=$host
for other in $FM_LOGINS; do [ "${other#*@}" != "$host" ] || login=$other; done

adopted() { grep -qs "$job" "$control/job.json"; }
lost() { [ -e "$control/$job.lost" ]; }
# A separate file: STOP, if written after the supervisor has removed it, would end the next start.
stopped() { [ -e "$control/STOP" ] || [ -e "$control/$job.stopped" ]; }
over() { stopped || lost || ! kill -0 "$pdsh" 2>/dev/null; }

send() {
    # If the supervisor was killed before it wrote job.json, no later start could find this job.
    waited=0
    until adopted; do
        if over || [ $((waited += 1)) -gt 300 ]; then return; fi
        sleep 0.1
    done
    cat "$spec"
    second=0
    until over; do
        if [ $((second % 4)) -eq 0 ]; then
            # Fails when ssh has ended, because pdsh and this shell ignore SIGPIPE.
            echo 2>/dev/null || return
        fi
        second=$((second + 1))
        sleep 1
    done
    if lost && ! stopped; then echo lost; fi
}

# ssh probes the remote side only after three seconds in which nothing was sent, heartbeats included.
messages="$control/$job.$host.ssh" # ssh's own messages, separate from the output that it carries
send | ssh -E "$messages" -o LogLevel=INFO -o BatchMode=yes -o ConnectTimeout=10 \
    -o ServerAliveInterval=3 -o ServerAliveCountMax=4 "$login" "$command"
code=$?
case $code in
0) ;;
3) lost || touch "$control/$job.stopped" ;; # Ranks there were asked to stop: so are the others.
*) echo "$host $code $(grep -v ^Warning: "$messages" | tail -n 1)" >>"$control/$job.lost" ;;
esac
rm -f "$messages"
exit "$code"
