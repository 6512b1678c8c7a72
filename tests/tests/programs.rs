//! Real programs, each dumped and restored several times while it works.

use std::fmt::Write;
use std::path::Path;

use firn_tests::{Program, Progress, isolated};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");

fn command(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn nothing(_: &Path) {}

#[test]
fn bash_loop_writes_all_numbers() {
    isolated("bash_loop_writes_all_numbers", &["bash"], |sandbox| {
        sandbox.check_survives(&Program {
            command: command(&["bash", &format!("{PROGRAMS}/count.sh")]),
            set_up: &nothing,
            progress: Progress::File("stdout", 4000),
            rounds: 3,
            enough: None,
            results: &[],
        });
    });
}

#[test]
fn python_with_threads_child_and_database() {
    isolated(
        "python_with_threads_child_and_database",
        &["python3", "sed"],
        |sandbox| {
            sandbox.check_survives(&Program {
                command: command(&["python3", &format!("{PROGRAMS}/busy.py")]),
                set_up: &nothing,
                progress: Progress::File("progress", 5000),
                rounds: 3,
                enough: None,
                results: &["progress"],
            });
        },
    );
}

#[test]
fn perl_with_timer_and_child() {
    isolated("perl_with_timer_and_child", &["perl"], |sandbox| {
        sandbox.check_survives(&Program {
            command: command(&["perl", &format!("{PROGRAMS}/words.pl")]),
            set_up: &nothing,
            progress: Progress::File("progress", 200),
            rounds: 3,
            enough: None,
            results: &["progress"],
        });
    });
}

#[test]
fn gcc_compiles_the_same_object() {
    isolated("gcc_compiles_the_same_object", &["gcc"], |sandbox| {
        let source = long_c_file(400);
        sandbox.check_survives(&Program {
            command: command(&["gcc", "-O2", "-pipe", "-c", "long.c", "-o", "long.o"]),
            set_up: &|dir| std::fs::write(dir.join("long.c"), &source).expect("room for a file"),
            progress: Progress::CpuTicks(40),
            rounds: 3,
            enough: None,
            results: &["long.o"],
        });
    });
}

/// Functions that keep an optimiser busy, each a little different.
fn long_c_file(functions: usize) -> String {
    let mut text = String::from("static unsigned mix(unsigned a) { return a * 2654435761u; }\n");
    for n in 0..functions {
        let _ = writeln!(
            text,
            "unsigned f{n}(unsigned *v, unsigned k) {{\n  unsigned s = {n};\n  \
             for (unsigned i = 0; i < k; i++) {{\n    switch (v[i] % {modulus}) {{\n      \
             case 0: s += mix(v[i] + {n}); break;\n      case 1: s ^= v[i] << {shift}; break;\n      \
             case 2: for (unsigned j = i; j < k; j += {step}) s += v[j] * s; break;\n      \
             default: s = mix(s) - v[i];\n    }}\n  }}\n  return s;\n}}",
            modulus = n % 7 + 4,
            shift = n % 31,
            step = n % 5 + 1,
        );
    }
    text
}

#[test]
fn tar_and_zstd_make_the_same_archive() {
    isolated(
        "tar_and_zstd_make_the_same_archive",
        &["bash", "tar", "zstd"],
        |sandbox| {
            let pipeline = "tar --sort=name --mtime=@0 -cf - tree | zstd -q -15 -T2 > tree.tar.zst";
            let check = "zstd -q -t tree.tar.zst && cksum < tree.tar.zst";
            sandbox.check_survives(&Program {
                command: command(&[
                    "bash",
                    "-c",
                    &format!("set -o pipefail; {pipeline} && {check}"),
                ]),
                set_up: &text_tree,
                progress: Progress::CpuTicks(60),
                rounds: 3,
                enough: None,
                results: &["tree.tar.zst"],
            });
        },
    );
}

/// Some 8 MB of files that compress like text does.
fn text_tree(dir: &Path) {
    let mut state = 1u64;
    for number in 0..16 {
        let mut text = String::new();
        while text.len() < 500_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let _ = write!(text, "word{} {:x} ", (state >> 33) % 5000, state >> 48);
        }
        let file = dir.join(format!("tree/{}/file-{number}", number % 8));
        std::fs::create_dir_all(file.parent().expect("it has one")).expect("room for a directory");
        std::fs::write(file, text).expect("room for a file");
    }
}

#[test]
fn five_hundred_threads_reach_the_same_sum() {
    isolated("five_hundred_threads_reach_the_same_sum", &[], |sandbox| {
        sandbox.check_survives(&Program {
            command: command(&[env!("CARGO_BIN_EXE_many-threads")]),
            set_up: &nothing,
            progress: Progress::File("progress", 300),
            rounds: 3,
            enough: None,
            results: &["progress"],
        });
    });
}
