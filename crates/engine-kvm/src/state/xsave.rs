//! XCR0 and the XSAVE area.
//!
//! KVM's area is in the standard format with the host's offsets, which are those of the saved form.
#![allow(unsafe_code, reason = "KVM_SET_XSAVE reads as many bytes as the host's processor has state")]

use kvm_bindings::{kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use purlin_arch::x86_64::regs::xcr0;
use purlin_engine::EngineError;

use super::corrupt;
use crate::host_error;

/// What KVM_GET_XSAVE returns, in bytes. (Only AMX needs more; a guest is not given that.)
const AREA: usize = 4096;

/// The legacy region and the header (SDM vol. 1 13.4).
const LEGACY_AND_HEADER: usize = 576;

/// PKRU, and where it ends in the standard format.
const PKRU: u64 = 1 << 9;

pub(super) fn get_xcr0(fd: &VcpuFd) -> Result<u64, EngineError> {
    let xcrs = fd.get_xcrs().map_err(host_error("KVM_GET_XCRS"))?;
    let used = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    Ok(xcrs.xcrs[..used].iter().find(|x| x.xcr == 0).map_or(xcr0::X87, |x| x.value))
}

pub(super) fn set_xcr0(fd: &VcpuFd, value: u64) -> Result<(), EngineError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value };
    fd.set_xcrs(&xcrs).map_err(host_error("KVM_SET_XCRS"))
}

/// The area, as long as the components in `xcr0` need it.
pub(super) fn get(fd: &VcpuFd, xcr0: u64) -> Result<Vec<u8>, EngineError> {
    let area = fd.get_xsave().map_err(host_error("KVM_GET_XSAVE"))?;
    let bytes = area.region.iter().flat_map(|word| word.to_le_bytes());
    Ok(bytes.take(length(xcr0)).collect())
}

/// End of the last component in `xcr0` (SDM vol. 1 13.5; the offsets that all processors have so far).
fn length(xcr0: u64) -> usize {
    match xcr0 {
        _ if xcr0 & !(xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512 | PKRU) != 0 => AREA,
        _ if xcr0 & PKRU != 0 => 2696,
        _ if xcr0 & xcr0::AVX512 != 0 => 2688,
        _ if xcr0 & xcr0::AVX != 0 => 832,
        _ => LEGACY_AND_HEADER,
    }
}

pub(super) fn set(fd: &VcpuFd, saved: &[u8]) -> Result<(), EngineError> {
    if !(LEGACY_AND_HEADER..=AREA).contains(&saved.len()) {
        return Err(corrupt(format!("an XSAVE area of {} bytes", saved.len())));
    }
    let mut area = kvm_xsave::default();
    for (word, bytes) in area.region.iter_mut().zip(saved.chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(padded);
    }
    // SAFETY: KVM reads more than a kvm_xsave only where the guest was given dynamic features (AMX), which takes an
    // arch_prctl that nothing here calls.
    unsafe { fd.set_xsave(&area) }.map_err(host_error("KVM_SET_XSAVE"))
}

#[cfg(test)]
mod tests {
    use super::length;

    /// The offsets in `VcpuState::xsave`'s description.
    #[test]
    fn length_is_that_of_the_components_in_use() {
        assert_eq!([0b1, 0b11, 0b111, 0xe7, 0x2e7].map(length), [576, 576, 832, 2688, 2696]);
    }
}
