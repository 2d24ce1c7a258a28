//! The child process.

use std::{
    arch::asm,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
};

use super::shared::{MAX_CODE, Shared, Slot};
use crate::{
    layout::{CODE_BYTES, DATA_BYTES, FILLER, FRAMES, PAGE, code_offset, mappings},
    segments,
    xsave::at,
};

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
/// The frames, all writable.
static FRAMES_AT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// Whether the bases of FS and GS can be read.
static BASED: AtomicBool = AtomicBool::new(false);

const STACK: usize = 256 << 10;

/// NT, AC and ID in RFLAGS: they would stay from one case to the next, or harm the handler.
const STICKY: u64 = 1 << 14 | 1 << 18 | 1 << 21;

/// The child's life. No allocation, no lock: other threads of the parent may have held any.
pub fn main(shared: &'static Shared, frames: i32, processor: u32) -> ! {
    SHARED.store(std::ptr::from_ref(shared).cast_mut(), Ordering::SeqCst);
    // SAFETY: in a process of its own, of which nothing but this function and the handler runs from now on. The fixed
    // addresses are not the process's own: the kernel puts nothing there unless asked.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        stay_on(processor);
        shared.control.set_progress(1);
        map(frames);
        shared.control.set_progress(2);
        BASED.store(bases_are_readable(), Ordering::SeqCst);
        catch_signals();
        shared.control.set_progress(3);
        load_segments();
        shared.control.set_progress(4);
        asm!("int3");
    }
    unreachable!()
}

/// Linux says so in the second word of its capabilities (asm/hwcap2.h).
pub fn bases_are_readable() -> bool {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 }
}

fn die(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { asm!("syscall", in("rax") libc::SYS_exit_group, in("rdi") status, options(noreturn)) }
}

/// User code can tell which processor it runs on: it is to be the same each time.
unsafe fn stay_on(processor: u32) {
    // SAFETY: the kernel reads the set, of which all zeroes is an empty one.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

unsafe fn map(frames: i32) {
    // SAFETY: see `main`. MAP_POPULATE: no case is to see a page that is not there yet, though the kernel would bring
    // it: the error code of a refused store would differ.
    unsafe {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let all = libc::mmap(std::ptr::null_mut(), FRAMES * PAGE as usize, rw, flags, frames, 0);
        if all == libc::MAP_FAILED {
            die(10);
        }
        std::ptr::write_bytes(all.cast::<u8>().add(DATA_BYTES), FILLER, CODE_BYTES);
        FRAMES_AT.store(all.cast(), Ordering::SeqCst);
        for m in mappings() {
            let mut protection = libc::PROT_READ;
            protection |= if m.writable { libc::PROT_WRITE } else { 0 };
            protection |= if m.executable { libc::PROT_EXEC } else { 0 };
            let (address, offset) = (m.linear as *mut libc::c_void, (m.frame as u64 * PAGE) as libc::off_t);
            let flags = flags | libc::MAP_FIXED_NOREPLACE;
            if libc::mmap(address, PAGE as usize, protection, flags, frames, offset) != address {
                die(11);
            }
        }
    }
}

unsafe fn catch_signals() {
    // SAFETY: see `main`. The stack is mapped here and stays.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let stack = libc::mmap(std::ptr::null_mut(), STACK, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK };
        if stack == libc::MAP_FAILED || libc::sigaltstack(&alternate, std::ptr::null_mut()) != 0 {
            die(12);
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                die(13);
            }
        }
    }
}

/// Makes the LDT, and loads the segment registers with what a case finds there.
///
/// From here on libc must not be called where it may use thread-local storage.
unsafe fn load_segments() {
    #[repr(C)]
    struct UserDesc {
        entry: u32,
        base: u32,
        limit: u32,
        flags: u32,
    }
    for (entry, segments::Entry { base, limit, bits }) in segments::LDT.into_iter().enumerate() {
        let desc = UserDesc { entry: entry as u32, base, limit, flags: bits };
        const WRITE: i32 = 0x11;
        // SAFETY: the kernel reads the descriptor.
        if unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const desc, size_of::<UserDesc>()) } != 0 {
            die(14);
        }
    }
    // SAFETY: see above.
    unsafe { reset_segments() };
}

/// DS, ES, FS and GS as a case finds them.
#[inline(always)]
unsafe fn reset_segments() {
    // SAFETY: the descriptors are there, and 64-bit code does not use DS and ES. Nothing in the child uses FS.
    unsafe {
        asm!(
            "mov fs, {fs:e}", "mov gs, {gs:e}", "mov ds, {ds:e}", "mov es, {ds:e}",
            fs = in(reg) u32::from(segments::FS),
            gs = in(reg) u32::from(segments::GS),
            ds = in(reg) u32::from(segments::DATA32),
            options(nostack, preserves_flags),
        );
    }
}

