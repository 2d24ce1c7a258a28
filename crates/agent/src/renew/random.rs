//! The kernel's random numbers (random(4)): a copy of a machine would have the same ones.
#![allow(unsafe_code)]

use std::{fs::File, io};

use purlin_agent::protocol::{Failed, FailureKind};
use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};

/// The most bytes of a seed.
const MOST: usize = 512;

/// `RNDADDENTROPY`, `_IOW('R', 0x03, int[2])`.
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
/// `RNDRESEEDCRNG`, `_IO('R', 0x07)`; Linux 4.14 and later.
const RESEED: Opcode = opcode::none(b'R', 0x07);

/// `struct rand_pool_info` with room for a seed.
#[repr(C)]
struct PoolInfo {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; MOST],
}

/// Whether it is a seed.
pub fn check(seed: &[u8]) -> Result<(), Failed> {
    match seed.len() {
        ..=MOST => Ok(()),
        length => {
            Err(Failed::new(FailureKind::Invalid, format!("a seed of {length} bytes is too long: at most {MOST}")))
        }
    }
}

/// Mixes `seed` in as that many bits that nobody knows, and has the generator begin anew with them.
pub fn add(seed: &[u8]) -> io::Result<()> {
    if seed.is_empty() {
        return Ok(());
    }
    let device = File::options().write(true).open("/dev/urandom")?;
    let mut info = PoolInfo { entropy_count: 8 * seed.len() as i32, buf_size: seed.len() as i32, buf: [0; MOST] };
    info.buf[..seed.len()].copy_from_slice(seed);
    // SAFETY: the kernel reads `buf_size` bytes of `buf`, which `check` has bounded, and writes nothing.
    unsafe { ioctl(&device, Setter::<ADD_ENTROPY, PoolInfo>::new(info))? };
    // SAFETY: it has no argument.
    unsafe { ioctl(&device, NoArg::<RESEED>::new())? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_as_in_linux_random_h() {
        assert_eq!((ADD_ENTROPY, RESEED), (0x4008_5203, 0x5207));
    }

    #[test]
    fn the_kernel_takes_a_seed() {
        // True randomness would be needed to claim entropy: here it is the kernel's own.
        let mut seed = [0; 32];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).unwrap();
        match add(&seed) {
            Err(error) if !rustix::process::geteuid().is_root() => {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            }
            added => added.unwrap(),
        }
        assert!(check(&[0; MOST]).is_ok() && check(&[0; MOST + 1]).is_err());
    }
}
