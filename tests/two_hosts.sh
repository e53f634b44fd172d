# Two hosts, each a network namespace of its own, joined by a cable that is unplugged when a line comes in; they run to
# their end where none comes. Each has files of its own where a command mounts some.
# Arguments: a command; run with NODE=0 or 1, HOST=10.9.0.1 and the name of its interface in IFNAME.
set -e
ip link set lo up
unshare --net sleep 300 &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add va type veth peer name vb
ip link set vb netns $other
ip address add 10.9.0.1/24 dev va
ip link set va up
nsenter --target $other --net sh -c "ip link set lo up; ip address add 10.9.0.2/24 dev vb; ip link set vb up"
NODE=0 HOST=10.9.0.1 IFNAME=va unshare --mount "$@" &
first=$!
NODE=1 HOST=10.9.0.1 IFNAME=vb nsenter --target $other --net unshare --mount "$@" >&2 &
second=$!
if read -r line; then
    if [ "$CUT" = quietly ]; then
        nsenter --target $other --net ip address flush dev vb  # the cable's other end stays as it was, as at a switch
    else
        ip link set va down
    fi
fi
wait $first || echo "host 0 ended with $?"
wait $second || echo "host 1 ended with $?"
kill $other
