//! Medians and ratios, as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::cases::{Aim, CRIU, CRIU_CACHED, FIRN, FLOOR, Metric, QUARTER};
use crate::measure::Outcome;

/// One judged aim.
struct Verdict {
    what: String,
    value: Option<f64>,
    at_most: f64,
}

impl Verdict {
    fn holds(&self) -> bool {
        self.value.is_some_and(|value| value <= self.at_most)
    }
}

/// The middle sample, or the mean of the two middle ones.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = sorted[(sorted.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

impl Outcome {
    fn median(&self, row: &str, metric: Metric) -> Option<f64> {
        median(self.rows.get(row)?.get(&metric)?)
    }

    fn judge(&self, aim: &Aim) -> Verdict {
        let ours = self.median(FIRN, aim.metric);
        let theirs = self.median(aim.against, aim.metric);
        Verdict {
            what: format!(
                "{} / {}",
                aim.metric.title().trim_end_matches(" ms"),
                aim.against
            ),
            value: ours.zip(theirs).map(|(ours, theirs)| ours / theirs),
            at_most: aim.at_most,
        }
    }

    /// Aims whose other side was measured, and the memory limit.
    fn verdicts(&self) -> Vec<Verdict> {
        let measured = |aim: &Aim| self.median(aim.against, aim.metric).is_some();
        let aims = self.case.aims();
        let mut verdicts: Vec<_> = aims
            .iter()
            .filter(|aim| measured(aim))
            .map(|aim| self.judge(aim))
            .collect();
        if let Some(at_most) = self.case.peak_limit_mib() {
            let value = self.median(FIRN, Metric::PeakRss);
            verdicts.push(Verdict {
                what: "peak MiB".to_owned(),
                value,
                at_most,
            });
        }
        verdicts
    }

    /// Whether nothing failed and every aim holds.
    pub fn is_good(&self) -> bool {
        self.failures.is_empty() && self.verdicts().iter().all(Verdict::holds)
    }

    /// The case as text.
    pub fn table(&self, title: &str) -> String {
        let mut text = format!("{title}\n");
        let columns: Vec<_> = Metric::ALL
            .into_iter()
            .filter(|metric| {
                self.rows
                    .keys()
                    .any(|row| self.median(row, *metric).is_some())
            })
            .collect();
        line(
            &mut text,
            "",
            columns.iter().map(|metric| metric.title().to_owned()),
        );
        for row in [FIRN, QUARTER, CRIU, CRIU_CACHED, FLOOR] {
            if !self.rows.contains_key(row) {
                continue;
            }
            let cell = |metric: &Metric| self.median(row, *metric).map_or("-".to_owned(), number);
            line(&mut text, row, columns.iter().map(cell));
        }
        for verdict in self.verdicts() {
            let value = verdict.value.map_or("not measured".to_owned(), number);
            let word = if verdict.holds() { "ok" } else { "MISS" };
            let Verdict { what, at_most, .. } = verdict;
            let _ = writeln!(
                text,
                "    {what:<24} {value:>8}   at most {at_most:<5} {word}"
            );
        }
        for (row, failure) in &self.failures {
            let _ = writeln!(text, "    {row} FAILED: {failure}");
        }
        text
    }

    /// The case as JSON: raw samples, medians and verdicts.
    pub fn json(&self, title: &str) -> Value {
        let medians: serde_json::Map<_, _> = self
            .rows
            .iter()
            .map(|(row, samples)| {
                let of_row = samples
                    .iter()
                    .map(|(metric, s)| (metric.title(), json!(median(s))));
                (
                    (*row).to_owned(),
                    of_row.map(|(k, v)| (k.to_owned(), v)).collect(),
                )
            })
            .collect();
        let aims: Vec<_> = self
            .verdicts()
            .iter()
            .map(|v| json!({"what": v.what, "value": v.value, "at_most": v.at_most, "ok": v.holds()}))
            .collect();
        json!({"title": title, "medians": medians, "aims": aims, "measured": self})
    }
}

fn line(text: &mut String, head: &str, cells: impl Iterator<Item = String>) {
    let _ = write!(text, "    {head:<12}");
    for cell in cells {
        let _ = write!(text, " {cell:>11}");
    }
    text.push('\n');
}

/// Three digits or so, whatever the size.
pub fn number(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::Case;
    use std::collections::BTreeMap;

    fn outcome(ours: &[f64], theirs: &[f64]) -> Outcome {
        let row = |samples: &[f64]| BTreeMap::from([(Metric::Dump, samples.to_vec())]);
        let rows = BTreeMap::from([(FIRN, row(ours)), (CRIU, row(theirs))]);
        Outcome {
            case: Case::C,
            rows,
            failures: BTreeMap::new(),
        }
    }

    #[test]
    fn median_of_odd_even_and_nothing() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn ratio_of_medians_decides() {
        assert!(outcome(&[3.0, 90.0, 3.0], &[10.0, 10.0, 1.0]).is_good());
        let missed = outcome(&[4.0], &[10.0]);
        assert!(!missed.is_good());
        assert!(missed.table("title").contains("MISS"));
    }

    #[test]
    fn failure_is_never_good() {
        let mut failed = outcome(&[1.0], &[10.0]);
        failed.failures.insert(FIRN, "it fell over".to_owned());
        assert!(!failed.is_good());
        assert!(failed.table("title").contains("it fell over"));
    }
}
