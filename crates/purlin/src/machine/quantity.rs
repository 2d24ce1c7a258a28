//! Numbers with units, as the command line has them.

/// `512M`: a number of KiB, MiB, GiB or TiB. A bare number would be bytes to one and MiB to the next reader; only 0
/// means the same to all, and is refused later as too small.
pub fn parse_size(text: &str) -> Result<u64, String> {
    match number_and_unit(text) {
        Some((0, None)) => Ok(0),
        Some((number, Some(shift))) => {
            number.checked_mul(1 << shift).ok_or_else(|| "that is more than any host has".into())
        }
        _ => Err("it is a whole number with K, M, G or T, such as 512M".into()),
    }
}

/// `10M`: so many KiB, MiB, GiB or TiB each second.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(rate) if rate > 0 => Ok(rate),
        _ => Err("it is bytes a second: a whole number with K, M or G, such as 10M".into()),
    }
}

/// `500`: so many each second.
pub fn parse_count(text: &str) -> Result<u64, String> {
    match number_and_unit(text) {
        Some((count, None)) if count > 0 => Ok(count),
        _ => Err("it is a whole number, such as 500".into()),
    }
}

/// A number, and the power of two that its unit stands for. `None` if the text is anything else.
fn number_and_unit(text: &str) -> Option<(u64, Option<u32>)> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "k" | "kib" => Some(10),
        "m" | "mib" => Some(20),
        "g" | "gib" => Some(30),
        "t" | "tib" => Some(40),
        "" => None,
        _ => return None,
    };
    // `parse` would take a sign.
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    Some((number, shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        assert_eq!(parse_size("64KiB"), Ok(64 << 10));
        assert_eq!(parse_size("0"), Ok(0));
        for wrong in ["", "M", "512", "-1M", "+1M", "1.5G", "1 G", "512MB", "99999999999999999999M", "16777216T", "½M"]
        {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_and_counts() {
        assert_eq!(parse_rate("10M"), Ok(10 << 20));
        assert_eq!(parse_count("500"), Ok(500));
        for wrong in ["0", "0M", "10", "-1M", "x"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
        for wrong in ["0", "5K", "-1", ""] {
            assert!(parse_count(wrong).is_err(), "{wrong}");
        }
    }
}
