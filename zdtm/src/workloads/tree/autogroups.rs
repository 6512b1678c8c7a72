//! Nice values of autogroups, by which the scheduler weighs whole sessions.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::groups::left_in_session;
use crate::{Child, Need, Stage, Workload, sys};

pub static AUTOGROUPS: Workload = Workload::new(
    "tree/autogroups",
    "nice values of the autogroups of two sessions, one of which has lost its leader",
    autogroups,
)
// Another user may change an autogroup ten times a second, all together.
.needs(&[Need::Root, Need::File(OWN)]);

const OWN: &str = "/proc/self/autogroup";

fn autogroups(stage: &Stage) -> Result<()> {
    let before = nice()?;
    let led = stage.child(|stage| {
        sys::setsid()?;
        keep_nice(stage, "-7")
    })?;
    let (_, left) = left_in_session(stage, |stage| stage.child(|stage| keep_nice(stage, "11")))?;
    stage.ready_and_wait()?;
    let now = nice()?;
    ensure!(
        now == before,
        "nice of another session was {before}, is {now}"
    );
    [led, left].into_iter().try_for_each(Child::finish)
}

fn keep_nice(stage: &Stage, wanted: &str) -> Result<()> {
    fs::write(OWN, wanted).context("setting nice of the session's autogroup")?;
    stage.ready_and_wait()?;
    let now = nice()?;
    ensure!(
        now == wanted,
        "nice of the autogroup was {wanted}, is {now}"
    );
    Ok(())
}

/// Of `/autogroup-12 nice -7`.
fn nice() -> Result<String> {
    let text = fs::read_to_string(OWN)?;
    let nice = text.trim_end().rsplit_once(' ').context("another form")?.1;
    Ok(nice.to_owned())
}
