//! `firn check`: a table of what works here.

use firn_engine::check::{Feature, Group, UNUSED_OF_CRIU, Verdict};
use serde_json::{Value, json};

use crate::args::CheckArgs;
use crate::output::{FAILED, Failure};

/// Probes what was asked for; status 0 says that all of it is served.
pub fn run(args: &CheckArgs) -> Result<u8, Failure> {
    crate::log::start(&crate::log::Settings {
        file: args.common.log.log_file.as_deref(),
        work_dir: &args.common.work_dir(),
        verbosity: args.common.log.verbosity,
        with_pid: false,
    })?;
    match &args.feature {
        Some(name) => one(name, args.common.log.json),
        None => table(args),
    }
}

fn one(name: &str, json: bool) -> Result<u8, Failure> {
    let feature = Feature::from_name(name).ok_or_else(|| unknown(name))?;
    let verdict = feature.probe();
    let works = verdict == Verdict::Works;
    if json {
        let answer = json!({"command": "check", "ok": works, "features": [row(feature, &verdict)]});
        return tell(&answer.to_string(), works);
    }
    let answer = match verdict {
        Verdict::Works => format!("{name} is supported"),
        Verdict::FallsBack { to, cost } => {
            format!("{name} is not supported; instead: {to} ({cost})")
        }
        Verdict::Missing { why, cost } => format!("{name} is not supported: {why} ({cost})"),
    };
    tell(&answer, works)
}

/// Prints the answer; the status says whether it is a good one.
fn tell(answer: &str, good: bool) -> Result<u8, Failure> {
    crate::print(format!("{answer}\n").as_bytes())?;
    Ok(u8::from(!good))
}

fn unknown(name: &str) -> Failure {
    if UNUSED_OF_CRIU.contains(&name) {
        return Failure::new(
            "unsupported",
            format!("nothing in this version uses feature '{name}'"),
        );
    }
    let names: Vec<&str> = Feature::ALL.iter().map(|feature| feature.name()).collect();
    // CRIU ends with 1, not with the status of a wrong command line, and scripts rely on it.
    Failure {
        code: FAILED,
        ..Failure::usage(format!("there is no feature '{name}'"))
    }
    .hint(format!("features: {}", names.join(" ")))
}

fn table(args: &CheckArgs) -> Result<u8, Failure> {
    let wanted = |group| match group {
        Group::Core => true,
        Group::Extra => args.extra || args.all,
        Group::Experimental => args.experimental || args.all,
    };
    let mut rows = Vec::new();
    for feature in Feature::ALL
        .iter()
        .copied()
        .filter(|feature| wanted(feature.group()))
    {
        rows.push((feature, feature.probe()));
    }
    let good = rows.iter().all(|(_, verdict)| verdict.is_served());
    if args.common.log.json {
        let list: Vec<Value> = rows
            .iter()
            .map(|(feature, verdict)| row(*feature, verdict))
            .collect();
        let answer = json!({"command": "check", "ok": good, "features": list});
        return tell(&answer.to_string(), good);
    }
    tell(&format!("{}{}", render(&rows), summary(&rows, args)), good)
}

fn row(feature: Feature, verdict: &Verdict) -> Value {
    let mut row = json!({
        "name": feature.name(),
        "what": feature.what(),
        "group": group(feature.group()),
    });
    match verdict {
        Verdict::Works => row["verdict"] = json!("works"),
        Verdict::FallsBack { to, cost } => {
            row["verdict"] = json!("falls back");
            row["to"] = json!(to);
            row["cost"] = json!(cost);
        }
        Verdict::Missing { why, cost } => {
            row["verdict"] = json!("missing");
            row["why"] = json!(why);
            row["cost"] = json!(cost);
        }
    }
    row
}

fn group(group: Group) -> &'static str {
    match group {
        Group::Core => "core",
        Group::Extra => "extra",
        Group::Experimental => "experimental",
    }
}

fn heading(group: Group) -> &'static str {
    match group {
        Group::Core => "Every dump and restore",
        Group::Extra => "Some tasks, or speed",
        Group::Experimental => "Capabilities to come",
    }
}

fn render(rows: &[(Feature, Verdict)]) -> String {
    let mut text = String::new();
    let mut last = None;
    for (feature, verdict) in rows {
        if last != Some(feature.group()) {
            last = Some(feature.group());
            text.push_str(&format!("{}\n", heading(feature.group())));
        }
        let (mark, more) = match verdict {
            Verdict::Works => ("works", None),
            Verdict::FallsBack { to, cost } => {
                ("falls back", Some(format!("to {to}; cost: {cost}")))
            }
            Verdict::Missing { why, cost } => ("missing", Some(format!("{why}; {cost}"))),
        };
        text.push_str(&format!(
            "  {mark:<10}  {:<25} {}\n",
            feature.name(),
            feature.what()
        ));
        if let Some(more) = more {
            text.push_str(&format!("{:14}{more}\n", ""));
        }
    }
    text
}

fn summary(rows: &[(Feature, Verdict)], args: &CheckArgs) -> String {
    let missing = |core: bool| -> Vec<&str> {
        let of_kind = |feature: &Feature| (feature.group() == Group::Core) == core;
        rows.iter()
            .filter(|(feature, verdict)| of_kind(feature) && !verdict.is_served())
            .map(|(feature, _)| feature.name())
            .collect()
    };
    let (core, others) = (missing(true), missing(false));
    if !core.is_empty() {
        return format!(
            "Dump and restore do not work here without {}.",
            core.join(", ")
        );
    }
    if !others.is_empty() {
        return format!(
            "Dump and restore work here; missing: {}.",
            others.join(", ")
        );
    }
    let more = if args.all {
        ""
    } else {
        " 'firn check --all' probes more."
    };
    format!("Looks good.{more}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_falls_back_and_what_it_costs() {
        let back = Verdict::FallsBack { to: "a", cost: "b" };
        let missing = Verdict::Missing {
            why: "EPERM".to_owned(),
            cost: "c",
        };
        let rows = [
            (Feature::Kcmp, Verdict::Works),
            (Feature::Memfd, back),
            (Feature::MemfdHugetlb, missing),
        ];
        let text = render(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "Every dump and restore");
        assert!(lines[1].starts_with("  works       kcmp "));
        assert_eq!(lines[2], "Some tasks, or speed");
        assert_eq!(lines[4].trim(), "to a; cost: b");
        assert_eq!(lines[6].trim(), "EPERM; c");
    }
}
