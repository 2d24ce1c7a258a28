//! Wider accesses to devices that have byte-wide registers: the bus performs them as single bytes, lowest address
//! first.

use crate::Effect;

/// Reads `data.len()` registers from `offset` on.
pub fn read(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (address, byte) in (offset..).zip(data) {
        *byte = register(address);
    }
}

/// Writes `data.len()` registers from `offset` on. The first effect counts: there is only one power to switch off.
pub fn write(offset: u64, data: &[u8], mut register: impl FnMut(u64, u8) -> Effect) -> Effect {
    let mut first = Effect::None;
    for (address, &byte) in (offset..).zip(data) {
        let effect = register(address, byte);
        if first == Effect::None {
            first = effect;
        }
    }
    first
}
