//! The processors that a guest can be given by name.

use std::{fmt, str::FromStr};

/// A processor that a guest can be given by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuModel {
    /// Every feature of the host that the engine can offer.
    Host,
    /// The x86-64-v2 level of the psABI: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA, MOVBE.
    V3,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
    V4,
}

impl CpuModel {
    /// All of them, the lowest first.
    pub const ALL: [Self; 4] = [Self::V2, Self::V3, Self::V4, Self::Host];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// There is no processor model of that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown processor model '{0}' (known: x86-64-v2, x86-64-v3, x86-64-v4, host)")]
pub struct UnknownModel(pub String);

impl FromStr for CpuModel {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<Self, UnknownModel> {
        Self::ALL.into_iter().find(|model| model.name() == name).ok_or_else(|| UnknownModel(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_error_lists_them() {
        for model in CpuModel::ALL {
            assert_eq!(model.to_string().parse(), Ok(model));
        }
        let message = "x86-64-v5".parse::<CpuModel>().unwrap_err().to_string();
        for model in CpuModel::ALL {
            assert!(message.contains(model.name()), "{message}");
        }
    }
}
