#!/bin/sh
# One host of a job, run by pdsh on the submitting host: the line to what works there (node_agent.py).
#
# The order goes in, then a beat every four seconds for as long as the job may go on; what the host says
# comes out. The line ends when STOP appears, when another host is lost (then it says so), or with pdsh.
host=$1 control=$2 job=$3 command=$4
order=$FM_ORDER pdsh=$PPID
unset FM_ORDER

adopted() { grep -qs "$job" "$control/job.json"; }
lost() { [ -e "$control/$job.lost" ]; }
over() { [ -e "$control/STOP" ] || lost || ! kill -0 "$pdsh" 2>/dev/null; }

line() {
    # A supervisor that was killed before it wrote job.json has no job: nobody would know of it.
    waited=0
    until adopted; do
        if over || [ $((waited += 1)) -gt 300 ]; then return; fi
        sleep 0.1
    done
    printf '%s\n' "$order"
    second=0
    until over; do
        if [ $((second % 4)) -eq 0 ]; then
            # It fails when ssh has ended: pdsh ignores the signal of a broken pipe, and so does this.
            echo 2>/dev/null || return
        fi
        second=$((second + 1))
        sleep 1
    done
    if lost && ! [ -e "$control/STOP" ]; then echo lost; fi
}

# ssh asks whether the far side lives only after three seconds in which nothing else moved, beats included.
words="$control/$job.$host.ssh" # what ssh itself says, apart from what it carries
line | ssh -E "$words" -o LogLevel=INFO -o BatchMode=yes -o ConnectTimeout=10 \
    -o ServerAliveInterval=3 -o ServerAliveCountMax=4 "$host" "$command"
code=$?
case $code in
0) ;;
3) lost || touch "$control/STOP" ;; # Ranks there were asked to stop: so are the others.
*) echo "$host $code $(grep -v ^Warning: "$words" | tail -n 1)" >>"$control/$job.lost" ;;
esac
rm -f "$words"
exit "$code"
