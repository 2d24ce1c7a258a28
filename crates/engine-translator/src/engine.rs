//! The engine seam, implemented.
#![allow(unsafe_code)]

use std::{
    io,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use purlin_arch::x86_64::cpuid::{CpuidEntry, lacking};
use purlin_engine::{Code, Engine, EngineError, Kick, SavedCode, Vcpu, Vm, VmConfig, memory::WriteObserver};

use crate::{
    clock::{VmClock, host_tsc_khz, monotonic_ns},
    cpu::Cpu,
    lapic,
    mailbox::request,
    profile::Profile,
    ram::Ram,
    translate::{Backing, CodeCache, Moment, prepare},
    vcpu::{TranslatedVcpu, init_block},
    vm::{Blocks, Shared},
};

/// Room for emitted code, in bytes. Pages are allocated as they are used.
const CODE_CACHE: usize = 44 << 20;

/// The translator.
#[derive(Debug)]
pub struct TranslatorEngine {
    tsc_khz: u32,
    code_cache: usize,
    hot_code: bool,
    movable_code: bool,
    profile: Option<Arc<Profile>>,
}

impl TranslatorEngine {
    /// What it is called.
    pub const NAME: &str = "translator";

    /// The engine, if this host can run it.
    pub fn new() -> Result<Self, EngineError> {
        Self::with_tsc(host_tsc_khz)
    }

    /// The same where the frequency of the host's TSC, in kHz, is known: to measure it takes 20 ms.
    pub fn with_tsc_khz(khz: u32) -> Result<Self, EngineError> {
        Self::with_tsc(|| khz)
    }

    fn with_tsc(khz: impl FnOnce() -> u32) -> Result<Self, EngineError> {
        // LAHF in 64-bit code carries the flags past address checks, XSAVE the guest's vector registers.
        let lahf = std::arch::x86_64::__cpuid(0x8000_0001).ecx & 1 != 0;
        if !lahf || !std::is_x86_feature_detected!("xsave") {
            let why = "the translator needs a processor with XSAVE and 64-bit LAHF (made since 2011): use another host";
            return Err(EngineError::Unavailable(why.into()));
        }
        // What is asked of the host once, before a sandbox forbids it: which program this is, and where the clock is.
        prepare();
        monotonic_ns();
        let (tsc_khz, code_cache) = (khz(), CODE_CACHE);
        Ok(Self { tsc_khz, code_cache, hot_code: false, movable_code: false, profile: None })
    }

    /// With room for `bytes` of emitted code in each VM instead of the default, 44 MiB. At least 512 KiB.
    pub fn with_code_cache(mut self, bytes: usize) -> Self {
        self.code_cache = bytes.max(512 << 10);
        self
    }

    /// Translating everything for speed, from the first time on: for tests, which cannot wait until samples find it.
    #[doc(hidden)]
    pub fn with_hot_code(mut self) -> Self {
        self.hot_code = true;
        self
    }

    /// Translating code below 4 GiB like that above, so that one translation serves all linear addresses of a page: for tests,
    /// whose code is there.
    #[doc(hidden)]
    pub fn with_movable_code(mut self) -> Self {
        self.movable_code = true;
        self
    }

    /// Counting in `profile` what its VMs do.
    pub fn with_profile(mut self, profile: Arc<Profile>) -> Self {
        self.profile = Some(profile);
        self
    }
}

impl Engine for TranslatorEngine {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn lacks(&self, cpuid: &[CpuidEntry]) -> Vec<String> {
        lacking(cpuid, &host_cpuid)
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
        Ok(Arc::new(self.create(config)?))
    }
}

/// What is copied is executed by the host's processor.
fn host_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

impl TranslatorEngine {
    /// [`Engine::create_vm`], of its own type.
    pub(crate) fn create(&self, config: VmConfig) -> Result<TranslatedVm, EngineError> {
        // Who profiles wants to use perf, too.
        let backing = if self.profile.is_some() { Backing::Anonymous } else { Backing::File };
        let code = CodeCache::new(self.code_cache, backing)
            .map_err(|source| EngineError::Host { what: "cannot map memory for translated code", source })?;
        code.set_all_hot(self.hot_code);
        let shared = Arc::new(Shared {
            ram: Ram::new(config.memory),
            code,
            blocks: OnceLock::new(),
            extint: AtomicBool::new(false),
            clock: VmClock::new(self.tsc_khz),
            tsc_khz: self.tsc_khz,
            watching: Mutex::new(()),
            world: Mutex::new(()),
            low_movable: AtomicBool::new(self.movable_code),
            profile: self.profile.clone(),
        });
        let blocks = Blocks::allocate(config.cpuid.len());
        // The local APICs announce themselves in their mailboxes, which have to be there by then.
        for (index, (block, cpuid)) in blocks.iter().zip(config.cpuid).enumerate() {
            let cpu = Cpu::new(shared.clone(), index as u32, Arc::new(cpuid));
            // SAFETY: just allocated, zeroed, and freed only with the VM.
            unsafe { init_block(block.0.as_ptr(), &shared, cpu) };
            if let Some(profile) = &self.profile {
                let _ = block.mailbox().profile.set(profile.vcpu(&shared.code));
            }
        }
        let _ = shared.blocks.set(blocks.clone());
        // SAFETY: allocated and initialised just now.
        let owned = Arc::new(unsafe { Blocks::own(blocks.clone()) });
        for block in &blocks {
            // SAFETY: no vCPU has been taken yet.
            lapic::announce(unsafe { &mut *(*block.0.as_ptr()).cpu.get() });
        }
        for log in shared.ram.logs() {
            log.set_observer(Arc::new(Observer(Arc::downgrade(&shared))));
        }
        Ok(TranslatedVm { shared, blocks: owned, taken: Mutex::new(vec![false; blocks.len()]) })
    }
}

/// Tells the translations of stores that devices make.
struct Observer(std::sync::Weak<Shared>);

impl WriteObserver for Observer {
    fn written(&self, address: u64, length: u64) {
        if let Some(shared) = self.0.upgrade() {
            shared.ram.written_by_others(&shared.code, address, length);
        }
    }
}

/// One machine's processors.
pub(crate) struct TranslatedVm {
    pub(crate) shared: Arc<Shared>,
    blocks: Arc<Blocks>,
    taken: Mutex<Vec<bool>>,
}

impl TranslatedVm {
    /// [`Vm::take_vcpu`], of its own type.
    pub(crate) fn take(&self, index: u32) -> Result<TranslatedVcpu, EngineError> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(index as usize) {
            Some(taken) if !*taken => *taken = true,
            _ => return Err(EngineError::Unavailable(format!("vCPU {index} does not exist or is taken"))),
        }
        let block = self.blocks.get(index);
        let block = block.ok_or_else(|| EngineError::Unavailable(format!("vCPU {index} does not exist")))?;
        Ok(TranslatedVcpu::new(block, self.shared.clone(), self.blocks.clone()))
    }
}

