#!/bin/sh
# Process 1 of the guests that the boot tests start: says what it sees, and powers off.
export PATH=/bin
echo 'purlin-test: userspace'
/bin/busybox mount -t devtmpfs dev /dev 2>/dev/null
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
echo "purlin-test: cpus $(nproc)"
echo "purlin-test: kernel $(uname -rm)"
echo "purlin-test: clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
# Levels 0 (emergency) to 4 (warning).
dmesg -r | sed -n 's/^<[0-4]>/purlin-test: warning /p'
echo 'purlin-test: done'
poweroff -f
