//! Shrinks a program that differs.

use anyhow::Result;

use crate::{
    case::Case,
    check::{Oracle, Verdict},
    generate::{
        Generated,
        program::{END, Link, Program},
    },
};

/// The shortest program found that still differs, from the same state.
pub fn reduce(oracle: &mut Oracle, generated: &Generated) -> Result<Generated> {
    let mut best = generated.clone();
    let mut i = best.program.items.len();
    while i > 0 {
        i -= 1;
        if best.program.items.len() == 1 {
            break;
        }
        let Some(shorter) = without(&best, i) else { continue };
        if matches!(oracle.check(&shorter.case)?, Verdict::Different { .. }) {
            best = shorter;
            i = best.program.items.len().min(i + 1);
        }
    }
    Ok(best)
}

/// The same without item `i`.
fn without(generated: &Generated, i: usize) -> Option<Generated> {
    if generated.program.items[i].link == Link::Hides {
        return None;
    }
    let mut program: Program = generated.program.clone();
    program.items.remove(i);
    for item in &mut program.items {
        if let Link::Branch(target) | Link::Immediate(target) = &mut item.link
            && *target > i
            && *target != END
        {
            *target -= 1;
        }
    }
    let (entry, code) = program.assemble()?;
    let case = Case { entry, code, ..generated.case.clone() };
    Some(Generated { case, program })
}
