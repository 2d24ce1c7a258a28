//! Descriptors that would lead out of the sandbox.
#![allow(unsafe_code)]

use std::{fs, os::fd::RawFd};

use crate::SandboxError;

/// Closes all descriptors but the standard ones: what whoever started the program has left open is not meant for it. To be
/// called first of all.
pub fn close_inherited() {
    let (first, last, no_flags): (libc::c_uint, libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX, 0);
    // Before Linux 5.9 they stay open, and those of directories are an error later.
    // SAFETY: it takes numbers only. Nothing in the process has opened a file yet, so nobody's is closed.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, no_flags) };
}

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
