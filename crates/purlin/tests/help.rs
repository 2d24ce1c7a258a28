//! What is made of the command line's own description: shells' completions and the manual.

mod support;

use std::{
    fs,
    io::Write,
    process::{Command, Output, Stdio},
};

use support::{assert_one_line, purlin};

fn script(shell: &str) -> String {
    let output = purlin().args(["completions", shell]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What bash prints that is given a program on its standard input.
fn bash(arguments: &[&str], program: &str) -> Output {
    let mut bash = Command::new("bash");
    let bash = bash.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut bash = bash.spawn().expect("bash");
    bash.stdin.take().unwrap().write_all(program.as_bytes()).unwrap();
    bash.wait_with_output().unwrap()
}

#[test]
fn bash_takes_its_script_and_completes_with_it() {
    let script = script("bash");
    let checked = bash(&["-n"], &script);
    assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
    // Bash does this at the tab key, of a word that has begun.
    let tab = |words: &str, last: usize| {
        let program = format!(
            "{script}\nCOMP_WORDS=({words}); COMP_CWORD={last}\n\
             _purlin purlin \"${{COMP_WORDS[{last}]}}\" \"${{COMP_WORDS[{last}-1]}}\"\necho \"${{COMPREPLY[@]}}\""
        );
        String::from_utf8(bash(&[], &program).stdout).unwrap()
    };
    assert_eq!(tab("purlin laun", 1), "launch\n");
    assert_eq!(tab("purlin snapshot res", 2), "restore\n");
    assert_eq!(tab("purlin launch --engine tr", 3), "translator\n");
}

#[test]
fn scripts_of_other_shells() {
    assert!(script("zsh").starts_with("#compdef purlin\n"));
    assert!(script("fish").contains("complete -c purlin "));
    let other = purlin().args(["completions", "csh"]).output().unwrap();
    assert_one_line(&other, 2, &["csh", "bash, zsh, fish"]);
}

#[test]
fn the_manual_has_a_page_for_each_verb() {
    let dir = tempfile::tempdir().unwrap();
    let man1 = dir.path().join("share/man1");
    let output = purlin().arg("man").arg(&man1).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let help = String::from_utf8(purlin().arg("--help").output().unwrap().stdout).unwrap();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // Behind more than two spaces a line goes on.
    let listed = listed.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let verbs: Vec<_> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(verbs.len() > 20, "{verbs:?}");
    for verb in verbs {
        let page = fs::read_to_string(man1.join(format!("purlin-{verb}.1"))).expect(verb);
        assert!(page.contains(&format!(".TH purlin-{verb} 1")), "{page}");
    }
    let page = |name: &str| fs::read_to_string(man1.join(name)).expect(name);
    assert!(page("purlin.1").contains("purlin\\-launch(1)"));
    assert!(page("purlin-launch.1").contains("purlin launch debian web"));
    assert!(page("purlin-snapshot-create.1").contains("Take a snapshot"));
    // What is hidden from users is hidden here.
    assert!(!page("purlin-daemon.1").contains("detached"));
    assert!(!man1.join("purlin-help.1").exists());

    fs::write(dir.path().join("file"), "").unwrap();
    let cannot = purlin().arg("man").arg(dir.path().join("file/man")).output().unwrap();
    assert_one_line(&cannot, 1, &["cannot make the directory", "file/man: "]);
}
