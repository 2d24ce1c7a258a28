//! One machine's processors on KVM, and its memory as KVM sees it.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use purlin_arch::x86_64::cpuid::CpuidEntry;
use purlin_engine::{EngineError, Kick, Vcpu, Vm, VmConfig, memory::GuestRam};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{
    cpuid,
    engine::Host,
    host_error,
    kick::Kicker,
    routes::{self, LevelRoutes, Message},
    run_page::RunPage,
    vcpu::KvmVcpu,
};

/// Where Intel's VMX keeps a page table for guests without paging, on processors that lack "unrestricted guest", and
/// the three pages after it a task state segment for real mode. Above the local APICs, below the firmware: no
/// machine of ours has anything there.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

/// Delivery modes of a message (SDM vol. 3A 11.11.2).
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_INIT: u32 = 5 << 8;

/// One machine's processors.
pub(crate) struct KvmVm {
    shared: Arc<Shared>,
    vcpus: Mutex<Vec<Option<NewVcpu>>>,
    kickers: Vec<Arc<Kicker>>,
    tsc_khz: u32,
}

/// A vCPU that nobody has taken yet.
struct NewVcpu {
    fd: VcpuFd,
    cpuid: Vec<CpuidEntry>,
}

/// What a machine's vCPUs share.
pub(crate) struct Shared {
    fd: VmFd,
    pub(crate) host: Arc<Host>,
    /// Kept mapped for as long as KVM may reach it, that is until the last vCPU is gone.
    pub(crate) memory: Arc<GuestRam>,
    routes: Mutex<LevelRoutes>,
    /// Level of the 8259's INTR output.
    extint: AtomicBool,
}

impl KvmVm {
    pub(crate) fn create(kvm: &Kvm, host: Arc<Host>, config: VmConfig) -> Result<Arc<Self>, EngineError> {
        let fd = kvm.create_vm().map_err(host_error("KVM_CREATE_VM"))?;
        reserve_vmx_pages(&fd)?;
        map_memory(&fd, &config.memory)?;
        split_irqchip(&fd)?;

        let mut vcpus = Vec::new();
        let mut kickers = Vec::new();
        for (index, wanted) in (0..).zip(&config.cpuid) {
            let vcpu = create_vcpu(&fd, index, cpuid::intersect(wanted, &host.cpuid))?;
            let page =
                RunPage::map(&vcpu.fd).map_err(|e| EngineError::Host { what: "mmap of a vCPU", source: e.into() })?;
            kickers.push(Kicker::new(page));
            vcpus.push(Some(vcpu));
        }
        let tsc_khz = match vcpus.first() {
            Some(Some(vcpu)) => vcpu.fd.get_tsc_khz().map_err(host_error("KVM_GET_TSC_KHZ"))?,
            _ => return Err(EngineError::Unavailable("a machine has at least one CPU".into())),
        };
        let shared =
            Shared { fd, host, memory: config.memory, routes: Mutex::default(), extint: AtomicBool::new(false) };
        Ok(Arc::new(Self { shared: Arc::new(shared), vcpus: Mutex::new(vcpus), kickers, tsc_khz }))
    }
}

/// Tells KVM which guest physical pages it may use for itself.
fn reserve_vmx_pages(fd: &VmFd) -> Result<(), EngineError> {
    if fd.check_extension(Cap::SetIdentityMapAddr) {
        fd.set_identity_map_address(IDENTITY_MAP).map_err(host_error("KVM_SET_IDENTITY_MAP_ADDR"))?;
    }
    if fd.check_extension(Cap::SetTssAddr) {
        fd.set_tss_address(TSS).map_err(host_error("KVM_SET_TSS_ADDR"))?;
    }
    Ok(())
}

