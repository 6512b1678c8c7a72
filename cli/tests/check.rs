//! `firn check`.

mod common;

use common::run;

#[test]
fn the_table_has_all_core_features_and_a_summary() {
    let said = run(&["check"]);
    assert!(matches!(said.code, Some(0 | 1)), "{said:?}");
    for name in [
        "ptrace_seize",
        "pidfd_store",
        "clone3_set_tid",
        "vdso_syscall",
    ] {
        assert!(said.out.contains(name), "{name} is not in\n{}", said.out);
    }
    assert!(!said.out.contains("tcp_repair"), "that is for --all");
    let good = said.out.lines().last().unwrap().starts_with("Looks good.");
    assert_eq!(said.code == Some(0), good, "{said:?}");
}

#[test]
fn all_of_it_is_there_for_programs_too() {
    let json = run(&["check", "--all", "--json"]).json();
    let rows = json["features"].as_array().unwrap();
    let count = |group: &str| rows.iter().filter(|row| row["group"] == group).count();
    assert!(count("core") >= 15 && count("extra") >= 12 && count("experimental") >= 5);
    for row in rows {
        let told = match row["verdict"].as_str().unwrap() {
            "works" => true,
            "falls back" => row["to"].is_string() && row["cost"].is_string(),
            "missing" => row["why"].is_string() && row["cost"].is_string(),
            _ => false,
        };
        assert!(told, "{row}");
    }
}

#[test]
fn one_feature_is_a_status() {
    let said = run(&["check", "--feature", "memfd"]).good();
    assert_eq!(said.out, "memfd is supported\n");
    let said = run(&["check", "--feature", "no-such-thing"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.err.contains("there is no feature 'no-such-thing'"),
        "{said:?}"
    );
    let said = run(&["check", "--feature", "timens"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.err
            .contains("nothing in this version uses feature 'timens'"),
        "{said:?}"
    );
}

#[test]
fn the_last_feature_counts() {
    run(&["check", "--feature", "nonsense", "--feature", "memfd"]).good();
}
