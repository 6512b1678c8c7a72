//! What was measured, line by line, each with what it aims at.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::report::{median, number};

/// What a value should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aim {
    /// Not less.
    AtLeast(f64),
    /// Not more.
    AtMost(f64),
    /// It is only told.
    None,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it is.
    pub what: String,
    /// How much, or None where it could not be measured.
    pub value: Option<f64>,
    /// In what; empty for a ratio.
    pub unit: &'static str,
    /// What it should be.
    pub aim: Aim,
}

impl Row {
    /// A value that is only told: the median of samples.
    pub fn told(what: impl Into<String>, samples: &[f64], unit: &'static str) -> Row {
        Row::aimed(what, samples, unit, Aim::None)
    }

    /// A median that has an aim.
    pub fn aimed(what: impl Into<String>, samples: &[f64], unit: &'static str, aim: Aim) -> Row {
        Row {
            what: what.into(),
            value: median(samples),
            unit,
            aim,
        }
    }

    /// Ours over theirs: the median of each round's ratio, in which both saw the same machine.
    pub fn ratio(what: impl Into<String>, ours: &[f64], theirs: &[f64], aim: Aim) -> Row {
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        Row::aimed(what, &ratios, "", aim)
    }

    /// Whether the aim is met; a value that is missing meets none.
    pub fn holds(&self) -> bool {
        match (self.aim, self.value) {
            (Aim::None, value) => value.is_some(),
            (Aim::AtLeast(least), Some(value)) => value >= least,
            (Aim::AtMost(most), Some(value)) => value <= most,
            (_, None) => false,
        }
    }

    fn verdict(&self) -> String {
        let word = if self.holds() { "ok" } else { "MISS" };
        match self.aim {
            Aim::AtLeast(least) => format!("at least {least:<6} {word}"),
            Aim::AtMost(most) => format!("at most  {most:<6} {word}"),
            Aim::None => String::new(),
        }
    }
}

/// The lines of one group, or why there are none.
#[derive(Clone, Debug)]
pub struct Group {
    /// What was done.
    pub title: String,
    /// Its lines.
    pub rows: Vec<Row>,
    /// What went wrong, or was left out and why.
    pub failure: Option<String>,
}

impl Group {
    /// Whether nothing failed and every aim is met.
    pub fn is_good(&self) -> bool {
        self.failure.is_none() && self.rows.iter().all(Row::holds)
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.title);
        for row in &self.rows {
            let value = row.value.map_or("-".to_owned(), number);
            let Row { what, unit, .. } = row;
            let line = format!("    {what:<52} {value:>8} {unit:<5} {}", row.verdict());
            let _ = writeln!(text, "{}", line.trim_end());
        }
        if let Some(failure) = &self.failure {
            let _ = writeln!(text, "    FAILED: {failure}");
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({"title": self.title, "rows": self.rows, "failure": self.failure, "ok": self.is_good()})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let row = Row::ratio("x", &[9.0, 1.0, 8.0], &[10.0, 1.0, 10.0], Aim::AtLeast(0.9));
        assert_eq!(row.value, Some(0.9));
        assert!(row.holds());
    }

    #[test]
    fn what_was_not_measured_is_not_good() {
        let row = Row::ratio("x", &[], &[], Aim::AtMost(1.0));
        let group = Group {
            title: "y".to_owned(),
            rows: vec![row],
            failure: None,
        };
        assert!(!group.is_good());
        assert!(group.text().contains("MISS"));
    }
}