impl Vm for TranslatedVm {
    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.take(index)?))
    }

    fn deliver_msi(&self, address: u64, data: u32) {
        lapic::deliver_msi(&self.shared, address, data);
    }

    fn set_extint(&self, high: bool) {
        self.shared.extint.store(high, Ordering::Release);
        if high && let Some(mailbox) = self.shared.mailbox(0) {
            mailbox.request(request::EXTINT);
        }
    }

    fn nmi(&self, index: u32) {
        if let Some(mailbox) = self.shared.mailbox(index as usize) {
            mailbox.request(request::NMI);
        }
    }

    fn kicker(&self, index: u32) -> Arc<dyn Kick> {
        Arc::new(Kicker { shared: self.shared.clone(), _blocks: self.blocks.clone(), index })
    }

    fn clock_ns(&self) -> u64 {
        self.shared.clock.now_ns()
    }

    fn set_clock_ns(&self, ns: u64) {
        self.shared.clock.set_ns(ns);
    }

    fn tsc_khz(&self) -> u32 {
        self.shared.tsc_khz
    }

    fn code(&self) -> Option<Arc<dyn Code>> {
        Some(Arc::new(CodeThen { shared: Arc::downgrade(&self.shared), moment: self.shared.code.moment() }))
    }

    fn restore_code(&self, code: &SavedCode) -> io::Result<()> {
        for physical in self.shared.code.restore(&code.file, &code.changes)?.into_iter().flatten() {
            if let Some(page) = self.shared.ram.page(physical) {
                self.shared.ram.watch(page);
            }
        }
        Ok(())
    }
}

/// The translations of a VM, if it is still there, at a moment.
struct CodeThen {
    shared: Weak<Shared>,
    moment: Moment,
}

impl Code for CodeThen {
    fn save(&self) -> io::Result<Option<SavedCode>> {
        let Some(shared) = self.shared.upgrade() else { return Ok(None) };
        let saved = shared.code.save(self.moment)?;
        Ok(saved.map(|(file, changes)| SavedCode { file, changes }))
    }

    fn refresh(&self) -> io::Result<()> {
        self.shared.upgrade().map_or(Ok(()), |shared| shared.code.refresh())
    }
}

struct Kicker {
    shared: Arc<Shared>,
    _blocks: Arc<Blocks>,
    index: u32,
}

impl Kick for Kicker {
    fn kick(&self) {
        if let Some(mailbox) = self.shared.mailbox(self.index as usize) {
            mailbox.request(request::KICK);
        }
    }
}
