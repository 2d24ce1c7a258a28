//! A root of the process's own, which has nothing but the plan's paths.
//!
//! It is a small tmpfs with a mount of each path at the same place; the old root is unmounted behind it. Mounts are made
//! by descriptors (Linux 5.12), all of them from the old root before anything covers it, so no name is looked up twice.
//!
//! There is no /proc: it tells too much of other processes to one of the same user, and has many files by which the kernel
//! is told something. What misses it: `/proc/self/exe`, so that no program can be started, and backtraces without names.

use std::path::{Component, Path};

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, mkdirat, openat, statat},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
    },
    process::{chdir, chroot, fchdir, pivot_root},
    thread::UnshareFlags,
};

use crate::{Access, Layer, Plan, Reachable, Report, SandboxError, error::host, namespaces};

/// Gives the process a root of its own, where the host lets it.
pub(crate) fn change(plan: &Plan, report: &mut Report) -> Result<(), SandboxError> {
    let unshared = namespaces::unshare(UnshareFlags::NEWNS)
        .and_then(|()| mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))
        .and_then(|()| new_tmpfs());
    match unshared {
        Ok(root) => {
            fill_and_enter(&root, plan)?;
            report.add(Layer::Root);
        }
        Err(error) => report.lacks(Layer::Root, namespaces::reason("mounts of its own", error)),
    }
    // The filters have no system call for it later.
    plan.working_directory
        .as_ref()
        .map_or(Ok(()), |path| chdir(path).map_err(|error| SandboxError::Path { path: path.clone(), error }))
}

/// The new root, mounted nowhere yet. Fails on kernels that cannot do the rest either.
fn new_tmpfs() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_set_string(&context, "size", "256k")?;
    fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    set_attributes(root.as_fd(), attributes, 0)?;
    Ok(root)
}

fn fill_and_enter(root: &OwnedFd, plan: &Plan) -> Result<(), SandboxError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| SandboxError::Path { path, error }
    };
    let paths = plan.outermost_first();
    let mounts: Vec<_> =
        paths.iter().map(|reachable| copy(reachable).map_err(failed(&reachable.path))).collect::<Result<_, _>>()?;
    // Over the old root: who looks up absolute names still begins below it, and pivot_root takes it from there.
    let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root, "", CWD, "/", onto).map_err(host("mount a new root"))?;
    for (reachable, mount) in paths.iter().zip(&mounts) {
        place(root, &reachable.path, mount).map_err(failed(&reachable.path))?;
    }
    // The old root comes to lie on the new one, and is taken off.
    fchdir(root).map_err(host("enter the new root"))?;
    match pivot_root(".", ".") {
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(host("unmount the old root"))?,
        // A host that runs from its initramfs: that can be neither left nor unmounted (pivot_root(2)), only covered, as the
        // new root does. What is below it has no name any more, and `enter` lets no directory be open that would be a way.
        Err(Errno::INVAL) => chroot(".").map_err(host("change the root"))?,
        Err(error) => return Err(host("change the root")(error)),
    }
    chdir("/").map_err(host("enter the new root"))?;
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY;
    set_attributes(root.as_fd(), read_only, 0).map_err(host("make the new root read-only"))
}

/// A mount of what is at a path, with all that is mounted in it, which allows what the plan does.
fn copy(Reachable { path, access }: &Reachable) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, path, flags)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    match access {
        Access::Read => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV,
        Access::ReadWrite => attributes |= MountAttrFlags::MOUNT_ATTR_NODEV,
        Access::Device => {}
    }
    if matches!(file_type(&tree)?, FileType::CharacterDevice | FileType::BlockDevice) {
        attributes -= MountAttrFlags::MOUNT_ATTR_NODEV;
    }
    set_attributes(tree.as_fd(), attributes, libc::AT_RECURSIVE)?;
    Ok(tree)
}

fn file_type(file: &OwnedFd) -> Result<FileType, Errno> {
    Ok(FileType::from_raw_mode(fstat(file)?.st_mode))
}

/// Mounts `mount` at `path` below the new root. What is in a path that is mounted already is found there.
fn place(root: &OwnedFd, path: &Path, mount: &OwnedFd) -> Result<(), Errno> {
    let is_directory = file_type(mount)? == FileType::Directory;
    let mut directory = root.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?;
    let mut parts = path.components().filter(|part| matches!(part, Component::Normal(_))).peekable();
    while let Some(part) = parts.next() {
        let name = part.as_os_str();
        let last = parts.peek().is_none();
        if last && !is_directory {
            make_file(&directory, name)?;
            return move_mount(mount, "", &directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
        }
        directory = make_directory(&directory, name)?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", &directory, "", flags)
}

/// A file to mount on, unless there is one.
fn make_file(directory: &OwnedFd, name: &std::ffi::OsStr) -> Result<(), Errno> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(()),
        Err(_) => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(directory, name, flags, Mode::from_raw_mode(0o444)).map(drop)
        }
    }
}

/// The directory of this name, made if it is not there.
fn make_directory(directory: &OwnedFd, name: &std::ffi::OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(directory, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            mkdirat(directory, name, Mode::from_raw_mode(0o755))?;
            openat(directory, name, flags, Mode::empty())
        }
        other => other,
    }
}

/// Sets attributes of a mount; none is taken from it. (rustix has no mount_setattr(2).)
fn set_attributes(mount: BorrowedFd<'_>, set: MountAttrFlags, recursive: libc::c_int) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let flags = libc::AT_EMPTY_PATH | recursive;
    let attributes = libc::mount_attr { attr_set: set.bits().into(), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let size = size_of_val(&attributes);
    // SAFETY: the path is an empty string, the structure is as long as is said, and both outlive the call.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, &raw const attributes, size)
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}
