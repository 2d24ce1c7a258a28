//! A profile for programs.

use purlin_vmm::profile::Report;
use serde_json::{Map, Value, json};

use super::text::{HOTTEST, percent};

/// The report.
pub fn report(report: &Report) -> String {
    let share = |samples| percent(samples, report);
    let hottest = report.hottest.iter().take(HOTTEST).map(|hot| {
        json!({
            "mode": if hot.place.user { "user" } else { "kernel" },
            "address": hot.place.linear.map(|linear| format!("{linear:#x}")),
            "physical_address": format!("{:#x}", hot.place.physical),
            "samples": hot.samples,
            "percent": share(hot.samples),
        })
    });
    let emulated = report
        .emulated
        .iter()
        .map(|e| json!({ "instruction": e.name, "samples": e.samples, "percent": share(e.samples), "times": e.count }));
    let places = report
        .places
        .iter()
        .map(|&(place, samples)| (place.key().to_owned(), json!({ "samples": samples, "percent": share(samples) })));
    let exits = report.exits.iter().map(|&(kind, count)| (kind.key().to_owned(), json!(count)));
    let made = &report.translation;
    let value = json!({
        "vcpus": report.vcpus,
        "cpu_seconds": report.cpu_ns as f64 / 1e9,
        "samples": report.samples(),
        "places": places.collect::<Map<_, _>>(),
        "hottest": hottest.collect::<Vec<Value>>(),
        "emulated": emulated.collect::<Vec<Value>>(),
        "exits": exits.collect::<Map<_, _>>(),
        "translation": {
            "cold_blocks": made.cold,
            "hot_blocks": made.hot,
            "bytes": made.bytes,
            "replaced_blocks": made.replaced,
            "killed_blocks": made.killed,
            "cache_clears": made.cleared,
        },
    });
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::{super::text::tests::example, *};

    #[test]
    fn it_says_what_the_text_says() {
        let value: Value = serde_json::from_str(&report(&example())).unwrap();
        assert_eq!(value["samples"], 1000);
        assert_eq!(value["cpu_seconds"], 4.0);
        assert_eq!(value["places"]["user_code"], json!({ "samples": 500, "percent": 50.0 }));
        assert_eq!(value["hottest"][1]["address"], "0xffffffff81000000");
        assert_eq!(value["hottest"][0]["mode"], "user");
        let rdtsc = json!({ "instruction": "rdtsc", "samples": 200, "percent": 20.0, "times": 123_456 });
        assert_eq!(value["emulated"], json!([rdtsc]));
        assert_eq!(value["exits"], json!({ "miss": 7, "emulate": 123_456 }));
        assert_eq!(value["translation"]["bytes"], 4096);
    }
}
