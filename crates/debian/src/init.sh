#!/bin/sh
# Process 1 of the guest that `purlin run shell` boots: a shell on the console, and power-off when it ends.
export PATH=/bin HOME=/root SHELL=/bin/sh

/bin/busybox mount -t devtmpfs dev /dev 2>/dev/null
/bin/busybox --install -s /bin
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/mounts /etc/mtab
hostname purlin
ip link set lo up 2>/dev/null

echo 'root:x:0:0:root:/root:/bin/sh' >/etc/passwd
echo 'root:x:0:' >/etc/group
cat >/etc/profile <<'PROFILE'
PS1='\u@\h:\w\$ '
alias ll='ls -l'
PROFILE

# What the machine's devices need, in this order, where the kernel does not have it built in.
load() {
    for module; do
        insmod /lib/modules/"$module".ko* 2>/dev/null
    done
}
load pvpanic pvpanic-mmio
if grep -q 0x1af4 /sys/bus/pci/devices/*/vendor 2>/dev/null; then
    load virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_console
    # The others only where there is such a device (virtio 1.3, 5, "Device Types"): a module takes its time.
    for device in /sys/bus/virtio/devices/*/device; do
        case $(cat "$device") in
            0x0001) load failover net_failover virtio_net ;;
            0x0002) load virtio_blk ;;
            0x0005) load virtio_balloon ;;
            0x0013) load vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport ;;
        esac
    done
    # A console that only came with its module is opened now, and stays open: a last close would throw away what has
    # been typed. (Where there is none, a failed exec would be this shell's end.)
    [ -s /sys/class/tty/console/active ] && exec </dev/console >/dev/console 2>&1
fi

# busybox's halt, poweroff and reboot send these to process 1.
trap 'poweroff -f' USR1 USR2
trap 'reboot -f' TERM

# The terminal's size, which a serial line does not tell: purlin puts it on the kernel's command line, and what the
# kernel does not know it hands to process 1 as environment.
console=/dev/$(sed 's/.* //' /sys/class/tty/console/active)
stty sane <"$console"
[ -n "$LINES" ] && [ -n "$COLUMNS" ] && stty rows "$LINES" cols "$COLUMNS" <"$console"
unset LINES COLUMNS

echo
echo "Linux $(uname -r), $(nproc) CPU(s), $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB of memory." \
    "'poweroff' ends it."
cd /root || cd /
# Beside this shell, so that the traps above work; but not with "&", which would have it and its children ignore SIGINT,
# nor by login, which throws away what came through a pipe before it ran. The outer setsid makes the inner one the leader
# of a session, which must fork to make another one.
setsid setsid -c sh -c 'sh -l; sync; poweroff -f' <"$console" >"$console" 2>&1
while :; do
    sleep 3600 &
    wait $!
done
