//! What the guest does (`init.sh`), and how it is known that it has gone on with just that: step N's number is a checksum of N
//! and of the step before, so no step can be left out, done twice or done wrongly without showing in all that follow.

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

/// Steps, as the guest says them: those that were whole lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps(Vec<(usize, String)>);

impl Steps {
    /// Those in a text; it may begin and end in mid-line.
    pub fn of(text: &str) -> Self {
        let step = |line: &str| {
            let mut words = line.trim_end_matches('\r').split(' ');
            let (Some("work"), Some(number), Some(sum), None) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                return None;
            };
            Some((number.parse().ok()?, sum.to_owned())).filter(|(_, sum)| sum.len() == 64)
        };
        // What the last newline is still to come for may be a part of a number only.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        Self(whole.lines().filter_map(step).collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The number of the last one; 0 if there is none.
    pub fn last(&self) -> usize {
        self.0.last().map_or(0, |(number, _)| *number)
    }

    /// They follow each other, the first one is among `first`, and each is what it must be.
    pub fn check(&self, first: std::ops::RangeInclusive<usize>) -> Result<()> {
        let Some((begin, _)) = self.0.first() else { return Ok(()) };
        ensure!(first.contains(begin), "the work goes on with step {begin}, not with one of {first:?}");
        let sums = sums().skip(begin - 1);
        for ((number, sum), (wanted, right)) in self.0.iter().zip((*begin..).zip(sums)) {
            ensure!(*number == wanted, "step {number} comes instead of {wanted}");
            ensure!(*sum == right, "step {number} is {sum} instead of {right}");
        }
        Ok(())
    }
}

/// What each step comes to, from the first one on.
fn sums() -> impl Iterator<Item = String> {
    let mut sum = String::from("begin");
    (1_usize..).map(move |number| {
        let digest = Sha256::digest(format!("{number} {sum}"));
        sum = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        sum.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(steps: std::ops::Range<usize>) -> String {
        let lines = (1..).zip(sums()).skip(steps.start - 1).take(steps.len());
        lines.map(|(number, sum)| format!("work {number} {sum}\r\n")).collect()
    }

    /// `printf '1 begin' | sha256sum`, and with `2` and what that says again.
    #[test]
    fn steps_are_those_of_sha256sum() {
        let first: Vec<String> = sums().take(2).collect();
        let right = [
            "6c8f678ab31b30371f2e5941671172e2af573de8d600d869e8d2d74dc7629142",
            "db7545cb2dac4782bafc76ccfc7e81c1bc47a8d2869f77ed4e495ecb593607f1",
        ];
        assert_eq!(first, right);
    }

    #[test]
    fn what_follows_from_the_step_before_is_taken() {
        let steps = Steps::of(&format!("rk 4 abc\nhello\n{}work 9 ab", said(5..8)));
        assert_eq!((steps.len(), steps.last()), (3, 7));
        steps.check(3..=5).unwrap();
        assert!(steps.check(6..=9).is_err());
    }

    #[test]
    fn a_step_left_out_done_twice_or_wrong_is_found() {
        let sums: Vec<String> = sums().take(2).collect();
        let broken = [
            said(1..4) + &said(5..6),
            said(1..4) + &said(3..6),
            said(1..4).replace(&sums[1], &sums[0]),
            said(1..4).replace("work 2", "work 4"),
        ];
        for text in broken {
            let steps = Steps::of(&text);
            assert!(steps.check(1..=1).is_err(), "{text}");
        }
    }
}
