#!/bin/sh
# mmdebstrap's last hook: $1 is the guest's root directory.
set -eu
root=$1

chroot "$root" systemctl --quiet enable systemd-networkd.service systemd-networkd-wait-online.service \
    systemd-resolved.service ssh-keys.service serial-getty@ttyS0.service purlin-agent.service
# sshd starts when somebody connects first, and ssh-keys.service before it: a clone that nobody connects to makes no keys.
chroot "$root" systemctl --quiet disable ssh.service
chroot "$root" systemctl --quiet enable ssh.socket
# Nobody looks at a virtual screen; maintenance that would take the package lock from the user's apt, or that looks after
# hardware, is there for who enables it.
chroot "$root" systemctl --quiet disable getty@tty1.service apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer e2scrub_reap.service systemd-pstore.service cloud-init-hotplugd.socket
# Programs for other processors are not there.
chroot "$root" systemctl --quiet mask systemd-binfmt.service proc-sys-fs-binfmt_misc.automount

# Each machine has its own: systemd makes an id where the file is empty (machine-id(5)), ssh-keys.service the keys.
rm -f "$root/etc/machine-id" "$root/var/lib/dbus/machine-id" "$root"/etc/ssh/ssh_host_*
: > "$root/etc/machine-id"
echo debian > "$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\tdebian\n::1\tlocalhost ip6-localhost ip6-loopback\n' > "$root/etc/hosts"
# The lists are as old as the image.
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/apt "$root"/var/log/*.log
