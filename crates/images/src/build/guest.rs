//! What a Debian guest is made of: packages, and files of ours.

/// The packages, beside those that Debian calls essential. What they only recommend is left out.
pub const PACKAGES: [&str; 23] = [
    // A kernel for virtual machines, and how it comes to its root.
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "e2fsprogs",
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
    "libpam-systemd",
    "libnss-myhostname",
    "dbus",
    "udev",
    "openssh-server",
    "cloud-init",
    "ca-certificates",
    // What one expects on a server.
    "iproute2",
    "iputils-ping",
    "netbase",
    "procps",
    "less",
    "nano",
    "sudo",
    "bash-completion",
];

/// Files of ours, as they are in `guest/`: their paths in the guest, and contents.
pub const FILES: &[(&str, &str)] = &[
    ("etc/apt/apt.conf.d/90no-languages", include_str!("guest/etc/apt/apt.conf.d/90no-languages")),
    ("etc/cloud/cloud.cfg.d/90_purlin.cfg", include_str!("guest/etc/cloud/cloud.cfg.d/90_purlin.cfg")),
    ("etc/cloud/cloud.cfg.d/91_datasource.cfg", include_str!("guest/etc/cloud/cloud.cfg.d/91_datasource.cfg")),
    ("etc/cloud/ds-identify.cfg", include_str!("guest/etc/cloud/ds-identify.cfg")),
    ("etc/default/locale", include_str!("guest/etc/default/locale")),
    ("etc/fstab", include_str!("guest/etc/fstab")),
    ("etc/initramfs-tools/conf.d/purlin", include_str!("guest/etc/initramfs-tools/conf.d/purlin")),
    ("etc/kernel/cmdline", include_str!("guest/etc/kernel/cmdline")),
    ("etc/profile.d/purlin-console.sh", include_str!("guest/etc/profile.d/purlin-console.sh")),
    ("etc/ssh/sshd_config.d/purlin.conf", include_str!("guest/etc/ssh/sshd_config.d/purlin.conf")),
    ("etc/systemd/network/80-ethernet.network", include_str!("guest/etc/systemd/network/80-ethernet.network")),
    ("etc/systemd/system.conf.d/purlin.conf", include_str!("guest/etc/systemd/system.conf.d/purlin.conf")),
    ("etc/systemd/system/cloud-init-local.service", include_str!("guest/etc/systemd/system/cloud-init-local.service")),
    ("etc/systemd/system/cloud-init.service", include_str!("guest/etc/systemd/system/cloud-init.service")),
    (
        "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
        include_str!("guest/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf"),
    ),
    (
        "etc/systemd/system/serial-getty@hvc0.service.d/autologin.conf",
        include_str!("guest/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf"),
    ),
    ("etc/systemd/system/purlin-agent.service", purlin_agent::UNIT),
    ("etc/systemd/system/ssh-keys.service", include_str!("guest/etc/systemd/system/ssh-keys.service")),
    (
        "etc/systemd/system/systemd-networkd-wait-online.service.d/no-card.conf",
        include_str!("guest/etc/systemd/system/systemd-networkd-wait-online.service.d/no-card.conf"),
    ),
    ("usr/share/initramfs-tools/modules.d/purlin", include_str!("guest/usr/share/initramfs-tools/modules.d/purlin")),
];
