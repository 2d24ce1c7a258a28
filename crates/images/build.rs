//! Builds the guest's agent (crates/agent), which images and seeds carry: a static program, of the same sources and lock
//! file as all else, whatever the profile that is being built.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};

fn main() -> io::Result<()> {
    let workspace = variable("CARGO_MANIFEST_DIR").join("../..").canonicalize()?;
    let out = variable("OUT_DIR");
    for path in ["Cargo.toml", "Cargo.lock", "crates/agent/Cargo.toml", "crates/agent/src"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    build(&workspace, &out)?;
    println!("cargo::rustc-env=PURLIN_AGENT_SOURCE={}", source(&workspace.join("crates/agent"))?);
    Ok(())
}

fn variable(name: &str) -> PathBuf {
    // Cargo sets them.
    env::var_os(name).unwrap_or_default().into()
}

/// Makes `OUT_DIR/purlin-agent`.
fn build(workspace: &Path, out: &Path) -> io::Result<()> {
    let target = env::var("TARGET").unwrap_or_default();
    let target_dir = out.join("agent");
    let mut cargo = Command::new(variable("CARGO"));
    cargo.current_dir(workspace).args(["build", "--package", "purlin-agent", "--bin", "purlin-agent"]);
    cargo.args(["--profile", "agent", "--target", &target]).arg("--target-dir").arg(&target_dir);
    // Clippy's wrapper builds nothing, and flags of a fuzzer or a coverage tool are not for the guest.
    cargo.env_remove("RUSTC_WORKSPACE_WRAPPER").env_remove("RUSTFLAGS");
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(workspace).join("\x1f"));
    let status = cargo.status()?;
    if !status.success() {
        return Err(io::Error::other(format!("the guest's agent could not be built: {status}")));
    }
    fs::copy(target_dir.join(&target).join("agent/purlin-agent"), out.join("purlin-agent"))?;
    Ok(())
}

/// Linked statically, and without this host's paths: two builds of it are the same.
fn flags(workspace: &Path) -> Vec<String> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let prefixes = [Some((workspace.to_owned(), "purlin")), home.map(|home| (home, "cargo"))];
    let remap = |(from, to): (PathBuf, &str)| format!("--remap-path-prefix={}=/{to}", from.display());
    [String::from("-Ctarget-feature=+crt-static")]
        .into_iter()
        .chain(prefixes.into_iter().flatten().map(remap))
        .collect()
}

/// A checksum of what the program is made of: unlike its own, it is the same whichever compiler makes it. What is the
/// host's only (the client) does not count.
fn source(agent: &Path) -> io::Result<String> {
    let mut files = vec![agent.join("Cargo.toml")];
    collect(&agent.join("src"), &mut files)?;
    files.retain(|path| !path.starts_with(agent.join("src/client")) && *path != agent.join("src/client.rs"));
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        let content = fs::read(&path)?;
        let name = path.strip_prefix(agent).unwrap_or(&path).to_string_lossy().into_owned();
        for part in [name.as_bytes(), &content] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { collect(&path, files)? } else { files.push(path) }
    }
    Ok(())
}
