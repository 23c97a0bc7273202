#!/usr/bin/env bash
# In the guest: two daemons with a CSI driver each, which are called as Kubernetes calls them.
# usage: guest-csi.sh DIRECTORY SCENARIO
set -u
# The daemons name it as their host, and reach each other by it.
busybox hostname guest
mkdir -p /mnt/csi
status=0
"$2" /mnt/csi || status=$?
if ((status == 0)); then
    echo "guest: passed"
    exit
fi
# What is mounted on a device whose daemon is gone keeps the guest from ending in order.
sleep 0.3
echo "$status" >"$GUEST_STATUS"
sync "$GUEST_STATUS"
busybox poweroff -n -f
