//! Descriptors that would lead out of the sandbox.

use std::{fs, os::fd::RawFd};

use crate::SandboxError;

/// An error if a directory is open that is not one of `allowed`: `openat` with it would find what the new root hides.
pub(crate) fn check(allowed: &[RawFd]) -> Result<(), SandboxError> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return Ok(()) };
    // Collected first: the listing has a descriptor itself, which is gone by then.
    let open: Vec<RawFd> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| !allowed.contains(fd)) {
        let link = format!("/proc/self/fd/{fd}");
        if fs::metadata(&link).is_ok_and(|metadata| metadata.is_dir()) {
            let path = fs::read_link(&link).unwrap_or_default();
            return Err(SandboxError::OpenDirectory { fd, path });
        }
    }
    Ok(())
}
