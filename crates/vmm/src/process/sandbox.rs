//! The sandbox of a VM's process: what it can reach once its machine is about to be made.

use std::{
    fs,
    path::{Path, PathBuf},
};

use purlin_api::{ErrorBody, vm};
use rustix::fs::{Gid, Uid};

use super::start::failed;
use crate::sandbox::{self, Access, Identity, Plan, Reachable, Report};

/// Gives everything up but what the machine in `dir` needs; `dir` is the working directory before and after.
pub fn enter(dir: &Path, spec: &vm::Spec) -> Result<Report, ErrorBody> {
    sandbox::enter(&plan(dir, spec)?).map_err(failed)
}

fn plan(dir: &Path, spec: &vm::Spec) -> Result<Plan, ErrorBody> {
    let mut paths = vec![reachable(dir, Access::ReadWrite)];
    let outside = |path: &&PathBuf| !dir.join(path).starts_with(dir);
    let restored = match &spec.origin {
        vm::Origin::Snapshot { file } => Some(file),
        vm::Origin::Boot | vm::Origin::Clone { .. } => None,
    };
    let boot = [&spec.kernel].into_iter().chain(&spec.initrds).chain(&spec.backing).chain(restored).filter(outside);
    paths.extend(boot.map(|path| reachable(path, Access::Read)));
    for disk in spec.own_disks.iter().chain(&spec.machine.disks).filter(|disk| outside(&&disk.path)) {
        let access = if disk.read_only { Access::Read } else { Access::ReadWrite };
        paths.push(reachable(&disk.path, access));
    }
    let identity = identity(dir, spec)?;
    let working_directory = Some(dir.to_owned());
    Ok(Plan { paths, working_directory, ..sandbox::plan(identity) })
}

fn reachable(path: &Path, access: Access) -> Reachable {
    Reachable { path: path.to_owned(), access }
}

/// A privileged daemon's machine becomes a user of its own, whose the directory is from then on. Where it has disks of
/// others, they are root's, and so it stays root, with no privilege.
fn identity(dir: &Path, spec: &vm::Spec) -> Result<Option<Identity>, ErrorBody> {
    if !spec.machine.disks.is_empty() {
        return Ok(None);
    }
    // By the directory's name, which is the machine's identity: the same at each run.
    let own = sandbox::own_user(dir.file_name().unwrap_or_default().as_encoded_bytes());
    if let Some(own) = own {
        give(dir, own).map_err(|e| failed(format!("cannot give {} to its machine's user: {e}", dir.display())))?;
    }
    Ok(own)
}

/// A directory of files, no deeper.
fn give(dir: &Path, Identity { uid, gid }: Identity) -> std::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let entries = fs::read_dir(dir)?.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
    for path in entries.iter().map(PathBuf::as_path).chain([dir]) {
        // What an earlier run of it has put there may be a link.
        rustix::fs::chownat(rustix::fs::CWD, path, Some(uid), Some(gid), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}
