//! Time: the host's monotonic clock and TSC, the VM's clock, and what kvmclock shows of it.
//!
//! The VM's clock is a straight line over the host's TSC, the same one for every vCPU, so that kvmclock (which hands
//! this very line to the guest) never differs between processors and never goes back.

use std::{
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering, fence},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    cpu::Cpu,
    mem::{copy_to_guest, page_rest},
};

/// The host's CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The host's time stamp counter.
#[allow(unsafe_code)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no effect on memory, and every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's TSC in kHz: from CPUID where a hypervisor or the processor tells it, else measured.
pub fn host_tsc_khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| told_tsc_khz().unwrap_or_else(measured_tsc_khz))
}

fn told_tsc_khz() -> Option<u32> {
    use core::arch::x86_64::__cpuid;
    const HYPERVISOR: u32 = 1 << 31;
    if __cpuid(1).ecx & HYPERVISOR != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        return Some(__cpuid(0x4000_0010).eax).filter(|khz| *khz != 0);
    }
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    let (denominator, numerator, crystal) = (u64::from(leaf.eax), u64::from(leaf.ebx), u64::from(leaf.ecx));
    let hz = (crystal * numerator).checked_div(denominator)?;
    u32::try_from(hz / 1000).ok().filter(|khz| *khz != 0)
}

/// Counts for a fiftieth of a second, which is exact to about a part in a million.
fn measured_tsc_khz() -> u32 {
    let (start_ns, start) = same_moment();
    std::thread::sleep(Duration::from_millis(20));
    let (end_ns, end) = same_moment();
    let khz = u128::from(end - start) * 1_000_000 / u128::from((end_ns - start_ns).max(1));
    u32::try_from(khz).unwrap_or(u32::MAX)
}

/// The monotonic clock and the TSC at one moment: of a few tries, the one least disturbed.
fn same_moment() -> (u64, u64) {
    let tries = (0..16).map(|_| {
        let before = host_tsc();
        let ns = monotonic_ns();
        let took = host_tsc().saturating_sub(before);
        (took, ns, before + took / 2)
    });
    let (_, ns, tsc) = tries.min().unwrap_or_default();
    (ns, tsc)
}

/// A factor from TSC ticks to nanoseconds as kvmclock defines it: shift left by `shift` (right if negative), multiply
/// by `multiplier` / 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// `tsc_to_system_mul`.
    pub multiplier: u32,
    /// `tsc_shift`.
    pub shift: i8,
}

impl Scale {
    /// The factor for a TSC of this frequency.
    pub fn new(tsc_khz: u32) -> Self {
        let ticks = u64::from(tsc_khz.max(1));
        // multiplier = 10^6 / khz * 2^(32 - shift), with the shift that uses all 32 bits of it.
        let mut shift = 0i8;
        let mut ns = 1_000_000u64;
        let mut base = ticks;
        while base <= ns {
            base <<= 1;
            shift += 1;
        }
        while ns << 1 < base {
            ns <<= 1;
            shift -= 1;
        }
        Self { multiplier: ((ns << 32) / base) as u32, shift }
    }

