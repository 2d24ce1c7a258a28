//! The child process.

use std::{
    arch::asm,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use super::shared::{MAX_CODE, Shared, Slot};
use crate::{
    layout::{CODE, CODE_BYTES, CODE_END, DATA_BYTES, FILLER, FRAMES, FS_BASE, GS_BASE, HIGH, PAGE, mappings},
    xsave::at,
};

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
/// The frames, all writable.
static FRAMES_AT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);

const STACK: usize = 256 << 10;

/// NT, AC and ID in RFLAGS: they would stay from one case to the next, or harm the handler.
const STICKY: u64 = 1 << 14 | 1 << 18 | 1 << 21;

/// The child's life. No allocation, no lock: other threads of the parent may have held any.
pub fn main(shared: &'static Shared, frames: i32) -> ! {
    SHARED.store(std::ptr::from_ref(shared).cast_mut(), Ordering::SeqCst);
    // SAFETY: in a process of its own, of which nothing but this function and the handler runs from now on. The fixed
    // addresses are not the process's own: the kernel puts nothing there unless asked.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        shared.control.set_progress(1);
        map(frames);
        shared.control.set_progress(2);
        catch_signals();
        shared.control.set_progress(3);
        load_segments();
        shared.control.set_progress(4);
        asm!("int3");
    }
    unreachable!()
}

fn die(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { asm!("syscall", in("rax") libc::SYS_exit_group, in("rdi") status, options(noreturn)) }
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

/// Gives FS and GS their bases, by descriptors: they hold in 32-bit code too. DS and ES become flat.
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
    let describe = |entry: u32, base: u64| {
        // seg_32bit, limit_in_pages, useable.
        let desc = UserDesc { entry, base: base as u32, limit: 0xf_ffff, flags: 1 | 1 << 4 | 1 << 6 };
        const WRITE: i32 = 0x11;
        // SAFETY: the kernel reads the descriptor.
        if unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const desc, size_of::<UserDesc>()) } != 0 {
            die(14);
        }
        // Index, TI (the LDT), RPL 3.
        (entry << 3 | 7) as u16
    };
    let (fs, gs) = (describe(0, FS_BASE), describe(1, GS_BASE));
    const USER_DS: u16 = 0x2b;
    // SAFETY: see above.
    unsafe {
        asm!(
            "mov fs, {fs:x}", "mov gs, {gs:x}", "mov ds, {ds:x}", "mov es, {ds:x}",
            fs = in(reg) fs, gs = in(reg) gs, ds = in(reg) USER_DS,
        );
    }
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
        let context = &mut *context.cast::<libc::ucontext_t>();
        let shared = &*SHARED.load(Ordering::Relaxed);
        let (next, count) = (NEXT.load(Ordering::Relaxed), COUNT.load(Ordering::Relaxed));
        if next < count {
            finish(&mut *shared.slot(next), context);
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
fn code_offset(entry: u64) -> usize {
    DATA_BYTES + ((entry & !HIGH).clamp(CODE, CODE_END) - CODE) as usize
}

unsafe fn finish(slot: &mut Slot, context: &libc::ucontext_t) {
    let machine = &context.uc_mcontext;
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
        let room = FRAMES * PAGE as usize - code_offset(slot.entry);
        std::ptr::write_bytes(frames().add(code_offset(slot.entry)), FILLER, slot.code_len.min(room));
    }
}

unsafe fn begin(slot: &Slot, context: &mut libc::ucontext_t) {
    let machine = &mut context.uc_mcontext;
    for (value, at) in slot.gpr.iter().zip(ORDER) {
        machine.gregs[at as usize] = *value as i64;
    }
    machine.gregs[libc::REG_RIP as usize] = slot.rip as i64;
    machine.gregs[libc::REG_EFL as usize] = slot.rflags as i64;
    let (cs, ss) = if slot.bits == 64 { (0x33, 0x2b) } else { (0x23, 0x2b) };
    machine.gregs[libc::REG_CSGSFS as usize] = cs | ss << 48;
    // SAFETY: see `handler`; the frames are as long. The bytes between LEGACY_END and HEADER, and those behind the last
    // component, are the kernel's own.
    unsafe {
        let area = machine.fpregs.cast::<u8>();
        let from = slot.area.0.as_ptr();
        std::ptr::copy_nonoverlapping(from, area, at::LEGACY_END);
        std::ptr::copy_nonoverlapping(from.add(at::HEADER), area.add(at::HEADER), slot.area_len - at::HEADER);
        std::ptr::copy_nonoverlapping(slot.memory.as_ptr(), frames(), DATA_BYTES);
        let room = FRAMES * PAGE as usize - code_offset(slot.entry);
        let len = slot.code_len.min(room).min(MAX_CODE);
        std::ptr::copy_nonoverlapping(slot.code.as_ptr(), frames().add(code_offset(slot.entry)), len);
    }
}
