#!/bin/sh
# Makes a bootable file system of Debian packages. It runs as root, be it of a user namespace or of fakeroot, in the
# directory that has sources, apt.conf, files/ (what goes into the guest as it is) and customize.sh.
#
# Environment: SUITE, MODE (mmdebstrap's), PACKAGES, SIZE (of the disk), UUID, EPOCH (nothing is newer), DISK (the
# file to make).
set -eu
umask 022
root=$PWD/root

echo "purlin: step installing the base system"
mmdebstrap --verbose --mode="$MODE" --variant=apt --format=directory --architectures=amd64 \
    --include="$PACKAGES" \
    --aptopt="$PWD/apt.conf" --dpkgopt='force-unsafe-io' \
    --essential-hook='cp -a files/. "$1"/' \
    --essential-hook='echo "purlin: step installing packages"' \
    --customize-hook="$PWD/customize.sh" \
    "$SUITE" "$root" "$PWD"/sources/*.sources

echo "purlin: step making the disk"
# fakechroot leaves symbolic links that lead through this host.
find "$root" -type l -lname "$root/*" -exec sh -c '
    root=$1; shift
    for link; do target=$(readlink "$link"); ln -sfn "${target#"$root"}" "$link"; done' sh "$root" {} +
# Not by apt itself: mmdebstrap put there what this host needs.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
find "$root" -newermt "@$EPOCH" -exec touch --no-dereference --date "@$EPOCH" {} +

# Inode tables are not left for the guest to zero (lazy_itable_init): a new file has zeroes already.
E2FSPROGS_FAKE_TIME=$EPOCH mke2fs -q -t ext4 -F -d "$root" -L purlin-root -U "$UUID" \
    -E "hash_seed=$UUID,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,assume_storage_prezeroed=1" \
    "$DISK" "$SIZE"
rm -rf "$root"