    /// Nanoseconds in `ticks`.
    pub fn ns(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 { u128::from(ticks) << self.shift } else { u128::from(ticks >> -self.shift) };
        ((shifted * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// The VM's clock: nanoseconds since the VM started.
#[derive(Debug)]
pub struct VmClock {
    reference: Mutex<Reference>,
    /// Changes with the reference.
    generation: AtomicU32,
    scale: Scale,
}

/// A moment on both scales.
#[derive(Clone, Copy, Debug)]
struct Reference {
    tsc: u64,
    ns: u64,
}

impl VmClock {
    /// A clock that starts at 0 now, on a host whose TSC has this frequency.
    pub fn new(tsc_khz: u32) -> Self {
        Self {
            reference: Mutex::new(Reference { tsc: host_tsc(), ns: 0 }),
            generation: AtomicU32::new(1),
            scale: Scale::new(tsc_khz),
        }
    }

    /// The time now.
    pub fn now_ns(&self) -> u64 {
        let Reference { tsc, ns } = self.reference();
        ns.wrapping_add(self.scale.ns(host_tsc().saturating_sub(tsc)))
    }

    /// Nanoseconds in so many ticks of the TSC.
    pub fn ns_of_ticks(&self, ticks: u64) -> u64 {
        self.scale.ns(ticks)
    }

    /// Sets the time. The vCPUs' kvmclock follows at their next [`refresh`].
    pub fn set_ns(&self, ns: u64) {
        *self.reference.lock().unwrap_or_else(PoisonError::into_inner) = Reference { tsc: host_tsc(), ns };
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn reference(&self) -> Reference {
        *self.reference.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One vCPU's view of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestClock {
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// MSR_KVM_SYSTEM_TIME_NEW.
    pub system_time: u64,
    /// MSR_KVM_WALL_CLOCK_NEW.
    pub wall_clock: u64,
    /// Version field of the guest's time structure.
    version: u32,
    /// [`VmClock::generation`] of what the guest has been told last.
    generation: u32,
}

/// `struct pvclock_vcpu_time_info` of KVM's documentation, x86/msr.
const TIME_INFO_SIZE: usize = 32;
/// Its flag for a clock that is the same on all vCPUs.
const TSC_STABLE: u8 = 1;

impl Cpu {
    /// The guest's time stamp counter.
    pub fn tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.clock.tsc_offset)
    }

    /// Makes the guest's time stamp counter read `tsc` now; IA32_TSC_ADJUST moves along (SDM vol. 3B 18.17.3).
    pub fn set_tsc(&mut self, tsc: u64) {
        let offset = tsc.wrapping_sub(host_tsc());
        let step = offset.wrapping_sub(self.clock.tsc_offset);
        self.clock.tsc_adjust = self.clock.tsc_adjust.wrapping_add(step);
        self.clock.tsc_offset = offset;
        self.tsc_changed();
    }

    /// Takes over a saved time stamp counter; the rest of [`GuestClock`] is as after reset.
    ///
    /// The machine's clocks start with [`VmClock::set_ns`]: then all of its vCPUs count on, however late each of them
    /// is restored, or they would differ from then on. If that was not called since the guest was last told of the
    /// clock, it counts on from now.
    pub fn resume_tsc(&mut self, tsc: u64) {
        let clock = &self.shared.clock;
        let started = clock.generation.load(Ordering::Acquire) != self.clock.generation;
        let start = if started { clock.reference().tsc } else { host_tsc() };
        let tsc_offset = tsc.wrapping_sub(start);
        self.clock = GuestClock { tsc_offset, version: self.clock.version, ..GuestClock::default() };
    }

    /// Writes IA32_TSC_ADJUST: the time stamp counter moves along.
    pub fn set_tsc_adjust(&mut self, adjust: u64) {
        let step = adjust.wrapping_sub(self.clock.tsc_adjust);
        self.clock.tsc_adjust = adjust;
        self.clock.tsc_offset = self.clock.tsc_offset.wrapping_add(step);
        self.tsc_changed();
    }

    fn tsc_changed(&mut self) {
        publish(self);
        crate::lapic::tsc_changed(self);
    }
}

/// Tells the guest of the VM's clock if that was set since. To be called before any vCPU runs: user code of one may
/// read the time structure of another.
pub fn refresh(cpu: &mut Cpu) {
    if cpu.shared.clock.generation.load(Ordering::Acquire) != cpu.clock.generation {
        publish(cpu);
    }
}

/// Writes the guest's time structure, if it has one. The version is odd meanwhile, so that a reader on another
/// processor starts again.
pub fn publish(cpu: &mut Cpu) {
    let shared = cpu.shared.clone();
    cpu.clock.generation = shared.clock.generation.load(Ordering::Acquire);
    if cpu.clock.system_time & 1 == 0 {
        return;
    }
    let address = cpu.clock.system_time & !1;
    let Reference { tsc, ns } = shared.clock.reference();
    let Scale { multiplier, shift } = shared.clock.scale;

    let version = cpu.clock.version.wrapping_add(1) | 1;
    let mut info = [0; TIME_INFO_SIZE];
    info[0..4].copy_from_slice(&version.to_le_bytes());
    info[8..16].copy_from_slice(&tsc.wrapping_add(cpu.clock.tsc_offset).to_le_bytes());
    info[16..24].copy_from_slice(&ns.to_le_bytes());
    info[24..28].copy_from_slice(&multiplier.to_le_bytes());
    info[28] = shift as u8;
    info[29] = TSC_STABLE;
    write_physical(cpu, address, &version.to_le_bytes());
    fence(Ordering::SeqCst);
    write_physical(cpu, address.wrapping_add(4), &info[4..]);
    fence(Ordering::SeqCst);
    cpu.clock.version = version.wrapping_add(1);
    let version = cpu.clock.version.to_le_bytes();
    write_physical(cpu, address, &version);
}

/// Writes the wall-clock structure (`struct pvclock_wall_clock`) at `address`: the time of day at which the VM's clock
/// was 0.
pub fn publish_wall_clock(cpu: &mut Cpu, address: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start = now.as_nanos().saturating_sub(u128::from(cpu.shared.clock.now_ns()));
    let (seconds, nanoseconds) = ((start / 1_000_000_000) as u32, (start % 1_000_000_000) as u32);
    // The version: odd while the rest is written, then even.
    write_physical(cpu, address, &1u32.to_le_bytes());
    write_physical(cpu, address.wrapping_add(4), &seconds.to_le_bytes());
    write_physical(cpu, address.wrapping_add(8), &nanoseconds.to_le_bytes());
    write_physical(cpu, address, &2u32.to_le_bytes());
}

/// Writes to guest physical memory; what is outside of it is lost.
fn write_physical(cpu: &mut Cpu, address: u64, data: &[u8]) {
    let shared = cpu.shared.clone();
    let (mut address, mut data) = (address, data);
    while !data.is_empty() {
        let n = page_rest(address).min(data.len());
        if let Some(page) = shared.ram.page(address) {
            let host = page.host.wrapping_add((address & 0xfff) as usize);
            copy_to_guest(host, &data[..n]);
            cpu.wrote_ram(host, n);
        }
        address = address.wrapping_add(n as u64);
        data = &data[n..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_is_exact_to_a_few_parts_in_a_billion() {
        for khz in [1, 999, 1_000_000, 1_000_001, 2_596_128, 5_000_000, u32::MAX] {
            let scale = Scale::new(khz);
            let second = scale.ns(u64::from(khz) * 1000);
            assert!(second.abs_diff(1_000_000_000) <= 2, "{khz} kHz: {second} ns, {scale:?}");
            assert!(scale.multiplier >= 1 << 31, "all bits are used: {scale:?}");
        }
    }

    #[test]
    fn the_measured_frequency_is_steady() {
        let (first, second) = (measured_tsc_khz(), measured_tsc_khz());
        assert!(first.abs_diff(second) <= first / 5000, "{first} {second}");
    }

    #[test]
    fn the_clock_follows_the_host_and_can_be_set() {
        let khz = 1_000_000;
        let clock = VmClock::new(khz);
        let first = clock.now_ns();
        assert!(clock.now_ns() >= first);
        clock.set_ns(5_000_000_000_000);
        let now = clock.now_ns();
        assert!((5_000_000_000_000..5_010_000_000_000).contains(&now), "{now}");
    }

    #[test]
    fn kvmclock_is_told_in_the_guests_memory() {
        use crate::testing::{Mode, cpus, peek};
        const AT: u64 = 0x5000;
        let mut all = cpus(Mode::Long(0), 2);
        for cpu in &mut all {
            cpu.set_tsc(u64::from(cpu.index) << 50);
            let at = AT + 0x40 * u64::from(cpu.index);
            crate::msr::write(cpu, purlin_arch::x86_64::msr::KVM_SYSTEM_TIME, at | 1).unwrap();
        }
        // What a guest computes: (system time, from the fields), by the documentation.
        let guest_time = |cpu: &Cpu| {
            let at = AT + 0x40 * u64::from(cpu.index);
            let (version, stamp, time) = (peek(cpu, at) as u32, peek(cpu, at + 8), peek(cpu, at + 16));
            let (multiplier, shift) = (peek(cpu, at + 24) as u32, (peek(cpu, at + 24) >> 32) as i8);
            assert_eq!(version % 2, 0, "not being written");
            assert_eq!(peek(cpu, at + 24) >> 40 & 0xff, 1, "TSC_STABLE");
            time + Scale { multiplier, shift }.ns(cpu.tsc().wrapping_sub(stamp))
        };
        let (first, second) = (guest_time(&all[0]), guest_time(&all[1]));
        assert!(second >= first && second - first < 100_000_000, "the same on both: {first} {second}");
        let host = all[0].shared.clock.now_ns();
        assert!(host >= second && host - second < 100_000_000, "{host} {second}");

        all[0].shared.clock.set_ns(1 << 50);
        let version = peek(&all[0], AT) as u32;
        refresh(&mut all[0]);
        assert_eq!(peek(&all[0], AT) as u32, version + 2);
        assert!(guest_time(&all[0]) >= 1 << 50);
        refresh(&mut all[0]);
        assert_eq!(peek(&all[0], AT) as u32, version + 2, "once");
        // The guest's TSC may be set: time goes on.
        crate::msr::write(&mut all[0], purlin_arch::x86_64::msr::TSC, 0).unwrap();
        let after = guest_time(&all[0]);
        assert!((1 << 50..(1 << 50) + 1_000_000_000).contains(&after), "{after}");
        // Switched off, and beyond memory: nothing is written, nothing breaks.
        crate::msr::write(&mut all[0], purlin_arch::x86_64::msr::KVM_SYSTEM_TIME, u64::MAX).unwrap();
        crate::msr::write(&mut all[0], purlin_arch::x86_64::msr::KVM_SYSTEM_TIME, 0).unwrap();
        publish(&mut all[0]);
    }

    #[test]
    fn the_wall_clock_is_when_the_vm_started() {
        use crate::testing::{Mode, cpus, peek};
        let cpu = &mut cpus(Mode::Long(0), 1)[0];
        cpu.shared.clock.set_ns(3600 * 1_000_000_000);
        crate::msr::write(cpu, purlin_arch::x86_64::msr::KVM_WALL_CLOCK, 0x6000).unwrap();
        let (version, seconds) = (peek(cpu, 0x6000) as u32, peek(cpu, 0x6000) >> 32);
        let hour_ago = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() - 3600;
        assert!(version != 0 && version % 2 == 0 && hour_ago.abs_diff(seconds) <= 2, "{seconds} {hour_ago}");
        assert!(peek(cpu, 0x6008) as u32 <= 999_999_999);
    }
}
