//! What a check found.

use std::fmt;

use serde::Serialize;

use super::fault::Fault;

/// What a check of a directory found.
#[derive(Debug, Default, Serialize)]
pub struct CheckReport {
    /// Number of image files that were read.
    pub images: usize,
    /// Number of processes.
    pub tasks: usize,
    /// Number of threads of all processes.
    pub threads: usize,
    /// Pages stored in this directory.
    pub pages: u64,
    /// Everything that makes the directory less than whole.
    pub problems: Vec<Problem>,
    /// What is worth knowing and wrong only under circumstances that images do not tell.
    pub remarks: Vec<Problem>,
}

/// Something wrong, and where.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// Name of the file.
    pub file: String,
    /// Index of the entry, from 0.
    pub entry: Option<u64>,
    /// Offset of the entry in the file, in bytes.
    pub offset: Option<u64>,
    /// What is wrong.
    #[serde(serialize_with = "as_text")]
    pub fault: Fault,
}

impl CheckReport {
    /// Says whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Fault::Decode(_) | Fault::Read(_) | Fault::Pages(_) = self.fault {
            // These name file and place themselves.
            return write!(f, "{}", self.fault);
        }
        f.write_str(&self.file)?;
        if let Some(entry) = self.entry {
            write!(f, ", entry {entry}")?;
        }
        if let Some(offset) = self.offset {
            write!(f, ", byte {offset}")?;
        }
        write!(f, ": {}", self.fault)
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "{problem}")?;
        }
        for remark in &self.remarks {
            writeln!(f, "note: {remark}")?;
        }
        let pages = usize::try_from(self.pages).unwrap_or(usize::MAX);
        let counts = [
            counted(self.images, "image"),
            counted(self.tasks, "task"),
            counted(self.threads, "thread"),
            counted(pages, "page"),
        ];
        let verdict = match self.problems.len() {
            0 => "whole".to_owned(),
            problems => counted(problems, "problem"),
        };
        writeln!(f, "{verdict}: {}", counts.join(", "))
    }
}

fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn as_text<S: serde::Serializer>(fault: &Fault, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(fault)
}
