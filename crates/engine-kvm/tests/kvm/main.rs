//! The engine on this machine's /dev/kvm: one binary, which `cargo xtask nested` also runs on emulated AMD-V.

mod guests;
mod machine;
mod probe;
