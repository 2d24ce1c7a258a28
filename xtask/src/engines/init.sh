#!/bin/sh
# Process 1 of the guest that goes from engine to engine: the agent, a power button, and work that can be checked.
export PATH=/bin
/bin/busybox mount -t devtmpfs dev /dev 2>/dev/null
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
hostname purlin-test
echo 'root:x:0:0:root:/root:/bin/sh' >/etc/passwd
echo 'root:x:0:' >/etc/group

load() {
    for module; do
        insmod /lib/modules/"$module".ko* 2>/dev/null
    done
}
load virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk \
    vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport \
    crc32c_generic crc16 mbcache jbd2 ext4 button evdev
mkdir -p /disk
mount -t ext4 /dev/vda /disk || echo 'purlin-test: no disk'
purlin-agent >/dev/console 2>&1 &

# Whatever is written to it first is the power button.
(dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2>/dev/null && sync && poweroff -f) &

# Memory that is to stay what it is.
dd if=/dev/urandom of=/tmp/block bs=1M count=8 2>/dev/null
sha256sum /tmp/block >/tmp/sum

# The work: each step depends on all before it, is written to the disk, and said.
n=0 sum=begin
while :; do
    n=$((n + 1))
    set -- $(printf '%s %s' "$n" "$sum" | sha256sum)
    sum=$1
    echo "work $n $sum" >>/disk/work
    echo "work $n $sum"
    sleep 0.05
done
