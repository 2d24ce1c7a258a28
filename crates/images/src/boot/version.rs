//! The order of kernels' versions.

use std::cmp::Ordering;

/// Compares as `sort -V` does in the main: numbers as numbers, the rest as text.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (parts(a), parts(b));
    loop {
        match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            (x, y) => match compare_part(x.unwrap_or_default(), y.unwrap_or_default()) {
                Ordering::Equal => {}
                other => return other,
            },
        }
    }
}

fn compare_part(a: &str, b: &str) -> Ordering {
    let is_number = |part: &str| part.starts_with(|c: char| c.is_ascii_digit());
    if is_number(a) && is_number(b) {
        let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
        return a.len().cmp(&b.len()).then_with(|| a.cmp(b));
    }
    a.cmp(b)
}

/// `6.1.0-56-cloud` → `6`, `.`, `1`, …
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let digits = rest.chars().next()?.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        rest = after;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_is_greater() {
        for (older, newer) in [
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("5.15.0-100-generic", "6.1.0-1-generic"),
            ("6.1", "6.1.1"),
            ("6.01", "6.2"),
            ("0-rescue-abc", "5.14.0-1.el9"),
            ("", "1"),
        ] {
            assert_eq!(compare(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare(newer, older), Ordering::Greater, "{older} {newer}");
        }
        assert_eq!(compare("6.1.0-01", "6.1.0-1"), Ordering::Equal);
        assert_eq!(compare("99999999999999999999999", "99999999999999999999998"), Ordering::Greater);
    }
}
