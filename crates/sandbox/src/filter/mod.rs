//! Filters of system calls (seccomp).
//!
//! A [`Filter`] is a list of what is allowed. What is not on it ends the process: nothing that is meant needs it, so it
//! is an attack or a defect. What libraries try and can do without is refused with an error instead.

pub(crate) mod calls;

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction,
    SeccompCmpArgLen::{Dword, Qword},
    SeccompCmpOp::{Eq, MaskedEq},
    SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::Filters;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// It cannot be compiled: a mistake in the list.
    #[error("cannot compile a filter of system calls: {0}")]
    Compile(#[from] BackendError),
    /// The kernel does not take it.
    #[error("cannot install a filter of system calls: {0}")]
    Install(#[from] seccompiler::Error),
}

impl FilterError {
    /// Whether this kernel has no filters at all.
    pub(crate) fn is_unsupported(&self) -> bool {
        let error = match self {
            Self::Install(seccompiler::Error::Seccomp(error) | seccompiler::Error::Prctl(error)) => {
                error.raw_os_error()
            }
            _ => None,
        };
        matches!(error, Some(libc::ENOSYS | libc::EINVAL))
    }
}

/// A condition on one of a call's six arguments, by number.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// Its low 32 bits are this.
    Is(u8, u32),
    /// Its low 32 bits, masked, are this: number, mask, value.
    Has(u8, u32, u32),
    /// All 64 bits, masked, are this: number, mask, value.
    HasLong(u8, u64, u64),
}

impl Argument {
    fn condition(self) -> Result<SeccompCondition, BackendError> {
        match self {
            Self::Is(number, value) => SeccompCondition::new(number, Dword, Eq, value.into()),
            Self::Has(number, mask, value) => SeccompCondition::new(number, Dword, MaskedEq(mask.into()), value.into()),
            Self::HasLong(number, mask, value) => SeccompCondition::new(number, Qword, MaskedEq(mask), value),
        }
    }
}

/// A list of what is allowed; see the module.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    allowed: BTreeMap<libc::c_long, Vec<Vec<Argument>>>,
    /// By error.
    refused: BTreeMap<i32, Vec<libc::c_long>>,
}

impl Filter {
    /// Allows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows calls whatever their arguments.
    pub fn allow(mut self, calls: &[libc::c_long]) -> Self {
        self.allowed.extend(calls.iter().map(|&call| (call, Vec::new())));
        self
    }

    /// Allows a call where all `arguments` are as they say. Said several times, one of them is enough.
    pub fn allow_if(mut self, call: libc::c_long, arguments: &[Argument]) -> Self {
        match self.allowed.entry(call) {
            // Allowed whatever its arguments.
            std::collections::btree_map::Entry::Occupied(entry) if entry.get().is_empty() => {}
            entry => entry.or_default().push(arguments.to_vec()),
        }
        self
    }

    /// Allows what has to do with memory, but no code: none is mapped, and none is made of data.
    pub fn allow_data_memory(self) -> Self {
        const EXEC: u32 = libc::PROT_EXEC.cast_unsigned();
        self.allow(&[libc::SYS_brk, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_munmap])
            .allow_if(libc::SYS_mmap, &[Argument::Has(2, EXEC, 0)])
            .allow_if(libc::SYS_mprotect, &[Argument::Has(2, EXEC, 0)])
    }

    /// Refuses calls with `error` instead of ending the process.
    pub fn refuse(mut self, calls: &[libc::c_long], error: i32) -> Self {
        self.allowed.extend(calls.iter().map(|&call| (call, Vec::new())));
        self.refused.entry(error).or_default().extend(calls);
        self
    }

    /// Installs it in the calling thread, and with that in those that it starts. It cannot be taken away. The thread
    /// must have given up new privileges.
    pub fn install(self, filters: Filters) -> Result<(), FilterError> {
        let (otherwise, refuse): (_, fn(i32) -> SeccompAction) = match filters {
            Filters::Enforce => (SeccompAction::KillProcess, |error| SeccompAction::Errno(error.cast_unsigned())),
            Filters::Log => (SeccompAction::Log, |_| SeccompAction::Log),
            Filters::Off => return Ok(()),
        };
        // Of several filters the most severe verdict counts.
        for (error, calls) in self.refused {
            let rules = calls.into_iter().map(|call| (call, Vec::new())).collect();
            apply(rules, SeccompAction::Allow, refuse(error))?;
        }
        let rules = self.allowed.into_iter().map(|(call, rules)| Ok((call, compile(rules)?)));
        apply(rules.collect::<Result<_, BackendError>>()?, otherwise, SeccompAction::Allow)
    }
}

fn compile(rules: Vec<Vec<Argument>>) -> Result<Vec<SeccompRule>, BackendError> {
    rules
        .into_iter()
        .map(|rule| SeccompRule::new(rule.into_iter().map(Argument::condition).collect::<Result<_, _>>()?))
        .collect()
}

fn apply(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<(), FilterError> {
    let arch = std::env::consts::ARCH.try_into()?;
    let program: BpfProgram = SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}
