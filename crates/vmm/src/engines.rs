//! Which engine runs a machine on this host.

use std::{fmt, str::FromStr, sync::Arc};

use purlin_engine::{Engine, EngineError};
use purlin_engine_kvm::{KvmEngine, Obstacle, Probed, probe};
use purlin_engine_translator::{TranslatorEngine, profile::Profile};

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// KVM where it runs kernels, else the translator.
    #[default]
    Auto,
    /// KVM, or an error that says why not.
    Kvm,
    /// The translator.
    Translator,
}

impl EngineChoice {
    /// All of them, under the names that users give.
    pub const NAMES: [(&str, Self); 3] = [("auto", Self::Auto), ("kvm", Self::Kvm), ("translator", Self::Translator)];
}

/// The user named an engine that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no engine '{0}': the engines are auto, kvm and translator")]
pub struct UnknownEngine(String);

impl FromStr for EngineChoice {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, UnknownEngine> {
        let known = Self::NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, choice)| *choice).ok_or_else(|| UnknownEngine(name.to_owned()))
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Self::NAMES.iter().find(|(_, choice)| choice == self).map_or("", |(name, _)| name))
    }
}

/// The engine that a machine will run on.
#[derive(Clone)]
pub struct Chosen {
    /// It.
    pub engine: Arc<dyn Engine>,
    /// Which it is and why, in one line for a person.
    pub why: String,
}

impl Chosen {
    /// The same engine, counting in `profile` what it does; `None` for KVM, which has no such profile.
    pub fn profiled(self, profile: Arc<Profile>) -> Result<Option<Self>, EngineError> {
        if self.engine.name() != TranslatorEngine::NAME {
            return Ok(None);
        }
        let engine = TranslatorEngine::new()?.with_profile(profile);
        Ok(Some(Self { engine: Arc::new(engine), ..self }))
    }
}

impl fmt::Debug for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chosen").field("engine", &self.engine.name()).field("why", &self.why).finish()
    }
}

/// Opens the engine that `choice` comes to on this host. Probes KVM (see [`mod@purlin_engine_kvm::probe`]) unless the
/// translator was asked for.
pub fn choose(choice: EngineChoice) -> Result<Chosen, EngineError> {
    match choice {
        EngineChoice::Auto => auto(probe()),
        EngineChoice::Kvm => kvm(probe()),
        EngineChoice::Translator => translator("asked for"),
    }
}

/// Opens the engine of this name again, which runs a machine on this host already, with a TSC of that frequency in kHz.
pub fn again(name: &str, tsc_khz: u32) -> Result<Chosen, EngineError> {
    let why = |engine| format!("engine: {engine} (as the machine that it was cloned of)");
    if name == TranslatorEngine::NAME {
        let engine = Arc::new(TranslatorEngine::with_tsc_khz(tsc_khz)?);
        return Ok(Chosen { engine, why: why("translator") });
    }
    Ok(Chosen { engine: Arc::new(KvmEngine::new()?), why: why("KVM") })
}

fn auto(probed: Result<Probed, Obstacle>) -> Result<Chosen, EngineError> {
    let obstacle = match probed {
        Ok(probed) => match open_kvm(probed) {
            Ok(chosen) => return Ok(chosen),
            Err(error) => error.to_string(),
        },
        Err(obstacle) => obstacle.to_string(),
    };
    translator(&obstacle).map_err(|error| {
        EngineError::Unavailable(format!("no engine works here. KVM: {obstacle}. Translator: {error}"))
    })
}

fn kvm(probed: Result<Probed, Obstacle>) -> Result<Chosen, EngineError> {
    open_kvm(probed.map_err(|o| EngineError::Unavailable(format!("{o}. {}", o.advice())))?)
}

fn open_kvm(probed: Probed) -> Result<Chosen, EngineError> {
    Ok(Chosen { engine: Arc::new(KvmEngine::new()?), why: format!("engine: KVM ({})", speed(probed)) })
}

/// What the probe found, in words.
pub(crate) fn speed(probed: Probed) -> String {
    format!("a probe kernel ran at {:.0}% of the host's speed", (100.0 / probed.slowdown).min(100.0))
}

fn translator(why: &str) -> Result<Chosen, EngineError> {
    Ok(Chosen { engine: Arc::new(TranslatorEngine::new()?), why: format!("engine: translator ({why})") })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use purlin_arch::x86_64::cpuid::CpuidEntry;
    use purlin_engine::{Engine, EngineError, Vm, VmConfig};
    use purlin_engine_kvm::{DeviceError, Obstacle};

    use super::{Chosen, EngineChoice, auto, choose, kvm};

    #[test]
    fn names_are_those_that_are_shown() {
        for (name, choice) in EngineChoice::NAMES {
            assert_eq!(name.parse(), Ok(choice));
            assert_eq!(choice.to_string(), name);
        }
        assert_eq!(
            "KVM".parse::<EngineChoice>().expect_err("names are lower case").to_string(),
            "there is no engine 'KVM': the engines are auto, kvm and translator"
        );
    }

    #[test]
    fn auto_takes_the_translator_where_kvm_does_not_run_kernels() {
        let obstacle = Obstacle::Instruction { instruction: "int3", said: String::new() };
        let chosen = auto(Err(obstacle)).expect("the translator runs anywhere");
        assert_eq!(chosen.engine.name(), "translator");
        assert_eq!(
            chosen.why,
            "engine: translator (this host's KVM does not run kernels: it cannot execute `int3` in ring 0)"
        );
    }

    #[test]
    fn only_the_translator_has_a_profile() {
        struct Kvm;
        impl Engine for Kvm {
            fn name(&self) -> &'static str {
                "kvm"
            }
            fn lacks(&self, _cpuid: &[CpuidEntry]) -> Vec<String> {
                Vec::new()
            }
            fn create_vm(&self, _config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
                Err(EngineError::Unavailable(String::new()))
            }
        }
        let kvm = Chosen { engine: Arc::new(Kvm), why: "asked for".into() };
        assert!(kvm.profiled(Arc::default()).expect("no failure").is_none());
        let translator = choose(EngineChoice::Translator).expect("the translator runs anywhere");
        let why = translator.why.clone();
        let profiled = translator.profiled(Arc::default()).expect("no failure").expect("a profile");
        assert_eq!((profiled.engine.name(), profiled.why), ("translator", why));
    }

    #[test]
    fn kvm_by_name_says_why_not_and_what_to_do() {
        let error = kvm(Err(Obstacle::Device(DeviceError::Forbidden))).expect_err("no permission");
        assert!(matches!(error, EngineError::Unavailable(_)));
        let text = error.to_string();
        assert!(text.starts_with("no permission to open /dev/kvm. Join the group"), "{text}");
    }
}