/// ES, DS, FS and GS, and the bases of the last two, which signals leave as they were.
#[inline(always)]
unsafe fn data_segments(based: bool) -> ([u16; 4], [u64; 2]) {
    let (es, ds, fs, gs): (u32, u32, u32, u32);
    let mut bases = [0u64; 2];
    // SAFETY: only reads registers; `based` says that the host has the instructions and Linux lets us use them.
    unsafe {
        asm!(
            "mov {es:e}, es", "mov {ds:e}, ds", "mov {fs:e}, fs", "mov {gs:e}, gs",
            es = out(reg) es, ds = out(reg) ds, fs = out(reg) fs, gs = out(reg) gs,
            options(nomem, nostack, preserves_flags),
        );
        if based {
            asm!(
                "rdfsbase {fs}", "rdgsbase {gs}",
                fs = out(reg) bases[0], gs = out(reg) bases[1],
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    ([es, ds, fs, gs].map(|selector| selector as u16), bases)
}

/// The order of the general registers in a signal frame, by their numbers in the encoding.
const ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Between two cases: takes the end of one, begins the next.
extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid frame, whose `fpregs` is an XSAVE area with the host's components. Alignment
    // checks, which a case may have switched on, are off before anything here can be unaligned.
    unsafe {
        asm!("pushfq", "and dword ptr [rsp], {kept}", "popfq", kept = const !(STICKY as i32));
        let based = BASED.load(Ordering::Relaxed);
        let segments = data_segments(based);
        reset_segments();
        let context = &mut *context.cast::<libc::ucontext_t>();
        let shared = &*SHARED.load(Ordering::Relaxed);
        let (next, count) = (NEXT.load(Ordering::Relaxed), COUNT.load(Ordering::Relaxed));
        if next < count {
            finish(&mut *shared.slot(next), context, segments);
            shared.control.set_progress(next + 1);
        }
        let next = if next + 1 < count {
            next + 1
        } else {
            COUNT.store(shared.control.next_batch(), Ordering::Relaxed);
            0
        };
        NEXT.store(next, Ordering::Relaxed);
        begin(&*shared.slot(next), context);
    }
}

unsafe fn frames() -> *mut u8 {
    FRAMES_AT.load(Ordering::Relaxed)
}

/// Where in the frames the code of a case lies.
fn code_at(entry: u64) -> usize {
    DATA_BYTES + code_offset(entry) as usize
}

unsafe fn finish(slot: &mut Slot, context: &libc::ucontext_t, segments: ([u16; 4], [u64; 2])) {
    let machine = &context.uc_mcontext;
    let ([es, ds, fs, gs], bases) = segments;
    let others = machine.gregs[libc::REG_CSGSFS as usize] as u64;
    slot.selectors = [es, others as u16, (others >> 48) as u16, ds, fs, gs];
    slot.bases = bases;
    for (value, at) in slot.gpr.iter_mut().zip(ORDER) {
        *value = machine.gregs[at as usize] as u64;
    }
    slot.rip = machine.gregs[libc::REG_RIP as usize] as u64;
    slot.rflags = machine.gregs[libc::REG_EFL as usize] as u64;
    slot.vector = machine.gregs[libc::REG_TRAPNO as usize] as u64;
    slot.error = machine.gregs[libc::REG_ERR as usize] as u64;
    slot.address = machine.gregs[libc::REG_CR2 as usize] as u64;
    // SAFETY: see `handler`; the frames are as long.
    unsafe {
        std::ptr::copy_nonoverlapping(machine.fpregs.cast::<u8>(), slot.area.0.as_mut_ptr(), slot.area_len);
        std::ptr::copy_nonoverlapping(frames(), slot.memory.as_mut_ptr(), DATA_BYTES);
        let room = FRAMES * PAGE as usize - code_at(slot.entry);
        std::ptr::write_bytes(frames().add(code_at(slot.entry)), FILLER, slot.code_len.min(room));
    }
}

unsafe fn begin(slot: &Slot, context: &mut libc::ucontext_t) {
    let machine = &mut context.uc_mcontext;
    for (value, at) in slot.gpr.iter().zip(ORDER) {
        machine.gregs[at as usize] = *value as i64;
    }
    machine.gregs[libc::REG_RIP as usize] = slot.rip as i64;
    machine.gregs[libc::REG_EFL as usize] = slot.rflags as i64;
    machine.gregs[libc::REG_CSGSFS as usize] = i64::from(slot.cs) | i64::from(slot.ss) << 48;
    // SAFETY: see `handler`; the frames are as long. The bytes between LEGACY_END and HEADER, and those behind the last
    // component, are the kernel's own.
    unsafe {
        let area = machine.fpregs.cast::<u8>();
        let from = slot.area.0.as_ptr();
        std::ptr::copy_nonoverlapping(from, area, at::LEGACY_END);
        std::ptr::copy_nonoverlapping(from.add(at::HEADER), area.add(at::HEADER), slot.area_len - at::HEADER);
        std::ptr::copy_nonoverlapping(slot.memory.as_ptr(), frames(), DATA_BYTES);
        let room = FRAMES * PAGE as usize - code_at(slot.entry);
        let len = slot.code_len.min(room).min(MAX_CODE);
        std::ptr::copy_nonoverlapping(slot.code.as_ptr(), frames().add(code_at(slot.entry)), len);
    }
}
