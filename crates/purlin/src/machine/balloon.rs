//! `--balloon size=SIZE[,deflate-on-oom=on|off][,free-page-reporting=on|off]`.

use purlin_api::Balloon;

use super::quantity::parse_size;

/// Reads the option.
pub fn parse(text: &str) -> Result<Balloon, String> {
    let mut config = Balloon { size: 0, deflate_on_oom: true, free_page_reporting: true };
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("size", size)) => config.size = parse_size(size).map_err(|e| format!("'{size}': {e}"))?,
            Some(("deflate-on-oom", switch)) => config.deflate_on_oom = parse_switch(switch)?,
            Some(("free-page-reporting", switch)) => config.free_page_reporting = parse_switch(switch)?,
            _ => {
                return Err(format!(
                    "'{part}' is none of size=SIZE, deflate-on-oom=on|off, free-page-reporting=on|off"
                ));
            }
        }
    }
    Ok(config)
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{text}' is neither on nor off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balloons() {
        let default = Balloon { size: 0, deflate_on_oom: true, free_page_reporting: true };
        assert_eq!(parse("size=0"), Ok(default));
        let all = Balloon { size: 256 << 20, deflate_on_oom: false, free_page_reporting: false };
        assert_eq!(parse("free-page-reporting=off,size=256M,deflate-on-oom=off"), Ok(all));
        assert_eq!(parse("deflate-on-oom=on"), Ok(default));
        for wrong in ["", "256M", "size", "size=1", "size=0,", "deflate-on-oom=yes", "size=0 ,deflate-on-oom=on"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
