//! `purlin top`: on a terminal, and without one.

mod support;

use rustix::{
    process::{Pid, Signal, kill_process},
    termios::{Winsize, tcsetwinsize},
};
use serde_json::Value;
use support::{Home, assert_one_line, terminal::OnTerminal};

/// xterm's own screen, and back.
const ENTERED: &str = "\x1b[?1049h";
const LEFT: &str = "\x1b[?25h\x1b[?1049l";

fn home() -> Home {
    let home = Home::new();
    home.ok("launch tiny busy --memory 64M --engine translator");
    home.ok("launch tiny off --memory 64M --no-start");
    home
}

#[test]
fn once() {
    let home = home();
    let rows: Vec<Value> = serde_json::from_str(&home.ok("top --json")).unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["busy", "off"]);
    // Its kernel waits for input by asking for it.
    assert!(rows[0]["cpu_percent"].as_f64().unwrap() > 0.0, "{}", rows[0]);
    assert!(rows[0]["memory"].as_u64().unwrap() > 0 && rows[0]["up_ms"].is_u64(), "{}", rows[0]);
    assert_eq!((&rows[0]["status"], &rows[0]["memory_size"]), (&"running".into(), &(64 << 20).into()));
    assert_eq!((&rows[1]["status"], &rows[1]["cpu_percent"]), (&"stopped".into(), &Value::Null));
    // Standard output is no terminal here.
    for words in ["top", "top --once"] {
        let table = home.ok(words);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            ["NAME", "STATUS", "CPU", "CAP", "SHARES", "MEMORY", "OF", "MAX", "UP"]
        );
        assert!(lines[1].starts_with("busy  running  ") && lines[1].contains(" %  "), "{table}");
        assert!(lines[2].starts_with("off   stopped  -"), "{table}");
    }
    assert_one_line(&home.run("top x"), 2, &["x"]);
}

#[test]
fn until_a_key_ends_it() {
    let home = home();
    for key in [b"q", b"\x03"] {
        let mut top = OnTerminal::start(home.purlin().arg("top"));
        top.expect(ENTERED);
        top.expect("purlin top: 2 machines");
        // The first time there is nothing to compare with, and then there is.
        top.expect("busy  running  -");
        top.expect(" %  ");
        assert!(top.is_raw());
        // A smaller terminal gets a smaller table.
        tcsetwinsize(&top.user, Winsize { ws_row: 3, ws_col: 9, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        kill_process(Pid::from_child(&top.child.0), Signal::WINCH).unwrap();
        top.expect("\x1b[Hpurlin to\x1b[K\r\n\x1b[K\r\nNAME  STA\x1b[K\x1b[J");
        top.type_keys(key);
        assert_eq!(top.end().code(), Some(0));
        top.expect(LEFT);
    }
}

#[test]
fn the_terminal_is_given_back_whatever_ends_it() {
    let home = home();
    for (signal, status) in [(Signal::TERM, Some(143)), (Signal::KILL, None)] {
        let mut top = OnTerminal::start(home.purlin().arg("top"));
        top.expect("NAME");
        kill_process(Pid::from_child(&top.child.0), signal).unwrap();
        assert_eq!(top.end().code(), status);
        top.expect(LEFT);
    }
    // The daemon and its machines end in the midst of it.
    let mut top = OnTerminal::start(home.purlin().arg("top"));
    top.expect("NAME");
    home.ok("daemon stop");
    assert_eq!(top.end().code(), Some(1));
    top.expect(LEFT);
    top.expect("purlin: ");
}