/// Gives KVM each region of guest memory as a slot.
fn map_memory(fd: &VmFd, memory: &GuestRam) -> Result<(), EngineError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|e| EngineError::Host {
            what: "guest memory has no host address",
            source: std::io::Error::other(e),
        })?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is one mapping of guest memory, which stays where it is while `Shared` holds it.
        unsafe { fd.set_user_memory_region(region) }.map_err(host_error("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Local APICs in the kernel, everything else above the seam; APIC IDs of 32 bits in messages and saved states.
fn split_irqchip(fd: &VmFd) -> Result<(), EngineError> {
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = routes::CAPACITY as u64;
    fd.enable_cap(&split).map_err(host_error("KVM_CAP_SPLIT_IRQCHIP"))?;

    let mut x2apic = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
    x2apic.args[0] = u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
    fd.enable_cap(&x2apic).map_err(host_error("KVM_CAP_X2APIC_API"))
}

fn create_vcpu(vm: &VmFd, index: u64, cpuid: Vec<CpuidEntry>) -> Result<NewVcpu, EngineError> {
    let fd = vm.create_vcpu(index).map_err(host_error("KVM_CREATE_VCPU"))?;
    if vm.check_extension_raw(u64::from(KVM_CAP_ENFORCE_PV_FEATURE_CPUID)) > 0 {
        // The MSRs of paravirtual features that CPUID does not offer are refused: they would hold state that no
        // saved form has.
        let mut enforce = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
        enforce.args[0] = 1;
        fd.enable_cap(&enforce).map_err(host_error("KVM_CAP_ENFORCE_PV_FEATURE_CPUID"))?;
    }
    fd.set_cpuid2(&cpuid::to_kvm(&cpuid)?).map_err(host_error("KVM_SET_CPUID2"))?;
    Ok(NewVcpu { fd, cpuid })
}

impl Vm for KvmVm {
    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let vcpu = lock(&self.vcpus).get_mut(index as usize).and_then(Option::take);
        let NewVcpu { fd, cpuid } =
            vcpu.ok_or_else(|| EngineError::Unavailable(format!("there is no vCPU {index}, or it was taken before")))?;
        Ok(Box::new(KvmVcpu::new(index, fd, cpuid, self.kickers[index as usize].clone(), self.shared.clone())))
    }

    fn deliver_msi(&self, address: u64, data: u32) {
        self.shared.deliver(Message { address, data });
    }

    fn set_extint(&self, high: bool) {
        let was = self.shared.extint.swap(high, Ordering::SeqCst);
        if high && !was {
            self.kickers[0].nudge();
        }
    }

    fn nmi(&self, index: u32) {
        // KVM_NMI waits until the vCPU has left the guest; a message does not.
        self.shared.deliver(Message { address: routes::physical_destination(index), data: DELIVERY_NMI });
    }

    /// # Panics
    /// If there is no vCPU `index`.
    fn kicker(&self, index: u32) -> Arc<dyn Kick> {
        self.kickers[index as usize].clone()
    }

    fn clock_ns(&self) -> u64 {
        self.shared.fd.get_clock().map_or(0, |clock| clock.clock)
    }

    fn set_clock_ns(&self, ns: u64) {
        let clock = kvm_clock_data { clock: ns, ..Default::default() };
        if let Err(error) = self.shared.fd.set_clock(&clock) {
            tracing::error!(%error, "KVM_SET_CLOCK failed: the guest's clock makes a step");
        }
    }

    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
}

impl Shared {
    /// Level of the 8259's INTR output.
    pub(crate) fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    /// Delivers a message; one that no local APIC takes is lost.
    fn deliver(&self, message: Message) {
        if message.is_level() {
            self.expect_eoi(message);
        }
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        if let Err(error) = self.fd.signal_msi(msi) {
            tracing::debug!(%error, ?message, "a message-signalled interrupt was lost");
        }
    }

    /// Makes KVM report the EOI of a level-triggered message.
    pub(crate) fn expect_eoi(&self, message: Message) {
        // Held over the ioctl: two threads that learn a message each must not set their tables in the other order.
        let mut routes = lock(&self.routes);
        if let Some(table) = routes.learn(message)
            && let Err(error) = self.fd.set_gsi_routing(&table)
        {
            tracing::error!(%error, ?message, "KVM_SET_GSI_ROUTING failed: a level-triggered interrupt will not end");
        }
    }

    /// Resets the processor with the local APIC `id`, at its next instruction.
    pub(crate) fn init(&self, id: u32) {
        self.deliver(Message { address: routes::physical_destination(id), data: DELIVERY_INIT });
    }
}

/// Locks; what these mutexes guard is never left half changed, so a panic elsewhere does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
